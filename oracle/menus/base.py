"""What a menu is made for: the contract of every method that proposes plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.families import decoder_layers
from backbone.plan import PlanError
from oracle.decoding import Decoding
from oracle.menus import LOSSES
from oracle.menus.task_labels import TaskLabels
from oracle.spread import spread

Advance = Callable[[], None]


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
        labels: answers to the prompts and their scores under any plan, for methods that look at scores.

    Raises:
        PlanError: a probe as deep as the model.
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

    def __post_init__(self) -> None:
        if not 1 <= self.probe_depth < self.n_layers:
            raise PlanError(f"probe_depth must be from 1 to {self.n_layers - 1} for this model, got {self.probe_depth}")

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
