"""What there is to learn from: prompts with their features, scores and the share of quality that each plan keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.base import lost
from controller.certificate.risks import Risk, unit_of
from controller.features import Features, rows_of
from oracle.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Table:
    """What there is to learn from: N prompts of one split.

    Attributes:
        prompts: the N prompts.
        features: each set of raw features [N, F].
        scores: under each plan [N, K].
        sufficient: whether each plan is sufficient [N, K].
        kept: what each plan keeps [N, K], see `controller.certificate.risks.quality_kept`.
        budgets: of each plan [K].
        risk: which loss the certificate bounds.
    """

    prompts: list[Prompt]
    features: Features
    scores: NDArray[np.float64]
    sufficient: NDArray[np.bool_]
    kept: NDArray[np.float64]
    budgets: NDArray[np.float64]
    risk: Risk

    def rows(self, rows: NDArray[np.intp]) -> Table:
        """Some of the prompts."""
        return Table(
            prompts=[self.prompts[row] for row in rows],
            features=rows_of(self.features, rows),
            scores=self.scores[rows],
            sufficient=self.sufficient[rows],
            kept=self.kept[rows],
            budgets=self.budgets,
            risk=self.risk,
        )

    @property
    def losses(self) -> NDArray[np.float64]:
        """Of each plan on each prompt [N, K]."""
        return lost(self.kept)

    @property
    def full(self) -> NDArray[np.float64]:
        """The full model's score of each prompt [N]."""
        return self.scores[:, -1]

    @property
    def unit(self) -> float:
        """What a mean of `losses` is divided by to be held against a bound."""
        return unit_of(self.risk, self.full)

    @property
    def tasks(self) -> NDArray[np.str_]:
        """Task of each prompt [N]."""
        return np.array([prompt.task for prompt in self.prompts])
