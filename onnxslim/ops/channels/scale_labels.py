"""Labels of scales: what the slices of tensors may be divided by without changing what a network computes.

A tensor whose slices are divided by numbers is made by a layer, whose weight takes these in, and read by
layers, whose weights undo them. The tracer is that of pruning: operators tie labels that have to have one
scale, and label 0 is the scale one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from onnxslim.ir.graph import Constant, Node, Tensor
from onnxslim.ops.channels.labels import Block, Labels, Shape, Trace, Tracer
from onnxslim.ops.layers import Layer


@dataclass(frozen=True, eq=False)
class Absorbed:
    """A constant that is multiplied by scales to a power of 1 or -1.

    Attributes:
        node, index: what reads it, and where.
        axes: of the constant, broadcast as far as it has to be, counted from the end.
        labels: of the scales, as long along each of their axes as the constant is along `axes`, or is to be.
        power: of the scales.
    """

    node: Node
    index: int
    axes: tuple[int, ...]
    labels: Labels
    power: int


@dataclass(frozen=True, eq=False)
class Mixed:
    """A layer whose weight takes scales in.

    Attributes:
        layer: it.
        reads: labels of its input channels, all groups; None where nothing is scaled.
        makes: labels of its output channels.
    """

    layer: Layer
    reads: Labels | None
    makes: Labels


class ScaleTracer(Tracer):
    """Labels of scales. Constants have none of their own: they take those of tensors in.

    Attributes:
        absorbed: constants that do.
        mixed: layers whose weights do.
    """

    def __init__(
        self, shape: Callable[[Tensor], Shape | None], opset: int = 17, outputs: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(shape, opset, outputs)
        self.absorbed: list[Absorbed] = []
        self.mixed: list[Mixed] = []

    def blocks(self, tensor: Tensor) -> tuple[Block, ...]:
        """See `Tracer`."""
        return () if isinstance(tensor, Constant) else super().blocks(tensor)

    def mingle(self, labels: Labels, node: Node) -> None:
        """See `Tracer`: what is computed of several slices together needs one scale for all."""
        self.tie(labels, np.zeros_like(labels), node, "it computes with several slices together")


class ScaleTrace(Trace):
    """What a rule for scales sees and does at one node."""

    tracer: ScaleTracer

    def __init__(self, node: Node, tracer: ScaleTracer) -> None:
        super().__init__(node, tracer)

    def absorb(self, index: int, axes: Iterable[int], labels: Labels, power: int) -> None:
        """A constant takes these scales in, if it is there; see `Absorbed`."""
        if self.has(index):
            self.tracer.absorbed.append(Absorbed(self.node, index, tuple(axes), labels, power))

    def mix(self, layer: Layer, reads: Labels | None, makes: Labels) -> None:
        """The weight of a layer takes scales in, and its bias; see `Mixed`."""
        self.tracer.mixed.append(Mixed(layer, reads, makes))
        self.absorb(2, (-1,), makes, -1)

    def only(self, axis: int) -> Labels | None:
        """Labels along one axis of the data, whose other axes stay; None if there are none."""
        for block in self.blocks(0):
            if axis not in block.axes:
                self.pin(block.labels, "it is scaled along another axis")
        return self.labels(0, axis) if any(axis in block.axes for block in self.blocks(0)) else None

    def makes(self, axis: int) -> Labels:
        """New labels along an axis of the output."""
        labels = self.tracer.fresh(self.made()[axis])
        self.emit([Block((axis,), labels)])
        return labels
