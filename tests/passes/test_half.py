"""Half: what computes and what is stored in half precision, and what stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.noise import sqnr
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.passes.half import Half
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import apply, normal, normals, ops, parse, replaced, sqnr_of

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


def _lost(before: Model, after: Model, feeds: dict[str, Array]) -> float:
    """The error as the standard defines it: ONNX Runtime leaves out some of the roundings on processors."""
    expected, actual = (Session(model, Target.reference()).run(feeds)["y"] for model in (before, after))
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


def test_inputs_that_may_be_left_out_are_seen_as_their_defaults() -> None:
    text = "g (float[N,4] x, float[4,4] w) => (float[N,4] y) <float[4,4] w = {0}> { y = MatMul(x, w) }"
    model = parse(text)
    model.graph.defaults["w"] = Constant("w", normal(4, 4))
    result, _ = apply(Half(), model, [{"x": normal(3, 4)}])
    assert "Cast" in ops(result)
    assert _error(model, result, {"x": normal(3, 4)}) < 5e-3


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


def _kept(model: Model, data: list[dict[str, Array]] | None = None, **given: Any) -> dict[str, str]:
    """Nodes that stay in single precision, with the reasons."""
    result = Pipeline(Half(**given), on_error="raise")(model, data=data and CalibrationData(data))
    return {skip.node: skip.reason for skip in result.report.steps[0].changes.skipped}


def _halved(model: Model, data: list[dict[str, Array]] | None = None, **given: Any) -> Model:
    return Pipeline(Half(**given), on_error="raise")(model, data=data and CalibrationData(data)).model


@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_in_constant_nodes_are_halved_too(weights_only: bool) -> None:
    weight = ", ".join(["0.5"] * 4096)
    model = parse(
        f"""g (float[N,64] x) => (float[N,64] y)
        {{ w = Constant<value = float[64,64] {{{weight}}}>() [product] y = MatMul(x, w) }}"""
    )
    assert _halved(model, weights_only=weights_only).to_proto().ByteSize() < 0.6 * model.to_proto().ByteSize()


@pytest.mark.parametrize(
    "body",
    [
        "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q)"
        " e = Add(v, tiny) r = Sqrt(e) y = Div(d, r)",
        "n = ReduceL2<axes=[-1]>(x) c = Clip(n, tiny) e = Expand(c, s) y = Div(x, e)",
        "n = ReduceMax<axes=[-1]>(x) m = Max(n, tiny) r = Reciprocal(m) y = Mul(x, r)",
        "y = Div(x, mixed)",
        "u = Unsqueeze(x, one) n = InstanceNormalization<epsilon=1e-12>(u, three, three) y = Squeeze(n, one)",
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_tiny_constants_keep_what_they_are_for(body: str, known: bool) -> None:
    model = parse(
        f"""g (float[3,4] x) => (float[3,4] y)
        <float tiny = {{1e-12}}, float[4] mixed = {{1e-9, 1, 2, 3}}, int64[2] s = {{3, 4}},
        int64[1] one = {{0}}, float[3] three = {{1, 1, 1}}> {{ {body} t = Identity(x) }}"""
    )
    data = [{"x": normal(3, 4)}] if known else None
    result = _halved(model, data)
    for x in (np.zeros((3, 4), np.float32), np.array([[1e-6, 0, -1e-6, 0]] * 3, np.float32)):
        expected, actual = (Session(each, Target.reference()).run({"x": x})["y"] for each in (model, result))
        np.testing.assert_allclose(actual, expected, rtol=0.05, atol=1e-3 * np.abs(expected).max())


def test_constants_that_are_small_but_not_lost_are_halved() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) <float e = {1e-5}> { a = Add(x, e) y = Sqrt(a) }")
    assert not _kept(model)


ROTARY = """g (int64[1,t] p, float[1,t,8] x) => (float[1,t,8] y) <int64[1] two = {2}, float[1,1,8] f = {0}>
{ [cast] c = Cast<to = 1>(p) [u] u = Unsqueeze(c, two) [angle] a = %s
  [cos] o = Cos(a) [turn] y = Mul(x, o) }"""


@pytest.mark.parametrize("angle", ["Mul(u, f)", "MatMul(u, f)"])
def test_angles_of_positions_stay_exact(angle: str) -> None:
    model = parse(ROTARY % angle, {})
    model.graph.initializers["f"].values = (1e4 ** -np.linspace(0, 1, 8, dtype=np.float32)).reshape(1, 1, 8)
    feeds = {"p": np.arange(3000, 3064)[None], "x": normal(1, 64, 8)}
    for data in (None, [feeds]):
        assert _kept(model, data).keys() == {"cast", "angle", "cos", "u"}
        assert _lost(model, _halved(model, data), feeds) < 2e-3


def test_layers_before_a_sine_are_halved() -> None:
    model = parse(
        "g (float[N,8] x) => (float[N,8] y) <float[8,8] w = {0}> { [p] a = MatMul(x, w) y = Sin(a) }"
    )
    assert "p" not in _kept(replaced(model, w=normal(8, 8)))


@pytest.mark.parametrize(
    ("body", "values", "kept"),
    [
        ("[a] a = Add(x, big) [s] y = Sub(a, big)", 1.0, {"a", "s"}),
        ("[a] a = Mul(x, x) [s] y = Sqrt(a)", 1e-5, {"a", "s"}),
        ("[a] a = Add(x, x) [s] y = Relu(a)", 1.0, set()),
        ("[a] a = Add(x, big) [f] f = Identity(a) [s] y = Sub(f, big)", 1.0, {"a", "f", "s"}),
    ],
)
def test_what_rounding_costs_is_measured_on_data(body: str, values: float, kept: set[str]) -> None:
    model = parse(f"g (float[N,8] x) => (float[N,8] y) <float big = {{2000}}> {{ {body} }}")
    feeds = {"x": normal(4, 8) * np.float32(values)}
    assert _kept(model, [feeds]).keys() == kept
    if kept:
        assert _lost(model, _halved(model), feeds) > 1e-2
        assert _lost(model, _halved(model, [feeds]), feeds) < 1e-2


def test_where_no_part_of_a_bearable_size_helps_only_the_node_itself_stays() -> None:
    turns = " ".join(f"a{index + 1} = Neg(a{index})" for index in range(20))
    model = parse(
        f"""g (float[N,8] x) => (float[N,8] y) <float big = {{2000}}>
        {{ a0 = Add(x, big) {turns} [s] y = Sub(a20, big) }}"""
    )
    assert _kept(model, [{"x": normal(4, 8)}]).keys() == {"s"}


def test_operators_without_a_kernel_stay_in_float() -> None:
    model = parse("g (float[N,8] x) => (float[N,8] y) { [i] a = Identity(x) [g] y = Sigmoid(a) }")
    reasons = _kept(model, dtype="bfloat16")
    assert "no kernel" in reasons["g"]


def test_infinities_are_what_the_type_holds() -> None:
    model = parse(
        """g (float[N,4] x, bool[N,4] m) => (float[N,4] y) <float none = {0}>
        { [w] w = Where(m, x, none) [s] y = Softmax(w) }"""
    )
    model = replaced(model, none=np.float32(-np.inf))
    feeds = {"x": normal(2, 4), "m": np.array([[True, False, True, True]] * 2)}
    assert not _kept(model)
    assert not _kept(model, [feeds])
    assert _error(model, _halved(model, [feeds]), feeds) < 1e-3


def test_parts_in_integers_are_left_alone() -> None:
    model = parse(
        """g (float[N,4] x) => (float[N,4] y) <float s = {0.1}, uint8 z = {128}, float[4,4] w = {0}>
        { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) [r] r = Relu(d)
          p = QuantizeLinear(r, s, z) e = DequantizeLinear(p, s, z) [f] f = Neg(e)
          [last] y = MatMul(f, w) }"""
    )
    model = replaced(model, w=normal(4, 4))
    kept = _kept(model)
    assert {"r", "f"} <= kept.keys()
    assert "last" not in kept


def test_sums_of_integers_are_scaled_in_float() -> None:
    model = parse(
        """g (uint8[N,4096] x) => (float[N,2] y) <uint8[4096,2] w = {0}, float s = {0.0001}>
        { i = MatMulInteger(x, w) [c] c = Cast<to = 1>(i) [m] m = Mul(c, s) [n] y = Neg(m) }"""
    )
    assert _kept(replaced(model, w=np.ones((4096, 2), np.uint8))).keys() == {"c", "m"}


def test_an_empty_cache_in_the_data_does_not_end_it() -> None:
    model = parse(
        """g (float[1,s,4] x, float[1,p,4] c) => (float[1,t,4] y) <float[4,4] w = {0}>
        { [k] k = MatMul(x, w) [j] j = Concat<axis = 1>(c, k) y = Neg(j) }"""
    )
    data = [{"x": normal(1, 5, 4), "c": np.zeros((1, 0, 4), np.float32)}]
    assert not _kept(replaced(model, w=normal(4, 4)), data)


def test_operators_whose_kernel_refuses_an_attribute_when_it_runs_stay_in_float() -> None:
    model = parse(
        """g (float[N,4] x, int64[E,4] at) => (float[N,4] y) { h = MatMul(x, w) u = MatMul(x, v)
        [most] s = ScatterElements<axis = 0, reduction = "max">(h, at, u)
        [sum] t = ScatterElements<axis = 0, reduction = "add">(s, at, u) y = MatMul(t, w) }""",
        normals(w=(4, 4), v=(4, 4)),
        opset=18,
    )
    kept = _kept(model)
    assert kept.keys() == {"sum"}
    assert "no kernel" in kept["sum"]
    feeds = {"x": normal(3, 4), "at": np.zeros((3, 4), np.int64)}
    assert _error(model, _halved(model), feeds) < 1e-2


def test_what_runs_in_no_type_on_what_it_is_tried_with_is_not_said_to_have_no_kernel() -> None:
    """Zeros are no sizes of parts."""
    model = parse(
        "g (float[N,4] x, int64[1] k) => (float[N,4] y) { h = MatMul(x, w) y = Split<axis = 1>(h, k) }",
        normals(w=(4, 4)),
    )
    assert not _kept(model)


def test_what_a_runtime_ends_at_stays_in_float_and_the_rest_goes_on() -> None:
    """A turned input and a product by a constant, in float16, end ONNX Runtime 1.31 while it opens them."""
    model = parse(
        """g (float[4,N,6] x) => (float[N,4,4] y)
        { [turn] t = Transpose<perm = [1,0,2]>(x) [dot] p = MatMul(t, w) r = Relu(p) y = MatMul(r, v) }""",
        normals(w=(6, 4), v=(4, 4)),
    )
    kept = _kept(model)
    assert kept.keys() <= {"turn", "dot"}
    assert _error(model, _halved(model), {"x": normal(4, 2, 6)}) < 1e-2


def test_single_precision_that_was_half_before_is_read_as_it_was() -> None:
    model = parse(
        "g (float16[N,4] x) => (float[N,4] y) { [wide] c = Cast<to=1>(x) m = MatMul(c, w) y = Add(m, c) }",
        normals(w=(4, 4)),
    )
    result, _ = apply(Half(exclude=("wide", "Add")), model)
    (product,) = [node for node in result.nodes() if node.op == "MatMul"]
    assert product.inputs[0].name == "x"


def test_what_fails_on_data_alone_stays_in_float_with_all_that_are_alike() -> None:
    """No made-up sizes of the parts fit each other, and zeros would not do for them."""
    model = parse(
        """g (float[N,4] x, int64[1] k) => (float[N,4] y) { h = MatMul(x, w) i = Expand(at, k2)
        k2 = Concat<axis = 0>(k, four)
        [one] s = ScatterElements<axis = 0, reduction = "add">(h, i, u) r = Relu(s)
        [two] t = ScatterElements<axis = 0, reduction = "add">(r, i, u) y = MatMul(t, w) }""",
        {**normals(w=(4, 4), u=(3, 4)), "at": np.zeros((1, 1), np.int64), "four": np.array([4])},
        opset=18,
    )
    feeds = {"x": normal(3, 4), "k": np.array([3])}
    kept = _kept(model, [feeds])
    assert kept.keys() == {"one", "two"}
    assert _error(model, _halved(model, [feeds]), feeds) < 1e-2


STEPS = """h = MatMul(x, w) {mean} d = Sub(h, m) {square} {variance} ve = Add(v, e) r = Sqrt(ve) n = Div(d, r)
ns = Mul(n, s) nb = Add(ns, b) y = MatMul(nb, w)"""


def _normalized(square: str, opset: int, outputs: str = "") -> Model:
    """A normalization in single steps, between two products."""
    axes = "<axes=[-1]>({})" if opset < 18 else "({}, a)"
    mean, variance = (f"{name} = ReduceMean{axes.format(of)}" for name, of in (("m", "h"), ("v", "q")))
    body = STEPS.format(mean=mean, square=f"q = {square}", variance=variance)
    text = f"""g (float[N,64] x) => (float[N,64] y{outputs}) <float[64,64] w = {{0}}, float[64] s = {{0}},
    float[64] b = {{0}}, float e = {{0.00001}}, float two = {{2.0}}, int64[1] a = {{-1}}> {{ {body} }}"""
    model = parse(text, opset=opset)
    for index, name in enumerate("wsb"):
        shape = model.graph.initializers[name].shape
        model.graph.initializers[name].values = normal(*shape, seed=index + 1)
    return model


LARGE = {"x": 60 * normal(8, 64, seed=9)}


@pytest.mark.parametrize("square", ["Pow(d, two)", "Mul(d, d)"])
@pytest.mark.parametrize("opset", [11, 13, 17, 20])
def test_normalizations_are_put_together_first(square: str, opset: int) -> None:
    model = _normalized(square, opset)
    result = Pipeline(Half(), on_error="raise")(model).model
    assert ops(result)["LayerNormalization"] == 1
    assert "Sqrt" not in ops(result)
    assert result.opset == max(opset, 17)
    assert sqnr_of(model, result, LARGE) > 50
    assert Pipeline(Half(weights_only=True))(model).model.opset == opset


@pytest.mark.parametrize("square", ["Pow(d, two)", "Mul(d, d)"])
def test_squares_stay_in_single_precision_where_no_data_tells_how_large_they_are(square: str) -> None:
    model = _normalized(square, 13, ", float[N,64] d")
    result, changes = apply(Half(), model)
    assert "LayerNormalization" not in ops(result)
    told = {skip.reason for skip in changes.skipped}
    assert any("squares of it may exceed what float16 holds" in reason for reason in told)
    # As NumPy computes it: processors of ONNX Runtime widen most of half precision.
    expected = Session(model).run(LARGE)["y"]
    assert sqnr(expected, Session(result, Target.reference()).run(LARGE)["y"]) > 40
    _, wide = apply(Half(dtype="bfloat16"), model)
    assert not any("squares of it" in skip.reason for skip in wide.skipped)
