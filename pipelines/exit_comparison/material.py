"""What token exits of a run are made of: heads from the split `adapt`, thresholds from the splits `train` and `tune`.

The full model's answers to both are labels that the run has anyway. No reference is looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch

from backbone.plan import LayerPlan
from backbone.stand_ins.training_targets import Example
from oracle.answered_prompts import answered_examples
from oracle.prompts import Prompt
from pipelines.workspace import Workspace
from runtime.token_exits.gates.base import Gate
from runtime.token_exits.gates.of_states import Classifier, Saturation, fit_classifier
from runtime.token_exits.gates.of_the_head import Entropy, Margin, Patience, TopProbability
from runtime.token_exits.gates.oracle import Oracle
from runtime.token_exits.heads import ExitHeads, fit_exit_bridges, shortlist_of
from runtime.token_exits.observing import Observed, agreements, confidences, observe
from runtime.token_exits.thresholds import mean_depth, threshold_for
from runtime.token_exits.training import train_bridges

GATES: dict[str, type[Gate]] = {
    gate.name: gate for gate in (TopProbability, Margin, Entropy, Saturation, Patience, Oracle)
}
"""By name, but for the classifier, which has to be fitted."""

CLASSIFIED = 4
"""Every so many-th answer is kept from the heads, for the classifier to be fitted on."""


def default_depths(n_layers: int) -> list[int]:
    """Six candidate layers, evenly over the last two thirds."""
    return sorted({n_layers // 3 + round(i * (n_layers - n_layers // 3) / 6) for i in range(6)} - {0, n_layers})


class Material:
    """Everything is made when first asked for, and once."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self.settings = workspace, workspace.config.token_exits
        self.model, self._tokenizer = workspace.adapted
        self.n_layers = workspace.frozen_menu().n_layers
        self.depths = tuple(self.settings.depths or default_depths(self.n_layers))

    @cached_property
    def _examples(self) -> list[Example]:
        """Of the split `adapt`."""
        return self._answered(self._workspace.splits["adapt"][: self._workspace.config.adapt.prompts])

    @property
    def for_heads(self) -> list[Example]:
        return [example for place, example in enumerate(self._examples) if place % CLASSIFIED]

    @property
    def for_classifier(self) -> list[Example]:
        """No head has been fitted on these, so that they show how often heads are right."""
        return self._examples[::CLASSIFIED]

    @cached_property
    def _shortlist(self) -> torch.Tensor:
        return shortlist_of((example.tokens for example in self._examples), self.settings.shortlist)

    @cached_property
    def frozen(self) -> ExitHeads:
        """The model's own final norm and head."""
        return ExitHeads(self.model, {}, self._shortlist)

    @cached_property
    def bridged(self) -> ExitHeads:
        """Closed-form bridges in front of them, where configured trained further."""
        sequences = [example.tokens[:-1] for example in self.for_heads]
        heads = ExitHeads(self.model, fit_exit_bridges(self.model, sequences, self.depths), self._shortlist)
        if self.settings.training_steps:
            observed = observe(self.model, self.for_heads, self.depths)
            bridges, self.training = train_bridges(heads, observed, steps=self.settings.training_steps)
            heads = ExitHeads(self.model, bridges, self._shortlist)
        return heads

    training: dict[int, tuple[float, float]] | None = None
    """Divergence on held-out answers before and after the training, by layer."""

    @cached_property
    def held_out(self) -> Observed:
        """Answer tokens of the splits `train` and `tune`, at most `token_exits.tokens`."""
        splits = self._workspace.labelled_splits
        prompts = [*splits["train"], *splits["tune"]][: self.settings.tokens // 2]  # most answers have two or more
        observed = observe(self.model, self._answered(prompts), self.depths)
        generator = torch.Generator().manual_seed(0)
        picked = torch.randperm(len(observed.following), generator=generator)[: self.settings.tokens].sort().values
        return observed.of(picked)

    def judged(self, heads: ExitHeads) -> torch.Tensor:
        """Whether leaving keeps the full model's next token, of held-out tokens [C, T]."""
        if id(heads) not in self._agreements:
            self._agreements[id(heads)] = agreements(heads, self.held_out, self.depths)
        return self._agreements[id(heads)]

    @cached_property
    def _agreements(self) -> dict[int, torch.Tensor]:
        return {}

    def gate(self, name: str, heads: ExitHeads) -> Gate:
        """A gate by its name; the classifier is fitted first."""
        if name != "classifier":
            return GATES[name]()
        if id(heads) not in self._classifiers:
            observed = observe(self.model, self.for_classifier, self.depths)
            picked = torch.arange(0, len(observed.following), max(len(observed.following) // self.settings.tokens, 1))
            observed = observed.of(picked)
            agrees = dict(zip(self.depths, agreements(heads, observed, self.depths), strict=True))
            states = {depth: observed.states[depth] for depth in self.depths}
            self._classifiers[id(heads)] = fit_classifier(states, agrees)
        return self._classifiers[id(heads)]

    @cached_property
    def _classifiers(self) -> dict[int, Gate]:
        return {}

    def steps(self, gate: Gate, heads: ExitHeads) -> list[float]:
        """The thresholds that a certificate tests, safest first: for each wanted agreement the lowest that keeps it on
        held-out tokens."""
        confidence = confidences(gate, heads, self.held_out, self.depths)
        return [threshold_for(confidence, self.judged(heads), wanted) for wanted in self.settings.agreements]

    def held_out_layers(self, name: str, heads: ExitHeads) -> float:
        """Layers that a held-out token runs under a gate, on average over the thresholds that a certificate tests."""
        gate = self.gate(name, heads)
        confidence = confidences(gate, heads, self.held_out, self.depths)
        layers = [mean_depth(confidence, self.depths, self.n_layers, step) for step in self.steps(gate, heads)]
        return sum(layers) / len(layers)

    def digest(self, name: str, heads: ExitHeads) -> str:
        """Twelve hexadecimal digits that name a gate's and its heads' weights."""
        bridges = [heads.bridges[depth].tensors() for depth in sorted(heads.bridges)]
        tensors = [tensor for bridge in bridges for _, tensor in sorted(bridge.items())]
        tensors += [] if heads.shortlist is None else [heads.shortlist]
        if isinstance(gate := self.gate(name, heads), Classifier):
            tensors += [torch.cat([own, own.new_tensor([constant])]) for own, constant in gate.weights.values()]
        content = hashlib.sha256()
        for tensor in tensors:
            content.update(tensor.double().cpu().numpy().tobytes())
        return content.hexdigest()[:12]

    def _answered(self, prompts: Sequence[Prompt]) -> list[Example]:
        full = LayerPlan.full(self.n_layers)
        return answered_examples(self._workspace.labeller, self._tokenizer, prompts, full)
