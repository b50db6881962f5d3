"""Run a model with a plan, or with one for each row: skipped sub-layers are not computed and keep no cache."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from backbone.errors import InputError, PlanError
from backbone.execution.executor import executing
from backbone.execution.live_changes import replaced
from backbone.execution.self_test import check_exactness
from backbone.families import check_intact, check_is_model
from backbone.healing.healing import AnyHealing, check_head, ready
from backbone.plan import LayerPlan

P = ParamSpec("P")


class _Block(AbstractContextManager[PreTrainedModel]):
    """A block of `with`, or a decorator; warns when it is dropped without having been either."""

    def __init__(self, name: str, open_block: Callable[[], AbstractContextManager[PreTrainedModel]]) -> None:
        self._name, self._open, self._is_used = name, open_block, False

    def __enter__(self) -> PreTrainedModel:
        self._is_used = True
        self._opened = self._open()
        return self._opened.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._opened.__exit__(*error)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self._is_used = True

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self._open():
                return function(*args, **kwargs)

        return inside

    def __del__(self) -> None:
        if not self._is_used:
            warnings.warn(
                f"{self._name}(...) was dropped without `with`, so that no plan was applied; write "
                f"`with {self._name}(...):` and run the model inside",
                RuntimeWarning,
                stacklevel=2,
            )


def _block(function: Callable[P, Iterator[PreTrainedModel]]) -> Callable[P, _Block]:
    """`contextmanager`, for a block that does nothing unless it is entered."""
    manager = contextmanager(function)

    @wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> _Block:
        return _Block(function.__name__, lambda: manager(*args, **kwargs))

    return made


@_block
def apply_plan(
    model: PreTrainedModel, plan: LayerPlan, healing: AnyHealing = None, *, first_layer: int = 0
) -> Iterator[PreTrainedModel]:
    """Within this block, `model` runs `plan`: `model.generate()` and `model()` with their stock arguments and outputs.

    The model's own code runs, with skipped modules told to pass their input on. On leaving the block, also by an
    exception, everything is as before. With the full plan the output is bit-equal to the stock model's.

    The plan holds for the calling thread alone. Other threads may run the same model meanwhile without a plan; one
    that applies a plan to it too waits until the first has left its block. A thread that is started inside the block,
    as for a streamer, has no plan: apply it there.

    A model's first plan is preceded by a self-test, some passes over a few tokens. Where `generate()` compiles its
    decoding step (static cache), each plan is compiled once, at its first use.

    Args:
        healing: what a shortened plan runs with, such as `allocator.healing`; made ready for the model at its first
            use, which takes a moment and memory for changed weights. The full plan never runs with it.
        first_layer: for passes that go on from known states: the layers before it pass their input on.

    Raises:
        PlanError: the plan is for another number of layers, or the full depth with a head that the healing lacks; this
            thread already runs this model with a plan; (from the model's forward) a cache filled under another plan.
        WrongModelError: the healing was made for another model.
        UnsupportedModelError: see `family_of`; sub-layers of an undeclared family; a model compiled by the user; the
            self-test failed.
        InputError: (from `generate()`) continuous batching.
    """
    with _applied(model, [plan], healing, first_layer):
        yield model


@_block
def apply_plans(
    model: PreTrainedModel, plans: Iterable[LayerPlan], healing: AnyHealing = None
) -> Iterator[PreTrainedModel]:
    """Within this block each row of a batch runs its own plan, in one pass for all.

    A layer, or half of one, computes only the rows whose plan runs it, and the cache holds only those. All else is as
    with `apply_plan`. Mixed steps run uncompiled, also with a static cache. What a row gets does not depend on the
    others, but for rounding.

    Args:
        model: the model.
        plans: of the B prompts. A pass over R = B * c rows takes c neighbouring rows as one prompt's, such as its
            beams or samples in `generate()`.
        healing: what the rows of shortened plans run with.

    Raises:
        PlanError: no plans, or (from the model's forward) a pass with other rows than B * c; see `apply_plan`.
        UnsupportedModelError: see `apply_plan`.
    """
    if isinstance(plans, LayerPlan):
        raise PlanError(
            f"apply_plans takes a list of plans, got plan {plans}; use apply_plan for one plan for all rows"
        )
    plans = list(plans)
    if not plans:
        raise PlanError("apply_plans needs a plan for each prompt of the batch, got none")
    with _applied(model, plans[:1] if all(plan == plans[0] for plan in plans) else plans, healing):
        yield model


@contextmanager
def _applied(
    model: PreTrainedModel, plans: Sequence[LayerPlan], healing: AnyHealing, first_layer: int = 0
) -> Iterator[None]:
    check_is_model(model)
    for plan in plans:
        if not isinstance(plan, LayerPlan):
            raise PlanError(
                f"a LayerPlan is needed, got {plan!r:.80}; build one with LayerPlan.skipping or read one by parse"
            )
    check_intact(model)
    shortest = min(plans, key=lambda plan: (plan.is_full, plan.layers))
    with _reserved(model, shortest) as reservation:
        if not reservation.tested:
            check_exactness(model)
            reservation.tested = True
        healed = None if shortest.is_full else ready(healing, model)
        for plan in plans:
            check_head(healed, plan)
        batching = "init_continuous_batching"  # of models that generate
        with (
            replaced([(model, batching, _refuse_thread)] if hasattr(model, batching) else []),
            executing(model, plans, healed, first_layer=first_layer),
        ):
            yield


def _refuse_thread(*args: Any, **kwargs: Any) -> Any:
    raise InputError(
        "continuous batching, such as by cache_implementation='paged', runs the model in a thread of its own, where no "
        "plan holds; leave it out"
    )


class _Reservation:
    """Which thread runs a model with which plan, and whether the model has passed its self-test."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None
        self.plan: LayerPlan | None = None
        self.tested = False


_reservations: WeakKeyDictionary[nn.Module, _Reservation] = WeakKeyDictionary()
_reservations_lock = threading.Lock()


@contextmanager
def _reserved(model: PreTrainedModel, plan: LayerPlan) -> Iterator[_Reservation]:
    with _reservations_lock:
        reservation = _reservations.setdefault(model, _Reservation())
    if reservation.thread == threading.get_ident():
        raise PlanError(
            f"this model already runs plan {reservation.plan} here; leave that block before applying {plan}"
        )
    with reservation.lock:
        reservation.thread, reservation.plan = threading.get_ident(), plan
        try:
            yield reservation
        finally:
            reservation.thread = reservation.plan = None
