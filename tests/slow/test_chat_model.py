"""Real weights of an instruct model: set LAYERBUDGET_CHAT_MODEL to its folder or .gguf file, else this is skipped."""

import os
from dataclasses import replace

import numpy as np
import pytest

from backbone.families import model_fingerprint, sublayer_bytes
from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from controller.certificate.certificate import Certificate
from controller.features import Projection, prompt_features
from controller.models.logistic import LogisticController
from oracle.chat import ChatTemplate
from oracle.decoding import Decoding
from oracle.labels.labeller import Labeller
from oracle.labels.reader import key_of
from oracle.labels.store import LabelStore
from oracle.prompts import Prompt
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat

SOURCE = os.environ.get("LAYERBUDGET_CHAT_MODEL", "")
pytestmark = pytest.mark.skipif(not SOURCE, reason="LAYERBUDGET_CHAT_MODEL is not set")

NEW_TOKENS = 24
QUESTIONS = (
    "What is the capital of France?",
    "Which gas do plants take in from the air?",
    "Give the opposite of the word: cold.",
    "How many days are in a week?",
)


@pytest.fixture(scope="module")
def loaded():
    return load_backbone(SOURCE, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def stock(loaded) -> list[list[int]]:
    """The tokenizer's own template and stock `generate()`, one prompt at a time."""
    model, tokenizer = loaded
    rows = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        rows.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return rows


@pytest.fixture(scope="module")
def allocator(loaded) -> Allocator:
    """Without a certified price: every prompt runs the full plan."""
    model, tokenizer = loaded
    template = ChatTemplate.of_tokenizer(tokenizer)
    assert template is not None
    n_layers = model.config.num_hidden_layers
    menu = PlanMenu.build([LayerPlan.exiting(n_layers, n_layers - 2)], sublayer_bytes(model), probe_depth=2)
    inputs = tokenizer(list(QUESTIONS), return_tensors="pt", padding=True)
    features = prompt_features(model, inputs["input_ids"], inputs["attention_mask"], 2, ("length",))
    projection, losses = Projection.fit(features, ("length",), 1), np.array([[1, 0], [0, 0], [1, 0], [0, 0]], "float32")
    controller = LogisticController()
    controller.fit(projection(features), losses, np.array(menu.budgets, "float32"))
    certificate = Certificate("insufficient", 0.9, 0.1, 9, None, 0.0, "", "2026-01-01", 22)
    parts = (menu, controller, "logistic", projection, certificate, Decoding(NEW_TOKENS), model_fingerprint(model))
    made = Allocator(*parts, SOURCE)
    return replace(made, chat=ChatFormat.of(template, tokenizer))


def test_labels_are_the_tokens_of_stock_generate(loaded, stock, allocator, tmp_path) -> None:
    model, tokenizer = loaded
    labeller = Labeller(model, tokenizer, Decoding(NEW_TOKENS), LabelStore(tmp_path / "labels.db"), 1)
    template = allocator.chat.template(tokenizer)
    prompts = [Prompt(text, "chat", text, "", "agreement").rendered(template) for text in QUESTIONS]
    full = allocator.menu.plans[-1]
    labeller.label_full(prompts, full)
    labels = labeller.labels(full, prompts)
    assert [list(labels[key_of(prompt)].answer_ids) for prompt in prompts] == stock


def test_the_allocators_answers_are_those_of_stock_generate(loaded, stock, allocator, caplog) -> None:
    model, tokenizer = loaded
    for question, ids in zip(QUESTIONS, stock, strict=True):
        inputs = allocator.inputs(tokenizer, [question])
        output = allocator.generate(model, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == ids
    assert not [text for text in caplog.messages if "does not begin" in text]
    texts = allocator.generate_many(model, tokenizer, QUESTIONS, batch_size=1)
    assert [text.text for text in texts] == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in stock]
    print(*(f"{question} {text.text!r}" for question, text in zip(QUESTIONS, texts, strict=True)), sep="\n")
    raw = allocator.generate_many(model, tokenizer, QUESTIONS, batch_size=1, raw=True)
    print("raw:", *(f"{question} {text.text!r}" for question, text in zip(QUESTIONS, raw, strict=True)), sep="\n")


def test_a_raw_prompt_is_noticed(loaded, allocator, caplog) -> None:
    model, tokenizer = loaded
    allocator.generate(model, **tokenizer(QUESTIONS[0], return_tensors="pt"), max_new_tokens=1, do_sample=False)
    assert [text for text in caplog.messages if "does not begin with" in text]
