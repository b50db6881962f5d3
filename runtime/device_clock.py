"""Points of time in a device's work, noted without waiting for the device."""

from __future__ import annotations

import time

import torch
from transformers import LogitsProcessor


class Moment:
    """When all work given to a device so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def ms_since(self, earlier: Moment) -> float:
        """Milliseconds from an earlier moment to this one; on a GPU this waits until the moment has come."""
        if self._event is None or earlier._event is None:
            return (self._seconds - earlier._seconds) * 1000
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event))


class FirstToken(LogitsProcessor):
    """Stands last among a loop's logits processors: notes when the first token's scores are there, changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.moment: Moment | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.moment is None:
            self.moment = Moment(self._device)
        return scores
