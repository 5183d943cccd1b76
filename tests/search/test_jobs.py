"""Trials made by others: the same ones, with what they need sent to them, and again where they are lost."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onnxslim.errors import TargetError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.metric import Run
from onnxslim.runtime.targets import Target
from onnxslim.search import Goals, SearchResult, backends, optimize
from onnxslim.search.backends import open_backend, require_backend
from onnxslim.search.jobs import _CACHES, ATTEMPTS, PROPOSING, DistributedExecutor, JobInputs, SearchJob
from onnxslim.search.outcome import opened
from onnxslim.search.problem import SearchProblem
from onnxslim.search.trials import TrialConfig, TrialStore, trials_in
from tests.helpers import normal, normals, parse

NET = """g (float[N,32] x) => (float[N,8] y)
{ a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) q = Relu(b) y = MatMul(q, u) }"""
# Nothing of which can be left away.
SMALL = "g (float[N,32] x) => (float[N,8] y) { y = MatMul(x, w) }"
GOALS = Goals(macs=0.6)


@pytest.fixture(scope="module")
def net() -> Model:
    return parse(NET, normals(w=(32, 64), v=(64, 64), u=(64, 8)))


@pytest.fixture(scope="module")
def data() -> Mapping[str, Array]:
    return {"x": normal(128, 32, seed=1)}


@pytest.fixture(scope="module")
def alone(net: Model, data: Mapping[str, Array]) -> SearchResult:
    return optimize(net, data, GOALS, effort="quick")


class Elsewhere:
    """A worker in this process, which sees none of the folders of the one that asks.

    Args:
        losing: of which jobs, by their number from 0, the worker ends.
    """

    name, size = "elsewhere", 2
    lost: tuple[type[BaseException], ...] = (ConnectionError,)

    machine: tuple[str, str] | None = None

    def __init__(self, losing: Callable[[int], bool] = lambda number: False) -> None:
        self.losing, self.jobs = losing, list[tuple[JobInputs, SearchJob, bool]]()
        _CACHES.clear()

    def submit(self, work: Callable[..., Any], *details: Any) -> Future[Any]:
        inputs, job, sent = details
        future: Future[Any] = Future()
        self.jobs.append((inputs, job, sent is not None))
        if self.losing(len(self.jobs) - 1):
            future.set_exception(ConnectionError("it was killed"))
        else:
            changed = inputs._replace(folder="/nowhere", machine=self.machine or inputs.machine)
            future.set_result(work(changed, job, sent))
        return future

    def close(self) -> None:
        _CACHES.clear()


@contextmanager
def using(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Searches with two jobs run there."""
    with monkeypatch.context() as patch:
        patch.setattr(backends, "ProcessBackend", lambda jobs: backend)
        yield


def same(found: SearchResult, expected: SearchResult) -> bool:
    """Whether two searches have tried and found the same, but for times."""

    def told(result: SearchResult) -> list[Any]:
        figures = [each.figures and replace(each.figures, latency=0, seconds=0) for each in result.trials]
        best = result.best and (result.best.config, result.model.to_proto().SerializeToString())
        return [[each.config for each in result.trials], figures, best]

    return told(found) == told(expected)


def problem(net: Model, data: Mapping[str, Array], **changes: Any) -> SearchProblem:
    given: dict[str, Any] = {
        "model": net,
        "data": opened(net, data, None),
        "named": None,
        "tested": False,
        "metric": None,
        "target": Target.cpu(),
        "seed": 0,
        "libraries": (),
        "distill": False,
        "effort": "quick",
        "goals": GOALS,
        "sizes": {"x": (1, 32)},
        "kept": False,
    }
    return SearchProblem(**{**given, **changes})


@pytest.mark.parametrize("size", [1, 2])
def test_workers_that_see_nothing_are_sent_files_once_and_what_is_lost_is_begun_again(
    net: Model, data: Mapping[str, Array], alone: SearchResult, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    backend = Elsewhere(lambda number: size == 2 and number in (0, 4))
    backend.size = size
    with using(backend, monkeypatch):
        found = optimize(net, data, GOALS, effort="quick", jobs=2)
    assert same(found, alone)
    assert {job for _, job, _ in backend.jobs[:4]} >= {*PROPOSING}, "what all trials need comes first"
    (note,) = (note for note in found.notes if "of files sent" in note)
    assert note.startswith("elsewhere: ")
    if size == 1:
        sent = [job for _, job, with_files in backend.jobs if with_files]
        assert [job.needs_moves for job in sent] == [False, True], "all but what could go, and that"
        assert "0 bytes" not in note
    else:
        assert "2 begun again after their workers ended" in note


def test_what_is_lost_every_time_is_told_and_not_kept(
    data: Mapping[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, backend = parse(SMALL, normals(w=(32, 8))), Elsewhere()
    backend.losing = lambda number: backend.jobs[number][1].config == TrialConfig(1.0, "int8")
    with using(backend, monkeypatch):
        found = optimize(net, data, Goals(macs=1.0), effort="quick", jobs=2, work=tmp_path)
    (error,) = (each.error for each in found.trials if each.encoding == "int8")
    assert error == f"{ATTEMPTS} processes have ended while they made it: it was killed"
    again = optimize(net, data, Goals(macs=1.0), effort="quick", work=tmp_path)
    assert not any("have ended" in each.error for each in again.trials)


def test_workers_that_fail_end_the_search(
    net: Model, data: Mapping[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Elsewhere(lambda number: True)
    backend.lost = ()
    with (
        using(backend, monkeypatch),
        pytest.raises(TargetError, match="elsewhere: ConnectionError: it was kill"),
    ):
        optimize(net, data, GOALS, effort="quick", jobs=2)


def test_machines_of_another_kind_are_refused(net: Model, data: Mapping[str, Array]) -> None:
    with closing(Elsewhere()) as backend:
        executor = DistributedExecutor(problem(net, data), TrialStore(None, {}), backend)
        backend.machine = ("another", "")
        with pytest.raises(TargetError, match="another processor, or version of onnxslim"):
            executor.run(TrialConfig(1.0, "float"), lambda: None)


def test_trials_are_kept_as_soon_as_they_are_made(
    net: Model, data: Mapping[str, Array], tmp_path: Path
) -> None:
    with closing(Elsewhere()) as backend:
        executor = DistributedExecutor(problem(net, data), TrialStore(tmp_path, {}), backend)
        configs = [TrialConfig(0.6, "float"), TrialConfig(1.0, "float")]
        backend.size = 3
        executor.prefetch(configs)
        assert [job for _, job, _ in backend.jobs] == [
            *PROPOSING,
            SearchJob(executor._key(configs[1]), configs[1]),
        ]
        executor.run(configs[1], lambda: pytest.fail("it was begun ahead"))
        executor.run(configs[0], lambda: None)
    assert [each.config for each in trials_in(tmp_path)] == configs[::-1]
    assert executor.lost == 0


def _seen(run: Run) -> float:
    """Marks the process that measures, and waits there if it is to."""
    folder = Path(os.environ["ONNXSLIM_TEST_MARKS"])
    marks = len(list(folder.iterdir()))
    (folder / f"{os.getpid()}-{marks}").touch()
    end = time.monotonic() + 60
    while marks == 1 and (folder / "wait").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return 1.0


def test_a_process_that_is_killed_loses_one_trial(
    data: Mapping[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process to measure, of two, is killed while it does."""
    marks = tmp_path / "marks"
    marks.mkdir()
    places = tmp_path / "places"
    places.mkdir()
    monkeypatch.setenv("TMPDIR", str(places))  # of the processes: this one has looked where its own is
    monkeypatch.setenv("ONNXSLIM_TEST_MARKS", str(marks))
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for mark in marks.iterdir():
                owner = int(mark.name.split("-")[0])
                if owner != os.getpid():
                    os.kill(owner, signal.SIGKILL)
                    killed.append(owner)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    net, goals = parse(SMALL, normals(w=(32, 8))), Goals(macs=1.0, require_sqnr=-100.0)
    found = optimize(net, data, goals, effort="quick", jobs=2, metric=_seen, time_limit=300.0)
    assert killed
    left = [each for each in places.glob("onnxslim-*") if each.is_dir()]
    assert not left, "processes leave nothing behind"
    assert any("1 begun again" in note for note in found.notes)
    here = optimize(net, data, goals, effort="quick", metric=_seen)
    assert same(found, here)


@pytest.mark.parametrize(
    ("backend", "jobs", "message"),
    [
        ("processes", 0, "jobs=0 processes make nothing"),
        ("dusk=tcp://a:1", 1, "unknown backend 'dusk=tcp://a:1': did you mean 'dask'"),
        ("processes=3", 1, "unknown backend"),
        ("ray", 2, "a cluster \\(ray\\) has workers of its own"),
        ("dask", 1, "needs the address of its scheduler"),
    ],
)
def test_backends_that_are_none(backend: str, jobs: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_backend(backend, jobs)


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for backend in ("dask=tcp://a:1", "ray"):
        with pytest.raises(UsageError, match=r"is not installed: pip install 'onnx-slimkit\["):
            require_backend(backend, 1)


def test_processes_that_cannot_be_had_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(backends, "ProcessPoolExecutor", refuse)
    with open_backend("processes", 2) as backend:
        assert backend is not None
        with pytest.raises(TargetError, match="give --jobs 1"):
            backend.submit(os.getpid)


def test_one_job_needs_no_backend() -> None:
    with open_backend("processes", 1) as backend:
        assert backend is None


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_on_dask(net: Model, data: Mapping[str, Array], alone: SearchResult) -> None:
    """Two workers, one of which is killed on the way."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).pid
        timer = threading.Timer(3.0, lambda: os.kill(victim, signal.SIGKILL))
        timer.start()
        found = optimize(net, data, GOALS, effort="quick", backend=f"dask={cluster.scheduler_address}")
        timer.join()
    assert same(found, alone)
    assert any(note.startswith("dask at tcp://") for note in found.notes)


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_on_ray(net: Model, data: Mapping[str, Array], alone: SearchResult) -> None:
    pytest.importorskip("ray")
    found = optimize(net, data, GOALS, effort="quick", backend="ray")
    assert same(found, alone)


@pytest.mark.cluster
def test_a_cluster_that_is_not_there() -> None:
    pytest.importorskip("distributed")
    with (
        pytest.raises(TargetError, match="cannot reach the cluster"),
        open_backend("dask=tcp://127.0.0.1:9", 1),
    ):
        pass
