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


def test_weights_are_shared_and_the_model_itself_stays_as_it_was() -> None:
    model, batch = tiny_model("gemma3_text"), padded_batch()
    stock = model(**batch).logits
    short = delete_layers(model, PLAN)
    assert decoder_layers(short)[0].mlp.up_proj.weight is decoder_layers(model)[1].mlp.up_proj.weight
    assert len(decoder_layers(model)) == model.config.num_hidden_layers == N_LAYERS
    assert torch.equal(model(**batch).logits, stock)


def test_it_is_saved_as_an_ordinary_shorter_checkpoint(tmp_path) -> None:
    model, batch = tiny_model("gemma3_text"), padded_batch()
    model.config.eos_token_id = [*range(N_LAYERS)]  # as many as layers
    delete_layers(model, PLAN).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.num_hidden_layers, loaded.config.eos_token_id) == (4, model.config.eos_token_id)
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
