"""Prompts in, texts out. Large sets are allocated first, then generated in batches, as many as can be of one plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plans
from backbone.execution.prompt_prefix import Prefix, joined, replaying
from backbone.left_padding import by_tokens, in_halves, padded_inputs
from backbone.plan import LayerPlan
from oracle.chat import padded_prompts, tokens_of
from oracle.decoding import Decoding, cut_at_stop
from oracle.labels.generation import stop_token_ids
from runtime.generate_arguments import asked_for, warn_of_other_decoding
from runtime.parts import AllocatorParts
from runtime.plan_selection import Decision, PlanSelector, prompt_key
from runtime.step_costs import StepCosts, known_step_costs

PROBE_TOKENS = 2048
"""Prompt tokens, with padding, that are probed together: enough to fill a device, few enough to be of like length."""

KEPT_BYTES = 2 * 2**30
"""Main memory for the prefixes of prompts that wait; prompts beyond it run their first layers again."""

_SEVERAL_TOKENS_AT_ONCE = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
_ONE_ANSWER_A_PROMPT = (
    *("num_return_sequences", "cache", "past_key_values", "return_dict_in_generate", "streamer"),
    *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"),
)


@dataclass(frozen=True, slots=True)
class AllocatedText:
    """A generated text, the plan that it was generated with, and its tokens, special ones not counted."""

    text: str
    plan: LayerPlan
    tokens: int = 0


def generate_texts(
    generate: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
) -> list[AllocatedText]:
    """Continue each of `prompts` [B], rendered, as one batch, by `allocator.generate`."""
    inputs = padded_prompts(tokenizer, prompts).to(model.device)
    output = generate(
        model,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        return_dict_in_generate=True,
        **decoding_options(tokenizer, decoding),
    )
    assert not isinstance(output, torch.Tensor)
    return _described(tokenizer, output.sequences, inputs["input_ids"].shape[1], decoding, output["plans"])


def decoding_options(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> dict[str, Any]:
    """The arguments of `generate()` for the decoding that an allocator was made with."""
    return decoding.arguments(tokenizer, list(stop_token_ids(tokenizer, decoding)))


def new_texts(
    tokenizer: PreTrainedTokenizerBase, sequences: torch.Tensor, prompt_width: int, decoding: Decoding
) -> list[str]:
    """The texts that follow the prompts in sequences [B, S], cut at the stop string."""
    texts = tokenizer.batch_decode(sequences[:, prompt_width:], skip_special_tokens=True)
    return [cut_at_stop(text, decoding.stop) for text in texts]


def _described(
    tokenizer: PreTrainedTokenizerBase, sequences: torch.Tensor, prompt_width: int, decoding: Decoding, plans: Any
) -> list[AllocatedText]:
    texts, special = new_texts(tokenizer, sequences, prompt_width, decoding), {*tokenizer.all_special_ids}
    tokens = [sum(token not in special for token in row) for row in sequences[:, prompt_width:].tolist()]
    return [AllocatedText(*one) for one in zip(texts, plans, tokens, strict=True)]


def finished_texts(
    allocator: AllocatorParts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    *,
    batch_size: int,
    **options: Any,
) -> Iterator[list[tuple[int, AllocatedText]]]:
    """Continue prompts [N], rendered or as tokens, each under its own plan, in batches as `Composer` makes them.

    Batches go on from the kept prefixes of their prompts. A batch that does not fit into the device's memory is run
    half by half. `options` are arguments of `generate()`, in place of those of the allocator.

    Yields:
        For each batch its places in `prompts` with their texts.

    Raises:
        UnsupportedGenerationError: an option that would give other than one answer a prompt, or an empty prompt.
        WrongModelError: another model than the one this allocator was made for.
    """
    if not prompts:
        return
    tokens = [tokens_of(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    if empty := [index for index, ids in enumerate(tokens) if not ids]:
        raise UnsupportedGenerationError(f"prompt {empty[0]} is empty: there is nothing to continue")
    settings = _settings(allocator, model, tokenizer, options)
    _check(model, batch_size, settings)
    names = ("do_sample", "num_beams", "max_new_tokens", "stop_strings")
    warn_of_other_decoding(allocator, {name: asked_for(model, settings, name) for name in names})

    def run(part: Sequence[int]) -> list[tuple[int, AllocatedText]]:
        inputs = padded_inputs(model, [tokens[index] for index in part])
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        own = [plans[index] for index in part]
        with apply_plans(model, own, healing), kept.replayed(model, part, copies):
            output: torch.Tensor = model.generate(**inputs, **settings)  # type: ignore[operator]
        texts = _described(tokenizer, output, inputs["input_ids"].shape[1], allocator.decoding, own)
        return list(zip(part, texts, strict=True))

    copies = int(asked_for(model, settings, "num_beams") or 1)
    kept = _Kept(0 if any(asked_for(model, settings, name) for name in _SEVERAL_TOKENS_AT_ONCE) else KEPT_BYTES)
    healing = allocator.prepare(model)
    plans = _allocated(allocator, model, tokens, kept)
    n_new = int(asked_for(model, settings, "max_new_tokens") or allocator.decoding.max_new_tokens)
    batches = Composer(known_step_costs(model), plans, [len(ids) for ids in tokens], n_new)
    for part in batches.composed(batch_size):
        yield in_halves(part, run)
        for index in part:
            kept.rows.pop(index, None)


@dataclass(slots=True)
class _Kept:
    """What the first layers made of prompts that wait, by their place among all prompts."""

    room: int
    rows: dict[int, Prefix] = field(default_factory=dict)

    def keep(self, part: Sequence[int], prefix: Prefix, lengths: Sequence[int]) -> None:
        """Keep the prompts of a batch, if there is room for all of them."""
        if prefix.nbytes <= self.room:
            rows = prefix.by_row(lengths)
            self.room -= sum(row.nbytes for row in rows)
            self.rows.update(zip(part, rows, strict=True))

    def replayed(self, model: PreTrainedModel, part: Sequence[int], copies: int) -> AbstractContextManager[None]:
        """`replaying` for a batch, each prompt in as many rows as it has beams; nothing unless all of it is kept."""
        rows = [self.rows[index] for index in part if index in self.rows]
        if len(rows) < len(part):
            return nullcontext()
        repeated = torch.arange(len(part), device=model.device).repeat_interleave(copies)
        return replaying(model, joined(rows, model.device), repeated if copies > 1 else None, release=True)


def _settings(
    allocator: AllocatorParts, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of `generate()`: a configuration among the options counts more than the allocator's decoding."""
    config, calibrated = options.get("generation_config"), decoding_options(tokenizer, allocator.decoding)
    settings = {name: value for name, value in calibrated.items() if getattr(config, name, None) is None} | options
    if asked_for(model, settings, "stop_strings"):
        settings["tokenizer"] = tokenizer
    return settings


def _check(model: PreTrainedModel, batch_size: int, options: dict[str, Any]) -> None:
    if batch_size < 1:
        raise UnsupportedGenerationError(f"batch_size must be at least 1, got {batch_size}")
    for name in _ONE_ANSWER_A_PROMPT:
        value = asked_for(model, options, name)
        if value is not None and value is not False and not (name == "num_return_sequences" and value == 1):
            raise UnsupportedGenerationError(
                f"generate_many gives one text a prompt, which {name} does not fit; use allocator.generate"
            )


def _allocated(
    allocator: AllocatorParts, model: PreTrainedModel, tokens: list[list[int]], kept: _Kept
) -> list[LayerPlan]:
    """The plans of all prompts [N]; fills `kept`."""
    lengths = [len(ids) for ids in tokens]

    def decide(part: Sequence[int], selector: PlanSelector) -> Decision:
        rows = [tokens[index] for index in part]
        decision = selector.decide(model, **padded_inputs(model, rows), keep_cache=kept.room > 0)
        if decision.prefix is not None:
            kept.keep(part, decision.prefix, [len(row) for row in rows])
        return replace(decision, prefix=None)

    parts = by_tokens(range(len(tokens)), lengths, PROBE_TOKENS)
    chosen = allocator.selector().decide_in_parts(
        ((part, partial(decide, part)) for part in parts), [prompt_key(ids) for ids in tokens]
    )
    return [allocator.menu.plans[index] for index in chosen]


Batch = list[int]
"""Places of prompts that run together."""


@dataclass(frozen=True, slots=True)
class Composer:
    """Composes batches of N prompts by plan and length, by what their passes cost.

    A batch of one plan reads only the weights of its layers, a mixed one those of its deepest row; prompts of like
    length save padding. So full batches of one plan come first, and the rest runs alone or with others, as is faster.

    Attributes:
        costs: of the model's passes; estimated ones serve, since only their ratios count.
        plans: of the prompts.
        lengths: tokens of the prompts.
        new_tokens: that each prompt is answered with, at most.
    """

    costs: StepCosts
    plans: Sequence[LayerPlan]
    lengths: Sequence[int]
    new_tokens: int

    def composed(self, batch_size: int) -> list[Batch]:
        """All prompts in batches of at most `batch_size`: of three ways the one that takes the least time.

        The deepest plans and the longest prompts come first, so that too little memory shows at once. Within a batch
        rows lie by depth, so that those that run a layer are neighbours.
        """
        by_plan: dict[LayerPlan, Batch] = {}
        for place in self._deepest_first(range(len(self.plans))):
            by_plan.setdefault(self.plans[place], []).append(place)
        full: list[Batch] = []
        left: list[Batch] = []
        for places in by_plan.values():
            parts = _parts(places, batch_size)
            (full if len(parts[-1]) == batch_size else left).append(parts.pop())
            full += parts
        by_length = sorted(range(len(self.plans)), key=lambda place: -self.lengths[place])
        ways = (
            full + self._merged(left, batch_size),
            full + _parts([place for places in left for place in places], batch_size),
            _parts(by_length, batch_size),
        )
        best = min(ways, key=lambda way: sum(map(self.ms, way)))
        ordered = [self._deepest_first(batch) for batch in best]
        return sorted(ordered, key=lambda batch: self._depth_and_length(batch[0]))

    def ms(self, batch: Sequence[int]) -> float:
        """Milliseconds of a batch: a pass over its padded prompts and one for each further token."""
        plans = [self.plans[place] for place in batch]
        runs = [[(i in plan.attention) + (i in plan.mlp) for i in range(plan.n_layers)] for plan in plans]
        rows, longest = np.sum(runs, axis=0) / 2, max(self.lengths[place] for place in batch)
        steps = (self.new_tokens - 1) * self.costs.mixed_ms(len(batch), rows)
        return self.costs.mixed_ms(len(batch) * longest, rows * longest) + steps

    def _merged(self, batches: Iterable[Batch], batch_size: int) -> list[Batch]:
        """Batches, of which pairs are put together as long as that saves time, the pair that saves most first."""
        found = {tuple(batch): self.ms(batch) for batch in batches}
        while True:
            pairs = [(a, b, (*a, *b)) for a, b in combinations(found, 2) if len(a) + len(b) <= batch_size]
            saved = {pair: found[pair[0]] + found[pair[1]] - self.ms(pair[2]) for pair in pairs}
            best = max(saved, key=lambda pair: saved[pair], default=None)
            if best is None or saved[best] <= 0:
                return [list(batch) for batch in found]
            first, second, both = best
            found[both] = found.pop(first) + found.pop(second) - saved[best]

    def _deepest_first(self, places: Iterable[int]) -> Batch:
        return sorted(places, key=self._depth_and_length)

    def _depth_and_length(self, place: int) -> tuple[float, str, int]:
        return -self.plans[place].layers, str(self.plans[place]), -self.lengths[place]


def _parts(places: Batch, size: int) -> list[Batch]:
    return [places[start : start + size] for start in range(0, len(places), size)]
