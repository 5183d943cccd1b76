"""Trials made by workers: what is handed to them, and what becomes of those that are lost.

A piece of work names files by their hashes: the model with its data files, the samples, the settings, what
could be left away. A worker that sees the folder they lie in, as all on this machine do, reads them there.
Another one answers what it lacks, is given the same again with the bytes, and holds them for later trials.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import joblib

from onnxslim.calibration.data import CalibrationData
from onnxslim.errors import OnnxSlimError, TargetError, one_line
from onnxslim.formats import size
from onnxslim.ir.model import load
from onnxslim.recipes.data import Batches
from onnxslim.runtime.machine import fingerprint
from onnxslim.runtime.profile import require_usable
from onnxslim.search.chains import Moves
from onnxslim.search.making import TrialMade, Workbench
from onnxslim.search.place import Workplace
from onnxslim.search.pools import Pool
from onnxslim.search.trials import Wish
from onnxslim.version import version

# How often work is begun whose worker is lost.
ATTEMPTS = 3
MODEL, DATA, PLACE, MOVES = "model.onnx", "data.joblib", "place.pickle", "moves.pickle"


class Task(NamedTuple):
    """Something to do: a trial, by its key; or, without a wish, to find out what could be left away."""

    key: str = ""
    wish: Wish | None = None

    @property
    def needs_moves(self) -> bool:
        """Whether it is made of what could be left away."""
        return self.wish is not None and self.wish.structure < 1 and self.wish.cut == "work"


class Order(NamedTuple):
    """What a task is done with.

    Attributes:
        folder: where the files lie, for those who see it.
        files: hash by name.
        machine: processor and version of the one that asks.
    """

    folder: str
    files: Mapping[str, str]
    machine: tuple[str, str]


class Lacking(NamedTuple):
    """What a worker answers that does not have these files."""

    names: tuple[str, ...]


class LostError(OnnxSlimError):
    """Work whose worker ended, however often it was begun."""


class Crew:
    """Workers that make the trials of a search.

    Args:
        pool: where they are.
        place: what trials have in common.
        keep: called with each trial that is made, as soon as it is.

    Attributes:
        sent: bytes of files that went to workers.
        lost: tasks whose worker ended before they did.
    """

    def __init__(self, pool: Pool, place: Workplace, keep: Callable[[TrialMade], None]) -> None:
        self._pool, self._keep = pool, keep
        self._folder = _passing(self)
        _pack(place, self._folder)
        self._files = {file.name: sha256(file) for file in sorted(self._folder.iterdir())}
        self._running: dict[Future[Any], Task] = {}
        self._line: list[Task] = []
        self._begun: Counter[Task] = Counter()
        self._ended: dict[Task, OnnxSlimError | None] = {}
        self._moves: Moves | None = None
        self.sent = self.lost = 0

    def makes(self, task: Task) -> bool:
        """Whether it has begun."""
        return task in self._running.values()

    def expect(self, tasks: Iterable[Task]) -> None:
        """Begin what may be asked for, most likely first, as far as there are workers."""
        self._line = [task for task in tasks if task not in self._ended]
        self._hear(0.0)
        self._fill()

    def finish(self, task: Task) -> None:
        """Have something done; what else is done meanwhile is kept, too.

        Raises:
            OnnxSlimError: it cannot be done, or workers cannot do any work.
        """
        if task.needs_moves:
            self.moves()
        self._line.insert(0, task)
        while task not in self._ended:
            self._fill()
            self._hear(None)
        error = self._ended[task]
        if error is not None:
            raise error

    def moves(self) -> Moves:
        """What could be left away.

        Raises:
            OnnxSlimError: a pass fails.
        """
        if self._moves is None:
            self.finish(Task())
        assert self._moves is not None
        return self._moves

    def told(self) -> str:
        """What workers had to do with it, for people."""
        again = f", {self.lost} begun again after their workers ended" if self.lost else ""
        return f"{self._pool.name}: {len(self._ended)} pieces of work, {size(self.sent)} of files sent{again}"

    def _fill(self) -> None:
        """Begin as much as there are workers for; what all trials need takes longest, and comes first."""
        line = [Task(), *self._line] if self._line and self._moves is None else self._line
        free = self._pool.size - len(self._running)
        for task in line:
            ready = self._moves is not None or not task.needs_moves
            if free > 0 and ready and task not in self._ended and not self.makes(task):
                self._begun[task] += 1
                self._begin(task)
                free -= 1

    def _begin(self, task: Task, sent: Mapping[str, bytes] | None = None) -> None:
        files = {name: each for name, each in self._files.items() if name != MOVES or task.needs_moves}
        order = Order(str(self._folder), files, (fingerprint(), version()))
        self._running[self._pool.submit(work_at, order, task, sent)] = task

    def _hear(self, seconds: float | None) -> None:
        """Take in what has been done, once there is something."""
        done, _ = wait(self._running, seconds, FIRST_COMPLETED)
        for future in done:
            self._take(self._running.pop(future), future)

    def _take(self, task: Task, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, self._pool.lost):
            self.lost += 1
            if self._begun[task] >= ATTEMPTS:
                told = f"{ATTEMPTS} processes have ended while they made it: {one_line(error)}"
                self._ended[task] = LostError(told)
            return
        if error is not None:
            raise TargetError(f"{self._pool.name}: {type(error).__name__}: {one_line(error)}") from error
        answer = future.result()
        if isinstance(answer, Lacking):
            sent = {name: (self._folder / name).read_bytes() for name in answer.names}
            self.sent += sum(map(len, sent.values()))
            self._begin(task, sent)
            return
        if isinstance(answer, TrialMade):
            self._keep(answer)
        elif not isinstance(answer, OnnxSlimError):
            self._moves = answer
            (self._folder / MOVES).write_bytes(pickle.dumps(answer))
            self._files[MOVES] = sha256(self._folder / MOVES)
        self._ended[task] = answer if isinstance(answer, OnnxSlimError) else None


def _pack(place: Workplace, folder: Path) -> None:
    """Write all that workers need into a folder."""
    place.model.save(folder / MODEL)
    joblib.dump((list(place.data.data), place.data.labels), folder / DATA)
    named = place.named and replace(place.named, path=str(Path(place.named.path).absolute()))
    metric = place.metric and joblib.wrap_non_picklable_objects(place.metric)
    bare = {"model": None, "data": None, "named": named, "metric": metric}
    rest = {item.name: getattr(place, item.name) for item in fields(place)}
    (folder / PLACE).write_bytes(pickle.dumps(({**rest, **bare}, place.model.source is None)))


def _unpacked(folder: Path) -> Workplace:
    data, labels = joblib.load(folder / DATA, mmap_mode="r")
    rest, from_memory = pickle.loads((folder / PLACE).read_bytes())
    given, model = Batches(CalibrationData(data), labels), load(folder / MODEL)
    if from_memory:  # results tell what they were made of by another hash then
        model.source = None
    return Workplace(**{**rest, "model": model, "data": given})


def _passing(owner: object) -> Path:
    """A folder that goes when its owner does."""
    folder = Path(tempfile.mkdtemp(prefix="onnxslim-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def sha256(file: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------ in the worker


class _Held:
    """What a worker holds of one search.

    Args:
        files: hash by name, of those that trials need.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)
        self.folders: dict[str, Path] = {}
        self.home = _passing(self)
        self.benches: dict[bool, Workbench] = {}

    def lacks(self, order: Order) -> tuple[str, ...]:
        """Names of files that are not here, and not to be seen there."""
        for name, expected in order.files.items():
            there = Path(order.folder) / name
            if name not in self.folders and there.is_file() and sha256(there) == expected:
                self.folders[name] = there.parent
        return tuple(name for name in order.files if name not in self.folders)

    def unpack(self, sent: Mapping[str, bytes]) -> None:
        """Take in files."""
        for name, content in sent.items():
            self.folders[name] = self.home
            (self.folders[name] / name).write_bytes(content)

    def bench(self, with_moves: bool) -> Workbench:
        """What makes trials."""
        if with_moves not in self.benches:
            moves = pickle.loads((self.folders[MOVES] / MOVES).read_bytes()) if with_moves else None
            self.benches[with_moves] = Workbench(_unpacked(self.folders[MODEL]), moves)
        return self.benches[with_moves]


# Of the last search that this process worked for. Clusters may run several threads of a process.
_HELD: list[_Held] = []
_ONE = threading.Lock()


def work_at(
    order: Order, task: Task, sent: Mapping[str, bytes] | None
) -> TrialMade | Moves | Lacking | OnnxSlimError:
    """Do a piece of work, in whichever process.

    Args:
        order: what with.
        task: what to do.
        sent: files, by name, that were lacking.
    """
    with _ONE:
        try:
            return _done(order, task, sent)
        except OnnxSlimError as error:
            return error


def _done(order: Order, task: Task, sent: Mapping[str, bytes] | None) -> TrialMade | Moves | Lacking:
    mine = {name: each for name, each in order.files.items() if name != MOVES}
    if not _HELD or _HELD[0].files != mine:
        _HELD[:] = [_Held(mine)]
    held = _HELD[0]
    held.unpack(sent or {})
    if lacking := held.lacks(order):
        return Lacking(lacking)
    bench = held.bench(task.needs_moves)
    require_usable(bench.place.target)
    if (fingerprint(), version()) != order.machine:
        raise TargetError("a worker has another processor, or version of onnxslim, than the one that asks")
    if task.wish is None:
        return bench.structures.moves
    return replace(bench.tried(task.key, task.wish), outcome=None)
