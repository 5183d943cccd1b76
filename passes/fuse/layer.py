"""Layers that take in factors and summands of their channels: what folding their neighbours needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Array, Constant, Node
from onnxslim.ops import REGISTRY, Role, view_of
from onnxslim.ops.layers import Layer, per_channel
from onnxslim.passes import predicates
from onnxslim.passes.fuse import uniform

MATCHES = ("BatchNormalization", "Gemm", "MatMul")
PRODUCTS = frozenset(spec.op for spec in REGISTRY.values() if spec.role is Role.LINEAR)
# A BatchNormalization has one weight per channel: its scale.
LAYERS = PRODUCTS | {"BatchNormalization"}
# What storing new values of a layer may make.
MAKES = ("Gemm",)
STORED = frozenset((*MAKES, *uniform.MAKES))
# ONNX Runtime has a fast Gemm for these; for others MatMul is faster, or there is no Gemm at all.
GEMM_TYPES = frozenset(map(np.dtype, (np.float32, np.float64)))


@dataclass(frozen=True)
class Absorber:
    """A layer or BatchNormalization whose weight is in the model: it takes in what its neighbours do.

    Attributes:
        node: the operator.
        layer: the layer it is; None for a BatchNormalization.
        weight: its second input; of a ConstantOfShape, a uniform array.
        rank: number of axes of its output; None if unknown.
    """

    node: Node
    layer: Layer | None
    weight: Array
    rank: int | None

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.layer.groups * self.layer.outputs if self.layer else self.weight.size

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.layer.groups * self.layer.inputs if self.layer else self.weight.size

    def vector(self, values: Array, channels: int) -> Array | None:
        """One value per channel from a constant that is combined with its data or result, if it is that.

        In double precision; None if the constant varies along another axis or changes the tensor's shape, or
        may.
        """
        if self.rank is None and (values.ndim > 1 or (self.layer is None and values.ndim)):
            return None
        if self.rank is not None and values.ndim > self.rank:
            return None
        return per_channel(values, self.layer.axis if self.layer else 1 - (self.rank or 0), channels)

    def scaled(self, outputs: Array | None, inputs: Array | None) -> Array | None:
        """The weight times factors of channels; see `uniform.scaled`."""
        factors = [] if inputs is None or self.layer is None else [self.layer.along_inputs(inputs)]
        if outputs is not None:
            factors.append(self.layer.along_outputs(outputs) if self.layer else outputs)
        return uniform.scaled(self.weight, *factors)

    def sum_over_inputs(self, shift: Array) -> Array:
        """What each output channel gets if this much is added to every element of each input channel."""
        assert self.layer is not None
        product = self.weight.astype(np.float64) * self.layer.along_inputs(shift) * self.layer.scale
        rest = [axis for axis in range(product.ndim) if axis != self.layer.weight_axis]
        return np.asarray(product.sum(axis=tuple(rest)))


def absorber(node: Node | None, edit: Editor) -> Absorber | None:
    """A node that may take factors in; None if its weight is computed, sparse or not of a float type."""
    if node is None or node.op not in LAYERS:
        return None
    tensor = node.inputs[1]
    stored = tensor.proto if isinstance(tensor, Constant) else None
    weight = None if isinstance(stored, onnx.SparseTensorProto) else uniform.values(tensor, edit)
    if weight is None or weight.dtype not in predicates.FLOATS:
        return None
    found = view_of(node, given=weight)
    if found is None:
        ready = weight.ndim == 1 and training(node, edit) is None
        return Absorber(node, None, weight, predicates.rank(edit.shape(node.inputs[0]))) if ready else None
    if weight.ndim < 2 or found.groups < 1 or weight.shape[0] % found.groups:
        return None
    return Absorber(node, found, weight, found.rank or _product_rank(node, weight, edit))


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


def bias(found: Absorber, edit: Editor) -> Array | None:
    """What it adds per output channel, in double precision.

    None if that is computed, or is no single value per channel.
    """
    if not _has_bias(found.node):
        return np.zeros(found.outputs)
    values = uniform.value(found.node, 2, edit)
    if values is None:
        return None
    return found.layer.bias_of(values) if found.layer else values.astype(np.float64)


def _has_bias(node: Node) -> bool:
    return node.op != "MatMul" and node.input(2) is not None


@dataclass(frozen=True)
class Folded:
    """Values that take the place of a layer's; None where they stay."""

    weight: Array | None = None
    bias: Array | None = None


def fold(
    found: Absorber,
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
            weight = found.scaled(outputs, inputs)
            if weight is None:
                return "its weight repeats one number, and would have to be written out"
    return _fitting(found, edit, weight, added)


def _new_bias(
    found: Absorber,
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


def _fitting(found: Absorber, edit: Editor, weight: Array | None, added: Array | None) -> Folded | str:
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


def _may_replace(found: Absorber, edit: Editor) -> bool:
    """Whether other values for this layer alone do not make the model much larger."""
    tensor = found.node.inputs[1]
    if uniform.is_uniform(found.weight):
        return True
    return edit.sole_consumer(tensor) is found.node or found.weight.nbytes <= predicates.MAX_COPY_BYTES


def can_be_gemm(found: Absorber) -> bool:
    """Whether a MatMul with this weight is a Gemm that ONNX Runtime computes as fast."""
    return found.rank == 2 and found.weight.ndim == 2 and found.weight.dtype in GEMM_TYPES


def store(found: Absorber, edit: Editor, folded: Folded) -> Node:
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


def _set(found: Absorber, edit: Editor, index: int, values: Array) -> None:
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
