"""Large sets of prompts: all are allocated first, then generated in batches, as many as can be of one plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.apply_plan import apply_plans
from backbone.execution.prompt_prefix import Prefix, joined, replaying
from backbone.families import check_is_model
from backbone.left_padding import by_tokens, in_halves, padded_inputs
from backbone.plan import LayerPlan
from oracle.chat import ChatError, Turns, tokens_of
from runtime.call_arguments import UnsupportedGenerationError, asked_for
from runtime.certified_decoding import warn_of_other_decoding
from runtime.composing import Composer
from runtime.parts import AllocatorParts, Prompts, check_is_tokenizer, listed
from runtime.plan_selection import Decision, PlanSelector, prompt_key
from runtime.step_costs import known_step_costs
from runtime.texts import AllocatedText, decoding_options, new_texts

PROBE_TOKENS = 2048
"""Prompt tokens, with padding, that are probed together: enough to fill a device, few enough to be of like length."""

KEPT_BYTES = 2 * 2**30
"""Main memory for what the first layers made of prompts that wait to be answered; prompts for which it does not suffice
run these layers again."""

_SEVERAL_TOKENS_AT_ONCE = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
_ONE_ANSWER_A_PROMPT = (
    *("num_return_sequences", "cache", "past_key_values", "return_dict_in_generate", "streamer"),
    *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"),
)


def finished_texts(
    allocator: AllocatorParts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    **options: Any,
) -> Iterator[list[tuple[int, AllocatedText]]]:
    """Continue rendered prompts [N], each under its own plan, in batches as `Composer` makes them.

    Batches go on from what the first layers made of their prompts when these were allocated, as far as `KEPT_BYTES`
    suffice. A batch for which the device's memory does not suffice is run half by half.

    Args:
        model, tokenizer: what answers.
        batch_size: prompts generated together, at most.
        options: arguments of `generate()`, in place of those that the allocator was calibrated with.

    Yields:
        For each batch its places in `prompts` with their texts.

    Raises:
        UnsupportedGenerationError: an option that would give other than one answer a prompt, or an empty prompt.
        WrongModelError: another model than the one this allocator was made for.
    """
    if not prompts:
        return
    tokens = [tokens_of(tokenizer, text) for text in prompts]
    if empty := [index for index, ids in enumerate(tokens) if not ids]:
        raise UnsupportedGenerationError(f"prompt {empty[0]} is empty: there is nothing to continue")
    settings = _settings(allocator, model, tokenizer, options)
    _check(model, batch_size, settings)
    names = ("do_sample", "num_beams", "max_new_tokens", "stop_strings")
    warn_of_other_decoding(allocator, {name: asked_for(model, settings, name) for name in names})

    def run(part: Sequence[int]) -> list[tuple[int, AllocatedText]]:
        inputs = padded_inputs(model, [tokens[index] for index in part])
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with apply_plans(model, [plans[index] for index in part]), kept.replayed(model, part, copies):
            output: torch.Tensor = model.generate(**inputs, **settings)  # type: ignore[operator]
        texts = new_texts(tokenizer, output, inputs["input_ids"].shape[1], allocator.decoding)
        return [(index, AllocatedText(text, plans[index])) for index, text in zip(part, texts, strict=True)]

    copies = int(asked_for(model, settings, "num_beams") or 1)
    kept = _Kept(0 if any(asked_for(model, settings, name) for name in _SEVERAL_TOKENS_AT_ONCE) else KEPT_BYTES)
    plans = _allocated(allocator, model, tokens, kept)
    n_new = int(asked_for(model, settings, "max_new_tokens") or allocator.decoding.max_new_tokens)
    batches = Composer(known_step_costs(model), plans, [len(ids) for ids in tokens], n_new)
    for part in batches.composed(batch_size):
        yield in_halves(part, run)
        kept.drop(part)


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

    def drop(self, part: Sequence[int]) -> None:
        for index in part:
            self.rows.pop(index, None)


def generate_many(
    allocator: AllocatorParts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    raw: bool,
    batch_size: int,
    advance: Callable[[int], None],
    **options: Any,
) -> list[AllocatedText]:
    """See `Allocator.generate_many`."""
    check_is_model(model)
    check_is_tokenizer(tokenizer)
    texts: dict[int, AllocatedText] = {}
    given = [_rendered(allocator, tokenizer, number, prompt, raw) for number, prompt in enumerate(listed(prompts))]
    for batch in finished_texts(allocator, model, tokenizer, given, batch_size=batch_size, **options):
        texts.update(batch)
        advance(len(batch))
    return [texts[index] for index in range(len(given))]


def _rendered(
    allocator: AllocatorParts, tokenizer: PreTrainedTokenizerBase, number: int, prompt: str | Turns, raw: bool
) -> str:
    try:
        return allocator.rendered(tokenizer, prompt, raw=raw)
    except ChatError as error:
        raise UnsupportedGenerationError(f"prompt {number}: {error}") from None


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

    allocator.prepare(model)
    parts = by_tokens(range(len(tokens)), lengths, PROBE_TOKENS)
    chosen = allocator.selector().decide_in_parts(
        ((part, partial(decide, part)) for part in parts), [prompt_key(ids) for ids in tokens]
    )
    return [allocator.menu.plans[index] for index in chosen]
