"""The decision at serving time: a plan for each prompt of a batch; if anything fails, the full plan and a log line."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from backbone.errors import InputError
from backbone.plan import PlanMenu
from backbone.prefix import Prefix, run_prefix
from controller.base import Controller, Floats, choose
from controller.features import Projection, pool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """For each of B prompts its plan in the menu, and what the first layers made of the prompts, where that is kept."""

    chosen: list[int]
    prefix: Prefix | None = None


@dataclass(frozen=True, slots=True)
class Decider:
    """Probe, controller and threshold.

    Attributes:
        threshold: None sends every prompt to the full plan, without a probe.
        limit_ms: time for the whole decision; a probe that runs is waited for, a controller that runs is not.
    """

    menu: PlanMenu
    controller: Controller
    projection: Projection
    threshold: float | None
    limit_ms: float | None = None

    def decide(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        keep_cache: bool,
        **inputs: torch.Tensor,
    ) -> Decision:
        """The plans of prompts [B, S]. Waits for the device once, when the features are there.

        Args:
            keep_cache: keep what the first layers made, for the passes that go on from it.

        Raises:
            InputError: a model that cannot be probed at all. Whatever else goes wrong sends prompts to the full plan.
        """
        full = Decision([len(self.menu) - 1] * len(input_ids))
        if self.threshold is None:
            return full
        start = time.perf_counter()
        try:
            prefix = run_prefix(
                model, input_ids, attention_mask, self.menu.probe_depth, keep_cache=keep_cache, **inputs
            )
        except InputError:
            raise
        except Exception:
            logger.exception("the probe failed; %d prompts run the full plan", len(input_ids))
            return full
        kept = replace(prefix, states=prefix.states[-1:]) if keep_cache else None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        try:
            return Decision(self._chosen(prefix, mask, start), kept)
        except Exception:
            logger.exception("the controller failed; %d prompts run the full plan", len(input_ids))
            return replace(full, prefix=kept)

    def _chosen(self, prefix: Prefix, mask: torch.Tensor, start: float) -> list[int]:
        features = pool(prefix.states[-1], mask)
        if self.limit_ms is None:
            return self._plans(features)
        left = self.limit_ms / 1000 - (time.perf_counter() - start)
        return _within(left, f"the decision took longer than {self.limit_ms:g} ms", lambda: self._plans(features))

    def _plans(self, features: Floats) -> list[int]:
        """Features [B, F] -> plans in the menu; rows that are not finite get the full plan."""
        assert self.threshold is not None
        finite = np.asarray(np.isfinite(features).all(axis=1))
        if not finite.all():
            logger.warning("%d prompts have hidden states that are not finite; they run the full plan", (~finite).sum())
        probabilities = self.controller.predict(self.projection(np.where(finite[:, None], features, 0.0)))
        sound = np.isfinite(probabilities).all(axis=1)
        if not sound.all():
            logger.warning("the controller gave %d prompts no number; they run the full plan", (~sound).sum())
        chosen = np.where(finite, choose(probabilities, self.threshold), len(self.menu) - 1)
        return [int(index) for index in chosen]


def _within(seconds: float, message: str, work: Callable[[], list[int]]) -> list[int]:
    """`work()`, or TimeoutError if that takes longer; the work is then left to itself, in a thread."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(work())
        except Exception as error:
            results.put(error)

    if seconds > 0:
        threading.Thread(target=run, daemon=True).start()
    try:
        found = results.get(timeout=max(seconds, 0))
    except queue.Empty:
        raise TimeoutError(message) from None
    if isinstance(found, Exception):
        raise found
    return found  # type: ignore[no-any-return]
