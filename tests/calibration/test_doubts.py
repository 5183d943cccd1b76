"""Doubts: data that cannot stand for real inputs is told from data that may."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.doubts import doubts
from onnxslim.engine.base import Pass
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Array
from onnxslim.passes.dead import Dead
from onnxslim.passes.half import Half
from onnxslim.passes.quantize import Quantize
from tests.helpers import normal, parse

ZERO, ONES, REAL = np.zeros((4, 8), np.float32), np.ones((4, 8), np.float32), normal(4, 8)
IDS, STEP, NONE = np.ones((4, 8), np.int64), np.array([0.5], np.float32), normal(0, 8)


@pytest.mark.parametrize(
    ("batches", "wanted"),
    [
        ([{"x": ZERO}], ("input 'x' is 0 everywhere", "all its 4 samples are equal")),
        ([{"x": ZERO}, {"x": ONES}], ()),
        ([{"x": REAL, "y": ONES}], ("input 'y' is 1 everywhere",)),
        ([{"x": REAL[:1]}], ("it is one single sample",)),
        ([{"x": REAL[:1]}] * 3, ("all its 3 samples are equal",)),
        ([{"x": REAL[:1]}, {"x": REAL[1:2]}], ()),
        ([{"x": REAL[:1]}, {"x": REAL[:1, :4]}], ()),
        ([{"x": REAL, "mask": IDS, "step": STEP, "past": NONE}], ()),
        ([{"x": IDS}], ("all its 4 samples are equal",)),
        ([{"past": NONE}], ()),
        ([{"x": REAL, "mask": IDS}, {"x": np.nan * ONES, "mask": IDS}], ()),
        ([{"x": np.nan * ONES, "mask": IDS}], ("input 'x' holds NaN",)),
    ],
)
def test_what_does_not_vary_is_doubtful(batches: list[dict[str, Array]], wanted: tuple[str, ...]) -> None:
    assert doubts(batches) == wanted


def test_data_is_read_only_until_it_varies() -> None:
    def batches() -> Iterator[dict[str, Array]]:
        yield {"x": REAL}
        raise AssertionError("the first batch tells all")

    assert not doubts(batches())


@pytest.mark.parametrize(("step", "warned"), [(Quantize(), True), (Half(), True), (Dead(), False)])
def test_a_pipeline_tells_of_it_where_a_pass_is_fitted_to_it(step: Pass, warned: bool) -> None:
    model = parse("g (float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", {"w": normal(8, 8)})
    for batch, doubtful in ((ZERO, True), (REAL, False)):
        report = Pipeline(step)(model, data=CalibrationData([{"x": batch}], name="zeros.npz")).report
        assert bool(report.doubts) == (warned and doubtful)
        assert ("warning: zeros.npz: input 'x' is 0 everywhere" in str(report)) == (warned and doubtful)
