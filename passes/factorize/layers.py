"""What factorization knows of a layer: its weight in one layout, its sizes, and how factors take its place.

The layout is [groups, inputs, outputs, *kernel], inputs and outputs per group, for convolutions, transposed
convolutions and matrix products alike; a matrix has no kernel axes. In it, a scheme is one formula for all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Array, Attribute, Constant, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of
from onnxslim.passes.predicates import FLOATS

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
class Layer:
    """A layer that can be factorized.

    Attributes:
        node: in the model that is edited.
        form: how its operator reads and writes weights.
        weight: [groups, inputs, outputs, *kernel].
        shape: of its data in one run.
        entering, leaving: size of each kernel axis of its data and of its result; of a matrix product, ().
        rows: vectors that are multiplied in one run, apart from those along kernel axes.
    """

    node: Node
    form: Form
    weight: Array
    shape: Sizes
    entering: Sizes
    leaving: Sizes
    rows: int

    @property
    def name(self) -> str:
        """For messages."""
        return self.node.label

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

    def matrix(self) -> Array:
        """The weight as [groups, patch, outputs], float64: what multiplies a patch of the data."""
        moved = np.moveaxis(self.weight, 2, -1).astype(np.float64)
        return moved.reshape(self.groups, self.patch, -1)

    def cost(self, shapes: Sequence[Sizes], axes: Sequence[Sizes]) -> int:
        """Multiply-accumulates of factors with weights of these shapes that take over these kernel axes."""
        total, now = 0, list(self.entering)
        for shape, mine in zip(shapes, axes, strict=True):
            before = math.prod(now)
            for axis in mine:
                now[axis] = self.leaving[axis]
            positions = before if self.form.scatters and mine else math.prod(now)
            total += self.rows * math.prod(shape) * positions
        return total


class Form(ABC):
    """How an operator reads and writes its weight.

    Attributes:
        weight_index: the input that is the weight.
        scatters: whether every input, not every output, is multiplied with the whole kernel.
        gathers: whether its result is a matrix of patches of its data times the weight.
    """

    weight_index = 1
    scatters = False
    gathers = True

    @abstractmethod
    def read(self, node: Node, weight: Array) -> Array:
        """A stored weight in the common layout."""

    @abstractmethod
    def sizes(self, data: Sizes, result: Sizes, inputs: int) -> tuple[Sizes, Sizes, int]:
        """`entering`, `leaving` and `rows` of a layer."""

    @abstractmethod
    def bias(self, node: Node, outputs: int) -> Array | None:
        """What it adds to each of its outputs; None if it cannot, or adds something else."""

    def scale(self, node: Node) -> float:
        """Factor of the product of data and weight."""
        return 1.0

    @abstractmethod
    def install(self, edit: Editor, node: Node, factors: Sequence[Factor], bias: Array | None) -> None:
        """Put factors in the place of a node; a bias replaces its own."""

    @abstractmethod
    def restore(
        self, edit: Editor, node: Node, data: Tensor, weight: Array, attrs: Mapping[str, Attribute]
    ) -> None:
        """Put one layer with this weight and these attributes in the place of the last of its factors."""


class Convolution(Form):
    """Conv: W [outputs, inputs / groups, *kernel]."""

    op = "Conv"

    def read(self, node: Node, weight: Array) -> Array:
        """Outputs are grouped."""
        split = weight.reshape(int(node.attrs.get("group", 1)), -1, *weight.shape[1:])
        return np.swapaxes(split, 1, 2)

    def write(self, weight: Array) -> Array:
        """A weight as it is stored."""
        swapped = np.swapaxes(weight, 1, 2)
        return np.ascontiguousarray(swapped.reshape(-1, *swapped.shape[2:]))

    def sizes(self, data: Sizes, result: Sizes, inputs: int) -> tuple[Sizes, Sizes, int]:
        """The batch is what there is besides channels and kernel axes."""
        return data[2:], result[2:], data[0]

    def bias(self, node: Node, outputs: int) -> Array | None:
        """Its third input."""
        return np.zeros(outputs) if node.input(2) is None else constant_of(node.inputs[2])

    def install(self, edit: Editor, node: Node, factors: Sequence[Factor], bias: Array | None) -> None:
        """A chain of convolutions without a bias but the last, so that zeros padded stay zeros."""
        data = node.inputs[0]
        for number, factor in enumerate(factors, 1):
            form: Convolution = self if factor.axes else Convolution()
            attrs = _restricted(node.attrs, factor)
            inputs = [data, _constant(edit, node, form.write(factor.weight), number)]
            if number == len(factors):
                edit.replace_node(node, form.op, [*inputs, *_added(edit, node, bias)], attrs)
                break
            made = edit.variable(f"{_stem(node)}_factor{number}_output", data)
            edit.add(node, form.op, inputs, [made], attrs, name=f"{_stem(node)}_factor{number}")
            data = made

    def restore(
        self, edit: Editor, node: Node, data: Tensor, weight: Array, attrs: Mapping[str, Attribute]
    ) -> None:
        """The bias is that of the last."""
        inputs = [data, _constant(edit, node, self.write(weight), 0), *_added(edit, node, None)]
        edit.replace_node(node, self.op, inputs, {**attrs, "kernel_shape": weight.shape[3:]})


class TransposedConvolution(Convolution):
    """ConvTranspose: W [inputs, outputs / groups, *kernel]."""

    op = "ConvTranspose"
    scatters = True

    def read(self, node: Node, weight: Array) -> Array:
        """Inputs are grouped."""
        return weight.reshape(int(node.attrs.get("group", 1)), -1, *weight.shape[1:])

    def write(self, weight: Array) -> Array:
        """A weight as it is stored."""
        return np.ascontiguousarray(weight.reshape(-1, *weight.shape[2:]))


class Product(Form):
    """Gemm and MatMul with a constant matrix on one side.

    A constant on the left is transposed, so that in the common layout data always comes from the left.

    Args:
        weight_index: the input that is the weight.
        followed: whether the node's result is read by an Add of one constant per column, and by nothing else.
    """

    def __init__(self, weight_index: int, followed: bool = False) -> None:
        self.weight_index = weight_index
        self.gathers = weight_index == 1
        self._followed = followed

    def read(self, node: Node, weight: Array) -> Array:
        """Transposed as far as the operator says so and the side demands."""
        flipped = bool(node.attrs.get("transB" if self.weight_index else "transA", 0))
        return (weight.T if flipped != (self.weight_index == 0) else weight)[None]

    def sizes(self, data: Sizes, result: Sizes, inputs: int) -> tuple[Sizes, Sizes, int]:
        """Every vector of the data is a row."""
        return (), (), math.prod(data) // inputs

    def bias(self, node: Node, outputs: int) -> Array | None:
        """Of a Gemm with data on the left, its third input if that is one value per column.

        A MatMul adds nothing itself, but what the Add behind it adds can change.
        """
        if self._followed:
            return np.zeros(outputs)
        if node.op != "Gemm" or self.weight_index == 0:
            return None
        if node.input(2) is None:
            return np.zeros(outputs)
        values = constant_of(node.inputs[2])
        if values is None or values.shape not in ((outputs,), (1, outputs)):
            return None
        scaled: Array = values.reshape(-1) * float(node.attrs.get("beta", 1.0))
        return scaled

    def scale(self, node: Node) -> float:
        """The alpha of a Gemm."""
        return float(node.attrs.get("alpha", 1.0))

    def install(self, edit: Editor, node: Node, factors: Sequence[Factor], bias: Array | None) -> None:
        """Two products; the one next to the data transposes it and scales, the other adds."""
        if self._followed and bias is not None:
            _add_behind(edit, node, bias)
            bias = None
        stem, data = _stem(node), node.inputs[1 - self.weight_index]
        weights = [self._written(factor.weight[0]) for factor in factors]
        first, second = (_constant(edit, node, weight, n) for n, weight in enumerate(weights, 1))
        made = edit.variable(f"{stem}_factor1_output", data)
        inner = self._beside(first, data)
        if node.op == "Gemm" and edit.opset < 11:  # where Gemm has to add something
            inner.append(edit.constant(f"{stem}_factor1_zero", np.zeros(1, weights[0].dtype)))
        kept = ("transA" if self.weight_index else "transB", "alpha")
        attrs = {name: node.attrs[name] for name in kept if name in node.attrs}
        edit.add(node, node.op, inner, [made], attrs, name=f"{stem}_factor1")
        scaled = {"beta": node.attrs["beta"]} if "beta" in node.attrs and bias is None else {}
        outer = [*self._beside(second, made), *_added(edit, node, bias)]
        edit.replace_node(node, node.op, outer, scaled)

    def restore(
        self, edit: Editor, node: Node, data: Tensor, weight: Array, attrs: Mapping[str, Attribute]
    ) -> None:
        """What is added is what the last adds."""
        constant = _constant(edit, node, self._written(weight[0]), 0)
        inputs = [*self._beside(constant, data), *_added(edit, node, None)]
        flip = "transB" if self.weight_index else "transA"
        kept = {name: value for name, value in attrs.items() if name != flip}
        edit.replace_node(node, node.op, inputs, kept)

    def _beside(self, weight: Constant, data: Tensor) -> list[Tensor]:
        return [data, weight] if self.weight_index else [weight, data]

    def _written(self, weight: Array) -> Array:
        return np.ascontiguousarray(weight if self.weight_index else weight.T)


def form_of(node: Node, fixed: Collection[int] = ()) -> Form | None:
    """How this node reads its weight; None if it is no layer.

    Args:
        node: in the default domain.
        fixed: ids of the tensors whose values must stay.
    """
    if node.op == "Conv":
        return Convolution()
    if node.op == "ConvTranspose":
        return TransposedConvolution()
    if node.op not in ("Gemm", "MatMul"):
        return None
    left = constant_of(node.inputs[1]) is None and constant_of(node.inputs[0]) is not None
    behind = None if left or node.op == "Gemm" or id(node.outputs[0]) in fixed else _adder(node)
    return Product(0 if left else 1, behind is not None)


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


def layer_of(node: Node, shapes: Mapping[str, Sizes], opset: int, fixed: Collection[int] = ()) -> Layer | str:
    """The layer at a node that has a form, or why it cannot be factorized.

    Args:
        node: of the main graph.
        shapes: of the tensors in one run, by name.
        opset: of the model.
        fixed: ids of the tensors whose values must stay, such as outputs of the model.
    """
    form = form_of(node, fixed)
    assert form is not None
    stored = constant_of(node.inputs[form.weight_index])
    if stored is None:
        return _not_stored(node.inputs[form.weight_index])
    if len(node.inputs[form.weight_index].outputs) > 1:
        return "its weight is shared with other nodes"
    reason = _unfit(node, stored, opset)
    if reason:
        return reason
    weight = form.read(node, stored)
    data = shapes.get(node.inputs[1 - form.weight_index].name)
    result = shapes.get(node.outputs[0].name)
    if data is None or result is None or 0 in data:
        return "the size of its data is not known; give data, or fix the sizes of the inputs"
    return Layer(node, form, weight, data, *form.sizes(data, result, weight.shape[1]))


def _not_stored(weight: Tensor) -> str:
    dequantized = bool(weight.inputs) and weight.inputs[0].op == "DequantizeLinear"
    return "its weight is quantized" if dequantized else "its weight is not constant"


def _unfit(node: Node, weight: Array, opset: int) -> str | None:
    if weight.dtype not in FLOATS:
        return f"its weight is of type {weight.dtype}"
    if node.op in ("Gemm", "MatMul") and weight.ndim != 2:
        return "its weight is not a matrix"
    if node.op == "Gemm" and opset < 7:
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
