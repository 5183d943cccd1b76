"""What a `cut` function sees and does at a node whose tensors lost slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.ir.graph import Constant, Node
from onnxslim.ops.channels.size_vectors import Measured, Sizes, Written, origin

# What stays, by name of the tensor and axis: one truth value per slice. Axes without an entry stay.
Masks: TypeAlias = Mapping[tuple[str, int], NDArray[np.bool_]]
# The same as indices of the slices that stay.
Kept: TypeAlias = Mapping[tuple[str, int], NDArray[np.intp]]


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
        found = origin(self.node, index, position, self._shape)
        return found.value if isinstance(found, Written) else None

    def set_element(self, index: int, position: int, value: int) -> None:
        """Change one element of a vector of sizes; one that measures an axis follows by itself."""
        found = origin(self.node, index, position, self._shape)
        if isinstance(found, Measured):
            return
        assert isinstance(found, Written), "a rule traced an axis whose size it cannot write"
        if found.value != value:
            values = np.array(found.node.constant(found.index))
            values.flat[found.offset] = value
            reader = Cut(found.node, self._shape, self._masks, self._rename, self.opset)
            reader.set_input(found.index, values)
