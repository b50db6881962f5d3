"""The yardstick of the benchmarks, the model with its layers truly deleted, computes what the plan computes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import N_LAYERS, padded_batch, tiny_model

from backbone.plan import LayerPlan
from backbone.running import apply_plan

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def decode():
    spec = importlib.util.spec_from_file_location("decode_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("plan", [LayerPlan.skipping(N_LAYERS, {0, 3}), LayerPlan.exiting(N_LAYERS, 3)], ids=str)
def test_the_deleted_model_equals_the_plan(decode, family, plan) -> None:
    model, batch = tiny_model(family), padded_batch()
    with apply_plan(model, plan):
        expected = model(**batch).logits
    torch.testing.assert_close(decode.without_layers(model, plan)(**batch).logits, expected)
