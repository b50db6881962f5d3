"""Load a causal language model from the hub, a folder, a GGUF file or an installed weights package."""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from backbone.complete_weights import check_complete, check_gguf_used, read_gguf
from backbone.errors import InputError, LoadError, reason_of
from backbone.families import family_of
from backbone.files import cache_folder, lock_of, making_folder
from backbone.model_source import PACKAGE_PREFIX, check_folder, check_package, folder_of, gguf_file, is_weights_file

CONVERSION = "-2"
"""Part of the names of converted folders; another one after a change that makes earlier conversions wrong."""


def load_backbone(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder-only language model in eval mode, and its tokenizer set to pad on the left.

    Args:
        source: a hub id, a folder, a `.gguf` file, or `package:NAME` for an installed package that carries weights.
            GGUF weights are converted once and kept under `$LAYERBUDGET_CACHE` (default `~/.cache/layerbudget`).
        dtype: `auto` (bfloat16 where the device computes in it, else float32), or the name of a torch dtype.
        device: `auto` (CUDA where there is one, else CPU), or a torch device.
        revision: branch, tag or commit of a hub repository.
        token: for a private hub repository; True takes the one that `hf auth login` stored.
        attn_implementation: such as `sdpa` or `eager`; default: what transformers takes.
        device_map: spread the model over devices, such as `auto`, in place of `device`; needs accelerate.

    Raises:
        LoadError: no such model, package, file, dtype or device; weights that are quantised and not GGUF; a revision of
            what is not on the hub; a device together with a device_map.
        UnsupportedModelError: see `backbone.families.family_of`.
    """
    if device_map is not None and device != "auto":
        raise LoadError(f"device {device!r} and device_map {device_map!r:.80} were both given; leave one of them out")
    place = checked_device(device)
    if revision is not None and (is_weights_file(source) or folder_of(source)):
        raise LoadError(
            f"revision {revision!r} was asked for, but {source!r} is not on the hub, where revisions are; leave it out"
        )
    folder = _resolve(source)
    hub = {"revision": revision, "token": token}
    options = {"attn_implementation": attn_implementation, "device_map": device_map}
    hub, options = ({name: value for name, value in given.items() if value is not None} for given in (hub, options))
    options["dtype"] = _checked_dtype(dtype, place)
    with _naming(source):
        _check_not_quantised(source, AutoConfig.from_pretrained(folder, **hub))
        model = _complete(source, folder, **hub, **options)
    tokenizer = _tokenizer(folder, source, **hub)
    check_vocabulary(source, model, tokenizer)
    if device_map is None:
        model.to(place)  # type: ignore[arg-type]
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def _complete(source: str, folder: str, **options: Any) -> PreTrainedModel:
    """A supported model, all of whose weights come from its checkpoint."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, found = loaded
    family_of(model)
    check_complete(source, model, found)
    return model  # type: ignore[no-any-return]


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_backbone` gives with a model. Raises LoadError where there is none."""
    return _tokenizer(_resolve(source), source)


def _tokenizer(folder: str, source: str, **hub: Any) -> PreTrainedTokenizerBase:
    with _naming(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **hub)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise LoadError(f"the tokenizer of {source!r} names neither a padding token nor an end of text; give it one")
    return tokenizer


def check_vocabulary(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises LoadError for a tokenizer with tokens that a model's embedding has no rows for.

    Placeholders of images, sounds and films may lie behind the rows: text does not contain them (Gemma 3).
    """
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    placeholders = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    beyond = [token for token, place in tokenizer.get_added_vocab().items() if place >= rows]
    if tokenizer.vocab_size > rows or not placeholders.issuperset(beyond):
        raise LoadError(
            f"the tokenizer of {source!r} has {len(tokenizer):,} tokens, and the model's embedding has {rows:,} "
            "rows; use the tokenizer that the model was trained with, or train rows for the new tokens "
            "(resize_token_embeddings)"
        )


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turns whatever the libraries say of somebody's files into one sentence that names the model."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise LoadError(f"cannot load the model {source!r}: {reason_of(error)}") from error


def _check_not_quantised(source: str, config: PreTrainedConfig) -> None:
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings.quant_method
        raise LoadError(
            f"the weights of {source!r} are quantised ({method}), and load_backbone loads floating-point weights or "
            "GGUF; load them with AutoModelForCausalLM.from_pretrained and pass that to apply_plan, which tests it"
        )


def checked_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d{1,3}))?", device)
    if match is None:
        raise LoadError(f"unknown device {device!r}; use auto, cpu, cuda, cuda:N or mps")
    kind, number = match[1], int(match[2] or 0)
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if number >= counts[kind]:
        names = {"cpu": "CPU device", "cuda": "CUDA GPUs", "mps": "MPS devices"}
        raise LoadError(f"device {device!r} was asked for, but this machine has {counts[kind]} {names[kind]}")
    return torch.device(device)


def _checked_dtype(dtype: str | torch.dtype, place: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _computes_in_bfloat16(place) else torch.float32
    known = getattr(torch, dtype, None)
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise LoadError(f"unknown dtype {dtype!r}; use auto, bfloat16, float16 or float32")
    return known


def _computes_in_bfloat16(place: torch.device) -> bool:
    if place.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _resolve(source: str) -> str:
    """A folder or hub id that `from_pretrained` takes."""
    if source.startswith(PACKAGE_PREFIX):
        return str(_converted(_package_gguf(source.removeprefix(PACKAGE_PREFIX))))
    if source.endswith(".gguf"):
        return str(_converted(gguf_file(Path(source).expanduser())))
    if (folder := folder_of(source)) is None:
        return source
    check_folder(folder)
    return str(folder)


def _package_gguf(name: str) -> Path:
    check_package(name)
    try:
        package = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # somebody's own code, which may do anything
        raise LoadError(f"cannot import the package {name!r}: {type(error).__name__}: {error}") from None
    if hasattr(package, "assemble"):  # weights published in parts that the package itself joins and checks
        return Path(package.assemble(cache_folder() / f"{name}.gguf"))
    if getattr(package, "__file__", None) is None:
        raise LoadError(f"package {name!r} has no files of its own; name one that carries a .gguf file")
    root = Path(str(package.__file__)).parent
    found = sorted(root.rglob("*.gguf"))
    if len(found) != 1:
        raise LoadError(f"package {name!r} should carry one .gguf file, found {len(found)} in {root}")
    return found[0]


def _converted(gguf: Path) -> Path:
    """The folder with the weights of a GGUF file, dequantised; made once, keyed by the file's SHA-256."""
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / f"{key}{CONVERSION}"
    with lock_of(target):
        if not target.exists():
            with making_folder(target) as unfinished:
                _convert(gguf.absolute(), unfinished)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as library
    except ImportError as error:
        raise LoadError(f"reading {gguf.name} needs `pip install layerbudget[gguf]`: {error}") from error
    name, where = str(gguf), {"gguf_file": gguf.name}
    options = {"quantization_config": GgufConfig(**where, dequantize=True), "dtype": torch.bfloat16}
    with _naming(name), _one_reader(library) as read:
        reader = read_gguf(name, read)
        model = _complete(name, str(gguf.parent), **where, **options)
        check_gguf_used(name, reader, model)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
        check_vocabulary(name, model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _one_reader(library: Any) -> Iterator[Callable[[str], Any]]:
    """Within this block `library.GGUFReader` gives the first reader of a file out again.

    transformers makes one each for configuration, weights and tokenizer. With a vocabulary of 262,144 strings each
    takes tens of seconds.
    """
    kind = library.GGUFReader
    library.GGUFReader = functools.cache(kind)
    try:
        yield library.GGUFReader
    finally:
        library.GGUFReader = kind
