"""Progress on the terminal: a bar with the time left for everything that lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` steps; call what it yields with the number of steps done."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=console.is_terminal) as bars:
        task = bars.add_task(description, total=total)
        yield lambda done: bars.advance(task, done)


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """A spinner with the time passed, for work whose length is not known."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=console.is_terminal) as bars:
        bars.add_task(description, total=None)
        yield
