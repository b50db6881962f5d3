"""A plan as a shorter checkpoint."""

from dataclasses import replace

import pytest
import torch
from command import layerbudget, refused
from tiny import padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import PLANS, make_allocator, with_healing
from transformers import AutoModelForCausalLM, AutoTokenizer

from backbone.execution.apply_plan import apply_plan
from serving.router.export import ExportError, export_plan

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def tokens(model):
    return model.generate(**padded_batch(), **GREEDY).tolist()


def test_the_checkpoint_says_what_the_model_says_under_the_plan(folder) -> None:
    model = tiny_model("llama")
    done = layerbudget("export", "--model", folder / "model", "--plan", PLANS[0], folder / "short")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("4 layers")
    with apply_plan(model, PLANS[0]):
        expected = tokens(model)
    assert tokens(AutoModelForCausalLM.from_pretrained(folder / "short").eval()) == expected
    assert len(AutoTokenizer.from_pretrained(folder / "short")) == len(tiny_tokenizer())


def test_an_adapter_is_merged(folder) -> None:
    model = tiny_model("llama")
    allocator = with_healing(model)
    allocator = replace(allocator, healing=replace(allocator.healing, bridges={}))
    with apply_plan(model, PLANS[0], allocator.healing):
        expected = tokens(model)
    export_plan(model, tiny_tokenizer(), str(PLANS[0]), folder / "short", allocator)
    short = AutoModelForCausalLM.from_pretrained(folder / "short").eval()
    found = short(**padded_batch()).logits
    assert tokens(short) == expected
    with apply_plan(tiny_model("llama"), PLANS[0]) as frozen:
        assert not torch.allclose(found, frozen(**padded_batch()).logits, atol=1e-4)


def test_bridges_are_refused_by_name(folder) -> None:
    model = tiny_model("llama")
    with pytest.raises(ExportError, match="has bridges"):
        export_plan(model, tiny_tokenizer(), str(PLANS[0]), folder / "short", with_healing(model))
    assert not (folder / "short").exists()


def test_layers_that_no_configuration_gives_are_refused(folder) -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ExportError, match=r"holds plan 0-1,4-5: .* in the place of layer 4"):
        export_plan(model, tiny_tokenizer(), "0-1,4-5", folder / "short")
    export_plan(model, tiny_tokenizer(), "0-3", folder / "short")


def test_a_place_that_cannot_be_is_refused_before_the_model_loads(folder) -> None:
    for out, said in (("model", "is there already"), ("model/config.json/short", "short.unfinished: not a directory")):
        assert said in refused("export", "--model", folder / "none", "--plan", "0-3", folder / out)


@pytest.mark.parametrize(
    ("plan", "said"), [("0-9", "layer 6 is outside"), ("0-4,5a", "half of a layer"), ("", "cannot read")]
)
def test_a_plan_that_cannot_be_is_refused(folder, plan, said) -> None:
    assert said in refused("export", "--model", folder / "model", "--plan", plan, folder / "short")


def test_a_model_or_an_allocator_is_needed(folder) -> None:
    done = layerbudget("export", "--plan", "0-3", folder / "short")
    assert done.returncode == 2
    assert "give --model M or --allocator DIR" in done.stderr


def test_the_allocators_model_must_be_the_one(folder) -> None:
    make_allocator(tiny_model("llama", layer_scale=0.5)).save_pretrained(folder / "allocator")
    sentence = refused(
        "export", "--allocator", folder / "allocator", "--model", folder / "model", "--plan", "0-3", folder / "short"
    )
    assert "this allocator was made for" in sentence
