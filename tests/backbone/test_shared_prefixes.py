"""Sequences that begin alike run their beginning once, with the states and answers that each has alone."""

import pytest
import torch
from tiny import OPTIONS, VOCABULARY, tiny_model, tiny_tokenizer

from backbone.execution import shared_prefixes
from backbone.execution.shared_prefixes import Beginning, beginnings, can_share, groups_of, shared_lengths
from backbone.healing.exit_places import read_places
from backbone.healing.training_targets import Example
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from oracle.labels.exit_answers import exit_answers

PLANS = [*(LayerPlan.exiting(6, depth) for depth in (2, 4)), LayerPlan.full(6)]
DEPTHS = (0, 3, 6)


def rows_of(head: int, tails: list[int], seed: int) -> list[list[int]]:
    """Sequences that share their first `head` tokens and have others behind them."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(3, VOCABULARY, (head,), generator=generator).tolist()
    return [
        shared + [3 + number, *torch.randint(3, VOCABULARY, (tail,), generator=generator).tolist()][:tail]
        for number, tail in enumerate(tails)
    ]


TABLE = {
    "alike": (rows_of(40, [1, 5, 9, 30], 0), {40}),
    "two kinds": ([*rows_of(40, [1, 5, 2], 0), *rows_of(33, [7, 8, 8, 1], 1)], {40, 33}),
    "nothing shared": (rows_of(0, [40, 41, 50], 0), {0}),
    "one token shared": (rows_of(1, [40, 41, 50], 0), {0}),
    "equal to the beginning": (rows_of(40, [0, 0, 4, 6], 0), {40}),
    "all equal": (rows_of(40, [0, 0, 0], 0), {40}),
    "one": (rows_of(40, [3], 0), {0}),
}
"""Sequences, and how many tokens each of them shares."""
CASES, SHARED = ({case: row[column] for case, row in TABLE.items()} for column in (0, 1))


@pytest.mark.parametrize("case", CASES)
def test_shared_lengths_are_those_of_the_groups(case) -> None:
    rows = CASES[case]
    lengths = shared_lengths(rows)
    assert set(lengths) == SHARED[case]
    groups = groups_of(rows, lengths)
    assert sorted(number for group in groups for number in group) == list(range(len(rows)))
    for group in groups:
        assert len({tuple(rows[number][: lengths[number]]) for number in group}) == 1


def test_shared_lengths_save_most() -> None:
    """All begin with a system part; the kinds behind it share more. Two of a kind are too few."""
    system = list(range(40))
    kinds = [[*system, kind, *range(50)] for kind in (90, 91)]
    rows = [[*kind, last] for kind in kinds for last in (1, 2, 3)]
    assert shared_lengths(rows) == [91] * 6
    assert shared_lengths([[*kind, last] for kind in kinds for last in (1, 2)]) == [40] * 4
    assert shared_lengths([list(range(n)) for n in range(30, 3000)])[0] == 0, "a long chain"
    assert shared_lengths([]) == []


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_states_are_those_without_sharing(family) -> None:
    model = tiny_model(family)
    for case, rows in CASES.items():
        for numbers, beginning in beginnings(model, rows, 6, DEPTHS):
            some = [rows[number] for number in numbers]
            found, expected = (one.states(some, 6, DEPTHS) for one in (beginning, Beginning(model)))
            assert len(beginning.tokens) in SHARED[case]
            for depth in DEPTHS:
                for row, tokens in enumerate(some):
                    left = (state[depth][row, -len(tokens) :] for state in (found, expected))
                    torch.testing.assert_close(*left, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_exits_answer_as_without_sharing(family) -> None:
    model, tokenizer, decoding = tiny_model(family), tiny_tokenizer(), Decoding(5, ("e",))
    for rows in CASES.values():
        for numbers, beginning in beginnings(model, rows, 6):
            some = [rows[number] for number in numbers]
            found = exit_answers(model, tokenizer, some, PLANS, decoding, beginning=beginning)
            plain = exit_answers(model, tokenizer, some, PLANS, decoding)
            ids, expected = ([{plan: one.ids for plan, one in row.items()} for row in rows] for rows in (found, plain))
            assert ids == expected


def test_places_are_those_without_sharing(model, monkeypatch) -> None:
    examples = [Example((*row, 5, 6), 2) for case in ("two kinds", "one token shared") for row in CASES[case]]
    found = read_places(model, examples, [2, 4])
    monkeypatch.setattr(shared_prefixes, "can_share", lambda model: False)
    plain = read_places(model, examples, [2, 4])
    assert found.following.equal(plain.following)
    assert found.text.equal(plain.text)
    for depth in (2, 4, 6):
        torch.testing.assert_close(found.states[depth], plain.states[depth], atol=1e-4, rtol=1e-3)


def test_a_shared_beginning_runs_once(model, monkeypatch) -> None:
    run: list[int] = []
    real = shared_prefixes.run_prefix
    monkeypatch.setattr(
        shared_prefixes, "run_prefix", lambda *a, **k: run.append(k["input_ids"].numel()) or real(*a, **k)
    )
    for numbers, beginning in beginnings(model, CASES["two kinds"], 6):
        begun = beginning.batch([CASES["two kinds"][number] for number in numbers])
        assert begun.columns == len(beginning.tokens)
    assert sorted(run) == [33, 40]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, False),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, True),
    ],
)
def test_caches_that_depend_on_what_follows_are_not_shared(options, expected) -> None:
    model = tiny_model("llama", **options)
    assert can_share(model) == expected
    lengths = {len(beginning.tokens) for _, beginning in beginnings(model, CASES["alike"], 6)}
    assert lengths == ({40} if expected else {0})
