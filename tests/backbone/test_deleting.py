"""That a deleted model computes what its plan computes is part of every family's conformance (test_families.py)."""

import pytest
import torch
from tiny import N_LAYERS, padded_batch, tiny_model
from transformers import AutoModelForCausalLM

from backbone.errors import PlanError
from backbone.execution.apply_plan import apply_plan
from backbone.execution.delete_layers import delete_layers
from backbone.families import decoder_layers
from backbone.plan import LayerPlan

PLAN = LayerPlan.skipping(N_LAYERS, {0, 3})
MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}


def test_weights_are_shared_and_the_model_itself_stays_as_it_was() -> None:
    model, batch = tiny_model("gemma3_text"), padded_batch()
    stock = model(**batch).logits
    short = delete_layers(model, PLAN)
    assert decoder_layers(short)[0].mlp.up_proj.weight is decoder_layers(model)[1].mlp.up_proj.weight
    assert len(decoder_layers(model)) == model.config.num_hidden_layers == N_LAYERS
    assert torch.equal(model(**batch).logits, stock)


@pytest.mark.parametrize(
    ("family", "options", "fields"),
    [
        (
            "gemma3_text",
            {"eos_token_id": [*range(N_LAYERS)]},
            {"eos_token_id": [*range(N_LAYERS)]},
        ),  # as many as layers
        ("qwen3_moe", {"mlp_only_layers": [2, 3]}, {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2]}),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 0, 0, 1, 1]}, {"no_rope_layers": [1, 1, 0, 1]}),
        ("qwen2", {"max_window_layers": 3, "use_sliding_window": True, "sliding_window": 6}, {"max_window_layers": 2}),
        ("afmoe", {**MOE, "num_dense_layers": 2}, {"num_dense_layers": 1}),
        ("dots1", {**MOE, "first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
        ("llama4_text", {**MOE, "moe_layers": [2, 3], "intermediate_size_mlp": 64}, {"moe_layers": [1]}),
    ],
)
def test_it_is_saved_as_an_ordinary_shorter_checkpoint(family, options, fields, tmp_path) -> None:
    model, batch = tiny_model(family, **options), padded_batch()
    delete_layers(model, PLAN).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in fields} == fields
    assert loaded.config.num_hidden_layers == 4
    with apply_plan(model, PLAN):
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LayerPlan.full(7), "is for 7 layers, this model has 6"),
        (LayerPlan.skipping(N_LAYERS, mlp={2}), "runs half of a layer"),
    ],
)
def test_plans_that_cannot_be_deleted_are_named(plan, message, model) -> None:
    with pytest.raises(PlanError, match=message):
        delete_layers(model, plan)
