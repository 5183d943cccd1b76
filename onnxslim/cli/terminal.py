"""What goes to the terminal: results on the standard output, messages and progress beside them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from onnxslim.engine.base import Progress
    from onnxslim.engine.forecast import Forecast
    from onnxslim.engine.pipeline import Report
    from onnxslim.validation.verdict import Verdict


# Seconds between two lines where there is no terminal; and how long something has to take for that to be said
# before.
EVERY, LONG = 10.0, 10.0


def log(line: str) -> None:
    """Print a message in one line on the standard error, made safe for a terminal."""
    from onnxslim.formats import clean

    print(f"onnxslim: {clean(' '.join(line.split()))}", file=sys.stderr)


def console(stderr: bool = False) -> Console:
    """Where to print: as wide as the terminal, or of a fixed width in a file or pipe."""
    from rich.console import Console

    from onnxslim.report.text import WIDTH

    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH)


def show(shown: Report | Verdict, quiet: bool) -> None:
    """Print a report or a verdict as text."""
    if quiet:
        return
    from onnxslim.report import text

    text.show(console(), shown)


def show_json(value: object) -> None:
    """Print a value as JSON."""
    from onnxslim.formats import to_json

    print(to_json(value))


def note(line: str, quiet: bool) -> None:
    """Print a message that nobody misses."""
    if not quiet:
        log(line)


class Meter:
    """How far a command is: which of its passes, what that is doing, how long it took and may take yet.

    Args:
        show: gets a line, and how much is done, of 1.
        forecast: what passes take; what is not in it counts nothing.
    """

    def __init__(self, show: Callable[[str, float], None], forecast: Forecast | None = None) -> None:
        self._show, self._forecast = show, forecast
        self._start = self._since = time.monotonic()
        self._at = -1  # the pass that is at work, or came to its end last
        self._between = True
        self._now = ""

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Take in how far something is."""
        names = self._forecast.names if self._forecast else ()
        following = self._at + (done == 0)
        if total == 1 and 0 <= following < len(names) and names[following] == what:
            self._at, self._since, self._now = following, time.monotonic(), ""
            self._between = done == 1
        else:
            self._now = f"{what} {done}" + (f" of {total}" if total is not None else "")
        self._show(self.line(), self.share())

    def line(self) -> str:
        """Where it is."""
        names = self._forecast.names if self._forecast else ()
        place = "" if self._between else f"{names[self._at]} ({self._at + 1} of {len(names)})"
        told = ": ".join(part for part in (place, self._now) if part)
        left = self._left()
        return ", ".join(part for part in (told, f"about {duration(left)} left" if left else "") if part)

    def share(self) -> float:
        """How much is done, of 1, by what was forecast and what it took so far."""
        left, gone = self._left(), time.monotonic() - self._start
        return 0.0 if left is None else gone / (gone + left) if gone + left else 1.0

    def _left(self) -> float | None:
        """Seconds of the passes to come, and of the one at work: as forecast, or a tenth of what it took."""
        if self._forecast is None:
            return None
        later = sum(self._forecast.seconds[self._at + 1 :])
        if self._between:
            return later
        took = time.monotonic() - self._since
        return later + max(self._forecast.seconds[self._at] - took, took / 10)


def duration(seconds: float) -> str:
    """Some time, as exactly as anybody knows it beforehand."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(quiet: bool, forecast: Forecast | None = None) -> Iterator[Progress | None]:
    """A bar on a terminal; elsewhere a line every ten seconds."""
    if quiet:
        yield None
        return
    if forecast is not None and forecast.total > LONG:
        log(f"this takes about {duration(forecast.total)}")
    stderr = console(stderr=True)
    if not stderr.is_terminal:
        yield Meter(_Seldom(), forecast)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr, transient=True) as bars:
        task = bars.add_task("", total=1.0 if forecast else None)
        yield Meter(lambda line, share: bars.update(task, description=line, completed=share), forecast)


class _Seldom:
    """Logs a line at most every so many seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, line: str, share: float) -> None:
        now = time.monotonic()
        if line and now - self._last >= EVERY:
            self._last = now
            log(f"{duration(now - self._start)}: {line}")
