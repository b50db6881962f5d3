"""What a proposal asks of a model and of prompts: layers, tokens, answers; columns, references."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from backbone.families import decoder_layers
from backbone.loading import load_backbone, load_tokenizer
from backbone.plan import LayerPlan
from oracle.chat import ChatTemplate, Rendered, tokens_of
from oracle.decoding import Decoding
from oracle.intake import ASKED, prompts_from, read_source
from oracle.judges import KL
from oracle.labels.generation import answer_batch
from oracle.lm_eval_tasks import decoding_of, first_split, is_task, read_task, tasks_of
from oracle.prompt_sources import Row, Source
from oracle.text_normalisation import last_number
from pipelines.run.model import Loaded
from pipelines.run.model_files import ModelFiles

LONGEST_ANSWER = 128
"""Tokens of an answer that is measured, at most."""
SYNONYMS = {
    "prompt": ("question", "text", "instruction", "input", "query", "problem", "sentence"),
    "messages": ("conversation", "conversations", "chat"),
    "reference": ("answer", "answers", "label", "target", "output", "response", "completion", "expected", "solution"),
    "task": ("category", "kind", "type", "subject"),
}
"""What columns of other people's files are called."""
_UNFINISHED = re.compile(r"[:>=]\s*$")


class AskedModel:
    """A model whose weights are loaded only where nothing less tells.

    Args:
        source, device: as `load_backbone` takes them.
        loaded: the model and its tokenizer, where they are loaded already.

    Raises:
        LoadError, UnsupportedModelError: there cannot be such a model.
    """

    def __init__(self, source: str, device: str = "auto", loaded: Loaded | None = None) -> None:
        self.source, self._device, self._given = source, device, loaded
        self._files = ModelFiles(source, loaded)

    @cached_property
    def loaded(self) -> Loaded:
        return self._given or load_backbone(self.source, device=self._device)

    @cached_property
    def n_layers(self) -> int:
        return self._files.n_layers or len(decoder_layers(self.loaded[0]))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        is_known = self._files.config and self._given is None
        return load_tokenizer(self.source) if is_known else self.loaded[1]

    @cached_property
    def template(self) -> ChatTemplate | None:
        return ChatTemplate.of_tokenizer(self._tokenizer)

    def count(self, text: str) -> int:
        """Tokens of a text that stands inside of another one."""
        return len(tokens_of(self._tokenizer, Rendered(text)))

    def answers(self, texts: Sequence[str]) -> list[str]:
        """The model's own answers to rendered prompts."""
        plan, decoding = LayerPlan.full(self.n_layers), Decoding(LONGEST_ANSWER)
        return [answer.text.strip() for answer in answer_batch(*self.loaded, texts, plan, decoding)]


class AskedPrompts:
    """The rows of a file or data set.

    Args:
        path: as `data.path` takes it.
        columns: our field -> its column, where names do not tell.

    Attributes:
        columns: the same, with those that were found by their names.
        rows: with our names.
        references: the first right answers, where there are any.
        judges: of the rows, None for rows that name none.
        are_turns: whether any prompt is a conversation.
        split: of a data set or task, which is read.
        stop: where a task of lm-evaluation-harness ends its answers; None for other prompts.

    Raises:
        PromptError: prompts that cannot be read.
    """

    def __init__(self, path: str, columns: Mapping[str, str]) -> None:
        tasks = tasks_of(path) if is_task(path) else []
        self.split = first_split(tasks) if tasks else "train"
        self.stop: list[str] | None = decoding_of(tasks)["stop"] if tasks else None
        source = read_task(path, self.split, tasks) if tasks else read_source(path, columns, self.split)
        self.columns = _columns(source) | dict(columns)
        self.rows: list[Row] = prompts_from(source, self.columns, dict)
        self.references: list[str] = [t for row in self.rows for t in (row["reference"] or ())[:1] if t.strip()]
        self.judges: set[str | None] = {row["judge"] for row in self.rows}
        self.are_turns = any(row["messages"] for row in self.rows)

    def uses_references(self, judge: str | None) -> bool:
        """Whether the rows' judges, or this one for those without, read references."""
        return bool(self.references) and not {judge, *self.judges} <= {None, KL, "agreement"}

    @property
    def unfinished(self) -> int:
        """Prompts that end in a colon or the like."""
        return sum(bool(_UNFINISHED.search(str(row["prompt"] or ""))) for row in self.rows)

    @property
    def are_apart(self) -> bool:
        """Whether most prompts hold empty lines, as between worked examples."""
        return sum("\n\n" in str(row["prompt"] or "") for row in self.rows) > len(self.rows) / 2

    @property
    def have_lines(self) -> bool:
        """Whether more than one reference in twenty has several lines."""
        return sum("\n" in text.strip() for text in self.references) > len(self.references) / 20

    @property
    def are_numbers(self) -> bool:
        """Whether all references are numbers."""
        return all(last_number(text) is not None and not re.search(r"[^\W\d_]", text) for text in self.references)


def _columns(source: Source) -> dict[str, str]:
    """Our field -> column, for columns that mean a field under another name."""
    known, found = {name.strip().lower(): name for name in reversed(source.columns)}, dict[str, str]()
    for field, names in SYNONYMS.items():
        is_asked = field in ASKED and (found.keys() | {*source.columns}) & {*ASKED}
        column = next((known[name] for name in (field, *names) if name in known), None)
        if field not in source.columns and not is_asked and column is not None:
            found[field] = column
    return found
