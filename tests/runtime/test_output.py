"""What an allocator's output says beside stock's, and what a call is warned of."""

import logging
import warnings
from dataclasses import replace
from typing import get_args, get_overloads, get_type_hints

import pytest
import torch
from tiny import N_LAYERS, padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import CHOSEN, DICT, FULL, GREEDY, ByLength, make_allocator
from transformers.generation.utils import GenerateDecoderOnlyOutput

from backbone.families import sublayer_bytes
from backbone.plan import LayerPlan
from layerbudget import AllocatedBeamOutput, AllocatedOutput, Allocator, UncertifiedDecodingWarning
from runtime.output import share_of_decoder, summary_line


@pytest.fixture
def allocator(model):
    """With a controller of its own, by which it is known whether it was warned of."""
    return make_allocator(model, controller=ByLength(), name="by_length")


def test_a_dictionary_has_stock_fields_plans_and_seconds(model, allocator) -> None:
    batch = padded_batch()
    found = allocator.generate(model, **batch, **GREEDY, **DICT, output_scores=True)
    assert type(found) is AllocatedOutput
    assert isinstance(found, GenerateDecoderOnlyOutput)
    assert len(found.scores) == found.sequences.shape[1] - batch["input_ids"].shape[1]
    assert found.plans == CHOSEN
    assert found.layers == pytest.approx((6 + 5 + 4 + 4) / 4)
    budgets = dict(zip(allocator.menu.plans, allocator.menu.budgets, strict=True))
    assert found.share_of_decoder == pytest.approx(sum(budgets[plan] for plan in found.plans) / 4)
    assert 0 < found.allocation_s < found.first_token_s < found.total_s < 60
    assert (found.drift, found.acceptance, found.logits) == (None, None, None)
    assert {"sequences", "scores", "plans", "layers"} <= found.keys()
    tokens = allocator.generate(model, **batch, **GREEDY)
    assert type(tokens) is torch.Tensor
    assert torch.equal(tokens, found.sequences)


def test_beams_keep_their_own_fields(model, allocator) -> None:
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "return_dict_in_generate": True}
    with pytest.warns(UncertifiedDecodingWarning, match="this call has num_beams=2: its bound"):
        found = allocator.generate(model, **padded_batch(), **options, output_scores=True)
    stock = model.generate(**padded_batch(), **options, output_scores=True)
    assert type(found) is AllocatedBeamOutput
    assert isinstance(found, type(stock))
    assert not isinstance(found, GenerateDecoderOnlyOutput)
    assert [name for name in found if name in stock] == [*stock]
    assert found.sequences_scores.shape == (4,)
    assert found.beam_indices.shape[0] == 4
    assert len(found.plans) == 4


def test_the_typed_output_has_plans_with_and_without_beams() -> None:
    returned = get_type_hints(get_overloads(Allocator.generate)[0])["return"]
    assert {*get_args(returned)} == {AllocatedOutput, AllocatedBeamOutput}


def test_plans_that_no_menu_knows_count_by_their_bytes(model, allocator) -> None:
    other = LayerPlan.exiting(N_LAYERS, 3)
    expected = (1 + other.budget(sublayer_bytes(model))) / 2
    assert share_of_decoder([FULL, other], allocator.menu, model) == pytest.approx(expected)
    said = summary_line([FULL, other], allocator.menu, model, 2.34)
    assert said == f"2 prompts: 4.50 of 6 layers on average, {expected:.1%} of the decoder, 2.3 s"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 7, "do_sample": False}, "max_new_tokens=7"),
        ({"max_new_tokens": 3, "do_sample": True}, "do_sample=True"),
        ({**GREEDY, "stop_strings": "b", "tokenizer": tiny_tokenizer()}, r"stop_strings=\['b'\]"),
    ],
    ids=["longer", "sampled", "stopped"],
)
def test_another_decoding_is_warned_of_once(model, allocator, options, named) -> None:
    with pytest.warns(
        UncertifiedDecodingWarning, match=f"'greedy max_new_tokens=6 stop=.*', and this call has {named}"
    ):
        allocator.generate(model, **padded_batch(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncertifiedDecodingWarning)
        allocator.generate(model, **padded_batch(), **options)
        replace(allocator, drift=None).generate(model, **padded_batch(), **options)


def test_large_sets_and_changed_allocators_are_warned_of(model, allocator) -> None:
    with pytest.warns(UncertifiedDecodingWarning, match="max_new_tokens=8"):
        allocator.generate_many(model, tiny_tokenizer(), ["abc"], max_new_tokens=8)
    certified = replace(allocator.certificate, decoding=str(allocator.decoding))
    changed = replace(allocator, certificate=certified, decoding=replace(allocator.decoding, max_new_tokens=9))
    changed = replace(changed, controller=make_allocator(model, controller=ByLength()).controller)
    with pytest.warns(UncertifiedDecodingWarning, match="whose decoding was changed to 'greedy max_new_tokens=9"):
        changed.generate(model, **padded_batch(), **GREEDY)


def test_the_certified_decoding_is_not_warned_of(model, allocator) -> None:
    """Nor any other where nothing is certified, or the full model answers."""
    none = replace(allocator, certificate=replace(allocator.certificate, price=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncertifiedDecodingWarning)
        allocator.generate(model, **padded_batch(), **GREEDY)
        allocator.generate(model, **padded_batch(), max_new_tokens=2, do_sample=False)
        none.generate(model, **padded_batch(), max_new_tokens=9, do_sample=False)
        one = {name: tensor[:1] for name, tensor in padded_batch().items()}
        allocator.generate(model, **one, max_new_tokens=9, do_sample=False, lossless=True)


def test_the_first_call_says_that_it_tests_the_model(caplog) -> None:
    fresh = tiny_model("llama")
    with caplog.at_level(logging.INFO, logger="backbone.execution.self_test"):
        allocator = make_allocator(fresh, controller=ByLength(), name="by_length")
        for _ in range(2):
            allocator.generate(fresh, **padded_batch(), **GREEDY)
    (record,) = caplog.records
    assert record.message.startswith("testing once whether layer plans are exact on llama")
