"""Where a request goes with its plan: to an engine that runs plans, or to the engine of a shortened model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2

from backbone.errors import InputError
from backbone.plan import LayerPlan, PlanMenu
from serving.router.requests import KEY, XARGS

logger = logging.getLogger(__name__)


class UpstreamError(InputError):
    """An address that is none, a pool for a plan that is not on the menu, or an engine that runs no plans."""


@dataclass(frozen=True, slots=True)
class Upstreams:
    """The engines behind the router.

    Attributes:
        engine: URL of the engine that serves the full model.
        pools: by plan the URL of an engine that serves the model without the other layers (`layerbudget export`). With
            none, the engine itself runs plans (`layerbudget-vllm`).
    """

    engine: str
    pools: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: str, pools: list[str], menu: PlanMenu) -> Upstreams:
        """From the command line's URL and `PLAN=URL`s.

        Raises:
            UpstreamError: see there.
        """
        if healed := [plan for plan in menu.plans if plan.healed]:
            raise UpstreamError(
                f"the menu has {healed[0]}, the full depth with an exit head, which no engine runs; serve an allocator "
                "that was made without it in menu.given"
            )
        named = {}
        for pool in pools:
            text, _, url = pool.partition("=")
            plan = LayerPlan.parse(text, menu.n_layers)
            if plan not in menu.plans or plan.is_full:
                known = "; ".join(str(one) for one in menu.plans[:-1])
                raise UpstreamError(f"--pool {pool!r} should be PLAN=URL with a shortened plan of the menu: {known}")
            named[str(plan)] = _checked_url(url)
        return cls(_checked_url(engine), named)

    def runs(self, plan: LayerPlan) -> bool:
        """Whether there is an engine that runs the plan."""
        return plan.is_full or not self.pools or str(plan) in self.pools

    def route(self, plan: LayerPlan) -> tuple[str, str | None]:
        """The engine's URL for a plan that one of them runs, and the plan as an engine that runs plans is told."""
        if plan.is_full:
            return self.engine, None
        return (self.pools[str(plan)], None) if self.pools else (self.engine, str(plan))

    @property
    def urls(self) -> list[str]:
        return [self.engine, *dict.fromkeys(self.pools.values())]

    def check(self) -> bool:
        """Whether the engine could be asked. It then refused a plan that cannot be, as an engine that runs plans does.

        Raises:
            UpstreamError: it does not, and would answer every request in full.
        """
        if self.pools:
            return True
        try:
            models = httpx2.get(f"{self.engine}/v1/models", timeout=10, trust_env=False)
            name = models.json()["data"][0]["id"]
            body = {"model": name, "prompt": "a", "max_tokens": 1, XARGS: {KEY: "none"}}
            answer = httpx2.post(f"{self.engine}/v1/completions", json=body, timeout=60, trust_env=False)
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return False
        if answer.status_code != 400 or KEY not in answer.text:
            raise UpstreamError(
                f"the engine at {self.engine} does not know {KEY}: install layerbudget-vllm there and start it with "
                "--worker-cls layerbudget_vllm.workers.PlannedCPUWorker, or name a pool for each plan (--pool)"
            )
        return True


class UpstreamCheck:
    """Asks an engine that did not answer at the start again and again whether it runs plans.

    Attributes:
        is_done: it does. Until then every request runs the full plan, since an engine that knows no plans runs it too.
    """

    def __init__(self, upstreams: Upstreams, is_done: bool) -> None:
        self.is_done, self._upstreams, self._ended = is_done, upstreams, threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._repeat, daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _repeat(self) -> None:
        said = ""
        while not self.is_done and not self._ended.wait(1):
            try:
                self.is_done = self._upstreams.check()
            except UpstreamError as error:
                if said != (said := str(error)):
                    logger.error("%s; until then all requests run the full plan", error)


def _checked_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    rest = parsed.username or parsed.password or parsed.query or parsed.fragment  # errors name the address to clients
    if parsed.scheme not in ("http", "https") or not parsed.host or rest:
        raise UpstreamError(f"an engine's address looks like http://127.0.0.1:8000, got {url!r:.80}")
    return url.rstrip("/").removesuffix("/v1")
