"""onnx's shape inference, kept from taking things on trust and corrected where ONNX Runtime differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import GraphProto, TensorProto

from onnxslim.ir import proto
from onnxslim.ir.graph import Constant, Dim, Graph, Node, Shape
from onnxslim.ir.model import Model
from onnxslim.ops import body, body_of
from onnxslim.shapes import ort_differences
from onnxslim.shapes.hiding import OPAQUE, hide_trusting, nested

# Rounds in which shapes are corrected to what ONNX Runtime makes of them, before they count as unknown.
MAX_CORRECTIONS = 8
# Propagation of values takes 80 bytes for each element of each vector; it is not done beyond this number.
MAX_PROPAGATED_ELEMENTS = 1 << 20
# Shape inference reads the values of constants that steer shapes, never those of weights.
MAX_STEERING_ELEMENTS = 4096
# A domain of functions that stand for nodes of domains inference knows nothing of.
_BODIES = "bodies"


@dataclass(frozen=True)
class Fact:
    """What is certain about a tensor.

    Attributes:
        dtype: type of its elements; None if unknown or if it is not a tensor.
        shape: as for any tensor. Two axes with one symbol have one size, even if it is not declared.
    """

    dtype: np.dtype[Any] | None
    shape: Shape


class Inference:
    """Shape inference on a model that believes its inputs, its constants and its operators, and nothing else.

    Args:
        model: not modified; must not change as long as this is in use.

    Attributes:
        symbols: the names of free axes of the inputs; axes without a name have got one.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._bare = skeleton(model)
        self._bare.opset_import.add(domain=OPAQUE, version=1)
        _forget(self._bare.graph)
        hide_trusting(self._bare)
        self.symbols = set(_name_axes(self._bare.graph))
        # What was stated, by id of the tensor.
        self._stated: dict[int, Fact] = {}
        # Whether values may be propagated; None as long as that is not known.
        self._propagate: bool | None = None

    def facts(self) -> dict[int, Fact]:
        """What follows, by id of the tensor."""
        for attempt in count():
            if self._propagate is None:
                plain = _infer(self._bare, propagate=False)
                self._propagate = plain is not None and _may_propagate(plain)
            inferred = _infer(self._bare, propagate=self._propagate) or self._bare
            facts = _facts(self._model, inferred, self._stated)
            wrong = dict(_disagreements(self._model, facts))
            if not wrong:
                break
            if attempt >= MAX_CORRECTIONS:
                wrong = {key: (None,) * len(shape) for key, shape in wrong.items()}
            self.state(wrong, facts)
        return facts

    def state(self, shapes: Mapping[int, tuple[Dim, ...]], facts: Mapping[int, Fact]) -> None:
        """Fix shapes of outputs, by id, from here on; inference no longer looks at the nodes that make them.

        Args:
            shapes: the shapes, by id of the first output of a node.
            facts: what was found so far, for the types.
        """
        for graph, found in side_by_side(self._model.graph, self._bare.graph):
            declared = {info.name: info for info in (*found.value_info, *found.output)}
            for node, made in zip(graph.nodes, found.node, strict=True):
                if node.outputs and id(node.outputs[0]) in shapes:
                    if any(_is_long(facts.get(id(tensor))) for tensor in node.outputs):
                        self._propagate = None
                    made.domain = OPAQUE
                    for tensor in node.outputs:
                        info = declared.get(tensor.name) or found.value_info.add(name=tensor.name)
                        fact = facts.get(id(tensor), Fact(None, None))
                        if fact.dtype is not None:
                            self._stated[id(tensor)] = Fact(fact.dtype, shapes.get(id(tensor)))
                            _declare(info, fact.dtype, shapes.get(id(tensor)))


def run(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model with shapes inferred, but for nodes that it hides from that; None if inference fails."""
    hide_trusting(model)
    plain = _infer(model, propagate=False)
    return _infer(model, propagate=True) if plain is not None and _may_propagate(plain) else plain


def _infer(model: onnx.ModelProto, *, propagate: bool) -> onnx.ModelProto | None:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=propagate)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None


def _may_propagate(model: onnx.ModelProto) -> bool:
    return _vector_elements(model.graph) <= MAX_PROPAGATED_ELEMENTS


def _is_long(fact: Fact | None) -> bool:
    """Whether values of a tensor of integers would take much memory."""
    if fact is None or fact.dtype is None or fact.dtype.kind not in "iu":
        return False
    return math.prod(dim for dim in fact.shape or () if isinstance(dim, int)) > MAX_STEERING_ELEMENTS


def skeleton(model: Model) -> onnx.ModelProto:
    """The model without weights, and without defaults of inputs, which are no constants."""
    bones = model.to_proto_with(_small_values)
    if model.graph.defaults:
        kept = [item for item in bones.graph.initializer if item.name not in model.graph.defaults]
        del bones.graph.initializer[:]
        bones.graph.initializer.extend(kept)
    for graph, found in side_by_side(model.graph, bones.graph):
        if found is not bones.graph:
            _show_captured(graph, found)
    _write_bodies(model, bones)
    return bones


def _write_bodies(model: Model, bones: onnx.ModelProto) -> None:
    """Have nodes of operators that inference does not know call functions that it does."""
    for graph, found in side_by_side(model.graph, bones.graph):
        for node, made in zip(graph.nodes, found.node, strict=True):
            write = body_of(node, model)
            name = f"{node.op}_{len(bones.functions)}"
            function = None if write is None else body.function(node, write, _BODIES, name)
            if function is not None:
                bones.functions.append(function)
                made.domain, made.op_type = _BODIES, name
                del made.attribute[:]
    if len(bones.functions) > len(model.shell.functions):
        bones.opset_import.add(domain=_BODIES, version=1)


def _show_captured(graph: Graph, found: GraphProto) -> None:
    """Declare what a body reads of the constants around it, whose values inference does not see otherwise."""
    own = {item.name for item in found.initializer}
    read = {tensor.name: tensor for node in graph.nodes for tensor in node.inputs}
    found.initializer.extend(
        _small_values(tensor)
        for name, tensor in read.items()
        if isinstance(tensor, Constant) and name not in own and tensor.size <= MAX_STEERING_ELEMENTS
    )


def side_by_side(graph: Graph, found: GraphProto) -> Iterator[tuple[Graph, GraphProto]]:
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


def _facts(model: Model, inferred: onnx.ModelProto, stated: Mapping[int, Fact]) -> dict[int, Fact]:
    facts: dict[int, Fact] = {}
    for graph, found in side_by_side(model.graph, inferred.graph):
        infos = {info.name: info for info in (*found.input, *found.value_info, *found.output)}
        for tensor in (*graph.inputs, *(made for node in graph.nodes for made in node.outputs)):
            if id(tensor) in stated:
                facts[id(tensor)] = stated[id(tensor)]
            elif tensor.name in infos:
                kind = infos[tensor.name].type
                facts[id(tensor)] = Fact(proto.dtype_of(kind.tensor_type.elem_type), proto.shape_of(kind))
    return facts


def _disagreements(model: Model, facts: Mapping[int, Fact]) -> Iterator[tuple[int, tuple[Dim, ...]]]:
    """Outputs, by id, of another shape than was inferred for them, with that shape."""
    unknown = Fact(None, None)
    for node in model.nodes():
        if node.op in ort_differences.MAY_DIFFER and node.inputs:
            data, made = node.inputs[0], facts.get(id(node.outputs[0]), unknown)
            source = data.shape if isinstance(data, Constant) else facts.get(id(data), unknown).shape
            actual = ort_differences.output_shape(node, source)
            if (
                actual is not None
                and made.dtype is not None
                and not ort_differences.agree(actual, made.shape)
            ):
                yield id(node.outputs[0]), actual
        elif node.op in ort_differences.ZERO_IF_UNKNOWN:
            found = {id(tensor): facts.get(id(tensor), unknown).shape for tensor in node.outputs}
            if found[id(node.outputs[0])] is not None and any(0 in (shape or ()) for shape in found.values()):
                for key, shape in found.items():
                    if shape is not None:
                        yield key, tuple(dim or None for dim in shape)


def _declare(info: onnx.ValueInfoProto, dtype: np.dtype[Any], shape: Shape) -> None:
    kind = info.type.tensor_type
    kind.Clear()
    kind.elem_type = proto.elem_type_of(dtype)
    for dim in shape if shape is not None else ():
        if isinstance(dim, int):
            kind.shape.dim.add(dim_value=dim)
        else:
            kind.shape.dim.add(dim_param=dim or "")
    if shape == ():
        kind.shape.SetInParent()


def _forget(graph: GraphProto) -> None:
    """Drop every shape that is not declared of an input of the model."""
    for current in nested(graph):
        del current.value_info[:]
        for info in (*current.output, *(current.input if current is not graph else ())):
            if info.type.WhichOneof("value") == "tensor_type":
                info.type.tensor_type.ClearField("shape")


def _name_axes(graph: GraphProto) -> Iterator[str]:
    """Give axes that have neither size nor symbol a symbol of their own; yields all symbols."""
    axes = [(f"{info.name}[{axis}]", dim) for info in graph.input for axis, dim in enumerate(_dims(info))]
    taken = {dim.dim_param for _, dim in axes}
    for name, dim in axes:
        if not dim.dim_param and not (dim.HasField("dim_value") and dim.dim_value >= 0):
            while name in taken:
                name += "'"
            dim.dim_param = name
        if dim.dim_param:
            yield dim.dim_param


def _dims(info: onnx.ValueInfoProto) -> Iterable[onnx.TensorShapeProto.Dimension]:
    return info.type.tensor_type.shape.dim


def _vector_elements(graph: GraphProto) -> int:
    """Elements of all tensors of one axis."""
    infos = (info for each in nested(graph) for info in (*each.input, *each.value_info, *each.output))
    shapes = (info.type.tensor_type.shape.dim for info in infos)
    return sum(shape[0].dim_value for shape in shapes if len(shape) == 1)


def _small_values(constant: Constant) -> TensorProto:
    if constant.size <= MAX_STEERING_ELEMENTS:
        return proto.encode_embedded(constant)
    tensor = TensorProto(name=constant.name, data_type=proto.elem_type_of(constant.dtype))
    tensor.dims.extend(constant.shape)
    return tensor
