"""Answers to a batch of prompts under one plan or several, by the model's stock `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from backbone.execution.apply_plan import apply_plan
from backbone.execution.prompt_prefix import Prefix, replaying, run_prefix
from backbone.execution.shared_passes import unchanged_depth
from backbone.families import decoder_of
from backbone.healing.healing import ReadyHealing
from backbone.left_padding import in_halves, position_inputs
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.decoding import Decoding, cut_at_stop

Enough = Callable[[list[int]], bool]
"""Whether the tokens generated for one sequence so far are all that is needed of it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its text cut at the stop string, all tokens generated for it, and the prompt's length."""

    text: str
    token_ids: list[int]
    prompt_tokens: int


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    plan: LayerPlan,
    decoding: Decoding,
    healing: ReadyHealing | None = None,
) -> list[Answer]:
    """The answers to `prompts` [B], generated as one left-padded batch under `plan`, with its healing."""
    prompt_ids = [tokens_of(tokenizer, text) for text in prompts]
    batch = SharedBatch(model, tokenizer, prompt_ids, [plan], decoding, healing)
    generated = batch.continued(plan, dict.fromkeys(range(len(prompts)), never), decoding.max_new_tokens)
    return [
        Answer(answer_text(tokenizer, ids, decoding), ids, len(prompt))
        for prompt, ids in zip(prompt_ids, generated, strict=True)
    ]


class SharedBatch:
    """B sequences as one left-padded batch, which is continued under one plan after another.

    What the first layers make of the sequences is computed once, as far as all plans run them whole and unchanged.

    Args:
        token_ids: of the sequences.
        plans: all under which they will be continued.
        decoding: what the model's generation config says is put in.
        healing: what shortened plans run with.

    Attributes:
        depth: the layers that are computed once; 0 for one plan, and where there is no memory to keep their states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        token_ids: Sequence[list[int]],
        plans: Sequence[LayerPlan],
        decoding: Decoding,
        healing: ReadyHealing | None = None,
    ) -> None:
        self._model, self._healing = model, healing
        decoding = decoding.of(model, tokenizer)
        self._stops = stop_token_ids(tokenizer, decoding)
        self._options = decoding.arguments(tokenizer, list(self._stops))
        inputs = tokenizer.pad({"input_ids": list(token_ids)}, return_tensors="pt", padding_side="left")
        self._ids, self._mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
        self.depth = unchanged_depth(plans, healing) if len(plans) > 1 else 0
        self._prefix: Prefix | None = None
        if self.depth:
            positions = position_inputs(decoder_of(model), self._mask)
            try:
                prefix = run_prefix(model, self._ids, self._mask, self.depth, keep_cache=True, **positions)
                self._prefix = replace(prefix, states=prefix.states[-1:])
            except torch.OutOfMemoryError:
                self.depth = 0

    def continued(self, plan: LayerPlan, enough: Mapping[int, Enough], max_new_tokens: int) -> list[list[int]]:
        """What follows some of the sequences, up to and with the first token that stops or after which there are
        enough; in smaller batches where memory does not suffice. What the model's generation config says counts too.

        Args:
            plan: one of those given.
            enough: numbers of the sequences, and for each when to end it.
            max_new_tokens: new tokens of each, at most.
        """
        return in_halves(list(enough.items()), lambda part: self._generate(plan, dict(part), max_new_tokens))

    def _generate(self, plan: LayerPlan, enough: Mapping[int, Enough], max_new_tokens: int) -> list[list[int]]:
        rows, width = torch.tensor(list(enough), device=self._model.device), self._ids.shape[1]
        ends = _RowEnds(list(enough.values()), width)
        replayed = nullcontext() if self._prefix is None else replaying(self._model, self._prefix, rows)
        with apply_plan(self._model, plan, self._healing), replayed:
            output = self._model.generate(  # type: ignore[operator]
                input_ids=self._ids[rows],
                attention_mask=self._mask[rows],
                stopping_criteria=StoppingCriteriaList([] if set(enough.values()) == {never} else [ends]),
                **{**self._options, "max_new_tokens": max_new_tokens},
            )
        new = output[:, width:].tolist()
        return [_until(ids[:length], self._stops) for ids, length in zip(new, ends.lengths, strict=True)]


def never(ids: list[int]) -> bool:
    """Generate to the answer's end."""
    return False


class _RowEnds(StoppingCriteria):
    """Ends each row of a batch as soon as its own condition holds; `generate()` fills it up with padding from there.

    Attributes:
        lengths: new tokens of each row when its condition came to hold; None where it has not.
    """

    def __init__(self, conditions: Sequence[Enough], prompt_width: int) -> None:
        self._conditions, self._width = conditions, prompt_width
        self.lengths: list[int | None] = [None] * len(conditions)

    def __call__(self, input_ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self._width :].tolist()):
            if self.lengths[row] is None and self._conditions[row](ids):
                self.lengths[row] = len(ids)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


def _until(ids: list[int], stops: frozenset[int]) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))]


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], decoding: Decoding) -> str:
    """The text of an answer's tokens, cut at the stop string."""
    return cut_at_stop(str(tokenizer.decode(list(ids), skip_special_tokens=True)), decoding.stop)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> frozenset[int]:
    """The end-of-text tokens, the other end tokens, and every token whose text contains a stop string.

    As `generate()`'s own `stop_strings`, but free of its cost: with a vocabulary of 262,144 that triples the time of
    a decoding step on a CPU. A stop string that is spread over several tokens ends the text, not the generation.
    """
    return _stop_token_ids(tokenizer, decoding.stop) | frozenset(decoding.ends)


@lru_cache(maxsize=8)
def _stop_token_ids(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> frozenset[int]:
    ends = tokenizer.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends])
    if stop:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        found |= {i for i, text in enumerate(texts) if any(string in text for string in stop)}
    return frozenset(found)
