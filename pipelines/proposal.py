"""A configuration for one model and one file of prompts, each decision with its reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from backbone.errors import InputError, PlanError
from controller.certificate.certificate import alpha_of
from controller.certificate.p_values import fewest_prompts
from oracle.batches import spread
from oracle.chat import Question, rendered
from oracle.intake import COLUMNS
from pipelines.config import LONGEST_NAME
from pipelines.proposal_inputs import LONGEST_ANSWER, AskedModel, AskedPrompts

FEWEST = 64
"""Prompts without which no split holds enough."""
SHORT = 8.0
"""Tokens of an answer, on average, up to which exit heads suit; see `pipelines.stages.adapt`."""
ANSWERED, MEASURED = 8, 500
"""Prompts that the model answers where references do not tell how long answers are; references that are measured."""
MOST_NEW = 256
"""New tokens that are proposed, at most."""
TRAINED_FROM = 300
"""Prompts of the split `adapt` from which on an adapter is trained too."""
LEVELS, DELTA = (0.97, 0.95, 0.9, 0.8, 0.7), 0.1
"""Values of `calibration.keep`, of which the first that the prompts can show is proposed; `calibration.delta`."""
HEADS = {"adapt": 0.32, "train": 0.25, "tune": 0.04, "calibrate": 0.25, "test": 0.14}
BRIDGES = {"adapt": 0.15, "train": 0.2, "tune": 0.05, "calibrate": 0.4, "test": 0.2}
"""`data.shares` where exit heads are fitted, which need many prompts, and where bridges are."""


class ProposalError(InputError):
    """Prompts or settings from which no configuration can be made."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One key of the configuration, such as `menu.probe_depth`, its value, and why it has that value."""

    key: str
    value: Any
    why: str

    @property
    def text(self) -> str:
        """The value as YAML, which JSON is part of, on one line."""
        return json.dumps(self.value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Proposal:
    """All decisions, in the order in which they are written; keys of one section stand together."""

    decisions: tuple[Decision, ...]

    @property
    def values(self) -> dict[str, Any]:
        """The configuration."""
        values: dict[str, Any] = {}
        for decision in self.decisions:
            section, _, key = decision.key.rpartition(".")
            (values.setdefault(section, {}) if section else values)[key] = decision.value
        return values

    def yaml(self, command: str) -> str:
        """The file: the command that runs it, then a commented line for each key."""
        lines, before = (
            [f"# {command}", "# Each key may be changed; `layerbudget check` says at once what would fail."],
            "",
        )
        for decision in self.decisions:
            section, _, key = decision.key.rpartition(".")
            lines += [f"{section}:"] if section not in ("", before) else []
            lines.append(f"{'  ' if section else ''}{key}: {decision.text}  # {decision.why}")
            before = section
        return "\n".join(lines) + "\n"


def propose(
    model: AskedModel,
    path: str,
    *,
    columns: Mapping[str, str] | None = None,
    judge: str | None = None,
    keep: float | None = None,
    name: str | None = None,
) -> Proposal:
    """A configuration that `layerbudget check` passes.

    Args:
        model: the one to shorten.
        path: of the prompts, as `data.path` takes it.
        columns: our field -> the file's column, where names do not tell.
        judge: of prompts that name none; None to choose one.
        keep: the bound; None to choose one that the number of prompts allows.
        name: of the run; None for the file's.

    Raises:
        PromptError: prompts that cannot be read.
        ProposalError: too few of them, conversations without a template, or an unknown field among the columns.
        PlanError: a model of one layer.
    """
    if unknown := {*(columns or {})} - {*COLUMNS}:
        raise ProposalError(f"--column names the field {min(unknown)!r}; the fields are {', '.join(COLUMNS)}")
    prompts = AskedPrompts(path, columns or {})
    if (count := len(prompts.rows)) < FEWEST:
        raise ProposalError(
            f"{path} holds {count} prompts, and a run needs {FEWEST} at least for its five splits: add prompts "
            "(some hundred give a useful certificate)"
        )
    if model.n_layers < 2:
        raise PlanError(
            f"{model.source!r} has {model.n_layers} layer, none of which can be left out; take a deeper one"
        )
    judged, chat = _judge(judge, prompts, model), _chat(prompts, model)
    stop = _stop(prompts, is_raw=chat.value == "never")
    lengths, whose = _lengths(prompts, model, judged.value, chat.value, stop.value)
    mean, most = float(np.mean(lengths)), MOST_NEW if prompts.uses_references(judged.value) else LONGEST_ANSWER
    shares = HEADS if mean <= SHORT else BRIDGES
    why = f"half as much again as {whose}, whose longest has {max(lengths)} tokens"
    decisions = [
        Decision("name", name or run_name(path), "the folder is runs/NAME"),
        Decision("model.source", model.source, f"{model.n_layers} layers"),
        Decision("data.path", path, f"{count} prompts"),
        *([] if prompts.split == "train" else [Decision("data.split", prompts.split, "there is no split train")]),
        *([Decision("data.columns", prompts.columns, "our field: the file's column")] if prompts.columns else []),
        *([judged] if judged.value else []),
        chat,
        Decision("data.shares", shares, "healing parts are fitted on the split adapt, exit heads on many prompts"),
        Decision("decoding.max_new_tokens", min(most, int(1.5 * np.quantile(lengths, 0.99)) + 2), why),
        stop,
        *_menu(model.n_layers, mean),
        *_healing(round(count * shares["adapt"]), prompts.uses_references(judged.value), is_short=mean <= SHORT),
        *_certificate(keep, int(count * shares["calibrate"])),
        Decision("tuning.trials", 10, "settings that are tried for each controller"),
        Decision("evaluation.speed_tokens", min(32, max(2, round(mean))), "as long as an answer is"),
        Decision("evaluation.speed_seconds", 45, "seconds of timing"),
    ]
    return Proposal(tuple(decisions))


def _judge(judge: str | None, prompts: AskedPrompts, model: AskedModel) -> Decision:
    key = "data.judge"
    if judge is not None:
        return Decision(key, judge, "as asked for")
    if None not in prompts.judges:
        return Decision(key, None, "each prompt names its own")
    if not prompts.references:
        return Decision(key, "agreement", "no references: answers are held against the full model's own")
    if prompts.are_numbers:
        return Decision(key, "number", "the references are numbers")
    longest = float(np.quantile([model.count(text) for text in spread(prompts.references, MEASURED)], 0.9))
    if longest <= SHORT and not prompts.have_lines:
        return Decision(key, "exact", f"nine in ten references have {longest:.0f} tokens or fewer")
    return Decision(key, "rouge_l", f"one in ten references has {longest:.0f} tokens or more")


def _chat(prompts: AskedPrompts, model: AskedModel) -> Decision:
    key = "data.chat_template"
    if model.template is None and prompts.are_turns:
        raise ProposalError(
            f"the prompts hold messages, and the tokenizer of {model.source!r} has no chat template: "
            "give prompt, a text, or a model for conversations"
        )
    if model.template is None:
        return Decision(key, "never", "the tokenizer has no chat template")
    if prompts.unfinished > len(prompts.rows) / 2:
        return Decision(
            key, "never", f"{prompts.unfinished} prompts end in a colon or the like and are to be continued"
        )
    return Decision(key, "auto", "the tokenizer's own; take never where prompts show by examples how to go on")


def _stop(prompts: AskedPrompts, *, is_raw: bool) -> Decision:
    if prompts.stop is not None:
        return Decision("decoding.stop", prompts.stop, "as the task ends its answers")
    if not is_raw:
        return Decision("decoding.stop", [], "the model ends its turn itself")
    if prompts.have_lines:
        return Decision("decoding.stop", [], "references have several lines; name a string that ends an answer")
    return Decision("decoding.stop", ["\n\n", "\n"] if prompts.are_apart else ["\n"], "an answer is one line")


def _lengths(
    prompts: AskedPrompts, model: AskedModel, judge: str | None, chat: str, stop: list[str]
) -> tuple[list[int], str]:
    """Tokens of some answers, and whose they are; in a conversation a number is more than its reference."""
    if prompts.uses_references(judge) and not (judge == "number" and chat == "auto"):
        return [max(1, model.count(text)) for text in spread(prompts.references, MEASURED)], "the references"
    template = model.template if chat == "auto" else None
    own = model.answers([rendered(Question.of_row(row), template) for row in spread(prompts.rows, ANSWERED)])
    for end in stop:
        own = [text.split(end, 1)[0] for text in own]
    return [max(1, model.count(text)) for text in own], f"{len(own)} of the model's own answers"


def _menu(n_layers: int, mean: float) -> Iterator[Decision]:
    if mean <= SHORT:
        part, named = 6, "sixth"
        yield Decision("menu.method", "heads", f"answers are short ({mean:.1f} tokens): the best of some early exits")
        yield Decision("menu.cheapest_budget", 0.15, "share of the decoder from which on exits are tried")
        yield Decision("menu.plans", 5, "four exits and the full model; the full depth with a head is added")
    else:
        part, named = 4, "quarter"
        yield Decision("menu.method", "covering", f"answers are long ({mean:.0f} tokens): plans of any shape")
        yield Decision("menu.plans", 8, "plans to choose from, the full one included")
    why = f"every plan runs a {named} of the layers, which the controller reads"
    yield Decision("menu.probe_depth", max(1, n_layers // part), why)


def _healing(prompts: int, uses_references: bool, *, is_short: bool) -> Iterator[Decision]:
    if is_short:
        why = "right answers" if uses_references else "there are no references"
        yield Decision("adapt.method", "heads", "exit heads suit answers of a few tokens")
        yield Decision("adapt.targets", "references" if uses_references else "own", f"what heads are fitted on: {why}")
        yield Decision("adapt.prompts", max(8, prompts), "all of the split")
    elif prompts >= TRAINED_FROM:
        yield Decision("adapt.method", "both", f"{prompts} prompts suffice to train an adapter beside bridges")
        yield Decision("adapt.minutes", 20, "time to train the adapter")
        yield Decision("adapt.prompts", min(prompts, 1000), "all of the split, 1000 at most")
    else:
        yield Decision("adapt.method", "bridges", f"{prompts} prompts are too few to train an adapter")
        yield Decision("adapt.prompts", max(8, prompts), "all of the split")


def _certificate(wanted: float | None, prompts: int) -> Iterator[Decision]:
    found = next((keep for keep in LEVELS if least_prompts(keep, DELTA) <= prompts), LEVELS[-1])
    why = f"share of the full model's score; what {prompts} prompts to calibrate on can show"
    yield Decision("calibration.risk", "mean_score", "answers that win make up for answers that lose")
    yield (
        Decision("calibration.keep", found, why) if wanted is None else Decision("calibration.keep", wanted, "as asked")
    )
    yield Decision("calibration.delta", DELTA, "how often such a certificate may fail")


def least_prompts(keep: float, delta: float) -> int:
    """Calibration prompts that a bound takes, whatever is lost; 0 for one that takes wins."""
    return fewest_prompts(alpha_of(keep), delta, "mean_score") if keep < 1 else 0


def run_name(path: str) -> str:
    """A run's name, made from that of a file."""
    stem = PurePath(path.removesuffix(".gz")).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:LONGEST_NAME] or "run"
