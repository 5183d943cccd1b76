"""Matrix products whose data becomes integers as it comes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from onnxslim.errors import UsageError
from onnxslim.ir.graph import Constant
from onnxslim.passes.quantize import QuantizeFigures
from onnxslim.passes.quantize.weights import MAX_PAIR
from onnxslim.runtime.profile import optimized_model
from tests.helpers import filled, normal, ops, parse, quantize, sqnr_of

_dynamic = partial(quantize, activations="dynamic")


# Three products of one input, as in attention; a bias that is added; one that is last.
BLOCK = """g (float[B,S,32] x) => (float[B,S,8] y)
<float[32,48] wq = {0}, float[32,48] wk = {0}, float[32,48] wv = {0}, float[48] b = {0},
 float[48,64] w1 = {0}, float[64,8] w2 = {0}, float h = {0.02}>
{ [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv) vb = Add(v, b)
  kt = Transpose<perm=[0,2,1]>(k) [attend] a = MatMul(q, kt) ah = Mul(a, h) s = Softmax(ah)
  [mix] m = MatMul(s, vb)
  [up] u = MatMul(m, w1) r = Relu(u) [down] y = MatMul(r, w2) }"""


def test_products_by_constants_run_in_integers_without_data() -> None:
    model = filled(parse(BLOCK))
    result, changes = _dynamic(model)
    assert {change.node for change in changes.changed} == {"q", "k", "v", "up"}
    assert QuantizeFigures.of(changes).fused == {"MatMul": 4}
    assert QuantizeFigures.of(changes).total == {"MatMul": 7}
    assert not QuantizeFigures.of(changes).unfused
    assert ops(result)["DynamicQuantizeLinear"] == 2, "what several products read is quantized once"
    ran = [node.op_type for node in optimized_model(result).graph.node]
    assert ran.count("MatMulIntegerToFloat") == 3
    assert ran.count("DynamicQuantizeMatMul") == 1
    for shape in ((1, 1), (2, 7), (3, 40)):
        feeds = {"x": normal(*shape, 32, seed=9)}
        assert sqnr_of(model, result, feeds) > 28
        assert sqnr_of(model, result, feeds, "none") > 28
    assert not any(name.startswith("w") and name[-1] in "qkv1" for name in result.graph.initializers)


def test_layers_in_bodies_are_told_of() -> None:
    text = """g (float[N,64] x, bool[1] c) => (float[N,64] y) { y = If (c) <
    then_branch = t () => (float[N,64] p) { p = MatMul(x, w) },
    else_branch = e () => (float[N,64] q) { q = Relu(x) }> }"""
    _, changes = quantize(parse(text, {"w": normal(64, 64)}), activations="dynamic")
    assert not changes
    assert changes.skipped[-1].reason.endswith("; 1 layers in bodies or functions are left")


@pytest.mark.parametrize(
    "text",
    [
        "float[32,48] w = {0}, float[48] b = {0}> { [n] h = Gemm(x, w, b)",
        "float[48,32] w = {0}, float[48] b = {0}> { [n] h = Gemm<transB=1>(x, w, b)",
        "float[48,32] w = {0}> { [n] h = Gemm<transB=1, alpha=0.25>(x, w)",
        "float[48,32] w = {0}, float[1,48] b = {0}> { [n] h = Gemm<transB=1, alpha=-2.0>(x, w, b)",
        "float[48,32] w = {0}, float[1] b = {0}> { [n] h = Gemm<transB=1>(x, w, b)",
    ],
)
def test_gemms_of_every_kind(text: str) -> None:
    model = filled(parse(f"g (float[N,32] x) => (float[N,48] y) <{text} y = Exp(h) }}"))
    result, changes = _dynamic(model, classifier=True)
    assert QuantizeFigures.of(changes).fused == {"MatMul": 1}
    feeds = {"x": 0.1 * normal(16, 32, seed=9)}
    assert sqnr_of(model, result, feeds) > 35


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("float[32,48] w = {0}> { xt = Transpose(x) h = Gemm<transA=1>(xt, w)", "its data is transposed"),
        ("float[32,48] w = {0}, float[48] b = {0}> { h = Gemm<beta=2.0>(x, w, b)", "its beta is not 1"),
        ("float[2,32,48] w = {0}> { h = MatMul(x, w)", "its weight is no matrix"),
    ],
)
def test_what_cannot_be_written_that_way_stores_its_weight(text: str, reason: str) -> None:
    shape = "2,N,48" if "[2,32" in text else "N,48"
    model = filled(
        parse(f"g (float[N,32] x) => (float[{shape}] y) <{text} y = Exp(h) }}".replace("[N,32]", "[40,32]"))
    )
    result, changes = _dynamic(model)
    assert "DynamicQuantizeLinear" not in ops(result)
    assert reason in [skip.reason for skip in changes.skipped]
    assert sqnr_of(model, result, {"x": 0.1 * normal(40, 32, seed=9)}) > 30


def test_no_pair_of_codes_can_saturate() -> None:
    """Weights of one sign at their largest: the sum of two neighbouring products would not fit in 16 bits."""
    model = filled(parse(BLOCK))
    model.graph.initializers["w1"].values = np.abs(model.graph.initializers["w1"].values) ** 0.1
    _, changes = _dynamic(model, exclude=("q",))
    assert (QuantizeFigures.of(changes).tightened or {})["up"] == 64
    result, _ = _dynamic(model)
    product = next(node for node in result.graph.nodes if node.name == "up")
    codes = product.inputs[1]
    assert isinstance(codes, Constant)
    pairs = codes.values[:-1].astype(int) + codes.values[1:]
    assert np.abs(pairs).max() <= MAX_PAIR


def test_with_data_the_worst_products_keep_their_data_in_float() -> None:
    """One input channel a thousand times the others that hardly matters: one range is too coarse."""
    model = filled(
        parse("""g (float[N,256] x) => (float[N,32] y)
        <float[256,64] w1 = {0}, float[64,64] w2 = {0}, float[64,32] w3 = {0}>
        { [a] a = MatMul(x, w1) ar = Relu(a) [b] b = MatMul(ar, w2) br = Relu(b) [c] y = MatMul(br, w3) }""")
    )
    values = model.graph.initializers["w1"].values.copy()
    values[0] *= 1e-4
    model.graph.initializers["w1"].values = values
    scale = np.ones(256, np.float32)
    scale[0] = 1000
    data = [{"x": normal(8, 256, seed=seed) * scale} for seed in range(8)]
    plain, _ = _dynamic(model, data, require_sqnr=0)
    kept, changes = _dynamic(model, data, require_sqnr=15)
    assert sqnr_of(model, plain, data[0]) < 5
    assert sqnr_of(model, kept, data[0]) > 14
    assert {row.node: row.kept for row in QuantizeFigures.of(changes).layers or ()} == {
        "a": True,
        "b": False,
        "c": False,
    }
    assert QuantizeFigures.of(changes).fused == {"MatMul": 1}


def test_what_several_products_read_is_stored_once() -> None:
    model = filled(
        parse("""g (float[N,48] x) => (float[N,48] y) <float[48,48] w = {0}, float h = {0.1}>
        { [a] a = MatMul(x, w) r = Relu(a) s = Mul(r, h) [b] b = MatMul(s, w) y = Neg(b) }""")
    )
    result, changes = _dynamic(model, classifier=True)
    assert QuantizeFigures.of(changes).fused == {"MatMul": 2}
    products = [node for node in result.graph.nodes if node.op == "MatMulInteger"]
    assert products[0].inputs[1] is products[1].inputs[1]
    assert "w" not in result.graph.initializers
    assert sqnr_of(model, result, {"x": normal(9, 48)}) > 28


def test_reasons_tell_what_stands_in_the_way() -> None:
    model = filled(
        parse("""g (float[N,32] x, float[32,48] v) => (float[N,48] y)
        <float[32,32] c = {0}, float[32,8] small = {0}, float[8,32] back = {0}>
        { [given] a = MatMul(x, v) [one] b = MatMul(x, small) [two] d = MatMul(b, back)
          [big] e = MatMul(d, c) f = Relu(e) [last] g = MatMul(f, v) h = Add(a, g) y = Neg(h) }""")
    )
    _, changes = _dynamic(model, classifier=True)
    reasons = {skip.node: skip.reason for skip in changes.skipped}
    assert reasons["given"] == reasons["last"] == "its weight is computed, not stored"
    assert reasons["one"] == reasons["two"] == "its weight takes less than 4096 bytes"
    assert {change.node for change in changes.changed} == {"big"}


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_models_in_other_precision_are_told_what_to_do(kind: str) -> None:
    model = parse(f"g ({kind}[N,64] x) => ({kind}[N,64] y) <{kind}[64,64] w = {{0}}> {{ y = MatMul(x, w) }}")
    dtype = np.float16 if kind == "float16" else np.float64
    model.graph.initializers["w"].values = np.ones((64, 64), dtype)
    _, changes = _dynamic(model, classifier=True)
    assert not changes
    assert any("--dtype fp32" in skip.reason for skip in changes.skipped)


def test_four_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="activations=none"):
        _dynamic(filled(parse(BLOCK)), weights="int4")


def test_where_only_weights_are_stored_the_worst_layers_get_more_bits() -> None:
    model = filled(parse(BLOCK))
    data = [{"x": normal(2, 8, 32, seed=seed)} for seed in range(8)]
    limits = {"int4": 18.0, "int8": 40.0}
    for bits, limit in limits.items():
        options: dict[str, Any] = {"activations": "none", "weights": bits, "storage": "qdq"}
        kept, changes = _dynamic(model, data, **options, require_sqnr=limit)
        found = ops(kept)["DequantizeLinear"]
        figures = QuantizeFigures.of(changes)
        rows = {row.node for row in figures.layers or () if row.kept}
        assert len(rows) > 0
        assert found == (4 if bits == "int4" else 4 - len(rows))
        assert figures.everything is not None
        assert figures.sqnr is not None
        assert figures.everything < limit <= figures.sqnr
