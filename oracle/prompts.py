"""The prompts of a run: read and checked. `oracle.splits` splits them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from oracle.chat import ChatError, ChatTemplate, Message, Question, Rendered, rendered, tokens_of
from oracle.intake import ASKED, prompts_from, read_source
from oracle.judges import JudgeError, check_judge, check_references, score
from oracle.prompt_sources import EMBEDDED, Row, read_file
from oracle.prompt_sources import PromptError as PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["adapt", "train", "tune", "calibrate", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""What plans and healing are made from, what controllers learn from and are tuned on, what the certificate is made
from, and what nothing has seen. Prompts that plans and healing were fitted on would lose less under them than others
do, and teach controllers to expect that of all."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with what it takes to judge an answer to it. Fields as in the JSONL file.

    Attributes:
        prompt: the text that the model is given; empty for `messages` that no template has rendered yet.
        messages: the conversation that `prompt` was rendered from, or is to be.
        reference: the right answer, of several the first one; empty for judges that need none.
        alternatives: further right answers.
        group: prompts of one group stay in one split; empty for none.
        template: hash of the chat template that rendered it; empty where none did.
    """

    id: str
    task: str
    prompt: str
    reference: str
    judge: str
    messages: tuple[Message, ...] = ()
    raw: bool = False
    template: str = ""
    alternatives: tuple[str, ...] = ()
    group: str = ""

    @property
    def hash(self) -> str:
        """Of what an answer and its score depend on, apart from model, plan, decoding and judge.

        Of a rendered prompt not its text, but what that was made from: some templates write the day's date.
        """
        parts: list[Any] = [self.prompt, self.reference]
        if self.template:
            parts = [[asdict(message) for message in self.messages], self.reference, self.template]
        parts += [self.alternatives] if self.alternatives else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    @property
    def question(self) -> Question:
        return Question(messages=self.messages) if self.messages else Question(self.prompt, raw=self.raw)

    @property
    def shown(self) -> str:
        """The text for people: what was given, without the template."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.messages) or self.prompt

    @property
    def text_key(self) -> str:
        """Equal for prompts of equal text but for white space, before and after they are rendered."""
        turns = self.messages or (Message("user", self.prompt),)
        return json.dumps([(turn.role, " ".join(turn.content.split())) for turn in turns])

    @property
    def references(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.reference, *self.alternatives)

    @property
    def shown_references(self) -> str:
        """All right answers, for people."""
        return " / ".join(self.references)

    def score(self, answer: str, full_answer: str, judge: str | None = None) -> float:
        """The score of an answer, by another judge than the prompt's own if one is given.

        Raises:
            JudgeError: whatever the judge raises, which may be the user's own code and even exit, or no score.
        """
        judge = judge or self.judge
        try:
            return score(judge, answer, self.references, full_answer)
        except JudgeError as error:
            raise JudgeError(f"the prompt {self.id!r:.80}: {error}") from None
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, SystemExit) else error
            raise JudgeError(f"the judge {judge!r} failed on prompt {self.id!r}: {reason}") from error

    def score_or_zero(self, answer: str, full_answer: str, judge: str | None = None) -> float:
        """As `score`, but 0 where the judge fails: so such an answer counts (see `oracle.labels.reader.judged`)."""
        try:
            return self.score(answer, full_answer, judge)
        except JudgeError:
            return 0.0

    def rendered(self, template: ChatTemplate | None) -> Prompt:
        """The same with the text that the model is given; see `oracle.chat.rendered`.

        Raises:
            PromptError: it cannot be rendered.
        """
        question = self.question
        try:
            text = rendered(question, template)
        except ChatError as error:
            raise PromptError(f"the prompt {self.id!r:.80}: {error}") from None
        if template is None or not isinstance(text, Rendered):
            return self
        turns = question.messages or (Message("user", question.text),)
        return replace(self, prompt=text, messages=turns, template=template.hash)


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `of` parts of the prompts, counted from 1, split by the prompts' hashes. Written `3/8`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise PromptError(f"a shard is written NUMBER/OF with numbers from 1, such as 3/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [prompt for prompt in prompts if int(prompt.hash, 16) % self.of == self.number - 1]


def load_prompts(
    source: str,
    *,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    dataset_split: str = "train",
    judge: str | None = None,
    force_judge: str | None = None,
) -> list[Prompt]:
    """The prompts of a source, in its order.

    Args:
        source: `embedded` (the project's own), a file (see `oracle.prompt_sources.ENDINGS`), `lm_eval:TASK` (see
            `oracle.lm_eval_tasks`), or a name or folder that `datasets.load_dataset` takes.
        limit: keep this many, chosen by a hash of the id, so that a larger limit only adds prompts.
        columns: our field -> its column; fields not named keep their own names.
        dataset_split: which split of the data set or task to read.
        judge: the judge of prompts that name none.
        force_judge: the judge of all prompts, whatever they name.

    Raises:
        PromptError: see `oracle.intake`; an unknown judge, or a reference that its judge cannot use.
    """
    checked = cache(_problem_of)

    def make(row: Row) -> Prompt:
        return _prompt({**row, "judge": force_judge or row["judge"] or judge}, checked)

    columns = {} if source == EMBEDDED else columns or {}
    found = read_source(source, columns, dataset_split)
    if found.unjudged and not (judge or force_judge):
        raise PromptError(found.unjudged)
    return limited(prompts_from(found, columns, make), limit)


def questions_of(path: Path) -> list[tuple[str, Question]]:
    """Id of each row of a file, and what it asks. Rows are read as those of `load_prompts`, but need no judge.

    Raises:
        PromptError: see `oracle.intake`.
    """
    return prompts_from(read_file(path, ASKED), {}, lambda row: (row["id"], Question.of_row(row)))


def _problem_of(judge: str | None) -> str | None:
    """What is wrong with a judge."""
    if judge is None:
        return "the judge is missing; name one in the field 'judge', or for all in data.judge"
    try:
        check_judge(judge)
    except JudgeError as error:
        return str(error)
    return None


def _prompt(row: Row, problem_of: Callable[[str | None], str | None]) -> Prompt:
    question, judge, references = Question.of_row(row), row["judge"], row["reference"] or ()
    if problem := problem_of(judge):
        raise PromptError(problem)
    check_references(judge, references)
    return Prompt(
        row["id"],
        row["task"],
        question.text,
        references[0] if references else "",
        judge,
        question.messages,
        question.raw,
        alternatives=references[1:],
        group=row["group"],
    )


def limited(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """So many of the prompts, chosen by a hash of the id, so that a larger limit only adds prompts; None keeps all."""
    if limit is None or limit >= len(prompts):
        return prompts
    kept = set(sorted((p.id for p in prompts), key=lambda name: place_of("limit", name))[:limit])
    return [p for p in prompts if p.id in kept]


def place_of(purpose: str, name: str) -> float:
    """A name's place in [0, 1), by a hash; another one for each purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big") / 2**64


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[tuple[str, str]], new_tokens: int
) -> None:
    """Raises PromptError for the first prompt (id, text) that is no text, or has no tokens, or too many for the model
    to answer.

    A model whose configuration names no `max_position_embeddings` takes any length.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a byte on the command line that is not UTF-8
            raise PromptError(
                f"the prompt {name!r:.80} holds {text[error.start]!r}, which is no character; give it in UTF-8"
            ) from None
        if not (count := len(tokens_of(tokenizer, text))):
            raise PromptError(f"the prompt {name!r:.80} has no tokens: there is nothing to continue")
        check_context(name, count, new_tokens, limit)


def check_context(name: str, count: int, new_tokens: int, limit: int | None) -> None:
    """Raises PromptError where a prompt of `count` tokens and its answer are more than the model takes."""
    if limit is not None and count + new_tokens > limit:
        raise PromptError(
            f"the prompt {name!r:.80} has {count} tokens, which with {new_tokens} new ones is more than the "
            f"{limit} (max_position_embeddings) that this model takes; shorten it, or ask for fewer new tokens"
        )
