"""One `generate()` call: what it is given, its plans, and its decoding in one pass, each row under its prompt's plan.

Shapes: `B` prompts, each in `copies` neighbouring rows (its beams or samples), `R = B * copies` rows, `S` tokens.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StopStringCriteria,
)
from transformers.cache_utils import DummyLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plans
from backbone.execution.prompt_prefix import Prefix, replaying
from backbone.execution.rows import remembered_plans
from backbone.families import decoder_layers, decoder_of
from backbone.healing.healing import ReadyHealing, healing_digest
from backbone.plan import LayerPlan, PlanMenu
from runtime.generate_arguments import REFUSED, refuse, refuse_other_loops, refuse_undecided
from runtime.plan_selection import PlanSelector

Output = torch.Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput

_METHODS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
}
_NOT_OF_THE_PREFIX = ("input_ids", "inputs_embeds", "attention_mask", "cache", "use_cache")


@dataclass(frozen=True, slots=True)
class Request:
    """A prepared call.

    Attributes:
        model: the model.
        input_ids: [R, S], left-padded.
        config: the generation configuration, complete.
        kwargs: what `generate()` prepared for the model: attention mask, cache, position ids and so on.
        loop: what it prepared for the decoding loop: logits processors, stopping criteria, streamer.
        healing: what shortened plans run with.

    Raises:
        UnsupportedGenerationError: assisted or other decoding, a streamer of beams, embeddings without tokens, or
            padding on the right.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    config: GenerationConfig
    kwargs: dict[str, Any]
    loop: dict[str, Any]
    healing: ReadyHealing | None = None

    def __post_init__(self) -> None:
        refuse_other_loops(self.config)
        refuse_undecided(self.config)
        if self.loop.get("streamer") is not None and (self.config.num_beams or 1) > 1:
            raise UnsupportedGenerationError("a streamer cannot follow beam search; leave one of them out")
        refuse(self.kwargs, REFUSED, "an allocator")
        if (mask := self.kwargs.get("attention_mask")) is not None:
            check_left_padded(mask[:: self.copies])

    @property
    def decoding_loop(self) -> Any:
        """The model's own, for the mode that is asked for."""
        return getattr(self.model, _METHODS[self.config.get_generation_mode()])

    @property
    def copies(self) -> int:
        return max(self.config.num_beams or 1, self.config.num_return_sequences or 1)

    @property
    def n_prompts(self) -> int:
        return len(self.input_ids) // self.copies

    @property
    def max_new_tokens(self) -> int:
        return max(int(self.config.max_length or 0) - self.input_ids.shape[1], 1)

    @property
    def decoding(self) -> dict[str, Any]:
        """What is asked for, as far as certificates depend on it."""
        criteria = self.loop.get("stopping_criteria") or ()
        strings = [text for one in criteria if isinstance(one, StopStringCriteria) for text in one.stop_strings]
        own = {name: getattr(self.config, name) for name in ("do_sample", "num_beams")}
        return {**own, "max_new_tokens": self.max_new_tokens, "stop_strings": strings}

    @property
    def cache(self) -> Cache | None:
        return self.kwargs.get("cache")

    @property
    def goes_on(self) -> bool:
        """The call goes on from a cache that is filled."""
        return self.cache is not None and int(self.cache.get_seq_length()) > 0

    @property
    def captures_layers(self) -> bool:
        """Every layer must really run its prompt, since what happens in it is asked for."""
        return bool(self.config.output_attentions or self.config.output_hidden_states)

    def prompts(self) -> dict[str, Any]:
        """What the decoder is given for the prompts themselves: `input_ids` [B, S], `attention_mask`, and so on."""
        given = {
            "input_ids": self.input_ids,
            "attention_mask": self.kwargs.get("attention_mask"),
            **prefix_inputs(self.model, self.kwargs),
        }
        return {
            name: None if value is None else value[:: self.copies].to(self.model.device)
            for name, value in given.items()
        }

    def plans_of_cache(self) -> list[LayerPlan] | None:
        """The plans [B] that the given cache was filled under, which go on; None if the cache is empty.

        Raises:
            UnsupportedGenerationError: it was filled under plans that are not known, for another number of prompts, or
                with other healing parts.
        """
        cache = self.cache
        if cache is None or not self.goes_on:
            return None
        known = remembered_plans(cache)
        if known is None and any(isinstance(layer, DummyLayer) for layer in cache.layers):
            raise UnsupportedGenerationError(
                "the cache passed in lacks layers, and it is not known which plan filled it; start with a new cache"
            )
        plans, filled = known or ((LayerPlan.full(len(decoder_layers(self.model))),), "")
        if len(plans) not in (1, self.n_prompts):
            raise UnsupportedGenerationError(
                f"the cache passed in was filled under the plans of {len(plans)} prompts, but this call has "
                f"{self.n_prompts}; give the same prompts, or start with a new cache"
            )
        shortest = min(plans, key=lambda plan: plan.layers)
        if filled != (own := healing_digest(self.healing, shortest)):
            raise UnsupportedGenerationError(
                f"the cache passed in was filled under plan {shortest} with {filled or 'no'} healing parts, and the "
                f"plan would go on with {own or 'none'}; start with a new cache"
            )
        return [plans[0]] * self.n_prompts if len(plans) == 1 else list(plans)

    def check_plans(self, plans: Sequence[LayerPlan]) -> None:
        """Raises UnsupportedGenerationError for what rows with these plans [B] cannot give."""
        if self.config.output_attentions and len({*plans}) > 1:
            raise UnsupportedGenerationError(
                "output_attentions=True needs all rows in every layer, and these prompts have different plans; leave "
                "it out, or give one prompt at a time"
            )


def prefix_inputs(model: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments that the decoder takes beside tokens and mask, such as `position_ids` [B, S]."""
    accepted = _accepted(model)
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and name in accepted}


def _accepted(model: PreTrainedModel) -> list[str]:
    return [name for name in inspect.signature(decoder_of(model).forward).parameters if name not in _NOT_OF_THE_PREFIX]


def check_known(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Raises UnsupportedGenerationError for an argument of `allocate` that is none of `prefix_inputs`."""
    known = prefix_inputs(model, arguments)
    for name, value in arguments.items():
        if value is not None and name not in known:
            near = get_close_matches(name, {"input_ids", "attention_mask", *_accepted(model)} - {name}, 1)
            hint = f"did you mean {near[0]!r}?" if near else "it takes what the prompts are, not how to generate"
            raise UnsupportedGenerationError(f"allocate takes no argument {name!r}; {hint}")


def inferred_mask(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The mask [B, S] of prompts without one, by `generate()`'s rule for pad tokens."""
    config = copy.deepcopy(model.generation_config)
    model._prepare_special_tokens(config, device=input_ids.device)  # type: ignore[operator]
    mask: torch.Tensor = model._prepare_attention_mask_for_generation(input_ids, config, {})  # type: ignore[operator]
    return mask


def check_left_padded(attention_mask: torch.Tensor | None) -> None:
    """Raises UnsupportedGenerationError if a row of a mask [B, S] ends in padding; padding inside a row is allowed."""
    if attention_mask is None or attention_mask.dim() != 2 or not attention_mask.shape[1]:
        return
    ends = (attention_mask[:, -1] == 0).nonzero()
    if len(ends):
        raise UnsupportedGenerationError(
            f"row {int(ends[0])} ends in padding, a 0 in its attention_mask; pad prompts on the left, with "
            "tokenizer.padding_side = 'left'"
        )


def loop_arguments(logits_processor: Any, stopping_criteria: Any, streamer: Any) -> dict[str, Any]:
    """What a `custom_generate` hands on to the model's own loop; beams take no streamer, not even None."""
    found = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    return found if streamer is None else {**found, "streamer": streamer}


class Moment:
    """When all work given to a device so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def ms_since(self, earlier: Moment) -> float:
        """Milliseconds from an earlier moment to this one; on a GPU this waits until the moment has come."""
        if self._event is None or earlier._event is None:
            return (self._seconds - earlier._seconds) * 1000
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event))


class FirstToken(LogitsProcessor):
    """The last of a loop's logits processors: notes when the first token's scores are there, changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.moment: Moment | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.moment is None:
            self.moment = Moment(self._device)
        return scores


def plans_of(request: Request, menu: PlanMenu, selector: PlanSelector) -> tuple[list[LayerPlan], Prefix | None]:
    """The plans of the prompts [B], those of a given cache if it is filled, and the kept prefix, if any."""
    if (plans := request.plans_of_cache()) is not None:
        return plans, None
    decision = selector.decide(request.model, **request.prompts(), keep_cache=not request.captures_layers)
    return [menu.plans[index] for index in decision.chosen], decision.prefix


def decode(
    request: Request, plans: Sequence[LayerPlan], start: Moment, prefix: Prefix | None = None
) -> tuple[Output, float]:
    """Decode with the model's own loop; gives the milliseconds from `start` to the first tokens too.

    Args:
        request: the prepared call.
        plans: of the B prompts.
        start: when the call began.
        prefix: what the first layers made of the prompts; None to run them again. Its memory is given back.
    """
    clock = FirstToken(request.model.device)
    loop = {**request.loop, "logits_processor": LogitsProcessorList([*request.loop["logits_processor"], clock])}
    with apply_plans(request.model, plans, request.healing), ExitStack() as stack:
        if prefix is not None:
            rows = torch.arange(request.n_prompts, device=request.model.device).repeat_interleave(request.copies)
            chosen = None if request.copies == 1 else rows
            stack.enter_context(replaying(request.model, prefix, chosen, release=True))
        output: Output = request.decoding_loop(
            request.input_ids, generation_config=request.config, **loop, **request.kwargs
        )
    return output, clock.moment.ms_since(start) if clock.moment else 0.0
