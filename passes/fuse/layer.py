"""Layers with constant weights, seen as one product per channel: what folding a factor or a shift needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Array, Constant, Node
from onnxslim.passes import predicates
from onnxslim.passes.fuse import uniform

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# A BatchNormalization has one weight per channel: its scale.
LAYERS = (*PRODUCTS, "BatchNormalization")
# ONNX Runtime has a fast Gemm for these; for others MatMul is faster, or there is no Gemm at all.
GEMM_TYPES = frozenset(map(np.dtype, (np.float32, np.float64)))


@dataclass(frozen=True)
class Layer:
    """A Conv, ConvTranspose, Gemm, MatMul or BatchNormalization whose weight is in the model.

    Attributes:
        node: the operator.
        weight: its second input; of a ConstantOfShape, a uniform array.
        groups: of a convolution; 1 for products.
        rank: number of axes of its output; None if unknown.
    """

    node: Node
    weight: Array
    groups: int
    rank: int | None

    @property
    def axis(self) -> int:
        """The axis of the output that runs over its channels, counted from the end if the rank is unknown."""
        return 1 if self.node.op != "MatMul" else -1 if self.rank is None else self.rank - 1

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        shape = self.weight.shape
        if self.node.op in ("Conv", "BatchNormalization"):
            return int(shape[0])
        if self.node.op == "ConvTranspose":
            return int(shape[1]) * self.groups
        return int(shape[0 if self.node.attrs.get("transB", 0) else -1])

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        shape = self.weight.shape
        if self.node.op == "Conv":
            return int(shape[1]) * self.groups
        if self.node.op == "ConvTranspose":
            return int(shape[0])
        return int(shape[-1 if self.node.attrs.get("transB", 0) else -2])

    def along_outputs(self, values: Array) -> Array:
        """One value per output channel, in a shape that broadcasts against the weight."""
        tail = (1,) * (self.weight.ndim - 2)
        if self.node.op == "Conv":
            return values.reshape(-1, 1, *tail)
        if self.node.op == "ConvTranspose":
            # [C, M/groups, ...]: the first C/groups rows make the first M/groups channels.
            rows = np.repeat(values.reshape(self.groups, -1), self.weight.shape[0] // self.groups, axis=0)
            return rows.reshape(*rows.shape, *tail)
        return values.reshape(-1, 1) if self.node.attrs.get("transB", 0) else values

    def along_inputs(self, values: Array) -> Array:
        """One value per input channel, in a shape that broadcasts against the weight."""
        tail = (1,) * (self.weight.ndim - 2)
        if self.node.op == "Conv":
            # [M, C/groups, ...]: the first M/groups rows read the first C/groups channels.
            rows = np.repeat(values.reshape(self.groups, -1), self.weight.shape[0] // self.groups, axis=0)
            return rows.reshape(*rows.shape, *tail)
        if self.node.op == "ConvTranspose":
            return values.reshape(-1, 1, *tail)
        return values if self.node.attrs.get("transB", 0) else values.reshape(-1, 1)

    def sum_over_inputs(self, shift: Array) -> Array:
        """What each output channel gets if this much is added to every element of each input channel."""
        alpha = self.node.attrs.get("alpha", 1.0) if self.node.op == "Gemm" else 1.0
        product = self.weight.astype(np.float64) * self.along_inputs(shift) * alpha
        inner = (1,) if self.node.attrs.get("transB", 0) else (0,)
        return np.asarray(
            product.sum(axis=tuple(range(1, product.ndim)) if self.node.op == "Conv" else inner)
        )


def layer(node: Node | None, edit: Editor) -> Layer | None:
    """The layer a node is; None if its weight is computed, stored sparsely or not of a float type."""
    if node is None or node.op not in LAYERS:
        return None
    tensor = node.inputs[1]
    stored = tensor.proto if isinstance(tensor, Constant) else None
    weight = None if isinstance(stored, onnx.SparseTensorProto) else uniform.values(tensor, edit)
    if weight is None or weight.dtype not in predicates.FLOATS:
        return None
    if node.op == "BatchNormalization":
        ready = weight.ndim == 1 and training(node, edit) is None
        return Layer(node, weight, 1, predicates.rank(edit.shape(node.inputs[0]))) if ready else None
    if weight.ndim < 2:
        return None
    groups = int(node.attrs.get("group", 1))
    if groups < 1 or weight.shape[0] % groups:
        return None
    return Layer(
        node, weight, groups, weight.ndim if node.op != "MatMul" else _product_rank(node, weight, edit)
    )


def training(node: Node, edit: Editor) -> str | None:
    """Why a BatchNormalization is no fixed scale and shift per channel, if it is not."""
    if node.attrs.get("training_mode", 0) or any(out.name for out in node.outputs[1:]):
        return "it is in training mode"
    if edit.opset < 9 and not node.attrs.get("spatial", 1):
        return "it normalizes every position by itself"
    return None


def _product_rank(node: Node, weight: Array, edit: Editor) -> int | None:
    data = predicates.rank(edit.shape(node.inputs[0]))
    if data is None:
        return None
    return max(data, weight.ndim) if data > 1 else weight.ndim - 1


def bias(found: Layer, edit: Editor) -> Array | None:
    """What the layer adds per output channel, in double precision.

    None if that is computed, or is no single value per channel.
    """
    node = found.node
    if not _has_bias(node):
        return np.zeros(found.outputs)
    values = uniform.value(node, 2, edit)
    if values is None:
        return None
    if node.op != "Gemm":
        return values.astype(np.float64)
    added = per_channel(values, found.rank, found.axis, found.outputs)
    return None if added is None else added * node.attrs.get("beta", 1.0)


def _has_bias(node: Node) -> bool:
    return node.op != "MatMul" and node.input(2) is not None


@dataclass(frozen=True)
class Folded:
    """Values that take the place of a layer's; None where they stay."""

    weight: Array | None = None
    bias: Array | None = None


def fold(
    found: Layer,
    edit: Editor,
    *,
    outputs: Array | None = None,
    shift: Array | None = None,
    inputs: Array | None = None,
    input_shift: Array | None = None,
) -> Folded | str:
    """The layer's values so that it does to x what `layer(x * inputs + input_shift) * outputs + shift` did.

    Args:
        found: the layer.
        edit: where it is.
        outputs, shift: factor and summand of each output channel.
        inputs, input_shift: factor and summand of each input channel.

    Returns:
        Or why there are none.
    """
    weight, added = None, None
    with np.errstate(all="ignore"):
        if not (outputs is None and shift is None and input_shift is None):
            added = _new_bias(found, edit, outputs, shift, input_shift)
            if added is None:
                return "its bias is computed, or is not one value per channel"
        if not (outputs is None and inputs is None):
            factors = [] if inputs is None else [found.along_inputs(inputs)]
            factors += [] if outputs is None else [found.along_outputs(outputs)]
            weight = uniform.scaled(found.weight, *factors)
            if weight is None:
                return "its weight repeats one number, and would have to be written out"
    return _fitting(found, edit, weight, added)


def _new_bias(
    found: Layer,
    edit: Editor,
    outputs: Array | None,
    shift: Array | None,
    input_shift: Array | None,
) -> Array | None:
    added = bias(found, edit)
    if added is None:
        return None
    added = added if input_shift is None else added + found.sum_over_inputs(input_shift)
    added = added if outputs is None else added * outputs
    return added if shift is None else added + shift


def _fitting(found: Layer, edit: Editor, weight: Array | None, added: Array | None) -> Folded | str:
    if added is not None and not _has_bias(found.node) and not added.any():
        added = None
    if added is not None and found.node.op == "MatMul" and not can_be_gemm(found):
        return (
            "MatMul has no bias, and only a product of two matrices in single or double precision is a Gemm"
        )
    if weight is not None and not _may_replace(found, edit):
        return "the weight is shared"
    dtype = found.weight.dtype
    folded = Folded(
        None if weight is None else uniform.rounded(weight, dtype),
        None if added is None else predicates.rounded(added, dtype),
    )
    if (folded.weight is None) != (weight is None) or (folded.bias is None) != (added is None):
        return f"the result does not fit {dtype}"
    return folded


def _may_replace(found: Layer, edit: Editor) -> bool:
    """Whether other values for this layer alone do not make the model much larger."""
    tensor = found.node.inputs[1]
    if uniform.is_uniform(found.weight):
        return True
    return edit.sole_consumer(tensor) is found.node or found.weight.nbytes <= predicates.MAX_COPY_BYTES


def can_be_gemm(found: Layer) -> bool:
    """Whether a MatMul with this weight is a Gemm that ONNX Runtime computes as fast."""
    return found.rank == 2 and found.weight.ndim == 2 and found.weight.dtype in GEMM_TYPES


def store(found: Layer, edit: Editor, folded: Folded) -> Node:
    """Give a layer its new values; a MatMul with a bias becomes a Gemm. Returns the layer's node."""
    node = found.node
    if folded.weight is not None:
        _set(found, edit, 1, folded.weight)
    if folded.bias is None:
        return node
    if node.op == "Gemm":
        node.attrs.pop("beta", None)
    if node.op == "MatMul":
        added = edit.constant(_bias_name(node.inputs[1].name), folded.bias)
        return edit.replace_node(node, "Gemm", [*node.inputs, added])
    _set(found, edit, 2, folded.bias)
    return node


def _set(found: Layer, edit: Editor, index: int, values: Array) -> None:
    """Store a weight or bias the way the weight is stored: as one number, if it was, or in full."""
    node = found.node
    tensor = node.input(index)
    name = tensor.name if tensor is not None else _bias_name(node.inputs[1].name)
    if uniform.is_uniform(found.weight) and values.size > 1 and (values == values.flat[0]).all():
        uniform.put(edit, node, index, np.broadcast_to(values.flat[0], values.shape), name)
    elif tensor is not None:
        edit.set_values(node, index, values)
    else:
        edit.set_input(node, index, edit.constant(name, values))


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias" if weight.endswith("weight") else f"{weight}_bias"


def per_channel(values: Array, rank: int | None, axis: int, channels: int) -> Array | None:
    """One value per channel from a constant, if all it does to a tensor is that.

    Args:
        values: the constant.
        rank: number of axes of the tensor; None if unknown.
        axis: which of them runs over the channels; negative if the rank is unknown.
        channels: their number.

    Returns:
        In double precision; None if the constant varies along another axis or changes the tensor's shape.
    """
    shape = values.shape
    if values.ndim > 0 and (rank is None and (values.ndim > 1 or axis != -1)):
        return None
    if rank is not None and values.ndim > rank:
        return None
    from_end = axis - rank if rank is not None and axis >= 0 else axis
    varying = {place - values.ndim for place, size in enumerate(shape) if size != 1}
    if not varying <= {from_end} or (varying and shape[from_end] != channels):
        return None
    return np.broadcast_to(values.astype(np.float64).reshape(-1), (channels,))
