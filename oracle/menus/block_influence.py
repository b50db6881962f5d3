"""Plans that skip the layers which turn their input least."""

from __future__ import annotations

import torch

from backbone.execution.live_changes import captured
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
    sums, tokens, layers = [0.0] * task.n_layers, 0, decoder_layers(task.model)
    for prompt in task.prompts:
        ids = tokens_of(task.tokenizer, prompt)
        with captured(layers, range(len(layers) + 1)) as states:
            task.model(input_ids=torch.tensor([ids], device=task.model.device), use_cache=False)
        for index in range(len(layers)):
            cosine = torch.nn.functional.cosine_similarity(states[index].float(), states[index + 1].float(), dim=-1)
            sums[index] += float((1 - cosine).sum())
        tokens += len(ids)
    return [total / tokens for total in sums]
