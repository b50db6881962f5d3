"""The arguments of `allocate` and `generate()`: what is refused, and what `generate()` does not hand on by itself.

Shapes: `B` prompts, `S` tokens.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from backbone.families import check_is_model, decoder_of
from runtime.generate_arguments import REFUSED, refuse
from runtime.generate_arguments import UnsupportedGenerationError as UnsupportedGenerationError

_NOT_OF_THE_PREFIX = ("input_ids", "inputs_embeds", "attention_mask", "cache", "use_cache")
_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def prefix_inputs(model: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Those of the arguments that the decoder is given for the prompts beside tokens and mask, such as
    `position_ids` [B, S]."""
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
    """The mask [B, S] of prompts that come without one, by `generate()`'s own rule: pad tokens are no tokens, unless
    the token that pads also ends texts."""
    config = copy.deepcopy(model.generation_config)
    model._prepare_special_tokens(config, device=input_ids.device)  # type: ignore[operator]
    mask: torch.Tensor = model._prepare_attention_mask_for_generation(input_ids, config, {})  # type: ignore[operator]
    return mask


def check_left_padded(attention_mask: torch.Tensor | None) -> None:
    """Raises UnsupportedGenerationError if a row of a mask [B, S] ends in padding. Padding inside a row, such as that
    behind an earlier answer of a conversation, is no matter."""
    if attention_mask is None or attention_mask.dim() != 2 or not attention_mask.shape[1]:
        return
    ends = (attention_mask[:, -1] == 0).nonzero()
    if len(ends):
        raise UnsupportedGenerationError(
            f"row {int(ends[0])} ends in padding, a 0 in its attention_mask; pad prompts on the left, with "
            "tokenizer.padding_side = 'left'"
        )


def kept_back(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments `streamer`, `assistant_model` and `synced_gpus` of the `generate()` of `model` that is running the
    caller as its `custom_generate`; empty where there is none.

    transformers 5.24 hands on none of the three: a streamer would get the prompt, and then nothing, for ever. They are
    read where they are still known, in the frame of `generate()`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _GENERATE and frame.f_locals.get("self") is model:
            return {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model", "synced_gpus")}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


@contextmanager
def given_to_loop(
    model: PreTrainedModel, logits_processor: Any, stopping_criteria: Any, streamer: Any
) -> Iterator[dict[str, Any]]:
    """What a decoding loop that runs as a `custom_generate` hands on to the model's own: processors, criteria and the
    streamer, also one that `generate()` kept back, which is ended when the block raises.

    Args:
        model: that generates.
        logits_processor, stopping_criteria: as `generate()` hands them on.
        streamer: given to the loop itself; None where the one of `generate()` is to be looked for.

    Raises:
        UnsupportedGenerationError: one of `REFUSED` that `generate()` kept back.
    """
    loop = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    kept = kept_back(model)
    own = kept.get("streamer") if streamer is None else None
    if (followed := streamer if own is None else own) is not None:  # beams take none, not even None
        loop["streamer"] = followed
    with ending_on_error(own):
        refuse(kept, REFUSED, "an allocator")
        yield loop


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
        UnsupportedGenerationError: one of `REFUSED`, or see `with_stop_strings`.
    """
    check_is_model(model)
    given = {"inputs": inputs, "generation_config": generation_config, **arguments}
    with ending_on_error(streamer):
        refuse({name: asked_for(model, given, name) for name in REFUSED}, REFUSED, "an allocator")
        stock = with_stop_strings(model, given)
        return model.generate(**stock, streamer=streamer, custom_generate=loop)  # type: ignore[operator]


@contextmanager
def ending_on_error(streamer: Any) -> Iterator[None]:
    """Ends a streamer when the block raises, so that whoever reads from it in another thread does not wait for ever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            with suppress(Exception):
                streamer.end()
        raise


def asked_for(model: PreTrainedModel, arguments: Mapping[str, Any], name: str) -> Any:
    """The value that `generate()` takes for an argument: given, or from a configuration, the model's own last."""
    if name in arguments:
        return arguments[name]
    own = getattr(arguments.get("generation_config"), name, None)
    return getattr(getattr(model, "generation_config", None), name, None) if own is None else own


def with_stop_strings(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate()` with `stop_strings`, also those of a generation configuration, and `tokenizer` made
    into a stopping criterion.

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
