"""Iterables, single prompts and arguments in each other's place: used as they are meant, or refused in one sentence."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from chat_templates import WITH_BEGIN
from tiny import N_LAYERS, padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import FULL, GREEDY, PLANS, ByLength, make_allocator
from transformers import GenerationConfig

from backbone.errors import ArtefactError, InputError, PlanError, UnsupportedGenerationError, UnsupportedModelError
from backbone.execution.apply_plan import apply_plan, apply_plans
from backbone.families import sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from oracle.chat import ChatError, ChatTemplate, Question
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat

PROMPTS = ["abcdefgh", "abc", "abcdefghijk"]
TURN = {"role": "user", "content": "abc"}


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_BEGIN
    return tokenizer


@pytest.fixture(scope="module")
def chat_allocator(allocator, chat_tokenizer):
    chat = ChatFormat.of(ChatTemplate.of_tokenizer(chat_tokenizer), chat_tokenizer, for_all=False)
    return replace(allocator, chat=chat)


def logits_under(model, plans):
    with apply_plans(model, plans), torch.no_grad():
        return model(**padded_batch()).logits.tolist()


TAKERS = {
    "PlanMenu.build": ([*PLANS], lambda model, allocator, given: PlanMenu.build(given, sublayer_bytes(model), 2)),
    "PlanMenu": ([PLANS[0], FULL], lambda model, allocator, given: PlanMenu(given, iter((0.5, 1.0)), 2)),
    "LayerPlan": ([0, 2], lambda model, allocator, given: LayerPlan(N_LAYERS, given, iter((1, 2)))),
    "LayerPlan.skipping": ([3, 4], lambda model, allocator, given: LayerPlan.skipping(N_LAYERS, given)),
    "attention skipped": ([3, 4], lambda model, allocator, given: LayerPlan.skipping(N_LAYERS, attention=given)),
    "LayerPlan.without": ([3], lambda model, allocator, given: FULL.without(attention=given)),
    "apply_plans": ([*PLANS, FULL, FULL], lambda model, allocator, given: logits_under(model, given)),
    "inputs": (
        PROMPTS,
        lambda model, allocator, given: allocator.inputs(tiny_tokenizer(), given)["input_ids"].tolist(),
    ),
    "generate_many": (PROMPTS, lambda model, allocator, given: allocator.generate_many(model, tiny_tokenizer(), given)),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_an_iterator_gives_what_a_list_gives(model, allocator, taker) -> None:
    given, take = TAKERS[taker]
    assert take(model, allocator, iter(given)) == take(model, allocator, list(given))
    assert hash(LayerPlan(N_LAYERS, {0}, [0])) == hash(LayerPlan(N_LAYERS, frozenset({0}), frozenset({0})))


@pytest.mark.parametrize("given", ["abc", TURN, [TURN], (TURN,), Question("abc")], ids=repr)
def test_a_single_prompt_is_one_prompt(model, chat_allocator, chat_tokenizer, given) -> None:
    tokenizer = chat_tokenizer
    expected = chat_allocator.inputs(tokenizer, [[TURN]])["input_ids"]
    assert chat_allocator.inputs(tokenizer, given)["input_ids"].tolist() == expected.tolist()
    assert chat_allocator.inputs(tokenizer, [given])["input_ids"].tolist() == expected.tolist()
    (text,) = chat_allocator.generate_many(model, tokenizer, given)
    assert [text] == chat_allocator.generate_many(model, tokenizer, [[TURN]])


def test_what_is_no_prompt_is_refused(allocator) -> None:
    with pytest.raises(ChatError, match="prompts are texts or conversations, got 3"):
        allocator.inputs(tiny_tokenizer(), 3)


@pytest.mark.parametrize("ends", [[2], [0], None], ids=["pad differs", "pad ends texts", "no end"])
def test_allocate_infers_the_mask_as_generate_does(ends) -> None:
    model, batch = tiny_model("llama"), padded_batch()
    model.generation_config.eos_token_id = ends
    allocator = make_allocator(model, controller=ByLength())
    output = allocator.generate(model, batch["input_ids"], **GREEDY, return_dict_in_generate=True)
    assert allocator.allocate(model, batch["input_ids"]) == output.plans
    if ends != [0]:
        assert allocator.allocate(model, batch["input_ids"]) == allocator.allocate(model, **batch)
        with pytest.raises(UnsupportedGenerationError, match="row 1 ends in padding"):
            allocator.allocate(model, batch["input_ids"].flip(1))


IDS = padded_batch()["input_ids"]
CALLS = {
    "generate(name)": (lambda a, m, t: a.generate("gpt2", IDS), "got the name 'gpt2'; load it first: model, tokenizer"),
    "generate(tokenizer)": (
        lambda a, m, t: a.generate(t, IDS),
        "a model is needed, got a .*Tokenizer.*; give the model",
    ),
    "generate(ids, model)": (lambda a, m, t: a.generate(IDS, m), "a model is needed, got a Tensor"),
    "allocate(name)": (lambda a, m, t: a.allocate("gpt2", IDS), "load_backbone.'gpt2'"),
    "allocate(ids)": (lambda a, m, t: a.allocate(IDS, m), "a model is needed, got a Tensor"),
    "measure(tokenizer)": (lambda a, m, t: a.measure(t), "a model is needed"),
    "check_model(name)": (lambda a, m, t: a.check_model("gpt2"), "a model is needed"),
    "many(tokenizer, model)": (lambda a, m, t: a.generate_many(t, m, PROMPTS), "a model is needed, got a .*Tokenizer"),
    "many(model, prompts)": (lambda a, m, t: a.generate_many(m, PROMPTS, t), "a tokenizer is needed, got a list"),
    "inputs(prompts)": (lambda a, m, t: a.inputs(PROMPTS, t), "a tokenizer is needed, got a list"),
    "inputs(model)": (lambda a, m, t: a.inputs(m, PROMPTS), "a tokenizer is needed, got a LlamaForCausalLM"),
    "apply_plan(name)": (lambda a, m, t: apply_plan("gpt2", FULL).__enter__(), "got the name 'gpt2'"),
    "apply_plan(plan, model)": (lambda a, m, t: apply_plan(FULL, m).__enter__(), "a model is needed, got a LayerPlan"),
    "apply_plan(plans)": (lambda a, m, t: apply_plan(m, [FULL]).__enter__(), "a LayerPlan is needed, got .LayerPlan"),
    "apply_plans(plan)": (lambda a, m, t: apply_plans(m, FULL).__enter__(), "takes a list of plans, got plan 0-5; use"),
    "apply_plans(texts)": (lambda a, m, t: apply_plans(m, ["0-5"]).__enter__(), "a LayerPlan is needed, got '0-5'"),
}


@pytest.mark.parametrize("call", CALLS)
def test_swapped_or_missing_objects_are_named(model, allocator, call) -> None:
    make, sentence = CALLS[call]
    with pytest.raises(InputError, match=sentence) as refused:
        make(allocator, model, tiny_tokenizer())
    assert isinstance(refused.value, UnsupportedModelError | PlanError | InputError)
    assert "\n" not in str(refused.value)


def test_a_runs_folder_names_its_allocator(tmp_path, allocator) -> None:
    allocator = make_allocator(tiny_model("llama"))
    allocator.save_pretrained(tmp_path / "demo" / "allocator")
    with pytest.raises(ArtefactError, match=r"demo is the folder of a run and no allocator; give .*demo/allocator$"):
        Allocator.from_pretrained(tmp_path / "demo")
    assert Allocator.from_pretrained(tmp_path / "demo", subfolder="allocator").fingerprint == allocator.fingerprint
    allocator.save_pretrained(tmp_path / "demo")
    assert Allocator.from_pretrained(tmp_path / "demo").fingerprint == allocator.fingerprint


def test_options_of_a_set_count_wherever_they_stand(model, allocator) -> None:
    many = partial(allocator.generate_many, model, tiny_tokenizer())
    for options in ({"max_new_tokens": 2}, {"num_beams": 2}):
        assert many(PROMPTS, generation_config=GenerationConfig(**options)) == many(PROMPTS, **options)
    short = many(PROMPTS, max_new_tokens=2)
    assert all(len(text.text) <= 2 for text in short)
    first = short[0].text[0]
    assert many(PROMPTS[:1], stop_strings=[first])[0].text == first
