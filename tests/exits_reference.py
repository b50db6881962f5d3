"""Token exits computed the slow way: one row, no cache, the whole text through every layer at each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.execution.live_changes import replaced
from backbone.families import decoder_layers, decoder_of
from token_exits.gates import Candidate, Gate, unit_states
from token_exits.kv_strategies import MOST_DEFERRED
from token_exits.settings import ExitSettings


class ByDirection(Gate):
    """Sure by how far the state lies along a fixed direction, in waves: tokens leave at all layers, or not at all."""

    name = "direction"

    def confidence(self, candidate: Candidate) -> torch.Tensor:
        generator = torch.Generator().manual_seed(candidate.depth)
        direction = torch.randn(candidate.states.shape[-1], generator=generator)
        return (4 * (unit_states(candidate.states) @ direction)).sin() / 2 + 0.5


class Reference:
    """Greedy decoding of one prompt. `left` knows where each position of the text left the layers."""

    def __init__(self, model: PreTrainedModel, settings: ExitSettings) -> None:
        self.model, self.settings = model, settings
        self.layers = decoder_layers(model)
        self.kinds = getattr(model.config, "layer_types", None) or ["all"] * len(self.layers)

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[int]]:
        """New tokens, and how many layers each of them ran."""
        ids, left, run = list(prompt), {}, []
        waiting: list[int] = []  # layers before which tokens wait, for `recompute`
        for step in range(new_tokens):
            newest, n_layers = len(ids) - 1, len(self.layers)
            may_leave = step > 0 and not (self.settings.strategy == "recompute" and len(waiting) >= MOST_DEFERRED)
            frozen = {} if self.settings.strategy == "recompute" else dict(left)
            depth = (
                self._decide(ids, frozen, newest, self.settings.threshold_at(step, new_tokens)) if may_leave else None
            )
            logits = self._logits(ids, frozen if depth is None else {**frozen, newest: depth}, newest)
            waiting = [] if depth is None else [max(depth, other) for other in [*waiting, depth]]
            if depth is not None:
                left[newest] = depth
            run.append(n_layers if depth is None else depth)
            logits[:, self.model.config.eos_token_id] = -torch.inf  # as `min_new_tokens` does
            ids.append(int(logits.argmax()))
        return ids[len(prompt) :], run

    def _decide(self, ids: list[int], frozen: dict[int, int], newest: int, threshold: float) -> int | None:
        """Where the newest token leaves, seen from a pass in which it does not."""
        states: dict[int, torch.Tensor] = {}
        self._run(ids, frozen, lambda index, before: states.__setitem__(index, before[:, newest]))
        last = self._logits(ids, frozen, newest).argmax(-1)
        memory: dict[str, torch.Tensor] = {}
        for depth in self.settings.depths:
            candidate = Candidate(
                depth, states[depth], states[depth - 1], torch.tensor([0]), 1, self.settings.heads, memory, last
            )
            if float(self.settings.gate.confidence(candidate)) >= threshold:
                return depth
        return None

    def _logits(self, ids: list[int], left: dict[int, int], newest: int) -> torch.Tensor:
        """[1, V] of the newest token."""
        output = self._run(ids, left, lambda index, before: None)[:, newest]
        if newest in left:
            output = self.settings.heads.output(left[newest], output)
        decoder: Any = decoder_of(self.model)
        return self.model.lm_head(decoder.norm(output))  # type: ignore[no-any-return]

    def _run(self, ids: list[int], left: dict[int, int], see: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
        """States [1, S, D] after the last layer, before the final norm, those of `left` as they left."""
        stub, final = _Sharing(self, left), []

        def of_layer(index: int, forward: Any) -> Any:
            def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                see(index, hidden_states)
                output = forward(hidden_states, *args, **{**kwargs, "cache": stub}).clone()
                for position, depth in left.items():
                    if depth <= index:
                        output[:, position] = hidden_states[:, position]
                if index == len(self.layers) - 1:
                    final.append(output)
                return output

            return run

        with replaced((layer, "forward", of_layer(i, layer.forward)) for i, layer in enumerate(self.layers)):
            decoder_of(self.model)(input_ids=torch.tensor([ids]), use_cache=False)
        return final[0]


class _Sharing:
    """In a cache's place: hands keys and values on, with the strategy `share` those of the last layer of the same kind
    that a token ran."""

    def __init__(self, reference: Reference, left: dict[int, int]) -> None:
        self._reference, self._left = reference, left
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if self._reference.settings.strategy == "share":
            kinds = self._reference.kinds
            for position, depth in self._left.items():
                if depth <= layer:
                    source = max(i for i in range(depth) if kinds[i] == kinds[layer])
                    keys[:, :, position] = self._made[source][0][:, :, position]
                    values[:, :, position] = self._made[source][1][:, :, position]
        self._made[layer] = (keys, values)
        return keys, values
