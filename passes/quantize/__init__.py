"""Static quantization to 8-bit integers, as Q/DQ pairs in standard operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxslim import shapes
from onnxslim.calibration import observers
from onnxslim.calibration.collect import Channels, Statistics, collect, merge
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import Distribution, Histogram, Range
from onnxslim.errors import CalibrationError
from onnxslim.graph import Constant, Tensor
from onnxslim.model import Model
from onnxslim.ops import spec_of
from onnxslim.passes.quantize.fused import fused
from onnxslim.passes.quantize.insert import Inserter
from onnxslim.passes.quantize.plan import Plan, Planner, exceeds
from onnxslim.passes.quantize.prepare import prepare
from onnxslim.pipeline import Changes, Context, Log, Pass, options
from onnxslim.runtime import CPU

ObserverName = Literal["minmax", "percentile", "kl", "mse"]


@options
class Quantize(Pass):
    """Run weighted operators, and what lies between them, in 8-bit integers (static QDQ, calibrated).

    Weights become int8 with one symmetric scale per output channel, activations get the integer type of the
    target with a range chosen on calibration data, biases int32. Operators that gain nothing stay in floating
    point, and the report names them.
    """

    name: ClassVar[str] = "quantize"
    needs_data: ClassVar[bool] = True

    observer: ObserverName = Field(
        "mse",
        description="how ranges of activations are chosen: exact min/max, a percentile, least KL divergence, "
        "or least mean squared error",
    )
    percentile: float = Field(99.99, gt=0, le=100, description="percent of the values kept by `percentile`")
    exclude: tuple[str, ...] = Field(
        (), description="globs on node names, or operator types, to keep in float"
    )
    classifier: bool = Field(False, description="quantize the last matrix product before an output too")
    bias_correction: bool = Field(
        True, description="adjust biases so that rounding the weights leaves the mean of every channel alone"
    )
    per_channel: bool = Field(True, description="one weight scale per output channel")

    def run(self, model: Model, ctx: Context) -> Changes:
        """Quantize the model in place.

        Raises:
            CalibrationError: there is no calibration data, or it does not fit the model.
            PassError: the model's opset is too old and cannot be raised.
        """
        if ctx.data is None:
            raise CalibrationError(
                "pass 'quantize' needs calibration data: pass data=, or --data on the command line"
            )
        data = ctx.data if isinstance(ctx.data, CalibrationData) else CalibrationData(ctx.data)
        data.check(model.inputs())
        ctx = replace(ctx, data=data)
        log = Log()
        prepare(model, ctx.target.quantized, log)
        shapes.infer(model)
        plan, seen = self._calibrated_plan(model, ctx, log)
        if not plan.linear:
            log.skip(model.graph.name or "model", "no operator with weights can run in integers")
            return Changes((), log.done().skipped)
        self._insert(model, plan, seen, ctx, log)
        return log.done()

    def _calibrated_plan(self, model: Model, ctx: Context, log: Log) -> tuple[Plan, Statistics]:
        """A plan and statistics of all its tensors; made anew where a tensor turns out to hold a mask."""
        rules = ctx.target.quantized
        seen = Statistics({}, {})
        while True:
            masked = {name for name, histogram in seen.histograms.items() if histogram.masked}
            planner = Planner(
                model, rules, log, exclude=self.exclude, classifier=self.classifier, masked=masked
            )
            plan = planner.plan()
            missing = [name for name in plan.sources() if name not in seen.histograms]
            channels = [key for key in self._channels(plan).values() if key not in seen.means]
            if not missing:
                return plan, seen
            found = collect(
                model,
                ctx.data,
                missing,
                channels=list(dict.fromkeys(channels)),
                target=ctx.target,
                jobs=ctx.jobs,
                progress=ctx.progress,
            )
            seen.histograms.update(found.histograms)
            seen.means.update(found.means)

    def _channels(self, plan: Plan) -> dict[int, Channels]:
        """For each node whose bias can be corrected, by id, the data whose channel means that takes."""
        found: dict[int, Channels] = {}
        for node in plan.linear if self.bias_correction else ():
            axis = spec_of(node).data_axis
            if axis is not None and node.constant(2) is not None:
                found[id(node)] = (node.inputs[0].name, axis(node))
        return found

    def _insert(self, model: Model, plan: Plan, seen: Statistics, ctx: Context, log: Log) -> None:
        rules = ctx.target.quantized
        channels = self._channels(plan)
        means = {node: seen.means[key].result() for node, key in channels.items() if key in seen.means}
        ranges = self._ranges(plan, seen.histograms, symmetric=rules.symmetric)
        inserter = Inserter(model, plan, rules, log)
        inserter.apply(ranges, self.per_channel, means)
        log.facts["tightened"] = inserter.tightened
        log.facts["corrected"] = inserter.corrected
        if ctx.target.provider == CPU:
            integer = {key: label for key, label in plan.labels.items() if key in plan.integer}
            log.facts.update(fused(model, integer, ctx.target))

    def _ranges(self, plan: Plan, seen: dict[str, Histogram], *, symmetric: bool) -> dict[int, Range]:
        """The range of each tensor of the plan; tensors on one scale get the same."""
        choose = self._chooser(symmetric=symmetric)
        known: dict[tuple[int, ...], Range] = {}

        def of(sources: tuple[Tensor, ...]) -> Range:
            group = tuple(id(source) for source in sources)
            if group not in known:
                known[group] = choose(merge([_statistics(source, seen) for source in sources]))
            return known[group]

        for key in list(plan.tensors):
            # A Relu that the common range does not imply would stand in the way of the integer kernel.
            if any(exceeds(source, of(plan.scales[key])) for source in plan.own[key]):
                plan.scales[key] = plan.own[key]
        return {key: of(plan.scales[key]) for key in plan.tensors}

    def _chooser(self, *, symmetric: bool) -> Callable[[Distribution], Range]:
        if self.observer == "minmax":
            return lambda d: observers.min_max(d, symmetric=symmetric)
        if self.observer == "percentile":
            return lambda d: observers.percentile(d, self.percentile, symmetric=symmetric)
        if self.observer == "kl":
            return lambda d: observers.kl_divergence(d, symmetric=symmetric)
        return lambda d: observers.mse(d, symmetric=symmetric)


def _statistics(source: Tensor, seen: dict[str, Histogram]) -> Histogram:
    """Of a calibrated tensor, or of a constant's own values."""
    if isinstance(source, Constant):
        histogram = Histogram()
        histogram.update(np.asarray(source.values))
        return histogram
    return seen[source.name]
