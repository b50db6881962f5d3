"""The full model's own answer, faster: the predicted plan drafts tokens, the full model checks them all in one pass.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with the model as its own draft. Greedy answers are the
full model's, up to the rounding of passes over several tokens; sampled ones follow its distribution (section 2.3).

Draft and check share one cache. Before a draft all its layers hold what the full model made of the text so far, so the
plan attends to better keys and values than its own. What the plan adds is its approximation: it is cut off before the
check, which writes the full model's instead, and what the check refuses is cut off after it. Sliding windows forget
only then, as in transformers' assisted decoding, whose loop does all but the drafting.

Shapes: `S` tokens so far, `V` vocabulary; one prompt.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.candidate_generator import CandidateGenerator

from backbone.execution.apply_plan import apply_plan
from backbone.execution.prompt_prefix import Prefix, replaying
from backbone.families import sublayer_bytes
from backbone.left_padding import position_inputs
from backbone.plan import LayerPlan
from runtime.call_arguments import UnsupportedGenerationError
from runtime.device_clock import FirstToken, Moment
from runtime.generation import Output
from runtime.request import Request
from runtime.step_costs import StepCosts, known_step_costs

MAX_DRAFT = 8
"""Tokens drafted before a check, at most."""

PRIOR_ACCEPTED, PRIOR_JUDGED = 4.0, 5.0
"""Until a request has shown better: of 5 judged tokens 4 are accepted."""


def check_lossless(request: Request) -> None:
    """Raises UnsupportedGenerationError unless a request can be drafted and checked."""
    if len(request.input_ids) > 1:
        raise UnsupportedGenerationError(
            f"lossless=True takes one prompt and one answer at a time, got {len(request.input_ids)} rows "
            "(prompts times beams or samples)"
        )
    cache = request.cache
    if type(cache) is not DynamicCache or getattr(cache, "_is_user_defined", False):
        kind = "no cache" if cache is None else f"a {type(cache).__name__}"
        raise UnsupportedGenerationError(
            f"lossless=True needs the dynamic cache that generate() makes by default, got {kind}; leave out use_cache, "
            "cache_implementation and cache"
        )
    croppable = (DynamicLayer, DynamicSlidingWindowLayer)
    if other := [type(layer).__name__ for layer in cache.layers if type(layer) not in croppable]:
        raise UnsupportedGenerationError(
            f"lossless=True cannot take back tokens from the {other[0]} of {request.model.config.model_type}"
        )


def generate_losslessly(
    request: Request, plan: LayerPlan, prefix: Prefix | None, start: Moment
) -> tuple[Output, float]:
    """Decode one prompt with the full model, drafting under `plan`.

    Args:
        request: the prepared call.
        prefix: what the first layers made of the prompt, from which the full model goes on; None to run them again.
        start: when the call began.

    Returns:
        The output, and the milliseconds from `start` to the first token. If it is an output object, it has
        `draft_tokens`, `accepted_tokens`, `acceptance` (their ratio, None without drafts), `full_passes` (the prompt's
        among them) and `generation_ms`.
    """
    began = time.perf_counter()
    clock = FirstToken(request.model.device)
    processors = LogitsProcessorList([*request.loop["logits_processor"], clock])
    drafter = Drafter(request, plan, processors)
    checking = _Checking(request.model, prefix, drafter)
    loop = {**request.loop, "logits_processor": processors, "generation_config": request.config}
    # A method of the library, given a stand-in for the model: so nothing on the model itself has to be changed.
    decode: Any = type(request.model)._assisted_decoding  # type: ignore[attr-defined]
    output: Any = decode(checking, request.input_ids, **loop, **request.kwargs)
    if not isinstance(output, torch.Tensor):
        output["draft_tokens"], output["accepted_tokens"] = drafter.drafted, drafter.accepted
        output["acceptance"] = drafter.accepted / drafter.drafted if drafter.drafted else None
        output["full_passes"] = checking.passes
        output["generation_ms"] = (time.perf_counter() - began) * 1000
    return output, clock.moment.ms_since(start) if clock.moment else 0.0


class Drafter(CandidateGenerator):
    """Drafts as many tokens as pay by the request's acceptance so far; once none does, no more.

    Attributes:
        drafted: tokens drafted so far.
        accepted: of these, tokens that the full model kept.
    """

    def __init__(self, request: Request, plan: LayerPlan, processors: LogitsProcessorList) -> None:
        self._request, self._plan, self._processors = request, plan, processors
        self._costs, self._budget = known_step_costs(request.model), plan.budget(sublayer_bytes(request.model))
        self._mask = request.kwargs.get("attention_mask")
        self._started, self._offered, self._judged = False, 0, 0
        self._length = MAX_DRAFT
        self.drafted = self.accepted = 0

    def get_candidates(self, input_ids: Any, **_: Any) -> tuple[Any, Any]:
        """Text [1, S] with drafted tokens behind it, and, for sampling, the scores [1, n, V] they were drawn from."""
        first, self._started = not self._started, True
        self._length = 0 if self._plan.is_full or not self._length else self._paying_length()
        left = int(self._request.config.max_length or 0) - input_ids.shape[1] - 1
        self._offered = 0 if first else max(min(self._length, left), 0)
        if not self._offered:
            return input_ids, None
        ids, scores = self._draft(input_ids)
        self._offered = ids.shape[1] - input_ids.shape[1]
        self.drafted += self._offered
        return ids, scores if self._request.config.do_sample else None

    def update_candidate_strategy(self, input_ids: Any, scores: torch.Tensor, num_matches: int) -> None:
        """Learn how many of the drafted tokens were kept; those behind the first refused one were not judged."""
        kept = min(int(num_matches), self._offered)
        self.accepted += kept
        self._judged += min(kept + 1, self._offered)

    def _paying_length(self) -> int:
        rate = (self.accepted + PRIOR_ACCEPTED) / (self._judged + PRIOR_JUDGED)
        return paying_length(self._costs, self._budget, rate)

    @torch.no_grad()
    def _draft(self, input_ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cache, ids, scores = _view(self._request.kwargs["cache"], self._plan), input_ids, []
        ends = getattr(self._request.config, "_eos_token_tensor", None)
        with apply_plan(self._request.model, self._plan):
            for _ in range(self._offered):
                logits = self._request.model(**self._step(ids), cache=cache, use_cache=True).logits[:, -1]
                scores.append(self._processors(ids, logits.to(input_ids.device, torch.float32, copy=True)))
                token = self._chosen(scores[-1])
                ids = torch.cat([ids, token], dim=1)
                if ends is not None and torch.isin(token, ends.to(token.device)).any():
                    break
        cache.crop(-len(scores))
        return ids, torch.stack(scores, dim=1)

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


def paying_length(costs: StepCosts, budget: float, rate: float) -> int:
    """How many tokens to draft for the most tokens a millisecond, if each is accepted with probability `rate`; 0 if
    decoding without drafts is as fast.

    A round of k drafts takes k steps of the plan and a full pass over k + 1 tokens, and gives on average
    (1 - rate^(k + 1)) / (1 - rate) tokens (Leviathan et al. 2023, equation 1).
    """
    lengths = np.arange(MAX_DRAFT + 1)
    tokens = np.array([sum(rate**power for power in range(length + 1)) for length in lengths])
    step = costs.ms(budget, np.array([1]))[0]
    return int((tokens / (lengths * step + costs.ms(1.0, lengths + 1))).argmax())


class _Checking:
    """The model as transformers' loop for assisted decoding sees it: each pass is one of the full model, the first goes
    on from the prefix, and the candidates come from the drafter."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix | None, drafter: Drafter) -> None:
        self._model, self._prefix, self._drafter = model, prefix, drafter
        self.passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _get_candidate_generator(self, **_: Any) -> Drafter:
        return self._drafter

    def __call__(self, **inputs: Any) -> Any:
        prefix, self._prefix = self._prefix, None
        self.passes += 1
        with apply_plan(self._model, LayerPlan.full(self._drafter._plan.n_layers)):
            if prefix is None:
                return self._model(**inputs)
            with replaying(self._model, prefix, release=True):
                return self._model(**inputs)


def _view(cache: Cache, plan: LayerPlan) -> Cache:
    """The same cache, without the layers whose attention a plan skips: what is added to one is added to both."""
    view = copy.copy(cache)
    view.layers = [
        layer if index in plan.attention else DummyLayer()  # type: ignore[no-untyped-call]
        for index, layer in enumerate(cache.layers)
    ]
    return view
