"""Vectors of sizes: where each element of one comes from, and who reads the size of an axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxslim.ir.graph import Constant, Node, Tensor

# Sizes of a tensor before a cut; None if they are not known.
Sizes: TypeAlias = Callable[[Tensor], "tuple[int, ...] | None"]

# Inputs that say which shape to make.
TARGETS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}
_UNCHANGED = ("Identity", "Cast", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Written:
    """An element that stands in a constant.

    Attributes:
        node, index: the reader of the constant.
        offset: place in the constant.
        alone: whether the vector it is part of has no other reader.
    """

    node: Node
    index: int
    offset: int
    alone: bool

    @property
    def value(self) -> int:
        """The element."""
        return int(np.asarray(self.node.constant(self.index)).flat[self.offset])


@dataclass(frozen=True)
class Measured:
    """An element that is the size of an axis of a tensor."""

    tensor: Tensor
    axis: int


def origin(node: Node, index: int, position: int, sizes: Sizes) -> Written | Measured | None:
    """Where an element of an input comes from; None if it is computed."""
    alone = True
    while (tensor := node.input(index)) is not None:
        if isinstance(tensor, Constant):
            return Written(node, index, position if tensor.size > 1 else 0, alone)
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is not None and maker.op == "Shape":
            return _measured(maker, position, sizes)
        step = _back(maker, position, sizes) if maker is not None else None
        if maker is None or step is None:
            return None
        alone = alone and len(tensor.outputs) == 1
        node, (index, position) = maker, step
    return None


def _measured(node: Node, position: int, sizes: Sizes) -> Measured | None:
    shape = sizes(node.inputs[0])
    if shape is None:
        return None
    axes = range(len(shape))[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    return Measured(node.inputs[0], axes[position]) if position < len(axes) else None


def _back(node: Node, position: int, sizes: Sizes) -> tuple[int, int] | None:
    """The input, and the place in it, of an element of the output of a node that only moves elements."""
    if node.op in _UNCHANGED:
        return 0, position
    if node.op == "Concat":
        starts = _starts(node, sizes)
        at = int(np.searchsorted(starts, position, "right")) - 1 if starts else 0
        return (at, position - starts[at]) if starts else None
    if node.op == "Where":
        condition = node.constant(0)
        if condition is None or condition.ndim != 1 or condition.size <= position:
            return None
        return (1 if condition[position] else 2), position
    if node.op in ("Gather", "Slice"):
        shape = sizes(node.inputs[0])
        chosen = _chosen(node, shape[0]) if shape is not None and len(shape) == 1 else None
        return (0, chosen[position]) if chosen is not None and position < len(chosen) else None
    return None


def _starts(node: Node, sizes: Sizes) -> list[int] | None:
    """Where each input of a Concat begins in its output."""
    starts = [0]
    for piece in node.inputs:
        shape = sizes(piece)
        if shape is None or len(shape) != 1:
            return None
        starts.append(starts[-1] + shape[0])
    return starts[:-1]


def _chosen(node: Node, length: int) -> list[int] | None:
    """The elements of a vector that a Gather or a Slice with constant places takes."""
    if node.op == "Gather":
        indices = node.constant(1)
        return None if indices is None else [int(index) % length for index in indices.flat]
    limits = [node.constant(index) for index in (1, 2, 4)]
    if limits[0] is None or limits[1] is None or (node.input(4) is not None and limits[2] is None):
        return None
    start, end = int(limits[0].flat[0]), int(limits[1].flat[0])
    step = int(limits[2].flat[0]) if limits[2] is not None else 1
    return list(range(length))[slice(start, end, step)]


def computed_with(node: Node, rank: int, sizes: Sizes, outputs: frozenset[int]) -> set[int]:
    """The axes whose sizes, as a Shape gives them, end up somewhere else than in the shape of a tensor.

    Args:
        node: the Shape.
        rank: of its input.
        sizes: shapes of tensors.
        outputs: ids of the graph's outputs.
    """
    axes = range(rank)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    found: set[int] = set()
    pending: list[tuple[Tensor, Sequence[int | None]]] = [(node.outputs[0], list(axes))]
    while pending:
        tensor, held = pending.pop()
        if id(tensor) in outputs:
            found.update(axis for axis in held if axis is not None)
        for reader in tensor.outputs:
            moved = list(_forward(reader, tensor, held, sizes))
            if not moved:
                found.update(axis for axis in held if axis is not None)
            pending.extend((reader.outputs[0], elements) for elements in moved if elements is not _SHAPES)
    return found


_SHAPES: Sequence[int | None] = ()


def _forward(
    node: Node, tensor: Tensor, held: Sequence[int | None], sizes: Sizes
) -> Iterator[Sequence[int | None]]:
    """What a reader makes of it: `_SHAPES` if it makes a tensor of that shape, nothing if it computes."""
    where = [index for index, each in enumerate(node.inputs) if each is tensor]
    if TARGETS.get(node.op) is not None and where == [TARGETS[node.op]]:
        yield _SHAPES
    elif node.op in _UNCHANGED and where == [0]:
        yield held
    elif node.op in ("Gather", "Slice") and where == [0]:
        chosen = _chosen(node, len(held))
        if chosen is not None:
            yield [held[index] for index in chosen]
    elif node.op == "Concat":
        starts = _starts(node, sizes)
        if starts is not None:
            for index in where:
                yield [None] * starts[index] + list(held)
