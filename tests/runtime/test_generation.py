"""Allocated generation equals each row generated alone under its plan, through both doors, with all stock features."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from tiny import N_LAYERS, OPTIONS, UNDECLARED, padded_batch, tiny_model
from tiny_allocator import CHOSEN, DICT, GREEDY, PLANS, Ban, ByLength, alone, make_allocator
from transformers import CompileConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plan
from backbone.families import decoder_layers

SAMPLING = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "temperature": 0.7}
S = 11


def row_alone(model, row, **options):
    """Stock's output for one row of `padded_batch`, with its padding, under its plan."""
    one = {name: tensor[row : row + 1] for name, tensor in padded_batch().items()}
    with apply_plan(model, CHOSEN[row]):
        return model.generate(**one, **options)


def cut(output, expected) -> list[list[int]]:
    """The new tokens of the rows, as far as the expected ones go; the rest must be padding."""
    rows = output[:, S:].tolist()
    assert all(set(row[len(want) :]) <= {0} for row, want in zip(rows, expected, strict=True))
    return [row[: len(want)] for row, want in zip(rows, expected, strict=True)]


@pytest.mark.parametrize("family", [*sorted(OPTIONS), *UNDECLARED])
def test_rows_equal_their_plan_alone_in_every_family(family) -> None:
    model, batch = tiny_model(family), padded_batch()
    allocator = make_allocator(model, controller=ByLength())
    assert allocator.allocate(model, **batch) == CHOSEN
    expected = alone(model, CHOSEN, batch, **GREEDY)
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        output = allocator.generate(model, **batch, **GREEDY, **cache)
        assert cut(output, expected) == expected, cache
        assert torch.equal(output, model.generate(**batch, **GREEDY, **cache, custom_generate=allocator))
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 6}
    output = allocator.generate(model, **batch, **beams)
    assert output.shape == (8, S + 6)
    for row, plan in enumerate(CHOSEN):
        keep = batch["attention_mask"][row].bool()
        with apply_plan(model, plan):
            want = model.generate(input_ids=batch["input_ids"][row : row + 1, keep], **beams)
        assert torch.equal(output[2 * row : 2 * row + 2, S:], want[:, keep.sum() :])


def test_no_layer_computes_a_prompt_token_twice(model, allocator) -> None:
    computed = [0] * N_LAYERS

    def count(index, module, args, output):
        computed[index] += output.shape[0] * output.shape[1]

    with ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(model)):
            hooks.enter_context(layer.mlp.register_forward_hook(partial(count, index)))
        allocator.generate(model, **padded_batch(), **GREEDY, min_new_tokens=6)
    rows = [sum(index in plan.mlp for plan in CHOSEN) for index in range(N_LAYERS)]
    assert computed == [count * (S + 5) for count in rows]


def test_sampling_under_one_plan_draws_what_stock_sampling_draws(model, allocator) -> None:
    cheap = {name: tensor[2:] for name, tensor in padded_batch().items()}
    options = {**SAMPLING, "num_return_sequences": 3}
    torch.manual_seed(0)
    found = allocator.generate(model, **cheap, **options)
    torch.manual_seed(0)
    with apply_plan(model, PLANS[0]):
        assert torch.equal(found, model.generate(**cheap, **options))
    assert found.shape == (6, S + 4)


@pytest.mark.parametrize(("returned", "beams"), [(1, 1), (2, 1), (1, 2)])
def test_sampling_keeps_rows_with_their_prompts(model, allocator, returned, beams) -> None:
    batch = padded_batch()
    output = allocator.generate(model, **batch, **SAMPLING, num_return_sequences=returned, num_beams=beams)
    assert torch.equal(output[:, :S], batch["input_ids"].repeat_interleave(returned, 0))


def test_scores_are_those_of_each_row(model, allocator) -> None:
    batch = padded_batch()
    options = {**GREEDY, **DICT, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    eos = int(alone(model, CHOSEN, batch, **GREEDY, repetition_penalty=1.3)[2][2])
    output = allocator.generate(model, **batch, **options, eos_token_id=[eos, 1], pad_token_id=0)
    steps = output.sequences.shape[1] - S
    assert len(output.scores) == len(output.logits) == steps
    for row in range(4):
        want = row_alone(model, row, **options, eos_token_id=[eos, 1], pad_token_id=0)
        for step, (scores, logits) in enumerate(zip(want.scores, want.logits, strict=True)):
            torch.testing.assert_close(output.scores[step][row : row + 1], scores)
            torch.testing.assert_close(output.logits[step][row : row + 1], logits)
    transitions = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert transitions.isfinite().all()


def test_beam_indices_and_scores_point_into_the_whole_batch(model, allocator) -> None:
    batch = padded_batch()
    options = {**GREEDY, **DICT, "output_scores": True, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 6}
    output = allocator.generate(model, **batch, **options)
    assert output.sequences_scores.shape == (8,)
    transitions = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    lengths = (output.beam_indices >= 0).sum(1)
    torch.testing.assert_close(transitions.sum(1) / lengths, output.sequences_scores)
    owners = output.beam_indices.clamp(min=0) // 3
    assert torch.equal(owners[:, 0], torch.arange(4).repeat_interleave(2).to(owners.dtype))


def test_one_prompt_streams(model, tokenizer, allocator, capsys) -> None:
    ids = padded_batch()["input_ids"][:1]
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = allocator.generate(model, input_ids=ids, **GREEDY, streamer=streamer)
    assert capsys.readouterr().out.strip() == tokenizer.decode(output[0, S:]).strip()


def test_prompts_may_be_captured_layer_by_layer(model, allocator) -> None:
    batch = padded_batch()
    output = allocator.generate(model, **batch, **GREEDY, **DICT, output_hidden_states=True)
    assert len(output.hidden_states[0]) == N_LAYERS + 1
    for row in range(4):
        want = row_alone(model, row, **GREEDY, **DICT, output_hidden_states=True).hidden_states
        for found, alone_ in zip(output.hidden_states[0], want[0], strict=True):
            seen = batch["attention_mask"][row].bool()
            torch.testing.assert_close(found[row, seen], alone_[0, seen])


def test_attentions_are_for_one_plan_at_a_time(model, allocator) -> None:
    model.set_attn_implementation("eager")
    try:
        one = {name: tensor[:1] for name, tensor in padded_batch().items()}
        found = allocator.generate(model, **one, **GREEDY, **DICT, output_attentions=True).attentions
        stock = model.generate(**one, **GREEDY, **DICT, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for own, want in zip(found[0], stock[0], strict=True):
        torch.testing.assert_close(own, want)
    with pytest.raises(UnsupportedGenerationError, match="output_attentions=True needs all rows in every layer"):
        allocator.generate(model, **padded_batch(), **GREEDY, **DICT, output_attentions=True)


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def test_stopping_criteria_and_logits_processors_hold_for_every_row(model, allocator) -> None:
    batch = padded_batch()
    own = {"stopping_criteria": StoppingCriteriaList([StopAt(S + 3)])}
    assert allocator.generate(model, **batch, **GREEDY, **own).shape[1] == S + 3
    banned = alone(model, CHOSEN, batch, **GREEDY)[2][0]
    own = {"logits_processor": LogitsProcessorList([Ban(banned)])}
    output = allocator.generate(model, **batch, **GREEDY, **own)
    expected = alone(model, CHOSEN, batch, **GREEDY, **own)
    assert banned not in output[:, S:]
    assert cut(output, expected) == expected


def test_processors_that_count_rows_see_the_whole_batch(model, allocator) -> None:
    batch, seen = padded_batch(), set()

    def allowed(row, tokens):
        seen.add((row, tuple(tokens[:S].tolist())))
        return [20 + row]

    output = allocator.generate(model, **batch, **GREEDY, prefix_allowed_tokens_fn=allowed)
    assert output[:, S:].tolist() == [[20 + row] * 6 for row in range(4)]
    assert seen == {(row, tuple(tokens)) for row, tokens in enumerate(batch["input_ids"].tolist())}


def test_inference_mode_changes_nothing(model, allocator) -> None:
    batch = padded_batch()
    with torch.inference_mode():
        inside = allocator.generate(model, **batch, **GREEDY)
    assert torch.equal(inside, allocator.generate(model, **batch, **GREEDY))


def test_one_plan_is_compiled_and_mixed_ones_are_not() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    allocator = make_allocator(model, controller=ByLength())
    config = CompileConfig(mode=None, backend="eager")
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(
        allocator.generate(model, **batch, **GREEDY, **compiled), allocator.generate(model, **batch, **GREEDY)
    )
    assert not model.__dict__.get("_layerbudget_graphs")
    cheap = {name: tensor[2:] for name, tensor in batch.items()}
    expected = allocator.generate(model, **cheap, **GREEDY)
    for _ in range(2):
        assert torch.equal(allocator.generate(model, **cheap, **GREEDY, **compiled), expected)
    assert len(model.__dict__["_layerbudget_graphs"]) == 1
