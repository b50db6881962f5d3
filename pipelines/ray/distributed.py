"""Work handed out to the workers of a Ray cluster by Ray Data, and their results as they come back.

What is done to a piece (see `worker_tasks`) and which pieces are missing is the caller's business: nothing
here knows of labels, features or stores, and no stage knows of Ray. Each worker is an actor that keeps what its task
loaded. Ray starts one that died again and repeats its piece; what came back before this process died is the caller's.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from backbone.errors import InputError, reason_of
from pipelines.config import ConfigError
from pipelines.config.sections import RaySection

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import pyarrow

Piece = TypeVar("Piece")
Result = TypeVar("Result")

LOCAL = "local"
"""In an address's place: a cluster of this machine's own cores, which ends with the command."""

_STORE_BYTES = 2**29
"""Shared memory of a local cluster, for pieces and results under way; what does not fit goes to disk."""


class Workers(Protocol):
    """Processes that share out pieces of work."""

    def map(self, task: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[int, Result]]:
        """For each piece its number and what the task made of it, in the order in which they are done.

        Args:
            task: pickled to every worker once; what it keeps, such as a model, is there for the next piece.
            pieces: pickled one by one.

        Raises:
            InputError: a task raised it.
        """


def workers_at(address: str | None, settings: RaySection) -> AbstractContextManager[Workers | None]:
    """The workers of a cluster; None, which is this process alone, without an address."""
    return nullcontext() if address is None else _connected(address, settings)


@contextmanager
def _connected(address: str, settings: RaySection) -> Iterator[Workers]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a command reports to nobody unasked
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray warns of a coming change
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # otherwise it tells of actors that could not start again
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError("--ray needs Ray: `pip install 'layerbudget[ray]'` brings it") from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = reason_of(error)
        raise ConfigError(f"no Ray cluster can be used at {address!r}: {reason}") from None
    try:
        yield RayWorkers(settings)
    finally:
        ray.shutdown()


class RayWorkers:
    """The workers of the cluster that this process is connected to; see `Workers`."""

    def __init__(self, settings: RaySection) -> None:
        self._settings = settings

    def map(self, task: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[tuple[int, Result]]:
        import ray

        if not pieces:
            return
        _quieten(ray.data.DataContext.get_current())
        rows = [{"number": number, "piece": pickle.dumps(piece)} for number, piece in enumerate(pieces)]
        smallest, largest, gpus = self._sizes(ray.cluster_resources())
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(pickle.dumps(task), self._settings.cpus),
            # A worker that has two pieces keeps the second from one that has none.
            compute=ray.data.ActorPoolStrategy(
                min_size=smallest, max_size=largest, initial_size=largest, max_tasks_in_flight_per_actor=1
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=self._settings.cpus,
            num_gpus=gpus,
        )
        # Without prefetching: a result that is held back until the next one comes would be lost with this process.
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in table.to_pylist():
                result = pickle.loads(row["result"])
                if isinstance(result, InputError):
                    raise result
                yield row["number"], result

    def _sizes(self, cluster: dict[str, float]) -> tuple[int, int, float]:
        """Workers at least and at most, and the GPUs of each."""
        settings = self._settings
        gpus = settings.gpus if settings.gpus is not None else float("GPU" in cluster)
        room = cluster.get("GPU", 0) / gpus if gpus else cluster.get("CPU", 0) / settings.cpus
        largest = settings.max_workers or max(int(room), settings.min_workers)
        return settings.min_workers, largest, gpus


class _Actor:
    """A worker's own process: runs the task on one piece after the other, with as many threads as it has cores."""

    def __init__(self, task: bytes, cpus: float) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        self._task = pickle.loads(task)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        (piece,) = batch["piece"].to_pylist()
        try:
            result = self._task(pickle.loads(piece))
        except InputError as error:  # somebody else's fault is told in one sentence, by the process that they look at
            result = error
        column = pyarrow.array([pickle.dumps(result)], pyarrow.large_binary())
        return pyarrow.table({"number": batch["number"], "result": column})


def _quieten(context: Any) -> None:
    """The progress that a user sees is the stage's own, as on one machine."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
