"""The options that commands have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from onnxslim.errors import UsageError

if TYPE_CHECKING:
    from onnxslim.recipes.data import Data

Json = Annotated[bool, typer.Option("--json", help="print JSON on the standard output instead of text")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but warnings and errors")]
CustomOps = Annotated[
    list[str] | None,
    typer.Option(metavar="LIBRARY", help="file of custom operators to load and run; may be repeated"),
]
EpLibrary = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIBRARY",
        help="file of a plugin of ONNX Runtime to load and run: its execution providers are then known by "
        "their names (`onnxslim providers`); may be repeated",
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="MODULE:FUNCTION",
        help="how good a model is, more is better: called with a function from inputs to outputs, by name",
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shapes",
        metavar="NAME:1,3,224,224",
        help="sizes of free axes to count MACs for and to make inputs up with; the model keeps its free axes "
        "(`onnxslim shapes` fixes them); may be repeated",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="print the traceback of an error")]
SavePlan = Annotated[Path | None, typer.Option(metavar="FILE.json", help="save what was chosen, for --plan")]


@dataclass(frozen=True, kw_only=True)
class ReportWords:
    """The options that say where reports go."""

    report: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="save a report: FILE.html for people, FILE.json for programs, FILE.md to show where models "
            "are built, FILE.xml as JUnit's tests; may be repeated",
        ),
    ] = None
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="save a report as JUnit's tests, whatever its name")
    ] = None
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="save a report in Markdown, whatever its name")
    ] = None

    def reports(self) -> list[ReportFile]:
        """All that are asked for."""
        named = (("--junit", self.junit, ".xml"), ("--markdown", self.markdown, ".md"))
        return [
            *(ReportFile("--report", path, path.suffix) for path in self.report or ()),
            *(ReportFile(word, path, form) for word, path, form in named if path is not None),
        ]


class ReportFile(NamedTuple):
    """A report that is asked for: by which option, where, and in the form of which suffix."""

    word: str
    path: Path
    form: str


def of_images(name: str) -> bool:
    """Whether a field of `DataWords` is about folders of images."""
    return name.startswith("image_") or name in ("labels_from_folders", "show_inputs")


@dataclass(frozen=True)
class DataWords:
    """The options that say where data comes from."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="inputs: an .npz with one array per model input, an .npy, or a folder of .npz batches, of "
            ".npy arrays, of images or of test_data_set_N/input_M.pb; or MODULE:FUNCTION to call for batches",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="samples per batch, where a file does not set it [default: the model's, or 8]"
        ),
    ] = None
    labels_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="array that holds the class of every sample [default: label]"),
    ] = None
    labels_from_folders: Annotated[
        bool,
        typer.Option(
            "--labels-from-folders",
            help="images lie in one folder per class; classes are numbered in order of their names",
        ),
    ] = False
    image_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="size of images [default: that of the model's input]")
    ] = None
    image_layout: Annotated[
        Literal["NCHW", "NHWC"] | None, typer.Option(help="order of the axes [default: the model's]")
    ] = None
    image_mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="what is subtracted [default: ImageNet's, shown]")
    ] = None
    image_std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="what is divided by [default: ImageNet's, shown]")
    ] = None
    image_scale: Annotated[
        float | None, typer.Option(help="factor of the pixels, before anything else [default: 1/255]")
    ] = None
    image_fit: Annotated[
        Literal["crop", "letterbox", "stretch"] | None,
        typer.Option(
            help="how images get the aspect ratio of the input: around the centre, with grey borders (as "
            "YOLO), or out of shape [default: crop]"
        ),
    ] = None
    image_channels: Annotated[
        Literal["RGB", "BGR"] | None, typer.Option(help="order of the channels [default: RGB]")
    ] = None
    show_inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="save a picture of the first eight images, as the model gets them"
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What was given, by the names of `onnxslim.recipes.recipe.data.Data`."""
        read: dict[str, Callable[[str, str], Any]] = {
            "image_size": _size,
            "image_mean": _numbers,
            "image_std": _numbers,
        }
        given = {
            name: value
            for name, value in vars(self).items()
            if value is not None and value is not False and name != "show_inputs"
        }
        given = {name: read[name](value, name) if name in read else value for name, value in given.items()}
        return {"path" if name == "data" else name: value for name, value in given.items()}

    def source(self, base: Data | None = None) -> Data | None:
        """The data to read: what was given, or `base` with what was given."""
        from dataclasses import replace

        from onnxslim.recipes.data import Data

        settings = self.settings()
        if base is not None and "path" not in settings:
            return replace(base, **settings)
        if "path" not in settings:
            if settings or self.show_inputs:
                settings = settings or {"show_inputs": self.show_inputs}
                raise UsageError(f"--{next(iter(settings)).replace('_', '-')} says nothing without --data")
            return None
        return Data(**settings)


def _size(text: str, name: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise UsageError(f"--{name.replace('_', '-')} {text}: expected HEIGHTxWIDTH, such as 224x224")
    return sizes * 2 if len(sizes) == 1 else sizes


def _numbers(text: str, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{name.replace('_', '-')} {text}: expected numbers: 0.5,0.5,0.5") from None


@dataclass(frozen=True)
class CommonWords:
    """The options of commands that run models, and make none or search for one."""

    ep_library: EpLibrary = None
    custom_ops: CustomOps = None
    json: Json = False
    quiet: Quiet = False
    debug: Debug = False


@dataclass(frozen=True)
class ModelWords(ReportWords):
    """The options of every command that makes a model out of a model."""

    source: Annotated[Path, typer.Argument(metavar="IN", readable=False, help="the model")]
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT", help="where to save the result, may be IN; without it nothing is saved"
        ),
    ] = None
    check: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="what the result has to meet or it is not saved: sqnr (dB), top1, cosine, max_abs, "
            "max_accuracy_drop, max_metric_drop, latency (ratio); may be repeated",
        ),
    ] = None
    test: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="samples that no pass sees, to compare the models on and to check, read as --data is "
            "[default: some of --data are held out]",
        ),
    ] = None
    metric: MetricName = None
    on_error: Annotated[
        Literal["revert", "keep", "raise"] | None,
        typer.Option(
            help="what to do with a pass that breaks the model: leave it out, and fail if none is left that "
            "did something; leave it out and save in any case; or stop [default: revert]"
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="execution provider the result is made for [default: cpu]"),
    ] = None
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="lay the result out for the target, but check it on the processor, and leave a check for "
            "where the target is; done in any case where the target is not installed",
        ),
    ] = False
    external_data: Annotated[
        bool,
        typer.Option("--external-data", help="put the weights in a .data file beside OUT, however small"),
    ] = False
    save_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="save what this command does as a recipe")
    ] = None
    ep_library: EpLibrary = None
    custom_ops: CustomOps = None
    seed: Annotated[int | None, typer.Option(help="of everything random [default: 0]")] = None
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="take the best that was found by then, and say what was not tried [default: none]",
        ),
    ] = None
    hold_out: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="share of --data that no pass sees, to judge results by without --test [default: 1/16, "
            "at most 64 samples]",
        ),
    ] = None
    jobs: Annotated[int, typer.Option(min=1, help="processes that work in parallel")] = 1
    json: Json = False
    quiet: Quiet = False
    debug: Debug = False

    def settings(self) -> dict[str, Any]:
        """What was given of what a recipe can hold."""
        given = {
            name: getattr(self, name) for name in ("on_error", "target", "seed", "time_limit", "hold_out")
        }
        return {name: value for name, value in given.items() if value is not None}


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of its parameters that are dataclasses, after its own."""
    signature = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: each.annotation for name, each in signature.items() if is_dataclass(each.annotation)
    }
    own = [each for name, each in signature.items() if name not in groups]
    fields = {
        name: list(inspect.signature(cls, eval_str=True).parameters.values()) for name, cls in groups.items()
    }

    def run(**words: Any) -> None:
        made = {
            name: cls(**{field.name: words.pop(field.name) for field in fields[name]})
            for name, cls in groups.items()
        }
        command(**made, **words)

    run.__doc__ = command.__doc__
    every = (*own, *(field for group in fields.values() for field in group))
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in every]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def plug(libraries: Sequence[str] | None) -> None:
    """Make providers of these plugins known by their names, in this process.

    Raises:
        UsageError, TargetError: see `Target.in_library`.
    """
    if libraries:
        from onnxslim.runtime.targets import REGISTRY, Target

        for path in libraries:
            REGISTRY.update({target.name: target for target in Target.in_library(path)})


def limits(words: Sequence[str] | None) -> Mapping[str, float]:
    """Requirements from words such as `sqnr=20`.

    Raises:
        UsageError: one is of another form, or there is no such requirement.
    """
    from onnxslim.validation.verdict import check_limits

    found: dict[str, float] = {}
    for word in words or ():
        name, _, value = word.partition("=")
        check_limits([name])
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"'{word}' is not of the form {name}=NUMBER") from None
    return found
