"""One `generate()` call as its decoding loop is given it, and what can be done with it.

Shapes: `B` prompts, each in `copies` neighbouring rows (its beams or samples), `R = B * copies` rows, `S` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from backbone.execution.cache import remembered_plan
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from backbone.stand_ins.attaching import attached_digest
from runtime.call_arguments import UnsupportedGenerationError, check_left_padded, prefix_inputs

_METHODS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
}
_COUNT_ROWS = (
    ClassifierFreeGuidanceLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""The library's logits processors that tell rows by their place in the whole batch."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prepared call.

    Attributes:
        model: the model.
        input_ids: [R, S], left-padded.
        config: the generation configuration, complete.
        kwargs: what `generate()` prepared for the model: attention mask, cache, position ids and so on.
        loop: what it prepared for the decoding loop: logits processors, stopping criteria, streamer.

    Raises:
        UnsupportedGenerationError: assisted or other decoding, a streamer of beams, embeddings without tokens, or
            padding on the right.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    config: GenerationConfig
    kwargs: dict[str, Any]
    loop: dict[str, Any]

    def __post_init__(self) -> None:
        if self.mode not in _METHODS:
            raise UnsupportedGenerationError(
                f"an allocator works with greedy, sampling and beam decoding, not with {self.mode.value}"
            )
        if self.loop.get("streamer") is not None and (self.config.num_beams or 1) > 1:
            raise UnsupportedGenerationError("a streamer cannot follow beam search; leave one of them out")
        if self.kwargs.get("inputs_embeds") is not None:
            raise UnsupportedGenerationError("an allocator reads input_ids; inputs_embeds cannot be used with it")
        if (mask := self.kwargs.get("attention_mask")) is not None:
            check_left_padded(mask[:: self.copies])

    @property
    def mode(self) -> GenerationMode:
        return self.config.get_generation_mode()

    @property
    def decoding_loop(self) -> Any:
        return getattr(self.model, _METHODS[self.mode])

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
    def cache(self) -> Cache | None:
        return self.kwargs.get("cache")

    @property
    def captures_layers(self) -> bool:
        """Every layer must really run its prompt, since what happens in it is asked for."""
        return bool(self.config.output_attentions or self.config.output_hidden_states)

    @property
    def one_lane_reason(self) -> str:
        """Why all rows must run together; empty where they need not."""
        if getattr(self.cache, "_is_user_defined", False):
            return "a cache that was passed in"
        if self.loop.get("streamer") is not None:
            return "a streamer"
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name):
                return f"{name}=True"
        bound = [type(one).__name__ for one in self.loop.get("logits_processor") or () if isinstance(one, _COUNT_ROWS)]
        return bound[0] if bound else ""

    def check_lanes(self, max_lanes: int | None, round_up: bool) -> None:
        """Raises UnsupportedGenerationError unless the batch can be put into lanes as asked."""
        if max_lanes is not None and max_lanes < 1:
            raise UnsupportedGenerationError(f"max_lanes must be at least 1, got {max_lanes}")
        if max_lanes is not None and not round_up:
            raise UnsupportedGenerationError(
                "max_lanes rounds plans up, which round_up=False forbids; give one of them"
            )
        if not round_up and self.n_prompts > 1 and self.one_lane_reason:
            raise UnsupportedGenerationError(
                f"{self.one_lane_reason} needs all prompts in one lane, which round_up=False forbids; leave it out, or "
                "give one prompt at a time"
            )

    def prompts(self) -> dict[str, Any]:
        """What the decoder is given for the prompts themselves: `input_ids` [B, S], `attention_mask`, and so on."""
        inputs = {
            name: value[:: self.copies].to(self.model.device)
            for name, value in prefix_inputs(self.model, self.kwargs).items()
        }
        mask = self.kwargs.get("attention_mask")
        return {
            "input_ids": self.input_ids[:: self.copies].to(self.model.device),
            "attention_mask": None if mask is None else mask[:: self.copies].to(self.model.device),
            **inputs,
        }

    def plan_of_cache(self) -> LayerPlan | None:
        """The plan that the given cache was filled under, which goes on; None if the cache is empty.

        Raises:
            UnsupportedGenerationError: it was filled under a plan that is not known, or with other stand-ins.
        """
        cache = self.cache
        if cache is None or int(cache.get_seq_length()) == 0:
            return None
        known = remembered_plan(cache)
        if known is None and any(isinstance(layer, DummyLayer) for layer in cache.layers):
            raise UnsupportedGenerationError(
                "the cache passed in lacks layers, and it is not known which plan filled it; start with a new cache"
            )
        plan, stand_ins = known or (LayerPlan.full(len(decoder_layers(self.model))), "")
        if stand_ins != (attached := attached_digest(self.model, plan)):
            raise UnsupportedGenerationError(
                f"the cache passed in was filled under plan {plan} with {stand_ins or 'no'} stand-ins, and the plan "
                f"would go on with {attached or 'none'}; start with a new cache"
            )
        return plan
