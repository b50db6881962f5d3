"""Judges score an answer in [0, 1], against a reference or against the full model's own answer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from backbone.errors import InputError
from backbone.registry import Registry
from oracle.text_normalisation import folded, last_number, may_become_plain, plain, words

Judge = Callable[[str, str, str], float]
"""(answer, reference, the full model's answer) -> score in [0, 1]."""


class JudgeError(InputError):
    """A judge that does not exist, a reference that it cannot use, or a score that is none."""


def rouge_l(answer: str, reference: str, full_answer: str) -> float:
    """ROUGE-L F-measure (Lin 2004, section 3) by the `rouge-score` package, over the `words` of any script."""
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


def exact(answer: str, reference: str, full_answer: str) -> float:
    """1 if equal to the reference but for case, outer space and the closing marks `. , ; : ! ?`."""
    return float(plain(answer) == plain(reference))


def may_become_exact(begun: str, references: Sequence[str]) -> bool:
    """Whether an answer that begins with this text can still be `exact` for one of the references."""
    return any(may_become_plain(begun, plain(reference)) for reference in references)


def number(answer: str, reference: str, full_answer: str) -> float:
    """1 if the last number of the answer equals the last number of the reference (see `last_number`)."""
    found, wanted = last_number(answer), last_number(reference)
    return float(found is not None and found == wanted)


def contains(answer: str, reference: str, full_answer: str) -> float:
    """1 if the reference occurs in the answer, case ignored."""
    return float(folded(reference).strip() in folded(answer))


def agreement(answer: str, reference: str, full_answer: str) -> float:
    """1 if the answer is the full model's, to the letter; needs no reference."""
    return float(answer == full_answer)


JUDGES: Registry[Judge] = Registry(
    "judges", {name: f"{__name__}:{name}" for name in ("rouge_l", "exact", "number", "contains", "agreement")}
)

KL = "kl"
"""The one judge that compares distributions, not answers (`oracle.labels.verification`); it needs no reference."""

MEANINGS = dict.fromkeys(("rouge_l", "exact", "number", "contains"), 2)
"""Raised when a judge changes, so that labels scored by an older meaning are not read."""


def judge_key(name: str) -> str:
    """What labels name their judge by."""
    return f"{name}:{MEANINGS[name]}" if name in MEANINGS else name


def check_judge(name: str) -> None:
    """Raises JudgeError unless `name` is a judge or names an importable `module:function`."""
    if name != KL:
        _judge(name)


def check_references(judge: str, references: Sequence[str]) -> None:
    """Raises JudgeError for references that a judge would score every answer alike by.

    A judge of one's own needs a reference, perhaps an empty one, unless its attribute `needs_reference` is False.
    """
    if judge in (KL, "agreement") or not getattr(_judge(judge), "needs_reference", True):
        return
    if not references:
        raise JudgeError(f"the reference is missing, and the judge {judge!r} needs one; add it, or take 'agreement'")
    for reference in references if judge in _USABLE else ():
        needed, is_usable = _USABLE[judge]
        if not is_usable(reference):
            raise JudgeError(f"the reference {reference!r:.80} holds no {needed}; the judge {judge!r} needs one")


_USABLE: dict[str, tuple[str, Callable[[str], object]]] = {
    "rouge_l": ("word", words),
    "exact": ("letter or sign", str.strip),
    "number": ("number", last_number),
    "contains": ("letter or sign", str.strip),
}
"""What a reference of a judge must hold, and how that is found."""


def score(judge: str, answer: str, references: str | Sequence[str], full_answer: str) -> float:
    """The score of one answer, by any judge but KL; of several right answers the best one counts (SQuAD's rule).

    Raises:
        JudgeError: unknown judge, references that it cannot use, or a score that is no number in [0, 1]; KL, which no
            text can be scored by.
    """
    if judge == KL:
        raise JudgeError(f"the judge {KL!r} scores distributions, not answers")
    given = [references] if isinstance(references, str) else references
    check_references(judge, given)
    return max(_checked(judge, _judge(judge)(answer, reference, full_answer)) for reference in given or [""])


def _checked(judge: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise JudgeError(f"the judge {judge!r} gave the score {value!r:.80}; a score is a number in [0, 1]")
    return number


@lru_cache
def _judge(name: str) -> Judge:
    module, colon, function = name.partition(":")
    if not colon and name not in JUDGES:
        nearest = get_close_matches(name, [*JUDGES, KL], n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise JudgeError(f"unknown judge {name!r}{hint or '.'} Known: {', '.join([*JUDGES, KL])}, or module:function")
    try:
        found: Judge = getattr(importlib.import_module(module), function) if colon else JUDGES[name]
    except InputError as error:
        raise JudgeError(str(error)) from None
    except (Exception, SystemExit) as error:  # the user's own code, which may do anything
        raise JudgeError(f"cannot import the judge {name!r}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise JudgeError(f"the judge {name!r} is of type {type(found).__name__}, which cannot be called")
    return found


@lru_cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """The tokenizer that `rouge-score` asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)
