"""One pass in which each row runs its plan: a layer, or half of one, computes only the rows whose plan runs it.

The model's own code runs. A module that no row runs passes its input on. A module that only some rows run gets inputs
cut to these rows, and its output is put back among what the other rows have when they skip it. Where all rows have one
plan, nothing is cut.

Shapes: `B` prompts, each in `c` neighbouring rows (its beams or samples), `R = B * c` rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from backbone.errors import InputError, UnsupportedModelError
from backbone.execution.live_changes import Forward, replaced
from backbone.execution.rows import Prompts, Rows, RowSets, hold_rows, remember_plans, taken, with_rows
from backbone.families import decoder_layers, decoder_of, family_of
from backbone.healing.healing import Bridge, ReadyHealing, Swap
from backbone.plan import LayerPlan

Patch = tuple[nn.Module, Forward]


@contextmanager
def executing(
    model: PreTrainedModel, plans: Sequence[LayerPlan], healing: ReadyHealing | None = None, *, first_layer: int = 0
) -> Iterator[None]:
    """Within this block and thread the rows of `model` run `plans`. No check but those of the plans.

    Args:
        plans: one for all rows, or one for each of the B prompts.
        healing: what shortened plans run with.
        first_layer: the layers before it pass their input on whatever the plans say.

    Raises:
        PlanError: a plan is for another number of layers.
        UnsupportedModelError: sub-layers of a family that is not declared, a model compiled as a whole, or, for
            several plans, masks that cannot be cut.
    """
    for plan in dict.fromkeys(plans):
        _check_can_run(model, plan)
    if len(plans) > 1 and model.config._attn_implementation == "flex_attention":
        raise UnsupportedModelError("flex_attention has masks that cannot be cut into rows; load the model with sdpa")
    executor = _Executor(model, plans, healing, first_layer)
    compiling = (model, "get_compiled_call", executor.compiled_call())
    with replaced([*((module, "forward", forward) for module, forward in executor.patches()), compiling]):
        yield


def _check_can_run(model: PreTrainedModel, plan: LayerPlan) -> None:
    layers = list(decoder_layers(model))
    plan.check_fits(len(layers))
    halves = (plan.skipped_attention | plan.skipped_mlp) - plan.skipped_layers
    if halves and family_of(model).attention is None:
        raise UnsupportedModelError(
            f"plan {plan} runs half of layer {min(halves)}, but {model.config.model_type} is not a declared family: "
            "only whole layers of it can be skipped"
        )
    for module in (model, decoder_of(model), *layers):  # a graph compiled before may go on as if there were no plan
        if module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable"):
            raise UnsupportedModelError(
                f"this model's {type(module).__name__} was compiled by the user, and no plan changes a compiled graph; "
                "leave it uncompiled: generate() compiles each plan by itself when it uses a static cache"
            )


def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _zeros(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


def _residual(hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return residual


def with_none(forward: Forward) -> Forward:
    """A forward that returns `(output, None)`."""
    return lambda *args, **kwargs: (forward(*args, **kwargs), None)


class _Executor:
    """The forwards that plans put in place of a model's own.

    Where several plans are mixed, `RowSets` says which rows a module has; a single plan never asks.
    """

    def __init__(
        self, model: PreTrainedModel, plans: Sequence[LayerPlan], healing: ReadyHealing | None, first_layer: int
    ) -> None:
        self._model, self._plans, self._healing, self._first = model, plans, healing, first_layer
        self._layers, self._family = list(decoder_layers(model)), family_of(model)
        self._rows = RowSets(len(plans), int(model.config.get_text_config().num_attention_heads))
        self._digest = healing.digest if healing else ""

    def patches(self) -> Iterator[Patch]:
        """Modules with the forwards that take the place of theirs."""
        for index in range(len(self._layers)):
            yield from self._of_layer(index)
        shortened = self._of(lambda plan: not plan.is_full)
        for swap in self._healing.swaps if self._healing else ():
            yield swap.module, self._swapping(swap, shortened)
        yield decoder_of(self._model), self._fitting_cache()

    def _of(self, holds: Callable[[LayerPlan], bool]) -> Prompts:
        """The prompts whose plan is such."""
        return tuple(prompt for prompt, plan in enumerate(self._plans) if holds(plan))

    def _running(self, index: int) -> tuple[Prompts, Prompts]:
        """The prompts that run attention, and the MLP, of a layer."""
        if index < self._first:
            return (), ()
        return self._of(lambda plan: index in plan.attention), self._of(lambda plan: index in plan.mlp)

    def _of_layer(self, index: int) -> Iterator[Patch]:
        family, layer = self._family, self._layers[index]
        attention, mlp = self._running(index)
        either = tuple(sorted({*attention, *mlp}))
        forward = self._cutting(layer.forward, with_none(pass_on) if family.returns_tuple else pass_on, either)
        if bridges := self._bridges_at(index):
            forward = self._crossing(forward, bridges)
        if heads := self._bridges_at(len(self._layers)) if layer is self._layers[-1] else []:
            forward = self._crossing(forward, heads, behind=True)
        if heads or len(either) < len(self._plans):
            yield layer, forward
        left = _residual if family.adds_residual else _zeros
        if attention != either:
            block = getattr(layer, str(family.attention))
            yield block, self._cutting(block.forward, with_none(left), attention)
        if mlp != either:
            *earlier, last = (getattr(layer, name) for name in family.mlp)
            if earlier and mlp:  # between these modules the rows are not told apart: computed, then left out
                yield last, self._leaving_out(last.forward, mlp)
            else:
                yield from ((module, pass_on) for module in earlier)
                yield last, self._cutting(last.forward, left, mlp)

    def _bridges_at(self, index: int) -> list[tuple[Prompts, Bridge]]:
        """The bridges over gaps that begin with a layer, each with the prompts whose plan it belongs to."""
        if self._healing is None or index < self._first:
            return []
        found = {plan: self._healing.bridges.get(plan, {}).get(index) for plan in self._plans}
        return [(self._of(plan.__eq__), bridge) for plan, bridge in found.items() if bridge is not None]

    def _cutting(self, forward: Forward, skip: Forward, wanted: Prompts) -> Forward:
        """A module's forward for the rows of the prompts `wanted` alone; the others have what `skip` gives."""
        if len(wanted) in (0, len(self._plans)):
            return forward if wanted else skip
        rows = self._rows

        def run(*args: Any, **kwargs: Any) -> Any:
            inside = rows.both(wanted)
            if inside is rows.current:
                return forward(*args, **kwargs)
            others = skip(*args, **kwargs)
            if not inside:
                return others
            cut_args, cut_kwargs = rows.cut_arguments(args, kwargs, inside)
            outer, rows.current = rows.current, inside
            try:
                own = forward(*cut_args, **cut_kwargs)
            finally:
                rows.current = outer
            if not isinstance(others, tuple):
                return with_rows(others, rows.places(inside, others.device), own)
            return (with_rows(others[0], rows.places(inside, others[0].device), own[0]), *own[1:])

        return run

    def _crossing(self, forward: Forward, bridges: Sequence[tuple[Prompts, Bridge]], behind: bool = False) -> Forward:
        """A layer's forward and then its bridges; `behind` the layer for exit heads."""
        n_prompts = len(self._plans)

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden_states, *args, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
            for prompts, bridge in bridges:
                before = states if behind else hidden_states
                if len(prompts) == n_prompts:
                    states = bridge(before)
                else:
                    places = self._rows.places(prompts, states.device)
                    states = with_rows(states, places, bridge(taken(before, places)))
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return run

    def _leaving_out(self, forward: Forward, wanted: Prompts) -> Forward:
        """A module's forward for all rows, with zeros for those of prompts that are not `wanted`."""
        rows = self._rows

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = forward(hidden_states)
            rest = tuple(prompt for prompt in rows.current if prompt not in wanted)
            by_row = output.reshape(rows.n_rows, -1)  # some blocks flatten rows and tokens
            return by_row.index_fill(0, rows.index(rest, output.device), 0.0).view_as(output)

        return run

    def _swapping(self, swap: Swap, shortened: Prompts) -> Forward:
        """A module's forward with its own weights for full rows and changed ones for the rows of shortened plans."""
        if len(shortened) == len(self._plans):
            return swap.forward
        forward, rows = swap.module.forward, self._rows

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            inside = rows.both(shortened)
            if inside is rows.current:
                return swap.forward(hidden_states)  # type: ignore[no-any-return]
            output: torch.Tensor = forward(hidden_states)
            if not inside:
                return output
            places = rows.places(inside, output.device)
            own = taken(hidden_states.reshape(rows.n_rows, -1, hidden_states.shape[-1]), places)
            by_row = output.reshape(rows.n_rows, -1, output.shape[-1])
            return with_rows(by_row, places, taken(by_row, places) + swap.change(own)).view_as(output)

        return run

    def _fitting_cache(self) -> Forward:
        """The decoder's forward, before which the pass is told its rows and the cache is fitted to the plans."""
        decoder: Any = decoder_of(self._model)
        forward, names, plans = decoder.forward, _argument_names(decoder.forward), tuple(self._plans)
        name = str(plans[0]) if len(plans) == 1 else "of each row"
        holding = [self._running(index)[0] for index in range(len(self._layers))]
        held: dict[int, list[Rows]] = {}

        def fit_cache(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _named_arguments(names, args, kwargs)
            if len(plans) > 1:  # the rows of one plan are never told apart, and stay one, however many a pass has
                given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
                self._rows.begin(len(next(value for value in given if isinstance(value, torch.Tensor))))
            if (n_rows := self._rows.n_rows) not in held:
                held[n_rows] = [self._rows.rows(p) if len(p) < len(plans) else None for p in holding]
            cache, use_cache = kwargs.get("cache"), kwargs.get("use_cache")
            if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
                cache = kwargs["cache"] = DynamicCache(config=decoder.config)
            if cache is not None:
                hold_rows(cache, held[n_rows], n_rows, name)
                if not torch.compiler.is_compiling():  # the first pass over a prompt never is
                    remember_plans(cache, plans, self._digest)
            return forward(*args, **kwargs)

        return fit_cache

    def compiled_call(self) -> Callable[[Any], Forward]:
        """What `generate()` asks for when it compiles the decoding step: one graph a plan, each kept.

        In one shared cache of graphs the ninth plan would silently run uncompiled (`torch._dynamo.config`'s
        `recompile_limit`). Every mixture of plans would be a graph of its own: mixed steps run uncompiled.
        """
        model, plans, digest = self._model, self._plans, self._digest
        graphs = model.__dict__.setdefault("_layerbudget_graphs", {})

        def get_compiled_call(compile_config: Any) -> Forward:
            if len(plans) > 1:
                return model.__call__
            options = (compile_config or model._default_compile_config()).to_dict()
            key = (plans[0], digest, repr(sorted(options.items())))
            if key not in graphs:
                graphs[key] = torch.compile(model.__call__, **options, isolate_recompiles=True)  # type: ignore[call-overload]
            return graphs[key]  # type: ignore[no-any-return]

        return get_compiled_call


def _argument_names(forward: Forward) -> list[str]:
    """Names of a forward's arguments that may be given by position, in order."""
    parameters = inspect.signature(forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def _named_arguments(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments by name, after those that have none; `past_key_values` under its newer name `cache`."""
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    if (old := found.pop("past_key_values", None)) is not None:
        if found.get("cache") is not None:
            raise InputError("cache and past_key_values were both given, and are the same thing; leave one of them out")
        found["cache"] = old
    return args[len(names) :], found
