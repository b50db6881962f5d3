"""The part of a model that decides: its first layers, checked against the allocator, the others given up."""

from __future__ import annotations

import gc

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.delete_layers import delete_layers
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from runtime.parts import AllocatorParts


def load_probe(
    allocator: AllocatorParts, source: str | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The first `probe_depth` layers of the allocator's model, with embeddings and head, and its tokenizer.

    The whole model is read once, since its fingerprint is made from all weights.

    Args:
        allocator: made for the model.
        source: where to load the model from; None for where the allocator's was.
        device: see `load_backbone`.

    Raises:
        WrongModelError: another model than the allocator's.
        LoadError: see `load_backbone`.
    """
    model, tokenizer = load_backbone(allocator.model_source if source is None else source, device=device)
    allocator.check_model(model)
    probe = delete_layers(model, LayerPlan.exiting(allocator.menu.n_layers, allocator.menu.probe_depth))
    del model
    gc.collect()  # the other layers' weights, which modules that know one another keep
    return probe, tokenizer
