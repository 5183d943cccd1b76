"""Models timed against one another, and the times kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.errors import SaveError
from onnxslim.ir.files import write_text
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.machine import fingerprint
from onnxslim.runtime.native import CPU, onnxruntime
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target


@dataclass(frozen=True)
class Latency:
    """Times of one call, in milliseconds."""

    median: float
    minimum: float

    @property
    def spread(self) -> float:
        """How far the median lies above the fastest call, as a share of that."""
        return self.median / self.minimum - 1


def latencies(
    sessions: Sequence[Session],
    feeds: Mapping[str, Array],
    *,
    rounds: int = 30,
    least: int = 5,
    seconds: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Latency], list[float]]:
    """Time sessions in turn on the same inputs, so that a busy machine slows all of them alike.

    Args:
        sessions: what to compare.
        feeds: inputs of each.
        rounds: turns at the most, after two to warm up.
        least: turns at the least, however long they take.
        seconds: budget for all turns.
        clock: what a run is timed with, in seconds.

    Returns:
        Times of each session, and the median over all turns of its time divided by the first one's.
    """
    table = _turns(sessions, feeds, rounds, least, seconds, clock)
    found = [Latency(float(np.median(column)), float(column.min())) for column in table.T]
    return found, [float(ratio) for ratio in np.median(table / table[:, :1], axis=0)]


def _turns(
    sessions: Sequence[Session],
    feeds: Mapping[str, Array],
    rounds: int,
    least: int,
    seconds: float,
    clock: Callable[[], float],
) -> NDArray[np.float64]:
    """Milliseconds of every call, shape (turns, sessions); see `latencies`."""
    for session in sessions:
        session.run(feeds)
        session.run(feeds)
    times: list[list[float]] = []
    with alone():
        end = time.perf_counter() + seconds
        while len(times) < rounds and (len(times) < least or time.perf_counter() < end):
            turn = []
            for session in sessions:
                start = clock()
                session.run(feeds)
                turn.append((clock() - start) * 1e3)
            times.append(turn)
    return np.array(times)


# Seconds after which a measurement no longer waits for those of other processes.
PATIENCE = 60.0


@contextmanager
def alone(patience: float = PATIENCE) -> Iterator[None]:
    """While no other process of this user on this machine measures, where the system can tell.

    Args:
        patience: seconds to wait for that.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        stream = open(Path(tempfile.gettempdir()) / f"onnxslim-{os.getuid()}.timing", "ab")  # noqa: SIM115
    except OSError:  # there is nowhere to meet
        yield
        return
    with stream:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        yield  # closing gives it back, and so does the end of the process


Maker: TypeAlias = Callable[[], Model]
# Turns of one comparison, and seconds after which there are no more of them.
ROUNDS, SECONDS = 30, 1.0
# Bytes of weights in models that are timed in the same turns.
MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Timing:
    """One model compared with others.

    Attributes:
        milliseconds: of the first model, the median.
        ratios: of each of the others to the first, the median over turns; less than 1 is faster.
    """

    milliseconds: float
    ratios: Mapping[str, float]


def compare(
    models: Sequence[Model],
    feeds: Mapping[str, Array],
    target: Target,
    *,
    rounds: int = 2 * ROUNDS,
    least: int = 5,
    seconds: float = 5.0,
) -> tuple[list[Latency], list[float]]:
    """Time models in turn on the same inputs, by the clock that says most about them; see `latencies`.

    Raises:
        LoadError: a model does not run.
    """
    sessions = [Session(model, target) for model in models]
    return latencies(sessions, feeds, rounds=rounds, least=least, seconds=seconds, clock=_clock(target))


# Three of four turns have to take longer by this, in two comparisons, to call a model slower: medians of the
# same model twice differ by 2 %. Calls that are shorter than this, in milliseconds, cost what calling costs.
SLOWER, TELLING = 1.05, 0.1


def slowdown(
    first: Model,
    second: Model,
    feeds: Mapping[str, Array],
    target: Target,
    seconds: float = 0.5,
    *,
    telling: float = TELLING,
) -> float | None:
    """How many times as long as the first model the second takes, where it certainly takes longer; else None.

    On one thread: more of them wait for one another on a busy machine.

    Args:
        first, second: what to compare.
        feeds: inputs of both.
        target: where to run; the reference evaluator has no time to speak of.
        seconds: budget of each of two comparisons.
        telling: milliseconds that the first one has to take, or nothing is told.

    Raises:
        LoadError: a model does not run.
    """
    single = target.with_threads(1)
    found = 1.0
    for _ in range(2):
        sessions = [Session(model, single) for model in (first, second)]
        if sessions[0].no_latency:
            return None
        table = _turns(sessions, feeds, 20, 3, seconds, _clock(single))
        ratios = table[:, 1] / table[:, 0]
        if np.quantile(ratios, 0.25) <= SLOWER or np.median(table[:, 0]) < telling:
            return None
        found = float(np.median(ratios))
    return found


class Bench:
    """Compares variants of small models and keeps the results.

    Args:
        target: where to run.
        folder: where results are kept; `None` keeps them nowhere.
    """

    def __init__(self, target: Target, folder: Path | None = None) -> None:
        self._target = target
        self._folder = folder

    def __call__(
        self, what: str, first: Maker, others: Mapping[str, Maker], feeds: Mapping[str, Array]
    ) -> Timing:
        """Time models in turn on the same inputs, as far as it was not done before.

        Args:
            what: everything that sets the first model apart from all others.
            first: makes the model to compare with.
            others: by what sets them apart from variants of the same first model.
            feeds: inputs of each.

        Raises:
            LoadError: a model does not run.
        """
        path = self._path(what)
        known = _read(path)
        missing = [name for name in others if known is None or name not in known.ratios]
        if known is None or missing:
            known = self._timed(known, first, {name: others[name] for name in missing}, feeds)
            _write(path, what, known)
        return Timing(known.milliseconds, {name: known.ratios[name] for name in others})

    def _timed(
        self, known: Timing | None, first: Maker, others: Mapping[str, Maker], feeds: Mapping[str, Array]
    ) -> Timing:
        milliseconds, ratios = 0.0, dict[str, float]()
        reference = first()
        for part in _portions(reference, others):
            timed, found = compare(
                (reference, *part.values()), feeds, self._target, rounds=ROUNDS, seconds=SECONDS
            )
            milliseconds = timed[0].median
            ratios.update(zip(part, found[1:], strict=True))
        if known is not None:
            return Timing(known.milliseconds, {**known.ratios, **ratios})
        return Timing(milliseconds, ratios)

    def _path(self, what: str) -> Path | None:
        if self._folder is None:
            return None
        target = (self._target.provider, self._target.options, self._target.threads)
        whole = json.dumps([what, target, onnxruntime().__version__, fingerprint()])
        return self._folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.json"


def _clock(target: Target) -> Callable[[], float]:
    """Time of this thread where it does all the work, which others on the machine do not lengthen."""
    return time.thread_time if target.provider == CPU and target.threads == 1 else time.perf_counter


def folder() -> Path:
    """Where results are kept: `latency` in `$ONNXSLIM_CACHE` or in `~/.cache/onnxslim`."""
    return Path(os.environ.get("ONNXSLIM_CACHE") or Path.home() / ".cache" / "onnxslim") / "latency"


def _portions(reference: Model, others: Mapping[str, Maker]) -> Iterator[dict[str, Model]]:
    """Models that are held at the same time; the reference is timed with each portion."""
    portion, held = dict[str, Model](), reference.nbytes()
    for name, make in others.items():
        model = make()
        if portion and held + model.nbytes() > MAX_BYTES:
            yield portion
            portion, held = {}, reference.nbytes()
        portion[name] = model
        held += model.nbytes()
    yield portion


def _read(path: Path | None) -> Timing | None:
    """What is kept there; a file that is missing or broken holds nothing."""
    if path is None:
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ratios = {str(name): float(ratio) for name, ratio in found["ratios"].items()}
        return Timing(float(found["milliseconds"]), ratios)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path | None, what: str, timing: Timing) -> None:
    """Keep a result; a folder that cannot be written keeps nothing."""
    if path is None:
        return
    content = json.dumps({"what": what, "milliseconds": timing.milliseconds, "ratios": dict(timing.ratios)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
    except (OSError, SaveError):
        return
