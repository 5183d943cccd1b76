"""Attention in one operator, and Einsum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.labels import Block, Labels, Trace

_COMPARED = "it is summed over or compared along this axis"


@dataclass(frozen=True)
class _HeadLabels:
    """Labels of the heads of queries, and of those of keys and values, each of which some of them share."""

    queries: Labels
    keys: Labels


def attention(trace: Trace) -> None:
    """Attention-23: Q, K, V are [batch, heads, length, size] or [batch, length, heads * size].

    A key-value head goes together with all query heads that share it; the sizes of heads stay.
    """
    if len(trace.shape(0)) == 4:
        heads = _heads_apart(trace)
    else:
        attrs = trace.node.attrs
        heads = _heads_merged(trace, attrs["q_num_heads"], attrs["kv_num_heads"])
    _bias(trace, 3, heads)
    _caches(trace, (4, 5), heads)
    trace.emit([Block((1,), heads.queries)], 3)


def grouped_query_attention(trace: Trace) -> None:
    """GroupQueryAttention of com.microsoft: [batch, length, heads * size], or all three in one input."""
    attrs = trace.node.attrs
    merge = _heads_merged if trace.has(1) else _heads_packed
    heads = merge(trace, attrs["num_heads"], attrs["kv_num_heads"])
    _bias(trace, 10, heads)
    _caches(trace, (3, 4), heads)
    if trace.has(11):
        trace.tie_axis(11, 0, heads.queries)
    for index in (12, 13):
        if trace.has(index) and np.prod(trace.shape(index)) > 1:
            trace.pin(heads.keys, "its cache has a scale for each channel")
    trace.emit([Block((1,), heads.queries)], 3)


def linear_attention(trace: Trace) -> None:
    """LinearAttention: [batch, length, heads * size], with a state, a decay and a rate for each head."""
    attrs = trace.node.attrs
    heads = _heads_merged(trace, attrs["q_num_heads"], attrs["kv_num_heads"])
    for index in (4, 5):
        if trace.has(index):
            for axis in (0, 1):
                trace.release(index, axis, _COMPARED)
            if trace.shape(index)[2] > 1:
                rows = trace.labels(index, 2).reshape(heads.keys.size, -1)
                trace.tie(rows, heads.keys[:, None])
    _caches(trace, (3,), heads, made=1)


def _bias(trace: Trace, index: int, heads: _HeadLabels) -> None:
    """What is added to scores, broadcast to [batch, heads of queries, length, keys]."""
    if not trace.has(index):
        return
    sizes = trace.shape(index)
    along = len(sizes) - 3
    for axis in range(len(sizes)):
        if axis != along:
            trace.release(index, axis, _COMPARED)
    if along >= 0:
        trace.tie_axis(index, along, heads.queries)


def _caches(trace: Trace, indices: Sequence[int], heads: _HeadLabels, made: int = 2) -> None:
    """Keys and values, or states, of what was before, [batch, heads, ...]; they come out with what is new."""
    for index in indices:
        if trace.has(index):
            for axis in (0, 2, 3):
                trace.release(index, axis, _COMPARED)
            trace.tie(trace.labels(index, 1), heads.keys, f"'{trace.node.inputs[index].name}' has its heads")
    for index in range(1, made + 1):
        trace.emit([Block((1,), heads.keys)], index)


def _keep(trace: Trace, index: int) -> None:
    for axis in range(len(trace.shape(index))):
        trace.release(index, axis, "its letters stand for more axes, or for one twice")


def _heads_apart(trace: Trace) -> _HeadLabels:
    for index in range(3):
        for axis in (0, 2, 3):
            trace.release(index, axis, _COMPARED)
    queries, keys, values = (trace.labels(index, 1) for index in range(3))
    trace.emit([Block((1,), queries)])
    return _tied(trace, queries, keys, values)


def _heads_merged(trace: Trace, query_heads: int, heads: int) -> _HeadLabels:
    for index in range(3):
        for axis in (0, 1):
            trace.release(index, axis, _COMPARED)
    return _merged(trace, [trace.labels(index, 2) for index in range(3)], query_heads, heads)


def _heads_packed(trace: Trace, query_heads: int, heads: int) -> _HeadLabels:
    """Queries, then keys, then values along the last axis of the first input."""
    for axis in (0, 1):
        trace.release(0, axis, _COMPARED)
    labels = trace.labels(0, 2)
    size = labels.size // (query_heads + 2 * heads)
    places = (query_heads * size, (query_heads + heads) * size)
    return _merged(trace, np.split(labels, places), query_heads, heads)


def _merged(trace: Trace, parts: Sequence[Labels], query_heads: int, heads: int) -> _HeadLabels:
    found: list[Labels] = []
    for labels, count in zip(parts, (query_heads, heads, heads), strict=True):
        rows = labels.reshape(count, -1)
        trace.tie(rows, rows[:, :1])
        found.append(rows[:, 0])
    trace.emit([Block((2,), np.repeat(found[0], trace.made()[2] // query_heads))])
    return _tied(trace, *found)


def _tied(trace: Trace, queries: Labels, keys: Labels, values: Labels) -> _HeadLabels:
    trace.tie(queries.reshape(keys.size, -1), keys[:, None])
    trace.tie(keys, values)
    return _HeadLabels(queries, keys)


def cut_attention(cut: Cut) -> None:
    """State the new numbers of heads."""
    for name, index in (("q_num_heads", 0), ("kv_num_heads", 1)):
        before = cut.node.attrs.get(name)
        if before and cut.kept(index, 2) is not None:
            cut.node.attrs[name] = cut.size(index, 2) * before // cut.before(index)[2]


def cut_grouped_query_attention(cut: Cut) -> None:
    """The same; groups keep their size."""
    attrs, heads = cut.node.attrs, cut.node.attrs["num_heads"]
    left = cut.size_made(2) * heads // cut.made()[2]
    attrs["num_heads"], attrs["kv_num_heads"] = left, attrs["kv_num_heads"] * left // heads


def rotary_embedding(trace: Trace) -> None:
    """RotaryEmbedding-23: channels of a head are mixed with each other, heads are not."""
    _rotated(trace, trace.node.attrs.get("num_heads", 0))


def indexed_rotary_embedding(trace: Trace) -> None:
    """That of com.microsoft, whose heads are as large as its angles say where it does not tell how many."""
    told = trace.node.attrs.get("num_heads", 0)
    _rotated(trace, told or trace.shape(0)[-1] // (2 * trace.shape(2)[-1]))


def _rotated(trace: Trace, heads: int) -> None:
    apart = len(trace.shape(0)) == 4
    for axis in (0, 2, 3) if apart else (0, 1):
        trace.release(0, axis, "its angles run along this axis")
    if not apart:
        rows = trace.labels(0, 2).reshape(heads, -1)
        trace.tie(rows, rows[:, :1])
    trace.emit(trace.blocks(0))


def cut_rotary_embedding(cut: Cut) -> None:
    """State the new number of heads."""
    if len(cut.before(0)) == 3 and cut.kept(0, 2) is not None and cut.node.attrs.get("num_heads"):
        cut.node.attrs["num_heads"] = cut.size(0, 2) * cut.node.attrs["num_heads"] // cut.before(0)[2]


def einsum(trace: Trace) -> None:
    """Axes with the same letter share their slices; a letter that is not in the result is summed over."""
    terms, result = parse(trace.node.attrs["equation"])
    if any(len(set(term)) != len(term) or "." in term for term in (*terms, result)):
        for index in range(len(terms)):
            _keep(trace, index)
        return
    summed = {letter for term in terms for letter in term} - set(result)
    for index, term in enumerate(terms):
        _keep_one(trace, index, term, summed)
    first: dict[str, Labels] = {}
    for index, term in enumerate(terms):
        for axis, letter in enumerate(term):
            if trace.shape(index)[axis] > 1:
                labels = trace.labels(index, axis)
                trace.tie(first.setdefault(letter, labels), labels, "the axis is fixed in another operand")
    _note(trace, terms, summed)
    trace.emit(Block((axis,), first[letter]) for axis, letter in enumerate(result) if letter in first)


def _keep_one(trace: Trace, index: int, term: str, summed: set[str]) -> None:
    """Of axes that were one, those stay labelled that are in the result."""
    for block in trace.blocks(index):
        if len(block.axes) > 1:
            for axis in [axis for axis in block.axes if term[axis] in summed][: len(block.axes) - 1]:
                trace.release(index, axis, "")


def _note(trace: Trace, terms: Sequence[str], summed: set[str]) -> None:
    fixed = [index for index in range(len(terms)) if trace.is_fixed(index)]
    for letter in sorted(summed):
        where = [index for index, term in enumerate(terms) if letter in term]
        data = [index for index in where if index not in fixed]
        if len(where) == 2 and len(data) == 1:
            weight = next(index for index in where if index in fixed)
            trace.contract(data[0], terms[data[0]].index(letter), weight, terms[weight].index(letter))
        else:
            for index in where:
                trace.inexact(trace.labels(index, terms[index].index(letter)))


def parse(equation: str | bytes) -> tuple[list[str], str]:
    """Letters of each operand and of the result."""
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if arrow:
        return terms, right
    letters = "".join(terms)
    return terms, "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
