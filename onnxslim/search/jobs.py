"""Trials made by other processes: what is handed to them, and what becomes of those that are lost.

A job names files by their hashes: the model with its data files, the samples, the settings, what could be
left away. A worker that sees the folder they lie in, as all on this machine do, reads them there. Another one
answers which are missing, is given the same again with the bytes, and holds them for later trials.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import joblib

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.moves import Move
from onnxslim.errors import OnnxSlimError, TargetError, one_line
from onnxslim.formats import size
from onnxslim.ir.model import load
from onnxslim.recipes.data import Batches
from onnxslim.runtime.machine import fingerprint
from onnxslim.runtime.profile import require_usable
from onnxslim.search.backends import SearchBackend
from onnxslim.search.chains import PLANS, Moves
from onnxslim.search.executor import TrialExecutor, TrialMade, TrialRunner
from onnxslim.search.problem import SearchProblem
from onnxslim.search.trials import TrialConfig, TrialStore
from onnxslim.version import version

# How often a job is begun whose worker is lost.
ATTEMPTS = 3
MODEL, DATA, PROBLEM, MOVES = "model.onnx", "data.joblib", "problem.pickle", "moves.pickle"


class SearchJob(NamedTuple):
    """A trial to make, by its key; or, without a config, what could be left away to find out, by one pass."""

    key: str = ""
    config: TrialConfig | None = None
    step: int = 0

    @property
    def needs_moves(self) -> bool:
        """Whether it is made of what could be left away."""
        return self.config is not None and self.config.needs_moves


# Passes propose without knowing of each other.
PROPOSING = tuple(SearchJob(step=step) for step in range(len(PLANS)))


class JobInputs(NamedTuple):
    """What a job is done with.

    Attributes:
        folder: where the files lie, for those who see it.
        files: hash by name.
        machine: processor and version of the one that asks.
    """

    folder: str
    files: Mapping[str, str]
    machine: tuple[str, str]


class MissingFiles(NamedTuple):
    """What a worker answers that does not have these files."""

    names: tuple[str, ...]


class WorkerLostError(OnnxSlimError):
    """A job whose worker ended, however often it was begun."""


class DistributedExecutor(TrialExecutor):
    """Has the workers of a backend make trials, some of them ahead of the question.

    Args:
        problem, store: see `TrialExecutor`.
        backend: where the workers are.

    Attributes:
        sent: bytes of files that went to workers.
        lost: jobs whose worker ended before they did.
    """

    def __init__(self, problem: SearchProblem, store: TrialStore, backend: SearchBackend) -> None:
        super().__init__(problem, store)
        self._backend = backend
        self._folder = _temporary(self)
        _pack(problem, self._folder)
        self._files = {file.name: sha256(file) for file in sorted(self._folder.iterdir())}
        self._running: dict[Future[Any], SearchJob] = {}
        self._queue: list[SearchJob] = []
        self._begun: Counter[SearchJob] = Counter()
        self._ended: dict[SearchJob, OnnxSlimError | None] = {}
        self._proposed: dict[int, Sequence[Move]] = {}
        self.sent = self.lost = 0
        if self._found is not None:
            self._offer(self._found)

    @property
    def told(self) -> str:
        """See `TrialExecutor`."""
        again = f", {self.lost} begun again after their workers ended" if self.lost else ""
        return f"{self._backend.name}: {len(self._ended)} jobs, {size(self.sent)} of files sent{again}"

    def prefetch(self, configs: Sequence[TrialConfig]) -> None:
        """Begin what may be asked for, most likely first, as far as there are workers."""
        jobs = (SearchJob(self._key(each), each) for each in configs)
        self._queue = [job for job in jobs if job not in self._ended and self._store.known(job.key) is None]
        self._collect(0.0)
        self._fill()

    def _make(self, key: str, config: TrialConfig, begin: Callable[[], None]) -> None:
        job = SearchJob(key, config)
        if not self._has_begun(job):
            begin()
        try:
            self._finish(job)
        except WorkerLostError as error:  # another search tries again: it may well be possible
            self._store.add(config.trial(key, None, str(error)), lasting=False)

    def _finish(self, job: SearchJob) -> None:
        """Have a job done; what else is done meanwhile is kept, too.

        Raises:
            OnnxSlimError: it cannot be done, or workers cannot do anything.
        """
        if job.needs_moves:
            self._moves()
        self._queue.insert(0, job)
        while job not in self._ended:
            self._fill()
            self._collect(None)
        error = self._ended[job]
        if error is not None:
            raise error

    def _find_moves(self) -> None:
        for job in PROPOSING:
            self._finish(job)

    def _offer(self, moves: Moves) -> None:
        """Put what could be left away where workers find it."""
        (self._folder / MOVES).write_bytes(pickle.dumps(moves))
        self._files[MOVES] = sha256(self._folder / MOVES)

    def _has_begun(self, job: SearchJob) -> bool:
        return job in self._running.values()

    def _fill(self) -> None:
        """Begin as much as there are workers for; what all trials need takes longest, and comes first."""
        queue = [*PROPOSING, *self._queue] if self._queue and self._found is None else self._queue
        free = self._backend.size - len(self._running)
        for job in queue:
            ready = self._found is not None or not job.needs_moves
            if free > 0 and ready and job not in self._ended and not self._has_begun(job):
                self._begun[job] += 1
                self._submit(job)
                free -= 1

    def _submit(self, job: SearchJob, sent: Mapping[str, bytes] | None = None) -> None:
        files = {name: each for name, each in self._files.items() if name != MOVES or job.needs_moves}
        inputs = JobInputs(str(self._folder), files, (fingerprint(), version()))
        self._running[self._backend.submit(run_job, inputs, job, sent)] = job

    def _collect(self, seconds: float | None) -> None:
        """Take in what has been done, once there is something."""
        done, _ = wait(self._running, seconds, FIRST_COMPLETED)
        for future in done:
            self._receive(self._running.pop(future), future)

    def _receive(self, job: SearchJob, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, self._backend.lost):
            self.lost += 1
            if self._begun[job] >= ATTEMPTS:
                told = f"{ATTEMPTS} processes have ended while they made it: {one_line(error)}"
                self._ended[job] = WorkerLostError(told)
            return
        if error is not None:
            raise TargetError(f"{self._backend.name}: {type(error).__name__}: {one_line(error)}") from error
        answer = future.result()
        if isinstance(answer, MissingFiles):
            sent = {name: (self._folder / name).read_bytes() for name in answer.names}
            self.sent += sum(map(len, sent.values()))
            self._submit(job, sent)
            return
        if isinstance(answer, TrialMade):
            self._take(answer)
        elif not isinstance(answer, OnnxSlimError):
            self._proposed[job.step] = answer
            if len(self._proposed) == len(PROPOSING):
                self._keep_moves([self._proposed[each.step] for each in PROPOSING])
                self._offer(self._moves())
        self._ended[job] = answer if isinstance(answer, OnnxSlimError) else None


def _pack(problem: SearchProblem, folder: Path) -> None:
    """Write all that workers need into a folder."""
    problem.model.save(folder / MODEL)
    joblib.dump((list(problem.data.data), problem.data.labels), folder / DATA)
    named = problem.named and replace(problem.named, path=str(Path(problem.named.path).absolute()))
    metric = problem.metric and joblib.wrap_non_picklable_objects(problem.metric)
    bare = {"model": None, "data": None, "named": named, "metric": metric}
    rest = {item.name: getattr(problem, item.name) for item in fields(problem)}
    (folder / PROBLEM).write_bytes(pickle.dumps(({**rest, **bare}, problem.model.source is None)))


def _unpacked(folder: Path) -> SearchProblem:
    data, labels = joblib.load(folder / DATA, mmap_mode="r")
    rest, from_memory = pickle.loads((folder / PROBLEM).read_bytes())
    given, model = Batches(CalibrationData(data), labels), load(folder / MODEL)
    if from_memory:  # results tell what they were made of by another hash then
        model.source = None
    return SearchProblem(**{**rest, "model": model, "data": given})


def _temporary(owner: object) -> Path:
    """A folder that goes when its owner does."""
    folder = Path(tempfile.mkdtemp(prefix="onnxslim-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def sha256(file: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------ in the worker


class _Cache:
    """What a worker holds of one search.

    Args:
        files: hash by name, of those that trials need.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)
        self.folders: dict[str, Path] = {}
        self.runners: dict[bool, TrialRunner] = {}

    @cached_property
    def own(self) -> Path:
        """Where files lie that were sent. Processes that see those of others end without tidying up."""
        return _temporary(self)

    def missing(self, inputs: JobInputs) -> tuple[str, ...]:
        """Names of files that are not here, and not to be seen there."""
        for name, expected in inputs.files.items():
            there = Path(inputs.folder) / name
            if name not in self.folders and there.is_file() and sha256(there) == expected:
                self.folders[name] = there.parent
        return tuple(name for name in inputs.files if name not in self.folders)

    def unpack(self, sent: Mapping[str, bytes]) -> None:
        """Take in files."""
        for name, content in sent.items():
            self.folders[name] = self.own
            (self.own / name).write_bytes(content)

    def runner(self, with_moves: bool) -> TrialRunner:
        """What makes trials."""
        if with_moves not in self.runners:
            moves = pickle.loads((self.folders[MOVES] / MOVES).read_bytes()) if with_moves else None
            self.runners[with_moves] = TrialRunner(_unpacked(self.folders[MODEL]), moves)
        return self.runners[with_moves]


# Of the last search that this process worked for. Clusters may run several threads of a process.
_CACHES: list[_Cache] = []
_LOCK = threading.Lock()


def run_job(
    inputs: JobInputs, job: SearchJob, sent: Mapping[str, bytes] | None
) -> TrialMade | Sequence[Move] | MissingFiles | OnnxSlimError:
    """Do a job, in whichever process.

    Args:
        inputs: what with.
        job: what to do.
        sent: files, by name, that were missing.
    """
    with _LOCK:
        try:
            return _done(inputs, job, sent)
        except OnnxSlimError as error:
            return error


def _done(
    inputs: JobInputs, job: SearchJob, sent: Mapping[str, bytes] | None
) -> TrialMade | Sequence[Move] | MissingFiles:
    lasting = {name: each for name, each in inputs.files.items() if name != MOVES}
    if not _CACHES or _CACHES[0].files != lasting:
        _CACHES[:] = [_Cache(lasting)]
    cache = _CACHES[0]
    cache.unpack(sent or {})
    if missing := cache.missing(inputs):
        return MissingFiles(missing)
    runner = cache.runner(job.needs_moves)
    require_usable(runner.problem.target)
    if (fingerprint(), version()) != inputs.machine:
        raise TargetError("a worker has another processor, or version of onnxslim, than the one that asks")
    if job.config is None:
        return runner.structures.proposed(job.step)
    return replace(runner.run(job.key, job.config), outcome=None)
