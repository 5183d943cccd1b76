"""Static quantization to 8-bit integers, as Q/DQ pairs in standard operators."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from onnxslim import shapes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.judge import Judge
from onnxslim.errors import CalibrationError
from onnxslim.model import Model
from onnxslim.passes.quantize.build import Builder, Recipe, Settings
from onnxslim.passes.quantize.fused import fused
from onnxslim.passes.quantize.prepare import prepare
from onnxslim.passes.quantize.search import Layer, Search, Trial
from onnxslim.pipeline import Changes, Context, Log, Pass, options
from onnxslim.runtime import CPU

ObserverName = Literal["auto", "minmax", "percentile", "kl", "mse"]
Algorithm = Literal["auto", "rtn", "cd"]


@options
class Quantize(Pass):
    """Run weighted operators, and what lies between them, in 8-bit integers (static QDQ, calibrated).

    Weights become int8 with one symmetric scale per output channel, activations get the integer type of the
    target with a range chosen on calibration data, biases int32. Operators that gain nothing stay in floating
    point, and the report names them.

    A quarter of the data is held out. If the outputs lose more than `require_sqnr` allows on it, every layer
    is measured on its own, and the fewest that have to are kept out of integers.
    """

    name: ClassVar[str] = "quantize"
    needs_data: ClassVar[bool] = True

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
        "outputs by coordinate descent (cd), or the better of both where it matters",
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
        if ctx.data is None:
            raise CalibrationError(
                "pass 'quantize' needs calibration data: pass data=, or --data on the command line"
            )
        data = ctx.data if isinstance(ctx.data, CalibrationData) else CalibrationData(ctx.data)
        data.check(model.inputs())
        log = Log()
        prepare(model, ctx.target.quantized, log)
        shapes.infer(model)
        trial = self._search(model, replace(ctx, data=data), log)
        log.add(trial.candidate.log.done())
        plan = trial.candidate.plan
        if not plan.linear and not plan.stored:
            log.skip(model.graph.name or "model", "no operator with weights can run in integers")
            return Changes((), log.done().skipped)
        model.graph = trial.candidate.model.graph
        if ctx.target.provider == CPU:
            integer = {key: label for key, label in plan.labels.items() if key in plan.integer}
            log.facts.update(fused(model, integer, ctx.target))
        return log.done()

    def _search(self, model: Model, ctx: Context, log: Log) -> Trial:
        """The candidate to take, and in the log how it was found."""
        fit, held = _split(ctx.data)
        settings = Settings(self.exclude, self.classifier, self.bias_correction, self.per_channel)
        search = Search(Builder(model, replace(ctx, data=fit), settings), Judge(model, held, ctx.target))
        if self.observer == "auto":
            trial = search.observer(Recipe())
        else:
            trial = search.attempt(Recipe((self.observer, self.percentile)))
        log.facts["nearest"] = trial.score.sqnr
        if self.algorithm == "cd" or (self.algorithm == "auto" and trial.score.sqnr < ENOUGH):
            trial = search.rounding(trial)
        log.facts["everything"] = trial.score.sqnr
        if trial.score.sqnr < self.require_sqnr or self.layers:
            layers = search.layers(trial)
            if trial.score.sqnr < self.require_sqnr:
                trial = search.keep(trial, layers, self.require_sqnr)
            log.facts["layers"] = [_row(layer, trial) for layer in layers]
        log.facts["sqnr"] = trial.score.sqnr
        log.facts["parts"] = dict(trial.score.parts)
        log.facts["observer"] = trial.recipe.observer[0]
        return trial


def _split(data: CalibrationData) -> tuple[CalibrationData, CalibrationData]:
    """Data to calibrate on and data to judge on; the same if there is a single batch."""
    try:
        return data.holdout(HELD, seed=0)
    except CalibrationError:
        return data, data


def _row(layer: Layer, trial: Trial) -> dict[str, object]:
    kept = layer.node in trial.recipe.kept
    return {"node": layer.node, "op": layer.op, "sqnr": round(layer.sqnr, 2), "kept": kept}


# In dB: what keeps more is not worth the time that rounding by second moments takes.
ENOUGH = 35.0
# Share of the data that candidates are judged on.
HELD = 0.25
