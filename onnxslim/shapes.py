"""Shape and type inference behind one adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import AttributeProto, GraphProto, TensorProto, helper

from onnxslim import proto, quirks
from onnxslim.graph import Constant, Dim, Graph, Node, Shape, Variable
from onnxslim.model import Model

# Rounds in which shapes are corrected to what ONNX Runtime makes of them, before they count as unknown.
MAX_CORRECTIONS = 8
# A domain inference knows nothing of.
_OPAQUE = "opaque"
# Propagation of values takes 80 bytes for each element of each vector; it is not done beyond this number.
MAX_PROPAGATED_ELEMENTS = 1 << 20
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
    skeleton = _skeleton(model)
    inferred = _infer(_stripped(skeleton)) or _infer(skeleton)
    if inferred is not None:
        for graph, found in _side_by_side(model.graph, inferred.graph):
            _apply(graph, found, outputs)


@dataclass(frozen=True)
class Fact:
    """What is certain about a tensor.

    Attributes:
        dtype: type of its elements; None if unknown or if it is not a tensor.
        shape: as for any tensor. Two axes with one symbol have one size, even if it is not declared.
    """

    dtype: np.dtype[Any] | None
    shape: Shape


def deduce(model: Model) -> dict[int, Fact]:
    """What follows from inputs, constants and operators alone, by id of the tensor.

    In contrast to `infer`, nothing is taken from annotations of inner tensors or from declared outputs.

    Args:
        model: not modified.
    """
    bare = _skeleton(model)
    _forget(bare.graph)
    _name_axes(bare.graph)
    bare.opset_import.add(domain=_OPAQUE, version=1)
    for attempt in count():
        facts = _facts(model, _infer(bare) or bare)
        wrong = dict(_disagreements(model, facts))
        if not wrong:
            break
        if attempt >= MAX_CORRECTIONS:
            wrong = {key: (None,) * len(shape) for key, shape in wrong.items()}
        _correct(model.graph, bare.graph, wrong, facts)
    return facts


def _facts(model: Model, inferred: onnx.ModelProto) -> dict[int, Fact]:
    facts: dict[int, Fact] = {}
    for graph, found in _side_by_side(model.graph, inferred.graph):
        infos = {info.name: info for info in (*found.input, *found.value_info, *found.output)}
        for tensor in (*graph.inputs, *(made for node in graph.nodes for made in node.outputs)):
            if tensor.name in infos:
                facts[id(tensor)] = _fact(infos[tensor.name].type)
    return facts


def _disagreements(model: Model, facts: Mapping[int, Fact]) -> Iterator[tuple[int, tuple[Dim, ...]]]:
    """Outputs, by id, of another shape than was inferred for them, with that shape."""
    unknown = Fact(None, None)
    for node in model.nodes():
        if node.op in quirks.MAY_DIFFER and node.inputs:
            data, made = node.inputs[0], facts.get(id(node.outputs[0]), unknown)
            source = data.shape if isinstance(data, Constant) else facts.get(id(data), unknown).shape
            actual = quirks.output_shape(node, source)
            if actual is not None and made.dtype is not None and not quirks.agree(actual, made.shape):
                yield id(node.outputs[0]), actual


def _correct(
    graph: Graph, bare: GraphProto, shapes: Mapping[int, tuple[Dim, ...]], facts: Mapping[int, Fact]
) -> None:
    """State shapes of outputs, and keep inference from looking at the nodes that make them."""
    for twin, found in _side_by_side(graph, bare):
        for node, made in zip(twin.nodes, found.node, strict=True):
            if id(node.outputs[0]) not in shapes:
                continue
            made.domain = _OPAQUE
            for tensor in node.outputs:
                fact = facts.get(id(tensor))
                if fact is not None and fact.dtype is not None:
                    _declare(found, tensor.name, fact.dtype, shapes.get(id(tensor)))


def _declare(graph: GraphProto, name: str, dtype: np.dtype[Any], shape: Shape) -> None:
    declared = next((info for info in (*graph.output, *graph.value_info) if info.name == name), None)
    info = declared if declared is not None else graph.value_info.add(name=name)
    info.type.CopyFrom(helper.make_tensor_type_proto(proto.elem_type_of(dtype), shape))


def _fact(kind: onnx.TypeProto) -> Fact:
    return Fact(proto.dtype_of(kind.tensor_type.elem_type), proto.shape_of(kind))


def _skeleton(model: Model) -> onnx.ModelProto:
    """The model without weights, and without defaults of inputs, which are no constants."""
    skeleton = model.to_proto_with(_small_values)
    if model.graph.defaults:
        kept = [item for item in skeleton.graph.initializer if item.name not in model.graph.defaults]
        del skeleton.graph.initializer[:]
        skeleton.graph.initializer.extend(kept)
    return skeleton


def _forget(graph: GraphProto) -> None:
    """Drop every shape that is not declared of an input of the model."""
    pending = [(graph, False)]
    while pending:
        current, nested = pending.pop()
        del current.value_info[:]
        for info in (*current.output, *(current.input if nested else ())):
            if info.type.WhichOneof("value") == "tensor_type":
                info.type.tensor_type.ClearField("shape")
        pending.extend(
            (item.g, True) for node in current.node for item in node.attribute if item.HasField("g")
        )


def _name_axes(graph: GraphProto) -> None:
    """Give axes that have neither size nor symbol a symbol of their own, for inference to carry along."""
    for info in graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.dim_param and not (dim.HasField("dim_value") and dim.dim_value >= 0):
                dim.dim_param = f"{info.name}[{axis}]"


def _side_by_side(graph: Graph, found: GraphProto) -> Iterator[tuple[Graph, GraphProto]]:
    """Graphs and their protobufs in pairs: two bodies may use one name for different tensors."""
    pending = [(graph, found)]
    while pending:
        graph, found = pending.pop()
        yield graph, found
        for node, made in zip(graph.nodes, found.node, strict=True):
            pending.extend(_bodies(node, made))


def _bodies(node: Node, made: onnx.NodeProto) -> Iterator[tuple[Graph, GraphProto]]:
    if node.bodies:
        graphs = {item.name: item.g for item in made.attribute if item.HasField("g")}
        yield from ((value, graphs[name]) for name, value in node.attrs.items() if isinstance(value, Graph))


def _apply(graph: Graph, found: GraphProto, outputs: bool) -> None:
    infos = {info.name: info for info in (*found.value_info, *(found.output if outputs else ()))}
    fixed = set() if outputs else {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in infos and id(tensor) not in fixed:
                _refine(tensor, infos[tensor.name])


def _infer(model: onnx.ModelProto) -> onnx.ModelProto | None:
    try:
        plain = onnx.shape_inference.infer_shapes(model)
        if _vector_elements(plain.graph) > MAX_PROPAGATED_ELEMENTS:
            return plain
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None


def _vector_elements(graph: GraphProto) -> int:
    """Elements of all tensors of one axis."""
    total = 0
    pending = [graph]
    while pending:
        current = pending.pop()
        for info in (*current.input, *current.value_info, *current.output):
            if len(info.type.tensor_type.shape.dim) == 1:
                total += info.type.tensor_type.shape.dim[0].dim_value
        pending.extend(
            item.g for node in current.node for item in node.attribute if item.type == AttributeProto.GRAPH
        )
    return total


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
