"""Answers begun by following the full model's and, where that does not settle them, generated to their end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from oracle.answering import answer_text, continue_batch, stop_token_ids
from oracle.decoding import Decoding, cut_at_stop
from oracle.following import follow
from oracle.labels import CUT
from oracle.prompts import Prompt


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


class Shortcut:
    """Gives the answers of plain greedy generation, for less. Only the beginnings are made for all plans at once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> None:
        self._model, self._tokenizer, self._decoding = model, tokenizer, decoding

    def begin(
        self, prompts: Sequence[Prompt], full_answers: Sequence[Sequence[int]], plans: Sequence[LayerPlan]
    ) -> list[Draft]:
        """Up to and with the first token that differs from the full model's, for each of B prompts and P plans."""
        start = time.perf_counter()
        rows = follow(self._model, self._tokenizer, [prompt.prompt for prompt in prompts], full_answers, plans)
        seconds = (time.perf_counter() - start) / (len(prompts) * len(plans))
        drafts = []
        for prompt, answer, row in zip(prompts, full_answers, rows, strict=True):
            for plan, followed in row.items():
                own = [] if followed.token is None else [followed.token]
                ids = [*answer[: followed.agreed], *own]
                drafts.append(Draft(prompt, plan, ids, followed.forward_tokens, seconds))
        return drafts

    def is_whole(self, draft: Draft) -> bool:
        stops = stop_token_ids(self._tokenizer, self._decoding.stop)
        return draft.ids[-1] in stops or len(draft.ids) == self._decoding.max_new_tokens

    def is_settled(self, draft: Draft, full_answer: str) -> bool:
        """Whether the score follows from the tokens so far."""
        return self.is_whole(draft) or (draft.prompt.judge == "agreement" and self.has_parted(draft, full_answer))

    def has_parted(self, draft: Draft, full_answer: str) -> bool:
        """Whether no continuation of the text so far can be the full model's answer."""
        text = str(self._tokenizer.decode(draft.ids, skip_special_tokens=True))
        may_change = "\ufffd" in text or getattr(self._tokenizer, "clean_up_tokenization_spaces", False)
        stops = self._decoding.stop
        may_stop = any(text.endswith(stop[:i]) for stop in stops for i in range(1, len(stop)))
        return not may_change and not may_stop and not full_answer.startswith(cut_at_stop(text, stops))

    def text(self, draft: Draft) -> str:
        """The text of the tokens so far, marked where they are not all."""
        return answer_text(self._tokenizer, draft.ids, self._decoding) + ("" if self.is_whole(draft) else CUT)

    def finish(self, drafts: Sequence[Draft]) -> list[Draft]:
        """The same drafts, of one plan, generated to their ends in one batch."""
        limit, plan = self._decoding.max_new_tokens, drafts[0].plan
        start = time.perf_counter()
        sequences = [[*self._tokenizer(draft.prompt.prompt).input_ids, *draft.ids] for draft in drafts]
        most = limit - min(len(draft.ids) for draft in drafts)
        rests = continue_batch(self._model, self._tokenizer, sequences, plan, self._decoding, most)
        seconds = (time.perf_counter() - start) / len(drafts)
        finished = []
        for draft, sequence, rest in zip(drafts, sequences, rests, strict=True):
            ids = [*draft.ids, *rest][:limit]
            tokens = (len(sequence) + len(ids) - len(draft.ids)) * plan.layers / plan.n_layers
            finished.append(Draft(draft.prompt, plan, ids, draft.forward_tokens + tokens, draft.seconds + seconds))
        return finished
