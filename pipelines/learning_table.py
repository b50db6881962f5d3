"""What there is to learn from: prompts with their features, scores and the share of quality that each plan keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.features import Features, rows_of
from oracle.prompts import Prompt
from pipelines.config_sections import Risk


@dataclass(frozen=True, slots=True)
class Table:
    """What there is to learn from: N prompts of one split.

    Attributes:
        prompts: the N prompts.
        features: each set of raw features [N, F].
        scores: under each plan [N, K].
        sufficient: whether each plan is sufficient [N, K].
        kept: share of quality that each plan keeps [N, K]: 1 less the loss that the certificate bounds.
        budgets: of each plan [K].
    """

    prompts: list[Prompt]
    features: Features
    scores: NDArray[np.float64]
    sufficient: NDArray[np.bool_]
    kept: NDArray[np.float64]
    budgets: NDArray[np.float64]

    def rows(self, rows: NDArray[np.intp]) -> Table:
        """Some of the prompts."""
        return Table(
            prompts=[self.prompts[row] for row in rows],
            features=rows_of(self.features, rows),
            scores=self.scores[rows],
            sufficient=self.sufficient[rows],
            kept=self.kept[rows],
            budgets=self.budgets,
        )

    @property
    def tasks(self) -> NDArray[np.str_]:
        """Task of each prompt [N]."""
        return np.array([prompt.task for prompt in self.prompts])


def quality_kept(risk: Risk, scores: NDArray[np.float64], sufficient: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[N, K]: 1 less the loss of each plan. `insufficient`: 1 where the plan is not sufficient, else 0. `score_lost`:
    how far its score lies below the full plan's; what it wins does not count."""
    if risk == "insufficient":
        return sufficient.astype(np.float64)
    return 1.0 - np.clip(scores[:, -1:] - scores, 0.0, 1.0)
