"""Attention of several heads in one operator, written out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxslim.ir.graph import Node, Tensor
from onnxslim.ops.body import Body
from onnxslim.ops.formulas import Results
from onnxslim.ops.spec import sizes

# Axes: batch, heads, positions, channels of a head.
_HEADS_FIRST = (0, 2, 1, 3)
_SINGLE = np.dtype(np.float32)
# The opset of RotaryEmbedding.
_ROTARY = 23


@dataclass(frozen=True)
class Heads:
    """What attention reads, with heads first.

    Attributes:
        query, key, value: [batch, heads, positions, channels of a head].
        like: an input with the element type of all of them.
        size: channels of one head of the query.
        values: channels of all heads of the value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    like: Tensor
    size: int
    values: int


def _split(b: Body, x: Tensor, heads: int, channels: int) -> Tensor:
    """[batch, positions, channels] with heads first."""
    b.require(heads > 0 and channels % heads == 0, f"{channels} channels are no {heads} heads")
    return b.swapped(b.add("Reshape", x, b.integers(0, 0, heads, channels // heads)), *_HEADS_FIRST)


def _mixed(b: Body, at: Heads, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """The values of all positions, mixed by softmax of scaled products of queries and keys."""
    given = b.attr("scale", 0.0)
    scale = given if given else 1.0 / math.sqrt(at.size)
    products = b.add("MatMul", at.query, b.swapped(at.key, 0, 1, 3, 2))
    scores: Tensor = b.add("Mul", products, b.number(scale, at.like))
    scores = scores if mask is None else b.add("Add", scores, mask)
    if b.attr("unidirectional", 0):
        scores = _causal(b, scores, at)
    scores = scores if bias is None else b.add("Add", scores, bias)
    mixed = b.swapped(b.add("MatMul", b.add("Softmax", scores, axis=-1), at.value), *_HEADS_FIRST)
    return b.add("Reshape", mixed, b.integers(0, 0, at.values))


def _causal(b: Body, scores: Tensor, at: Heads) -> Tensor:
    """The lowest number there is for keys behind a query; the last query stands at the last key."""
    kind = b.dtype(at.like)
    b.require(kind == _SINGLE, f"it is causal in {kind}")
    zero, one = b.constant(np.array(0)), b.constant(np.array(1))
    count, last = (
        b.add("Squeeze", b.add("Slice", b.add("Shape", tensor), b.integers(2), b.integers(3)))
        for tensor in (at.query, at.key)
    )
    rows = b.unsqueezed(b.add("Range", b.add("Sub", last, count), last, one), 1)
    behind = b.add("Less", rows, b.add("Range", zero, last, one))
    return b.add("Where", behind, b.number(float(np.finfo(_SINGLE).min), at.like), scores)


def _masked(b: Body, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to scores: a low number where a mask, [batch, (positions,) keys], is zero."""
    low = b.attr("mask_filter_value", -10000.0)
    if mask is None:
        return None
    rank = b.rank(mask)
    b.require(rank in (2, 3), f"its mask has {rank} axes, and so tells lengths, or one for each head")
    none = b.add("Equal", mask, b.constant(np.array(0, np.int32)))
    added = b.add("Where", none, b.number(low, like), b.number(0.0, like))
    return b.unsqueezed(added, *((1, 2) if rank == 2 else (1,)))


def _single_head(b: Body, query: Tensor, key: Tensor, value: Tensor) -> Results:
    """Attention of one head, whose result has the same shape."""
    return [b.add("MatMul", b.add("MatMul", query, b.transposed(key)), value)]


def multi_head(b: Body) -> Results:
    """MultiHeadAttention of queries, keys and values that are apart."""
    query, key, value = b.input(0), b.input(1), b.input(2)
    bias, mask, added, past, past_values = (b.optional(index) for index in range(3, 8))
    heads = b.attr("num_heads", 0)
    if b.generic:
        b.passed("scale", "unidirectional", "mask_filter_value")
        return _single_head(b, query, key, value)
    b.require(
        all(b.rank(each) == 3 for each in (query, key, value)), "its heads are apart, or packed, already"
    )
    width, last = b.size(query, -1), b.size(value, -1)
    parts: list[Tensor] = [query, key, value]
    if bias is not None:
        split = b.split(bias, (width, width, last), 0)
        parts = [b.add("Add", part, each) for part, each in zip(parts, split, strict=True)]
    query, key = (_split(b, part, heads, width) for part in parts[:2])
    value = _split(b, parts[2], heads, last)
    if past is not None and past_values is not None:
        key, value = b.add("Concat", past, key, axis=2), b.add("Concat", past_values, value, axis=2)
    like = b.input(0)
    at = Heads(query, key, value, like, width // heads, last)
    return [_mixed(b, at, _masked(b, mask, like), added), key, value]


def packed(b: Body) -> Results:
    """Attention with the projections of queries, keys and values in one matrix, in this order."""
    bias, mask, past, added = (b.optional(index) for index in range(2, 6))
    return projected(b, (b.input(0), b.input(1), bias), mask, past, added)


def projected(
    b: Body,
    projection: tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None,
    past: Tensor | None,
    added: Tensor | None = None,
    like: Tensor | None = None,
) -> Results:
    """The same of data, a matrix and a bias, wherever they come from.

    Args:
        b: of the node.
        projection: data, matrix and bias.
        mask, past, added: inputs of the node, if they are there.
        like: an input with the element type that all is computed in; the data if None.
    """
    x, weight, bias = projection
    like = x if like is None else like
    heads, told = b.attr("num_heads", 0), b.numbers("qkv_hidden_sizes")
    b.require(not b.attr("do_rotary", 0), "it rotates queries and keys")
    b.require(not b.attr("past_present_share_buffer", 0), "past and present are one buffer")
    third = b.size(b.input(1), 1) // 3
    b.require(len(told) in (0, 3), "its qkv_hidden_sizes are not three")
    widths = [int(each) for each in told] or [third] * 3
    made: Tensor = b.add("MatMul", x, weight)
    made = made if bias is None else b.add("Add", made, bias)
    parts: list[Tensor] = list(b.split(made, widths, -1))
    if b.generic:
        b.passed("scale", "unidirectional", "mask_filter_value")
        return _single_head(b, *parts)
    query, key, value = (_split(b, part, heads, width) for part, width in zip(parts, widths, strict=True))
    if past is not None:
        keys, values = (b.add("Gather", past, b.constant(np.array(index)), axis=0) for index in (0, 1))
        key, value = b.add("Concat", keys, key, axis=2), b.add("Concat", values, value, axis=2)
    present = None
    if b.has_output(1):
        present = b.add("Concat", b.unsqueezed(key, 0), b.unsqueezed(value, 0), axis=0)
    at = Heads(query, key, value, like, widths[0] // heads, widths[2])
    return [_mixed(b, at, _masked(b, mask, like), added), present]


def grouped(b: Body) -> Results:
    """GroupQueryAttention, as far as types and shapes go: its keys and values lie in buffers."""
    b.require(b.generic, "its keys and values lie in buffers of which a part is filled")
    query, key, value, total = b.input(0), b.optional(1), b.optional(2), b.input(6)
    heads, shared = b.attr("num_heads", 0), b.attr("kv_num_heads", 0)
    _ignore(b)
    if key is None or value is None:  # they are packed behind the query
        packed = b.add("Reshape", query, b.integers(0, 0, heads + 2 * shared, -1))
        first, *new = b.split(packed, (heads, shared, shared), 2)
        query = b.add("Reshape", first, b.integers(0, 0, -1))
    else:
        new = [b.add("Reshape", each, b.integers(0, 0, shared, -1)) for each in (key, value)]
    made = []
    for past, each in zip((b.optional(3), b.optional(4)), new, strict=True):
        made.append(b.swapped(each, *_HEADS_FIRST) if past is None else _cut(b, past, 2, total))
    return [query, *made]


def _cut(b: Body, tensor: Tensor, axis: int, total: Tensor) -> Tensor:
    """A tensor of which only some, nobody knows how many, are left along an axis."""
    some = b.cast(b.add("Reshape", total, b.integers(1)), np.dtype(np.bool_))
    return b.add("Compress", tensor, some, axis=axis)


def _ignore(b: Body) -> None:
    """What says nothing of types and shapes."""
    for index in range(b.count):
        b.optional(index)
    b.passed(*b.attributes)


def rotary(b: Body) -> Results:
    """RotaryEmbedding, with positions as the second input."""
    x, positions, cosines, sines = (b.input(index) for index in range(4))
    if b.generic:
        _ignore(b)
        return [b.add("Identity", x)]
    b.require(not b.attr("is_packed_batching", 0), "its batches are packed")
    b.require(b.attr("scale", 1.0) == 1.0, "it scales as well")
    b.require(b.rank(positions) == 2, "its positions are told by the first of them")
    shared = b.passed("interleaved", "num_heads", "rotary_embedding_dim")
    b.require(b.opset >= _ROTARY, f"it is there from opset {_ROTARY} on")
    if b.rank(x) == 3 and not shared.get("num_heads", 0):
        shared["num_heads"] = b.size(x, -1) // (2 * b.size(cosines, -1))
    return [b.add("RotaryEmbedding", x, cosines, sines, positions, **shared)]


def multi_head_macs(node: Node) -> int | None:
    """Products of queries and keys, and of what comes of them and values."""
    query, key, value = (sizes(tensor.shape) for tensor in node.inputs[:3])
    past = node.input(6)
    before = (0, 0, 0) if past is None else sizes(past.shape)
    if query is None or key is None or value is None or before is None or len(key) != 3:
        return None
    return math.prod(query[:2]) * (key[1] + before[2]) * (query[-1] + value[-1])


def grouped_macs(node: Node) -> int | None:
    """The same, of each head of queries; keys of a buffer count as if it were full."""
    query, past, output = (None if each is None else sizes(each.shape) for each in _grouped_shapes(node))
    if query is None or output is None or (node.input(3) is not None and past is None):
        return None
    return 2 * math.prod(output) * (query[1] + (0 if past is None else past[2]))


def _grouped_shapes(node: Node) -> tuple[Tensor | None, ...]:
    return node.inputs[0], node.input(3), node.outputs[0]


def packed_macs(node: Node, before: int = 4) -> int | None:
    """Those of the projections, and the same; `before` is the input of keys and values that were before."""
    x, weight = (sizes(tensor.shape) for tensor in node.inputs[:2])
    past = node.input(before)
    lengths = (0, 0, 0, 0) if past is None else sizes(past.shape)
    if x is None or weight is None or lengths is None:
        return None
    widths = node.attrs.get("qkv_hidden_sizes") or (weight[1] // 3,) * 3
    return math.prod(x[:2]) * (math.prod(weight) + (x[1] + lengths[3]) * (widths[0] + widths[2]))
