"""A model's family, configuration and files, read before the model is loaded.

Models of declared families need no torch for this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.errors import LoadError, UnsupportedModelError

if TYPE_CHECKING:  # imports torch, which declared families do without
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Family:
    """How to reach the layers of one `model_type`.

    Attributes:
        decoder: path from the causal language model to the module that runs the layers.
        layers: name of the list of layers in that module.
        attention: name of the attention block in a layer, which returns `(hidden, weights)`; None where unknown,
            and then only whole layers can be skipped.
        mlp: names of the modules of a layer that make up its MLP, in the order in which they run.
        returns_tuple: a layer returns `(hidden, weights)` instead of `hidden`.
        adds_residual: attention and MLP are called with `(hidden, residual)` and return their output plus the residual.
    """

    decoder: str
    layers: str
    attention: str | None
    mlp: tuple[str, ...] = ()
    returns_tuple: bool = False
    adds_residual: bool = False


_LLAMA_LIKE = Family("model", "layers", "self_attn", ("mlp",))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma2", "gemma3_text", "olmo2", "stablelm"),
            *("granite", "cohere2", "smollm3", "mixtral", "qwen3_moe"),
        ),
        _LLAMA_LIKE,
    ),
    "opt": Family("model.decoder", "layers", "self_attn", ("fc1", "fc2")),
    "gpt2": Family("transformer", "h", "attn", ("mlp",)),
    "gpt_neox": Family("gpt_neox", "layers", "attention", ("mlp",)),
    "falcon": Family("transformer", "h", "self_attention", ("mlp",), returns_tuple=True),
    "bloom": Family("transformer", "h", "self_attention", ("mlp",), returns_tuple=True, adds_residual=True),
}


ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Values of `config.layer_types` that declared families may have."""


def check_supported(config: PreTrainedConfig | Mapping[str, Any]) -> None:
    """Check whether layers of a model can be skipped.

    Args:
        config: its configuration, or the content of its `config.json`.

    Raises:
        UnsupportedModelError: encoder-decoder, multimodal and KV-sharing models; hybrids and other models whose layers
            keep a recurrent state instead of keys and values.
    """
    given = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    kind = given("model_type")
    if given("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder model; layerbudget runs decoder-only language models"
        )
    if any(given(part) is not None for part in ("vision_config", "audio_config")):
        raise UnsupportedModelError(f"{kind} is multimodal; load its language model alone, for example gemma3_text")
    if given("num_kv_shared_layers"):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers, so a layer cannot be skipped exactly"
        )
    if kind in FAMILIES and ATTENTION.issuperset(given("layer_types") or ()):
        return
    if state := _state_in_place_of_keys(config):
        raise UnsupportedModelError(
            f"{kind} is not made of attention layers alone: {state}; layerbudget cannot skip layers of such models yet"
        )


def _state_in_place_of_keys(config: PreTrainedConfig | Mapping[str, Any]) -> str | None:
    """A clause on what layers keep in place of keys and values; None for nothing, or where only loading can tell."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, DynamicCache
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    try:
        if isinstance(config, Mapping):
            config = AutoConfig.for_model(**config)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
    except Exception:  # custom code or kinds of layers: only the loaded model can tell
        return None
    kinds = getattr(text, "layer_types", None)
    if kinds is None and getattr(model_class, "_is_stateful", False):
        return "they keep a recurrent state"
    for index, layer in enumerate(layers):
        if not isinstance(layer, DynamicLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
            kind = f" ({kinds[index]})" if kinds else ""
            return f"layer {index}{kind} keeps a {type(layer).__name__} in place of keys and values"
    return None


PACKAGE_PREFIX = "package:"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def look_at(source: str) -> dict[str, Any] | None:
    """Read a model's configuration from its folder or the hub's cache.

    Args:
        source: as `backbone.loading.load_backbone` takes it.

    Returns:
        None for packages, GGUF files and repositories that are not in the cache: loading them gives the configuration.

    Raises:
        LoadError: no model can be loaded from the source.
    """
    if source.startswith(PACKAGE_PREFIX):
        check_package(source.removeprefix(PACKAGE_PREFIX))
        return None
    if source.endswith(".gguf"):
        gguf_file(Path(source).expanduser())
        return None
    return _hub_config(source) if (folder := folder_of(source)) is None else _folder_config(folder)


def is_weights_file(source: str) -> bool:
    """Whether a model's source names a package with weights, or a GGUF file."""
    return source.startswith(PACKAGE_PREFIX) or source.endswith(".gguf")


def folder_of(source: str) -> Path | None:
    """The folder that a model's source names, which may be missing; None for another kind of source."""
    if is_weights_file(source):
        return None
    path = Path(source).expanduser()
    return path if path.is_dir() or source.startswith((".", "/", "~")) else None


def local_file(source: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository in the hub's cache; None where there is none."""
    if is_weights_file(source):
        return None
    if (folder := folder_of(source)) is not None:
        return path if (path := folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, name)
    return Path(cached) if isinstance(cached, str) else None


def local_settings(source: str, name: str) -> dict[str, Any]:
    """The content of a JSON file of a model; empty where there is none. Raises LoadError for a damaged one."""
    path = local_file(source, name)
    return {} if path is None else _read_json(path)


def check_package(name: str) -> None:
    """Raises LoadError unless a package is installed."""
    try:
        found = find_spec(name)
    except Exception:  # the import of a parent package can raise anything
        found = None
    if found is None:
        pip_name = name.replace("_", "-")
        raise LoadError(f"no package {name!r} is installed; `pip install {pip_name}` installs it")


def gguf_file(path: Path) -> Path:
    """Return `path`; raises LoadError unless it is a file that begins with `GGUF`."""
    if not path.is_file():
        raise LoadError(f"no such GGUF file: {path}")
    with path.open("rb") as file:
        if (begin := file.read(4)) != b"GGUF":
            raise LoadError(f"{path} is no GGUF file: it begins with {begin!r}, not with b'GGUF'")
    return path


def check_folder(path: Path) -> None:
    """Raises LoadError for a folder that is missing or holds no configuration of a model."""
    if not (path / "config.json").is_file():
        raise LoadError(
            f"no model in the folder {path}: there is no config.json; name the folder that save_pretrained wrote"
        )


def _folder_config(path: Path) -> dict[str, Any]:
    check_folder(path)
    if not any(found for pattern in WEIGHTS for found in path.glob(pattern)):
        raise LoadError(f"no model in the folder {path}: there are no weights, such as model.safetensors")
    return _read_json(path / "config.json")


def _hub_config(name: str) -> dict[str, Any] | None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise LoadError(f"{name!r} is neither a folder nor the name of a hub repository: {error}") from None
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return _read_json(Path(cached))
    if constants.HF_HUB_OFFLINE:
        raise LoadError(f"{name!r} is not in the hub's cache, and HF_HUB_OFFLINE forbids the download")
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise LoadError(f"{path} is damaged: it holds a {type(config).__name__}, not a JSON object")
    return config
