"""A plan for each row: what stands in for layers, what the cache holds, and what is refused."""

import copy
from typing import NamedTuple

import pytest
import torch
from tiny import N_LAYERS, OPTIONS, padded_batch, tiny_model
from torch import nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.pytorch_utils import Conv1D

from backbone.errors import PlanError
from backbone.execution.apply_plan import apply_plan, apply_plans
from backbone.execution.rows import cache_bytes, cut, remembered_plans
from backbone.families import model_fingerprint
from backbone.healing.healing import Adapter, Bridge, Healing
from backbone.plan import LayerPlan

FULL = LayerPlan.full(N_LAYERS)
MIDDLE = LayerPlan.skipping(N_LAYERS, {2, 3})
EXIT = LayerPlan.exiting(N_LAYERS, 3)
HALVES = LayerPlan.skipping(N_LAYERS, {5}, attention={1}, mlp={3})
PLANS = [EXIT, FULL, MIDDLE, HALVES]
LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
GREEDY = {**LENGTH, "do_sample": False}
MODES = {"greedy": GREEDY, "beams": {**GREEDY, "num_beams": 2}, "sampling": {**LENGTH, "do_sample": True, "top_k": 0}}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


class SeededRows(LogitsProcessor):
    """Draws each row's next token with a generator of its own (Gumbel's trick), so that a row draws in a batch what it
    draws alone; what it drew is the only token left."""

    def __init__(self, rows) -> None:
        self.draws = [torch.Generator().manual_seed(row) for row in rows]

    def __call__(self, input_ids, scores):
        noise = torch.stack([torch.rand(scores.shape[1], generator=draw) for draw in self.draws])
        drawn = (scores - (-noise.log()).log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def generated(model, batch, rows, mode, **options):
    seeded = LogitsProcessorList([SeededRows(rows)]) if mode == "sampling" else None
    return model.generate(**batch, **MODES[mode], **options, logits_processor=seeded)


def row(batch, index):
    return {name: tensor[index : index + 1] for name, tensor in batch.items()}


def alone(model, batch, plans, mode, healing=None):
    """The tokens of each row by itself under its own plan."""
    found = []
    for index, plan in enumerate(plans):
        with apply_plan(model, plan, healing):
            found.append(generated(model, row(batch, index), [index], mode)[0])
    return torch.stack(found)


def with_healing(family: str, *, bridges: bool, adapter: bool):
    """A model with random bridges and random low-rank changes of the matrices in its last three layers."""
    model, draw = tiny_model(family), torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.1

    spans = {MIDDLE: [2], EXIT: [3], HALVES: [5]}
    made = {plan: {first: Bridge((random(32, 32),), random(32)) for first in of} for plan, of in spans.items()}
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(f".{layer}." in f"{name}." for layer in (3, 4, 5))
    ]
    shapes = {name: model.get_parameter(name).shape for name in names}
    if family == "gpt2":  # its matrices lie the other way round
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    changes = {name: (random(shape[0], 4), random(4, shape[1])) for name, shape in shapes.items()}
    return model, Healing(model_fingerprint(model), made if bridges else {}, Adapter(changes) if adapter else None)


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_rows_with_healing_equal_their_plan_alone_in_every_family(family) -> None:
    """Whole and half layers, a bridge for each gap and an adapter, left padding; full rows beside all of them."""
    (model, healing), batch, wrong = with_healing(family, bridges=True, adapter=True), padded_batch(), []
    for mode in MODES:
        expected = alone(model, batch, PLANS, mode, healing)
        for cache, options in CACHES.items():
            with apply_plans(model, PLANS, healing):
                found = generated(model, batch, range(len(PLANS)), mode, **options)
            if not torch.equal(found, expected):
                wrong.append((mode, cache, int((found != expected).sum())))
    assert wrong == []


@pytest.mark.parametrize("parts", ["bridges", "adapter"])
@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_healing_reach_their_own_rows_only(family, parts) -> None:
    model, healing = with_healing(family, bridges=parts == "bridges", adapter=parts == "adapter")
    batch = padded_batch()
    with apply_plans(model, PLANS, healing):
        found = generated(model, batch, range(len(PLANS)), "greedy")
    assert torch.equal(found, alone(model, batch, PLANS, "greedy", healing))


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_a_head_at_full_depth_reaches_its_own_rows(family) -> None:
    """Beside rows of the full model, of an exit with a head and of halves; without a head the plan is refused."""
    (model, healing), batch = with_healing(family, bridges=True, adapter=False), padded_batch()
    healed = LayerPlan.parse("0-5h", 6)
    for lacking in (healing, None):
        with (
            pytest.raises(PlanError, match="is the full depth with an exit head, and no healing with this head"),
            apply_plan(model, healed, lacking),
        ):
            pass
    made = {
        healed: {6: Bridge((torch.randn(32, 32),), torch.randn(32))},
        EXIT: {3: Bridge((torch.ones(32, 32),), torch.ones(32))},
    }
    healing = Healing(model_fingerprint(model), made)
    for plans in ([healed, FULL, EXIT, HALVES], [FULL, healed, healed, FULL]):
        with apply_plans(model, plans, healing):
            found = generated(model, batch, range(len(plans)), "greedy")
        assert torch.equal(found, alone(model, batch, plans, "greedy", healing))
    found = alone(model, batch, [healed] * 4, "greedy", healing)
    assert not torch.equal(found, alone(model, batch, [FULL] * 4, "greedy"))


def test_rows_drawn_with_their_own_seeds_differ_from_greedy_ones() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    greedy, sampled = (alone(model, batch, PLANS, mode) for mode in ("greedy", "sampling"))
    assert not torch.equal(greedy, sampled)


@torch.no_grad()
def test_where_no_row_has_left_full_rows_are_bit_equal_to_stock_beside_adapted_ones() -> None:
    """The adapter changes layers 3 to 5, of which all rows run the first two."""
    (model, healing), batch = with_healing("llama", bridges=False, adapter=True), padded_batch()
    last = LayerPlan.exiting(N_LAYERS, N_LAYERS - 1)
    stock = model(**batch, use_cache=False, output_hidden_states=True).hidden_states[N_LAYERS - 1]
    with apply_plans(model, [last, FULL, last, FULL], healing):
        mixed = model(**batch, use_cache=False, output_hidden_states=True).hidden_states[N_LAYERS - 1]
    assert torch.equal(mixed[[1, 3]], stock[[1, 3]])
    assert not torch.allclose(mixed[[0, 2], -1], stock[[0, 2], -1], atol=1e-3)


def test_a_full_row_beside_adapted_ones_has_the_weights_of_the_stock_model() -> None:
    (model, healing), batch = with_healing("llama", bridges=True, adapter=True), padded_batch()
    stock = model(**batch, use_cache=False).logits
    with apply_plans(model, PLANS, healing):
        mixed = model(**batch, use_cache=False).logits
    torch.testing.assert_close(mixed[1, 2:], stock[1, 2:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], stock[0], atol=1e-2)
    assert torch.equal(model(**batch, use_cache=False).logits, stock)


def test_rows_as_many_as_tokens_are_told_apart_from_them() -> None:
    model = tiny_model("llama")
    batch = {name: tensor[:, -4:] for name, tensor in padded_batch().items()}
    with apply_plans(model, PLANS):
        mixed = model(**batch, use_cache=False).logits
    for index, plan in enumerate(PLANS):
        with apply_plan(model, plan):
            torch.testing.assert_close(mixed[index], model(**row(batch, index), use_cache=False).logits[0])


def test_equal_plans_take_the_path_of_one_plan() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    with apply_plan(model, MIDDLE):
        expected = model(**batch, use_cache=False).logits
    with apply_plans(model, [MIDDLE] * 4):
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
    with apply_plans(model, [FULL] * 4):
        found = model(**batch, use_cache=False).logits
    assert torch.equal(found, model(**batch, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_the_cache_holds_each_rows_own_layers(kind) -> None:
    model, batch = tiny_model("llama"), padded_batch()

    def cache():
        return StaticCache(config=model.config, max_cache_len=16) if kind == "static" else DynamicCache()

    with apply_plan(model, FULL):
        full = cache_bytes(model(**batch, cache=cache()).cache)
    with apply_plans(model, PLANS):
        mixed = model(**batch, cache=cache()).cache
    share = sum(len(plan.attention) for plan in PLANS) / (len(PLANS) * N_LAYERS)
    assert cache_bytes(mixed) == pytest.approx(full * share)
    assert [len(layer.keys) for layer in mixed.layers] == [
        sum(i in p.attention for p in PLANS) for i in range(N_LAYERS)
    ]
    assert remembered_plans(copy.deepcopy(mixed)) == (tuple(PLANS), "")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_operations_on_the_cache_move_the_rows_that_each_layer_holds(family) -> None:
    """Repeated, reordered within prompts, cut: the cache goes on as that of a batch that was so from the beginning."""
    model, batch = tiny_model(family), padded_batch()
    doubled = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in batch.items()}
    with apply_plans(model, PLANS):
        cache, wanted = model(**batch).cache, model(**doubled).cache
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0, 2, 3, 5, 4, 7, 6]))
        cache.crop(-2)
        wanted.crop(-2)
        mask = doubled["attention_mask"][:, :-1]
        step = {"input_ids": doubled["input_ids"][:, -2:-1], "attention_mask": mask}
        torch.testing.assert_close(model(**step, cache=cache).logits, model(**step, cache=wanted).logits)
    kept = torch.tensor([0, 1, 4, 5])
    cache.batch_select_indices(kept)
    with apply_plans(model, [EXIT, MIDDLE]):
        mask = torch.cat([mask, torch.ones(8, 1, dtype=mask.dtype)], dim=1)[kept]
        found = model(input_ids=step["input_ids"][kept], attention_mask=mask, cache=cache).logits
    with apply_plans(model, PLANS):
        mask = torch.cat([doubled["attention_mask"][:, :-1], torch.ones(8, 1, dtype=mask.dtype)], dim=1)
        expected = model(input_ids=step["input_ids"], attention_mask=mask, cache=wanted).logits[kept]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_cache_of_rows_is_refused_elsewhere() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    with apply_plans(model, PLANS):
        cache = model(**batch).cache
    step = {"input_ids": batch["input_ids"][:, -1:]}
    with pytest.raises(PlanError, match="a plan for each row: one of its layers holds 3 of 4 rows"):
        model(**step, cache=copy.deepcopy(cache))
    with apply_plan(model, FULL), pytest.raises(PlanError, match=r"layer \d holds the rows .*wanted are (all|no) rows"):
        model(**step, cache=copy.deepcopy(cache))
    with apply_plans(model, PLANS[::-1]), pytest.raises(PlanError, match="filled under other plans: layer 1"):
        model(**step, cache=copy.deepcopy(cache))
    with apply_plan(model, MIDDLE):
        other = model(**batch).cache
    with apply_plans(model, PLANS), pytest.raises(PlanError, match="filled under other plans"):
        model(**step, cache=other)


def test_other_rows_than_plans_are_refused() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    with apply_plans(model, PLANS[:3]), pytest.raises(PlanError, match="4 rows, but plans were given for 3"):
        model(**batch)
    with pytest.raises(PlanError, match="needs a plan for each prompt"), apply_plans(model, []):
        pass
    with pytest.raises(ValueError, match="layers"), apply_plans(model, [FULL, LayerPlan.full(4)]):
        pass
    assert model(**batch).logits.shape[0] == 4


class Pair(NamedTuple):
    cosines: torch.Tensor
    sines: list[torch.Tensor | None]


@pytest.mark.parametrize("places", [slice(1, 3), torch.tensor([0, 2]), slice(0, 0), torch.tensor([1]), slice(0, 3)])
def test_what_holds_the_rows_is_cut_and_the_rest_passes(places) -> None:
    rows, heads, cache = torch.arange(12.0).view(3, 2, 2), torch.arange(12.0).view(6, 1, 2), DynamicCache()
    found = cut(Pair(rows, [rows, None]), 3, lambda _: places, n_heads=2)
    assert type(found) is Pair
    assert torch.equal(found.cosines, rows[places])
    assert torch.equal(found.sines[0], rows[places])
    assert torch.equal(cut(heads, 3, lambda _: places, n_heads=2), heads.view(3, 2, 1, 2)[places].flatten(0, 1))
    for other in (None, True, cache, torch.arange(3), rows[:1], rows.flatten(0, 1)[None], heads):
        assert cut(other, 3, lambda _: places) is other
