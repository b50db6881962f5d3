"""What a case of the table came to: the two good outcomes, and those of which there may be none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from child import Ended
from content import labels_of
from project import Project

from backbone.interrupts import INTERRUPTED, LINE

Outcome = Literal[
    "refused in one sentence", "harmless and correct", "traceback", "accepted damage", "data lost", "hang", "death"
]
GOOD: tuple[Outcome, ...] = ("refused in one sentence", "harmless and correct")
RED: tuple[Outcome, ...] = ("traceback", "accepted damage", "data lost", "hang", "death")

LONGEST_SENTENCE = 600
"""Characters: an error that quotes a whole file helps nobody."""


def outcome_of(ended: Ended) -> Outcome:
    """By the way that a command ended, before anybody looks at what it left behind."""
    if ended.status is None:
        return "hang"
    if ended.status < 0:
        return "death"
    if ended.status == INTERRUPTED and ended.err.count(LINE.decode()) == 1 and "Traceback" not in ended.err:
        return "refused in one sentence"
    if "Traceback (most recent call last)" in ended.err or ended.status not in (0, 2):
        return "traceback"
    return "harmless and correct" if ended.status == 0 else _refusal(ended)


def _refusal(ended: Ended) -> Outcome:
    *_, last = ended.err.rstrip("\n").split("\n")
    sentences = [line for line in ended.err.split("\n") if line.startswith("error: ")]
    good = sentences == [last] and len(last) <= LONGEST_SENTENCE
    return "refused in one sentence" if good else "traceback"


Check = Callable[[Ended], str | None]
"""Looks at what an accepted case left behind; what is wrong with it, or None."""


def must_be_refused(ended: Ended) -> str | None:
    return "it should have been refused"


def may_be_accepted(ended: Ended) -> str | None:
    return None


def answers_as(before: str) -> Check:
    """An accepted allocator must answer as the undamaged one did."""
    return lambda ended: None if answer(ended.out) == before else "another answer than undamaged"


def answer(out: str) -> str:
    """What was answered, without the spinner and bars before it."""
    return out[out.index("\nabcabc") :]


def judged(ended: Ended, project: Project, foreign: dict, check: Check) -> tuple[Outcome, str]:
    """The outcome and, for a red one, what was seen; `foreign` files are somebody else's, as they were before."""
    outcome = outcome_of(ended)
    seen = f"status {ended.status}\n{ended.out[-1500:]}\n{ended.err[-3000:]}"
    if changed := [str(path) for path, old in foreign.items() if not path.is_file() or path.read_bytes() != old]:
        return "data lost", f"{', '.join(changed)} changed\n{seen}"
    if outcome == "harmless and correct" and (wrong := check(ended)):
        return "accepted damage", f"{wrong}\n{seen}"
    return outcome, "" if outcome in GOOD else seen


def lost_labels(before: Project, after: Project) -> str | None:
    """Labels cost the most of all, so none may vanish, whatever else was damaged."""
    gone = labels_of(before.run / "labels.db") - labels_of(after.run / "labels.db")
    return f"{len(gone)} labels are gone" if gone else None


def differences(reference: Project, project: Project) -> str | None:
    """Results that are not those of the undisturbed run."""
    found, wanted = project.content, reference.content
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return f"other results than undisturbed: {', '.join(names)}" if names else None
