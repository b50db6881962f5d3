"""Run a model with a plan: skipped sub-layers are not computed and keep no cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.cache import drop_skipped_layers
from backbone.errors import InputError
from backbone.families import UnsupportedModelError, decoder_layers, decoder_of, family_of
from backbone.plan import LayerPlan, PlanError

Forward = Callable[..., Any]


class NestedPlanError(InputError):
    """`apply_plan` inside `apply_plan` on one model and thread."""


@contextmanager
def apply_plan(model: PreTrainedModel, plan: LayerPlan) -> Iterator[PreTrainedModel]:
    """Within this block, `model` runs `plan`: `model.generate()` and `model()` with their stock arguments and outputs.

    The model's layers are told to pass their input on; the model's own code runs otherwise unchanged, and on leaving
    the block, also by an exception, everything is as before. With the full plan the output is bit-equal to the stock
    model's. A second thread that applies a plan to the same model waits until the first has left its block.

    Raises:
        PlanError: the plan is for another number of layers.
        UnsupportedModelError: see `family_of`; or the family's MLP cannot be skipped by itself.
        NestedPlanError: this thread already runs this model with a plan.
        CacheMismatchError: (from the model's forward) a cache that was filled under another plan.
    """
    replacements = _replacements(model, plan)
    with _reserved(model, plan), ExitStack() as undo:
        for module, forward in replacements:
            undo.callback(_restore_forward, module, module.__dict__.get("forward"))
            module.forward = forward
        hook = decoder_of(model).register_forward_pre_hook(_cache_hook(plan), with_kwargs=True)
        undo.callback(hook.remove)
        yield model


def _replacements(model: PreTrainedModel, plan: LayerPlan) -> list[tuple[nn.Module, Forward]]:
    family, layers = family_of(model), decoder_layers(model)
    if plan.n_layers != len(layers):
        raise PlanError(f"plan {plan} is for {plan.n_layers} layers, this model has {len(layers)}")
    attention_only = plan.skipped_mlp - plan.skipped_layers
    if attention_only and family.mlp is None:
        raise UnsupportedModelError(f"the MLPs of {model.config.model_type} cannot be skipped by themselves")
    whole = _pass_on_with_none if family.returns_tuple else _pass_on
    return [
        *((layers[i], whole) for i in plan.skipped_layers),
        *(
            (layers[i].get_submodule(family.attention), _no_attention)
            for i in plan.skipped_attention - plan.skipped_layers
        ),
        *((layers[i].get_submodule(str(family.mlp)), _no_mlp) for i in attention_only),
    ]


def _pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _pass_on_with_none(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return hidden_states, None


def _no_attention(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(hidden_states), None


def _no_mlp(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


def _restore_forward(module: nn.Module, previous: Forward | None) -> None:
    if previous is None:
        del module.forward
    else:  # something else, such as accelerate's device hooks, had set it on the instance
        module.forward = previous


def _cache_hook(plan: LayerPlan) -> Callable[..., Any]:
    """Fits the cache to the plan on its way into the decoder, whoever made it."""

    def fit_cache(
        decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
        if cache is not None:
            drop_skipped_layers(cache, plan)
        return args, kwargs

    return fit_cache


class _Reservation:
    """Which thread runs a model with which plan."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None
        self.plan: LayerPlan | None = None


_reservations: WeakKeyDictionary[nn.Module, _Reservation] = WeakKeyDictionary()
_reservations_lock = threading.Lock()


@contextmanager
def _reserved(model: PreTrainedModel, plan: LayerPlan) -> Iterator[None]:
    with _reservations_lock:
        reservation = _reservations.setdefault(model, _Reservation())
    if reservation.thread == threading.get_ident():
        raise NestedPlanError(
            f"this model already runs plan {reservation.plan} here; leave that block before applying {plan}"
        )
    with reservation.lock:
        reservation.thread, reservation.plan = threading.get_ident(), plan
        try:
            yield
        finally:
            reservation.thread = reservation.plan = None
