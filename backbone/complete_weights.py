"""Refuse weights that do not fill a model, or that hold more than the model takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from backbone.errors import LoadError, reason_of
from backbone.families import decoder_layers, family_of

SHOWN = 3
"""Names that a message quotes."""

ARCHITECTURE = "general.architecture"
GGUF_KEYS = (
    ("block_count",),
    ("embedding_length",),
    ("attention.head_count",),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
"""Without one of each of these transformers takes the numbers of the family's first model."""


def check_complete(source: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Check that a checkpoint filled every weight of a model, and that nothing of its layers was left over.

    Args:
        source: the model's name, for messages.
        model: as `from_pretrained(..., ignore_mismatched_sizes=True)` gives it.
        found: what `output_loading_info=True` gives beside it.

    Raises:
        LoadError: weights are missing or of another shape, and so were filled with random numbers; or the checkpoint
            holds weights of layers that the model leaves out.
    """
    if missing := found["missing_keys"]:
        raise LoadError(f"the weights of {source!r} lack {_some(missing)}, which would be filled with random numbers")
    if found["mismatched_keys"]:
        name, there, wanted = sorted(found["mismatched_keys"])[0]
        raise LoadError(
            f"the weights of {source!r} hold {name!r} with the shape {tuple(there)}, and its configuration needs "
            f"{tuple(wanted)}"
        )
    if unused := [name for name in found["unexpected_keys"] if _changes_output(model, name)]:
        raise LoadError(
            f"the weights of {source!r} hold {_some(unused)}, which its configuration of {len(decoder_layers(model))} "
            "layers leaves out, so that this model is not the one that was saved"
        )


def read_gguf(name: str, read: Callable[[str], Any]) -> Any:
    """`read`, which is `gguf.GGUFReader`, of a file whose metadata say what transformers would otherwise guess.

    Raises LoadError if the file is truncated or damaged, or lacks keys.
    """
    try:
        reader = read(name)
    except Exception as error:  # whatever the bytes happen to mean
        size = Path(name).stat().st_size
        raise LoadError(f"{name!r}, {size:,} bytes, is truncated or damaged: {reason_of(error)}") from error
    kind = "?" if (field := reader.fields.get(ARCHITECTURE)) is None else field.contents()
    wanted = [(ARCHITECTURE,), *(tuple(f"{kind}.{key}" for key in keys) for keys in GGUF_KEYS)]
    if missing := [names[0] for names in wanted if reader.fields.keys().isdisjoint(names)]:
        raise LoadError(f"{name!r} lacks {_some(missing)}, which transformers would replace by a guess")
    return reader


def check_gguf_used(name: str, reader: Any, model: PreTrainedModel) -> None:
    """Raises LoadError if a GGUF file holds more numbers than the model has taken from it.

    transformers drops tensors of layers beyond `block_count`, biases that the family's configuration does not know, and
    factors of rotary embeddings, and says nothing.
    """
    is_copy = {"output.weight": bool(getattr(model.config, "tie_word_embeddings", False))}
    held = sum(int(tensor.n_elements) for tensor in reader.tensors if not is_copy.get(tensor.name))
    if (left := held - sum(parameter.numel() for parameter in model.parameters())) > 0:
        raise LoadError(
            f"{name!r} holds {left:,} numbers that transformers leaves out of its {type(model).__name__} of "
            f"{len(decoder_layers(model))} layers, so that this model is not the one in the file"
        )


def _some(names: Iterable[str]) -> str:
    """The first few of some names, layers by their number."""
    ordered = sorted(names, key=lambda name: [part.zfill(8) for part in name.split(".")])
    rest = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(map(repr, ordered[:SHOWN])) + rest


def _changes_output(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight that a model leaves out belongs to its layers, or to a module that has other weights.

    Masks that old checkpoints keep as buffers do not, and neither do heads for other tasks.
    """
    owner, family = name.rpartition(".")[0], family_of(model)
    for root in (model, *model.children()):
        if owner in (modules := dict(root.named_modules())):
            return bool(modules[owner]._parameters)
    path = f"{family.decoder}.{family.layers}".split(".")
    lists = ["\\.".join(path[start:]) for start in range(len(path))]
    return re.match(rf"(?:{'|'.join(lists)})\.\d+\.", name) is not None
