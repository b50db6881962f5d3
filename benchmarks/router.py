"""Requests through the router and an engine with plans, beside the same engine without them.

    python benchmarks/router.py --vllm .venv-vllm/bin/python --allocator runs/demo/allocator
    python benchmarks/router.py --vllm ... --allocator DIR --requests 32 --new-tokens 32 --rounds 2 --minutes 10

Needs vLLM with layerbudget-vllm in an environment of its own (`make test-vllm` makes it). The demo's prompts, answers
of a fixed number of tokens, greedy, all requests at once; float32 on a CPU. In turn, after a warm-up:

- stock: vLLM without this project (with --one-engine as `installed`)
- installed: with the plugin and its worker, no request names a plan
- router: the same through the router, each request under the plan that the allocator chooses
- known: these plans sent to the engine without a router, which shares the machine here

Also: the tokens of each plan in the mixture and by themselves; the law's prediction (docs/runtime.md) from the times of
uniform batches; with --minutes the memory of router and engine under load. Writes benchmarks/results/serving-NAME.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from scipy.optimize import nnls
from servers import free_port, running, wait_until_well

from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from oracle.prompts import load_prompts
from runtime.allocator import Allocator
from runtime.paired_timing import machine

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("requests", "new_tokens", "rounds", "dtype", "eager", "one_engine")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
"""Of the router, which shares the cores with the engine here: threads that wait by spinning slow one another down."""

WORKER = "layerbudget_vllm.workers.PlannedCPUWorker"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got, and when, in seconds from its sending."""

    tokens: list[int]
    first_s: float
    total_s: float
    plan: str | None


@dataclass(frozen=True, slots=True)
class Server:
    """A process that answers."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def resident_mib(self) -> float:
        """Memory of the process and of all that it started."""
        return sum(_resident(pid) for pid in _tree(self.process.pid)) / 2**20


def main() -> None:
    arguments = options()
    allocator = Allocator.from_pretrained(arguments.allocator)
    menu = allocator.menu
    prompts = drawn_prompts(arguments.requests)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as until_the_end:
        model = arguments.model or saved(allocator, Path(scratch))
        serve = Serving(arguments, model, Path(scratch), until_the_end)
        planned = serve.engine(plans=True)
        router = serve.router(planned.url)
        stock = planned if arguments.one_engine else serve.engine(plans=False)
        contestants = {"stock": stock, "installed": planned, "router": router, "known": planned}
        if arguments.one_engine:
            del contestants["installed"]
        result: dict[str, Any] = {
            "settings": {
                **{name: getattr(arguments, name) for name in SETTINGS},
                "model": arguments.name,
            },
            "machine": machine(),
            **compared(contestants, prompts, arguments),
        }
        plans = result.pop("plans_of_requests")
        result["mixture"] = alike(planned, prompts, plans, result.pop("router_tokens"), arguments)
        result["law"] = law(planned, prompts, [LayerPlan.parse(plan, menu.n_layers) for plan in plans], menu, arguments)
        if arguments.minutes:
            result["memory"] = under_load(router, planned, prompts, arguments)
    path = RESULTS / f"serving-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "settings"}, indent=1))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="Python of the environment that vLLM is installed in")
    parser.add_argument("--allocator", required=True)
    parser.add_argument("--model", help="folder of the model; default: the allocator's, saved once more")
    parser.add_argument("--name", default="gemma", help="name in the result's file")
    parser.add_argument("--requests", type=int, default=64, help="all at once")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="no engine compiles; they start faster")
    parser.add_argument(
        "--one-engine",
        action="store_true",
        help="where two do not fit: stock is the plugin's without plans",
    )
    parser.add_argument("--minutes", type=float, default=0, help="of load, during which memory is looked at")
    parser.add_argument("--kv-mib", type=int, default=1024)
    return parser.parse_args()


def drawn_prompts(count: int) -> list[str]:
    everything = load_prompts("embedded")
    random.Random(0).shuffle(everything)
    return [prompt.prompt for prompt in everything[:count]]


def saved(allocator: Allocator, folder: Path) -> str:
    model, tokenizer = load_backbone(allocator.model_source, device="cpu")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


@dataclass(frozen=True, slots=True)
class Serving:
    """Starts servers that end with the benchmark."""

    arguments: argparse.Namespace
    model: str
    scratch: Path
    until_the_end: ExitStack
    started: list[Server] = field(default_factory=list)

    def engine(self, *, plans: bool) -> Server:
        given = self.arguments
        words = ["--model", self.model, "--served-model-name", "served", "--dtype", given.dtype]
        words += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(given.kv_mib << 20)]
        words += ["--max-num-seqs", str(max(given.requests, 2)), "--no-enable-prefix-caching"]
        words += ["--enforce-eager"] if given.eager else []
        if plans:
            allocator = json.dumps({"layerbudget_allocator": str(Path(given.allocator).resolve())})
            words += ["--worker-cls", WORKER, "--additional-config", allocator]
        command = [str(given.vllm), "-m", "vllm.entrypoints.openai.api_server", *words]
        return self._started(command, {} if plans else {"VLLM_PLUGINS": ""})

    def router(self, upstream: str) -> Server:
        words = ["--allocator", self.arguments.allocator, "--model", self.model, "--upstream", upstream]
        words += ["--decision-limit-ms", "20000"]
        return self._started([sys.executable, "-m", "layerbudget", "serve", *words], ONE_THREAD)

    def _started(self, command: list[str], environment: dict[str, str]) -> Server:
        port = free_port()
        log = self.scratch / f"{port}.log"
        given = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **environment}
        process = running([*command, "--host", "127.0.0.1", "--port", str(port)], log, given)
        server = Server(f"http://127.0.0.1:{port}", self.until_the_end.enter_context(process))
        self.started.append(server)
        wait_until_well(server.url, [one.process for one in self.started], log)
        return server


def sent(server: Server, prompts: Sequence[str], plans: Sequence[str | None], new_tokens: int) -> list[Answer]:
    """All requests at once, each with the plan that it names."""

    async def one(client: httpx2.AsyncClient, prompt: str, plan: str | None) -> Answer:
        body = {"model": "served", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True} | (
            {} if plan is None else {"vllm_xargs": {"layer_plan": plan}}
        )
        start, first, tokens = time.perf_counter(), 0.0, list[int]()
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            if stream.status_code != 200:
                raise SystemExit(f"{server.url} said {stream.status_code}: {(await stream.aread()).decode()}")
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    found = json.loads(line.removeprefix("data: "))
                    if "error" in found:
                        raise SystemExit(f"{server.url} said {found}")
                    first = first or time.perf_counter() - start
                    tokens += [token for choice in found["choices"] for token in choice.get("token_ids") or []]
            chosen = stream.headers.get("x-layer-plan", plan)
        return Answer(tokens, first, time.perf_counter() - start, chosen)

    async def everyone() -> list[Answer]:
        async with httpx2.AsyncClient(timeout=3600, limits=httpx2.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(one(client, *pair) for pair in zip(prompts, plans, strict=True)))

    return asyncio.run(everyone())


def timed(
    server: Server, prompts: Sequence[str], plans: Sequence[str | None], new_tokens: int
) -> tuple[float, list[Answer]]:
    start = time.perf_counter()
    answers = sent(server, prompts, plans, new_tokens)
    return time.perf_counter() - start, answers


def compared(contestants: dict[str, Server], prompts: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Each contestant's rounds, in turn, the first of which is a warm-up."""
    plans: list[str | None] = [None] * len(prompts)
    nothing = list(plans)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, list[Answer]] = {}
    for number in range(arguments.rounds + 1):
        for name, server in contestants.items():
            asked = plans if name == "known" else nothing
            took, answers[name] = timed(server, prompts, asked, arguments.new_tokens)
            if name == "router":
                plans = [answer.plan for answer in answers[name]]
            if number:
                seconds[name].append(took)
            print(f"round {number}: {name} {took:.1f} s", flush=True)
    chosen = [str(plan) for plan in plans]
    rows = {name: described(seconds[name], seconds["stock"], answers[name], arguments) for name in contestants}
    own = answers.get("installed", answers["stock"])
    differing = sum(a.tokens != b.tokens for a, b in zip(answers["stock"], own, strict=True))
    return {
        "contestants": rows,
        "installed_differs_from_stock": None if own is answers["stock"] else differing,
        "plans": {plan: chosen.count(plan) for plan in sorted(set(chosen), key=chosen.count, reverse=True)},
        "decision_ms": decision_ms(contestants["router"]),
        "plans_of_requests": chosen,
        "router_tokens": [answer.tokens for answer in answers["router"]],
    }


def described(
    seconds: list[float], stock: list[float], answers: list[Answer], arguments: argparse.Namespace
) -> dict[str, float]:
    tokens = sum(len(answer.tokens) for answer in answers)
    assert tokens == arguments.requests * arguments.new_tokens, tokens
    first, total = ([getattr(answer, name) for answer in answers] for name in ("first_s", "total_s"))
    return {
        "tokens_per_s": round(tokens / statistics.median(seconds), 2),
        "to_stock": round(statistics.median([b / a for a, b in zip(seconds, stock, strict=True)]), 3),
        "first_token_s_median": round(statistics.median(first), 3),
        "first_token_s_p95": round(float(np.quantile(first, 0.95)), 3),
        "request_s_median": round(statistics.median(total), 3),
        "request_s_p95": round(float(np.quantile(total, 0.95)), 3),
    }


def decision_ms(router: Server) -> float:
    """Mean time until a request had its plan, all of them having come at once."""
    found = {}
    for line in httpx2.get(f"{router.url}/metrics").text.splitlines():
        if line.startswith("layerbudget_decision_ms_"):
            found[line.split()[0]] = float(line.split()[1])
    return round(found["layerbudget_decision_ms_sum"] / found["layerbudget_decision_ms_count"], 2)


def alike(
    engine: Server, prompts: list[str], plans: list[str], mixed: list[list[int]], arguments: argparse.Namespace
) -> dict[str, int]:
    """How many requests got other tokens in the mixture than where all others of the batch have the same plan."""
    differing = 0
    for plan in set(plans):
        own = [index for index, chosen in enumerate(plans) if chosen == plan]
        alone = sent(engine, [prompts[index] for index in own], [plan] * len(own), arguments.new_tokens)
        differing += sum(answer.tokens != mixed[index] for answer, index in zip(alone, own, strict=True))
    return {"requests": len(prompts), "differing": differing}


def law(
    engine: Server, prompts: list[str], plans: list[LayerPlan], menu: PlanMenu, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Time to stock by `(h + sum(u w + f B k)) / (h + L (w + B k))`, with h, w and k from uniform batches.

    Those are of all requests and of a quarter of them, under the full plan and under the menu's shortest.
    """
    rows, seconds, n = [], [], menu.n_layers
    for plan in (menu.plans[0], menu.plans[-1]):
        for size in (len(prompts), max(1, len(prompts) // 4)):
            took = min(timed(engine, prompts[:size], [str(plan)] * size, arguments.new_tokens)[0] for _ in range(2))
            rows.append([1.0, size, plan.layers, plan.layers * size])
            seconds.append(took / arguments.new_tokens)
    fixed, head, w, k = nnls(np.array(rows), np.array(seconds))[0]
    count = len(plans)
    share = [sum(layer in plan.attention for plan in plans) / count for layer in range(n)]
    top = fixed + head * count
    one_pass = top + sum((part > 0) * w + part * count * k for part in share)
    stock = top + n * (w + count * k)
    return {
        "step_ms": {"head": fixed * 1e3, "head_row": head * 1e3, "layer": w * 1e3, "layer_row": k * 1e3},
        "mean_layers": sum(plan.layers for plan in plans) / count,
        "speed_to_stock": round(stock / one_pass, 3),
    }


def under_load(
    router: Server, engine: Server, prompts: list[str], arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Resident memory in MiB after each turn of all requests."""
    until = time.monotonic() + 60 * arguments.minutes
    found: dict[str, list[float]] = {"minutes": [], "router_mib": [], "engine_mib": []}
    while time.monotonic() < until:
        sent(router, prompts, [None] * len(prompts), arguments.new_tokens)
        found["minutes"].append(round(arguments.minutes - (until - time.monotonic()) / 60, 2))
        found["router_mib"].append(round(router.resident_mib, 1))
        found["engine_mib"].append(round(engine.resident_mib, 1))
    return found


def _tree(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
