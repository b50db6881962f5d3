"""Our own ways to answer the prompts of benchmarks/end_to_end.py. Shapes: `N` prompts, `T` new tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import Answers, FirstTokens
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.apply_plan import apply_plan, apply_plans
from backbone.execution.delete_layers import delete_layers
from backbone.left_padding import padded_inputs
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.decoding import cut_at_stop
from oracle.labels.generation import stop_token_ids
from oracle.prompts import Prompt
from runtime.allocator import Allocator
from runtime.offline import Composer
from runtime.step_costs import known_step_costs

NEAR_TIE = 2
"""Two scores nearer than so many units in the last place of the larger may change places with the shape of a batch."""

Places = Sequence[int]


class Contest:
    """N prompts, the plans that the allocator gives them, and ways to answer them with exactly T tokens each.

    Attributes:
        chosen: the plan of each prompt in the menu, as `allocator.allocate` finds it.
        static: the plan of the menu whose budget is nearest to the mean of those.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        allocator: Allocator,
        prompts: Sequence[Prompt],
        new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.allocator = model, tokenizer, allocator
        self._texts = [allocator.rendered(tokenizer, prompt.prompt) for prompt in prompts]
        self._tokens = [tokens_of(tokenizer, text) for text in self._texts]
        self._ends = stop_token_ids(tokenizer, allocator.decoding)
        self._exact = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        allocator.measure(model)
        self.chosen = [
            allocator.menu.plans.index(allocator.allocate(model, **self.batch([i]))[0]) for i in range(len(prompts))
        ]
        budgets = allocator.menu.budgets
        mean = sum(budgets[index] for index in self.chosen) / len(prompts)
        self.static = allocator.menu.plans[min(range(len(budgets)), key=lambda i: (abs(budgets[i] - mean), -i))]
        self._deleted: dict[LayerPlan, PreTrainedModel] = {}

    @property
    def plans(self) -> list[LayerPlan]:
        return [self.allocator.menu.plans[index] for index in self.chosen]

    def batch(self, places: Places) -> dict[str, torch.Tensor]:
        inputs = padded_inputs(self.model, [self._tokens[place] for place in places])
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def texts(self, answers: Answers) -> list[str]:
        """What a user would read: up to the first token that ends an answer, and to the stop string."""
        kept = [self._ended(row) for row in answers.tokens]
        decoded = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [cut_at_stop(text, self.allocator.decoding.stop) for text in decoded]

    def _ended(self, tokens: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens) - 1)
        return tokens[: end + 1]

    def online(self, batches: Sequence[Places], size: int) -> dict[str, Callable[[], Answers]]:
        """Batches as they come. The ideal makes its own, of one plan each and of at most `size` prompts."""
        places = [place for batch in batches for place in batch]
        groups = self._of_one_plan(places, size)
        for plan, _ in groups:
            self._without(plan)
        lossless = {"lossless": lambda: self._joined(batches, self._lossless)} if size == 1 else {}
        return {
            "stock": lambda: self._joined(batches, lambda batch: self._stock(self.model, batch)),
            "static": lambda: self._joined(batches, self._static),
            "allocator": lambda: self._joined(batches, self._allocated),
            "known": lambda: self._joined(batches, self._known),
            "ideal": lambda: self._ideal(groups),
            **lossless,
        }

    def offline(self) -> dict[str, Callable[[], Answers]]:
        """All prompts at once, in batches of 32, the longest first.

        The allocator gives texts and no tokens; its answers are those of `known`, which has its plans and batches.
        """
        longest = sorted(range(len(self._tokens)), key=lambda place: -len(self._tokens[place]))
        batches = [longest[start : start + 32] for start in range(0, len(longest), 32)]
        lengths = [len(ids) for ids in self._tokens]
        composer = Composer(known_step_costs(self.model), self.plans, lengths, self._exact["max_new_tokens"])
        parts = composer.composed(32)
        groups = self._of_one_plan(longest, 32)
        for plan, _ in groups:
            self._without(plan)

        def allocated() -> Answers:
            self.allocator.generate_many(
                self.model, self.tokenizer, self._texts, batch_size=32, eos_token_id=None, **self._exact
            )
            return Answers()

        return {
            "stock": lambda: self._joined(batches, lambda batch: self._stock(self.model, batch)),
            "static": lambda: self._joined(batches, self._static),
            "allocator": allocated,
            "known": lambda: self._joined(parts, self._known),
            "ideal": lambda: self._ideal(groups),
        }

    def differing(self, count: int) -> dict[str, Any]:
        """The first prompts as one batch, every row under its own plan, against each prompt alone under it."""
        every = range(min(count, len(self._tokens)))
        inputs = self.batch(every)
        together = self.allocator.generate(self.model, **inputs, **self._exact)
        assert isinstance(together, torch.Tensor)
        rows = together[:, inputs["input_ids"].shape[1] :].tolist()
        differing, ties = 0, 0
        for place, plan in zip(every, self.plans, strict=False):
            with apply_plan(self.model, plan, self.allocator.healing):
                alone = self.model.generate(
                    **self.batch([place]), **self._exact, return_dict_in_generate=True, output_logits=True
                )
            tokens = alone.sequences[0, -len(rows[place]) :].tolist()
            others = [step for step, pair in enumerate(zip(tokens, rows[place], strict=True)) if pair[0] != pair[1]]
            differing += len(others)
            ties += bool(others) and self._nearly_tied(
                alone.logits[others[0]][0], tokens[others[0]], rows[place][others[0]]
            )
        return {"rows": len(rows), "tokens": differing, "rows_parted_at_a_near_tie": ties}

    def _nearly_tied(self, logits: torch.Tensor, one: int, other: int) -> bool:
        """Whether two tokens score within a few units in the last place of the model's number format."""
        unit = torch.finfo(self.model.dtype).eps * float(logits.max().abs())
        return float((logits[one] - logits[other]).abs()) <= NEAR_TIE * unit

    def _stock(self, model: PreTrainedModel, places: Places) -> Answers:
        inputs = self.batch(places)
        clock = FirstTokens(time.perf_counter())
        output = model.generate(**inputs, **self._exact, stopping_criteria=[clock])  # type: ignore[operator]
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        return Answers(new, [clock.ms or 0.0] * len(new))

    def _static(self, places: Places) -> Answers:
        with apply_plan(self.model, self.static, self.allocator.healing):
            return self._stock(self.model, places)

    def _allocated(self, places: Places) -> Answers:
        inputs = self.batch(places)
        output = self.model.generate(  # type: ignore[operator]
            **inputs, **self._exact, return_dict_in_generate=True, custom_generate=self.allocator
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return Answers(new, [1000 * output.first_token_s] * len(new))

    def _lossless(self, places: Places) -> Answers:
        inputs = self.batch(places)
        output = self.allocator.generate(
            self.model, **inputs, **self._exact, return_dict_in_generate=True, lossless=True
        )
        assert not isinstance(output, torch.Tensor)
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return Answers(new, [1000 * output.first_token_s], acceptance=[output.acceptance])

    def _known(self, places: Places) -> Answers:
        """All that the allocator does but the decision: no probe, so no prefix to go on from."""
        with apply_plans(self.model, [self.plans[place] for place in places], self.allocator.healing):
            return self._stock(self.model, places)

    def _of_one_plan(self, places: Places, size: int) -> list[tuple[LayerPlan, Places]]:
        """The places in batches of one plan and at most `size` prompts, the longest first."""
        groups = []
        for plan in dict.fromkeys(self.plans[place] for place in places):
            own = [place for place in places if self.plans[place] == plan]
            longest = sorted(own, key=lambda place: -len(self._tokens[place]))
            groups += [(plan, longest[start : start + size]) for start in range(0, len(longest), size)]
        return groups

    def _ideal(self, groups: Sequence[tuple[LayerPlan, Places]]) -> Answers:
        plans = {tuple(places): plan for plan, places in groups}
        batches = [places for _, places in groups]
        return self._joined(batches, lambda places: self._stock(self._without(plans[tuple(places)]), places))

    def _without(self, plan: LayerPlan) -> PreTrainedModel:
        """The model with the layers left out by the plan deleted; a layer of which one sub-layer runs stays whole."""
        whole = LayerPlan.skipping(plan.n_layers, plan.skipped_layers)
        if plan not in self._deleted:
            self._deleted[plan] = delete_layers(self.model, whole)
        return self._deleted[plan]

    def _joined(self, batches: Sequence[Places], answer: Callable[[Places], Answers]) -> Answers:
        found: dict[int, tuple[list[int], float]] = {}
        acceptance: list[float | None] = []
        for batch in batches:
            one = answer(batch)
            acceptance += one.acceptance
            found.update(zip(batch, zip(one.tokens, one.first_token_ms, strict=True), strict=True))
        ordered = [found[place] for place in sorted(found)]
        return Answers([tokens for tokens, _ in ordered], [ms for _, ms in ordered], acceptance=acceptance)
