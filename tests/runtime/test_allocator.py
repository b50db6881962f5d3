"""Allocated generation equals each row generated alone under its plan, through both doors."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import padded_batch, tiny_model, tiny_tokenizer
from tiny_allocator import GREEDY, SETS, alone, make_allocator, resigned, with_healing

from backbone.errors import ArtefactError, InputError, WrongModelError
from controller.base import CONTROLLERS, LossRange
from controller.features import prompt_features
from controller.models.gbdt import LightGBMController
from layerbudget.inspection import inspect
from oracle.decoding import Decoding
from runtime.allocator import Allocator
from runtime.offline import generate_texts
from runtime.saving.allocator_files import run_folder


def test_another_model_is_refused(plain) -> None:
    with pytest.raises(WrongModelError, match=r"was made for llama-6x32-.* the model given is llama-6x32-"):
        plain.allocate(tiny_model("llama", seed=5), **padded_batch())


def test_a_copy_in_float16_is_told_why_it_is_another_model(plain) -> None:
    with pytest.raises(WrongModelError, match=r"the model given is .*, in float16, .* load it in bfloat16 or float32"):
        plain.allocate(tiny_model("llama").half(), **padded_batch())


def test_without_a_certificate_every_prompt_runs_the_full_model(model) -> None:
    allocator, batch = make_allocator(model, price=None), padded_batch()
    assert all(plan.is_full for plan in allocator.allocate(model, **batch))
    assert torch.equal(allocator.generate(model, **batch, **GREEDY), model.generate(**batch, **GREEDY))


def test_a_plan_that_is_certified_for_all_is_run_by_all(model, tmp_path) -> None:
    made, batch = make_allocator(model), padded_batch()
    made = replace(made, certificate=replace(made.certificate, plan=1))
    made.save_pretrained(tmp_path)
    allocator, plan = Allocator.from_pretrained(tmp_path), made.menu.plans[1]
    assert (allocator.allocate(model, **batch), allocator.keeps) == ([plan] * 4, [0.9])
    assert f"(one plan for all, {plan}, certified: " in repr(allocator).replace("mlp, ", "(")
    answers = allocator.generate(model, **batch, **GREEDY)[:, batch["input_ids"].shape[1] :].tolist()
    assert answers == alone(model, [plan] * 4, batch, **GREEDY)


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


SHIPPED = {
    0.97: "12100001110010110201000011110100101111101111010011101011011011011011000101111110",
    1.0: "12100001110010110201000011110100101111101111010011101011011011011011000101111110",
    1.05: "12100001110010110201000011110100101111101111010011101011111011011011000101111110",
}
"""What the shipped allocator chose when it was made: plans of 80 vectors of features at each level."""


def test_the_shipped_allocator_chooses_as_before() -> None:
    allocator = Allocator.from_pretrained("package:layerbudget")
    features = np.random.default_rng(0).normal(size=(80, allocator.projection.n_features)).astype("float32")
    predicted = allocator.controller.predict(features)
    for keep, plans in SHIPPED.items():
        price = allocator.at(keep).certificate.price
        assert "".join(map(str, allocator.rule.choose(predicted, price))) == plans


@pytest.mark.parametrize(("risk", "least"), [("mean_score", -1.0), ("insufficient", 0.0)])
@pytest.mark.parametrize("name", ["logistic", "mlp", "lightgbm"])
def test_a_file_without_a_range_of_losses_gets_that_of_the_risk(model, tmp_path, name, risk, least) -> None:
    """The numbers of a controller's file are what they were before controllers predicted losses."""
    saved = make_allocator(model, controller=CONTROLLERS[name](), name=name)
    saved = replace(saved, certificate=replace(saved.certificate, risk=risk))
    saved.controller.loss_range = LossRange(least)
    saved.save_pretrained(tmp_path)
    path = tmp_path / "controller.safetensors"
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["controller"])
    assert about.pop("least_loss") == least
    save_file(load_file(path), path, {"controller": json.dumps(about)} if about else None)
    resigned(tmp_path)
    loaded = Allocator.from_pretrained(tmp_path)
    features = np.random.default_rng(0).normal(size=(9, saved.projection.n_features)).astype("float32")
    np.testing.assert_array_equal(loaded.controller.predict(features), saved.controller.predict(features))
    assert loaded.controller.predict(features).min() >= least


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
    for other in (7, 9):
        monkeypatch.setattr("runtime.saving.allocator_files.FORMAT_VERSION", other)
        make_allocator(model).save_pretrained(tmp_path / "other")
        monkeypatch.undo()
        with pytest.raises(ArtefactError, match=f"has allocator format {other}, this version reads 8; make it again"):
            Allocator.from_pretrained(tmp_path / "other")


def test_the_run_of_an_allocator_is_found_from_its_own_folder(plain, tmp_path, monkeypatch) -> None:
    plain.save_pretrained(tmp_path / "allocator")
    (tmp_path / "metrics.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "allocator")
    assert run_folder(".") == tmp_path == run_folder(str(tmp_path / "allocator"))
    with pytest.raises(InputError, match=r"metrics.json is damaged"):
        inspect(".")


def test_a_repository_is_downloaded_as_asked(plain, tmp_path, monkeypatch) -> None:
    asked = []
    plain.save_pretrained(tmp_path / "snapshot" / "small" / "one")

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("runtime.saving.allocator_files.snapshot_download", download)
    options = {"revision": "v2", "token": "hf_secret", "cache_dir": tmp_path / "cache"}
    loaded = Allocator.from_pretrained("me/mine", **options, subfolder="small/one")
    assert asked == [("me/mine", {**options, "allow_patterns": "small/one/*"})]
    assert loaded.menu == plain.menu
    with pytest.raises(ArtefactError, match="holds no allocator"):
        Allocator.from_pretrained("me/mine", subfolder="small/two")
    with pytest.raises(ArtefactError, match="holds no allocator"):
        Allocator.from_pretrained("me/mine")
    assert asked[-1] == ("me/mine", {"revision": None, "token": None, "cache_dir": None, "allow_patterns": None})


def test_a_local_folder_has_subfolders_but_no_revisions(plain, tmp_path) -> None:
    plain.save_pretrained(tmp_path / "mine")
    assert Allocator.from_pretrained(tmp_path, subfolder="mine").menu == plain.menu
    with pytest.raises(ArtefactError, match=r"revision 'v2' was asked for, but .* is a local folder"):
        Allocator.from_pretrained(tmp_path / "mine", revision="v2")
    for outside in ("../mine", str(tmp_path / "mine")):
        with pytest.raises(ArtefactError, match="lies outside of"):
            Allocator.from_pretrained(tmp_path / "mine", subfolder=outside)


def test_push_to_hub_uploads_the_saved_folder(plain, monkeypatch) -> None:
    uploads = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Url", (str,), {"repo_id": repo_id})(f"hub/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploads[repo_id] = json.loads((folder_path / "manifest.json").read_text())

    monkeypatch.setattr("runtime.saving.allocator_files.HfApi", Api)
    assert plain.push_to_hub("me/mine") == "hub/me/mine"
    assert uploads["me/mine"]["controller"] == "mlp"


def test_texts_come_with_their_plans(model, plain) -> None:
    texts = generate_texts(plain.generate, model, tiny_tokenizer(), ["abcdefgh", "ab"], Decoding(5))
    assert len(texts) == 2
    for text, prompt in zip(texts, ["abcdefgh", "ab"], strict=True):
        single = generate_texts(plain.generate, model, tiny_tokenizer(), [prompt], Decoding(5))[0]
        assert single == text


def test_rows_run_their_plans_with_the_allocators_healing() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    stock = model.generate(**batch, **GREEDY)
    allocator = with_healing(model)
    plans = allocator.allocate(model, **batch)
    assert len(set(plans)) > 1
    output = allocator.generate(model, **batch, **GREEDY)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == alone(model, plans, batch, allocator.healing, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY), stock), "without a plan the model is what it was"
    assert output[:, batch["input_ids"].shape[1] :].tolist() != alone(model, plans, batch, **GREEDY)


def test_healing_do_not_change_what_the_probe_sees() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    before = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2, SETS)["states"]
    with_healing(model).prepare(model)
    after = prompt_features(model, batch["input_ids"], batch["attention_mask"], 2, SETS)["states"]
    assert np.array_equal(after, before)


def test_healing_are_saved_with_the_allocator(tmp_path) -> None:
    model, batch = tiny_model("llama"), padded_batch()
    allocator = with_healing(model)
    expected = allocator.generate(model, **batch, **GREEDY)
    allocator.save_pretrained(tmp_path / "allocator")
    loaded = Allocator.from_pretrained(tmp_path / "allocator")
    assert loaded.healing.digest == allocator.healing.digest
    assert torch.equal(loaded.generate(model, **batch, **GREEDY), expected)
    (tmp_path / "allocator" / "healing.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtefactError, match=r"healing\.safetensors does not match its SHA-256"):
        Allocator.from_pretrained(tmp_path / "allocator")


def test_allocators_with_other_healing_share_a_model() -> None:
    """Each runs its own healing, whichever ran before, and leaves nothing on the model."""
    model, batch = tiny_model("llama"), padded_batch()
    some = [with_healing(model), with_healing(model, scale=0.6), make_allocator(model)]
    plans, traces = some[0].allocate(model, **batch), set(vars(model))
    expected = [alone(model, plans, batch, one.healing, **GREEDY) for one in some]
    assert expected[0] != expected[1] != expected[2] != expected[0]
    for _ in range(2):
        for allocator, tokens in zip(some, expected, strict=True):
            output = allocator.generate(model, **batch, **GREEDY)
            assert output[:, batch["input_ids"].shape[1] :].tolist() == tokens
    assert set(vars(model)) == traces
