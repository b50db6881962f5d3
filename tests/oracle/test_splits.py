"""Splits are exact, stratified and independent of the file's order, and nothing leaks from one into another."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from oracle.chat import ChatTemplate, Message
from oracle.prompts import SPLITS, Prompt, limited
from oracle.splits import count_twins, limited_splits, splits_of

SHARES = {"adapt": 0.15, "train": 0.3, "tune": 0.1, "calibrate": 0.25, "test": 0.2}
NO_ADAPT = {"adapt": 0.0, "train": 0.5, "tune": 0.1, "calibrate": 0.2, "test": 0.2}


def prompts_of(sizes, group_of=lambda number: "", draw=None) -> list[Prompt]:
    names = [f"task {task}" for task, size in enumerate(sizes) for _ in range(size)]
    return [Prompt(f"p{i}", name, f"text {i}", "", "agreement", group=group_of(i)) for i, name in enumerate(names)]


def found(prompts, shares=SHARES) -> dict[str, str]:
    return {prompt.id: split for split, some in splits_of(prompts, shares).items() for prompt in some}


@pytest.mark.parametrize("shares", [SHARES, NO_ADAPT])
@pytest.mark.parametrize("sizes", [[120], [33, 47, 40], [1] * 120, [100, *[2] * 10], [7], [997, 3]])
def test_shares_are_exact_and_stratified(sizes, shares) -> None:
    prompts = prompts_of(sizes)
    parts = splits_of(prompts, shares)
    assert sorted(p.id for some in parts.values() for p in some) == sorted(p.id for p in prompts)
    assert all(abs(len(parts[split]) - shares[split] * len(prompts)) < 1 for split in SPLITS)
    of_task = Counter((split, p.task) for split in SPLITS for p in parts[split])
    for task, size in Counter(p.task for p in prompts).items():
        assert all(abs(of_task[split, task] - shares[split] * size) < 2 for split in SPLITS)


def test_another_seed_gives_other_splits_of_equal_sizes() -> None:
    prompts = prompts_of([60, 60])
    first, second = (splits_of(prompts, SHARES, seed) for seed in (0, 1))
    assert first == splits_of(prompts, SHARES)
    assert {split: len(some) for split, some in first.items()} == {split: len(some) for split, some in second.items()}
    assert first["test"] != second["test"]


@pytest.mark.parametrize(("size", "slack"), [(1, 1), (2, 1), (5, 3), (24, 24)])
def test_groups_stay_together_as_near_to_the_shares_as_they_allow(size, slack) -> None:
    prompts = prompts_of([60, 60], lambda number: f"g{number // size}")
    splits = found(prompts)
    assert all(len({splits[p.id] for p in prompts if p.group == group}) == 1 for group in {p.group for p in prompts})
    counts = Counter(splits.values())
    assert all(abs(counts[split] - SHARES[split] * 120) < slack for split in SPLITS)


def test_single_prompts_make_good_what_groups_leave() -> None:
    prompts = prompts_of([120], lambda number: f"g{number // 7}" if number < 42 else "")
    assert [len(some) for some in splits_of(prompts, SHARES).values()] == [18, 36, 12, 30, 24]


def test_twins_stay_together_before_and_after_rendering() -> None:
    draw = random.Random(0)
    singles = prompts_of([80])
    twins = [replace(p, id=f"{p.id} again", prompt=f" text\n{p.id[1:]} ", task=draw.choice("ab")) for p in singles[:30]]
    turns = [replace(p, id=f"{p.id} turn", prompt="", messages=(Message("user", p.prompt),)) for p in singles[:10]]
    prompts = [*singles, *twins, *turns]
    assert count_twins(prompts) == 70
    assert count_twins(singles) == 0
    splits = found(prompts)
    assert all(splits[p.id] == splits[p.id.partition(" ")[0]] for p in prompts)
    template = ChatTemplate("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    assert found([prompt.rendered(template) for prompt in prompts]) == splits


def test_a_chain_of_texts_and_groups_is_one_unit() -> None:
    fields = [("a", "1"), ("b", "1"), ("b", "2"), ("c", "2"), ("c", "")]
    chain = [Prompt(f"c{i}", "t", text, "", "agreement", group=group) for i, (text, group) in enumerate(fields)]
    splits = found([*prompts_of([50]), *chain])
    assert len({splits[prompt.id] for prompt in chain}) == 1


def test_ids_alone_decide_and_few_prompts_move() -> None:
    prompts = prompts_of([200, 150, 100], lambda number: f"g{number // 3}" if number < 60 else "")
    splits = found(prompts)
    shuffled = random.Random(1).sample(prompts, len(prompts))
    assert found(shuffled) == splits
    assert found([replace(p, reference="x", judge="exact") for p in prompts]) == splits
    more = found([*prompts, *[Prompt(f"new {i}", "task 1", f"new {i}", "", "agreement") for i in range(9)]])
    assert sum(more[name] != split for name, split in splits.items()) < 15, "of 450"


def test_a_limit_keeps_the_shares_and_only_adds_prompts() -> None:
    parts = splits_of(prompts_of([90, 110]), NO_ADAPT)
    before: set[str] = set()
    for limit in (8, 20, 100, 199):
        kept = limited_splits(parts, limit)
        assert sum(map(len, kept.values())) == limit
        assert all(abs(len(kept[split]) - NO_ADAPT[split] * limit) < 1 for split in SPLITS)
        assert before < {prompt.id for some in kept.values() for prompt in some}
        before = {prompt.id for some in kept.values() for prompt in some}
    assert limited_splits(parts, None) == limited_splits(parts, 500) == parts
    assert {p.id for p in limited(prompts_of([50]), 10)} < {p.id for p in limited(prompts_of([50]), 11)}
