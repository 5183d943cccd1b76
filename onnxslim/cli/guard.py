"""A command in a process of its own, so that what ends it natively costs one pass and not all of the work.

Candidates inside lossy passes run in the process of the command, many times and on much data; a crash of ONNX
Runtime would take everything along without a word. So a process that does nothing else waits for the command.
If a signal ends it, the command is run again without the pass that was at work, which counts as failed.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from onnxslim.cli import terminal
from onnxslim.engine.journal import Journal
from onnxslim.errors import InvalidGraph
from onnxslim.runtime.isolated import may_fork

# How native code ends; and what systems do that run out of memory.
CRASHES = frozenset(("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGKILL"))
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP")
_NOBODY = -1
_PR_SET_PDEATHSIG = 1  # prctl(2)
# An interruption may come twice, from the terminal and from the process that waits: within so many seconds.
_ECHO = 0.5

# That of the command that runs in this process.
journal = Journal()


class _SharedJournal(Journal):
    """A journal in memory that parent and child share."""

    def __init__(self) -> None:
        super().__init__()
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.note(None)

    def note(self, position: int | None) -> None:
        self._page[:8] = struct.pack("q", _NOBODY if position is None else position)

    def last(self) -> int | None:
        """The pass that was at work when somebody last wrote; None if none was."""
        (found,) = struct.unpack("q", self._page[:8])
        return None if found == _NOBODY else int(found)


def guarded(command: Callable[[], int]) -> int:
    """The exit code of a command, run in a child process where one can be forked.

    It returns in both processes: in the child with the command's own code, in the one that waits with what
    became of it. Must be called before anything starts threads.
    """
    if not may_fork():
        return command()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where that is ignored, exit codes are lost
    shared = _SharedJournal()
    while True:
        child = _forked()
        if child is None:
            _adopt(shared)
            return command()
        code = _waited(child)
        if code >= 0:
            return code
        number, position = signal.Signals(-code), shared.last()
        how = f"signal {number.value} ({signal.strsignal(number)})"
        if number.name not in CRASHES:
            return 128 + number
        if position is None or position in shared.ended:
            terminal.log(f"error: the process was ended by {how}; please report this with the model")
            return InvalidGraph.exit_code
        terminal.log(f"warning: a pass ended the process with {how}; starting again without it")
        shared.ended[position] = how
        shared.note(None)


def _forked() -> int | None:
    """The process id of a child, in this process; None in the child, and nothing written twice."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork() or None


def _adopt(shared: _SharedJournal) -> None:
    """Be the child: with that journal, and no longer than the process that waits."""
    global journal
    journal = shared
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _once())
    with suppress(OSError, AttributeError):  # a C library without it: then the child finishes its work
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _once() -> Callable[[int, FrameType | None], None]:
    """A handler that lets an interruption through, but not its echo."""
    last = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _ECHO:
            signal.default_int_handler(number, frame)

    return interrupt


def _waited(child: int) -> int:
    """The exit code of a child, negative if a signal ended it; signals to this process reach it, too."""

    def forward(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    before: dict[int, Any] = {}
    for passed_on in (signal.Signals[name] for name in FORWARDED):
        if signal.getsignal(passed_on) is not signal.SIG_IGN:
            before[passed_on] = signal.signal(passed_on, forward)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
