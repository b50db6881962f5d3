"""Whether an allocator is worth its use, and why not, by the `metrics.json` of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any, NamedTuple

from controller.certificate.certificate import PLAN_SHARE, alpha_of
from controller.certificate.p_values import fewest_prompts
from controller.certificate.risks import CalibrationError
from pipelines.evaluation.summary import NOTHING_LEFT_OUT, exceeds_limit, percent, quality, times

WORTH = 1.1
"""Least speed-up over stock generation of an allocator that is worth its use."""
SAME = 0.98
"""Least share of the allocator's speed at which a single plan counts as equally fast."""
LOOK_AT_ANSWERS = "Look at the model's answers first: the chat template, decoding.stop or the judge may not fit them."
IN_PARTS = ("heads", "bridges", "both")
"""Values of `adapt.method` whose parts no ordinary checkpoint holds."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to use an allocator for these prompts and this model.

    Attributes:
        worth: whether the allocator is worth its use.
        reason: one of `REASONS`, or `worth_it`.
        sentences: for people; the first one is the verdict.
    """

    worth: bool
    reason: str
    sentences: list[str]


class FullRun(NamedTuple):
    """The run that a trial stands for: its prompts, and the levels of `calibration.keep` that share delta there."""

    prompts: int
    levels: int


def verdict(metrics: Mapping[str, Any], full: FullRun | None = None) -> Verdict:
    """The verdict on a run.

    Args:
        metrics: of the run, as `metrics.json` holds them.
        full: for a trial; None where this is the full run.
    """
    own = FullRun(sum(metrics["prompts"].values()), len(metrics["certificates"]))
    found = _Findings(metrics, own if full is None else full)
    for reason, why in REASONS.items():
        if sentences := why(found):
            first, *others = sentences
            said = "One plan is enough" if reason == "single_plan" else "Not worth it"
            return Verdict(False, reason, [f"{said}: {first}", *others])
    return Verdict(True, "worth_it", _worth_it(found))


class _Findings:
    """Figures of a run that several reasons use.

    Attributes:
        certificate: certificate of the highest level that was asked for.
        is_certified: whether any level is certified for the allocator.
        in_reach: `is_certified`, and a run with all prompts would likely certify the highest level.
        size, full_size: number of independent calibration prompts of this run, and of a run with all prompts.
        best, static: report cards of the allocator and of the best single plan.
        single, batch: speed-up of the allocator over stock generation, with one prompt at a time and in a batch.
        static_plan, static_speed: the best single plan, and its speed-up in a batch.
        left_out: share of the decoder that the allocator leaves out, as a text.
    """

    def __init__(self, metrics: Mapping[str, Any], full: FullRun) -> None:
        self.metrics, self.full = metrics, full
        self.certificate: Mapping[str, Any] = max(metrics["certificates"], key=lambda each: each["keep"])
        self.size = int(self.certificate["groups"] or self.certificate["n"])
        self.full_size = int(self.size * max(1.0, full.prompts / sum(metrics["prompts"].values())))
        self.is_certified = metrics["certificate"]["price"] is not None
        self.in_reach = self.is_certified and self.may_certify(self.certificate)
        self.best, self.static = metrics[metrics["best"]], metrics["best_static"]
        self.single, self.batch = (metrics["speed"]["intervals"][how] for how in ("single", "batch"))
        place = self.static["plan_shares"].index(max(self.static["plan_shares"]))
        self.static_plan, self.static_speed = (
            metrics["model"]["plans"][place],
            metrics["speed"]["plan_intervals"][place],
        )
        self.left_out = percent(1 - self.best["budget"])

    @property
    def pays(self) -> bool:
        return _pays(self.single) or _pays(self.batch)

    @property
    def shortens(self) -> bool:
        """Whether the allocator leaves enough out, or is faster all the same, as with a high price from few prompts."""
        return self.in_reach and (self.best["budget"] <= 1 / WORTH or self.pays)

    @property
    def speeds(self) -> str:
        rows = self.metrics["speed"]["prompts"]
        return f"{times(self.single)} as fast one prompt at a time and {times(self.batch)} in a batch of {rows}"

    def may_certify(self, certificate: Mapping[str, Any]) -> bool:
        """Whether a full run would likely certify a level, whether or not this run did."""
        is_possible = bool(certificate["prompts_needed"]) and self.needed(certificate) <= self.full_size
        return certificate["price"] is not None or is_possible

    def least(self, certificate: Mapping[str, Any], score: float) -> float:
        """Least number of calibration prompts that certify a bound in a full run where nothing is lost or won.

        `score` is the full model's.
        """
        if certificate["keep"] >= 1 or not score:
            return 0.0 if score else inf
        delta, risk = (1 - PLAN_SHARE) * certificate["delta"] / self.full.levels, certificate["risk"]
        try:
            return fewest_prompts(
                alpha_of(certificate["keep"]), delta, risk, full_score=score if risk == "mean_score" else 1.0
            )
        except CalibrationError:
            return inf

    def needed(self, certificate: Mapping[str, Any]) -> float:
        """Number of calibration prompts that a bound needs in a full run, by this run's wins and losses where known.

        The wealth that a test has to win is 1 / its share of delta, and wealth grows exponentially.
        """
        found: int | None = certificate["prompts_needed"]
        if not found:
            return self.least(certificate, certificate["full_score"])
        delta, levels = certificate["delta"], max(1, len(certificate["levels"]))
        return max(self.size + 1, round(found * log(self.full.levels / delta) / log(levels / delta)))


def _pays(ratio: Mapping[str, Any]) -> bool:
    return ratio["low"] is not None and ratio["low"] > 1 and ratio["value"] >= WORTH


def _scores_too_low(found: _Findings) -> Sequence[str]:
    certificate = found.certificate
    if not certificate["full_score"]:
        return "the full model scores 0 on all calibration prompts, so there is nothing to keep.", LOOK_AT_ANSWERS
    least = found.least(certificate, certificate["full_score"])
    if found.may_certify(certificate) or not least > found.full_size >= found.least(certificate, 1.0):
        return ()
    return (
        f"the model scores too low for the bound. Its mean score is {certificate['full_score']:.3g}, and to certify "
        f"{percent(certificate['keep'])} of that takes {_count(least)} calibration prompts; a run with all "
        f"{found.full.prompts} prompts has {found.full_size}.",
        LOOK_AT_ANSWERS,
    )


def _single_plan(found: _Findings) -> Sequence[str]:
    static, speed, bound = found.static, found.static_speed, found.certificate["keep"]
    as_good = static["quality_ratio"] >= (min(bound, found.best["quality_ratio"]) if found.in_reach else bound)
    as_fast = static["budget"] <= found.best["budget"] or speed["value"] >= SAME * found.batch["value"]
    is_rival = as_good and (as_fast or not found.in_reach)
    if static["budget"] >= NOTHING_LEFT_OUT or not (_pays(speed) and is_rival):
        return ()
    said = (
        f"the plan {found.static_plan} for all prompts does as well. It is {times(speed)} as fast in a batch and keeps"
    )
    return f"{said} {percent(static['quality_ratio'], 1)} of the full model's mean score.", _use(found)


def _use(found: _Findings) -> str:
    """A sentence on how to use the best single plan without an allocator."""
    method = found.metrics["healing"]["method"]
    if method not in IN_PARTS:
        return (
            f"`layerbudget export OUT --allocator RUN/allocator --plan {found.static_plan}` writes a checkpoint of it."
        )
    return (
        f"The plan has healing parts ({method}), which no ordinary checkpoint holds: run it with "
        "`apply_plan(model, plan, allocator.healing)`, or make the run with adapt.method=adapter or none, "
        "whose plans `layerbudget export` writes."
    )


def _too_few_prompts(found: _Findings) -> Sequence[str]:
    needed = found.needed(found.certificate)
    if found.shortens or needed <= found.size:
        return ()
    there = f"A full run has {found.full_size} of them"
    return (
        f"there are too few prompts yet. To certify {percent(found.certificate['keep'])} of the full model's score "
        f"takes some {_count(needed)} calibration prompts, and this run had {found.size}.",
        f"{there}, which would likely do: go on with `layerbudget run`, or give more minutes."
        if needed <= found.full_size
        else f"{there}, too few as well: add prompts, or lower calibration.keep.",
    )


def _plans_lose_too_much(found: _Findings) -> Sequence[str]:
    if found.shortens:
        return ()
    return (
        f"the shortened plans lose too much. The bound of {percent(found.certificate['keep'])} "
        + (f"leaves out {found.left_out} of the decoder." if found.in_reach else "is out of reach."),
        "More prompts for the split adapt, other plans (menu) or other healing parts (adapt.method) may help.",
    )


def _layers_do_not_matter(found: _Findings) -> Sequence[str]:
    speed, limit = found.metrics["speed"], found.metrics["speed"]["limit"]
    if found.pays or limit["low"] is None or limit["value"] >= WORTH:
        return ()
    return (
        f"the layers take too small a share of the time. The allocator leaves out {found.left_out} of the decoder, "
        f"which makes prompts of {speed['prompt_tokens']:.0f} and answers of {speed['new_tokens']} tokens "
        f"{times(limit)} as fast at most.",
        "The output head runs for every new token under any plan: a smaller vocabulary or shorter answers help.",
    )


def _no_measured_gain(found: _Findings) -> Sequence[str]:
    if found.pays and not exceeds_limit(found.metrics):
        return ()
    if found.single["low"] is None:
        return ("the timed rounds are too few to tell a gain from noise; raise evaluation.speed_rounds to 5 or more.",)
    return (
        f"no reliable gain was measured on this machine: {found.speeds}. The layers left out allow "
        f"{times(found.metrics['speed']['limit'])} at most.",
        f"A decision takes {found.metrics['overhead_ms']:.0f} ms a prompt, which weighs less on longer prompts. Other "
        "work on the machine hides small gains.",
    )


REASONS = {
    "score_too_low": _scores_too_low,
    "single_plan": _single_plan,
    "too_few_prompts": _too_few_prompts,
    "plans_lose_too_much": _plans_lose_too_much,
    "layers_do_not_matter": _layers_do_not_matter,
    "no_measured_gain": _no_measured_gain,
}
"""Name -> function that gives the sentences of a reason, none where it does not apply; the first that does counts."""


def _worth_it(found: _Findings) -> list[str]:
    said = [
        f"Worth it: {found.speeds}, keeping {quality(found.metrics)} of the full model's mean score with "
        f"{percent(found.best['budget'])} of the decoder on {found.metrics['prompts']['test']} unseen prompts.",
        found.metrics["certificate"]["sentence"],
    ]
    if found.full_size > found.size:
        highest = max(each["keep"] for each in found.metrics["certificates"] if found.may_certify(each))
        count = f"A full run, with some {found.full_size} prompts to calibrate on"
        said.append(f"{count}, would likely certify {percent(highest)}.")
    return said


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e9 else "more than can be counted"
