"""Quantized candidates of one model: calibrated once, built as often as a search wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnxslim import shapes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import Gram
from onnxslim.engine.base import Context, Log
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize.blocks import Blocks
from onnxslim.passes.quantize.calibrate import Calibration, Group, names
from onnxslim.passes.quantize.choices import Variant, refusal
from onnxslim.passes.quantize.coder import Floats, WeightCoder
from onnxslim.passes.quantize.equalize import equalize
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.insert import Inserter
from onnxslim.passes.quantize.plan import Plan, Planner
from onnxslim.passes.quantize.sequential import Sequential
from onnxslim.passes.quantize.storing import Storage
from onnxslim.passes.quantize.strategy import Draft, Strategy
from onnxslim.passes.quantize.trained import Trained
from onnxslim.passes.quantize.weights import Encoded
from onnxslim.passes.repair.onward import Onward
from onnxslim.shapes import cost


@dataclass(frozen=True)
class Candidate:
    """A quantized model, the plan it was made after, and what was done to it."""

    model: Model
    plan: Plan
    log: Log
    groups: tuple[Group, ...]
    figures: QuantizeFigures

    def labels(self) -> set[str]:
        """Weighted nodes in integers, or stored so where none computes in them."""
        nodes = (*(self.plan.linear or self.plan.stored), *self.plan.tables, *self.plan.recurrent)
        return {self.plan.labels[id(node)] for node in nodes}


class Builder:
    """Builds candidates of a prepared model.

    Args:
        model: prepared, with shapes inferred; never modified.
        ctx: with data, where the strategy needs any.
        strategy: how to quantize.
        trained: what was quantized in the model already, and was taken out of it.
        calibration: what was seen of its tensors already; nothing by default.
        coder: of its weights; one without better integers than the nearest by default.

    Attributes:
        is_equalized: whether channels of the model were scaled.
        fitted_without: if weights were fitted in turn, labels of the layers that were not in integers then.
    """

    def __init__(
        self,
        model: Model,
        ctx: Context,
        strategy: Strategy,
        trained: Trained | None = None,
        calibration: Calibration | None = None,
        coder: WeightCoder | None = None,
    ) -> None:
        self._onward: Onward | None = None
        self._macs: dict[str, int] | None = None
        self.is_equalized = False
        self.fitted_without: tuple[str, ...] | None = None
        self.model = model
        self.ctx = ctx
        self.strategy = strategy
        self._settings = strategy.settings
        self._trained = trained or Trained()
        self._calibration = calibration or Calibration(ctx, means=self._settings.bias_correction)
        self._coder = coder or WeightCoder(ctx, self._settings, self._trained)

    def __call__(self, variant: Variant) -> Candidate:
        """Build one candidate.

        Raises:
            CalibrationError: the data does not fit the model.
        """
        twin, log = self.model.copy(), Log()
        draft = self._draft(twin, variant, log)
        groups = tuple(dict.fromkeys(names(group) for group in draft.plan.scales.values()))
        if variant.refined:
            self._coder.observe(self.model, draft.plan)
        figures = self.strategy.compute(draft)
        if self._trained:
            self._trained.restore(twin, {tensor.name for tensor in draft.plan.tensors.values()})
        storage = Storage(twin, log)
        self.strategy.store(draft, storage)
        storage.finish()
        return Candidate(twin, draft.plan, log, groups, figures)

    def _draft(self, model: Model, variant: Variant, log: Log) -> Draft:
        plan = self._plan(model, variant, log)
        ranges = self._calibration.ranges(plan, variant)
        return Draft(
            model=model,
            plan=plan,
            variant=variant,
            coder=self._coder,
            ranges=ranges,
            means=self._calibration.means(plan),
            grids=self._calibration.grids(plan, self._trained),
            dequantized=self._trained.constants,
            log=log,
        )

    def _plan(self, model: Model, variant: Variant, log: Log) -> Plan:
        """A plan whose tensors are all calibrated; made anew where one turns out to hold a mask."""
        while True:
            plan = self._planned(model, variant, log)
            if not self._calibration.cover(self.model, plan):
                return plan

    def _planned(self, model: Model, variant: Variant, log: Log) -> Plan:
        """A plan by what is known of the tensors so far."""
        planner = Planner(
            model,
            self.ctx.target.layout,
            log,
            refuse=refusal(self._settings, variant),
            kept=self.strategy.in_floats(model, variant),
            weights_only=not self.strategy.calibrated,
            sharing=self.strategy.sharing,
            classifier=self._settings.classifier,
            irregular=self._calibration.irregular(),
            trained=self._trained.covers,
            looks_up=self.strategy.looks_up,
            recurs=self.strategy.recurs,
            coded=self._trained.constants,
        )
        plan = planner.plan()
        plan.limits.update(self.strategy.limits(plan, variant))
        return plan

    def foresee(self, variants: Iterable[Variant]) -> None:
        """Calibrate for candidates that will be built, in one pass over the data for all of them."""
        twin = self.model.copy()
        self._calibration.cover(self.model, *(self._planned(twin, each, Log()) for each in variants))

    def observed(self, variant: Variant) -> Plan:
        """The plan of a candidate that is not built, but what it has to know of the data is known then."""
        return self._plan(self.model.copy(), variant, Log())

    def equalized(self, plan: Plan, log: Log) -> Builder | None:
        """Of the same model with its channels scaled for a plan of it; None where that changes nothing.

        Scales and codes from training fit the channels as they are.
        """
        if self._trained:
            return None
        twin = self.model.copy()
        low, high = self.ctx.target.layout.codes
        levels = high - low, 2 * self.strategy.limit
        if not equalize(twin, plan, self.ctx.given.fit, levels, log, self.ctx.target):
            return None
        shapes.infer(twin)
        made = Builder(twin, self.ctx, self.strategy)
        made.is_equalized = True
        return made

    def fitted(self, variant: Variant) -> Builder | None:
        """Of the model with its weights fitted and rounded in turn, for a variant; None if there are none.

        Codes from training stay what they are.
        """
        if self._trained or not self.strategy.fits_in_turn:
            return None
        student, plan = self._student(variant)
        known = {tensor.name for node in self.model.graph.nodes for tensor in node.outputs}
        held = self.strategy.held_back(variant)
        layers = [
            node.outputs[0]
            for node in (*plan.linear, *plan.stored)
            if len(node.inputs[1].outputs) == 1 and node.inputs[1].name not in self._settings.ties
        ]
        stored = {node.inputs[1].name for node in plan.stored}
        found = [tensor.name for tensor in layers if tensor.name in known]
        if not found or not self._settings.per_channel:
            return None

        def code(
            layer: Layer, wanted: Floats, gram: Gram, corrected: bool
        ) -> tuple[Encoded | Blocks, Floats]:
            kept = layer.node.inputs[1].name in stored
            finer = layer.node.label in held
            limit = self.strategy.limit_of(layer.node.label, variant, stored=kept)
            return self.strategy.code(
                self._coder, layer, wanted, gram, corrected=corrected, kept=kept, finer=finer, limit=limit
            )

        work = Sequential(student, code)
        work.run(self.model, found, self.ctx)
        twin = work.refitted(self.model)
        shapes.infer(twin)
        coder = WeightCoder(self.ctx, self._settings, Trained(), work.codes, work.blocks)
        made = Builder(twin, self.ctx, self.strategy, calibration=self._calibration, coder=coder)
        made.is_equalized = self.is_equalized
        made.fitted_without = tuple(sorted(self.strategy.held_back(variant)))
        return made

    def in_floats(self, variant: Variant) -> Model:
        """A candidate whose activations alone are integers: what better integers of weights come close to."""
        return self._student(variant)[0]

    def _student(self, variant: Variant) -> tuple[Model, Plan]:
        """A candidate with its weights as they are, and the plan of it."""
        student, log = self.model.copy(), Log()
        plan = self._plan(student, variant, log)
        if self.strategy.calibrated:
            inserter = Inserter(student, plan, self.ctx.target.layout, log, self._coder.encoder())
            inserter.apply(self._calibration.ranges(plan, variant), True, activations_only=True)
        return student, plan

    def onward(self) -> Onward | None:
        """What runs candidates from where they begin to differ; None where tensors cannot be kept."""
        if self._onward is None:
            self._onward = Onward.of(self.model, self.macs(), self.ctx.target)
        return self._onward

    def absorb(self, data: CalibrationData) -> None:
        """Take more data into the ranges: what candidates were chosen by."""
        self._calibration.absorb(self.model, data)

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of weighted nodes on the first batch, by label, where shapes tell."""
        if self._macs is None:
            sizes = {name: array.shape for name, array in self._first().items()}
            self._macs = cost.by_label(self.model, sizes)
        return self._macs

    def _first(self) -> Mapping[str, Array]:
        """The first batch, if there is one."""
        return next(iter(self.ctx.given.fit), {})

    def announce(self, what: str, done: int, total: int | None) -> None:
        """Tell the caller of the pass how far a long step is."""
        if self.ctx.progress:
            self.ctx.progress(what, done, total)
