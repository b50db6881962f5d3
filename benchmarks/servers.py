"""Servers as processes of their own, started for a benchmark or a test and killed at its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, whose output goes to a file; killed at the end.

    Args:
        environment: put over this process's own.
    """
    with log.open("wb") as output:
        given = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=given)
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With its children, which it may have left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_well(
    url: str, processes: Sequence[subprocess.Popen[bytes]], log: Path, seconds: float = float("inf")
) -> None:
    """Until a server's `/health` answers with status 200.

    Raises:
        RuntimeError: one of the processes that it needs has ended, or the time is over; with the end of its log.
    """
    until = time.monotonic() + seconds
    while not is_well(url):
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            raise RuntimeError(f"the server at {url} did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.3)


def is_well(url: str) -> bool:
    try:
        return bool(httpx2.get(f"{url}/health", timeout=5).status_code == 200)
    except httpx2.HTTPError:
        return False
