"""Closed-form repair of a compressed model: every layer refitted, in turn, to what the original computes.

A layer behind a cut, a factorization or a quantizer sees other inputs than it was trained on. Given its own
inputs in the student and the output it should have, the best weights are those of a linear regression. Layers
are taken in topological order, each on the inputs that the layers already repaired give it, so that errors do
not add up (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, for residual
branches too).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Gram, Moments
from onnxslim.calibration.samples import Samples
from onnxslim.calibration.stages import SpillStore, StagedRunner, Stop
from onnxslim.calibration.stream import Batch, Progress, Values, stream
from onnxslim.engine.base import Changes, Log
from onnxslim.errors import CalibrationError, TimeUp
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of
from onnxslim.ops.channels.cut import Kept
from onnxslim.ops.layers import Floats, Layer, Positions, values_at
from onnxslim.passes.repair.activation import ElementwiseChain, Table, behind, tabulated
from onnxslim.passes.repair.descent import Rows, gradient_refine
from onnxslim.passes.repair.jobs import Job, Linear, goals
from onnxslim.passes.repair.plan import schedule, unchanged
from onnxslim.passes.repair.solve import USUAL, Fit, Method, fit
from onnxslim.runtime.targets import Target

# From a job, what the regression found for it (None: nothing better) and the moments of all rows, to what is
# to be written.
Finish: TypeAlias = Callable[[Job, "Fit | None", Gram], "Fit | None"]

# From a layer, the weights it should have as its matrix, moments of what it sees, and whether a bias takes in
# the mean of an error, to the matrix that it gets.
Storer: TypeAlias = Callable[[Layer, Floats, Gram, bool], Floats]

# Bytes of tensors between two stages that stay in memory; the rest goes to temporary files.
MEMORY = 1 << 27
# Positions of a layer's output to look at: a number per input, between bounds.
_ROWS_PER_INPUT = 48
_MIN_ROWS, _MAX_ROWS = 1 << 14, 40_000
# Elements of inputs to take out of a batch at a time.
_ELEMENTS = 1 << 23
# The strength of a fit is chosen by every so many-th sample, or row where there are too few samples, and the
# fit is then made on all: those to choose candidates by are too few for that (decision 61).
_EVERY = 4
# Mean squared error, relative to the mean square of the original's output, that is rounding.
_ROUNDING = 1e-10


def repair(
    student: Model,
    teacher: Model,
    data: Samples,
    *,
    kept: Kept = MappingProxyType({}),
    method: Method = "ridge",
    target: Target | None = None,
    progress: Progress | None = None,
    layers: Collection[str] | None = None,
    memory: int = MEMORY,
    finish: Finish | None = None,
    chosen: bool = True,
    descend: bool = True,
    part: float = 1.0,
) -> Changes:
    """Refit the weights of a compressed model to the original's outputs, layer by layer.

    Tensors of the two models correspond by name. Convolutions, transposed convolutions and matrix products
    get new weights and biases; normalizations, and scales and shifts per channel, new values. A layer's goal
    is its output before the activation, or, where that goes into a sum whose other operand is at hand, the
    sum; where an activation follows, the error behind it is what counts. How strongly weights are held to
    what they are is chosen for each layer on a quarter of the samples; where new weights are no better on
    these, the old ones stay.

    Args:
        student: edited in place.
        teacher: the original; not modified.
        data: samples to fit on, without labels.
        kept: for axes of the teacher's tensors, the indices the student's tensor of that name still has;
            axes that are not in it have the same size in both.
        method: "ridge" for weights and biases, "bias" for the means of the outputs alone.
        target: where to run; processors by default.
        progress: called with ("repairing", layers done, layers in all).
        layers: names of the output tensors of layers to refit; by default all those whose input is no longer
            computed as in the teacher.
        memory: bytes of intermediate tensors to keep in memory; more are put into temporary files.
        finish: has the last word on what is written, such as weights that are rounded; layers then need not
            have got other inputs.
        chosen: whether nothing is to be chosen by the samples for that any more: they are then fitted to as
            well.
        descend: whether weights before an activation are fitted by descent on the error behind it, once
            regression has found them.
        part: of the positions that are looked at by default.

    Returns:
        What was refitted, with the error on what it was chosen by before and after, and what was left alone.

    Raises:
        CalibrationError: the data is empty or does not fit the model.
        UsageError: a name in `layers` is not that of a tensor the student computes.
    """
    log = Log()
    ir.sort(student.graph)
    clean = unchanged(student, teacher)
    if finish:  # it may change what is the same so far
        clean &= {tensor.name for tensor in student.graph.inputs}
    stages = schedule(student, teacher, clean, layers, log)
    if any(stages):
        store = SpillStore(memory)
        work = _Repair(
            student, teacher, kept, method, target, clean, stages, store, log, finish, chosen, descend, part
        )
        try:
            work.run(data, progress)
        except TimeUp as error:
            if finish is not None:  # who has the last word on every layer has not had it
                raise
            log.skip(student.graph.name or "model", f"not all layers were fitted again: {error}")
    return log.done()


def in_turn(
    student: Model,
    teacher: Model,
    data: Samples,
    layers: Collection[str],
    store: Storer,
    *,
    target: Target | None = None,
    progress: Progress | None = None,
    chosen: bool = True,
    part: float = 1.0,
) -> Changes:
    """Have layers get weights of another kind, one after the other, each behind those that have them already.

    Args:
        student: edited in place.
        teacher, data, target, progress, chosen, part: see `repair`.
        layers: names of their output tensors.
        store: makes such a weight of the one that regression wants; a bias takes in the mean of the error.

    Raises:
        TimeUp: not all layers have got theirs.
    """

    def finish(job: Job, fitted: Fit | None, gram: Gram) -> Fit | None:
        assert isinstance(job, Linear)
        wanted = job.wanted(fitted)
        if wanted is None:
            return None
        restored = store(job.layer, wanted, gram, job.takes_bias)
        return job.landed(restored, wanted, fitted, gram)

    return repair(
        student,
        teacher,
        data,
        layers=layers,
        target=target,
        progress=progress,
        finish=finish,
        chosen=chosen,
        part=part,
    )


def refitted(model: Model, layer: Layer, matrix: Floats, gram: Gram) -> bool:
    """Give one layer other weights, its bias taking in the mean of the error; whether that is possible.

    Args:
        model: edited in place.
        layer: of it, or of a model that it is a copy of.
        matrix: the weights, as `Layer.matrix`.
        gram: moments of what the layer sees.
    """
    name = layer.node.outputs[0].name
    twin = layer_of(next(node for node in model.graph.nodes if node.outputs[0].name == name))
    assert isinstance(twin, Layer)
    own = [goal for goal in goals(twin, model.graph) if not goal.other]
    if not own:
        return False
    job = Linear(twin, own[-1])
    landed = job.landed(matrix, twin.matrix(), None, gram)
    return job.write(model.graph, landed.weight, landed.bias) is None


@dataclass
class _Sums:
    """Moments of one job, for the samples to fit on and those to choose by; where needed, their rows too."""

    train: Moments = field(default_factory=Moments)
    tune: Moments = field(default_factory=Moments)
    square: float = 0.0
    unfit: str = ""
    rows: tuple[list[Rows], list[Rows]] = field(default_factory=lambda: ([], []))


class _Sides(NamedTuple):
    """Tensors of both models for one batch, by name."""

    teacher: Values
    student: Values


_Batch: TypeAlias = Batch[_Sides]


class _Repair:
    """One call of `repair`: both models at the same stage, and the jobs there."""

    def __init__(
        self,
        student: Model,
        teacher: Model,
        kept: Kept,
        method: Method,
        target: Target | None,
        clean: set[str],
        stages: Sequence[Sequence[Job]],
        store: SpillStore,
        log: Log,
        finish: Finish | None,
        chosen: bool,
        descend: bool,
        part: float,
    ) -> None:
        self.student = student
        self._chosen = chosen
        self._strength = USUAL
        self._part = part
        self.finish = finish
        self.kept = kept
        self.method = method
        self.stages = stages
        self.store = store
        self.log = log
        # What is rounded afterwards by the moments alone is fitted by them, too.
        goals = [] if finish or not descend else [job.goal.tensor for jobs in stages for job in jobs]
        self.chains = _chains(student.graph, goals)
        given = clean & {tensor.name for node in teacher.graph.nodes for tensor in node.outputs}
        self.copy = StagedRunner(student, [_stop(jobs) for jobs in stages], store, given=given, target=target)
        wanted = [
            Stop([*_goals(jobs), *(name for name in self.copy.requests(stage) if name in given)])
            for stage, jobs in enumerate(stages)
        ]
        self.original = StagedRunner(teacher, wanted, store, target=target)

    def run(self, data: Samples, progress: Progress | None) -> None:
        """Refit all jobs, stage by stage."""
        used = data.seen if self._chosen else data.fit
        batches = [
            {name: self.store.put(array) for name, array in feeds.items()}
            for feeds in used.bind(self.student.inputs())
        ]
        done, total = 0, sum(map(len, self.stages))
        for stage, jobs in enumerate(self.stages):
            sums = [_Sums() for _ in jobs]
            for batch in stream(batches, partial(self._sides, stage)):
                for job, each in zip(jobs, sums, strict=True):
                    with np.errstate(invalid="ignore", over="ignore"):  # the moments tell
                        self._observe(job, each, batch)
            for job, each in zip(jobs, sums, strict=True):
                self._refit(job, each)
                for array in (array for rows in chain(*each.rows) for array in rows):
                    self.store.drop(array)
                done += 1
                if progress:
                    progress("repairing", done, total)

    def _sides(self, stage: int, index: int, feeds: Mapping[str, Array]) -> _Sides:
        """Both models, run up to a stage."""
        teacher = self.original.run(stage, index, feeds)
        return _Sides(teacher, self.copy.run(stage, index, {**feeds, **teacher}))

    def _observe(self, job: Job, sums: _Sums, batch: _Batch) -> None:
        seen = zip((sums.train, sums.tune), sums.rows, _positions(job, batch, self._part), strict=True)
        for moments, rows, at in seen:
            for part in np.array_split(at, -(-at.size * job.size // _ELEMENTS) or 1):
                goal = self._goal(job, batch, part)
                if isinstance(goal, str):
                    sums.unfit = goal
                    return
                x, present = job.rows(batch.values.student, part)
                sums.square += float(np.square(goal, dtype=np.float64).sum())
                inputs, goal = x if self.method == "ridge" else x[:, :0], goal.reshape(present.shape)
                moments.update(inputs, goal - present)
                if part.size and job.goal.tensor in self.chains:
                    rows.append(Rows(*map(self.store.put, (inputs, goal, present))))

    def _goal(self, job: Job, batch: _Batch, at: Positions) -> Floats | str:
        """The teacher's values at some positions, as far as the student still has their channels."""
        value = batch.values.teacher[job.goal.tensor]
        axis = job.axis % value.ndim if -job.axis <= value.ndim else 0
        channels: NDArray[np.intp] | None = None
        for (tensor, each), indices in self.kept.items():
            if tensor == job.goal.tensor and each % value.ndim == axis:
                channels = np.asarray(indices)
            elif tensor == job.goal.tensor:
                value = value.take(indices, each)
        size = value.shape[axis] if channels is None else channels.size
        positions = value.size // max(value.shape[axis], 1)
        if positions != job.count(batch.values.student) or size != job.goal.scale.size:
            return f"the original's '{job.goal.tensor}' has another shape, {value.shape}"
        found = values_at(value, axis, at)
        return found if channels is None else found[channels]

    def _refit(self, job: Job, sums: _Sums) -> None:
        if sums.unfit:
            self.log.skip(job.label, sums.unfit)
            return
        if self.method == "bias" and not job.takes_bias:
            self.log.skip(job.label, "it has no bias")
            return
        found = self._finished(job, sums) if self.finish else self._fit(job, sums)
        if isinstance(found, str):
            self.log.skip(job.label, found)
            return
        problem = job.write(self.student.graph, found.weight, found.bias)
        if problem:
            self.log.skip(job.label, problem)
            return
        how = f"error on what was chosen by {found.before:.3g} -> {found.after:.3g}"
        self.log.change(job.label, f"refitted to '{job.goal.tensor}'", how)

    def _finished(self, job: Job, sums: _Sums) -> Fit | str:
        try:
            whole = sums.train.result()
            whole = whole.joined(sums.tune.result())
        except CalibrationError as error:
            return str(error)
        fitted = self._fit(job, sums)
        assert self.finish is not None
        return self.finish(job, fitted if isinstance(fitted, Fit) else None, whole) or "it is left as it is"

    def _fit(self, job: Job, sums: _Sums) -> Fit | str:
        if sums.train.empty != sums.tune.empty:
            return "it makes too few values in all of the data to be fitted to some and chosen by others"
        try:
            train, tune = sums.train.result(), sums.tune.result()
        except CalibrationError as error:
            return str(error)
        mask = job.mask
        found = fit(train, tune, method=self.method, bias=job.takes_bias, mask=mask, near=self._strength)
        if found.strength != math.inf:  # the next layer wants about the same
            self._strength = found.strength
        if found.before <= _ROUNDING * sums.square / (train.count + tune.count):
            return "it computes what the original does"
        # Steps of descent know no mask.
        whole = self.method == "bias" or (found.weight is not None and mask is None)
        function = self._function(job, sums) if whole else None
        if function is not None:
            fitted_on, chosen_by = sums.rows
            found = gradient_refine(
                found, (train, fitted_on), (tune, chosen_by), function, bias=job.takes_bias
            )
        if not found.after < found.before:
            return "other weights are no better"
        return found

    def _function(self, job: Job, sums: _Sums) -> Table | None:
        """What the goal is seen through."""
        nodes = self.chains.get(job.goal.tensor)
        seen = [rows.wanted for rows in chain(*sums.rows)]
        if nodes is None or not seen:
            return None
        least, most = min(float(each.min()) for each in seen), max(float(each.max()) for each in seen)
        return tabulated(self.student, nodes, least, most)


def _positions(job: Job, batch: _Batch, part: float) -> tuple[Positions, Positions]:
    """Positions of a job's goal to fit on, and those of every so many-th sample to choose the strength by."""
    count = job.count(batch.values.student)
    at = batch.positions(count, int(part * _rows(job)))
    which = batch.first + at * batch.samples // max(count, 1) if batch.total > _EVERY else np.arange(at.size)
    chosen_by = which % _EVERY == 0
    return at[~chosen_by], at[chosen_by]


def _stop(jobs: Sequence[Job]) -> Stop:
    reads = dict.fromkeys(name for job in jobs for name in job.reads())
    peeks = {id(node): node for job in jobs for node in job.peeks()}
    return Stop(list(reads), list(peeks.values()))


def _goals(jobs: Sequence[Job]) -> Iterator[str]:
    yield from dict.fromkeys(job.goal.tensor for job in jobs)


def _chains(graph: ir.Graph, goals: Collection[str]) -> dict[str, ElementwiseChain]:
    """By name of a tensor, the activation behind it if there is one."""
    made = {tensor.name: tensor for node in graph.nodes for tensor in node.outputs}
    found = {name: behind(graph, made[name]) for name in goals}
    return {name: chain for name, chain in found.items() if chain is not None}


def _rows(job: Job) -> int:
    return int(np.clip(_ROWS_PER_INPUT * job.width, _MIN_ROWS, _MAX_ROWS))


__all__ = ["Finish", "repair"]
