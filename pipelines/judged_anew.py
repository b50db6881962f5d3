"""What a loss that needs no reference means in the prompts' own scores: the test prompts once more, by their judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle.frontier.frontier import equal_mean_budget, static_points
from oracle.labels.reader import judged
from pipelines.labelling import labelled_scores
from pipelines.learning_table import Table
from pipelines.workspace import Workspace


def by_own_judges(workspace: Workspace, test: Table, chosen: Mapping[str, NDArray[np.intp]]) -> dict[str, Any] | None:
    """Scores of every static plan and of some policies, where each prompt is judged as its file says.

    Labels `evaluation.own_judges` test prompts in addition. Prompts on whose full answer their judge fails are
    left out; None if none is left.

    Args:
        workspace: of the run.
        chosen: plan of each test prompt [N], for each policy.
    """
    if not (count := workspace.config.evaluation.own_judges):
        return None
    own = {prompt.id: prompt for prompt in workspace.prompts_as_judged}
    prompts = [own[prompt.id] for prompt in test.prompts[:count]]
    scores = labelled_scores(workspace.labeller, prompts, workspace.menu(), "labels by own judges")
    rows, scores = judged(scores)
    if not len(rows):
        return None
    full = max(float(scores[:, -1].mean()), 1e-12)
    return {
        "prompts": len(rows),
        "full": full,
        "static": static_points(scores, test.budgets),
        "equal_mean_budget": equal_mean_budget(scores, test.budgets),
        "policies": {
            name: {
                "budget": float(test.budgets[choice[rows]].mean()),
                "quality_ratio": float(scores[np.arange(len(rows)), choice[rows]].mean()) / full,
            }
            for name, choice in chosen.items()
        },
    }
