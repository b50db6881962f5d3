"""An oracle that is not flattered: it picks by one scoring of the prompts and is measured by another.

A score is part skill and part luck of the draw. Whoever picks the best of many plans by one score picks luck too, and
the same score then counts it as skill. A second, independent scoring of the same (prompt, plan) pairs has its own luck:
two seeds of sampled decoding, or two halves of the evidence behind each score. Where a run has one scoring alone, the
prompt's scores under the other plans are the evidence: an answer that is right by luck is not right because of them.

Shapes: `N` prompts, `K` plans, cheapest first, the last full. `scores_a` and `scores_b` are [N, K], `budgets` [K].
"""

from __future__ import annotations

import numpy as np

from oracle.frontier.frontier import Point
from oracle.frontier.sweep import Floats, Sweep, path, sweep

FOLDS = 5
"""Parts of the prompts that are foretold in turn."""


def split_half(scores_a: Floats, scores_b: Floats, budgets: Floats) -> list[Point]:
    """What an oracle's picks are worth: made by one scoring, measured by the other, both ways, averaged.

    The oracle goes up as in `oracle.frontier.frontier.oracle_hull`; its points are measured as they fall, so the curve
    need not rise, and no hull is drawn over it, which would pick by luck again. Beyond the end of its sweep an oracle
    keeps its picks.
    """
    one = path(sweep(scores_a, budgets), scores_b, budgets).T
    other = path(sweep(scores_b, budgets), scores_a, budgets).T
    spent = np.union1d(one[0], other[0])
    scores = (np.interp(spent, *one) + np.interp(spent, *other)) / 2
    return list(zip(spent.tolist(), scores.tolist(), strict=True))


def from_other_plans(scores: Floats) -> Floats:
    """[N, K]: each score as the prompt's scores under the other plans foretell it, learned from other prompts.

    By least squares with weights that are not negative. With negative ones, which are chance, picks between two plans
    would use the scores of both.
    """
    from scipy.optimize import nnls

    foretold, plans = np.empty(scores.shape), np.arange(scores.shape[1])
    for held in np.array_split(np.random.default_rng(0).permutation(len(scores)), FOLDS):
        seen = np.delete(scores, held, axis=0) if len(held) < len(scores) else scores
        centre = seen.mean(axis=0)
        for plan in plans:
            weights, _ = nnls((seen - centre)[:, plans != plan], (seen - centre)[:, plan])
            foretold[held, plan] = centre[plan] + (scores[held] - centre)[:, plans != plan] @ weights
    return foretold


def corrected_sweep(scores: Floats, budgets: Floats) -> Sweep:
    """The sweep of an oracle that knows of each plan what the prompt's scores under the others say.

    Its picks owe nothing to the luck of the scores that they are measured by. With scores that are partly luck it comes
    close to `split_half` of two scorings; without any luck it saves less than could be saved
    (tests/oracle/test_honesty.py).
    """
    return sweep(from_other_plans(scores), budgets)


def corrected_path(steps: Sweep, scores: Floats, budgets: Floats, counts: Floats | None = None) -> Floats:
    """[S + 2, 2]: mean budget and mean score along `corrected_sweep`, then those of the full plan; see `path`."""
    full = np.average(scores[:, -1], weights=counts)
    return np.concatenate([path(steps, scores, budgets, counts), [[budgets[-1], full]]])
