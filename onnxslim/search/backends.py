"""Where work is done beside this process: processes of this machine, or the user's Dask or Ray cluster.

All three take functions and give futures of the standard library. joblib, which runs on each of them too,
hands out work in rounds: a process that is killed takes all of a round along, and the next one begins when
the slowest of the last has ended. A search wants one answer at a time, and others ahead of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol, TypeAlias

from joblib.externals.loky import ProcessPoolExecutor

from onnxslim.errors import TargetError, UsageError, nearest, one_line

# Seconds to wait for a scheduler.
PATIENCE = 20


class SearchBackend(Protocol):
    """Where work is done.

    Attributes:
        name: for people.
        lost: what a future raises whose worker has ended.
    """

    name: str
    lost: tuple[type[BaseException], ...]

    @property
    def size(self) -> int:
        """How many jobs can be done at a time."""

    def submit(self, work: Callable[..., Any], *details: Any) -> Future[Any]:
        """Have something done; no more than `size` at a time."""

    def close(self) -> None:
        """End all that is still being done."""


def require_backend(backend: str, jobs: int) -> None:
    """Refuse a backend that is none, or not installed.

    Args:
        backend: "processes", "dask=ADDRESS", "ray" or "ray=ADDRESS".
        jobs: how many processes; clusters have as many workers as they have.

    Raises:
        UsageError: says why.
    """
    kind, _, address = backend.partition("=")
    if not isinstance(jobs, int) or jobs < 1:
        raise UsageError(f"jobs={jobs!r} processes make nothing: give 1 or more")
    if kind not in CLUSTERS and backend != "processes":
        raise UsageError(f"unknown backend '{backend}': {nearest(kind, ('processes', *CLUSTERS))}")
    if kind in CLUSTERS and jobs > 1:
        raise UsageError(f"{jobs} processes are of this machine; a cluster ({kind}) has workers of its own")
    if kind == "dask" and not address:
        raise UsageError("the backend dask needs the address of its scheduler: dask=tcp://HOST:8786")
    if kind in CLUSTERS and importlib.util.find_spec(CLUSTERS[kind].module) is None:
        raise UsageError(f"the backend {kind} is not installed: pip install 'onnx-slimkit[{kind}]'")


@contextmanager
def open_backend(backend: str, jobs: int) -> Iterator[SearchBackend | None]:
    """Where trials are to be made, as long as they are; None: in this process.

    Raises:
        TargetError: the cluster cannot be reached.
    """
    kind, _, address = backend.partition("=")
    if kind not in CLUSTERS and jobs == 1:
        yield None
        return
    try:
        pool = CLUSTERS[kind](address) if kind in CLUSTERS else ProcessBackend(jobs)
    except Exception as error:  # whatever the cluster's client raises
        raise TargetError(f"cannot reach the cluster '{backend}': {one_line(error)}") from error
    with closing(pool):
        yield pool


class ProcessBackend:
    """Processes of this machine, each on its own, so that one that ends takes no other along."""

    lost: tuple[type[BaseException], ...] = (BrokenExecutor,)

    def __init__(self, jobs: int) -> None:
        self.name, self._jobs = f"{jobs} processes", jobs
        self._idle: list[_Process] = []
        self._all: list[_Process] = []

    @property
    def size(self) -> int:
        """See `SearchBackend`."""
        return self._jobs

    def submit(self, work: Callable[..., Any], *details: Any) -> Future[Any]:
        """See `SearchBackend`."""
        process = self._idle.pop() if self._idle else self._started()
        future: Future[Any] = process.submit(work, *details)
        future.add_done_callback(partial(self._back, process))
        return future

    def _started(self) -> _Process:
        threads = str(max((os.cpu_count() or 1) // self._jobs, 1))
        given = os.environ.get("OPENBLAS_NUM_THREADS", threads)
        try:
            process: _Process = ProcessPoolExecutor(
                max_workers=1,
                initializer=_follow,
                initargs=(os.getpid(),),
                env={"OPENBLAS_NUM_THREADS": given},
            )
        except OSError as error:  # images of few rights have no place for semaphores
            why = f"{error.strerror}; they need a /dev/shm to write to"
            raise TargetError(f"cannot start processes: {why}, or give --jobs 1") from error
        self._all.append(process)
        return process

    def _back(self, process: _Process, future: Future[Any]) -> None:
        if not future.cancelled() and not isinstance(future.exception(), self.lost):
            self._idle.append(process)

    def close(self) -> None:
        """See `SearchBackend`."""
        for process in self._all:
            process.shutdown(wait=False, kill_workers=True)


_Process: TypeAlias = Any  # joblib has no types


def _follow(asking: int) -> None:
    """End with the process that asks, however that ends; Ctrl-C means that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == asking:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class DaskBackend:
    """A Dask cluster, which gives what a lost worker did to another one by itself.

    Args:
        address: of its scheduler.
    """

    module: ClassVar[str] = "distributed"

    def __init__(self, address: str) -> None:
        distributed = importlib.import_module(self.module)
        self.name = f"dask at {address}"
        self.lost: tuple[type[BaseException], ...] = (distributed.KilledWorker,)
        self._client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
        self._client.wait_for_workers(1, timeout=PATIENCE)
        self._executor = self._client.get_executor(pure=False)

    @property
    def size(self) -> int:
        """Workers that are there now; each makes one trial at a time."""
        return max(len(self._client.nthreads()), 1)

    def submit(self, work: Callable[..., Any], *details: Any) -> Future[Any]:
        """See `SearchBackend`."""
        found: Future[Any] = self._executor.submit(work, *details)
        return found

    def close(self) -> None:
        """See `SearchBackend`."""
        self._executor.shutdown(wait=False)
        self._client.close()


class RayBackend:
    """A Ray cluster.

    Args:
        address: as `ray.init` takes it; empty: the one in `RAY_ADDRESS`, or a new one on this machine.
    """

    module: ClassVar[str] = "ray"

    def __init__(self, address: str) -> None:
        self._ray = importlib.import_module(self.module)
        self.name = f"ray at {address}" if address else "ray"
        told = self._ray.exceptions
        self.lost: tuple[type[BaseException], ...] = (
            told.WorkerCrashedError,
            told.OutOfMemoryError,
            told.NodeDiedError,
            told.ObjectLostError,
        )
        self._own = not self._ray.is_initialized()
        if self._own:
            self._ray.init(address=address or None, include_dashboard=False, log_to_driver=False)
        self._remote: dict[Callable[..., Any], Any] = {}
        self._running: set[Any] = set()

    @property
    def size(self) -> int:
        """Processors of the cluster, one for a trial."""
        return max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def submit(self, work: Callable[..., Any], *details: Any) -> Future[Any]:
        """See `SearchBackend`."""
        if work not in self._remote:
            self._remote[work] = self._ray.remote(max_retries=0)(work)
        reference = self._remote[work].remote(*details)
        self._running.add(reference)
        future: Future[Any] = reference.future()
        future.add_done_callback(lambda _: self._running.discard(reference))
        return future

    def close(self) -> None:
        """See `SearchBackend`."""
        for reference in list(self._running):
            self._ray.cancel(reference, force=True)
        if self._own:
            self._ray.shutdown()


CLUSTERS: Mapping[str, type[DaskBackend] | type[RayBackend]] = {"dask": DaskBackend, "ray": RayBackend}
