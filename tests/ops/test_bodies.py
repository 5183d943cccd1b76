"""Operators that the standard domain lacks, written in those that it has; ONNX Runtime is the judge."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx.defs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxslim import shapes
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array, Constant, Node, Shape, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.ops import REGISTRY, body
from onnxslim.passes.unfuse import Unfuse
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.shapes.cost import macs
from tests.helpers import ONNX_RUNTIME, RECENT, apply, as_fused, ops, parse, reasons, skip_if_opset_is_newer

NEWEST = onnx.defs.onnx_opset_version()
# The oldest in which all that is written is there, and those in which operators came that are written since.
LATE = 23
OPSETS = (11, 17, LATE)
# The first with scales of channels, and a late one.
CODED_OPSETS = (13, 21)
LIMIT = 1e-5
SIZES = {"N": 2, "S": 5}
# Integers of this name are sums of products of codes, which are larger than indices.
BIAS = "b"
# A result of this name is no output.
UNREAD = "u"
# Keys and values for the next token: how many there are is counted.
PRESENT = ("r", "t")
# Results that are no floats, by name.
KINDS = {"m": "int32", "q": "uint8"}

_CONV = "float[N,4,6,6] x | float[4,2,3,3] w"
_GEMM = "float[N,4] x | float[4,3] w"
_ROW = "float[N,3,8] x"
_SKIP = f"{_ROW}, float[N,3,8] z | float[8] g"
# Calls, with what is fed, and behind a bar what is a constant.
CALLS = [
    ("y = FusedConv<group=2>(x, w)", _CONV),
    ('y = FusedConv<group=2, activation="Relu", pads=[1,1,1,1]>(x, w, b)', f"{_CONV}, float[4] b"),
    (
        'y = FusedConv<group=2, strides=[2,2], activation="LeakyRelu", activation_params=[0.3]>(x, w)',
        _CONV,
    ),
    ('y = FusedConv<group=2, activation="Clip", activation_params=[-0.5, 0.7]>(x, w)', _CONV),
    ('y = FusedConv<group=2, activation="HardSigmoid", activation_params=[0.3, 0.4]>(x, w)', _CONV),
    ('y = FusedConv<group=2, activation="Sigmoid">(x, w)', _CONV),
    (
        'y = FusedConv<activation="Tanh", kernel_shape=[3,3], auto_pad="SAME_UPPER">(x, w, b, z)',
        "float[N,2,6,6] x, float[N,4,6,6] z | float[4,2,3,3] w, float[4] b",
    ),
    (
        'y = FusedConv<activation="Relu", dilations=[2,2]>(x, w)',
        "float[N,2,6,6] x | float[4,2,3,3] w",
    ),
    (
        'y = FusedConv<activation="Relu">(x, w, , z)',
        "float[N,2,6,6] x, float[N,4,4,4] z | float[4,2,3,3] w",
    ),
    ('y = FusedGemm<alpha=0.5, activation="Relu">(x, w)', _GEMM),
    ('y = FusedGemm<activation="Relu", beta=0.5>(x, w, b)', f"{_GEMM}, float[3] b"),
    ('y = FusedGemm<transB=1, activation="Sigmoid">(x, w)', "float[N,4] x | float[3,4] w"),
    ('y = FusedGemm<transA=1, activation="Tanh">(x, w)', "float[N,4] x | float[N,3] w"),
    ('y = FusedGemm<activation="LeakyRelu", activation_alpha=0.3>(x, w)', _GEMM),
    ('y = FusedGemm<activation="Elu", activation_alpha=0.3>(x, w)', _GEMM),
    ('y = FusedGemm<activation="HardSigmoid", activation_alpha=0.3, activation_beta=0.4>(x, w)', _GEMM),
    ('y = FusedGemm<activation="Softplus">(x, w)', _GEMM),
    ("y = FusedMatMul(x, w)", f"{_ROW} | float[8,4] w"),
    ("y = FusedMatMul<alpha=0.125, transB=1>(x, z)", f"{_ROW}, float[N,S,8] z"),
    ("y = FusedMatMul<alpha=2.0, transA=1>(x, z)", f"{_ROW}, float[N,3,S] z"),
    ("y = FusedMatMul<transA=1, transB=1>(x, z)", f"{_ROW}, float[N,S,3] z"),
    ("y = TransposeMatMul<alpha=0.5, transB=1>(x, w)", f"{_ROW} | float[4,8] w"),
    ("y = Gelu(x)", _ROW),
    ("y = BiasGelu(x, b)", f"{_ROW} | float[8] b"),
    ("y = FastGelu(x)", _ROW),
    ("y = FastGelu(x, b)", f"{_ROW} | float[8] b"),
    ("y = QuickGelu(x)", _ROW),
    ("y = QuickGelu<alpha=1.0>(x)", _ROW),
    ("y = QuickGelu<alpha=0.7>(x)", _ROW),
    ("y = SkipLayerNormalization(x, z, g)", _SKIP),
    ("y = SkipLayerNormalization<epsilon=0.1>(x, z, g, b)", f"{_SKIP}, float[8] b"),
    ("y, , , s = SkipLayerNormalization<epsilon=0.1>(x, z, g, b, c)", f"{_SKIP}, float[8] b, float[8] c"),
    ("y, , , s = SkipLayerNormalization(x, z, g, , c)", f"{_SKIP}, float[8] c"),
    ("y = SkipLayerNormalization(x, z, g)", f"{_ROW}, float[3,8] z | float[8] g"),
    ("y = SkipSimplifiedLayerNormalization(x, z, g)", _SKIP),
    ("y, , , s = SkipSimplifiedLayerNormalization<epsilon=0.1>(x, z, g, c)", f"{_SKIP}, float[8] c"),
    ("y = .SimplifiedLayerNormalization(x, g)", f"{_ROW} | float[8] g"),
    ("y = .SimplifiedLayerNormalization<axis=2, epsilon=0.1, stash_type=1>(x, g)", f"{_ROW} | float[8] g"),
    ("y = .LayerNormalization(x, g)", f"{_ROW} | float[8] g"),
    ("y = .LayerNormalization<axis=2, epsilon=0.1>(x, g, b)", f"{_ROW} | float[8] g, float[8] b"),
]
_TABLES = "float[7,8] w, float[9,8] p"
_NORM = "float[8] g, float[8] b"
CALLS += [
    ("y, u = EmbedLayerNormalization(x, , w, p, , g, b)", f"int32[N,S] x | {_TABLES}, {_NORM}"),
    (
        "y, u, s = EmbedLayerNormalization<epsilon=0.1>(x, z, w, p, t, g, b)",
        f"int32[N,S] x, int32[N,S] z | {_TABLES}, float[3,8] t, {_NORM}",
    ),
    (
        "y, m = EmbedLayerNormalization<mask_index_type=1>(x, z, w, p, t, g, b, k)",
        f"int32[N,S] x, int32[N,S] z, int32[N,S] k | {_TABLES}, float[3,8] t, {_NORM}",
    ),
    (
        "y, m = EmbedLayerNormalization(x, , w, p, , g, b, k, l)",
        f"int32[N,S] x, int32[N,S] k, int32[N,S] l | {_TABLES}, {_NORM}",
    ),
]
# Attention over 12 channels in 3 heads.
_QKV = "float[N,5,12] x, float[N,S,12] k, float[N,S,6] v"
_PACKED = "float[N,5,12] x | float[12,36] w, float[36] b"
CALLS += [
    ("y = MultiHeadAttention<num_heads=3>(x, k, v)", _QKV),
    ("y = MultiHeadAttention<num_heads=3, scale=0.5>(x, k, v, b)", f"{_QKV} | float[30] b"),
    ("y = MultiHeadAttention<num_heads=3>(x, k, v, , m)", f"{_QKV}, int32[N,S] m"),
    (
        "y = MultiHeadAttention<num_heads=3, mask_filter_value=-5.0>(x, k, v, b, m, a)",
        f"{_QKV}, int32[N,5,S] m, float[1,3,5,S] a | float[30] b",
    ),
    ("y = MultiHeadAttention<num_heads=3, unidirectional=1>(x, k, v)", f"{_QKV}"),
    (
        "y, r, t = MultiHeadAttention<num_heads=3, unidirectional=1>(x, k, v, , , , p, o)",
        "float[N,5,12] x, float[N,S,12] k, float[N,S,12] v, float[N,3,4,4] p, float[N,3,4,4] o",
    ),
    ("y = Attention<num_heads=3>(x, w, b)", _PACKED),
    ("y = Attention<num_heads=3, scale=0.5, unidirectional=1>(x, w, b)", _PACKED),
    (
        "y = Attention<num_heads=3, qkv_hidden_sizes=[12,12,6]>(x, w, b)",
        "float[N,5,12] x | float[12,30] w, float[30] b",
    ),
    ("y = Attention<num_heads=3, mask_filter_value=-5.0>(x, w, b, m)", f"int32[N,5] m, {_PACKED}"),
    ("y = Attention<num_heads=3>(x, w, b, m, , a)", f"int32[N,5,5] m, float[N,3,5,5] a, {_PACKED}"),
    (
        "y, r = Attention<num_heads=3, unidirectional=1>(x, w, b, , p)",
        f"float[2,N,3,4,4] p, {_PACKED}",
    ),
]
# From opset 23 on.
_ROTATED = "int64[N,S] z | float[7,4] c, float[7,4] d"
ROTARY = [
    ("y = RotaryEmbedding(x, z, c, d)", f"float[N,S,24] x, {_ROTATED}"),
    ("y = RotaryEmbedding<interleaved=1, num_heads=3>(x, z, c, d)", f"float[N,S,24] x, {_ROTATED}"),
    ("y = RotaryEmbedding(x, z, c, d)", f"float[N,3,S,8] x, {_ROTATED}"),
]
# Calls of operators that take codes, or make them.
_X, _TWO = "uint8[N,4,6,6] x", "uint8[N,4,6,6] x, uint8[N,4,6,6] z"
_Y = "float s1, uint8 o1, float s, uint8 o"
_YY = f"{_Y}, float s2, uint8 o2"
_W = "int8[4,2,3,3] w, float[4] sw, int8[4] ow"
_V = "int8[8,4] w, float[4] sw, int8[4] ow"
_V1 = "int8[8,4] w, float[1] s2, int8[1] o2"
_CODES = "uint8[N,3,8] x"
_QX, _QW = "uint8[N,5,12] x", "int8[12,36] w, float[36] b"
CODED = [
    ("q = QLinearAdd(x, s1, o1, z, s2, o2, s, o)", f"{_TWO} | {_YY}"),
    ("q = QLinearMul(x, s1, o1, z, s2, o2, s, o)", f"{_TWO} | {_YY}"),
    ("q = QLinearSigmoid(x, s1, o1, s, o)", f"{_X} | {_Y}"),
    ("q = QLinearLeakyRelu<alpha=0.3>(x, s1, o1, s, o)", f"{_X} | {_Y}"),
    ("q = QLinearSoftmax<axis=-1, opset=13>(x, s1, o1, s, o)", f"{_X} | {_Y}"),
    ("q = QLinearGlobalAveragePool(x, s1, o1, s, o)", f"{_X} | {_Y}"),
    (
        "q = QLinearAveragePool<kernel_shape=[2,2], strides=[2,1], pads=[1,0,0,1]>(x, s1, o1, s, o)",
        f"{_X} | {_Y}",
    ),
    ("q = QLinearConcat<axis=1>(s, o, x, s1, o1, z, s2, o2)", f"{_TWO} | {_YY}"),
    ("q = QLinearWhere(c, x, s1, o1, z, s2, o2, s, o)", f"{_TWO}, bool[N,1,6,6] c | {_YY}"),
    (
        "q = .QLinearConv<group=2, pads=[1,1,1,1]>(x, s1, o1, w, sw, ow, s, o, b)",
        f"{_X} | {_Y}, {_W}, int32[4] b",
    ),
    (
        "q = .QLinearConv<group=2>(x, s1, o1, w, s2, o2, s, o)",
        f"{_X} | {_Y}, int8[4,2,3,3] w, float s2, int8 o2",
    ),
    ("q = .QLinearMatMul(x, s1, o1, w, sw, ow, s, o)", f"{_CODES} | {_Y}, {_V}"),
    ("q = .QLinearMatMul(x, s1, o1, w, s2, o2, s, o)", f"{_CODES} | {_Y}, {_V1}"),
    ("q = QGemm<alpha=0.5>(x, s1, o1, w, sw, ow, b, s, o)", f"uint8[N,8] x | {_Y}, {_V}, int32[4] b"),
    ("q = QGemm(x, s1, o1, w, sw, ow, b, s, o)", f"uint8[N,8] x | {_Y}, {_V}, int32[4] b"),
    ("q = QGemm<transB=1>(x, s1, o1, w, sw, ow, , s, o)", f"uint8[N,8] x | {_Y}, {_V.replace('8,4', '4,8')}"),
    ("y = QGemm<transB=1>(x, s1, o1, w, s2, o2)", f"uint8[N,8] x | {_Y}, int8[4,8] w, float s2, int8 o2"),
    ("y = DynamicQuantizeMatMul(x, w, sw)", f"{_ROW} | {_V}"),
    ("y = DynamicQuantizeMatMul(x, w, s2, o2, b)", f"{_ROW} | {_V1}, float[4] b"),
    ("y = MatMulIntegerToFloat(x, w, s1, sw, o1, ow, b)", f"{_CODES} | {_Y}, {_V}, float[4] b"),
    ("y = MatMulIntegerToFloat(x, w, s1, sw)", f"{_CODES} | {_V}, float[1] s1"),
    ("y = MatMulIntegerToFloat(x, w, s1, s2, o1)", f"{_CODES}, float s1 | {_V1}, uint8 o1"),
    ("y = QAttention<num_heads=3>(x, w, b, s1, s2, , o1)", f"{_QX} | {_QW}, float s2, float s1, uint8 o1"),
    (
        "y = QAttention<num_heads=3, unidirectional=1>(x, w, b, s1, sw, m, o1, ow)",
        f"{_QX}, int32[N,5] m | {_QW}, float[36] sw, int8[36] ow, float s1, uint8 o1",
    ),
    (
        "y, r = QAttention<num_heads=3, unidirectional=1>(x, w, b, s1, s2, , o1, , p)",
        f"{_QX}, float[2,N,3,4,4] p | {_QW}, float s2, float s1, uint8 o1",
    ),
    ("q = QuantizeLinear(x, s, o)", f"{_ROW} | float s, uint8 o"),
    ("q = QuantizeLinear<axis=2>(x, s, o)", f"{_ROW} | float[8] s, uint8[8] o"),
    ("y = DequantizeLinear(x, s, o)", f"{_CODES} | float s, uint8 o"),
    ("y = DequantizeLinear<axis=2>(x, s, o)", f"{_CODES} | float[8] s, uint8[8] o"),
]
# Products by matrices of a few bits; K and N of the operator stand beside an axis N.
_BITS = "float[N,3,40] x"
BITS = [
    (
        "y = MatMulNBits<K=40, N=6, bits=4, block_size=16>(x, w, sw)",
        f"{_BITS} | uint8[6,3,8] w, float[18] sw",
    ),
    (
        "y = MatMulNBits<K=40, N=6, bits=4, block_size=16, accuracy_level=1>(x, w, sw, ow, , b)",
        f"{_BITS} | uint8[6,3,8] w, float[18] sw, uint8[12] ow, float[6] b",
    ),
    (
        "y = MatMulNBits<K=40, N=6, bits=8, block_size=16>(x, w, sw, ow)",
        f"{_BITS} | uint8[6,3,16] w, float[18] sw, uint8[18] ow",
    ),
]
# Tables of a few bits.
_IDS = "int64[N,3] i"
TABLES = [
    (
        "y = GatherBlockQuantized<bits=4, block_size=16, quantize_axis=1>(w, i, sw)",
        f"{_IDS} | uint8[6,20] w, float[6,3] sw",
    ),
    (
        "y = GatherBlockQuantized<bits=4, block_size=16, quantize_axis=-1>(w, i, sw, ow)",
        f"{_IDS} | uint8[6,20] w, float[6,3] sw, uint8[6,2] ow",
    ),
    (
        "y = GatherBlockQuantized<bits=8, block_size=32>(w, i, sw, ow)",
        f"{_IDS} | uint8[6,40] w, float[6,2] sw, uint8[6,2] ow",
    ),
    (
        "y = GatherBlockQuantized<bits=8, block_size=32>(w, i, sw)",
        f"{_IDS} | uint8[6,40] w, float[6,2] sw",
    ),
]
# What is in no file that ONNX Runtime has made, or cannot be written: it stays, for a reason.
KEPT = [
    ('y = FusedConv<activation="Relu", group=2, extra=1>(x, w)', _CONV, "its attribute 'extra'"),
    ('y = FusedConv<activation="Mish", group=2>(x, w)', _CONV, "nothing is known of its activation 'Mish'"),
    ("y = QuickGelu<alpha=1>(x)", _ROW, "its attribute 'alpha' is no float"),
    ("y = Gelu(x, z)", f"{_ROW}, float[8] z", "nothing is known of its input 1"),
    ("y, r = Gelu(x)", _ROW, "nothing is known of its output 1"),
    ("y = BiasGelu(x)", _ROW, "it has no input 1"),
    (
        "q = QLinearSoftmax<axis=1, opset=11>(x, s1, o1, s, o)",
        f"{_X} | {_Y}",
        "it is the Softmax of opset 11",
    ),
    ("q = QLinearGlobalAveragePool<channels_last=1>(x, s1, o1, s, o)", f"{_X} | {_Y}", "the last axis"),
    ("y = DequantizeLinear(x, s, o)", "uint16[N,3,8] x | float s, uint16 o", "codes of uint16 take opset 21"),
    (
        "y = MatMulNBits<K=40, N=6, bits=4, block_size=32>(x, w, sw)",
        f"{_BITS} | uint8[6,3,8] w, float[18] sw",
        "144 numbers are not the 192",
    ),
    ("y = FusedMatMul<transBatchA=1>(x, z)", f"{_ROW}, float[3,N,8] z", "moves batch axes"),
]


def _fused(call: str, tensors: str, opset: int, *, constant: bool = True) -> Model:
    """The model of a call: of a domain of ONNX Runtime's, unless there is a dot before its operator."""
    left, right = call.split(" = ")
    right = right[1:] if right.startswith(".") else f"com.microsoft.{right}"
    results = ", ".join(
        f"{KINDS.get(name, 'float')}[] {name}" for name in left.split(", ") if name not in ("", UNREAD)
    )
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    text = f"{head}\ng ({tensors.replace('|', ',')}) => ({results}) {{ {left} = {right} }}"
    kept = {name.split()[-1] for name in tensors.partition("|")[2].split(",") if " " in name.strip()}
    values = _values(parse(text))
    return parse(text, {name: values[name] for name in kept} if constant else None)


def _op(call: str) -> str:
    return call.split("= ")[1].lstrip(".").split("<")[0].split("(")[0]


def _values(model: Model) -> dict[str, Array]:
    """Something for every input; scales are small and positive."""
    made: dict[str, Array] = {}
    random = np.random.default_rng(0)
    for name, dtype, shape, _ in ((i.name, i.dtype, i.shape, i.required) for i in model.inputs()):
        sizes = [dim if isinstance(dim, int) else SIZES[str(dim)] for dim in shape or ()]
        assert dtype is not None
        if dtype.kind == "f":
            values = np.asarray(random.standard_normal(sizes))
            made[name] = np.asarray(np.abs(values) * 0.02 + 0.01 if name[0] == "s" else values, dtype)
        elif dtype.kind == "b":
            made[name] = random.integers(0, 2, sizes).astype(dtype)
        else:
            few = (-3000, 3000) if name == BIAS else (0, 3)
            low, high = few if dtype.itemsize > 1 else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            if name == "w" and dtype == np.int8:  # no two products leave 16 bits: older processors saturate
                low, high = -64, 64
            made[name] = np.asarray(random.integers(low, high, sizes), dtype)
    return made


def _run(model: Model, feeds: dict[str, Array]) -> dict[str, Any]:
    """Its outputs; older versions of ONNX Runtime want one zero point for all channels of a weight."""
    try:
        return Session(model, optimize="none").run(feeds)
    except LoadError as error:
        if "W_zero_point_data" in str(error):
            pytest.skip("this ONNX Runtime takes one zero point for all channels")
        raise


CASES = [
    pytest.param(call, tensors, opset, id=f"{call}-{opset}")
    for calls, opsets in ((CALLS, OPSETS), (CODED, CODED_OPSETS), ((*BITS, *TABLES, *ROTARY), (LATE,)))
    for call, tensors in calls
    for opset in opsets
    if "= .Layer" not in call or opset < 17
]


@pytest.mark.parametrize("constant", [True, False], ids=["constants", "fed"])
@pytest.mark.parametrize(("call", "tensors", "opset"), CASES)
def test_bodies_compute_what_the_operator_does(call: str, tensors: str, opset: int, constant: bool) -> None:
    before = _fused(call, tensors, opset, constant=constant)
    after, changes = apply(Unfuse(), before)
    if ("NBits" in call or "GatherBlock" in call) and not constant:
        assert "its codes are no constants" in next(iter(reasons(changes).values()))
        return
    if "GatherBlock" in call and "ow" in call and ONNX_RUNTIME < RECENT:
        pytest.skip("this ONNX Runtime finds other zero points")
    assert not changes.skipped
    for node in after.nodes():
        assert onnx.defs.get_schema(node.op, opset), node.op
    feeds = _values(before)
    expected, actual = (_run(model, feeds) for model in (before, after))
    for name, value in expected.items():
        # A number halfway between two codes may become either.
        limit = 1 if value.dtype == np.uint8 else LIMIT * np.abs(value).max()
        found, wanted = (
            each if each.dtype.kind == "f" else each.astype(int) for each in (actual[name], value)
        )
        np.testing.assert_allclose(found, wanted, rtol=LIMIT, atol=limit, strict=True)
        assert actual[name].dtype == value.dtype


@pytest.mark.parametrize(("call", "tensors", "opset"), CASES)
def test_types_and_shapes_follow_from_bodies(call: str, tensors: str, opset: int) -> None:
    model = _fused(call, tensors, opset)
    found, facts = _run(model, _values(model)), shapes.deduce(model)
    for tensor in model.graph.outputs:
        fact, value = facts[id(tensor)], found[tensor.name]
        assert fact.dtype == value.dtype
        if tensor.name in PRESENT:
            continue
        assert fact.shape is not None
        sizes = [SIZES.get(str(dim), dim) for dim in fact.shape]
        wrong = sum(mine != size for mine, size in zip(sizes, value.shape, strict=True))
        # How many positions there are is counted, which inference does not follow.
        assert wrong <= ("EmbedLayerNormalization" in call)


@pytest.mark.parametrize(
    ("call", "tensors"),
    [
        ("(x, k, v, p, o, l, n)", "float[N,1,32] x, float[N,1,16] k, float[N,1,16] v"),
        ("(x, , , p, o, l, n)", "float[N,1,64] x"),
    ],
)
def test_types_and_shapes_behind_attention_with_buffers(call: str, tensors: str) -> None:
    past = "float[N,2,5,8] p, float[N,2,5,8] o | int32[2] l, int32[1] n"
    head = "y, r, t = GroupQueryAttention<num_heads=4, kv_num_heads=2>"
    model = _fused(f"{head}{call}", f"{tensors}, {past}", 17)
    model.graph.initializers["l"].values = np.full(2, 5, np.int32)
    model.graph.initializers["n"].values = np.full(1, 6, np.int32)
    found, facts = Session(model).run(_values(model)), shapes.deduce(model)
    for tensor in model.graph.outputs:
        shape, value = facts[id(tensor)].shape, found[tensor.name]
        assert shape is not None
        known = [SIZES.get(str(dim), dim) for dim in shape]
        # How much of a buffer is filled is not known.
        pairs = zip(known, value.shape, strict=True)
        assert all(isinstance(dim, str) or dim == size for dim, size in pairs)
        assert sum(isinstance(dim, str) for dim in known) <= 1
        assert known[0] == SIZES["N"]
    _, changes = apply(Unfuse(), model)
    assert "buffers of which a part is filled" in next(iter(reasons(changes).values()))


@pytest.mark.parametrize(("call", "tensors", "opset"), CASES)
def test_multiply_accumulates_are_those_of_the_body(call: str, tensors: str, opset: int) -> None:
    model = _fused(call, tensors, opset)
    shapes_fed = {name: value.shape for name, value in _values(model).items()}
    written, _ = apply(Unfuse(), model)
    assert macs(model, shapes_fed) == macs(written, shapes_fed)


# ONNX Runtime fuses no sum into a convolution before it has laid that out in its own way, and no sum into
# a normalization without a bias or beside others that read it. Either runs faster than its kernel for both.
APART = (
    ", z)",
    "group=2>(x, w)",
    "MatMul(x, w)",
    "SkipS",
    "(x, z, g)",
    ", s = ",
    "Attention",
    "Embed",
    ".LayerNormalization(x, g)",
)


@pytest.mark.parametrize(
    ("call", "tensors"),
    [(call, tensors) for call, tensors in CALLS if not any(part in call for part in APART)],
)
def test_onnx_runtime_fuses_again_what_was_written_out(call: str, tensors: str, tmp_path: Path) -> None:
    """So that it runs no slower."""
    written, _ = apply(Unfuse(), _fused(call, tensors, 11))
    # What makes an output of the model is not fused.
    result = written.graph.outputs[0]
    behind = Variable("behind", result.dtype)
    written.graph.nodes.append(Node("Neg", "negative", {}, [result], [behind]))
    written.graph.outputs[0] = behind
    fused = ops(as_fused(written, tmp_path))
    assert fused[_op(call).replace("Transpose", "Fused")] == 1, fused
    assert sum(fused.values()) == 2, fused


# It adds this bias by itself, and takes no alpha; attention it leaves apart.
OTHERS = ("o1, ow, b)", "alpha=0.5", "QAttention")


@pytest.mark.parametrize(
    ("call", "tensors"),
    [(call, tensors) for call, tensors in CODED if not any(part in call for part in OTHERS)],
)
def test_onnx_runtime_computes_with_codes_again(call: str, tensors: str, tmp_path: Path) -> None:
    before = _fused(call, tensors, 13)
    written, _ = apply(Unfuse(), before)
    assert ops(as_fused(written, tmp_path)) == ops(before)


@pytest.mark.parametrize(("call", "tensors", "reason"), KEPT)
def test_what_is_not_understood_stays_and_is_named(call: str, tensors: str, reason: str) -> None:
    before = _fused(call, tensors, LATE if "NBits" in call else 17)
    after, changes = apply(Unfuse(), before)
    assert ops(after) == ops(before)
    ((_, told),) = reasons(changes).items()
    assert reason in told


@pytest.mark.parametrize(("direction", "count"), [("forward", 1), ("bidirectional", 2)])
def test_types_and_shapes_behind_recurrent_layers_of_codes(direction: str, count: int) -> None:
    attrs = f'hidden_size=3, direction="{direction}"'
    call = f"y, r, t = DynamicQuantizeLSTM<{attrs}>(x, w, k, b, , , , , sw, ow, sk, ow)"
    codes = f"int8[{count},4,12] w, int8[{count},3,12] k, int8[{count}] ow"
    scales = f"float[{count}] sw, float[{count}] sk, float[{count},24] b"
    model = _fused(call, f"float[5,N,4] x | {codes}, {scales}", 17)
    feeds = _values(model)
    found, facts = Session(model).run(feeds), shapes.deduce(model)
    for tensor in model.graph.outputs:
        shape = facts[id(tensor)].shape
        assert shape is not None
        assert tuple(SIZES.get(str(dim), dim) for dim in shape) == found[tensor.name].shape
    assert macs(model, {"x": feeds["x"].shape}) == 5 * SIZES["N"] * count * 12 * (4 + 3)
    _, changes = apply(Unfuse(), model)
    assert "turned into integers at every step" in next(iter(reasons(changes).values()))


@pytest.mark.skipif(NEWEST < 28, reason="this onnx is older than SwiGLU")
@pytest.mark.parametrize("alpha", ["", "<alpha=0.5>"])
def test_what_onnx_runtime_lacks_is_written_out_though_it_is_standard(alpha: str) -> None:
    skip_if_opset_is_newer(28)
    tensors = "float[N,3,8] x, float[N,3,8] z"
    before = parse(f"g ({tensors}) => (float[] y) {{ y = SwiGLU{alpha}(x, z) }}", opset=28, ir_version=13)
    feeds = _values(before)
    with pytest.raises(LoadError, match="Could not find an implementation"):
        Session(before)
    after, _ = apply(Unfuse(which="free"), before)
    expected, found = Session(before, Target.reference()).run(feeds)["y"], Session(after).run(feeds)["y"]
    np.testing.assert_allclose(found, expected, rtol=LIMIT, atol=LIMIT)


# Bodies that have tests of their own, those of the standard in the tests of Legalize.
OTHERWISE = {"GroupQueryAttention", "SwiGLU", "Swish", "RMSNormalization", "CastLike", "DynamicQuantizeLSTM"}


def test_every_body_is_run() -> None:
    assert {_op(call) for call, _ in (*CALLS, *CODED, *BITS, *TABLES, *ROTARY)} | OTHERWISE == {
        op for (_, op), spec in REGISTRY.items() if spec.body is not None
    }


NAMES = sorted(
    {
        name
        for call, _ in (*CALLS, *CODED, *BITS, *TABLES, *ROTARY)
        for name in re.findall(r"(\w+)=", call.partition("<")[2])
    }
)
ODD = st.one_of(
    st.sampled_from([-1, 0, 3, 0.5, math.nan, "", "Relu", "Clip", (), (0, 1), (2, 2, 2, 2), (0.5,)]),
    st.just(helper.make_attribute("odd", numpy_helper.from_array(np.zeros(2)))),
)
READ = st.sampled_from(
    [
        Variable(""),
        Variable("free", np.dtype(np.float32)),
        Variable("ranked", np.dtype(np.uint8), ("N", None)),
        Constant("scalar", np.float32(2.0).reshape(())),
        Constant("codes", np.ones((4, 3, 8), np.uint8)),
        Constant("matrix", np.ones((4, 8), np.float32)),
        Constant("empty", np.ones((0, 2), np.float32)),
        Constant("words", np.array(["a"], object)),
    ]
)


@pytest.mark.parametrize("key", [key for key, spec in REGISTRY.items() if spec.body is not None], ids=str)
@given(reads=st.lists(READ, max_size=9), attrs=st.dictionaries(st.sampled_from(NAMES), ODD, max_size=4))
@settings(max_examples=60, deadline=None)
def test_odd_nodes_have_a_body_or_none_but_do_no_harm(
    key: tuple[str, str], reads: list[Variable | Constant], attrs: dict[str, Any]
) -> None:
    spec = REGISTRY[key]
    assert spec.body is not None
    node = Node(spec.op, "odd", attrs, reads, [Variable("y"), Variable("z")], spec.domain)
    body.function(node, spec.body, "test", "odd")
    for opset in OPSETS:
        found = body.Body(node, opset, Stated(), lambda name: name)
        with suppress(body.UnwrittenError):
            found.close(spec.body(found))


class Stated:
    """Facts of tensors that carry them."""

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        return tensor.dtype

    def shape(self, tensor: Tensor) -> Shape:
        return tensor.shape
