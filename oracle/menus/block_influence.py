"""Plans that skip the layers which turn their input least."""

from __future__ import annotations

from typing import Any

import torch

from backbone.families import decoder_layers
from backbone.plan import LayerPlan
from oracle.chat import tokens_of
from oracle.menus.base import Advance, MenuTask


def block_influence(task: MenuTask, advance: Advance) -> list[LayerPlan]:
    """Skips layers in order of their block influence, least first (ShortGPT, Men et al. 2024, arXiv 2403.03853,
    section 3.1)."""
    influence = layer_influence(task)
    order = sorted(range(task.probe_depth, task.n_layers), key=influence.__getitem__)
    return [LayerPlan.skipping(task.n_layers, order[: task.n_layers - count]) for count in task.counts]


@torch.inference_mode()
def layer_influence(task: MenuTask) -> list[float]:
    """For each layer 1 - cos(input, output), averaged over the tokens of all prompts."""
    sums = [0.0] * task.n_layers
    hooks = [
        layer.register_forward_hook(_adding(sums, index)) for index, layer in enumerate(decoder_layers(task.model))
    ]
    tokens = 0
    try:
        for prompt in task.prompts:
            ids = tokens_of(task.tokenizer, prompt)
            task.model(input_ids=torch.tensor([ids], device=task.model.device), use_cache=False)
            tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / tokens for total in sums]


def _adding(sums: list[float], index: int) -> Any:
    def add(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        cosine = torch.nn.functional.cosine_similarity(args[0].float(), after.float(), dim=-1)
        sums[index] += float((1 - cosine).sum())

    return add
