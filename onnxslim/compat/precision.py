"""A model in half or in single precision, as callers of PyPI's OnnxSlim ask for it."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, TensorProto, numpy_helper

from onnxslim.engine.base import Context
from onnxslim.errors import LoadError, UsageError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Graph, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.passes.dead import Dead
from onnxslim.passes.eliminate import Eliminate
from onnxslim.passes.half import Half
from onnxslim.runtime.session import Session

_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)
# Attributes that name the element type of a result.
_TYPE_ATTRIBUTES = ("to", "dtype")


def to_half(model: Model) -> Model:
    """A copy of the model in half precision, inputs and outputs too.

    `onnxslim.passes.Half` does it, all values of inner tensors being taken to fit. What it leaves in single
    precision, such as bodies and numbers that are too large, stays so, between Casts.

    Raises:
        UsageError: ONNX Runtime does not load the result.
    """
    twin = model.copy()
    Half().run(twin, Context())
    _narrow_interface(twin)
    for step in (Eliminate(), Dead()):
        step.run(twin, Context())
    try:
        Session(twin, once=True)
    except LoadError as error:
        raise UsageError(f"dtype 'fp16' does not work for this model: {error}") from error
    return twin


def _narrow_interface(model: Model) -> None:
    """Take and give half precision where it was single precision; Casts to what the model computes in."""
    graph, name = model.graph, Namer(model.graph)
    graph.defaults = {key: Constant(key, _narrow(value)) for key, value in graph.defaults.items()}
    for tensor in graph.inputs:
        if tensor.dtype == _SINGLE:
            wide = Variable(name(f"{tensor.name}_float32"), _SINGLE, tensor.shape)
            ir.replace_uses(tensor, wide)
            tensor.dtype = _HALF
            cast = Node("Cast", name(f"{tensor.name}_Cast"), {"to": int(TensorProto.FLOAT)}, [tensor], [wide])
            graph.nodes.insert(0, cast)
    for index, output in enumerate(graph.outputs):
        if output.dtype == _SINGLE and not any(output is tensor for tensor in graph.outputs[:index]):
            _narrow_output(graph, output, name)


def _narrow_output(graph: Graph, output: Tensor, name: Namer) -> None:
    """Give an output, which keeps its name, the type of half precision."""
    narrow = Variable(output.name, _HALF, output.shape)
    graph.outputs[:] = [narrow if tensor is output else tensor for tensor in graph.outputs]
    if isinstance(output, Constant):
        graph.initializers.pop(output.name, None)
    output.name = name(f"{output.name}_float32")
    cast = Node("Cast", name(f"{narrow.name}_Cast"), {"to": int(TensorProto.FLOAT16)}, [output], [narrow])
    graph.nodes.append(cast)


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


def _narrow(constant: Constant) -> Array:
    return constant.values.astype(_HALF) if constant.dtype == _SINGLE else constant.values


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
