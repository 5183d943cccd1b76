"""What is known of types and shapes: declared, inferred, and certain."""

from __future__ import annotations

import onnx
from onnx import GraphProto

from onnxslim.ir import proto
from onnxslim.ir.graph import Graph, Variable
from onnxslim.ir.model import Model
from onnxslim.shapes import inference
from onnxslim.shapes.dims import copied, dims_of, keep
from onnxslim.shapes.inference import Fact

__all__ = ["Fact", "copied", "deduce", "infer", "keep"]


def infer(model: Model, *, outputs: bool = False) -> None:
    """Fill in types and shapes of the model's tensors as far as the operators determine them.

    Args:
        model: edited in place.
        outputs: whether to infer those of graph outputs too, instead of keeping what is declared.

    Inferred shapes win over the annotations of inner tensors, which exporters get wrong; an annotation is
    used only where inference says nothing. Inputs and outputs keep what is declared. A graph on which
    inference fails keeps what it has.
    """
    bones = inference.skeleton(model)
    inferred = inference.run(_stripped(bones)) or inference.run(bones)
    if inferred is not None:
        for graph, found in inference.side_by_side(model.graph, inferred.graph):
            _apply(graph, found, outputs)


def deduce(model: Model) -> dict[int, Fact]:
    """What follows from inputs, constants and operators alone, by id of the tensor.

    In contrast to `infer`, nothing is taken from annotations of inner tensors or from declared outputs.

    Args:
        model: not modified.
    """
    return dims_of(model).facts


def _apply(graph: Graph, found: GraphProto, outputs: bool) -> None:
    infos = {info.name: info for info in (*found.value_info, *(found.output if outputs else ()))}
    fixed = set() if outputs else {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in infos and id(tensor) not in fixed:
                _refine(tensor, infos[tensor.name])


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    return bare


def _refine(tensor: Variable, info: onnx.ValueInfoProto) -> None:
    if info.type.WhichOneof("value") != "tensor_type":
        if tensor.proto is None:
            tensor.proto, tensor.declared = info, None
        return
    dtype, shape = proto.dtype_of(info.type.tensor_type.elem_type), proto.shape_of(info.type)
    tensor.dtype = dtype or tensor.dtype
    if shape is None:
        return
    known = tensor.shape if tensor.shape is not None and len(tensor.shape) == len(shape) else shape
    # A symbol of the exporter's says more than an inferred "unknown".
    tensor.shape = tuple(new if new is not None else old for new, old in zip(shape, known, strict=True))
