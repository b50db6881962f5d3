"""What a pass of a model costs: milliseconds as a function of the layers that run and of the tokens in the pass.

The model of a pass is `fixed(tokens) + budget * layers(tokens)`: the output head and the overhead of a call, and the
decoder's layers, without what attention adds for long contexts. The numbers decide how much is drafted and which
prompts run together, never about outputs, so an estimate serves until somebody measures.

Shapes: `L` layers, `N` numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from backbone.execution.apply_plan import apply_plan
from backbone.families import decoder_layers, sublayer_bytes
from backbone.files import cache_folder, write_atomically
from backbone.left_padding import head_options
from backbone.plan import LayerPlan
from runtime.paired_timing import machine, median_seconds

logger = logging.getLogger(__name__)

BALANCE_TOKENS = {"cuda": 256, "cpu": 32}
"""Tokens at which computing takes as long as reading the weights, for the estimate: what an H100's peak rates give in
bfloat16, roughly, and between what two models showed on a CPU (16 for Gemma 3 270M, 43 for Qwen2.5 1.5B, 2 cores)."""

DECODE_ROWS, PROMPT_TOKENS = (1, 2, 4, 8, 16, 32, 64), 256
CHECK_TOKENS, CONTEXT_TOKENS = (1, 2, 4, 8, 16), 64
PASSES, ROUNDS = 2, 3


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Times of passes at a few numbers of tokens, read in between and beyond them along straight lines.

    Attributes:
        tokens: ascending, at least two.
        full_ms: of a pass of the full model with so many tokens, a row each, or of a prompt's where they are many.
        fixed_ms: the part of it that does not depend on the layers that run.
        check_tokens: ascending, at least two.
        check_ms: of a pass of the full model with so many tokens of one row behind its text, the head over all of them.
        measured: whether these are milliseconds; an estimate has ratios only.
    """

    tokens: tuple[int, ...]
    full_ms: tuple[float, ...]
    fixed_ms: tuple[float, ...]
    check_tokens: tuple[int, ...]
    check_ms: tuple[float, ...]
    measured: bool

    def ms(self, budget: float, tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Time of passes with [N] tokens under a plan of this budget [N]."""
        at_grid = np.array(self.fixed_ms) + budget * (np.array(self.full_ms) - np.array(self.fixed_ms))
        return _along(self.tokens, at_grid, tokens)

    def mixed_ms(self, tokens: int, run: NDArray[Any]) -> float:
        """Time of one pass with so many tokens, of which each layer runs some [L]."""
        layers = self.ms(1.0, run) - self.ms(0.0, run)
        return float(self.ms(0.0, np.array([tokens]))[0] + (layers * (run > 0)).mean())

    def checking_ms(self, tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Time of passes of the full model with [N] tokens of one row."""
        return _along(self.check_tokens, np.array(self.check_ms), tokens)


def _along(grid: tuple[int, ...], values: NDArray[np.float64], tokens: NDArray[Any]) -> NDArray[np.float64]:
    """Values at [N] numbers of tokens, on straight lines between those of the grid; beyond it on the last line."""
    slope = max((values[-1] - values[-2]) / (grid[-1] - grid[-2]), 0.0)
    return np.asarray(np.interp(tokens, grid, values) + np.maximum(tokens - grid[-1], 0) * slope)


def estimated_step_costs(model: PreTrainedModel) -> StepCosts:
    """From the bytes that a pass reads, growing linearly in the tokens: doubled at `BALANCE_TOKENS`."""
    decoder = float(sum(sum(pair) for pair in sublayer_bytes(model)))
    head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    fixed = 0.0 if head is None else float(sum(p.numel() * p.element_size() for p in head.parameters()))
    tokens = (1, BALANCE_TOKENS.get(model.device.type, 32))
    factors = [1 + count / tokens[1] for count in tokens]
    full_ms, fixed_ms = [(decoder + fixed) * factor for factor in factors], [fixed * factor for factor in factors]
    return StepCosts(tokens, tuple(full_ms), tuple(fixed_ms), tokens, tuple(full_ms), measured=False)


@torch.no_grad()
def measure_step_costs(model: PreTrainedModel, advance: Callable[[], None] = lambda: None) -> StepCosts:
    """Time passes of the full model and of its first half in turn, and passes that check drafts in a filled cache.

    Takes as long as some 160 decoding steps and a few prompts.
    """
    n_layers = len(decoder_layers(model))
    half = LayerPlan.exiting(n_layers, (n_layers + 1) // 2)
    share = half.budget(sublayer_bytes(model))
    full_ms, fixed_ms = [], []
    shapes = [(rows, 1) for rows in DECODE_ROWS] + [(1, PROMPT_TOKENS)]
    for shape in shapes:
        work = {plan: _passes(model, plan, shape) for plan in (LayerPlan.full(n_layers), half)}
        full, short = (1000 * seconds / PASSES for seconds in median_seconds(work, ROUNDS, advance).values())
        layers = 0.0 if share == 1 else max(full - short, 0.0) / (1 - share)
        full_ms.append(full)
        fixed_ms.append(max(full - layers, 0.0))
    checks = median_seconds({count: _check(model, count) for count in CHECK_TOKENS}, ROUNDS, advance)
    check_ms = [1000 * seconds / PASSES for seconds in checks.values()]
    rising = [tuple(np.maximum.accumulate(times).tolist()) for times in (full_ms, check_ms)]
    tokens = tuple(rows * length for rows, length in shapes)
    return StepCosts(tokens, rising[0], tuple(fixed_ms), CHECK_TOKENS, rising[1], measured=True)


def _passes(model: PreTrainedModel, plan: LayerPlan, shape: tuple[int, int]) -> Callable[[], None]:
    ids = torch.ones(shape, dtype=torch.long, device=model.device)
    options = head_options(model, 1)

    def run() -> None:
        with apply_plan(model, plan):
            for _ in range(PASSES):
                model(input_ids=ids, use_cache=True, **options)

    return run


def _check(model: PreTrainedModel, count: int) -> Callable[[], None]:
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones((1, CONTEXT_TOKENS), dtype=torch.long, device=model.device), cache=cache, use_cache=True)
    ids = torch.ones((1, count), dtype=torch.long, device=model.device)

    def run() -> None:
        for _ in range(PASSES):
            model(input_ids=ids, cache=cache, use_cache=True)
            cache.crop(-count)

    return run


_known: dict[str, StepCosts] = {}


def known_step_costs(model: PreTrainedModel) -> StepCosts:
    """What was measured for this model, device and dtype, in this process or an earlier one; else the estimate."""
    key = _key(model)
    if key not in _known:
        _known[key] = _read(key) or estimated_step_costs(model)
    return _known[key]


def measured_step_costs(model: PreTrainedModel) -> StepCosts:
    """The kept costs of a model if they are measured ones; otherwise they are measured now, and kept."""
    costs = known_step_costs(model)
    if not costs.measured:
        costs = measure_step_costs(model)
        keep_step_costs(model, costs)
    return costs


def keep_step_costs(model: PreTrainedModel, costs: StepCosts) -> None:
    """Keep measured costs for this process, and, where that can be written, in the cache folder for later ones."""
    key = _key(model)
    _known[key] = costs
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(costs), indent=2) + "\n")
    except OSError as error:
        logger.warning("step times cannot be kept for later processes (%s)", error)


def _key(model: PreTrainedModel) -> str:
    """What a pass takes depends on the shapes of a model's weights, on its dtype and on the device."""
    sizes = hashlib.sha256(repr([(name, *weight.shape) for name, weight in model.named_parameters()]).encode())
    device: tuple[object, ...] = (model.device.type, machine()["cores"], torch.get_num_threads())
    if model.device.type == "cuda":
        device = (torch.cuda.get_device_name(model.device),)
    size = f"{model.config.model_type}-{sizes.hexdigest()[:12]}"
    parts = (size, model.dtype, model.config._attn_implementation, *device)
    return re.sub(r"[^\w.-]+", "-", "_".join(map(str, parts)))


def _path(key: str) -> Path:
    return cache_folder() / "step_costs" / f"{key}.json"


def _read(key: str) -> StepCosts | None:
    try:
        found = json.loads(_path(key).read_text())
        return StepCosts(
            **{name: tuple(found[name]) for name in ("tokens", "full_ms", "fixed_ms", "check_tokens", "check_ms")},
            measured=True,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the measured step times cannot be read (%s); they are estimated until measured again", error)
        return None
