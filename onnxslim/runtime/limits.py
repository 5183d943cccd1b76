"""Limits of time and memory on what cannot be trusted to end."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnxslim.errors import LoadError

POLL_SECONDS = 0.002


@dataclass(frozen=True)
class RunLimits:
    """What a run may take.

    Attributes:
        seconds: of wall-clock time.
        bytes: of memory beyond what the process has taken so far at its peak; not limited on Windows.
    """

    seconds: float
    bytes: int


class LimitExceeded(LoadError):
    """A run was stopped because it took more than its limits."""


class Watchdog:
    """While it is open, a thread looks at the clock and at memory.

    Args:
        limits: of what happens meanwhile.
        stop: called once from the thread when a limit is exceeded; has to end what happens.
        peak: most memory so far, in bytes, of what is watched; this process by default.
        every: seconds from one look to the next.

    Attributes:
        exceeded: the limit that was, in words; empty if none was.
    """

    def __init__(
        self,
        limits: RunLimits,
        stop: Callable[[], None],
        peak: Callable[[], int] | None = None,
        every: float = POLL_SECONDS,
    ) -> None:
        self._limits, self._stop, self._peak, self._every = limits, stop, peak or _peak, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.exceeded = ""

    def __enter__(self) -> Watchdog:
        self._end, self._most = time.monotonic() + self._limits.seconds, self._peak() + self._limits.bytes
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(self._every):
            if time.monotonic() > self._end:
                self.exceeded = f"{self._limits.seconds:g} seconds"
            elif self._peak() > self._most:
                self.exceeded = f"{self._limits.bytes} bytes"
            if self.exceeded:
                self._stop()
                return


def _peak() -> int:
    """Most memory the process has had at a time, in bytes; 0 where it cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(process: int) -> int:
    """Most memory another process has had at a time, in bytes; 0 but on Linux, which alone tells."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except (OSError, ValueError):
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
