"""An oracle that is not flattered: it picks by one scoring of the prompts and is measured by another.

A score is part skill and part luck of the draw. Whoever picks the best of many plans by one score picks luck too, and
the same score then counts it as skill. A second, independent scoring of the same (prompt, plan) pairs has its own luck:
two seeds of sampled decoding, or two halves of the evidence behind each score.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `scores_a` and `scores_b` are [N, K], `budgets` [K].
"""

from __future__ import annotations

import numpy as np

from oracle.frontier.frontier import Point
from oracle.frontier.upgrades import Floats, climb, path


def split_half(scores_a: Floats, scores_b: Floats, budgets: Floats) -> list[Point]:
    """What an oracle's picks are worth: made by one scoring, measured by the other, both ways, averaged.

    The oracle climbs as in `oracle.frontier.frontier.oracle_hull`; its points are measured as they fall, so the curve
    need not rise, and no hull is drawn over it, which would pick by luck again. Beyond the end of its climb an oracle
    keeps its picks.
    """
    one = path(climb(scores_a, budgets), scores_b, budgets).T
    other = path(climb(scores_b, budgets), scores_a, budgets).T
    spent = np.union1d(one[0], other[0])
    scores = (np.interp(spent, *one) + np.interp(spent, *other)) / 2
    return list(zip(spent.tolist(), scores.tolist(), strict=True))
