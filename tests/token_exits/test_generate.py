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


REFUSED: list[tuple[type[Exception], str, dict[str, Any], dict[str, Any]]] = [
    (UnsupportedGenerationError, "beam_search", {}, {"num_beams": 2}),
    (UnsupportedGenerationError, "dynamic cache", {}, {"use_cache": False}),
    (UnsupportedGenerationError, "StaticCache", {}, {"cache_implementation": "static"}),
    (
        UnsupportedGenerationError,
        "output_hidden_states",
        {},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ),
    (UnsupportedGenerationError, "prefill_chunk_size", {}, {"prefill_chunk_size": 4}),
    (UnsupportedGenerationError, "assistant_model", {}, {"assistant_model": "other"}),
    (UnsupportedGenerationError, "padding", {}, {"attention_mask": padded_batch()["attention_mask"].flip(1)}),
    (UnsupportedModelError, "olmo2.*known are gemma2", {"family": "olmo2"}, {}),
    (
        TokenExitsError,
        "first of each kind lie before layer 3",
        {"family": "gemma3_text", "strategy": "share", "depths": (2, 4)},
        {},
    ),
    (TokenExitsError, "window 6", {"family": "gemma3_text", "strategy": "recompute"}, {}),
    (TokenExitsError, "takes no plan", {"strategy": "recompute"}, {"plan": LayerPlan.skipping(6, {1})}),
    (TokenExitsError, "takes none from outside", {"strategy": "recompute"}, {"cache": DynamicCache()}),
]
"""An error, its words, the options of the exits and the arguments of `generate()`."""


@pytest.mark.parametrize(("error", "words", "options", "arguments"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_cannot_be_generated_is_refused(error, words, options, arguments) -> None:
    exits_options = dict(options)
    model = tiny_model(exits_options.pop("family", "llama"))
    with pytest.raises(error, match=words):
        exits_of(model, **exits_options).generate(model, **{**padded_batch(), **GREEDY, **arguments})


def test_heads_of_another_model_are_refused(model) -> None:
    with pytest.raises(TokenExitsError, match="another LlamaForCausalLM"):
        exits_of(tiny_model("llama")).generate(model, **padded_batch(), **GREEDY)


def test_projections_that_are_not_the_model_s_are_refused() -> None:
    other = tiny_model("llama")
    forward = other.model.layers[2].self_attn.v_proj.forward
    calls = iter(range(100))
    other.model.layers[2].self_attn.v_proj.forward = lambda states: forward(states) * (1 + 0.1 * next(calls))
    with pytest.raises(InputError):
        exits_of(other).generate(other, **padded_batch(), **GREEDY)


def test_recompute_gives_no_cache(model) -> None:
    output: Any = exits_of(model, strategy="recompute").generate(
        model, **padded_batch(), **GREEDY, return_dict_in_generate=True
    )
    assert output.cache is None
