"""The first layers alone decide as the whole model does."""

import pytest
from tiny import N_LAYERS, padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import ByLength, make_allocator, with_healing

from backbone.families import decoder_layers
from runtime.parts import WrongModelError
from serving.router.selector import RequestSelector, load_probe


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_first_layers_decide_as_the_whole_model(family, tmp_path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    allocator = make_allocator(model, controller=ByLength(), name="by_length")
    batch = padded_batch()
    prompts = [row[kept.bool()].tolist() for row, kept in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    probe, tokenizer = load_probe(allocator, str(tmp_path), "cpu")
    assert len(decoder_layers(probe)) == allocator.menu.probe_depth < N_LAYERS
    choices = RequestSelector(allocator, probe, tokenizer).choose([[prompt] for prompt in prompts])
    assert [choice.plan for choice in choices] == allocator.allocate(model, **batch)
    assert {choice.because for choice in choices} == {"chosen"}


def test_another_model_is_refused(tmp_path) -> None:
    tiny_model("llama", layer_scale=0.5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(WrongModelError):
        load_probe(with_healing(tiny_model("llama")), str(tmp_path), "cpu")
