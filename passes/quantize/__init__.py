"""Static quantization to 8-bit integers, as Q/DQ pairs in standard operators."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxslim import shapes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import batch_samples
from onnxslim.calibration.judge import SAMPLES, Judge
from onnxslim.errors import CalibrationError
from onnxslim.model import Model
from onnxslim.passes.quantize.build import Bits, Builder, Candidate, Recipe, Settings
from onnxslim.passes.quantize.fused import fused
from onnxslim.passes.quantize.prepare import MIN_OPSET, WIDE_OPSET, prepare
from onnxslim.passes.quantize.search import ENOUGH, OBSERVERS, Layer, Search, Trial
from onnxslim.pipeline import Changes, Context, Log, Pass, options
from onnxslim.runtime import CPU, Target, layout

ObserverName = Literal["auto", "minmax", "percentile", "kl", "mse"]
Activations = Literal["auto", "uint8", "int8", "uint16", "none"] | None
Layout = Literal["target", "cpu", "openvino", "cuda", "tensorrt", "qnn"]
Algorithm = Literal["auto", "rtn", "cd", "gptq"]


@options
class Quantize(Pass):
    """Run weighted operators, and what lies between them, in 8-bit integers (static QDQ, calibrated).

    Weights become int8 with one symmetric scale per output channel, activations get the integer type of the
    target with a range chosen on calibration data, biases int32. Operators that gain nothing stay in floating
    point, and the report names them.

    Part of the data is held out. If the outputs lose more than `require_sqnr` allows on it, every layer
    is measured on its own, and the fewest that have to are kept out of integers.
    """

    name: ClassVar[str] = "quantize"
    needs_data: ClassVar[bool] = True

    weights: Bits = Field(
        "int8",
        description="integer type of weights; int4 halves the file again, and is computed with as int8 or, "
        "where activations are not integers, in blocks of 32 with a scale each",
    )
    activations: Activations = Field(
        "auto",
        description="integer type of activations: that of the target, another one, or none: then only "
        "weights of matrix products and embeddings are stored as integers",
    )
    observer: ObserverName = Field(
        "auto",
        description="how ranges of activations are chosen: exact min/max, a percentile, least KL divergence, "
        "least mean squared error, or whichever does best on samples held out",
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
    require_sqnr: float = Field(
        25.0,
        description="signal to noise, in dB, that the outputs are to keep on samples held out; layers that "
        "cost too much of it stay in float (0: none does)",
    )
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
    layout: Layout = Field(
        "target",
        description="for which target the graph is laid out, if not for the one that it is judged on",
    )
    layers: bool = Field(
        False,
        description="measure what every layer alone does to the outputs, even where enough is kept anyway",
    )

    def run(self, model: Model, ctx: Context) -> Changes:
        """Quantize the model in place.

        Raises:
            CalibrationError: there is no calibration data, or it does not fit the model.
            PassError: the model's opset is too old and cannot be raised.
        """
        if ctx.data is None and self._static:
            raise CalibrationError(
                "pass 'quantize' needs calibration data: pass data=, or --data on the command line"
            )
        log = Log()
        ctx = replace(ctx, target=self._target(ctx.target))
        wide = self.weights == "int4" or ctx.target.quantized.activation.itemsize > 1
        prepare(model, ctx.target.quantized, log, WIDE_OPSET if wide else MIN_OPSET)
        shapes.infer(model)
        candidate = self._candidate(model, ctx, log)
        log.add(candidate.log.done())
        plan = candidate.plan
        if not plan.linear and not plan.stored:
            log.skip(model.graph.name or "model", "no operator with weights can run in integers")
            return Changes((), log.done().skipped)
        model.graph = candidate.model.graph
        if ctx.target.provider == CPU and self.layout in ("target", "cpu"):
            integer = {key: label for key, label in plan.labels.items() if key in plan.integer}
            log.facts.update(fused(model, integer, ctx.target))
        return log.done()

    @property
    def _static(self) -> bool:
        return self.activations not in (None, "none")

    def _target(self, target: Target) -> Target:
        """The target with the wanted layout and type of activations."""
        if self.layout != "target":
            target = replace(target, quantized=layout(self.layout))
        if not self._static or self.activations in (None, "auto"):
            return target
        kind = np.dtype(self.activations)
        rules = replace(target.quantized, activation=kind, symmetric=kind.kind == "i")
        return replace(target, quantized=rules)

    def _candidate(self, model: Model, ctx: Context, log: Log) -> Candidate:
        """The result, found by a search if there is data to judge by."""
        if ctx.data is None:
            return Builder(model, ctx, self._settings())(Recipe())
        data = ctx.data if isinstance(ctx.data, CalibrationData) else CalibrationData(ctx.data)
        data.check(model.inputs())
        return self._search(model, replace(ctx, data=data), log).candidate

    def _settings(self) -> Settings:
        return Settings(
            self.exclude,
            self.classifier,
            self.bias_correction,
            self.per_channel,
            self.weights,
            self._static,
            self.algorithm == "gptq",
        )

    def _search(self, model: Model, ctx: Context, log: Log) -> Trial:
        """The candidate to take, and in the log how it was found."""
        fit, held, share = _split(ctx.data)
        build = Builder(model, replace(ctx, data=fit), self._settings())
        search = Search(build, Judge(model, held, ctx.target))
        if not self._static:
            trial = search.attempt(Recipe())
        elif self.observer == "auto":
            trial = search.observer(Recipe())
        else:
            trial = search.attempt(Recipe((self.observer, self.percentile)))
        log.facts["nearest"] = trial.score.sqnr
        if self.equalization and self._static and trial.score.sqnr < ENOUGH:
            choices = OBSERVERS if self.observer == "auto" else (trial.recipe.observer,)
            search, trial = search.equalized(trial, choices, log)
        if self.algorithm in ("cd", "gptq") or (self.algorithm == "auto" and trial.score.sqnr < ENOUGH):
            search, trial = search.rounding(trial, self.sequential)
        log.facts["everything"] = trial.score.sqnr
        if trial.score.sqnr < self.require_sqnr or self.layers:
            layers = search.layers(trial)
            if trial.score.sqnr < self.require_sqnr and self._static and self.observer == "auto":
                trial, layers = search.ranges(trial, layers)
            if trial.score.sqnr < self.require_sqnr:
                trial = search.keep(trial, layers, self.require_sqnr)
            log.facts["layers"] = [_row(layer, trial) for layer in layers]
        if self.optimize_for == "latency" and self._static:
            trial = search.fastest(trial)
        if share > FEW or (share and trial.score.sqnr < ENOUGH):
            trial = search.complete(trial, held, self.require_sqnr)
        log.facts["sqnr"] = trial.score.sqnr
        log.facts["latency"] = search.latency(trial)
        log.facts["parts"] = dict(trial.score.parts)
        log.facts["observer"] = trial.recipe.observer[0]
        return trial


def _split(data: CalibrationData) -> tuple[CalibrationData, CalibrationData, float]:
    """Data to calibrate on, data to judge on, `SAMPLES` samples or half of all, and the share of these.

    A single batch serves for both, and nothing is held out then.
    """
    try:
        batches = len(data)
    except TypeError:
        batches = sum(1 for _ in data)
    if batches < 2:
        return data, data, 0.0
    wanted = max(math.ceil(SAMPLES / batch_samples(next(iter(data)))), 1)
    share = min(wanted / batches, 0.5)
    return *data.holdout(share, seed=0), share


def _row(layer: Layer, trial: Trial) -> dict[str, object]:
    kept = layer.node in trial.recipe.kept or layer.node in trial.recipe.refused
    return {"node": layer.node, "op": layer.op, "sqnr": round(layer.sqnr, 2), "kept": kept}


# With no more of the data held out than this, ranges are as good without it.
FEW = 1 / 3
