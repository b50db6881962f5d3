"""Every argument of `generate()`, every way in: under the full plan stock's result, or refused by name."""

from functools import cache
from inspect import signature
from itertools import product

import pytest
import torch
from generate_cases import BASE, CASES, IDS, TOKENS, S, given, own_allocator, own_model
from tiny import tiny_tokenizer
from tiny_allocator import FULL, PLANS
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import StoppingCriteria

from backbone.errors import InputError, UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plan, apply_plans
from runtime import generate_arguments, lossless
from runtime.generate_arguments import LIKE_STOCK, OTHER_LOOPS, REFUSED, REFUSED_BY_LOSSLESS, refuse_undecided

WITHOUT_TOKENIZER = ("stop_strings", "token_healing")
"""transformers drops their tokenizer on its way to a `custom_generate`, and then refuses them."""


NOT_HANDED_ON = [(name, "custom_generate") for name in ("assistant_model", "synced_gpus", "streamer")]
"""transformers drops them before it calls a `custom_generate`, which therefore cannot refuse them."""


def run(generate, arguments: dict):
    """The output, or the error, and what a streamer got."""
    torch.manual_seed(0)
    try:
        found = generate(**arguments)
    except Exception as error:
        return error, None
    streamer = arguments.get("streamer")
    if streamer is None:
        return found, None
    return found, (streamer.tokens, streamer.ends)


@cache
def stock(case: str):
    return run(own_model().generate, given(case))


def under_plan(**arguments):
    with apply_plan(own_model(), FULL):
        return own_model().generate(**arguments)


WAYS = {
    "apply_plan": under_plan,
    "allocator": lambda **arguments: own_allocator().generate(own_model(), **arguments),
    "custom_generate": lambda **arguments: own_model().generate(**{"custom_generate": own_allocator(), **arguments}),
    "lossless": lambda **arguments: own_allocator().generate(own_model(), **arguments, lossless=True),
}


def is_refused(case: str, way: str, arguments: dict) -> bool:
    """What the product's tables say."""
    if way == "apply_plan" or (way == "custom_generate" and "custom_generate" in arguments):
        return False
    tables = [REFUSED, *([REFUSED_BY_LOSSLESS] if way == "lossless" else [])]
    named = {**arguments, "cache": arguments.get("cache", arguments.get("past_key_values"))}
    by_value = any(table[name][0](value) for table in tables for name, value in named.items() if name in table)
    return by_value or (case in OTHER_LOOPS and case != "assistant_model")


@pytest.fixture(autouse=True)
def three_drafts(monkeypatch) -> None:
    """However few tokens are accepted, three are drafted."""
    monkeypatch.setattr(lossless, "best_draft", lambda costs, plans: (plans[0], 3))


def test_every_argument_of_transformers_is_decided_about() -> None:
    installed = {name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version"}
    installed |= signature(GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    decided = LIKE_STOCK | OTHER_LOOPS.keys() | REFUSED.keys()
    assert installed <= decided, f"decide in runtime/generate_arguments.py: {sorted(installed - decided)}"
    assert {case.partition(":")[0] for case in CASES} == decided
    assert REFUSED_BY_LOSSLESS.keys() <= decided
    assert not LIKE_STOCK & OTHER_LOOPS.keys()


@pytest.mark.parametrize(("case", "way"), [pair for pair in product(CASES, WAYS) if pair not in NOT_HANDED_ON])
def test_an_argument_gives_stocks_result_or_is_refused(case, way) -> None:
    arguments, (want, streamed) = given(case), stock(case)
    found, seen = run(WAYS[way], arguments)
    refused = is_refused(case, way, arguments)
    if isinstance(found, UnsupportedGenerationError):
        assert refused, found
        assert any(f"{name}=" in str(found) or f"{name} (" in str(found) for name in {*CASES[case], "cache"}), found
    elif way == "custom_generate" and case in WITHOUT_TOKENIZER:
        assert "you must pass the model's tokenizer" in str(found)
    elif isinstance(want, Exception):
        assert (type(found), str(found)) == (type(want), str(want))
    else:
        assert not refused
        assert seen == streamed
        check_equal(found, want, first_scores_only=way == "lossless" and arguments["do_sample"])


def check_equal(found, want, *, first_scores_only: bool) -> None:
    """Drafts draw other random numbers: where tokens are drawn, the distribution of the first must be the same."""
    if isinstance(found, Exception):
        raise found
    if first_scores_only:
        torch.testing.assert_close(found.scores[0], want.scores[0])
    elif isinstance(want, torch.Tensor):
        assert torch.equal(found, want)
    else:
        assert isinstance(found, type(want))
        assert torch.equal(found.sequences, want.sequences), (found.sequences[:, S:], want.sequences[:, S:])
        for name in ("scores", "logits", "hidden_states", "attentions", "sequences_scores", "beam_indices"):
            torch.testing.assert_close(found.get(name), want.get(name), rtol=1e-3, atol=1e-3, msg=name)
        lengths = [None if output.cache is None else output.cache.get_seq_length() for output in (found, want)]
        assert lengths[0] == lengths[1]


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_mixed_plans_gets_stocks_answer(case) -> None:
    """The prompt twice, under the full plan and under a shorter one; stock gets it twice too where it refuses that."""
    arguments, (want, _) = given(case), stock(case)
    double = {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    if case == "bos_token_id":
        double["input_ids"] = torch.full((2, 1), 7)
    with apply_plans(own_model(), (plan for plan in (FULL, PLANS[0]))):
        found, _ = run(own_model().generate, double)
    if isinstance(found, Exception):
        twice, _ = run(own_model().generate, double)
        assert (type(found), str(found)) == (type(twice), str(twice))
    elif arguments["do_sample"]:
        torch.testing.assert_close(found.scores[0][0], want.scores[0][0], rtol=1e-3, atol=1e-3)
    else:
        row, answer = (getattr(output, "sequences", output)[0] for output in (found, want))
        assert torch.equal(row[: len(answer)], answer)
        assert len({*row[len(answer) :].tolist()}) <= 1, "padding"


@pytest.mark.parametrize("name", ["stop_strings", "token_healing", "guidance_scale"])
@pytest.mark.parametrize("place", ["argument", "configuration", "model"])
def test_a_refusal_finds_an_argument_in_every_place(place, name, monkeypatch) -> None:
    value = {"stop_strings": ["x"], "token_healing": True, "guidance_scale": 2.0}[name]
    options = {"max_new_tokens": 2}
    if place == "argument":
        options[name] = value
    elif place == "configuration":
        options = {"generation_config": GenerationConfig(**options, **{name: value})}
    else:
        monkeypatch.setattr(own_model().generation_config, name, value)
    with pytest.raises(UnsupportedGenerationError, match=name):
        own_allocator().generate(own_model(), IDS, **options, lossless=True)


def test_continuous_batching_is_refused_under_plans_and_by_allocators() -> None:
    paged = {"input_ids": IDS, "max_new_tokens": 2, "cache_implementation": "paged"}
    with pytest.raises(InputError, match="cache_implementation='paged'"), apply_plan(own_model(), PLANS[0]):
        own_model().generate(**paged)
    with pytest.raises(InputError, match="cache_implementation='paged'"):
        own_allocator().generate(own_model(), **paged)


def test_an_argument_of_a_newer_transformers_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(generate_arguments, "UNDECIDED", ["beam_width", "_from_model_config"])
    config = GenerationConfig()
    refuse_undecided(config)
    config.beam_width = 3
    with pytest.raises(UnsupportedGenerationError, match="beam_width=3 is an argument of a newer transformers"):
        refuse_undecided(config)


@pytest.mark.parametrize("place", range(len(TOKENS)))
def test_lossless_stops_where_stock_does(place) -> None:
    """Wherever a stop string or a criterion ends the text, before, within or at the end of a draft."""
    tokenizer, options = tiny_tokenizer(), {"max_new_tokens": 8, "do_sample": False}
    for text in {tokenizer.decode(TOKENS[place]), tokenizer.decode(TOKENS[max(place - 1, 0) : place + 1])}:
        stop = {"stop_strings": [text], "tokenizer": tokenizer}
        want = own_model().generate(IDS, **options, **stop)
        assert want.shape[1] == S + place + 1
        assert torch.equal(own_allocator().generate(own_model(), IDS, **options, **stop, lossless=True), want)


def test_lossless_refuses_a_criterion_that_reads_scores() -> None:
    class Unsure(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return scores[-1].max() < 0

    with pytest.raises(UnsupportedGenerationError, match="a stopping criterion that reads scores"):
        own_allocator().generate(own_model(), IDS, **BASE, stopping_criteria=[Unsure()], lossless=True)
