"""Exact, stratified splits of prompts, decided by hashes of their ids; twins and groups stay together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from oracle.prompts import SPLITS, Prompt, Split, place_of

Unit = list[Prompt]
"""Prompts that stay in one split."""


def splits_of(prompts: Sequence[Prompt], shares: Mapping[Split, float], seed: int = 0) -> dict[Split, list[Prompt]]:
    """The prompts of each split, in their order.

    Prompts of one task are sorted by a hash of their ids and cut where the shares are exact. What rounding leaves over
    is made good by the next task, so that the whole is exact too. Larger groups go first, since single prompts fill
    what these leave. The order of the prompts does not matter; a further prompt moves the few at the cuts.

    Args:
        prompts: all prompts of a run.
        shares: of each split; they sum to 1.
        seed: another one gives other splits.
    """
    purpose = f"split {seed}" if seed else "split"

    strata: dict[tuple[int, tuple[str, ...]], list[Unit]] = defaultdict(list)
    for unit in _units(prompts):
        strata[-len(unit), tuple(sorted({prompt.task for prompt in unit}))].append(unit)
    owed, split_of = dict.fromkeys(SPLITS, 0.0), dict[str, Split]()
    for (size, _), units in sorted(strata.items(), key=lambda item: (item[0][0], place_of("task", repr(item[0][1])))):
        counts = Counter(deal(owed, shares, len(units), -size))
        order = [split for split in SPLITS for _ in range(counts[split])]
        for split, unit in zip(order, sorted(units, key=lambda unit: _place(unit, purpose)), strict=True):
            split_of |= {prompt.id: split for prompt in unit}
    parts: dict[Split, list[Prompt]] = {split: [] for split in SPLITS}
    for prompt in prompts:
        parts[split_of[prompt.id]].append(prompt)
    return parts


def limited_splits(parts: Mapping[Split, Sequence[Prompt]], limit: int | None) -> dict[Split, list[Prompt]]:
    """So many prompts of some splits, of each its share, so that a larger limit only adds prompts; None keeps all."""
    sizes = {split: len(prompts) for split, prompts in parts.items()}
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return {split: list(prompts) for split, prompts in parts.items()}
    owed = dict.fromkeys(parts, 0.0)
    shares = {split: size / total for split, size in sizes.items()}
    counts = Counter(split for _ in range(limit) for split in deal(owed, shares, 1))
    kept = {
        prompt.id
        for split, prompts in parts.items()
        for prompt in sorted(prompts, key=lambda prompt: place_of("limit", prompt.id))[: counts[split]]
    }
    return {split: [prompt for prompt in prompts if prompt.id in kept] for split, prompts in parts.items()}


def deal(owed: dict[Split, float], shares: Mapping[Split, float], count: int, size: int = 1) -> list[Split]:
    """The split of each of `count` units of `size` prompts: always the one that is owed most, which is kept in `owed`.

    With nothing owed before and a size of 1 that gives each split its share, rounded by largest remainders.
    """
    dealt = []
    for split in owed:
        owed[split] += shares[split] * count * size
    for _ in range(count):
        dealt.append(max(owed, key=lambda split: round(owed[split], 6)))
        owed[dealt[-1]] -= size
    return dealt


def count_twins(prompts: Sequence[Prompt]) -> int:
    """How many prompts have the text of another one."""
    return sum(count for count in Counter(prompt.text_key for prompt in prompts).values() if count > 1)


def _place(unit: Unit, purpose: str) -> float:
    return min(place_of(purpose, prompt.id) for prompt in unit)


def _units(prompts: Sequence[Prompt]) -> list[Unit]:
    """Prompts that share a text or a group, directly or by way of others, are one unit."""
    leaders: dict[str, str] = {}

    def leader(key: str) -> str:
        while leaders.setdefault(key, key) != key:
            leaders[key] = key = leaders[leaders[key]]
        return key

    for prompt in prompts:
        leaders[leader(f"group {prompt.group}" if prompt.group else prompt.text_key)] = leader(prompt.text_key)
    units: dict[str, Unit] = defaultdict(list)
    for prompt in prompts:
        units[leader(prompt.text_key)].append(prompt)
    return list(units.values())
