"""The decision for each request: those that wait are decided together; what fails or takes too long runs in full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.plan import LayerPlan
from oracle.chat import padded
from runtime.parts import AllocatorParts
from runtime.router.prompts import Body, prompts_of

logger = logging.getLogger(__name__)

MOST_TOGETHER = 8
"""Requests that are decided in one pass of the first layers: few, so that the engine begins with the first of many. In
order of arrival: to the drift alarm, prompts in order of length look like drift."""


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
        loop = asyncio.get_running_loop()
        while True:
            group = [await self._waiting.get()]
            while not self._waiting.empty() and len(group) < MOST_TOGETHER:
                group.append(self._waiting.get_nowait())
            group = [(body, answer) for body, answer in group if not answer.done()]  # the others came too late
            if not group:
                continue
            choices = await loop.run_in_executor(self._thread, self.choose, [body for body, _ in group])
            for (_, answer), choice in zip(group, choices, strict=True):
                if not answer.done():
                    answer.set_result(choice)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def choose(self, bodies: Sequence[Body]) -> list[Choice]:
        """The plan of each request. Raises nothing: whatever fails means the full plan."""
        prompts: list[list[list[int]]] = []
        choices: list[Choice | None] = []
        for body in bodies:
            try:
                prompts.append(prompts_of(body, self.allocator, self.tokenizer))
                choices.append(None)
            except InputError:
                choices.append(self._full("unreadable"))
            except Exception:
                logger.exception("a prompt could not be read; it runs the full plan")
                choices.append(self._full("failed"))
        try:
            found = iter(self._decided(prompts))
        except Exception:
            logger.exception("the decision failed; %d requests run the full plan", len(prompts))
            found = iter([self._full("failed")] * len(prompts))
        return [next(found) if choice is None else choice for choice in choices]

    def _decided(self, requests: Sequence[list[list[int]]]) -> list[Choice]:
        flat = [prompt for prompts in requests for prompt in prompts]
        if not flat:
            return []
        batch = padded(self.tokenizer, flat).to(self.model.device)
        decision = self.allocator.decider().decide(self.model, **batch, keep_cache=False)
        plans = iter([self.allocator.menu.plans[index] for index in decision.chosen])
        own = [{next(plans) for _ in prompts} for prompts in requests]
        return [Choice(found.pop()) if len(found) == 1 else self._full("several") for found in own]

    def _full(self, because: str) -> Choice:
        return Choice(self.allocator.menu.plans[-1], because)
