"""Both doors of generate(): what works goes on working, what cannot is refused by name."""

import threading
from typing import Any

import pytest
import torch
from exits_reference import ByDirection
from tiny import padded_batch, tiny_model, tiny_tokenizer
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import MaxTimeCriteria, RepetitionPenaltyLogitsProcessor

from backbone.errors import InputError, UnsupportedGenerationError, UnsupportedModelError
from backbone.plan import LayerPlan
from token_exits.gates import Constant
from token_exits.heads import ExitHeads, TokenExitsError
from token_exits.settings import NEVER, ExitSettings
from token_exits.token_exits import TokenExits

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def exits_of(model: Any, **options: Any) -> TokenExits:
    fields = {"gate": ByDirection(), "depths": (3, 4, 5), "threshold": 0.6, **options}
    return TokenExits(ExitSettings(heads=ExitHeads(model), **fields))


def test_both_doors_give_the_same(model) -> None:
    exits, batch = exits_of(model), padded_batch()
    first = exits.generate(model, **batch, **GREEDY)
    assert torch.equal(first, model.generate(**batch, **GREEDY, custom_generate=exits))
    assert torch.equal(model.generate(**batch, **GREEDY), tiny_model("llama").generate(**batch, **GREEDY))


def test_sampling_draws_from_what_the_exits_say(model) -> None:
    exits, batch = exits_of(model), padded_batch()
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(4)
    first = exits.generate(model, **batch, **options)
    torch.manual_seed(4)
    assert torch.equal(first, exits.generate(model, **batch, **options))
    assert len(first) == 8
    torch.manual_seed(4)
    never = exits_of(model, threshold=NEVER).generate(model, **batch, **options)
    torch.manual_seed(4)
    assert torch.equal(never, model.generate(**batch, **options))


def test_processors_criteria_and_stop_strings_work(model) -> None:
    never, batch = exits_of(model, threshold=NEVER), padded_batch()
    options = {
        **GREEDY,
        "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]),
        "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e6)]),
    }
    assert torch.equal(never.generate(model, **batch, **options), model.generate(**batch, **options))
    plain = {"max_new_tokens": 20, "do_sample": False, "stop_strings": ["a", "e"], "tokenizer": tiny_tokenizer()}
    assert torch.equal(never.generate(model, **batch, **plain), model.generate(**batch, **plain))


def test_a_streamer_gets_every_token(model) -> None:
    tokenizer = tiny_tokenizer()
    inputs = {name: tensor[:1] for name, tensor in padded_batch().items()}
    exits, streamer = exits_of(model), TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=exits.generate, args=(model,), kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    whole = exits.generate(model, **inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(whole)


def test_a_conversation_goes_on_with_its_cache(model) -> None:
    exits, batch = exits_of(model), padded_batch()
    cache = DynamicCache(config=model.config)
    first: Any = exits.generate(model, **batch, **GREEDY, cache=cache, return_dict_in_generate=True)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 6, dtype=torch.long)], dim=1)
    second = exits.generate(model, first.sequences, attention_mask=mask, **GREEDY, cache=first.cache)
    assert second.shape == (4, batch["input_ids"].shape[1] + 12)
    assert cache.get_seq_length() == second.shape[1] - 1


def test_other_threads_stay_stock(model) -> None:
    batch, found = padded_batch(), []
    stock = model.generate(**batch, **GREEDY)

    class Looking(Constant):
        def confidence(self, candidate: Any) -> torch.Tensor:
            if not found:
                found.append(None)
                thread = threading.Thread(target=lambda: found.append(model.generate(**batch, **GREEDY)))
                thread.start()
                thread.join()
            return super().confidence(candidate)

    exits_of(model, gate=Looking(1.0)).generate(model, **batch, **GREEDY)
    assert torch.equal(found[1], stock)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"use_cache": False}, "dynamic cache"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"assistant_model": "other"}, "assistant_model"),
    ],
)
def test_ways_of_generating_that_are_refused(model, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedGenerationError, match=words):
        exits_of(model).generate(model, **padded_batch(), **{**GREEDY, **arguments})


def test_right_padding_is_refused(model) -> None:
    batch = padded_batch()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(UnsupportedGenerationError, match="padding"):
        exits_of(model).generate(model, **batch, **GREEDY)


def test_heads_of_another_model_are_refused(model) -> None:
    with pytest.raises(TokenExitsError, match="another LlamaForCausalLM"):
        exits_of(tiny_model("llama")).generate(model, **padded_batch(), **GREEDY)


def test_families_without_known_projections_are_refused() -> None:
    other = tiny_model("olmo2")
    with pytest.raises(UnsupportedModelError, match=r"olmo2.*known are gemma2"):
        exits_of(other).generate(other, **padded_batch(), **GREEDY)


def test_projections_that_are_not_the_model_s_are_refused() -> None:
    other = tiny_model("llama")
    forward = other.model.layers[2].self_attn.v_proj.forward
    calls = iter(range(100))
    other.model.layers[2].self_attn.v_proj.forward = lambda states: forward(states) * (1 + 0.1 * next(calls))
    with pytest.raises(InputError):
        exits_of(other).generate(other, **padded_batch(), **GREEDY)


@pytest.mark.parametrize(
    ("family", "options", "arguments", "words"),
    [
        ("gemma3_text", {"strategy": "share", "depths": (2, 4)}, {}, "first of each kind lie before layer 3"),
        ("gemma3_text", {"strategy": "recompute"}, {}, "window 6"),
        ("llama", {"strategy": "recompute"}, {"plan": LayerPlan.skipping(6, {1})}, "takes no plan"),
    ],
)
def test_unusable_strategies_are_refused(family: str, options: Any, arguments: Any, words: str) -> None:
    model = tiny_model(family)
    with pytest.raises(TokenExitsError, match=words):
        exits_of(model, **options).generate(model, **padded_batch(), **GREEDY, **arguments)


def test_recompute_takes_no_cache_from_outside(model) -> None:
    with pytest.raises(TokenExitsError, match="takes none from outside"):
        exits_of(model, strategy="recompute").generate(model, **padded_batch(), **GREEDY, cache=DynamicCache())
    output: Any = exits_of(model, strategy="recompute").generate(
        model, **padded_batch(), **GREEDY, return_dict_in_generate=True
    )
    assert output.cache is None
