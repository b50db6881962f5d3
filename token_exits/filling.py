"""Keys and values of the newest token for the rows that a layer does not run: propagated or shared.

Shapes: `R` rows, `r` of them, `D` hidden size, `H` key-value heads, `d` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from token_exits.heads import TokenExitsError
from token_exits.keys_values import KeysValues, project
from token_exits.settings import Strategy
from token_exits.token_pass import of_rows


class Filling:
    """What the layers of one model under one plan keep of rows that have left. `recompute` does not come here."""

    def __init__(self, model: PreTrainedModel, strategy: Strategy, plan: LayerPlan) -> None:
        self._layers, self._shares = list(decoder_layers(model)), strategy == "share"
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(self._layers)
        self._source: dict[int, int | None] = {}
        last: dict[str, int] = {}
        for index in sorted(plan.attention):
            self._source[index] = last.get(kinds[index])
            last[kinds[index]] = index

    def first_shared(self) -> int:
        """The first layer from which on every layer has one of its kind before it."""
        return max(index for index, source in self._source.items() if source is None) + 1

    def of_rows(self, rows: torch.Tensor, index: int, states: torch.Tensor, kwargs: dict[str, Any]) -> KeysValues:
        """What layer `index` is to keep of the newest token of `rows`, [r, H, 1, d] each.

        Args:
            states: with which they left, in their places among all [R, 1, D].
            kwargs: what the model hands to the layer.
        """
        if self._shares:
            source = kwargs["cache"].layers[self._source[index]]
            return source.keys[rows, :, -1:], source.values[rows, :, -1:]
        own = states if len(rows) == len(states) else states.index_select(0, rows)
        embeddings = of_rows(kwargs["position_embeddings"], rows, len(states)) if own is not states else None
        return project(self._layers[index], own, embeddings or kwargs["position_embeddings"])

    def fill(self, rows: torch.Tensor, index: int, states: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Let layer `index` keep the newest token of all rows, none of which it runs."""
        kwargs["cache"].update(*self.of_rows(rows, index, states, kwargs), index)


def check_shared(filling: Filling, depths: tuple[int, ...]) -> None:
    """Raises TokenExitsError where a token may leave before any layer of some kind has run."""
    if depths[0] < (first := filling.first_shared()):
        raise TokenExitsError(
            f"the strategy 'share' copies keys and values from a layer of the same kind, and this model's first of "
            f"each kind lie before layer {first}: let tokens leave from there on, not before layer {depths[0]}"
        )
