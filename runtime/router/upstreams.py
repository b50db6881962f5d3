"""Where a request goes with its plan: to an engine that runs plans, or to the engine of a shortened model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from backbone.errors import InputError
from backbone.plan import LayerPlan, PlanMenu

KEY = "layer_plan"
"""As `layerbudget-vllm` reads it."""


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
        named = {}
        for pool in pools:
            text, _, url = pool.partition("=")
            plan = LayerPlan.parse(text, menu.n_layers)
            if plan not in menu.plans or plan.is_full:
                known = "; ".join(str(one) for one in menu.plans[:-1])
                raise UpstreamError(f"--pool {pool!r} should be PLAN=URL with a shortened plan of the menu: {known}")
            named[str(plan)] = _checked_url(url)
        return cls(_checked_url(engine), named)

    def route(self, body: Mapping[str, Any], plan: LayerPlan) -> tuple[str, dict[str, Any]]:
        """The engine's URL and the request's body for a plan. A plan that has no pool runs in full."""
        if plan.is_full or (self.pools and str(plan) not in self.pools):
            return self.engine, dict(body)
        if self.pools:
            return self.pools[str(plan)], dict(body)
        return self.engine, {**body, "vllm_xargs": {**(body.get("vllm_xargs") or {}), KEY: str(plan)}}

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
            models = httpx2.get(f"{self.engine}/v1/models", timeout=10)
            name = models.json()["data"][0]["id"]
            body = {"model": name, "prompt": "a", "max_tokens": 1, "vllm_xargs": {KEY: "none"}}
            answer = httpx2.post(f"{self.engine}/v1/completions", json=body, timeout=60)
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return False
        if answer.status_code != 400 or KEY not in answer.text:
            raise UpstreamError(
                f"the engine at {self.engine} does not know {KEY}: install layerbudget-vllm there and start it with "
                "--worker-cls layerbudget_vllm.workers.PlannedCPUWorker, or name a pool for each plan (--pool)"
            )
        return True


def _checked_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UpstreamError(f"an engine's address looks like http://127.0.0.1:8000, got {url!r:.80}")
    return url.rstrip("/").removesuffix("/v1")
