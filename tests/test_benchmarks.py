"""The benchmarks' yardstick computes what the plan computes, and the README says what they measured."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import N_LAYERS, padded_batch, tiny_model

from backbone.plan import LayerPlan
from backbone.running import apply_plan

ROOT = Path(__file__).parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("plan", [LayerPlan.skipping(N_LAYERS, {0, 3}), LayerPlan.exiting(N_LAYERS, 3)], ids=str)
def test_the_deleted_model_equals_the_plan(family, plan) -> None:
    model, batch = tiny_model(family), padded_batch()
    with apply_plan(model, plan):
        expected = model(**batch).logits
    torch.testing.assert_close(script("decode").without_layers(model, plan)(**batch).logits, expected)


def test_the_readme_shows_the_committed_results() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert script("demo").results_table(result) in (ROOT / "README.md").read_text()
