"""Many prompts: full batches of one plan, results in input order, files that a killed run goes on with."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import FULL, PLANS, ByLength, make_allocator
from transformers import GenerationConfig

from backbone.errors import UnsupportedGenerationError, WrongModelError
from backbone.execution.apply_plan import apply_plan
from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from oracle.prompts import PromptError
from runtime import offline
from runtime.answer_files import answer_file
from runtime.offline import Composer
from runtime.step_costs import StepCosts

TWICE = {"num_return_sequences": 2, "do_sample": True}
PROMPTS = ["abcdefghijk"[: 3 + i % 9] + "xyz"[: i % 4] for i in range(23)]


@pytest.fixture(scope="module")
def allocator(model):
    return replace(make_allocator(model, controller=ByLength()), decoding=Decoding(5))


def single(model, prompt, plan) -> str:
    inputs = tiny_tokenizer()([prompt], return_tensors="pt")
    with apply_plan(model, plan):
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return tiny_tokenizer().decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_prompts_run_their_own_plans_in_the_fewest_batches(model, allocator) -> None:
    done, passes = [], []

    def note(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:  # the probe runs the decoder only
            passes.append(kwargs["input_ids"].shape)

    with model.register_forward_pre_hook(note, with_kwargs=True):
        texts = allocator.generate_many(model, tiny_tokenizer(), PROMPTS, batch_size=4, advance=done.append)
    assert len(passes) == 6, "23 prompts fit into 6 batches of 4"
    assert (sum(done), max(done)) == (len(PROMPTS), 4)
    assert {text.plan for text in texts} == {FULL, *PLANS}
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tiny_tokenizer()([prompt], return_tensors="pt")["input_ids"]
        assert text.plan == allocator.allocate(model, ids)[0]
        assert text.text == single(model, prompt, text.plan)


@contextmanager
def first_layer_tokens(model):
    """Prompt tokens, with their padding, that the first layer computes."""
    counts = [0]

    def count(module, args, output):
        counts[0] += output.shape[:-1].numel() if output.shape[-2] > 1 else 0

    with decoder_layers(model)[0].mlp.register_forward_hook(count):
        yield counts


@pytest.mark.parametrize("beams", [1, 2])
def test_the_first_layers_see_a_prompt_once_as_long_as_memory_suffices(model, allocator, monkeypatch, beams) -> None:
    many = partial(allocator.generate_many, model, tiny_tokenizer(), PROMPTS, batch_size=4, num_beams=beams)
    with first_layer_tokens(model) as once:
        expected = many()
    probed = len(PROMPTS) * max(map(len, PROMPTS))  # they are probed in one batch
    assert once == [probed]
    for room in (0, 20_000):
        monkeypatch.setattr(offline, "KEPT_BYTES", room)
        monkeypatch.setattr(offline, "PROBE_TOKENS", 20)
        with first_layer_tokens(model) as again:
            assert many() == expected
        assert again > once


def test_assisted_decoding_computes_prompts_again(model, allocator) -> None:
    many = partial(allocator.generate_many, model, tiny_tokenizer(), PROMPTS[:5], batch_size=1)
    assert many(prompt_lookup_num_tokens=2) == many()


def flat(per_row: float) -> StepCosts:
    """A pass takes 1 ms for the weights of all layers and something for each row; the head takes nothing."""
    tokens = (0, 64)
    full_ms = tuple(1.0 + per_row * count for count in tokens)
    return StepCosts(tokens, full_ms, (0.0, 0.0), tokens, full_ms, measured=True)


def test_batches_are_of_one_plan_as_far_as_they_are_full_and_what_is_left_is_mixed() -> None:
    plans = [FULL] * 5 + [PLANS[1]] * 9 + [PLANS[0]] * 2
    lengths = [7, 3, 9, 1, 5, 2, 8, 4, 6, 1, 9, 3, 5, 7, 4, 6]
    parts = Composer(flat(0.01), plans, lengths, 100).composed(4)
    assert [[lengths[place] for place in part] for part in parts] == [
        [9, 7, 5, 3],
        [1, 1, 6, 4],
        [9, 8, 7, 6],
        [5, 4, 3, 2],
    ]
    assert [len({plans[place] for place in part}) for part in parts] == [1, 3, 1, 1]
    assert sorted(place for part in parts for place in part) == list(range(16))
    assert Composer(flat(0.01), [], [], 100).composed(4) == []


def test_what_is_left_of_a_plan_runs_by_itself_where_rows_cost_more_than_weights() -> None:
    """Beside a long prompt the short ones would be padded to its length."""
    plans, lengths = [FULL, PLANS[0], PLANS[0]], [50, 2, 3]
    assert Composer(flat(1.0), plans, lengths, 2).composed(4) == [[0], [2, 1]]
    assert Composer(flat(0.001), plans, lengths, 100).composed(4) == [[0, 2, 1]]


def test_prompts_of_like_length_run_together_where_padding_costs_more_than_plans_save() -> None:
    plans, lengths = [FULL, FULL, PLANS[1], PLANS[1]], [50, 2, 51, 1]
    assert Composer(flat(1.0), plans, lengths, 2).composed(2) == [[0, 2], [1, 3]]
    assert Composer(flat(0.0), plans, lengths, 2).composed(2) == [[0, 1], [2, 3]]


def test_too_little_memory_halves_a_batch(model, allocator) -> None:
    expected = allocator.generate_many(model, tiny_tokenizer(), PROMPTS, batch_size=8)

    def scarce(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError

    with model.register_forward_pre_hook(scarce, with_kwargs=True):  # the probe runs its decoder only
        assert allocator.generate_many(model, tiny_tokenizer(), PROMPTS, batch_size=8) == expected


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a"], {"num_return_sequences": 2}, "which num_return_sequences does not fit"),
        (["a"], {"generation_config": GenerationConfig(**TWICE)}, "which num_return_sequences does not fit"),
        (["a"], {"input_ids": torch.ones(1, 3)}, "which input_ids does not fit"),
        (["a"], {"cache": object()}, "which cache does not fit"),
        (["a"], {"return_dict_in_generate": True}, "which return_dict_in_generate does not fit"),
        (["a", ""], {}, "prompt 1: the prompt is empty"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, allocator, prompts, options, message) -> None:
    with pytest.raises(UnsupportedGenerationError, match=message):
        allocator.generate_many(model, tiny_tokenizer(), prompts, **options)


def test_another_model_is_refused_and_no_prompts_are_answered(model, allocator) -> None:
    assert allocator.generate_many(model, tiny_tokenizer(), []) == []
    with pytest.raises(WrongModelError):
        allocator.generate_many(tiny_model("llama", seed=5), tiny_tokenizer(), PROMPTS)


@pytest.fixture
def prompts_path(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": text}) + "\n" for i, text in enumerate(PROMPTS)))
    return path


def answered(allocator, model, prompts_path, name, **options):
    out = prompts_path.with_name(name)
    answer_file(allocator, model, tiny_tokenizer(), prompts_path, out, batch_size=4, **options)
    assert not out.with_name(f"{name}.partial").exists()
    return [json.loads(line) for line in out.read_text().splitlines()]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_was(model, allocator, prompts_path, batches, torn) -> None:
    expected = answered(allocator, model, prompts_path, "whole.jsonl")
    assert [row["id"] for row in expected] == [f"p{i}" for i in range(len(PROMPTS))]
    assert [row["answer"] for row in expected] == [
        single(model, row["prompt"], LayerPlan.parse(row["plan"], 6)) for row in expected
    ]
    done: list[int] = []

    def kill(count: int) -> None:
        done.append(count)
        if len(done) > batches:
            raise KilledError

    with pytest.raises(KilledError):
        answered(allocator, model, prompts_path, "out.jsonl", advance=kill)
    assert not prompts_path.with_name("out.jsonl").exists()
    partial = prompts_path.with_name("out.jsonl.partial")
    if torn:
        partial.write_bytes(partial.read_bytes()[:-7])
    begun, rest = [], []
    again = answered(
        allocator, model, prompts_path, "out.jsonl", begin=lambda *counts: begun.append(counts), advance=rest.append
    )
    assert again == expected
    assert begun == [(sum(done) - torn, len(PROMPTS))]
    assert sum(rest) == len(PROMPTS) - sum(done) + torn


def test_without_a_file_answers_go_to_the_terminal(model, allocator, prompts_path, capsys) -> None:
    answer_file(allocator, model, tiny_tokenizer(), prompts_path, None, batch_size=4)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == answered(allocator, model, prompts_path, "out.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no prompts file"),
        ('{"id": "a"}\n', "has no column 'prompt' or 'messages'; it has id"),
        ("[]", "expected an object"),
        ('{"id": "a", "prompt": "b"}\n' * 2, "the id 'a' was used before, at line 1; ids must differ"),
        ("", "holds no prompts"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_named(model, allocator, tmp_path, text, message) -> None:
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PromptError, match=message):
        answer_file(allocator, model, tiny_tokenizer(), path, tmp_path / "out.jsonl", batch_size=2)
    assert not list(tmp_path.glob("out*"))
