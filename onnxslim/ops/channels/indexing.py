"""Operators that read or write elements at computed places: other axes are carried along."""

from __future__ import annotations

from onnxslim.ops.channels.elementwise import join
from onnxslim.ops.channels.labels import Trace

_READ, _WRITTEN = "elements are read from computed places", "elements are written to computed places"


def gather_nd(trace: Trace) -> None:
    """Indices [..., k] say where along k axes, behind those of the batch; the other axes come whole."""
    indices = trace.shape(1)
    first = trace.node.attrs.get("batch_dims", 0) + indices[-1]
    for axis in range(first):
        trace.release(0, axis, _READ)
    by = len(indices) - 1 - first
    trace.emit(block.moved([axis + by for axis in block.axes]) for block in trace.blocks(0))


def scatter_nd(trace: Trace) -> None:
    """Updates [..., the rest] go to where indices [..., k] say along the first k axes of the data."""
    indices = trace.shape(1)
    first, leading = indices[-1], len(indices) - 1
    for index, count in ((0, first), (2, leading)):
        for axis in range(count):
            trace.release(index, axis, _WRITTEN)
    join(trace, [0, 2], {0: 0, 2: first - leading})


def gather_elements(trace: Trace) -> None:
    """Along one axis, places are computed; along the others, they are those of the indices."""
    _elements(trace, [0, 1], _READ)


def scatter_elements(trace: Trace) -> None:
    """The same, of data, indices and updates."""
    _elements(trace, [0, 1, 2], _WRITTEN)


def tensor_scatter(trace: Trace) -> None:
    """TensorScatter: a cache, and what is written to it along one axis."""
    _except(trace, [0, 1], [trace.node.attrs.get("axis", -2)], _WRITTEN)


def _elements(trace: Trace, operands: list[int], why: str) -> None:
    shapes = [trace.shape(index) for index in operands]
    shorter = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    _except(trace, operands, [trace.node.attrs.get("axis", 0), *shorter], why)


def _except(trace: Trace, operands: list[int], axes: list[int], why: str) -> None:
    """All operands share their slices, but along some axes, which stay."""
    for index in operands:
        for axis in axes:
            trace.release(index, axis, why)
    join(trace, operands, dict.fromkeys(operands, 0))
