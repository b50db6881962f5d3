"""Label prompts: answer each under each plan of the menu, judge it, store it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.loading import model_fingerprint
from backbone.plan import LayerPlan, PlanMenu
from oracle.answering import answer_batch
from oracle.decoding import Decoding
from oracle.judges import score
from oracle.labels import Label, LabelStore
from oracle.prompts import Prompt
from oracle.shortcut import Draft, Shortcut

Advance = Callable[[int], None]
Key = tuple[str, str]
"""(prompt hash, judge)."""


def key_of(prompt: Prompt) -> Key:
    return prompt.hash, prompt.judge


TRIAL, WORTH = 32, 0.25
"""A plan that was led along TRIAL answers and settled less than this share of them is no longer led but generated."""


class Labeller:
    """Fills a store with the label of every (prompt, plan), going on where an earlier run stopped.

    Args:
        model: runs the plans; with its tokenizer.
        decoding: how answers are generated.
        store: where labels are kept; one transaction a batch.
        batch_size: prompts generated together.
        shortcut: follow the full model's answer with every plan and generate only what differs (see
            `oracle.following`); otherwise generate everything.

    Attributes:
        failures: one sentence for each label whose judge failed; its score is NaN.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        store: LabelStore,
        batch_size: int,
        *,
        shortcut: bool = True,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._decoding, self._store, self._batch_size = decoding, store, batch_size
        self._shortcut = shortcut
        self._follower = Shortcut(model, tokenizer, decoding)
        self.failures: list[str] = []
        self.model_key = f"{model_fingerprint(model)} {model.dtype}"

    def missing(self, prompts: Sequence[Prompt], plan: LayerPlan) -> list[Prompt]:
        """The prompts that have no label under `plan` yet."""
        found = self._store.keys(self.model_key, str(plan), str(self._decoding))
        return [prompt for prompt in prompts if key_of(prompt) not in found]

    def label(self, prompts: Sequence[Prompt], menu: PlanMenu, advance: Advance = lambda done: None) -> None:
        """Label all prompts under all plans of the menu, the full plan first since others are compared with it."""
        full_plan = menu.plans[-1]
        self._generate(self.missing(prompts, full_plan), full_plan, None, advance)
        full = self._read(full_plan)
        missing = {plan: self.missing(prompts, plan) for plan in menu.plans[:-1]}
        if self._shortcut:
            self._follow(prompts, missing, full, advance)
        else:
            for plan, without in missing.items():
                self._generate(without, plan, full, advance)

    def label_some(self, wanted: Mapping[LayerPlan, Sequence[Prompt]], full_plan: LayerPlan) -> None:
        """Label some prompts under some plans, as a search asks for them; their full plans' labels must be there."""
        full = self._read(full_plan)
        for plan, prompts in wanted.items():
            without = self.missing(prompts, plan)
            self._follow(without, {plan: without}, full, lambda done: None)

    def scores(self, prompts: Sequence[Prompt], plan: LayerPlan) -> list[float]:
        """The scores of prompts that were labelled under `plan`."""
        labels = self._read(plan)
        return [labels[key_of(prompt)].score for prompt in prompts]

    def read(self, prompts: Sequence[Prompt], menu: PlanMenu) -> list[list[Label]]:
        """For each prompt its K labels, cheapest plan first."""
        by_plan = [self._read(plan) for plan in menu.plans]
        return [[labels[key_of(prompt)] for labels in by_plan] for prompt in prompts]

    def _read(self, plan: LayerPlan) -> dict[Key, Label]:
        return self._store.read(self.model_key, str(plan), str(self._decoding))

    def _generate(
        self, prompts: Sequence[Prompt], plan: LayerPlan, full: Mapping[Key, Label] | None, advance: Advance
    ) -> None:
        """Plain generation under one plan."""
        for batch in self._batches(prompts, full):
            start = time.perf_counter()
            answers = answer_batch(
                self._model, self._tokenizer, [prompt.prompt for prompt in batch], plan, self._decoding
            )
            seconds = (time.perf_counter() - start) / len(batch)
            labels = []
            for prompt, answer in zip(batch, answers, strict=True):
                tokens = (answer.prompt_tokens + len(answer.token_ids)) * plan.layers / plan.n_layers
                draft = Draft(prompt, plan, answer.token_ids, tokens, seconds)
                labels.append(self._judged(draft, answer.text, answer.prompt_tokens, full))
            self._store.add(labels)
            advance(len(labels))

    def _follow(
        self,
        prompts: Sequence[Prompt],
        missing: Mapping[LayerPlan, Sequence[Prompt]],
        full: Mapping[Key, Label],
        advance: Advance,
    ) -> None:
        """All plans along the full model's answers at once; what that leaves open is generated, a batch at a time."""
        wanted = {plan: {key_of(prompt) for prompt in without} for plan, without in missing.items()}
        unfinished: dict[LayerPlan, list[Draft]] = defaultdict(list)
        settled: dict[LayerPlan, list[bool]] = defaultdict(list)
        todo = [prompt for prompt in prompts if any(key_of(prompt) in keys for keys in wanted.values())]
        for batch in self._batches(todo, full):
            known: list[Draft] = []
            for draft in self._begun(batch, wanted, full):
                settled[draft.plan].append(self._follower.is_settled(draft, full[key_of(draft.prompt)].answer))
                (known if settled[draft.plan][-1] else unfinished[draft.plan]).append(draft)
            self._add(known, full, advance)
            for plan in [plan for plan, drafts in unfinished.items() if len(drafts) >= self._batch_size]:
                self._finish(unfinished.pop(plan), full, advance)
            for plan in [plan for plan, found in settled.items() if len(found) >= TRIAL and np.mean(found) < WORTH]:
                wanted.pop(plan, None)
        for drafts in unfinished.values():
            self._finish(drafts, full, advance)
        for plan in [plan for plan in missing if plan not in wanted]:
            self._generate(self.missing(missing[plan], plan), plan, full, advance)

    def _begun(
        self, batch: Sequence[Prompt], wanted: Mapping[LayerPlan, Collection[Key]], full: Mapping[Key, Label]
    ) -> list[Draft]:
        """Drafts of what is wanted for the prompts of a batch."""
        plans = [plan for plan, keys in wanted.items() if any(key_of(prompt) in keys for prompt in batch)]
        if not plans:
            return []
        drafts = self._follower.begin(batch, [full[key_of(prompt)].answer_ids for prompt in batch], plans)
        return [draft for draft in drafts if key_of(draft.prompt) in wanted[draft.plan]]

    def _finish(self, drafts: Sequence[Draft], full: Mapping[Key, Label], advance: Advance) -> None:
        ordered = sorted(drafts, key=lambda draft: (len(draft.ids), full[key_of(draft.prompt)].prompt_tokens))
        for first in range(0, len(ordered), self._batch_size):
            self._add(self._follower.finish(ordered[first : first + self._batch_size]), full, advance)

    def _add(self, drafts: Sequence[Draft], full: Mapping[Key, Label], advance: Advance) -> None:
        labels = [
            self._judged(draft, self._follower.text(draft), full[key_of(draft.prompt)].prompt_tokens, full)
            for draft in drafts
        ]
        self._store.add(labels)
        advance(len(labels))

    def _batches(self, prompts: Sequence[Prompt], full: Mapping[Key, Label] | None) -> Iterator[list[Prompt]]:
        """Batches of like prompts, longest first, so that too little memory shows at once.

        Like in length, so that little is padded, and in the power of two of the expected answer's length (the full
        model's, or the reference's as long as that is not known), since a batch decodes until its longest answer ends.
        """

        def effort(prompt: Prompt) -> tuple[int, int, str]:
            if full is None:
                expected = len(self._tokenizer(prompt.reference).input_ids)
            else:
                expected = len(full[key_of(prompt)].answer_ids)
            return -expected.bit_length(), -len(self._tokenizer(prompt.prompt).input_ids), prompt.id

        ordered = sorted(prompts, key=effort)
        for start in range(0, len(ordered), self._batch_size):
            yield ordered[start : start + self._batch_size]

    def _judged(self, draft: Draft, answer: str, prompt_tokens: int, full: Mapping[Key, Label] | None) -> Label:
        prompt = draft.prompt
        full_answer = answer if full is None else full[key_of(prompt)].answer
        try:
            value = score(prompt.judge, answer, prompt.reference, full_answer)
        except Exception as error:  # a judge may be the user's own code: one prompt must not end a night's run
            self.failures.append(f"the judge {prompt.judge!r} failed on prompt {prompt.id!r}: {error}")
            value = float("nan")
        return Label(
            model=self.model_key,
            prompt=prompt.hash,
            plan=str(draft.plan),
            decoding=str(self._decoding),
            judge=prompt.judge,
            answer=answer,
            answer_ids=tuple(draft.ids),
            score=value,
            prompt_tokens=prompt_tokens,
            forward_tokens=draft.forward_tokens,
            seconds=draft.seconds,
        )


def score_matrix(labels: Sequence[Sequence[Label]]) -> NDArray[np.float64]:
    """Scores [N, K] of N prompts under K plans; NaN where a judge failed."""
    return np.array([[label.score for label in row] for row in labels], dtype=np.float64)
