"""Exit heads: from a state between two layers to the model's output.

An exit head is the model's own final norm and output head, with or without a bridge over the skipped layers in front
(Shan et al. 2024, arXiv 2412.01455). Gates see the output head cut to a shortlist of the vocabulary.

Shapes: `r` rows, `D` hidden size, `V` vocabulary, `K` tokens of the shortlist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from backbone.errors import InputError, reason_of
from backbone.execution.live_changes import captured
from backbone.execution.self_test import rounding_limit
from backbone.families import decoder_layers, final_norm
from backbone.healing.fit_bridges import fit_bridges
from backbone.healing.healing import Bridge
from backbone.plan import LayerPlan


class TokenExitsError(InputError):
    """Token exits that cannot be: wrong layers, thresholds or models."""


_checked: WeakSet[torch.nn.Module] = WeakSet()


class ExitHeads:
    """The exit heads of one model.

    Args:
        bridges: by the layer before which tokens leave; without one the state itself goes to the final norm.
        shortlist: the token ids [K] that gates see; None for all.

    Raises:
        TokenExitsError: final norm and head do not give the model's own logits.
    """

    def __init__(
        self, model: PreTrainedModel, bridges: Mapping[int, Bridge] | None = None, shortlist: torch.Tensor | None = None
    ) -> None:
        self.model = model
        self.bridges = {depth: bridge.to(model.device, model.dtype) for depth, bridge in (bridges or {}).items()}
        self.shortlist = None if shortlist is None else shortlist.to(model.device)
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head, self._norm = head, final_norm(model) or torch.nn.Identity()
        self._weight, self._bias = head.weight, getattr(head, "bias", None)
        if self.shortlist is not None:
            self._weight = head.weight.detach().index_select(0, self.shortlist).contiguous()
            self._bias = None if self._bias is None else self._bias.detach().index_select(0, self.shortlist)
        if model not in _checked:
            self._check()
            _checked.add(model)

    @torch.no_grad()
    def _check(self) -> None:
        """Raises TokenExitsError unless final states give the model's own logits."""
        layers, kind = decoder_layers(self.model), self.model.config.model_type
        ids = torch.arange(1, 3, device=self.model.device)[None]
        with captured(layers, [len(layers)]) as states:
            logits = self.model(input_ids=ids, use_cache=False).logits[0].float()
        wanted = logits if self.shortlist is None else logits[:, self.shortlist]
        try:
            own = self.logits(states[len(layers)][0])
        except RuntimeError as error:
            raise TokenExitsError(
                f"{kind}: its head does not take what its final norm gives, so an exit head cannot end this model: "
                f"{reason_of(error)}"
            ) from error
        difference = float((own - wanted).norm() / wanted.norm())
        if not difference <= (limit := rounding_limit(self.model.dtype, self.model.device)):
            raise TokenExitsError(
                f"{kind}: final norm and head differ by {difference:.1%} from the model's own logits (at most "
                f"{limit:.1%} is rounding), so an exit head cannot end this model"
            )

    def output(self, depth: int, states: torch.Tensor) -> torch.Tensor:
        """Input [.., D] of the final norm for states [.., D] before layer `depth`."""
        bridge = self.bridges.get(depth)
        return states if bridge is None else bridge(states)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[r, K] over the shortlist, from outputs [r, D]; float32."""
        logits = torch.nn.functional.linear(self._norm(outputs), self._weight, self._bias).float()
        config = self.model.config
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if factor := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return logits

    def predictions(self, outputs: torch.Tensor) -> torch.Tensor:
        """The likeliest token of the whole vocabulary [r], from outputs [r, D]."""
        return self._head(self._norm(outputs)).argmax(-1)  # type: ignore[no-any-return]


def shortlist_of(texts: Iterable[Sequence[int]], size: int) -> torch.Tensor:
    """The `size` commonest tokens of some texts, commonest first; or all there are."""
    counts = Counter(token for ids in texts for token in ids)
    return torch.tensor([token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]])


def fit_exit_bridges(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], depths: Sequence[int], **options: Any
) -> dict[int, Bridge]:
    """Fit a closed-form bridge from each candidate layer to the model's output, without labels.

    Args:
        sequences: token ids of prompts with the model's own answers.
        depths: candidate layers.
        options: of `fit_bridges`.
    """
    n_layers = len(decoder_layers(model))
    plans = {depth: LayerPlan.exiting(n_layers, depth) for depth in depths}
    fits = fit_bridges(model, sequences, list(plans.values()), **options)
    return {depth: fits[plan][depth].bridge for depth, plan in plans.items()}
