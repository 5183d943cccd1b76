"""Matrices whose codes of few bits have a scale for each block of a column."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ops.body import Body, UnwrittenError
from onnxslim.ops.formulas import Results
from onnxslim.ops.spec import sizes

# Types of codes by their bits, and the opset of scales for blocks.
_CODES = {4: np.dtype(ml_dtypes.uint4), 8: np.dtype(np.uint8)}
OPSET = 21
_TABLES = (np.dtype(np.uint8), np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4))
# To what ONNX Runtime may round the data of such a product: int8, a scale for each block of a row, or not at
# all, which takes three times as long for one row with codes of four bits, sixty times with codes of eight.
ACCURACY, EXACT = 4, 1


def unpacked(packed: Array, bits: int, count: int) -> Array:
    """The first codes of each row of bytes, uint8: lower bits come first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(len(packed), -1)[:, :count])


def packed(codes: Array, bits: int) -> Array:
    """The other way round: rows of bytes, whose last one may have room to spare."""
    each = 8 // bits
    whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).reshape(len(codes), -1, each)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(whole.astype(np.uint8) << shifts, axis=2))


def product(b: Body) -> Results:
    """MatMulNBits: a product by a matrix [K, N] of which each row of bytes holds a column."""
    x, bias = b.input(0), b.optional(5)
    b.passed("accuracy_level")  # in what type ONNX Runtime may compute it
    weight = _any_matrix(b, x) if b.generic else _matrix(b)
    made: Tensor = b.add("MatMul", x, weight)
    return [made if bias is None else b.add("Add", made, bias)]


def _any_matrix(b: Body, x: Tensor) -> Tensor:
    for index in range(1, b.count):
        b.optional(index)
    b.passed("bits", "block_size")
    return b.add("CastLike", b.add("ConstantOfShape", b.integers(b.attr("K", 0), b.attr("N", 0))), x)


def _matrix(b: Body) -> Tensor:
    """DQ of the codes, in the order of the standard."""
    rows, columns = b.attr("K", 0), b.attr("N", 0)
    bits, size = b.attr("bits", 4), b.attr("block_size", 0)
    codes, scales, told = b.values(b.input(1)), b.values(b.input(2)), b.optional(3)
    zeros = None if told is None else b.values(told)
    b.require(b.opset >= OPSET, f"scales for blocks take opset {OPSET}")
    b.require(b.optional(4) is None, "its rows are in groups of another order")
    b.require(bits in _CODES, f"its codes have {bits} bits")
    if codes is None or scales is None or (told is not None and zeros is None):
        raise UnwrittenError("its codes are no constants")
    b.require(
        rows > 0 and columns > 0 and size > 0, "it does not say how large its matrix and its blocks are"
    )
    b.require(zeros is None or zeros.dtype == np.uint8, "its zero points are no codes")
    blocks = math.ceil(rows / size)
    _require_sizes(b, (codes, columns * blocks * size * bits // 8), (scales, columns * blocks))
    whole = unpacked(codes.reshape(columns, -1), bits, rows)
    points = np.full((columns, blocks), 1 << (bits - 1), np.uint8)
    if zeros is not None:
        _require_sizes(b, (zeros, columns * math.ceil(blocks * bits / 8)))
        points = unpacked(zeros.reshape(columns, -1), bits, blocks)
    stored, scale, zero = (
        b.constant(np.ascontiguousarray(each.T).astype(kind))
        for each, kind in (
            (whole, _CODES[bits]),
            (scales.reshape(columns, blocks), scales.dtype),
            (points, _CODES[bits]),
        )
    )
    return b.add("DequantizeLinear", stored, scale, zero, axis=0, block_size=size)


def table(b: Body) -> Results:
    """GatherBlockQuantized: slices of a table, which are turned back once they are found."""
    data, indices, scales, told = b.input(0), b.input(1), b.input(2), b.optional(3)
    bits, size = b.attr("bits", 4), b.attr("block_size", 128)
    axis, along = b.attr("quantize_axis", 1), b.attr("gather_axis", 0)
    kind = b.dtype(data)
    b.require(kind in _TABLES and bits in _CODES, f"its codes are {bits} bits of {kind}")
    if b.generic:
        found = b.add("Gather", b.add("CastLike", data, scales), indices, axis=along)
        return [b.add("Concat", found, found, axis=-1) if kind == np.uint8 and bits < 8 else found]
    b.require(b.opset >= OPSET, f"scales for blocks take opset {OPSET}")
    codes, steps = b.values(data), b.values(scales)
    zeros = None if told is None else b.values(told)
    if codes is None or steps is None or (told is not None and zeros is None):
        raise UnwrittenError("its codes are no constants")
    b.require(zeros is None or zeros.dtype == kind, "its zero points are no codes")
    shapes = {each.ndim for each in (codes, steps, zeros) if each is not None}
    b.require(len(shapes) == 1 and max(shapes) > 1, "its codes and scales have other axes")
    if kind == np.uint8:
        codes = _opened(codes, bits).astype(_CODES[bits])
        opened = np.full(steps.shape, 1 << (bits - 1)) if zeros is None else _opened(zeros, bits)
        zeros = opened[..., : steps.shape[-1]].astype(_CODES[bits])
    b.require(zeros is None or zeros.shape == steps.shape, "its zero points are not as many as its scales")
    zero = None if zeros is None else b.constant(zeros)
    whole = b.add("DequantizeLinear", b.constant(codes), scales, zero, axis=axis, block_size=size)
    return [b.add("Gather", whole, indices, axis=along)]


def _opened(packed: Array, bits: int) -> Array:
    """Codes along the last axis, a byte each."""
    codes = unpacked(packed.reshape(-1, packed.shape[-1]), bits, packed.shape[-1] * (8 // bits))
    return codes.reshape(*packed.shape[:-1], -1)


def _require_sizes(b: Body, *found: tuple[Array, int]) -> None:
    for values, size in found:
        b.require(values.size == size, f"{values.size} numbers are not the {size} that its sizes ask for")


def product_macs(node: Node) -> int | None:
    """Rows of the data times the elements of the matrix."""
    data, made = sizes(node.inputs[0].shape), sizes(node.outputs[0].shape)
    return None if data is None or made is None else math.prod(data) * made[-1]
