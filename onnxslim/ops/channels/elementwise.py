"""Operators that compute element by element, with or without broadcasting."""

from __future__ import annotations

from dataclasses import replace

from onnxslim.ops.channels.labels import Block, Labels, Trace


def same(trace: Trace) -> None:
    """The first output has the slices of the first input."""
    trace.emit(trace.blocks(0))


def same_all(trace: Trace) -> None:
    """Every output has the slices of the first input."""
    for index in range(len(trace.node.outputs)):
        trace.emit(trace.blocks(0), index)


def like(trace: Trace) -> None:
    """As `same`; of the second input, nothing but the type counts."""
    trace.ignore(1)
    same(trace)


def broadcast(trace: Trace) -> None:
    """Axes are aligned from the right; along each, all operands that are not stretched share their slices."""
    operands = [index for index in range(len(trace.node.inputs)) if trace.has(index)]
    rank = len(trace.made())
    join(trace, operands, {index: rank - len(trace.shape(index)) for index in operands})


def join(trace: Trace, operands: list[int], shift: dict[int, int], skip: int | None = None) -> None:
    """Tie the blocks of several inputs and label the output with them.

    Args:
        trace: the node.
        operands: inputs to join.
        shift: what to add to an axis of each input to get that of the output.
        skip: an axis of the output to leave out; blocks over it and other axes must not be there any more.
    """
    _agree(trace, operands, shift, skip)
    joined: dict[tuple[int, ...], Labels] = {}
    for index in operands:
        for block in trace.blocks(index):
            axes = tuple(axis + shift[index] for axis in block.axes)
            if skip in axes:
                continue
            if axes in joined:
                trace.tie(joined[axes], block.labels)
            joined.setdefault(axes, block.labels)
    trace.emit(Block(axes, labels) for axes, labels in joined.items())


def _agree(trace: Trace, operands: list[int], shift: dict[int, int], skip: int | None) -> None:
    """Release axes until the blocks of any two inputs cover the same axes or none in common."""
    settled = False
    while not settled:
        settled = True
        for axis in range(len(trace.made())):
            if axis == skip:
                continue
            wide = [index for index in operands if _size(trace, index, axis - shift[index]) > 1]
            covers = {index: _cover(trace, index, axis, shift[index]) for index in wide}
            if len(set(covers.values())) > 1:
                settled = False
                _settle(trace, axis, covers, shift)


def _settle(trace: Trace, axis: int, covers: dict[int, frozenset[int]], shift: dict[int, int]) -> None:
    """Where one input has no labels along an axis, none may; otherwise the smallest block decides."""
    smallest = min(covers.values(), key=len)
    for index, cover in covers.items():
        for extra in sorted(cover - smallest) if smallest else [axis] if cover else []:
            trace.release(index, extra - shift[index], "it is combined with a tensor that stays as it is")


def _size(trace: Trace, index: int, axis: int) -> int:
    return trace.shape(index)[axis] if axis >= 0 else 1


def _cover(trace: Trace, index: int, axis: int, shift: int) -> frozenset[int]:
    """The axes of the output that are labelled together with this one in an input."""
    for block in trace.blocks(index):
        if axis - shift in block.axes:
            return frozenset(each + shift for each in block.axes)
    return frozenset()


def shifted(blocks: tuple[Block, ...], by: int) -> list[Block]:
    """Blocks of a tensor that got `by` more axes in front."""
    return [replace(block, axes=tuple(axis + by for axis in block.axes)) for block in blocks]
