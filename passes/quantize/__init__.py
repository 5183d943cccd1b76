"""Static quantization to 8-bit integers, as Q/DQ pairs in standard operators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxslim import shapes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.seen import NOTE, seen
from onnxslim.engine.base import Changes, Context, Effort, Log, Pass, PassWork, options
from onnxslim.engine.demands import KEPT, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS, tell_idle
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PlanOf
from onnxslim.errors import TimeUp, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.learn import door
from onnxslim.learn.door import UnknownError
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.learning.lessons import RUNS, distance
from onnxslim.passes.quantize.block_products import clamped, is_product
from onnxslim.passes.quantize.build import Builder, Candidate
from onnxslim.passes.quantize.choices import (
    SIMULATED,
    Activations,
    Algorithm,
    Bits,
    Settings,
    StorageChoice,
    StorageForm,
    Variant,
)
from onnxslim.passes.quantize.coder import priced
from onnxslim.passes.quantize.dynamic import Dynamic
from onnxslim.passes.quantize.figures import LayerFigures, QuantizeFigures
from onnxslim.passes.quantize.fused import beside_floats, kernels
from onnxslim.passes.quantize.goal import TrialGoal
from onnxslim.passes.quantize.prepare import MIN_OPSET, TWO_BITS_OPSET, WIDE_OPSET, prepare
from onnxslim.passes.quantize.rate import price_for
from onnxslim.passes.quantize.recorded import LayoutName, QuantizationPlan, QuantizeOptions, moves_of
from onnxslim.passes.quantize.search import ENOUGH, Search, Sensitivity, stored
from onnxslim.passes.quantize.shared import look_up, taken
from onnxslim.passes.quantize.static import Static
from onnxslim.passes.quantize.strategy import Strategy
from onnxslim.passes.quantize.tables import ties_of, untie
from onnxslim.passes.quantize.train import BATCH, RATE, Training
from onnxslim.passes.quantize.trained import Trained, constants_read, strip
from onnxslim.passes.quantize.trial import Trial
from onnxslim.passes.quantize.weight_only import WeightOnly, WeightOnlyBlocks, WeightOnlyBytes
from onnxslim.passes.quantize.weights import floor_for
from onnxslim.runtime.native import CPU
from onnxslim.runtime.targets import Target, layouts
from onnxslim.shapes.cost import uncounted

__all__ = ["QuantizationPlan", "Quantize", "QuantizeFigures"]

# In dB: what keeps more is not worth a search; nothing is, and everything is.
ENOUGH_BY_EFFORT: Mapping[Effort, float] = {"quick": -math.inf, "normal": ENOUGH, "thorough": math.inf}
# In dB: what lacks more is not tried with better integers before layers are left out of them, or get eight
# bits instead of four: they have brought 5 dB at most, and 6.4 in four bits (benchmarks/README.md).
FAR = 10.0
# Where weights have less than this part in all the noise, better integers of them are not looked for: what
# they would bring at the best is less than chance (benchmarks/README.md, Speed).
PART = 1 / 3
WORK: Mapping[Effort, PassWork] = {
    "quick": PassWork(0.3, 2e-3, 15.0, 1e-7),
    "normal": PassWork(0.3, 5e-3, 60.0, 5e-7),
    "thorough": PassWork(0.3, 2e-2, 130.0, 1e-6),
}
EFFORTS = (
    "how much to try: quick takes the nearest integers by one way to choose ranges, and all layers, unless "
    "require_sqnr or max_drop is given and takes fewer; normal "
    f"searches where that keeps less than {ENOUGH:g} dB; thorough always does"
)
ObserverName = Literal["auto", "minmax", "percentile", "kl", "mse"]


@options
class Quantize(Pass):
    """Run weighted operators, and what lies between them, in 8-bit integers (static QDQ, calibrated).

    Weights become int8 with one symmetric scale per output channel, activations get the integer type of the
    target with a range chosen on calibration data, biases int32. Operators that gain nothing stay in floating
    point, and the report names them.

    Part of the data is set aside to choose by. If the outputs lose more than `require_sqnr` allows on it, or
    the metric (or the share of equal decisions) drops by more than `max_drop`, every layer is measured on its
    own, and the fewest that have to are kept out of integers. If the whole then takes longer than in floating
    point, so are the layers that make it slow.

    With `activations="none"` the weights of matrix products and embeddings alone become integers: int8, or
    int4 with a scale for every few inputs. ONNX Runtime multiplies by them as they are, and rounds the data
    to int8 by blocks as it comes; the report says what that costs. Codes of few bits that a file brings
    along, in whichever form, are kept to the bit.

    With `train` the result is a start: scales, weights and biases are then learnt through the rounding, with
    PyTorch, such that outputs come close to those of the model that came into the pipeline. The best state on
    samples that nothing was fitted to is kept, the start included. All layers that can are in integers then;
    with `require_sqnr` or `max_drop`, layers are kept out of them, and the rest is trained once more, where
    that is not enough after training.
    """

    name: ClassVar[str] = "quantize"
    beside_plan: ClassVar[tuple[str, ...]] = ("train", "lr", "features", "checkpoint")

    weights: Bits = Field(
        "int8",
        description="integer type of weights; int4 halves the file again, and is computed with as int8 or, "
        "where activations are not integers, in blocks of 32 with a scale each, "
        "on processors a zero point, too; int3 (stored as int4) and int2 (-1, 0 and 1, in opset 25) are "
        "computed with as int8, too",
    )
    activations: Activations = Field(
        "auto",
        description="integer type of activations: that of the target, or another one; uint4 and int4: a "
        "simulation for processors, of what weighted operators read alone; dynamic: only matrix "
        "products by constants, and on processors LSTMs, run in integers, and ranges of their data are those "
        "of every single input, without calibration; none: weights of matrix products and embeddings are "
        "stored as integers",
    )
    storage: StorageChoice = Field(
        "auto",
        description="with activations=none, how such weights are written: DequantizeLinear in front of the "
        "product, which any runtime reads (qdq), or ONNX Runtime's own MatMulNBits, with accuracy_level 4 "
        "(matmulnbits), which it makes of the former itself; auto: qdq, unless the file has the latter, the "
        "target runs only that (webgpu) or, on processors, that is not possible (a table that is looked up "
        "and multiplied by) or slow (a Relu or Clip alone reads a product)",
    )
    download: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the bytes of 8-bit weights to keep once they are deflated, as when they are "
        "sent: with data, codes are chosen by error and bits; without, channels with small weights get "
        "fewer of them",
    )
    block_size: int | None = Field(
        None,
        ge=16,
        le=256,
        description="with activations=none, inputs of an output that share a scale, a power of two. By "
        "default 32 in four bits; in eight, all of them, or 128 in MatMulNBits",
    )
    size: float | None = Field(
        None,
        gt=0,
        le=1,
        description="with weights of fewer than eight bits, bytes of the constants to keep, of 1: as far as "
        "there is room, the layers are in eight bits that gain most by it",
    )
    observer: ObserverName = Field(
        "auto",
        description="how ranges of activations are chosen: exact min/max, a percentile, least KL divergence, "
        "least mean squared error, or whichever does best on the samples to choose by",
    )
    percentile: float = Field(99.99, gt=0, le=100, description="percent of the values kept by `percentile`")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to keep in float")
    classifier: bool = Field(False, description="quantize the last matrix product before an output too")
    bias_correction: bool = Field(
        True, description="adjust biases so that rounding the weights leaves the mean of every channel alone"
    )
    per_channel: bool = Field(True, description="one weight scale per output channel")
    require_sqnr: LeastSqnr = Field(
        None,
        description=f"{KEPT}; layers that cost too much of it stay in float (0: none does). By default 25, "
        "or 0 where max_drop, size or train is given",
    )
    max_drop: MostDrop = None
    algorithm: Algorithm = Field(
        "auto",
        description="how weights are rounded: to the nearest code (rtn), for the least error of a layer's "
        "outputs by coordinate descent (cd), the same from what GPTQ finds (gptq), or by descent where that "
        "matters and helps (auto)",
    )
    equalization: bool = Field(
        True,
        description="scale channels, in what makes and reads them, to make even use of the ranges of "
        "activations, where the outputs get better by it",
    )
    sequential: bool = Field(
        True,
        description="fit weights, before they are rounded, to the inputs that the layers before make of "
        "integers, where the outputs get better by it",
    )
    optimize_for: Literal["accuracy", "latency"] = Field(
        "accuracy",
        description="latency: leave the smallest layers in float where that is measured to be faster",
    )
    layout: LayoutName = Field(
        "target",
        description="for which target the graph is laid out, if not for the one that it is judged on",
    )
    train: int | None = Field(
        None,
        ge=1,
        description="learn scales, weights and biases through the rounding, from what the original makes of "
        "the data, in so many steps of 64 samples; with integer activations and PyTorch",
    )
    lr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="with train, largest step, relative to the size of each weight and scale "
        f"[default: {RATE:g}]",
    )
    features: tuple[str, ...] = Field(
        (),
        description="with train, names of tensors inside the model that are to come close to the original's, "
        "too",
    )
    checkpoint: Path | None = Field(
        None,
        description="with train, file to keep the state in, once a minute; goes on from it, if it is there",
    )
    effort: Effort = Field("normal", description=EFFORTS)
    layers: bool = Field(
        False,
        description="measure what every layer alone does to the outputs, even where enough is kept anyway",
    )
    plan: Annotated[Path | QuantizationPlan | None, PlanOf(QuantizationPlan)] = Field(
        None, description="file of a plan to replay, instead of choosing"
    )

    def __post_init__(self) -> None:
        """Refuse a choice beside a plan, and options that mean nothing with others."""
        if self.plan is not None:
            self.require_alone()
        if self.activations not in (None, "none"):
            for option, given in (("storage", self.storage != "auto"), ("block_size", self.block_size)):
                if given:
                    raise UsageError(f"pass 'quantize': {option} goes with activations=none")
        if self.size is not None and (self.weights == "int8" or self._way is Dynamic):
            raise UsageError("pass 'quantize': size goes with weights=int4, int3 or int2, and not dynamic")
        if self.download is not None and (self.weights != "int8" or self.activations == "none"):
            raise UsageError("pass 'quantize': download goes with weights=int8 and integer activations")
        if self.weights in ("int3", "int2") and not self._way.calibrated:
            raise UsageError(
                f"pass 'quantize': {self.weights} weights go with integer activations that are calibrated"
            )
        if self.train is not None and not self._way.calibrated:
            raise UsageError("pass 'quantize': train goes with integer activations that are calibrated")
        if self.optimize_for == "latency" and self.activations in SIMULATED:
            raise UsageError(
                f"pass 'quantize': activations={self.activations} is a simulation, which nothing runs faster"
            )
        for option in ("lr", "features", "checkpoint"):
            if self.train is None and getattr(self, option):
                raise UsageError(f"pass 'quantize': {option} goes with train")
        if (size := self.block_size or 16) & (size - 1):
            raise UsageError(f"pass 'quantize': block_size is a power of two, not {size}")

    def run(self, model: Model, ctx: Context) -> Changes:
        """Quantize the model in place.

        Raises:
            CalibrationError: there is no calibration data, or it does not fit the model.
            PassError: the model's opset is too old and cannot be raised.
            UsageError: options contradict each other, or the plan cannot be read or does not fit the model.
        """
        self.require_data(ctx.data)
        if (plan := self._planned()) is not None:
            return replace(self._as(plan), **{name: getattr(self, name) for name in self.beside_plan})._run(
                model, ctx, plan
            )
        return self._run(model, ctx, None)

    def _planned(self) -> QuantizationPlan | None:
        """The plan that was asked for."""
        return None if self.plan is None else QuantizationPlan.given(self.plan)

    @staticmethod
    def _as(plan: QuantizationPlan) -> Quantize:
        """The pass with the options that a plan was made with."""
        return Quantize(**{item.name: getattr(plan.options, item.name) for item in fields(plan.options)})

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        work = WORK[self.effort if self._way.calibrated else "quick"]
        return replace(work, samples=RUNS * BATCH * (self.train or 0))

    @property
    def learns(self) -> bool:
        """See `Pass.learns`."""
        return self.train is not None

    def require_installed(self) -> None:
        """See `Pass.require_installed`."""
        if self.train is not None:
            door.require(f"pass '{self.name}' with train")

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """Of every layer that it runs in integers while all others do not; without data, nothing is known."""
        self.require_data(ctx.data)
        if ctx.data is None:
            return ()
        log = Log()
        start = self._prepared(model.copy(), ctx, log)
        search, build = self._judged(start)
        trial, _ = self._everything(search, build, log)
        trial = search.rounding(trial) if self._rounds(trial, search) else trial
        return moves_of(trial, search.layers(trial), self._options())

    def _prepared(self, model: Model, ctx: Context, log: Log) -> Start:
        """What all candidates are made of; the model is edited.

        Raises:
            UsageError: options contradict each other.
        """
        before = stored(model)
        if self.activations == "dynamic" and self.weights != "int8":
            raise UsageError(
                f"pass 'quantize': {self.weights} weights go with activations=none, where ONNX Runtime turns "
                "data into integers as it comes as well"
            )
        ctx = replace(ctx, target=self._target(ctx.target))
        self._require_kernels(ctx.target)
        form = self._form(model, ctx.target)
        plain = form == "matmulnbits" or (self.weights == "int8" and self.block_size is None)
        wide = not plain or ctx.target.layout.activation.itemsize > 1
        opset = TWO_BITS_OPSET if self.weights == "int2" else WIDE_OPSET if wide else MIN_OPSET
        shared = taken(model, ctx.target.layout) if self._way.calibrated and self.weights == "int8" else {}
        prepare(model, ctx.target.layout, log, opset)
        tell_idle(self.exclude, model, log)
        trained = strip(model)
        ties = untie(model) if form == "matmulnbits" else {}
        shapes.infer(model)
        looked_up = _look(model, ctx)
        original = model.copy()
        if trained:
            trained.restore(original, ())
        trained = replace(trained, shared=shared)
        return Start(model, original, trained, ctx, looked_up, form, ties, before)

    def _form(self, model: Model, target: Target) -> StorageForm:
        """How weights are written that are only stored as integers."""
        if self.storage != "auto" or self.activations not in (None, "none"):
            return "qdq" if self.storage == "auto" else self.storage
        needed = self._is_for_cpu(target) and any(True for _ in chain(ties_of(model), clamped(model)))
        blocks = needed or target.layout.block_products
        return "matmulnbits" if blocks or any(map(is_product, model.nodes())) else "qdq"

    def _require_kernels(self, target: Target) -> None:
        """Raise UsageError if a target would run nothing of what is asked for in integers."""
        if self._way.calibrated and not target.layout.kernels:
            name = target.stands_for or (target.name if self.layout == "target" else self.layout)
            raise UsageError(
                f"pass 'quantize': {name} has no integer kernels; with activations=none weights are stored "
                "as integers"
            )
        if target.layout.bits is not None and not self._is_for_cpu(target):
            raise UsageError(
                f"pass 'quantize': activations={self.activations} is a simulation, for target and layout cpu"
            )

    def _is_for_cpu(self, target: Target) -> bool:
        """Whether the file is made for ONNX Runtime on the processor of this machine."""
        return target.provider == CPU and not target.stands_for and self.layout in ("target", "cpu")

    def _run(self, model: Model, ctx: Context, asked: QuantizationPlan | None) -> Changes:
        log = Log()
        start = self._prepared(model, ctx, log)
        ctx, trained = start.ctx, start.trained
        if asked is not None:
            asked.require_fit(model)
        candidate, figures = self._candidate(start, log, asked)
        log.add(candidate.log.done())
        plan = candidate.plan
        if not any((plan.linear, plan.stored, plan.tables, plan.recurrent)):
            log.skip(model.graph.name or "model", _nothing(model, figures))
            return Changes((), log.done().skipped)
        for name in start.looked_up:
            log.skip(name, NOTE)
        model.graph, model.opsets = candidate.model.graph, candidate.model.opsets
        if ctx.target.layout.bits is not None:
            log.warn(f"activations={self.activations}", SIMULATION)
        elif self._is_for_cpu(ctx.target):
            integer = {key: label for key, label in plan.labels.items() if key in plan.integer}
            fused, total, unfused = kernels(model, integer, ctx.target)
            figures = replace(figures, fused=fused, total=total, unfused=unfused)
            if self.activations in (None, "none"):
                figures = replace(figures, beside_floats=_beside_floats(model, ctx))
        if trained.tensors or trained.constants:
            figures = replace(figures, trained=(len(trained.tensors), len(trained.constants)))
        if trained.shared:
            figures = replace(figures, shared=look_up(model, trained.shared))
        return log.done(figures)

    @property
    def needs_data(self) -> bool:
        """For ranges, and to rank layers on."""
        if (plan := self._planned()) is not None:
            return plan.needs_data or self._as(plan).needs_data
        return self._way.calibrated or self.max_drop is not None or self.size is not None

    @property
    def _way(self) -> type[Strategy]:
        """How to quantize."""
        if self.activations == "dynamic":
            return Dynamic
        if self.activations not in (None, "none"):
            return Static
        if self.weights == "int4":
            return WeightOnlyBlocks
        return WeightOnly if self.block_size is None else WeightOnlyBytes

    def _target(self, target: Target) -> Target:
        """The target with the wanted layout and type of activations."""
        if self.layout != "target":
            target = replace(target, layout=layouts()[self.layout])
        if not self._way.calibrated or self.activations in (None, "auto"):
            return target
        kind, bits = SIMULATED.get(self.activations, (self.activations, None))
        return replace(target, layout=target.layout.of(np.dtype(kind), bits))

    def _candidate(
        self, start: Start, log: Log, asked: QuantizationPlan | None
    ) -> tuple[Candidate, QuantizeFigures]:
        """The result, found by a search if there is data to judge by, and what was measured on the way."""
        ctx = start.ctx
        if ctx.data is None:
            build = self._builder(start)
            variant = Variant() if asked is None else asked.variant(build)
            candidate = build(variant)
            if asked is not None:
                asked.require_whole(candidate)
            kept = QuantizationPlan.of(self._options(), variant, build, candidate, False)
            return candidate, replace(candidate.figures, plan=kept)
        goal = TrialGoal(self._least, self.max_drop, start.original, ctx)
        asks_nothing = (self.require_sqnr, self.max_drop) == (None, None)
        if self.train is None or asked is not None or asks_nothing or self.effort == "quick":
            trial, figures = self._sought(start, log, goal, goal, asked)
            return trial.candidate, figures
        # Training may give back what is asked for, with all in integers.
        anything, notes = TrialGoal(-math.inf, None, start.original, ctx), Log()
        trial, figures = self._sought(start, notes, anything, goal)
        if not goal.met(trial):
            log.skip("training", f"with all layers in integers, {goal.shortfall(trial)}")
            trial, figures = self._again(start, log, goal, (trial, figures))
        else:
            log.add(notes.done())
        return trial.candidate, figures

    def _again(
        self, start: Start, log: Log, goal: TrialGoal, found: tuple[Trial, QuantizeFigures]
    ) -> tuple[Trial, QuantizeFigures]:
        """The same with layers kept out of integers before training; as it is where the time is over."""
        second = self.checkpoint and self.checkpoint.with_name(f"{self.checkpoint.name}.2")
        try:
            return replace(self, checkpoint=second)._sought(start, log, goal, goal)
        except TimeUp as error:
            log.skip("model", f"{error}; not tried: layers kept out of integers before training")
            return found

    @property
    def _least(self) -> float | None:
        """See `require_sqnr`."""
        if self.require_sqnr is None and self.train is not None:
            return -math.inf
        return 0.0 if self.require_sqnr is None and self.size is not None else self.require_sqnr

    def _sought(
        self,
        start: Start,
        log: Log,
        goal: TrialGoal,
        told: TrialGoal,
        asked: QuantizationPlan | None = None,
    ) -> tuple[Trial, QuantizeFigures]:
        """The best candidate for a goal, trained where that is asked for, and what was measured on the way.

        Args:
            start: of all candidates.
            log: notes go here.
            goal: what decides before training.
            told: what is to be kept in the end.
            asked: a plan to replay instead.
        """
        ctx = start.ctx
        assert ctx.data is not None
        search, build = self._judged(start)
        if asked is not None:
            build = asked.builder(build, ctx.data.tune, log)
            trial, complete = search.attempt(asked.variant(build), build), asked.complete
            asked.require_whole(trial.candidate)
            figures = QuantizeFigures()
        else:
            found, figures = self._search(search, build, goal, log, start.bytes)
            trial, tune = found, ctx.data.tune
            if ctx.data.tuned and found.score.sqnr < search.enough:
                trial = search.step(
                    "ranges of all samples", found, lambda: search.complete(found, tune, goal)
                )
            complete = trial is not found
        if self.train is not None:
            untrained, found_so_far = trial, figures
            trial, figures = search.step(
                "training",
                (trial, figures),
                lambda: self._learnt(untrained, found_so_far, start, log),
            )
        if search.late is not None:
            error, untried = search.late
            log.skip("model", f"{error}; not tried: {', '.join(untried)}")
        if asked is None and not told.met(trial):
            log.skip("model", told.shortfall(trial))
        kept = QuantizationPlan.of(self._options(), trial.variant, trial.build, trial.candidate, complete)
        return trial, replace(self._told(figures, trial, search, told), plan=kept)

    def _learnt(
        self, trial: Trial, figures: QuantizeFigures, start: Start, log: Log
    ) -> tuple[Trial, QuantizeFigures]:
        """The same once it was trained, and what is told of that."""
        assert self.train is not None
        train = Training(self.train, self.features, self.checkpoint, self.lr)
        teacher, model = start.ctx.teacher or start.original, trial.candidate.model
        # What was chosen by is learnt from as well.
        fresh = start.ctx.given.fresh
        data = start.ctx.given.tune if fresh is None else fresh
        judge, constants = Judge(teacher, data, start.ctx.target), constants_read(model)
        before, values = judge(model).sqnr, [each.values for each in constants]
        try:
            found = train(trial.candidate, trial.build, teacher.copy(), log)
        except UnknownError as why_not:
            log.skip("training", str(why_not))
            return trial, figures
        learnt, after = found.learnt, judge(model).sqnr
        if learnt.improved and not after > before:
            log.skip(
                "training", f"the start stays: in ONNX Runtime what was learnt keeps {after:.2f} dB of it"
            )
            for constant, start_values in zip(constants, values, strict=True):
                constant.values = start_values
        figures = replace(
            figures,
            learnt=(before, max(before, after)),
            distance=distance(learnt),
            examples=found.taught.told,
            threads=learnt.threads,
            looks=tuple(learnt.looks),
        )
        return replace(trial, score=self._judge(start, data)(model)), figures

    def _builder(self, start: Start) -> Builder:
        return Builder(start.model, start.ctx, self._strategy(start), start.trained)

    def _judged(self, start: Start) -> tuple[Search, Builder]:
        """What makes candidates, and what judges them on data."""
        judge = self._judge(start, start.ctx.given.tune)
        return Search(judge, ENOUGH_BY_EFFORT[self.effort]), self._builder(start)

    @staticmethod
    def _judge(start: Start, data: CalibrationData) -> Judge:
        """What measures candidates on some data."""
        # What runs in integers may saturate where what it was trained with did not.
        optimize = "none" if start.trained.tensors or start.trained.constants else "all"
        return Judge(start.original, data, start.ctx.target, optimize=optimize, clear=CLEAR)

    def _options(self) -> QuantizeOptions:
        """Those that a plan keeps."""
        return QuantizeOptions(**{item.name: getattr(self, item.name) for item in fields(QuantizeOptions)})

    def _strategy(self, start: Start) -> Strategy:
        settings = Settings(
            exclude=self.exclude,
            classifier=self.classifier,
            bias_correction=self.bias_correction,
            per_channel=self.per_channel,
            weights=self.weights,
            algorithm=self.algorithm,
            storage=start.form,
            block_size=self.block_size,
            floor=self._floor(start),
            price=self._price(start),
            ties=start.ties,
        )
        bytewise = self._way is WeightOnly and start.form == "matmulnbits"
        return (WeightOnlyBytes if bytewise else self._way)(settings, start.ctx.target.layout)

    def _floor(self, start: Start) -> float:
        """Of scales, where fewer bits are wanted and no data says which."""
        if self.download is None or start.ctx.data is not None:
            return 0.0
        return floor_for(_weights_of(start.model), self.download)

    def _price(self, start: Start) -> float:
        """What a bit is worth, where fewer are wanted and there is data."""
        if self.download is None or start.ctx.data is None:
            return 0.0
        return price_for(priced(start.model, start.ctx), self.download)

    def _everything(self, search: Search, build: Builder, log: Log) -> tuple[Trial, float]:
        """The candidate with all in integers, the nearest ones, and what one unscaled keeps, in dB."""
        if not self._way.calibrated:
            trial = search.attempt(Variant(), build)
        elif self.observer == "auto":
            trial = search.observer(Variant(), build)
        else:
            trial = search.attempt(Variant((self.observer, self.percentile)), build)
        nearest = trial.score.sqnr
        if self.equalization and self._way.calibrated and trial.score.sqnr < search.enough:
            plain, usual = trial, self.observer == "auto"
            trial = search.step("scaled channels", plain, lambda: search.equalized(plain, log, usual=usual))
        return trial, nearest

    def _refined(self, search: Search, trial: Trial, goal: TrialGoal) -> Trial:
        """The same with better integers of its weights, where they matter and do better.

        Fitting in turn ends with integers of its own: what each layer alone would have is looked for only
        where that does not help.
        """
        if self.download is not None:
            smaller = partial(search.smaller, trial, sequential=self.sequential)
            return search.step("fewer bits for weights", trial, smaller)
        if not self._rounds(trial, search) or self._is_far(trial, goal):
            return trial
        weighed = search.step("better integers of weights", 0.0, lambda: self._weighed(search, trial))
        if weighed < PART:
            return trial
        fitted = trial
        if self.sequential:
            fitted = search.step("weights fitted in turn", trial, lambda: search.fitted(trial))
        if fitted is trial:
            return search.step("better rounding of weights", trial, lambda: search.rounding(trial))
        return fitted

    def _search(
        self, search: Search, build: Builder, goal: TrialGoal, log: Log, size: int
    ) -> tuple[Trial, QuantizeFigures]:
        """The candidate to take, and what was measured until it was found."""
        trial, nearest = self._everything(search, build, log)
        fitted = self._refined(search, trial, goal)
        figures = QuantizeFigures(nearest=nearest, everything=fitted.score.sqnr)
        quick = self.effort == "quick"
        if self.size is not None:
            return self._within(search, trial, fitted, self.size * size, log), figures
        asked = (self.require_sqnr, self.max_drop) != (None, None)
        if self.layers or not (goal.met(fitted) or (quick and not asked)):
            found: tuple[Trial, tuple[LayerFigures, ...] | None] = fitted, None
            fitted, layers = search.step(
                "the fewest layers out of integers",
                found,
                lambda: self._without_worst(search, trial, found[0], goal),
            )
            figures = replace(figures, layers=layers)
        for_speed = self.optimize_for == "latency"
        if for_speed and search.untimed:
            log.skip("model", f"no layer stays in float for speed: {search.untimed}")
        elif self._way.calibrated and self.activations not in SIMULATED and (for_speed or not quick):
            faster = search.fastest if for_speed else search.paying
            made = fitted
            fitted = search.step("faster layers in floating point", made, lambda: faster(made))
        return fitted, figures

    def _within(self, search: Search, trial: Trial, fitted: Trial, budget: float, log: Log) -> Trial:
        """The candidate with layers in eight bits as far as there is room; where there is none, says so."""
        if (least := stored(fitted.candidate.model)) > budget:
            log.warn(
                f"size={self.size:g}",
                f"in {self.weights} it takes {least} bytes, and {budget:.0f} are asked for",
            )
        chosen = search.step(
            "eight bits for some layers",
            fitted,
            lambda: search.within(fitted, trial, search.layers(trial), budget),
        )
        return max(fitted, chosen, key=lambda each: each.score.sqnr)

    def _rounds(self, trial: Trial, search: Search) -> bool:
        """Whether to look for better codes than a candidate has."""
        chosen = self.algorithm in ("cd", "gptq")
        return chosen or (self.algorithm == "auto" and trial.score.sqnr < search.enough)

    def _is_far(self, trial: Trial, goal: TrialGoal) -> bool:
        """Whether better integers of weights would not do for all of them."""
        saves = (self._saves and self.weights == "int8") or self._mixes
        return saves and goal.missing(trial) > FAR

    def _weighed(self, search: Search, trial: Trial) -> float:
        """The part that weights have in all the noise; all, where better integers are looked for anyway."""
        return search.weights(trial) if self._saves else 1.0

    @property
    def _mixes(self) -> bool:
        """Whether layers that need more than four bits get eight, without a search for better ones first."""
        return self.effort == "normal" and self.algorithm == "auto" and self._way is WeightOnlyBlocks

    @property
    def _saves(self) -> bool:
        """Whether better integers of weights are looked for only where these make the noise.

        Data of few bits makes most of it, of which weights fitted to such data take back more than their own
        part.
        """
        usual = self.effort == "normal" and self.algorithm == "auto"
        return usual and self._way.calibrated and self.activations not in SIMULATED

    def _without_worst(
        self, search: Search, trial: Trial, fitted: Trial, goal: TrialGoal
    ) -> tuple[Trial, tuple[LayerFigures, ...]]:
        """The candidate with the fewest layers out of integers that keeps enough, and what each layer does.

        Args:
            search: of candidates.
            trial: everything in integers, the nearest ones, of weights as they are.
            fitted: the same with better integers, or itself if these were not better.
            goal: what is to be kept.
        """
        if trial.build.strategy.widens(trial.variant) and not goal.met(fitted):
            finest = search.attempt(replace(trial.variant, eight=True), trial.build)
            other = self._refined(search, finest, goal)
            if not goal.met(other):
                return self._without_worst(search, finest, other, goal)
        layers = search.layers(trial)
        best = fitted
        if not goal.met(fitted):
            found = trial
            if self.effort == "thorough" and self._way.calibrated and self.observer == "auto":
                found, layers = search.ranges(trial, layers)
                if found is not trial:
                    fitted = max(fitted, self._refined(search, found, goal), key=lambda each: each.score.sqnr)
            # Where all had better not be rounded anew, the few that stay in four bits are.
            best = search.keep(fitted, layers, goal, refined=self._mixes)
            if fitted is not found and not (goal.met(best) and 2 * best.held < len(layers)):
                # What was fitted to a network all in integers does not suit one with little in them.
                first, plain, ranked, gain = best, found, layers, fitted.score.sqnr

                def anew() -> Trial:
                    alone = search.rounding(plain)
                    other = search.keep(alone, ranked, goal, gain - alone.score.sqnr)
                    return max(first, other, key=goal.merit)

                best = search.step("layers kept around weights fitted alone", first, anew)
        return best, tuple(_row(layer, best) for layer in layers)

    @staticmethod
    def _told(figures: QuantizeFigures, trial: Trial, search: Search, goal: TrialGoal) -> QuantizeFigures:
        """The same with those of the candidate that was taken."""
        made = trial.candidate
        return replace(
            figures,
            tightened=made.figures.tightened,
            corrected=made.figures.corrected,
            sqnr=trial.score.sqnr,
            metric=None if goal.before is None else (goal.before, goal.value(made.model)),
            latency=None if search.untimed else search.latency(trial),
            parts=dict(trial.score.parts),
            observer=trial.variant.observer[0],
        )


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        model: prepared, with what was quantized before taken out.
        original: prepared, as candidates are compared with it.
        trained: what was taken out.
        ctx: with the target as the options want it.
        looked_up: tensors whose types only a run has told.
        form: how weights are written that are only stored as integers.
        ties: see `Settings`.
        bytes: of the constants of the model that came in.
    """

    model: Model
    original: Model
    trained: Trained
    ctx: Context
    looked_up: Sequence[str]
    form: StorageForm
    ties: Mapping[str, str]
    bytes: int


def _beside_floats(model: Model, ctx: Context) -> float | None:
    """See `QuantizeFigures`; None where there is nothing to run on."""
    feeds = ctx.one_run()
    if ctx.data is None and feeds is None:
        return None
    data = CalibrationData([feeds or {}]) if ctx.data is None else ctx.data.tune
    return round(beside_floats(model, data, ctx.target), 2)


def _look(model: Model, ctx: Context) -> list[str]:
    """Give tensors behind operators that nobody knows the types they have in a run; returns their names."""
    outputs = (tensor for node in model.graph.nodes for tensor in node.outputs)
    untyped = [each for each in outputs if each.name and each.dtype is None and each.proto is None]
    feeds = ctx.one_run() if untyped else None
    told = seen(model, feeds, ctx.target) if feeds is not None else {}
    found = [tensor for tensor in untyped if tensor.name in told]
    for tensor in found:
        tensor.dtype = told[tensor.name].dtype
    return [tensor.name for tensor in found]


def _nothing(model: Model, figures: QuantizeFigures) -> str:
    """Why nothing was quantized."""
    if any(layer.kept for layer in figures.layers or ()):
        return NOTHING_LEFT
    kinds = {tensor.dtype for tensor in model.constants() if isinstance(tensor.dtype, np.dtype)}
    other = [kind.name for kind in kinds if kind.kind == "f" and kind != np.float32]
    if other and np.dtype(np.float32) not in kinds:
        return f"{NOTHING_FOUND}: its weights are {other[0]}; 'onnxslim slim --dtype fp32' makes them float32"
    inside = uncounted(model)
    return f"{NOTHING_FOUND}; {inside} layers in bodies or functions are left" if inside else NOTHING_FOUND


def _row(layer: Sensitivity, trial: Trial) -> LayerFigures:
    kept = layer.node in trial.variant.kept or layer.node in trial.variant.refused
    return LayerFigures(layer.node, layer.op, round(layer.sqnr, 2), kept)


def _weights_of(model: Model) -> list[tuple[Array, int]]:
    """The weights of the layers of the main graph, each with its axis of output channels."""
    layers = [layer for layer in map(layer_of, model.graph.nodes) if isinstance(layer, Layer)]
    return [(layer.weight.astype(np.float32), layer.weight_axis) for layer in layers]


# In dB: what keeps that much of a few samples need not be looked at any longer.
CLEAR = ENOUGH + 5.0
NOTHING_FOUND = "no operator with weights can run in integers"
SIMULATION = "a simulation: a Clip leaves 16 of the codes of 8 bits, and nothing runs faster by it"
NOTHING_LEFT = "every layer would have to stay in floating point to keep as much as is asked for"
