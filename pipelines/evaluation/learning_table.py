"""What there is to learn from: prompts with their features, their scores and the loss of each plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from controller.base import ChoiceRule
from controller.certificate.risks import Risk, loss_scale, plan_losses
from controller.features import Features, rows_of
from oracle.frontier.frontier import sufficient_plans
from oracle.labels.reader import judged
from oracle.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Table:
    """N prompts to learn from, or to measure on.

    Attributes:
        features: each set of raw features [N, F].
        scores: under each plan [N, K].
        sufficient: whether each plan is sufficient [N, K].
        losses: of each plan [N, K], see `controller.certificate.risks.plan_losses`.
        budgets: of each plan [K].
        risk: which loss the certificate bounds.
        labelled: which scores are known [N, K]; others are 0, and so are what is made of them. Only the split
            `calibrate` has such (see `controller.certificate.calibration.on_path`).
        left_out: prompts that are not among the N, since the judge failed on the full model's answer.
    """

    prompts: list[Prompt]
    features: Features
    scores: NDArray[np.float64]
    sufficient: NDArray[np.bool_]
    losses: NDArray[np.float64]
    budgets: NDArray[np.float64]
    risk: Risk
    labelled: NDArray[np.bool_] | None = None
    left_out: int = 0

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        scores: NDArray[np.float64],
        features: Features,
        budgets: NDArray[np.float64],
        risk: Risk,
        tolerance: float = 0.0,
        labelled: NDArray[np.bool_] | None = None,
    ) -> Table:
        """Prompts with their scores [N, K], NaN where a judge failed (see `oracle.labels.reader.judged`).

        `tolerance` is how much lower than the full model's the score of a sufficient answer may be.
        """
        rows, known = judged(scores)
        sufficient = sufficient_plans(known, tolerance)
        return cls(
            prompts=[prompts[row] for row in rows],
            features=rows_of(features, rows),
            scores=known,
            sufficient=sufficient,
            losses=plan_losses(risk, known, sufficient),
            budgets=budgets,
            risk=risk,
            labelled=None if labelled is None else labelled[rows],
            left_out=len(scores) - len(rows),
        )

    def rows(self, rows: NDArray[np.intp]) -> Table:
        """Some of the prompts."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            features=rows_of(self.features, rows),
            scores=self.scores[rows],
            sufficient=self.sufficient[rows],
            losses=self.losses[rows],
            labelled=None if self.labelled is None else self.labelled[rows],
        )

    @property
    def rule(self) -> ChoiceRule:
        """How plans are chosen at a price."""
        return ChoiceRule(self.budgets, self.risk)

    @property
    def full(self) -> NDArray[np.float64]:
        """The full model's score of each prompt [N]."""
        return self.scores[:, -1]

    @property
    def unit(self) -> float:
        """What a mean of `losses` is divided by to be held against a bound."""
        return loss_scale(self.risk, self.full)

    @property
    def tasks(self) -> NDArray[np.str_]:
        """[N]."""
        return np.array([prompt.task for prompt in self.prompts])

    @property
    def groups(self) -> NDArray[np.intp]:
        """[N], see `groups_of`."""
        return groups_of(self.prompts)


def groups_of(prompts: Sequence[Prompt]) -> NDArray[np.intp]:
    """Which prompts are no independent draws of one another [N]: those with one `group`, and those with one text."""
    found, first = np.arange(len(prompts)), dict[tuple[str, str], int]()
    for row, prompt in enumerate(prompts):
        for key in (("text", prompt.prompt), ("group", prompt.group)):
            other = found[first.setdefault(key, row)] if key[1] else row
            found[found == other] = found[row]
    return found
