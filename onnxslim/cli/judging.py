"""The commands that judge: two models side by side, what a model says of how it was made, and graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxslim.cli import terminal
from onnxslim.cli.parsing import GroupedCommand
from onnxslim.cli.running import (
    named_metric,
    require_reports,
    require_sheet,
    tell_data,
    warn_of_made_up_inputs,
)
from onnxslim.cli.words import (
    CommonWords,
    DataWords,
    Debug,
    InputShapes,
    Json,
    MetricName,
    Quiet,
    ReportFile,
    ReportWords,
    expanded,
    limits,
    plug,
)
from onnxslim.errors import UsageError

if TYPE_CHECKING:
    from onnxslim.runtime.targets import Target
    from onnxslim.validation.verdict import Verdict


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("validate", cls=GroupedCommand)(_validate)
    app.command("verify", cls=GroupedCommand)(_verify)
    app.command("diff")(_diff)


@dataclass(frozen=True)
class ComparisonWords(ReportWords):
    """How two models are compared."""

    rounds: Annotated[int, typer.Option(min=0, help="calls to time; 0 measures no latency")] = 30
    metric: MetricName = None
    input_shapes: InputShapes = None


@expanded
def _validate(
    data: DataWords,
    comparison: ComparisonWords,
    common: CommonWords,
    first: Annotated[
        Path | None, typer.Argument(metavar="A", readable=False, help="the original", show_default=False)
    ] = None,
    second: Annotated[
        Path | None,
        typer.Argument(metavar="B", readable=False, help="what was made of it", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.check.json",
            readable=False,
            help="instead of A and B: run a model that was made elsewhere on the target it was made for, "
            "with the check that was left beside it",
        ),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="where to run: cpu, cuda, …; may be repeated [default: all there are]"
        ),
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="fail unless met; as --check of `run`")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=0, help="threads per operator; 0 leaves it to ONNX Runtime")
    ] = 0,
) -> None:
    """Run two models side by side.

    Compares outputs, accuracy, latency and size, on every execution provider.
    """
    from onnxslim.validation import later

    plug(common.ep_library)
    required, run = limits(require), (provider or (), threads, common.custom_ops or ())
    if resume is not None:
        if first or data.settings() or comparison.reports() or comparison.metric or comparison.input_shapes:
            raise UsageError("--resume takes no models, data, report, metric or sizes: the check has them")
        verdict, asked = _resume(resume, *run, common.quiet)
        _tell(verdict, common)
        later.require(verdict, {**asked, **required})
        return
    if first is None or second is None:
        raise UsageError("give two models, or --resume and a check")
    require_reports(comparison.reports(), {path.resolve(): "a model" for path in (first, second)})
    require_sheet(data)
    _compare(first, second, data, _targets(*run), required, comparison, common).require(**required)


def _compare(
    first: Path,
    second: Path,
    data: DataWords,
    targets: Sequence[Target],
    required: Mapping[str, float],
    comparison: ComparisonWords,
    common: CommonWords,
) -> Verdict:
    """Compare two models, and tell what was found."""
    from onnxslim.ir.model import load
    from onnxslim.shapes.given import by_name
    from onnxslim.validation.compare import validate

    model, result, source = load(first), load(second), data.source()
    opened = source.read(model) if source else None
    tell_data(opened, data, common.quiet)
    feeds, labels = (opened.data, opened.labels) if opened else (None, None)
    with terminal.progress(common.quiet) as progress:
        verdict = validate(
            model,
            result,
            feeds,
            targets,
            labels=labels,
            metric=named_metric(comparison.metric),
            rounds=comparison.rounds,
            progress=progress,
            input_shapes=by_name(comparison.input_shapes or ()),
        )
    warn_of_made_up_inputs(verdict)
    _tell(verdict, common)
    if reports := comparison.reports():
        from onnxslim.engine.pipeline import Report
        from onnxslim.report import html

        told = html.document(model, result, Report(), verdict, limits=required, data=feeds)
        for each in reports:
            told.save(each.path, each.form)
    return verdict


def _targets(provider: Sequence[str], threads: int, libraries: Sequence[str]) -> list[Target]:
    """Where to run: what was named, or all there is."""
    from onnxslim.runtime.profile import available
    from onnxslim.runtime.targets import Target

    known = [Target.named(name) for name in provider] if provider else available()
    return [each.with_threads(threads).with_libraries(libraries) for each in known]


def _tell(verdict: Verdict, common: CommonWords) -> None:
    if common.json:
        terminal.show_json(verdict)
    else:
        terminal.show(verdict, common.quiet)


def _resume(
    check: Path, provider: Sequence[str], threads: int, libraries: Sequence[str], quiet: bool
) -> tuple[Verdict, Mapping[str, float]]:
    """Run what a check is for; returns what was found, and what the check asks for."""
    from onnxslim.validation import later

    if len(provider) > 1:
        raise UsageError("--resume runs a model on one target")
    asked = later.read(check)
    (target,) = _targets(provider or (asked.target,), threads, libraries)
    with terminal.progress(quiet) as progress:
        return later.resume(check, target, progress=progress), asked.limits


@expanded
def _verify(
    data: DataWords,
    common: CommonWords,
    model: Annotated[Path, typer.Argument(metavar="MODEL", readable=False, help="what was made")],
    original: Annotated[
        Path | None,
        typer.Option(metavar="FILE", readable=False, help="what it was made of, to compare with"),
    ] = None,
    provider: Annotated[str, typer.Option(metavar="NAME", help="where to run both")] = "cpu",
) -> None:
    """Check what a model says of how it was made, and of what was measured then.

    Commands and recipes write it into what they change. With --original and --data, outputs are measured
    again.
    """
    from onnxslim.ir.model import load
    from onnxslim.report import text
    from onnxslim.runtime.targets import Target
    from onnxslim.validation import certificate

    plug(common.ep_library)
    require_sheet(data)
    made, source = load(model), data.source()
    if source is not None and original is None:
        raise UsageError("--data says nothing without --original")
    opened = source.read(made) if source else None
    tell_data(opened, data, common.quiet)
    target = Target.named(provider).with_libraries(common.custom_ops or ())
    told = certificate.Certificate.read(made)
    before = None if original is None else load(original)
    found = certificate.verify(made, before, opened.data if opened else None, target)
    if common.json:
        terminal.show_json({"certificate": told, "findings": found})
    elif not common.quiet:
        text.show_findings(terminal.console(), told, found)
    certificate.require(found)


def _diff(
    first: Annotated[Path, typer.Argument(metavar="A", readable=False, help="a model")],
    second: Annotated[
        Path, typer.Argument(metavar="B", readable=False, help="what became of it, or another")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="save a page that draws what changed")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            readable=False,
            help="report of the run that made B: tells which pass did what "
            "[default: what B says of itself, which tells that of one pass alone]",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show how the graphs of two models differ.

    Nodes are matched by what they are connected to, whatever they and their constants are called.
    """
    from onnxslim.report.diff import PassDeeds, diff
    from onnxslim.report.text import lines

    known = None if report is None else PassDeeds.read(report)
    if html is not None:
        _require_page(html, (first, second))
        from onnxslim.report.html import difference_page

        page = difference_page(first, second, known)
        page.save(html)
        found = page.difference
    else:
        found = diff(first, second, known)
    if json:
        terminal.show_json(found)
    elif not quiet and found is not None:
        lines(terminal.console(), found.lines())


def _require_page(path: Path, models: Sequence[Path]) -> None:
    if path.suffix != ".html":
        raise UsageError(f"'{path}': the page is a file in .html")
    require_reports([ReportFile("--html", path, ".html")], {model.resolve(): "a model" for model in models})
