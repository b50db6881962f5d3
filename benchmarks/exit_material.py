"""Token exits of a finished run: heads from the split `adapt`, thresholds from the splits `train` and `tune`.

The full model's answers to both are labels that the run has anyway. No reference is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from exit_observation import ObservedTokens, agreements, confidences, mean_depth, observe, train_bridges

from backbone.healing.training_targets import Example
from backbone.plan import LayerPlan
from oracle.answered_prompts import answered_examples
from oracle.prompts import Prompt
from pipelines.run.workspace import Workspace
from token_exits.gates import Entropy, Gate, Margin, Patience, Saturation, TopProbability, fit_classifier
from token_exits.heads import ExitHeads, fit_exit_bridges, shortlist_of
from token_exits.thresholds import threshold_for

GATES: dict[str, type[Gate]] = {gate.name: gate for gate in (TopProbability, Margin, Entropy, Saturation, Patience)}
"""By name, but for the classifier, which has to be fitted."""
AGREEMENTS = (0.99, 0.97, 0.94, 0.9, 0.8)
"""Shares of held-out tokens to keep, safest first: the thresholds that a certificate tests."""
SHORTLIST = 2048
"""Tokens of the vocabulary that gates look at."""
TOKENS = 600
"""Held-out tokens, at most, that thresholds are set on."""
CLASSIFIED = 4
"""Every so many-th answer is kept from the heads, for the classifier to be fitted on."""


def default_depths(n_layers: int) -> list[int]:
    """Six candidate layers, evenly over the last two thirds."""
    return sorted({n_layers // 3 + round(i * (n_layers - n_layers // 3) / 6) for i in range(6)} - {0, n_layers})


@dataclass(eq=False)
class Material:
    """Everything is made when first asked for, and once.

    Attributes:
        workspace: of the run.
        gates: names of the gates that are compared.
        training_steps: for which bridges are trained towards the full model's distribution.
    """

    workspace: Workspace
    gates: Sequence[str]
    training_steps: int = 0
    training: dict[int, tuple[float, float]] | None = None
    """Divergence on held-out answers before and after the training, by layer."""

    def __post_init__(self) -> None:
        self.model, self._tokenizer = self.workspace.model.loaded
        self.n_layers = self.workspace.frozen_menu().n_layers
        self.depths = tuple(default_depths(self.n_layers))
        settings = self.workspace.config.adapt
        prompts = self.workspace.prompts.splits["adapt"][: settings.most_prompts(settings.method)]
        examples = self._answered(prompts)
        self.for_heads = [example for place, example in enumerate(examples) if place % CLASSIFIED]
        self.for_classifier = examples[::CLASSIFIED]
        """No head has been fitted on these, so that they show how often heads are right."""
        self.shortlist = shortlist_of((example.tokens for example in examples), SHORTLIST)

    @cached_property
    def frozen(self) -> ExitHeads:
        """The model's own final norm and head."""
        return ExitHeads(self.model, {}, self.shortlist)

    @cached_property
    def bridged(self) -> ExitHeads:
        """Closed-form bridges in front of them, trained further for `training_steps`."""
        sequences = [example.tokens[:-1] for example in self.for_heads]
        heads = ExitHeads(self.model, fit_exit_bridges(self.model, sequences, self.depths), self.shortlist)
        if self.training_steps:
            observed = observe(self.model, self.for_heads, self.depths)
            bridges, self.training = train_bridges(heads, observed, steps=self.training_steps)
            heads = ExitHeads(self.model, bridges, self.shortlist)
        return heads

    @cached_property
    def held_out(self) -> ObservedTokens:
        """Answer tokens of the splits `train` and `tune`, at most `TOKENS`."""
        prompts = self.workspace.prompts.labelled("train", "tune")[: TOKENS // 2]  # most answers have two or more
        observed = observe(self.model, self._answered(prompts), self.depths)
        generator = torch.Generator().manual_seed(0)
        picked = torch.randperm(len(observed.following), generator=generator)[:TOKENS].sort().values
        return observed.of(picked)

    @cache  # noqa: B019
    def judged(self, heads: ExitHeads) -> torch.Tensor:
        """Whether leaving keeps the full model's next token, of held-out tokens [C, T]."""
        return agreements(heads, self.held_out, self.depths)

    @cache  # noqa: B019
    def gate(self, name: str, heads: ExitHeads) -> Gate:
        """A gate by its name; the classifier is fitted first."""
        if name != "classifier":
            return GATES[name]()
        observed = observe(self.model, self.for_classifier, self.depths)
        picked = torch.arange(0, len(observed.following), max(len(observed.following) // TOKENS, 1))
        observed = observed.of(picked)
        agrees = dict(zip(self.depths, agreements(heads, observed, self.depths), strict=True))
        return fit_classifier({depth: observed.states[depth] for depth in self.depths}, agrees)

    @cache  # noqa: B019
    def confidence(self, name: str, heads: ExitHeads) -> torch.Tensor:
        """How sure a gate is of the held-out tokens [C, T]."""
        return confidences(self.gate(name, heads), heads, self.held_out, self.depths)

    def steps(self, name: str, heads: ExitHeads) -> list[float]:
        """The thresholds that a certificate tests, safest first: for each wanted agreement the lowest that keeps it on
        held-out tokens."""
        return [threshold_for(self.confidence(name, heads), self.judged(heads), wanted) for wanted in AGREEMENTS]

    def best_gate(self) -> str:
        """The gate of the fewest layers at equal agreement on the held-out tokens, which are of no test prompt."""

        def layers(name: str) -> float:
            confidence, steps = self.confidence(name, self.bridged), self.steps(name, self.bridged)
            return sum(mean_depth(confidence, self.depths, self.n_layers, step) for step in steps)

        return min(self.gates, key=layers)

    def _answered(self, prompts: Sequence[Prompt]) -> list[Example]:
        full = LayerPlan.full(self.n_layers)
        return answered_examples(self.workspace.labeller(self.workspace.healing), self._tokenizer, prompts, full)
