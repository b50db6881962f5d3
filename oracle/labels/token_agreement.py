"""How often is a plan's next token the full model's, while they have agreed so far? What drafting with it would keep.

Shapes: `N` prompts, `K` plans.
"""

from __future__ import annotations

from collections.abc import Sequence

from oracle.labels.store import Label


def acceptance_rates(labels: Sequence[Sequence[Label]]) -> tuple[float, ...]:
    """For each of K plans the share of its tokens that the full model says too, counted up to the first that it does
    not: the probability with which a drafted token is accepted, as far as it is the same at every place.

    Args:
        labels: of N prompts under K plans, the last of which is the full one. Answers that were cut short hold at least
            the first token that is not the full model's.
    """
    kept, judged = [0] * len(labels[0]), [0] * len(labels[0])
    for row in labels:
        full = row[-1].answer_ids
        for plan, label in enumerate(row):
            pairs = list(zip(label.answer_ids, full, strict=False))
            agreed = next((place for place, (own, other) in enumerate(pairs) if own != other), len(pairs))
            kept[plan] += agreed
            judged[plan] += min(agreed + 1, len(pairs))
    return tuple(k / n if n else 1.0 for k, n in zip(kept, judged, strict=True))
