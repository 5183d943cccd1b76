"""Quantize where it is easy to get wrong: odd attributes, shared tensors, what ONNX Runtime does to Q."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.noise import sqnr
from onnxslim.engine.base import Changes, Context, Pass, options
from onnxslim.engine.check import interface, wellformed
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import Quantize, QuantizeFigures, weights
from onnxslim.runtime.session import Session
from tests.helpers import normal, parse, quantize, reasons

# Weights by name: w is 3x3, v and u are 1x1 convolutions of 8 channels.
WEIGHTS = {
    "w": 0.2 * normal(8, 8, 3, 3),
    "v": 0.3 * normal(8, 8, 1, 1, seed=1),
    "u": 0.3 * normal(8, 8, 1, 1, seed=2),
}


def _net(
    body: str, outputs: str = "float[N,C,H,W] y", *, opset: int = 17, ir_version: int = 8, **constants: Array
) -> Model:
    """A model of x, float[N,8,6,6], with those weights that its body names."""
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: value for name, value in {**WEIGHTS, **constants}.items() if name in words}
    text = f"g (float[N,8,6,6] x) => ({outputs}) {{ {body} }}"
    return parse(text, used, opset=opset, ir_version=ir_version)


def _quantized(model: Model, feeds: dict[str, Array] | None = None, **chosen: Any) -> tuple[Model, Changes]:
    twin, changes = quantize(model, [feeds or {"x": normal(8, 8, 6, 6)}], classifier=True, **chosen)
    wellformed(twin)
    assert interface(twin) == interface(model)
    return twin, changes


def _assert_close(
    before: Model, after: Model, feeds: dict[str, Array] | None = None, least: float = 25
) -> None:
    """Every output is close to the original's, as ONNX Runtime fuses the model and as it is written."""
    feeds = feeds or {"x": normal(8, 8, 6, 6)}
    expected = Session(before).run(feeds)
    found = [Session(after, optimize=level).run(feeds) for level in ("all", "none")]
    for name, reference in expected.items():
        ratios = [sqnr(reference, outputs[name]) for outputs in found]
        assert min(ratios) > least, (name, ratios)
        assert abs(ratios[0] - ratios[1]) < 1.0 or min(ratios) > 100, (name, ratios)


# Operators


@pytest.mark.parametrize(
    "body",
    [
        'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)',
        "a = Conv<dilations=[2,2]>(x, w) y = Conv(a, v)",
        "a = Add(x, x) y = Conv(a, v)",
        "a = Conv(x, v) r = Relu(a) b = Add(a, r) y = Conv(b, u)",
        "a = Conv(x, v) r = Relu(a) b = Conv(r, u) c = Add(a, b) y = Conv(c, v)",
        "a = Conv(x, v) m, n = Split<axis=1>(a) b = Concat<axis=1>(n, m) y = Conv(b, u)",
        "a = Conv(x, v) b = LeakyRelu(a) c = Sigmoid(b) d = Mul(b, c) y = Conv(d, u)",
        "a = Conv(x, v) b = Softmax<axis=1>(a) y = Conv(b, u)",
        "a = Conv(x, v) p = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(a) "
        "y = Conv(p, u)",
    ],
)
def test_small_networks_agree_fused_and_as_written(body: str) -> None:
    model = _net(body)
    after, changes = _quantized(model)
    assert QuantizeFigures.of(changes).unfused == ()
    _assert_close(model, after)


def test_positions_that_a_pooling_found_are_not_quantized() -> None:
    body = "a = Conv(x, v) p, i = MaxPool<kernel_shape=[2,2]>(a) y = Conv(p, u)"
    model = _net(body, "float[N,C,H,W] y, int64[N,8,5,5] i")
    after, changes = _quantized(model)
    assert QuantizeFigures.of(changes).fused == {"Conv": 2}
    assert len([node for node in after.nodes() if node.op == "QuantizeLinear"]) == 4
    feeds = {"x": normal(8, 8, 6, 6)}
    assert Session(after).run(feeds)["i"].dtype == np.int64


@pytest.mark.parametrize(
    "attributes", ["pads=[1,1,1,1], strides=[2,2], ceil_mode=1, count_include_pad=1", "dilations=[2,2]"]
)
def test_pooling_that_integer_kernels_get_wrong_never_stands_between_pairs(attributes: str) -> None:
    body = f"a = Conv(x, v) p = AveragePool<kernel_shape=[3,3], {attributes}>(a) r = Relu(p) y = Conv(r, u)"
    model = _net(body.replace("3,3", "2,2") if "dilations" in body else body, opset=19, ir_version=9)
    after, changes = _quantized(model)
    assert "integer kernel of AveragePool" in reasons(changes)["AveragePool→p"]
    assert QuantizeFigures.of(changes).fused == {"Conv": 1}
    _assert_close(model, after)


def test_resizing_that_extrapolates_has_a_range_of_its_own() -> None:
    body = (
        'a = Conv(x, v) s = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize", '
        "extrapolation_value=50.0>(a, roi, sc) y = Conv(s, u)"
    )
    roi, scales = np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32), np.array([1, 1, 2, 2], np.float32)
    model = _net(body, roi=roi, sc=scales)
    after, _ = _quantized(model, exclude=("nothing",))
    _assert_close(model, after)


@pytest.mark.parametrize("bias", [np.float32(2), normal(1), normal(8, 1), normal(8, 5)])
def test_a_bias_that_is_no_row_keeps_its_gemm_in_float(bias: Array) -> None:
    text = "g (float[8,4] x, float[4,5] k, float b) => (float[8,M] y) { y = Gemm(x, k, b) }"
    shape = f"float[{','.join(map(str, bias.shape))}] b" if np.ndim(bias) else "float b"
    model = parse(text.replace("float b", shape), {"k": normal(4, 5), "b": bias})
    _, changes = _quantized(model, {"x": normal(8, 4)})
    assert reasons(changes)["Gemm→y"] == "its bias is not one value per column"


def test_a_single_column_is_quantized() -> None:
    text = "g (float[N,4] x, float[4,1] k, float[1] b) => (float[N,1] y) { y = Gemm(x, k, b) }"
    model = parse(text, {"k": normal(4, 1), "b": normal(1)})
    after, changes = _quantized(model, {"x": normal(8, 4)})
    assert QuantizeFigures.of(changes).fused == {"Gemm": 1}
    _assert_close(model, after, {"x": normal(8, 4)})


def test_an_empty_weight_is_left_alone() -> None:
    model = parse(
        "g (float[N,0] x, float[0,4] k) => (float[N,4] y) { y = MatMul(x, k) }", {"k": normal(0, 4)}
    )
    _, changes = _quantized(model, {"x": np.zeros((3, 0), np.float32)})
    assert reasons(changes)["MatMul→y"] == "its weight is empty"


def test_weights_in_constant_nodes_are_quantized() -> None:
    values = ",".join(f"{value:.3f}" for value in normal(16))
    model = parse(
        f"""g (float[N,4] x, bool c) => (float[N,4] y) {{ k = Constant<value=float[4,4] {{{values}}}>()
        a = MatMul(x, k) y = If (c) < then_branch = t () => (float[N,4] p) {{ p = Abs(a) }},
                                      else_branch = e () => (float[N,4] q) {{ q = Neg(a) }}> }}"""
    )
    feeds = {"x": normal(8, 4), "c": np.array(True)}
    after, changes = _quantized(model, feeds)
    assert QuantizeFigures.of(changes).fused == {"MatMul": 1}
    _assert_close(model, after, feeds)


# What is around it


def test_nothing_is_quantized_twice() -> None:
    once, _ = _quantized(_net("a = Conv(x, v) r = Relu(a) y = Conv(r, u)"))
    twice, changes = _quantized(once)
    assert QuantizeFigures.of(changes).trained == (3, 2)
    assert sorted(node.op for node in twice.nodes()) == sorted(node.op for node in once.nodes())
    feeds = {"x": normal(8, 8, 6, 6, seed=9)}
    np.testing.assert_array_equal(Session(once).run(feeds)["y"], Session(twice).run(feeds)["y"])


def test_a_partly_quantized_model_is_completed() -> None:
    model = _net(
        "s = Constant<value_float=0.05>() a = Conv(x, v) q = QuantizeLinear(a, s) d = DequantizeLinear(q, s) "
        "b = Conv(d, u) y = Conv(b, w)"
    )
    result, changes = _quantized(model)
    assert QuantizeFigures.of(changes).fused == {"Conv": 3}
    pair = next(node for node in result.nodes() if node.op == "QuantizeLinear" and node.inputs[0].name == "a")
    assert isinstance(pair.inputs[1], Constant)
    assert pair.inputs[1].values == np.float32(0.05)
    _assert_close(model, result)


@pytest.mark.parametrize("opset", [8, 9, 11])
def test_raising_the_opset_keeps_interface_and_metadata(opset: int) -> None:
    model = _net("a = Conv(x, v) r = Relu(a) y = Conv(r, u)", "float[N,C,H,W] y", opset=opset, ir_version=4)
    model.shell.metadata_props.add(key="stride", value="32")
    result = Pipeline(Quantize(), on_error="raise")(model, data=CalibrationData([{"x": normal(8, 8, 6, 6)}]))
    assert result.model.opset == 13
    assert result.model.metadata == {"stride": "32"}
    written = result.model.to_proto().graph.output[0].type.tensor_type.shape
    assert [dim.dim_param for dim in written.dim] == ["N", "C", "H", "W"]


MOVED = "a = Add(x, x) t = Transpose<perm=[0,1,3,2]>(a) r = Relu(t) {} = Conv(r, v)"


def test_an_output_in_front_of_what_is_moved_stays_exact() -> None:
    """ONNX Runtime moves the Q behind the Relu up to `a`, which is an output and has negative values."""
    model = _net(MOVED.format("y"), "float[N,C,H,W] y, float[N,8,6,6] a")
    after, changes = _quantized(model)
    assert QuantizeFigures.of(changes).fused == {"Conv": 1}
    _assert_close(model, after)
    feeds = {"x": normal(8, 8, 6, 6)}
    np.testing.assert_array_equal(Session(after).run(feeds)["a"], Session(model).run(feeds)["a"])


def test_what_a_body_reads_in_front_of_what_is_moved_stays_exact() -> None:
    text = f"""g (float[N,8,6,6] x, bool c, float[8,8,1,1] v) => (float[N,8,6,6] y) {{
        {MOVED.format("z")}
        y = If (c) < then_branch = t () => (float[N,8,6,6] p) {{ p = Neg(a) }},
                     else_branch = e () => (float[N,8,6,6] q) {{ q = Identity(z) }}> }}"""
    model = parse(text, {"v": WEIGHTS["v"]})
    feeds = {"x": normal(8, 8, 6, 6), "c": np.array(True)}
    after, changes = _quantized(model, feeds)
    assert "QuantizeLinear" in reasons(changes)["Conv→z"]
    _assert_close(model, after, feeds)


def test_a_tensor_of_nothing_but_mask_values_is_no_error() -> None:
    _, changes = _quantized(_net("y = Conv(x, v, b)", b=np.full(8, 1e31, np.float32)))
    assert reasons(changes)["Conv→y"] == "its data holds mask values"


def test_one_scale_for_a_weight_costs_no_more_than_it_must() -> None:
    weight = normal(32, 32, 3, 3)
    free = weights.encode(weight, 0, per_channel=False)
    safe = weights.encode(weight, 0, per_channel=False, pair_axis=1)
    half = np.abs(weight).max() / 63
    seven = np.rint(weight / half) * half

    def error(values: Array) -> float:
        return float(np.square(values - weight).mean())

    assert safe.scales.shape == ()
    assert error(free.codes * free.scales) < error(safe.codes * safe.scales) <= error(seven)


@options
class _Broken(Pass):
    """A pass that makes what ONNX Runtime refuses, and looks at it."""

    name = "broken"

    def run(self, model: Model, ctx: Context) -> Changes:
        raise LoadError("ONNX Runtime refuses the model")


def test_a_result_that_cannot_be_loaded_is_reverted_like_any_other() -> None:
    model = _net("y = Conv(x, v)")
    result = Pipeline(_Broken())(model)
    assert result.report.steps[0].error == "pass 'broken' failed: ONNX Runtime refuses the model"
    assert result.model is model


# Random networks


@st.composite
def _networks(draw: st.DrawFn) -> str:
    """The body of a network of 8 channels, with residuals, gates, joins and pools."""
    lines: list[str] = []
    tensors = ["x"]
    for index in range(draw(st.integers(2, 8))):
        source, other = draw(st.sampled_from(tensors[-3:])), draw(st.sampled_from(tensors))
        out = f"t{index}"
        lines.append(
            draw(
                st.sampled_from(
                    [
                        f"{out} = Conv<pads=[1,1,1,1]>({source}, w)",
                        f"{out} = Conv({source}, v)",
                        f"{out} = Add({source}, {other})",
                        f"{out} = Relu({source})",
                        f"{out} = LeakyRelu({source})",
                        f"{out} = HardSwish({source})",
                        f"{out} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({source})",
                        f"{out} = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>({source})",
                        f"{out} = Transpose<perm=[0,1,3,2]>({source})",
                        f"{out}a, {out}b = Split<axis=1>({source}) {out} = Concat<axis=1>({out}b, {out}a)",
                        f"{out}p = GlobalAveragePool({source}) {out}c = Conv({out}p, u) "
                        f"{out}g = HardSigmoid({out}c) {out} = Mul({source}, {out}g)",
                    ]
                )
            )
        )
        tensors.append(out)
    lines.append(f"y = Conv({tensors[-1]}, u)")
    return " ".join(lines)


@given(body=_networks(), both=st.booleans())
@settings(max_examples=25, deadline=None)
def test_random_networks_agree_fused_and_as_written(body: str, both: bool) -> None:
    """With and without a second output in the middle, which must keep its name and its values."""
    model = _net(body, "float[N,C,H,W] y" + (", float[N,8,6,6] t0" if both else ""))
    with pytest.MonkeyPatch.context() as patch:  # how long so little takes is chance
        patch.setattr(Judge, "slowdown", lambda self, model: None)
        after, changes = _quantized(model)
    assert QuantizeFigures.of(changes).unfused == ()
    _assert_close(model, after, least=20)
