"""Features of prompts from the states of the probe layers, and their projection for controllers.

Shapes: `B` or `N` prompts, `S` tokens, `D` hidden size, `P` probe layers. Prompts are padded on the left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from backbone.execution.prompt_prefix import probe_states
from backbone.families import final_norm
from controller.base import FEATURE_SETS, WIDE, Floats, LearningError, check_sets

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


LEAST_VARIANCE = 1e-4
ARRAYS = ("mean", "scale", "components")
"""The saved arrays of a projection."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection of features: standardised, wide sets reduced to principal components.

    It is fitted on training prompts and saved with the allocator.

    Attributes:
        sets: the sets of features that it reads, in order.
        mean: of each raw feature [F].
        scale: standard deviation of each raw feature, 1 where it is constant.
        wide: number of leading raw features that the components reduce; the others stay.
        components: [C, wide], each divided by the standard deviation of the training prompts along it. Variances
            count as at least `LEAST_VARIANCE` of the first one: less is mostly rounding.
    """

    sets: tuple[str, ...]
    mean: Floats
    scale: Floats
    wide: int
    components: Floats

    @classmethod
    def fit(cls, features: Features, sets: Sequence[str], n_components: int) -> Projection:
        """Fit on N training prompts, with at most N - 1 components, none without wide sets.

        Raises:
            LearningError: features that are not finite, or the same for all prompts.
        """
        from sklearn.decomposition import PCA

        ordered = tuple(sorted(sets, key=lambda name: name not in WIDE))
        raw = _joined(features, ordered)
        _check(raw, ordered)
        mean, scale = raw.mean(0), raw.std(0)
        scale = np.where(scale > 1e-6, scale, 1.0).astype(np.float32)
        wide = sum(features[name].shape[1] for name in ordered if name in WIDE)
        components = np.zeros((0, 0), dtype=np.float32)
        if wide:
            states = ((raw - mean) / scale)[:, :wide]
            pca = PCA(min(n_components, len(raw) - 1, wide), random_state=0).fit(states)
            variance = pca.explained_variance_
            spread = np.sqrt(np.maximum(variance, max(LEAST_VARIANCE * variance[0], 1e-12)))
            components = (pca.components_ / spread[:, None]).astype(np.float32)
        return cls(ordered, mean, scale, wide, np.ascontiguousarray(components))

    def __call__(self, features: Features) -> Floats:
        """Projected features [N, C + narrow] of N prompts."""
        standardised = (_joined(features, self.sets) - self.mean) / self.scale
        states, narrow = standardised[:, : self.wide], standardised[:, self.wide :]
        return np.concatenate([states @ self.components.T, narrow], axis=1) if self.wide else narrow

    def first(self, n_components: int) -> Projection:
        """The same with at most so many components."""
        return replace(self, components=np.ascontiguousarray(self.components[:n_components]))

    @property
    def arrays(self) -> dict[str, Floats]:
        """`ARRAYS`, to be saved."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}

    def save(self, path: Path) -> None:
        # One entry of metadata: the library writes several in an order that changes from process to process.
        save_file(self.arrays, path, {"sets": json.dumps(self.sets)})

    @property
    def n_features(self) -> int:
        """Number of projected features."""
        return len(self.components) * bool(self.wide) + len(self.mean) - self.wide

    @classmethod
    def load(cls, path: Path) -> Projection:
        """Raises LearningError for a file that `save` did not write."""
        try:
            with safe_open(path, "numpy") as file:
                sets = tuple(json.loads((file.metadata() or {})["sets"]))
                arrays = {name: file.get_tensor(name) for name in ARRAYS}
            check_sets(sets)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise LearningError(f"{path} holds no projection: {error}") from None
        return cls.of_arrays(path, sets, arrays)

    @classmethod
    def of_arrays(cls, path: Path, sets: tuple[str, ...], arrays: dict[str, Floats]) -> Projection:
        """From `arrays`, read from a file; raises LearningError where they do not fit."""
        mean, scale, components = (arrays[name] for name in ARRAYS)
        fits = mean.ndim == 1 and scale.shape == mean.shape and components.ndim == 2
        if not fits or components.shape[1] > len(mean) or any(a.dtype != np.float32 for a in (mean, scale, components)):
            raise LearningError(
                f"{path} holds no projection: mean {mean.shape}, scale {scale.shape} and components {components.shape} "
                "do not fit, or are not float32"
            )
        if not all(np.isfinite(array).all() for array in (mean, scale, components)) or not (scale > 0).all():
            raise LearningError(f"{path} holds no projection: a number is not finite, or a scale not above 0")
        return cls(sets, mean, scale, components.shape[1], components)


def _joined(features: Features, sets: Sequence[str]) -> Floats:
    return np.concatenate([features[name] for name in sets], axis=1)


def _check(raw: Floats, sets: Sequence[str]) -> None:
    if bad := int((~np.isfinite(raw).all(axis=1)).sum()):
        raise LearningError(
            f"{bad} of {len(raw)} prompts have features that are not finite: the first layers overflow on them; "
            "leave them out, or load the model in bfloat16 or float32"
        )
    if not (raw.std(0) > 1e-6).any():
        raise LearningError(
            f"all {len(raw)} prompts have the same features ({', '.join(sets)}), so nothing tells them apart"
        )
