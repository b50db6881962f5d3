"""A run's findings in words, from metrics.json alone."""

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
NOTHING_LEFT_OUT = 0.9995
"""Budgets above it are those of the full model."""


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


CONTRIBUTORS = {
    "full": "the model as it is",
    "full_with_head": "the same with a fitted head",
    "best_static": "the best single plan",
    "task": "the task's name as router",
}
"""Policies in whose order gains are told apart; the allocator comes last."""


def contributions(metrics: Metrics) -> list[dict[str, Any]]:
    """A row for each policy that explains a part of what the allocator reaches, and one for the allocator."""
    named = {name: text for name, text in CONTRIBUTORS.items() if name in metrics} | {metrics["best"]: "the allocator"}
    figures = ("layers", "budget", "quality", "quality_ratio")
    return [{"name": text, **{key: metrics[name][key] for key in figures}} for name, text in named.items()]


def _contribution_lines(metrics: Metrics) -> Sequence[str]:
    head = (
        f"{'On the unseen prompts':<32}{'layers run':>12}{'of the decoder':>16}{'mean score':>12}{'of the model':>14}"
    )
    rows = (
        f"  {row['name']:<30}{row['layers']:>12.1f}{percent(row['budget'], 1):>16}{row['quality']:>12.3f}"
        f"{percent(row['quality_ratio'], 1):>14}"
        for row in metrics["contributions"]
    )
    return ["", head, *rows]


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


def sentence(metrics: Metrics) -> str:
    """Layers, quality, certificate and speed, in one sentence."""
    best = metrics[metrics["best"]]
    layers = f"{best['layers']:.1f} of {metrics['model']['layers']} layers a prompt"
    return (
        f"{layers} ({percent(best['budget'])} of the decoder) keep {quality(metrics)} of the full model's mean score "
        f"on {metrics['prompts']['test']} unseen prompts; {certificate(metrics)}; "
        f"on this machine {speeds(metrics)}."
    )


def saves(metrics: Metrics) -> bool:
    """Whether a price is certified at which something is left out."""
    best = metrics[metrics["best"]]
    return metrics["certificate"]["price"] is not None and best["budget"] < NOTHING_LEFT_OUT


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
    best, worst = metrics[metrics["best"]], metrics["worst_task"]
    text = (
        f"{percent(best['worse'], 1)} of the answers score lower than the full model's and lose "
        f"{percent(best['score_lost'], 1)} of its score, {percent(best['better'], 1)} score higher and win "
        f"{percent(best['score_won'], 1)}"
    )
    if worst is None or worst["tasks"] < 2:
        return f"{text}."
    kept = f"{percent(worst['kept']['value'])} ({_between(worst['kept'], 100, 0)}%)"
    return f"{text}; of {worst['tasks']} tasks {worst['task']!r} keeps least, {kept} on {worst['n']} prompts."


def rival(metrics: Metrics) -> str | None:
    """The first rival over which these metrics show no gain, in words; None where all are beaten.

    Policies that need no controller are compared on the test split, at the budget of the allocator or below; those that
    do not look at the prompt out of fold, where the gain has to exceed its noise.
    """
    best = metrics[metrics["best"]]
    for name in ("best_static", "static_mixture", "random"):
        other = metrics[name]
        if other["budget"] <= best["budget"] + 0.005 and other["quality"] >= best["quality"]:
            return RIVALS[name]
    against = (metrics["comparison"]["pooled"] or {"against": {}})["against"]
    for name in ("static_mixture", "shuffled", "task"):
        if name in against and not against[name]["score_gained"]["low"] > 0:
            return RIVALS[name]
    return None if metrics["comparison"]["knows_the_prompt"] else RIVALS["shuffled"]


def gains(metrics: Metrics) -> list[tuple[str, str, str]]:
    """For each rival out of fold: its name, the decoder saved at equal score, the score gained at equal budget."""
    pooled = metrics["comparison"]["pooled"] or {"against": {}}
    return [
        (RIVALS[name], _points(found["budget_saved"]), _points(found["score_gained"]))
        for name, found in pooled["against"].items()
    ]


def quality(metrics: Metrics) -> str:
    """What is kept of the full model's mean score, with its interval over prompts."""
    best = metrics[metrics["best"]]
    interval = metrics["intervals"]["kept"]
    if interval["low"] is None:
        return "no share that could be measured"
    return f"{percent(best['quality_ratio'], 1)} ({_between(interval, 100, 0)}%)"


def certificate(metrics: Metrics) -> str:
    """What is guaranteed, without the prompts that it was seen on."""
    found = metrics["certificate"]
    if found["price"] is None:
        return f"{_plain(found['keep'])} could not be certified, so all prompts run all layers"
    confidence = f"certified with {percent(1 - found['delta'])} confidence"
    if found["risk"] == "mean_score":
        return f"{confidence} to keep at least {_plain(found['keep'])}"
    if found["risk"] == "insufficient":
        return f"{confidence}: at most {_plain(1 - found['keep'])} of the answers are worse"
    return f"{confidence} to lose at most {_plain(1 - found['keep'])} of a full score on average"


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
    speed = metrics["speed"]
    single, limit = speed["intervals"]["single"], speed["limit"]
    return single["low"] is not None and single["low"] > max(limit["high"], 1.0)


def times(ratio: Mapping[str, Any]) -> str:
    """A ratio with its interval, or the interval alone where the figure does not exceed the noise."""
    if ratio["exceeds_noise"]:
        return f"{ratio['value']:.2f} times ({_between(ratio, 1, 2)})"
    return f"{_between(ratio, 1, 2)} times"


def closing(metrics: Metrics, report: str) -> str:
    """What a run ends with: the sentence, some prompts with both answers, where the report is."""
    examples = metrics["examples"]
    as_good = sum(row["score"] >= row["full_score"] for row in examples)
    return "\n".join(
        [
            "",
            textwrap.fill(sentence(metrics), WIDTH),
            textwrap.fill(f"{judges(metrics)} {changes(metrics)}", WIDTH),
            *_contribution_lines(metrics),
            *_gain_lines(metrics),
            "",
            textwrap.fill(f"{_capital(count_of(len(examples)))} unseen prompts ({RULE}):", WIDTH),
            *(line for row in examples for line in _shown(row, metrics["model"]["layers"])),
            "",
            f"{as_good} of these {len(examples)} answers score as high as the full model's.",
            f"Report: {report}",
        ]
    )


def _gain_lines(metrics: Metrics) -> Sequence[str]:
    if not (rows := gains(metrics)):
        return []
    pooled = metrics["comparison"]["pooled"]
    head = (
        f"On {pooled['prompts']} prompts to train, tune and test, out of fold at a mean loss of "
        f"{_plain(pooled['alpha'])}, against"
    )
    return [
        "",
        f"{head}:",
        *(f"  {name:<32}{saved} of the decoder saved, {gained} of the score gained" for name, saved, gained in rows),
    ]


def count_of(number: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six")
    return words[number] if number < len(words) else str(number)


def tail(prompt: str, most: int = 72) -> str:
    """The end of a prompt on one line."""
    line = " / ".join(part.strip() for part in prompt.strip().splitlines() if part.strip())
    return line if len(line) <= most else f"...{line[-most:]}"


def _shown(row: Mapping[str, Any], n_layers: int) -> Sequence[str]:
    worse = row["score"] < row["full_score"]
    return [
        "",
        f"  {row['task']}: {tail(row['prompt'])}",
        f"    expected     {tail(row['reference'])}" if row["reference"].strip() else "    no reference",
        f"    full model   {_answer(row['full_answer'])}  {n_layers:>4} layers  {row['full_ms']:6.0f} ms",
        f"    allocator    {_answer(row['answer'])}  {row['layers']:>4g} layers  {row['ms']:6.0f} ms"
        + ("   worse" if worse else ""),
    ]


def _answer(text: str, width: int = 44) -> str:
    line = " / ".join(text.split("\n"))
    return f"{line if len(line) <= width else line[: width - 3] + '...':<{width}}"


def _between(interval: Mapping[str, Any], scale: float, digits: int) -> str:
    low, high = (f"{scale * interval[end]:.{digits}f}" for end in ("low", "high"))
    return f"{low} to {high}"


def _points(estimate: Mapping[str, Any]) -> str:
    """Percentage points with their interval."""
    return f"{100 * estimate['value']:+.1f}% ({_between(estimate, 100, 1)})"


def _plain(share: float) -> str:
    """A percentage without digits that say nothing."""
    return f"{100 * share:.3g}%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
