"""States of all later layers at the places that predict answers, from one pass over each text.

Shapes: `T` places, `D` hidden size, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from backbone.execution.shared_prefixes import beginnings
from backbone.families import decoder_layers
from backbone.healing.training_targets import Example
from backbone.left_padding import by_tokens

Advance = Callable[[int], None]

PROMPT_PLACES = 8
"""Places of a prompt, beside those that predict its answer, at which a head follows the full model."""
BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Places:
    """T places of some texts, each predicting the token that follows.

    Attributes:
        states: by depth, before that layer, float32 [T, D]; before layer L means after the last. On the CPU.
        following: the token that follows in the text [T].
        is_answer: whether that token belongs to the answer [T].
        is_target: whether that token is a reference's, which is the target itself [T].
        text: number of the text [T].
    """

    states: Mapping[int, torch.Tensor]
    following: torch.Tensor
    is_answer: torch.Tensor
    is_target: torch.Tensor
    text: torch.Tensor

    def __len__(self) -> int:
        return len(self.text)

    def of(self, picked: torch.Tensor) -> Places:
        """Some of the places; `picked` are numbers or a mask."""
        states = {depth: state[picked] for depth, state in self.states.items()}
        return Places(states, self.following[picked], self.is_answer[picked], self.is_target[picked], self.text[picked])


@torch.no_grad()
def read_places(
    model: PreTrainedModel,
    examples: Sequence[Example],
    depths: Sequence[int],
    *,
    seed: int = 0,
    advance: Advance = lambda done: None,
) -> Places:
    """States at the places that predict the answers, and at a few others, from one pass over each text.

    Args:
        model: runs in full.
        examples: prompts with answers of at least one token.
        depths: layers before which states are kept; those after the last are kept too.
        seed: of the draw of the other places.
        advance: called with the number of texts that were run.
    """
    n_layers, generator = len(decoder_layers(model)), torch.Generator().manual_seed(seed)
    wanted = sorted({*depths, n_layers})
    found: dict[int, tuple[list[int], dict[int, torch.Tensor]]] = {}
    rows = [one.tokens[:-1] for one in examples]
    drawn = [_places_of(one, generator) for one in examples]
    for group, beginning in beginnings(model, rows, n_layers, wanted):
        for batch in by_tokens(group, [len(rows[number]) for number in group], BATCH_TOKENS):
            states = beginning.states([rows[number] for number in batch], n_layers, wanted)
            for row, number in enumerate(batch):
                columns = [place - len(rows[number]) for place in drawn[number]]
                own = {depth: state[row, columns].float().cpu() for depth, state in states.items()}
                found[number] = (drawn[number], own)
            advance(len(batch))
    texts = [(number, one, *found[number]) for number, one in enumerate(examples)]
    is_answer = [
        torch.tensor([place >= len(one.tokens) - 1 - one.answer for place in places]) for _, one, places, _ in texts
    ]
    return Places(
        {depth: torch.cat([own[depth] for *_, own in texts]) for depth in wanted},
        torch.cat([torch.tensor([one.tokens[place + 1] for place in places]) for _, one, places, _ in texts]),
        torch.cat(is_answer),
        torch.cat([mask & one.from_reference for mask, (_, one, *_) in zip(is_answer, texts, strict=True)]),
        torch.cat([torch.full((len(places),), number) for number, _, places, _ in texts]),
    )


def places_bytes(model: PreTrainedModel, examples: Sequence[Example], depths: Sequence[int]) -> int:
    """Memory of the states that `read_places` would keep."""
    places = sum(one.answer + min(PROMPT_PLACES, max(len(one.tokens) - one.answer - 1, 0)) for one in examples)
    hidden: int = model.config.get_text_config().hidden_size
    return places * len({*depths, len(decoder_layers(model))}) * hidden * 4


def _places_of(example: Example, generator: torch.Generator) -> list[int]:
    """Those that predict the answer, after a few drawn ones of the prompt."""
    size = len(example.tokens) - 1
    asked = size - example.answer + 1
    others = torch.randperm(max(asked - 1, 0), generator=generator)[:PROMPT_PLACES]
    return [*sorted(others.tolist()), *range(asked - 1, size)]
