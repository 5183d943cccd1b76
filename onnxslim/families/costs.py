"""Multiply-accumulates and parameters of a model as functions of how many units its families keep."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from onnxslim.families.analysis import Analysis, Family
from onnxslim.ir.graph import Constant, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.ops import spec_of

Counts = Mapping[str, int]  # units that go, by name of their family


@dataclass(frozen=True)
class _Shape:
    """Sizes of a tensor, and by how much each shrinks with every unit of a family that goes."""

    sizes: tuple[int, ...]
    losses: tuple[tuple[int, str, int], ...]  # axis, family, slices per unit

    def after(self, gone: Counts) -> tuple[int, ...]:
        sizes = list(self.sizes)
        for axis, family, width in self.losses:
            sizes[axis] -= width * gone.get(family, 0)
        return tuple(sizes)

    @cached_property
    def families(self) -> frozenset[str]:
        return frozenset(family for _, family, _ in self.losses)


class Costs:
    """What a model costs after a cut, without making it.

    Args:
        model: the analyzed model.
        analysis: of the model; multiply-accumulates are those of the sizes it was made for.

    Whole branches may be gone as well: `without` names what their nodes make first, and their constants.
    """

    def __init__(self, model: Model, analysis: Analysis) -> None:
        self._uncounted = 0
        self._nodes = model.graph.nodes
        losses: dict[str, list[tuple[int, str, int]]] = {}
        for family in analysis.families:
            for member in family.members:
                losses.setdefault(member.tensor, []).append((member.axis, family.name, member.width))

        def shape(tensor: Tensor) -> _Shape | None:
            sizes = tensor.shape if isinstance(tensor, Constant) else analysis.sizes.get(tensor.name)
            return None if sizes is None else _Shape(sizes, tuple(losses.get(tensor.name, ())))

        self._shape = shape
        self._layers = [
            layer for node in model.graph.nodes if spec_of(node).macs if (layer := _Layer.of(node, shape))
        ]
        constants = {
            tensor.name: tensor
            for node in model.graph.nodes
            for tensor in node.inputs
            if isinstance(tensor, Constant)
        }
        known = {name: shape(tensor) for name, tensor in constants.items()}
        self._constants = {name: found for name, found in known.items() if found is not None}
        self._uncounted = model.stats().parameters - self.parameters({})

    def per_unit(self, family: Family) -> tuple[int, int]:
        """Parameters and multiply-accumulates that go with one unit of a family alone."""
        one = {family.name: 1}
        return self.parameters({}) - self.parameters(one), self.macs({}) - self.macs(one)

    def shares(self, gone: Counts) -> dict[str, float]:
        """What is left, where it is less than all.

        Returns:
            Of multiply-accumulates by the name of what a node makes, of elements by that of a constant.
        """
        counts = [(layer.name, layer.macs(gone), layer.macs({})) for layer in self._layers]
        for name, shape in self._constants.items():
            counts.append((name, math.prod(shape.after(gone)), math.prod(shape.sizes)))
        return {name: now / whole for name, now, whole in counts if now < whole}

    def macs(self, gone: Counts, without: Collection[str] = ()) -> int:
        """Multiply-accumulates of the main graph."""
        return sum(layer.macs(gone) for layer in self._layers if layer.name not in without)

    def parameters(self, gone: Counts, without: Collection[str] = ()) -> int:
        """Elements of the constants, those in bodies included."""
        left = (shape for name, shape in self._constants.items() if name not in without)
        return sum(math.prod(shape.after(gone)) for shape in left) + self._uncounted

    @cached_property
    def works(self) -> list[NodeWork]:
        """What every node has to do, as far as it is known."""
        layers = {layer.name: layer for layer in self._layers}
        made = ((node.outputs[0].name, self._shape(node.outputs[0])) for node in self._nodes if node.outputs)
        return [
            NodeWork(name, shape, layers.get(name))
            for name, shape in made
            if name in layers or shape is not None
        ]


class NodeWork:
    """What one node has to do: multiply-accumulates if it is a layer, else elements that it makes.

    Attributes:
        name: of what it makes first.
        macs, elements: of the whole; 0 where that is not known.
    """

    def __init__(self, name: str, shape: _Shape | None, layer: _Layer | None) -> None:
        self.name = name
        self._shape, self._layer = shape, layer
        self.macs = layer.macs({}) if layer is not None else 0
        self.elements = math.prod(shape.sizes) if shape is not None else 0

    def left(self, gone: Counts) -> float:
        """The share of it that is left."""
        if self._layer is not None and self.macs:
            return self._layer.macs(gone) / self.macs
        if self._shape is None or not self.elements or not self._shape.families & gone.keys():
            return 1.0
        return math.prod(self._shape.after(gone)) / self.elements


class _Layer:
    """A node that multiplies, with shapes that can be changed."""

    def __init__(self, node: Node, shapes: Mapping[str, _Shape]) -> None:
        inputs, outputs = (
            [
                Variable(each.name, None, shapes[each.name].sizes if each.name in shapes else None)
                for each in tensors
            ]
            for tensors in (node.inputs, node.outputs)
        )
        self._tensors = [*inputs, *outputs]
        self.name = outputs[0].name
        self._node = Node(node.op, node.name, node.attrs, inputs, outputs, node.domain)
        self._shapes = shapes
        self._families = sorted(frozenset().union(*(shape.families for shape in shapes.values())))
        self._known: dict[tuple[int, ...], int] = {}

    @classmethod
    def of(cls, node: Node, shape: object) -> _Layer | None:
        """The layer, if the shapes of its inputs and of its first output are known."""
        assert callable(shape)
        found = {each.name: shape(each) for each in (*node.inputs, *node.outputs[:1]) if each.name}
        if any(each is None for each in found.values()):
            return None
        more = {each.name: shape(each) for each in node.outputs[1:] if each.name}
        known = {name: each for name, each in (found | more).items() if each is not None}
        return cls(node, {**known, "": _Shape((), ())})

    def macs(self, gone: Counts) -> int:
        key = tuple(gone.get(family, 0) for family in self._families)
        if key not in self._known:
            for tensor in self._tensors:
                if tensor.name in self._shapes:
                    tensor.shape = self._shapes[tensor.name].after(gone)
            count = spec_of(self._node).macs
            self._known[key] = (count(self._node) if count else 0) or 0
        return self._known[key]
