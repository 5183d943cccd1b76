"""Operators that multiply by weights: convolutions, matrix products, recurrent layers."""

from __future__ import annotations

import math

from onnxslim.ir.graph import Node
from onnxslim.ops import integers
from onnxslim.ops.channels import layers, recurrent, scales
from onnxslim.ops.layers import Convolution, Product, TransposedConvolution
from onnxslim.ops.spec import Channels, OpSpec, Role, Trait, register, sizes


def conv_macs(node: Node, weight: int = 1) -> int | None:
    """Output elements times weights per output channel; `weight` is the position of that input."""
    output, kernel = sizes(node.outputs[0].shape), sizes(node.inputs[weight].shape)
    return None if output is None or kernel is None else math.prod(output) * math.prod(kernel[1:])


def _conv_transpose_macs(node: Node) -> int | None:
    """Input elements times weights per input channel."""
    data, weight = sizes(node.inputs[0].shape), sizes(node.inputs[1].shape)
    return None if data is None or weight is None else math.prod(data) * math.prod(weight[1:])


def _matmul_macs(node: Node) -> int | None:
    output, left = sizes(node.outputs[0].shape), sizes(node.inputs[0].shape)
    return None if output is None or left is None else math.prod(output) * left[-1]


def gemm_macs(node: Node) -> int | None:
    output, left = sizes(node.outputs[0].shape), sizes(node.inputs[0].shape)
    if output is None or left is None:
        return None
    return math.prod(output) * left[0 if node.attrs.get("transA", 0) else 1]


def _matmul_unfit(node: Node) -> str | None:
    shape = node.inputs[1].shape
    return None if shape is not None and len(shape) == 2 else "its weight is not a matrix"


def _gemm_unfit(node: Node) -> str | None:
    """Integer kernels add a bias of one value per column, as it is."""
    bias = node.input(2)
    if bias is None:
        return None
    if node.attrs.get("beta", 1.0) != 1.0 or node.attrs.get("alpha", 1.0) != 1.0:
        return "its alpha or beta is not 1"
    shape = bias.shape
    if not shape or any(dim != 1 for dim in shape[:-1]) or shape[-1] != Product(node).outputs:
        return "its bias is not one value per column"
    return None


def recurrent_macs(node: Node) -> int | None:
    """Steps times batch times the weights that each step reads."""
    data = sizes(node.inputs[0].shape)
    weights = [sizes(node.inputs[index].shape) for index in (1, 2)]
    if data is None or any(shape is None for shape in weights):
        return None
    return data[0] * data[1] * sum(math.prod(shape) for shape in weights if shape is not None)


_RECURRENT = Channels(recurrent.recurrent, recurrent.cut_recurrent)

register(
    OpSpec(
        "Conv",
        channels=Channels(layers.convolution, layers.cut_convolution),
        role=Role.LINEAR,
        layer=Convolution,
        scales=scales.layer,
        data=(0,),
        requantized=True,
        macs=conv_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2,5,5] x, float[3,2,3,3] w, float[3] b) => (float[N,3,3,3] y) { y = Conv(x, w, b) }""",
    ),
    OpSpec(
        "ConvTranspose",
        channels=Channels(layers.transposed_convolution, layers.cut_convolution),
        role=Role.LINEAR,
        layer=TransposedConvolution,
        scales=scales.layer,
        data=(0,),
        requantized=True,
        macs=_conv_transpose_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2,3,3] x, float[2,3,2,2] w, float[3] b) => (float[N,3,6,6] y)
{ y = ConvTranspose<strides=[2,2]>(x, w, b) }""",
    ),
    # Its columns depend on offsets, which no view of a layer reads: its weight is pruned, but not fitted.
    OpSpec(
        "DeformConv",
        channels=Channels(layers.deformable_convolution, layers.cut_convolution),
        data=(0,),
        macs=conv_macs,
        example="""<ir_version: 9, opset_import: ["" : 19]>
g (float[N,2,5,5] x, float[3,2,3,3] w, float[N,18,3,3] o, float[3] b) => (float[N,3,3,3] y)
{ y = DeformConv(x, w, o, b) }""",
    ),
    OpSpec(
        "CausalConvWithState",
        channels=Channels(layers.causal_convolution),
        data=(0,),
        macs=conv_macs,
        example="""<ir_version: 12, opset_import: ["" : 27]>
g (float[N,4,6] x, float[4,1,3] w, float[4] b) => (float[N,4,6] y, float[N,4,2] s)
{ y, s = CausalConvWithState<activation="silu">(x, w, b) }""",
    ),
    OpSpec(
        "Gemm",
        channels=Channels(layers.gemm),
        role=Role.LINEAR,
        layer=Product,
        scales=scales.layer,
        classifies=True,
        data=(0,),
        unfit=_gemm_unfit,
        macs=gemm_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x, float[3,4] w, float[3] b) => (float[N,3] y) { y = Gemm<transB=1>(x, w, b) }""",
    ),
    OpSpec(
        "MatMul",
        channels=Channels(layers.matmul),
        role=Role.LINEAR,
        layer=Product,
        scales=scales.layer,
        classifies=True,
        data=(0, 1),
        unfit=_matmul_unfit,
        macs=_matmul_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,5,4] x, float[4,3] w) => (float[N,5,3] y) { y = MatMul(x, w) }""",
    ),
    OpSpec(
        "LSTM",
        ranks={0: 3, 5: 3, 6: 3},
        channels=_RECURRENT,
        macs=recurrent_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[5,N,3] x, float[1,8,3] w, float[1,8,2] r) => (float[5,1,N,2] y)
{ y = LSTM<hidden_size=2>(x, w, r) }""",
    ),
    OpSpec(
        "GRU",
        ranks={0: 3, 5: 3},
        channels=_RECURRENT,
        macs=recurrent_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[5,N,3] x, float[1,6,3] w, float[1,6,2] r) => (float[5,1,N,2] y)
{ y = GRU<hidden_size=2>(x, w, r) }""",
    ),
    OpSpec(
        "RNN",
        ranks={0: 3, 5: 3},
        channels=_RECURRENT,
        macs=recurrent_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[5,N,3] x, float[1,2,3] w, float[1,2,2] r) => (float[5,1,N,2] y)
{ y = RNN<hidden_size=2>(x, w, r) }""",
    ),
)

register(
    OpSpec(
        "ConvInteger",
        traits=Trait.INTEGER,
        channels=Channels(layers.integer_convolution, layers.cut_convolution),
        macs=conv_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (uint8[N,2,5,5] x, uint8[3,2,3,3] w) => (int32[N,3,3,3] y) { y = ConvInteger(x, w) }""",
    ),
    OpSpec(
        "MatMulInteger",
        traits=Trait.INTEGER,
        channels=Channels(layers.integer_matmul),
        macs=_matmul_macs,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (uint8[N,5,4] x, uint8[4,3] w) => (int32[N,5,3] y) { y = MatMulInteger(x, w) }""",
    ),
    OpSpec(
        "QLinearConv",
        traits=Trait.INTEGER,
        weight=3,
        channels=Channels(layers.integer_convolution, layers.cut_integer_convolution),
        macs=lambda node: conv_macs(node, weight=3),
        body=integers.convolution,
        qoperator=True,
        written="layers",
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (uint8[N,2,5,5] x, uint8[3,2,3,3] w) => (uint8[N,3,3,3] y)
<float s = {0.5}, uint8 z = {0}, float t = {9.0}, float[3] p = {0.5, 0.25, 0.125}, uint8[3] q = {0, 0, 0}>
{ y = QLinearConv(x, s, z, w, p, q, t, z) }""",
    ),
    OpSpec(
        "QLinearMatMul",
        traits=Trait.INTEGER,
        weight=3,
        channels=Channels(layers.integer_matmul),
        macs=_matmul_macs,
        body=integers.product,
        qoperator=True,
        written="layers",
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (uint8[N,5,4] x, uint8[4,3] w) => (uint8[N,5,3] y)
<float s = {0.5}, uint8 z = {0}, float t = {9.0}> { y = QLinearMatMul(x, s, z, w, s, z, t, z) }""",
    ),
)
