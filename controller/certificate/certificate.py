"""The certificate of a price: a file, a sentence, and its exclusions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from backbone.strict_json import LONGEST_NAME, parse
from controller.certificate.risks import MOST_KEPT, RISKS, CalibrationError, Risk

MOST_PROMPTS, LARGEST_PRICE, LONGEST_TEXT, MOST_LEVELS = 10**9, 1e6, 10_000, 20
"""Limits of a certificate; a text in characters."""
LOWEST_TASK_RISK = -1e4
"""Lowest risk of a task, whose full model's mean score may be near 0."""
PLAN_SHARE = 0.1
"""Share of delta that a plan for all prompts is tested with; the prices have the rest."""
_ALONE = "Each certificate fails with probability delta, the best of several more often."
_SHARED = "All levels together fail with probability delta: choose among them, and certify another on other prompts."


def alpha_of(keep: float) -> float:
    """The largest mean loss that keeps `keep`: .03 for .97."""
    return round(1 - keep, 9)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A bound on the mean loss of prompts like the calibration prompts.

    The mean loss is at most 1 - `keep` with probability at least 1 - `delta`.

    Attributes:
        risk: which loss; see `controller.certificate.risks.Risk`.
        keep: above 0; 1 or more, for `mean_score` alone, where the full model's mean score or more is kept.
        delta: how often the bound may fail, over draws of the calibration prompts; with `levels`, any of theirs.
        n: calibration prompts.
        price: of an expected loss of 1, in shares of the decoder; None where no valid price shortens anything, and then
            every prompt runs the full plan. With a `plan` it decides nothing.
        observed_risk: mean loss of the calibration prompts at the price, 0 without one; of `mean_score` in shares of
            the full model's mean score.
        prompts_hash: of the calibration prompts.
        date: when it was made, ISO 8601.
        fewest_prompts: with fewer calibration prompts (in each task, with `per_task`) no price can be valid, if the
            controller wins nothing; None where no number suffices, and where `keep` is 1 or more.
        full_score: the full model's mean score on them; 1 where the risk does not ask for it.
        prompts_needed: without a price, about how many prompts like these would do at the first price that shortens
            any; 0 where none does; None for too many, or where there is a price.
        per_task: task -> {"n", "observed_risk"} where the bound holds in every task, empty where only overall.
        tolerance: how much lower than the full model's the score of a sufficient answer may be.
        decoding: how the answers were generated, in words.
        chat_template: hash of the template of the prompts; empty without one.
        left_out: prompts that are not among the n, since the judge failed on the full model's answer.
        plan: place in the menu of a plan that is certified for all prompts, on those that no controller's price was
            tested on, where no valid price runs less; None where the price chooses.
        groups: independent groups of prompts, each of which counts once in every mean and in every number of prompts
            but `n` and `left_out`; None where each prompt is a group of its own.
        levels: all values of `keep` that were certified on these prompts and share `delta`; empty for this one alone.
        assumes: names of the allocator's optional files that it was made with.
        does_not_cover: exclusions, in sentences.
    """

    risk: Risk
    keep: float
    delta: float
    n: int
    price: float | None
    observed_risk: float
    prompts_hash: str
    date: str
    fewest_prompts: int | None
    full_score: float = 1.0
    prompts_needed: int | None = None
    per_task: dict[str, dict[str, float]] = field(default_factory=dict)
    tolerance: float = 0.0
    decoding: str = ""
    chat_template: str = ""
    left_out: int = 0
    plan: int | None = None
    groups: int | None = None
    levels: tuple[float, ...] = ()
    assumes: tuple[str, ...] = ()
    does_not_cover: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.does_not_cover:
            object.__setattr__(self, "does_not_cover", exclusions(self))

    @property
    def alpha(self) -> float:
        """The largest mean loss that keeps the bound."""
        return alpha_of(self.keep)

    @property
    def sentence(self) -> str:
        """The certificate in plain words."""
        left_out = ""
        if self.left_out:
            count = f"{self.left_out} of {self.n + self.left_out} prompts"
            left_out = f" Left out: {count}, since the judge failed on the full model's answer."
        if self.price is None:
            return f"Not certified: {self._reason}, so all prompts run the full model.{left_out}"
        seen = self._seen(self.observed_risk)
        if self.risk == "mean_score":
            seen = f"{seen} of {self.full_score:.3g}"
        if self.per_task:
            worst = max(self.per_task, key=lambda task: self.per_task[task]["observed_risk"])
            seen = f"{seen}; {worst!r}, the worst task: {self._seen(self.per_task[worst]['observed_risk'])}"
        grouped = "" if self.groups is None else f" of {self.groups} groups, each of which counts once"
        one = "" if self.plan is None else " Every prompt runs the same plan, since no certified price runs less."
        levels = ", ".join(map(_percent, self.levels))
        shared = f" The levels {levels} share this confidence: any may be chosen." if self.levels else ""
        return (
            f"With {_percent(1 - self.delta)} confidence, {self._bound}, on prompts like the {self.n} calibration "
            f"prompts{grouped} (observed: {seen}).{one}{shared}{left_out}"
        )

    def too_small(self) -> dict[str, int]:
        """Tasks with too few prompts for the bound, and their numbers of prompts.

        The task of an overall bound is "all tasks".
        Empty where `keep` is 1 or more, since wins may be of any size."""
        if self.keep >= 1:
            return {}
        sizes = {task: int(seen["n"]) for task, seen in self.per_task.items()} or {"all tasks": self.groups or self.n}
        return {task: n for task, n in sizes.items() if self.fewest_prompts is None or n < self.fewest_prompts}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({**asdict(self), "sentence": self.sentence}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Raises CalibrationError for a file that `save` of this version did not write."""
        try:
            data = parse(path.read_text(encoding="utf-8"))
            data.pop("sentence")
            data.setdefault("plan")  # which came later
            _check(data)
            return cls(**{**data, **{name: tuple(data[name]) for name in ("levels", "assumes", "does_not_cover")}})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"{path} is not a certificate that this version can read ({error}): "
                "make it again with the calibrate stage"
            ) from None

    @property
    def _bound(self) -> str:
        each = ", in each task," if self.per_task else ""
        if self.risk == "mean_score":
            return f"answers{each} keep at least {_percent(self.keep)} of the full model's mean score"
        if self.risk == "insufficient":
            prompts = f"at most {_percent(self.alpha)} of prompts{each}"
            less = f"over {self.tolerance:g} lower" if self.tolerance else "lower"
            return f"{prompts} get an answer that scores {less} than the full model's"
        amount = f"{self.alpha:.3g} of a score that runs from 0 to 1"
        return f"answers{each} lose on average at most {amount} against the full model's"

    @property
    def _reason(self) -> str:
        claim = f"showing with {_percent(1 - self.delta)} confidence that {self._bound}"
        what = "calibration prompts" if self.groups is None else "groups of calibration prompts"
        small = self.too_small()
        if self.fewest_prompts is None and self.risk != "mean_score":
            return f"{claim} takes more calibration prompts than can be looked at; ask for a larger bound"
        if self.fewest_prompts is None and self.keep < 1:
            scored = f"the full model's mean score on the {self.n} calibration prompts is {self.full_score:.3g}"
            return f"{scored}, too near 0 for {claim}; use prompts that it can answer, or another judge"
        if small and self.per_task:
            tasks = ", ".join(f"{task!r} has {n}" for task, n in small.items())
            return f"{claim} takes at least {self.fewest_prompts} {what} of each task ({tasks})"
        if small:
            where = f" where that is {self.full_score:.3g}" if self.risk == "mean_score" else ""
            return f"{claim} takes at least {self.fewest_prompts} {what}{where}, and there are {small['all tasks']}"
        if self.prompts_needed == 0:
            return f"the controller chooses the full plan for all {self.n} calibration prompts at every price"
        more = f": at the spread of what they lose it takes about {self.prompts_needed}"
        if self.prompts_needed is None:
            short = "loses too much" if self.keep < 1 else "wins too little"
            more = f", nor would many more like them: it {short} at the first price that shortens any"
        return f"{self.groups or self.n} {what} do not suffice for {claim}, with this controller{more}"

    def _seen(self, risk: float) -> str:
        """An observed risk in words."""
        if self.risk == "mean_score":
            return _percent(1 - risk)
        return _percent(risk) if self.risk == "insufficient" else f"{risk:.3g}"


def exclusions(found: Certificate) -> tuple[str, ...]:
    """The sentences of `Certificate.does_not_cover`."""
    tasks = (
        f"Tasks other than {', '.join(sorted(found.per_task))}."
        if found.per_task
        else "Single tasks, or another mixture of them: a rare or hard task may lose more than the bound."
    )
    decoding = f" than {found.decoding}" if found.decoding else ""
    template = f"; another chat template than {found.chat_template}, or none" if found.chat_template else ""
    return (
        f"Other kinds of prompts: other lengths, languages or templates{template}.",
        tasks,
        "Single prompts: a mean is bounded, and any one prompt may lose everything.",
        f"Other decoding settings{decoding}: sampling, longer answers, other ends.",
        "Another data type, device or batch size, whose rounding can change an answer.",
        "Quality that the judge does not see.",
        "Prompts for which the judge fails on the full model's answer: "
        f"{found.left_out} of {found.n + found.left_out} were left out. A shortened plan's answer on which it fails "
        "scores 0.",
        f"Drift: prompts that have changed since {found.date}.",
        "Prompts that are not independent draws: copies of the training prompts, near-duplicates, and groups that the "
        "field 'group' does not name. Prompts of one group, or of one text, count as one.",
        "A choice made afterwards: the controller and the bound were named before the calibration prompts were looked "
        f"at. {_SHARED if found.levels else _ALONE}",
    )


def _check(data: dict[str, Any]) -> None:
    """Raises ValueError for an entry that no certificate has."""
    if (found := set(data)) != (known := {field.name for field in fields(Certificate)}):
        raise ValueError(f"missing: {sorted(known - found)}, unknown: {sorted(found - known)}")
    signed, lowest, most = data["risk"] == "mean_score", 0.0, MOST_KEPT if data["risk"] == "mean_score" else 1.0
    if signed and _is_number(data["full_score"], 0, 1):
        lowest = 1 - 1 / (data["full_score"] or 1) - 1e-6  # gains are at most 1 - full, in shares of full

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value <= MOST_PROMPTS

    def is_count_or_none(value: Any) -> bool:
        return value is None or is_count(value)

    def is_share(value: Any) -> bool:
        return _is_number(value, 0, 1)

    def is_level(value: Any) -> bool:
        return _is_number(value, 0, most) and 0 < value < most

    def is_name(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= LONGEST_NAME

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= LONGEST_TEXT

    def is_task(name: str, seen: Any) -> bool:
        named = isinstance(seen, dict) and seen.keys() == {"n", "observed_risk"} and is_name(name)
        least = LOWEST_TASK_RISK if lowest < 0 else 0
        return named and is_count(seen["n"]) and _is_number(seen["observed_risk"], least, 1)

    def are(test: Callable[[Any], bool], most: float = math.inf) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, list) and len(value) <= most and all(map(test, value))

    tests: dict[str, Callable[[Any], bool]] = {
        "risk": lambda value: value in RISKS,
        "price": lambda value: value is None or (_is_number(value, 0, LARGEST_PRICE) and value > 0),
        "per_task": lambda value: isinstance(value, dict) and all(is_task(*one) for one in value.items()),
        "delta": lambda value: is_share(value) and 0 < value < 1,
        "keep": is_level,
        "levels": are(is_level, MOST_LEVELS),
        "observed_risk": lambda value: _is_number(value, lowest, 1),
        "date": lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", value)),
        "decoding": is_text,
        **dict.fromkeys(("n", "left_out"), is_count),
        **dict.fromkeys(("fewest_prompts", "prompts_needed", "groups", "plan"), is_count_or_none),
        **dict.fromkeys(("tolerance", "full_score"), is_share),
        **dict.fromkeys(("prompts_hash", "chat_template"), is_name),
        **dict.fromkeys(("assumes", "does_not_cover"), are(is_text)),
    }
    if wrong := [name for name, test in tests.items() if not test(data[name])]:
        raise ValueError(f"{wrong[0]} is {data[wrong[0]]!r:.80}")


def _is_number(value: object, lowest: float, highest: float) -> bool:
    return type(value) in (int, float) and lowest <= value <= highest  # type: ignore[operator]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
