"""The model's own final norm and output head, run on given states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.execution.executor import pass_on, with_none
from backbone.execution.live_changes import replaced
from backbone.families import decoder_layers, family_of


def output_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] that the model gives for states after its last layer [R, D].

    The model's own code runs with layers that compute nothing, so that whatever a family does between its last layer
    and its logits is done: norms, scales, caps. Gradients flow.
    """
    layers, returns_tuple = decoder_layers(model), family_of(model).returns_tuple
    given = states[:, None].to(model.dtype)
    skip, give = pass_on, lambda *args, **kwargs: given
    if returns_tuple:
        skip, give = with_none(skip), with_none(give)
    forwards = [(layer, "forward", skip) for layer in list(layers)[:-1]] + [(layers[-1], "forward", give)]
    ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
    with replaced(forwards):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, 0]


@contextmanager
def head_on(model: PreTrainedModel, tokens: torch.Tensor) -> Iterator[None]:
    """Within this block the head computes the logits of the tokens `tokens` [v] only."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    part = copy.copy(head)  # shares everything but the parameters
    part.__dict__["_parameters"] = {
        name: None if p is None else p[tokens.to(p.device)].detach().contiguous()
        for name, p in head._parameters.items()
    }
    with replaced([(head, "forward", lambda states: type(head).forward(part, states.contiguous()))]):
        yield
