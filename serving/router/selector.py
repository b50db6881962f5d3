"""Plan selection for requests, in batches; failures and late decisions run in full."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import InputError
from backbone.execution.delete_layers import delete_layers
from backbone.left_padding import padded_inputs
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from runtime.parts import AllocatorParts
from serving.router.limits import Limits
from serving.router.record import PromptRecord
from serving.router.requests import Body, LongPromptError, PromptReader, least_tokens, positions_of

T = TypeVar("T")
Prompts = list[list[int]]

logger = logging.getLogger(__name__)

MOST_TOGETHER = 8
"""Requests that are decided in one pass: few, so that the engine starts early, and in order of arrival, since an order
by length looks like drift to the alarm."""
MOST_TOKENS_TOGETHER = 2048
"""Padded tokens of such a pass. A request with more is decided alone, when no shorter one waits."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan of a request.

    Attributes:
        plan: its plan.
        because: `chosen`, or why the plan is the full one: `unreadable`, `long`, `late`, `failed`, `several` (prompts
            of one request with different plans), `no_pool`, `unchecked` (see `UpstreamCheck`).
    """

    plan: LayerPlan
    because: str = "chosen"


class FairQueue(Generic[T]):
    """A queue that takes the earliest item of each sender in turn."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def put(self, sender: Hashable, item: T) -> None:
        self._queues.setdefault(sender, deque()).append(item)

    def next(self) -> T:
        """The item that `take` gives next. Raises StopIteration where there is none."""
        return next(iter(self._queues.values()))[0]

    def take(self) -> T:
        sender = next(iter(self._queues))
        queue = self._queues.pop(sender)
        item = queue.popleft()
        if queue:
            self._queues[sender] = queue
        return item


@dataclass(eq=False, slots=True)
class _Waiting:
    prompts: Prompts
    answer: asyncio.Future[Choice]


@dataclass(slots=True)
class RequestSelector:
    """Selects plans with the allocator's first layers, in a thread of its own.

    Attributes:
        allocator: its menu, controller and price.
        model: its first layers; see `load_probe`.
        tokenizer: of the model.
        limits: of a decision's time and tokens.
        record: keeps a share of the prompts; None for none.
    """

    allocator: AllocatorParts
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limits: Limits = field(default_factory=Limits)
    record: PromptRecord | None = None
    _reader: PromptReader = field(init=False)
    _most: int = field(init=False)
    _short: FairQueue[_Waiting] = field(default_factory=FairQueue)
    _long: FairQueue[_Waiting] = field(default_factory=FairQueue)
    _some: asyncio.Event = field(default_factory=asyncio.Event)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "layerbudget-probe"))

    def __post_init__(self) -> None:
        self._most = min(self.limits.decision_tokens, positions_of(self.model))
        record = None if self.record is None else self.record.offer
        self._reader = PromptReader.of(self.allocator, self.model, self.tokenizer, record)

    def read(self, body: Body, *, chat: bool) -> Prompts | str:
        """The tokens of a request's prompts, or why the request runs in full. Raises nothing."""
        try:
            if least_tokens(body.get("messages" if chat else "prompt"), self._most) > self._most:
                return "long"
            prompts = self._reader.prompts_of(body, chat=chat, most_tokens=self._most)
            return prompts if len(prompts) * max(map(len, prompts)) <= self._most else "long"
        except LongPromptError:
            return "long"
        except InputError:
            return "unreadable"
        except Exception:
            logger.exception("a prompt could not be read; it runs the full plan")
            return "failed"

    async def plan_for(self, prompts: Prompts | str, sender: Hashable = None) -> Choice:
        """The plan of one request, from the result of `read`; `serve` must run meanwhile."""
        if isinstance(prompts, str):
            return self.full(prompts)
        waiting = _Waiting(prompts, asyncio.get_running_loop().create_future())
        (self._short if _padded_tokens([waiting]) <= MOST_TOKENS_TOGETHER else self._long).put(sender, waiting)
        self._some.set()
        try:
            return await asyncio.wait_for(waiting.answer, self.limits.decision_ms / 1000)
        except TimeoutError:
            return self.full("late")
        finally:
            waiting.prompts = []  # it may stay in the queue for a while

    async def serve(self) -> None:
        """Decide until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            group = self._group()
            if not group:
                self._some.clear()
                continue
            choices = await loop.run_in_executor(self._thread, self.choose, [waiting.prompts for waiting in group])
            for waiting, choice in zip(group, choices, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(choice)

    def _group(self) -> list[_Waiting]:
        """The requests that are decided next, without those that are late."""
        group: list[_Waiting] = []
        while self._short and len(group) < MOST_TOGETHER:
            if not self._short.next().answer.done():
                if _padded_tokens([*group, self._short.next()]) > MOST_TOKENS_TOGETHER:
                    break
                group.append(self._short.next())
            self._short.take()
        while self._long and not group:
            group = [waiting for waiting in [self._long.take()] if not waiting.answer.done()]
        return group

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self.record is not None:
            self.record.close()

    def choose(self, requests: Sequence[Prompts]) -> list[Choice]:
        """The plan of each request. Raises nothing: a failure means the full plan."""
        try:
            flat = [prompt for prompts in requests for prompt in prompts]
            decision = self.allocator.selector().decide(self.model, **padded_inputs(self.model, flat), keep_cache=False)
            plans = iter([self.allocator.menu.plans[index] for index in decision.chosen])
            own = [{next(plans) for _ in prompts} for prompts in requests]
            return [Choice(found.pop()) if len(found) == 1 else self.full("several") for found in own]
        except Exception:
            logger.exception("the decision failed; %d requests run the full plan", len(requests))
            return [self.full("failed")] * len(requests)

    def full(self, because: str) -> Choice:
        return Choice(self.allocator.menu.plans[-1], because)


def _padded_tokens(group: Sequence[_Waiting]) -> int:
    lengths = [len(prompt) for waiting in group for prompt in waiting.prompts]
    return len(lengths) * max(lengths, default=0)


def load_probe(
    allocator: AllocatorParts, source: str | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the probe layers of the allocator's model, and its tokenizer.

    Embeddings and head are kept. The whole model is read once, since its fingerprint is made from all weights.

    Args:
        allocator: made for the model.
        source: where to load the model from; None for the allocator's own source.
        device: see `load_backbone`.

    Raises:
        WrongModelError: another model than the allocator's.
        LoadError: see `load_backbone`.
    """
    model, tokenizer = load_backbone(allocator.model_source if source is None else source, device=device)
    allocator.check_model(model)
    probe = delete_layers(model, LayerPlan.exiting(allocator.menu.n_layers, allocator.menu.probe_depth))
    del model
    gc.collect()  # the other layers' weights, which modules that know one another keep
    return probe, tokenizer
