"""A configuration for one model and one file of prompts, each decision with its reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.families import decoder_layers
from backbone.loading import load_backbone, load_tokenizer
from backbone.plan import LayerPlan, PlanError
from controller.certificate.certificate import alpha_of
from controller.certificate.fewest_prompts import fewest_prompts
from oracle.chat import ChatTemplate, Question, Rendered, rendered, tokens_of
from oracle.decoding import Decoding
from oracle.embedded_prompts import embedded_prompts
from oracle.intake import ASKED, COLUMNS, prompts_from, read_source
from oracle.judges import KL
from oracle.labels.generate_answers import answer_batch
from oracle.prompt_sources import Row, Source
from oracle.prompts import EMBEDDED
from oracle.spread import spread
from oracle.text_normalisation import last_number
from pipelines.config import LONGEST_NAME
from pipelines.run.given_model import given_model
from pipelines.run.model_files import ModelFiles

FEWEST = 64
"""Prompts without which no split holds enough."""
SHORT = 8.0
"""Tokens of an answer, on average, up to which exit heads suit; see `pipelines.stages.adapt`."""
ANSWERED, LONGEST_ANSWER = 8, 128
"""Prompts that the model answers where references do not tell how long answers are, and tokens of each, at most."""
MEASURED = 500
"""References whose tokens are counted, at most."""
MOST_NEW = 256
"""New tokens that are proposed, at most."""
TRAINED_FROM = 300
"""Prompts of the split `adapt` from which on an adapter is trained too."""
LEVELS = (0.97, 0.95, 0.9, 0.8, 0.7)
"""Values of `calibration.keep`, of which the first that the prompts can show is proposed."""
DELTA = 0.1
SHARES = {
    "heads": {"adapt": 0.32, "train": 0.25, "tune": 0.04, "calibrate": 0.25, "test": 0.14},
    "bridges": {"adapt": 0.15, "train": 0.2, "tune": 0.05, "calibrate": 0.4, "test": 0.2},
}
"""Splits where exit heads are fitted, which need many prompts, and where bridges are."""
SYNONYMS = {
    "prompt": ("question", "text", "instruction", "input", "query", "problem", "sentence"),
    "messages": ("conversation", "conversations", "chat"),
    "reference": ("answer", "answers", "label", "target", "output", "response", "completion", "expected", "solution"),
    "id": ("question_id", "prompt_id", "qid", "uuid", "idx"),
    "task": ("category", "kind", "type", "subject"),
}
"""What columns of other people's files are called."""
_ABBREVIATED = re.compile(r"[:>=]\s*$")


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
        """The value as YAML, on one line."""
        if isinstance(self.value, str) and re.fullmatch(r"[\w./:-]+", self.value) and _is_plain(self.value):
            return self.value
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
            lines += [f"{section}:"] if section and section != before else []
            lines.append(f"{'  ' if section else ''}{key}: {decision.text}  # {decision.why}")
            before = section
        return "\n".join(lines) + "\n"


class AskedModel:
    """What a proposal asks of a model. Weights are loaded only where nothing less tells.

    Args:
        source: as `load_backbone` takes it.
        device: where to load it, as `load_backbone` takes it.

    Raises:
        LoadError, UnsupportedModelError: there cannot be such a model.
    """

    def __init__(self, source: str, device: str = "auto") -> None:
        self.source, self._device, self._files = source, device, ModelFiles(source)

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return given_model(self.source) or load_backbone(self.source, device=self._device)

    @cached_property
    def n_layers(self) -> int:
        return self._files.n_layers or len(decoder_layers(self.loaded[0]))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        is_known = self._files.config and not given_model(self.source)
        return load_tokenizer(self.source) if is_known else self.loaded[1]

    @cached_property
    def template(self) -> ChatTemplate | None:
        return ChatTemplate.of_tokenizer(self._tokenizer)

    def count(self, text: str) -> int:
        """Tokens of a text that stands inside of another one."""
        return len(tokens_of(self._tokenizer, Rendered(text)))

    def answers(self, texts: Sequence[str]) -> list[str]:
        """The model's own answers to rendered prompts."""
        model, tokenizer = self.loaded
        decoding = Decoding(LONGEST_ANSWER).of(model, tokenizer)
        found = answer_batch(model, tokenizer, texts, LayerPlan.full(self.n_layers), decoding)
        return [answer.text for answer in found]


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
        ProposalError: too few of them.
        PlanError: a model of one layer.
    """
    named, rows = _rows(path, columns or {})
    if len(rows) < FEWEST:
        raise ProposalError(
            f"{path} holds {len(rows)} prompts, and a run needs {FEWEST} at least for its five splits: add prompts "
            "(some hundred give a useful certificate)"
        )
    texts, answers = _texts(rows, model), _References(rows)
    chat, judged = texts.decision, answers.decision(judge, model)
    stop = _stop(rows, answers, is_raw=chat.value == "never")
    lengths, measured = _lengths(rows, answers, judged.value, texts, model, stop.value)
    is_short = float(np.mean(lengths)) <= SHORT
    healed = _healing(model, lengths, len(rows), uses_references=answers.are_used(judged.value), is_short=is_short)
    shares = next(decision.value for decision in healed if decision.key == "data.shares")
    decisions = [
        Decision("name", name or run_name(path), "the folder is runs/NAME"),
        Decision("model.source", model.source, f"{model.n_layers} layers"),
        Decision("data.path", path, f"{len(rows)} prompts"),
        *([Decision("data.columns", named, "our field: the file's column")] if named else []),
        *([judged] if judged.value else []),
        chat,
        *(decision for decision in healed if decision.key.startswith("data.")),
        Decision(
            "decoding.max_new_tokens",
            min(
                MOST_NEW if answers.are_used(judged.value) else LONGEST_ANSWER,
                int(1.5 * np.quantile(lengths, 0.99)) + 2,
            ),
            f"half as much again as {measured}, whose longest has {max(lengths)} tokens",
        ),
        stop,
        *(decision for decision in healed if not decision.key.startswith("data.")),
        Decision("calibration.risk", "mean_score", "answers that win make up for answers that lose"),
        _keep(keep, int(len(rows) * shares["calibrate"])),
        Decision("calibration.delta", DELTA, "how often such a certificate may fail"),
        Decision("tuning.trials", 10, "settings that are tried for each controller"),
        Decision("evaluation.speed_tokens", min(32, max(2, round(float(np.mean(lengths))))), "as long as an answer is"),
        Decision("evaluation.speed_seconds", 45, "seconds of timing"),
    ]
    return Proposal(tuple(decisions))


def _rows(path: str, columns: Mapping[str, str]) -> tuple[dict[str, str], list[Row]]:
    """The columns that our fields have under other names, and the rows with our names."""
    if path == EMBEDDED:
        source = Source(EMBEDDED, EMBEDDED, [(f"prompt {i}", row) for i, row in enumerate(embedded_prompts(), 1)])
    else:
        source = read_source(path, columns, "train")
    found = _columns(source) | dict(columns)
    if unknown := found.keys() - {*COLUMNS}:
        raise ProposalError(f"--column names the field {min(unknown)!r}; the fields are {', '.join(COLUMNS)}")
    return found, prompts_from(source, found, dict)


def _columns(source: Source) -> dict[str, str]:
    """Our field -> column, for columns that mean a field under another name."""
    known, found = {name.strip().lower(): name for name in reversed(source.columns)}, dict[str, str]()
    for field, names in SYNONYMS.items():
        if field in source.columns or (field in ASKED and (found.keys() | {*source.columns}) & {*ASKED}):
            continue
        column = next((known[name] for name in (field, *names) if name in known), None)
        if column is not None and (field != "id" or _are_distinct(source, column)):
            found[field] = column
    return found


def _are_distinct(source: Source, column: str) -> bool:
    values = [str(row.get(column)) for _, row in source.rows if isinstance(row, Mapping)]
    return len({*values}) == len(values)


@dataclass(frozen=True)
class _Texts:
    """Some prompts as the model is given them, and the decision that made them so."""

    decision: Decision
    rendered: list[str]


def _texts(rows: Sequence[Row], model: AskedModel) -> _Texts:
    questions = [Question.of_row(row) for row in rows]
    are_turns = any(question.messages for question in questions)
    unfinished = sum(bool(_ABBREVIATED.search(question.text)) for question in questions)
    if model.template is None:
        decision = Decision("data.chat_template", "never", "the tokenizer has no chat template")
        if are_turns:
            raise ProposalError(
                f"the prompts hold messages, and the tokenizer of {model.source!r} has no chat template: "
                "give prompt, a text, or a model for conversations"
            )
    elif unfinished > len(rows) / 2 and not are_turns:
        why = f"{unfinished} prompts end in a colon or the like and are to be continued"
        decision = Decision("data.chat_template", "never", why)
    else:
        decision = Decision("data.chat_template", "auto", "the tokenizer's own; never, where prompts show by examples")
    template = model.template if decision.value == "auto" else None
    return _Texts(decision, [rendered(question, template) for question in spread(questions, ANSWERED)])


class _References:
    """The right answers in a file, and the judge that suits them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.texts: list[str] = [text for row in rows for text in (row["reference"] or ())[:1] if text.strip()]
        self._judges = {row["judge"] for row in rows}

    def are_used(self, judge: str | None) -> bool:
        """Whether any judge reads references."""
        return bool(self.texts) and not {judge, *self._judges} <= {None, KL, "agreement"}

    def decision(self, judge: str | None, model: AskedModel) -> Decision:
        key = "data.judge"
        if judge is not None:
            return Decision(key, judge, "as asked for")
        if None not in self._judges:
            return Decision(key, None, "each prompt names its own")
        if not self.texts:
            return Decision(key, "agreement", "no references: answers are held against the full model's own")
        if all(last_number(text) is not None and not re.search("[^\\W\\d_]", text) for text in self.texts):
            return Decision(key, "number", "the references are numbers")
        longest = float(np.quantile([model.count(text) for text in spread(self.texts, MEASURED)], 0.9))
        if longest <= SHORT and not any("\n" in text.strip() for text in self.texts):
            return Decision(key, "exact", f"nine in ten references have {longest:.0f} tokens or fewer")
        return Decision(key, "rouge_l", f"one in ten references has {longest:.0f} tokens or more")


def _stop(rows: Sequence[Row], answers: _References, *, is_raw: bool) -> Decision:
    if not is_raw:
        return Decision("decoding.stop", [], "the model ends its turn itself")
    if any("\n" in text.strip() for text in answers.texts):
        return Decision("decoding.stop", [], "references have several lines; name a string that ends an answer")
    apart = sum("\n\n" in (row["prompt"] or "") for row in rows) > len(rows) / 2
    return Decision("decoding.stop", ["\n\n", "\n"] if apart else ["\n"], "an answer is one line")


def _lengths(
    rows: Sequence[Row],
    answers: _References,
    judge: str | None,
    texts: _Texts,
    model: AskedModel,
    stop: Sequence[str],
) -> tuple[list[int], str]:
    """Tokens of some answers, and whose they are; in a conversation a number is more than its reference."""
    is_wordy = judge == "number" and texts.decision.value == "auto"
    if answers.are_used(judge) and not is_wordy:
        return [max(1, model.count(text)) for text in spread(answers.texts, MEASURED)], "the references"
    own = [text.strip() for text in model.answers(texts.rendered)]
    for end in stop:
        own = [text.split(end, 1)[0] for text in own]
    return [max(1, model.count(text)) for text in own], f"{len(own)} of the model's own answers"


def _healing(
    model: AskedModel, lengths: Sequence[int], n_prompts: int, *, uses_references: bool, is_short: bool
) -> list[Decision]:
    """Splits, menu and healing parts, which go together."""
    n_layers, mean = model.n_layers, float(np.mean(lengths))
    if n_layers < 2:
        raise PlanError(f"{model.source!r} has {n_layers} layer, and there is none to leave out; it takes two or more")
    probe = Decision("menu.probe_depth", max(1, n_layers // 4), "every plan runs a quarter of the layers")
    counts = sorted({max(probe.value, round(share * n_layers)) for share in (1 / 3, 1 / 2, 2 / 3)} - {n_layers})
    if is_short:
        exits = [str(LayerPlan.exiting(n_layers, count)) for count in counts]
        return [
            Decision("data.shares", SHARES["heads"], "exit heads are fitted on many prompts, of the split adapt"),
            Decision("menu.method", "given", f"answers are short ({mean:.1f} tokens): early exits"),
            probe,
            Decision(
                "menu.given",
                [*exits, f"0-{n_layers - 1}h"],
                "exits at 1/3, 1/2 and 2/3 of the layers, the full depth with a head",
            ),
            Decision("adapt.method", "heads", "exit heads suit answers of a few tokens"),
            Decision(
                "adapt.targets",
                "references" if uses_references else "own",
                "what heads are fitted on: right answers" if uses_references else "no references to fit heads on",
            ),
            Decision("adapt.prompts", max(8, round(n_prompts * SHARES["heads"]["adapt"])), "all of the split"),
        ]
    prompts = max(8, round(n_prompts * SHARES["bridges"]["adapt"]))
    is_trained = prompts >= TRAINED_FROM
    return [
        Decision("data.shares", SHARES["bridges"], "bridges need few prompts, a certificate many"),
        Decision("menu.method", "covering", f"answers are long ({mean:.0f} tokens): plans of any shape"),
        probe,
        Decision("menu.plans", 8, "plans to choose from, the full one included"),
        Decision("menu.prompts", max(1, min(32, prompts // 2)), "prompts that the search for plans looks at"),
        Decision(
            "adapt.method",
            "both" if is_trained else "bridges",
            f"{prompts} prompts suffice to train an adapter beside bridges"
            if is_trained
            else f"{prompts} prompts are too few to train an adapter",
        ),
        *([Decision("adapt.minutes", 20, "time to train the adapter")] if is_trained else []),
        Decision("adapt.prompts", min(prompts, 1000), "all of the split, 1000 at most"),
    ]


def _keep(wanted: float | None, prompts: int) -> Decision:
    if wanted is not None:
        return Decision("calibration.keep", wanted, "as asked for")
    found = next((keep for keep in LEVELS if least_prompts(keep, DELTA) <= prompts), LEVELS[-1])
    return Decision(
        "calibration.keep", found, f"share of the full model's score; what {prompts} prompts to calibrate on can show"
    )


def least_prompts(keep: float, delta: float) -> int:
    """Calibration prompts that a bound takes, whatever is lost; 0 for one that takes wins."""
    return fewest_prompts(alpha_of(keep), delta, "mean_score") if keep < 1 else 0


def _is_plain(text: str) -> bool:
    """Whether YAML reads a text without quotes as itself."""
    try:
        return bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False


def run_name(path: str) -> str:
    """A run's name, made from that of a file."""
    stem = PurePath(path.removesuffix(".gz")).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:LONGEST_NAME] or "run"
