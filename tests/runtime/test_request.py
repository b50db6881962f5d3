"""Arguments as stock `generate()` takes them; what cannot be meant is refused in one sentence."""

import pytest
import torch
from tiny import padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import CHOSEN, GREEDY, PLANS, Recorder, alone, make_allocator
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer
from transformers.generation import LogitsProcessor

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plan
from backbone.testing import patches

S = 11
WAYS = {
    "allocator": lambda allocator, model, **arguments: allocator.generate(model, **arguments),
    "model": lambda allocator, model, **arguments: model.generate(**arguments, custom_generate=allocator),
}


def test_inputs_and_configuration_come_as_in_stock_generate(model, allocator) -> None:
    batch, config = padded_batch(), GenerationConfig(**GREEDY)
    ids, mask = batch["input_ids"], {"attention_mask": batch["attention_mask"]}
    expected = allocator.generate(model, **batch, **GREEDY)
    assert torch.equal(allocator.generate(model, ids, **mask, **GREEDY), expected)
    assert torch.equal(allocator.generate(model, inputs=ids, **mask, **GREEDY), expected)
    assert torch.equal(allocator.generate(model, ids, config, **mask), expected)
    assert torch.equal(allocator.generate(model, ids, generation_config=config, **mask), expected)
    assert torch.equal(model.generate(ids, config, **mask, custom_generate=allocator), expected)


def test_stop_strings_of_a_configuration_end_their_rows(allocator) -> None:
    model, tokenizer, batch = tiny_model("llama"), tiny_tokenizer(), padded_batch()
    token = alone(model, CHOSEN, batch, **GREEDY)[3][1]
    text = tokenizer.decode([token])
    expected = allocator.generate(model, **batch, **GREEDY, pad_token_id=0, stop_strings=[text], tokenizer=tokenizer)
    assert expected[3, S + 1] == token
    assert set(expected[3, S + 2 :].tolist()) <= {0, token}
    assert not torch.equal(expected, allocator.generate(model, **batch, **GREEDY, pad_token_id=0))
    config = GenerationConfig(**GREEDY, pad_token_id=0, stop_strings=[text])
    for _ in range(2):
        output = allocator.generate(model, **batch, generation_config=config, tokenizer=tokenizer)
        assert torch.equal(output, expected)
    assert config.stop_strings == [text], "the caller's own configuration stays what it is"
    with pytest.raises(UnsupportedGenerationError, match="stop_strings needs the tokenizer as well"):
        allocator.generate(model, **batch, generation_config=config)
    model.generation_config.stop_strings = [text]
    for own in (GREEDY, {"generation_config": GenerationConfig(**GREEDY)}):
        output = allocator.generate(model, **batch, **own, pad_token_id=0, tokenizer=tokenizer)
        assert torch.equal(output, expected)
    without = allocator.generate(model, **batch, **GREEDY, pad_token_id=0, stop_strings=None)
    assert without.shape[1] == S + 6


def test_a_streamer_gets_every_token(model, allocator) -> None:
    recorder, batch = Recorder(), padded_batch()
    output = allocator.generate(model, **batch, **GREEDY, streamer=recorder)
    assert recorder.put_[0] == batch["input_ids"].tolist()
    assert recorder.put_[1:] == output[:, S:].T.tolist()
    assert recorder.ends == 1


class Broken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise ZeroDivisionError("a broken processor")


ERRORS = {
    "logits_processor": ([Broken()], ZeroDivisionError, "a broken processor"),
    "assistant_model": (object(), UnsupportedGenerationError, r"assistant_model \(object\)"),
    "prompt_lookup_num_tokens": (3, UnsupportedGenerationError, "=3 asks for assisted generation"),
    "synced_gpus": (True, UnsupportedGenerationError, "synced_gpus=True"),
    "num_beams": (2, UnsupportedGenerationError, "a streamer cannot follow beam search"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_its_cause_and_ends_a_streamer_once(model, allocator, name) -> None:
    value, error, message = ERRORS[name]
    recorder, before = Recorder(), patches(model)
    with pytest.raises(error, match=message):
        allocator.generate(model, **padded_batch(), **{**GREEDY, name: value}, streamer=recorder)
    assert recorder.ends == 1
    assert patches(model) == before


def test_a_reader_of_a_streamer_does_not_wait_for_ever(model, allocator) -> None:
    streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=10)
    with pytest.raises(ValueError, match="max_token"):
        allocator.generate(model, padded_batch()["input_ids"][:1], max_token=1, streamer=streamer)
    assert list(streamer) == [""]


def test_a_streamer_that_cannot_end_does_not_hide_the_error(model, allocator) -> None:
    class Unending(Recorder):
        def end(self) -> None:
            raise RuntimeError("no end")

    with pytest.raises(UnsupportedGenerationError, match=r"assistant_model \(object\)"):
        allocator.generate(model, **padded_batch(), **GREEDY, assistant_model=object(), streamer=Unending())


def test_padding_on_the_right_is_refused(model, allocator) -> None:
    batch = padded_batch()
    flipped = {name: tensor.flip(1) for name, tensor in batch.items()}
    sentence = r"row 1 ends in padding, .*padding_side = 'left'"
    with pytest.raises(UnsupportedGenerationError, match=sentence):
        allocator.allocate(model, **flipped)
    for generate in WAYS.values():
        with pytest.raises(UnsupportedGenerationError, match=sentence):
            generate(allocator, model, **flipped, **GREEDY)
        with pytest.raises(UnsupportedGenerationError, match=sentence):
            generate(allocator, model, **flipped, **GREEDY, num_beams=3)
        with pytest.raises(UnsupportedGenerationError, match=sentence):
            generate(allocator, model, inputs=flipped["input_ids"], **GREEDY)


def test_padding_behind_an_earlier_turn_is_allowed(model, allocator) -> None:
    batch, cache = {name: tensor[2:] for name, tensor in padded_batch().items()}, DynamicCache(config=model.config)
    first = allocator.generate(model, **batch, **GREEDY, cache=cache)
    longer = torch.cat([first, batch["input_ids"]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.long), batch["attention_mask"]], 1)
    output = allocator.generate(model, longer, attention_mask=mask, cache=cache, **GREEDY)
    with apply_plan(model, PLANS[0]):
        assert torch.equal(output, model.generate(longer, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"atention_mask": torch.ones(4, 11)}, "no argument 'atention_mask'; did you mean 'attention_mask'"),
        ({"position_id": torch.ones(4, 11)}, "no argument 'position_id'; did you mean 'position_ids'"),
        ({"max_new_tokens": 3}, "no argument 'max_new_tokens'; it takes what the prompts are"),
        ({"cache": DynamicCache()}, "no argument 'cache'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_allocate_refuses_what_it_would_ignore(model, allocator, arguments, message) -> None:
    with pytest.raises(UnsupportedGenerationError, match=message):
        allocator.allocate(model, padded_batch()["input_ids"], **arguments)


def test_what_another_family_takes_is_not_suggested() -> None:
    model = tiny_model("bloom")
    with pytest.raises(UnsupportedGenerationError, match="no argument 'position_ids'") as refused:
        make_allocator(model).allocate(model, **padded_batch(), position_ids=torch.ones(4, 11))
    assert str(refused.value).count("position_ids") == 1


def test_allocate_takes_positions(model, allocator) -> None:
    batch = padded_batch()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert allocator.allocate(model, **batch, position_ids=positions) == CHOSEN
    assert allocator.allocate(model, **batch, position_ids=None) == CHOSEN
