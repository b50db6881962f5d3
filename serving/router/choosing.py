"""The decision for each request: those that wait are decided together; what fails or takes too long runs in full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.left_padding import padded_inputs
from backbone.plan import LayerPlan
from runtime.parts import AllocatorParts
from serving.router.limits import Limits
from serving.router.prompts import LongPromptError, PromptReader
from serving.router.requests import Body
from serving.router.turns import Turns

logger = logging.getLogger(__name__)

Prompts = list[list[int]]

MOST_TOGETHER = 8
"""Requests that are decided in one pass of the first layers: few, so that the engine begins with the first of many. Not
in order of length, which looks like drift to the alarm."""

MOST_TOKENS_TOGETHER = 2048
"""Padded tokens of such a pass. A request with more is decided alone, when no shorter one waits."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request runs.

    Attributes:
        plan: its plan.
        because: `chosen`, or why the plan is the full one: `unreadable`, `long`, `late`, `failed`, `several` (prompts
            of one request with different plans), `no_pool`, `unchecked` (see `UpstreamCheck`).
    """

    plan: LayerPlan
    because: str = "chosen"


@dataclass(eq=False, slots=True)
class _Asked:
    prompts: Prompts
    answer: asyncio.Future[Choice]


@dataclass(slots=True)
class Chooser:
    """Decides with the allocator's first layers, in a thread of its own.

    Attributes:
        allocator: chooses.
        model: its first layers; see `load_probe`.
        tokenizer: of the model.
        limits: of a decision's time and tokens.
    """

    allocator: AllocatorParts
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limits: Limits = field(default_factory=Limits)
    _reader: PromptReader = field(init=False)
    _short: Turns[_Asked] = field(default_factory=Turns)
    _long: Turns[_Asked] = field(default_factory=Turns)
    _some: asyncio.Event = field(default_factory=asyncio.Event)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "layerbudget-probe"))

    def __post_init__(self) -> None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        most = min(self.limits.decision_tokens, positions or self.limits.decision_tokens)
        embedded = next(self.model.get_input_embeddings().parameters()).shape[0]
        self._reader = PromptReader(self.allocator, self.tokenizer, most, min(embedded, len(self.tokenizer)))

    def read(self, body: Body, *, chat: bool) -> Prompts | str:
        """The tokens of a request's prompts, or why the request runs in full. Raises nothing."""
        try:
            return self._reader.prompts_of(body, chat=chat)
        except LongPromptError:
            return "long"
        except InputError:
            return "unreadable"
        except Exception:
            logger.exception("a prompt could not be read; it runs the full plan")
            return "failed"

    async def plan_for(self, prompts: Prompts | str, sender: Hashable = None) -> Choice:
        """The plan of one request, given what `read` gave; `serve` must run meanwhile."""
        if isinstance(prompts, str):
            return self.full(prompts)
        asked = _Asked(prompts, asyncio.get_running_loop().create_future())
        (self._short if _padded_tokens([asked]) <= MOST_TOKENS_TOGETHER else self._long).put(sender, asked)
        self._some.set()
        try:
            return await asyncio.wait_for(asked.answer, self.limits.decision_ms / 1000)
        except TimeoutError:
            return self.full("late")
        finally:
            asked.prompts = []  # it may stay in the queue for a while

    async def serve(self) -> None:
        """Decides as long as it is not cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            group = self._group()
            if not group:
                self._some.clear()
                continue
            choices = await loop.run_in_executor(self._thread, self.choose, [asked.prompts for asked in group])
            for asked, choice in zip(group, choices, strict=True):
                if not asked.answer.done():
                    asked.answer.set_result(choice)

    def _group(self) -> list[_Asked]:
        """Those that are decided next, without the ones that came too late."""
        group: list[_Asked] = []
        while self._short and len(group) < MOST_TOGETHER:
            if not self._short.next().answer.done():
                if _padded_tokens([*group, self._short.next()]) > MOST_TOKENS_TOGETHER:
                    break
                group.append(self._short.next())
            self._short.take()
        while self._long and not group:
            group = [asked for asked in [self._long.take()] if not asked.answer.done()]
        return group

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def choose(self, requests: Sequence[Prompts]) -> list[Choice]:
        """The plan of each request. Raises nothing: whatever fails means the full plan."""
        try:
            return self._decided(requests)
        except Exception:
            logger.exception("the decision failed; %d requests run the full plan", len(requests))
            return [self.full("failed")] * len(requests)

    def _decided(self, requests: Sequence[Prompts]) -> list[Choice]:
        flat = [prompt for prompts in requests for prompt in prompts]
        decision = self.allocator.selector().decide(self.model, **padded_inputs(self.model, flat), keep_cache=False)
        plans = iter([self.allocator.menu.plans[index] for index in decision.chosen])
        own = [{next(plans) for _ in prompts} for prompts in requests]
        return [Choice(found.pop()) if len(found) == 1 else self.full("several") for found in own]

    def full(self, because: str) -> Choice:
        return Choice(self.allocator.menu.plans[-1], because)


def _padded_tokens(group: Sequence[_Asked]) -> int:
    lengths = [len(prompt) for asked in group for prompt in asked.prompts]
    return len(lengths) * max(lengths, default=0)
