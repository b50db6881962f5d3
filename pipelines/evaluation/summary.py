"""A run's findings in words, from metrics.json alone; no sentence says what the metrics contradict."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config import Config, ConfigError
from pipelines.evaluation.examples import RULE

Metrics = Mapping[str, Any]
WIDTH = 120
NEEDED = {"contributions", "examples", "intervals", "judges", "left_out", "worst_task"}
NOTHING_LEFT_OUT = 0.9995
"""Budgets above it are those of the full model."""

JUDGED = {
    "agreement": "whether it is the full model's own answer, to the letter",
    "contains": "whether it contains the reference",
    "exact": "whether it equals the reference",
    "kl": "how near the plan's distribution of tokens stays to the full model's along its answer",
    "number": "whether its last number is the reference's",
    "rouge_l": "how much of the reference it has in the same order (ROUGE-L)",
}
"""What each judge says of an answer."""
RIVALS = {
    "best_static": "the best static plan",
    "static_mixture": "static plans drawn at random",
    "random": "the same plans dealt at random",
    "shuffled": "another prompt's features",
    "task": "the name of the task alone",
}
"""What a controller has to beat."""
CONTRIBUTORS = {
    "full": "the model as it is",
    "full_with_head": "the same with a fitted head",
    "best_static": "the best single plan",
    "task": "the task's name as router",
}
"""Policies in whose order gains are told apart; the allocator comes last."""


def load_metrics(config: Config) -> dict[str, Any]:
    """The finished run's metrics.json.

    Raises:
        ConfigError: an earlier version wrote it, which did not measure all that is to be told.
    """
    metrics: dict[str, Any] = json.loads((config.folder / "metrics.json").read_text())
    if missing := NEEDED - metrics.keys():
        raise ConfigError(
            f"{config.folder / 'metrics.json'} was written by an earlier version and lacks {min(missing)!r}: "
            "run `layerbudget evaluate CONFIG`, then `layerbudget report CONFIG`"
        )
    return metrics


def contributions(metrics: Metrics) -> list[dict[str, Any]]:
    """A row for each policy that explains a part of what the allocator reaches, and one for the allocator."""
    named = {name: text for name, text in CONTRIBUTORS.items() if name in metrics} | {metrics["best"]: "the allocator"}
    figures = ("layers", "budget", "quality", "quality_ratio")
    return [{"name": text, **{key: metrics[name][key] for key in figures}} for name, text in named.items()]


def saves(metrics: Metrics) -> bool:
    """Whether a price is certified at which something is left out."""
    return metrics["certificate"]["price"] is not None and _best(metrics)["budget"] < NOTHING_LEFT_OUT


def rival(metrics: Metrics) -> str | None:
    """The first rival over which these metrics show no gain, in words; None where all are beaten.

    Policies that need no controller are compared on the test split, at the budget of the allocator or below; those that
    do not look at the prompt out of fold, where the gain has to exceed its noise.
    """
    best = _best(metrics)
    for name in ("best_static", "static_mixture", "random"):
        other = metrics[name]
        if other["budget"] <= best["budget"] + 0.005 and other["quality"] >= best["quality"]:
            return RIVALS[name]
    against = (metrics["comparison"]["pooled"] or {"against": {}})["against"]
    for name in ("static_mixture", "shuffled", "task"):
        if name in against and not against[name]["score_gained"]["low"] > 0:
            return RIVALS[name]
    return None if metrics["comparison"]["knows_the_prompt"] else RIVALS["shuffled"]


def headline(metrics: Metrics) -> str:
    """What the run is worth: savings only where no rival has them too."""
    if metrics["certificate"]["price"] is None:
        return "Nothing could be saved with certainty"
    if not saves(metrics):
        return "Every prompt still runs all layers"
    if (other := rival(metrics)) is not None:
        return f"No gain shown over {other}"
    best, known = _best(metrics), metrics["intervals"]["kept"]["low"] is not None
    kept = f", {percent(best['quality_ratio'])} of the quality" if known else ""
    return f"{percent(1 - best['budget'])} less to compute in the layers{kept}"


def tiles(metrics: Metrics) -> dict[str, tuple[str, str]]:
    """The figure that stands large on the tiles of the report's first screen, and the sentence below it."""
    best, kept, prompts = _best(metrics), metrics["intervals"]["kept"], metrics["prompts"]["test"]
    layers, quality = ("nothing saved", "All layers run for every prompt."), "not measurable"
    text = f"of the full model's mean score, on {prompts} prompts that nothing here had seen"
    if saves(metrics):
        share = f"{percent(1 - best['budget'])} less"
        layers = share, f"to compute in the layers, on the average of {prompts} prompts."
    if kept["low"] is not None:
        quality = f"{percent(best['quality_ratio'], 1)} kept"
        text += f" (90% interval {_between(kept, 100, 0)}%)" if saves(metrics) else ""
    changed = f" {changes(metrics)}" if saves(metrics) else ""
    return {"layers": layers, "cost": _cost(metrics), "quality": (quality, f"{text}. {judges(metrics)}{changed}")}


def _cost(metrics: Metrics) -> tuple[str, str]:
    """The share of this machine's time a request that is saved, where the timings tell it from noise."""
    if not saves(metrics):
        return "nothing saved", "All layers run for every prompt, so that nothing gets faster."
    ratios, said = metrics["speed"]["intervals"], f"On this machine {speeds(metrics)}."
    ways = {"single": "one prompt at a time", "batch": f"in a batch of {metrics['speed']['prompts']}"}
    known = [how for how in ways if ratios[how]["exceeds_noise"] and not exceeds_limit(metrics)]
    if not known:
        return "not measurable", said
    share = saved(ratios[known[0]])["value"]
    assert share is not None  # what exceeds the noise has a value
    figure = f"{percent(abs(share))} {'less' if share >= 0 else 'more'}"
    return figure, f"of the machine's time for a request, {ways[known[0]]}. {said}"


def saved(ratio: Metrics) -> dict[str, float | None]:
    """The share of the time that something so many times as fast saves, with its interval."""
    return {end: None if ratio[end] is None else 1 - 1 / ratio[end] for end in ("value", "low", "high")}


def sentence(metrics: Metrics) -> str:
    """Layers, quality, certificate and speed, in one sentence."""
    best = _best(metrics)
    layers = f"{best['layers']:.1f} of {metrics['model']['layers']} layers a prompt"
    share = f"{percent(best['budget'])} of the decoder"
    return (
        f"{layers} ({share}) keep {quality(metrics)} of the full model's mean score on "
        f"{metrics['prompts']['test']} unseen prompts; {_certificate(metrics['certificate'])}; on this machine "
        f"{speeds(metrics)}."
    )


def quality(metrics: Metrics) -> str:
    """What is kept of the full model's mean score, with its interval over prompts."""
    kept = metrics["intervals"]["kept"]
    if kept["low"] is None:
        return "no share that could be measured"
    return f"{percent(_best(metrics)['quality_ratio'], 1)} ({_between(kept, 100, 0)}%)"


def judges(metrics: Metrics) -> str:
    """Who judged the test prompts, and by what."""
    found = metrics["judges"]
    named = [
        f"{name}{f' ({count} prompts)' if len(found) > 1 else ''}: {JUDGED.get(name, 'a judge of your own')}"
        for name, count in sorted(found.items())
    ]
    return f"An answer's score, from 0 to 1, is that of the judge {'; '.join(named)}."


def changes(metrics: Metrics) -> str:
    """What the mean hides: answers that got worse and better, and the task that keeps least."""
    best, worst = _best(metrics), metrics["worst_task"]
    text = (
        f"{percent(best['worse'], 1)} of the answers score lower than the full model's, {percent(best['better'], 1)} "
        "score higher"
    )
    if worst is None or worst["tasks"] < 2:
        return f"{text}."
    kept = f"{percent(worst['kept']['value'])} ({_between(worst['kept'], 100, 0)}%)"
    return f"{text}; of {worst['tasks']} tasks {worst['task']!r} keeps least, {kept} on {worst['n']} prompts."


def _certificate(found: Metrics) -> str:
    """What is guaranteed, without the prompts that it was seen on."""
    if found["price"] is None:
        return f"{_plain(found['keep'])} could not be certified, so all prompts run all layers"
    promises = {
        "mean_score": f" to keep at least {_plain(found['keep'])}",
        "insufficient": f": at most {_plain(1 - found['keep'])} of the answers are worse",
        "score_lost": f" to lose at most {_plain(1 - found['keep'])} of a full score on average",
    }
    return f"certified with {percent(1 - found['delta'])} confidence{promises[found['risk']]}"


def speeds(metrics: Metrics) -> str:
    """How many times as fast as stock, one at a time and in a batch, beside what the layers left out allow."""
    speed = metrics["speed"]
    single, batch = speed["intervals"]["single"], speed["intervals"]["batch"]
    if single["low"] is None:
        return f"{speed['rounds']} timed rounds are too few to say how much faster that is"
    if exceeds_limit(metrics):
        return "the measured speed exceeds what the layers left out allow, so that it is noise"
    return (
        f"it is {times(single)} as fast as stock generate() one prompt at a time, where the layers left out allow "
        f"{times(speed['limit'])} at most, and {times(batch)} as fast in a batch of {speed['prompts']}"
    )


def exceeds_limit(metrics: Metrics) -> bool:
    """Whether the speed-up one prompt at a time lies clearly above what the layers left out allow."""
    single, limit = metrics["speed"]["intervals"]["single"], metrics["speed"]["limit"]
    return single["low"] is not None and single["low"] > max(limit["high"], 1.0)


def closing(metrics: Metrics, report: str) -> str:
    """What a run ends with: the sentence, where the score comes from, some prompts with both answers, the report."""
    examples = metrics["examples"]
    as_good = sum(row["score"] >= row["full_score"] for row in examples)
    return "\n".join(
        [
            "",
            textwrap.fill(sentence(metrics), WIDTH),
            textwrap.fill(f"{judges(metrics)} {changes(metrics)}", WIDTH),
            "",
            f"{'On the unseen prompts':<32}{'layers run':>12}{'of the decoder':>16}"
            f"{'mean score':>12}{'of the model':>14}",
            *(
                f"  {row['name']:<30}{row['layers']:>12.1f}{percent(row['budget'], 1):>16}{row['quality']:>12.3f}"
                f"{percent(row['quality_ratio'], 1):>14}"
                for row in metrics["contributions"]
            ),
            "",
            textwrap.fill(f"{len(examples)} unseen prompts ({RULE}):", WIDTH),
            *(line for row in examples for line in _shown(row, metrics["model"]["layers"])),
            "",
            f"{as_good} of these {len(examples)} answers score as high as the full model's.",
            f"Report: {report}",
        ]
    )


def _shown(row: Metrics, n_layers: int) -> Sequence[str]:
    worse = "   worse" if row["score"] < row["full_score"] else ""
    return [
        "",
        f"  {row['task']}: {tail(row['prompt'])}",
        f"    expected     {tail(row['reference'])}" if row["reference"].strip() else "    no reference",
        f"    full model   {_answer(row['full_answer'])}  {n_layers:>4} layers  {row['full_ms']:6.0f} ms",
        f"    allocator    {_answer(row['answer'])}  {row['layers']:>4g} layers  {row['ms']:6.0f} ms{worse}",
    ]


def ends(prompt: str, first: int = 80, last: int = 40) -> str:
    """Beginning and end of a prompt on one line, without characters that cannot be printed."""
    text = "".join(char if char.isprintable() else " " for char in prompt)
    line = " ".join(text.split())
    return line if len(line) <= first + last else f"{line[:first]} … {line[-last:]}"


def tail(prompt: str, most: int = 72) -> str:
    """The end of a prompt on one line."""
    line = " / ".join(part.strip() for part in prompt.strip().splitlines() if part.strip())
    return line if len(line) <= most else f"...{line[-most:]}"


def _answer(text: str, width: int = 44) -> str:
    line = " / ".join(text.split("\n"))
    return f"{line if len(line) <= width else line[: width - 3] + '...':<{width}}"


def _best(metrics: Metrics) -> Metrics:
    """The allocator's card."""
    card: Metrics = metrics[metrics["best"]]
    return card


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


def _plain(share: float) -> str:
    """A percentage without digits that say nothing."""
    return f"{100 * share:.3g}%"


def times(ratio: Metrics) -> str:
    """A ratio with its interval, or the interval alone where the figure does not exceed the noise."""
    interval = _between(ratio, 1, 2)
    return f"{ratio['value']:.2f} times ({interval})" if ratio["exceeds_noise"] else f"{interval} times"


def _between(interval: Metrics, scale: float, digits: int) -> str:
    low, high = (f"{scale * interval[end]:.{digits}f}" for end in ("low", "high"))
    return f"{low} to {high}"
