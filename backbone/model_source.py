"""What a model's source holds, as far as it is on this machine; nothing of it is loaded, and torch is not either."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backbone.errors import InputError

PACKAGE_PREFIX = "package:"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


class LoadError(InputError):
    """A model that cannot be loaded as asked; the message says what was wrong."""


def look_at(source: str) -> dict[str, Any] | None:
    """The configuration of a model, from its folder or the hub's cache; None where it has to be loaded to be known.

    Args:
        source: as `backbone.loading.load_backbone` takes it.

    Raises:
        LoadError: there cannot be a model.
    """
    if source.startswith(PACKAGE_PREFIX):
        check_package(source.removeprefix(PACKAGE_PREFIX))
        return None
    if source.endswith(".gguf"):
        gguf_file(Path(source).expanduser())
        return None
    if Path(source).expanduser().is_dir() or source.startswith((".", "/", "~")):
        return _of_folder(Path(source).expanduser())
    return _of_hub(source)


def local_file(source: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository in the hub's cache; None where there is none."""
    if source.startswith(PACKAGE_PREFIX) or source.endswith(".gguf"):
        return None
    if Path(source).expanduser().is_dir() or source.startswith((".", "/", "~")):
        path = Path(source).expanduser() / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, name)
    return Path(cached) if isinstance(cached, str) else None


def local_settings(source: str, name: str) -> dict[str, Any]:
    """The content of a JSON file of a model; empty where there is none. Raises LoadError for a damaged one."""
    path = local_file(source, name)
    return {} if path is None else _parsed(path)


def check_package(name: str) -> None:
    """Raises LoadError unless a package is installed."""
    try:
        found = find_spec(name)
    except Exception:  # a package in which it should lie may do anything
        found = None
    if found is None:
        pip_name = name.replace("_", "-")
        raise LoadError(f"no package {name!r} is installed; `pip install {pip_name}` would bring it")


def gguf_file(path: Path) -> Path:
    """The file; raises LoadError unless it begins as GGUF does."""
    if not path.is_file():
        raise LoadError(f"no such GGUF file: {path}")
    with path.open("rb") as file:
        if (begin := file.read(4)) != b"GGUF":
            raise LoadError(f"{path} is no GGUF file: it begins with {begin!r}")
    return path


def check_folder(path: Path) -> None:
    """Raises LoadError for a folder that is missing or holds no configuration of a model."""
    if not (path / "config.json").is_file():
        raise LoadError(
            f"no model in the folder {path}: there is no config.json; name the one that save_pretrained wrote"
        )


def _of_folder(path: Path) -> dict[str, Any]:
    check_folder(path)
    if not any(found for pattern in WEIGHTS for found in path.glob(pattern)):
        raise LoadError(f"no model in the folder {path}: there are no weights, such as model.safetensors")
    return _parsed(path / "config.json")


def _of_hub(name: str) -> dict[str, Any] | None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise LoadError(f"{name!r} is neither a folder nor the name of a hub repository: {error}") from None
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return _parsed(Path(cached))
    if constants.HF_HUB_OFFLINE:
        raise LoadError(f"{name!r} is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it")
    return None


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise LoadError(f"{path} is damaged: it holds no keys and values")
    return config
