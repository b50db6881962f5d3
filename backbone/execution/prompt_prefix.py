"""The first layers of a prompt, run once: their states tell which plan to take, and every plan goes on from them.

Shapes: `B` prompts, `S` tokens, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from backbone.execution.apply_plan import apply_plan
from backbone.execution.live_changes import Forward, captured, replaced
from backbone.families import decoder_layers, decoder_of, family_of
from backbone.left_padding import position_inputs
from backbone.plan import LayerPlan


@dataclass(slots=True, eq=False)
class Prefix:
    """What the first layers of a model made of B prompts.

    Attributes:
        states: after 0 layers (the embeddings), 1, 2, ... layers [B, S, D] each; those of padding are meaningless.
        keys_values: of each of these layers [B, heads, S, d] each, not shortened to a window; empty if not kept.
    """

    states: tuple[torch.Tensor, ...]
    keys_values: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def release(self) -> None:
        """Give the memory back; nothing can go on from this prefix any more."""
        self.states, self.keys_values = (), ()

    @property
    def nbytes(self) -> int:
        """What it holds, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.states, *(one for pair in self.keys_values for one in pair)))

    def by_row(self, lengths: Sequence[int]) -> list[Prefix]:
        """Each of the B prompts, of so many tokens, by itself and without its padding, in main memory."""

        def rows_of(batch: torch.Tensor) -> list[torch.Tensor]:
            host = batch.cpu()  # as a whole, since a device is waited for at every transfer
            return [host[row : row + 1, ..., -length:, :].clone() for row, length in enumerate(lengths)]

        states = [rows_of(state) for state in self.states]
        layers = [(rows_of(keys), rows_of(values)) for keys, values in self.keys_values]
        return [
            Prefix(tuple(state[row] for state in states), tuple((keys[row], values[row]) for keys, values in layers))
            for row in range(len(lengths))
        ]


def joined(rows: Sequence[Prefix], device: torch.device) -> Prefix:
    """One batch of prompts that lie by themselves, left-padded with zeros: the opposite of `Prefix.by_row`."""
    longest = max(row.states[-1].shape[1] for row in rows)

    def padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        *outer, _, width = tensors[0].shape[1:]
        batch = torch.zeros((len(tensors), *outer, longest, width), dtype=tensors[0].dtype)
        for row, tensor in zip(batch, tensors, strict=True):
            row[..., -tensor.shape[-2] :, :] = tensor[0]
        return batch.to(device)

    first = rows[0]
    return Prefix(
        tuple(padded([row.states[i] for row in rows]) for i in range(len(first.states))),
        tuple(
            (padded([row.keys_values[i][0] for row in rows]), padded([row.keys_values[i][1] for row in rows]))
            for i in range(len(first.keys_values))
        ),
    )


@torch.no_grad()
def run_prefix(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    depth: int,
    *,
    keep_cache: bool,
    **inputs: torch.Tensor,
) -> Prefix:
    """Run the first `depth` layers; no later layer and no head is computed.

    Args:
        input_ids: prompt tokens, int64 [B, S], left-padded.
        attention_mask: 1 for tokens, 0 for padding [B, S]; None if there is no padding.
        depth: number of layers that run, at least 1.
        keep_cache: also keep keys and values, for `replaying`.
        inputs: other arguments of the model's decoder, such as `position_ids`.
    """
    decoder, layers = decoder_of(model), decoder_layers(model)
    depths = range(depth + 1)
    # Without a configuration no layer of the cache forgets what has left its window: a later cache may still want it.
    cache = DynamicCache() if keep_cache else None
    with apply_plan(model, LayerPlan.exiting(len(layers), depth)), captured(layers, depths) as states:
        decoder(input_ids=input_ids, attention_mask=attention_mask, cache=cache, use_cache=keep_cache, **inputs)
    kept: list[Any] = [] if cache is None else cache.layers[:depth]
    return Prefix(tuple(states[i] for i in depths), tuple((layer.keys, layer.values) for layer in kept))


@torch.inference_mode()
def probe_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, depth: int
) -> list[torch.Tensor]:
    """Hidden states [B, S, D] before and after each of the first `depth` layers of left-padded prompts [B, S].

    No later layer and no head is computed. The states of padding are meaningless.
    """
    positions = position_inputs(decoder_of(model), attention_mask)
    return list(run_prefix(model, input_ids, attention_mask, depth, keep_cache=False, **positions).states)


@contextmanager
def replaying(
    model: PreTrainedModel, prefix: Prefix, rows: torch.Tensor | None = None, *, release: bool = False
) -> Iterator[None]:
    """Within this block, inside `apply_plan`, the first layers of `model` give what was kept of the prompt.

    The prompt may come in one pass or in several (chunks); after its last token the layers compute again. Until then a
    compiled decoding step is put off, since a graph that was traced now would hold the kept states for ever.

    Args:
        model: that a plan was applied to.
        prefix: of the same prompts, made with `keep_cache=True`.
        rows: which of its prompts the passes' rows are [R]; None for all, in order.
        release: give the prefix's memory back as soon as its last token was replayed.
    """
    replay = _Replay(model, prefix, rows, release)
    try:
        with replaced([(model, "get_compiled_call", replay.deferring(model.get_compiled_call))]):
            replay.start()
            yield
    finally:
        replay.stop()


class _Replay:
    def __init__(self, model: PreTrainedModel, prefix: Prefix, rows: torch.Tensor | None, release: bool) -> None:
        self._model, self._prefix, self._rows, self._release = model, prefix, rows, release
        self._layers = list(decoder_layers(model))[: len(prefix.keys_values)]
        self._returns_tuple = family_of(model).returns_tuple
        self._done, self._total = 0, prefix.states[-1].shape[1]
        self._undo = ExitStack()

    def start(self) -> None:
        forwards = ((layer, "forward", self._forward_of(index)) for index, layer in enumerate(self._layers))
        self._undo.enter_context(replaced(forwards))

    def stop(self) -> None:
        self._undo.close()
        self._done = self._total
        if self._release:
            self._prefix.release()

    def deferring(self, compiled: Forward) -> Forward:
        """`compiled`, the model's `get_compiled_call`, whose result runs the plain model while the replay goes on."""

        def get_compiled_call(config: Any) -> Forward:
            graph = compiled(config)
            return lambda *args, **inputs: (self._model if self._done < self._total else graph)(*args, **inputs)

        return get_compiled_call

    def _forward_of(self, index: int) -> Forward:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            span = slice(self._done, self._done + hidden_states.shape[1])
            assert span.stop <= self._total, f"the prefix has {self._total} tokens, the prompt at least {span.stop}"
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            if cache is not None:
                keys, values = self._prefix.keys_values[index]
                cache.update(self._chosen(keys[:, :, span]), self._chosen(values[:, :, span]), index)
            if index == len(self._layers) - 1:
                hidden_states = self._chosen(self._prefix.states[-1][:, span])
                self._done = span.stop
                if self._done == self._total:
                    self.stop()
            return (hidden_states, None) if self._returns_tuple else hidden_states

        return forward

    def _chosen(self, kept: torch.Tensor) -> torch.Tensor:
        """The rows [R, ...] of a kept tensor [B, ...]."""
        return kept if self._rows is None else kept.index_select(0, self._rows)
