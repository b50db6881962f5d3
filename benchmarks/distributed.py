"""What Ray costs, what kills cost, and whether the driver's memory stays flat.

    python benchmarks/distributed.py speed --run runs/demo   # two workers of one core, one process, two shards
    python benchmarks/distributed.py kills                   # 20 killed workers and 5 killed drivers, on a tiny model
    python benchmarks/distributed.py memory                  # 100,000 prompts, on a tiny model

`speed` labels copies of a run whose stages menu and adapt are done. Each way runs in processes of its own, and start-up
(from the command to the first block that is begun with a loaded model) is told apart. Writes
benchmarks/results/distributed-PART.json; `speed --ways` adds to what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from ray_processes import Command, content, count, finish, label_until_killed, label_while_killing, variables
from timed_workers import TimedWorkers
from tiny_project import make_project

from runtime.paired_timing import machine

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "one_process": "one process with two threads",
    "ray": "Ray: two workers of one core",
    "shards": "--shard 1/2 and 2/2: two processes with one thread",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = options.add_subparsers(dest="part", required=True)
    timed = parts.add_parser("speed")
    timed.add_argument("--run", type=Path, required=True, help="folder of a run")
    timed.add_argument("--ways", nargs="+", choices=[*WAYS, "compare"], default=[*WAYS, "compare"])
    timed.add_argument("--work", type=Path, help="where the copies are; default: a folder that is removed")
    timed.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over the run's own")
    child = parts.add_parser("child", help="used by `speed`")
    child.add_argument("run", type=Path)
    child.add_argument("way", choices=["alone", "ray"])
    child.add_argument("shard", help="such as 1/2; 1/1 for all")
    child.add_argument("settings", nargs="*")
    killed = parts.add_parser("kills")
    killed.add_argument("--workers", type=int, default=20)
    killed.add_argument("--drivers", type=int, default=5)
    killed.add_argument("--kinds", nargs="*", choices=["workers", "drivers"], default=["workers", "drivers"])
    killed.add_argument("--prompts", type=int, default=3000)
    killed.add_argument("--work", type=Path, help="where the runs are; default: a folder that is removed")
    flat = parts.add_parser("memory")
    flat.add_argument("--prompts", type=int, default=100_000)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part == "child":
            print(json.dumps(label_timed(arguments.run, arguments.way, arguments.shard, arguments.settings)))
            return
        part: Callable[[argparse.Namespace, Path], Iterator[dict[str, Any]]] = globals()[arguments.part]
        for found in part(arguments, Path(folder)):
            keep(RESULTS / f"distributed-{arguments.part}.json", found)


def keep(path: Path, found: dict[str, Any]) -> None:
    """Adds to what was measured before."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    text = json.dumps({**known, **found, "machine": machine()}, indent=2)
    path.write_text(text + "\n")
    print(text, flush=True)


def speed(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of each way from the first block to the last label, and before them."""
    work = arguments.work or folder
    for way in arguments.ways:
        if way == "compare":
            yield compared(work)
            continue
        copy = work / way / arguments.run.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(arguments.run, copy)
        remove_labels(copy)
        yield {"settings": arguments.set, way: {"what": WAYS[way], **run_way(way, copy, arguments.set)}}


def remove_labels(run: Path) -> None:
    """All but what `adapt` needs: an empty store."""
    for path in run.glob("labels.db*"):
        path.unlink()


def run_way(way: str, run: Path, settings: Sequence[str]) -> dict[str, Any]:
    alone = {"one_process": [("alone", "1/1")], "shards": [("alone", "1/2"), ("alone", "2/2")]}
    given = alone.get(way, [("ray", "1/1")])
    threads = "2" if way == "one_process" else "1"
    began = time.time()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "child", str(run), *words, *settings],
            env=variables(threads),
            stdout=subprocess.PIPE,
        )
        for words in given
    ]
    spans = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    first, last = min(span["first"] for span in spans), max(span["last"] for span in spans)
    labels = count(run / "labels.db")
    return {
        "labels": labels,
        "startup_seconds": round(first - began, 1),
        "label_seconds": round(last - first, 1),
        "whole_seconds": round(time.time() - began, 1),
        "busy": [[round(start - first, 1), round(end - first, 1)] for span in spans for start, end in span["pieces"]],
    }


def compared(work: Path) -> dict[str, Any]:
    """Whether the labels of all ways are the same; one thread and two round otherwise, and so do other blocks."""
    stores = {way: content(path) for way in WAYS for path in (work / way).glob("*/labels.db")}
    yardstick = stores["one_process"]
    equal = {way: sum(own == other for own, other in zip(rows, yardstick, strict=True)) for way, rows in stores.items()}
    return {"labels_equal_to_one_process": equal, "labels": len(yardstick)}


def label_timed(run: Path, way: str, shard: str, settings: Sequence[str]) -> dict[str, Any]:
    """Labels a run; times (seconds) of the first block's begin, of the last label, and of each piece."""
    from oracle.prompts import Shard
    from pipelines.config import load_config
    from pipelines.ray.distributed import LOCAL, workers_at
    from pipelines.ray.remote_work import remote_labeller
    from pipelines.run.workspace import Workspace

    config = load_config(run / "config.yaml", [f"runs={run.parent}", "ray.max_workers=2", *settings])
    workspace = Workspace(config.model_copy(update={"file": ""}))
    menu, prompts = workspace.menu(), Shard.parse(shard).select(workspace.prompts.labelled())
    if way == "alone":
        labeller = workspace.labeller(workspace.healing)
        first = time.time()
        labeller.label(prompts, menu)
        return {"first": first, "last": time.time(), "pieces": [[first, time.time()]]}
    with workers_at(LOCAL, config.ray) as workers:
        assert workers is not None
        timed = TimedWorkers(workers, [])
        remote_labeller(workspace, timed, workspace.healing).label(prompts, menu)
        last = time.time()
    return {"first": min(start for start, _ in timed.spans), "last": last, "pieces": sorted(timed.spans)}


def kills(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Labels in one process left alone, with workers killed, with drivers killed; what is lost, doubled, other."""
    work, draw = arguments.work or folder, random.Random(0)
    configs = {name: prepared(work / name, arguments.prompts) for name in ("alone", *arguments.kinds)}
    if "workers" in configs:
        yield {"killed_workers": label_while_killing(configs["workers"], arguments.workers, draw)}
    if "drivers" in configs:
        held = [label_until_killed(configs["drivers"], draw) for _ in range(arguments.drivers)]
        yield {"killed_drivers": len(held), "labels_after_each_killed_driver": held}
        finish("label", str(configs["drivers"]), "--ray")
    finish("label", str(configs["alone"]))
    stores = {name: content(path.parent / "runs" / "tiny" / "labels.db") for name, path in configs.items()}
    for name in arguments.kinds:
        yield {f"equal_after_killed_{name}": stores[name] == stores["alone"]}
        yield {f"labels_after_killed_{name}": len(stores[name]), "labels": len(stores["alone"])}


def prepared(folder: Path, prompts: int) -> Path:
    """A tiny run that is about to be labelled, made unless it is there."""
    if not (folder / "runs" / "tiny" / "adapt.json").exists():
        config = make_project(folder, prompts, batch_size=4, max_new_tokens=6)
        for stage in ("menu", "adapt"):
            finish(stage, str(config))
    return folder / "tiny.yaml"


def memory(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The driver's memory, in MiB, by the number of labels that are stored; what Ray shares is told apart."""
    config = make_project(folder, arguments.prompts, batch_size=64, max_new_tokens=2, plans=2)
    for stage in ("menu", "adapt"):
        finish(stage, str(config))
    driver, points = Command("label", str(config), "--ray"), []
    start, last = time.time(), 0.0
    while not driver.is_over:
        time.sleep(0.5)
        labels = count(folder / "runs" / "tiny" / "labels.db")
        if labels and time.time() - last > 5 and not driver.is_over:
            used = psutil.Process(driver.process.pid).memory_info()
            points.append([labels, round((used.rss - used.shared) / 2**20, 1), round(used.shared / 2**20, 1)])
            last = time.time()
    driver.finish()
    yield {
        "prompts": arguments.prompts,
        "labels": count(folder / "runs" / "tiny" / "labels.db"),
        "seconds": round(time.time() - start, 1),
        "labels_own_mib_shared_mib": points,
    }


if __name__ == "__main__":
    main()
