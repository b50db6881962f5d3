"""Searchers: bisection of a nested menu, greedy removal of layers, and Monte-Carlo tree search."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from backbone.plan import LayerPlan
from oracle.search.base import Search, Searcher, SearchError, SearchSpace

RUNS = (1, 2)
"""How many neighbouring layers one action of the tree search skips."""


@dataclass(frozen=True, slots=True)
class BisectionSearch(Searcher):
    """Binary search over a menu in which each plan runs all that the one before it runs.

    If sufficiency grows with the plan, the first ceil(log2 K) evaluations find the least sufficient plan. It need not:
    so the cheaper plans are then tried as well, from the next cheaper one down, while the budget lasts. A budget of
    K - 1 always proves what is found, and mends it where a plan was sufficient below one that was not.
    """

    over_menu: ClassVar[bool] = True

    def search(self, space: SearchSpace) -> Search:
        plans = space.shortened
        _check_nested([*plans, space.full])
        low, high = 0, len(plans)  # the plan at `high` is sufficient; the full one, at the end, always is
        while low < high:
            middle = (low + high) // 2
            if (yield plans[middle]):
                high = middle
            else:
                low = middle + 1
        for plan in reversed(plans[:high]):  # noqa: UP028 - what `yield from` asks of a list cannot be answered
            yield plan


def _check_nested(plans: list[LayerPlan]) -> None:
    for small, large in pairwise(plans):
        if not small <= large:
            raise SearchError(
                f"bisection needs a menu in which each plan runs all that the one before it runs, but plan {large} "
                f"does not run all of {small}: take the searcher 'mcts', or a menu of early exits or of greedy removals"
            )


def one_layer_less(plan: LayerPlan, removable: Iterable[int]) -> list[LayerPlan]:
    """The plan without each of these layers that it still runs."""
    return [plan.without(attention={i}, mlp={i}) for i in removable if i in plan.attention]


@dataclass(frozen=True, slots=True)
class RemovalSearch(Searcher):
    """Greedy search from the full plan downwards.

    At each step the plan tries to lose each of its layers after the probe, cheapest result first, and goes on from the
    first sufficient one. Results that run only a part of what was insufficient before are seldom sufficient: they are
    tried only where no other is, so that they cost little yet are not taken for granted. The search ends where the plan
    can lose no other layer.

    Source: SLEB (Song et al. 2024, arXiv 2402.09025, section 3) removes one block after another, each time the one
    whose loss shows least, once for a model; here it is done for each prompt, and its sufficiency decides.
    """

    over_menu: ClassVar[bool] = False

    def search(self, space: SearchSpace) -> Search:
        best: LayerPlan | None = space.full
        insufficient: list[LayerPlan] = []
        while best is not None:
            shorter = one_layer_less(best, space.removable)
            unlikely = {plan for plan in shorter if any(plan <= failed for failed in insufficient)}
            best = None
            for plan in sorted(shorter, key=lambda plan: (plan in unlikely, space.rank(plan))):
                if (yield plan):
                    best = plan
                    break
                insufficient.append(plan)


@dataclass(frozen=True, slots=True)
class MctsSearch(Searcher):
    """UCT over plans, from the full one, by actions that skip one or two neighbouring layers of what is left.

    Source: the searches for each prompt in Dr.LLM (Heakl et al. 2025, arXiv 2510.12773, section 3) and CoLa (Li et al.
    2025, arXiv 2507.07996), with the rule of choice of UCT (Kocsis and Szepesvári 2006, section 2). Unlike there:

    - No layer is repeated: a stock cache has no place for a second pass's keys and values at the same layer.
    - The reward of a plan is the share of bytes that it saves if it is sufficient, else 0, in place of a length penalty
      in the rule of choice; so rewards lie in [0, 1], as UCT takes for granted.
    - A plan that two orders of actions lead to is one node, under the parent that came first, and is tried once. The
      search ends when there are none left.
    - A node of v visits gets no more than ceil(sqrt(v)) children while there is something to try below them
      (progressive widening, Coulom 2007): a few dozen evaluations would not try even the full plan's actions once each.

    Args:
        seed: of the order in which a node's actions are tried.
        exploration: weight of the confidence term. Small, as are rewards: a layer saves a few hundredths.

    Raises:
        SearchError: an exploration below 0.
    """

    seed: int = 0
    exploration: float = 0.05
    over_menu: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.exploration < 0:
            raise SearchError(f"exploration must be 0 or more, got {self.exploration}")

    def search(self, space: SearchSpace) -> Search:
        tree = _Tree(space, random.Random(self.seed), self.exploration)
        while tree.root.is_open:
            path = tree.grow()
            sufficient = yield path[-1].plan
            reward = 1 - space.budget(path[-1].plan) if sufficient else 0.0
            for node in path:
                node.visits += 1
                node.reward += reward


@dataclass(slots=True, eq=False)
class _Node:
    """A plan in the tree. Every node is a whole plan, so its own evaluation takes the place of a rollout.

    Attributes:
        untried: plans one action further that are no nodes yet.
        visits: evaluations of this plan and of those below it.
        reward: the sum of their rewards.
    """

    plan: LayerPlan
    untried: list[LayerPlan]
    children: list[_Node] = field(default_factory=list)
    visits: int = 0
    reward: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is anything left to try at or below this node."""
        return bool(self.untried) or any(child.is_open for child in self.children)

    @property
    def widens(self) -> bool:
        """Whether the next plan to try is a new child of this node."""
        room = len(self.children) < math.sqrt(self.visits)
        return bool(self.untried) and (room or not any(child.is_open for child in self.children))


class _Tree:
    """The plans tried so far, below the full one."""

    def __init__(self, space: SearchSpace, draw: random.Random, exploration: float) -> None:
        self._space, self._draw, self._exploration = space, draw, exploration
        self._placed = {space.full}
        self.root = self._node(space.full)
        self.root.visits = 1  # the full plan is known: sufficient, and it saves nothing

    def grow(self) -> list[_Node]:
        """Adds one node where UCT leads to. Returns the path to it from the root, both included."""
        path = [self.root]
        while not path[-1].widens:
            path.append(self._best_child(path[-1]))
        child = self._node(path[-1].untried.pop())
        path[-1].children.append(child)
        return [*path, child]

    def _best_child(self, node: _Node) -> _Node:
        def upper_bound(child: _Node) -> float:
            confidence = math.sqrt(math.log(node.visits) / child.visits)
            return child.reward / child.visits + self._exploration * confidence

        return max((child for child in node.children if child.is_open), key=upper_bound)

    def _node(self, plan: LayerPlan) -> _Node:
        """A node with the plans one action further that have no place in the tree yet; they get theirs here."""
        left = [layer for layer in self._space.removable if layer in plan.attention]
        runs = [left[start : start + n] for n in RUNS for start in range(len(left) - n + 1)]
        further = [plan.without(attention=run, mlp=run) for run in runs]
        untried = [shorter for shorter in further if shorter not in self._placed]
        self._placed.update(untried)
        self._draw.shuffle(untried)
        return _Node(plan, untried)


BISECTION, GREEDY, MCTS = BisectionSearch(), RemovalSearch(), MctsSearch()
