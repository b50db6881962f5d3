"""What a run tells its user: progress with the time left, failed labels, and parts that are left out."""

from __future__ import annotations

import time
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

from backbone.errors import reason_of
from backbone.interrupts import safe_place

console = Console(highlight=False)

EVERY_S = 30.0
"""Seconds between two lines where the output is no terminal."""


def say(text: str, style: str | None = None) -> None:
    """Print a line in which brackets, such as those of a user's path or message, are brackets and no markup."""
    console.print(text, style=style, markup=False)


def say_failures(failures: Sequence[str]) -> None:
    """Name the first of the labels whose judge failed, one sentence each, if there are any."""
    if failures:
        say(f"{len(failures)} labels have no score, the first since {failures[0]}", style="red")
        say("  prompts without a score under some plan are left out of everything that follows")


class Omissions(dict[str, str]):
    """Name of each control or picture that is left out -> the reason."""

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Skip the rest of the block where its data allow no fit or no picture, and print the reason.

        Catches `ValueError`, which `InputError` and the failures of numpy's and scikit-learn's fits are. Every other
        exception is an error of the program and ends the run.
        """
        try:
            yield
        except ValueError as error:
            self[name] = reason_of(error)
            say(f"  {name} is left out: {self[name]}", style="red")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows work of `total` steps; call what it yields with the number of steps done, where the work may be stopped."""
    if not console.is_terminal:
        yield _stoppable(Lines(description, total))
        return
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(description, total=total)
        yield _stoppable(lambda done: bars.advance(task, done))


def _stoppable(show: Callable[[int], None]) -> Callable[[int], None]:
    def advance(done: int) -> None:
        show(done)
        safe_place()

    return advance


class Lines:
    """Prints how far work of `total` steps has come, and the time left at its rate so far, once in `every` seconds."""

    def __init__(
        self, description: str, total: int, every: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._description, self._total, self._every, self._clock = description, total, every, clock
        self._done, self._start = 0, clock()
        self._last = self._start

    def __call__(self, done: int) -> None:
        self._done += done
        now = self._clock()
        if now - self._last < self._every or not self._done:
            return
        self._last = now
        left = max(0, self._total - self._done) * (now - self._start) / self._done
        say(f"  {self._description}: {self._done:,} of {self._total:,}, {duration(left)} left")


def duration(seconds: float) -> str:
    """Such as `40 s`, `3.4 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """A spinner with the time passed, for work whose length is not known; elsewhere than on a terminal a line."""
    safe_place()
    if not console.is_terminal:
        say(f"  {description}")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bars.add_task(description, total=None)
        yield
