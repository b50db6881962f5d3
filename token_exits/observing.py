"""What the full model's own answer tokens look like at every candidate layer: what heads, gates and thresholds are made
from and measured on. No labels are needed, only the model's answers.

Shapes: `T` tokens, `D` hidden size, `C` candidate layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from backbone.execution.live_changes import captured
from backbone.families import decoder_layers, decoder_of
from backbone.healing.training_targets import Example
from backbone.left_padding import by_tokens, padded_inputs
from token_exits.gates.base import Candidate, Gate
from token_exits.heads import ExitHeads

AT_ONCE = 128
"""Tokens whose whole logits are made together."""


@dataclass(frozen=True, eq=False)
class Observed:
    """T answer tokens, each looked at while it is the newest: what is predicted next.

    Attributes:
        states: by layer, before it [T, D]; before layer L means after the last.
        following: the token that follows in the full model's answer [T].
        place: of the token in its answer, from 1 [T].
        text: which answer it belongs to [T].
    """

    states: dict[int, torch.Tensor]
    following: torch.Tensor
    place: torch.Tensor
    text: torch.Tensor

    def of(self, picked: torch.Tensor) -> Observed:
        """Some of the tokens."""
        states = {depth: states[picked] for depth, states in self.states.items()}
        return Observed(states, self.following[picked], self.place[picked], self.text[picked])


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    examples: Sequence[Example],
    depths: Sequence[int],
    *,
    batch_tokens: int = 4096,
    advance: Callable[[int], None] = lambda done: None,
) -> Observed:
    """The answer tokens of some examples at the candidate layers, in passes over whole texts.

    An answer's first token is predicted by the prompt, which runs in full, and its last predicts nothing that is known:
    an answer of n tokens gives n - 1.

    Args:
        model: whose answers they are.
        examples: prompts with the model's own answers.
        batch_tokens: tokens that run together.
        advance: called with the number of examples that were run.
        depths: candidate layers. The states before the layers in front of them, and after the last, are kept too.
    """
    layers = decoder_layers(model)
    wanted = {*depths, *(depth - 1 for depth in depths), len(layers)}
    found: list[tuple[int, dict[int, torch.Tensor], Sequence[int]]] = []
    for batch in by_tokens(list(enumerate(examples)), [len(each.tokens) for each in examples], batch_tokens):
        with captured(layers, wanted) as states:
            decoder_of(model)(**padded_inputs(model, [example.tokens for _, example in batch]), use_cache=False)
        for row, (text, example) in enumerate(batch):
            span = slice(-example.answer, -1)
            found.append(
                (text, {depth: s[row, span].clone() for depth, s in states.items()}, example.tokens[span.start :])
            )
        advance(len(batch))
    found = sorted((each for each in found if len(each[2]) > 1), key=lambda each: each[0])
    return Observed(
        {depth: torch.cat([states[depth] for _, states, _ in found]) for depth in sorted(wanted)},
        torch.cat([torch.tensor(answer[1:]) for _, _, answer in found]).to(model.device),
        torch.cat([torch.arange(1, len(answer)) for _, _, answer in found]),
        torch.cat([torch.full((len(answer) - 1,), text) for text, _, answer in found]),
    )


@torch.no_grad()
def confidences(gate: Gate, heads: ExitHeads, observed: Observed, depths: Sequence[int]) -> torch.Tensor:
    """How sure a gate is of each token at each candidate layer, if none leaves before [C, T]."""
    n_tokens, found = len(observed.following), []
    parts = torch.split(torch.arange(n_tokens, device=observed.following.device), AT_ONCE * 8)
    for rows in parts:
        memory: dict[str, torch.Tensor] = {}
        part = [
            gate.confidence(
                Candidate(
                    depth,
                    observed.states[depth][rows],
                    observed.states[depth - 1][rows],
                    rows,
                    n_tokens,
                    heads,
                    order,
                    memory,
                    observed.following[rows],
                )
            )
            for order, depth in enumerate(depths)
        ]
        found.append(torch.stack(part))
    return torch.cat(found, dim=1)


@torch.no_grad()
def agreements(heads: ExitHeads, observed: Observed, depths: Sequence[int]) -> torch.Tensor:
    """Whether a token that leaves at each candidate layer is followed by what follows in the full model's answer
    [C, T]."""
    return torch.stack(
        [
            torch.cat(
                [heads.predictions(heads.output(depth, part)) for part in torch.split(observed.states[depth], AT_ONCE)]
            )
            == observed.following
            for depth in depths
        ]
    )
