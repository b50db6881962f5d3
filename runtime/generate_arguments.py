"""Which arguments of `generate()` an allocator takes: one decision for each that transformers has.

Under the full plan an argument gives stock `generate()`'s result, or a sentence refuses it by name. A test compares
these tables with the installed transformers and tries every argument (`tests/runtime/test_generate_arguments.py`).
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation.configuration_utils import GenerationMode

from backbone.errors import UnsupportedGenerationError
from backbone.families import check_is_model
from controller.base import Controller
from runtime.parts import AllocatorParts

_LIKE_STOCK = """
max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams use_cache
cache_implementation cache_config max_cache_len temperature top_k top_p min_p top_h typical_p epsilon_cutoff
eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
suppress_tokens begin_suppress_tokens sequence_bias guidance_scale watermarking_config num_return_sequences
output_attentions output_hidden_states output_scores output_logits return_dict_in_generate pad_token_id bos_token_id
eos_token_id encoder_no_repeat_ngram_size decoder_start_token_id is_assistant num_assistant_tokens
num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind
target_lookbehind assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config
low_memory diversity_penalty prefill_chunk_size inputs generation_config logits_processor stopping_criteria
prefix_allowed_tokens_fn streamer negative_prompt_ids negative_prompt_attention_mask input_ids attention_mask
position_ids cache past_key_values tokenizer assistant_tokenizer trust_remote_code
"""
LIKE_STOCK = frozenset(_LIKE_STOCK.split())
"""Taken; the exceptions of the lossless mode are in `REFUSED_BY_LOSSLESS`."""

OTHER_LOOPS: dict[str, GenerationMode] = {
    "assistant_model": GenerationMode.ASSISTED_GENERATION,
    "use_mtp": GenerationMode.ASSISTED_GENERATION,
    "prompt_lookup_num_tokens": GenerationMode.ASSISTED_GENERATION,
    "assistant_early_exit": GenerationMode.ASSISTED_GENERATION,
    "penalty_alpha": GenerationMode.CONTRASTIVE_SEARCH,
    "dola_layers": GenerationMode.DOLA_GENERATION,
    "num_beam_groups": GenerationMode.GROUP_BEAM_SEARCH,
    "constraints": GenerationMode.CONSTRAINED_BEAM_SEARCH,
    "force_words_ids": GenerationMode.CONSTRAINED_BEAM_SEARCH,
}
"""Refused where they make `generate()` run a decoding loop that an allocator does not run."""

Refusals = Mapping[str, tuple[Callable[[Any], bool], str]]
"""Argument -> whether a value is refused, and why."""


def _given(value: Any) -> bool:
    return value is not None and value is not False


def _several(value: Any) -> bool:
    return (value or 1) > 1


REFUSED: Refusals = {
    "assistant_model": (_given, "the draft would come from another model"),
    "synced_gpus": (_given, "each process would run other layers"),
    "custom_generate": (_given, "the allocator is the decoding loop"),
    "token_healing": (_given, "generate() changes the prompts with a tokenizer that it does not hand on"),
    "inputs_embeds": (_given, "plans are chosen from input_ids"),
    "cache_implementation": (lambda value: value == "paged", "continuous batching takes no custom_generate"),
}

_ONE_ROW = "drafts are checked for one prompt and one answer at a time"
_TAKEN_BACK = "drafts are taken back from the dynamic cache that generate() makes by default"
REFUSED_BY_LOSSLESS: Refusals = {
    "num_beams": (_several, _ONE_ROW),
    "num_return_sequences": (_several, _ONE_ROW),
    "use_cache": (lambda value: value is False, _TAKEN_BACK),
    "cache_implementation": (lambda value: value not in (None, "dynamic"), _TAKEN_BACK),
    "cache": (_given, _TAKEN_BACK),
    "guidance_scale": (lambda value: value not in (None, 1), "its processor keeps a cache that drafts would change"),
    "watermarking_config": (
        lambda value: isinstance(value, SynthIDTextWatermarkingConfig),
        "its processor remembers the tokens of refused drafts",
    ),
    "output_attentions": (_given, "a check computes several tokens in one pass"),
    "is_assistant": (_given, "its stopping criterion reads scores, which drafted tokens do not have yet"),
    "assistant_ensemble_weight": (_given, "answers would no longer be the full model's alone"),
}
"""Refused by `lossless=True` beside `REFUSED`."""

_FIELDS = vars(GenerationConfig()).keys()  # type: ignore[no-untyped-call]
UNDECIDED = sorted(_FIELDS - LIKE_STOCK - OTHER_LOOPS.keys() - REFUSED.keys())
"""Fields that only a newer transformers has, beside what says where a configuration came from."""


def refuse(arguments: Mapping[str, Any], refusals: Refusals, what: str) -> None:
    """Raises UnsupportedGenerationError for the first of some arguments that `what` cannot work with."""
    for name, (is_refused, reason) in refusals.items():
        if is_refused(value := arguments.get(name)):
            raise UnsupportedGenerationError(
                f"{what} cannot be used with {_shown(name, value)}: {reason}; leave it out"
            )


def refuse_other_loops(config: GenerationConfig) -> None:
    """Raises UnsupportedGenerationError for a complete configuration that asks for another decoding loop."""
    mode = config.get_generation_mode()
    for name in (name for name, other in OTHER_LOOPS.items() if other == mode):
        if _given(value := getattr(config, name, None)):
            raise UnsupportedGenerationError(
                f"an allocator works with greedy, sampling and beam decoding, and {_shown(name, value)} asks for "
                f"{mode.value.replace('_', ' ')}; leave it out"
            )


def refuse_undecided(config: GenerationConfig) -> None:
    """Raises UnsupportedGenerationError for a field of a newer transformers that is set."""
    defaults = config._get_default_generation_params()
    for name in UNDECIDED:
        value = getattr(config, name, None)
        if not name.startswith("_") and name != "transformers_version" and value not in (None, defaults.get(name)):
            raise UnsupportedGenerationError(
                f"{_shown(name, value)} is an argument of a newer transformers than this version was tried with; "
                "leave it out"
            )


def _shown(name: str, value: Any) -> str:
    is_plain = isinstance(value, str | int | float | list | tuple)
    return f"{name}={value!r:.60}" if is_plain else f"{name} ({type(value).__name__})"


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


_warned: WeakSet[Controller] = WeakSet()
"""Controllers of the allocators that were warned of in this process; copies of an allocator share theirs."""
_lock = threading.Lock()


class UncertifiedDecodingWarning(UserWarning):
    """A call decodes otherwise than the certificate says; the message says how."""


def warn_of_other_decoding(allocator: AllocatorParts, asked: Mapping[str, Any]) -> None:
    """Warn, once an allocator and process, of longer answers, other stop strings, sampling or beams.

    Without a certified price nothing is promised, and nothing is said.

    Args:
        allocator: whose certificate it is.
        asked: what a call asks for: `do_sample`, `num_beams`, `max_new_tokens`, `stop_strings`.
    """
    if allocator.certificate.price is None or not (found := list(_differences(allocator, asked))):
        return
    with _lock:
        if allocator.controller in _warned:
            return
        _warned.add(allocator.controller)
    certified = allocator.certificate.decoding or str(allocator.decoding)
    text = (
        f"the certificate covers answers by {certified!r}, and this call has {', '.join(found)}: its bound does not "
        "hold for these answers; later calls of this allocator are not named"
    )
    warnings.warn(UncertifiedDecodingWarning(text), stacklevel=2)


def _differences(allocator: AllocatorParts, asked: Mapping[str, Any]) -> Iterator[str]:
    decoding = allocator.decoding
    if not allocator.has_own_decoding:
        yield f"an allocator whose decoding was changed to {str(decoding)!r}"
    if asked["do_sample"]:
        yield "do_sample=True"
    if (asked["num_beams"] or 1) > 1:
        yield f"num_beams={asked['num_beams']}"
    if (asked["max_new_tokens"] or 0) > decoding.max_new_tokens:
        yield f"max_new_tokens={asked['max_new_tokens']}"
    strings = [asked["stop_strings"]] if isinstance(asked["stop_strings"], str) else asked["stop_strings"] or ()
    if strings and {*strings} != {*decoding.stop}:
        yield f"stop_strings={sorted(strings)}"
