"""The workers to start vLLM with: `--worker-cls layerbudget_vllm.workers.PlannedCPUWorker`."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from layerbudget_vllm.requests import LayerPlanError
from layerbudget_vllm.runner import PlannedPasses


class PlannedCPURunner(PlannedPasses, CPUModelRunner):
    """vLLM's runner for the CPU, whose requests may name plans."""


class PlannedCPUWorker(CPUWorker):
    """vLLM's worker for the CPU with the runner above."""

    def init_device(self) -> None:
        with patch.object(cpu_worker, "CPUModelRunner", PlannedCPURunner):
            super().init_device()


class PlannedGPURunner(PlannedPasses, GPUModelRunner):
    """vLLM's first runner for GPUs, whose requests may name plans."""


class PlannedGPUWorker(Worker):
    """vLLM's worker for GPUs with the runner above. Not run on a GPU yet."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            raise LayerPlanError("layer plans run with vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
        return PlannedGPURunner(self.vllm_config, self.device)
