"""Label prompts: answer each under each plan of the menu, judge it, store it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.loading import model_fingerprint
from backbone.plan import LayerPlan, PlanMenu
from oracle.answering import answer_batch, answer_text, continue_batch, stop_token_ids
from oracle.decoding import Decoding, cut_at_stop
from oracle.following import Followed, follow
from oracle.judges import score
from oracle.labels import CUT, Label, LabelStore
from oracle.prompts import Prompt

Advance = Callable[[int], None]
Key = tuple[str, str]
"""(prompt hash, judge)."""


def key_of(prompt: Prompt) -> Key:
    return prompt.hash, prompt.judge


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer, or the beginning of one, before it is judged, and what it cost.

    Attributes:
        ids: tokens of the answer so far.
        forward_tokens, seconds: see `Label`.
    """

    prompt: Prompt
    plan: LayerPlan
    ids: list[int]
    forward_tokens: float
    seconds: float


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
        """All plans along the full model's answers at once; what differs is generated when there is a batch of it."""
        wanted = {plan: {key_of(prompt) for prompt in without} for plan, without in missing.items()}
        unfinished: dict[LayerPlan, list[Draft]] = defaultdict(list)
        settled: dict[LayerPlan, list[bool]] = defaultdict(list)
        todo = [prompt for prompt in prompts if any(key_of(prompt) in keys for keys in wanted.values())]
        for batch in self._batches(todo, full):
            labels = []
            for draft, followed in self._followed(batch, wanted, full):
                settled[draft.plan].append(self._is_certain(draft, followed, full))
                if settled[draft.plan][-1]:
                    labels.append(self._known(draft, full))
                else:
                    unfinished[draft.plan].append(draft)
            self._store.add(labels)
            advance(len(labels))
            for plan in [plan for plan, drafts in unfinished.items() if len(drafts) >= self._batch_size]:
                self._finish(unfinished.pop(plan), full, advance)
            for plan in [plan for plan, known in settled.items() if len(known) >= TRIAL and np.mean(known) < WORTH]:
                wanted.pop(plan, None)
        for drafts in unfinished.values():
            self._finish(drafts, full, advance)
        for plan, without in missing.items():
            self._generate(self.missing(without, plan), plan, full, advance)

    def _followed(
        self, batch: Sequence[Prompt], wanted: Mapping[LayerPlan, Collection[Key]], full: Mapping[Key, Label]
    ) -> Iterator[tuple[Draft, Followed]]:
        plans = [plan for plan, keys in wanted.items() if any(key_of(prompt) in keys for prompt in batch)]
        if not plans:
            return
        answers = [full[key_of(prompt)].answer_ids for prompt in batch]
        start = time.perf_counter()
        rows = follow(self._model, self._tokenizer, [prompt.prompt for prompt in batch], answers, plans)
        seconds = (time.perf_counter() - start) / (len(batch) * len(plans))
        for prompt, answer, row in zip(batch, answers, rows, strict=True):
            for plan, followed in row.items():
                if key_of(prompt) in wanted[plan]:
                    own = [] if followed.token is None else [followed.token]
                    ids = [*answer[: followed.agreed], *own]
                    yield Draft(prompt, plan, ids, followed.forward_tokens, seconds), followed

    def _is_certain(self, draft: Draft, followed: Followed, full: Mapping[Key, Label]) -> bool:
        """Whether the score follows from the tokens so far."""
        if followed.token is None or len(draft.ids) == self._decoding.max_new_tokens:
            return True
        if followed.token in stop_token_ids(self._tokenizer, self._decoding.stop):
            return True
        return draft.prompt.judge == "agreement" and self._has_parted(draft, full)

    def _has_parted(self, draft: Draft, full: Mapping[Key, Label]) -> bool:
        """Whether no continuation of the text so far can be the full model's answer."""
        text = str(self._tokenizer.decode(draft.ids, skip_special_tokens=True))
        may_change = "\ufffd" in text or getattr(self._tokenizer, "clean_up_tokenization_spaces", False)
        stops = self._decoding.stop
        may_stop = any(text.endswith(stop[:i]) for stop in stops for i in range(1, len(stop)))
        begun = cut_at_stop(text, stops)
        return not may_change and not may_stop and not full[key_of(draft.prompt)].answer.startswith(begun)

    def _known(self, draft: Draft, full: Mapping[Key, Label]) -> Label:
        text, label = answer_text(self._tokenizer, draft.ids, self._decoding), full[key_of(draft.prompt)]
        stops = stop_token_ids(self._tokenizer, self._decoding.stop)
        is_whole = draft.ids[-1] in stops or len(draft.ids) == self._decoding.max_new_tokens
        return self._judged(draft, text if is_whole else text + CUT, label.prompt_tokens, full)

    def _finish(self, drafts: Sequence[Draft], full: Mapping[Key, Label], advance: Advance) -> None:
        """Generate the rest of answers of one plan."""
        limit = self._decoding.max_new_tokens
        ordered = sorted(drafts, key=lambda draft: (len(draft.ids), full[key_of(draft.prompt)].prompt_tokens))
        for first in range(0, len(ordered), self._batch_size):
            part = ordered[first : first + self._batch_size]
            plan = part[0].plan
            start = time.perf_counter()
            sequences = [[*self._tokenizer(draft.prompt.prompt).input_ids, *draft.ids] for draft in part]
            most = limit - min(len(draft.ids) for draft in part)
            rests = continue_batch(self._model, self._tokenizer, sequences, plan, self._decoding, most)
            seconds = (time.perf_counter() - start) / len(part)
            labels = []
            for draft, sequence, rest in zip(part, sequences, rests, strict=True):
                ids = [*draft.ids, *rest][:limit]
                tokens = (len(sequence) + len(ids) - len(draft.ids)) * plan.layers / plan.n_layers
                whole = Draft(draft.prompt, plan, ids, draft.forward_tokens + tokens, draft.seconds + seconds)
                labels.append(self._known(whole, full))
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
