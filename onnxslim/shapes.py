"""Shape and type inference behind one adapter."""

from __future__ import annotations

import onnx
import onnx.shape_inference
from onnx import GraphProto, TensorProto

from onnxslim import proto
from onnxslim.graph import Constant, Graph, Variable
from onnxslim.model import Model

# Shape inference reads the values of constants that steer shapes, never those of weights.
MAX_STEERING_ELEMENTS = 4096


def infer(model: Model, *, outputs: bool = False) -> None:
    """Fill in types and shapes of the model's tensors as far as the operators determine them.

    Args:
        model: edited in place.
        outputs: whether to infer those of graph outputs too, instead of keeping what is declared.

    Inferred shapes win over the annotations of inner tensors, which exporters get wrong; an annotation is
    used only where inference says nothing. Inputs and outputs keep what is declared. A graph on which
    inference fails keeps what it has.
    """
    skeleton = model.to_proto_with(_small_values)
    inferred = _infer(_stripped(skeleton)) or _infer(skeleton)
    if inferred is None:
        return
    # Walked side by side: two bodies may use one name for different tensors.
    pending = [(model.graph, inferred.graph)]
    while pending:
        graph, found = pending.pop()
        _apply(graph, found, outputs)
        for node, made in zip(graph.nodes, found.node, strict=True):
            bodies = {item.name: item.g for item in made.attribute if item.HasField("g")}
            pending.extend(
                (value, bodies[name]) for name, value in node.attrs.items() if isinstance(value, Graph)
            )


def _apply(graph: Graph, found: GraphProto, outputs: bool) -> None:
    infos = {info.name: info for info in (*found.value_info, *(found.output if outputs else ()))}
    fixed = set() if outputs else {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in infos and id(tensor) not in fixed:
                _refine(tensor, infos[tensor.name])


def _infer(model: onnx.ModelProto) -> onnx.ModelProto | None:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    return bare


def _refine(tensor: Variable, info: onnx.ValueInfoProto) -> None:
    if info.type.WhichOneof("value") != "tensor_type":
        if tensor.proto is None:
            tensor.proto = info
        return
    dtype, shape = proto.dtype_of(info.type.tensor_type.elem_type), proto.shape_of(info.type)
    tensor.dtype = dtype or tensor.dtype
    if shape is None:
        return
    known = tensor.shape if tensor.shape is not None and len(tensor.shape) == len(shape) else shape
    # A symbol of the exporter's says more than an inferred "unknown".
    tensor.shape = tuple(new if new is not None else old for new, old in zip(shape, known, strict=True))


def _small_values(constant: Constant) -> TensorProto:
    if constant.size <= MAX_STEERING_ELEMENTS:
        return proto.encode_embedded(constant)
    tensor = TensorProto(name=constant.name, data_type=proto.elem_type_of(constant.dtype))
    tensor.dims.extend(constant.shape)
    return tensor
