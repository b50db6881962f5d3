"""How far does a plan follow the full model's answer? Greedy decoding need not be run to know.

If, over the full model's answer, the plan's arg-max is the answer's next token at each of the first n places, then the
plan, decoding by itself, would have produced these n tokens and then its own next one. One pass over the known answer
finds n, as a pass of the large model verifies a draft in speculative decoding (Leviathan et al. 2023, arXiv 2211.17192,
section 2). Plans that begin with the same layers share those layers' computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.shared_passes import SharedPasses, sharing_order
from backbone.left_padding import in_halves, memory_budget
from backbone.plan import LayerPlan
from oracle.labels.teacher_forcing import ForcedAnswers

Forced = tuple[str, Sequence[int]]
"""A prompt and its known answer."""

LOGITS_BYTES = 2**28
"""Logits of one pass, at most; with a large vocabulary they outweigh everything else."""


@dataclass(frozen=True, slots=True)
class Followed:
    """One plan along one known answer.

    Attributes:
        matches: for each token of the answer, whether the plan would say it there.
        token: the plan's own token at the first place where it would not; None where it repeats the whole answer.
        forward_tokens: tokens passed through the network, each weighted by the share of the layers that it passed.
    """

    matches: tuple[bool, ...]
    token: int | None
    forward_tokens: float

    @property
    def agreed(self) -> int:
        """Tokens of the answer that the plan, decoding by itself, repeats."""
        return len(self.matches) if self.token is None else self.matches.index(False)

    def repeated(self, answer: Sequence[int]) -> list[int]:
        """What the plan, decoding by itself, says: of the known answer what it repeats, then its own token."""
        return [*answer[: self.agreed], *([] if self.token is None else [self.token])]


def follow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[int]],
    plans: Sequence[LayerPlan],
) -> list[dict[LayerPlan, Followed]]:
    """For each of B prompts, how far each plan follows its known answer (token ids)."""
    found = []
    for rows in fitting(model, list(zip(prompts, answers, strict=True))):
        found += in_halves(rows, lambda part: _follow(model, tokenizer, part, plans))
    return found


def fitting(model: PreTrainedModel, rows: Sequence[Forced]) -> Iterator[Sequence[Forced]]:
    """The rows in parts whose logits fit into LOGITS_BYTES, or into a sixteenth of a GPU's free memory."""
    of_row = max(len(answer) for _, answer in rows) * model.config.get_text_config().vocab_size * 4
    size = max(1, memory_budget(model.device, LOGITS_BYTES, 1 / 16) // of_row)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _follow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Forced],
    plans: Sequence[LayerPlan],
) -> list[dict[LayerPlan, Followed]]:
    prompts, answers = zip(*rows, strict=True)
    forced = ForcedAnswers(model, tokenizer, prompts, answers)
    order = sharing_order(model, plans)
    shared = SharedPasses(model, order)
    found: list[dict[LayerPlan, Followed]] = [{} for _ in rows]
    for plan in order:
        before = shared.layers_run
        with shared.next_plan():
            tokens = [logits.argmax(-1).tolist() for logits in forced.logits()]
        share = (shared.layers_run - before) / plan.n_layers
        for row, (answer, own) in enumerate(zip(answers, tokens, strict=True)):
            found[row][plan] = compared(answer, own, share * forced.tokens[row])
    return found


def compared(answer: Sequence[int], own: Sequence[int], forward_tokens: float) -> Followed:
    """A known answer, and what a plan says at each of its places."""
    matches = tuple(a == b for a, b in zip(answer, own, strict=True))
    return Followed(matches, None if all(matches) else own[matches.index(False)], forward_tokens)
