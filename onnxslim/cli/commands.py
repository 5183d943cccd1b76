"""The commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from onnxslim import passes
from onnxslim.cli import judging, reducing, searching, terminal
from onnxslim.cli.parsing import Commands, PassCommand, RunCommand, SlimCommand
from onnxslim.cli.running import (
    make_folder,
    process,
    require_writable,
)
from onnxslim.cli.words import (
    DataWords,
    Debug,
    EpLibrary,
    InputShapes,
    Json,
    ModelWords,
    Quiet,
    SavePlan,
    expanded,
    plug,
)
from onnxslim.errors import UsageError

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make ONNX models smaller and faster, and prove that they still work.\n\n"
    "`onnxslim IN OUT` is short for `onnxslim slim IN OUT`.",
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-v", is_eager=True, callback=lambda given: _version(given), help="print the version"
        ),
    ] = False,
) -> None: ...


def _version(given: bool) -> None:
    if given:
        import onnxslim

        print(f"onnxslim {onnxslim.__version__}")
        raise typer.Exit


@app.command("slim", cls=SlimCommand)
@expanded
def _slim(
    job: ModelWords,
    data: DataWords,
    ctx: typer.Context,
    input_shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:1,3,224,224 …", help="fix the sizes of inputs"),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(metavar="TENSOR[:DTYPE] …", help="cut the model: its inputs are these tensors"),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(metavar="TENSOR[:DTYPE] …", help="cut the model: its outputs are these tensors"),
    ] = None,
    skip_optimizations: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME …", help="parts to leave out, by OnnxSlim's names"),
    ] = None,
    skip_fusion_patterns: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME …", help="rules to leave out, by OnnxSlim's names or ours"),
    ] = None,
    size_threshold: Annotated[
        int | None, typer.Option(metavar="BYTES", help="by how much folding may make the model larger")
    ] = None,
    no_shape_infer: Annotated[
        bool, typer.Option("--no-shape-infer", help="do not infer new output shapes for --input-shapes")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="precision to convert to: fp16, fp32")
    ] = None,
    save_as_external_data: Annotated[
        bool, typer.Option("--save-as-external-data", help="the same as --external-data")
    ] = False,
    model_check: Annotated[
        bool,
        typer.Option("--model-check", help="compare the outputs of the result once more before saving it"),
    ] = False,
    model_check_inputs: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:1,3,224,224|NAME:FILE.npy …", help="inputs to compare on"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="log what is done")] = False,
) -> None:
    """Simplify a model, same results.

    Takes the options of OnnxSlim's command line too; --inspect shows what models consist of instead.
    """
    from onnxslim.compat import slim

    asked = slim.Request(
        input_shapes=tuple(input_shapes or ()),
        inputs=tuple(inputs or ()),
        outputs=tuple(outputs or ()),
        no_shape_infer=no_shape_infer,
        skip_optimizations=tuple(skip_optimizations or ()),
        skip_fusion_patterns=tuple(skip_fusion_patterns or ()),
        size_threshold=size_threshold,
        dtype=dtype,
        model_check=model_check,
        model_check_inputs=tuple(model_check_inputs or ()),
    )
    if verbose:
        slim.be_verbose()
    job = replace(job, external_data=job.external_data or save_as_external_data)
    process(job, data, asked.passes(ctx.obj), asked=asked)


@app.command("inspect")
def _inspect(
    models: Annotated[
        list[Path], typer.Argument(metavar="IN…", readable=False, help="the models, shown side by side")
    ],
    dump_to_disk: Annotated[
        bool,
        typer.Option("--dump-to-disk", help="also write the nodes of IN.onnx to IN.onnx_model_info.csv here"),
    ] = False,
    input_shapes: InputShapes = None,
    node_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="also write figures of the first model's nodes there, for Google's Model Explorer: "
            "macs.json, bytes.json; made if it is not there",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", readable=False, help="report to take decibels.json from"),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="run the first model, for microseconds.json")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what models consist of and need.

    Of two models, also tells how the second differs from the first, as `onnxslim diff` does.
    """
    from onnxslim import utils
    from onnxslim.report import diff, inspect, text
    from onnxslim.shapes.given import by_name

    if dump_to_disk:
        require_writable(Path("model_info.csv"))
    if (report or profile) and node_data is None:
        raise UsageError("--report and --profile say nothing without --node-data")
    if node_data is not None:
        make_folder(node_data)
    sizes = by_name(input_shapes or ())
    found = [inspect.inspect(path, sizes) for path in models]
    difference = diff.diff(models[0], models[1]) if len(models) == 2 else None
    if json:
        terminal.show_json({"models": found, "difference": difference})
    else:
        text.show_inspections(terminal.console(), found, difference)
    if node_data is not None:
        _write_node_data(node_data, models[0], sizes, report, profile)
    for path in models if dump_to_disk else ():
        written = utils.dump_model_info_to_disk(utils.summarize_model(path))
        terminal.log(f"model info written to {written}")


def _write_node_data(
    folder: Path, model: Path, sizes: Mapping[str, tuple[int, ...]], report: Path | None, profile: bool
) -> None:
    from onnxslim.formats import to_json
    from onnxslim.ir.files import write_text
    from onnxslim.ir.model import load
    from onnxslim.report.node_data import node_data

    for figure, found in node_data(load(model), sizes, report, profile).items():
        path = folder / f"{figure}.json"
        write_text(path, to_json(found))
        terminal.log(f"{path}: {len(found['results'])} nodes")


@app.command("prune", cls=PassCommand)
@expanded
def _prune(
    job: ModelWords,
    data: DataWords,
    ctx: typer.Context,
    families: Annotated[
        bool, typer.Option("--families", help="only list what can be removed together, and what that saves")
    ] = False,
    explain: Annotated[
        list[str] | None,
        typer.Option(metavar="TENSOR", help="only tell what may be removed of a tensor, or what pins it"),
    ] = None,
    save_plan: SavePlan = None,
    input_shapes: InputShapes = None,
) -> None:
    """Remove channels, heads and hidden units.

    How far to go is one of --macs, --params, --ratio and --plan  [one is required].

    Which and how many is measured on --data, and what is left is fitted to it; without data the norms of
    weights decide, and nothing is fitted.
    """
    from onnxslim.cli import pruning

    if families or explain:
        pruning.tell(job.source, families, explain or (), job.json, input_shapes or ())
        return
    chain = [passes.create("prune", ctx.obj)]
    process(job, data, chain, save_plan=save_plan, input_shapes=input_shapes or ())


# What commands named after passes do, for the list of commands; the pass itself tells its options.
_SUMMARIES = {
    "quantize": "Make a model run in 8-bit integers.\n\nRanges are calibrated on --data.",
    "factorize": "Replace large layers by products of smaller ones.",
    "cluster": "Store weights as codes of a few bits into tables.\n\nThey are fitted to --data.",
    "sparsify": "Make weights zero.\n\nThe others are fitted to --data to make up for them.",
    "distill": "Learn weights from what the original, or --teacher, makes of --data.\n\nNeeds PyTorch.",
    "half": "Compute in half precision where the ranges of --data allow it.",
    "inline": "Replace calls of the model's own functions by what these do.",
    "unfuse": "Write ONNX Runtime's own operators in standard ones.",
    "legalize": "Write a model in operators that are there where it is to run.",
}
# Parts of slim, and commands that take more options than their pass.
_NO_COMMANDS = ("slim", "prune", "fold", "eliminate", "fuse", "dedupe", "dead")


# Without what these do there is no use in going on, unless --on-error says otherwise.
_NEEDED = ("legalize",)
# Those that take --plan, known without loading them.
_PLANNED = ("factorize", "quantize", "cluster", "sparsify")


def _add_pass_command(name: str) -> None:
    @expanded
    def run(job: ModelWords, data: DataWords, ctx: typer.Context, input_shapes: InputShapes = None) -> None:
        if name in _NEEDED and job.on_error is None:
            job = replace(job, on_error="raise")
        process(job, data, [passes.create(name, ctx.obj)], input_shapes=input_shapes or ())

    @expanded
    def plan(
        job: ModelWords,
        data: DataWords,
        ctx: typer.Context,
        save_plan: SavePlan = None,
        input_shapes: InputShapes = None,
    ) -> None:
        chain = [passes.create(name, ctx.obj)]
        process(job, data, chain, save_plan=save_plan, input_shapes=input_shapes or ())

    run = plan if name in _PLANNED else run
    run.__doc__ = _SUMMARIES.get(name, f"Run the pass '{name}'; see `onnxslim passes {name}`.")
    app.command(name, cls=PassCommand)(run)


for _name in passes.names():
    if _name not in _NO_COMMANDS:
        _add_pass_command(_name)


@app.command("run", cls=RunCommand)
@expanded
def _run(
    job: ModelWords,
    data: DataWords,
    chain: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", "-p", metavar="NAME[:OPTION=VALUE,…]", help="a pass; repeat for one after the other"
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", readable=False, help="a recipe; may also simply come first, before IN"
        ),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="let the recipe name files outside its own folder")
    ] = False,
    input_shapes: InputShapes = None,
) -> None:
    """Run one pass after the other, or a recipe.

    For example: onnxslim run IN OUT --data calib.npz -p slim -p quantize:observer=mse,exclude=/head/*

    Or: onnxslim run recipe.yaml IN OUT
    """
    if bool(chain) == bool(recipe):
        raise UsageError("give either passes (-p, --pass) or a recipe to run")
    steps = [passes.parse(text) for text in chain or ()]
    process(job, data, steps, recipe=recipe, trust=trust, input_shapes=input_shapes or ())


searching.register(app)


judging.register(app)
reducing.register(app)


@app.command("providers")
def _providers(
    ep_library: EpLibrary = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the execution providers, and which of them work here.

    Each one that is installed runs a small model, in a process of its own.
    """
    plug(ep_library)
    from onnxslim.report.text import show_offers
    from onnxslim.runtime.profile import offers

    found = offers()
    if json:
        terminal.show_json(found)
    else:
        show_offers(terminal.console(), found)


@app.command("passes")
def _passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a pass to tell about")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes with all their options."""
    from onnxslim.report.text import show_passes

    chosen = [passes.get(each) for each in ([name] if name else passes.names())]
    known = {cls.name: (passes.summary(cls), passes.options_of(cls)) for cls in chosen}
    if json:
        terminal.show_json(
            {each: {"summary": text, "options": found} for each, (text, found) in known.items()}
        )
    else:
        show_passes(terminal.console(), known)


@app.command("demo")
def _demo(
    model: Annotated[
        Literal["resnet", "mobilenet", "vit", "all"], typer.Option(help="which of the models that come along")
    ] = "all",
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="save the results here; made if it is not there")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """See it work on models that come along.

    Slims, quantizes and validates them on real images with their true labels.
    """
    from onnxslim.cli import demo

    with terminal.progress(quiet) as progress:
        outcomes = demo.run(demo.MODELS if model == "all" else (model,), keep=keep, progress=progress)
    if json:
        terminal.show_json(outcomes)
    elif not quiet:
        demo.show(terminal.console(), outcomes)
