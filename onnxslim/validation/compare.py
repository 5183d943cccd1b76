"""Two models side by side in ONNX Runtime: are the outputs the same, and what did it gain?

Outputs are reduced batch by batch, so that no more than one batch of them is ever held. All sums are taken in
float64, over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import OutputPart, parts_of
from onnxslim.calibration.noise import Noise
from onnxslim.engine import check
from onnxslim.engine.base import Progress, Shapes
from onnxslim.errors import CalibrationError, LoadError, UsageError, ValidationError
from onnxslim.formats import percent
from onnxslim.ir.graph import Array
from onnxslim.ir.model import InputSpec, Model, Source, load
from onnxslim.runtime.metric import Metric, hits, labels_of, measure
from onnxslim.runtime.native import CPU
from onnxslim.runtime.probe import Feeds, probes
from onnxslim.runtime.profile import available, counted, left_over, may_stray, places, require_usable
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import Latency, latencies
from onnxslim.shapes import cost
from onnxslim.shapes.given import InputShapes, one_sample, sized_by, with_sizes
from onnxslim.validation.verdict import BeforeAfter, Footprint, OutputRow, ProviderVerdict, Verdict

T = TypeVar("T")

BLOCK = 1 << 20
# A median that much above the fastest call means threads that wait for each other and not for the model.
UNSTEADY = 1.5
# How far an original gets from what guessing gives to always right, if it does not see what it was trained
# on: images of another scale or order of channels give that. Of fewer samples nothing is said.
NEAR_CHANCE = 0.1
SAYING = 20


def validate(
    a: Source,
    b: Source,
    data: CalibrationData | Iterable[Mapping[str, Array]] | Mapping[str, Array] | str | Path | None = None,
    targets: Sequence[Target | str] | Target | str | None = None,
    *,
    labels: Array | None = None,
    metric: Metric | None = None,
    rounds: int = 30,
    seconds: float = 5.0,
    progress: Progress | None = None,
    input_shapes: InputShapes | None = None,
) -> Verdict:
    """Run two models on the same inputs and compare what comes out, how fast and how large they are.

    Args:
        a: the original: a file, a ModelProto or a Model.
        b: what was made of it.
        data: batches of inputs, samples, or where they lie (`CalibrationData.of`); made up from the declared
            shapes if None, which says little.
        targets: where to run, or the names of that; every execution provider there is by default.
        labels: the class of every sample, shape (samples,), in the order of the data.
        metric: called with a function from inputs to outputs, both dicts by name, once for each model; it
            runs that on data of its own and returns how good the model is, more is better.
        rounds: interleaved calls to time on the first batch; 0 measures no latency.
        seconds: budget for timing, per provider.
        progress: called with ("validating", batches done, batches in all).
        input_shapes: see `Pipeline`.

    Raises:
        UsageError: there is no input of a name in `input_shapes`, or it has other axes.
        LoadError: a model is broken or does not run.
        TargetError: a provider is not available, or loads but runs nothing.
        CalibrationError: data or labels do not fit the model.
        ValidationError: the second model cannot take the place of the first.
    """
    first, second = load(a), load(b)
    _require_same_interface(first, second)
    known = None if labels is None else np.asarray(labels)
    for model in (first, second):
        check.require_affordable(model)
    several = [targets] if isinstance(targets, str | Target) else available() if targets is None else targets
    chosen = _ordered([Target.of(each) for each in several])
    for each in chosen:
        require_usable(each)
    runners = [_Runner(first, second, target, metric) for target in chosen]
    given = None if data is None else CalibrationData.of(data, first.inputs())
    declared = first.inputs()
    specs = with_sizes(declared, input_shapes or {})
    batches, made_up = inputs_for(first, given, runners[0].sessions[0], specs)
    sizes = _stream(batches, runners, known, progress, _length(given))
    opening = runners[0].opening
    timed = [runner.time(rounds, seconds) for runner in runners]
    notes = [text for runner in runners for text in (*runner.notes, *runner.strays(chosen[0]))]
    notes += runners[0].guesses()
    shapes = one_sample(declared, specs, {name: array.shape for name, array in opening.items()})
    origin = cost.ASSUMED if made_up else cost.SEEN
    notes.extend(cost.caveats(first, shapes, origin, sized_by(declared, specs)))
    return Verdict(
        before=footprint(first, shapes),
        after=footprint(second, shapes),
        providers=tuple(
            runner.verdict(latency, ratio) for runner, (latency, ratio) in zip(runners, timed, strict=True)
        ),
        samples=sum(sizes),
        batches=len(sizes),
        batch=sizes[0],
        whose="made up" if made_up else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def _require_same_interface(first: Model, second: Model) -> None:
    missing = [t.name for t in first.graph.outputs if t.name not in {o.name for o in second.graph.outputs}]
    if missing:
        raise ValidationError(f"the second model has no output '{missing[0]}', which the first one has")
    known = {spec.name for spec in first.inputs()}
    extra = [spec.name for spec in second.inputs() if spec.required and spec.name not in known]
    if extra:
        raise ValidationError(f"the second model needs an input '{extra[0]}', which the first one has not")


def _ordered(targets: Sequence[Target]) -> list[Target]:
    """Processors first: they are the reference the others are compared with."""
    if not targets:
        raise UsageError("no execution provider to validate on")
    return sorted(targets, key=lambda target: target.provider != CPU)


def inputs_for(
    model: Model, data: CalibrationData | None, session: Session, specs: Sequence[InputSpec]
) -> tuple[Iterator[Feeds], bool]:
    """Batches to run a model on, and whether they had to be made up.

    Args:
        model: what to feed.
        data: what there is.
        session: the same model, loaded.
        specs: its inputs, where somebody said more of their sizes than the model does.

    Raises:
        CalibrationError: the data is empty, or there is nothing that the model runs on.
    """
    if data is None:
        # What runs with ONNX Runtime's optimizations alone is no input of the model.
        made = probes(model, Session(model, session.target, optimize="none", once=True), (), specs)
        if not made:
            raise CalibrationError("no inputs could be made up on which the model runs; pass data")
        return iter([run.feeds for run in made]), True
    bound = data.bind(model.inputs())
    batches = iter(bound)
    head = next(batches, None)
    if head is None:
        raise CalibrationError(f"{bound.name}: there is no data")
    return chain([head], batches), False


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _stream(
    batches: Iterator[Feeds],
    runners: Sequence[_Runner],
    labels: Array | None,
    progress: Progress | None,
    total: int | None,
) -> list[int]:
    """Run every batch everywhere; returns how many samples each had."""
    sizes: list[int] = []
    for feeds in batches:
        start, size = sum(sizes), _batch_size(feeds)
        part = None if labels is None else labels_of(labels, start, size)
        reference: check.Outputs | None = None
        for runner in runners:
            reference = runner.update(feeds, size, part, reference)
        sizes.append(size)
        if progress:
            progress("validating", len(sizes), total)
    if labels is not None and len(labels) != sum(sizes):
        raise CalibrationError(f"there are {len(labels)} labels for {sum(sizes)} samples")
    return sizes


def _batch_size(feeds: Feeds) -> int:
    return next((int(array.shape[0]) for array in feeds.values() if array.ndim), 1)


def footprint(model: Model, shapes: Shapes) -> Footprint:
    """The size of a model, with the MACs of one sample of these shapes."""
    stats = model.stats()
    macs = cost.macs(model, shapes)
    return Footprint(stats.nodes, stats.parameters, stats.bytes, macs)


class _Runner:
    """Both models on one target, and what was seen of their outputs so far."""

    def __init__(self, first: Model, second: Model, target: Target, metric: Metric | None) -> None:
        self.target = target
        self._models = first, second
        self._placed: tuple[Mapping[str, int], Mapping[str, int]] | None = None
        self._strays: dict[str, str] = {}
        self.sessions = (Session(first, target), _second(lambda: Session(second, target)))
        self.notes = [f"{target.name}: {target.precision}"] if target.precision else []
        self.opening: Feeds = {}
        self._parts = list(_outputs_and_parts(first))
        self._rows, self._drift = ([OutputSums.of(part) for part in self._parts] for _ in range(2))
        self._samples = 0
        self._correct = [0, 0]
        self._classes = 0
        self._metric = metric
        self._labelled = self._compared = False

    def update(
        self, feeds: Feeds, size: int, labels: Array | None, reference: check.Outputs | None
    ) -> check.Outputs:
        """Take in a batch; returns the outputs of the first model, or the reference if one is given."""
        first, second = self.sessions
        original = _first(first, feeds)
        taken = {name: array for name, array in feeds.items() if name in second.input_names}
        result = _second(lambda: second.run(taken))
        if not self.opening:
            self.opening = feeds
            self._note_randomness(feeds, original)
            self._place(feeds, taken)
        for part, row in zip(self._parts, self._rows, strict=True):
            row.update(part.of(original), part.of(result))
        if reference is not None:
            self._compared = True
            for part, row in zip(self._parts, self._drift, strict=True):
                row.update(part.of(reference), part.of(original))
                if problem := check.difference(part.of(reference), part.of(original)):
                    self._strays.setdefault(part.name, problem)
        self._samples += size
        if labels is not None:
            self._score(labels, (original, result))
        return original if reference is None else reference

    def _place(self, first: Feeds, second: Feeds) -> None:
        """See that the provider really runs the models, where it could leave them to processors."""
        if may_stray(self.target):
            before, after = self._models
            told = places(before, self.target, first), _second(lambda: places(after, self.target, second))
            self._placed = counted(told[0]), counted(told[1])
            for which, nodes in zip(("first", "second"), told, strict=True):
                self.notes += left_over(self.target, which, nodes)

    def strays(self, reference: Target) -> Iterator[str]:
        """Notes on outputs of the first model that differ between providers."""
        for name, problem in self._strays.items():
            yield (
                f"{self.target.name}: output '{name}' of the first model itself is not what it is on "
                f"{reference.name}: it {problem}; that lies between the providers, not in the second model"
            )

    def _note_randomness(self, feeds: Feeds, original: check.Outputs) -> None:
        again = self.sessions[0].run(feeds)
        names = [name for name in original if check.difference(original[name], again[name])]
        if names:
            listed = ", ".join(f"'{name}'" for name in names)
            self.notes.append(
                f"{self.target.name}: outputs {listed} of the first model differ from run to run"
            )

    def _score(self, labels: Array, outputs: Sequence[check.Outputs]) -> None:
        self._labelled = True
        for index, values in enumerate(outputs):
            self._correct[index] += self._hits(values, labels)

    def _hits(self, values: check.Outputs, labels: Array) -> int:
        name = self.classifier()
        if name is None:
            raise CalibrationError("labels were given, but no output has shape (batch, classes)")
        if len(values[name]) != len(labels):
            raise CalibrationError(
                f"output '{name}' has {len(values[name])} rows for a batch of {len(labels)} samples"
            )
        self._classes = values[name].shape[1]
        return hits(values[name], labels)

    def guesses(self) -> Iterator[str]:
        """A note if the original is right hardly more often than somebody who guesses."""
        if self._classes and self._samples >= SAYING:
            right, chance = self._correct[0] / self._samples, 1 / self._classes
            if right < chance + NEAR_CHANCE * (1 - chance):
                yield (
                    f"the first model itself is right in {percent(right)} of the samples, where guessing "
                    f"among {self._classes} classes is in {percent(chance)}: look at how inputs are prepared "
                    "(scale, mean, order of channels) and at the labels"
                )

    def _measured(self) -> BeforeAfter | None:
        metric, (first, second) = self._metric, self._models
        if metric is None:
            return None
        after = _second(lambda: measure(metric, second, self.target))
        return BeforeAfter(measure(metric, first, self.target), after)

    def classifier(self) -> str | None:
        """The first output of shape (batch, classes)."""
        return next((row.name for row in self._rows if row.classifies), None)

    def time(self, rounds: int, seconds: float) -> tuple[tuple[Latency, Latency] | None, float | None]:
        """Latency of both models on the first batch, and the ratio of the second to the first."""
        if rounds <= 0:
            return None, None
        if why := self.sessions[0].no_latency:
            self.notes.append(f"{self.target.name}: no latency is told: {why}")
            return None, None
        (first, second), ratios = latencies(self.sessions, self.opening, rounds=rounds, seconds=seconds)
        if any(each.median > UNSTEADY * each.minimum for each in (first, second)):
            self.notes.append(
                f"{self.target.name}: latency is unsteady (fastest calls {first.minimum:.3f} and "
                f"{second.minimum:.3f} ms): something else keeps this machine busy; one thread is steadier"
            )
        return (first, second), ratios[1]

    def verdict(self, latency: tuple[Latency, Latency] | None, ratio: float | None) -> ProviderVerdict:
        """Everything measured here."""
        return ProviderVerdict(
            target=self.target.name,
            outputs=tuple(row.result() for row in self._rows),
            original=tuple(row.result() for row in self._drift) if self._compared else (),
            accuracy=BeforeAfter(*(n / self._samples for n in self._correct)) if self._labelled else None,
            metric=self._measured(),
            latency=latency,
            ratio=ratio,
            placed=self._placed,
        )


def _outputs_and_parts(model: Model) -> Iterator[OutputPart]:
    """Every output, and after it the parts that a Concat puts together: boxes, and scores of classes."""
    for name, parts in parts_of(model).items():
        yield OutputPart(name, name)
        yield from parts if len(parts) > 1 else ()


def _first(session: Session, feeds: Feeds) -> check.Outputs:
    try:
        return session.run(feeds)
    except LoadError as error:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
        raise CalibrationError(f"the first model does not run on a batch of {shapes}: {error}") from error


def _second(attempt: Callable[[], T]) -> T:
    """Whatever only the second model fails at is a finding, not bad input."""
    try:
        return attempt()
    except LoadError as error:
        raise ValidationError(f"the second model fails where the first one does not: {error}") from error


def compare(name: str, reference: Any, actual: Any) -> OutputRow:
    """How close one value is to another, both of one batch."""
    row = OutputSums(name)
    row.update(reference, actual)
    return row.result()


@dataclass
class OutputSums:
    """Running sums over one output."""

    name: str
    sums: Noise = field(default_factory=Noise)
    power: float = 0.0
    dot: float = 0.0
    worst: float = 0.0
    same: int = 0
    count: int = 0
    agreed: int = 0
    samples: int = 0
    batches: int = 0
    floating: bool = True
    classifies: bool = True
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, part: OutputPart) -> OutputSums:
        """For an output, or for a part of one, which says nothing of classes."""
        return cls(part.name, classifies=part.stop is None)

    def update(self, reference: Any, actual: Any) -> None:
        """Take in one batch of this output."""
        self.batches += 1
        if not isinstance(reference, np.ndarray):
            self.floating = self.classifies = False
            self.same += not check.difference(reference, actual)
            self.count += 1
            return
        problem = check.type_problem(reference, actual)
        if problem:
            self.problems.append(problem)
            return
        self.floating &= reference.dtype.kind == "f"
        self.classifies &= self.floating and reference.ndim == 2 and reference.shape[1] >= 2
        for start in range(0, reference.size, BLOCK):
            self._add(*(array.reshape(-1)[start : start + BLOCK] for array in (reference, actual)))
        if self.classifies:
            self.agreed += int((reference.argmax(axis=1) == actual.argmax(axis=1)).sum())
            self.samples += len(reference)

    def _add(self, reference: Array, actual: Array) -> None:
        exact = reference == actual
        if self.floating:
            exact |= np.isnan(reference) & np.isnan(actual)
        self.same += int(np.count_nonzero(exact))
        self.count += reference.size
        if not self.floating:
            return
        # What is infinite or NaN on both sides is no noise; on one side only, it is infinite noise.
        usable = np.isfinite(reference) & np.isfinite(actual)
        if not (usable | exact).all():
            self.sums.noise = self.worst = math.inf
        x, y = reference[usable].astype(np.float64), actual[usable].astype(np.float64)
        if x.size:
            self.sums.add(x, y)
            self.power += float(y @ y)
            self.dot += float(x @ y)
            self.worst = max(self.worst, float(np.abs(x - y).max()))

    def result(self) -> OutputRow:
        """The figures so far."""
        equal = self.same / self.count if self.count else 1.0
        if self.problems:
            problem = f"{self.problems[0]} (in {len(self.problems)} of {self.batches} batches)"
            return OutputRow(self.name, 0.0, problem=problem)
        if not self.floating:
            return OutputRow(self.name, equal)
        top1 = self.agreed / self.samples if self.classifies and self.samples else None
        return OutputRow(self.name, equal, self.worst, self.sums.sqnr, self._cosine(), top1)

    def _cosine(self) -> float:
        if self.sums.noise == 0.0:
            return 1.0
        if math.isinf(self.sums.noise):
            return math.nan
        norms = math.sqrt(self.sums.signal) * math.sqrt(self.power)
        return self.dot / norms if norms else 0.0
