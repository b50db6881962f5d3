"""Adapters on a model: saved, applied, refused."""

import pytest
import torch
from tiny import N_LAYERS, padded_batch, tiny_model

from backbone.errors import UnsupportedModelError
from backbone.execution.apply_plan import apply_plan
from backbone.families import model_fingerprint
from backbone.healing.healing import Adapter, Healing
from backbone.plan import LayerPlan


def product(n_out: int, n_in: int, value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n_out, 1), value), torch.full((1, n_in), value)


def test_adapters_survive_saving(tmp_path) -> None:
    model, batch = tiny_model("gpt2"), padded_batch()
    changes = {"transformer.h.3.mlp.c_proj.weight": product(32, 128, 0.1)}
    healing = Healing(model_fingerprint(model), {}, Adapter(changes))
    healing.save(tmp_path / "healing.safetensors")
    loaded = Healing.load(tmp_path / "healing.safetensors")
    assert loaded.digest == healing.digest
    outputs = []
    for each in (healing, loaded):
        with apply_plan(model, LayerPlan.exiting(N_LAYERS, 4), each), torch.no_grad():
            outputs.append(model(**batch).logits)
    assert torch.equal(*outputs)


def test_weights_that_cannot_be_changed_are_refused() -> None:
    model = tiny_model("llama")
    name = "model.layers.3.mlp.down_proj.weight"
    with pytest.raises(UnsupportedModelError, match=r"changes model\.layers\.9.*does not have"):
        Adapter({"model.layers.9.mlp.down_proj.weight": product(32, 64)}).merged(model)
    with pytest.raises(UnsupportedModelError, match="not the weight of a linear layer"):
        Adapter({"model.layers.3.input_layernorm.weight": product(32, 32)}).merged(model)
    with pytest.raises(UnsupportedModelError, match=r"of shape \(2, 2\), the model's is \(32, 64\)"):
        Adapter({name: product(2, 2)}).merged(model)
    module = model.get_submodule(name.rpartition(".")[0])
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        Adapter({name: product(32, 64)}).merged(model)
