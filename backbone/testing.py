"""The conformance suite of model families: a test class that inherits it proves that plans are exact on its model.

    class TestMine(FamilyConformance):
        def make(self):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model("mine", num_hidden_layers=6, ...)).eval()

pytest then finds the tests below in `TestMine`. Use at least four layers, float32 and weights large enough that greedy
tokens do not hang on rounding.
"""

from __future__ import annotations

import copy
from functools import cached_property
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from backbone.execution.apply_plan import apply_plan, apply_plans
from backbone.execution.delete_layers import delete_layers
from backbone.execution.rows import layer_bytes
from backbone.execution.self_test import check_exactness
from backbone.families import decoder_layers, family_of
from backbone.plan import LayerPlan

Batch = dict[str, torch.Tensor]

NEW_TOKENS = 4
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 2},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 0.7},
}
CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"cache_implementation": "static"}}


class FamilyConformance:
    """Inherit, and override `make`; pytest finds the tests."""

    def make(self) -> PreTrainedModel:
        """A small model of the family in eval mode."""
        raise NotImplementedError

    @cached_property
    def model(self) -> PreTrainedModel:
        if "_made" not in type(self).__dict__:
            type(self)._made = self.make()  # type: ignore[attr-defined]
        return type(self)._made  # type: ignore[attr-defined, no-any-return]

    def plans(self) -> dict[str, LayerPlan]:
        """At least eight plans; those with half layers only where the family allows them."""
        n = len(decoder_layers(self.model))
        full_attention = [i for i, kind in enumerate(self._layer_types(n)) if kind == "full_attention"]
        draw = torch.Generator().manual_seed(0)
        shuffled = torch.randperm(n, generator=draw).tolist()
        plans = {
            "first layer": LayerPlan.skipping(n, {0}),
            "last layer": LayerPlan.skipping(n, {n - 1}),
            "first full-attention layer": LayerPlan.skipping(n, {full_attention[0], n - 2}),
            "prefix": LayerPlan.exiting(n, n // 2),
            "evenly": LayerPlan.evenly(n, n - 2),
            "random": LayerPlan.skipping(n, shuffled[: n // 2]),
            "all but one": LayerPlan.skipping(n, set(range(n)) - {n // 2}),
            "full": LayerPlan.full(n),
        }
        if family_of(self.model).attention is not None:
            plans["attention"] = LayerPlan.skipping(n, attention={0, full_attention[0], n - 1})
            plans["MLP"] = LayerPlan.skipping(n, mlp={0, 2})
            plans["sub-layers"] = LayerPlan.skipping(n, {n - 1}, attention=shuffled[:2], mlp=shuffled[2:4])
        return plans

    def _layer_types(self, n: int) -> list[str]:
        return getattr(self.model.config, "layer_types", None) or ["full_attention"] * n

    def batches(self) -> dict[str, Batch]:
        """One prompt of 11 tokens, and four of 11, 9, 7 and 4 tokens, left-padded."""
        draw = torch.Generator().manual_seed(1)
        input_ids = torch.randint(3, self.model.config.vocab_size, (4, 11), generator=draw)
        mask = torch.ones_like(input_ids)
        for row, padding in enumerate((0, 2, 4, 7)):
            mask[row, :padding] = 0
        four = {"input_ids": input_ids, "attention_mask": mask}
        return {"one": {name: tensor[:1] for name, tensor in four.items()}, "four": four}

    def generated(self, batch: Batch, **options: Any) -> list[list[int]]:
        torch.manual_seed(0)
        tokens = self.model.generate(  # type: ignore[operator]
            **batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, **options
        )
        return tokens.tolist()  # type: ignore[no-any-return]

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Logits [4, 11, vocabulary] of the padded batch."""
        with torch.no_grad():
            return model(**self.batches()["four"], use_cache=False).logits  # type: ignore[no-any-return]

    def test_tokens_equal_the_uncached_computation(self) -> None:
        """Every plan x cache x batch x way of decoding."""
        wrong = []
        for (plan_name, plan), (batch_name, batch), (mode_name, mode) in product(
            self.plans().items(), self.batches().items(), MODES.items()
        ):
            with apply_plan(self.model, plan):
                expected = self.generated(batch, **mode, use_cache=False)
                for cache_name, cache in CACHES.items():
                    if self.generated(batch, **mode, **cache) != expected:
                        wrong.append((plan_name, cache_name, batch_name, mode_name))
        assert wrong == []

    def mixtures(self) -> list[list[str]]:
        """Names of plans for four rows; each plan runs beside three others."""
        names = list(self.plans())
        return [[names[(start + i) % len(names)] for i in range(4)] for start in range(0, len(names), 3)]

    def test_rows_with_different_plans_equal_each_alone(self) -> None:
        """Each row has the tokens it has alone; sampled ones, drawn for the whole batch, are the uncached mixture's."""
        wrong, plans, batch = [], self.plans(), self.batches()["four"]
        rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(4)]
        alone: dict[tuple[int, str, str], list[int]] = {}
        for mixture, (mode_name, mode) in product(self.mixtures(), MODES.items()):
            own = [plans[name] for name in mixture]
            if mode_name == "sampling":
                with apply_plans(self.model, own):
                    expected = self.generated(batch, **mode, use_cache=False)
            else:
                for row, name in enumerate(mixture):
                    if (row, name, mode_name) not in alone:
                        with apply_plan(self.model, plans[name]):
                            alone[row, name, mode_name] = self.generated(rows[row], **mode)[0]
                expected = [alone[row, name, mode_name] for row, name in enumerate(mixture)]
            for cache_name, cache in CACHES.items():
                with apply_plans(self.model, own):
                    if self.generated(batch, **mode, **cache) != expected:
                        wrong.append((mixture, cache_name, mode_name))
        assert wrong == []

    def test_a_skipped_sublayer_adds_nothing(self) -> None:
        """The yardstick is the stock model with the weights of those sub-layers set to zero."""
        for name, plan in self.plans().items():
            with apply_plan(self.model, plan):
                found = self.logits(self.model)
            if plan.attention == plan.mlp:
                expected = self.logits(delete_layers(self.model, plan))
            else:
                expected = self.logits(self._with_zeroed(plan))
            mask = self.batches()["four"]["attention_mask"].bool()
            difference = (found[mask] - expected[mask]).abs().max().item()
            assert difference <= 1e-4 * expected[mask].abs().max().item(), name

    def _with_zeroed(self, plan: LayerPlan) -> PreTrainedModel:
        zeroed, family = copy.deepcopy(self.model), family_of(self.model)
        skipped = [(i, str(family.attention)) for i in plan.skipped_attention]
        skipped += [(i, name) for i in plan.skipped_mlp for name in family.mlp]
        for i, name in skipped:
            for parameter in decoder_layers(zeroed)[i].get_submodule(name).parameters():
                parameter.data.zero_()
        return zeroed

    def test_every_plan_but_the_full_one_changes_the_output(self) -> None:
        stock = self.logits(self.model)
        for name, plan in self.plans().items():
            with apply_plan(self.model, plan):
                assert torch.equal(self.logits(self.model), stock) == plan.is_full, name

    def test_skipped_attention_keeps_no_cache(self) -> None:
        for name, plan in self.plans().items():
            with apply_plan(self.model, plan):
                cache = self.model(**self.batches()["four"], use_cache=True).cache
            held = {i for i, layer in enumerate(cache.layers) if layer_bytes(layer) > 0}
            assert held == plan.attention, name

    def test_everything_is_restored(self) -> None:
        stock, before = self.logits(self.model), patches(self.model)
        for plan in self.plans().values():
            try:
                with apply_plan(self.model, plan):
                    raise _InterruptionError
            except _InterruptionError:
                pass
            assert patches(self.model) == before
        assert torch.equal(self.logits(self.model), stock)

    def test_the_self_test_passes(self) -> None:
        check_exactness(self.model)


class _InterruptionError(Exception):
    pass


def patches(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Where a module's own forward, compiled call or hooks were set."""
    found = []
    for name, module in model.named_modules():
        found += [(name, key) for key in ("forward", "get_compiled_call") if key in module.__dict__]
        found += [(name, "hook")] * (len(module._forward_pre_hooks) + len(module._forward_hooks))
    return found
