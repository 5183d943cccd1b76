"""Shapes that are certain: from inputs and operators alone, and as ONNX Runtime computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnxslim import shapes
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Shape
from onnxslim.ir.model import Model, load
from onnxslim.shapes.cost import macs
from tests.helpers import is_wellformed, parse, run


def deduced(model: Model) -> dict[str, Shape]:
    facts = shapes.deduce(model)
    made = [tensor for node in model.nodes() for tensor in node.outputs]
    return {tensor.name: facts[id(tensor)].shape for tensor in made if id(tensor) in facts}


def assert_true(model: Model) -> None:
    """Every size that was deduced of an output is the one ONNX Runtime makes."""
    found = deduced(model)
    try:
        outputs = run(model)
    except LoadError:
        return
    for name, value in outputs.items():
        shape = found[name]
        if shape is not None:
            assert len(shape) == value.ndim
            sizes = [
                size if isinstance(dim, int) else dim for dim, size in zip(shape, value.shape, strict=True)
            ]
            assert sizes == list(shape), name


def test_annotations_do_not_count_but_inputs_do() -> None:
    model = parse(
        """g (float[N,4] x, int64[2] s, float[M,3] z) => (float[9,9] y, float[9] v) <float[7,7] t>
        { t = Reshape(x, s) y = Neg(t) v = Neg(z) }"""
    )
    found = deduced(model)
    assert [isinstance(dim, int) for dim in found["t"] or ()] == [False, False]
    assert found["t"] == found["y"]
    assert found["v"] == ("M", 3)


def test_axes_without_names_get_names_of_their_own() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[?,?,?] x) => (float[] y) { y = Neg(x) }'
    )
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -1
    shape = deduced(load(proto))["y"]
    assert shape is not None
    assert len(set(shape)) == 3
    assert None not in shape


def test_the_value_of_a_default_is_not_certain() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x, int64[2] s) => (float[] y) <int64[2] s = {2, 2}> { y = Reshape(x, s) }"""
    )
    shape = deduced(load(proto))["y"]
    assert shape is not None
    assert not any(isinstance(dim, int) for dim in shape)


def test_bodies_are_not_believed_what_they_declare() -> None:
    model = parse(
        """g (float[2] x, int64 n, bool t) => (float[] y) {
            y = Loop(n, t, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] w)
                { d = Identity(c) w = Concat<axis = 0>(v, v) }>
        }"""
    )
    found = deduced(model)
    assert not any(isinstance(dim, int) for dim in found["w"] or ())
    assert found["y"] is None or not any(isinstance(dim, int) for dim in found["y"])


def test_long_vectors_are_not_propagated_element_by_element() -> None:
    model = parse(
        "g (float[1] x) => (float[] y) { big = Expand(x, n) y = Add(big, big) }", {"n": np.array([2**40])}
    )
    assert deduced(model)["y"] == (2**40,)


@given(
    op=st.sampled_from(["MaxPool", "AveragePool", "LpPool"]),
    size=st.integers(1, 11),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.sampled_from([1, 1, 1, 2, 3]),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    ceil=st.booleans(),
    auto=st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
)
@settings(max_examples=150, deadline=None)
def test_pools(
    op: str, size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], ceil: bool, auto: str
) -> None:
    padding = (
        f'auto_pad = "{auto}"' if auto != "NOTSET" else f"pads = [{pads[0] % kernel}, {pads[1] % kernel}]"
    )
    assert_true(
        parse(
            f"g (float[1,1,{size}] x) => (float[] y, float[] z) {{ "
            f"y = {op}<kernel_shape = [{kernel}], strides = [{stride}], dilations = [{dilation}], "
            f"ceil_mode = {int(ceil)}, {padding}>(x) "
            "z = MaxPool<kernel_shape = [1], strides = [2], ceil_mode = 1>(y) }",
            opset=19,
        )
    )


@given(
    st.integers(1, 40),
    st.sampled_from([0.3, 0.77, 1.1, 1.5, 2.0, 2.7, 3.1, 1 / 3]),
    st.sampled_from([9, 10, 11, 18]),
)
@example(size=10, scale=3.1, opset=9)
@settings(max_examples=60, deadline=None)
def test_scales(size: int, scale: float, opset: int) -> None:
    body = {9: "Upsample(x, s)", 10: "Resize(x, s)", 11: "Resize(x, r, s)", 18: "Resize(x, , s)"}[opset]
    constants: dict[str, Any] = {"s": np.array([1, 1, scale], np.float32), "r": np.zeros(0, np.float32)}
    assert_true(parse(f"g (float[1,1,{size}] x) => (float[] y) {{ y = {body} }}", constants, opset=opset))


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=2), st.sampled_from([1, 2, -1, -2]))
@settings(max_examples=60, deadline=None)
def test_slices(ends: list[int], step: int) -> None:
    for last in (*ends, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)):
        constants = {
            "a": np.array(ends[:1]),
            "b": np.array([last]),
            "c": np.array([0]),
            "d": np.array([step]),
        }
        assert_true(parse("g (float[6] x) => (float[] y) { y = Slice(x, a, b, c, d) }", constants))


@pytest.mark.parametrize(
    "attributes",
    [
        "output_shape = [14]",
        "output_shape = [1, 3, 14]",
        'auto_pad = "SAME_UPPER", output_padding = [1], strides = [3]',
        "output_padding = [1], strides = [3]",
    ],
)
def test_transposed_convolutions(attributes: str) -> None:
    weight = np.ones((2, 3, 3), np.float32)
    text = f"g (float[1,2,7] x) => (float[] y) {{ y = ConvTranspose<{attributes}>(x, w) }}"
    assert_true(parse(text, {"w": weight}))


def test_sizes_of_attention_that_inference_does_not_know_are_not_zero() -> None:
    model = parse(
        """g (float[B,Q,24] q, float[B,K,24] k, float[B,K,V] v) => (float[A,C,D] y, int64[3] s)
        { y = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v) s = Shape(y) }""",
        opset=23,
        ir_version=10,
    )
    made = shapes.deduce(model)[id(model.graph.outputs[0])]
    assert made.shape is not None
    assert 0 not in made.shape
    assert made.shape[:2] == ("B", "Q")


@pytest.mark.parametrize(
    "node",
    [
        "Resize(x, , s)",
        "Resize<axes = [7, 8, 9, 10]>(x, , s)",
        "MaxPool<kernel_shape = [2, 2], strides = [0, 0], ceil_mode = 1>(x)",
        "MaxPool<kernel_shape = [2, 2], pads = [1], ceil_mode = 1>(x)",
        "MaxPool<kernel_shape = 2, ceil_mode = 1>(x)",
        "Concat(n)",
        'Reshape(x, q) q = Shape<start = "no">(x)',
        "LSTM<hidden_size = 2>(s, s, s)",
    ],
)
def test_nodes_that_say_what_no_operator_means_have_no_sizes_of_their_own(node: str) -> None:
    scales = {"s": np.array([1, 1, np.inf, 1.5], np.float32)}
    model = parse(f"g (float[1,2,6,6] x, float n) => (float[a,b,c,d] y) {{ y = {node} }}", scales, opset=18)
    with pytest.raises(LoadError):
        run(model)
    deduced(model)
    macs(model)


def test_operators_whose_inference_reads_types_that_are_not_known_end_no_process() -> None:
    text = """<ir_version: 8, opset_import: ["" : 20, "ai.onnx.ml" : 4, "any" : 1]>
    g (string[N] x, float[N,3] z) => (bool[N] a, bool[N] b, int64[N] c, float[N,3] d) {
    d = Relu(z) s = Identity(x) a = RegexFullMatch<pattern = "a">(s) t = any.Op(x)
    b = RegexFullMatch<pattern = "b">(t)
    c = ai.onnx.ml.LabelEncoder<keys_strings = ["a"], values_int64s = [1]>(t) }"""
    model = parse(text)
    assert deduced(model) == {"a": ("N",), "b": None, "c": None, "d": ("N", 3), "s": ("N",)}
    assert is_wellformed(model)
    shapes.infer(model)
    wrong = parse(text.replace("Relu(z)", "Relu(z, z)"))
    assert not is_wellformed(wrong)
