"""ONNX Runtime's own operators, as it leaves them in files it has optimized; each row says what one is."""

from __future__ import annotations

import math

import numpy as np

from onnxslim.ir.graph import Node, Tensor
from onnxslim.ops import blocks, heads, integers
from onnxslim.ops.body import Body, WriteBody
from onnxslim.ops.channels import attention
from onnxslim.ops.channels import blocks as block_channels
from onnxslim.ops.formulas import Results, gelu, normalized, root_normalized, swish, tanh_gelu
from onnxslim.ops.linear import conv_macs, gemm_macs, recurrent_macs
from onnxslim.ops.spec import Channels, Macs, OpSpec, register, sizes

DOMAIN = "com.microsoft"
_HEAD = f'<ir_version: 8, opset_import: ["" : 17, "{DOMAIN}" : 1]>\ng '
_ANGLES = ", ".join(f"0.{digit}" for digit in range(12))

# ---------------------------------------------------------------------------------------- activations

# Activations that are fused into what is before them, with the attributes their parameters stand for.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "Softplus": (),
    "Softsign": (),
    "LeakyRelu": ("alpha",),
    "Elu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"),
}
_CLIP = "Clip"


def _activated(b: Body, x: Tensor, op: str, given: dict[str, float], like: Tensor) -> Tensor:
    """An activation with the parameters that are given, the others being those of the operator itself."""
    if not op:
        return x
    if op == _CLIP and b.opset >= 11:
        bounds = [b.number(given[key], like) if key in given else None for key in ("min", "max")]
        return b.add(op, x, *bounds)
    b.require(op in _ACTIVATIONS or op == _CLIP, f"nothing is known of its activation '{op}'")
    return b.add(op, x, **given)


def _conv(b: Body) -> Results:
    """Conv(x, w, bias), plus z where it is there, and then the activation."""
    x, weight, bias, added = b.input(0), b.input(1), b.optional(2), b.optional(3)
    conv = b.passed("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    op, given = b.attr("activation", ""), b.numbers("activation_params")
    names = ("min", "max") if op == _CLIP else _ACTIVATIONS.get(op, ())
    b.require(len(given) in (0, len(names)), f"its {len(given)} activation_params are not those of {op}")
    made: Tensor = b.add("Conv", x, weight, bias, **conv)
    made = made if added is None else b.add("Add", made, added)
    return [_activated(b, made, op, dict(zip(names, given, strict=False)), x)]


def _gemm(b: Body) -> Results:
    a, weight, bias = b.input(0), b.input(1), b.optional(2)
    gemm = b.passed("alpha", "beta", "transA", "transB")
    op, prefix = b.attr("activation", ""), "activation_"
    given = b.passed(*(f"{prefix}{name}" for name in _ACTIVATIONS.get(op, ())))
    if bias is None and b.opset < 11:
        bias = b.number(0.0, a, weight)
    made = b.add("Gemm", a, weight, bias, **gemm)
    return [_activated(b, made, op, {key.removeprefix(prefix): value for key, value in given.items()}, a)]


def _matmul(b: Body) -> Results:
    """alpha · a b, either of them with its last two axes swapped first."""
    a, c = b.input(0), b.input(1)
    for name in ("transBatchA", "transBatchB"):
        b.require(not b.attr(name, 0), f"its attribute '{name}' moves batch axes")
    alpha = b.attr("alpha", 1.0)
    first = b.transposed(a) if b.attr("transA", 0) else a
    second = b.transposed(c) if b.attr("transB", 0) else c
    made = b.add("MatMul", first, second)
    return [made if alpha == 1.0 else b.add("Mul", made, b.number(alpha, a, c))]


def _matmul_macs(node: Node) -> int | None:
    output, left = sizes(node.outputs[0].shape), sizes(node.inputs[0].shape)
    if output is None or left is None:
        return None
    return math.prod(output) * left[-2 if node.attrs.get("transA", 0) and len(left) > 1 else -1]


def _fast_gelu(b: Body) -> Results:
    """The approximate Gelu, with the bias added to x first."""
    like, bias = b.input(0), b.optional(1)
    return [tanh_gelu(b, like if bias is None else b.add("Add", like, bias), like)]


# -------------------------------------------------------------------------------- sums and normalizations


def _skip(b: Body, bias: int) -> tuple[Tensor, Tensor, float]:
    """What a layer is added up to, the scale and the epsilon of what normalizes it."""
    x, skip, scale, added = b.input(0), b.input(1), b.input(2), b.optional(bias)
    total = b.add("Add", x, skip)
    return (total if added is None else b.add("Add", total, added)), scale, b.attr("epsilon", 1e-12)


def _skip_norm(b: Body) -> Results:
    """LayerNormalization of x + skip + bias, and that sum."""
    total, scale, epsilon = _skip(b, 4)
    made = normalized(b, total, scale, b.optional(3), epsilon, b.input(0))
    return [made, None, None, total]


def _skip_simplified_norm(b: Body) -> Results:
    total, scale, epsilon = _skip(b, 3)
    return [root_normalized(b, total, scale, epsilon, b.input(0)), None, None, total]


def _embedded(b: Body) -> Results:
    """LayerNormalization of the sum of a word's embedding, its position's and its segment's."""
    words, segments, mask, positions = b.input(0), b.optional(1), b.optional(7), b.optional(8)
    word, position, segment = b.input(2), b.input(3), b.optional(4)
    b.passed("mask_index_type")  # what it says is known from whether there is a mask
    found: Tensor = b.add("Gather", word, words)
    if positions is None:
        length = b.add("Slice", b.add("Shape", words), b.integers(1), b.integers(2))
        place = b.add("Slice", position, b.integers(0), length, b.integers(0))
    else:
        place = b.add("Gather", position, positions)
    found = b.add("Add", found, place)
    if segments is not None and segment is not None:
        found = b.add("Add", found, b.add("Gather", segment, segments))
    made = normalized(b, found, b.input(5), b.input(6), b.attr("epsilon", 1e-12), word)
    return [made, None if mask is None else _ones(b, mask), found]


def _ones(b: Body, mask: Tensor) -> Tensor:
    """How many elements of each row are one, int32."""
    kind = np.dtype(np.int32)
    found = b.cast(b.add("Equal", mask, b.constant(np.array(1, kind))), kind)
    if b.opset < 13:
        return b.add("ReduceSum", found, axes=(1,), keepdims=0)
    return b.add("ReduceSum", found, b.integers(1), keepdims=0)


# -------------------------------------------------------------------------------------------- the rows

_BODIES: dict[str, WriteBody] = {
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "TransposeMatMul": _matmul,
    "Gelu": lambda b: [gelu(b, b.input(0), b.input(0))],
    "BiasGelu": lambda b: [gelu(b, b.add("Add", b.input(0), b.input(1)), b.input(0))],
    "FastGelu": _fast_gelu,
    "QuickGelu": lambda b: [swish(b, b.attr("alpha", 1.702))],
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_norm,
    "EmbedLayerNormalization": _embedded,
}

_MACS: dict[str, Macs] = {
    "FusedConv": conv_macs,
    "FusedGemm": gemm_macs,
    "FusedMatMul": _matmul_macs,
    "TransposeMatMul": _matmul_macs,
    "QGemm": gemm_macs,
    "DynamicQuantizeMatMul": _matmul_macs,
    "MatMulIntegerToFloat": _matmul_macs,
    "QAttention": lambda node: heads.packed_macs(node, before=8),
}

register(
    *(OpSpec(op, DOMAIN, body=body, macs=_MACS.get(op)) for op, body in _BODIES.items()),
    *(
        OpSpec(op, DOMAIN, body=body, macs=_MACS.get(op), qoperator=True, written="layers")
        for op, body in integers.BODIES.items()
    ),
    OpSpec("DynamicQuantizeLSTM", DOMAIN, body=integers.lstm, macs=recurrent_macs, written="all"),
    OpSpec("Attention", DOMAIN, body=heads.packed, macs=heads.packed_macs, written="layers"),
    OpSpec("MultiHeadAttention", DOMAIN, body=heads.multi_head, macs=heads.multi_head_macs, written="units"),
    OpSpec(
        "GroupQueryAttention",
        DOMAIN,
        body=heads.grouped,
        written="all",
        macs=heads.grouped_macs,
        channels=Channels(attention.grouped_query_attention, attention.cut_grouped_query_attention),
        example=f"""{_HEAD}(float[1,3,32] q, float[1,3,16] k, float[1,3,16] v) => (float[1,3,32] y)
{{ l = Constant<value = int32[1] {{2}}>() n = Constant<value = int32 {{3}}>()
  y, p, r = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, , , l, n) }}""",
    ),
    OpSpec(
        "RotaryEmbedding",
        DOMAIN,
        body=heads.rotary,
        written="units",
        channels=Channels(attention.indexed_rotary_embedding, attention.cut_rotary_embedding),
        example=f"""{_HEAD}(float[N,3,32] x) => (float[N,3,32] y)
<float[3,4] c = {{{_ANGLES}}}, float[3,4] s = {{{_ANGLES}}}>
{{ p = Constant<value = int64[1] {{0}}>() y = com.microsoft.RotaryEmbedding(x, p, c, s) }}""",
    ),
    OpSpec(
        "MatMulNBits",
        DOMAIN,
        body=blocks.product,
        body_opset=blocks.OPSET,
        macs=blocks.product_macs,
        qoperator=True,
        written="all",
        channels=Channels(
            block_channels.block_product, block_channels.cut_block_product, block_channels.ready_block_product
        ),
        example=f"""{_HEAD}(float[N,3,64] x) => (float[N,3,2] y)
<uint8[2,4,8] w = {{{", ".join(map(str, range(100, 164)))}}}, float[2,4] s = {{{", ".join(["0.5"] * 8)}}}>
{{ y = com.microsoft.MatMulNBits<K=64, N=2, bits=4, block_size=16>(x, w, s) }}""",
    ),
    # Written out, ONNX Runtime turns all of the table back to look up a few rows of it.
    OpSpec(
        "GatherBlockQuantized",
        DOMAIN,
        body=blocks.table,
        body_opset=blocks.OPSET,
        written="all",
        channels=Channels(block_channels.block_table),
        example=f"""{_HEAD}(int64[N,3] i) => (float[N,3,64] y)
<uint8[2,32] w = {{{", ".join(map(str, range(100, 164)))}}}, float[2,4] s = {{{", ".join(["0.5"] * 8)}}}>
{{ y = com.microsoft.GatherBlockQuantized<bits=4, block_size=16>(w, i, s) }}""",
    ),
)
