"""What calibration found, as a file and as sentences: what is promised, and what is not."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from backbone.errors import InputError
from backbone.strict_json import LONGEST_NAME, parse
from controller.certificate.risks import MOST_KEPT, RISKS, Risk

MOST_PROMPTS, LARGEST_PRICE, LONGEST_TEXT, MOST_LEVELS = 10**9, 1e6, 10_000, 20
"""What no certificate exceeds; a text in characters."""
LOWEST_TASK_RISK = -1e4
"""Of a task, whose full model's mean score may be near 0; it is not in the file."""
_DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


_ALONE = "Each certificate fails with probability delta, the best of several more often."
_SHARED = "All levels together fail with probability delta: choose among them, and certify another on other prompts."


def alpha_of(keep: float) -> float:
    """The largest mean loss that keeps `keep`: .03 for .97."""
    return round(1 - keep, 9)


class CertificateError(InputError):
    """A file that is no certificate of this version, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """With probability at least 1 - `delta`, so much is kept on average on prompts like the calibration prompts.

    Attributes:
        risk: which loss; see `controller.certificate.risks.Risk`. The mean losses of `mean_score` are in shares of the
            full model's mean score, and below 0 where more is won than lost.
        keep: the bound: the mean loss is at most 1 - `keep`. Above 0; 1 or more, for `mean_score` alone, where
            the full model's mean score or more is kept.
        delta: how often the bound may fail, over draws of the calibration prompts; with `levels`, any of theirs.
        n: calibration prompts.
        price: what an expected loss of 1 costs, in shares of the decoder, where plans are chosen; None where no price
            is valid, or where the lowest valid one shortens nothing, and every prompt runs the full plan.
        observed_risk: mean loss of the calibration prompts at the price (0 where there is none), of groups where
            `groups` counts them.
        prompts_hash: of the calibration prompts.
        date: when it was made, ISO 8601.
        fewest_prompts: with fewer calibration prompts (in each task, where `per_task` is given) no price can be valid,
            if the controller wins nothing; None where that is more than can be looked at, and where `keep` is 1 or
            more, which takes wins.
        full_score: the full model's mean score on them; 1 where the risk does not ask for it.
        prompts_needed: where there is no price, about how many prompts that lose and vary like these would do at the
            first price that shortens any; 0 where the controller shortens none of them; None for too many, or where
            there is a price.
        per_task: task -> {"n", "observed_risk"} where the bound holds in every task, empty where only overall.
        tolerance: how much lower than the full model's the score of a sufficient answer may be.
        decoding: how the answers were generated, in words.
        chat_template: hash of the template that the prompts were put into; empty where they were given as they are.
        left_out: prompts that are not among the n, since the judge failed on the full model's answer.
        groups: independent groups that the prompts fall into, each of which counts once in every mean and in every
            number of prompts but `n` and `left_out`; None where each prompt is a group of its own.
        levels: all values of `keep` that were certified on these prompts and share `delta`, so that any of them may be
            chosen afterwards; empty for this one alone.
        assumes: names of the allocator's files beside menu, projection and controller that it was made with, such as
            the outlier test's and the drift alarm's.
        does_not_cover: what is not promised, in sentences.
    """

    risk: Risk
    keep: float
    delta: float
    n: int
    price: float | None
    observed_risk: float
    prompts_hash: str
    date: str
    fewest_prompts: int | None
    full_score: float = 1.0
    prompts_needed: int | None = None
    per_task: dict[str, dict[str, float]] = field(default_factory=dict)
    tolerance: float = 0.0
    decoding: str = ""
    chat_template: str = ""
    left_out: int = 0
    groups: int | None = None
    levels: tuple[float, ...] = ()
    assumes: tuple[str, ...] = ()
    does_not_cover: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.does_not_cover:
            object.__setattr__(self, "does_not_cover", exclusions(self))

    @property
    def alpha(self) -> float:
        """The largest mean loss that keeps the bound."""
        return alpha_of(self.keep)

    @property
    def sentence(self) -> str:
        """The certificate in plain words."""
        if self.price is None:
            return f"Not certified: {self._reason}, so all prompts run the full model.{self._unjudged}"
        seen = self._seen(self.observed_risk)
        if self.risk == "mean_score":
            seen = f"{seen} of {self.full_score:.3g}"
        return (
            f"With {_percent(1 - self.delta)} confidence, {self._bound}, on prompts like the {self.n} calibration "
            f"prompts{self._grouped} (observed: {seen}{self._worst_task}).{self._shared}{self._unjudged}"
        )

    @property
    def _shared(self) -> str:
        if not self.levels:
            return ""
        return f" The levels {', '.join(map(_percent, self.levels))} share this confidence: any may be chosen."

    @property
    def _grouped(self) -> str:
        return "" if self.groups is None else f" of {self.groups} groups, each of which counts once"

    @property
    def _unjudged(self) -> str:
        if not self.left_out:
            return ""
        count = f"{self.left_out} of {self.n + self.left_out} prompts"
        return f" Left out: {count}, since the judge failed on the full model's answer."

    def too_small(self) -> dict[str, int]:
        """Task -> its prompts, where they are too few for the bound; of an overall bound "all tasks" -> all prompts.
        Empty where `keep` is 1 or more, since wins may be of any size."""
        if self.keep >= 1:
            return {}
        sizes = {task: int(seen["n"]) for task, seen in self.per_task.items()} or {"all tasks": self.groups or self.n}
        return {task: n for task, n in sizes.items() if self.fewest_prompts is None or n < self.fewest_prompts}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({**asdict(self), "sentence": self.sentence}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Raises CertificateError for a file that `save` of this version did not write."""
        try:
            data = parse(path.read_text(encoding="utf-8"))
            data.pop("sentence")
            _check_values(data)
            return cls(**{**data, **{name: tuple(data[name]) for name in ("levels", "assumes", "does_not_cover")}})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CertificateError(
                f"{path} is not a certificate that this version can read ({error}): "
                "make it again with the calibrate stage"
            ) from None

    @property
    def _bound(self) -> str:
        each = ", in each task," if self.per_task else ""
        if self.risk == "mean_score":
            return f"answers{each} keep at least {_percent(self.keep)} of the full model's mean score"
        if self.risk == "insufficient":
            prompts = f"at most {_percent(self.alpha)} of prompts{each}"
            less = f"over {self.tolerance:g} lower" if self.tolerance else "lower"
            return f"{prompts} get an answer that scores {less} than the full model's"
        return f"answers{each} lose on average at most {self._amount(self.alpha)} against the full model's"

    @property
    def _reason(self) -> str:
        claim = f"showing with {_percent(1 - self.delta)} confidence that {self._bound}"
        what = "calibration prompts" if self.groups is None else "groups of calibration prompts"
        small = self.too_small()
        if self.fewest_prompts is None and self.risk != "mean_score":
            return f"{claim} takes more calibration prompts than can be looked at; ask for a larger bound"
        if self.fewest_prompts is None and self.keep < 1:
            scored = f"the full model's mean score on the {self.n} calibration prompts is {self.full_score:.3g}"
            return f"{scored}, too near 0 for {claim}; use prompts that it can answer, or another judge"
        if small and self.per_task:
            tasks = ", ".join(f"{task!r} has {n}" for task, n in small.items())
            return f"{claim} takes at least {self.fewest_prompts} {what} of each task ({tasks})"
        if small:
            where = f" where that is {self.full_score:.3g}" if self.risk == "mean_score" else ""
            return f"{claim} takes at least {self.fewest_prompts} {what}{where}, and there are {small['all tasks']}"
        if self.prompts_needed == 0:
            return f"the controller chooses the full plan for all {self.n} calibration prompts at every price"
        return f"{self.groups or self.n} {what} do not suffice for {claim}, with this controller{self._more}"

    @property
    def _more(self) -> str:
        if self.prompts_needed is None:
            return f", nor would many more like them: it {self._short} at the first price that shortens any"
        return f": at the spread of what they lose it takes about {self.prompts_needed}"

    @property
    def _short(self) -> str:
        return "loses too much" if self.keep < 1 else "wins too little"

    def _amount(self, risk: float) -> str:
        return self._seen(risk) + ("" if self.risk == "insufficient" else " of a score that runs from 0 to 1")

    def _seen(self, risk: float) -> str:
        """An observed risk in words: what is kept of the full model's score, lost, or how many prompts lost."""
        if self.risk == "mean_score":
            return _percent(1 - risk)
        return _percent(risk) if self.risk == "insufficient" else f"{risk:.3g}"

    @property
    def _worst_task(self) -> str:
        if not self.per_task:
            return ""
        worst = max(self.per_task, key=lambda task: self.per_task[task]["observed_risk"])
        return f"; {worst!r}, the worst task: {self._seen(self.per_task[worst]['observed_risk'])}"


def exclusions(found: Certificate) -> tuple[str, ...]:
    """What a certificate does not promise, in sentences."""
    tasks = (
        f"Tasks other than {', '.join(sorted(found.per_task))}."
        if found.per_task
        else "Single tasks, or another mixture of them: a rare or hard task may lose more than the bound."
    )
    decoding = f" than {found.decoding}" if found.decoding else ""
    template = f"; another chat template than {found.chat_template}, or none" if found.chat_template else ""
    return (
        f"Other kinds of prompts: other lengths, languages or templates{template}.",
        tasks,
        "Single prompts: a mean is bounded, and any one prompt may lose everything.",
        f"Other decoding settings{decoding}: sampling, longer answers, other ends.",
        "Another data type, device or batch size, whose rounding can change an answer.",
        "Quality that the judge does not see.",
        "Prompts for which the judge fails on the full model's answer: "
        f"{found.left_out} of {found.n + found.left_out} were left out. A shortened plan's answer on which it fails "
        "scores 0.",
        f"Drift: prompts that have changed since {found.date}.",
        "Prompts that are not independent draws: copies of the training prompts, near-duplicates, and groups that the "
        "field 'group' does not name. Prompts of one group, or of one text, count as one.",
        "A choice made afterwards: the controller and the bound were named before the calibration prompts were looked "
        f"at. {_SHARED if found.levels else _ALONE}",
    )


def _check_values(data: dict[str, Any]) -> None:
    if (found := set(data)) != (known := {field.name for field in fields(Certificate)}):
        raise ValueError(f"missing: {sorted(known - found)}, unknown: {sorted(found - known)}")
    tasks, price, full = data["per_task"], data["price"], data["full_score"]
    lowest = 0.0
    if data["risk"] == "mean_score" and _is_number(full, 0, 1):
        lowest = 1 - 1 / (full or 1) - 1e-6  # what is won is at most 1 - full, in shares of full
    right = {
        "risk": data["risk"] in RISKS,
        "price": price is None or (_is_number(price, 0, LARGEST_PRICE) and price > 0),
        "per_task": isinstance(tasks, dict) and all(_is_task(*one, lowest) for one in tasks.items()),
        **{name: _are_texts(data[name], LONGEST_TEXT) for name in ("assumes", "does_not_cover")},
        "delta": _is_number(data["delta"], 0, 1) and 0 < data["delta"] < 1,
        "keep": _is_level(data["keep"], data["risk"]),
        "levels": isinstance(data["levels"], list)
        and len(data["levels"]) <= MOST_LEVELS
        and all(_is_level(level, data["risk"]) for level in data["levels"]),
        **{name: _is_count(data[name]) for name in ("n", "left_out")},
        **{
            name: data[name] is None or _is_count(data[name]) for name in ("fewest_prompts", "prompts_needed", "groups")
        },
        **{name: _is_number(data[name], 0, 1) for name in ("tolerance", "full_score")},
        "observed_risk": _is_number(data["observed_risk"], lowest, 1),
        **{name: _are_texts([data[name]], LONGEST_NAME) for name in ("prompts_hash", "chat_template")},
        "decoding": _are_texts([data["decoding"]], LONGEST_TEXT),
        "date": isinstance(data["date"], str) and bool(_DATE.fullmatch(data["date"])),
    }
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise ValueError(f"{wrong[0]} is {data[wrong[0]]!r:.80}")


def _is_task(name: str, seen: object, lowest: float) -> bool:
    if not isinstance(seen, dict) or seen.keys() != {"n", "observed_risk"} or len(name) > LONGEST_NAME:
        return False
    return _is_count(seen["n"]) and _is_number(seen["observed_risk"], LOWEST_TASK_RISK if lowest < 0 else 0, 1)


def _is_level(value: object, risk: object) -> bool:
    most = MOST_KEPT if risk == "mean_score" else 1
    return _is_number(value, 0, most) and 0 < value < most  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST_PROMPTS


def _is_number(value: object, lowest: float, highest: float) -> bool:
    return type(value) in (int, float) and lowest <= value <= highest  # type: ignore[operator]


def _are_texts(values: object, longest: int) -> bool:
    return isinstance(values, list) and all(isinstance(one, str) and len(one) <= longest for one in values)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
