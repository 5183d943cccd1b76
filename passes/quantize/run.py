"""One run of the quantizer: from what is asked for to the candidate that is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np

from onnxslim import shapes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.seen import NOTE, seen
from onnxslim.engine.base import Changes, Context, Effort, Log
from onnxslim.engine.matching import tell_idle
from onnxslim.engine.moves import Move
from onnxslim.errors import TimeUp, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.learn.door import UnknownError
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.learning.lessons import distance
from onnxslim.passes.quantize.block_products import clamped, is_product
from onnxslim.passes.quantize.build import Builder, Candidate
from onnxslim.passes.quantize.choices import (
    SIMULATED,
    Settings,
    StorageForm,
    Variant,
)
from onnxslim.passes.quantize.coder import priced
from onnxslim.passes.quantize.figures import LayerFigures, QuantizeFigures
from onnxslim.passes.quantize.fused import beside_floats, kernels
from onnxslim.passes.quantize.goal import TrialGoal
from onnxslim.passes.quantize.prepare import MIN_OPSET, TWO_BITS_OPSET, WIDE_OPSET, prepare
from onnxslim.passes.quantize.rate import price_for
from onnxslim.passes.quantize.recorded import QuantizationPlan, moves_of
from onnxslim.passes.quantize.search import ENOUGH, Search, Sensitivity, stored
from onnxslim.passes.quantize.shared import look_up, taken
from onnxslim.passes.quantize.strategy import Strategy
from onnxslim.passes.quantize.tables import ties_of, untie
from onnxslim.passes.quantize.train import Training
from onnxslim.passes.quantize.trained import Trained, constants_read, strip
from onnxslim.passes.quantize.trial import Trial
from onnxslim.passes.quantize.weight_only import WeightOnly, WeightOnlyBlocks, WeightOnlyBytes
from onnxslim.passes.quantize.weights import floor_for
from onnxslim.passes.quantize.wish import QuantizeWish
from onnxslim.runtime.native import CPU
from onnxslim.runtime.targets import Target, layouts
from onnxslim.shapes.cost import uncounted

# In dB: what keeps more is not worth a search; nothing is, and everything is.
ENOUGH_BY_EFFORT: Mapping[Effort, float] = {"quick": -math.inf, "normal": ENOUGH, "thorough": math.inf}
# In dB: what lacks more is not tried with better integers before layers are left out of them, or get eight
# bits instead of four: they have brought 5 dB at most, and 6.4 in four bits (benchmarks/README.md).
FAR = 10.0
# Where weights have less than this part in all the noise, better integers of them are not looked for: what
# they would bring at the best is less than chance (benchmarks/README.md, Speed).
PART = 1 / 3


class QuantizeRun:
    """One run of the pass.

    Args:
        wish: what is asked for.
    """

    def __init__(self, wish: QuantizeWish) -> None:
        self._wish = wish

    def __call__(self, model: Model, ctx: Context, asked: QuantizationPlan | None) -> Changes:
        """Quantize a model in place.

        Args:
            model: edited.
            ctx: see `Context`.
            asked: a plan to replay.
        """
        log = Log()
        start = self._prepared(model.copy(), ctx, log)
        ctx, trained = start.ctx, start.trained
        if asked is not None:
            asked.require_fit(start.model)
        candidate, figures = self._candidate(start, log, asked)
        log.add(candidate.log.done())
        plan = candidate.plan
        if not any((plan.linear, plan.stored, plan.tables, plan.recurrent)):
            log.skip(model.graph.name or "model", _nothing(start.model, figures))
            return Changes((), log.done().skipped)
        for name in start.looked_up:
            log.skip(name, NOTE)
        model.graph, model.opsets = candidate.model.graph, candidate.model.opsets
        if ctx.target.layout.bits is not None:
            log.warn(f"activations={self._wish.activations}", SIMULATION)
        elif self._is_for_cpu(ctx.target):
            integer = {key: label for key, label in plan.labels.items() if key in plan.integer}
            fused, total, unfused = kernels(model, integer, ctx.target)
            figures = replace(figures, fused=fused, total=total, unfused=unfused)
            if self._wish.activations in (None, "none"):
                figures = replace(figures, beside_floats=_beside_floats(model, ctx))
        if trained.tensors or trained.constants:
            figures = replace(figures, trained=(len(trained.tensors), len(trained.constants)))
        if trained.shared:
            figures = replace(figures, shared=look_up(model, trained.shared))
            if figures.learnt is not None:
                log.skip("training", UNSHARED)
        return log.done(figures)

    def moves(self, model: Model, ctx: Context) -> Sequence[Move]:
        """See `Pass.propose`; the model is edited."""
        log = Log()
        start = self._prepared(model, ctx, log)
        search, build = self._judged(start)
        trial, _ = self._everything(search, build, lambda _: False, log)
        trial = search.rounding(trial) if self._rounds(trial, search) else trial
        return moves_of(trial, search.layers(trial), self._wish.kept_options())

    def _prepared(self, model: Model, ctx: Context, log: Log) -> Start:
        """What all candidates are made of; the model is edited.

        Raises:
            UsageError: options contradict each other.
        """
        before = stored(model)
        if self._wish.activations == "dynamic" and self._wish.weights != "int8":
            raise UsageError(
                f"pass 'quantize': {self._wish.weights} weights go with activations=none, where ONNX Runtime "
                "turns data into integers as it comes as well"
            )
        ctx = replace(ctx, target=self._target(ctx.target))
        self._require_kernels(ctx.target)
        form = self._form(model, ctx.target)
        plain = form == "matmulnbits" or (self._wish.weights == "int8" and self._wish.block_size is None)
        wide = not plain or ctx.target.layout.activation.itemsize > 1
        opset = TWO_BITS_OPSET if self._wish.weights == "int2" else WIDE_OPSET if wide else MIN_OPSET
        shared = (
            taken(model, ctx.target.layout)
            if self._wish.way.calibrated and self._wish.weights == "int8"
            else {}
        )
        prepare(model, ctx.target.layout, log, opset)
        tell_idle(self._wish.exclude, model, log)
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
        if self._wish.storage != "auto" or self._wish.activations not in (None, "none"):
            return "qdq" if self._wish.storage == "auto" else self._wish.storage
        needed = self._is_for_cpu(target) and any(True for _ in chain(ties_of(model), clamped(model)))
        blocks = needed or target.layout.block_products
        return "matmulnbits" if blocks or any(map(is_product, model.nodes())) else "qdq"

    def _require_kernels(self, target: Target) -> None:
        """Raise UsageError if a target would run nothing of what is asked for in integers."""
        if self._wish.way.calibrated and not target.layout.kernels:
            name = target.stands_for or (target.name if self._wish.layout == "target" else self._wish.layout)
            raise UsageError(
                f"pass 'quantize': {name} has no integer kernels; with activations=none weights are stored "
                "as integers"
            )
        if target.layout.bits is not None and not self._is_for_cpu(target):
            raise UsageError(
                f"pass 'quantize': activations={self._wish.activations} is a simulation, for target and "
                "layout cpu"
            )

    def _is_for_cpu(self, target: Target) -> bool:
        """Whether the file is made for ONNX Runtime on the processor of this machine."""
        return target.provider == CPU and not target.stands_for and self._wish.layout in ("target", "cpu")

    def _target(self, target: Target) -> Target:
        """The target with the wanted layout and type of activations."""
        if self._wish.layout != "target":
            target = replace(target, layout=layouts()[self._wish.layout])
        if not self._wish.way.calibrated or self._wish.activations in (None, "auto"):
            return target
        kind, bits = SIMULATED.get(self._wish.activations, (self._wish.activations, None))
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
            kept = QuantizationPlan.of(self._wish.kept_options(), variant, build, candidate, False)
            return candidate, replace(candidate.figures, plan=kept)
        goal = TrialGoal(self._least, self._wish.max_drop, start.original, ctx)
        asks_nothing = (self._wish.require_sqnr, self._wish.max_drop) == (None, None)
        if self._wish.train is None or asked is not None or asks_nothing or self._wish.effort == "quick":
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
        second = self._wish.checkpoint and self._wish.checkpoint.with_name(f"{self._wish.checkpoint.name}.2")
        try:
            return QuantizeRun(replace(self._wish, checkpoint=second))._sought(start, log, goal, goal)
        except TimeUp as error:
            log.skip("model", f"{error}; not tried: layers kept out of integers before training")
            return found

    @property
    def _least(self) -> float | None:
        """See `require_sqnr`."""
        if self._wish.require_sqnr is None and self._wish.train is not None:
            return -math.inf
        return (
            0.0
            if self._wish.require_sqnr is None and self._wish.size is not None
            else self._wish.require_sqnr
        )

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
        if self._wish.train is not None:
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
        kept = QuantizationPlan.of(
            self._wish.kept_options(), trial.variant, trial.build, trial.candidate, complete
        )
        return trial, replace(self._told(figures, trial, search, told), plan=kept)

    def _learnt(
        self, trial: Trial, figures: QuantizeFigures, start: Start, log: Log
    ) -> tuple[Trial, QuantizeFigures]:
        """The same once it was trained, and what is told of that."""
        assert self._wish.train is not None
        train = Training(self._wish.train, self._wish.features, self._wish.checkpoint, self._wish.lr)
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
        return Search(judge, ENOUGH_BY_EFFORT[self._wish.effort]), self._builder(start)

    @staticmethod
    def _judge(start: Start, data: CalibrationData) -> Judge:
        """What measures candidates on some data."""
        # What runs in integers may saturate where what it was trained with did not.
        optimize = "none" if start.trained.tensors or start.trained.constants else "all"
        return Judge(start.original, data, start.ctx.target, optimize=optimize, clear=CLEAR)

    def _strategy(self, start: Start) -> Strategy:
        settings = Settings(
            exclude=self._wish.exclude,
            classifier=self._wish.classifier,
            bias_correction=self._wish.bias_correction,
            per_channel=self._wish.per_channel,
            weights=self._wish.weights,
            algorithm=self._wish.algorithm,
            storage=start.form,
            block_size=self._wish.block_size,
            floor=self._floor(start),
            price=self._price(start),
            ties=start.ties,
        )
        bytewise = self._wish.way is WeightOnly and start.form == "matmulnbits"
        return (WeightOnlyBytes if bytewise else self._wish.way)(settings, start.ctx.target.layout)

    def _floor(self, start: Start) -> float:
        """Of scales, where fewer bits are wanted and no data says which."""
        if self._wish.download is None or start.ctx.data is not None:
            return 0.0
        return floor_for(_weights_of(start.model), self._wish.download)

    def _price(self, start: Start) -> float:
        """What a bit is worth, where fewer are wanted and there is data."""
        if self._wish.download is None or start.ctx.data is None:
            return 0.0
        return price_for(priced(start.model, start.ctx), self._wish.download)

    def _everything(
        self, search: Search, build: Builder, fits: Callable[[Trial], bool], log: Log
    ) -> tuple[Trial, float]:
        """The candidate with all in integers, the nearest ones, and what one unscaled keeps, in dB.

        Args:
            search, build: of candidates.
            fits: whether weights of one are fitted in turn next.
            log: what was scaled goes here.
        """
        if not self._wish.way.calibrated:
            trial = search.attempt(Variant(), build)
        elif self._wish.observer == "auto":
            trial = search.observer(Variant(), build, fits)
        else:
            trial = search.attempt(Variant((self._wish.observer, self._wish.percentile)), build)
        nearest = trial.score.sqnr
        if self._wish.equalization and self._wish.way.calibrated and trial.score.sqnr < search.enough:
            plain, usual = trial, self._wish.observer == "auto"
            trial = search.step(
                "scaled channels", plain, lambda: search.equalized(plain, log, fits, usual=usual)
            )
        return trial, nearest

    def _refined(self, search: Search, trial: Trial, goal: TrialGoal) -> Trial:
        """The same with better integers of its weights, where they matter and do better.

        Fitting in turn ends with integers of its own: what each layer alone would have is looked for only
        where that does not help.
        """
        if self._wish.download is not None:
            smaller = partial(search.smaller, trial, sequential=self._wish.sequential)
            return search.step("fewer bits for weights", trial, smaller)
        if not self._finds(search, trial, goal):
            return trial
        weighed = search.step("better integers of weights", 0.0, lambda: self._weighed(search, trial))
        if weighed < PART:
            return trial
        fitted = trial
        if self._wish.sequential:
            fitted = search.step("weights fitted in turn", trial, lambda: search.fitted(trial))
        if fitted is trial:
            return search.step("better rounding of weights", trial, lambda: search.rounding(trial))
        return fitted

    def _search(
        self, search: Search, build: Builder, goal: TrialGoal, log: Log, size: int
    ) -> tuple[Trial, QuantizeFigures]:
        """The candidate to take, and what was measured until it was found."""
        trial, nearest = self._everything(search, build, partial(self._fits, search, goal), log)
        fitted = self._refined(search, trial, goal)
        figures = QuantizeFigures(nearest=nearest, everything=fitted.score.sqnr)
        quick = self._wish.effort == "quick"
        if self._wish.size is not None:
            return self._within(search, trial, fitted, self._wish.size * size, log), figures
        asked = (self._wish.require_sqnr, self._wish.max_drop) != (None, None)
        if self._wish.layers or not (goal.met(fitted) or (quick and not asked)):
            found: tuple[Trial, tuple[LayerFigures, ...] | None] = fitted, None
            fitted, layers = search.step(
                "the fewest layers out of integers",
                found,
                lambda: self._without_worst(search, trial, found[0], goal),
            )
            figures = replace(figures, layers=layers)
        for_speed = self._wish.optimize_for == "latency"
        if for_speed and search.untimed:
            log.skip("model", f"no layer stays in float for speed: {search.untimed}")
        elif (
            self._wish.way.calibrated and self._wish.activations not in SIMULATED and (for_speed or not quick)
        ):
            faster = search.fastest if for_speed else search.paying
            made = fitted
            fitted = search.step("faster layers in floating point", made, lambda: faster(made))
        return fitted, figures

    def _within(self, search: Search, trial: Trial, fitted: Trial, budget: float, log: Log) -> Trial:
        """The candidate with layers in eight bits as far as there is room; where there is none, says so."""
        if (least := stored(fitted.candidate.model)) > budget:
            log.warn(
                f"size={self._wish.size:g}",
                f"in {self._wish.weights} it takes {least} bytes, and {budget:.0f} are asked for",
            )
        chosen = search.step(
            "eight bits for some layers",
            fitted,
            lambda: search.within(fitted, trial, search.layers(trial), budget),
        )
        return max(fitted, chosen, key=lambda each: each.score.sqnr)

    def _finds(self, search: Search, trial: Trial, goal: TrialGoal) -> bool:
        """Whether better codes are looked for."""
        return self._rounds(trial, search) and not self._is_far(trial, goal)

    def _fits(self, search: Search, goal: TrialGoal, trial: Trial) -> bool:
        """Whether these are looked for by fitting in turn."""
        return self._wish.sequential and self._wish.download is None and self._finds(search, trial, goal)

    def _rounds(self, trial: Trial, search: Search) -> bool:
        """Whether to look for better codes than a candidate has."""
        chosen = self._wish.algorithm in ("cd", "gptq")
        return chosen or (self._wish.algorithm == "auto" and trial.score.sqnr < search.enough)

    @property
    def _is_timed(self) -> bool:
        """Whether integers may be slower than floats, as far as the time of the result says anything."""
        return self._wish.way.calibrated and self._wish.activations not in SIMULATED

    def _is_far(self, trial: Trial, goal: TrialGoal) -> bool:
        """Whether better integers of weights would not do for all of them."""
        saves = (self._saves and self._wish.weights == "int8") or self._mixes
        return saves and goal.missing(trial) > FAR

    def _weighed(self, search: Search, trial: Trial) -> float:
        """The part that weights have in all the noise; all, where better integers are looked for anyway."""
        return search.weights(trial) if self._saves else 1.0

    @property
    def _mixes(self) -> bool:
        """Whether layers that need more than four bits get eight, without a search for better ones first."""
        return (
            self._wish.effort == "normal"
            and self._wish.algorithm == "auto"
            and self._wish.way is WeightOnlyBlocks
        )

    @property
    def _saves(self) -> bool:
        """Whether better integers of weights are looked for only where these make the noise.

        Data of few bits makes most of it, of which weights fitted to such data take back more than their own
        part.
        """
        usual = self._wish.effort == "normal" and self._wish.algorithm == "auto"
        return usual and self._wish.way.calibrated and self._wish.activations not in SIMULATED

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
            if (
                self._wish.effort == "thorough"
                and self._wish.way.calibrated
                and self._wish.observer == "auto"
            ):
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
UNSHARED = "weights that were looked up in tables have integers of their own now, which take more room"
NOTHING_LEFT = "every layer would have to stay in floating point to keep as much as is asked for"
