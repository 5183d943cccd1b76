"""Attention in one operator, and Einsum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.labels import Block, Labels, Trace


def attention(trace: Trace) -> None:
    """Attention-23: Q, K, V are [batch, heads, length, size] or [batch, length, heads * size].

    A key-value head goes together with all query heads that share it; the sizes of heads stay.
    """
    if trace.has(3):
        _keep(trace, 3)
    if len(trace.shape(0)) == 4:
        _heads_apart(trace)
    else:
        attrs = trace.node.attrs
        _heads_merged(trace, attrs["q_num_heads"], attrs["kv_num_heads"])
    for index in range(1, len(trace.node.outputs)):
        if trace.node.outputs[index].name:
            for which in range(3):
                _keep(trace, which)


def _keep(trace: Trace, index: int) -> None:
    for axis in range(len(trace.shape(index))):
        trace.release(index, axis, "heads are only followed through queries, keys and values")


def _heads_apart(trace: Trace) -> None:
    for index in range(3):
        for axis in (0, 2, 3):
            trace.release(index, axis, "it is summed over or compared along this axis")
    queries, keys, values = (trace.labels(index, 1) for index in range(3))
    _tie_heads(trace, queries, keys, values)
    trace.emit([Block((1,), queries)])


def _heads_merged(trace: Trace, query_heads: int, heads: int) -> None:
    found: list[Labels] = []
    for index, count in ((0, query_heads), (1, heads), (2, heads)):
        for axis in (0, 1):
            trace.release(index, axis, "it is compared along this axis")
        rows = trace.labels(index, 2).reshape(count, -1)
        trace.tie(rows, rows[:, :1])
        found.append(rows[:, 0])
    _tie_heads(trace, *found)
    trace.emit([Block((2,), np.repeat(found[0], trace.made()[2] // query_heads))])


def _tie_heads(trace: Trace, queries: Labels, keys: Labels, values: Labels) -> None:
    trace.tie(queries.reshape(keys.size, -1), keys[:, None])
    trace.tie(keys, values)


def cut_attention(cut: Cut) -> None:
    """State the new numbers of heads."""
    for name, index in (("q_num_heads", 0), ("kv_num_heads", 1)):
        before = cut.node.attrs.get(name)
        if before and cut.kept(index, 2) is not None:
            cut.node.attrs[name] = cut.size(index, 2) * before // cut.before(index)[2]


def rotary_embedding(trace: Trace) -> None:
    """RotaryEmbedding-23: channels of a head are mixed with each other, heads are not."""
    apart = len(trace.shape(0)) == 4
    for axis in (0, 2, 3) if apart else (0, 1):
        trace.release(0, axis, "its angles run along this axis")
    if not apart:
        rows = trace.labels(0, 2).reshape(trace.node.attrs["num_heads"], -1)
        trace.tie(rows, rows[:, :1])
    trace.emit(trace.blocks(0))


def cut_rotary_embedding(cut: Cut) -> None:
    """State the new number of heads."""
    if len(cut.before(0)) == 3 and cut.kept(0, 2) is not None:
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
