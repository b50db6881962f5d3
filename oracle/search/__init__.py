"""Which plan is the least that is sufficient for one prompt? Searchers on one contract, from one budget of evaluations.

`base.py` has the contract, `driving.py` runs searchers, `measuring.py` answers them with a model's labels, `testing.py`
proves that a searcher keeps the contract.
"""

from __future__ import annotations

from oracle.search.base import Searcher
from oracle.search.bisection import BisectionSearch
from oracle.search.exhaustive import ExhaustiveSearch
from oracle.search.mcts import MctsSearch
from oracle.search.removal import RemovalSearch

SEARCHERS: dict[str, Searcher] = {
    "exhaustive": ExhaustiveSearch(),
    "bisection": BisectionSearch(),
    "greedy": RemovalSearch(width=1),
    "beam": RemovalSearch(width=3),
    "mcts": MctsSearch(),
}
"""Name -> searcher. A searcher keeps nothing of a search, so one serves all."""
