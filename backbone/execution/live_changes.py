"""The one way in which a live model is changed: methods of its modules are replaced for the calling thread alone.

Other threads that run the same model meanwhile, with its stock `generate()` or otherwise, get its own methods. Nothing
is hooked, since registering a hook disturbs a pass that runs in another thread, and no weight is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]

_owners: dict[int, int] = {}
"""By the id of a module, the thread that has replaced methods of it."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_mine(module_id: int) -> bool:
    """Whether this thread has replaced the module's methods; in a compiled graph, the thread that compiled."""
    return _owners.get(module_id) == threading.get_ident()


@contextmanager
def replaced(replacements: Iterable[tuple[nn.Module, str, Forward]]) -> Iterator[None]:
    """Within this block, and in this thread, these methods (module, name, method) run instead of the modules' own.

    Blocks of one thread may be nested; a module must not be changed by two threads at once (`apply_plan` sees to that).
    """
    undo: list[tuple[nn.Module, str, Forward | None, int | None]] = []
    try:
        for module, name, method in replacements:
            undo.append((module, name, module.__dict__.get(name), _owners.get(id(module))))
            _owners[id(module)] = threading.get_ident()
            module.__dict__[name] = _for_this_thread(module, getattr(module, name), method)
        yield
    finally:
        for module, name, previous, owner in reversed(undo):
            _put_back(module.__dict__, name, previous)
            _put_back(_owners, id(module), owner)


def _for_this_thread(module: nn.Module, original: Forward, method: Forward) -> Forward:
    module_id = id(module)

    @wraps(original)  # the library reads the signatures of forwards
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs) if _is_mine(module_id) else original(*args, **kwargs)

    return dispatched


def _put_back(place: dict[Any, Any], key: Any, previous: Any) -> None:
    """Whatever was there: nothing, or what an outer block or accelerate's device hooks had set."""
    if previous is None:
        del place[key]
    else:
        place[key] = previous


@contextmanager
def captured(layers: nn.ModuleList, depths: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Yields the states [B, S, D] before some layers, as this block's passes fill them; L means after the last."""
    states: dict[int, torch.Tensor] = {}
    with replaced(_keeping(layers, depths, states)):
        yield states


def _keeping(
    layers: nn.ModuleList, depths: Collection[int], states: dict[int, torch.Tensor]
) -> Iterator[tuple[nn.Module, str, Forward]]:
    for depth in sorted(depths):
        layer = layers[min(depth, len(layers) - 1)]
        yield layer, "forward", _noting(layer.forward, states, depth, depth == len(layers))


def _noting(forward: Forward, states: dict[int, torch.Tensor], depth: int, is_after: bool) -> Forward:
    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_after:
            states[depth] = hidden_states
        output = forward(hidden_states, *args, **kwargs)
        if is_after:
            states[depth] = output[0] if isinstance(output, tuple) else output
        return output

    return run
