"""Tokens that left early wait at their layer until a later token of their row comes by and takes them along.

Source: EE-LLM, Chen et al. 2023 (arXiv 2312.04916, section 3.3, KV recomputation). Once a token has been taken along,
its keys and values are those of the full model.

Shapes: `R` rows, `r` of them go on, `s` tokens of each in a pass, the newest last, `T` tokens in the cache, `D` hidden
size, `d` head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from backbone.execution.live_changes import Forward
from token_exits.keys_values import KeysValues
from token_exits.row_cache import SomeTokens, add_empty_slot
from token_exits.token_pass import TokenPass, of_rows

MOST_WAITING = 8
"""A row with so many waiting tokens runs all layers at its next one, so that no token waits for ever."""


@dataclass(eq=False)
class Token:
    """A token that has not been through all layers.

    Attributes:
        step: pass in which it was the newest.
        slot: its place in the cache.
        state: [D], before the layer that it comes to next.
    """

    step: int
    slot: int
    state: torch.Tensor


class Unfinished:
    """The waiting tokens of every row of one decoding loop, and those that are on their way in the current pass."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[int, list[Token]]] = defaultdict(dict)
        """By row and layer."""
        self._along: dict[int, list[Token]] = defaultdict(list)
        """By row, oldest first."""
        self._embeddings: dict[int, dict[int, KeysValues]] = {}
        """By step and layer: position embeddings [R or 1, 1, d]."""
        self._slot = 0

    def begin(self, token: TokenPass, slot: int) -> None:
        """A pass begins whose newest tokens go to a place of the cache."""
        self._slot = slot
        self._embeddings[token.step] = {}
        self._embeddings.pop(token.step - MOST_WAITING - 1, None)

    def allowed(self, rows: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
        """Which of the rows [r] that are sure may leave."""
        full = [
            sum(map(len, self._waiting[row].values())) + len(self._along[row]) >= MOST_WAITING for row in rows.tolist()
        ]
        return sure & ~torch.tensor(full, device=sure.device)

    def leave(self, token: TokenPass, depth: int, rows: torch.Tensor, states: torch.Tensor) -> None:
        """The newest tokens of some rows wait before layer `depth` with their states of all [R, 1, D], and so do those
        that came along."""
        for row in rows.tolist():
            newest = Token(token.step, self._slot, states[row, 0])
            self._waiting[row].setdefault(depth, []).extend([*self._along.pop(row, []), newest])

    def take_along(self, token: TokenPass, depth: int) -> None:
        """The tokens that wait before layer `depth` go on with the newest of their row."""
        for row in token.going.tolist():
            self._along[row] = sorted(
                [*self._along[row], *self._waiting[row].pop(depth, [])], key=lambda waiting: waiting.slot
            )

    def end(self, token: TokenPass) -> None:
        """What came along to the end has been through all layers."""
        self._along.clear()

    def run(
        self, token: TokenPass, index: int, forward: Forward, states: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """One layer for the newest tokens [R, 1, D] of the rows that go on, and for those that they take along."""
        self._embeddings[token.step][index] = kwargs["position_embeddings"]
        if token.all_go and not any(self._along.values()):
            return forward(states, **kwargs)  # type: ignore[no-any-return]
        if token.none_goes:
            add_empty_slot(kwargs["cache"], index)
            return states
        rows = token.going
        tokens = self._lined_up(token, states)
        slots = torch.tensor([[each.slot for each in line] for line in tokens], device=rows.device)
        own = {name: of_rows(value, rows, token.n_rows) for name, value in kwargs.items()}
        own["cache"] = SomeTokens(kwargs["cache"], rows, slots)
        own["position_embeddings"] = self._embeddings_of(tokens, rows, index)
        own["attention_mask"] = mask_of(own.get("attention_mask"), slots, self._slot + 1)
        output = forward(torch.stack([torch.stack([each.state for each in line]) for line in tokens]), **own)
        for place, line in enumerate(tokens):
            for column, each in enumerate(line):
                each.state = output[place, column]
        return states.index_copy(0, rows, output[:, -1:])

    def _lined_up(self, token: TokenPass, states: torch.Tensor) -> list[list[Token]]:
        """For each row that goes on its s tokens; rows with fewer begin with copies of the newest, which change
        nothing."""
        most = max(len(self._along[row]) for row in token.going.tolist())
        lines = []
        for row in token.going.tolist():
            newest = Token(token.step, self._slot, states[row, 0])
            lines.append([newest] * (most - len(self._along[row])) + [*self._along[row], newest])
        return lines

    def _embeddings_of(self, tokens: Sequence[Sequence[Token]], rows: torch.Tensor, index: int) -> KeysValues:
        """Position embeddings [r, s, d] of tokens."""
        found = []
        for row, line in zip(rows.tolist(), tokens, strict=True):
            pairs = [self._embeddings[each.step][index] for each in line]
            own = [[part[row if len(part) > 1 else 0, 0] for part in pair] for pair in pairs]
            found.append([torch.stack(parts) for parts in zip(*own, strict=True)])
        cosines, sines = (torch.stack(parts) for parts in zip(*found, strict=True))
        return cosines, sines


def mask_of(newest: torch.Tensor | None, slots: torch.Tensor, length: int) -> torch.Tensor:
    """The attention mask [r, 1, s, T] of tokens at some slots [r, s], from that of the newest [r, 1, 1, T]: each sees
    what the newest sees, as far as it lies not behind itself."""
    is_before = torch.arange(length, device=slots.device) <= slots[:, None, :, None]
    if newest is None:
        return is_before
    if newest.dtype == torch.bool:
        return is_before & newest
    return newest.masked_fill(~is_before, torch.finfo(newest.dtype).min)
