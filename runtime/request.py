"""One `generate()` call as its decoding loop is given it, and what can be done with it.

Shapes: `B` prompts, each in `copies` neighbouring rows (its beams or samples), `R = B * copies` rows, `S` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, StopStringCriteria
from transformers.cache_utils import DummyLayer
from transformers.generation.configuration_utils import GenerationMode

from backbone.execution.cache import remembered_plans
from backbone.families import decoder_layers
from backbone.healing.attaching import attached_digest
from backbone.plan import LayerPlan
from runtime.call_arguments import check_left_padded, prefix_inputs
from runtime.generate_arguments import (
    REFUSED,
    UnsupportedGenerationError,
    refuse,
    refuse_other_loops,
    refuse_undecided,
)

_METHODS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
}


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
        refuse_other_loops(self.config)
        refuse_undecided(self.config)
        if self.loop.get("streamer") is not None and (self.config.num_beams or 1) > 1:
            raise UnsupportedGenerationError("a streamer cannot follow beam search; leave one of them out")
        refuse(self.kwargs, REFUSED, "an allocator")
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
        plans, healing = known or ((LayerPlan.full(len(decoder_layers(self.model))),), "")
        if len(plans) not in (1, self.n_prompts):
            raise UnsupportedGenerationError(
                f"the cache passed in was filled under the plans of {len(plans)} prompts, but this call has "
                f"{self.n_prompts}; give the same prompts, or start with a new cache"
            )
        shortest = min(plans, key=lambda plan: plan.layers)
        if healing != (attached := attached_digest(self.model, shortest)):
            raise UnsupportedGenerationError(
                f"the cache passed in was filled under plan {shortest} with {healing or 'no'} healing parts, and the "
                f"plan would go on with {attached or 'none'}; start with a new cache"
            )
        return [plans[0]] * self.n_prompts if len(plans) == 1 else list(plans)

    def check_plans(self, plans: Sequence[LayerPlan]) -> None:
        """Raises UnsupportedGenerationError for what rows with these plans [B] cannot give."""
        if self.config.output_attentions and len({*plans}) > 1:
            raise UnsupportedGenerationError(
                "output_attentions=True needs all rows in every layer, and these prompts have different plans; leave "
                "it out, or give one prompt at a time"
            )
