"""Answer tokens at the candidate layers: confidences, agreement with the full model, and training of exit bridges.

Only the model's own answers are needed, no labels.

Shapes: `T` tokens, `D` hidden size, `C` candidate layers, `K` tokens of the shortlist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from backbone.execution.live_changes import captured
from backbone.families import decoder_layers, decoder_of
from backbone.healing.healing import Bridge
from backbone.healing.training_targets import Example
from backbone.left_padding import by_tokens, padded_inputs
from token_exits.gates import Candidate, Gate
from token_exits.heads import ExitHeads
from token_exits.thresholds import exits_at

BATCH = 128
"""Tokens whose logits over the whole vocabulary are computed together."""
Data = tuple[torch.Tensor, torch.Tensor]
"""States [T, D] and the full model's log-probabilities [T, K]."""
HELD_OUT, CHECK_EVERY = 8, 20
"""Every so many-th answer is held out for early stopping, and checked every so many steps."""


@dataclass(frozen=True, eq=False)
class ObservedTokens:
    """T answer tokens, each as it was the newest.

    Attributes:
        states: by layer, before it [T, D]; before layer L means after the last.
        following: the next token of the full model's answer [T].
        place: of the token in its answer, from 1 [T].
        text: the answer that it belongs to [T].
    """

    states: dict[int, torch.Tensor]
    following: torch.Tensor
    place: torch.Tensor
    text: torch.Tensor

    def of(self, picked: torch.Tensor) -> ObservedTokens:
        """Some of the tokens."""
        states = {depth: states[picked] for depth, states in self.states.items()}
        return ObservedTokens(states, self.following[picked], self.place[picked], self.text[picked])


@torch.no_grad()
def observe(
    model: PreTrainedModel, examples: Sequence[Example], depths: Sequence[int], batch_tokens: int = 4096
) -> ObservedTokens:
    """Record answer tokens at the candidate layers, in passes over whole texts.

    The prompt predicts an answer's first token, and nothing follows its last: n tokens of an answer give n - 1.

    Args:
        model: whose answers they are.
        examples: prompts with the model's own answers.
        depths: candidate layers; states before the layers in front of them, and after the last, are recorded too.
        batch_tokens: tokens that run together.
    """
    layers = decoder_layers(model)
    wanted = {*depths, *(depth - 1 for depth in depths), len(layers)}
    answers: list[tuple[int, dict[int, torch.Tensor], Sequence[int]]] = []
    for batch in by_tokens(list(enumerate(examples)), [len(each.tokens) for each in examples], batch_tokens):
        with captured(layers, wanted) as states:
            decoder_of(model)(**padded_inputs(model, [example.tokens for _, example in batch]), use_cache=False)
        for row, (text, example) in enumerate(batch):
            span = slice(-example.answer, -1)
            own = {depth: each[row, span].clone() for depth, each in states.items()}
            answers.append((text, own, example.tokens[span.start :]))
    answers = sorted((each for each in answers if len(each[2]) > 1), key=lambda each: each[0])
    return ObservedTokens(
        {depth: torch.cat([states[depth] for _, states, _ in answers]) for depth in sorted(wanted)},
        torch.cat([torch.tensor(answer[1:]) for _, _, answer in answers]).to(model.device),
        torch.cat([torch.arange(1, len(answer)) for _, _, answer in answers]),
        torch.cat([torch.full((len(answer) - 1,), text) for text, _, answer in answers]),
    )


@torch.no_grad()
def confidences(gate: Gate, heads: ExitHeads, observed: ObservedTokens, depths: Sequence[int]) -> torch.Tensor:
    """A gate's confidence in each token at each candidate layer, if none leaves before [C, T]."""
    n_tokens, found = len(observed.following), []
    for rows in torch.split(torch.arange(n_tokens, device=observed.following.device), BATCH * 8):
        memory: dict[str, torch.Tensor] = {}
        candidates = (
            Candidate(
                depth,
                observed.states[depth][rows],
                observed.states[depth - 1][rows],
                rows,
                n_tokens,
                heads,
                memory,
                observed.following[rows],
            )
            for depth in depths
        )
        found.append(torch.stack([gate.confidence(candidate) for candidate in candidates]))
    return torch.cat(found, dim=1)


@torch.no_grad()
def agreements(heads: ExitHeads, observed: ObservedTokens, depths: Sequence[int]) -> torch.Tensor:
    """Whether leaving at each candidate layer predicts the next token of the full model's answer [C, T]."""

    def predicted(depth: int) -> torch.Tensor:
        parts = torch.split(observed.states[depth], BATCH)
        return torch.cat([heads.predictions(heads.output(depth, part)) for part in parts])

    return torch.stack([predicted(depth) == observed.following for depth in depths])


def mean_depth(confidence: torch.Tensor, depths: Sequence[int], n_layers: int, threshold: float) -> float:
    """Mean number of layers that a token runs, from confidences [C, T]."""
    layers = torch.tensor([*depths, n_layers]).to(confidence.device)
    return float(layers[exits_at(confidence, threshold)].float().mean())


def train_bridges(
    heads: ExitHeads,
    observed: ObservedTokens,
    *,
    steps: int = 200,
    batch: int = 256,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> tuple[dict[int, Bridge], dict[int, tuple[float, float]]]:
    """Train bridges further on the model's own predictions, without labels (Valade 2024, arXiv 2407.21082).

    The loss is the divergence of an exit from the full model for the same token, over the shortlist. Each bridge is
    returned as it was when it did best on held-out answers.

    Args:
        heads: with a bridge at each layer to train.
        observed: tokens at these layers.
        steps: of Adam, for each bridge.
        batch: tokens of a step.
        learning_rate: of Adam at first; half a cosine brings it down to nothing.
        seed: of the draw of tokens.

    Returns:
        The bridges by layer, and of each its divergence (nats a token) on held-out answers before and after.
    """
    n_layers = max(observed.states)
    with torch.no_grad():
        targets = heads.logits(observed.states[n_layers]).log_softmax(-1)
    is_held = observed.text.to(targets.device) % HELD_OUT == 0
    found, losses = {}, {}
    for depth, bridge in heads.bridges.items():
        states = observed.states[depth]
        fitted, held = ((states[part], targets[part]) for part in (~is_held, is_held))
        found[depth], losses[depth] = _trained(heads, bridge, fitted, held, steps, batch, learning_rate, seed)
    return found, losses


def _trained(
    heads: ExitHeads,
    bridge: Bridge,
    fitted: Data,
    held: Data,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> tuple[Bridge, tuple[float, float]]:
    parts = {name: part.detach().float().clone().requires_grad_() for name, part in bridge.tensors().items()}
    optimizer = torch.optim.Adam(parts.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    first = best = _divergence(heads, bridge, held).item()
    kept = bridge
    for step in range(1, steps + 1):
        rows = torch.randint(len(fitted[0]), (batch,), generator=generator).to(fitted[0].device)
        with torch.enable_grad():
            loss = _divergence(heads, Bridge.from_tensors(parts), (fitted[0][rows], fitted[1][rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == steps:
            now = Bridge.from_tensors({name: part.detach().clone() for name, part in parts.items()})
            if (found := _divergence(heads, now, held).item()) < best:
                best, kept = found, now
    return kept, (first, best)


def _divergence(heads: ExitHeads, bridge: Bridge, data: Data) -> torch.Tensor:
    states, targets = data
    logs = heads.logits(bridge(states)).log_softmax(-1)
    return torch.nn.functional.kl_div(logs, targets, reduction="batchmean", log_target=True)
