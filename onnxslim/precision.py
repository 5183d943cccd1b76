"""A model in half or in single precision, as callers of PyPI's OnnxSlim ask for it."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, TensorProto, numpy_helper

from onnxslim import runtime
from onnxslim.errors import LoadError, UsageError
from onnxslim.graph import Array, Constant, Node, Variable
from onnxslim.model import Model
from onnxslim.runtime import Session

_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)
# Attributes that name the element type of a result.
_TYPE_ATTRIBUTES = ("to", "dtype")


def to_half(model: Model) -> Model:
    """The model in half precision, inputs and outputs too, by the converter that comes with ONNX Runtime.

    Operators that have no kernel in half precision stay as they are, between Casts. Numbers that are too
    large or too small are cut to what half precision holds.

    Raises:
        UsageError: ONNX Runtime does not load the result.
        SaveError: the model is too large for one protobuf.
    """
    converted = Model.from_proto(runtime.half(model.to_proto()))
    try:
        Session(converted, once=True)
    except LoadError as error:
        raise UsageError(f"dtype 'fp16' does not work for this model: {error}") from error
    return converted


def to_single(model: Model) -> Model:
    """A copy of the model that computes in single precision where it did in half precision.

    Raises:
        UsageError: the model has functions of its own, whose types are not known.
    """
    if model.shell.functions:
        raise UsageError("dtype 'fp32' does not work for models with functions of their own; slim it before")
    twin = model.copy()
    for graph in twin.graphs():
        # A copy shares its defaults with the original.
        graph.defaults = {name: Constant(name, _wide(value)) for name, value in graph.defaults.items()}
    for constant in twin.constants():
        if constant.dtype == _HALF:
            constant.values = _wide(constant)
    for graph in twin.graphs():
        made = (tensor for node in graph.nodes for tensor in node.outputs)
        for tensor in (*graph.inputs, *graph.outputs, *made):
            if isinstance(tensor, Variable) and tensor.dtype == _HALF:
                tensor.dtype = _SINGLE
        for node in graph.nodes:
            _widen(node)
    return twin


def _wide(constant: Constant) -> Array:
    return constant.values.astype(_SINGLE) if constant.dtype == _HALF else constant.values


def _widen(node: Node) -> None:
    """Let a node make single precision where its attributes say half precision."""
    for name in _TYPE_ATTRIBUTES:
        if node.attrs.get(name) == TensorProto.FLOAT16:
            node.attrs[name] = int(TensorProto.FLOAT)
    value = node.attrs.get("value")
    if isinstance(value, AttributeProto) and value.t.data_type == TensorProto.FLOAT16:
        wide = numpy_helper.from_array(numpy_helper.to_array(value.t).astype(_SINGLE), value.t.name)
        node.attrs["value"] = AttributeProto(name="value", type=AttributeProto.TENSOR, t=wide)
