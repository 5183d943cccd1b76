"""Layers in other types than float32 are named, and stand in nobody's way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxslim.engine.base import Pass
from onnxslim.engine.pipeline import Pipeline
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from tests.helpers import normal, parse, reasons

# A product in single and one in double precision.
MIXED = """g (float[N,64] x) => (float[N,32] y)
{ a = MatMul(x, w) b = Relu(a) c = Cast<to=11>(b) [double] d = MatMul(c, v) y = Cast<to=1>(d) }"""


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (Quantize(require_sqnr=0), "its data is not float32 but float64"),
        (Quantize(activations="dynamic", require_sqnr=0), "its weight is not float32 but float64"),
        (Quantize(activations="none", require_sqnr=0), "its weight is not float32 but float64"),
        (Prune(ratio=0.5), "its weight is of type float64, not float32 or float16"),
        (Half(), ""),
    ],
)
def test_one_product_in_double_precision_ends_no_pass(made: Pass, reason: str) -> None:
    values: dict[str, Any] = {"w": normal(64, 64), "v": normal(64, 32, seed=1).astype(np.float64)}
    data = [{"x": normal(8, 64, seed=seed)} for seed in range(8)]
    (step,) = Pipeline(made, on_error="raise")(parse(MIXED, values), data=data).report.steps
    assert step.changes.changed
    assert not reason or reasons(step.changes)["double"] == reason
