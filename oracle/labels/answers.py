"""Answers of prompts under plans, each made in the cheapest way, and only as far as the judge has to read them.

Early exits answer from one pass. Elsewhere a batch is generated under one plan after another, and the layers with which
all these plans begin run once. Exits may be verified along the full model's answer first, since they share that pass.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_prefixes import Beginning
from backbone.healing.healing import ReadyHealing
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.decoding import Decoding, cut_at_stop
from oracle.judges import may_become_exact
from oracle.labels.exit_answers import exit_answers
from oracle.labels.generation import SharedBatch, answer_text, never, stop_token_ids
from oracle.labels.store import CUT, Label
from oracle.labels.verification import verify
from oracle.prompts import Prompt

Full = Mapping[Prompt, Label]
"""The labels under the full plan."""

PROMPTS_IN_MEMORY = 2048
"""Prompts whose tokens are kept, more than a block holds."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer, or the beginning of one, before it is judged, and what it cost.

    Attributes:
        ids: tokens of the answer so far.
        forward_tokens, seconds: see `Label`.
    """

    prompt: Prompt
    plan: LayerPlan
    ids: tuple[int, ...] = ()
    forward_tokens: float = 0.0
    seconds: float = 0.0


class Answers:
    """The answers of plain greedy generation, for less.

    Args:
        decoding: complete, see `Decoding.of`.
        healing: what shortened plans run with.
        stop_early: end an answer where its score is decided.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        healing: ReadyHealing | None = None,
        *,
        stop_early: bool = True,
    ) -> None:
        self._model, self._tokenizer, self._decoding, self._stop_early = model, tokenizer, decoding, stop_early
        self._healing = healing
        self.tokens = lru_cache(PROMPTS_IN_MEMORY)(lambda prompt: tokens_of(tokenizer, prompt.prompt))
        """Token ids of a prompt."""

    def of_exits(
        self, prompts: Sequence[Prompt], plans: Sequence[LayerPlan], beginning: Beginning, shared: float
    ) -> list[Draft]:
        """What early exits answer; the full model's answers are whole.

        Where answers end depends on the prompt and the answer alone, so that labels that are made again are the same.

        Args:
            prompts: with one beginning.
            plans: early exits, the full plan too where its labels are missing.
            beginning: of all these prompts.
            shared: tokens of it that fall to each prompt.
        """

        def decided(number: int, ids: list[int], plan: LayerPlan) -> bool:
            return not plan.is_full and self.is_decided(prompts[number], ids, None)

        def enough(number: int, ids: list[int], some: Sequence[LayerPlan]) -> bool:
            return not any(plan.is_full for plan in some) and decided(number, ids, some[0])

        def read(number: int, ids: list[int], plan: LayerPlan) -> list[int]:
            return next((ids[:size] for size in range(1, len(ids)) if decided(number, ids[:size], plan)), ids)

        start, rows = time.perf_counter(), [self.tokens(prompt) for prompt in prompts]
        found = exit_answers(
            self._model, self._tokenizer, rows, plans, self._decoding, enough, beginning, self._healing
        )
        seconds = (time.perf_counter() - start) / (len(prompts) * len(plans))
        share = shared * max(len(plan.attention) for plan in plans) / plans[0].n_layers / len(plans)
        return [
            Draft(prompts[number], plan, tuple(read(number, one.ids, plan)), one.forward_tokens + share, seconds)
            for number, answers in enumerate(found)
            for plan, one in answers.items()
        ]

    def verified(self, prompts: Sequence[Prompt], plans: Sequence[LayerPlan], full: Full) -> list[Draft]:
        """What plans answer up to the first token that is not the full model's, from one pass over its answers."""
        start = time.perf_counter()
        rows = [(self.tokens(prompt), full[prompt].answer_ids) for prompt in prompts]
        found = verify(self._model, rows, plans, self._healing)
        seconds = (time.perf_counter() - start) / (len(prompts) * len(plans))
        return [
            Draft(prompt, plan, one.ids, one.forward_tokens, seconds)
            for prompt, row in zip(prompts, found, strict=True)
            for plan, one in row.items()
        ]

    def generated(self, drafts: Sequence[Draft], full: Full) -> Iterator[list[Draft]]:
        """The same drafts, generated in one batch until they are decided: those of one plan after those of another.

        Drafts of a prompt that have the same tokens share a row, and the layers with which all their plans begin.
        """
        rows: dict[tuple[Prompt, tuple[int, ...]], dict[LayerPlan, Draft]] = defaultdict(dict)
        for draft in drafts:
            rows[draft.prompt, draft.ids][draft.plan] = draft
        plans = list(dict.fromkeys(draft.plan for draft in drafts))
        start, owners = time.perf_counter(), list(rows.values())
        sequences = [[*self.tokens(prompt), *ids] for prompt, ids in rows]
        batch = SharedBatch(self._model, self._tokenizer, sequences, plans, self._decoding, self._healing)
        beginning = (time.perf_counter() - start) / len(drafts)
        for plan in plans:
            start = time.perf_counter()
            own = {row: of_row[plan] for row, of_row in enumerate(owners) if plan in of_row}
            left = self._decoding.max_new_tokens - min(len(draft.ids) for draft in own.values())
            rests = batch.continued(plan, {row: self._enough(draft, full) for row, draft in own.items()}, left)
            seconds = beginning + (time.perf_counter() - start) / len(own)
            finished = []
            for (row, draft), rest in zip(own.items(), rests, strict=True):
                ids = (*draft.ids, *rest)[: self._decoding.max_new_tokens]
                layers = plan.layers - batch.depth + batch.depth / len(owners[row])  # of the tokens given
                tokens = (len(sequences[row]) * layers + (len(ids) - len(draft.ids)) * plan.layers) / plan.n_layers
                finished.append(Draft(draft.prompt, plan, ids, draft.forward_tokens + tokens, draft.seconds + seconds))
            yield finished

    def _enough(self, draft: Draft, full: Full) -> Callable[[list[int]], bool]:
        if draft.plan.is_full or not self._stop_early:
            return never
        return lambda rest: self.is_decided(draft.prompt, [*draft.ids, *rest], full[draft.prompt].answer)

    def is_whole(self, ids: Sequence[int]) -> bool:
        stops = stop_token_ids(self._tokenizer, self._decoding)
        return ids[-1] in stops or len(ids) >= self._decoding.max_new_tokens

    def is_decided(self, prompt: Prompt, ids: Sequence[int], full_answer: str | None) -> bool:
        """Whether the score follows from the tokens so far; None stands for a full answer that is not known yet."""
        return self.is_whole(ids) or self.has_diverged(prompt, ids, full_answer)

    def has_diverged(self, prompt: Prompt, ids: Sequence[int], full_answer: str | None) -> bool:
        """Whether no continuation of the text so far can be right: the full model's answer for the judge `agreement`,
        equal to a reference for `exact`. Then the score is 0. Other judges read answers to their ends."""
        if prompt.judge != "exact" and (prompt.judge != "agreement" or full_answer is None):
            return False
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        may_change = "\ufffd" in text or getattr(self._tokenizer, "clean_up_tokenization_spaces", False)
        stops = self._decoding.stop
        may_stop = any(text.endswith(stop[:i]) for stop in stops for i in range(1, len(stop)))
        if may_change or may_stop:
            return False
        begun = cut_at_stop(text, stops)
        if prompt.judge == "exact":
            return not may_become_exact(begun, prompt.references)
        return full_answer is not None and not full_answer.startswith(begun)

    def text(self, ids: Sequence[int]) -> str:
        """The text of the tokens so far, marked where they are not all."""
        return answer_text(self._tokenizer, ids, self._decoding) + ("" if self.is_whole(ids) else CUT)
