"""What a call of an allocator gives beside the tokens: plans, layers, shares of the decoder, seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils.generic import ModelOutput

from backbone.errors import InputError
from backbone.families import sublayer_bytes
from backbone.plan import LayerPlan, PlanMenu
from controller.certificate.drift import DriftState

MOST_OTHER_LAYERS = 0.05
"""Share of the decoder by which prompts may run more or fewer layers than was certified: rounding changes few plans."""


@dataclass
class Allocation(ModelOutput):
    """What an allocator with `return_dict_in_generate=True` says beside stock's fields.

    Attributes:
        plans: of the B prompts.
        layers, share_of_decoder: that ran, on average over the prompts; the share is the mean of the plans' budgets.
        allocation_s: seconds until the plans were known.
        first_token_s: seconds until the first tokens were known.
        total_s: seconds of the whole call.
        drift: state of the drift alarm; None without one.
        draft_tokens, accepted_tokens, acceptance, full_passes: of `lossless=True`, see `runtime.lossless`; `plans`,
            `layers` and `share_of_decoder` are then those of the plan that drafts.
    """

    plans: list[LayerPlan] = None  # type: ignore[assignment]  # transformers wants defaults of None
    layers: float = None  # type: ignore[assignment]
    share_of_decoder: float = None  # type: ignore[assignment]
    allocation_s: float = None  # type: ignore[assignment]
    first_token_s: float = None  # type: ignore[assignment]
    total_s: float = None  # type: ignore[assignment]
    drift: DriftState | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    acceptance: float | None = None
    full_passes: int | None = None


@dataclass
class AllocatedOutput(Allocation, GenerateDecoderOnlyOutput):
    """Stock's output with the fields of `Allocation`. Fields that were not asked for are None."""


@dataclass
class AllocatedBeamOutput(Allocation, GenerateBeamDecoderOnlyOutput):
    """The same of beam search, with `sequences_scores` and `beam_indices`."""


Allocated = AllocatedOutput | AllocatedBeamOutput


def allocated(output: ModelOutput, plans: list[LayerPlan], **fields: Any) -> Allocated:
    """The output of stock's loop with the fields of `Allocation`."""
    made: type[Allocated] = AllocatedOutput if isinstance(output, GenerateDecoderOnlyOutput) else AllocatedBeamOutput
    return made(**dict(output), plans=plans, layers=mean_layers(plans), **fields)


def mean_layers(plans: Iterable[LayerPlan]) -> float:
    counts = Counter(plans)
    return sum(plan.layers * count for plan, count in counts.items()) / counts.total()


def share_of_decoder(plans: Iterable[LayerPlan], menu: PlanMenu, model: PreTrainedModel) -> float:
    """Mean budget of plans, by the menu, which counts bridges, or by the model's bytes where a cache brought others."""
    budgets, counts = dict(zip(menu.plans, menu.budgets, strict=True)), Counter(plans)
    if others := counts.keys() - budgets.keys():
        size = sublayer_bytes(model)
        budgets |= {plan: plan.budget(size) for plan in others}
    return sum(budgets[plan] * count for plan, count in counts.items()) / counts.total()


def summary_line(plans: Iterable[LayerPlan], menu: PlanMenu, model: PreTrainedModel, seconds: float) -> str:
    """Prompts, layers and seconds of one command."""
    ran = list(plans)
    return (
        f"{len(ran)} prompts: {mean_layers(ran):.2f} of {menu.n_layers} layers on average, "
        f"{share_of_decoder(ran, menu, model):.1%} of the decoder, {seconds:.1f} s"
    )


def check_layers(certified: Iterable[LayerPlan], ran: Iterable[LayerPlan]) -> None:
    """Compare the plans [N] that a certificate rests on with those that `generate` ran for the same prompts.

    Args:
        certified: for each prompt the plan that the certified policy chose.
        ran: the `plans` of the output of `allocator.generate`, or the plans of the texts of `generate_many`.

    Raises:
        InputError: the plans differ, on average over prompts, by more than `MOST_OTHER_LAYERS` of the layers.
    """
    pairs = list(zip(certified, ran, strict=True))
    differing = sum(len(one.attention ^ other.attention) + len(one.mlp ^ other.mlp) for one, other in pairs) / 2
    if differing > MOST_OTHER_LAYERS * sum(one.n_layers for one, _ in pairs):
        expected, found = (sum(plan.layers for plan in plans) / len(pairs) for plans in zip(*pairs, strict=True))
        raise InputError(
            f"generate ran {found:.2f} of {pairs[0][0].n_layers} layers on average, where {expected:.2f} were "
            f"certified ({differing / len(pairs):.2f} differ a prompt); a FullPlanWarning says why"
        )
