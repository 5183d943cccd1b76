"""Half: what computes and what is stored in half precision, and what stays as it was."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.half import Half
from onnxslim.runtime.session import Session
from tests.helpers import apply, normal, normals, ops, parse, replaced

NET = """g (float[N,3,8,8] x) => (float[N,10] y)
<float[64,3,3,3] w = {0}, float[64] b = {0}, float[64,10] m = {0}, float[1] big = {30000.0}>
{ [conv] c = Conv(x, w, b) r = Relu(c) [large] l = Mul(r, big) [small] s = Div(l, big)
  p = GlobalAveragePool(s) f = Flatten(p) [product] y = MatMul(f, m) }"""


@pytest.fixture
def net() -> Model:
    return replaced(parse(NET), **normals(w=(64, 3, 3, 3), b=(64,), m=(64, 10)))


@pytest.fixture
def feeds() -> dict[str, Array]:
    return {"x": normal(4, 3, 8, 8, seed=5)}


def _error(before: Model, after: Model, feeds: dict[str, Array]) -> float:
    expected, actual = (Session(model).run(feeds)["y"] for model in (before, after))
    assert actual.dtype == np.float32
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


def test_nodes_compute_in_half_precision_but_for_those_that_would_overflow(
    net: Model, feeds: dict[str, Array]
) -> None:
    result, changes = apply(Half(), net, [feeds])
    skipped = {skip.node for skip in changes.skipped}
    assert {"large", "small"} <= skipped
    assert {"conv", "product"} <= {change.node for change in changes.changed}
    assert _error(net, result, feeds) < 5e-3
    assert result.graph.inputs[0].dtype == result.graph.outputs[0].dtype == np.float32


def test_without_data_only_constants_tell_what_is_safe(net: Model) -> None:
    _, changes = apply(Half(), net)
    assert {"conv", "product"} <= {change.node for change in changes.changed}
    assert {"large", "small"} <= {skip.node for skip in changes.skipped}


def test_excluded_nodes_stay(net: Model, feeds: dict[str, Array]) -> None:
    _, changes = apply(Half(exclude=("conv",)), net, [feeds])
    assert ("conv", "excluded by 'conv'") in {(skip.node, skip.reason) for skip in changes.skipped}


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_weights_alone_halve_the_file_and_run_at_full_speed(
    net: Model, feeds: dict[str, Array], dtype: str, most: float
) -> None:
    result, _ = apply(Half(dtype=dtype, weights_only=True), net, [feeds])  # type: ignore[arg-type]
    assert ops(result)["Cast"] == 1
    assert 0 < _error(net, result, feeds) < most


def test_the_pipeline_accepts_it(net: Model, feeds: dict[str, Array]) -> None:
    result = Pipeline(Half(), on_error="raise")(net, data=CalibrationData([feeds]))
    assert result.report.steps[0].changes


@pytest.mark.parametrize(
    "body",
    [
        "a = Cast<to = 1>(i) b = Neg(x) y = Mul(a, b)",
        "s = Shape(x) a = ConstantOfShape<value = float[1] {2}>(s) b = Neg(x) y = Mul(a, b)",
        "a = EyeLike<dtype = 1>(i) b = MatMul(x, a) c = Neg(b) y = Cast<to = 1>(c)",
    ],
)
def test_operators_that_state_their_type(body: str) -> None:
    model = parse(f"g (float[4,4] x, int64[4,4] i) => (float[4,4] y) {{ {body} }}")
    feeds: dict[str, Array] = {"x": np.eye(4, dtype=np.float32), "i": np.ones((4, 4), np.int64)}
    result = Pipeline(Half())(model)
    assert result.report.steps[0].changes
    assert not result.report.steps[0].error
    assert _error(model, result.model, feeds) < 1e-3
