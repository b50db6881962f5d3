"""Allocated generation equals each row generated alone under its plan, through both doors."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import N_LAYERS, padded_batch, tiny_model, tiny_tokenizer
from transformers import TextStreamer

import controller.features
from backbone.adapters import Adapter
from backbone.bridges import Bridge
from backbone.families import sublayer_bytes
from backbone.loading import model_fingerprint
from backbone.plan import LayerPlan, PlanMenu
from backbone.running import apply_plan
from backbone.stand_ins import StandIns, attach, attached_digest, detach
from controller.certificate import Certificate
from controller.features import Projection, prompt_features
from controller.gbdt import LightGBMController
from controller.mlp import MLPController
from oracle.decoding import Decoding
from oracle.prompts import PromptError
from runtime.allocator import Allocator, WrongModelError
from runtime.artefact import ArtefactError
from runtime.generation import UnsupportedGenerationError
from runtime.offline import generate_file
from runtime.texts import generate_texts

PLANS = [LayerPlan.skipping(N_LAYERS, {3, 4}), LayerPlan.skipping(N_LAYERS, {4})]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def make_allocator(model, threshold=0.5, controller=None, name="mlp") -> Allocator:
    """An allocator whose controller tells the prompts of `padded_batch` apart by their length."""
    batch = padded_batch()
    menu = PlanMenu.build(PLANS, sublayer_bytes(model), probe_depth=2)
    features = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2)
    projection = Projection.fit(features, 3)
    sufficient = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]], dtype=bool)
    fitted = controller or MLPController(epochs=300, dropout=0.0, learning_rate=0.01, hidden=16)
    fitted.fit(np.tile(projection(features), (20, 1)), np.tile(sufficient, (20, 1)), np.array(menu.budgets, "float32"))
    certificate = Certificate("risk", 0.1, 0.1, 100, threshold, 0.05, "abc", "2026-01-01", 22)
    return Allocator(menu, fitted, name, projection, certificate, Decoding(6), model_fingerprint(model), "tiny")


@pytest.fixture(scope="module")
def allocator(model) -> Allocator:
    return make_allocator(model)


def alone(model, plans, batch, **options) -> list[list[int]]:
    rows = []
    for row, plan in enumerate(plans):
        keep = batch["attention_mask"][row].bool()
        with apply_plan(model, plan):
            rows.append(
                model.generate(input_ids=batch["input_ids"][row : row + 1, keep], **options)[0, keep.sum() :].tolist()
            )
    return rows


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_rows_of_a_mixed_batch_equal_their_plan_alone(family, cache) -> None:
    model, batch = tiny_model(family), padded_batch()
    allocator = make_allocator(model)
    plans = allocator.allocate(model, **batch)
    assert plans == [LayerPlan.full(N_LAYERS), PLANS[1], PLANS[0], PLANS[0]]
    expected = alone(model, plans, batch, **GREEDY)
    output = allocator.generate(model, **batch, **GREEDY, **cache)
    other_door = model.generate(**batch, **GREEDY, **cache, custom_generate=allocator)
    assert torch.equal(output, other_door)
    assert [row[: len(want)] for row, want in zip(output[:, 11:].tolist(), expected, strict=True)] == expected


def test_beams_and_returned_sequences_keep_their_places(model, allocator) -> None:
    batch = padded_batch()
    plans = allocator.allocate(model, **batch)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 6}
    output = allocator.generate(model, **batch, **options)
    assert output.shape == (8, 17)
    for row, plan in enumerate(plans):
        keep = batch["attention_mask"][row].bool()
        with apply_plan(model, plan):
            expected = model.generate(input_ids=batch["input_ids"][row : row + 1, keep], **options)
        assert torch.equal(output[2 * row : 2 * row + 2, 11:], expected[:, keep.sum() :])


def test_sampling_returns_the_asked_sequences(model, allocator) -> None:
    output = allocator.generate(model, **padded_batch(), max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert output.shape[0] == 12


def test_the_output_object_carries_plans_and_time(model, allocator) -> None:
    batch = padded_batch()
    output = allocator.generate(model, **batch, **GREEDY, return_dict_in_generate=True)
    assert output.layer_plans == allocator.allocate(model, **batch)
    assert output.allocation_ms > 0
    assert torch.equal(output.sequences, allocator.generate(model, **batch, **GREEDY))


def test_one_prompt_streams_and_gives_scores(model, tokenizer, allocator, capsys) -> None:
    ids = padded_batch()["input_ids"][:1]
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = allocator.generate(
        model, input_ids=ids, **GREEDY, streamer=streamer, return_dict_in_generate=True, output_scores=True
    )
    assert len(output.scores) == output.sequences.shape[1] - 11
    assert capsys.readouterr().out.strip() == tokenizer.decode(output.sequences[0, 11:]).strip()


@pytest.mark.parametrize("option", ["output_scores", "output_logits", "output_hidden_states", "output_attentions"])
def test_outputs_a_step_are_refused_for_mixed_rows(model, allocator, option) -> None:
    with pytest.raises(UnsupportedGenerationError, match=f"{option}=True needs all rows on one plan"):
        allocator.generate(model, **padded_batch(), **GREEDY, return_dict_in_generate=True, **{option: True})


def test_a_filled_cache_is_refused(model, allocator) -> None:
    batch = padded_batch()
    cache = model(**batch).past_key_values
    step = {"input_ids": torch.cat([batch["input_ids"], batch["input_ids"][:, :1]], 1)}
    with pytest.raises(UnsupportedGenerationError, match="cache that already holds tokens"):
        allocator.generate(model, **step, past_key_values=cache, **GREEDY)


def test_embeddings_without_tokens_are_refused(model, allocator) -> None:
    embeddings = model.get_input_embeddings()(padded_batch()["input_ids"])
    with pytest.raises(UnsupportedGenerationError, match="inputs_embeds cannot be used"):
        allocator.generate(model, inputs_embeds=embeddings, **GREEDY)


def test_another_model_is_refused(allocator) -> None:
    with pytest.raises(WrongModelError, match=r"was made for llama-6x32-.* the model given is llama-6x32-"):
        allocator.allocate(tiny_model("llama", seed=5), **padded_batch())


def test_without_a_certificate_every_prompt_runs_the_full_model(model) -> None:
    allocator, batch = make_allocator(model, threshold=None), padded_batch()
    assert all(plan.is_full for plan in allocator.allocate(model, **batch))
    assert torch.equal(allocator.generate(model, **batch, **GREEDY), model.generate(**batch, **GREEDY))


def test_states_that_are_not_finite_get_the_full_plan(model, allocator, monkeypatch, caplog) -> None:
    def broken(*args):
        features = prompt_features(*args)
        features[2, 0] = np.nan
        return features

    monkeypatch.setattr("runtime.allocator.prompt_features", broken)
    assert controller.features.prompt_features is prompt_features
    plans = allocator.allocate(model, **padded_batch())
    assert plans[2].is_full
    assert plans[3] == PLANS[0]
    assert "not finite" in caplog.text


@pytest.mark.parametrize(("name", "controller_"), [("mlp", None), ("lightgbm", LightGBMController(n_trees=20))])
def test_saving_and_loading_gives_the_same_choices(model, tmp_path, name, controller_) -> None:
    saved, batch = make_allocator(model, controller=controller_, name=name), padded_batch()
    saved.save_pretrained(tmp_path / "allocator")
    saved.save_pretrained(tmp_path / "allocator")
    loaded = Allocator.from_pretrained(tmp_path / "allocator")
    assert loaded.allocate(model, **batch) == saved.allocate(model, **batch)
    assert (loaded.menu, loaded.certificate, loaded.decoding) == (saved.menu, saved.certificate, saved.decoding)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["allocator"]
    assert "Layer allocator for tiny" in (tmp_path / "allocator" / "README.md").read_text()


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1
    path.write_bytes(bytes(data))


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip_a_byte, _empty, lambda path: path.unlink()])
def test_every_damaged_file_is_found_before_it_is_read(model, tmp_path, damage) -> None:
    make_allocator(model, controller=LightGBMController(n_trees=5), name="lightgbm").save_pretrained(tmp_path / "whole")
    for name in sorted(path.name for path in (tmp_path / "whole").iterdir()):
        folder = tmp_path / f"damaged-{name}"
        Allocator.from_pretrained(tmp_path / "whole").save_pretrained(folder)
        damage(folder / name)
        with pytest.raises(ArtefactError, match=r"damaged|holds no allocator"):
            Allocator.from_pretrained(folder)


def test_folders_without_an_allocator_and_newer_formats_are_refused(model, tmp_path, monkeypatch) -> None:
    with pytest.raises(ArtefactError, match=r"holds no allocator: there is no manifest.json"):
        Allocator.from_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="neither a folder nor a hub repository"):
        Allocator.from_pretrained("nobody/no-such-allocator")
    monkeypatch.setattr("runtime.artefact.FORMAT_VERSION", 7)
    make_allocator(model).save_pretrained(tmp_path / "newer")
    monkeypatch.undo()
    with pytest.raises(ArtefactError, match="has allocator format 7, this version reads 1"):
        Allocator.from_pretrained(tmp_path / "newer")


def test_push_to_hub_uploads_the_saved_folder(model, allocator, monkeypatch) -> None:
    uploads = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Url", (str,), {"repo_id": repo_id})(f"hub/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploads[repo_id] = json.loads((folder_path / "manifest.json").read_text())

    monkeypatch.setattr("runtime.artefact.HfApi", Api)
    assert allocator.push_to_hub("me/mine") == "hub/me/mine"
    assert uploads["me/mine"]["controller"] == "mlp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no prompts file"),
        ('{"id": "a"}\n', "line 1: the prompt is missing or empty"),
        ("[]", "expected an object"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_named(model, allocator, tmp_path, text, message) -> None:
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PromptError, match=message):
        generate_file(allocator, model, tiny_tokenizer(), path, tmp_path / "out.jsonl", 2)
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_come_with_their_plans(model, allocator) -> None:
    texts = generate_texts(allocator, model, tiny_tokenizer(), ["abcdefgh", "ab"], Decoding(5))
    assert len(texts) == 2
    for text, prompt in zip(texts, ["abcdefgh", "ab"], strict=True):
        single = generate_texts(allocator, model, tiny_tokenizer(), [prompt], Decoding(5))[0]
        assert single == text


def with_stand_ins(model, scale: float = 0.3) -> Allocator:
    """An allocator with a bridge for each plan's gap and a change of a weight behind the probe."""
    torch.manual_seed(0)
    bridges = {plan: {plan.gaps[0].start: Bridge((scale * torch.randn(32, 32),), torch.zeros(32))} for plan in PLANS}
    adapter = Adapter({"model.layers.2.mlp.down_proj.weight": (scale * torch.randn(32, 2), torch.randn(2, 64))})
    return replace(make_allocator(model), stand_ins=StandIns(model_fingerprint(model), bridges, adapter))


def test_rows_run_their_plans_with_the_allocators_stand_ins() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    stock = model.generate(**batch, **GREEDY)
    allocator = with_stand_ins(model)
    plans = allocator.allocate(model, **batch)
    assert len(set(plans)) > 1
    output = allocator.generate(model, **batch, **GREEDY)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == alone(model, plans, batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY), stock), "without a plan the model is what it was"
    detach(model)
    assert output[:, batch["input_ids"].shape[1] :].tolist() != alone(model, plans, batch, **GREEDY)


def test_stand_ins_do_not_change_what_the_probe_sees() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    before = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2)
    with_stand_ins(model).prepare(model)
    assert np.array_equal(prompt_features(model, batch["input_ids"], batch["attention_mask"], 2), before)


def test_stand_ins_are_saved_with_the_allocator(tmp_path) -> None:
    model, batch = tiny_model("llama"), padded_batch()
    allocator = with_stand_ins(model)
    expected = allocator.generate(model, **batch, **GREEDY)
    detach(model)
    allocator.save_pretrained(tmp_path / "allocator")
    loaded = Allocator.from_pretrained(tmp_path / "allocator")
    assert loaded.stand_ins.digest == allocator.stand_ins.digest
    assert torch.equal(loaded.generate(model, **batch, **GREEDY), expected)
    assert attached_digest(model, PLANS[0]) == allocator.stand_ins.digest
    (tmp_path / "allocator" / "stand_ins.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtefactError, match=r"stand_ins\.safetensors does not match its SHA-256"):
        Allocator.from_pretrained(tmp_path / "allocator")


def test_a_model_with_the_stand_ins_of_others_is_refused() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    allocator, other = with_stand_ins(model), with_stand_ins(model, scale=0.1)
    allocator.prepare(model)
    with pytest.raises(WrongModelError, match=r"stand-ins .* attached, this allocator comes with"):
        other.generate(model, **batch, **GREEDY)
    with pytest.raises(WrongModelError, match="comes with none"):
        make_allocator(model).generate(model, **batch, **GREEDY)
    detach(model)
    other.generate(model, **batch, **GREEDY)
    attach(model, allocator.stand_ins)
    allocator.generate(model, **batch, **GREEDY)
