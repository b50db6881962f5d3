"""What healing parts are made from: prompts with the full model's own answers, or with their references."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from backbone.healing.training_targets import Example
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.decoding import Decoding
from oracle.labels.labeller import Advance
from oracle.labels.reader import Key, key_of
from oracle.labels.store import Label
from oracle.prompts import Prompt


class FullAnswers(Protocol):
    """A labeller, in this process or elsewhere."""

    def label_full(self, prompts: Sequence[Prompt], full_plan: LayerPlan, advance: Advance) -> None: ...

    def labels(self, plan: LayerPlan, prompts: Iterable[Prompt]) -> dict[Key, Label]: ...


def answered_examples(
    labeller: FullAnswers,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    full_plan: LayerPlan,
    advance: Advance = lambda done: None,
) -> list[Example]:
    """Prompts with the full model's answers, which are labels; what is missing of them is made."""
    labeller.label_full(prompts, full_plan, advance)
    labels = labeller.labels(full_plan, prompts)
    answers = [labels[key_of(prompt)].answer_ids for prompt in prompts]
    return [
        Example((*tokens_of(tokenizer, prompt.prompt), *answer), len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def reference_examples(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], decoding: Decoding
) -> list[Example]:
    """Prompts with their references, where they have one, ended as the model's own answers end."""
    examples = []
    for prompt in prompts:
        if prompt.reference:
            text = f"{'' if prompt.template else ' '}{prompt.reference}" + (decoding.stop[0] if decoding.stop else "")
            ids = tokenizer(text, add_special_tokens=False).input_ids
            ids = ids if decoding.stop else [*ids, tokenizer.eos_token_id]
            ids = ids[: decoding.max_new_tokens]
            examples.append(Example((*tokens_of(tokenizer, prompt.prompt), *ids), len(ids), from_reference=True))
    return examples
