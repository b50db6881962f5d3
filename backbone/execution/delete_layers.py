"""Delete the layers that a plan skips; the speed of the result is the limit of what skipping can reach."""

from __future__ import annotations

import copy
from itertools import chain

from torch import nn
from transformers import PreTrainedModel

from backbone.errors import PlanError
from backbone.families import decoder_layers, decoder_of, family_of
from backbone.plan import LayerPlan


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
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n_layers and name != "eos_token_id":  # such as layer_types
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    return short
