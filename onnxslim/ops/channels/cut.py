"""What a `cut` function sees and does at a node whose tensors lost slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.graph import Constant, Node, Tensor

# What stays, by name of the tensor and axis: one truth value per slice. Axes without an entry stay.
Masks: TypeAlias = Mapping[tuple[str, int], NDArray[np.bool_]]


# Sizes of a tensor before the cut; None if they are not known.
Sizes: TypeAlias = Callable[[Tensor], "tuple[int, ...] | None"]


class Cut:
    """A node, the shapes its tensors had and what stays of them.

    Args:
        node: edited in place.
        shape: sizes of a tensor before the cut.
        masks: what stays.
        rename: makes a free name of a wanted one.
        opset: of the standard operators.
    """

    def __init__(
        self,
        node: Node,
        shape: Sizes,
        masks: Masks,
        rename: Callable[[str], str],
        opset: int = 17,
    ) -> None:
        self.node = node
        self.opset = opset
        self._shape = shape
        self._masks = masks
        self._rename = rename

    def before(self, index: int) -> tuple[int, ...]:
        """Sizes that an input had."""
        return self._shape(self.node.inputs[index]) or ()

    def made(self, index: int = 0) -> tuple[int, ...]:
        """Sizes that an output had."""
        return self._shape(self.node.outputs[index]) or ()

    def kept(self, index: int, axis: int) -> NDArray[np.bool_] | None:
        """What stays of an axis of an input; None for all of it."""
        return self._masks.get((self.node.inputs[index].name, axis))

    def kept_made(self, axis: int, index: int = 0) -> NDArray[np.bool_] | None:
        """What stays of an axis of an output; None for all of it."""
        return self._masks.get((self.node.outputs[index].name, axis))

    def size(self, index: int, axis: int) -> int:
        """Size of an axis of an input after the cut."""
        kept = self.kept(index, axis)
        return self.before(index)[axis] if kept is None else int(kept.sum())

    def size_made(self, axis: int, index: int = 0) -> int:
        """Size of an axis of an output after the cut."""
        kept = self.kept_made(axis, index)
        return self.made(index)[axis] if kept is None else int(kept.sum())

    def changed(self, index: int = 0) -> list[int]:
        """Axes of an output that lost slices."""
        return [axis for axis in range(len(self.made(index))) if self.kept_made(axis, index) is not None]

    def set_input(self, index: int, values: NDArray[np.generic]) -> None:
        """Give the node a constant of its own at an input."""
        while len(self.node.inputs) <= index:
            self.node.inputs.append(Constant("", np.empty(0)))
        old = self.node.inputs[index]
        name = self._rename(old.name or f"{self.node.label}/{index}")
        self.node.inputs[index] = Constant(name, values)

    def element(self, index: int, position: int) -> int | None:
        """An element of a vector of sizes; None if it is computed."""
        return written(self.node, index, position, self._shape)

    def set_element(self, index: int, position: int, value: int) -> None:
        """Change one element of a vector of sizes: a constant, or a Concat of vectors that is one there."""
        place = locate(self.node, index, position, self._shape)
        assert place is not None, "a rule traced an axis whose size it cannot write"
        node, at, offset = place
        values = np.array(node.constant(at))
        if values.flat[offset] == value:
            return
        values.flat[offset] = value
        Cut(node, self._shape, self._masks, self._rename, self.opset).set_input(at, values)


def locate(node: Node, index: int, position: int, shape: Sizes) -> tuple[Node, int, int] | None:
    """Where an element of a vector of sizes is written: the node, its input, and the place in that constant.

    Returns:
        None if the element is computed, or if somebody else reads the vector it is part of.
    """
    place = _source(node, index, position, shape)
    return place[0] if place is not None and place[1] else None


def written(node: Node, index: int, position: int, shape: Sizes) -> int | None:
    """An element of a vector of sizes, wherever it is written; None if it is computed."""
    place = _source(node, index, position, shape)
    if place is None:
        return None
    (at, which, offset), _ = place
    return int(np.asarray(at.constant(which)).flat[offset])


def _source(node: Node, index: int, position: int, shape: Sizes) -> tuple[tuple[Node, int, int], bool] | None:
    """The place of an element, followed through Concat and Where, and whether nobody else reads it."""
    alone = True
    while (tensor := node.input(index)) is not None:
        if isinstance(tensor, Constant):
            return (node, index, position if tensor.size > 1 else 0), alone
        maker = tensor.inputs[0] if tensor.inputs else None
        step = _STEPS[maker.op](maker, position, shape) if maker and maker.op in _STEPS else None
        if maker is None or step is None:
            return None
        alone = alone and len(tensor.outputs) == 1
        node, (index, position) = maker, step
    return None


def _into_concat(node: Node, position: int, shape: Sizes) -> tuple[int, int] | None:
    for index, piece in enumerate(node.inputs):
        sizes = shape(piece)
        if sizes is None or len(sizes) != 1:
            return None
        if position < sizes[0]:
            return index, position
        position -= sizes[0]
    return None


def _into_where(node: Node, position: int, shape: Sizes) -> tuple[int, int] | None:
    condition = node.constant(0)
    if condition is None or condition.ndim != 1 or condition.size <= position:
        return None
    return (1 if condition[position] else 2), position


_STEPS = {"Concat": _into_concat, "Where": _into_where}
