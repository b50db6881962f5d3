"""Delete the layers that a plan skips; the speed of the result is the limit of what skipping can reach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from backbone.errors import PlanError
from backbone.families import decoder_layers, decoder_of, family_of
from backbone.plan import LayerPlan


def _of_each(values: list[Any], kept: list[int]) -> list[Any]:
    return [values[layer] for layer in kept]


def _renumbered(layers: list[int], kept: list[int]) -> list[int]:
    return [new for new, old in enumerate(kept) if old in layers]


def _counted(first: int, kept: list[int]) -> int:
    return sum(layer < first for layer in kept)


LAYER_FIELDS: dict[str, Callable[[Any, list[int]], Any]] = {
    **dict.fromkeys(("layer_types", "mlp_layer_types", "no_rope_layers"), _of_each),
    **dict.fromkeys(("mlp_only_layers", "moe_layers"), _renumbered),
    **dict.fromkeys(("first_k_dense_replace", "max_window_layers", "num_dense_layers"), _counted),
}
"""Fields of a configuration: a value for each layer, numbers of layers, and how many of the first layers.

Another list with as many values as layers is taken for one of the first kind.
"""


def delete_layers(model: PreTrainedModel, plan: LayerPlan) -> PreTrainedModel:
    """A model of only the layers that `plan` runs, renumbered.

    It computes what `model` computes under `plan`. The weights are shared with `model`, not copied. `save_pretrained`
    writes an ordinary, shorter checkpoint.

    Raises:
        PlanError: the plan is for another number of layers, or runs half of a layer.
    """
    n_layers = len(decoder_layers(model))
    plan.check_fits(n_layers)
    if plan.attention != plan.mlp:
        raise PlanError(f"plan {plan} runs half of a layer; only whole layers can be deleted")
    kept = sorted(plan.attention)
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    short = copy.deepcopy(model, shared)
    for graphs in ("_compiled_call", "_layerbudget_graphs"):
        short.__dict__.pop(graphs, None)
    layers = nn.ModuleList(decoder_layers(short)[i] for i in kept)
    setattr(decoder_of(short), family_of(short).layers, layers)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:
                module.__dict__["layer_idx"] = index
    config = short.config
    if (step := getattr(config, "decoder_sparse_step", 1)) > 1:  # every so many layers have experts
        dense = {*config.mlp_only_layers, *(layer for layer in range(n_layers) if (layer + 1) % step)}
        config.mlp_only_layers, config.decoder_sparse_step = sorted(dense), 1
    for name, value in list(vars(config).items()):
        is_list = isinstance(value, list) and len(value) == n_layers and name != "eos_token_id"
        if value is not None and (renumber := LAYER_FIELDS.get(name, _of_each if is_list else None)):
            setattr(config, name, renumber(value, kept))
    config.num_hidden_layers = len(kept)
    return short
