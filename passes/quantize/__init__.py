"""Static quantization to 8-bit integers, as Q/DQ pairs in standard operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxslim.engine.base import Changes, Context, options
from onnxslim.engine.moves import Move
from onnxslim.ir.model import Model
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.recorded import QuantizationPlan
from onnxslim.passes.quantize.run import QuantizeRun
from onnxslim.passes.quantize.wish import QuantizeWish

__all__ = ["QuantizationPlan", "Quantize", "QuantizeFigures"]


@options
class Quantize(QuantizeWish):
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

    Weights that are looked up in tables, as `Cluster` leaves them, keep their codes: the tables become int8,
    and kernels get the integers that runtimes look up in them as they load the model. Weights of few bits get
    eight where too much would be lost, before layers are kept out of integers.

    With `train` the result is a start: scales, weights and biases are then learnt through the rounding, with
    PyTorch, such that outputs come close to those of the model that came into the pipeline. The best state on
    samples that nothing was fitted to is kept, the start included. All layers that can are in integers then;
    with `require_sqnr` or `max_drop`, layers are kept out of them, and the rest is trained once more, where
    that is not enough after training.
    """

    def run(self, model: Model, ctx: Context) -> Changes:
        """Quantize the model in place.

        Raises:
            CalibrationError: there is no calibration data, or it does not fit the model.
            PassError: the model's opset is too old and cannot be raised.
            UsageError: options contradict each other, or the plan cannot be read or does not fit the model.
        """
        self.require_data(ctx.data)
        if (plan := self.planned()) is None:
            return QuantizeRun(self)(model, ctx, None)
        beside = {name: getattr(self, name) for name in self.beside_plan}
        return QuantizeRun(replace(self.of_plan(plan), **beside))(model, ctx, plan)

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """Of every layer that it runs in integers while all others do not; without data, nothing is known."""
        self.require_data(ctx.data)
        return () if ctx.data is None else QuantizeRun(self).moves(model.copy(), ctx)
