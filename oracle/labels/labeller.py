"""Label prompts: answer each under each plan of the menu, judge it, store it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_prefixes import beginnings
from backbone.fingerprint import model_fingerprint
from backbone.healing.attaching import attached_digest
from backbone.plan import LayerPlan, PlanMenu
from oracle.chat import tokens_of
from oracle.decoding import Decoding
from oracle.judges import KL, JudgeError, judge_key
from oracle.labels.answers_from_full import Draft, Verification
from oracle.labels.blocks import together, wanted_in_blocks
from oracle.labels.divergence import diverge
from oracle.labels.equal_batches import packed
from oracle.labels.exit_answers import are_exits
from oracle.labels.generate_answers import answer_batch
from oracle.labels.reader import LabelReader, key_of, model_key
from oracle.labels.store import CUT, Label, LabelStore, StoreError
from oracle.labels.verification_trial import TRIAL, worth_verifying
from oracle.prompts import Prompt

Advance = Callable[[int], None]
Full = Mapping[Prompt, Label]
"""The labels under the full plan."""
Missing = Mapping[LayerPlan, Sequence[Prompt]]
"""Prompts that have no label under a plan, or whose labels under it are asked for."""


class Labeller(LabelReader):
    """Fills a store with the label of every (prompt, plan), going on where an earlier run stopped.

    Args:
        model: runs the plans; with its tokenizer.
        decoding: how answers are generated; what the model's generation config says is put in.
        store: where labels are kept; one transaction a batch.
        batch_size: prompts generated together.
        shortcut: follow the full model's answer with the plans for which that pays and generate only what differs (see
            `oracle.labels.verification`), sharing what plans begin with; otherwise generate everything. The judge
            `kl` generates nothing either way. Where the decoding changes tokens, following their likeliest ones would
            not do, and everything is generated.

    Attributes:
        decoding: how answers are generated, complete.
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
        super().__init__(store, decoding.of(model, tokenizer), self.model_key)
        self._batch_size = batch_size
        self._shortcut = shortcut and not self.decoding.changes_tokens
        self._verification = Verification(model, tokenizer, self.decoding)
        self._fingerprint = model_fingerprint(model)
        self.failures: list[str] = []

    def model_key(self, plan: LayerPlan) -> str:
        """What answers under a plan, with the healing parts that are attached to the model now."""
        return model_key(self._fingerprint, str(self._model.dtype), attached_digest(self._model, plan))

    def label(self, prompts: Sequence[Prompt], menu: PlanMenu, advance: Advance = lambda done: None) -> None:
        """Label all prompts under all plans of the menu, block by block."""
        self.label_in_blocks(dict.fromkeys(menu.plans, prompts), menu.plans[-1], advance)

    def label_full(self, prompts: Sequence[Prompt], full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label all prompts under the full plan alone, block by block."""
        self.label_in_blocks({full_plan: prompts}, full_plan, advance)

    def label_in_blocks(self, wanted: Missing, full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label some prompts under some plans, block by block; see `oracle.labels.blocks` and `label_some`."""
        for block in wanted_in_blocks(wanted, self._batch_size, self.decoding):
            self.label_some(block, full_plan, advance)

    def label_some(self, wanted: Missing, full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label some prompts under some plans, the full plan first since others are compared with it.

        Of prompts that are wanted under other plans alone, as a search asks for them, its label must be there.
        """
        if self._shortcut and full_plan in wanted and are_exits(self._model, list(wanted)):
            self._answer_exits(wanted, full_plan, advance)
        self._generate(self.missing(wanted.get(full_plan, ()), full_plan), full_plan, None, advance)
        others = [plan for plan in wanted if plan != full_plan]
        self._compare({plan: self.missing(wanted[plan], plan) for plan in others}, full_plan, advance)

    def _compare(self, missing: Mapping[LayerPlan, Sequence[Prompt]], full_plan: LayerPlan, advance: Advance) -> None:
        """The labels that are missing under shortened plans, each in the cheapest way that its judge allows."""
        asked = {prompt for prompts in missing.values() for prompt in prompts}
        labels = self.labels(full_plan, asked)
        if lost := [prompt.id for prompt in asked if key_of(prompt) not in labels]:
            raise StoreError(
                f"the label store {self._store.path} is damaged: the full plan's label of prompt {min(lost)!r} was "
                "stored and is not there; delete the file, and the labels are made again"
            )
        full = {prompt: labels[key_of(prompt)] for prompt in asked}
        forced, free = (
            {
                plan: [prompt for prompt in prompts if (prompt.judge == KL) == wanted]
                for plan, prompts in missing.items()
            }
            for wanted in (True, False)
        )
        self._diverge(forced, full, advance)
        if self._shortcut:
            self._follow(free, full, advance)
        else:
            for plan, without in free.items():
                self._generate(without, plan, full, advance)

    def _answer_exits(
        self, wanted: Mapping[LayerPlan, Sequence[Prompt]], full_plan: LayerPlan, advance: Advance
    ) -> None:
        """All early exits and the full model from one pass over each prompt; see `oracle.labels.exit_answers`.

        What prompts begin with in common runs once, and layers behind the deepest exit only for prompts without a label
        under the full plan.
        """
        missing = {plan: {p for p in self.missing(some, plan) if p.judge != KL} for plan, some in wanted.items()}
        prompts = together(missing)
        labels = self.labels(full_plan, prompts)
        full = {prompt: labels[key_of(prompt)] for prompt in prompts if key_of(prompt) in labels}
        for some in ([p for p in prompts if p in full], [p for p in prompts if p not in full]):
            plans = [plan for plan, without in missing.items() if not without.isdisjoint(some)]
            rows = [tokens_of(self._tokenizer, prompt.prompt) for prompt in some]
            depth = max((len(plan.attention) for plan in plans), default=1)
            for numbers, beginning in beginnings(self._model, rows, depth):
                shared = len(beginning.tokens) / len(numbers)
                for batch in self._batches([some[number] for number in numbers], None):
                    drafts = self._verification.exits(batch, plans, beginning, shared)
                    own = [draft for draft in drafts if draft.plan == full_plan]
                    full |= {draft.prompt: self._full_label(draft) for draft in own}
                    self._keep([full[draft.prompt] for draft in own], advance)
                    others = [draft for draft in drafts if draft.plan != full_plan]
                    self._add([draft for draft in others if draft.prompt in missing[draft.plan]], full, advance)

    def _full_label(self, draft: Draft) -> Label:
        text, tokens = self._verification.text(draft), len(tokens_of(self._tokenizer, draft.prompt.prompt))
        return self._labelled(draft, text, tokens, self._judged(draft.prompt, text, text))

    def _generate(self, prompts: Sequence[Prompt], plan: LayerPlan, full: Full | None, advance: Advance) -> None:
        """Plain generation under one plan."""
        for batch in self._batches(prompts, full):
            start = time.perf_counter()
            answers = answer_batch(
                self._model, self._tokenizer, [prompt.prompt for prompt in batch], plan, self.decoding
            )
            seconds = (time.perf_counter() - start) / len(batch)
            labels = []
            for prompt, answer in zip(batch, answers, strict=True):
                tokens = (answer.prompt_tokens + len(answer.token_ids)) * plan.layers / plan.n_layers
                draft = Draft(prompt, plan, answer.token_ids, tokens, seconds)
                value = self._judged(prompt, answer.text, answer.text if full is None else full[prompt].answer)
                labels.append(self._labelled(draft, answer.text, answer.prompt_tokens, value))
            self._keep(labels, advance)

    def _follow(self, missing: Missing, full: Full, advance: Advance) -> None:
        """A few prompts tell which plans are worth leading along the full model's answers; all else is generated."""
        asked = together(missing)
        trial = set(asked[:: max(1, len(asked) // TRIAL)])
        led = self._lead(_among(missing, trial), full, advance)
        if rest := set(asked) - trial:
            left, saved = _among(missing, rest), self._verification.saved(led, full)
            worth = worth_verifying(self._model, saved, sum(draft.forward_tokens for draft in led))
            self._lead({plan: some for plan, some in left.items() if plan in worth}, full, advance)
            others = {plan: some for plan, some in left.items() if plan not in worth}
            for begun in self._begun(others, full):
                self._finish_batch(begun, full, advance)

    def _lead(self, missing: Missing, full: Full, advance: Advance) -> list[Draft]:
        """All plans along the full model's answers at once; what that leaves open is generated, a batch at a time.

        Returns the drafts as far as they were led.
        """
        unfinished: dict[LayerPlan, list[Draft]] = defaultdict(list)
        led: list[Draft] = []
        for begun in self._begun(missing, full):
            drafts = self._verification.lead(begun, full)
            led += drafts
            known: list[Draft] = []
            for draft in drafts:
                is_decided = self._verification.is_decided(draft, full[draft.prompt].answer)
                (known if is_decided else unfinished[draft.plan]).append(draft)
            self._add(known, full, advance)
            for plan in [plan for plan, drafts in unfinished.items() if len(drafts) >= self._batch_size]:
                self._finish(unfinished.pop(plan), full, advance)
        for drafts in unfinished.values():
            self._finish(drafts, full, advance)
        return led

    def _begun(self, missing: Missing, full: Full) -> Iterator[list[Draft]]:
        """An empty draft for all that is missing, a batch of prompts with all their plans at a time."""
        wanted = {plan: set(prompts) for plan, prompts in missing.items()}
        for batch in self._batches(together(missing), full):
            yield [Draft(prompt, plan) for plan, some in wanted.items() for prompt in batch if prompt in some]

    def _finish(self, drafts: Sequence[Draft], full: Full, advance: Advance) -> None:
        """Drafts of one plan to their ends, in batches."""

        def tokens(draft: Draft) -> int:
            return full[draft.prompt].prompt_tokens + self.decoding.max_new_tokens

        ordered = sorted(drafts, key=lambda draft: (len(draft.ids), -tokens(draft)))
        for batch in packed(ordered, tokens, self._batch_size):
            self._finish_batch(batch, full, advance)

    def _finish_batch(self, drafts: Sequence[Draft], full: Full, advance: Advance) -> None:
        for finished in self._verification.finish(drafts, full):
            self._add(finished, full, advance)

    def _add(self, drafts: Sequence[Draft], full: Full, advance: Advance) -> None:
        labels = []
        for draft in drafts:
            text, whole = self._verification.text(draft), full[draft.prompt]
            value = self._judged(draft.prompt, text, whole.answer)
            labels.append(self._labelled(draft, text, whole.prompt_tokens, value))
        self._keep(labels, advance)

    def _diverge(self, missing: Missing, full: Full, advance: Advance) -> None:
        """Labels of the judge `kl`: all plans along the full model's answers, nothing generated."""
        wanted = {plan: set(prompts) for plan, prompts in missing.items()}
        for batch in self._batches(together(missing), full):
            plans = [plan for plan, prompts in wanted.items() if not prompts.isdisjoint(batch)]
            texts, answers = [prompt.prompt for prompt in batch], [full[prompt].answer_ids for prompt in batch]
            start = time.perf_counter()
            found = diverge(self._model, self._tokenizer, texts, answers, plans)
            seconds = (time.perf_counter() - start) / (len(batch) * len(plans))
            labels = []
            for prompt, row in zip(batch, found, strict=True):
                for plan in [plan for plan in plans if prompt in wanted[plan]]:
                    draft = Draft(prompt, plan, list(row[plan].ids), row[plan].forward_tokens, seconds)
                    value = self._checked(prompt, row[plan].score)
                    labels.append(self._labelled(draft, CUT, full[prompt].prompt_tokens, value))
            self._keep(labels, advance)

    def _checked(self, prompt: Prompt, value: float) -> float:
        """The score as it is; NaN is noted."""
        if math.isnan(value):
            self.failures.append(f"the judge {KL!r} failed on prompt {prompt.id!r}: the model's logits are NaN")
        return value

    def _keep(self, labels: Sequence[Label], advance: Advance) -> None:
        self._store.add(labels)
        advance(len(labels))

    def _batches(self, prompts: Sequence[Prompt], full: Full | None) -> Iterator[list[Prompt]]:
        """Batches of like prompts, longest first, so that too little memory shows at once.

        Like in length, so that little is padded, and in the power of two of the expected answer's length (the full
        model's, or the reference's as long as that is not known), since a batch decodes until its longest answer ends.
        """
        lengths = {prompt: len(tokens_of(self._tokenizer, prompt.prompt)) for prompt in prompts}

        def expected(prompt: Prompt) -> int:
            return len(self._tokenizer(prompt.reference).input_ids if full is None else full[prompt].answer_ids)

        ordered = sorted(lengths, key=lambda prompt: (-expected(prompt).bit_length(), -lengths[prompt], prompt.id))
        return packed(ordered, lambda prompt: lengths[prompt] + self.decoding.max_new_tokens, self._batch_size)

    def _judged(self, prompt: Prompt, answer: str, full_answer: str) -> float:
        """The score, or NaN where the judge fails, which is noted."""
        if prompt.judge == KL:
            return 1.0  # only the full plan has an answer of its own to judge, and it is compared with itself
        try:
            return prompt.score(answer, full_answer)
        except JudgeError as error:  # one prompt must not end a night's run
            self.failures.append(str(error))
            return float("nan")

    def _labelled(self, draft: Draft, answer: str, prompt_tokens: int, value: float) -> Label:
        return Label(
            model=self.model_key(draft.plan),
            prompt=draft.prompt.hash,
            plan=str(draft.plan),
            decoding=str(self.decoding),
            judge=judge_key(draft.prompt.judge),
            answer=answer,
            answer_ids=tuple(draft.ids),
            score=value,
            prompt_tokens=prompt_tokens,
            forward_tokens=draft.forward_tokens,
            seconds=draft.seconds,
        )


def _among(missing: Missing, some: Container[Prompt]) -> dict[LayerPlan, list[Prompt]]:
    """What is missing of some prompts, without plans that miss nothing."""
    found = {plan: [prompt for prompt in prompts if prompt in some] for plan, prompts in missing.items()}
    return {plan: prompts for plan, prompts in found.items() if prompts}
