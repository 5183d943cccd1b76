"""Recipes: what to do to a model, as a YAML file that can be kept, shared and run again.

passes:
  - slim
  - quantize: {observer: minmax, exclude: [/head/*]}
data: calibration.npz
check: {sqnr: 20}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import HELD, SAMPLES, Samples, Subset, Whose
from onnxslim.engine.base import Pass, Progress, options
from onnxslim.engine.forecast import Forecast
from onnxslim.engine.journal import Journal
from onnxslim.engine.pipeline import Pipeline, Report, Result, Step
from onnxslim.engine.plans import PassPlan
from onnxslim.errors import OnnxSlimError, UsageError, ValidationError
from onnxslim.formats import SHOWN_NAMES, plain
from onnxslim.ir.files import write_text
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, Source, load, source_sha256
from onnxslim.recipes import reading
from onnxslim.recipes.data import Batches, Data
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.profile import here_or_simulated
from onnxslim.runtime.releases import SETTLED
from onnxslim.runtime.targets import Target
from onnxslim.shapes.given import with_sizes
from onnxslim.validation import later
from onnxslim.validation.certificate import Certificate
from onnxslim.validation.compare import validate
from onnxslim.validation.later import not_run
from onnxslim.validation.verdict import Verdict, check_limits

if TYPE_CHECKING:
    from onnxslim.report.html import Document

# Calls to time where somebody looks at the latency.
ROUNDS = 30


@dataclass(frozen=True)
class Outcome:
    """What running a recipe gave.

    Attributes:
        model: the result.
        report: what the passes did.
        verdict: result and original side by side; None if nobody asked for it.
        original: what the result is compared with: the model that was given, or what passes that say what the
            model is, such as Extract, made of it.
        recipe: what was run.
        opened: the data it was run with, if any.
        unmeasured: why there is no verdict although somebody asked for one, but for no figures of it.
        target: where it was run; see `Target.simulated`.
        judged: samples that the result can be judged by, if there are any.
    """

    model: Model
    report: Report
    verdict: Verdict | None
    original: Model
    recipe: Recipe
    opened: Batches | None = None
    unmeasured: str = ""
    target: Target = field(default_factory=Target.cpu)
    judged: CalibrationData | None = None

    def require(self) -> Outcome:
        """Insist on what the recipe asks for.

        Raises:
            ValidationError: it is not met; or no pass changed anything, and that is not because there was
                nothing left to do without loss.
        """
        if self.undone and self.recipe.on_error != "keep":
            told = "; ".join(f"pass {step.description} {step.outcome}" for step in self.undone)
            raise ValidationError(f"{told}; on_error 'keep' takes the model as it is")
        if self.verdict is not None:
            self.verdict.require(**self.recipe.check)
        return self

    @property
    def undone(self) -> tuple[Step, ...]:
        """Passes that were reverted, or found nothing they could do, where nothing else was done either."""
        # A model that was made to run has been through a step that nobody asked for.
        asked = {each.describe(): each for each in self.recipe.passes}
        steps = [step for step in self.report.steps if step.description in asked]
        if any(step.changes for step in steps):
            return ()
        return tuple(step for step in steps if step.error or not asked[step.description].lossless)

    def document(self, *, layers: bool = False) -> Document:
        """All there is to tell, to be saved as HTML or JSON.

        Args:
            layers: run both models once more, and compare them layer by layer.
        """
        from onnxslim.report import html

        told = self.original, self.model, self.report, self.verdict
        settings, limits = self.recipe.to_dict(), self.recipe.check
        if not layers:
            return html.brief(*told, recipe=settings, limits=limits)
        data = self.opened.data if self.opened else None
        return html.document(*told, recipe=settings, limits=limits, data=data)

    def save(self, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
        """Write the model; see `Model.save`."""
        self.model.save(path, external_data=external_data)

    def save_check(self, path: str | os.PathLike[str]) -> Path | None:
        """Leave what there is to check where the target is, beside the model that was saved.

        Returns:
            The file that `onnxslim.validation.later.resume` reads there; None if the target has run here.

        Raises:
            CalibrationError: there is nothing that the models run on.
            SaveError: it cannot be written.
        """
        if not self.target.stands_for:
            return None
        limits, sizes = self.recipe.check, self.recipe.input_shapes
        return later.leave(Path(path), self.original, self.target, self.judged, limits, sizes)


@options
class Recipe:
    """Everything that decides what becomes of a model, except the model itself."""

    passes: tuple[Pass, ...] = Field(description="what to run, in order: names, or `name: {option: value}`")
    data: Data | None = Field(
        None, description="calibration data: a path inside the recipe's folder, or its settings"
    )
    test: Data | None = Field(
        None,
        description="samples that no pass sees, to judge the result by: a path, or its settings [default: "
        "some of the data are held out]",
    )
    target: str = Field("cpu", description="execution provider the result is made for")
    seed: int = Field(0, description="of everything random")
    on_error: Literal["revert", "keep", "raise"] = Field(
        "revert",
        description="what to do with a pass that breaks the model: leave it out, but fail if nothing else is "
        "left; leave it out in any case; or stop",
    )
    check: dict[str, float] = Field(
        default_factory=dict, description="what the result has to meet, such as `sqnr: 20`"
    )
    time_limit: float | None = Field(
        None,
        gt=0,
        description="seconds after which passes take the best they have found, and say what was not tried",
    )
    hold_out: float = Field(
        HELD,
        gt=0,
        lt=1,
        description="share of the samples that no pass sees, to judge the result by, where no test data is "
        f"given [default: {HELD}, at most {SAMPLES} of them]",
    )
    input_shapes: dict[str, tuple[int, ...]] = Field(
        default_factory=dict,
        description="sizes of inputs with free axes, to count for and to make inputs up with; the model "
        "keeps its free axes",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not self.passes:
            raise UsageError("a recipe needs at least one pass")
        for before, after in zip(self.passes, self.passes[1:], strict=False):
            if after.prepares and not before.prepares:
                raise UsageError(
                    f"pass '{after.name}' says what the model is, so it comes before '{before.name}'"
                )
        check_limits(self.check)
        Target.named(self.target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: bool = False) -> Recipe:
        """Read a recipe file.

        Its data is never code to run.

        Args:
            path: the file.
            trust: whether it may name files outside its own folder.

        Raises:
            UsageError: it cannot be read, or says something that means nothing; names the key.
        """
        return reading.read(cls, Path(path), trust)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a recipe file that `load` reads back to an equal recipe.

        Files in its folder are named from there, and others by their whole path, which takes trust to read.

        Raises:
            UsageError: the data is code, or a plan is no file.
            SaveError: it cannot be written.
        """
        file = Path(path)
        write_text(file, self.text(file.absolute().parent))

    def text(self, folder: Path) -> str:
        """What `save` writes into a file in this folder.

        Raises:
            UsageError: the data is code, or a plan is no file.
        """
        document: dict[str, Any] = {"passes": [_written(each, folder) for each in self.passes]}
        for key in _DATA:
            if (data := getattr(self, key)) is not None:
                document[key] = _data_written(data, folder)
        given = _given(self)
        document |= {name: given[name] for name in _PLAIN if name in given}
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, defaults included."""
        return {
            "passes": [{each.name: _all(each)} for each in self.passes],
            **{key: None if (data := getattr(self, key)) is None else _all(data) for key in _DATA},
            **{name: plain(getattr(self, name)) for name in _PLAIN},
        }

    def told(self) -> list[Any]:
        """The passes as `text` writes them, for others to read: of files and plans the names alone."""
        return [_named(each, _names(each)) for each in self.passes]

    @property
    def sha256(self) -> str:
        """Hash of all settings, defaults included, and of files passes read, but not of where they lie."""
        document = self.to_dict()
        document["passes"] = [{each.name: {**_all(each), **_contents(each)}} for each in self.passes]
        for key in _DATA:
            if document[key]:
                document[key]["path"] = None
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def run(
        self,
        model: Source,
        *,
        data: Any = None,
        labels: Array | None = None,
        test: Any = None,
        test_labels: Array | None = None,
        libraries: Sequence[str] = (),
        jobs: int = 1,
        progress: Progress | None = None,
        metric: Metric | None = None,
        simulate: bool = False,
    ) -> Outcome:
        """Run the passes and hold the result to what `check` says.

        Args:
            model: a file, a ModelProto or a Model; left as it is.
            data: batches instead of those the recipe names; see `CalibrationData.of`.
            labels: the class of every sample of `data`.
            test, test_labels: likewise, instead of the test data that the recipe names.
            libraries: files of custom operators that the model needs to run; see `Target`.
            jobs: processes that may work in parallel; the result does not depend on their number.
            progress: called with (what, done, total).
            metric: see `Pipeline`; accuracy if there are labels and it is not given.
            simulate: run on processors, in the place of the target, even if that is installed; where it is
                not, that is done anyway, and `Outcome.later_check` is for where it is.

        Raises:
            TargetError: the target is installed, but does not work here.
            ValidationError: the result does not meet what the recipe asks for.
            OnnxSlimError: whatever else went wrong.
        """
        work = Work(self, model, tuple(libraries), jobs, metric, simulate=simulate)
        if data is not None:
            work.feed(data, labels)
        if test is not None:
            work.feed_test(test, test_labels)
        return work.run(progress).require()


class Work:
    """A recipe about to be run on a model. All that can be known before is checked before.

    A model that passes changed tells in its metadata which recipe was run on which file.

    Args:
        recipe: what to run.
        model: left as it is.
        libraries, jobs, metric: see `Recipe.run`.
        reported: whether somebody wants to see the models compared, even where the recipe asks for nothing.
        journal: see `Pipeline`.
        simulate: see `Recipe.run`.

    Attributes:
        original: the model as the first passes say it is, which data, checks and reports refer to.

    Raises:
        UsageError: a pass needs a file that is not there or does not fit the model, or something that is not
            installed, or input sizes do not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Source,
        libraries: tuple[str, ...] = (),
        jobs: int = 1,
        metric: Metric | None = None,
        reported: bool = False,
        journal: Journal | None = None,
        simulate: bool = False,
    ) -> None:
        for each in Pipeline(*recipe.passes).steps:
            each.require_installed()
            for key, file in reading.files_of(each).items():
                if not file.is_file():
                    raise UsageError(f"pass '{each.name}', option '{key}': there is no file '{file}'")
        self._recipe, self._jobs, self._metric = recipe, jobs, metric
        self._reported, self._journal = reported, journal
        chosen = here_or_simulated(Target.named(recipe.target), simulate)
        self._target = chosen.with_libraries(libraries)
        self._source = load(model)
        stop_or_revert: Literal["raise", "revert"] = "raise" if recipe.on_error == "raise" else "revert"
        start, self._pipeline = Pipeline(*recipe.passes, on_error=stop_or_revert).prepared(self._source)
        self.original, self._report = start.model, start.report
        self._make_run()
        with_sizes(
            self.original.inputs(), recipe.input_shapes
        )  # what does not fit is refused before the work
        self._opened: Batches | None = None
        self._test: Batches | None = None

    def _make_run(self) -> None:
        """Take the model in operators that the target has kernels for, where it lacks some, for the original.

        Nothing could be compared with what does not run, and nothing measured of it.
        """
        if self.original.opset <= SETTLED:
            return
        from onnxslim.passes.legalize import Legalize, needed

        legalize, pipeline = Legalize(), self._pipeline
        lacking = needed(self.original, self._target)
        if lacking:
            on_error: Literal["raise", "revert"] = "revert"
            if pipeline.passes[:1] == (legalize,):
                on_error = pipeline.on_error
                self._pipeline = Pipeline(*pipeline.passes[1:], on_error=on_error, count=pipeline.count)
            made = Pipeline(legalize, on_error=on_error, count=False)
            result = made(self.original, target=self._target)
            named = ", ".join(map(repr, lacking[:SHOWN_NAMES]))
            note = (
                f"{self._target.name} has no kernel for {named}: the model was legalized before anything else"
            )
            told = replace(result.report, notes=(note,)) if result.report.steps[0].changes else result.report
            self.original, self._report = result.model, self._report + told

    @property
    def opened(self) -> Batches | None:
        """The data, opened when it is first asked for; None if there is none.

        Raises:
            CalibrationError: it cannot be read, or does not fit the model.
        """
        if self._opened is None and self._recipe.data is not None:
            self._opened = self._recipe.data.read(self.original)
        return self._opened

    @property
    def test(self) -> Batches | None:
        """The samples that no pass is to see, opened when they are first asked for; None if there are none.

        Raises:
            CalibrationError: they cannot be read, or do not fit the model.
        """
        if self._test is None and self._recipe.test is not None:
            self._test = self._recipe.test.read(self.original)
        return self._test

    def feed_test(self, data: Any, labels: Array | None = None) -> None:
        """Take other samples to judge by than what the recipe names; see `CalibrationData.of`."""
        self._test = Batches(CalibrationData.of(data, name="test data"), labels)

    def feed(self, data: Any, labels: Array | None = None) -> None:
        """Take other data than what the recipe names; see `CalibrationData.of`."""
        self._opened = Batches(CalibrationData.of(data), labels)

    def forecast(self) -> Forecast | None:
        """How long the passes will take, about; None where that cannot be told."""
        data = self.opened.data if self.opened else None
        return Forecast.of(self._pipeline.steps, self.original, data, self._target)

    def run(self, progress: Progress | None = None) -> Outcome:
        """Run the passes, and the models side by side where that is asked for.

        Args:
            progress: called with (what, done, total).

        Raises:
            CalibrationError: the data does not fit the model, or is needed and not there.
            UsageError: a check needs labels or a metric, and there is none.
            PassError: see `Pipeline`.
        """
        self._require_enough()
        result = self._rewritten(progress)
        report = self._report + result.report
        if self._target.stands_for:
            report = replace(report, doubts=(not_run(self._target.stands_for), *report.doubts))
        verdict, unmeasured = None, ""
        if self._reported or self._recipe.check:
            try:
                verdict = self._compared(result, progress)
            except OnnxSlimError as error:
                if self._recipe.check:
                    raise
                unmeasured = str(error)
        told = Outcome(result.model, report, verdict, self.original, self._recipe, self._opened, unmeasured)
        judged, _ = self._judged(result.samples)
        return replace(told, target=self._target, judged=judged.data if judged else None)

    def _require_enough(self) -> None:
        """Raise if a pass needs data that is not there, or a check something to measure it by."""
        given = self.test or self.opened
        labels = given.labels if given else None
        for each in self._recipe.passes:
            each.require_data(self.opened)
        for name, there in (("max_accuracy_drop", labels), ("max_metric_drop", self._metric)):
            if name in self._recipe.check and there is None:
                what = "labels" if name == "max_accuracy_drop" else "a metric"
                raise UsageError(f"the check of {name} needs {what}, and there is none")

    def _rewritten(self, progress: Progress | None) -> Result:
        origin = source_sha256(self._source)
        result = self._pipeline(
            self.original,
            data=self.opened.data if self.opened else None,
            target=self._target,
            seed=self._recipe.seed,
            jobs=self._jobs,
            progress=progress,
            metric=self._metric,
            labels=self.opened.labels if self.opened else None,
            test=self.test.data if self.test else None,
            test_labels=self.test.labels if self.test else None,
            input_shapes=self._recipe.input_shapes,
            journal=self._journal,
            time_limit=self._recipe.time_limit,
            hold_out=self._recipe.hold_out,
        )
        if result.model is self._source:
            return result
        kept = next((step.kept for step in reversed(result.report.steps) if step.kept is not None), None)
        told = Certificate.of(result.model, self._recipe.sha256, origin, self._recipe.told(), kept)
        return replace(result, model=told.stamped(result.model))

    def _compared(self, result: Result, progress: Progress | None) -> Verdict:
        timed = self._reported or "latency" in self._recipe.check
        judged, whose = self._judged(result.samples)
        verdict = validate(
            self.original,
            result.model,
            judged.data if judged else None,
            [self._target],
            labels=judged.labels if judged else None,
            metric=self._metric,
            rounds=ROUNDS if timed else 0,
            progress=progress,
            input_shapes=self._recipe.input_shapes,
        )
        return replace(verdict, whose=whose or verdict.whose)

    def _judged(self, samples: Samples | None) -> tuple[Subset | None, Whose | None]:
        """What the models are compared on, and whose it is, where passes were fitted to data.

        What a pass was fitted to, or chosen by, it does well on: those samples are taken which no pass had to
        do with, if there are such.
        """
        fitted = any(not (each.lossless or each.prepares) for each in self._recipe.passes)
        if samples is not None and fitted:
            return samples.judged, samples.whose
        given = self.test or self.opened
        return (Subset(given.data, given.labels) if given else None), None


# --------------------------------------------------------------------------------------------- writing


# What a recipe says besides passes and data.
_DATA = ("data", "test")
_PLAIN = ("target", "seed", "on_error", "check", "time_limit", "hold_out", "input_shapes")


def _all(value: Any) -> dict[str, Any]:
    return {item.name: plain(getattr(value, item.name)) for item in fields(value)}


def _given(value: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    kept = {}
    for name, info in type(value).__pydantic_fields__.items():
        if getattr(value, name) != info.get_default(call_default_factory=True):
            kept[name] = plain(getattr(value, name))
    return kept


def _contents(each: Pass) -> dict[str, str]:
    """Hashes of the files that a pass reads."""
    return {
        key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in reading.files_of(each).items()
    }


def _names(each: Pass) -> dict[str, str]:
    """Of the files that a pass reads, and of plans, what they are called."""
    plans = {key: repr(value) for key, value in each.given().items() if isinstance(value, PassPlan)}
    return {**plans, **{key: path.name for key, path in reading.files_of(each).items()}}


def _from(folder: Path, path: str | Path) -> str:
    """A file as a recipe in a folder names it."""
    found = Path(path).resolve()
    inside = found.is_relative_to(folder.resolve())
    return (found.relative_to(folder.resolve()) if inside else found).as_posix()


def _written(each: Pass, folder: Path) -> Any:
    if any(isinstance(value, PassPlan) for value in each.given().values()):
        raise UsageError(f"pass '{each.name}': recipes name files of plans; save the plan and give its path")
    return _named(each, {key: _from(folder, path) for key, path in reading.files_of(each).items()})


def _named(each: Pass, files: Mapping[str, str]) -> Any:
    """A pass by name, with what was given of its options, where files are called so."""
    settings = {**_given(each), **files}
    return {each.name: settings} if settings else each.name


def _data_written(data: Data, folder: Path) -> Any:
    if data.is_function:
        raise UsageError(f"a recipe cannot hold data that is code ('{data.path}'); leave it out")
    settings = {**_given(data), "path": _from(folder, data.path)}
    return settings if len(settings) > 1 else settings["path"]
