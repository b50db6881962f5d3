"""Make a model run a plan: its own code goes on, with the skipped modules replaced and their cache left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.errors import InputError
from backbone.execution.cache import drop_skipped_layers, remember_plans
from backbone.execution.live_changes import replaced
from backbone.families import UnsupportedModelError, decoder_layers, decoder_of, family_of
from backbone.healing.attaching import Attached
from backbone.healing.bridges import Bridge
from backbone.plan import LayerPlan

Forward = Callable[..., Any]


@contextmanager
def patched(
    model: PreTrainedModel, plan: LayerPlan, *, first_layer: int = 0, attached: Attached | None = None
) -> Iterator[None]:
    """Within this block and thread the skipped modules of `model` pass their input on. No check but those of the plan.

    Args:
        first_layer: the layers before it pass their input on whatever the plan says.
        attached: what stands in for skipped layers, and the weights that the others run with.

    Raises:
        PlanError: the plan is for another number of layers.
        UnsupportedModelError: sub-layers of a family that is not declared, or a model compiled as a whole.
    """
    rest = plan.from_layer(first_layer)
    forwards = _replacements(model, rest)
    if attached is not None:
        bridges = attached.bridges.get(plan, {})
        forwards += _bridging(model, {i: bridge for i, bridge in bridges.items() if i >= first_layer})
        forwards += [(swap.module, swap.forward) for swap in attached.swaps]
    forwards.append((decoder_of(model), _fitting_cache(decoder_of(model), rest, attached)))
    compiling = (model, "get_compiled_call", _compiled_calls(model, rest, attached))
    with replaced([*((module, "forward", forward) for module, forward in forwards), compiling]):
        yield


def _replacements(model: PreTrainedModel, plan: LayerPlan) -> list[tuple[nn.Module, Forward]]:
    family, layers = family_of(model), list(decoder_layers(model))
    check_can_run(model, plan)
    skipped = plan.skipped_layers
    whole = pass_on_with_none if family.returns_tuple else pass_on
    attention = residual_with_none if family.adds_residual else zeros_with_none
    mlp = residual if family.adds_residual else zeros
    replacements: list[tuple[nn.Module, Forward]] = [(layers[i], whole) for i in skipped]
    for i in plan.skipped_attention - skipped:
        replacements.append((getattr(layers[i], str(family.attention)), attention))
    for i in plan.skipped_mlp - skipped:
        *earlier, last = family.mlp
        replacements += [(getattr(layers[i], name), pass_on) for name in earlier]
        replacements.append((getattr(layers[i], last), mlp))
    return replacements


def check_can_run(model: PreTrainedModel, plan: LayerPlan) -> None:
    """Raises PlanError or UnsupportedModelError, see `patched`."""
    layers = list(decoder_layers(model))
    plan.check_fits(len(layers))
    halves = (plan.skipped_attention | plan.skipped_mlp) - plan.skipped_layers
    if halves and family_of(model).attention is None:
        raise UnsupportedModelError(
            f"plan {plan} runs half of layer {min(halves)}, but {model.config.model_type} is not a declared family: "
            "only whole layers of it can be skipped"
        )
    _check_not_compiled(model, layers)


def _bridging(model: PreTrainedModel, bridges: Mapping[int, Bridge]) -> list[tuple[nn.Module, Forward]]:
    """The first layer of a gap does what its bridge does; the others of the gap pass their input on. The last layer of
    the full depth goes on to its head."""
    returns_tuple, layers = family_of(model).returns_tuple, decoder_layers(model)

    def crossing(bridge: Bridge) -> Forward:
        def cross(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return bridge(hidden_states)

        def cross_with_none(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return bridge(hidden_states), None

        return cross_with_none if returns_tuple else cross

    return [
        (layers[first], crossing(bridge))
        if first < len(layers)
        else (layers[-1], going_on_to(bridge, layers[-1].forward))
        for first, bridge in bridges.items()
    ]


def going_on_to(head: Bridge, forward: Forward) -> Forward:
    """The last layer's forward and an exit head behind it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return (head(output[0]), *output[1:]) if isinstance(output, tuple) else head(output)

    return run


def _check_not_compiled(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """A graph that was compiled before the plan came may go on as if there were none."""
    for module in (model, decoder_of(model), *layers):
        if module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable"):
            raise UnsupportedModelError(
                f"this model's {type(module).__name__} was compiled by hand, and no plan can change a compiled graph; "
                "leave it uncompiled: generate() compiles each plan by itself when it uses a static cache"
            )


def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def pass_on_with_none(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return hidden_states, None


def zeros(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


def zeros_with_none(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(hidden_states), None


def residual(hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return residual


def residual_with_none(
    hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return residual, None


def _compiled_calls(model: PreTrainedModel, plan: LayerPlan, attached: Attached | None) -> Callable[[Any], Forward]:
    """What `generate()` asks for when it compiles the decoding step: here one graph a plan, each kept.

    In one shared cache of graphs the ninth plan would silently run uncompiled (`torch._dynamo.config.recompile_limit`).
    """
    graphs = model.__dict__.setdefault("_layerbudget_graphs", {})

    def get_compiled_call(compile_config: Any) -> Forward:
        config = compile_config or model._default_compile_config()
        options = config.to_dict()
        key = (plan, attached.digest if attached else "", repr(sorted(options.items())))
        if key not in graphs:
            graphs[key] = torch.compile(model.__call__, **options, isolate_recompiles=True)  # type: ignore[call-overload]
        return graphs[key]  # type: ignore[no-any-return]

    return get_compiled_call


def _fitting_cache(decoder: Any, plan: LayerPlan, attached: Attached | None) -> Forward:
    """The decoder's forward, with the cache, whoever made it, fitted to the plan first, and the plan noted on it."""
    forward, names = decoder.forward, argument_names(decoder.forward)

    def fit_cache(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = named_arguments(names, args, kwargs)
        cache, use_cache = kwargs.get("cache"), kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["cache"] = DynamicCache(config=decoder.config)
        if cache is not None:
            drop_skipped_layers(cache, plan)
            if not torch.compiler.is_compiling():  # the first pass over a prompt never is
                remember_plans(cache, (plan,), attached.digest if attached else "")
        return forward(*args, **kwargs)

    return fit_cache


def argument_names(forward: Forward) -> list[str]:
    """Names of a forward's arguments that may be given by position, in order."""
    parameters = inspect.signature(forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def named_arguments(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments by name, after those that have none; the cache as `cache`, also if given as
    `past_key_values`.

    Raises:
        InputError: the cache came twice.
    """
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    if (old := found.pop("past_key_values", None)) is not None:
        if found.get("cache") is not None:
            raise InputError("cache and past_key_values were both given, and are the same thing; leave one of them out")
        found["cache"] = old
    return args[len(names) :], found
