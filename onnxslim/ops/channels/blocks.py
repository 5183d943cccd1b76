"""Matrices whose codes of few bits have a scale for each block of a column."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnxslim.ir.graph import Constant, Node
from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.labels import Block, Labels, Trace

_GROUPED = 4


def block_product(trace: Trace) -> None:
    """MatMulNBits: A [..., K], B [N, blocks, bytes], scales [N, blocks], zero points, a bias [N].

    Columns go one by one; of what they are multiplied along, whole blocks. Zero points of several blocks may
    share a byte, and then go together.
    """
    attrs, rank = trace.node.attrs, len(trace.shape(0))
    if len(trace.shape(1)) != 3 or len(trace.shape(2)) != 2 or trace.has(_GROUPED):
        return
    columns, along = trace.labels(1, 0), trace.labels(0, rank - 1)
    trace.release(1, 2, "it is a block of codes")
    _tie_blocks(trace, along, trace.labels(1, 1), attrs["block_size"])
    for index in (2, 3):
        if trace.has(index):
            trace.tie(trace.labels(index, 0), columns)
            _tie_packed(trace, trace.labels(1, 1), trace.labels(index, 1))
    if trace.has(5):
        trace.tie_axis(5, 0, columns)
    kept = [block for block in trace.blocks(0) if rank - 1 not in block.axes]
    trace.emit([*kept, Block((rank - 1,), columns)])


def block_table(trace: Trace) -> None:
    """GatherBlockQuantized: a table [rows, channels] in blocks of channels, whose codes may share a byte."""
    attrs, rank = trace.node.attrs, len(trace.made())
    if (
        len(trace.shape(0)) != 2
        or attrs.get("gather_axis", 0)
        or attrs.get("quantize_axis", 1) not in (1, -1)
    ):
        return
    for index in (0, 2, 3):
        if trace.has(index):
            trace.release(index, 0, "its rows are looked up")
    codes, blocks = trace.labels(0, 1), trace.labels(2, 1)
    channels = np.repeat(codes, trace.made()[-1] // codes.size)
    _tie_blocks(trace, channels, blocks, attrs.get("block_size", 128))
    if trace.has(3):
        _tie_packed(trace, blocks, trace.labels(3, 1))
    trace.emit([Block((rank - 1,), channels)])


def _tie_blocks(trace: Trace, along: Labels, blocks: Labels, size: int) -> None:
    if along.size % size:
        trace.pin(along, "its last block is not full")
        trace.pin(blocks, "its last block is not full")
        return
    rows = along.reshape(blocks.size, size)
    trace.tie(rows, blocks[:, None], "a block goes as a whole")


def _tie_packed(trace: Trace, blocks: Labels, stored: Labels) -> None:
    """One scale or zero point for each block, or several of them in a byte."""
    each = math.ceil(blocks.size / stored.size)
    for at, label in enumerate(stored):
        trace.tie(blocks[at * each : (at + 1) * each], label)


def cut_block_product(cut: Cut) -> None:
    """State the new sizes of the matrix."""
    attrs = cut.node.attrs
    attrs["K"], attrs["N"] = cut.size(0, len(cut.before(0)) - 1), cut.size_made(len(cut.made()) - 1)


def ready_block_product(node: Node, rename: Callable[[str], str]) -> None:
    """Scales and zero points as matrices, which ONNX Runtime takes in one row as well."""
    codes = node.constant(1)
    if codes is None or codes.ndim != 3:
        return
    for index in (2, 3):
        values = node.constant(index)
        if values is not None and values.ndim == 1 and values.size % len(codes) == 0:
            name = rename(node.inputs[index].name)
            node.inputs[index] = Constant(name, values.reshape(len(codes), -1))
