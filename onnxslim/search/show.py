"""Trials and results of a search as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.console import Console

from onnxslim.formats import decibels, figure, percent
from onnxslim.report.text import lines, table
from onnxslim.search.goals import TrialFigures
from onnxslim.search.outcome import SearchResult
from onnxslim.search.trials import SearchTrial

HEAD = ("trial", "SQNR dB", "lost", "latency", "size", "download", "MACs", "seconds")


def show_trials(console: Console, trials: Sequence[SearchTrial], marked: Collection[str]) -> None:
    """Print what was tried, with a star at those whose keys are marked; what failed, and why, comes last."""
    grid = table(*HEAD)
    for trial in trials:
        if trial.figures is not None:
            name = f"{trial.label} *" if trial.key in marked else trial.label
            grid.add_row(name, *_cells(trial.figures))
    console.print(grid)
    lines(console, (f"not made: {each.label}: {each.error}" for each in trials if each.figures is None))


def show_result(console: Console, found: SearchResult) -> None:
    """Print what a search has tried and chosen."""
    show_trials(console, found.trials, [] if found.best is None else [found.best.key])
    lines(console, _chosen(found))


def _chosen(found: SearchResult) -> Iterator[str]:
    asked = ", ".join(f"{name} {value:g}" for name, value in found.goals.given.items())
    yield f"asked for: {asked}"
    if found.best is not None and found.verified is not None:
        told = zip(HEAD[1:-1], _cells(found.verified), strict=False)
        figures = ", ".join(f"{name} {value}" for name, value in told if value)
        seen = (
            f"{found.samples} samples that nothing was chosen by"
            if found.samples
            else "what it was chosen by"
        )
        yield f"chosen: {found.best.label}; on {seen}: {figures}"
    yield from (f"note: {note}" for note in found.notes)


def _cells(figures: TrialFigures) -> tuple[str, ...]:
    shares = (figures.latency, figures.size, figures.download, figures.macs)
    return (
        decibels(figures.sqnr),
        percent(figures.drop),
        *(figure(share, ".3f") for share in shares),
        f"{figures.seconds:.0f}",
    )
