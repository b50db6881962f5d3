"""Self-test before a model's first plan: plans must be exact with this library, on this device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.errors import UnsupportedModelError
from backbone.execution.executor import executing
from backbone.families import decoder_layers, decoder_of, family_of
from backbone.left_padding import position_inputs
from backbone.plan import LayerPlan

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 0.1
"""Largest relative difference (Frobenius norm) between cached and uncached states; a wrong mask gives far more."""

PROMPT_TOKENS, STEPS, PADDING = 6, 2, 3

ATTEMPTS = 3
"""Times that stock model and full plan are compared; the first passes of a process sometimes round differently."""


@torch.no_grad()
def check_exactness(model: PreTrainedModel) -> None:
    """Compare decoding with and without a KV cache, under a few plans.

    Two short left-padded rows are decoded. This costs about nine passes of the decoder over at most 16 tokens; the
    output head does not run. Forward hooks on the model see these passes too.

    Raises:
        UnsupportedModelError: states differ by more than rounding, are not finite, or the full plan is not bit-equal
            to the stock model; see `family_of`.
    """
    logger.info("testing once whether layer plans are exact on %s, by a few passes over short texts", _name(model))
    with _evaluating(model):
        inputs = _inputs(model)
        if not _uncached(model, inputs)[inputs["attention_mask"].bool()].isfinite().all():
            raise UnsupportedModelError(
                f"{_name(model)}: the hidden states of a few tokens are not finite, so its answers are "
                f"meaningless{wider_dtypes(model.dtype)}"
            )
        if not any(_full_plan_is_equal(model, inputs) for _ in range(ATTEMPTS)):
            raise UnsupportedModelError(
                f"{_name(model)}: the full plan gives other states than the stock model, so no plan is exact"
            )
        for plan in _plans(model):
            with executing(model, [plan]):
                uncached = _uncached(model, inputs)[:, -STEPS:]
                difference = _difference(_cached(model, inputs), uncached)
            limit = rounding_limit(uncached.dtype, uncached.device)
            if not difference <= limit:
                raise UnsupportedModelError(
                    f"{_name(model)}: under plan {plan} a step with a cache differs by {difference:.1%} from the same "
                    f"step without a cache (rounding: at most {limit:.1%}), so layers of this model cannot be skipped"
                )


def rounding_limit(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative difference due to rounding; with TF32 a GPU rounds products in float32 as it does in float16."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return HALF_TOLERANCE
    return TOLERANCE.get(dtype, HALF_TOLERANCE)


def _full_plan_is_equal(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    stock = _uncached(model, inputs)
    with executing(model, [LayerPlan.full(len(decoder_layers(model)))]):
        return torch.equal(_uncached(model, inputs), stock)


def wider_dtypes(dtype: torch.dtype) -> str:
    """Advice for states that are not finite, to end a sentence with; empty where no dtype is wider."""
    is_widest = torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max
    return "" if is_widest else "; load the model in bfloat16 or float32, which hold larger numbers"


def _name(model: PreTrainedModel) -> str:
    return f"{model.config.model_type} ({type(model).__name__}, {model.dtype}, {model.config._attn_implementation})"


def _plans(model: PreTrainedModel) -> list[LayerPlan]:
    n_layers = len(decoder_layers(model))
    if n_layers == 1:
        return [LayerPlan.full(1)]
    plans = [LayerPlan.skipping(n_layers, {0}), LayerPlan.exiting(n_layers, (n_layers + 1) // 2)]
    if family_of(model).attention is not None:
        plans.append(LayerPlan.skipping(n_layers, attention={0}, mlp={n_layers - 1}))
    return plans


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    length = PROMPT_TOKENS + STEPS
    ids = torch.arange(1, 2 * length + 1).reshape(2, length) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **position_inputs(decoder_of(model), mask)}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _uncached(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return _states(decoder_of(model)(**inputs, use_cache=False))


def _cached(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """States of the last tokens [2, STEPS, D], each computed by itself after a prefill."""
    decoder: Any = decoder_of(model)
    cache, states = DynamicCache(config=decoder.config), []
    spans = [(0, PROMPT_TOKENS), *((PROMPT_TOKENS + i, PROMPT_TOKENS + i + 1) for i in range(STEPS))]
    for start, stop in spans:
        step = {name: tensor[:, start:stop] for name, tensor in inputs.items()}
        step["attention_mask"] = inputs["attention_mask"][:, :stop]
        states.append(_states(decoder(**step, cache=cache, use_cache=True)))
    return torch.cat(states[1:], dim=1)


def _states(output: Any) -> torch.Tensor:
    return output.last_hidden_state  # type: ignore[no-any-return]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off in this block, and restore the mode of each module after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
