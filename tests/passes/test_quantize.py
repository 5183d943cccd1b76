"""Quantize: which nodes run in integers, what they become, and that ONNX Runtime fuses them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Context
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import Quantize, QuantizeFigures, weights
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import filled, normal, ops, parse, quantize, reasons, replaced, same_outputs, sqnr_of

BLOCK = """g (float[N,8,6,6] x) => (float[N,10] y)
<float[16,8,3,3] w1 = {0}, float[16] b1 = {0}, float[16,16,1,1] w2 = {0}, float[16] b2 = {0},
 float[16,8,1,1] ws = {0}, float[16,16,3,3] w3 = {0}, float[10,16] wc = {0}, float[10] bc = {0}>
{
    [conv1] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    [conv2] c2 = Conv(r1, w2, b2)
    [short] s = Conv(x, ws)
    [add] a = Add(c2, s)
    r2 = Relu(a)
    [pool] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r2)
    [conv3] c3 = Conv<pads=[1,1,1,1]>(p, w3)
    r3 = Relu(c3)
    [gap] m = GlobalAveragePool(r3)
    f = Flatten(m)
    [head] y = Gemm<transB=1>(f, wc, bc)
}"""


@pytest.fixture
def block() -> Model:
    return filled(parse(BLOCK), 0.3)


@pytest.fixture
def feeds() -> dict[str, Array]:
    return {"x": normal(4, 8, 6, 6)}


def test_a_residual_block_runs_in_integers_and_fuses(block: Model, feeds: dict[str, Array]) -> None:
    after, changes = quantize(block, [feeds])
    assert QuantizeFigures.of(changes).fused == {"Conv": 4, "Add": 1}
    assert QuantizeFigures.of(changes).unfused == ()
    assert ops(after)["Relu"] == 0, "ranges that begin at zero do the work of Relu"
    assert sqnr_of(block, after, feeds) > 30
    assert abs(sqnr_of(block, after, feeds) - sqnr_of(block, after, feeds, "none")) < 1.0


def test_the_last_pooling_and_classifier_stay_in_float_unless_asked(
    block: Model, feeds: dict[str, Array]
) -> None:
    _, changes = quantize(block, [feeds])
    assert "classifier" in reasons(changes)["head"]
    assert "gap" in reasons(changes)
    _, changes = quantize(block, [feeds], classifier=True)
    assert QuantizeFigures.of(changes).fused == {"Conv": 4, "Add": 1, "GlobalAveragePool": 1, "Gemm": 1}


def test_a_large_classifier_stores_integers_and_computes_in_float() -> None:
    model = parse(
        """g (float[N,64] x) => (float[N,64] y) <float[64,64] w = {1}, float[64,64] v = {1}>
        { a = MatMul(x, w) r = Relu(a) [head] h = MatMul(r, v) y = Softmax(h) }"""
    )
    model = replaced(model, w=0.1 * normal(64, 64), v=0.1 * normal(64, 64, seed=1))
    feeds = {"x": normal(32, 64)}
    after, changes = quantize(model, [feeds])
    assert QuantizeFigures.of(changes).fused == {"MatMul": 1}
    assert sum(t.nbytes for t in after.constants()) < 0.3 * model.nbytes()
    assert sqnr_of(model, after, feeds) > 25
    after, _ = quantize(model, [feeds], exclude=("head",))
    assert sum(t.nbytes for t in after.constants()) > 0.5 * model.nbytes()


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ("float[N,64] s", "s = Relu(a) b = Add(a, s)"),  # a state
        (
            "float[M,64] s",
            "s = Concat<axis=0>(cache, a) m = ReduceMean<axes=[0]>(s) b = Add(a, m)",
        ),  # a cache
        ("float[N,64] a", "b = Relu(a)"),  # what lies between
    ],
)
def test_layers_whose_results_are_given_back_and_used_are_no_classifiers(outputs: str, text: str) -> None:
    model = parse(
        f"""g (float[N,64] x, float[P,64] cache) => (float[N,64] y, {outputs}) {{
            [first] a = MatMul(x, w) {text} [last] h = MatMul(b, v) y = Softmax(h)
        }}""",
        {"w": 0.1 * normal(64, 64), "v": 0.1 * normal(64, 64, seed=1)},
    )
    feeds = {"x": normal(32, 64), "cache": normal(4, 64)}
    after, changes = quantize(model, [feeds])
    assert "first" not in reasons(changes)
    assert "classifier" in reasons(changes)["last"]
    assert sqnr_of(model, after, feeds) > 25


def test_every_head_is_a_classifier() -> None:
    model = parse(
        """g (float[N,64] x) => (float[N,8] y, float[N,8] z) {
            a = MatMul(x, w) r = Relu(a) [one] y = MatMul(r, v) [two] t = MatMul(r, u) z = Softmax(t)
        }""",
        {"w": 0.1 * normal(64, 64), "v": 0.1 * normal(64, 8, seed=1), "u": 0.1 * normal(64, 8, seed=2)},
    )
    _, changes = quantize(model, [{"x": normal(32, 64)}])
    assert all("classifier" in reasons(changes)[head] for head in ("one", "two"))


def test_pooling_shares_the_scale_of_its_input(block: Model, feeds: dict[str, Array]) -> None:
    after, _ = quantize(block, [feeds])
    pool = next(node for node in after.graph.nodes if node.name == "pool")
    before, behind = pool.inputs[0].inputs[0], pool.outputs[0].outputs[0]
    assert (before.op, behind.op) == ("DequantizeLinear", "QuantizeLinear")
    assert before.inputs[1:] == behind.inputs[1:]


def test_the_interface_and_float_weights_are_what_is_expected(block: Model, feeds: dict[str, Array]) -> None:
    after, _ = quantize(block, [feeds])
    assert after.inputs() == block.inputs()
    left = {tensor.name for tensor in after.constants() if tensor.dtype == np.float32 and tensor.size > 32}
    assert left == {"wc"}


@pytest.mark.parametrize("name", ["conv2", "conv*", "Conv"])
def test_excluded_nodes_stay_in_float(block: Model, feeds: dict[str, Array], name: str) -> None:
    _, changes = quantize(block, [feeds], exclude=(name,))
    assert reasons(changes)["conv2"] == f"excluded by '{name}'"


def test_without_data_there_is_one_clear_error(block: Model) -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        Quantize().run(block.copy(), Context())


def test_a_pipeline_checks_and_reports_it(block: Model, feeds: dict[str, Array]) -> None:
    result = Pipeline(Quantize())(block, data=CalibrationData([feeds]))
    (step,) = result.report.steps
    assert step.error == ""
    assert step.after.bytes < 0.6 * step.before.bytes
    assert ops(block)["QuantizeLinear"] == 0


def test_one_scale_for_concatenated_tensors(feeds: dict[str, Array]) -> None:
    model = parse(
        """g (float[N,8,6,6] x) => (float[N,8,6,6] y) <float[8,8,1,1] w = {1}, float[8,8,1,1] v = {1},
        float[8,16,1,1] u = {1}>
        { a = Conv(x, w) b = Conv(x, v) [cat] c = Concat<axis=1>(a, b) y = Conv(c, u) }"""
    )
    model = replaced(model, w=normal(8, 8, 1, 1), v=10 * normal(8, 8, 1, 1), u=normal(8, 16, 1, 1))
    after, changes = quantize(model, [feeds])
    cat = next(node for node in after.graph.nodes if node.name == "cat")
    assert len({id(tensor.inputs[0].inputs[1]) for tensor in cat.inputs}) == 1
    assert QuantizeFigures.of(changes).fused == {"Conv": 3, "Concat": 1}
    # The output is an output of the graph: it keeps its name and its kernel.
    assert after.graph.outputs[0].inputs[0].op == "DequantizeLinear"


def test_a_relu_behind_one_of_the_joined_tensors_keeps_its_kernel(feeds: dict[str, Array]) -> None:
    model = parse(
        """g (float[N,8,6,6] x) => (float[N,8,3,3] y) <float[8,8,1,1] w = {1}, float[8,8,1,1] v = {1},
        float[8,16,1,1] u = {1}>
        { a = Conv(x, w) r = Relu(a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
          b = Conv<strides=[2,2]>(x, v) c = Concat<axis=1>(p, b) y = Conv(c, u) }"""
    )
    model = replaced(model, w=normal(8, 8, 1, 1), v=normal(8, 8, 1, 1, seed=1), u=normal(8, 16, 1, 1))
    after, changes = quantize(model, [feeds])
    assert QuantizeFigures.of(changes).fused == {"Conv": 3, "Concat": 1}
    assert QuantizeFigures.of(changes).unfused == ()
    assert sqnr_of(model, after, feeds) > 30


def test_pooling_of_what_is_made_in_float_stays_in_float(feeds: dict[str, Array]) -> None:
    model = parse(
        """g (float[N,8,6,6] x) => (float[N,8,3,3] y, float[N,8,6,6] z) <float[8,8,1,1] w = {1}>
        { t = Tanh(x) [pool] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)
          y = Conv(p, w) z = Conv(t, w) }"""
    )
    after, changes = quantize(replaced(model, w=normal(8, 8, 1, 1)), [feeds])
    assert "made in floating point" in reasons(changes)["pool"]
    assert ops(after)["QuantizeLinear"] == 4, "of both results, of the pooled and of the other data"


def test_squeeze_excite_and_hardswish_run_in_integers(feeds: dict[str, Array]) -> None:
    model = parse(
        """g (float[N,8,6,6] x) => (float[N,8,6,6] y) <float[8,8,1,1] w = {1}, float[4,8,1,1] d = {1},
        float[8,4,1,1] e = {1}, float[8,8,1,1] u = {1}>
        { a = Conv(x, w) h = HardSwish(a) p = ReduceMean<axes=[2,3]>(h) s = Conv(p, d) t = Relu(s)
          q = Conv(t, e) g = HardSigmoid<alpha=0.1667, beta=0.5>(q) m = Mul(h, g) y = Conv(m, u) }""",
    )
    shapes = {"w": (8, 8, 1, 1), "d": (4, 8, 1, 1), "e": (8, 4, 1, 1), "u": (8, 8, 1, 1)}
    model = replaced(
        model, **{name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    )
    after, changes = quantize(model, [feeds])
    assert QuantizeFigures.of(changes).fused == {"Conv": 4, "GlobalAveragePool": 1, "Mul": 2, "Add": 2}
    assert QuantizeFigures.of(changes).unfused == ()
    assert sqnr_of(model, after, feeds) > 30


@given(alpha=st.floats(0.05, 0.5), beta=st.floats(0.1, 0.9))
@settings(max_examples=10, deadline=None)
def test_hardsigmoid_in_integers_is_within_a_step(alpha: float, beta: float) -> None:
    model = parse(
        f"""g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {{1}}, float[4,4] v = {{1}}>
        {{ a = MatMul(x, w) h = HardSigmoid<alpha={alpha:.4f}, beta={beta:.4f}>(a) m = MatMul(h, v)
           y = Softsign(m) }}"""
    )
    identity = np.eye(4, dtype=np.float32)
    model = replaced(model, w=identity, v=identity)
    x = np.linspace(-8, 8, 64, dtype=np.float32).reshape(16, 4)
    after, _ = quantize(model, [{"x": x}], observer="minmax")
    expected, actual = Session(model).run({"x": x})["y"], Session(after, optimize="none").run({"x": x})["y"]
    # A step of the input, a step of the result, and that of the bias, each rounded to the nearest.
    assert np.abs(expected - actual).max() <= 0.5 * (16 * alpha + 1 + beta) / 255 + 4e-3


def test_mask_constants_never_set_a_range() -> None:
    model = parse(
        """g (float[N,4,8] x, float[N,4,8] mask) => (float[N,4,8] y) <float[8,8] w = {1}, float[8,8] v = {1},
        float low = {-3.4e38}>
        { m = Mul(mask, low) a = MatMul(x, w) s = Add(a, m) y = MatMul(s, v) }"""
    )
    model = replaced(model, w=normal(8, 8), v=normal(8, 8, seed=1))
    mask = np.zeros((2, 4, 8), np.float32)
    mask[0, 0, 0] = 1.0
    after, changes = quantize(model, [{"x": normal(2, 4, 8), "mask": mask}], classifier=True)
    assert any("mask values" in reason for reason in reasons(changes).values())
    scales = [float(t.values) for t in after.constants() if t.name.endswith("_scale") and t.size == 1]
    assert max(scales) < 1.0


def test_a_shared_weight_is_stored_once() -> None:
    model = parse(
        """g (float[N,8] x) => (float[N,8] y) <float[8,8] w = {1}>
        { a = MatMul(x, w) b = Tanh(a) c = MatMul(b, w) y = Tanh(c) }"""
    )
    after, changes = quantize(replaced(model, w=normal(8, 8)), [{"x": normal(16, 8)}])
    assert QuantizeFigures.of(changes).fused == {"MatMul": 2}
    assert [t.shape for t in after.constants() if t.dtype == np.int8 and len(t.shape) == 2] == [(8, 8)]


def test_a_bias_beside_vanishing_weights_survives() -> None:
    model = parse(
        """g (float[N,4,3,3] x) => (float[N,2,3,3] y) <float[2,4,1,1] w = {1}, float[2] b = {1}>
        { y = Conv(x, w, b) }"""
    )
    weight = normal(2, 4, 1, 1)
    weight[1] = 1e-20
    model = replaced(model, w=weight, b=np.array([1.0, 3.0], np.float32))
    feeds = {"x": normal(2, 4, 3, 3)}
    after, _ = quantize(model, [feeds])
    assert np.abs(Session(after).run(feeds)["y"][:, 1] - 3.0).max() < 0.05


def test_what_a_body_reads_is_the_dequantized_tensor() -> None:
    model = parse(
        """g (float[N,4] x, bool c) => (float[N,4] y) <float[4,4] w = {1}, float[4,4] v = {1}>
        { a = MatMul(x, w) r = Relu(a) b = MatMul(r, v)
          y = If (c) < then_branch = t () => (float[N,4] u) { u = Neg(r) },
                       else_branch = e () => (float[N,4] o) { o = Identity(b) }> }"""
    )
    model = replaced(model, w=normal(4, 4), v=normal(4, 4, seed=1))
    feeds = {"x": normal(8, 4), "c": np.array(True)}
    after, _ = quantize(model, [feeds])
    assert sqnr_of(model, after, feeds) > 30


def test_a_weight_that_a_body_reads_is_not_stored_twice() -> None:
    model = parse(
        """g (float[N,32] x, bool c) => (float[N,32] y) {
            a = MatMul(x, w)  r = Relu(a)  b = MatMul(r, v)
            y = If(c) <then_branch = t () => (float[N,32] p) { p = MatMul(b, w) },
                       else_branch = e () => (float[N,32] q) { q = Identity(b) }>
        }""",
        {"w": normal(32, 32), "v": normal(32, 32)},
    )
    after, changes = quantize(model, [{"x": normal(8, 32), "c": np.array(True)}], classifier=True)
    assert "would be stored twice" in reasons(changes)["MatMul→a"]
    assert after.nbytes() < 0.75 * model.nbytes()
    assert "w" in after.graph.initializers


def test_an_old_opset_is_raised() -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1}> { y = MatMul(x, w) }", opset=11)
    after, changes = quantize(replaced(model, w=normal(4, 4)), [{"x": normal(8, 4)}], classifier=True)
    assert after.opset == 13
    assert changes.changed[0].action == "raised to opset 13"
    assert model.opset == 11


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, z)", "its weight is not a matrix"),
        ("c = CastLike(x, h) d = MatMul(c, wh) y = CastLike(d, x)", "not float32"),
    ],
)
def test_what_cannot_be_quantized_says_why(body: str, reason: str) -> None:
    model = parse(
        f"""g (float[2,4] x, float[2,4,4] z) => (float[N,4] y) <float16[1] h = {{1}}, float16[4,4] wh = {{1}}>
        {{ {body} }}""".replace("float[N,4] y", "float[2,2,4] y" if "z" in body else "float[2,4] y")
    )
    if "wh" not in body:
        del model.graph.initializers["wh"], model.graph.initializers["h"]
    else:
        model = replaced(model, wh=normal(4, 4).astype(np.float16))
    feeds = {"x": normal(2, 4), "z": normal(2, 4, 4)}
    after, changes = quantize(model, [feeds], classifier=True)
    assert any(reason in skip.reason for skip in changes.skipped)
    assert not changes
    same_outputs(model, after, feeds)


def test_symmetric_targets_get_symmetric_integers(block: Model, feeds: dict[str, Array]) -> None:
    rules = Target.tensorrt().layout
    after, _ = quantize(block, [feeds], target=Target("tensorrt", "CPUExecutionProvider", layout=rules))
    zeros = [t for t in after.constants() if t.name.endswith("_zero_point")]
    assert zeros
    assert all(t.dtype == np.int8 and not t.values.any() for t in zeros)
    conv = next(node for node in after.graph.nodes if node.name == "conv1")
    assert isinstance(conv.inputs[2], Constant)
    assert conv.inputs[2].dtype == np.float32
    assert conv.outputs[0].outputs[0].op == "Relu", "zero is not the end of a symmetric range"
    assert sqnr_of(block, after, feeds, "none") > 25


# Weights


_WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=4, max_dims=4, max_side=5),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


def _pair_sums(codes: Array) -> Array:
    """Sums of the pairs that kernels may form: they run over channels fastest, then over the window."""
    rows = np.transpose(codes, (0, 2, 3, 1)).reshape(len(codes), -1).astype(int)
    sums = np.abs(rows[:, 1:] + rows[:, :-1])
    channels = codes.shape[1]
    if channels % 2 == 0:  # four products are added at a time, so that none reach into the next position
        sums = np.delete(sums, np.arange(channels - 1, sums.shape[1], channels), axis=1)
    return np.asarray(sums)


@given(_WEIGHTS, st.booleans())
def test_codes_never_saturate_sixteen_bits(weight: Array, per_channel: bool) -> None:
    encoded = weights.encode(weight, 0, per_channel=per_channel, pair_axis=1)
    assert encoded.codes.shape == weight.shape
    assert (255 * _pair_sums(encoded.codes) <= 32767).all()


@given(_WEIGHTS, st.integers(0, 3))
def test_rounding_is_to_the_nearest_code(weight: Array, axis: int) -> None:
    encoded = weights.encode(weight, axis, per_channel=True)
    scales = encoded.scales.reshape([-1 if i == axis else 1 for i in range(4)])
    assert (np.abs(encoded.codes * scales - weight) <= 0.5001 * scales).all()


@given(st.integers(1, 3), st.booleans(), st.booleans())
@settings(deadline=None)
def test_the_lost_mean_is_what_the_outputs_lose(groups: int, per_channel: bool, transposed: bool) -> None:
    pixels, channels = 50, 4 * groups
    weight = normal(6 * groups, 4, 1, 1)
    encoded = weights.encode(weight, 0, per_channel=per_channel)
    data = normal(1, channels, pixels, 1) + 1.0
    error = weight - encoded.codes * encoded.scales.reshape([-1 if encoded.scales.ndim else 1, 1, 1, 1])
    by_group = np.split(data[0, :, :, 0], groups)
    lost = [np.squeeze(w, (2, 3)) @ x for w, x in zip(np.split(error, groups), by_group, strict=True)]
    means = data.mean(axis=(0, 2, 3))
    found = weights.lost_mean(weight, encoded, 0, means)
    assert found is not None
    np.testing.assert_allclose(found, np.concatenate(lost).mean(axis=1), atol=1e-5)
    if groups == 1 and transposed:
        matrix = np.ascontiguousarray(weight[:, :, 0, 0].T)
        turned = weights.encode(matrix, 1, per_channel=per_channel)
        again = weights.lost_mean(matrix, turned, 1, means)
        assert again is not None
        np.testing.assert_allclose(again, found, atol=1e-6)


def test_bias_correction_keeps_the_mean_of_every_channel() -> None:
    model = parse(
        """g (float[N,8,6,6] x) => (float[N,4,6,6] y) <float[4,8,1,1] w = {1}, float[4] b = {1}>
        { y = Conv(x, w, b) }"""
    )
    model = replaced(model, w=normal(4, 8, 1, 1), b=normal(4))
    feeds = {"x": np.abs(normal(16, 8, 6, 6)) + 2.0}
    expected = Session(model).run(feeds)["y"].mean(axis=(0, 2, 3))

    def shift(**options: Any) -> float:
        after, _ = quantize(model, [feeds], per_channel=False, **options)
        return float(np.abs(Session(after).run(feeds)["y"].mean(axis=(0, 2, 3)) - expected).max())

    assert shift() < 0.2 * shift(bias_correction=False)


def test_tightening_costs_less_than_seven_bits() -> None:
    weight = normal(64, 64, 3, 3)

    def error(codes: Array, scales: Array) -> float:
        return float(np.square(codes * scales.reshape(-1, 1, 1, 1) - weight).mean())

    free = weights.encode(weight, 0, per_channel=True)
    safe = weights.encode(weight, 0, per_channel=True, pair_axis=1)
    half = np.abs(weight).max(axis=(1, 2, 3)) / 63
    seven = error(np.rint(weight / half.reshape(-1, 1, 1, 1)), half)
    assert safe.tightened > 0
    assert error(free.codes, free.scales) < error(safe.codes, safe.scales) < 0.6 * seven
