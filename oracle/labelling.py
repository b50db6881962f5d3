"""Label prompts: answer each under each plan of the menu, judge it, store it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.loading import model_fingerprint
from backbone.plan import LayerPlan, PlanMenu
from oracle.answering import Answer, answer_batch
from oracle.decoding import Decoding
from oracle.judges import JudgeError, score
from oracle.labels import Label, LabelStore
from oracle.prompts import Prompt

Advance = Callable[[int], None]


class Labeller:
    """Fills a store with the label of every (prompt, plan), going on where an earlier run stopped.

    Args:
        model: runs the plans; with its tokenizer.
        decoding: how answers are generated.
        store: where labels are kept; one transaction a batch.
        batch_size: prompts generated together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        store: LabelStore,
        batch_size: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._decoding, self._store, self._batch_size = decoding, store, batch_size
        self.model_key = f"{model_fingerprint(model)} {model.dtype}"

    def missing(self, prompts: Sequence[Prompt], plan: LayerPlan) -> list[Prompt]:
        """The prompts that have no label under `plan` yet."""
        found = self._read(plan)
        return [prompt for prompt in prompts if (prompt.hash, prompt.judge) not in found]

    def label(self, prompts: Sequence[Prompt], menu: PlanMenu, advance: Advance = lambda done: None) -> None:
        """Label all prompts under all plans of the menu, the full plan first since judges may compare with it."""
        self._label_plan(prompts, menu.plans[-1], advance)
        full = self._read(menu.plans[-1])
        full_answers = {key: label.answer for key, label in full.items()}
        for plan in reversed(menu.plans[:-1]):
            self._label_plan(prompts, plan, advance, full_answers)

    def read(self, prompts: Sequence[Prompt], menu: PlanMenu) -> list[list[Label]]:
        """For each prompt its K labels, cheapest plan first."""
        by_plan = [self._read(plan) for plan in menu.plans]
        return [[labels[prompt.hash, prompt.judge] for labels in by_plan] for prompt in prompts]

    def _read(self, plan: LayerPlan) -> dict[tuple[str, str], Label]:
        return self._store.read(self.model_key, str(plan), str(self._decoding))

    def _label_plan(
        self,
        prompts: Sequence[Prompt],
        plan: LayerPlan,
        advance: Advance,
        full_answers: dict[tuple[str, str], str] | None = None,
    ) -> None:
        for batch in self._batches(self.missing(prompts, plan)):
            start = time.perf_counter()
            texts = [prompt.prompt for prompt in batch]
            answers = answer_batch(self._model, self._tokenizer, texts, plan, self._decoding)
            seconds = (time.perf_counter() - start) / len(batch)
            pairs = zip(batch, answers, strict=True)
            self._store.add([self._judged(p, plan, answer, seconds, full_answers) for p, answer in pairs])
            advance(len(batch))

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Batches of like prompts, longest first, so that too little memory shows at once.

        Like in length, so that little is padded, and in the power of two of the reference's length, since a batch
        decodes until its longest answer ends.
        """

        def effort(prompt: Prompt) -> tuple[int, int, str]:
            expected = len(self._tokenizer(prompt.reference).input_ids).bit_length()
            return -expected, -len(self._tokenizer(prompt.prompt).input_ids), prompt.id

        ordered = sorted(prompts, key=effort)
        for start in range(0, len(ordered), self._batch_size):
            yield ordered[start : start + self._batch_size]

    def _judged(
        self,
        prompt: Prompt,
        plan: LayerPlan,
        answer: Answer,
        seconds: float,
        full_answers: dict[tuple[str, str], str] | None,
    ) -> Label:
        full_answer = answer.text if full_answers is None else full_answers[prompt.hash, prompt.judge]
        try:
            value = score(prompt.judge, answer.text, prompt.reference, full_answer)
        except Exception as error:
            raise JudgeError(f"the judge {prompt.judge!r} failed on prompt {prompt.id!r}: {error}") from error
        return Label(
            model=self.model_key,
            prompt=prompt.hash,
            plan=str(plan),
            decoding=str(self._decoding),
            judge=prompt.judge,
            answer=answer.text,
            score=value,
            prompt_tokens=answer.prompt_tokens,
            answer_tokens=len(answer.token_ids),
            seconds=seconds,
        )


def score_matrix(labels: Sequence[Sequence[Label]]) -> NDArray[np.float64]:
    """Scores [N, K] of N prompts under K plans."""
    return np.array([[label.score for label in row] for row in labels], dtype=np.float64)
