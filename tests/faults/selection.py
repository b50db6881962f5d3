"""The whole table with LAYERBUDGET_FAULTS=long, as in `make faults`; else a few cases of each part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")

LONG = os.environ.get("LAYERBUDGET_FAULTS") == "long"


def selected(cases: Sequence[Case], every: int) -> list[Case]:
    """All cases, or every n-th of them."""
    return list(cases) if LONG else list(cases[::every])
