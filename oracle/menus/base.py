"""What a menu is made for: the contract of every method that proposes plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.families import decoder_layers
from backbone.healing.healing import Healing
from backbone.plan import LayerPlan
from oracle.answered_prompts import answered_examples
from oracle.batches import spread
from oracle.decoding import Decoding
from oracle.labels.labeller import Labeller
from oracle.menus import LOSSES
from oracle.prompts import Prompt

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class TaskLabels:
    """Answers to a task's prompts, and their scores under any plans.

    Labels are kept in the labeller's store, so that a search that was stopped finds them done.

    Attributes:
        labeller: makes the labeller of the model with some healing, None for without.
        tokenizer: of that model.
        prompts: the task's prompts [N], which plans are scored on.
        others: prompts that bridges are fitted on; on those a plan would look better than it is.
        full: the full plan.
    """

    labeller: Callable[[Healing | None], Labeller]
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    others: Sequence[Prompt]
    full: LayerPlan

    def scores(
        self,
        plans: Sequence[LayerPlan],
        healing: Healing | None,
        judge: str | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> NDArray[np.float64]:
        """Scores [N, P] under P plans; NaN where a judge failed.

        Args:
            healing: what shortened plans run with.
            judge: of all prompts, in place of their own.
            advance: called with the number of labels made.
        """
        prompts = [prompt if judge is None else replace(prompt, judge=judge) for prompt in self.prompts]
        labeller = self.labeller(healing)
        labeller.label_full(prompts, self.full)
        labeller.label_some({plan: prompts for plan in plans if not plan.is_full}, self.full, advance)
        return np.array([labeller.scores(prompts, plan) for plan in plans]).T

    def sequences(self) -> list[tuple[int, ...]]:
        """Token ids of each of the `others` with the full model's answer, less the last token, behind which nothing
        follows."""
        examples = answered_examples(self.labeller(None), self.tokenizer, self.others, self.full)
        return [example.tokens[:-1] for example in examples]


@dataclass(frozen=True, slots=True)
class MenuTask:
    """What a menu is made for.

    Attributes:
        model: the model, with its tokenizer.
        prompts: a few prompts of the workload, for methods that look at the model's answers.
        decoding: how answers are generated.
        probe_depth: layers that every plan runs.
        n_plans: K, the full plan included.
        cheapest_budget: share of the decoder's bytes that the cheapest plan should run.
        losses: shares of the full model's mean score that the menu's oracle may lose, for methods that look at scores;
            the menu is to be good at all of them.
        given: texts of the plans, for the method `given`.
        labels: for methods that look at scores.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    decoding: Decoding
    probe_depth: int
    n_plans: int
    cheapest_budget: float
    losses: Sequence[float] = LOSSES
    given: Sequence[str] = ()
    labels: TaskLabels | None = None

    @property
    def n_layers(self) -> int:
        return len(decoder_layers(self.model))

    @property
    def fewest_layers(self) -> int:
        """Layers of the cheapest plan."""
        return max(self.probe_depth, round(self.cheapest_budget * self.n_layers))

    @property
    def counts(self) -> list[int]:
        """Numbers of layers for the K - 1 shortened plans, evenly spread."""
        return spread(range(self.fewest_layers, self.n_layers), self.n_plans - 1)
