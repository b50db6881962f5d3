"""Which plan is the least that is sufficient for one prompt? Searchers on one contract, from one budget of evaluations.

`base.py` has the contract, `driver.py` runs searchers, also on a model's labels, `testing.py` proves that a searcher
keeps the contract.
"""

from __future__ import annotations

from backbone.registry import Registry
from oracle.search.base import Searcher

SEARCHERS: Registry[Searcher] = Registry(
    "searchers",
    {
        "bisection": "oracle.search.searchers:BISECTION",
        "greedy": "oracle.search.searchers:GREEDY",
        "mcts": "oracle.search.searchers:MCTS",
    },
)
"""Name -> searcher. A searcher keeps nothing of a search, so one serves all."""
