"""Drift alarm: active while served prompts do not look like the calibration prompts.

A conformal test martingale bets against "these prompts and the calibration prompts are exchangeable". The alarm is
triggered when its wealth is high. A new martingale then starts, and the alarm clears once that one has stayed poor.

Shapes: `N` prompts, `F` projected features, `C` channels (scores of a prompt).
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backbone.strict_json import parse
from controller.certificate.risks import CalibrationError, Floats

Ints = NDArray[np.int64]

SLOPES: Floats = np.array([-1.0, 0.0, 1.0])
"""Bets that p-values are too small, uniform, too large."""
JUMP = 0.01
"""Share of the wealth that changes its bet before each prompt, as in the source."""
DROPPED_BITS = 2
"""Of the ten mantissa bits of a 16-bit float: scores are told apart to 0.4%, and counting is four times as fast."""
FEWEST = 100
"""Prompts of a martingale before it may trigger the alarm: a few prompts of one kind are no other workload."""
RECOVERY = 200
"""Prompts without a trigger after which the alarm clears."""
RECENT = 10_000
"""Prompts that are remembered, so that repeated ones count once."""
LARGEST_SCORE = 65504.0
"""The largest 16-bit float; all scores beyond it, infinity too, count as equal."""
CELLS = (0x7C00 >> DROPPED_BITS) + 1
"""From zero to infinity."""


@dataclass(frozen=True, slots=True)
class DriftState:
    """An alarm's state since the start or the last reset.

    Attributes:
        wealth: of the martingale, which started with 1.
        seen: prompts counted.
        triggered: whether the alarm is active now.
        alarms: how often it was triggered.
    """

    wealth: float
    seen: int
    triggered: bool
    alarms: int


def drift_scores(features: NDArray[np.floating], budgets: NDArray[np.floating]) -> Floats:
    """Scores [N, 2] of prompts: mean square of projected features, and budget.

    The projection whitened the features on the training prompts, so the first is the squared Mahalanobis distance from
    their centre, divided by F. Nothing is fitted on the calibration prompts, which must stay exchangeable with the
    served ones. A prompt with features that are not finite is infinitely far.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        distance = np.square(features, dtype=np.float64).mean(axis=1)
    return np.stack([np.where(np.isfinite(distance), distance, np.inf), np.asarray(budgets, dtype=np.float64)], axis=1)


class DriftAlarm:
    """Watches a stream of prompts; may be shared by threads.

    While served and calibration prompts are exchangeable (independent draws from one population are), the alarm is
    *ever* triggered, over an endless stream, with probability at most `false_alarm_rate`: the p-values are then
    independent and uniform, the wealth is a martingale, and Ville's inequality bounds its maximum. The bound is on the
    first trigger of one process: m processes, or m resets, have m chances.

    A trigger starts a new martingale, which forgets the prompts so far. The alarm clears when that one has not
    triggered it within `RECOVERY` prompts. All martingales compare with the same calibration prompts, so later false
    triggers are not independent of the first and have no bound of their own. Where prompts stay different the alarm is
    triggered again; where they differ so little that this takes more than `RECOVERY` prompts, it comes and goes.

    Rank, not size, counts; so a change shows within some hundred prompts, or not at all where neither score changes its
    distribution. Order is part of exchangeability: a service that sorts its prompts by length or task triggers the
    alarm although the mixture is the same. Rows of one call are shuffled first.

    Sources: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 7.1 (smoothed p-values);
    Vovk et al. 2021, Retrain or not retrain: conformal test martingales for change-point detection (arXiv 2102.10439),
    algorithm 1 (the Simple Jumper).
    """

    def __init__(self, reference_scores: Floats, false_alarm_rate: float = 0.01, seed: int = 0) -> None:
        """Args:
            reference_scores: `drift_scores` [n, C] of the calibration prompts.
            false_alarm_rate: bound on the probability of ever being triggered without cause, in (0, 1).
            seed: of the tie-breaks.

        Raises:
            CalibrationError: no scores, negative or NaN ones, or a rate that is no probability.
        """
        scores = np.asarray(reference_scores, dtype=np.float64)
        if scores.ndim != 2 or 0 in scores.shape or not (scores >= 0).all():
            raise CalibrationError(
                f"reference scores of shape {scores.shape} cannot be watched: "
                "they must be non-negative numbers, [prompts, channels]"
            )
        if not 0 < false_alarm_rate < 1:
            raise CalibrationError(
                f"the false-alarm rate is {false_alarm_rate}; it must lie between 0 and 1, both excluded"
            )
        self.reference_scores = np.minimum(scores, LARGEST_SCORE)
        self.false_alarm_rate = false_alarm_rate
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy, which goes on by itself; made under the lock."""
        with self._lock:
            return copy.deepcopy({name: value for name, value in self.__dict__.items() if name != "_lock"})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget all prompts and start anew, with another chance of a false alarm."""
        with self._lock:
            self._recent: OrderedDict[bytes, None] = OrderedDict()
            self._seen, self._alarms, self._triggered = 0, 0, False
            self._start_martingale()

    def _start_martingale(self) -> None:
        channels = _cells(self.reference_scores).T
        self._counts: Ints = np.stack([np.bincount(channel, minlength=CELLS) for channel in channels])
        self._martingale, self._tested = _TestMartingale(len(channels)), 0

    def observe(
        self, features: NDArray[np.floating], budgets: NDArray[np.floating], keys: Sequence[bytes] | None = None
    ) -> bool:
        """Count N served prompts, in order of arrival; returns `triggered`.

        Args:
            features: projected features [N, F], as the controller gets them.
            budgets: share of the decoder [N] that the certified price chooses for them, before any reversion to the
                full plan.
            keys: names of the prompts [N], equal for equal ones; without them repeated prompts count again.
        """
        return self.observe_scores(drift_scores(features, budgets), keys)

    def observe_scores(self, scores: Floats, keys: Sequence[bytes] | None = None) -> bool:
        """As `observe`, from scores [N, C]."""
        if scores.ndim != 2 or scores.shape[1] != self.reference_scores.shape[1]:
            raise CalibrationError(
                f"scores have shape {scores.shape}, the reference has {self.reference_scores.shape[1]} channels"
            )
        cells = _cells(scores)
        with self._lock:
            for row in self._random.permutation(len(cells)):
                if keys is None or self._is_new(keys[row]):
                    self._count(cells[row])
            return self._triggered

    def _is_new(self, key: bytes) -> bool:
        """Whether a prompt was not counted lately; remembers it."""
        is_new = key not in self._recent
        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return is_new

    def _count(self, cells: Ints) -> None:
        """One prompt, [C]."""
        self._martingale.update(self._p_values(cells))
        self._seen, self._tested = self._seen + 1, self._tested + 1
        if self._tested >= FEWEST and self._martingale.wealth >= 1 / self.false_alarm_rate:
            self._alarms, self._triggered = self._alarms + 1, True
            self._start_martingale()
        elif self._tested >= RECOVERY:
            self._triggered = False

    def _p_values(self, cells: Ints) -> Floats:
        """Smoothed p-values [C], exactly uniform: ranks among all scores, ties broken at random."""
        channels = np.arange(len(cells))
        self._counts[channels, cells] += 1
        larger = np.array([self._counts[channel, cells[channel] + 1 :].sum() for channel in channels])
        tied, total = self._counts[channels, cells], len(self.reference_scores) + self._tested + 1
        return np.asarray((larger + self._random.random(len(cells)) * tied) / total)

    @property
    def triggered(self) -> bool:
        """Whether the alarm is active now."""
        return self._triggered

    @property
    def state(self) -> DriftState:
        with self._lock:
            return DriftState(self._martingale.wealth, self._seen, self._triggered, self._alarms)

    @property
    def description(self) -> str:
        """Its reference, rate and state in a sentence."""
        state = self.state
        return (
            f"compares served prompts with {len(self.reference_scores)} calibration prompts and is triggered without "
            f"cause with a probability of at most {self.false_alarm_rate:g}; "
            f"{'active' if state.triggered else 'not active'} after {state.seen} prompts of this process. It begins "
            "anew with every process and by allocator.drift.reset()."
        )

    def save(self, path: Path) -> None:
        """Write the reference and the rate, not the prompts seen."""
        arrays = {"reference_scores": np.ascontiguousarray(self.reference_scores)}
        save_file(arrays, path, {"false_alarm_rate": repr(self.false_alarm_rate)})

    @classmethod
    def load(cls, path: Path, seed: int = 0) -> DriftAlarm:
        """Raises CalibrationError for a file that `save` did not write."""
        try:
            with safe_open(path, framework="numpy") as file:
                rate, scores = parse(file.metadata()["false_alarm_rate"]), file.get_tensor("reference_scores")
            if type(rate) is not float or scores.dtype != np.float64 or not (scores <= LARGEST_SCORE).all():
                raise ValueError(f"its rate is {rate!r:.40}, or a score no float64 up to {LARGEST_SCORE:g}")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} holds no drift reference ({error}): make it again with the calibrate stage"
            ) from None
        return cls(scores, rate, seed)


class _TestMartingale:
    """The Simple Jumper on each of C channels, its wealth the mean over them.

    Of the initial wealth 1 / (t (t + 1)) is bet from prompt t on. So the wealth is at least 1 / t^2 at any time, and a
    change is noticed soon after a long quiet stretch, which costs a jumper a little at every prompt. A sum of
    martingales is one, so Ville's inequality holds as before.
    """

    def __init__(self, channels: int) -> None:
        self._wealth = np.zeros((channels, len(SLOPES)))
        self._time = 0

    @property
    def wealth(self) -> float:
        return float(self._wealth.sum(axis=1).mean() + 1 / (self._time + 1))

    def update(self, p_values: Floats) -> None:
        """Bet on p-values [C]."""
        self._time += 1
        own = self._wealth.sum(axis=1, keepdims=True)
        stake = 1 / (self._time * (self._time + 1))
        wealth = (1 - JUMP) * self._wealth + (JUMP * own + stake) / len(SLOPES)
        self._wealth = wealth * (1 + SLOPES * (p_values[:, None] - 0.5))


def _cells(scores: Floats) -> Ints:
    """Cells of a histogram for scores [N, C]: their bits as 16-bit floats, which order like floats."""
    # abs, for -0.0 has other bits than 0.0
    halves = np.nan_to_num(np.abs(scores), nan=LARGEST_SCORE, posinf=LARGEST_SCORE)
    bits: Ints = np.minimum(halves, LARGEST_SCORE).astype(np.float16).view(np.uint16).astype(np.int64)
    return bits >> DROPPED_BITS
