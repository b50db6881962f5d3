"""Allocated generation equals each row generated alone under its plan, through both doors, with all stock features."""

from itertools import pairwise

import pytest
import torch
from tiny import N_LAYERS, OPTIONS, UNDECLARED, padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import GREEDY, PLANS, ByLength, Recorder, alone, make_allocator
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation import LogitsProcessor

from backbone.execution.apply_plan import apply_plan
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from backbone.testing import patches
from runtime.call_arguments import UnsupportedGenerationError

FULL = LayerPlan.full(N_LAYERS)
CHOSEN = [FULL, PLANS[1], PLANS[0], PLANS[0]]
APART = {**GREEDY, "round_up": False}
DICT = {"return_dict_in_generate": True}
SAMPLING = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "temperature": 0.7}
S = 11


@pytest.fixture(scope="module")
def allocator(model):
    return make_allocator(model, controller=ByLength())


@pytest.fixture
def dear_rows(monkeypatch) -> None:
    """Passes cost nothing but their rows, so that by time alone every plan gets a lane of its own."""
    monkeypatch.setattr(
        "runtime.step_costs.StepCosts.generation_ms", lambda *_, **__: lambda budget, prompts: budget * prompts
    )


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
        output = allocator.generate(model, **batch, **APART, **cache)
        assert cut(output, expected) == expected, cache
        assert torch.equal(output, model.generate(**batch, **APART, **cache, custom_generate=allocator))
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 6}
    output = allocator.generate(model, **batch, **beams, round_up=False)
    assert output.shape == (8, S + 6)
    for row, plan in enumerate(CHOSEN):
        keep = batch["attention_mask"][row].bool()
        with apply_plan(model, plan):
            want = model.generate(input_ids=batch["input_ids"][row : row + 1, keep], **beams)
        assert torch.equal(output[2 * row : 2 * row + 2, S:], want[:, keep.sum() :])


def test_no_layer_computes_a_prompt_token_twice(model, allocator) -> None:
    computed = [0] * N_LAYERS
    hooks = []
    for index, layer in enumerate(decoder_layers(model)):

        def count(module, args, output, index=index):
            computed[index] += output.shape[0] * output.shape[1]

        hooks.append(layer.mlp.register_forward_hook(count))
    try:
        allocator.generate(model, **padded_batch(), **APART, min_new_tokens=6)
    finally:
        for hook in hooks:
            hook.remove()
    rows = [sum(index in plan.mlp for plan in CHOSEN) for index in range(N_LAYERS)]
    assert computed == [count * (S + 5) for count in rows]


def test_by_default_few_rows_run_together_under_the_largest_plan(model, allocator) -> None:
    batch = padded_batch()
    output = allocator.generate(model, **batch, **GREEDY, **DICT)
    assert output.layer_plans == [FULL] * 4
    assert torch.equal(output.sequences, model.generate(**batch, **GREEDY))
    cheap = {name: tensor[2:] for name, tensor in batch.items()}
    output = allocator.generate(model, **cheap, **GREEDY, **DICT)
    assert output.layer_plans == [PLANS[0]] * 2
    with apply_plan(model, PLANS[0]):
        assert torch.equal(output.sequences, model.generate(**cheap, **GREEDY))


def test_lanes_follow_the_costs_and_the_limit(model, allocator, dear_rows) -> None:
    batch = padded_batch()
    assert allocator.generate(model, **batch, **GREEDY, **DICT).layer_plans == CHOSEN
    two = allocator.generate(model, **batch, **GREEDY, **DICT, max_lanes=2).layer_plans
    assert two == [FULL, FULL, PLANS[0], PLANS[0]]
    other_door = model.generate(**batch, **GREEDY, **DICT, max_lanes=1, custom_generate=allocator)
    assert other_door.layer_plans == [FULL] * 4


def test_the_output_carries_plans_and_times(model, allocator) -> None:
    batch = padded_batch()
    output = allocator.generate(model, **batch, **APART, **DICT)
    assert output.layer_plans == CHOSEN
    assert output.allocation_ms > 0
    # the lanes run one after the other, the cheapest first
    first = [output.time_to_first_token_ms[row] for row in (2, 1, 0)]
    assert all(0 < earlier < later for earlier, later in pairwise(first))
    assert output.time_to_first_token_ms[2] == output.time_to_first_token_ms[3] > output.allocation_ms
    assert torch.equal(output.sequences, allocator.generate(model, **batch, **APART))


def test_sampling_under_one_plan_draws_what_stock_sampling_draws(model, allocator) -> None:
    cheap = {name: tensor[2:] for name, tensor in padded_batch().items()}
    options = {**SAMPLING, "num_return_sequences": 3}
    torch.manual_seed(0)
    found = allocator.generate(model, **cheap, **options)
    torch.manual_seed(0)
    with apply_plan(model, PLANS[0]):
        assert torch.equal(found, model.generate(**cheap, **options))
    assert found.shape == (6, S + 4)


@pytest.mark.parametrize(
    "mode", [SAMPLING, {**SAMPLING, "num_return_sequences": 2}, {**SAMPLING, "num_beams": 2}], ids=str
)
def test_sampling_in_lanes_keeps_rows_with_their_prompts(model, allocator, mode) -> None:
    batch = padded_batch()
    output = allocator.generate(model, **batch, **mode, round_up=False)
    returned = mode.get("num_return_sequences", 1)
    assert torch.equal(output[:, :S], batch["input_ids"].repeat_interleave(returned, 0))


def test_scores_of_lanes_are_those_of_each_row(model, allocator) -> None:
    batch = padded_batch()
    options = {**GREEDY, **DICT, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    eos = int(alone(model, CHOSEN, batch, **GREEDY, repetition_penalty=1.3)[2][2])
    output = allocator.generate(model, **batch, **options, round_up=False, eos_token_id=[eos, 1], pad_token_id=0)
    steps = output.sequences.shape[1] - S
    assert len(output.scores) == len(output.logits) == steps
    assert output.cache is None
    for row, plan in enumerate(CHOSEN):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        with apply_plan(model, plan):
            want = model.generate(**one, **options, eos_token_id=[eos, 1], pad_token_id=0)
        for step, (scores, logits) in enumerate(zip(want.scores, want.logits, strict=True)):
            torch.testing.assert_close(output.scores[step][row : row + 1], scores)
            torch.testing.assert_close(output.logits[step][row : row + 1], logits)
    transitions = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert transitions.isfinite().all()


def test_lanes_that_end_early_score_padding_as_certain(model, allocator) -> None:
    batch = padded_batch()
    eos = int(alone(model, CHOSEN, batch, **GREEDY)[2][0])
    keep = {name: tensor[[0, 2]] for name, tensor in batch.items()}
    output = allocator.generate(
        model, **keep, **APART, **DICT, output_scores=True, eos_token_id=[eos], pad_token_id=7, min_new_tokens=0
    )
    assert output.sequences[1, S:].tolist() == [eos, 7, 7, 7, 7, 7]
    assert output.scores[3][1].softmax(-1).argmax() == 7
    transitions = model.compute_transition_scores(output.sequences, output.scores)
    assert transitions[1, 1:].tolist() == [0] * 5


def test_beam_indices_and_scores_point_into_the_whole_batch(model, allocator) -> None:
    batch = padded_batch()
    options = {**GREEDY, **DICT, "output_scores": True, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 6}
    output = allocator.generate(model, **batch, **options, round_up=False)
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


def test_a_streamer_of_many_rows_gets_them_in_one_lane(model, allocator, dear_rows) -> None:
    recorder, batch = Recorder(), padded_batch()
    output = allocator.generate(model, **batch, **GREEDY, streamer=recorder)
    assert recorder.put_[1:] == output[:, S:].T.tolist()
    assert recorder.ends == 1


def test_prompts_may_be_captured_layer_by_layer(model, allocator, dear_rows) -> None:
    batch = padded_batch()
    model.set_attn_implementation("eager")
    try:
        output = allocator.generate(model, **batch, **GREEDY, **DICT, output_hidden_states=True, output_attentions=True)
        stock = model.generate(**batch, **GREEDY, **DICT, output_hidden_states=True, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    assert len(output.hidden_states[0]) == N_LAYERS + 1
    for found, want in zip(output.hidden_states[0], stock.hidden_states[0], strict=True):
        torch.testing.assert_close(found, want)
    for found, want in zip(output.attentions[0], stock.attentions[0], strict=True):
        torch.testing.assert_close(found, want)


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


class Ban(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor(self.token), -torch.inf)


def test_stopping_criteria_and_logits_processors_hold_in_every_lane(model, allocator) -> None:
    batch = padded_batch()
    own = {"stopping_criteria": StoppingCriteriaList([StopAt(S + 3)])}
    assert allocator.generate(model, **batch, **APART, **own).shape[1] == S + 3
    banned = alone(model, CHOSEN, batch, **GREEDY)[2][0]
    own = {"logits_processor": LogitsProcessorList([Ban(banned)])}
    output = allocator.generate(model, **batch, **APART, **own)
    expected = alone(model, CHOSEN, batch, **GREEDY, **own)
    assert banned not in output[:, S:]
    assert cut(output, expected) == expected


def test_processors_that_count_rows_see_the_whole_batch(model, allocator, dear_rows) -> None:
    batch, seen = padded_batch(), set()

    def allowed(row, tokens):
        seen.add((row, tuple(tokens[:S].tolist())))
        return [20 + row]

    output = allocator.generate(model, **batch, **GREEDY, prefix_allowed_tokens_fn=allowed)
    assert output[:, S:].tolist() == [[20 + row] * 6 for row in range(4)]
    assert seen == {(row, tuple(tokens)) for row, tokens in enumerate(batch["input_ids"].tolist())}


def test_stop_strings_end_their_rows(model, allocator) -> None:
    tokenizer, batch = tiny_tokenizer(), padded_batch()
    token = alone(model, CHOSEN, batch, **GREEDY)[3][1]
    text = tokenizer.decode([token])
    options = {**APART, "pad_token_id": 0, "stop_strings": [text]}
    output = allocator.generate(model, **batch, **options, tokenizer=tokenizer)
    assert output[3, S + 1] == token
    assert set(output[3, S + 2 :].tolist()) <= {0, token}
    with pytest.raises(UnsupportedGenerationError, match="stop_strings needs the tokenizer as well"):
        allocator.generate(model, **batch, **options)


def test_inference_mode_changes_nothing(model, allocator) -> None:
    batch = padded_batch()
    with torch.inference_mode():
        inside = allocator.generate(model, **batch, **APART)
    assert torch.equal(inside, allocator.generate(model, **batch, **APART))


def test_every_lane_is_compiled_and_equal() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    allocator = make_allocator(model, controller=ByLength())
    config = CompileConfig(mode=None, backend="eager")
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    expected = allocator.generate(model, **batch, **APART)
    for _ in range(2):
        assert torch.equal(allocator.generate(model, **batch, **APART, **compiled), expected)
    assert len(model.__dict__["_layerbudget_graphs"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "not with assisted_generation"),
        ({"synced_gpus": True}, "synced_gpus=True"),
        ({"streamer": Recorder(), "num_beams": 2}, "a streamer cannot follow beam search"),
        ({"assistant_model": object()}, "an assistant_model"),
        ({"max_lanes": 0}, "max_lanes must be at least 1, got 0"),
        ({"max_lanes": 2, "round_up": False}, "give one of them"),
        ({"round_up": False, "streamer": Recorder()}, "a streamer needs all prompts in one lane"),
        ({"round_up": False, "cache": DynamicCache()}, "a cache that was passed in needs all prompts"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_what_cannot_work_is_refused_by_name(model, allocator, options, message) -> None:
    before = patches(model)
    with pytest.raises(UnsupportedGenerationError, match=message):
        allocator.generate(model, **padded_batch(), **{**GREEDY, **options})
    assert patches(model) == before


def test_embeddings_without_tokens_are_refused(model, allocator) -> None:
    embeddings = model.get_input_embeddings()(padded_batch()["input_ids"])
    with pytest.raises(UnsupportedGenerationError, match="inputs_embeds cannot be used"):
        allocator.generate(model, inputs_embeds=embeddings, **GREEDY)
