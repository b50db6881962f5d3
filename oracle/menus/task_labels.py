"""What a menu's method may ask of the labels: the answers to its prompts, and their scores under any plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from oracle.answered_prompts import answered_examples
from oracle.labels.labeller import Labeller
from oracle.prompts import Prompt


@dataclass(frozen=True, slots=True)
class TaskLabels:
    """Labels are kept in the labeller's store, so that a search that was stopped finds them done.

    Attributes:
        labeller: makes or gives the labeller, which labels with what is attached to its model at the moment.
        tokenizer: of that model.
        prompts: the task's prompts [N], which plans are scored on.
        others: prompts that bridges are fitted on; on those a plan would look better than it is.
        full: the full plan.
    """

    labeller: Callable[[], Labeller]
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    others: Sequence[Prompt]
    full: LayerPlan

    def scores(
        self, plans: Sequence[LayerPlan], judge: str | None = None, advance: Callable[[int], None] = lambda done: None
    ) -> NDArray[np.float64]:
        """Scores [N, P] under P plans; NaN where a judge failed.

        Args:
            judge: of all prompts, in place of their own.
            advance: called with the number of labels made.
        """
        prompts = [prompt if judge is None else replace(prompt, judge=judge) for prompt in self.prompts]
        labeller = self.labeller()
        labeller.label_full(prompts, self.full)
        labeller.label_some({plan: prompts for plan in plans if not plan.is_full}, self.full, advance)
        return np.array([labeller.scores(prompts, plan) for plan in plans]).T

    def sequences(self) -> list[tuple[int, ...]]:
        """Token ids of each of the `others` with the full model's answer, less the last token, behind which nothing
        follows."""
        examples = answered_examples(self.labeller(), self.tokenizer, self.others, self.full)
        return [example.tokens[:-1] for example in examples]
