"""Each forward function: what ONNX Runtime computes, and gradients as finite differences have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.learn import rows
from onnxslim.learn.door import FLOATS, to_numpy, to_torch
from onnxslim.learn.forward import load as load_rows
from onnxslim.learn.net import Net
from onnxslim.learn.weights import weights
from onnxslim.ops import REGISTRY
from tests.helpers import feeds_for, judge_of, parse

torch: Any = pytest.importorskip(
    "torch", reason="PyTorch is not installed: pip install 'onnx-slimkit[train]'"
)
pytestmark = pytest.mark.train

load_rows()
# Operators whose row in onnxslim/ops has no example, or one that takes any numbers for positions.
EXAMPLES = {
    "DynamicQuantizeLinear": """g (float[2,3] x) => (uint8[2,3] y, float s, uint8 z) {
        y, s, z = DynamicQuantizeLinear(x) }""",
    "EyeLike": "g (float[2,3] x) => (float[2,3] y) { y = EyeLike<k=1>(x) }",
    "Det": "g (float[2,3,3] x) => (float[2] y) { y = Det(x) }",
    "MaxUnpool": """g (float[1,1,2,2] x) => (float[1,1,4,4] y) {
        i = Constant<value = int64[1,1,2,2] {5, 7, 13, 15}>()
        y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(x, i) }""",
    "If": """g (float[2,3] x) => (float[2,3] y) {
        k = Constant<value_floats=[0.0]>() s = ReduceSum<keepdims=0>(x) c = Greater(s, k) d = Squeeze(c)
        y = If (d) <then_branch = t () => (float[2,3] a) { a = Sin(x) },
                    else_branch = e () => (float[2,3] b) { b = Mul(x, x) }> }""",
    "Loop": """g (float[2,3] x) => (float[2,3] y, float[N,2,3] z) {
        n = Constant<value_int=3>()
        y, z = Loop (n, , x) <body = b (int64 i, bool c, float[2,3] s) => (bool d, float[2,3] t, float[2,3] u)
        {
            d = Identity(c) t = Mul(s, x) u = Sin(t) }> }""",
    "Scan": """g (float[3] x, float[2,3] z) => (float[3] y, float[2,3] w) {
        y, w = Scan<num_scan_inputs=1, body = b (float[3] s, float[3] r) => (float[3] t, float[3] u) {
            t = Mul(s, r) u = Sin(t) }>(x, z) }""",
}  # fmt: skip
SCATTER = """<ir_version: 8, opset_import: ["" : 10]> g (float[3,2] x, float[1,2] u) => (float[3,2] y) {
    i = Constant<value = int64[1,2] {1, 2}>() y = Scatter(x, i, u) }"""
# Operators through which nothing is learnt.
FLAT = {
    *(
        "And",
        "Or",
        "Xor",
        "Not",
        "Equal",
        "Less",
        "Greater",
        "LessOrEqual",
        "GreaterOrEqual",
        "IsNaN",
        "IsInf",
    ),
    *("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"),
    *("ArgMax", "ArgMin", "NonZero", "Size", "EyeLike", "Range"),
    *(
        "Ceil",
        "Floor",
        "Round",
        "Sign",
        "Hardmax",
        "QuantizeLinear",
        "DequantizeLinear",
        "MatMulInteger",
        "ConvInteger",
    ),
}


def _positive(x: Array) -> Array:
    return np.abs(x) + 0.5


def _beyond_one(x: Array) -> Array:
    return np.abs(x) + 1.5


def _anywhere(x: Array) -> Array:
    return x


def _within_one(x: Array) -> Array:
    return 0.9 * np.tanh(x)


# Where functions of numbers have slopes.
DOMAINS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("Log", "Sqrt", "Pow", "Reciprocal", "ReduceLogSum", "BatchNormalization"), _positive),
    **dict.fromkeys(("Asin", "Acos", "Atanh"), _within_one),
    "Acosh": _beyond_one,
}


def example(op: str) -> Model:
    """A model with this operator in it."""
    if op == "Scatter":
        return parse(SCATTER)
    return parse(EXAMPLES.get(op) or REGISTRY["", op].example)


def inputs(op: str, model: Model) -> dict[str, Array]:
    shaped = DOMAINS.get(op, _anywhere)
    feeds = feeds_for(model, seed=3)
    return {name: np.asarray(shaped(x), x.dtype) if x.dtype in FLOATS else x for name, x in feeds.items()}


@pytest.mark.parametrize("op", sorted(rows.ROWS))
def test_examples_compute_what_onnx_runtime_does(op: str) -> None:
    model = example(op)
    feeds = inputs(op, model)
    expected = judge_of(model).run(feeds)
    found = Net(model)({name: to_torch(array) for name, array in feeds.items()})
    for name, array in expected.items():
        actual = to_numpy(found[name])
        assert (actual.shape, actual.dtype) == (array.shape, array.dtype)
        np.testing.assert_allclose(actual, array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", sorted(rows.ROWS))
def test_gradients_are_those_of_finite_differences(op: str) -> None:
    model = example(op)
    net = Net(model, weights(model), torch.float64)
    feeds = {name: to_torch(array) for name, array in inputs(op, model).items()}
    names = [name for name, value in feeds.items() if value.is_floating_point()]
    tensors = [*(feeds[name].double().requires_grad_() for name in names), *net.parameters]

    def outputs(*given: Any) -> tuple[Any, ...]:
        found = net({**feeds, **dict(zip(names, given, strict=False))})
        return tuple(each for each in found.values() if each.requires_grad)

    made = outputs(*tensors)
    if op in FLAT:
        assert not made or not any(map(_any, torch.autograd.grad([each.sum() for each in made], tensors)))
        assert [node.op for node in net.blocked] == ([op] if tensors else [])
    else:
        assert made
        assert torch.autograd.gradcheck(outputs, tuple(tensors), eps=1e-6, atol=1e-6, rtol=1e-4)


def _any(gradient: Any) -> bool:
    return bool(gradient.any())
