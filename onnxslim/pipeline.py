"""Passes, and the pipeline that chains, checks and reports them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated
from typing_extensions import dataclass_transform

from onnxslim.check import Checker
from onnxslim.errors import CalibrationError, InvalidGraph, LoadError, OnnxSlimError, PassError
from onnxslim.formats import plain
from onnxslim.graph import Array
from onnxslim.metric import Metric
from onnxslim.model import Model, Stats
from onnxslim.ops import cost
from onnxslim.runtime import Target

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Progress: TypeAlias = Callable[[str, int, "int | None"], None]

P = TypeVar("P")


@dataclass_transform(frozen_default=True)
def options(cls: type[P]) -> type[P]:
    """Make a class a frozen dataclass whose fields are checked when it is made: what every pass is."""
    checked = validated(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
    return checked(cls)  # type: ignore[return-value]


@dataclass(frozen=True)
class Change:
    """Something a pass did: to which node, what, and why."""

    node: str
    action: str
    reason: str = ""


@dataclass(frozen=True)
class Skip:
    """Something a pass could have done but did not: at which node, and why not."""

    node: str
    reason: str


@dataclass(frozen=True)
class Changes:
    """What a pass did and what it left alone; true if it changed anything.

    Attributes:
        facts: figures about the whole model that belong in the report, such as the number of fused nodes.
    """

    changed: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.changed)


class Log:
    """Collects what a pass does while it does it."""

    def __init__(self) -> None:
        self._changed: list[Change] = []
        self._skipped: dict[tuple[str, str], Skip] = {}
        self.facts: dict[str, Any] = {}

    def change(self, node: str, action: str, reason: str = "") -> None:
        """Note something done."""
        self._changed.append(Change(node, action, reason))

    def skip(self, node: str, reason: str) -> None:
        """Note something not done; the same note twice counts once."""
        self._skipped[node, reason] = Skip(node, reason)

    def add(self, changes: Changes) -> None:
        """Take over the notes of a part."""
        self._changed.extend(changes.changed)
        self._skipped.update({(skip.node, skip.reason): skip for skip in changes.skipped})
        self.facts.update(changes.facts)

    def done(self) -> Changes:
        """The notes so far; whoever changed a node is no longer skipping it."""
        return Changes(tuple(self._changed), tuple(self._skipped.values()), dict(self.facts))


@dataclass(frozen=True)
class Context:
    """What passes may know and use besides the model.

    Attributes:
        target: where the result is to run.
        data: calibration batches, each a dict of one array per input; None if there are none.
        teacher: the model as it came in, before any pass.
        seed: of everything random.
        jobs: processes that may work in parallel.
        progress: called with (what, done, total) by long steps.
        sample: inputs of one run, real ones where there are data, to count and time on; None if the model
            does not run on any.
        metric: how good a model is, for passes that are to keep that; None if nobody said.
    """

    target: Target = field(default_factory=Target.cpu)
    data: Any = None
    teacher: Model | None = None
    seed: int = 0
    jobs: int = 1
    progress: Progress | None = None
    sample: Mapping[str, Array] | None = None
    metric: Metric | None = None


class Pass:
    """A step that rewrites a model in place.

    A subclass is a frozen dataclass (use `@options`): its fields are its options everywhere, on the command
    line, in recipes and in Python, and its docstring is their help.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def run(self, model: Model, ctx: Context) -> Changes:
        """Rewrite the model; says what was done and, where nothing was, why."""
        raise NotImplementedError

    @property
    def keeps_shapes(self) -> bool:
        """Whether inputs and outputs have the shapes they had: always, unless somebody asked otherwise."""
        return True

    def parts(self) -> tuple[Pass, ...]:
        """Smaller passes that do the same when run in turn until nothing changes; () if there are none.

        They are run and checked one by one when the whole fails its check, to keep what is right.
        """
        return ()

    def fits(self, before: Model, after: Model) -> bool:
        """Whether what some of the parts make may be as large as it is."""
        return True

    def describe(self) -> str:
        """The pass with the options that differ from their defaults, as in a recipe."""
        given = {name: getattr(self, name) for name in _defaults(type(self))}
        told = [f"{name}={value!r}" for name, value in given.items() if value != _defaults(type(self))[name]]
        return f"{self.name}({', '.join(told)})"


def _defaults(cls: type[Pass]) -> dict[str, Any]:
    """Default values of a pass's options, by name."""
    fields: Mapping[str, Any] = getattr(cls, "__pydantic_fields__", {})
    return {name: info.get_default(call_default_factory=True) for name, info in fields.items()}


@dataclass(frozen=True)
class Step:
    """What one pass did to the model.

    Attributes:
        macs_before, macs_after: multiply-accumulates of one sample of the size that was checked; None if a
            shape is unknown, or if they were not counted.
        error: why the step, or a part of it, was reverted; empty if all of it was kept.
        kind: name of the pass, without its options.
    """

    name: str
    seconds: float
    before: Stats
    after: Stats
    macs_before: int | None
    macs_after: int | None
    changes: Changes
    error: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Report:
    """What a pipeline did: its steps in order, and notes on what could not be checked."""

    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from onnxslim.report import text

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN is None, infinities are the strings "inf" and "-inf"."""
        return dict(plain(self))


@dataclass(frozen=True)
class Result:
    """A rewritten model and how it came about."""

    model: Model
    report: Report

    def save(self, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
        """Write the model; see `Model.save`."""
        self.model.save(path, external_data=external_data)


class Pipeline:
    """Runs passes one after the other and keeps of each only what passes its check.

    Args:
        passes: in order.
        on_error: "revert" undoes a pass that fails, says so in the report and goes on; "raise" stops.
        count: count multiply-accumulates for the report, which takes a good part of the time of a fast pass.
    """

    def __init__(
        self, *passes: Pass, on_error: Literal["revert", "raise"] = "revert", count: bool = True
    ) -> None:
        self.passes = passes
        self.on_error = on_error
        self.count = count

    def __call__(
        self,
        model: Model,
        *,
        data: Any = None,
        target: Target | None = None,
        seed: int = 0,
        jobs: int = 1,
        progress: Progress | None = None,
        metric: Metric | None = None,
    ) -> Result:
        """Run every pass on a copy of the model.

        Args:
            model: left as it is.
            data: calibration batches for the passes that need them, and for checking.
            target: where the result is to run; processors by default.
            seed: of everything random.
            jobs: processes that may work in parallel.
            progress: called with (what, done, total): with the name of each pass before and after it, and by
                long steps; the total is None where it is not known.
            metric: runs a model on data of its own and says how good it is, more is better; for `max_drop`.

        Raises:
            PassError: with on_error="raise", when a pass fails or breaks the model.
            CalibrationError: the data does not fit the model.
        """
        target = target or Target.cpu()
        checker = Checker(model, target, _samples(data))
        sample = checker.feeds[-1] if checker.feeds else None
        ctx = Context(target, data, model, seed, jobs, progress, sample, metric)
        shapes = sample_shapes(model, checker.feeds[0]) if checker.feeds else None
        stats, macs = model.stats(), self._macs(model, shapes)
        steps: list[Step] = []
        for each in self.passes:
            _announce(ctx, each, 0)
            start = time.perf_counter()
            outcome, changes, error = self._attempt(each, model, ctx, checker, steps)
            seconds = time.perf_counter() - start
            before, macs_before = stats, macs
            if outcome is not model:
                if not each.lossless:
                    checker.accept(outcome)
                model, stats, macs = outcome, outcome.stats(), self._macs(outcome, shapes)
            steps.append(
                Step(each.describe(), seconds, before, stats, macs_before, macs, changes, error, each.name)
            )
            _announce(ctx, each, 1)
        return Result(model, Report(tuple(steps), tuple(checker.notes)))

    def _macs(self, model: Model, shapes: Shapes | None) -> int | None:
        return cost.macs(model, shapes) if self.count else None

    def _attempt(
        self, each: Pass, model: Model, ctx: Context, checker: Checker, steps: Sequence[Step]
    ) -> tuple[Model, Changes, str]:
        candidate = model.copy()
        try:
            changes = _run(each, candidate, ctx)
            if changes:
                _check(each, candidate, changes, checker)
            return candidate if changes else model, changes, ""
        except PassError as error:
            if self.on_error == "revert" and each.parts():
                return _piecewise(each, model, ctx, checker, str(error))
            failure = error
        if self.on_error == "raise":
            done = tuple(step.name for step in steps)
            raise type(failure)(str(failure), pass_name=each.name, node=failure.node, done=done) from failure
        return model, Changes(), str(failure)


def sample_shapes(model: Model, feeds: Mapping[str, Array]) -> Shapes:
    """Shapes of the inputs for one sample: fixed sizes as declared, others as fed, and a batch of one."""
    specs = [spec for spec in model.inputs() if spec.name in feeds]
    batch = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)}
    found: Shapes = {}
    for spec in specs:
        fed = feeds[spec.name].shape
        declared = spec.shape if spec.shape is not None else (None,) * len(fed)
        found[spec.name] = tuple(
            dim if isinstance(dim, int) else 1 if axis == 0 or dim in batch else fed[axis]
            for axis, dim in enumerate(declared)
        )
    return found


def _announce(ctx: Context, each: Pass, done: int) -> None:
    if ctx.progress:
        ctx.progress(each.name, done, 1)


def _samples(data: Any) -> list[Mapping[str, Array]]:
    if data is None:
        return []
    for feeds in data:
        return [feeds]
    raise CalibrationError("the calibration data is empty")


def _run(each: Pass, model: Model, ctx: Context) -> Changes:
    """Run a pass; one that crashes has failed like any other, and leaves the model before it intact."""
    try:
        return each.run(model, ctx)
    except LoadError as error:  # it is the result that cannot be read or run
        raise PassError(f"pass '{each.name}' failed: {error}", pass_name=each.name) from error
    except (OnnxSlimError, OSError, MemoryError):  # the caller's and the machine's, not the pass's
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise PassError(f"pass '{each.name}' failed with {reason}", pass_name=each.name) from error


def _check(each: Pass, candidate: Model, changes: Changes, checker: Checker) -> None:
    try:
        checker(candidate, lossless=each.lossless, shapes=each.keeps_shapes)
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
