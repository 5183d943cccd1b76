"""Labels on the slices of tensors: which of them can only be removed together.

Every index of every axis of a tensor carries a label. Operators say which labels must share one fate, by
tying them; the connected components of these ties are the units that pruning removes or keeps. Label 0 is
the fate "stays": what is tied to it is pinned. An axis without labels stays, too.

An axis is usually labelled on its own. A Reshape that splits a labelled axis leaves a block of several axes
with one array of labels for all of them (heads and their channels, groups and their positions). Such a block
is kept for as long as it is only moved, and reduced to one axis when an operator treats one of its axes
differently from the others: that axis is *released*, which ties all labels along it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.ir.graph import Constant, Node, Tensor

Labels: TypeAlias = NDArray[np.int64]
Shape: TypeAlias = tuple[int, ...]

PINNED = 0


@dataclass(frozen=True)
class Block:
    """Labels of one axis, or of several that were one.

    Attributes:
        axes: ascending.
        labels: int64, as long along each of its axes as the tensor is along `axes`.
    """

    axes: tuple[int, ...]
    labels: Labels

    def moved(self, places: Sequence[int]) -> Block:
        """The block with its axes renumbered: axis `axes[i]` becomes `places[i]`."""
        order = np.argsort(places)
        return Block(tuple(int(places[at]) for at in order), np.transpose(self.labels, order))


@dataclass(frozen=True)
class Tie:
    """Labels that an operator ties, pair by pair, and why if it pins them."""

    first: Labels
    second: Labels
    node: Node | None
    why: str


@dataclass(frozen=True)
class Contraction:
    """A place where a layer sums over an axis of its data, weighted by an axis of a constant.

    Attributes:
        node: the layer.
        data, data_axis: what it sums over.
        weight, weight_axis: the constant, and its axis that runs along with the data's.
    """

    node: Node
    data: Tensor
    data_axis: int
    weight: Tensor
    weight_axis: int


class Tracer:
    """Labels of all tensors of a graph, in the order in which operators are visited.

    Args:
        shape: sizes of a tensor; None if they are not known.
        opset: of the standard operators.
        outputs: ids of the graph's outputs.

    Attributes:
        ties: what operators tied, in order.
        contractions: where layers sum over an axis.
        inexact: labels of what cannot be removed as if it were zero, and the operator to blame.
        count: labels in use.
        fixed: ids of the computed tensors that depend on constants alone.
    """

    def __init__(
        self, shape: Callable[[Tensor], Shape | None], opset: int = 17, outputs: frozenset[int] = frozenset()
    ) -> None:
        self.shape = shape
        self.opset = opset
        self.outputs = outputs
        self.ties: list[Tie] = []
        self.contractions: list[Contraction] = []
        self.inexact: list[tuple[Labels, Node]] = []
        self.count = 1
        self.fixed: set[int] = set()
        self._pinned = np.ones(1, bool)
        self._blocks: dict[int, tuple[Block, ...]] = {}
        self._tensors: dict[int, Tensor] = {}

    def fresh(self, count: int) -> Labels:
        """Labels that nothing else has."""
        self.count += count
        if self.count > self._pinned.size:
            self._pinned = np.concatenate([self._pinned, np.zeros(self.count, bool)])
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def blocks(self, tensor: Tensor) -> tuple[Block, ...]:
        """Blocks of a tensor; each axis of a constant is labelled when somebody first asks."""
        if id(tensor) not in self._blocks:
            sizes = tensor.shape if isinstance(tensor, Constant) else ()
            made = tuple(Block((axis,), self.fresh(size)) for axis, size in enumerate(sizes) if size > 1)
            self.label(tensor, made)
        return self._blocks[id(tensor)]

    def label(self, tensor: Tensor, blocks: Iterable[Block]) -> None:
        """Set the blocks of a tensor; a slice that is alone on its axis stays."""
        given = list(blocks)
        for block in given:
            if block.labels.size == 1:
                self.tie(block.labels, np.zeros_like(block.labels), None, f"it is all of '{tensor.name}'")
        self._blocks[id(tensor)] = tuple(block for block in given if block.labels.size > 1)
        self._tensors[id(tensor)] = tensor

    def labelled(self) -> list[tuple[Tensor, tuple[Block, ...]]]:
        """All tensors that have labels, in the order in which they got them."""
        return [(self._tensors[key], blocks) for key, blocks in self._blocks.items() if blocks]

    def tie(self, first: Labels, second: Labels, node: Node | None, why: str = "") -> None:
        """Labels at equal places share one fate; the arrays are broadcast against each other."""
        first, second = np.broadcast_arrays(first, second)
        differ = first != second
        if differ.any():
            self.ties.append(Tie(first[differ], second[differ], node, why))
            pinned = self._pinned[first] | self._pinned[second]
            self._pinned[first[pinned]] = self._pinned[second[pinned]] = True

    def line(self, tensor: Tensor, axis: int, node: Node | None) -> Labels:
        """Labels of one axis: all pinned where it has none; other axes of its block are released."""
        shape = self.shape(tensor)
        assert shape is not None
        for block in self.blocks(tensor):
            if axis in block.axes:
                for other in block.axes:
                    if other != axis:
                        self.release(tensor, other, node, "")
        found = [block for block in self.blocks(tensor) if axis in block.axes]
        return found[0].labels if found else np.zeros(shape[axis], np.int64)

    def is_alive(self, block: Block) -> bool:
        """Whether a part of a block may be removed, as far as is known by now."""
        return not bool(self._pinned[block.labels].all())

    def release(self, tensor: Tensor, axis: int, node: Node | None, why: str) -> None:
        """Make an axis one along which nothing is removed.

        A block of several axes keeps the others: all labels along the released one are tied.
        """
        blocks = []
        for block in self.blocks(tensor):
            if axis in block.axes:
                at = block.axes.index(axis)
                first = np.take(block.labels, [0], axis=at)
                if len(block.axes) == 1:
                    self.tie(block.labels, np.zeros_like(block.labels), node, why)
                    continue
                self.tie(block.labels, first, node)
                block = Block(tuple(each for each in block.axes if each != axis), np.squeeze(first, at))
            blocks.append(block)
        self.label(tensor, blocks)

    def mingle(self, labels: Labels, node: Node) -> None:
        """A node computes with what these labels stand for together; see `inexact`."""
        self.inexact.append((labels, node))

    def components(self) -> Labels:
        """For each label the number of its component; that of PINNED is 0.

        Numbers follow the smallest label, so that the result does not depend on how they are found.
        """
        first = np.concatenate([tie.first for tie in self.ties] or [np.zeros(0, np.int64)])
        second = np.concatenate([tie.second for tie in self.ties] or [np.zeros(0, np.int64)])
        return joined(first, second, self.count)

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on constants alone."""
        return isinstance(tensor, Constant) or id(tensor) in self.fixed

    def pin(self, tensor: Tensor, node: Node | None, why: str) -> None:
        """Keep a tensor whole."""
        for block in self.blocks(tensor):
            self.tie(block.labels, np.zeros_like(block.labels), node, why)


def joined(first: Labels, second: Labels, count: int) -> Labels:
    """Components of a graph of `count` vertices with edges from each `first` to its `second`, by vertex.

    Numbered from 0 in the order of their smallest vertices.
    """
    from scipy import sparse  # takes as long to import as to slim a small model, where nothing needs it
    from scipy.sparse import csgraph

    graph = sparse.coo_array((np.ones(first.size, bool), (first, second)), shape=(count, count))
    _, roots = csgraph.connected_components(graph, directed=False)
    _, where, inverse = np.unique(roots, return_index=True, return_inverse=True)
    rank = np.empty(where.size, np.int64)
    rank[np.argsort(where)] = np.arange(where.size)
    return rank[inverse]


class UnknownSizesError(ValueError):
    """A rule asks for the sizes of a tensor that nobody knows."""


class Trace:
    """What a rule sees and does at one node.

    An input that a rule does not ask about is pinned when it is done: what is not known to be data must not
    change.
    """

    def __init__(self, node: Node, tracer: Tracer) -> None:
        self.node = node
        self.tracer = tracer
        self._read: set[int] = set()

    def shape(self, index: int) -> Shape:
        """Sizes of an input; the rule is not run where one with data is unknown."""
        found = self.tracer.shape(self.node.inputs[index])
        assert found is not None
        return found

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return self.node.input(index) is not None

    def made(self, index: int = 0) -> Shape:
        """Sizes of an output; the rule is not run where those of the first one are unknown.

        Raises:
            UnknownSizesError: they are, of another one.
        """
        found = self.tracer.shape(self.node.outputs[index])
        if found is None:
            raise UnknownSizesError
        return found

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.tracer.opset

    def is_fixed(self, index: int) -> bool:
        """Whether an input depends on constants alone."""
        return self.tracer.is_fixed(self.node.inputs[index])

    def blocks(self, index: int) -> tuple[Block, ...]:
        """Blocks of an input."""
        self._read.add(index)
        return self.tracer.blocks(self.node.inputs[index])

    def labels(self, index: int, axis: int) -> Labels:
        """Labels of one axis of an input: all pinned where it has none; other axes of its block released."""
        self._read.add(index)
        return self.tracer.line(self.node.inputs[index], axis % len(self.shape(index)), self.node)

    def release(self, index: int, axis: int, why: str) -> None:
        """Keep an axis of an input as it is; see `Tracer.release`."""
        self._read.add(index)
        axis %= len(self.shape(index))
        self.tracer.release(self.node.inputs[index], axis, self.node, why)

    def ignore(self, *indices: int) -> None:
        """These inputs may change without harm."""
        self._read.update(indices)

    def tie(self, first: Labels, second: Labels, why: str = "") -> None:
        """Labels at equal places share one fate."""
        self.tracer.tie(first, second, self.node, why)

    def tie_axis(self, index: int, axis: int, labels: Labels) -> None:
        """Tie an axis of an input to labels of the same length; left out inputs and axes of one are free."""
        if self.has(index):
            self._read.add(index)
            if self.shape(index) and self.shape(index)[axis] == labels.size:
                self.tie(self.labels(index, axis), labels, f"axis {axis} of input {index} is fixed")

    def pin(self, labels: Labels, why: str) -> None:
        """Keep what these labels stand for."""
        self.tie(labels, np.zeros_like(labels), why)

    def inexact(self, labels: Labels) -> None:
        """Removing what these labels stand for changes more than setting it to zero does."""
        self.tracer.mingle(labels, self.node)

    def contract(self, data: int, data_axis: int, weight: int, weight_axis: int) -> None:
        """The node sums over an axis of its data along an axis of a weight: tie the two, and note it."""
        self.tie(self.labels(data, data_axis), self.labels(weight, weight_axis), "what it sums over is fixed")
        tensors = self.node.inputs
        self.tracer.contractions.append(
            Contraction(self.node, tensors[data], data_axis, tensors[weight], weight_axis)
        )

    def emit(self, blocks: Iterable[Block], index: int = 0) -> None:
        """Label an output."""
        if index < len(self.node.outputs) and self.node.outputs[index].name:
            self.tracer.label(self.node.outputs[index], blocks)

    def finish(self, why: str) -> None:
        """Pin what the rule did not look at."""
        given = [tensor for tensor in self.node.inputs if tensor.name]
        if given and all(map(self.tracer.is_fixed, given)):
            self.tracer.fixed.update(id(tensor) for tensor in self.node.outputs)
        for index, tensor in enumerate(self.node.inputs):
            if tensor.name and index not in self._read:
                self.tracer.pin(tensor, self.node, why)
