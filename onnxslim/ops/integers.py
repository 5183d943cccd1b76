"""Operators that take and make codes (QOperator format), as what they do to the numbers between DQ and Q."""

from __future__ import annotations

import numpy as np

from onnxslim.ir.graph import Tensor
from onnxslim.ops import heads
from onnxslim.ops.body import Body, WriteBody
from onnxslim.ops.formulas import Results

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_SINGLE = np.dtype(np.float32)
# Codes that the first Q and DQ of the standard know, and the opset of scales for each channel.
_BYTES = tuple(map(np.dtype, (np.uint8, np.int8, np.int32)))
_PER_CHANNEL = 13
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_WIDE = 21


def _values(b: Body, codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 0) -> Tensor:
    """DQ; a vector of scales runs along the axis."""
    return _coded(b, _DEQUANTIZE, codes, scale, zero, axis)


def _codes(b: Body, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Q, with one scale for all."""
    b.require(_is_single(b, scale), f"'{scale.name}' is not one scale")
    return _coded(b, _QUANTIZE, values, scale, zero, 0)


def _coded(b: Body, op: str, tensor: Tensor, scale: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    if _is_single(b, scale):
        return b.add(op, tensor, _scalar(b, scale), None if zero is None else _scalar(b, zero))
    b.require(b.opset >= _PER_CHANNEL, f"a scale for each channel takes opset {_PER_CHANNEL}")
    return b.add(op, tensor, scale, zero, axis=axis)


def _is_single(b: Body, scale: Tensor) -> bool:
    shape = b.shape(scale)
    return b.generic if shape is None else all(dim == 1 for dim in shape)


def _scalar(b: Body, tensor: Tensor) -> Tensor:
    """What may be a vector of one element, as a scalar: a vector is a scale for each channel."""
    if b.shape(tensor) in ((), None):
        return tensor
    values = b.values(tensor)
    if values is not None:
        b.require(values.size == 1, f"'{tensor.name}' is not one number")
        return b.constant(values.reshape(()))
    return b.add("Reshape", tensor, b.integers())


def _product(b: Body, scale: Tensor, other: Tensor, factor: float = 1.0) -> Tensor:
    """The scale of a sum of products of codes."""
    values, others = b.values(scale), b.values(other)
    if values is not None and others is not None:
        b.require(values.size == 1 and values.dtype == others.dtype == _SINGLE, "its scales are not float32")
        return b.constant(
            np.asarray(values.reshape(-1) * others * _SINGLE.type(factor)).reshape(others.shape)
        )
    made = b.add("Mul", _scalar(b, scale), other)
    return made if factor == 1.0 else b.add("Mul", made, b.constant(np.array(factor, np.float32)))


def _grid(b: Body, index: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point."""
    return b.input(index), b.optional(index + 1)


def _operand(b: Body, index: int) -> Tensor:
    """What codes, with scale and zero point behind them, stand for."""
    return _values(b, b.input(index), *_grid(b, index + 1))


def convolution(b: Body) -> Results:
    """QLinearConv: the bias has the scale of the products."""
    weight = _values(b, b.input(3), *_grid(b, 4))
    bias = b.optional(8)
    if bias is not None:
        bias = _values(b, bias, _product(b, b.input(1), b.input(4)), None)
    made = b.add("Conv", _operand(b, 0), weight, bias, **b.passed(*_CONV))
    return [_codes(b, made, *_grid(b, 6))]


def _matrix(b: Body, index: int, transposed: int = 0) -> Tensor:
    """The right operand of a product, with a scale for each column or for all of it."""
    axis = 0
    if not _is_single(b, b.input(index + 1)):
        b.require(b.rank(b.input(index)) == 2, f"'{b.input(index).name}' is not a matrix")
        axis = 1 - transposed
    return _values(b, b.input(index), *_grid(b, index + 1), axis)


def product(b: Body) -> Results:
    """QLinearMatMul."""
    return [_codes(b, b.add("MatMul", _operand(b, 0), _matrix(b, 3)), *_grid(b, 6))]


def _gemm(b: Body) -> Results:
    """QGemm: the bias has the scale of alpha times the products; without a scale the result is no codes."""
    gemm, alpha, bias = b.passed("alpha", "transA", "transB"), b.attr("alpha", 1.0), b.optional(6)
    if bias is not None:
        bias = _values(b, bias, _product(b, b.input(1), b.input(4), alpha), None)
    made = b.add("Gemm", _operand(b, 0), _matrix(b, 3, b.attr("transB", 0)), bias, **gemm)
    return [made if b.optional(7) is None else _codes(b, made, *_grid(b, 7))]


def _binary(op: str) -> WriteBody:
    return lambda b: [_codes(b, b.add(op, _operand(b, 0), _operand(b, 3)), *_grid(b, 6))]


def _unary(op: str, *attrs: str) -> WriteBody:
    def write(b: Body) -> Results:
        b.require(not b.attr("channels_last", 0), "its channels are the last axis")
        return [_codes(b, b.add(op, _operand(b, 0), **b.passed(*attrs)), *_grid(b, 3))]

    return write


def _softmax(b: Body) -> Results:
    """Before opset 13, Softmax takes all axes from its own on for one."""
    axis, opset, x = b.attr("axis", -1), b.attr("opset", 13), b.input(0)
    b.require((opset < 13) == (b.opset < 13) or b.is_last(x, axis), f"it is the Softmax of opset {opset}")
    return [_codes(b, b.add("Softmax", _operand(b, 0), axis=axis), *_grid(b, 3))]


def _concat(b: Body) -> Results:
    operands = [_operand(b, index) for index in range(2, b.count, 3)]
    return [_codes(b, b.add("Concat", *operands, axis=b.attr("axis", 0)), *_grid(b, 0))]


def _where(b: Body) -> Results:
    chosen = b.add("Where", b.input(0), _operand(b, 1), _operand(b, 4))
    return [_codes(b, chosen, *_grid(b, 7))]


def _scaled(b: Body, product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = b.add("Mul", b.cast(product, _SINGLE), scale)
    return made if bias is None else b.add("Add", made, bias)


def _dynamic_product(b: Body) -> Results:
    """DynamicQuantizeMatMul: data becomes integers as it comes."""
    codes, scale, zero = b.add_many("DynamicQuantizeLinear", 3, b.input(0))
    product = b.add("MatMulInteger", codes, b.input(1), zero, b.optional(3))
    return [_scaled(b, product, b.add("Mul", scale, b.input(2)), b.optional(4))]


def _product_to_float(b: Body) -> Results:
    """MatMulIntegerToFloat: of codes whose scale is a constant, the product of what they stand for."""
    bias, scale = b.optional(6), b.input(2)
    if b.values(scale) is not None and _is_single(b, scale):
        left = _values(b, b.input(0), scale, b.optional(4))
        axis = 0 if _is_single(b, b.input(3)) else b.rank(b.input(1)) - 1
        made: Tensor = b.add("MatMul", left, _values(b, b.input(1), b.input(3), b.optional(5), axis))
        return [made if bias is None else b.add("Add", made, bias)]
    product = b.add("MatMulInteger", b.input(0), b.input(1), b.optional(4), b.optional(5))
    return [_scaled(b, product, b.add("Mul", scale, b.input(3)), bias)]


def _attention(b: Body) -> Results:
    """QAttention: the projections are of codes, what they make is in floating point."""
    data = _values(b, b.input(0), b.input(3), b.optional(6))
    scale = b.input(4)
    weight = _values(b, b.input(1), scale, b.optional(7), 0 if _is_single(b, scale) else 1)
    bias = b.input(2)
    return heads.projected(b, (data, weight, bias), b.optional(5), b.optional(8), like=bias)


def lstm(b: Body) -> Results:
    """DynamicQuantizeLSTM, as far as types and shapes go: its state becomes codes at every step."""
    b.require(b.generic, "its state is turned into integers at every step")
    x, weights = b.input(0), [b.input(1), b.input(2)]
    for index in range(3, b.count):
        b.optional(index)
    flat = [b.add("Transpose", b.add("CastLike", each, x), perm=(0, 2, 1)) for each in weights]
    return b.add_many("LSTM", 3, x, *flat, **b.passed("direction", "hidden_size"))


def code(op: str) -> WriteBody:
    """Q and DQ of a domain of their own, which had more types before the standard did."""

    def write(b: Body) -> Results:
        x, scale, zero = b.input(0), b.input(1), b.optional(2)
        codes = x if op == _DEQUANTIZE else zero
        kind = _BYTES[0] if codes is None else b.dtype(codes)
        b.require(b.generic or b.opset >= _WIDE or kind in _BYTES, f"codes of {kind} take opset {_WIDE}")
        b.require(b.generic or b.dtype(scale) == _SINGLE, "its scale is not known to be float32")
        return [_coded(b, op, x, scale, zero, b.attr("axis", 1))]

    return write


BODIES: dict[str, WriteBody] = {
    "QLinearAdd": _binary("Add"),
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearAveragePool": _unary("AveragePool", *_POOL),
    "QLinearSoftmax": _softmax,
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "QGemm": _gemm,
    "DynamicQuantizeMatMul": _dynamic_product,
    "MatMulIntegerToFloat": _product_to_float,
    "QAttention": _attention,
}
