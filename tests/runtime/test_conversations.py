"""A cache that is passed on keeps its plan from turn to turn."""

import copy

import pytest
import torch
from tiny import N_LAYERS, padded_batch, tiny_model
from tiny_allocator import CHOSEN, DICT, FULL, GREEDY, PLANS, ByLength, make_allocator, prompt, with_healing
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DummyLayer

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plan
from backbone.plan import LayerPlan

CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


def next_turn(sequences: torch.Tensor) -> torch.Tensor:
    return torch.cat([sequences, prompt(0).expand(len(sequences), -1)], dim=1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom"])
@pytest.mark.parametrize("caches", CACHES)
def test_a_second_turn_goes_on_under_the_plan_of_the_first(family, caches) -> None:
    model = tiny_model(family)
    allocator = make_allocator(model, controller=ByLength())
    cache = CACHES[caches](model.config)
    first = allocator.generate(model, input_ids=prompt(3), **GREEDY, **DICT, cache=cache)
    assert first.plans == [PLANS[0]]
    longer = next_turn(first.sequences)
    second = allocator.generate(model, input_ids=longer, **GREEDY, **DICT, cache=first.cache)
    assert second.plans == [PLANS[0]]
    with apply_plan(model, PLANS[0]):
        assert torch.equal(second.sequences, model.generate(input_ids=longer, **GREEDY))
    assert allocator.allocate(model, longer) == [FULL], "without the cache the turn would have run another plan"


def test_a_cache_of_the_full_model_goes_on_in_full(model, allocator) -> None:
    ids = prompt(3)
    with torch.no_grad():
        cache = model(ids).cache
    longer = torch.cat([ids, ids], 1)
    output = allocator.generate(model, input_ids=longer, cache=cache, **GREEDY, **DICT)
    assert output.plans == [FULL]
    assert torch.equal(output.sequences, model.generate(input_ids=longer, **GREEDY))


def test_a_prefilled_cache_may_be_copied_and_its_plan_be_none_of_the_menu(model, allocator) -> None:
    plan, ids = LayerPlan.skipping(N_LAYERS, mlp={3}), prompt(0)
    with torch.no_grad(), apply_plan(model, plan):
        cache = model(ids[:, :5]).cache
        expected = model.generate(input_ids=ids, **GREEDY)
    for _ in range(2):
        output = allocator.generate(model, input_ids=ids, cache=copy.deepcopy(cache), **GREEDY, **DICT)
        assert output.plans == [plan]
        assert torch.equal(output.sequences, expected)


def test_every_row_of_a_batch_goes_on_under_its_own_plan(model, allocator) -> None:
    batch, cache = padded_batch(), DynamicCache(config=model.config)
    first = allocator.generate(model, **batch, **GREEDY, **DICT, cache=cache)
    assert first.plans == CHOSEN
    longer = next_turn(first.sequences)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, longer.shape[1] - 11, dtype=torch.long)], 1)
    second = allocator.generate(model, input_ids=longer, attention_mask=mask, **GREEDY, **DICT, cache=cache)
    assert second.plans == CHOSEN
    for row, plan in enumerate(CHOSEN):
        with apply_plan(model, plan):
            alone = model.generate(input_ids=longer[row : row + 1], attention_mask=mask[row : row + 1], **GREEDY)
        assert torch.equal(second.sequences[row : row + 1], alone)
    with pytest.raises(UnsupportedGenerationError, match="filled under the plans of 4 prompts, but this call has 2"):
        allocator.generate(model, input_ids=longer[:2], attention_mask=mask[:2], **GREEDY, cache=cache)


def test_a_cache_whose_plan_is_not_known_is_refused(model, allocator) -> None:
    ids = prompt(0)
    with torch.no_grad(), apply_plan(model, PLANS[0]):
        cache = model(ids).cache
    del cache._layerbudget_filled_under
    assert any(isinstance(layer, DummyLayer) for layer in cache.layers)
    with pytest.raises(UnsupportedGenerationError, match="it is not known which plan filled it"):
        allocator.generate(model, input_ids=next_turn(ids), cache=cache, **GREEDY)


def test_a_cache_filled_with_other_healing_is_refused() -> None:
    model = tiny_model("llama")
    allocator = with_healing(model)
    output = allocator.generate(model, input_ids=prompt(3), **GREEDY, **DICT)
    assert output.plans == [PLANS[0]]
    with pytest.raises(UnsupportedGenerationError, match=r"was filled under plan .* healing parts, .* go on with none"):
        make_allocator(model).generate(model, input_ids=next_turn(output.sequences), cache=output.cache, **GREEDY)
