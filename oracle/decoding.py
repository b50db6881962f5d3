"""How answers are generated, and where their text ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from backbone.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
"""Options of `generate()` with the values that leave greedy tokens as they are; for all others that is None."""

_FIXED = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
"""Answers are greedy: a run measures plans, and a drawn answer would add the draw's noise to every label."""

_ELSEWHERE = frozenset(
    (
        *_FIXED,
        *("max_new_tokens", "max_length", "max_time", "stop_strings", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("decoder_start_token_id", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"),
        *("eta_cutoff", "early_stopping", "length_penalty", "use_cache", "cache_implementation", "cache_config"),
        *("max_cache_len", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "num_assistant_tokens", "num_assistant_tokens_schedule", "is_assistant"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
        *("assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"),
        *("use_mtp", "compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size"),
        *("low_memory", "token_healing", "transformers_version", "_from_model_config"),
    )
)
"""Options that this module sets itself, that matter for sampling or beams alone, or that change how but not what."""


MOST_NEW_TOKENS, MOST_STOPS, LONGEST_STOP, LARGEST_TOKEN = 2**20, 64, 1000, 2**31
"""What no decoding exceeds; every token's id is below the last."""


class DecodingError(InputError):
    """Settings that answers cannot be generated with."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are generated: greedily, until a stop string, an end token, or `max_new_tokens`.

    Attributes:
        max_new_tokens: tokens of an answer, at most.
        stop: an answer's text ends before the first of these strings.
        ends: tokens beside the tokenizer's own end of text that end an answer, such as the end of a turn.
        options: further arguments of `generate()` that change which token is chosen, such as `repetition_penalty`.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"greedy max_new_tokens={self.max_new_tokens} stop={list(self.stop)!r}"]
        parts += [f"ends={list(self.ends)}"] if self.ends else []
        return " ".join([*parts, *(f"{name}={value!r}" for name, value in sorted(self.options.items()))])

    def of(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Decoding:
        """The same, with what the model's own generation config says as well: its end tokens, and its options where
        these settings do not name them. Once that is in, asking again changes nothing."""
        return self.completed(*own_settings(model, tokenizer))

    def completed(self, ends: Sequence[int], options: Mapping[str, Any]) -> Decoding:
        """The same, with what `own_settings` found in a model."""
        return replace(self, ends=tuple(sorted({*self.ends, *ends})), options={**options, **self.options})

    @property
    def changes_tokens(self) -> dict[str, Any]:
        """The options under which the chosen token is not the likeliest one."""
        return {name: value for name, value in self.options.items() if value != _NEUTRAL.get(name)}

    def arguments(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> dict[str, Any]:
        """The arguments of `generate()`; they count more than the model's generation config.

        Args:
            tokenizer: whose padding token is used.
            stops: the tokens that end an answer.
        """
        return {
            **_FIXED,
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": sorted(stops),
            "pad_token_id": tokenizer.pad_token_id,
            **self.options,
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return {**asdict(self), "stop": list(self.stop), "ends": list(self.ends)}

    @classmethod
    def from_dict(cls, data: Any) -> Decoding:
        """Raises DecodingError for values that `to_dict` does not write."""
        if not isinstance(data, dict) or data.keys() != {"max_new_tokens", "stop", "ends", "options"}:
            raise DecodingError(f"decoding should hold max_new_tokens, stop, ends and options, got {data!r:.80}")
        new, stop, ends, options = data["max_new_tokens"], data["stop"], data["ends"], data["options"]
        if type(new) is not int or not 1 <= new <= MOST_NEW_TOKENS:
            raise DecodingError(f"max_new_tokens must be a number from 1 to {MOST_NEW_TOKENS}, got {new!r:.80}")
        if not isinstance(stop, list) or not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stop):
            raise DecodingError(f"stop must be a list of strings of 1 to {LONGEST_STOP} characters, got {stop!r:.80}")
        if len(stop) > MOST_STOPS:
            raise DecodingError(f"stop must be a list of at most {MOST_STOPS} strings, got {len(stop)}")
        if not isinstance(ends, list) or not all(type(one) is int and 0 <= one < LARGEST_TOKEN for one in ends):
            raise DecodingError(f"ends must be a list of token ids, got {ends!r:.80}")
        return cls(new, tuple(stop), tuple(ends), checked_options(options))


def checked_options(options: Any) -> dict[str, Any]:
    """Raises DecodingError unless these are options of `generate()` that a greedy answer may depend on."""
    if not isinstance(options, dict):
        raise DecodingError(f"options must hold arguments of generate(), got {options!r:.80}")
    if not options:
        return options
    from transformers import GenerationConfig  # slow, and a configuration without options is checked without it

    for name in options:
        if name in _ELSEWHERE:
            raise DecodingError(f"options cannot hold {name!r}: answers are greedy and end as `decoding` itself says")
        if name not in GenerationConfig().to_dict():  # type: ignore[no-untyped-call]
            raise DecodingError(f"options holds {name!r:.80}, which is no argument of generate()")
    return options


def own_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], dict[str, Any]]:
    """What a model's own generation config says of greedy answers: end tokens beside the tokenizer's, and options."""
    config: Any = model.generation_config
    ends = {*_listed(config.eos_token_id)} - {*_listed(tokenizer.eos_token_id)}
    options = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _ELSEWHERE and value != _NEUTRAL.get(name) and value is not None
    }
    return sorted(ends), options


def _listed(tokens: int | Sequence[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string, without outer white space."""
    for string in stop:
        text = text.split(string, 1)[0]
    return text.strip()
