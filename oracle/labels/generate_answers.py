"""Generate the answers to a batch of prompts under one plan, with the model's stock `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from backbone.execution.apply_plan import apply_plan
from backbone.left_padding import in_halves
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
) -> list[Answer]:
    """The answers to `prompts` [B], generated as one left-padded batch under `plan`."""
    prompt_ids = [tokens_of(tokenizer, text) for text in prompts]
    generated = continue_batch(model, tokenizer, prompt_ids, plan, decoding, decoding.max_new_tokens)
    return [
        Answer(answer_text(tokenizer, ids, decoding), ids, len(prompt))
        for prompt, ids in zip(prompt_ids, generated, strict=True)
    ]


def continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[list[int]],
    plan: LayerPlan,
    decoding: Decoding,
    max_new_tokens: int,
    enough: Sequence[Enough] | None = None,
) -> list[list[int]]:
    """The tokens that follow each of B sequences, up to and with the first that stops or after which there are
    `enough` (one condition a sequence); in smaller batches where memory does not suffice. What the model's generation
    config says counts too."""
    decoding = decoding.of(model, tokenizer)
    stops = stop_token_ids(tokenizer, decoding)
    options = {**decoding.arguments(tokenizer, list(stops)), "max_new_tokens": max_new_tokens}

    def generate(part: Sequence[tuple[list[int], Enough]]) -> list[list[int]]:
        sequences = [sequence for sequence, _ in part]
        inputs = tokenizer.pad({"input_ids": sequences}, return_tensors="pt", padding_side="left").to(model.device)
        ends = _RowEnds([condition for _, condition in part], inputs["input_ids"].shape[1])
        with apply_plan(model, plan):
            output = model.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                stopping_criteria=StoppingCriteriaList([ends] if enough else []),
                **options,
            )
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_until(ids[:length], stops) for ids, length in zip(rows, ends.lengths, strict=True)]

    return in_halves(list(zip(token_ids, enough or [_never] * len(token_ids), strict=True)), generate)


def _never(ids: list[int]) -> bool:
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
