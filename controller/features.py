"""Features of a prompt: its pooled hidden states after the probe layers, and a few scalars; then a learned projection.

One extractor serves training and generation. Shapes: `B` or `N` prompts, `S` tokens, `D` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from backbone.probing import probe

Floats = NDArray[np.float32]

SCALARS = ("log_tokens", "last_norm", "mean_norm", "norm_spread", "last_to_mean_cosine")


def prompt_features(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, probe_depth: int
) -> Floats:
    """Features [B, 2 * D + 5] of prompts [B, S] (left-padded), from one pass through the first `probe_depth` layers."""
    states = probe(model, input_ids, attention_mask, probe_depth)
    return pool(states, attention_mask)


def pool(states: torch.Tensor, attention_mask: torch.Tensor) -> Floats:
    """Mean state, last state and `SCALARS` of each prompt: [B, S, D] and [B, S] -> float32 [B, 2 * D + 5]."""
    states, mask = states.float(), attention_mask.to(states.device).float()
    tokens = mask.sum(-1)
    mean = (states * mask[..., None]).sum(1) / tokens[:, None]
    last = states[:, -1]
    norms = states.norm(dim=-1)
    mean_norm = (norms * mask).sum(-1) / tokens
    spread = (((norms - mean_norm[:, None]) ** 2 * mask).sum(-1) / tokens).sqrt()
    cosine = torch.cosine_similarity(last, mean, dim=-1)
    scalars = torch.stack([tokens.log(), last.norm(dim=-1), mean_norm, spread, cosine], dim=-1)
    pooled: Floats = torch.cat([mean, last, scalars], dim=-1).cpu().numpy()
    return pooled


@dataclass(frozen=True, slots=True)
class Projection:
    """Standardises features, then reduces the states to their principal components; the scalars stay.

    Attributes:
        mean: of each raw feature [2 * D + 5].
        scale: standard deviation of each raw feature, 1 where it is constant.
        components: [C, 2 * D], each divided by the standard deviation of the training prompts along it.
    """

    mean: Floats
    scale: Floats
    components: Floats

    @classmethod
    def fit(cls, features: Floats, n_components: int) -> Projection:
        """Fit on training prompts [N, 2 * D + 5]; keeps at most N - 1 components."""
        from sklearn.decomposition import PCA

        mean, scale = features.mean(0), features.std(0)
        scale = np.where(scale > 1e-6, scale, 1.0).astype(np.float32)
        states = ((features - mean) / scale)[:, : -len(SCALARS)]
        pca = PCA(min(n_components, len(features) - 1, states.shape[1]), random_state=0, svd_solver="full").fit(states)
        spread = np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
        return cls(mean, scale, np.ascontiguousarray(pca.components_ / spread[:, None], dtype=np.float32))

    def __call__(self, features: Floats) -> Floats:
        """[N, 2 * D + 5] -> [N, C + 5]."""
        standardised = (features - self.mean) / self.scale
        states, scalars = standardised[:, : -len(SCALARS)], standardised[:, -len(SCALARS) :]
        return np.concatenate([states @ self.components.T, scalars], axis=1)

    def save(self, path: Path) -> None:
        arrays = {"mean": self.mean, "scale": self.scale, "components": self.components}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)  # others are torn

    @classmethod
    def load(cls, path: Path) -> Projection:
        return cls(**load_file(path))
