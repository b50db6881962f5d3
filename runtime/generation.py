"""Run the rows of one prepared `generate()` call in lanes: the rows that share a plan decode together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from backbone.errors import InputError
from backbone.plan import LayerPlan
from backbone.running import apply_plan

_METHODS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
}


class UnsupportedGenerationError(InputError):
    """A way of generating that cannot be combined with an allocator; the message names it."""


def decode_in_lanes(
    model: PreTrainedModel,
    plans: Sequence[LayerPlan],
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    **loop_arguments: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Decode rows [R, S], each under its plan, with the model's own decoding loop.

    Args:
        plans: one plan a row of `input_ids`.
        model_kwargs: what `generate()` prepared for the loop: attention mask, cache, position ids and so on.
        loop_arguments: logits processors, stopping criteria, streamer.

    Returns:
        Sequences [R', S'] or the usual output object, rows in input order (R' counts `num_return_sequences`).

    Raises:
        UnsupportedGenerationError: assisted or other decoding, a cache that holds tokens, or outputs a step when rows
            run different plans.
    """
    mode = generation_config.get_generation_mode()
    if mode not in _METHODS:
        raise UnsupportedGenerationError(
            f"an allocator works with greedy, sampling and beam decoding, not with {mode.value}"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedGenerationError("an allocator cannot start from a cache that already holds tokens; pass none")
    loop = getattr(model, _METHODS[mode])
    lanes = _lanes(plans)
    if len(lanes) > 1:
        _check_mixable(generation_config, loop_arguments)
    outputs = []
    for plan, rows in lanes.items():
        index = torch.tensor(rows, device=input_ids.device)
        whole = len(rows) == len(plans)
        kwargs = model_kwargs if whole else _lane_kwargs(model, model_kwargs, index, len(plans))
        with apply_plan(model, plan):
            outputs.append(loop(input_ids[index], generation_config=generation_config, **loop_arguments, **kwargs))
    return outputs[0] if len(outputs) == 1 else _merged(outputs, list(lanes.values()), generation_config)


def _lanes(plans: Sequence[LayerPlan]) -> dict[LayerPlan, list[int]]:
    lanes: dict[LayerPlan, list[int]] = {}
    for row, plan in enumerate(plans):
        lanes.setdefault(plan, []).append(row)
    return lanes


def _check_mixable(config: GenerationConfig, loop_arguments: dict[str, Any]) -> None:
    for name in ("output_scores", "output_logits", "output_hidden_states", "output_attentions"):
        if getattr(config, name):
            raise UnsupportedGenerationError(
                f"{name}=True needs all rows on one plan; this batch's rows run different plans"
            )
    if loop_arguments.get("streamer") is not None:
        raise UnsupportedGenerationError("a streamer takes one prompt at a time; this batch's rows run different plans")


def _lane_kwargs(model: PreTrainedModel, kwargs: dict[str, Any], index: torch.Tensor, n_rows: int) -> dict[str, Any]:
    """The rows of one lane out of the prepared arguments, with an empty cache of the same kind."""
    lane = {
        name: value[index] if isinstance(value, torch.Tensor) and value.dim() and len(value) == n_rows else value
        for name, value in kwargs.items()
    }
    if kwargs.get("past_key_values") is not None:
        lane["past_key_values"] = _empty_like(model, kwargs["past_key_values"])
    return lane


def _empty_like(model: PreTrainedModel, cache: Cache) -> Cache:
    if isinstance(cache, StaticCache):
        return StaticCache(config=model.config, max_cache_len=cache.get_max_length())
    if type(cache) is DynamicCache:
        return DynamicCache(config=model.config, offloading=cache.offloading)
    raise UnsupportedGenerationError(f"a {type(cache).__name__} cannot serve rows that run different plans")


def _merged(
    outputs: Sequence[Any], rows_of_lanes: Sequence[Sequence[int]], config: GenerationConfig
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Sequences of all lanes in input order, shorter ones filled up with the padding token on the right."""
    lanes = [output if isinstance(output, torch.Tensor) else output.sequences for output in outputs]
    copies = row_copies(config)
    returned = sum(map(len, lanes)) * copies // sum(map(len, rows_of_lanes))
    order = [row // copies * returned + i for rows in rows_of_lanes for row in rows[::copies] for i in range(returned)]
    fill = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    length = max(lane.shape[1] for lane in lanes)
    joined = torch.cat([functional.pad(lane, (0, length - lane.shape[1]), value=fill) for lane in lanes])
    merged = torch.empty_like(joined)
    merged[torch.tensor(order, device=joined.device)] = joined
    if not config.return_dict_in_generate:
        return merged
    return GenerateDecoderOnlyOutput(sequences=merged)  # type: ignore[arg-type]


def row_copies(config: GenerationConfig) -> int:
    """Neighbouring rows that `generate()` made of each prompt: its beams or its samples."""
    return max(config.num_beams or 1, config.num_return_sequences or 1)
