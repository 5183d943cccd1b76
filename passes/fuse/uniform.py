"""Tensors that repeat one number, which files state by that number and their shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import AttributeProto, numpy_helper

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ir.model import constant_of
from onnxslim.passes import predicates

MAKES = ("ConstantOfShape",)


def values(tensor: Tensor | None, edit: Editor) -> Array | None:
    """Values of a constant, or of a ConstantOfShape, moved or not: an array that takes no memory."""
    known = constant_of(tensor)
    if known is not None or tensor is None:
        return known
    size = predicates.product(edit.shape(tensor))
    found = predicates.filling(predicates.origin(tensor)) if size else None
    return None if found is None else np.broadcast_to(found, edit.shape(tensor) or ())  # type: ignore[arg-type]


def value(node: Node, index: int, edit: Editor) -> Array | None:
    """Likewise for an input of a node."""
    return values(node.input(index), edit)


def is_uniform(array: Array) -> bool:
    """Whether an array is such a one: many elements at one place in memory."""
    return array.size > 1 and not any(array.strides)


def first(array: Array) -> Array:
    """The number, as an array without axes."""
    return np.asarray(array[(0,) * array.ndim])


def scaled(weight: Array, *factors: Array) -> Array | None:
    """A weight times vectors shaped to broadcast against it, in double precision.

    None if the weight repeats one number and the result would not.
    """
    if not is_uniform(weight):
        product = weight.astype(np.float64)
        for factor in factors:
            product = product * factor
        return product
    number = first(weight).astype(np.float64)
    for factor in factors:
        if not (factor == factor.flat[0]).all():
            return None
        number = number * factor.flat[0]
    return np.broadcast_to(number, weight.shape)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array | None:
    """See `predicates.rounded`."""
    if not is_uniform(array):
        return predicates.rounded(array, dtype)
    number = predicates.rounded(first(array), dtype)
    return None if number is None else np.broadcast_to(number, array.shape)


def put(edit: Editor, node: Node, index: int, array: Array, name: str) -> None:
    """Let a node read an array at an input, made by a ConstantOfShape."""
    made = edit.variable(name, like=node.inputs[0], shape=array.shape)
    made.dtype = array.dtype
    shape = edit.constant(f"{name}_shape", np.array(array.shape, np.int64))
    filler = numpy_helper.from_array(first(array).reshape(1))
    told = AttributeProto(name="value", type=AttributeProto.TENSOR, t=filler)
    edit.add(node, "ConstantOfShape", [shape], [made], {"value": told}, name=name)
    edit.set_input(node, index, made)
