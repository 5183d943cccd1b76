"""A report to keep: one HTML file for people, which needs nothing else; JSON for programs; what builds show.

Names come from model files. They are escaped twice over: control characters as on a terminal, and everything
else by jinja2; and the page's own policy allows no script, no network and no style but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template

from onnxslim.engine.pipeline import Report, Step
from onnxslim.formats import clean, count, decibels, percent, quotient, size, to_json
from onnxslim.ir.files import write_text
from onnxslim.ir.model import Model, Source, load
from onnxslim.report import drawing, junit, markdown, require_form
from onnxslim.report.diff import Difference, PassDeeds, diff
from onnxslim.report.layers import (
    FULL_DECIBELS,
    ByteShare,
    LayerComparison,
    LayerFidelity,
    ValueSpread,
    analyse,
)
from onnxslim.report.text import (
    OUTPUT_HEAD,
    figure_lines,
    grouped_changes,
    output_cells,
    provider_lines,
    step_cells,
)
from onnxslim.runtime.machine import Machine, machine
from onnxslim.validation.verdict import Checked, Verdict
from onnxslim.version import version

# Of the JSON document; raised when a key changes its meaning or goes away.
SCHEMA = 4
MIN_BAR = 0.25  # percent of the longest one
MAX_NAMES = 200

# The page is whole without the script, which only sorts and filters it.
_HERE = resources.files("onnxslim.report")
STYLE, SCRIPT = ((_HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))


@dataclass(frozen=True)
class Document:
    """Everything a report has; its fields are the keys of the JSON (docs/reports.md).

    Attributes:
        schema: version of the JSON.
        version: of onnxslim.
        made: when, in UTC.
        machine: on what, with which versions.
        source: the file the model came from; empty if it was only in memory.
        metadata: what the result tells of itself: hashes of recipe and source.
        recipe: as `Recipe.to_dict` gives it; None if there was none.
        checks: what the result was to meet, and whether it does.
        analysis: None where nobody asked for it.
        difference: of the two graphs; likewise.
    """

    schema: int
    version: str
    made: str
    machine: Machine
    source: str
    metadata: Mapping[str, str]
    recipe: Mapping[str, Any] | None
    report: Report
    verdict: Verdict | None
    checks: tuple[Checked, ...]
    analysis: LayerComparison | None
    difference: Difference | None = None

    def to_json(self) -> str:
        """The JSON document."""
        return to_json(self)

    def to_html(self) -> str:
        """The page."""
        hashes = {"style_hash": _hash(STYLE), "script_hash": _hash(SCRIPT)}
        return _template().render(_cleaned(dict(_view(self))), style=STYLE, script=SCRIPT, **hashes)

    def to_markdown(self) -> str:
        """What to show of it where a build is summed up."""
        return markdown.page(self.source or "model", self.report, self.verdict, self.checks)

    def to_junit(self) -> str:
        """What was asked for, and whether it is met, as tests."""
        return junit.suites(self.source or "model", self.report, self.verdict, self.checks)

    def text(self, path: Path, form: str | None = None) -> str:
        """The document in the form of this suffix, or of the file's own.

        Raises:
            UsageError: there is no such form.
        """
        form = path.suffix if form is None else form
        require_form(path, form)
        forms: Mapping[str, Callable[[], str]] = {
            ".html": self.to_html,
            ".json": lambda: self.to_json() + "\n",
            ".md": self.to_markdown,
            ".xml": self.to_junit,
        }
        return forms[form]()

    def save(self, path: str | os.PathLike[str], form: str | None = None) -> None:
        """Write it as HTML, JSON, Markdown or JUnit's XML: in the form of this suffix, or of the file's own.

        Raises:
            UsageError: see `text`.
            SaveError: the file cannot be written.
        """
        write_text(Path(path), self.text(Path(path), form))


def document(
    before: Model,
    after: Model,
    report: Report,
    verdict: Verdict | None = None,
    *,
    recipe: Mapping[str, Any] | None = None,
    limits: Mapping[str, float] | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
) -> Document:
    """A report on a model and what became of it, layer by layer.

    Args:
        before: the original.
        after: the result.
        report: of the pipeline.
        verdict: of `validate`, if it was run.
        recipe: what was done, from `Recipe.to_dict`.
        limits: what the verdict is to meet; see `Verdict.require`.
        data: batches of inputs; the layers are compared on the first one.
    """
    feeds = next(iter(data or ()), None)
    known = brief(before, after, report, verdict, recipe=recipe, limits=limits)
    return replace(
        known, analysis=analyse(before, after, feeds), difference=diff(before, after, deeds(report))
    )


def difference_page(before: Source, after: Source, known: PassDeeds | None = None) -> Document:
    """A report of how two models differ, and of nothing else.

    Args:
        before, after, known: see `onnxslim.report.diff.diff`.

    Raises:
        LoadError: see there.
    """
    first, second = load(before), load(after)
    return replace(brief(first, second, Report()), difference=diff(first, second, known))


def deeds(report: Report) -> PassDeeds | None:
    """Which pass did what; None if none was run."""
    steps = ((s.name, [(c.node, c.action) for c in s.changes.changed]) for s in report.steps)
    return PassDeeds.of(steps) if report.steps else None


def brief(
    before: Model,
    after: Model,
    report: Report,
    verdict: Verdict | None = None,
    *,
    recipe: Mapping[str, Any] | None = None,
    limits: Mapping[str, float] | None = None,
) -> Document:
    """The same without a look at the layers."""
    own = {key: value for key, value in after.metadata.items() if key.startswith("onnxslim.")}
    return Document(
        schema=SCHEMA,
        version=version(),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        machine=machine(),
        source=before.source.name if before.source else "",
        metadata=own,
        recipe=recipe,
        report=report,
        verdict=verdict,
        checks=verdict.checked(**(limits or {})) if verdict else (),
        analysis=None,
    )


@cache
def _template() -> Template:
    text = (_HERE / "report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


def _hash(style: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _cleaned(value: Any) -> Any:
    """The same with every text made harmless, line breaks of ours excepted."""
    if isinstance(value, str):
        return "\n".join(map(clean, value.split("\n")))
    if isinstance(value, Mapping):
        return {key: _cleaned(item) for key, item in value.items()}
    return [_cleaned(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------ what is shown


def _view(shown: Document) -> Iterator[tuple[str, Any]]:
    verdict, analysis = shown.verdict, shown.analysis
    yield "title", shown.source or "model"
    yield "version", shown.version
    yield "made", shown.made
    yield "machine", str(shown.machine)
    yield "checks", [_check(each) for each in shown.checks]
    yield "failed", sum(bool(each.failures) for each in shown.checks)
    kept = [step.kept for step in shown.report.steps if step.kept is not None]
    yield "kept", f"The result {kept[-1]}" if kept else ""
    yield "origin", [f"{key.removeprefix('onnxslim.')} {value}" for key, value in _origin(shown.metadata)]
    yield "summary", list(_summary(shown))
    notes = (*shown.report.warnings, *shown.report.notes, *(verdict.notes if verdict else ()))
    yield "notes", list(dict.fromkeys(notes))
    yield "providers", list(_providers(verdict)) if verdict else []
    yield "steps", [_step(step) for step in shown.report.steps]
    yield "timeline", _timeline(shown.report.steps)
    yield "unfound", list(analysis.notes) if analysis else []
    yield "fidelity", _fidelity(analysis.fidelity) if analysis else []
    yield (
        "histograms",
        [_histogram(each) for each in analysis.distributions if each.counts] if analysis else [],
    )
    yield "operators", _sizes(analysis.operators) if analysis else []
    yield "layers", _sizes(analysis.layers) if analysis else []
    yield "recipe", _yaml(shown.recipe)
    yield "difference", drawing.view(shown.difference) if shown.difference is not None else None


def _check(checked: Checked) -> dict[str, Any]:
    return {
        "name": f"{checked.name} {checked.bound}",
        "lines": list(checked.failures) or ["met"],
        "failed": bool(checked.failures),
    }


def _origin(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from ((key, value) for key, value in metadata.items() if key.endswith("_sha256"))


def _summary(shown: Document) -> Iterator[tuple[str, str, str, str]]:
    if shown.verdict:
        figures = shown.verdict.before, shown.verdict.after
        macs = figures[0].macs, figures[1].macs
    elif shown.report.steps:
        steps = shown.report.steps
        figures = steps[0].before, steps[-1].after  # type: ignore[assignment]
        macs = steps[0].macs_before, steps[-1].macs_after
    elif shown.difference:
        figures, macs = shown.difference.sizes, (None, None)  # type: ignore[assignment]
    else:
        return
    for name in ("bytes", "parameters", "nodes"):
        before, after = (getattr(each, name) for each in figures)
        show = size if name == "bytes" else count
        yield name, show(before), show(after), quotient(after, before)
    if (sent := shown.report.download) is not None:
        for name in ("deflate", "zstd"):
            before, after = (getattr(each, name) for each in sent)
            if before is not None and after is not None:
                yield f"bytes with {name}", size(before), size(after), quotient(after, before)
    if macs != (None, None):
        yield "MACs of one sample", count(macs[0]), count(macs[1]), quotient(macs[1], macs[0])


def _providers(verdict: Verdict) -> Iterator[dict[str, Any]]:
    for provider in verdict.providers:
        tables = [(f"Result against original, {verdict.looked_at}", provider.outputs)]
        if provider.original:
            tables.append((f"Original against itself on {verdict.providers[0].target}", provider.original))
        yield {
            "name": provider.target,
            "lines": [line.strip() for line in provider_lines(provider, verdict)],
            "tables": [
                {"title": title, "head": OUTPUT_HEAD, "rows": [output_cells(row) for row in rows]}
                for title, rows in tables
            ],
        }


def _step(step: Step) -> dict[str, Any]:
    done = [line.strip() for line in grouped_changes(step.changes.changed)]
    skipped: dict[str, list[str]] = {}
    for skip in step.changes.skipped:
        skipped.setdefault(skip.reason, []).append(skip.node)
    return {
        "name": step.description,
        "cells": step_cells(step),
        "outcome": step.outcome,
        "failed": bool(step.error),
        "done": done + ([str(step.kept)] if step.kept else []) + figure_lines(step.changes.figures),
        "skipped": [
            {"reason": reason, "count": len(nodes), "names": _listed(nodes)}
            for reason, nodes in sorted(skipped.items(), key=lambda item: -len(item[1]))
        ],
    }


def _listed(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - MAX_NAMES} more" if len(nodes) > MAX_NAMES else ""
    return ", ".join(islice(nodes, MAX_NAMES)) + more


def _yaml(recipe: Mapping[str, Any] | None) -> str:
    return "" if recipe is None else yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


# --------------------------------------------------------------------------------------------- bars


def _bar(name: str, label: str, parts: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """One row of bars, one above the other; lengths are fractions of the widest."""
    height = 10 // len(parts)
    made = [
        {
            "kind": kind,
            "width": round(max(100 * length, MIN_BAR), 1) if length > 0 else 0,
            "height": height - 1,
            "y": index * height,
        }
        for index, (kind, length) in enumerate(parts)
    ]
    return {"name": _short(name), "label": label, "parts": made}


def _short(name: str) -> str:
    """A name that fits; the end of it tells more than its beginning."""
    shown = clean(name)
    return shown if len(shown) <= 52 else "…" + shown[-51:]


def _timeline(steps: Sequence[Step]) -> list[dict[str, Any]]:
    longest = max((step.seconds for step in steps), default=0.0) or 1.0
    return [_bar(step.name, f"{step.seconds:.2f}", [("after", step.seconds / longest)]) for step in steps]


def _sizes(shares: Sequence[ByteShare]) -> list[dict[str, Any]]:
    largest = max((max(share.before, share.after) for share in shares), default=0) or 1
    return [
        _bar(
            share.name,
            f"{size(share.before)} → {size(share.after)}",
            [("before", share.before / largest), ("after", share.after / largest)],
        )
        for share in shares
    ]


def _fidelity(layers: Sequence[LayerFidelity]) -> list[dict[str, Any]]:
    rows = []
    for layer in layers:
        length = 1.0 if layer.sqnr == math.inf else min(max(layer.sqnr / FULL_DECIBELS, 0.0), 1.0)
        kind = "poor" if layer.sqnr < 20 else "after"
        unit = "" if layer.sqnr == math.inf else " dB"
        rows.append(_bar(f"{layer.node} ({layer.op})", decibels(layer.sqnr) + unit, [(kind, length)]))
    return rows


def _histogram(found: ValueSpread) -> dict[str, Any]:
    # The square root keeps the tails, where ranges are decided, visible beside the peak.
    highest = math.sqrt(max(found.counts))
    span = (found.highest - found.lowest) or 1.0
    title = f"{found.what} of {_short(found.layer)}"
    limits = None
    if found.range is not None:
        start, end = (min(max((edge - found.lowest) / span, 0.0), 1.0) * 600 for edge in found.range)
        limits = (round(start, 1), round(end - start, 1))
        low, high = (f"{edge:.4g}" for edge in found.range)
        title += f"; integers stand for {low} to {high}, {percent(found.beyond)} beyond"
    return {
        "title": title,
        "lowest": f"{found.lowest:.4g}",
        "highest": f"{found.highest:.4g}",
        "heights": [round(130 * math.sqrt(value) / highest, 1) for value in found.counts],
        "range": limits,
    }
