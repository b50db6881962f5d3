"""Features of prompts from the states of the probe layers.

Shapes: `B` or `N` prompts, `S` tokens, `D` hidden size, `P` probe layers. Prompts are padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from backbone.execution.prompt_prefix import probe_states
from backbone.families import final_norm
from controller.base import FEATURE_SETS, LearningError

Floats = NDArray[np.float32]
Features = dict[str, Floats]
"""Set of features -> its values [N, F]."""

WINDOW = 16
"""Last tokens of a prompt in the set `windows`."""


@dataclass(frozen=True, slots=True)
class Probed:
    """States of B prompts in the probe layers.

    Attributes:
        model: for the set `lens`.
        states: P + 1 states float32 [B, S, D]: the embeddings, then after each probe layer; padding is zero.
        input_ids: [B, S].
        mask: float32 [B, S], 1 for tokens.
    """

    model: PreTrainedModel
    states: Sequence[torch.Tensor]
    input_ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(
        cls, model: PreTrainedModel, states: Sequence[torch.Tensor], input_ids: torch.Tensor, mask: torch.Tensor
    ) -> Probed:
        weights = mask.to(states[0].device).float()
        return cls(model, [state.float() * weights[..., None] for state in states], input_ids, weights)

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens of each prompt [B, 1]."""
        return self.mask.sum(-1, keepdim=True)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over each prompt's tokens: [B, S, ...] -> [B, ...]."""
        weights = self.mask.reshape(*self.mask.shape, *[1] * (values.dim() - 2))
        return (values * weights).sum(1) / weights.sum(1)


def length(probed: Probed) -> torch.Tensor:
    """Logarithm of the number of tokens [B, 1]."""
    return probed.tokens.log()


def tokens(probed: Probed) -> torch.Tensor:
    """Statistics of token ids [B, 4].

    Share of different ids, share that repeat their neighbour, mean and spread of the logarithm of the id.
    In most vocabularies small ids are common tokens.
    """
    ids, mask = probed.input_ids.to(probed.mask.device), probed.mask
    marked = torch.where(mask.bool(), ids, -1).sort(-1).values
    different = (((marked[:, 1:] != marked[:, :-1]) & (marked[:, 1:] >= 0)).sum(-1) + (marked[:, 0] >= 0)).float()
    repeated = ((ids[:, 1:] == ids[:, :-1]).float() * mask[:, 1:] * mask[:, :-1]).sum(-1)
    logs = (ids.float() + 1).log()
    mean = probed.mean(logs)
    spread = probed.mean((logs - mean[:, None]) ** 2).sqrt()
    count = probed.tokens[:, 0]
    return torch.stack([different / count, repeated / count, mean, spread], dim=-1)


def embedding(probed: Probed) -> torch.Tensor:
    """Mean token embedding [B, D]."""
    return probed.mean(probed.states[0])


def states(probed: Probed) -> torch.Tensor:
    """Mean and last state after the probe layers [B, 2 * D]."""
    last = probed.states[-1]
    return torch.cat([probed.mean(last), last[:, -1]], dim=-1)


def windows(probed: Probed) -> torch.Tensor:
    """Mean state of the last `WINDOW` tokens, after all and half of the probe layers [B, 2 * D]."""
    weights = probed.mask[:, -WINDOW:, None]
    found = [probed.states[-1], probed.states[len(probed.states) // 2]]
    return torch.cat([state[:, -WINDOW:].sum(1) / weights.sum(1) for state in found], dim=-1)


def path(probed: Probed) -> torch.Tensor:
    """Norms and cosines of states along probe layers [B, 4 * P + 2].

    For each layer: log norm of the last state, mean log norm, and the cosine to the state before it, of the last token
    and on average. At the end: spread of the norms, and cosine of last and mean state.
    """
    columns = []
    for before, after in zip(probed.states, probed.states[1:], strict=False):
        norms = after.norm(dim=-1)
        turns = torch.cosine_similarity(before, after, dim=-1)
        columns += [norms[:, -1].log1p(), probed.mean(norms).log1p(), turns[:, -1], probed.mean(turns)]
    last, norms = probed.states[-1], probed.states[-1].norm(dim=-1)
    mean = probed.mean(norms)
    spread = probed.mean((norms - mean[:, None]) ** 2).sqrt() / mean.clamp(min=1e-6)
    cosine = torch.cosine_similarity(last[:, -1], probed.mean(last), dim=-1)
    return torch.stack([*columns, spread, cosine], dim=-1)


def lens(probed: Probed) -> torch.Tensor:
    """Entropy in nats and top probability by the logit lens [B, 2].

    Final norm and head on an early state (Belrose et al. 2023, arXiv 2303.08112, section 2). With a large vocabulary
    the head costs as much as several layers.
    """
    norm, head = final_norm(probed.model), probed.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if norm is None:
        raise LearningError(f"the features 'lens' need a final norm, and {type(probed.model).__name__} has none")
    logs = head(norm(probed.states[-1][:, -1].to(probed.model.dtype))).float().log_softmax(-1)
    return torch.stack([-(logs.exp() * logs).sum(-1), logs.amax(-1).exp()], dim=-1)


SETS: dict[str, Callable[[Probed], torch.Tensor]] = dict(
    zip(FEATURE_SETS, (length, tokens, embedding, states, windows, path, lens), strict=True)
)


@torch.inference_mode()
def extract(
    model: PreTrainedModel,
    states: Sequence[torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sets: Sequence[str],
) -> Features:
    """Compute sets of features of prompts [B, S], in one transfer from the device.

    Args:
        model: the model, for the set `lens`.
        input_ids: tokens of the prompts [B, S].
        states: P + 1 states [B, S, D]: the embeddings, then after each probe layer.
        attention_mask: 1 for tokens [B, S].
        sets: names in `SETS`.

    Returns:
        float32 [B, F] for each set; not finite where the states are not.
    """
    probed = Probed.of(model, states, input_ids, attention_mask)
    parts = [SETS[name](probed).float() for name in sets]
    values = torch.cat(parts, dim=-1).cpu().numpy()
    ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
    return dict(zip(sets, np.split(values, ends, axis=1), strict=True))


def prompt_features(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, probe_depth: int, sets: Sequence[str]
) -> Features:
    """Sets of features of left-padded prompts [B, S], from one pass through the probe layers."""
    states = probe_states(model, input_ids, attention_mask, probe_depth)
    return extract(model, states, input_ids, attention_mask, sets)


def rows_of(features: Mapping[str, Floats], rows: NDArray[np.intp]) -> Features:
    """The features of some prompts."""
    return {name: values[rows] for name, values in features.items()}
