"""Plan selection while serving: a plan for each prompt of a batch; if anything fails, the full plan and a warning."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from backbone.errors import InputError
from backbone.execution.prompt_prefix import Prefix, run_prefix
from backbone.execution.self_test import wider_dtypes
from backbone.plan import PlanMenu
from controller.base import ChoiceRule, Controller, FittedPredictor, Floats
from controller.certificate.drift import RECOVERY, DriftAlarm
from controller.features import Features, extract

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRIGGERED = (
    "the drift alarm is active: prompts are no longer like those of the certificate, and all run the full plan; it "
    "clears after %d prompts without a new cause, or at once by allocator.drift.reset()"
)
_CLEARED = "the drift alarm has cleared after %d prompts like those of the certificate; plans are chosen as before"

_warned: WeakKeyDictionary[Controller, set[tuple[str, type]]] = WeakKeyDictionary()
"""By an allocator's controller: what was warned of in this process."""
_warnings_lock = threading.Lock()


class FullPlanWarning(UserWarning):
    """Prompts run the full plan, since no plan could be chosen for them; the message says why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision for B prompts.

    Attributes:
        chosen: the plan of each in the menu.
        prefix: what the first layers made of the prompts, where that is kept.
        projected: what the controller saw of the prompts [B, F]; None where it saw nothing.
    """

    chosen: list[int]
    prefix: Prefix | None = None
    projected: Floats | None = None


@dataclass(frozen=True, slots=True)
class PlanSelector:
    """Probe, controller, price, outlier test and alarm.

    Attributes:
        predictor: what each plan loses on a prompt; sends outliers to the full plan.
        rule: chooses among the plans of the menu.
        price: None sends every prompt to the full plan, without a probe.
        drift: while it is active, every prompt gets the full plan; the probe goes on, so that it can clear.
        is_served: the prompts that are decided about are served, so that the alarm counts them.
        limit_ms: time for the whole decision; a probe that runs is waited for, a controller that runs is not.
    """

    menu: PlanMenu
    predictor: FittedPredictor
    rule: ChoiceRule
    price: float | None
    drift: DriftAlarm | None = None
    limit_ms: float | None = None
    is_served: bool = True

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
            model, input_ids: the model, and the prompts' tokens.
            attention_mask: [B, S]; None for a mask of ones.
            keep_cache: keep what the first layers made, for the passes that go on from it.
            inputs: further arguments of the decoder, such as `position_ids`.

        Raises:
            InputError: a model that cannot be probed at all. Whatever else goes wrong sends prompts to the full plan.
        """
        full = Decision(self._all_full(len(input_ids)))
        if self.price is None:
            return full
        keys = prompt_keys(input_ids, attention_mask) if self.drift is not None else []
        start = time.perf_counter()
        try:
            prefix = run_prefix(
                model, input_ids, attention_mask, self.menu.probe_depth, keep_cache=keep_cache, **inputs
            )
        except InputError:
            raise
        except Exception as error:
            self._warn("the probe failed", len(input_ids), error)
            return full
        kept = replace(prefix, states=prefix.states[-1:]) if keep_cache else None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        try:
            features = extract(model, prefix.states, input_ids, mask, self.predictor.projection.sets)
            work = partial(self._plans, features, model.dtype)
            projected, chosen = work() if self.limit_ms is None else _within(self.limit_ms, start, work)
        except Exception as error:
            self._warn("the controller failed", len(input_ids), error)
            return replace(full, prefix=kept)
        return Decision(self._watched(projected, chosen, keys), kept, projected)

    def _plans(self, features: Features, dtype: torch.dtype) -> tuple[Floats, list[int]]:
        """Projected features [B, F] and plans in the menu; rows with a value that is not finite get the full plan."""
        predictor = self.predictor
        projected = predictor.projection(features)
        finite = np.isfinite(projected).all(axis=1)
        if broken := int((~finite).sum()):
            self._warn(f"hidden states are not finite in {dtype}", broken, hint=wider_dtypes(dtype))
        expected = predictor.controller.predict(projected)
        if silent := int((finite & ~np.isfinite(expected).all(axis=1)).sum()):
            self._warn("the controller gave no number", silent)
        expected = predictor.without_outliers(expected, features)
        return projected, self.rule.choose(expected, self.price).tolist()

    def _warn(self, what: str, count: int, error: Exception | None = None, hint: str = "") -> None:
        """Warn of prompts that run the full plan, for each reason once a process and allocator."""
        logger.debug(what, exc_info=error)
        reason = (what, type(error))
        with _warnings_lock:
            reasons = _warned.setdefault(self.predictor.controller, set())
            is_known = reason in reasons
            reasons.add(reason)
        if not is_known:
            cause = "" if error is None else f" ({type(error).__name__}: {error})"
            text = f"{what}{cause}; {count} prompts run the full plan{hint}; later ones are not counted"
            warnings.warn(FullPlanWarning(text), stacklevel=2)

    def _watched(self, projected: Floats, chosen: list[int], keys: Sequence[bytes]) -> list[int]:
        """The plans of prompts, which come in order of arrival, or the full one for all while the alarm is active."""
        if self.drift is None:
            return chosen
        if self.is_served:
            was_active = self.drift.triggered
            is_active = self.drift.observe(projected, self.rule.budgets[chosen], keys)
            if is_active != was_active:
                logger.warning(_TRIGGERED if is_active else _CLEARED, RECOVERY)
        return self._all_full(len(chosen)) if self.drift.triggered else chosen

    def decide_in_parts(
        self, parts: Iterable[tuple[Sequence[int], Callable[[PlanSelector], Decision]]], keys: Sequence[bytes]
    ) -> list[int]:
        """The plans of N prompts that are probed in several parts but have arrived together.

        The alarm sees them in order of arrival: sorted parts would look like drift.

        Args:
            parts: for each part the places of its prompts, and how the selector it is given decides about them.
            keys: `prompt_key` of each prompt [N].
        """
        unwatched = replace(self, drift=None)
        chosen: dict[int, int] = {}
        projected: dict[int, Floats] = {}
        for places, decide in parts:
            decision = decide(unwatched)
            chosen.update(zip(places, decision.chosen, strict=True))
            if decision.projected is not None:
                projected.update(zip(places, decision.projected, strict=True))
        ordered = [chosen[place] for place in range(len(chosen))]
        if seen := sorted(projected):
            rows, own = np.stack([projected[place] for place in seen]), [ordered[place] for place in seen]
            for place, index in zip(seen, self._watched(rows, own, [keys[place] for place in seen]), strict=True):
                ordered[place] = index
        return ordered

    def _all_full(self, count: int) -> list[int]:
        return [len(self.menu) - 1] * count


def prompt_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[bytes]:
    """`prompt_key` of each prompt of a padded batch [B, S]."""
    ids = input_ids.cpu().numpy()
    mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy()
    return [prompt_key(row[kept]) for row, kept in zip(ids, mask.astype(bool), strict=True)]


def prompt_key(ids: Sequence[int] | NDArray[np.int64]) -> bytes:
    """A short name for a prompt's tokens."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def _within(limit_ms: float, start: float, work: Callable[[], T]) -> T:
    """`work()`, or TimeoutError if that ends later than `limit_ms` after `start`; it then goes on in a thread."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    left = limit_ms / 1000 - (time.perf_counter() - start)
    if left > 0:
        threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout=max(left, 0))
    except TimeoutError:
        raise TimeoutError(f"the decision took longer than {limit_ms:g} ms") from None
