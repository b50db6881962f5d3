"""How long a search for a menu will be, for its progress bar."""

from __future__ import annotations

import math

from oracle.menus.base import MenuTask
from oracle.menus.covering import most_measured
from oracle.menus.greedy import layer_removals, sublayer_removals


def search_steps(method: str, task: MenuTask) -> int:
    """At most how often a search will call `advance`; 0 for methods that do not search."""
    searches = {
        "greedy_layers": layer_removals,
        "greedy_sublayers": sublayer_removals,
        "bridged_layers": layer_removals,
    }
    if method == "covering":
        return most_measured(task)
    if method not in searches:
        return 0
    n = len(searches[method](task))
    removed = min(n, math.ceil((1 - task.cheapest_budget) / (1 - task.probe_depth / task.n_layers) * n))
    return sum(n - i for i in range(max(removed, 1)))
