"""Write the figures of README.md and docs/results.md from the committed results.

    python benchmarks/readme.py           # rewrites both files
    python benchmarks/readme.py --check   # exits with status 1 where a figure is not that of its file

Figures stand between `<!-- figures: NAME -->` and `<!-- end -->`; NAME is a key of `BLOCKS`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)
EARLIER = ("qwen_embedded", "smollm2_chat", "qwen_chat")
"""Runs of earlier versions, as committed; docs/results.md says what has changed since."""
RUNS = ("demo_own", "qwen_classify", "qwen_classify_own", "qwen_documents")
"""Runs with blocks of their own: NAME, what explains the score on unseen prompts, NAME_levels, the certified levels,
NAME_speeds and, as for the demo, NAME_redraws and NAME_bounds."""

REDRAWN = {
    "allocator": "the allocator",
    "task": "the task's name as router",
    "shuffled": "a controller with shuffled features",
    "embedding": "a controller with the mean embedding alone",
    "best_static": "the best single plan",
    "oracle": "the oracle (flattered)",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing")
    check = options.parse_args().check
    for page in PAGES:
        text = page.read_text()
        if (new := rendered(text)) == text:
            continue
        if check:
            sys.exit(f"{page.name} does not show the committed results: run `python benchmarks/readme.py`")
        page.write_text(new)
        print(page.name)


def rendered(page: str) -> str:
    """A page with every block of figures as the results have them."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", page)


def gain() -> str:
    """The range of each figure over the fresh runs."""
    runs = _demo()["runs"]
    budget, quality, single, batch = (
        _range([run["figures"][name] for run in runs], form)
        for name, form in (
            ("certified_budget", "{:.0%}"),
            ("quality", "{:.0%}"),
            ("speed_one_at_a_time", "{:.2f}"),
            ("speed_in_a_batch", "{:.2f}"),
        )
    )
    return (
        f"Over {len(runs)} fresh runs, each with other splits, layerbudget runs {budget} of the decoder and\n"
        f"scores {quality} of what the full model scores. It answers {batch} times as many requests a second in\n"
        f"batches of 8, {single} times as many one at a time."
    )


def larger_model() -> str:
    """What Qwen runs, scores and gains, with references and without."""
    with_references, without = (_first_level(_result(name)) for name in ("qwen_classify", "qwen_classify_own"))
    return (
        "Qwen2.5-Coder 1.5B on five kinds of prompts to classify, with heads fitted on right answers:\n"
        f"{with_references}.\nWith heads fitted on its own answers alone: {without}."
    )


def _first_level(metrics: Mapping[str, Any]) -> str:
    """What the allocator is certified to keep, runs, scores and gains."""
    ours, keep = metrics["contributions"][-1], metrics["certificates"][0]["keep"]
    return (
        f"{ours['budget']:.0%} of the decoder and {ours['quality_ratio']:.0%} of the full model's score,\n"
        f"certified to keep {keep:.0%}, at {table.within(metrics['speed']['intervals']['single'], '{:.2f}')} times "
        "its requests a second one at a time"
    )


def policies() -> str:
    """Four ways to answer the middle run's unseen prompts."""
    metrics = _demo()["metrics"]
    speed, rows = metrics["speed"], metrics["contributions"]
    budgets = [budget for budget, _ in metrics["healing"]["after"]["static"]]
    single = min(range(len(budgets)), key=lambda plan: abs(budgets[plan] - rows[2]["budget"]))
    seconds = (*(speed["plan_seconds"][plan] for plan in (-1, -2, single)), speed["seconds"]["allocator_batch"])
    names = ("full model", "full model with a fitted head", "best single plan", "**layerbudget**")
    cells = [
        [name, f"{row['layers']:.1f}", f"{row['quality']:.2f}", f"{speed['prompts'] / taken:.1f}"]
        for name, row, taken in zip(names, (*rows[:3], rows[-1]), seconds, strict=True)
    ]
    return _table(["", f"layers run, of {metrics['model']['layers']}", "score", "requests a second"], cells)


def fresh_runs() -> str:
    """Every fresh run of the demo."""
    names = ("certified_budget", "quality", "speed_one_at_a_time", "speed_in_a_batch", "headroom")
    rows = [
        [str(run["seed"]), f"{run['seconds'] / 60:.1f}", *(f"{run['figures'][name]:.3f}" for name in names)]
        for run in _demo()["runs"]
    ]
    head = ["data.seed", "minutes", "of the decoder", "score, of full", "speed, one", "speed, batch", "headroom"]
    return _table(head, rows)


def explained() -> str:
    """The middle run's table of what explains the score, on unseen prompts."""
    return contributions(_demo()["metrics"])


def speeds(metrics: Mapping[str, Any]) -> str:
    """How many times as fast as stock generation the allocator is."""
    found = metrics["speed"]
    rows = [
        [name, table.within(found["intervals"][key], "{:.2f}")]
        for name, key in (("one at a time", "single"), (f"{found['prompts']} in a batch", "batch"))
    ]
    return _table(["", "times stock"], rows)


def verdicts() -> str:
    """The verdicts of ten minutes beside those of the full runs."""
    rows = [
        [
            name.replace("_", " "),
            *(f"`{each[run]['reason']}`, {each[run]['minutes']:.0f} minutes" for run in ("trial", "full")),
        ]
        for name, each in _result("verdicts")["workloads"].items()
    ]
    return _table(["prompts", "`layerbudget try`", "full run"], rows)


def contributions(metrics: Mapping[str, Any]) -> str:
    rows = [
        [
            row["name"],
            f"{row['layers']:.1f}",
            f"{row['budget']:.0%}",
            f"{row['quality']:.3f}",
            f"{row['quality_ratio']:.0%}",
        ]
        for row in metrics["contributions"]
    ]
    head = ["", f"layers of {metrics['model']['layers']}", "of the decoder", "mean score", "of the full model's"]
    return _table(head, rows)


def levels(metrics: Mapping[str, Any]) -> str:
    rows = [
        [f"{each['keep']:.0%}", "not certified", ""]
        if each["price"] is None
        else [f"{each['keep']:.0%}", f"{each['test']['budget']:.1%}", f"{1 - each['test']['loss']:.0%}"]
        for each in sorted(metrics["certificates"], key=lambda each: float(each["keep"]))
    ]
    return _table(["certified to keep", "of the decoder", "mean score, of full"], rows)


def earlier_runs() -> str:
    """Runs of earlier versions."""
    rows = [table.row(RESULTS / f"{name}.json") for name in EARLIER]
    return _table(table.COLUMNS, rows)


def redrawn(name: str) -> str:
    """The policies of one run over redraws of its splits: mean, and the range of 90% of the draws."""
    found = json.loads((RESULTS / f"redraws-{name}.json").read_text())["policies"]
    columns = {"of the decoder": "budget", "mean score, of full": "quality_ratio", "worse": "worse", "better": "better"}
    rows = [
        [
            REDRAWN[policy],
            *(_over_draws(figures[key]) for key in columns.values()),
            f"{figures['beaten']['mean']:.0%}" if "beaten" in figures else "",
        ]
        for policy, figures in found.items()
    ]
    return _table(["", *columns, "draws in which it runs more than the allocator"], rows)


def bounds(name: str) -> str:
    """How often each bound of that run was exceeded over the redraws."""
    found = json.loads((RESULTS / f"redraws-{name}.json").read_text())
    allocator, count = found["policies"]["allocator"], found["draws"] * found["calibrations"]
    keeps = sorted((key.removeprefix("broken_") for key in allocator if key.startswith("broken_")), key=float)
    rows = [
        [f"{float(keep):.0%}", _over_draws(allocator[f"budget_{keep}"]), f"{allocator[f'broken_{keep}']['mean']:.1%}"]
        for keep in keeps
    ]
    return _table(["certified to keep", "of the decoder", f"bound exceeded, of {count} draws"], rows)


def _over_draws(figure: Mapping[str, float]) -> str:
    return table.within({**figure, "value": figure["mean"]}, "{:.1%}")


def _shown(show: Callable[[Mapping[str, Any]], str], run: str) -> str:
    return show(_result(run))


BLOCKS: dict[str, Callable[[], str]] = {
    one.__name__: one
    for one in (
        *(gain, larger_model, policies, fresh_runs, explained),
        *(verdicts, earlier_runs),
    )
}
BLOCKS |= {
    f"{run}{suffix}": partial(_shown, show, run)
    for run in RUNS
    for suffix, show in (("", contributions), ("_levels", levels), ("_speeds", speeds))
}
BLOCKS |= {
    f"{run}{suffix}": partial(show, run)
    for run in ("demo", *RUNS)
    for suffix, show in (("_redraws", redrawn), ("_bounds", bounds))
}


def _demo() -> dict[str, Any]:
    return _result("demo")


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _range(values: Sequence[float], form: str) -> str:
    return f"{form.format(min(values))} to {form.format(max(values))}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
