"""The full model's own answer, faster: a shorter plan drafts tokens, the full model checks them all in one pass.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with the model as its own draft. Greedy answers are the
full model's, up to the rounding of passes over several tokens; sampled ones follow its distribution (section 2.3).

The plan that drafts, and how many tokens, are chosen for the most tokens a millisecond, by what passes cost and by the
plan's acceptance: on the labelled prompts, and then in this request. Where no plan pays, the full model decodes alone.

Draft and check share one cache. Before a draft its layers hold the full model's keys and values. What the plan adds is
cut off before the check, which writes the full model's instead. Refused tokens are cut off after it. transformers' loop
for assisted decoding does all but the drafting.

Shapes: `S` tokens so far, `V` vocabulary; one prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, LogitsProcessorList
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.candidate_generator import CandidateGenerator

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plan
from backbone.families import decoder_layers
from backbone.left_padding import position_inputs
from backbone.plan import LayerPlan
from runtime.generate_arguments import REFUSED_BY_LOSSLESS, refuse
from runtime.parts import AllocatorParts
from runtime.request import FirstToken, Moment, Output, Request, decode
from runtime.step_costs import StepCosts, known_step_costs

MAX_DRAFT = 8
"""Tokens drafted before a check, at most."""

PRIOR_JUDGED = 5.0
"""What the labels say of a plan counts as much as so many judged tokens of a request."""

REFUSED = 2.0
"""Where no label says anything: a plan that leaves out a share of the decoder is refused so many times as often."""


@dataclass(slots=True)
class DraftPlan:
    """A shortened plan of the menu that may draft.

    Attributes:
        plan: the plan.
        budget: its share of the decoder.
        accepted, judged: its tokens that the full model kept, and those that it judged, with what the labels say.
    """

    plan: LayerPlan
    budget: float
    accepted: float
    judged: float = PRIOR_JUDGED

    @property
    def rate(self) -> float:
        return self.accepted / self.judged


def draft_plans(allocator: AllocatorParts) -> list[DraftPlan]:
    """The shortened plans of an allocator's menu with their acceptance on its labels."""
    menu = allocator.menu
    rates = allocator.acceptance or [max(1 - REFUSED * (1 - budget), 0.0) for budget in menu.budgets]
    return [
        DraftPlan(plan, budget, rate * PRIOR_JUDGED)
        for plan, budget, rate in zip(menu.plans, menu.budgets, rates, strict=True)
        if plan.layers < plan.n_layers
    ]


def best_draft(costs: StepCosts, plans: Sequence[DraftPlan]) -> tuple[DraftPlan | None, int]:
    """The plan and the number of tokens to draft for the most tokens a millisecond; None and 0 if drafts do not pay.

    A round of k drafts takes k steps of the plan and a full pass over k + 1 tokens, and gives on average
    (1 - rate^(k + 1)) / (1 - rate) tokens (Leviathan et al. 2023, equation 1).
    """
    lengths = np.arange(MAX_DRAFT + 1)
    checks, best = costs.checking_ms(lengths + 1), (1 / costs.checking_ms(np.array([1]))[0], 0)
    chosen = None
    for draft in plans:
        tokens = np.cumsum(draft.rate**lengths)
        speeds = tokens / (lengths * costs.ms(draft.budget, np.array([1]))[0] + checks)
        if speeds.max() > best[0]:
            chosen, best = draft, (float(speeds.max()), int(speeds.argmax()))
    return chosen, best[1]


def check_lossless(request: Request) -> None:
    """Raises UnsupportedGenerationError unless a request can be drafted and checked."""
    cache = request.cache
    own = cache if getattr(cache, "_is_user_defined", False) else None
    refuse({**vars(request.config), "cache": own}, REFUSED_BY_LOSSLESS, "lossless=True")
    if len(request.input_ids) > 1:
        raise UnsupportedGenerationError(f"lossless=True takes one prompt at a time, got {len(request.input_ids)}")
    if type(cache) is not DynamicCache:
        kind = "no cache" if cache is None else f"a {type(cache).__name__}"
        raise UnsupportedGenerationError(
            f"lossless=True needs a dynamic cache, and {request.model.config.model_type} decodes with {kind}"
        )
    croppable = (DynamicLayer, DynamicSlidingWindowLayer)
    if other := [type(layer).__name__ for layer in cache.layers if type(layer) not in croppable]:
        raise UnsupportedGenerationError(
            f"lossless=True cannot take back tokens from the {other[0]} of {request.model.config.model_type}"
        )


def generate_losslessly(
    request: Request, plans: Sequence[DraftPlan], start: Moment
) -> tuple[Output, float, list[LayerPlan]]:
    """Decode one prompt with the full model, drafting under one of some plans, from the moment `start`.

    Returns:
        The output, the milliseconds from `start` to the first token, and the plan that drafted, the full one if none
        did. An output object has `draft_tokens`, `accepted_tokens`, `acceptance` (their ratio, None without drafts) and
        `full_passes` (the prompt's among them).
    """
    full = LayerPlan.full(len(decoder_layers(request.model)))
    drafter = Drafter(request, plans)
    if drafter.pays:
        output, first_token_ms = _decode_with_drafts(request, drafter, start)
    else:
        output, first_token_ms = decode(request, [full], start)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        drafter.rounds = sequences.shape[1] - request.input_ids.shape[1]
    if not isinstance(output, torch.Tensor):
        output["draft_tokens"], output["accepted_tokens"] = drafter.drafted, drafter.accepted
        output["acceptance"] = drafter.accepted / drafter.drafted if drafter.drafted else None
        output["full_passes"] = drafter.rounds
    return output, first_token_ms, [drafter.last or full]


def _decode_with_drafts(request: Request, drafter: Drafter, start: Moment) -> tuple[Any, float]:
    """The output of transformers' loop for assisted decoding, and the milliseconds to the first token.

    The loop runs on a shallow copy of the model, which shares every module, so that the model itself, which other
    threads may be running, keeps its own source of drafts.
    """
    clock = FirstToken(request.model.device)
    drafter.processors = LogitsProcessorList([*request.loop["logits_processor"], clock])
    loop = {**request.loop, "logits_processor": drafter.processors, "generation_config": request.config}
    model: Any = copy.copy(request.model)
    model.__dict__["_get_candidate_generator"] = lambda **_: drafter
    output = model._assisted_decoding(request.input_ids, **loop, **request.kwargs)
    return output, clock.moment.ms_since(start) if clock.moment else 0.0


class Drafter(CandidateGenerator):
    """Drafts as many tokens as pay, under the plan with which they pay most; once none does, no more.

    Attributes:
        processors: of the request's scores.
        last: the plan that drafted last.
        rounds: passes of the full model so far, one after each draft.
        drafted: tokens drafted so far.
        accepted: of these, tokens that the full model kept.
    """

    def __init__(self, request: Request, plans: Sequence[DraftPlan]) -> None:
        self._request, self._plans, self._costs = request, plans, known_step_costs(request.model)
        self._mask = request.kwargs.get("attention_mask")
        self._offered = 0
        self._draft_plan, self._length = best_draft(self._costs, plans)
        self.processors = LogitsProcessorList()
        self.last: LayerPlan | None = None
        self.drafted = self.accepted = self.rounds = 0

    @property
    def pays(self) -> bool:
        return self._length > 0

    def get_candidates(self, input_ids: Any, **_: Any) -> tuple[Any, Any]:
        """Text [1, S] with drafted tokens behind it, and, for sampling, the scores [1, n, V] they were drawn from."""
        first = not self.rounds
        self.rounds += 1
        if self.pays:
            self._draft_plan, self._length = best_draft(self._costs, self._plans)
        left = int(self._request.config.max_length or 0) - input_ids.shape[1] - 1
        self._offered = 0 if first else max(min(self._length, left), 0)
        if not self._offered or self._draft_plan is None:
            return input_ids, None
        ids, scores = self._draft(input_ids, self._draft_plan.plan)
        self._offered = ids.shape[1] - input_ids.shape[1]
        self.drafted += self._offered
        return ids, scores if self._request.config.do_sample else None

    def update_candidate_strategy(self, input_ids: Any, scores: torch.Tensor, num_matches: int) -> None:
        """Learn how many of the drafted tokens were kept; those behind the first refused one were not judged."""
        kept = min(int(num_matches), self._offered)
        self.accepted += kept
        if self._draft_plan is not None:
            self._draft_plan.accepted += kept
            self._draft_plan.judged += min(kept + 1, self._offered)

    @torch.no_grad()
    def _draft(self, input_ids: Any, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A draft [1, S + n] and its scores, ended before the first token that stops the text."""
        cache, ids = _view(self._request.kwargs["cache"], plan), input_ids
        scores: list[torch.Tensor] = []
        self.last = plan
        config, stops, is_stopped = self._request.config, self._request.loop["stopping_criteria"], False
        unknown = _UnknownScores() if config.return_dict_in_generate and config.output_scores else None
        with apply_plan(self._request.model, plan, self._request.healing):
            while len(scores) < self._offered and not is_stopped:
                logits = self._request.model(**self._step(ids), cache=cache, use_cache=True).logits[:, -1]
                scores.append(self.processors(ids, logits.to(input_ids.device, torch.float32, copy=True)))
                ids = torch.cat([ids, self._chosen(scores[-1])], dim=1)
                is_stopped = bool(stops(ids, unknown).any())
        cache.crop(-len(scores))
        n_kept = len(scores) - is_stopped
        return ids[:, : input_ids.shape[1] + n_kept], torch.stack(scores[:n_kept], dim=1) if n_kept else None

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        if not self._request.config.do_sample:
            return scores.argmax(-1, keepdim=True)
        return torch.multinomial(scores.softmax(-1), num_samples=1)

    def _step(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's arguments for the last token of a text [1, S]."""
        mask = torch.ones_like(ids)
        if self._mask is not None:
            mask[:, : self._mask.shape[1]] = self._mask
        positions = {name: value[:, -1:] for name, value in position_inputs(self._request.model, mask).items()}
        return {"input_ids": ids[:, -1:], "attention_mask": mask, **positions}


class _UnknownScores:
    """Stands for the scores of drafted tokens, which the full model has not given yet."""

    def _refuse(self, *_: Any) -> Any:
        raise UnsupportedGenerationError(
            "lossless=True cannot be used with a stopping criterion that reads scores: drafted tokens have none yet; "
            "leave output_scores or the criterion out"
        )

    __getitem__ = __iter__ = __len__ = _refuse


def _view(cache: Cache, plan: LayerPlan) -> Cache:
    """The same cache, without the layers whose attention a plan skips: what is added to one is added to both."""
    view = copy.copy(cache)
    view.layers = [
        layer if index in plan.attention else DummyLayer()  # type: ignore[no-untyped-call]
        for index, layer in enumerate(cache.layers)
    ]
    return view
