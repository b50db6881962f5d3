"""One `generate()` call: its arguments, what is refused of them, and what its decoding loop is given.

Shapes: `B` prompts, each in `copies` neighbouring rows (its beams or samples), `R = B * copies` rows, `S` tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import DummyLayer
from transformers.generation.configuration_utils import GenerationMode

from backbone.errors import UnsupportedGenerationError
from backbone.execution.rows import remembered_plans
from backbone.families import check_is_model, decoder_layers, decoder_of
from backbone.healing.healing import ReadyHealing, healing_digest
from backbone.plan import LayerPlan
from runtime.generate_arguments import REFUSED, refuse, refuse_other_loops, refuse_undecided

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

    def plans_of_cache(self, healing: ReadyHealing | None) -> list[LayerPlan] | None:
        """The plans [B] that the given cache was filled under, which go on with `healing`; None if the cache is empty.

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
        if filled != (own := healing_digest(healing, shortest)):
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


def generate_by(
    loop: Callable[..., Any],
    model: PreTrainedModel,
    inputs: Any,
    generation_config: Any,
    streamer: Any,
    arguments: Mapping[str, Any],
) -> Any:
    """`model.generate()` with a loop as its `custom_generate`; a streamer is ended when an error is raised.

    Args:
        loop: takes what `generate()` gives to a `custom_generate`.
        model, inputs, generation_config, streamer, arguments: as those of stock `generate()`.

    Raises:
        UnsupportedGenerationError: one of `REFUSED`, or stop strings without a tokenizer.
    """
    check_is_model(model)
    given = {"inputs": inputs, "generation_config": generation_config, **arguments}
    try:
        refuse({name: asked_for(model, given, name) for name in REFUSED}, REFUSED, "an allocator")
        stock = _with_stop_strings(model, given)
        return model.generate(**stock, streamer=streamer, custom_generate=loop)  # type: ignore[operator]
    except BaseException:
        if streamer is not None:  # whoever reads from it in another thread would wait for ever
            with suppress(Exception):
                streamer.end()
        raise


def asked_for(model: PreTrainedModel, arguments: Mapping[str, Any], name: str) -> Any:
    """The value that `generate()` takes for an argument: given, or from a configuration, the model's own last."""
    if name in arguments:
        return arguments[name]
    own = getattr(arguments.get("generation_config"), name, None)
    return getattr(getattr(model, "generation_config", None), name, None) if own is None else own


def _with_stop_strings(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with `stop_strings`, from wherever they come, and `tokenizer` made into a stopping criterion.

    transformers 5.24 drops the tokenizer on its way to a `custom_generate`, and then misses it.

    Raises:
        UnsupportedGenerationError: stop strings without a tokenizer.
    """
    config, default = arguments.get("generation_config"), getattr(model, "generation_config", None)
    strings = asked_for(model, arguments, "stop_strings")
    if not strings:
        return arguments
    if arguments.get("tokenizer") is None:
        raise UnsupportedGenerationError("stop_strings needs the tokenizer as well; pass tokenizer=")
    rest = {name: value for name, value in arguments.items() if name not in ("stop_strings", "tokenizer")}
    if getattr(config, "stop_strings", None):
        rest["generation_config"] = copy.deepcopy(config)
        rest["generation_config"].stop_strings = None
    if getattr(default, "stop_strings", None):
        rest["stop_strings"] = None  # a keyword counts more than the model's own configuration
    stop = StopStringCriteria(tokenizer=arguments["tokenizer"], stop_strings=strings)
    rest["stopping_criteria"] = StoppingCriteriaList([*(rest.get("stopping_criteria") or []), stop])
    return rest
