"""Rings while the prompts that are served do not look like those that the certificate was made with.

A conformal test martingale: a gambler bets against "these prompts and the calibration prompts come in no particular
order" and the alarm is active when the gambler has become rich. Then a new gambler starts, and the alarm clears once
that one has stayed poor for a while. Needs numpy and no labels.

Shapes: `N` prompts, `F` projected features, `C` channels (two ways to look odd).
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

from backbone.errors import InputError
from backbone.strict_json import parse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SLOPES: Floats = np.array([-1.0, 0.0, 1.0])
"""The gambler's opinions: p-values are too small, uniform, too large."""

JUMP = 0.01
"""Share of the capital that changes its opinion before each prompt, as in the source."""

DROPPED_BITS = 2
"""Of the ten mantissa bits of a 16-bit float: scores are told apart to 0.4%, and counting is four times as fast."""

FEWEST = 100
"""Prompts that a gambler sees at least before the alarm may ring: somebody who tries out a few prompts of one kind is
not yet another workload."""

RECOVERY = 200
"""Prompts without another ring after which the alarm clears."""

RECENT = 10_000
"""Prompts that are remembered, so that one which comes again is not counted again."""

ODDEST = 65504.0
"""The largest 16-bit float: all scores beyond it, infinity too, are equally odd."""

CELLS = (0x7C00 >> DROPPED_BITS) + 1
"""From zero to infinity."""


class DriftError(InputError):
    """Scores or a file that no alarm can be made of."""


@dataclass(frozen=True, slots=True)
class DriftState:
    """What an alarm has made of the prompts since the start or the last reset.

    Attributes:
        capital: what the gambler owns, having started with 1.
        seen: prompts counted.
        triggered: whether the alarm is active now.
        alarms: how often it has rung.
    """

    capital: float
    seen: int
    triggered: bool
    alarms: int


def drift_scores(features: NDArray[np.floating], budgets: NDArray[np.floating]) -> Floats:
    """How odd each prompt is, [N, 2]: the mean square of its projected features [N, F], and its chosen budget [N].

    The projection whitened the features on the training prompts, so the first is the squared Mahalanobis distance from
    their centre, divided by F. Nothing here is fitted on the calibration prompts, which must stay exchangeable with the
    served ones. A prompt with features that are not finite is infinitely far.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        distance = np.square(features, dtype=np.float64).mean(axis=1)
    return np.stack([np.where(np.isfinite(distance), distance, np.inf), np.asarray(budgets, dtype=np.float64)], axis=1)


class DriftAlarm:
    """Watches a stream of prompts; may be shared by threads.

    While the prompts served are exchangeable with the calibration prompts (independent draws from one population are),
    the probability that the alarm *ever* rings, over an endless stream, is at most `false_alarm_rate`: under
    exchangeability the p-values are independent and uniform, the capital is a martingale, and Ville's inequality bounds
    its maximum. The bound is on the first ring of one process: m processes, or m resets, have m chances.

    When it rings, everything starts anew: the prompts so far are forgotten and a new gambler plays. The alarm falls
    silent when that one has not become rich within `RECOVERY` prompts, and goes on playing. All gamblers compare with
    the same calibration prompts. Should these be an odd sample, every gambler gains by it, so that further false rings
    are not independent of the first and have no bound of their own. Where prompts stay different, new gamblers win
    again, and it keeps ringing; where they differ so little that it takes a gambler more than `RECOVERY` prompts to
    notice, it rings on and off.

    Rank, not size, counts; so a change of the population shows within some hundred prompts, or not at all where neither
    score changes its distribution. A prompt that was counted lately is not counted again. Order is part of
    exchangeability: a service that sorts its prompts by length or task is not exchangeable and will ring although the
    mixture is the same. Rows of one call are shuffled first, which mends sorting within a call, not among calls.

    Sources: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 7.1 (smoothed p-values);
    Vovk et al. 2021, Retrain or not retrain: conformal test martingales for change-point detection (arXiv 2102.10439),
    algorithm 1 (the Simple Jumper).
    """

    def __init__(self, reference_scores: Floats, false_alarm_rate: float = 0.01, seed: int = 0) -> None:
        """Args:
            reference_scores: `drift_scores` [n, C] of the calibration prompts.
            false_alarm_rate: bound on the probability of ever ringing without cause, in (0, 1).
            seed: of the tie-breaks.

        Raises:
            DriftError: no scores, negative or NaN ones, or a rate that is no probability.
        """
        scores = np.asarray(reference_scores, dtype=np.float64)
        if scores.ndim != 2 or 0 in scores.shape or not (scores >= 0).all():
            raise DriftError(
                f"reference scores of shape {scores.shape} cannot be watched: "
                "they must be non-negative numbers, [prompts, channels]"
            )
        if not 0 < false_alarm_rate < 1:
            raise DriftError(f"the false-alarm rate is {false_alarm_rate}; it must lie between 0 and 1, both excluded")
        self.reference_scores = np.minimum(scores, ODDEST)
        self.false_alarm_rate = false_alarm_rate
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in another process, has seen what this one has, and goes on by itself. Made under the lock:
        another thread may be counting."""
        with self._lock:
            return copy.deepcopy({name: value for name, value in self.__dict__.items() if name != "_lock"})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget what was served and start anew, with another chance of a false alarm."""
        with self._lock:
            self._recent: OrderedDict[bytes, None] = OrderedDict()
            self._seen, self._alarms, self._triggered = 0, 0, False
            self._start_gambler()

    def _start_gambler(self) -> None:
        self._counts: Ints = np.stack(
            [np.bincount(channel, minlength=CELLS) for channel in _cells(self.reference_scores).T]
        )
        self._martingale, self._played = _TestMartingale(self._counts.shape[0]), 0

    def observe(
        self,
        features: NDArray[np.floating],
        budgets: NDArray[np.floating],
        keys: Sequence[bytes] | None = None,
    ) -> bool:
        """Take note of N prompts that are served, in order of arrival; whether the alarm is active then.

        Args:
            features: projected features [N, F], as the controller gets them.
            budgets: share of the decoder [N] that the certified price chooses for them, before any
                reversion to the full plan.
            keys: names of the prompts [N], equal for equal ones; without them no prompt is taken for another.
        """
        return self.observe_scores(drift_scores(features, budgets), keys)

    def observe_scores(self, scores: Floats, keys: Sequence[bytes] | None = None) -> bool:
        """As `observe`, from scores [N, C]."""
        if scores.ndim != 2 or scores.shape[1] != self.reference_scores.shape[1]:
            raise DriftError(
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
        self._martingale.bet(self._p_values(cells))
        self._seen, self._played = self._seen + 1, self._played + 1
        if self._played >= FEWEST and self._martingale.capital >= 1 / self.false_alarm_rate:
            self._alarms, self._triggered = self._alarms + 1, True
            self._start_gambler()
        elif self._played >= RECOVERY:
            self._triggered = False

    @property
    def triggered(self) -> bool:
        """Whether the alarm is active now."""
        return self._triggered

    @property
    def state(self) -> DriftState:
        with self._lock:
            return DriftState(self._martingale.capital, self._seen, self._triggered, self._alarms)

    @property
    def description(self) -> str:
        """What it watches, and what it has made of the prompts of this process so far, in a sentence."""
        state = self.state
        now = f"{'rings' if state.triggered else 'silent'} after {state.seen} prompts of this process"
        return (
            f"compares served prompts with {len(self.reference_scores)} calibration prompts and rings without cause "
            f"with a probability of at most {self.false_alarm_rate:g}; {now}. It begins anew with every process and "
            "by allocator.drift.reset()."
        )

    def save(self, path: Path) -> None:
        """Write the reference and the rate, not what was observed."""
        arrays = {"reference_scores": np.ascontiguousarray(self.reference_scores)}
        save_file(arrays, path, {"false_alarm_rate": repr(self.false_alarm_rate)})

    @classmethod
    def load(cls, path: Path, seed: int = 0) -> DriftAlarm:
        """Raises DriftError for a file that `save` did not write."""
        try:
            with safe_open(path, framework="numpy") as file:
                rate, scores = parse(file.metadata()["false_alarm_rate"]), file.get_tensor("reference_scores")
            if type(rate) is not float or scores.dtype != np.float64 or not (scores <= ODDEST).all():
                raise ValueError(f"its rate is {rate!r:.40}, or a score no float64 up to {ODDEST:g}")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DriftError(
                f"{path} holds no drift reference ({error}): make it again with the calibrate stage"
            ) from None
        return cls(scores, rate, seed)

    def _p_values(self, cells: Ints) -> Floats:
        """[C]: how many of all scores so far, the new one included, are larger, ties broken at random; exactly
        uniform."""
        channels = np.arange(len(cells))
        self._counts[channels, cells] += 1
        larger = np.array([self._counts[channel, cells[channel] + 1 :].sum() for channel in channels])
        tied, total = self._counts[channels, cells], len(self.reference_scores) + self._played + 1
        return np.asarray((larger + self._random.random(len(cells)) * tied) / total)


class _TestMartingale:
    """The Simple Jumper on each of C channels, its capital the mean over them.

    The stake is not put down at once but 1 / (t (t + 1)) of it at prompt t. Otherwise a long quiet stretch, which costs
    a jumper a little at every prompt, would make it too poor to notice a change after it: here it owns at least 1 / t^2
    at any time. A sum of martingales is one, so Ville's inequality holds as before; and no logarithms are needed, since
    the capital is bounded below and the game ends when it is high.
    """

    def __init__(self, channels: int) -> None:
        self._pots = np.zeros((channels, len(SLOPES)))
        self._time = 0

    @property
    def capital(self) -> float:
        return float(self._pots.sum(axis=1).mean() + 1 / (self._time + 1))

    def bet(self, p_values: Floats) -> None:
        """Bet on p-values [C]."""
        self._time += 1
        own = self._pots.sum(axis=1, keepdims=True)
        stake = 1 / (self._time * (self._time + 1))
        pots = (1 - JUMP) * self._pots + (JUMP * own + stake) / len(SLOPES)
        self._pots = pots * (1 + SLOPES * (p_values[:, None] - 0.5))


def _cells(scores: Floats) -> Ints:
    """Scores as places in a row of counters [N, C]: the bits of a non-negative 16-bit float order as the floats do, so
    that 8 thousand counters hold every score ever seen, however long the stream is."""
    # abs, for -0.0 has other bits than 0.0
    halves = np.minimum(np.abs(np.nan_to_num(scores, nan=ODDEST, posinf=ODDEST)), ODDEST).astype(np.float16)
    return halves.view(np.uint16).astype(np.int64) >> DROPPED_BITS
