"""Answers begun by following the full model's and, where that does not settle them, generated to their end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_passes import unchanged_depth
from backbone.execution.shared_prefixes import Beginning
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.decoding import Decoding, cut_at_stop
from oracle.judges import may_become_exact
from oracle.labels.exit_answers import exit_answers
from oracle.labels.generate_answers import Enough, SharedBatch, answer_text, stop_token_ids
from oracle.labels.store import CUT, Label
from oracle.labels.verification import follow
from oracle.prompts import Prompt

LOOKS = 3
"""Passes, at most, in which a draft is led along a guess before it is generated."""

PARTING: dict[str, Callable[[str, Sequence[str], str], bool]] = {
    "agreement": lambda begun, references, full_answer: full_answer.startswith(begun),
    "exact": lambda begun, references, full_answer: may_become_exact(begun, references),
}
"""For judges of equal texts: whether an answer that begins like this may still be right. If not, its score is 0."""

FIRST_LOOK = 4
"""Tokens of the first guess. Most plans leave the full model's answer within few tokens if they leave it at all, and
with a large vocabulary the logits of further tokens would cost more than the layers."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer, or the beginning of one, before it is judged, and what it cost.

    Attributes:
        ids: tokens of the answer so far.
        forward_tokens, seconds: see `Label`.
    """

    prompt: Prompt
    plan: LayerPlan
    ids: list[int] = field(default_factory=list)
    forward_tokens: float = 0.0
    seconds: float = 0.0


class Verification:
    """Gives the answers of plain greedy generation, for less, and only as far as the judge has to read them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> None:
        self._model, self._tokenizer, self._decoding = model, tokenizer, decoding

    def exits(
        self,
        prompts: Sequence[Prompt],
        plans: Sequence[LayerPlan],
        beginning: Beginning,
        shared: float,
    ) -> list[Draft]:
        """What early exits answer, as far as the judge has to read it; the full model's answers are whole.

        How far that is depends on the prompt and the answer alone, so that labels that are made again are the same.

        Args:
            prompts: with one beginning.
            plans: early exits, the full plan too where its labels are missing.
            beginning: of all these prompts.
            shared: tokens of it that fall to each prompt.
        """

        def settled(number: int, ids: list[int], plan: LayerPlan) -> bool:
            return not plan.is_full and self.is_decided(Draft(prompts[number], plan, ids), None)

        def enough(number: int, ids: list[int], some: Sequence[LayerPlan]) -> bool:
            return not any(plan.is_full for plan in some) and settled(number, ids, some[0])

        def read(number: int, ids: list[int], plan: LayerPlan) -> list[int]:
            return next((ids[:size] for size in range(1, len(ids)) if settled(number, ids[:size], plan)), ids)

        start = time.perf_counter()
        rows = [tokens_of(self._tokenizer, prompt.prompt) for prompt in prompts]
        found = exit_answers(self._model, self._tokenizer, rows, plans, self._decoding, enough, beginning)
        seconds = (time.perf_counter() - start) / (len(prompts) * len(plans))
        share = shared * max(len(plan.attention) for plan in plans) / plans[0].n_layers / len(plans)
        return [
            Draft(prompts[number], plan, read(number, one.ids, plan), one.forward_tokens + share, seconds)
            for number, answers in enumerate(found)
            for plan, one in answers.items()
        ]

    def lead(self, drafts: Sequence[Draft], full: Mapping[Prompt, Label]) -> list[Draft]:
        """Drafts led along the full model's answers until that settles them or leads no further.

        Args:
            drafts: of any prompts and plans, each prompt and plan once.
            full: the label of each of these prompts under the full plan.
        """
        led: list[Draft] = []
        open_drafts = list(drafts)
        for _ in range(LOOKS):
            looked, open_drafts = self._look(open_drafts, full), []
            for draft in looked:
                (open_drafts if self._can_be_led(draft, full[draft.prompt]) else led).append(draft)
        return led + open_drafts

    def _can_be_led(self, draft: Draft, full: Label) -> bool:
        """Whether another look may settle it: while it is the full model's answer, or may yet become its text."""
        agrees = tuple(draft.ids) == full.answer_ids[: len(draft.ids)]
        return not self.is_decided(draft, full.answer) and (agrees or draft.prompt.judge == "agreement")

    def _look(self, drafts: Sequence[Draft], full: Mapping[Prompt, Label]) -> list[Draft]:
        """One pass for each draft, along its tokens and a guess. Plans share passes over equal prompts and tokens."""
        rows: dict[tuple[Prompt, tuple[int, ...]], dict[LayerPlan, Draft]] = defaultdict(dict)
        for draft in drafts:
            rows[draft.prompt, self._guess(draft.ids, full[draft.prompt].answer_ids)][draft.plan] = draft
        alike: dict[frozenset[LayerPlan], list[tuple[Prompt, tuple[int, ...]]]] = defaultdict(list)
        for row, own in rows.items():
            alike[frozenset(own)].append(row)
        return [
            draft
            for plans, some in alike.items()
            for draft in self._followed({row: rows[row] for row in some}, list(plans))
        ]

    def _guess(self, ids: Sequence[int], answer: Sequence[int]) -> tuple[int, ...]:
        """The tokens so far and what may follow: the full model's answer from where it was left."""
        agreed = next((i for i, (own, other) in enumerate(zip(ids, answer, strict=False)) if own != other), len(ids))
        is_short, agrees_so_far = len(answer) <= 2 * FIRST_LOOK, 0 < agreed == len(ids)
        more = len(answer) if is_short or agrees_so_far else FIRST_LOOK
        return (*ids, *answer[agreed : agreed + more])[: self._decoding.max_new_tokens]

    def _followed(
        self, rows: Mapping[tuple[Prompt, tuple[int, ...]], Mapping[LayerPlan, Draft]], plans: Sequence[LayerPlan]
    ) -> list[Draft]:
        """The drafts of some rows (prompt and guess) under the same plans: up to and with the first token that is not
        the guess's."""
        start = time.perf_counter()
        texts, guesses = [prompt.prompt for prompt, _ in rows], [guess for _, guess in rows]
        found = follow(self._model, self._tokenizer, texts, guesses, plans)
        seconds = (time.perf_counter() - start) / (len(rows) * len(plans))
        return [
            replace(
                draft,
                ids=followed[plan].repeated(guess),
                forward_tokens=draft.forward_tokens + followed[plan].forward_tokens,
                seconds=draft.seconds + seconds,
            )
            for guess, followed, own in zip(guesses, found, rows.values(), strict=True)
            for plan, draft in own.items()
        ]

    def is_whole(self, draft: Draft) -> bool:
        stops = stop_token_ids(self._tokenizer, self._decoding)
        return draft.ids[-1] in stops or len(draft.ids) >= self._decoding.max_new_tokens

    def is_decided(self, draft: Draft, full_answer: str | None) -> bool:
        """Whether the score follows from the tokens so far; None stands for a full answer that is not known yet."""
        judge = draft.prompt.judge
        can_part = judge in PARTING and not (judge == "agreement" and full_answer is None)
        return self.is_whole(draft) or (can_part and self.has_diverged(draft, full_answer or ""))

    def has_diverged(self, draft: Draft, full_answer: str) -> bool:
        """Whether no continuation of the text so far can be right: the full model's answer for the judge `agreement`,
        equal to a reference for `exact`."""
        text = str(self._tokenizer.decode(draft.ids, skip_special_tokens=True))
        may_change = "\ufffd" in text or getattr(self._tokenizer, "clean_up_tokenization_spaces", False)
        stops = self._decoding.stop
        may_stop = any(text.endswith(stop[:i]) for stop in stops for i in range(1, len(stop)))
        if may_change or may_stop:
            return False
        return not PARTING[draft.prompt.judge](cut_at_stop(text, stops), draft.prompt.references, full_answer)

    def text(self, draft: Draft) -> str:
        """The text of the tokens so far, marked where they are not all."""
        return answer_text(self._tokenizer, draft.ids, self._decoding) + ("" if self.is_whole(draft) else CUT)

    def finish(self, drafts: Sequence[Draft], full: Mapping[Prompt, Label]) -> Iterator[list[Draft]]:
        """The same drafts, generated in one batch until they are settled: those of one plan after those of another.

        Drafts of a prompt that have the same tokens share a row, and the layers with which all their plans begin.
        """
        rows: dict[tuple[Prompt, tuple[int, ...]], dict[LayerPlan, Draft]] = defaultdict(dict)
        for draft in drafts:
            rows[draft.prompt, tuple(draft.ids)][draft.plan] = draft
        plans = list(dict.fromkeys(draft.plan for draft in drafts))
        start, owners = time.perf_counter(), list(rows.values())
        sequences = [[*tokens_of(self._tokenizer, prompt.prompt), *ids] for prompt, ids in rows]
        batch = SharedBatch(self._model, self._tokenizer, sequences, plans, self._decoding)
        beginning = (time.perf_counter() - start) / len(drafts)
        for plan in plans:
            start = time.perf_counter()
            own = {row: drafts_of[plan] for row, drafts_of in enumerate(owners) if plan in drafts_of}
            rests = batch.continued(
                plan,
                {row: self._enough(draft, full[draft.prompt].answer) for row, draft in own.items()},
                self._decoding.max_new_tokens - min(len(draft.ids) for draft in own.values()),
            )
            seconds = beginning + (time.perf_counter() - start) / len(own)
            yield [
                self._finished(draft, rest, len(sequences[row]), batch.depth, len(owners[row]), seconds)
                for (row, draft), rest in zip(own.items(), rests, strict=True)
            ]

    def _finished(
        self, draft: Draft, rest: Sequence[int], given: int, depth: int, sharing: int, seconds: float
    ) -> Draft:
        """A draft with the rest of its answer, after `given` tokens, for which `depth` layers ran once for all plans
        that are `sharing` them."""
        ids, plan = [*draft.ids, *rest][: self._decoding.max_new_tokens], draft.plan
        tokens = _forward_tokens(plan, given, len(ids) - len(draft.ids), depth, sharing)
        return Draft(draft.prompt, plan, ids, draft.forward_tokens + tokens, draft.seconds + seconds)

    def saved(self, led: Sequence[Draft], full: Mapping[Prompt, Label]) -> dict[LayerPlan, float]:
        """Forward tokens that generating under a plan all that leading has settled would have taken, if the layers with
        which all plans begin run once for all; less what they cost anew for drafts that it has not settled."""
        plans = list(dict.fromkeys(draft.plan for draft in led))
        depth = unchanged_depth(self._model, plans)
        saved = dict.fromkeys(plans, 0.0)
        for draft in led:
            label, plan = full[draft.prompt], draft.plan
            saved[plan] += _forward_tokens(plan, label.prompt_tokens, len(draft.ids), depth, len(plans))
            if not self.is_decided(draft, label.answer):
                saved[plan] -= _forward_tokens(plan, label.prompt_tokens, len(draft.ids))
        return saved

    def _enough(self, draft: Draft, full_answer: str) -> Enough:
        return lambda rest: self.is_decided(replace(draft, ids=[*draft.ids, *rest]), full_answer)


def _forward_tokens(plan: LayerPlan, given: int, new: int, depth: int = 0, sharing: int = 1) -> float:
    """What generating `new` tokens after `given` ones takes, each weighted by the share of the layers that it passes.

    `sharing` plans share the first `depth` layers of the given tokens.
    """
    return (given * (plan.layers - depth + depth / sharing) + new * plan.layers) / plan.n_layers
