"""A run in a given time: as many prompts as fit, the same stages, one verdict at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.families import decoder_layers
from backbone.files import write_atomically
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from oracle.batches import spread
from oracle.chat import ChatTemplate
from oracle.labels.generation import answer_batch
from oracle.menus.methods import TRIED_EXITS
from oracle.prompts import Prompt
from pipelines.config import Config, load_config
from pipelines.evaluation.speed import FEWEST_ROUNDS
from pipelines.evaluation.summary import load_metrics
from pipelines.proposal import FEWEST, least_prompts
from pipelines.run.progress import duration, say
from pipelines.run.prompts import prompts_of
from pipelines.run.runner import run_all
from pipelines.run.state import read_record
from pipelines.run.tracking import log_verdict
from pipelines.verdict import FullRun, Verdict, verdict
from runtime.paired_timing import seconds_of

TIMED = 8
"""Prompts whose answers are timed."""
FIXED_S = 60.0
"""What a trial takes beside prompts and timings: controllers, controls, reports."""
EXAMPLES = 60
"""Answers, one at a time, in whose time the report's examples are made."""
PASSES = {True: 0.8, False: 3.0}
"""How many times as long as its full answer a prompt takes in all stages: with exits alone, and with other plans."""
HEAD_FIT = 16
"""Answers in whose time one exit head is fitted, whatever the number of prompts."""
TIMINGS = 0.15
"""Share of the time for timings."""
SAFE = 0.85
"""Share of the time that is planned for."""
LOWER = (0.9, 0.8, 0.6)
"""Bounds that fewer prompts can show, for a trial that cannot show what is wanted."""
SCORES = 1.5
"""How many times as many prompts a bound takes at the full model's score, as it may be, as at a score of 1."""
MOST_TIMED = 8
"""Prompts that speeds are measured on, at most."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that the full model takes for a prompt and its answer, alone and as one of a batch."""

    single: float
    batched: float


def measured_pace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], config: Config
) -> Pace:
    """Times some rendered prompts, after one for warm-up."""
    decoding = config.decoding.settings().of(model, tokenizer)
    plan = LayerPlan.full(len(decoder_layers(model)))

    def seconds(texts: Sequence[str]) -> float:
        return seconds_of(lambda: answer_batch(model, tokenizer, texts, plan, decoding))

    seconds(prompts[:1])
    return Pace(seconds(prompts[:1]), seconds(prompts) / len(prompts))


def settings_for(config: Config, pace: Pace, minutes: float, prompts: int) -> list[str]:
    """What a trial of so many minutes changes in a configuration, as `--set` takes it.

    Args:
        config: of the full run.
        pace: of this machine.
        minutes: for all stages.
        prompts: all that there are.

    Raises:
        InputError: too few prompts fit.
    """
    seconds, timed = 60 * minutes * SAFE, _timed(config, pace, minutes)
    are_exits = config.menu.method in ("given", "heads")
    heads = len(config.menu.given) or TRIED_EXITS // 4 + config.menu.plans  # a quarter of the steps for those tried
    fixed = FIXED_S + pace.single * EXAMPLES
    fixed += pace.batched * HEAD_FIT * heads if config.adapt.method == "heads" else 0
    fixed += max(seconds * TIMINGS, timed * _timing_s(config, pace))
    each = pace.batched * PASSES[are_exits]
    limit = min(prompts, fitting := int(max(0.0, seconds - fixed) / each))
    if limit < FEWEST:
        needed = (FEWEST * each + fixed) / (60 * SAFE)
        raise InputError(
            f"{fitting} prompts fit into {minutes:.3g} minutes on this machine, at {pace.batched:.2g} s for an answer, "
            f"and a trial needs {FEWEST}: give --minutes {needed + 1:.0f}, or a faster machine"
        )
    changed = [
        f"data.limit={limit}",
        f"adapt.prompts={max(8, min(config.adapt.prompts or limit, int(limit * config.data.shares['adapt'])))}",
        f"calibration.keep={_levels(config, int(limit * config.data.shares['calibrate']))}",
        f"tuning.trials={max(2, min(config.tuning.trials, int(minutes // 3)))}",
        f"evaluation.speed_prompts={timed}",
        f"evaluation.speed_seconds={max(5, round(seconds * TIMINGS))}",
        "evaluation.speed_rounds=20",
    ]
    if not are_exits:  # a search among plans, or a trained adapter, takes longer than a trial
        changed += ["menu.method=gaps", "adapt.method=bridges", "adapt.minutes=null"]
    return changed


def _timed(config: Config, pace: Pace, minutes: float) -> int:
    """Prompts whose fewest rounds fit into the time for timings; two at least."""
    return max(2, min(MOST_TIMED, int(60 * minutes * SAFE * TIMINGS / _timing_s(config, pace))))


def _timing_s(config: Config, pace: Pace) -> float:
    """Seconds that the fewest rounds of timings take for a prompt, in a batch under each plan and four times alone."""
    menu = config.menu
    plans = len(menu.given) + 1 if menu.given else menu.plans + (menu.method == "heads")  # with the full depth's head
    return (FEWEST_ROUNDS + 1) * pace.single * (0.6 * plans + 4)


def _levels(config: Config, calibrate: int) -> list[float]:
    """The wanted bound and lower ones, of which the first has to be in reach of so many calibration prompts."""
    wanted = config.calibration.keep[0]
    lower = dict.fromkeys(keep for keep in (wanted, *LOWER) if keep <= wanted)
    shown = [keep for keep in lower if SCORES * least_prompts(keep, config.calibration.delta / 3) <= calibrate]
    return list(dict.fromkeys([*shown[:2], wanted]))


def run_trial(path: Path, settings: Sequence[str], minutes: float) -> Verdict:
    """Run all stages on as many prompts as fit into the time; writes `verdict.json` into the run's folder.

    Args:
        path: the configuration of the full run, which goes on from what the trial leaves.
        settings: `key=value` over the file's.
        minutes: for all stages.

    Raises:
        InputError: whatever a run refuses; too few prompts fit.
    """
    begun = time.monotonic()
    config = load_config(path, settings)
    _check_no_full_run(config)
    prompts = prompts_of(config)
    loaded = load_backbone(config.model.source, dtype=config.model.dtype, device=config.model.device)
    pace = measured_pace(*loaded, _rendered(spread(prompts, TIMED), loaded[1], config), config)
    left = minutes - (time.monotonic() - begun) / 60
    changed = settings_for(config, pace, left, len(prompts))
    say(f"{pace.batched:.2g} s a prompt on this machine; for {minutes:g} minutes: {', '.join(changed)}")
    trial = load_config(path, [*settings, *changed])
    full = FullRun(len(prompts), len(config.calibration.keep))
    run_all(trial, loaded, full)
    found = verdict(load_metrics(trial), full)
    write_atomically(trial.folder / "verdict.json", json.dumps(asdict(found), indent=2) + "\n")
    log_verdict(trial, found.reason)
    say(f"{duration(time.monotonic() - begun)} in all")
    return found


def _check_no_full_run(config: Config) -> None:
    """Raises InputError for another run's folder, and for results of all prompts, which a trial would replace."""
    read_record(config)
    resolved = config.folder / "config.yaml"
    if resolved.is_file() and load_config(resolved).data.limit is None:
        raise InputError(
            f"{config.folder} holds a run with all prompts, whose results a trial would replace: name another file "
            "with --out"
        )


def _rendered(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[str]:
    template = None if config.data.chat_template == "never" else ChatTemplate.of_tokenizer(tokenizer)
    return [prompt.rendered(template).prompt for prompt in prompts]
