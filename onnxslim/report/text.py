"""Reports and verdicts as text for people.

What comes from model files is shown escaped, and nothing of it is ever read as markup.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxslim.formats import (
    arrow,
    clean,
    count,
    decibels,
    figure,
    names,
    percent,
    quotient,
    shortened,
    size,
)

if TYPE_CHECKING:
    from onnxslim.engine.base import Change, Figures, Skip
    from onnxslim.engine.pipeline import Report, Step
    from onnxslim.passes import Option
    from onnxslim.report.diff import Difference
    from onnxslim.report.inspect import Coverage, Inspection
    from onnxslim.runtime.profile import Offer
    from onnxslim.validation.certificate import Certificate, Finding
    from onnxslim.validation.verdict import OutputRow, ProviderVerdict, Verdict

WIDTH = 110
Rows: TypeAlias = "list[tuple[str, ...]]"
SHOWN_GROUPS = 20
OUTPUT_HEAD = ("output", "SQNR dB", "cosine", "max abs", "top-1", "equal")
STEP_HEAD = ("pass", "seconds", "nodes", "parameters", "bytes", "MACs")
SIZE_HEAD = ("", "before", "after", "after / before")


def text(report: Report) -> str:
    """A pipeline's report: what every pass did to the size of the model, and what it left alone, and why."""
    return _captured(lambda console: show_report(console, report))


def verdict_text(verdict: Verdict) -> str:
    """A verdict: both sizes, and per execution provider the outputs, accuracy and latency."""
    return _captured(lambda console: show_verdict(console, verdict))


def show(console: Console, shown: Report | Verdict) -> None:
    """Print a report or a verdict."""
    from onnxslim.engine.pipeline import Report

    if isinstance(shown, Report):
        show_report(console, shown)
    else:
        show_verdict(console, shown)


def show_report(console: Console, report: Report) -> None:
    """Print a report."""
    lines(console, (f"warning: {warning}" for warning in report.warnings))
    grid = table(*STEP_HEAD)
    for step in report.steps:
        grid.add_row(*step_cells(step))
    if report.steps:
        console.print(grid)
    if report.download is not None:
        before, after = report.download
        lines(console, (f"download: {before.told(after)}",))
    for step in report.steps:
        lines(console, _details(step))
    lines(console, (f"note: {note}" for note in report.notes))


def show_verdict(console: Console, verdict: Verdict) -> None:
    """Print a verdict."""
    grid = table(*SIZE_HEAD)
    for row in size_rows(verdict):
        grid.add_row(*row)
    console.print(grid)
    for provider in verdict.providers:
        _show_provider(console, provider, verdict)
    lines(console, (f"note: {note}" for note in verdict.notes))


def show_passes(console: Console, known: Mapping[str, tuple[str, Sequence[Option]]]) -> None:
    """Print what passes do and what their options mean."""
    for name, (summary, options) in known.items():
        console.print(Text(f"{name}: {summary}", style="bold"))
        grid = table("option", "values", "default", "meaning", left=4)
        for option in options:
            grid.add_row(*map(clean, (option.name, option.type, option.default, option.help)))
        console.print(grid if options else Text("  no options"))


def show_offers(console: Console, offers: Sequence[Offer]) -> None:
    """Execution providers: where they come from, what they run on, and whether they work."""
    shown = table("name", "from", "works", left=3)
    for each in offers:
        shown.add_row(each.target or "?", each.source or "-", "no" if each.problem else "yes")
    console.print(shown)
    for each in offers:
        about = (*each.devices, *([each.problem] if each.problem else ()), *each.notes)
        lines(console, (f"{each.target or each.source}: {line}" for line in about))


def show_findings(console: Console, told: Certificate, findings: Sequence[Finding]) -> None:
    """Print what a model says of itself, and whether that holds."""
    passes = "; ".join(each if isinstance(each, str) else _passed(each) for each in told.passes)
    lines(console, (f"made by onnxslim {told.version}: {passes}",))
    grid = table("", "holds", "", left=3)
    for each in findings:
        grid.add_row(each.what, {True: "yes", False: "NO", None: "-"}[each.holds], each.told)
    console.print(grid)


def _passed(told: Mapping[str, Any]) -> str:
    given = {name: ",".join(f"{key}={value}" for key, value in each.items()) for name, each in told.items()}
    return ", ".join(f"{name}:{options}" for name, options in given.items())


def show_inspections(console: Console, found: Sequence[Inspection], difference: Difference | None) -> None:
    """Print what models consist of side by side, and how the second differs from the first."""
    head = ("Model Name", *(each.name for each in found))
    told = ([row for row in rows if any(row[1:])] for rows in _sections(found))
    console.print(sectioned(head, list(told), left=len(head)))
    if difference is not None:
        lines(console, difference.lines())


def _sections(found: Sequence[Inspection]) -> Iterator[Rows]:
    yield [
        ("opsets", *(", ".join(f"{k or 'ai.onnx'} {v}" for k, v in each.opsets.items()) for each in found)),
        ("IR version", *(str(each.ir_version) for each in found)),
        ("made by", *(each.producer for each in found)),
    ]
    for kind, maps in (("IN", [e.inputs for e in found]), ("OUT", [e.outputs for e in found])):
        names = dict.fromkeys(name for each in maps for name in each)
        yield [(f"{kind}: {name}", *(each.get(name, "") for each in maps)) for name in names]
    ops = sorted({op for each in found for op in each.operators})
    yield [(op, *(str(each.operators.get(op, 0)) for each in found)) for op in ops]
    yield [
        ("nodes", *(count(each.nodes) for each in found)),
        ("parameters", *(count(each.parameters) for each in found)),
        ("MACs of one sample", *(_macs(each) for each in found)),
        ("  counted for", *(_counted(each) for each in found)),
        ("activations at their peak", *(size(each.memory.peak) for each in found)),
        ("  at", *(each.memory.node for each in found)),
        ("Model Size", *(size(each.bytes) for each in found)),
        *(
            (f"  constants of {dtype}", *(size(each.dtypes.get(dtype, 0)) for each in found))
            for dtype in dict.fromkeys(dtype for each in found for dtype in each.dtypes)
        ),
        ("  in data files", *(_sized(each.external) for each in found)),
        ("run in integers (Q/DQ)", *(_coverage(each.coverage) for each in found)),
        ("free sizes", *(_free(each.free) for each in found)),
        ("own functions", *(", ".join(each.functions) for each in found)),
        ("custom operators", *(", ".join(each.custom) for each in found)),
    ]


def _macs(found: Inspection) -> str:
    inside = f", without {found.uncounted} layers in bodies or functions" if found.uncounted else ""
    return count(found.macs) + inside


def _counted(found: Inspection) -> str:
    return ", ".join(
        f"{sizes} (assumed, see --input-shapes)" if made_up else sizes
        for sizes, made_up in found.counted.items()
    )


def _sized(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(value)}" for name, value in parts.items())


def _coverage(found: Coverage) -> str:
    if not found.total:
        return ""
    share = "" if found.macs is None else f", {percent(found.macs)} of MACs"
    weights = f", {found.weights_only} more weights stored so" if found.weights_only else ""
    return f"{found.quantized} of {found.total} layers{share}{weights}"


def _free(found: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(dict.fromkeys(name for names in found.values() for name in names))


def _show_provider(console: Console, provider: ProviderVerdict, verdict: Verdict) -> None:
    lines(console, [f"{provider.target}: second model against the first, {verdict.looked_at}"])
    console.print(_outputs(provider.outputs))
    if provider.original:
        lines(console, [f"{provider.target}: first model against itself on {verdict.providers[0].target}"])
        console.print(_outputs(provider.original))
    lines(console, provider_lines(provider, verdict))


def size_rows(verdict: Verdict) -> Iterator[tuple[str, ...]]:
    """Sizes of both models, and their quotients."""
    before, after = verdict.before, verdict.after
    for name, first, second in (
        ("bytes", before.bytes, after.bytes),
        ("parameters", before.parameters, after.parameters),
        ("MACs of one sample", before.macs, after.macs),
        ("nodes", before.nodes, after.nodes),
    ):
        show = size if name == "bytes" else count
        yield name, show(first), show(second), quotient(second, first)


def output_cells(row: OutputRow) -> tuple[str, ...]:
    """How close an output is, or why that is not known, below `OUTPUT_HEAD`."""
    if row.problem:
        return row.name, row.problem, "", "", "", ""
    figures = figure(row.cosine, ".6f"), figure(row.max_abs, ".3g"), percent(row.top1), percent(row.equal)
    return (row.name, decibels(row.sqnr), *figures)


def _outputs(rows: Sequence[OutputRow]) -> Table:
    grid = table(*OUTPUT_HEAD)
    for row in rows:
        grid.add_row(*output_cells(row))
    return grid


def provider_lines(provider: ProviderVerdict, verdict: Verdict) -> Iterator[str]:
    """Accuracy, metric, where operators ran, and latency on one provider, as far as they were measured."""
    if provider.accuracy is not None:
        first, second = provider.accuracy.before, provider.accuracy.after
        yield f"  accuracy {percent(first)} → {percent(second)} ({100 * (second - first):+.2f} points)"
    if provider.metric is not None:
        yield f"  metric {provider.metric.before:.6g} → {provider.metric.after:.6g}"
    if provider.placed is not None:
        before_after = (
            ", ".join(f"{count} on {name}" for name, count in each.items()) for each in provider.placed
        )
        yield f"  operators run: {' → '.join(before_after)}"
    if provider.latency is not None and provider.ratio is not None:
        before, after = provider.latency
        yield (
            f"  latency, batch of {verdict.batch}: {before.median:.3f} → {after.median:.3f} ms "
            f"({1 / provider.ratio:.2f} times as fast)"
        )


def step_cells(step: Step) -> tuple[str, ...]:
    """What a pass took, and what it made of the model's size, below `STEP_HEAD`."""
    return (
        step.name,
        f"{step.seconds:.2f}",
        arrow(count(step.before.nodes), count(step.after.nodes)),
        arrow(count(step.before.parameters), count(step.after.parameters)),
        arrow(size(step.before.bytes), size(step.after.bytes)),
        arrow(count(step.macs_before), count(step.macs_after)),
    )


def _details(step: Step) -> Iterator[str]:
    happened = step.outcome
    lines = [
        *([f"  {happened}"] if happened else []),
        *([f"  {step.kept}"] if step.kept is not None else []),
        *_limited(grouped_changes(step.changes.changed)),
        *_limited(_skips(step.changes.skipped)),
        *(f"  {line}" for line in figure_lines(step.changes.figures)),
    ]
    if lines:
        yield step.description
        yield from lines


def grouped_changes(changes: Iterable[Change]) -> list[str]:
    """Changes by the rule that made them; what was done is told where it is the same everywhere."""
    groups: dict[str, list[str]] = {}
    for change in changes:
        groups.setdefault(change.reason or change.action, []).append(change.action)
    lines = []
    for name, actions in _largest_first(groups):
        same = len(set(actions)) == 1 and actions[0] != name
        lines.append(f"  {len(actions)} × {name}" + (f": {actions[0]}" if same else ""))
    return lines


def figure_lines(figures: Figures) -> list[str]:
    """What a pass counted and measured, a line for each caption."""
    return [f"{caption}: {shortened(value)}" for caption, value in figures.captions()]


def _skips(skips: Iterable[Skip]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for skip in skips:
        groups.setdefault(skip.reason, []).append(skip.node)
    return [
        f"  left alone {len(nodes)} × {reason} ({names(nodes)})" for reason, nodes in _largest_first(groups)
    ]


def _largest_first(groups: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _limited(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:SHOWN_GROUPS]
    if len(lines) > SHOWN_GROUPS:
        yield f"  and {len(lines) - SHOWN_GROUPS} more kinds, see the JSON report"


class PlainTable(Table):
    """A table that shows its cells as they are: nothing in them is read as markup or steers the terminal."""

    def add_row(self, *cells: Any, style: Any = None, end_section: bool = False) -> None:
        """Add a row of texts."""
        plain = (Text(clean(cell)) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, style=style, end_section=end_section)


def table(*columns: str, left: int = 1) -> PlainTable:
    """A table whose first `left` columns are words and whose others are figures."""
    grid = PlainTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        words = index < left
        grid.add_column(
            Text(clean(column)),
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
            min_width=8 if words else None,
        )
    return grid


def sectioned(head: Sequence[str], sections: Sequence[Rows], *, left: int = 1) -> PlainTable:
    """A table with a line after each section but the last."""
    grid = table(*head, left=left)
    for rows in sections:
        for index, row in enumerate(rows):
            grid.add_row(*row, end_section=index == len(rows) - 1 and rows is not sections[-1])
    return grid


def lines(console: Console, texts: Iterable[str]) -> None:
    """Print lines that come from elsewhere as they are, whatever their length."""
    for line in texts:
        console.print(Text(clean(line)), soft_wrap=True)


def _captured(show: Any) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
