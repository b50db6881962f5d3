"""The plan that a request names, and whether an engine can run it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import vllm

from layerbudget import InputError, LayerPlan

KEY = "layer_plan"
"""Of `SamplingParams.extra_args`; over HTTP of `vllm_xargs`."""

ARCHITECTURES = ("Gemma3ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM")
WORKERS = ("layerbudget_vllm.workers.PlannedCPUWorker", "layerbudget_vllm.workers.PlannedGPUWorker")
TESTED = "0.32."
"""The minor version of vLLM whose insides this package knows."""


class LayerPlanError(InputError):
    """A plan that the engine cannot run; the message says why."""


def plan_of(params: Any, n_layers: int) -> LayerPlan | None:
    """The plan that sampling parameters name; None where they name none or the full one.

    Raises:
        LayerPlanError: no text, no plan, a plan of another number of layers, one that runs half of a layer, or the full
            depth with an exit head.
    """
    text = (getattr(params, "extra_args", None) or {}).get(KEY)
    return None if text is None else _read(text, n_layers)


@lru_cache(maxsize=1024)
def _read(text: object, n_layers: int) -> LayerPlan | None:
    try:
        plan = LayerPlan.parse(text, n_layers)  # type: ignore[arg-type]  # it refuses what is no text
    except InputError as error:
        raise LayerPlanError(f"{KEY}: {error}") from None
    if plan.attention != plan.mlp:
        raise LayerPlanError(f"{KEY} {plan} runs half of a layer; inside vLLM a layer runs as a whole or not at all")
    if plan.healed:
        raise LayerPlanError(
            f"{KEY} {plan} is the full depth with an exit head, which runs in transformers alone; make an allocator "
            "without it in menu.given"
        )
    return None if plan.is_full else plan


def check_engine(config: Any) -> None:
    """Whether an engine can run plans.

    Args:
        config: its `VllmConfig`.

    Raises:
        LayerPlanError: another version, model or worker class, or a feature that plans do not go with.
    """
    if not vllm.__version__.startswith(TESTED):
        raise LayerPlanError(f"layer plans are for vLLM {TESTED}x, this is {vllm.__version__}")
    worker = config.parallel_config.worker_cls
    if worker not in WORKERS:
        raise LayerPlanError(
            f"{KEY} needs the workers of layerbudget-vllm, this engine has {worker}; start it with "
            f"--worker-cls {WORKERS[0]} (on a GPU {WORKERS[1]})"
        )
    if not set(config.model_config.architectures) & set(ARCHITECTURES):
        raise LayerPlanError(
            f"{KEY}: {config.model_config.architectures[0]} is not among the models that can run plans: "
            f"{', '.join(ARCHITECTURES)}"
        )
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "pipeline parallelism": config.parallel_config.pipeline_parallel_size > 1,
        "dual-batch overlap": bool(getattr(config.parallel_config, "enable_dbo", False)),
    }
    for name, present in refused.items():
        if present:
            raise LayerPlanError(f"{KEY} does not go with {name}, which this engine was started with")
