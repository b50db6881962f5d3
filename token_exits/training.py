"""Train exit bridges further, on the model's own predictions: no labels (Valade 2024, arXiv 2407.21082).

Only the bridges change. The loss is the divergence of what an exit says from what the full model says about the same
token, over the shortlist, so that no step pays for the whole vocabulary.

Shapes: `T` tokens, `D` hidden size, `K` tokens of the shortlist.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from backbone.healing.bridges import Bridge
from token_exits.heads import ExitHeads
from token_exits.observing import Observed

HELD = 8
"""Every so many-th answer is held out, to say when to stop."""
LOOK_EVERY = 20


def train_bridges(
    heads: ExitHeads,
    observed: Observed,
    *,
    steps: int = 200,
    batch: int = 256,
    learning_rate: float = 3e-4,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[dict[int, Bridge], dict[int, tuple[float, float]]]:
    """Each bridge as it was when it did best on held-out answers; never worse than before.

    Args:
        heads: with a bridge at each layer to train.
        observed: tokens at these layers.
        steps: of Adam, for each bridge.
        batch: tokens of a step.
        learning_rate: of Adam at first; half a cosine brings it down to nothing.
        seed: of the draw of tokens.
        advance: called with the number of steps that were done.

    Returns:
        The bridges by layer, and of each its divergence (nats a token) on held-out answers before and after.
    """
    n_layers = max(observed.states)
    with torch.no_grad():
        targets = heads.logits(observed.states[n_layers]).log_softmax(-1)
    is_held = observed.text.to(targets.device) % HELD == 0
    found, losses = {}, {}
    for depth, bridge in heads.bridges.items():
        states = observed.states[depth]
        fitted, held = ((states[part], targets[part]) for part in (~is_held, is_held))
        found[depth], losses[depth] = _trained(heads, bridge, fitted, held, steps, batch, learning_rate, seed, advance)
    return found, losses


Data = tuple[torch.Tensor, torch.Tensor]
"""States [T, D] and the full model's log-probabilities [T, K]."""


def _trained(
    heads: ExitHeads,
    bridge: Bridge,
    fitted: Data,
    held: Data,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    advance: Callable[[int], None],
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
        advance(1)
        if step % LOOK_EVERY == 0 or step == steps:
            now = Bridge.from_tensors({name: part.detach().clone() for name, part in parts.items()})
            if (found := _divergence(heads, now, held).item()) < best:
                best, kept = found, now
    return kept, (first, best)


def _divergence(heads: ExitHeads, bridge: Bridge, data: Data) -> torch.Tensor:
    states, targets = data
    logs = heads.logits(bridge(states)).log_softmax(-1)
    return torch.nn.functional.kl_div(logs, targets, reduction="batchmean", log_target=True)
