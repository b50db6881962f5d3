"""The decision for each request: those that wait are decided together; what fails or takes too long runs in full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.plan import LayerPlan
from runtime.parts import AllocatorParts
from runtime.router.prompts import Body, padded, prompts_of

logger = logging.getLogger(__name__)

Prompts = list[list[int]]
"""Tokens of the prompts of one request."""

T = TypeVar("T")

MOST_WAITING = 64
"""Requests that are put in order of their lengths."""

MOST_TOGETHER = 8
"""Requests that are decided in one pass of the first layers: few, so that the engine begins with the first of many."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request runs.

    Attributes:
        plan: its plan.
        because: `chosen`, or why the plan is the full one: `unreadable`, `late`, `failed`, `several` (prompts in one
            request with different plans).
    """

    plan: LayerPlan
    because: str = "chosen"


@dataclass(slots=True)
class Chooser:
    """Decides with the allocator's first layers, in a thread of its own.

    Attributes:
        allocator: chooses.
        model: its first layers; see `load_probe`.
        tokenizer: of the model.
        limit_ms: a request that has no plan after this time runs the full one.
    """

    allocator: AllocatorParts
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limit_ms: float = 500.0
    _waiting: asyncio.Queue[tuple[Body, asyncio.Future[Choice]]] = field(default_factory=asyncio.Queue)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "layerbudget-probe"))

    async def plan_for(self, body: Body) -> Choice:
        """The plan of one request; `serve` must run meanwhile."""
        answer: asyncio.Future[Choice] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((body, answer))
        try:
            return await asyncio.wait_for(answer, self.limit_ms / 1000)
        except TimeoutError:
            return self._full("late")

    async def serve(self) -> None:
        """Decides as long as it is not cancelled."""
        while True:
            group = [await self._waiting.get()]
            while not self._waiting.empty() and len(group) < MOST_WAITING:
                group.append(self._waiting.get_nowait())
            found = await self._in_thread(self._read, [body for body, _ in group])
            readable: list[tuple[Prompts, asyncio.Future[Choice]]] = []
            for (_, answer), prompts in zip(group, found, strict=True):
                if isinstance(prompts, Choice):
                    _tell(answer, prompts)
                else:
                    readable.append((prompts, answer))
            readable.sort(key=lambda pair: max(map(len, pair[0])))  # prompts of like length need little padding
            for start in range(0, len(readable), MOST_TOGETHER):
                part = [pair for pair in readable[start : start + MOST_TOGETHER] if not pair[1].done()]
                choices = await self._in_thread(self._decided, [prompts for prompts, _ in part])
                for (_, answer), choice in zip(part, choices, strict=True):
                    _tell(answer, choice)

    async def _in_thread(self, work: Callable[[list[Any]], list[T]], values: list[Any]) -> list[T]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, values)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def choose(self, bodies: Sequence[Body]) -> list[Choice]:
        """The plan of each request. Raises nothing: whatever fails means the full plan."""
        found = self._read(bodies)
        decided = iter(self._decided([prompts for prompts in found if not isinstance(prompts, Choice)]))
        return [prompts if isinstance(prompts, Choice) else next(decided) for prompts in found]

    def _read(self, bodies: Sequence[Body]) -> list[Prompts | Choice]:
        """The tokens of each request's prompts, or the full plan for one that cannot be read."""
        found: list[Prompts | Choice] = []
        for body in bodies:
            try:
                found.append(prompts_of(body, self.allocator, self.tokenizer))
            except InputError:
                found.append(self._full("unreadable"))
            except Exception:
                logger.exception("a prompt could not be read; it runs the full plan")
                found.append(self._full("failed"))
        return found

    def _decided(self, requests: Sequence[Prompts]) -> list[Choice]:
        flat = [prompt for prompts in requests for prompt in prompts]
        if not flat:
            return []
        pad: Any = self.tokenizer.pad_token_id
        try:
            ids, mask = (torch.tensor(rows, device=self.model.device) for rows in padded(flat, pad))
            decision = self.allocator.decider().decide(self.model, ids, mask, keep_cache=False)
        except Exception:
            logger.exception("the decision failed; %d requests run the full plan", len(requests))
            return [self._full("failed")] * len(requests)
        plans = iter([self.allocator.menu.plans[index] for index in decision.chosen])
        own = [{next(plans) for _ in prompts} for prompts in requests]
        return [Choice(found.pop()) if len(found) == 1 else self._full("several") for found in own]

    def _full(self, because: str) -> Choice:
        return Choice(self.allocator.menu.plans[-1], because)


def _tell(answer: asyncio.Future[Choice], choice: Choice) -> None:
    if not answer.done():  # the others came too late
        answer.set_result(choice)
