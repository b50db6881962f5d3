"""Measure what plans cost on this machine: things compared are timed alternately, in one process, after a warm-up."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
import transformers

Name = TypeVar("Name")


def median_seconds(
    work: Mapping[Name, Callable[[], object]], rounds: int, advance: Callable[[], None]
) -> dict[Name, float]:
    """Median time of each piece of work over `rounds` rounds, all in each; a round before them is warm-up."""
    seconds: dict[Name, list[float]] = {name: [] for name in work}
    for round_number in range(rounds + 1):
        for name, run in work.items():
            took = seconds_of(run)
            if round_number:
                seconds[name].append(took)
            advance()
    return {name: median(times) for name, times in seconds.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """What a piece of work takes, with all that it gave to the device."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
