"""The commands that search for the best small model, and that show what searches have tried."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from onnxslim.cli import terminal
from onnxslim.cli.parsing import GroupedCommand
from onnxslim.cli.running import named_metric, require_sheet, require_writable, tell_data
from onnxslim.cli.words import (
    CommonWords,
    DataWords,
    Debug,
    InputShapes,
    Json,
    MetricName,
    expanded,
    plug,
)
from onnxslim.errors import UsageError
from onnxslim.runtime import isolated

if TYPE_CHECKING:
    from onnxslim.search import Goals, SearchResult

CostChoice = Literal["latency", "size", "download", "macs"]


@dataclass(frozen=True)
class GoalWords:
    """What a search is asked for."""

    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="LOSS",
            help="how much less the metric may be, or accuracy on labels; without them, the share of samples "
            "whose largest output may be another",
        ),
    ] = None
    require_sqnr: Annotated[
        float | None, typer.Option(metavar="DB", help="signal to noise that the outputs have to keep")
    ] = None
    latency: Annotated[
        float | None, typer.Option(metavar="SHARE", help="time it may take, of the original's")
    ] = None
    size: Annotated[float | None, typer.Option(metavar="SHARE", help="bytes the file may have")] = None
    download: Annotated[
        float | None, typer.Option(metavar="SHARE", help="bytes it may have once it is deflated")
    ] = None
    macs: Annotated[float | None, typer.Option(metavar="SHARE", help="multiply-accumulates it may need")] = (
        None
    )

    def goals(self) -> Goals:
        """As a search takes them."""
        from onnxslim.search import Goals

        return Goals(**vars(self))


@dataclass(frozen=True)
class SearchWords:
    """How to search, by the names of `onnxslim.optimize`."""

    target: Annotated[str, typer.Option(metavar="NAME", help="execution provider the result is made for")] = (
        "cpu"
    )
    effort: Annotated[Literal["quick", "normal", "thorough"], typer.Option(help="how much to try")] = "normal"
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="begin no trial any more after that")
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="keep trials there, with recipes that make them again; go on from those there"
        ),
    ] = None
    jobs: Annotated[int, typer.Option(min=1, help="processes that make trials at the same time")] = 1
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="where trials are made: processes of this machine, or workers of a cluster: "
            "dask=tcp://HOST:8786, ray, ray=ADDRESS",
        ),
    ] = "processes"
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            help="learn weights again where something was left away; takes PyTorch and thousands of samples",
        ),
    ] = False
    seed: Annotated[int, typer.Option(help="of everything random")] = 0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("auto", cls=GroupedCommand)(_auto)
    app.command("trials", cls=GroupedCommand)(_trials)


@expanded
def _auto(
    source: Annotated[Path, typer.Argument(metavar="IN", readable=False, help="the model")],
    goals: GoalWords,
    search: SearchWords,
    data: DataWords,
    common: CommonWords,
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="where to save the result")] = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="samples to judge what was chosen by, read as --data is [default: an eighth of --data]",
        ),
    ] = None,
    metric: MetricName = None,
    input_shapes: InputShapes = None,
) -> None:
    """Search for what makes a model smallest and fastest.

    Without goals: as fast as can be with 99 % of the decisions kept, or 20 dB where no output decides or
    less than 100 samples choose. With budgets (--latency, --size, --download, --macs): what loses least
    within them.
    """
    plug(common.ep_library)
    require_sheet(data)
    if output is not None:
        require_writable(output)
    wanted, named = goals.goals(), data.source()
    if named is None:
        raise UsageError("a search measures what is lost: give it --data")
    isolated.start()
    from onnxslim.ir.model import load
    from onnxslim.search import optimize
    from onnxslim.search.show import show_result
    from onnxslim.shapes.given import by_name

    model = load(source)
    tell_data(named.read(model), data, common.quiet)
    with terminal.progress(common.quiet) as progress:
        found = optimize(
            model,
            named,
            wanted,
            test=None if test is None else replace(named, path=test),
            metric=named_metric(metric),
            progress=progress,
            libraries=tuple(common.custom_ops or ()),
            input_shapes=by_name(input_shapes or ()),
            **vars(search),
        )
    if common.json:
        terminal.show_json(_told(found))
    elif not common.quiet:
        show_result(terminal.console(), found)
    found.require()
    if output is None:
        terminal.note("nothing was saved: give OUT to save the result", common.quiet)
    else:
        found.model.save(output)
        terminal.note(f"saved {output}", common.quiet)


def _told(found: SearchResult) -> dict[str, Any]:
    """What programs are told."""
    names = ("best", "verified", "samples", "goals", "trials", "problem", "notes")
    return {name: getattr(found, name) for name in names}


@expanded
def _trials(
    folder: Annotated[Path, typer.Argument(metavar="DIR", readable=False, help="what --work named")],
    cost: Annotated[CostChoice, typer.Option(help="what the front is of, beside what is kept")] = "latency",
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="draw what trials cost and keep, with the fronts")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what searches have tried.

    DIR/KEY/recipe.yaml makes a trial again: onnxslim run DIR/KEY/recipe.yaml IN OUT --trust; with the same
    --data, if that was MODULE:FUNCTION
    """
    from onnxslim.ir.files import write_text
    from onnxslim.search import front, trials_in
    from onnxslim.search.chart import chart
    from onnxslim.search.show import show_trials

    if svg is not None:
        require_writable(svg)
    found = trials_in(folder)
    best = front(found, cost)
    if svg is not None:
        write_text(svg, chart(found))
    if json:
        terminal.show_json({"trials": found, "front": [each.key for each in best]})
        return
    show_trials(terminal.console(), found, [each.key for each in best])
