"""Weights that do not fill a model, hold more than it takes, or are damaged: one sentence, and nothing in the cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_model, tiny_tokenizer
from tiny_gguf import write_gguf

from backbone import loading
from backbone.errors import LoadError
from backbone.loading import load_backbone


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


GGUF = {
    "a tensor": (
        {"without": ["blk.3.ffn_up.weight"]},
        r"lack 'model\.layers\.3\.mlp\.up_proj\.weight', which would be",
    ),
    "a norm": ({"without": ["blk.2.attn_norm.weight"]}, r"lack 'model\.layers\.2\.input_layernorm\.weight'"),
    "the last norm": ({"without": ["output_norm.weight"]}, r"lack 'model\.norm\.weight'"),
    "the embedding": ({"without": ["token_embd.weight"]}, r"lack 'model\.embed_tokens\.weight'"),
    "a bias": ({"without": ["blk.0.attn_q.bias"]}, r"lack 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
    "layers": ({"keys": {"block_count": 8}}, r"lack 'model\.layers\.6\..*', .* and 21 more"),
    "too many layers": (
        {"keys": {"block_count": 4}},
        "18,688 numbers that transformers leaves out of its .* of 4 layers",
    ),
    "no layers": ({"keys": {"block_count": 0}}, "56,064 numbers that transformers leaves out of its .* of 0 layers"),
    "the number of layers": ({"without": ["block_count"]}, r"lacks 'qwen2\.block_count', which transformers would"),
    "the number of heads": ({"without": ["attention.head_count"]}, r"lacks 'qwen2\.attention\.head_count'"),
    "the width": ({"without": ["embedding_length"]}, r"lacks 'qwen2\.embedding_length'"),
    "epsilon": ({"without": ["attention.layer_norm_rms_epsilon"]}, r"lacks 'qwen2\.attention\.layer_norm_rms_epsilon'"),
    "the MLP's width": (
        {"without": ["feed_forward_length"]},
        r"with the shape \(32, 64\), and its .* needs \(32, \d+\)",
    ),
    "a shape": ({"tensors": {"blk.1.attn_q.weight": zeros(16, 32)}}, r"q_proj\.weight' with the shape \(16, 32\)"),
    "dimensions": ({"tensors": {"blk.1.attn_q.weight": zeros(2, 16, 32)}}, r"with the shape \(2, 16, 32\)"),
    "heads that do not fit": ({"keys": {"attention.head_count": 3}}, r"and its configuration needs"),
    "no heads": ({"keys": {"attention.head_count": 0}}, "cannot load the model '.*by zero"),
    "a short embedding": ({"tensors": {"token_embd.weight": zeros(90, 32)}}, r"shape \(90, 32\), .* needs \(97, 32\)"),
    "factors that are dropped": (
        {"tensors": {"rope_freqs.weight": zeros(4)}},
        "holds 4 numbers that transformers leaves",
    ),
    "a bias that is dropped": (
        {"tensors": {"blk.0.attn_output.bias": zeros(32)}},
        "holds 32 numbers that transformers",
    ),
}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Asserts that a model is refused in one sentence that names it, and that the cache stays empty."""
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))

    def check(source: Path, message: str) -> None:
        with pytest.raises(LoadError, match=message) as caught:
            load_backbone(str(source), dtype="float32")
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert {path.name for path in (tmp_path / "cache").glob("*")} <= {"locks"}

    return check


def test_gguf_whole_file_loads_as_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "whole.gguf")
    with file.open("rb") as opened:
        key = loading.hashlib.file_digest(opened, "sha256").hexdigest()
    spoiled = tmp_path / "cache" / key  # by an earlier version, which filled gaps with random weights
    spoiled.mkdir(parents=True)
    model, _ = load_backbone(str(file), dtype="float32")
    expected = tiny_model("qwen2").bfloat16().float()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_gguf_without_its_own_head_takes_the_embedding(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    model, _ = load_backbone(str(write_gguf(tmp_path / "tied.gguf", without=["output.weight"])))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", GGUF)
def test_gguf_that_does_not_fit_is_refused(name, tmp_path, refused) -> None:
    changes, message = GGUF[name]
    refused(write_gguf(tmp_path / "weights.gguf", **changes), message)


@pytest.mark.parametrize("part", [4, 30, 0.3, -1, "version", "count"], ids=str)
def test_gguf_that_is_damaged_is_refused(part, tmp_path, refused) -> None:
    file = write_gguf(tmp_path / "weights.gguf")
    whole = file.read_bytes()
    if part == "version":
        damaged = whole[:4] + b"\x09\0\0\0" + whole[8:]
    elif part == "count":
        damaged = whole[:8] + b"\xff" * 8 + whole[16:]
    else:
        damaged = whole[: int(part * len(whole)) if isinstance(part, float) else part]
    file.write_bytes(damaged)
    refused(file, rf"weights\.gguf', {len(damaged):,} bytes, is truncated or damaged: .")


UP = "model.layers.3.mlp.up_proj.weight"
FOLDERS = {
    "a weight": (lambda weights, config: weights.pop(UP), rf"lack '{UP}', which would be filled with random numbers"),
    "a norm": (lambda weights, config: weights.pop("model.norm.weight"), r"lack 'model\.norm\.weight'"),
    "a shape": (
        lambda weights, config: weights.update({UP: torch.zeros(8, 32)}),
        r"shape \(8, 32\), .* needs \(64, 32\)",
    ),
    "layers": (lambda weights, config: config.update(num_hidden_layers=8), r"lack 'model\.layers\.6.* and 15 more"),
    "too many layers": (
        lambda weights, config: config.update(num_hidden_layers=4),
        r"hold 'model\.layers\.4\..*and 15 more, which its configuration of 4 layers leaves out",
    ),
    "a bias that is dropped": (
        lambda weights, config: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        r"hold 'model\.layers\.0\.self_attn\.q_proj\.bias', which its configuration",
    ),
    "a norm that is dropped": (
        lambda weights, config: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        r"hold 'model\.layers\.0\.self_attn\.q_norm\.weight', which",
    ),
}
HARMLESS = {
    "as it is": lambda weights, config: None,
    "a head of another task": lambda weights, config: weights.update({"v_head.summary.weight": torch.ones(1, 32)}),
    "a mask": lambda weights, config: weights.update({"model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8)}),
    "frequencies": lambda weights, config: weights.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
    "a tied head": lambda weights, config: (weights.pop("lm_head.weight"), config.update(tie_word_embeddings=True)),
}


def saved(folder: Path, change) -> Path:
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_that_does_not_fit_is_refused(name, tmp_path, refused) -> None:
    change, message = FOLDERS[name]
    refused(saved(tmp_path / "model", change), message)


@pytest.mark.parametrize("name", HARMLESS)
def test_folder_with_harmless_differences_loads(name, tmp_path) -> None:
    model, _ = load_backbone(str(saved(tmp_path, HARMLESS[name])), dtype="float32")
    assert torch.equal(model.get_parameter(UP), tiny_model("llama").get_parameter(UP))


@pytest.mark.parametrize("kept", [0, 200, -1])
def test_folder_with_damaged_weights_is_refused(kept, tmp_path, refused) -> None:
    file = saved(tmp_path / "model", lambda weights, config: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(file.parent, "cannot load the model .*: .")


def test_folder_without_one_of_its_shards_is_refused(tmp_path, refused) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    refused(folder, "cannot load the model .*00002-of-")


@pytest.mark.parametrize(
    ("rows", "added", "fits"), [(97, 0, True), (98, 1, True), (97, 1, False), (98, 2, False), (90, 0, False)]
)
def test_tokenizer_with_more_tokens_than_rows_is_refused(rows, added, fits, tmp_path) -> None:
    tiny_model("llama", vocab_size=rows).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>", "<y>"][:added])
    tokenizer.save_pretrained(tmp_path)
    if fits:
        load_backbone(str(tmp_path), device="cpu")
        return
    with pytest.raises(LoadError, match=f"has {VOCABULARY + added} tokens, and the model's embedding has {rows} rows"):
        load_backbone(str(tmp_path), device="cpu")


def test_placeholder_of_images_needs_no_row(tmp_path) -> None:
    """As Gemma 3's text models have one behind their vocabulary."""
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "image_token": "<image>"}))
    load_backbone(str(tmp_path), device="cpu")
