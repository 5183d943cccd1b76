"""ONNX Runtime in a process of its own, so that what ends it, or never ends, does not end this one.

A worker is an interpreter that has imported onnxruntime and little else. It holds one model at a time and
answers through pipes. One that died or had to be killed is replaced when it is next needed; one that nobody
has needed for `LINGER_SECONDS` is ended, and so are all when this process ends. Workers are started as plain
commands: callers need no `if __name__ == "__main__"`, and may themselves be daemons, threads or forks. The
command line, which knows that nothing else runs, forks its first one.
"""

from __future__ import annotations

import atexit
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from onnxslim.errors import LoadError, one_line
from onnxslim.runtime import native
from onnxslim.runtime.limits import LimitExceeded, RunLimits, Watchdog, peak_of
from onnxslim.runtime.native import OrtModel, SessionSettings
from onnxslim.runtime.worker import receive, send, serve

# Whether the command line is all that this process runs; it says so.
alone = False

LINGER_SECONDS = 10.0
# What a worker may take longer, and more, than a run that should have stopped by itself, before it is killed.
GRACE = RunLimits(seconds=1, bytes=64 << 20)
START = RunLimits(seconds=120, bytes=8 << 30)

END_SECONDS = 5.0
POLL_SECONDS = 0.02
PIPE_BYTES = 1 << 20  # where the system lets one choose

_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from onnxslim.runtime.worker import serve; serve()"

Source = Callable[[], AbstractContextManager[bytes | str]]


class WorkerEnded(LoadError):
    """The process in which ONNX Runtime opened or ran a model came to an end."""


class _CannotStart(WorkerEnded):
    """It never came so far as to answer."""


def open_model(
    source: Source, settings: SessionSettings, limits: RunLimits | None
) -> IsolatedModel | OrtModel:
    """Open a model in a worker, or in this process where there can be none.

    Args:
        source: makes the bytes of the model, or a file; called again if a worker has to be replaced.
        settings: for ONNX Runtime.
        limits: of opening the model, and of each run that is not given others; only a worker keeps to them
            whatever happens, and to those of memory only on Linux.

    Raises:
        WorkerEnded: the worker died of it.
        LimitExceeded: it took more than it may.
        LoadError, TargetError, UsageError: see `onnxslim.runtime.native.open_model`.
    """
    if _POOL.usable():
        try:
            return IsolatedModel(source, settings, limits)
        except _CannotStart as error:
            _POOL.give_up(str(error))
    with source() as loadable:
        return native.open_model(loadable, settings)


def start() -> None:
    """Start a worker ahead of its first use, so that it gets ready meanwhile."""
    if _POOL.usable():
        with suppress(_CannotStart):
            _POOL.give_back(_POOL.borrow())


class IsolatedModel:
    """A model in a worker. See `open_model`."""

    def __init__(self, source: Source, settings: SessionSettings, limits: RunLimits | None) -> None:
        self._source, self._settings, self._limits = source, settings, limits
        self._open()

    def _open(self) -> None:
        self._worker = _POOL.borrow()
        self._return = weakref.finalize(self, _POOL.give_back, self._worker)
        self._return.atexit = False
        with self._source() as loadable:
            source = loadable if isinstance(loadable, str) else pickle.PickleBuffer(loadable)
            names = self._worker.ask("open", source, self._settings, limits=self._limits)
        self.input_names, self.output_names = names

    def run(self, names: Sequence[str], feeds: Mapping[str, Any], limits: RunLimits | None) -> Sequence[Any]:
        """See `onnxslim.runtime.backend.Loaded`; after a worker has ended, the model is opened in another."""
        if not self._worker.usable():
            self._return.detach()
            self._open()
        question = "run", list(names), dict(feeds), limits
        found: Sequence[Any] = self._worker.ask(*question, limits=limits or self._limits)
        return found

    def end_profile(self) -> Path:
        """See `onnxslim.runtime.backend.Loaded`."""
        found: Path = self._worker.ask("end_profile", limits=self._limits)
        return found


_DOING = {
    "ready": "started",
    "open": "opened the model",
    "run": "ran the model",
    "close": "closed the model",
    "end_profile": "wrote its profile",
}


class _Fork:
    """A worker forked from this process, which saves imports; it has the part of Popen that is used here.

    Args:
        said: where what it prints goes.
    """

    def __init__(self, said: IO[bytes]) -> None:
        asked, asking = os.pipe()
        answered, answering = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            try:
                for number, place in ((asked, 0), (answering, 1), (said.fileno(), 2)):
                    os.dup2(number, place)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                serve()
            finally:
                os._exit(1)  # whatever happens, nothing of the caller goes on here
        os.close(asked)
        os.close(answering)
        self.stdin, self.stdout = os.fdopen(asking, "wb"), os.fdopen(answered, "rb")

    def poll(self) -> int | None:
        """Its exit code as of Popen, None while it runs."""
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # SIGCHLD is ignored, and the code lost, which Popen takes for 0
                ended, status = self.pid, 0
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        """The same, once it has ended.

        Raises:
            TimeoutExpired: it has not within so many seconds.
        """
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.001)
        return code

    def kill(self) -> None:
        """End it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def may_fork() -> bool:
    """Whether a fork is certain to find no lock that a thread holds, and a child to miss no thread.

    That is where nothing but this thread runs: NumPy's threads are idle, and BLAS is made for it. ONNX
    Runtime must not be there yet: imported, it may have threads, for which a process waits in the end.
    """
    return sys.platform == "linux" and threading.active_count() == 1 and "onnxruntime" not in sys.modules


def _spawned(said: IO[bytes]) -> subprocess.Popen[bytes]:
    # Without the imports that `site` may bring, the package is found where it lies.
    places = [*map(str, sys.path), str(Path(__file__).parents[2])]
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _BOOT, *places],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy only carries arrays there
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        pipesize=PIPE_BYTES,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )


class _Worker:
    """The process, as seen from the one that started it.

    Raises:
        _CannotStart: there is none.
    """

    # The most memory that a worker has taken without exceeding a limit, which is about what is taken beyond.
    most = 0

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `end`
        self._owner = os.getpid()
        self._ready = False
        self._process: subprocess.Popen[bytes] | _Fork
        try:
            self._process = _Fork(self._said) if alone and may_fork() else _spawned(self._said)
        except OSError as error:
            self._said.close()
            raise _CannotStart(one_line(error)) from error

    def usable(self) -> bool:
        """Whether it can be asked: it lives, and was not inherited by a fork."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, what: str, *details: Any, limits: RunLimits | None = None) -> Any:
        """What the worker answers; raises what it raises.

        Raises:
            WorkerEnded: it ended instead.
            LimitExceeded: it took more than it may, and was killed.
            _CannotStart: it has never been ready.
        """
        if not self._ready:
            self._hear_first()
        return self._answer(lambda: send(self._stdin(), (what, *details)), what, limits)

    def _hear_first(self) -> None:
        try:
            self._answer(lambda: None, "ready", START)
        except LoadError as error:
            raise _CannotStart(str(error)) from error
        self._ready = True

    def _answer(self, question: Callable[[], None], what: str, limits: RunLimits | None) -> Any:
        dog = _watch(limits, self._process.kill, self._peak)
        try:
            with dog or nullcontext():
                question()
                good, value = receive(self._stdout())
        except (EOFError, OSError):
            raise self._ended(_DOING[what], dog.exceeded if dog else "") from None
        except BaseException:  # the answer would be taken for that to the next question
            self.end()
            raise
        _Worker.most = max(_Worker.most, self._peak())
        if not good:
            raise value
        return value

    def _ended(self, doing: str, exceeded: str) -> LoadError:
        with suppress(subprocess.TimeoutExpired):  # it has closed its pipe, and is about to end
            self._process.wait(END_SECONDS)
        last = self._last_words()
        self.end()
        code = self._process.wait()
        if exceeded:
            return LimitExceeded(f"ONNX Runtime was stopped: it took more than {exceeded} while it {doing}")
        how = f"signal {-code}" if code < 0 else f"exit code {code:#x}" if code > 255 else f"exit code {code}"
        return WorkerEnded(f"ONNX Runtime ended with {how} while it {doing}{last and f': {last}'}")

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def forget(self) -> None:
        """Let go of the model it holds."""
        with suppress(OSError):
            send(self._stdin(), ("close",))

    def end(self) -> None:
        """End the process, whatever it is doing; harmless if it has ended."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            with suppress(OSError):  # what could not be sent any more
                pipe.close()  # type: ignore[union-attr]

    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _peak(self) -> int:
        return max(_Worker.most, peak_of(self._process.pid))


def _watch(limits: RunLimits | None, stop: Callable[[], None], peak: Callable[[], int]) -> Watchdog | None:
    if limits is None:
        return None
    most = RunLimits(limits.seconds + GRACE.seconds, limits.bytes + GRACE.bytes)
    return Watchdog(most, stop, peak, POLL_SECONDS)


class _Pool:
    """Workers that hold no model, to be borrowed one for each.

    Without locks: the garbage collector may give a worker back in the middle of anything, and a fork would
    inherit them closed. Single operations on lists are atomic, and an early timer costs a start.
    """

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._all: weakref.WeakSet[_Worker] = weakref.WeakSet()
        self._timer: threading.Thread | None = None
        self._needed = 0.0
        self._given_up = False

    def usable(self) -> bool:
        """Whether workers are wanted, and can be started as far as is known."""
        wanted = os.environ.get("ONNXSLIM_ISOLATE", "1") != "0"
        # A frozen application is its own interpreter: starting it would run the application.
        return wanted and not self._given_up and bool(sys.executable) and not getattr(sys, "frozen", False)

    def give_up(self, why: str) -> None:
        """Start no more workers, and say so."""
        self._given_up = True
        warnings.warn(f"models are run in this process, which may crash with them: {why}", stacklevel=2)

    def borrow(self) -> _Worker:
        """A worker for one model."""
        for worker in self._drain():
            if worker.usable():
                return worker
            worker.end()
        worker = _Worker()
        self._all.add(worker)
        return worker

    def give_back(self, worker: _Worker) -> None:
        """Keep a worker for the next model, for a while."""
        if not worker.usable():
            worker.end()
            return
        worker.forget()
        self._idle.append(worker)
        self._needed = time.monotonic()
        # One thread for all of them: models come by the thousand.
        if self._timer is None or not self._timer.is_alive():
            self._timer = threading.Thread(target=self._linger, daemon=True)
            self._timer.start()

    def _linger(self) -> None:
        while (left := self._needed + LINGER_SECONDS - time.monotonic()) > 0:
            time.sleep(left)
        self._timer = None  # before it closes: what is given back from here on is closed now or by the next
        self.close()

    def close(self) -> None:
        """End the workers that nobody has borrowed."""
        for worker in self._drain():
            worker.end()

    def end(self) -> None:
        """End all workers, at the end of this process."""
        for worker in list(self._all):
            worker.end()

    def _drain(self) -> Iterator[_Worker]:
        with suppress(IndexError):
            while True:
                yield self._idle.pop()


_POOL = _Pool()
atexit.register(_POOL.end)
