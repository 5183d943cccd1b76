"""The command line: words in, a pipeline run, words out. Everything heavy is imported when it is needed."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from onnxslim import terminal
from onnxslim.errors import OnnxSlimError, SaveError, UsageError

if TYPE_CHECKING:
    from onnxslim.calibration.data import CalibrationData
    from onnxslim.compat import Request
    from onnxslim.graph import Array
    from onnxslim.model import Model
    from onnxslim.pipeline import Pass, Progress, Report, Result
    from onnxslim.runtime import Target
    from onnxslim.verdict import Verdict

T = TypeVar("T")

INTERRUPTED = 130
IO_ERROR = SaveError.exit_code
INTERNAL_ERROR = 1
DEFAULT_COMMAND = "slim"
# Options that OnnxSlim takes several values after.
_SEVERAL = (
    "--input-shapes",
    "--inputs",
    "--outputs",
    "--skip-optimizations",
    "--skip-fusion-patterns",
    "--model-check-inputs",
)

# Typer brings a click of its own or uses the installed one; either way this is its UsageError.
_ClickUsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; those of the process by default.

    Returns:
        The exit code: 0 ok, 2 usage, 3 bad model, 4 validation failed, 5 calibration data, 6 files,
        7 provider, 130 interrupted, 1 for a mistake of ours.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            # Typer may itself turn an interruption into this code.
            command = typer.main.get_command(app)
            code = command.main(words or ["--help"], prog_name="onnxslim", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if "--debug" in words:
                traceback.print_exc()
            return _failed(error)
    if code == INTERRUPTED:
        terminal.log("interrupted")
    return (code or 0) if words else UsageError.exit_code


def _failed(error: Exception) -> int:
    """Say in one line what went wrong; returns the exit code."""
    if isinstance(error, OnnxSlimError):
        code, message = error.exit_code, str(error)
    elif isinstance(error, _ClickUsageError):
        code, message = UsageError.exit_code, _usage_message(error)
    elif isinstance(error, OSError):
        code, message = IO_ERROR, f"{error.filename or 'file'}: {error.strerror or error}"
    else:
        code = INTERNAL_ERROR
        message = f"internal error, {type(error).__name__}: {error} (run with --debug for the traceback)"
    terminal.log(f"error: {message}")
    return code


def _usage_message(error: Any) -> str:
    possible = get_close_matches(
        getattr(error, "option_name", ""), getattr(error, "possibilities", None) or (), 1
    )
    if possible:
        return f"no such option: {error.option_name}; did you mean {possible[0]}?"
    return str(error.format_message())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    terminal.log(f"warning: {message}")


# ------------------------------------------------------------------------------------------------ commands


class _Commands(TyperGroup):
    """A first word that is no command belongs to the default command: `onnxslim in.onnx out.onnx`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {*self.commands, *(name for param in self.get_params(ctx) for name in param.opts)}
        if "--inspect" in args and (args[0] == DEFAULT_COMMAND or args[0] not in own):
            # As OnnxSlim spells it.
            models = args[1:] if args[0] == DEFAULT_COMMAND else args
            args = ["inspect", *(word for word in models if word != "--inspect")]
        if args and args[0] not in own:
            self._require_no_typo(args[0])
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def _require_no_typo(self, word: str) -> None:
        close = get_close_matches(word, self.commands, n=1)
        if close and not os.path.exists(word):
            raise UsageError(f"there is no command or file '{word}'; did you mean '{close[0]}'?")


class _PassCommand(TyperCommand):
    """A command named after a pass, with the fields of the pass as options; they are read when it is used."""

    _generated: tuple[Any, ...] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        if not self._generated:
            self._generated = tuple(_pass_params(str(self.name)))
            self.params = [*self.params, *self._generated]
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        given = {param.name: ctx.params.pop(param.name) for param in self._generated}
        ctx.obj = {name: value for name, value in given.items() if value not in (None, (), [])}
        return super().invoke(ctx)


class _SlimCommand(_PassCommand):
    """Options that take several values take them one after the other too: `--inputs a b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_one_by_one(args)))


def _one_by_one(words: Sequence[str]) -> Iterator[str]:
    """Repeat the name of an option before each of its values."""
    option = ""
    for index, word in enumerate(words):
        if word in _SEVERAL and index + 1 < len(words):
            option = word
        elif word.startswith("-"):
            option = ""
            yield word
        else:
            yield from (option, word) if option else (word,)


def _pass_params(name: str) -> list[Any]:
    """The options of a pass as parameters of a command. None of them has a default: the pass has."""
    from onnxslim import passes

    def holder(**_: Any) -> None: ...

    parameters = []
    for option in passes.options_of(passes.get(name)):
        kind: Any = bool if option.flag else list[str] if option.many else str
        shown = "" if option.default in ("", "none") else f" [default: {option.default}]"
        word = typer.Option(metavar=None if option.flag else option.type, help=option.help + shown)
        parameters.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, word],
            )
        )
    holder.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    scratch = typer.Typer(add_completion=False)
    scratch.command()(holder)
    return list(typer.main.get_command(scratch).params)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make ONNX models smaller and faster, and prove that they still work.\n\n"
    "`onnxslim IN OUT` is short for `onnxslim slim IN OUT`.",
)

Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|FOLDER",
        help="inputs: an .npz with one array per model input, or a folder of .npz batches or of "
        "test_data_set_N/input_M.pb",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="samples per batch of an .npz")]
LabelsKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="array of the .npz that holds the class of every sample [default: label]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON on the standard output instead of text")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but warnings and errors")]
Debug = Annotated[bool, typer.Option("--debug", help="print the traceback of an error")]
Checks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="what the result has to meet or it is not saved: sqnr (dB), top1, cosine, max_abs, "
        "max_accuracy_drop, latency (ratio); may be repeated",
    ),
]


@dataclass(frozen=True)
class _Job:
    """The options of every command that makes a model out of a model."""

    source: Annotated[Path, typer.Argument(metavar="IN", help="the model")]
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT", help="where to save the result, may be IN; without it nothing is saved"
        ),
    ] = None
    data: Data = None
    batch_size: BatchSize = 8
    labels_key: LabelsKey = None
    check: Checks = None
    on_error: Annotated[
        Literal["revert", "raise"], typer.Option(help="what to do with a pass that breaks the model")
    ] = "revert"
    target: Annotated[str, typer.Option(metavar="NAME", help="execution provider the result is made for")] = (
        "cpu"
    )
    external_data: Annotated[
        bool,
        typer.Option("--external-data", help="put the weights in a .data file beside OUT, however small"),
    ] = False
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="save the report as JSON")] = None
    seed: Annotated[int, typer.Option(help="of everything random")] = 0
    jobs: Annotated[int, typer.Option(min=1, help="processes that work in parallel")] = 1
    json: Json = False
    quiet: Quiet = False
    debug: Debug = False


def _with_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `_Job` after its own."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    fields = list(inspect.signature(_Job, eval_str=True).parameters.values())

    def run(**words: Any) -> None:
        command(_Job(**{field.name: words.pop(field.name) for field in fields}), **words)

    run.__doc__ = command.__doc__
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *fields)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


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


@app.command("slim", cls=_SlimCommand)
@_with_job
def _slim(
    job: _Job,
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
    from onnxslim import compat, passes

    asked = compat.Request(
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
        compat.be_verbose()
    job = replace(job, external_data=job.external_data or save_as_external_data)
    _process(job, [asked.step(passes.create("slim", ctx.obj))], asked)


@app.command("inspect")
def _inspect(
    models: Annotated[list[Path], typer.Argument(metavar="IN…", help="the models, shown side by side")],
    dump_to_disk: Annotated[
        bool,
        typer.Option("--dump-to-disk", help="also write the nodes of IN.onnx to IN.onnx_model_info.csv here"),
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what models consist of."""
    from onnxslim import utils

    utils.inspect(models, dump_to_disk=dump_to_disk)


@app.command("quantize", cls=_PassCommand)
@_with_job
def _quantize(job: _Job, ctx: typer.Context) -> None:
    """Make a model run in 8-bit integers.

    Ranges are calibrated on --data.
    """
    from onnxslim import passes

    _process(job, [passes.create("quantize", ctx.obj)])


@app.command("run")
@_with_job
def _run(
    job: _Job,
    chain: Annotated[
        list[str],
        typer.Option(
            "--pass", "-p", metavar="NAME[:OPTION=VALUE,…]", help="a pass; repeat for one after the other"
        ),
    ],
) -> None:
    """Run one pass after the other.

    For example: onnxslim run IN OUT --data calib.npz -p slim -p quantize:observer=mse,exclude=/head/*
    """
    from onnxslim import passes

    _process(job, [passes.parse(text) for text in chain])


@app.command("validate")
def _validate(
    first: Annotated[Path, typer.Argument(metavar="A", help="the original")],
    second: Annotated[Path, typer.Argument(metavar="B", help="what was made of it")],
    data: Data = None,
    batch_size: BatchSize = 8,
    labels_key: LabelsKey = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="where to run: cpu, cuda, …; may be repeated [default: all there are]"
        ),
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="fail unless met; as --check of `run`")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="calls to time; 0 measures no latency")] = 30,
    threads: Annotated[
        int, typer.Option(min=0, help="threads per operator; 0 leaves it to ONNX Runtime")
    ] = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run two models side by side.

    Compares outputs, accuracy, latency and size, on every execution provider.
    """
    limits = _limits(require)
    from onnxslim.model import load
    from onnxslim.runtime import Target
    from onnxslim.validation import validate

    model, result = load(first), load(second)
    from onnxslim import sources

    feeds, labels = sources.read(data, batch_size, labels_key, model)
    known = [Target.named(name) for name in provider] if provider else Target.available()
    targets = [target.with_threads(threads) for target in known]
    with terminal.progress(quiet) as progress:
        verdict = validate(model, result, feeds, targets, labels=labels, rounds=rounds, progress=progress)
    _warn_of_made_up_inputs(verdict)
    if json:
        terminal.show_json(verdict)
    else:
        terminal.show(verdict, quiet)
    verdict.require(**limits)


@app.command("passes")
def _passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a pass to tell about")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes with all their options."""
    from onnxslim import passes
    from onnxslim.report import show_passes

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
    from onnxslim import demo

    with terminal.progress(quiet) as progress:
        outcomes = demo.run(demo.MODELS if model == "all" else (model,), keep=keep, progress=progress)
    if json:
        terminal.show_json(outcomes)
    elif not quiet:
        demo.show(terminal.console(), outcomes)


# ------------------------------------------------------------------------------------------------- running


def _process(job: _Job, chain: Sequence[Pass], asked: Request | None = None) -> None:
    """Run passes on a model, check the result, and only then save anything."""
    _warn_of_rivals()
    limits = _limits(job.check)
    for path in (job.output, job.report):
        if path is not None:
            _require_writable(path)
    if job.report is not None and job.report.resolve() in _resolved(job.source, job.output):
        raise UsageError(f"--report {job.report} would overwrite the model")
    from onnxslim.model import load
    from onnxslim.pipeline import Pipeline
    from onnxslim.runtime import Target

    target = Target.named(job.target)
    model = load(job.source)
    for note in asked.notes if asked else ():
        terminal.log(f"warning: {note}")
    model = asked.edit(model) if asked else model
    from onnxslim import sources

    data, labels = sources.read(job.data, job.batch_size, job.labels_key, model)
    feeds = asked.feeds(model) if asked else None
    with terminal.progress(job.quiet) as progress:
        result = Pipeline(*chain, on_error=job.on_error)(
            model,
            data=data if feeds is None else [feeds],
            target=target,
            seed=job.seed,
            jobs=job.jobs,
            progress=progress,
        )
        if asked:
            result = asked.finish(model, result, feeds)
        verdict = _verdict(model, result, data, labels, target, limits, progress)
    _warn_of_idle_passes(result.report, job.quiet)
    for shown in (result.report, verdict):
        if shown is not None and not job.json:
            terminal.show(shown, job.quiet)
    if job.json:
        terminal.show_json({"report": result.report, "verdict": verdict})
    if verdict is not None:
        _warn_of_made_up_inputs(verdict)
        verdict.require(**limits)
    _save(job, model, result, verdict)


def _verdict(
    model: Model,
    result: Result,
    data: CalibrationData | None,
    labels: Array | None,
    target: Target,
    limits: Mapping[str, float],
    progress: Progress | None,
) -> Verdict | None:
    if not limits:
        return None
    from onnxslim.validation import validate

    rounds = 30 if "latency" in limits else 0
    return validate(model, result.model, data, [target], labels=labels, rounds=rounds, progress=progress)


def _save(job: _Job, model: Model, result: Result, verdict: Verdict | None) -> None:
    from onnxslim.report import size, to_json

    if job.output is None:
        terminal.note("nothing was saved: give OUT to save the result", job.quiet)
    else:
        result.save(job.output, external_data=True if job.external_data else None)
        before, after = model.stats().bytes, result.model.stats().bytes
        terminal.note(
            f"saved {job.output}: {size(after)}, {100 * after / before:.1f} % of {size(before)}", job.quiet
        )
    if job.report is not None:
        job.report.write_text(to_json({"report": result.report, "verdict": verdict}) + "\n", encoding="utf-8")


def _warn_of_rivals() -> None:
    """Say so if this package shares its name, and maybe its files, with another one."""
    from importlib.metadata import packages_distributions

    owners = sorted(set(packages_distributions().get("onnxslim", ())))
    if len(owners) > 1:
        terminal.log(
            f"warning: {' and '.join(owners)} both install the package 'onnxslim'; uninstall all of them, "
            "then install the one you want"
        )


def _warn_of_idle_passes(report: Report, quiet: bool) -> None:
    from onnxslim.report import outcome

    for step in report.steps:
        line = outcome(step)
        if step.error:
            terminal.log(f"warning: pass {step.name} {line}")
        elif line:
            terminal.note(f"pass {step.name} {line}", quiet)


def _warn_of_made_up_inputs(verdict: Verdict) -> None:
    if verdict.made_up:
        terminal.log(
            "warning: the models were compared on made-up inputs; give --data to compare them on real ones"
        )


def _limits(words: Sequence[str] | None) -> dict[str, float]:
    from onnxslim.verdict import check_limits

    limits: dict[str, float] = {}
    for word in words or ():
        name, _, value = word.partition("=")
        check_limits([name])
        try:
            limits[name] = float(value)
        except ValueError:
            raise UsageError(f"'{word}' is not of the form {name}=NUMBER") from None
    return limits


def _require_writable(path: Path) -> None:
    """Fail before any work is done if a file could not be written in the end."""
    folder = path.absolute().parent
    if path.is_dir():
        raise SaveError(f"cannot write '{path}': it is a folder")
    if not folder.is_dir():
        raise SaveError(f"cannot write '{path}': there is no folder '{folder}'")
    if not os.access(folder, os.W_OK):
        raise SaveError(f"cannot write '{path}': the folder '{folder}' is not writable")


def _resolved(*paths: Path | None) -> set[Path]:
    return {path.resolve() for path in paths if path is not None}
