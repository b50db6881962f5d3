"""Which sub-layers of a decoder run: a plan for one sequence, and the menu of plans that a model is used with.

Shapes and words: `L` layers; a sub-layer is the attention block or the MLP block of one layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from backbone.errors import PlanError
from backbone.strict_json import parse

SublayerBytes = Sequence[tuple[int, int]]
"""For each of the L layers: parameter bytes of its attention block and of its MLP block."""

MOST_LAYERS, MOST_PLANS = 10_000, 256
"""More than any model or menu has: a damaged file is not to fill the memory."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The sub-layers that run for one sequence, prompt and answer alike. Immutable and hashable.

    Build one with `full`, `skipping`, `exiting` or `evenly`, or read one with `parse`. `a <= b` says that `b` runs
    everything `a` runs; `a | b` runs what either runs; `str(plan)` is its compact form, such as `0-5,8a,9m,10-17`
    (layer 8 runs attention only, layer 9 its MLP only).

    `healed` marks the full depth with a fitted exit head, `0-17h`: it runs every layer and answers otherwise than the
    full model, which has no head but its own.

    Raises:
        PlanError: a layer outside the model, a plan that runs nothing, or the mark on a shortened one.
    """

    n_layers: int
    attention: frozenset[int]
    mlp: frozenset[int]
    healed: bool = False

    def __post_init__(self) -> None:
        for name in ("attention", "mlp"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        for layer in self.attention | self.mlp:
            if not 0 <= layer < self.n_layers:
                raise PlanError(f"layer {layer} is outside the model: it has layers 0 to {self.n_layers - 1}")
        if not self.attention | self.mlp:
            raise PlanError("a plan must run at least one sub-layer, and this one runs none")
        if self.healed and self.layers < self.n_layers:
            raise PlanError(f"the mark h stands behind all layers, as in 0-{self.n_layers - 1}h, got {self}")

    @classmethod
    def full(cls, n_layers: int) -> LayerPlan:
        """Every sub-layer runs."""
        return cls.skipping(n_layers)

    @classmethod
    def skipping(
        cls, n_layers: int, layers: Iterable[int] = (), *, attention: Iterable[int] = (), mlp: Iterable[int] = ()
    ) -> LayerPlan:
        """Everything runs but the given whole `layers`, and the given `attention` and `mlp` sub-layers."""
        whole = set(layers)
        no_attention, no_mlp = whole | set(attention), whole | set(mlp)
        if outside := sorted(layer for layer in no_attention | no_mlp if not 0 <= layer < n_layers):
            raise PlanError(f"cannot skip layer {outside[0]}: the model has layers 0 to {n_layers - 1}")
        every = frozenset(range(n_layers))
        return cls(n_layers, every - no_attention, every - no_mlp)

    @classmethod
    def exiting(cls, n_layers: int, n_run: int) -> LayerPlan:
        """The first `n_run` layers run, then the final norm and the head (early exit)."""
        return cls.skipping(n_layers, range(_checked_count(n_layers, n_run), n_layers))

    @classmethod
    def evenly(cls, n_layers: int, n_run: int, *, probe_depth: int = 1) -> LayerPlan:
        """`n_run` layers run; the skipped ones lie evenly between the first `probe_depth` layers and the last.

        Source: Unified Layer Skipping (Liu et al. 2024, arXiv 2404.06954, section 3).
        """
        n_skipped = n_layers - _checked_count(n_layers, n_run)
        candidates = range(probe_depth, n_layers - 1)
        if n_skipped > len(candidates):
            raise PlanError(
                f"cannot run {n_run} of {n_layers} layers evenly: "
                f"layers 0 to {probe_depth - 1} and the last always run, so at least {n_layers - len(candidates)} do"
            )
        return cls.skipping(
            n_layers, {candidates[int((i + 0.5) * len(candidates) / n_skipped)] for i in range(n_skipped)}
        )

    @classmethod
    def parse(cls, text: str, n_layers: int) -> LayerPlan:
        """The plan that `str(plan)` wrote, for a model of `n_layers` layers."""
        if type(n_layers) is not int or not 1 <= n_layers <= MOST_LAYERS:
            raise PlanError(f"a model has from 1 to {MOST_LAYERS} layers, got {n_layers!r:.80}")
        if not isinstance(text, str):
            raise PlanError(f"a plan is a text such as 0-5,8a,9m, got {text!r:.80}")
        attention: set[int] = set()
        mlp: set[int] = set()
        named = 0
        healed = text.rstrip().endswith("h")
        for part in (text.rstrip()[:-1] if healed else text).split(","):
            match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?([am]?)\s*", part)
            if match is None or int(match[1]) > int(match[2] or match[1]):
                raise PlanError(f"cannot read {part!r:.80} in the plan {text!r:.80}: parts look like 3, 0-5, 8a or 9m")
            first, last = (min(int(number), n_layers) for number in (match[1], match[2] or match[1]))
            named += last - first + 1
            if named > 2 * n_layers + 1:
                raise PlanError(f"the plan {text!r:.80} names more layers than twice the {n_layers} of the model")
            kind = match[3]
            if kind != "m":
                attention.update(range(first, last + 1))
            if kind != "a":
                mlp.update(range(first, last + 1))
        return cls(n_layers, frozenset(attention), frozenset(mlp), healed)

    @property
    def is_full(self) -> bool:
        """Whether this is the model as it is."""
        return not self.healed and self.layers == self.n_layers

    @property
    def layers(self) -> float:
        """How many layers run; a layer of which one sub-layer runs counts half."""
        return (len(self.attention) + len(self.mlp)) / 2

    @property
    def skipped_attention(self) -> frozenset[int]:
        return frozenset(range(self.n_layers)) - self.attention

    @property
    def skipped_mlp(self) -> frozenset[int]:
        return frozenset(range(self.n_layers)) - self.mlp

    @property
    def skipped_layers(self) -> frozenset[int]:
        """Layers of which nothing runs."""
        return self.skipped_attention & self.skipped_mlp

    @property
    def gaps(self) -> tuple[range, ...]:
        """Neighbouring layers of which nothing runs."""
        return tuple(range(run[0], run[-1] + 1) for run in _runs(dict.fromkeys(self.skipped_layers, "")))

    def without(self, *, attention: Iterable[int] = (), mlp: Iterable[int] = ()) -> LayerPlan:
        return LayerPlan(self.n_layers, self.attention - set(attention), self.mlp - set(mlp))

    def from_layer(self, first: int) -> LayerPlan:
        """What this plan runs from layer `first` on."""
        return self.without(attention=range(first), mlp=range(first)) if first else self

    def budget(self, sublayer_bytes: SublayerBytes) -> float:
        """Share of the decoder's parameter bytes that this plan runs, in (0, 1]."""
        runs = sum(sublayer_bytes[i][0] for i in self.attention) + sum(sublayer_bytes[i][1] for i in self.mlp)
        return runs / sum(attention + mlp for attention, mlp in sublayer_bytes)

    def check_fits(self, n_layers: int) -> None:
        """Raises PlanError unless this plan is for a model of `n_layers` layers."""
        if self.n_layers != n_layers:
            raise PlanError(f"plan {self} is for {self.n_layers} layers, this model has {n_layers}")

    def __or__(self, other: LayerPlan) -> LayerPlan:
        self._check_same_model(other)
        return LayerPlan(self.n_layers, self.attention | other.attention, self.mlp | other.mlp)

    def __le__(self, other: LayerPlan) -> bool:
        self._check_same_model(other)
        return self.attention <= other.attention and self.mlp <= other.mlp

    def _check_same_model(self, other: LayerPlan) -> None:
        if self.n_layers != other.n_layers:
            raise PlanError(f"these plans are for models of {self.n_layers} and of {other.n_layers} layers")

    def __repr__(self) -> str:
        return f"LayerPlan.parse({str(self)!r}, {self.n_layers})"

    def __str__(self) -> str:
        kinds = {i: ("" if i in self.mlp else "a") if i in self.attention else "m" for i in self.attention | self.mlp}
        spans = [(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}") + kinds[run[0]] for run in _runs(kinds)]
        return ",".join(spans) + ("h" if self.healed else "")


def _runs(kinds: Mapping[int, str]) -> list[list[int]]:
    """Runs of neighbouring layers of one kind."""
    grouped = groupby(enumerate(sorted(kinds)), key=lambda item: (item[1] - item[0], kinds[item[1]]))
    return [[layer for _, layer in run] for _, run in grouped]


@dataclass(frozen=True, slots=True)
class PlanMenu:
    """K plans for one model, cheapest first; the last is the full model. All run the first `probe_depth` layers.

    Attributes:
        plans: the K plans.
        budgets: for each plan its share of the decoder's parameter bytes, ascending, the last 1.
        probe_depth: layers that run before the choice among the plans is made.

    Raises:
        PlanError: a plan skips a probe layer, the order is wrong, or the full plan is missing.
    """

    plans: tuple[LayerPlan, ...]
    budgets: tuple[float, ...]
    probe_depth: int

    def __post_init__(self) -> None:
        for name in ("plans", "budgets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        plans, budgets = self.plans, self.budgets
        if len(plans) != len(budgets) or len(set(plans)) != len(plans):
            raise PlanError(f"a menu needs one budget for each of its plans, all different, got {self.budgets}")
        if not plans or not plans[-1].is_full:
            raise PlanError("the last plan of a menu must be the full model")
        if wrong := [budget for budget in budgets if not 0 < budget <= 1]:
            raise PlanError(f"a budget is a share above 0 and at most 1, got {wrong[0]}")
        if list(budgets) != sorted(budgets):
            raise PlanError(f"the plans of a menu go from cheapest to full, got budgets {budgets}")
        if not 1 <= self.probe_depth <= self.n_layers:
            raise PlanError(f"probe_depth must be from 1 to {self.n_layers}, got {self.probe_depth}")
        if self.probe_depth == self.n_layers and any(plan.healed for plan in plans):
            raise PlanError(f"probe_depth must be below {self.n_layers}, where plans go on to an exit head")
        for plan in plans:
            missing = (plan.skipped_attention | plan.skipped_mlp) & set(range(self.probe_depth))
            if missing:
                raise PlanError(
                    f"plan {plan} skips layer {min(missing)}, but every plan runs the first {self.probe_depth} layers: "
                    "features are read there (probe_depth)"
                )

    @classmethod
    def build(cls, plans: Iterable[LayerPlan], sublayer_bytes: SublayerBytes, probe_depth: int) -> PlanMenu:
        """A menu of the given plans and the full one, doubles dropped, sorted by budget."""
        plans, n_layers = list(plans), len(sublayer_bytes)
        if wrong := [plan for plan in plans if plan.n_layers != n_layers]:
            raise PlanError(f"plan {wrong[0]} is for {wrong[0].n_layers} layers, the model has {n_layers}")
        distinct = {*plans, LayerPlan.full(n_layers)}
        ordered = sorted(distinct, key=lambda plan: (plan.budget(sublayer_bytes), plan.is_full, str(plan)))
        return cls(tuple(ordered), tuple(plan.budget(sublayer_bytes) for plan in ordered), probe_depth)

    def keeping(self, added: Mapping[str, float]) -> PlanMenu:
        """The plans whose texts `added` names, with what it adds to their budgets, and the full one; sorted again."""
        pairs = zip(self.plans, self.budgets, strict=True)
        costs = {p: budget + added.get(str(p), 0.0) for p, budget in pairs if p.is_full or str(p) in added}
        order = sorted(costs, key=lambda plan: (plan.is_full, costs[plan]))
        return PlanMenu(tuple(order), tuple(min(costs[plan], 1.0) for plan in order), self.probe_depth)

    @property
    def n_layers(self) -> int:
        return self.plans[0].n_layers

    def __len__(self) -> int:
        return len(self.plans)

    def __repr__(self) -> str:
        return f"PlanMenu({len(self)} plans of {self.plans[0].layers:g} to {self.n_layers} layers)"

    def to_json(self) -> dict[str, Any]:
        plans = [{"runs": str(plan), "budget": budget} for plan, budget in zip(self.plans, self.budgets, strict=True)]
        return {"n_layers": self.n_layers, "probe_depth": self.probe_depth, "plans": plans}

    @classmethod
    def from_json(cls, data: Any) -> PlanMenu:
        """Raises PlanError for data that `to_json` did not write."""
        entries = data.get("plans") if isinstance(data, dict) else None
        if not isinstance(entries, list) or data.keys() != {"n_layers", "probe_depth", "plans"}:
            raise PlanError(f"a menu holds n_layers, probe_depth and a list of plans, got {data!r:.80}")
        if len(entries) > MOST_PLANS:
            raise PlanError(f"a menu holds at most {MOST_PLANS} plans, got {len(entries)}")
        for entry in entries:
            if not isinstance(entry, dict) or entry.keys() != {"runs", "budget"}:
                raise PlanError(f"each plan of a menu holds runs and budget, got {entry!r:.80}")
            if type(entry["budget"]) not in (int, float):
                raise PlanError(f"a budget is a share above 0 and at most 1, got {entry['budget']!r:.80}")
        if type(data["probe_depth"]) is not int:
            raise PlanError(f"probe_depth is a number of layers, got {data['probe_depth']!r:.80}")
        plans = tuple(LayerPlan.parse(entry["runs"], data["n_layers"]) for entry in entries)
        return cls(plans, tuple(float(entry["budget"]) for entry in entries), data["probe_depth"])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> PlanMenu:
        """Raises PlanError for a file that `save` did not write."""
        try:
            return cls.from_json(parse(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} holds no menu: {error}") from None


def _checked_count(n_layers: int, n_run: int) -> int:
    if not 1 <= n_run <= n_layers:
        raise PlanError(f"cannot run {n_run} layers of a model of {n_layers}: between 1 and {n_layers} can run")
    return n_run
