"""Passes, and the pipeline that chains, checks and reports them."""

from __future__ import annotations

import html
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from traceback import walk_tb
from typing import Any, Literal, NamedTuple

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.doubts import doubts
from onnxslim.calibration.samples import HELD, Samples, Subset, require_numbers
from onnxslim.engine.base import Changes, Context, Log, Pass, Progress
from onnxslim.engine.check import Checker, require_interface
from onnxslim.engine.deadline import Deadline
from onnxslim.engine.journal import Journal
from onnxslim.engine.judging import Kept, OutputJudge
from onnxslim.errors import InvalidGraph, LoadError, OnnxSlimError, PassError, TimeUp, UsageError
from onnxslim.formats import SHOWN_NAMES, plain, size
from onnxslim.ir.download import Download, download
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, Source, Stats, load
from onnxslim.ops.bound import binding
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import slowdown
from onnxslim.shapes import cost
from onnxslim.shapes.given import InputShapes, one_sample, sized_by, with_sizes

# Steps at level INFO, what is worth a warning as one, how far long steps are at DEBUG; nobody hears of it who
# does not ask for it.
LOG = logging.getLogger(__name__)
logging.getLogger("onnxslim").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Step:
    """What one pass did to the model.

    Attributes:
        name: of the pass.
        description: the name, with the options that are not as by default.
        macs_before, macs_after: multiply-accumulates of one sample of the size that was checked; None if a
            shape is unknown, or if they were not counted.
        error: why the step, or a part of it, was reverted; empty if all of it was kept.
        kept: what the outputs are worth after a step that is not lossless, and those before it; None after
            others, and where neither data nor made-up inputs run.
    """

    name: str
    description: str
    seconds: float
    before: Stats
    after: Stats
    macs_before: int | None
    macs_after: int | None
    changes: Changes
    error: str = ""
    kept: Kept | None = None

    @property
    def outcome(self) -> str:
        """Why a pass, or a part of it, was reverted or did nothing; empty if it did what it was asked."""
        if self.error:
            what = "was partly reverted" if self.changes else "was reverted, the model is as it was before"
            return f"{what}: {self.error}"
        if self.changes:
            return ""
        counted = Counter(skip.reason for skip in self.changes.skipped).most_common()
        reasons = [reason for reason, _ in counted]
        more = len(reasons) - SHOWN_NAMES
        told = [*reasons[:SHOWN_NAMES], *([f"and {more} more reasons, see the report"] if more > 0 else [])]
        return f"changed nothing: {'; '.join(told) or 'it found nothing to do'}"


@dataclass(frozen=True)
class Report:
    """What a pipeline did.

    Attributes:
        steps: in order.
        notes: on what could not be checked.
        doubts: why what was made on the data may not hold for real inputs, or where it is to run.
        slowdown: how many times as long as what came in the result takes, on one thread; None where it is not
            certainly slower, or nothing was done that is not lossless.
        download: bytes of what came in and of the result when they are sent; None where nothing was done that
            is not lossless.
    """

    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    slowdown: float | None = None
    download: tuple[Download, Download] | None = None

    def __str__(self) -> str:
        from onnxslim.report.text import text

        return text(self)

    def __repr__(self) -> str:
        steps = [step.description + (" (reverted)" if step.error else "") for step in self.steps]
        return f"<Report of {', '.join(steps) or 'no passes'}>"

    def _repr_html_(self) -> str:
        """For notebooks: the text."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __add__(self, later: Report) -> Report:
        """The report of one pipeline after the other."""
        notes = dict.fromkeys((*self.notes, *later.notes))
        doubts = dict.fromkeys((*self.doubts, *later.doubts))
        slower = self.slowdown if later.slowdown is None else later.slowdown
        sent = self.download or later.download
        if self.download is not None and later.download is not None:
            sent = self.download[0], later.download[1]
        return Report((*self.steps, *later.steps), tuple(notes), tuple(doubts), slower, sent)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before the result is used: what is missing, doubts, what hardly works, growth."""
        kept = next((step.kept for step in reversed(self.steps) if step.kept is not None), None)
        little = (f"hardly the same model: the result {kept}",) if kept is not None and kept.little else ()
        reverted = (f"pass {step.description} {step.outcome}" for step in self.steps if step.error)
        return (*reverted, *self.doubts, *little, *self._growth())

    def _growth(self) -> Iterator[str]:
        before, after = (self.steps[0].before.bytes, self.steps[-1].after.bytes) if self.steps else (0, 0)
        if after > before:
            told = f"{size(after)} for {size(before)}, {size(after - before)} more"
            yield f"the result is larger than what came in: {told}"
        if self.slowdown is not None:
            yield f"the result is slower than what came in: a run takes {self.slowdown:.2f} times as long"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN is None, infinities are the strings "inf" and "-inf"."""
        return dict(plain(self))


@dataclass(frozen=True)
class Result:
    """A rewritten model and how it came about.

    Attributes:
        samples: the data as passes had it, split; None if there was none, or no pass came to need it.
    """

    model: Model
    report: Report
    samples: Samples | None = None

    def save(self, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
        """Write the model; see `Model.save`."""
        self.model.save(path, external_data=external_data)

    def _repr_html_(self) -> str:
        """For notebooks: the report."""
        return self.report._repr_html_()


class Pipeline:
    """Runs passes one after the other and keeps of each only what passes its check.

    Args:
        passes: in order; or one list of them.
        on_error: "revert" undoes a pass that fails, says so in the report and goes on; "raise" stops.
        count: count multiply-accumulates for the report, which takes a good part of the time of a fast pass.
    """

    def __init__(
        self,
        *passes: Pass | Sequence[Pass],
        on_error: Literal["revert", "raise"] = "revert",
        count: bool = True,
    ) -> None:
        self.passes = tuple(
            chain.from_iterable(each if isinstance(each, list | tuple) else (each,) for each in passes)
        )
        for each in self.passes:
            _require_pass(each)
        if on_error not in ("revert", "raise"):
            raise UsageError(f"on_error is 'revert' or 'raise', not {on_error!r}")
        self.on_error = on_error
        self.count = count

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(each.describe() for each in self.passes)})"

    @property
    def steps(self) -> tuple[Pass, ...]:
        """All that is run: the passes, and what each of them wants behind it."""
        return tuple(chain.from_iterable((each, *each.behind) for each in self.passes))

    def __call__(
        self,
        model: Source,
        *,
        data: Any = None,
        target: Target | str | None = None,
        seed: int = 0,
        jobs: int = 1,
        progress: Progress | None = None,
        metric: Metric | None = None,
        labels: Array | None = None,
        test: Any = None,
        test_labels: Array | None = None,
        input_shapes: InputShapes | None = None,
        journal: Journal | None = None,
        time_limit: float | None = None,
        hold_out: float = HELD,
    ) -> Result:
        """Run every pass on a copy of the model.

        Args:
            model: a Model, left as it is, or what `load` makes one of.
            data: calibration batches for the passes that need them, and for checking; or samples as arrays by
                name, or where they lie (`CalibrationData.of`). Of the model as those passes see it that say
                what it is, such as Extract, if there are any.
            target: where the result is to run, or its name; processors by default.
            seed: of everything random.
            jobs: processes that may work in parallel.
            progress: called with (what, done, total): with the name of each pass before and after it, and by
                long steps; the total is None where it is not known.
            metric: runs a model on data of its own and says how good it is, more is better; for `max_drop`.
            labels: the class of every sample of the data, shape (samples,): without a metric, accuracy is the
                one, on the samples that are not held out.
            test: other samples, in the forms of `data`, that passes do not see and results are judged by;
                by default some of the data are held out for that.
            test_labels: the class of every sample of them.
            input_shapes: sizes of inputs with free axes, by name: what multiply-accumulates are counted for,
                and made-up inputs have. The model keeps its free axes; FixShapes fixes them.
            journal: learns which pass is at work, and knows which ones are not to be tried again.
            time_limit: seconds after which passes that are not lossless take the best they have found, and
                say what they have not tried.
            hold_out: the share of the samples that passes do not see and results are judged by, without
                `test`; by default a sixteenth, at most 64 of them.

        Raises:
            UsageError: there is no input of that name, or it has other axes; there is test data alone; a pass
                takes something that is not installed.
            LoadError, TargetError: the model or the target is none, or the model is tied to one machine.
            PassError: when a pass fails that prepares the model; with on_error="raise", when any fails or
                breaks the model.
            CalibrationError: the data does not fit the model.
        """
        if data is None and test is not None:
            raise UsageError("test data says nothing without data: give both, or data alone")
        for each in self.steps:
            each.require_installed()
        model = load(model)
        _require_unbound(model)
        if not 0 < hold_out < 1:
            raise UsageError(f"hold_out is a share between 0 and 1, not {hold_out:g}")
        deadline = None if time_limit is None else Deadline(time_limit)
        watched = _logged(progress)
        watched = watched if deadline is None else deadline.watching(watched)
        ctx = Context(Target.of(target), None, seed, jobs, watched, None, metric)
        given = _Given(data, labels, test, test_labels, input_shapes or {}, hold_out)
        run = _PipelineRun(self, model, ctx, given, journal or Journal(), deadline)
        for position, each in enumerate(self.steps):
            _announce(progress, each, 0)
            run.step(position, each)
            _announce(progress, each, 1)
        return run.result()

    def prepared(self, model: Model) -> tuple[Result, Pipeline]:
        """The model as the passes that come first say it is, and a pipeline of the others.

        That model is the one that data, checks and reports refer to.

        Raises:
            UsageError: as those passes do.
        """
        first = tuple(takewhile(lambda each: each.prepares, self.passes))
        rest = Pipeline(*self.passes[len(first) :], on_error=self.on_error, count=self.count)
        return Pipeline(*first)(model), rest


class _Given(NamedTuple):
    """What came with a model; see `Pipeline.__call__`."""

    data: Any
    labels: Array | None
    test: Any
    test_labels: Array | None
    input_shapes: InputShapes
    hold_out: float

    def samples(self, model: Model, ctx: Context, learning: bool) -> Samples | None:
        """The data for a model, to be split; None if there is none.

        Args:
            learning: whether a pass learns.

        Raises:
            CalibrationError: the data does not fit the model.
        """
        if self.data is None:
            return None
        specs = model.inputs()
        bound = CalibrationData.of(self.data, specs).bind(specs)
        bound.check(specs)
        if learning:
            require_numbers(bound, model, ctx.target)
        test = None
        if self.test is not None:
            test = Subset(CalibrationData.of(self.test, specs, name="test data"), self.test_labels)
            test.data.check(specs)
        return Samples(
            bound,
            model,
            ctx.target,
            ctx.seed,
            self.labels,
            test=test,
            hold_out=self.hold_out,
            learning=learning,
        )


class _PipelineRun:
    """One run of a pipeline: the model as it changes, and what was done to it.

    Args:
        pipeline: what is run.
        model: as it comes in.
        ctx: what passes may know, without the data.
        given: the data, and what else came with the model.
        journal: see `Pipeline`.
        deadline: when it has to be done.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        model: Model,
        ctx: Context,
        given: _Given,
        journal: Journal,
        deadline: Deadline | None,
    ) -> None:
        self._pipeline, self._given, self._journal, self._deadline = pipeline, given, journal, deadline
        self._model, self._ctx = model, ctx
        self._steps: list[Step] = []
        self._notes: list[str] = []
        self._stats = model.stats()
        self._macs: int | None = None
        self._ground: _Ground | None = None

    def step(self, position: int, each: Pass) -> None:
        """Run one pass, and keep what is right of it."""
        if not each.prepares:
            self._stand()
        start = time.perf_counter()
        outcome, changes, error = self._outcome(position, each)
        seconds = time.perf_counter() - start
        stats, macs, kept = self._stats, self._macs, None
        if outcome is not self._model:
            kept = self._took(position, each, outcome)
        told = stats, self._stats, macs, self._macs, changes, error, kept
        self._steps.append(Step(each.name, each.describe(), seconds, *told))
        _log(self._steps[-1])

    def result(self) -> Result:
        """The model as it is now, and the report."""
        lossy = [at for at, step in enumerate(self._steps) if step.kept is not None]
        slower, sent = None, None
        if self._ground is not None and lossy:
            with self._journal.within(lossy[-1]):
                slower = self._ground.slowdown(self._model)
            sent = self._ground.downloads(self._model)
        notes = tuple(dict.fromkeys(self._notes))
        report = Report(tuple(self._steps), notes, self._doubts(self._ctx.data), slower, sent)
        for warning in report.warnings:
            LOG.warning("%s", warning)
        return Result(self._model, report, self._ctx.data)

    def _stand(self) -> None:
        """Have something that the model is held to, from here on."""
        if self._ground is not None:
            return
        if self._ctx.data is None:
            learning = any(each.learns for each in self._pipeline.steps)
            samples = self._given.samples(self._model, self._ctx, learning)
            metric = self._ctx.metric or (samples.metric if samples is not None else None)
            self._ctx = replace(self._ctx, data=samples, metric=metric)
        count, shapes = self._pipeline.count, self._given.input_shapes
        self._ground = _Ground(self._model, self._ctx, self._notes, count, shapes)
        self._macs = self._ground.macs(self._model)

    def _outcome(self, position: int, each: Pass) -> tuple[Model, Changes, str]:
        if self._ground is None or each.prepares:
            return *_prepared(each, self._model, self._ctx), ""
        with self._journal.within(position):
            failed = self._journal.failure(position, each.name) or _late(self._deadline, each)
            return self._attempt(each, self._ground, failed)

    def _took(self, position: int, each: Pass, outcome: Model) -> Kept | None:
        """Go on with what a pass made; what its outputs are worth, if it is not lossless."""
        ground, kept = self._ground, None
        self._model, self._stats, self._macs = outcome, outcome.stats(), None
        if ground is None or each.prepares:
            self._ground = None
            return None
        self._macs = ground.macs(outcome)
        if not each.lossless:
            with self._journal.within(position):
                kept = ground.judge(outcome)
        if each.interface:
            self._ground = None
        elif not each.lossless:
            ground.checker.accept(outcome)
        return kept

    def _attempt(self, each: Pass, ground: _Ground, failed: PassError | None) -> tuple[Model, Changes, str]:
        """What a pass makes of the model, unless it is known to have failed before."""
        model, on_error = self._model, self._pipeline.on_error
        candidate = model.copy()
        try:
            if failed is not None:
                raise failed
            changes = _run(each, candidate, ground.ctx)
            if changes:
                _check(each, candidate, changes, ground.checker)
            return candidate if changes else model, changes, ""
        except PassError as error:
            if on_error == "revert" and each.parts():
                return _piecewise(each, model, ground.ctx, ground.checker, str(error))
            failure = error
        if on_error == "raise":
            done = tuple(step.description for step in self._steps)
            raise type(failure)(str(failure), pass_name=each.name, node=failure.node, done=done) from failure
        return model, Changes(), str(failure)

    def _doubts(self, samples: Samples | None) -> tuple[str, ...]:
        """Why data may not be what a lossy pass should be fitted to, in one line."""
        if samples is None or all(each.lossless or each.prepares for each in self._pipeline.passes):
            return ()
        found = doubts(samples.data)
        return (f"{samples.data.name}: {'; '.join(found)}; {UNLIKE_REAL}",) if found else ()


class _Ground:
    """What passes start from and are held to, until one of them changes the model's interface.

    Args:
        model: it is that of which this interface is.
        ctx: what passes may know besides.
        notes: what cannot be checked goes there.
        count: whether to count multiply-accumulates.
        given: sizes of inputs that somebody asked for.
    """

    def __init__(self, model: Model, ctx: Context, notes: list[str], count: bool, given: InputShapes) -> None:
        # Models are compared on the first batch.
        first = [] if ctx.data is None else list(islice(ctx.data.data, 1))
        declared = model.inputs()
        specs = with_sizes(declared, given)
        self.checker = Checker(model, ctx.target, first, notes, specs)
        feeds = self.checker.feeds
        self.judge = OutputJudge(model, ctx.target, ctx.data, feeds)
        self.ctx = replace(ctx, sample=feeds[-1] if feeds else None, judge=self.judge, teacher=model)
        self._model = model
        fed = {name: array.shape for name, array in feeds[0].items()} if feeds else {}
        self._shapes = one_sample(declared, specs, fed)
        self._count = count
        if count:
            origin = cost.SEEN if first else cost.ASSUMED
            notes.extend(cost.caveats(model, self._shapes, origin, sized_by(declared, specs)))

    def macs(self, model: Model) -> int | None:
        """Multiply-accumulates of one sample, where they are to be counted."""
        return cost.macs(model, self._shapes) if self._count else None

    def downloads(self, model: Model) -> tuple[Download, Download]:
        """What was sent before, and what is."""
        return download(self._model), download(model)

    def slowdown(self, model: Model) -> float | None:
        """How many times as long as before a run of the model takes, where it certainly takes longer."""
        if self.ctx.sample is None or self._model.nbytes() > UNTIMED_BYTES:
            return None
        try:
            return slowdown(self._model, model, self.ctx.sample, self.ctx.target)
        except LoadError:
            return None


# Bytes of weights beyond which a model is not timed unasked: sessions to be timed hold a copy of them.
UNTIMED_BYTES = 2 << 30
# A fault of a pass, not of what it was given.
UNFORESEEN = "it met something it was not made for"
UNLIKE_REAL = "results may be much worse on real inputs than they look here: give some dozens of real samples"


def _require_pass(each: object) -> None:
    if isinstance(each, Pass):
        return
    if isinstance(each, type) and issubclass(each, Pass):
        raise UsageError(f"{each.__name__} is a class: a pipeline takes passes, as {each.__name__}()")
    hint = "; onnxslim.passes.parse makes passes of texts" if isinstance(each, str) else ""
    raise UsageError(f"a pipeline takes passes, such as Slim(), not {each!r}{hint}")


def _require_unbound(model: Model) -> None:
    """Raise LoadError if a node ties the model to the machine it was saved on."""
    for node in model.nodes():
        why = binding(node)
        if why is not None and (node.domain, node.op) not in model.functions:
            raise LoadError(f"node '{node.label}' ({node.domain}.{node.op}) {why}")


def _announce(progress: Progress | None, each: Pass, done: int) -> None:
    if progress:
        progress(each.name, done, 1)


def _logged(progress: Progress | None) -> Progress | None:
    """The same callback, with what it is told in the log, where somebody wants to read that much."""
    if not LOG.isEnabledFor(logging.DEBUG):
        return progress

    def report(what: str, done: int, total: int | None) -> None:
        LOG.debug("%s: %d of %s", what, done, "?" if total is None else total)
        if progress is not None:
            progress(what, done, total)

    return report


def _log(step: Step) -> None:
    told = step.outcome or str(step.kept or f"{len(step.changes.changed)} changes")
    LOG.info("%s took %.2f s: %s", step.description, step.seconds, told)


def _late(deadline: Deadline | None, each: Pass) -> TimeUp | None:
    """Why a pass is not begun any more; what loses nothing is done all the same, as it takes little time."""
    if deadline is None or each.lossless or not deadline.passed:
        return None
    return TimeUp(
        f"pass '{each.name}' was not tried: the time limit of {deadline.seconds:g} s was over before"
    )


def _run(each: Pass, model: Model, ctx: Context) -> Changes:
    """Run a pass; one that crashes has failed like any other, and leaves the model before it intact."""
    try:
        return each.run(model, ctx)
    except LoadError as error:  # it is the result that cannot be read or run
        raise PassError(f"pass '{each.name}' failed: {error}", pass_name=each.name) from error
    except (OnnxSlimError, OSError, MemoryError):  # the caller's and the machine's, not the pass's
        raise
    except Exception as error:
        raise PassError(
            f"pass '{each.name}' failed: {UNFORESEEN}, at {_place(each, error)}; "
            "please report this with the model",
            pass_name=each.name,
        ) from error


def _place(each: Pass, error: Exception) -> str:
    """Module and line of the innermost code of the pass, or of this package, that an error came through.

    What Python or NumPy say of it (an index, shapes that do not match) means nothing to who uses the pass;
    the error itself stays the cause of the one that is raised.
    """
    ours = {__name__.partition(".")[0], type(each).__module__.partition(".")[0]}
    frames = ((frame.f_globals.get("__name__", ""), line) for frame, line in walk_tb(error.__traceback__))
    *_, (module, line) = (found for found in frames if found[0].partition(".")[0] in ours)
    return f"{module}:{line}"


def _prepared(each: Pass, model: Model, ctx: Context) -> tuple[Model, Changes]:
    """Run a pass that says what the model is: no model computes what it makes, and it cannot be left out."""
    candidate = model.copy()
    changes = _run(each, candidate, ctx)
    try:
        require_interface(model, candidate, each.interface)
    except LoadError as error:
        raise PassError(f"pass '{each.name}' failed: {error}", pass_name=each.name) from error
    return candidate if changes else model, changes


def _check(each: Pass, candidate: Model, changes: Changes, checker: Checker) -> None:
    try:
        checker(candidate, lossless=each.lossless, changing=each.interface)
    except LoadError as error:
        nodes = list(dict.fromkeys(change.node for change in changes.changed))
        shown = ", ".join(f"'{node}'" for node in nodes[:3]) + (" …" if len(nodes) > 3 else "")
        raise InvalidGraph(
            f"pass '{each.name}' broke the model at {shown}: {error}", pass_name=each.name, node=nodes[0]
        ) from error


def _piecewise(
    each: Pass, model: Model, ctx: Context, checker: Checker, why: str
) -> tuple[Model, Changes, str]:
    """Run a pass part by part and drop the parts that break the model, or make it too large."""
    log, broken, start = Log(), dict[str, str](), model
    for _ in range(MAX_ROUNDS):
        progressed = False
        for part in _parts(each, broken):
            candidate = model.copy()
            try:
                changes = _run(part, candidate, ctx)
                if not changes:
                    continue
                if not each.fits(start, candidate):
                    log.skip(part.name, "left out: the model would be larger for it")
                    continue
                _check(part, candidate, changes, checker)
            except PassError as error:
                broken[part.name] = str(error)
                continue
            model, progressed = candidate, True
            log.add(changes)
        if not progressed:
            break
    for name, reason in broken.items():
        log.skip(name, f"reverted: {reason}")
    return model, log.done(), "; ".join(broken.values()) or f"unstable check: {why}"


def _parts(each: Pass, broken: Mapping[str, str]) -> Iterator[Pass]:
    yield from (part for part in each.parts() if part.name not in broken)


MAX_ROUNDS = 10
