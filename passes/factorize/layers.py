"""What factorization knows of a layer: its weight, its sizes in one run, and how factors take its place.

Weights are [groups, inputs, outputs, *kernel] here (`Layer.kernels`), for convolutions, transposed
convolutions and matrix products alike; a matrix has no kernel axes. So a scheme is one formula for all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Array, Attribute, Constant, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of
from onnxslim.ops import view_of
from onnxslim.ops.layers import Convolution, Layer, Window
from onnxslim.passes.fold.weights import why_computed
from onnxslim.passes.predicates import FLOATS

MATCHES = ("Add", "Gemm")
MAKES = ("Conv",)

Sizes: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Factor:
    """One of the layers that take a layer's place.

    Attributes:
        weight: [groups, inputs, outputs, *kernel].
        axes: the kernel axes whose stride, padding and dilation this factor takes over.
    """

    weight: Array
    axes: Sizes = ()


@dataclass(frozen=True)
class Whole:
    """A layer that can be factorized, with its sizes in one run.

    Attributes:
        view: the layer, of the model that is edited.
        weight: [groups, inputs, outputs, *kernel].
        shape: of its data.
        result: shape of what it makes.
        followed: whether that is read by an Add of one constant per column, and by nothing else.
    """

    view: Layer
    weight: Array
    shape: Sizes
    result: Sizes
    followed: bool = False

    @property
    def node(self) -> Node:
        """The node of the layer."""
        return self.view.node

    @property
    def name(self) -> str:
        """For messages."""
        return self.view.label

    @property
    def output(self) -> str:
        """Name of the tensor it makes, which its last factor makes in its place."""
        return self.node.outputs[0].name

    @property
    def kernel(self) -> Sizes:
        """Size along each kernel axis."""
        return self.weight.shape[3:]

    @property
    def groups(self) -> int:
        """Number of groups; inputs, outputs and ranks are per group."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Per group."""
        return int(self.weight.shape[1])

    @property
    def outputs(self) -> int:
        """Per group."""
        return int(self.weight.shape[2])

    @property
    def depthwise(self) -> bool:
        """Whether a group has one channel on either side, and nothing in between can be smaller."""
        return self.groups > 1 and min(self.inputs, self.outputs) == 1

    @property
    def patch(self) -> int:
        """Values that one result sums over."""
        return self.inputs * math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return self.cost([self.weight.shape], [tuple(range(len(self.kernel)))])

    @cached_property
    def biased(self) -> bool:
        """Whether what it adds to each of its outputs can be changed.

        A MatMul adds nothing itself, but what the Add behind it adds can change.
        """
        return self.followed or (self.view.takes_bias and self.view.bias() is not None)

    def matrix(self) -> Array:
        """The weight as [groups, patch, outputs], float64: what multiplies a patch of the data."""
        moved = np.moveaxis(self.weight, 2, -1).astype(np.float64)
        return moved.reshape(self.groups, self.patch, -1)

    def cost(self, shapes: Sequence[Sizes], axes: Sequence[Sizes]) -> int:
        """Multiply-accumulates of factors with weights of these shapes that take over these kernel axes."""
        kernel = len(self.kernel)
        entering, leaving = (shape[len(shape) - kernel :] for shape in (self.shape, self.result))
        rows = math.prod(self.shape) // (self.groups * self.inputs * math.prod(entering))
        total, now = 0, list(entering)
        for shape, mine in zip(shapes, axes, strict=True):
            before = math.prod(now)
            for axis in mine:
                now[axis] = leaving[axis]
            positions = before if self.view.scatters and mine else math.prod(now)
            total += rows * math.prod(shape) * positions
        return total

    def install(self, edit: Editor, node: Node, factors: Sequence[Factor], bias: Array | None) -> None:
        """Put factors in the place of a node that is this layer, or its copy; a bias replaces its own."""
        if isinstance(self.view, Window):
            _install_convolutions(edit, node, self.view, factors, bias)
        else:
            _install_products(edit, node, self, factors, bias)

    def restore(
        self, edit: Editor, node: Node, data: Tensor, weight: Array, attrs: Mapping[str, Attribute]
    ) -> None:
        """Put one layer like this with this weight in the place of the last of its factors, a node.

        Args:
            edit: of the model.
            node: the last factor; what it adds, the layer adds.
            data: what the layer reads.
            weight: [groups, inputs, outputs, *kernel].
            attrs: of the layer.
        """
        if isinstance(self.view, Window):
            inputs = [data, _constant(edit, node, self.view.pack(weight), 0)]
            attrs = {**attrs, "kernel_shape": weight.shape[3:]}
        else:
            inputs = _beside(self.view, _constant(edit, node, _written(self.view, weight), 0), data)
            flip = "transB" if self.view.weight_index else "transA"
            attrs = {name: value for name, value in attrs.items() if name != flip}
        edit.replace_node(node, self.node.op, [*inputs, *_added(edit, node, None)], attrs)


def _install_convolutions(
    edit: Editor, node: Node, layer: Window, factors: Sequence[Factor], bias: Array | None
) -> None:
    """A chain of convolutions without a bias but the last, so that zeros padded stay zeros."""
    data = node.inputs[0]
    for number, factor in enumerate(factors, 1):
        op, pack = (node.op, layer.pack) if factor.axes else ("Conv", Convolution.pack)
        attrs = _restricted(node.attrs, factor)
        inputs = [data, _constant(edit, node, pack(factor.weight), number)]
        if number == len(factors):
            edit.replace_node(node, op, [*inputs, *_added(edit, node, bias)], attrs)
            break
        made = edit.variable(f"{_stem(node)}_factor{number}_output", data)
        edit.add(node, op, inputs, [made], attrs, name=f"{_stem(node)}_factor{number}")
        data = made


def _install_products(
    edit: Editor, node: Node, whole: Whole, factors: Sequence[Factor], bias: Array | None
) -> None:
    """Two products; the one next to the data transposes it and scales, the other adds."""
    layer = whole.view
    if whole.followed and bias is not None:
        _add_behind(edit, node, bias)
        bias = None
    stem, data = _stem(node), node.inputs[1 - layer.weight_index]
    weights = [_written(layer, factor.weight) for factor in factors]
    first, second = (_constant(edit, node, weight, n) for n, weight in enumerate(weights, 1))
    made = edit.variable(f"{stem}_factor1_output", data)
    inner = _beside(layer, first, data)
    if node.op == "Gemm" and edit.opset < 11:  # where Gemm has to add something
        inner.append(edit.constant(f"{stem}_factor1_zero", np.zeros(1, weights[0].dtype)))
    kept = ("transA" if layer.weight_index else "transB", "alpha")
    attrs = {name: node.attrs[name] for name in kept if name in node.attrs}
    edit.add(node, node.op, inner, [made], attrs, name=f"{stem}_factor1")
    scaled = {"beta": node.attrs["beta"]} if "beta" in node.attrs and bias is None else {}
    edit.replace_node(node, node.op, [*_beside(layer, second, made), *_added(edit, node, bias)], scaled)


def _beside(layer: Layer, weight: Constant, data: Tensor) -> list[Tensor]:
    return [data, weight] if layer.weight_index else [weight, data]


def _written(layer: Layer, weight: Array) -> Array:
    """A matrix as a product without attributes reads it."""
    return np.ascontiguousarray(weight[0] if layer.weight_index else weight[0].T)


def weighted(node: Node) -> Layer | None:
    """The layer at a node, as far as the operator tells, with the weight on the side that is constant."""
    layer = view_of(node)
    if layer is None or isinstance(layer, Window):
        return layer
    left = constant_of(node.inputs[1]) is None and constant_of(node.inputs[0]) is not None
    return view_of(node, weight_index=0) if left else layer


def _adder(node: Node) -> tuple[Node, int] | None:
    """The Add of one constant per column that alone reads a product, and which of its inputs that is."""
    result = node.outputs[0]
    reader = result.outputs[0] if len(result.outputs) == 1 else None
    if reader is None or reader.op != "Add" or reader.domain not in DEFAULT_DOMAINS:
        return None
    index = 1 if reader.inputs[0] is result else 0
    values, weight = constant_of(reader.inputs[index]), constant_of(node.inputs[1])
    if values is None or weight is None or values.ndim == 0 or values.shape[-1] != weight.shape[-1]:
        return None
    return (reader, index) if values.size == values.shape[-1] else None


def _add_behind(edit: Editor, node: Node, bias: Array) -> None:
    """Add to what is added to a node's result."""
    found = _adder(node)
    assert found is not None
    add, index = found
    old = constant_of(add.inputs[index])
    assert old is not None
    edit.set_values(add, index, (old + bias.reshape(old.shape)).astype(old.dtype))


def whole_of(
    layer: Layer, shapes: Mapping[str, Sizes], opset: int, fixed: Collection[int] = ()
) -> Whole | str:
    """What factorization has to know of a layer, or why it cannot be factorized.

    Args:
        layer: of the main graph; see `weighted`.
        shapes: of the tensors in one run, by name.
        opset: of the model.
        fixed: ids of the tensors whose values must stay, such as outputs of the model.
    """
    node, weight = layer.node, layer.node.inputs[layer.weight_index]
    stored = constant_of(weight)
    if stored is None:
        return why_computed(weight)
    if len(weight.outputs) > 1:
        return "its weight is shared with other nodes"
    reason = _unfit(layer, stored, opset)
    if reason:
        return reason
    data, result = shapes.get(layer.data.name), shapes.get(node.outputs[0].name)
    if data is None or result is None:
        return "the size of its data follows from no rule, and was not seen in a run on data"
    if 0 in data:
        return "its data are empty in the run that sizes are taken from"
    right = layer.weight_index == 1 and not layer.takes_bias
    followed = right and id(node.outputs[0]) not in fixed and _adder(node) is not None
    return Whole(layer, layer.kernels(), data, result, followed)


def _unfit(layer: Layer, weight: Array, opset: int) -> str | None:
    if weight.dtype not in FLOATS:
        return f"its weight is of type {weight.dtype}"
    if not isinstance(layer, Window) and weight.ndim != 2:
        return "its weight is not a matrix"
    if layer.node.op == "Gemm" and opset < 7:
        return "Gemm before opset 7 broadcasts in another way"
    return None


def _stem(node: Node) -> str:
    return node.name or node.outputs[0].name


def _constant(edit: Editor, node: Node, values: Array, number: int) -> Constant:
    return edit.constant(f"{_stem(node)}_factor{number}_weight", values)


def _added(edit: Editor, node: Node, bias: Array | None) -> list[Tensor]:
    """Input 2 of the last factor: that of the node, or another one in its place."""
    if bias is not None:
        return [edit.constant(f"{_stem(node)}_bias", bias)]
    return [] if node.input(2) is None else [node.inputs[2]]


# Attributes of convolutions with one value per kernel axis, and its value where nothing is to happen.
_PER_AXIS = {"strides": 1, "dilations": 1, "output_padding": 0}


def _restricted(attrs: Mapping[str, Attribute], factor: Factor) -> dict[str, Attribute]:
    """Attributes of a convolution on the kernel axes of a factor alone."""
    kernel = factor.weight.shape[3:]
    found: dict[str, Attribute] = {"kernel_shape": tuple(kernel)}
    if factor.weight.shape[0] > 1:
        found["group"] = factor.weight.shape[0]
    if not factor.axes:
        return found
    mine = [axis in factor.axes for axis in range(len(kernel))]
    for name, nothing in _PER_AXIS.items():
        if name in attrs:
            found[name] = tuple(v if use else nothing for v, use in zip(attrs[name], mine, strict=True))
    if "pads" in attrs:
        found["pads"] = tuple(v if use else 0 for v, use in zip(attrs["pads"], mine * 2, strict=True))
    found.update({name: attrs[name] for name in ("auto_pad", "output_shape") if name in attrs})
    return found
