"""ModelProto to editable graph and back, losing nothing.

graphsurgeon's own importer and exporter drop metadata, doc strings, unused and overridable initializers,
quantization annotations and overloads, and fail on optional types, so the conversion is ours: each object
keeps the protobuf it came from, and whatever no pass touched is written back from it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import google.protobuf.message
import numpy as np
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    ShardingSpecProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from onnxslim.errors import LoadError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Attribute, Constant, Dim, Graph, Node, Shape, Tensor, Variable

Message = TypeVar(
    "Message", bound=onnx.ModelProto | GraphProto | NodeProto | AttributeProto | onnx.SparseTensorProto
)
Scope: TypeAlias = ChainMap[str, Tensor]
Decode: TypeAlias = Callable[[TensorProto], Array]
Encode: TypeAlias = Callable[[Constant], TensorProto]

# From this IR version on, an initializer is a graph input only if the caller may override it.
OVERRIDABLE_SINCE_IR = 4


def dtype_of(elem_type: int) -> np.dtype[Any] | None:
    """NumPy type of an ONNX element type, None if it is undefined or unknown."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, TypeError, ValueError):
        return None


def elem_type_of(dtype: np.dtype[Any]) -> int:
    """ONNX element type of a NumPy type."""
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def shape_of(type_proto: onnx.TypeProto) -> Shape:
    """Declared shape of a tensor type; None if the rank is unknown or it is not a tensor."""
    if type_proto.WhichOneof("value") != "tensor_type" or not type_proto.tensor_type.HasField("shape"):
        return None
    return tuple(_dim(dim) for dim in type_proto.tensor_type.shape.dim)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    kind = dim.WhichOneof("value")
    if kind == "dim_value":
        # Some exporters write -1 where they mean "unknown".
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    # Equal names promise equal sizes, but some write one name for whatever they do not know.
    return str(dim.dim_param) if kind == "dim_param" and dim.dim_param not in ("", "?", "-1") else None


def fields_but(proto: Message, *left_out: str) -> Message:
    """A copy of a protobuf message without some of its fields, which are never copied even in passing."""
    made = type(proto)()
    _copy_fields(proto, made, left_out)
    return made


def _copy_fields(proto: Message, made: Message, left_out: tuple[str, ...]) -> None:
    for field, value in proto.ListFields():
        if field.name in left_out:
            continue
        if hasattr(value, "MergeFrom"):
            getattr(made, field.name).MergeFrom(value)
        else:
            setattr(made, field.name, value)


# --------------------------------------------------------------------------------------------- import


def import_graph(
    proto: GraphProto, ir_version: int, decode: Decode, around: Mapping[str, Tensor] | None = None
) -> Graph:
    """The editable graph of a GraphProto.

    Args:
        proto: the graph; not modified, and parts of it are kept.
        ir_version: of the model; before version 4 every initializer is listed among the inputs too.
        decode: values of a TensorProto, wherever its data lies.
        around: tensors it may read besides its own, by name.

    Raises:
        LoadError: a tensor is made twice or never, or the nodes form a cycle.
    """
    return _import(proto, ChainMap(dict(around or {})), ir_version, decode)


def _import(proto: GraphProto, outer: Scope, ir_version: int, decode: Decode) -> Graph:
    scope = outer.new_child()
    graph = Graph(proto.name, proto)
    _declare_values(graph, proto, scope, ir_version, decode)
    made = _declare_outputs(proto, scope)

    def lookup(name: str, reader: str) -> Tensor:
        if name not in scope:
            raise LoadError(f"{reader} reads tensor '{name}', which nothing in the model makes")
        return scope[name]

    for node, outputs in zip(proto.node, made, strict=True):
        for text in (node.op_type, node.name, node.domain, *node.input, *node.output):
            if not isinstance(text, str):  # protobuf gives out bytes where they are no UTF-8
                raise LoadError(f"a name is not UTF-8: {text[:40]!r}")
        reader = f"node '{node.name or node.op_type}' ({node.op_type})"
        inputs = [lookup(name, reader) if name else ir.empty() for name in node.input]
        attrs = {item.name: _attribute(item, scope, ir_version, decode) for item in node.attribute}
        twin = Node(node.op_type, node.name, attrs, inputs, outputs, node.domain, node)
        twin.imported = attrs
        graph.nodes.append(twin)
    graph.outputs = [lookup(info.name, "the list of graph outputs") for info in proto.output]
    ir.sort(graph)
    return graph


def _declare_values(graph: Graph, proto: GraphProto, scope: Scope, ir_version: int, decode: Decode) -> None:
    constants: dict[str, Constant] = {}
    for tensor in proto.initializer:
        if tensor.name in constants:
            raise LoadError(f"initializer '{tensor.name}' is there twice")
        constants[tensor.name] = Constant(tensor.name, proto=tensor, load=_loader(tensor, decode))
    for sparse in (_embedded(item, decode) for item in proto.sparse_initializer):
        constants[sparse.values.name] = Constant(sparse.values.name, proto=sparse, load=dense(sparse, decode))
    for info in proto.input:
        if info.name in constants:
            if ir_version < OVERRIDABLE_SINCE_IR:
                continue
            graph.defaults[info.name] = constants.pop(info.name)
        variable = _variable(info)
        graph.inputs.append(variable)
        scope[info.name] = variable
    graph.initializers = constants
    scope.update(constants)


def _declare_outputs(proto: GraphProto, scope: Scope) -> list[list[Variable]]:
    # What is declared of an output counts for more than what value_info says of the same tensor.
    declared = {info.name: info for info in (*proto.value_info, *proto.output)}
    made: list[list[Variable]] = []
    for node in proto.node:
        outputs: list[Variable] = []
        for name in node.output:
            if not name:
                outputs.append(ir.empty())
                continue
            if name in scope.maps[0]:
                raise LoadError(
                    f"tensor '{name}' is made more than once, last by node '{node.name or node.op_type}'"
                )
            scope[name] = variable = _variable(declared[name]) if name in declared else Variable(name)
            outputs.append(variable)
        made.append(outputs)
    return made


def _variable(info: ValueInfoProto) -> Variable:
    tensor = info.type.WhichOneof("value") == "tensor_type"
    dtype = dtype_of(info.type.tensor_type.elem_type) if tensor else None
    return Variable(info.name, dtype, shape_of(info.type), info)


def _loader(tensor: TensorProto, decode: Decode) -> Callable[[], Array]:
    return lambda: decode(tensor)


def dense(sparse: onnx.SparseTensorProto, decode: Decode) -> Callable[[], Array]:
    """A function that makes the tensor of a sparse one."""

    def load() -> Array:
        values, indices = decode(sparse.values), decode(sparse.indices)
        array = np.zeros(tuple(sparse.dims), values.dtype)
        flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))
        array.reshape(-1)[flat] = values
        return array

    return load


def _attribute(item: AttributeProto, scope: Scope, ir_version: int, decode: Decode) -> Attribute:
    if item.ref_attr_name:
        return item
    if item.type == AttributeProto.GRAPH:
        return _import(item.g, scope, ir_version, decode)
    if item.type == AttributeProto.STRING:
        return _text(item.s)
    if item.type == AttributeProto.STRINGS:
        return tuple(_text(value) for value in item.strings)
    if item.type in (AttributeProto.INT, AttributeProto.FLOAT):
        return helper.get_attribute_value(item)
    if item.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return tuple(helper.get_attribute_value(item))
    return _embedded(item, decode)


def _embedded(message: Message, decode: Decode) -> Message:
    """A message with all tensor data inside; a copy only if some was not."""
    if next(_external(message), None) is None:
        return message
    copy = fields_but(message)
    embed(copy, decode)
    return copy


def embed(message: google.protobuf.message.Message, decode: Decode) -> None:
    """Put external tensor data anywhere in a message into it, so that no later step has to look for it.

    Meant for what is rare and small: attributes, sparse tensors, functions, training graphs.

    Raises:
        LoadError: the data cannot be read.
    """
    for tensor in list(_external(message)):
        plain = numpy_helper.from_array(np.asarray(decode(tensor)), tensor.name)
        plain.doc_string = tensor.doc_string
        tensor.CopyFrom(plain)


def _external(message: google.protobuf.message.Message) -> Iterator[TensorProto]:
    if isinstance(message, TensorProto):
        if message.data_location == TensorProto.EXTERNAL:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            items = (value,) if isinstance(value, google.protobuf.message.Message) else value
            for item in items:
                yield from _external(item)


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


# --------------------------------------------------------------------------------------------- export


def export_graph(graph: Graph, into: GraphProto, ir_version: int, encode: Encode) -> None:
    """Write an editable graph.

    Args:
        graph: the graph; not modified.
        into: an empty GraphProto, as large ones take long to copy.
        ir_version: of the model to be written.
        encode: TensorProto of a constant, embedded or pointing to a data file.
    """
    _export(graph, into, set(), ir_version, encode)


def _export(graph: Graph, proto: GraphProto, outer: set[int], ir_version: int, encode: Encode) -> None:
    origin = graph.proto if graph.proto is not None else GraphProto()
    parts = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")
    _copy_fields(origin, proto, parts)
    if proto.name != graph.name:
        proto.name = graph.name
    constants = list(graph.initializers.values())
    known = outer | {id(constant) for constant in constants}
    constants.extend(_unregistered(graph, known))
    known.update(id(constant) for constant in constants)
    proto.node.extend(_node(node, known, ir_version, encode) for node in graph.nodes)
    for constant in _in_order([*graph.defaults.values(), *constants], origin.initializer):
        _write_constant(proto, constant, encode)
    listed = constants if ir_version < OVERRIDABLE_SINCE_IR else []
    proto.input.extend(_inputs([*graph.inputs, *listed], origin))
    proto.output.extend(_outputs(graph, origin))
    proto.value_info.extend(_value_infos(graph, constants, origin))


def _in_order(constants: list[Constant], origin: Iterable[TensorProto]) -> list[Constant]:
    place = {tensor.name: index for index, tensor in enumerate(origin)}
    return sorted(constants, key=lambda constant: place.get(constant.name, len(place)))


def _inputs(tensors: list[Tensor], origin: GraphProto) -> Iterator[ValueInfoProto]:
    """Inputs as they are now, in their order; before IR 4 constants are among them, where they were."""
    place = {info.name: index for index, info in enumerate(origin.input)}
    if any(isinstance(tensor, Constant) for tensor in tensors):
        tensors = sorted(tensors, key=lambda tensor: place.get(tensor.name, len(place)))
    for tensor in tensors:
        declared = origin.input[place[tensor.name]] if tensor.name in place else None
        # A pass may have given a constant other sizes, or another type.
        if isinstance(tensor, Constant) and declared is not None and _still_holds(declared, tensor):
            yield declared
        else:
            yield _value_info(tensor)


def _outputs(graph: Graph, origin: GraphProto) -> Iterator[ValueInfoProto]:
    """Outputs as they were declared: two may name one tensor, or an input, and differ in their symbols."""
    for index, tensor in enumerate(graph.outputs):
        declared = origin.output[index] if index < len(origin.output) else None
        if declared is not None and declared.name == tensor.name and _as_read(tensor):
            yield declared
        else:
            yield _value_info(tensor)


def _value_infos(graph: Graph, constants: list[Constant], origin: GraphProto) -> Iterator[ValueInfoProto]:
    """What is known of inner tensors, in the order it was declared, followed by what is new."""
    fixed = {id(tensor) for tensor in graph.outputs}
    made = {t.name: t for node in graph.nodes for t in node.outputs if t.name}
    others: dict[str, Tensor] = {constant.name: constant for constant in constants}
    others.update((tensor.name, tensor) for tensor in graph.inputs)
    for info in origin.value_info:
        tensor = made.pop(info.name, None)
        if tensor is not None and id(tensor) not in fixed:
            yield _value_info(tensor)
        elif (tensor is not None and _as_read(tensor)) or _still_holds(info, others.get(info.name)):
            yield info
    # What inference found is not written: anyone can infer it again, and it would make the file grow.
    yield from (_value_info(t) for t in made.values() if id(t) not in fixed and t.proto is not None)


def _still_holds(info: ValueInfoProto, tensor: Tensor | None) -> bool:
    """Whether a declaration fits an input or a constant, which may have come into its place."""
    if not isinstance(tensor, Constant):
        return tensor is not None
    declared = _variable(info)
    if declared.dtype != tensor.dtype or declared.shape is None:
        return declared.dtype == tensor.dtype
    return len(declared.shape) == len(tensor.shape) and all(
        dim == size or not isinstance(dim, int)
        for dim, size in zip(declared.shape, tensor.shape, strict=True)
    )


def _unregistered(graph: Graph, known: set[int]) -> Iterable[Constant]:
    """Constants that passes made, in order of first use; those only bodies read belong here too."""
    seen: dict[int, Constant] = {}
    for each in ir.walk(graph):
        if each is not graph:
            known = known | {id(constant) for constant in each.initializers.values()}
        for tensor in (*(t for node in each.nodes for t in node.inputs), *each.outputs):
            if isinstance(tensor, Constant) and id(tensor) not in known:
                seen.setdefault(id(tensor), tensor)
    return seen.values()


def _write_constant(proto: GraphProto, constant: Constant, encode: Encode) -> None:
    if isinstance(constant.proto, onnx.SparseTensorProto):
        proto.sparse_initializer.append(constant.proto)
    else:
        proto.initializer.append(encode(constant))


def encode_embedded(constant: Constant) -> TensorProto:
    """The TensorProto of a constant with its data inside; the one it was read from where it still holds."""
    origin = constant.tensor_proto
    if origin is not None and origin.data_location != TensorProto.EXTERNAL:
        if origin.name == constant.name:
            return origin
        renamed = TensorProto()
        renamed.CopyFrom(origin)
        renamed.name = constant.name
        return renamed
    return numpy_helper.from_array(np.asarray(constant.peek()), constant.name)


def _node(node: Node, known: set[int], ir_version: int, encode: Encode) -> NodeProto:
    if node.proto is not None and _is_as_read(node, node.proto):
        return node.proto
    origin = node.proto if node.proto is not None else NodeProto()
    proto = fields_but(origin, "input", "output", "attribute")
    originals = {item.name: item for item in origin.attribute}
    for field, value in (("op_type", node.op), ("name", node.name), ("domain", node.domain or "")):
        if getattr(proto, field) != value:
            setattr(proto, field, value)
    if (node.op, node.domain or "") != (origin.op_type, origin.domain):
        proto.ClearField("overload")
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    _keep_shards(proto, lambda spec: spec.tensor_name in (*proto.input, *proto.output))
    for name, value in node.attrs.items():
        if isinstance(value, Graph):
            item = fields_but(originals.get(name, AttributeProto(name=name, type=AttributeProto.GRAPH)), "g")
            item.g.SetInParent()
            _export(value, item.g, known, ir_version, encode)
            proto.attribute.append(item)
        elif isinstance(value, AttributeProto):
            proto.attribute.append(value)
        elif name in originals and node.imported.get(name) is value:
            proto.attribute.append(originals[name])
        else:
            kind = _kind_of_empty(node, name) if value in ((), []) else None
            proto.attribute.append(helper.make_attribute(name, value, attr_type=kind))
    return proto


def _kind_of_empty(node: Node, name: str) -> int:
    """The type of an attribute without elements: that of the operator's, or else integers."""
    try:
        known = onnx.defs.get_schema(node.op, node.domain or "").attributes
    except onnx.defs.SchemaError:
        known = {}
    return int(known[name].type) if name in known else AttributeProto.INTS  # type: ignore[call-overload]


def forget_shards(node: Node, is_cut: Callable[[str, int], bool]) -> None:
    """Drop how a node's tensors are split among devices along axes that are not as long as they were.

    Args:
        node: its declaration is replaced, not changed.
        is_cut: of the name of a tensor and one of its axes, as the declaration counts it.
    """
    if node.proto is None or not node.proto.device_configurations:
        return
    node.proto = fields_but(node.proto)

    def is_left(spec: ShardingSpecProto) -> bool:
        kept = [dim for dim in spec.sharded_dim if not is_cut(spec.tensor_name, dim.axis)]
        if kept:
            del spec.sharded_dim[:]
            spec.sharded_dim.extend(kept)
        return bool(kept) or not spec.sharded_dim

    _keep_shards(node.proto, is_left)


def _keep_shards(proto: NodeProto, wanted: Callable[[ShardingSpecProto], bool]) -> None:
    for placed in proto.device_configurations:
        kept = [spec for spec in placed.sharding_spec if wanted(spec)]
        del placed.sharding_spec[:]
        placed.sharding_spec.extend(kept)


def _is_as_read(node: Node, origin: NodeProto) -> bool:
    """Whether a node without bodies is still what its declaration says."""
    if (node.op, node.name, node.domain or "") != (origin.op_type, origin.name, origin.domain):
        return False
    if [item.name for item in origin.attribute] != list(node.attrs):
        return False
    imported = node.imported
    for name, value in node.attrs.items():
        # A tensor may have been embedded when it was read.
        if isinstance(value, (Graph, AttributeProto)) or imported.get(name) is not value:
            return False
    return [tensor.name for tensor in node.inputs] == list(origin.input) and [
        tensor.name for tensor in node.outputs
    ] == list(origin.output)


def _value_info(tensor: Tensor) -> ValueInfoProto:
    if isinstance(tensor, Constant):
        return helper.make_tensor_value_info(tensor.name, elem_type_of(tensor.dtype), tensor.shape)
    if tensor.proto is not None and _as_read(tensor):
        return tensor.proto
    info = ValueInfoProto()
    if tensor.proto is not None:
        info.CopyFrom(tensor.proto)
    info.name = tensor.name
    if tensor.dtype is not None:
        info.type.CopyFrom(helper.make_tensor_type_proto(elem_type_of(tensor.dtype), tensor.shape))
    return info


def _as_read(tensor: Tensor) -> bool:
    """Whether a tensor is still what its declaration says."""
    if isinstance(tensor, Constant) or tensor.proto is None:
        return tensor.proto is not None
    if tensor.declared is None:
        origin = _variable(tensor.proto)
        tensor.declared = origin.name, origin.dtype, origin.shape
    return tensor.declared == (tensor.name, tensor.dtype, tensor.shape)
