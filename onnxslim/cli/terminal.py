"""What goes to the terminal: results on the standard output, messages and progress beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from onnxslim.engine.base import Progress
    from onnxslim.engine.pipeline import Report
    from onnxslim.validation.verdict import Verdict


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


@contextmanager
def progress(quiet: bool) -> Iterator[Progress | None]:
    """Bars for long steps, on a terminal only."""
    stderr = console(stderr=True)
    if quiet or not stderr.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
