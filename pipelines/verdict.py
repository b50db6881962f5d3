"""Whether an allocator is worth it, and if not why, from `metrics.json` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from controller.certificate.certificate import alpha_of
from controller.certificate.fewest_prompts import fewest_prompts
from pipelines.evaluation.summary import NOTHING_LEFT_OUT, exceeds_limit, percent, quality, times

WORTH = 1.1
"""Times as fast as stock generation from which on an allocator is worth it."""
SAME = 0.98
"""Share of the allocator's speed from which on a single plan counts as fast as it."""
IN_PARTS = ("heads", "bridges", "both")
"""Healing whose plans no ordinary checkpoint holds."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with these prompts and this model.

    Attributes:
        worth: whether the allocator is worth it.
        reason: one of `REASONS`, or `worth_it`.
        sentences: for people; the first one is the verdict.
    """

    worth: bool
    reason: str
    sentences: list[str]


def verdict(metrics: Mapping[str, Any], prompts: int) -> Verdict:
    """The verdict on a run.

    Args:
        metrics: of the run, as `metrics.json` holds them.
        prompts: all that there are, of which the run may have used some.
    """
    found = _Findings(metrics, prompts)
    for reason, why in REASONS.items():
        if sentences := why(found):
            first, *others = sentences
            return Verdict(False, reason, [f"Not worth it: {first}", *others])
    return Verdict(True, "worth_it", _worth_it(found))


@dataclass(frozen=True)
class _Findings:
    """Figures that several reasons look at."""

    metrics: Mapping[str, Any]
    prompts: int

    @property
    def best(self) -> Mapping[str, Any]:
        return self.metrics[self.metrics["best"]]  # type: ignore[no-any-return]

    @property
    def static(self) -> Mapping[str, Any]:
        """The best single plan."""
        return self.metrics["best_static"]  # type: ignore[no-any-return]

    @property
    def certificate(self) -> Mapping[str, Any]:
        return self.metrics["certificate"]  # type: ignore[no-any-return]

    @property
    def is_certified(self) -> bool:
        return self.certificate["price"] is not None

    @property
    def size(self) -> int:
        """Independent calibration prompts."""
        return int(self.certificate["groups"] or self.certificate["n"])

    @property
    def full_size(self) -> int:
        """The same of a run with all prompts."""
        return int(self.size * max(1.0, self.prompts / sum(self.metrics["prompts"].values())))

    @property
    def left_out(self) -> str:
        return percent(1 - self.best["budget"])

    @cached_property
    def static_speed(self) -> Mapping[str, Any]:
        """How many times as fast the best single plan is in a batch."""
        place = self.static["plan_shares"].index(max(self.static["plan_shares"]))
        return self.metrics["speed"]["plan_intervals"][place]  # type: ignore[no-any-return]

    @property
    def static_plan(self) -> str:
        shares = self.static["plan_shares"]
        return str(self.metrics["model"]["plans"][shares.index(max(shares))])

    def speed(self, how: str) -> Mapping[str, Any]:
        return self.metrics["speed"]["intervals"][how]  # type: ignore[no-any-return]


def _pays(ratio: Mapping[str, Any]) -> bool:
    return ratio["low"] is not None and ratio["low"] > 1 and ratio["value"] >= WORTH


def _least(certificate: Mapping[str, Any], full_score: float) -> float:
    """Calibration prompts that a bound takes whatever is lost, where the full model scores so much."""
    if certificate["keep"] >= 1 or not full_score:
        return 0.0 if full_score else float("inf")
    delta = certificate["delta"] / max(1, len(certificate["levels"]))
    score = full_score if certificate["risk"] == "mean_score" else 1.0
    try:
        return fewest_prompts(alpha_of(certificate["keep"]), delta, certificate["risk"], full_score=score)
    except ValueError:
        return float("inf")


def _single_plan(found: _Findings) -> Sequence[str]:
    static, speed = found.static, found.static_speed
    if static["budget"] >= NOTHING_LEFT_OUT or not _pays(speed):
        return ()
    as_good = static["quality_ratio"] >= min(found.certificate["keep"], found.best["quality_ratio"])
    as_fast = static["budget"] <= found.best["budget"] or speed["value"] >= SAME * found.speed("batch")["value"]
    if found.is_certified and not (as_good and as_fast):
        return ()
    method = found.metrics["healing"]["method"]
    use = f"`layerbudget export OUT --allocator RUN/allocator --plan {found.static_plan}` writes it as a checkpoint."
    if method in IN_PARTS:
        use = (
            f"The plan has healing parts ({method}), which no ordinary checkpoint holds: run it with "
            f"`attach(model, allocator.healing)` and `apply_plan(model, plan)`, or make the run with "
            "adapt.method=adapter or none, whose plans `layerbudget export` writes."
        )
    return (
        f"the plan {found.static_plan} for all prompts does as well. It is {times(speed)} as fast in a batch and keeps "
        f"{percent(static['quality_ratio'], 1)} of the full model's mean score.",
        use,
    )


def _scores_too_low(found: _Findings) -> Sequence[str]:
    certificate = found.certificate
    if found.is_certified or not _least(certificate, certificate["full_score"]) > found.full_size:
        return ()
    if _least(certificate, 1.0) > found.full_size:
        return ()
    return (
        f"the model scores too low for the bound. Its mean score is {certificate['full_score']:.3g}, and to keep "
        f"{percent(certificate['keep'])} of so little takes {_count(_least(certificate, certificate['full_score']))} "
        f"calibration prompts; all {found.prompts} prompts give {found.full_size}.",
        "Look at the model's answers first: the chat template, decoding.stop and the judge may be wrong for them.",
    )


def _too_few_prompts(found: _Findings) -> Sequence[str]:
    certificate = found.certificate
    needed = max(_least(certificate, certificate["full_score"]), certificate["prompts_needed"] or 0)
    if found.is_certified or needed <= found.size:
        return ()
    there = f"A full run has {found.full_size} of them"
    return (
        f"there are too few prompts yet. To certify {percent(certificate['keep'])} of the full model's score takes "
        f"some {_count(needed)} calibration prompts, and this run had {found.size}.",
        f"{there}, which would likely do: go on with `layerbudget run`, or give more minutes."
        if needed <= found.full_size
        else f"{there}, too few as well: add prompts, or lower calibration.keep.",
    )


def _plans_lose_too_much(found: _Findings) -> Sequence[str]:
    if found.is_certified and (found.best["budget"] <= 1 / WORTH or any(_pays(found.speed(how)) for how in HOW)):
        return ()
    lost = f"the shortened plans lose too much. At the bound {percent(found.certificate['keep'])} the allocator can"
    better = "More prompts for the split adapt, other plans (menu) or other healing parts (adapt.method) may help."
    return f"{lost} leave out {found.left_out} of the decoder.", better


def _layers_do_not_matter(found: _Findings) -> Sequence[str]:
    speed, limit = found.metrics["speed"], found.metrics["speed"]["limit"]
    if any(_pays(found.speed(how)) for how in HOW) or limit["value"] >= WORTH:
        return ()
    return (
        f"the layers matter too little for the time. The allocator leaves out {found.left_out} of the decoder, which "
        f"makes prompts of {speed['prompt_tokens']:.0f} and answers of {speed['new_tokens']} tokens {times(limit)} as "
        "fast at most.",
        "The output head runs for every new token whatever the plan: a smaller vocabulary or shorter answers help.",
    )


def _no_measured_gain(found: _Findings) -> Sequence[str]:
    if any(_pays(found.speed(how)) for how in HOW) and not exceeds_limit(found.metrics):
        return ()
    if found.speed("single")["low"] is None:
        return "too few timed rounds tell no gain from noise; raise evaluation.speed_rounds to 5 or more.", ""
    return (
        f"no gain shows on this machine: {_speeds(found)}, where the layers left out allow "
        f"{times(found.metrics['speed']['limit'])} at most.",
        f"A decision takes {found.metrics['overhead_ms']:.0f} ms a prompt, which longer prompts earn back; other work "
        "on the machine hides small gains.",
    )


REASONS = {
    "score_too_low": _scores_too_low,
    "single_plan": _single_plan,
    "too_few_prompts": _too_few_prompts,
    "plans_lose_too_much": _plans_lose_too_much,
    "layers_do_not_matter": _layers_do_not_matter,
    "no_measured_gain": _no_measured_gain,
}
"""Name -> its sentences, none where it does not apply; the first that applies is the verdict's."""
HOW = ("single", "batch")


def _worth_it(found: _Findings) -> list[str]:
    levels = [each for each in found.metrics["certificates"] if _in_reach(each, found)]
    highest = max(each["keep"] for each in levels)
    return [
        f"Worth it: {_speeds(found)}, keeping {quality(found.metrics)} of the full model's mean score with "
        f"{percent(found.best['budget'])} of the decoder on {found.metrics['prompts']['test']} unseen prompts.",
        found.certificate["sentence"],
        f"A full run, with some {found.full_size} prompts to calibrate on, would likely certify {percent(highest)}.",
    ]


def _in_reach(certificate: Mapping[str, Any], found: _Findings) -> bool:
    """Whether a full run would likely certify a level that this run may have failed to."""
    if certificate["price"] is not None:
        return True
    needed = max(certificate["prompts_needed"] or 0, _least(certificate, certificate["full_score"]))
    return bool(certificate["prompts_needed"]) and needed <= found.full_size


def _speeds(found: _Findings) -> str:
    single, batch = (times(found.speed(how)) for how in HOW)
    return f"{single} as fast one prompt at a time and {batch} in a batch of {found.metrics['speed']['prompts']}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e9 else "more than can be counted"
