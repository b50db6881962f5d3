"""The driver against a computation without cache or batch that takes the same decisions, on float32 models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exits_reference import ByDirection, Reference
from tiny import N_LAYERS, padded_batch, tiny_model

from backbone.execution.delete_layers import delete_layers
from backbone.healing.healing import Bridge
from backbone.plan import LayerPlan
from token_exits.gates import Constant, Gate, Oracle, Patience, Saturation
from token_exits.heads import ExitHeads
from token_exits.kv_projection import FAMILIES
from token_exits.settings import NEVER, STRATEGIES, ExitSettings, Strategy
from token_exits.token_exits import TokenExits

NEW_TOKENS = 12
DEPTHS = (3, 4, 5)
EXACT: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


def heads_of(model: Any) -> ExitHeads:
    """With a bridge at one of the candidate layers."""
    size, generator = model.config.hidden_size, torch.Generator().manual_seed(5)
    bridge = Bridge((torch.randn(size, size, generator=generator) * 0.2,), torch.randn(size, generator=generator) * 0.1)
    return ExitHeads(model, {4: bridge})


def compared(family: str, strategy: Strategy, gate: Gate, threshold: float, **options: Any) -> list[list[int]]:
    """Asserts that every row of a padded batch is what the reference makes of it; the layers that its tokens ran."""
    model = tiny_model(family, **options)
    settings = ExitSettings(gate, heads_of(model), DEPTHS, threshold, strategy)
    batch = {name: tensor[1:3] for name, tensor in padded_batch().items()}
    output: Any = TokenExits(settings).generate(model, **batch, **EXACT, return_dict_in_generate=True)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        tokens, run = Reference(model, settings).generate(ids[mask.bool()].tolist(), NEW_TOKENS)
        assert output.layers_run[row].tolist() == run
        assert output.sequences[row, -NEW_TOKENS:].tolist() == tokens
    return output.layers_run.tolist()  # type: ignore[no-any-return]


def wide(family: str) -> dict[str, Any]:
    """Options for windows that hold the whole text, which `recompute` needs."""
    return {"sliding_window": 64} if family in ("mistral", "gemma2", "gemma3_text") else {}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_leave_as_in_the_uncached_computation(family: str, strategy: Strategy) -> None:
    options = wide(family) if strategy == "recompute" else {}
    run = compared(family, strategy, ByDirection(), 0.6, **options)
    assert len({layers for row in run for layers in row[1:]}) >= 3  # the gate tells tokens apart
    assert any(len({row[step] for row in run}) > 1 for step in range(NEW_TOKENS))  # and rows of one step


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("gate", "threshold"), [(Saturation(), 0.8), (Patience(), 0.4)])
def test_gates_that_look_at_earlier_layers(gate: Gate, threshold: float, strategy: Strategy) -> None:
    compared("llama", strategy, gate, threshold)


@pytest.mark.parametrize("strategy", ["propagate", "share"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_oracle_leaves_what_it_would_have_left(family: str, strategy: Strategy) -> None:
    run = compared(family, strategy, Oracle(), 0.5, layer_scale=0.5)
    assert len({layers for row in run for layers in row[1:]}) > 1


def test_oracle_keeps_the_first_step_s_token() -> None:
    model, batch = tiny_model("llama", layer_scale=0.5), padded_batch()
    oracle = TokenExits(ExitSettings(Oracle(), ExitHeads(model), DEPTHS, 0.5))
    output: Any = oracle.generate(model, **batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(output, model.generate(**batch, max_new_tokens=2, do_sample=False))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_never_sure_is_stock(family: str, strategy: Strategy) -> None:
    model, batch = tiny_model(family, **wide(family)), padded_batch()
    exits = TokenExits(ExitSettings(ByDirection(), ExitHeads(model), DEPTHS, NEVER, strategy))
    stock = model.generate(**batch, **EXACT, return_dict_in_generate=True, output_logits=True)
    output: Any = exits.generate(model, **batch, **EXACT, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(output.sequences, stock.sequences)
    for own, other in zip(output.logits, stock.logits, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_deferred_tokens_are_bounded(strategy: Strategy) -> None:
    run = compared("llama", strategy, Constant(1.0), 0.5)
    longest = max(len(streak) for streak in "".join("x" if layers < N_LAYERS else " " for layers in run[0]).split())
    assert longest == (8 if strategy == "recompute" else NEW_TOKENS - 1)


def test_no_layer_runs_for_tokens_that_have_left() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    calls: list[tuple[int, int]] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, args, output, i=index: calls.append((i, len(output))))
    TokenExits(ExitSettings(Constant(1.0), ExitHeads(model), (3,), 0.5)).generate(model, **batch, **EXACT)
    runs = [calls.count((index, 4)) for index in range(N_LAYERS)]  # the self-tests have fewer rows
    assert runs == [NEW_TOKENS] * 3 + [1] * 3


def test_below_a_plan() -> None:
    """Tokens that leave a shortened model are those that leave the model with the skipped layers deleted."""
    model, batch = tiny_model("llama"), padded_batch()
    short = delete_layers(model, LayerPlan.skipping(N_LAYERS, {1}))
    below = TokenExits(ExitSettings(Constant(1.0), ExitHeads(model), (4,), 0.5))
    alone = TokenExits(ExitSettings(Constant(1.0), ExitHeads(short), (3,), 0.5))
    plan = LayerPlan.skipping(N_LAYERS, {1})
    output: Any = below.generate(model, **batch, **EXACT, plan=plan, return_dict_in_generate=True)
    assert torch.equal(output.sequences, alone.generate(short, **batch, **EXACT))
    assert output.layers_run[0].tolist() == [5] + [3] * (NEW_TOKENS - 1)
