"""Which plan is the least that is sufficient for one prompt? Searchers on one contract, from one budget of evaluations.

`base.py` has the contract, `driver.py` runs searchers, `on_model.py` answers them with a model's labels, `testing.py`
proves that a searcher keeps the contract.
"""

from __future__ import annotations

from backbone.registry import Registry
from oracle.search.base import Searcher

SEARCHERS: Registry[Searcher] = Registry(
    "searchers",
    {
        "bisection": "oracle.search.bisection:BISECTION",
        "greedy": "oracle.search.removal:GREEDY",
        "mcts": "oracle.search.mcts:MCTS",
    },
)
"""Name -> searcher. A searcher keeps nothing of a search, so one serves all."""
