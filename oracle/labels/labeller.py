"""Label prompts: answer each under each plan of the menu, judge it, store it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_prefixes import beginnings
from backbone.families import model_fingerprint
from backbone.healing.healing import AnyHealing, healing_digest, ready
from backbone.plan import LayerPlan, PlanMenu
from oracle.batches import packed, together, wanted_in_blocks
from oracle.decoding import Decoding
from oracle.judges import KL, JudgeError, judge_key
from oracle.labels.answers import Answers, Draft, Full
from oracle.labels.exit_answers import are_exits, exit_depth
from oracle.labels.reader import LabelReader, key_of, model_key
from oracle.labels.store import CUT, Label, LabelStore, StoreError
from oracle.labels.verification import diverge
from oracle.prompts import Prompt

Advance = Callable[[int], None]
Missing = Mapping[LayerPlan, Sequence[Prompt]]
"""Prompts that have no label under a plan, or whose labels under it are asked for."""


class Labeller(LabelReader):
    """Fills a store with the label of every (prompt, plan), going on where an earlier run stopped.

    Args:
        model: runs the plans; with its tokenizer.
        decoding: how answers are generated; what the model's generation config says is put in.
        store: where labels are kept; one transaction a batch.
        batch_size: prompts generated together.
        healing: what shortened plans run with.
        verify: make each answer in the cheapest way and end it where its score is decided (see
            `oracle.labels.answers`); otherwise generate everything to its end, plan by plan. The judge `kl` generates
            nothing either way. Where the decoding changes tokens, the likeliest ones are not those chosen, and
            everything is generated.

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
        healing: AnyHealing = None,
        *,
        verify: bool = True,
    ) -> None:
        self._model, self._tokenizer, self._healing = model, tokenizer, ready(healing, model)
        super().__init__(store, decoding.of(model, tokenizer), self.model_key)
        self._batch_size = batch_size
        self._verifies = verify and not self.decoding.changes_tokens
        self._answers = Answers(model, tokenizer, self.decoding, self._healing, stop_early=self._verifies)
        self._fingerprint = model_fingerprint(model)
        self.failures: list[str] = []

    def model_key(self, plan: LayerPlan) -> str:
        """What answers under a plan: see `oracle.labels.reader.model_key`."""
        return model_key(self._fingerprint, str(self._model.dtype), healing_digest(self._healing, plan))

    def label(self, prompts: Sequence[Prompt], menu: PlanMenu, advance: Advance = lambda done: None) -> None:
        """Label all prompts under all plans of the menu, block by block."""
        self.label_in_blocks(dict.fromkeys(menu.plans, prompts), menu.plans[-1], advance)

    def label_full(self, prompts: Sequence[Prompt], full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label all prompts under the full plan alone, block by block."""
        self.label_in_blocks({full_plan: prompts}, full_plan, advance)

    def label_in_blocks(self, wanted: Missing, full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label some prompts under some plans, block by block; see `oracle.batches.blocks` and `label_some`."""
        for block in wanted_in_blocks(wanted, self._batch_size, self.decoding):
            self.label_some(block, full_plan, advance)

    def label_some(self, wanted: Missing, full_plan: LayerPlan, advance: Advance = lambda done: None) -> None:
        """Label some prompts under some plans, the full plan first since others are compared with it.

        Of prompts that are wanted under other plans alone, as a search asks for them, its label must be there.
        """
        if self._verifies and full_plan in wanted and are_exits(list(wanted), self._healing):
            self._label_exits(wanted, full_plan, advance)
        self._generate({full_plan: self.missing(wanted.get(full_plan, ()), full_plan)}, {}, advance)
        missing = {plan: self.missing(some, plan) for plan, some in wanted.items() if plan != full_plan}
        full = self._full_labels(missing, full_plan)
        self._diverge({plan: [p for p in some if p.judge == KL] for plan, some in missing.items()}, full, advance)
        free = {plan: [p for p in some if p.judge != KL] for plan, some in missing.items()}
        if not self._verifies:
            for plan, some in free.items():
                self._generate({plan: some}, full, advance)
        elif all(exit_depth(plan) is not None for plan in free):
            self._verify(free, full, advance)
        else:
            self._generate(free, full, advance)

    def _full_labels(self, missing: Missing, full_plan: LayerPlan) -> dict[Prompt, Label]:
        """The full plan's labels of all these prompts, which have been stored."""
        asked = together(missing)
        full = self._known(full_plan, asked)
        if lost := [prompt.id for prompt in asked if prompt not in full]:
            raise StoreError(
                f"the label store {self._store.path} is damaged: the full plan's label of prompt {min(lost)!r} was "
                "stored and is not there; delete the file, and the labels are made again"
            )
        return full

    def _known(self, plan: LayerPlan, prompts: Sequence[Prompt]) -> dict[Prompt, Label]:
        labels = self.labels(plan, prompts)
        return {prompt: labels[key_of(prompt)] for prompt in prompts if key_of(prompt) in labels}

    def _label_exits(self, wanted: Missing, full_plan: LayerPlan, advance: Advance) -> None:
        """All early exits and the full model from one pass over each prompt; see `oracle.labels.exit_answers`.

        What prompts begin with in common runs once, and layers behind the deepest exit only for prompts without a label
        under the full plan.
        """
        missing = {plan: {p for p in self.missing(some, plan) if p.judge != KL} for plan, some in wanted.items()}
        prompts = together(missing)
        full = self._known(full_plan, prompts)
        for some in ([p for p in prompts if p in full], [p for p in prompts if p not in full]):
            plans = [plan for plan, without in missing.items() if not without.isdisjoint(some)]
            rows = [self._answers.tokens(prompt) for prompt in some]
            depth = max((len(plan.attention) for plan in plans), default=1)
            for numbers, beginning in beginnings(self._model, rows, depth):
                shared = len(beginning.tokens) / len(numbers)
                for batch in self._batches([some[number] for number in numbers], {}):
                    drafts = self._answers.of_exits(batch, plans, beginning, shared)
                    full |= self._keep([draft for draft in drafts if draft.plan == full_plan], full, advance)
                    others = [draft for draft in drafts if draft.plan != full_plan]
                    self._keep([draft for draft in others if draft.prompt in missing[draft.plan]], full, advance)

    def _generate(self, missing: Missing, full: Full, advance: Advance) -> None:
        """Answers under shortened plans, compared with the full model's; or the full model's, where `full` is empty."""
        for plans, batch in self._alike(missing, full):
            self._finish([Draft(prompt, plan) for plan in plans for prompt in batch], full, advance)

    def _verify(self, missing: Missing, full: Full, advance: Advance) -> None:
        """All plans along the full model's answers at once; what that leaves undecided is generated."""
        for plans, batch in self._alike(missing, full):
            drafts: dict[bool, list[Draft]] = {True: [], False: []}
            for draft in self._answers.verified(batch, plans, full):
                drafts[self._answers.is_decided(draft.prompt, draft.ids, full[draft.prompt].answer)].append(draft)
            self._keep(drafts[True], full, advance)
            self._finish(drafts[False], full, advance)

    def _finish(self, drafts: Sequence[Draft], full: Full, advance: Advance) -> None:
        for finished in self._answers.generated(drafts, full) if drafts else ():
            self._keep(finished, full, advance)

    def _diverge(self, missing: Missing, full: Full, advance: Advance) -> None:
        """Labels of the judge `kl`: all plans along the full model's answers, nothing generated."""
        for plans, batch in self._alike(missing, full):
            start = time.perf_counter()
            found = diverge(
                self._model, [(self._answers.tokens(p), full[p].answer_ids) for p in batch], plans, self._healing
            )
            seconds = (time.perf_counter() - start) / (len(batch) * len(plans))
            labels = []
            for (prompt, row), plan in product(zip(batch, found, strict=True), plans):
                if math.isnan(score := row[plan].score):
                    self.failures.append(f"the judge {KL!r} failed on prompt {prompt.id!r}: the model's logits are NaN")
                draft = Draft(prompt, plan, row[plan].ids, row[plan].forward_tokens, seconds)
                labels.append(self._labelled(draft, CUT, score))
            self._store_labels(labels, advance)

    def _alike(self, missing: Missing, full: Full) -> Iterator[tuple[list[LayerPlan], list[Prompt]]]:
        """Batches of prompts that lack labels under the same plans, with these plans."""
        lacking: dict[Prompt, list[LayerPlan]] = defaultdict(list)
        for plan, prompts in missing.items():
            for prompt in prompts:
                lacking[prompt].append(plan)
        groups: dict[tuple[LayerPlan, ...], list[Prompt]] = defaultdict(list)
        for prompt, plans in lacking.items():
            groups[tuple(plans)].append(prompt)
        for alike, prompts in groups.items():
            yield from ((list(alike), batch) for batch in self._batches(prompts, full))

    def _batches(self, prompts: Sequence[Prompt], full: Full) -> Iterator[list[Prompt]]:
        """Batches of like prompts, longest first, so that too little memory shows at once.

        Like in length, so that little is padded, and in the power of two of the expected answer's length (the full
        model's, or the reference's as long as that is not known), since a batch decodes until its longest answer ends.
        """
        lengths = {prompt: len(self._answers.tokens(prompt)) for prompt in prompts}

        def expected(prompt: Prompt) -> int:
            return len(full[prompt].answer_ids if full else self._tokenizer(prompt.reference).input_ids)

        ordered = sorted(lengths, key=lambda prompt: (-expected(prompt).bit_length(), -lengths[prompt], prompt.id))
        return packed(ordered, lambda prompt: lengths[prompt] + self.decoding.max_new_tokens, self._batch_size)

    def _keep(self, drafts: Sequence[Draft], full: Full, advance: Advance) -> dict[Prompt, Label]:
        """Judge whole or decided answers, and store their labels; those by prompt, for drafts of one plan."""
        labels = {}
        for draft in drafts:
            text = self._answers.text(draft.ids)
            score = self._judged(draft.prompt, text, text if draft.plan.is_full else full[draft.prompt].answer)
            labels[draft.prompt, draft.plan] = self._labelled(draft, text, score)
        self._store_labels(list(labels.values()), advance)
        return {prompt: label for (prompt, _), label in labels.items()}

    def _store_labels(self, labels: Sequence[Label], advance: Advance) -> None:
        self._store.add(labels)
        advance(len(labels))

    def _judged(self, prompt: Prompt, answer: str, full_answer: str) -> float:
        """The score, or NaN where the judge fails, which is noted."""
        if prompt.judge == KL:
            return 1.0  # only the full plan has an answer of its own to judge, and it is compared with itself
        try:
            return prompt.score(answer, full_answer)
        except JudgeError as error:  # one prompt must not end a night's run
            self.failures.append(str(error))
            return float("nan")

    def _labelled(self, draft: Draft, answer: str, score: float) -> Label:
        return Label(
            model=self.model_key(draft.plan),
            prompt=draft.prompt.hash,
            plan=str(draft.plan),
            decoding=str(self.decoding),
            judge=judge_key(draft.prompt.judge),
            answer=answer,
            answer_ids=draft.ids,
            score=score,
            prompt_tokens=len(self._answers.tokens(draft.prompt)),
            forward_tokens=draft.forward_tokens,
            seconds=draft.seconds,
        )
