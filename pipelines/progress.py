"""Progress on the terminal: a bar with the time left for everything that lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def say(text: str, style: str | None = None) -> None:
    """Print a line in which brackets, such as those of a user's path or message, are brackets and no markup."""
    console.print(text, style=style, markup=False)


def say_failures(failures: Sequence[str]) -> None:
    """Name the first of the labels whose judge failed, one sentence each, if there are any."""
    if failures:
        say(f"{len(failures)} labels have no score, the first since {failures[0]}", style="red")
        say("  prompts without a score under some plan are left out of everything that follows")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` steps; call what it yields with the number of steps done."""
    columns = (
        TextColumn("  {task.description}", markup=False),
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
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=console.is_terminal) as bars:
        bars.add_task(description, total=None)
        yield
