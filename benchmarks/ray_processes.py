"""Commands of `layerbudget` that run on Ray: started, watched, and their workers and themselves killed."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
CONTENT = "model, prompt, plan, decoding, judge, answer, answer_ids, score, prompt_tokens, forward_tokens"
"""All columns of a label but its time."""


def variables(threads: str) -> dict[str, str]:
    """The environment of a process that finds layerbudget and these scripts, and no network."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}


class Command:
    """A command of layerbudget that was begun, with one thread for each process.

    What it says goes to a file: Ray's processes have the same output, and outlive a command that is killed, so that
    the end of a pipe might never come.
    """

    def __init__(self, *arguments: str) -> None:
        self._words = [sys.executable, "-m", "layerbudget", *arguments]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as this object)
        self.process = subprocess.Popen(self._words, env=variables("1"), stdout=subprocess.DEVNULL, stderr=self._said)

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> None:
        """Waits for its end. Raises RuntimeError with what a command that failed has said."""
        if self.process.wait():
            self._said.seek(0)
            said = self._said.read().decode()[-2000:]
            raise RuntimeError(f"{self._words!r} ended with {self.process.returncode}: {said}")

    def kill(self) -> None:
        """Kills it alone, as a machine short of memory does. Its cluster ends by itself, but for two processes
        of Ray's (dashboard and environments) that take a minute or two: these are ended here."""
        cluster = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(cluster, timeout=20)
        for process in left:
            process.kill()


def finish(*arguments: str) -> None:
    """Runs a command of layerbudget to its end."""
    Command(*arguments).finish()


def workers_of(driver: int) -> list[int]:
    """Process ids of the actors of a local cluster that a process started."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::") and "Map" in process.cmdline()[0]:
                found.append(process.pid)
        except psutil.Error:  # it has just ended
            continue
    return found


def label_while_killing(config: Path, kills: int, draw: random.Random) -> int:
    """Labels on two workers, one of which is killed now and then while labels are missing; how many were."""
    driver, killed = Command("label", str(config), "--ray"), 0
    labels, seen = config.parent / "runs" / "tiny" / "labels.db", 0
    while not driver.is_over:
        time.sleep(draw.uniform(0.1, 0.5))
        done = count(labels)
        if killed < kills and done > seen and (alive := workers_of(driver.process.pid)):
            os.kill(draw.choice(alive), signal.SIGKILL)
            killed, seen = killed + 1, done
    driver.finish()
    return killed


def label_until_killed(config: Path, draw: random.Random) -> int:
    """Begins to label on two workers and kills this command when some more labels have come; how many there are."""
    labels = config.parent / "runs" / "tiny" / "labels.db"
    before, driver = count(labels), Command("label", str(config), "--ray")
    while count(labels) == before and not driver.is_over:
        time.sleep(0.05)
    time.sleep(draw.uniform(0.0, 0.5))
    if driver.is_over:
        raise RuntimeError("the command was over before it could be killed: use more prompts")
    driver.kill()
    return count(labels)


def count(store: Path) -> int:
    """Labels in a store; none where there is no store yet."""
    rows = _rows(store, "SELECT COUNT(*) FROM labels")
    return rows[0][0] if rows else 0


def content(store: Path) -> list[tuple[Any, ...]]:
    """All labels of a store, sorted by their key."""
    return _rows(store, f"SELECT {CONTENT} FROM labels ORDER BY model, decoding, plan, prompt, judge")


def _rows(store: Path, query: str) -> list[tuple[Any, ...]]:
    if not store.is_file():
        return []
    connection = sqlite3.connect(f"{store.resolve().as_uri()}?mode=ro", uri=True, timeout=60)
    try:
        return connection.execute(query).fetchall()
    except sqlite3.OperationalError:  # it is just being made
        return []
    finally:
        connection.close()
