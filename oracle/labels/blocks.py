"""Blocks: the prompts whose labels are made together, whoever makes them.

A block is several batches wide, so that plans share passes over it, and small enough that little is lost with a worker
that dies. How answers round, and how far they are generated, depends on the prompts beside them. Since blocks depend on
the prompts alone, neither on the number of processes nor on what is done already, one process and many workers give the
same labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from backbone.execution.shared_prefixes import CHARACTERS_PER_TOKEN, alike
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from oracle.prompts import Prompt

BATCHES = 8
"""Batches of a block, at most, on average."""
FEWEST_BATCHES, BLOCKS = 2, 8
"""Few prompts are cut into so many blocks, as long as each has some batches: who gets the last of three blocks lets a
second worker wait for a third of the time."""


def blocks(prompts: Sequence[Prompt], batch_size: int, decoding: Decoding) -> list[list[Prompt]]:
    """The prompts in blocks that begin alike, of like length and about the same work each, longest first.

    No tokenizer is needed: lengths are counted in characters.
    """
    by_id = sorted(prompts, key=lambda prompt: prompt.id)
    ordered = [by_id[number] for group in alike([prompt.prompt for prompt in by_id]) for number in group]
    tokens = [len(prompt.prompt) / CHARACTERS_PER_TOKEN + decoding.max_new_tokens for prompt in ordered]
    few, many = (-(-len(ordered) // (batches * batch_size)) for batches in (BATCHES, FEWEST_BATCHES))
    count, done = max(few, min(many, BLOCKS)), np.cumsum(tokens)
    ends = [int(np.searchsorted(done, done[-1] * number / count)) for number in range(1, count)]
    parts = zip([0, *ends], [*ends, len(ordered)], strict=True)
    return [ordered[start:end] for start, end in parts if start < end]


def wanted_in_blocks(
    wanted: Mapping[LayerPlan, Sequence[Prompt]], batch_size: int, decoding: Decoding
) -> Iterator[dict[LayerPlan, list[Prompt]]]:
    """Prompts whose labels are wanted under plans, in blocks of all these prompts; a plan without any is left out."""
    members = {plan: set(some) for plan, some in wanted.items()}
    for block in blocks(together(wanted), batch_size, decoding):
        found = {plan: [prompt for prompt in block if prompt in own] for plan, own in members.items()}
        yield {plan: some for plan, some in found.items() if some}


def together(wanted: Mapping[LayerPlan, Iterable[Prompt]]) -> list[Prompt]:
    """Every prompt that is wanted under some plan, once."""
    return list(dict.fromkeys(prompt for prompts in wanted.values() for prompt in prompts))
