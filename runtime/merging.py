"""Outputs of several lanes as the one output that `generate()` would give: rows in input order, lengths evened out.

Shapes: `R` rows, `T` steps, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from runtime.lanes import Lane
from runtime.request import Request

Output = torch.Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput


def merged(outputs: Sequence[Any], lanes: Sequence[Lane], request: Request) -> Output:
    """The outputs of the lanes as one.

    Shorter sequences are filled up with the padding token, and the scores of a lane that had ended say that this token
    was certain. There is no common cache: `cache` is None.
    """
    config = request.config
    fill = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    sequences = [output if isinstance(output, torch.Tensor) else output.sequences for output in outputs]
    returned = len(sequences[0]) // len(lanes[0].prompts)
    places = _places(lanes, returned)
    together = _joined(sequences, places, fill)
    if not config.return_dict_in_generate:
        return together
    rows = _places(lanes, request.copies)
    steps: dict[str, Any] = {
        name: _joined_steps([getattr(output, name) for output in outputs], rows, fill) for name in ("scores", "logits")
    }
    if outputs[0].get("beam_indices") is None:
        return GenerateDecoderOnlyOutput(sequences=together, **steps)  # type: ignore[arg-type]
    if outputs[0].sequences_scores is not None:
        steps["sequences_scores"] = _joined([output.sequences_scores[:, None] for output in outputs], places, 0)[:, 0]
    steps["beam_indices"] = _joined(_in_the_batch(outputs, rows), places, -1)
    return GenerateBeamDecoderOnlyOutput(sequences=together, **steps)  # type: ignore[arg-type]


def _places(lanes: Sequence[Lane], each: int) -> list[torch.Tensor]:
    """For each lane the places of its rows among all, where a prompt has `each` rows."""
    return [torch.tensor([prompt * each + i for prompt in lane.prompts for i in range(each)]) for lane in lanes]


def _joined(parts: Sequence[torch.Tensor], places: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """Parts [R', T'] as one tensor [R, T], filled up on the right."""
    longest = max(part.shape[1] for part in parts)
    joined = torch.cat([functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])
    ordered = torch.empty_like(joined)
    ordered[torch.cat(list(places)).to(joined.device)] = joined
    return ordered


def _joined_steps(
    parts: Sequence[tuple[torch.Tensor, ...] | None], places: Sequence[torch.Tensor], fill: int
) -> tuple[torch.Tensor, ...] | None:
    """Per-step scores [R', V] of lanes as per-step scores [R, V]."""
    steps = [part for part in parts if part is not None]
    if not steps:
        return None
    certain = [
        torch.full_like(part[0], -torch.inf).index_fill_(1, torch.tensor(fill, device=part[0].device), 0.0)
        for part in steps
    ]
    return tuple(
        _joined([part[i] if i < len(part) else ended for part, ended in zip(steps, certain, strict=True)], places, 0)
        for i in range(max(map(len, steps)))
    )


def _in_the_batch(outputs: Sequence[Any], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Beam indices, which count the rows of a lane, as indices of rows of the batch; -1 stays."""
    found = []
    for output, places in zip(outputs, rows, strict=True):
        indices = output.beam_indices
        of_batch = places.to(indices.device, indices.dtype)[indices.clamp(min=0).long()]
        found.append(torch.where(indices < 0, indices, of_batch))
    return found
