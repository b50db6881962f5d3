"""Judges score an answer in [0, 1], against a reference or against the full model's own answer."""

from __future__ import annotations

import importlib
import re
import string
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from backbone.errors import InputError
from backbone.registry import Registry, RegistryError

Judge = Callable[[str, str, str], float]
"""(answer, reference, the full model's answer) -> score in [0, 1]."""


class JudgeError(InputError):
    """An unknown judge, or a score outside [0, 1]."""


def rouge_l(answer: str, reference: str, full_answer: str) -> float:
    """ROUGE-L F-measure with stemming (Lin 2004, section 3), by the `rouge-score` package."""
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


def exact(answer: str, reference: str, full_answer: str) -> float:
    """1 if equal to the reference but for case, outer space and closing punctuation."""
    return float(_normalised(answer) == _normalised(reference))


def may_become_exact(begun: str, reference: str) -> bool:
    """Whether an answer that begins with this text, which has no white space around it, can still be `exact`."""
    so_far, wanted = begun.casefold(), _normalised(reference)
    return wanted.startswith(so_far) or (so_far.startswith(wanted) and not _normalised(so_far[len(wanted) :]))


def number(answer: str, reference: str, full_answer: str) -> float:
    """1 if the last number of the answer equals the last number of the reference; thousands commas are ignored."""
    found, wanted = _last_number(answer), _last_number(reference)
    return float(found is not None and found == wanted)


def contains(answer: str, reference: str, full_answer: str) -> float:
    """1 if the reference occurs in the answer, case ignored."""
    return float(reference.strip().casefold() in answer.casefold())


def agreement(answer: str, reference: str, full_answer: str) -> float:
    """1 if the answer is the full model's, to the letter; needs no reference."""
    return float(answer == full_answer)


JUDGES: Registry[Judge] = Registry(
    "judges", {name: f"{__name__}:{name}" for name in ("rouge_l", "exact", "number", "contains", "agreement")}
)

KL = "kl"
"""The one judge that reads no answer but compares distributions (`oracle.labels.divergence`). It needs no reference."""


def check_judge(name: str) -> None:
    """Raises JudgeError unless `name` is a judge or names an importable `module:function`."""
    if name != KL:
        _judge(name)


def score(judge: str, answer: str, reference: str, full_answer: str) -> float:
    """The score of one answer, by any judge but KL.

    Raises:
        JudgeError: unknown judge, or one that gives a score outside [0, 1]; KL, which no text can be scored by.
    """
    if judge == KL:
        raise JudgeError(f"the judge {KL!r} scores distributions, not answers")
    value = float(_judge(judge)(answer, reference, full_answer))
    if not 0.0 <= value <= 1.0:
        raise JudgeError(f"judge {judge!r} scored {value} for the answer {answer[:60]!r}; scores lie in [0, 1]")
    return value


def score_or_zero(judge: str, answer: str, reference: str, full_answer: str) -> float:
    """As `score`, but 0 where the judge fails: so such an answer counts (see `oracle.labels.reader.judged`)."""
    try:
        return score(judge, answer, reference, full_answer)
    except (Exception, SystemExit):  # a judge may be the user's own code
        return 0.0


@lru_cache
def _judge(name: str) -> Judge:
    module, colon, function = name.partition(":")
    if not colon and name not in JUDGES:
        nearest = get_close_matches(name, [*JUDGES, KL], n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise JudgeError(f"unknown judge {name!r}{hint} Known: {', '.join([*JUDGES, KL])}, or module:function")
    try:
        found: Judge = getattr(importlib.import_module(module), function) if colon else JUDGES[name]
    except RegistryError as error:
        raise JudgeError(str(error)) from None
    except (Exception, SystemExit) as error:  # the user's own code, which may do anything
        raise JudgeError(f"cannot import the judge {name!r}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise JudgeError(f"the judge {name!r} is of type {type(found).__name__}, which cannot be called")
    return found


@lru_cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _normalised(text: str) -> str:
    return text.strip().rstrip(string.punctuation).strip().casefold()


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None
