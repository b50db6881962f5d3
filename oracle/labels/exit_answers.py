"""Greedy answers of all early exits of a model, from one pass over each prompt.

The layers below an exit do not know of the plan, so one pass of the full model holds the state from which each exit
predicts the next token. Exits that have said the same so far go on as one row; where they diverge, the row is doubled.
A prompt of many tokens with an answer of few thus costs little more than one pass for all plans.

Shapes: `R` rows, each one prompt with what some exits have said so far; `D` hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.apply_plan import apply_plan
from backbone.execution.live_changes import captured
from backbone.execution.output_head import output_logits
from backbone.execution.shared_prefixes import Beginning, Begun
from backbone.families import decoder_layers, decoder_of
from backbone.healing.healing import Bridges, ReadyHealing
from backbone.left_padding import in_halves, position_inputs
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from oracle.labels.generation import stop_token_ids

Enough = Callable[[int, list[int], Sequence[LayerPlan]], bool]
"""(number of a prompt, tokens that some plans have said so far, these plans) -> whether that is all that is needed."""

AT_ONCE = 64
"""Rows whose logits over the whole vocabulary are made together."""


@dataclass(slots=True)
class ExitAnswer:
    """What one exit says.

    Attributes:
        ids: tokens of the answer, the stopping one included; fewer where there were enough.
        forward_tokens: this exit's share of the tokens passed, weighted by the share of the layers they passed.
    """

    ids: list[int] = field(default_factory=list)
    forward_tokens: float = 0.0


def exit_depth(plan: LayerPlan) -> int | None:
    """The layers that an early exit runs, L for the full depth; None for a plan of another shape."""
    depth = len(plan.attention)
    return depth if plan.healed or plan == LayerPlan.exiting(plan.n_layers, max(depth, 1)) else None


def are_exits(plans: Sequence[LayerPlan], healing: ReadyHealing | None) -> bool:
    """Whether all these plans are early exits of a model with its own weights, so that one pass serves them all."""
    unchanged = healing is None or not healing.swaps or all(plan.is_full for plan in plans)
    return unchanged and all(exit_depth(plan) is not None for plan in plans)


@torch.no_grad()
def exit_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    plans: Sequence[LayerPlan],
    decoding: Decoding,
    enough: Enough = lambda number, ids, plans: False,
    beginning: Beginning | None = None,
    healing: ReadyHealing | None = None,
) -> list[dict[LayerPlan, ExitAnswer]]:
    """For each of B prompts (token ids) what each plan answers greedily.

    Args:
        model: the model, with its tokenizer.
        prompts: token ids of each.
        plans: see `are_exits`.
        decoding: under which the likeliest token is the chosen one.
        enough: ends answers before their end.
        beginning: of all these prompts, run through as many layers as the deepest plan has.
        healing: with the exit heads.
    """
    deepest = LayerPlan.exiting(plans[0].n_layers, max(len(plan.attention) for plan in plans))
    numbered, start = list(enumerate(prompts)), beginning or Beginning(model)

    def run(some: Sequence[tuple[int, Sequence[int]]]) -> list[dict[LayerPlan, ExitAnswer]]:
        begun = start.batch([ids for _, ids in some])
        with apply_plan(model, deepest):
            passes = _Pass(
                model, plans, decoding, stop_token_ids(tokenizer, decoding), {} if healing is None else healing.bridges
            )
            return passes.answers(begun, lambda row, ids, plans: enough(some[row][0], ids, plans))

    return in_halves(numbered, run)


Row = tuple[int, tuple[int, ...]]
"""Number of a prompt, and the tokens said so far."""


class _Pass:
    def __init__(
        self,
        model: PreTrainedModel,
        plans: Sequence[LayerPlan],
        decoding: Decoding,
        stops: frozenset[int],
        heads: Bridges,
    ) -> None:
        self._heads = heads
        self._model, self._plans, self._decoding, self._stops = model, list(plans), decoding, stops
        self._depths = {plan: len(plan.attention) for plan in plans}
        self._decoder: Any = decoder_of(model)
        self._share = max(self._depths.values()) / plans[0].n_layers

    def answers(self, begun: Begun, enough: Enough) -> list[dict[LayerPlan, ExitAnswer]]:
        ids, mask, cache = begun.input_ids, begun.mask, begun.cache
        found = [{plan: ExitAnswer() for plan in self._plans} for _ in ids]
        states = self._run(begun.inputs)
        for number, tokens in enumerate(mask[:, begun.columns :].sum(1).tolist()):
            self._count(found[number], self._plans, tokens)
        rows: dict[Row, list[LayerPlan]] = {(number, ()): self._plans for number in range(len(ids))}
        while rows:
            later = self._said(rows, states)
            for (number, so_far), plans in later.items():
                for plan in plans:
                    found[number][plan].ids = list(so_far)
            parents = {row: place for place, row in enumerate(rows)}
            rows = {row: plans for row, plans in later.items() if not self._is_over(row, plans, enough)}
            if not rows:
                return found
            chosen = torch.tensor([parents[number, so_far[:-1]] for number, so_far in rows], device=ids.device)
            cache.reorder_cache(chosen)  # type: ignore[arg-type]
            mask = torch.cat([mask[chosen], mask.new_ones(len(rows), 1)], dim=1)
            last = torch.tensor([[so_far[-1]] for _, so_far in rows], device=ids.device)
            positions = {name: value[:, -1:] for name, value in position_inputs(self._decoder, mask).items()}
            states = self._run(
                {"input_ids": last, "attention_mask": mask, "cache": cache, "use_cache": True, **positions}
            )
            for (number, _), plans in rows.items():
                self._count(found[number], plans, 1)
        return found

    def _run(self, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        """States [R, D] of the newest tokens at each exit's depth."""
        with captured(decoder_layers(self._model), set(self._depths.values())) as states:
            self._decoder(**inputs)
        return {depth: state[:, -1] for depth, state in states.items()}

    def _said(
        self, rows: Mapping[Row, Sequence[LayerPlan]], states: Mapping[int, torch.Tensor]
    ) -> dict[Row, list[LayerPlan]]:
        """The rows with the token that each of their plans says next."""
        later: dict[Row, list[LayerPlan]] = defaultdict(list)
        places = {row: place for place, row in enumerate(rows)}
        for plan in self._plans:
            own = [row for row, plans in rows.items() if plan in plans]
            state = states[self._depths[plan]][[places[row] for row in own]]
            if head := self._heads.get(plan, {}).get(self._depths[plan]):
                state = head(state)
            tokens = [
                one
                for part in torch.split(state, AT_ONCE)
                for one in output_logits(self._model, part).argmax(-1).tolist()
            ]
            for (number, so_far), token in zip(own, tokens, strict=True):
                later[number, (*so_far, token)].append(plan)
        return later

    def _is_over(self, row: Row, plans: Sequence[LayerPlan], enough: Enough) -> bool:
        number, said = row[0], list(row[1])
        return said[-1] in self._stops or len(said) == self._decoding.max_new_tokens or enough(number, said, plans)

    def _count(self, of_prompt: Mapping[LayerPlan, ExitAnswer], plans: Sequence[LayerPlan], tokens: int) -> None:
        for plan in plans:
            of_prompt[plan].forward_tokens += tokens * self._share / len(plans)
