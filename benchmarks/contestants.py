"""Our own ways to answer the prompts of benchmarks/runtime.py. Shapes: `N` prompts, `T` new tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import Answers, FirstTokens
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.apply_plan import apply_plan
from backbone.execution.delete_layers import delete_layers
from backbone.left_padding import padded_inputs
from backbone.plan import LayerPlan
from oracle.decoding import cut_at_stop
from oracle.labels.generate_answers import stop_token_ids
from oracle.prompts import Prompt
from runtime.allocator import Allocator
from runtime.device_clock import Moment
from runtime.generation import decode_in_lanes
from runtime.lanes import Lane, lane_a_plan, least_time_lanes
from runtime.request import Request
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
        self._texts = [prompt.prompt for prompt in prompts]
        self._tokens = [list(ids) for ids in tokenizer(self._texts)["input_ids"]]
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
        if answers.texts:
            return answers.texts
        kept = [self._ended(row) for row in answers.tokens]
        decoded = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [cut_at_stop(text, self.allocator.decoding.stop) for text in decoded]

    def _ended(self, tokens: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens) - 1)
        return tokens[: end + 1]

    def online(self, batches: Sequence[Places], size: int) -> dict[str, Callable[[], Answers]]:
        """Batches as they come. The ideal makes its own, of one plan each and of at most `size` prompts."""
        lanes = [self._lanes(batch) for batch in batches]
        places = [place for batch in batches for place in batch]
        groups = self._of_one_plan(places, size)
        for plan, _ in groups:
            self._without(plan)
        lossless = {"lossless": lambda: self._joined(batches, self._lossless)} if size == 1 else {}
        return {
            "stock": lambda: self._joined(batches, lambda batch: self._stock(self.model, batch)),
            "static": lambda: self._joined(batches, self._static),
            "allocator": lambda: self._joined(batches, self._allocated),
            "known": lambda: self._joined(batches, lambda batch: self._known(batch, lanes[batches.index(batch)])),
            "ideal": lambda: self._ideal(groups),
            **lossless,
        }

    def offline(self) -> dict[str, Callable[[], Answers]]:
        """All prompts at once, in batches of 32, the longest first."""
        longest = sorted(range(len(self._tokens)), key=lambda place: -len(self._tokens[place]))
        batches = [longest[start : start + 32] for start in range(0, len(longest), 32)]
        lanes = self._offline_lanes()
        groups = self._of_one_plan(longest, 32)
        for plan, _ in groups:
            self._without(plan)

        texts = self._many()  # with answers that end by themselves

        def allocated() -> Answers:
            self._many(eos_token_id=None)
            return Answers(texts=texts)

        return {
            "stock": lambda: self._joined(batches, lambda batch: self._stock(self.model, batch)),
            "static": lambda: self._joined(batches, self._static),
            "allocator": allocated,
            "known": lambda: self._ideal(lanes, planned=True),
            "ideal": lambda: self._ideal(groups),
        }

    def differing(self) -> dict[str, Any]:
        """The prompts as one batch, every row under exactly its own plan, against each prompt alone under it."""
        every = range(len(self._tokens))
        inputs = self.batch(every)
        together = self.allocator.generate(self.model, **inputs, **self._exact, round_up=False)
        assert isinstance(together, torch.Tensor)
        rows = together[:, inputs["input_ids"].shape[1] :].tolist()
        differing, ties = 0, 0
        for place, plan in zip(every, self.plans, strict=True):
            with apply_plan(self.model, plan):
                alone = self.model.generate(
                    **self.batch([place]), **self._exact, return_dict_in_generate=True, output_logits=True
                )
            tokens = alone.sequences[0, -len(rows[place]) :].tolist()
            parted = [step for step, pair in enumerate(zip(tokens, rows[place], strict=True)) if pair[0] != pair[1]]
            differing += len(parted)
            ties += bool(parted) and self._nearly_tied(
                alone.logits[parted[0]][0], tokens[parted[0]], rows[place][parted[0]]
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
        with apply_plan(self.model, self.static):
            return self._stock(self.model, places)

    def _allocated(self, places: Places, custom_generate: Any = None) -> Answers:
        inputs = self.batch(places)
        output = self.model.generate(  # type: ignore[operator]
            **inputs, **self._exact, return_dict_in_generate=True, custom_generate=custom_generate or self.allocator
        )
        return Answers(
            output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), list(output["time_to_first_token_ms"])
        )

    def _lossless(self, places: Places) -> Answers:
        inputs = self.batch(places)
        output = self.allocator.generate(
            self.model, **inputs, **self._exact, return_dict_in_generate=True, lossless=True
        )
        assert not isinstance(output, torch.Tensor)
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return Answers(new, list(output["time_to_first_token_ms"]), acceptance=[output["acceptance"]])

    def _known(self, places: Places, lanes: Sequence[Lane]) -> Answers:
        """All that the allocator does but the decision: no probe, so no prefix to go on from."""

        def loop(
            model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kw: Any
        ) -> Any:
            start = Moment(model.device)
            arguments = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            request = Request(model, input_ids, generation_config, kw, arguments)
            output, first_token_ms = decode_in_lanes(request, lanes, None, start)
            output["time_to_first_token_ms"] = first_token_ms
            return output

        return self._allocated(places, loop)

    def _lanes(self, places: Places) -> list[Lane]:
        """The lanes that the allocator would make of a batch."""
        width = max(len(self._tokens[place]) for place in places)
        lane_ms = known_step_costs(self.model).generation_ms(width, self._exact["max_new_tokens"], 1)
        return least_time_lanes(self.allocator.menu, [self.chosen[place] for place in places], lane_ms)

    def _offline_lanes(self) -> list[tuple[LayerPlan, Places]]:
        lengths = [len(ids) for ids in self._tokens]
        lane_ms = known_step_costs(self.model).generation_ms(
            sum(lengths) // len(lengths), self._exact["max_new_tokens"], 1
        )
        lanes = least_time_lanes(self.allocator.menu, self.chosen, lane_ms, max_prompts=32, sizes=lengths)
        return [group for lane in reversed(lanes) for group in _cut(lane, lengths, 32)]

    def _of_one_plan(self, places: Places, size: int) -> list[tuple[LayerPlan, Places]]:
        lengths = [len(self._tokens[place]) for place in places]
        lanes = lane_a_plan(self.allocator.menu, [self.chosen[place] for place in places])
        cut = [group for lane in lanes for group in _cut(lane, lengths, size)]
        return [(plan, [places[at] for at in group]) for plan, group in cut]

    def _ideal(self, groups: Sequence[tuple[LayerPlan, Places]], *, planned: bool = False) -> Answers:
        answers: dict[int, tuple[list[int], float]] = {}
        for plan, places in groups:
            if planned:
                with apply_plan(self.model, plan):
                    found = self._stock(self.model, places)
            else:
                found = self._stock(self._without(plan), places)
            answers.update(zip(places, zip(found.tokens, found.first_token_ms, strict=True), strict=True))
        ordered = [answers[place] for place in sorted(answers)]
        return Answers([tokens for tokens, _ in ordered], [ms for _, ms in ordered])

    def _without(self, plan: LayerPlan) -> PreTrainedModel:
        """The model with the layers left out by the plan deleted; a layer of which one sub-layer runs stays whole."""
        whole = LayerPlan.skipping(plan.n_layers, plan.skipped_layers)
        if plan not in self._deleted:
            self._deleted[plan] = delete_layers(self.model, whole)
        return self._deleted[plan]

    def _many(self, **options: Any) -> list[str]:
        found = self.allocator.generate_many(
            self.model, self.tokenizer, self._texts, batch_size=32, **{**self._exact, **options}
        )
        return [answer.text for answer in found]

    def _joined(self, batches: Sequence[Places], answer: Callable[[Places], Answers]) -> Answers:
        found: dict[int, tuple[list[int], float]] = {}
        acceptance: list[float | None] = []
        for batch in batches:
            one = answer(batch)
            acceptance += one.acceptance
            found.update(zip(batch, zip(one.tokens, one.first_token_ms, strict=True), strict=True))
        ordered = [found[place] for place in sorted(found)]
        return Answers([tokens for tokens, _ in ordered], [ms for _, ms in ordered], acceptance=acceptance)


def _cut(lane: Lane, lengths: Sequence[int], size: int) -> list[tuple[LayerPlan, Places]]:
    """The prompts of a lane in batches of at most `size`, the longest first."""
    longest = sorted(lane.prompts, key=lambda place: -lengths[place])
    return [(lane.plan, longest[start : start + size]) for start in range(0, len(longest), size)]
