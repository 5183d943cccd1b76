"""Equal constants and equal computations, kept once."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from onnx import AttributeProto, SparseTensorProto, TensorProto, numpy_helper
from pydantic import Field

from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.ir import files
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Graph, Namer, Node
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import Role, Trait, has, spec_of
from onnxslim.passes import dead

# Smaller constants stay in the body that reads them, where shape inference can see their values.
MIN_SHARED_BYTES = 1024
# By so many of their first bytes most constants differ.
HEAD_BYTES = 4096


@options
class Dedupe(Pass):
    """Keep one of several equal constants, and one of several nodes that compute the same from the same.

    Equal means equal in every bit. Nodes that draw random numbers, keep state, or are not known are left
    alone.
    """

    name: ClassVar[str] = "dedupe"
    lossless: ClassVar[bool] = True

    constants: bool = Field(True, description="merge equal constants")
    nodes: bool = Field(True, description="merge equal nodes")

    def run(self, model: Model, ctx: Context) -> Changes:
        """Merge equal constants first, as equal nodes must read the same ones."""
        log = Log()
        if self.constants:
            _merge_constants(model, log)
        if self.nodes:
            _merge_nodes(model, log)
        return log.done()


# ------------------------------------------------------------------------------------------- constants


def _merge_constants(model: Model, log: Log) -> None:
    if model.shell.training_info:
        log.skip(model.graph.name, "constants stay apart: the training information may refer to them")
        return
    outputs = {id(tensor) for tensor in model.graph.outputs}
    name: Namer | None = None
    unread = dead.unread(model)
    for group in list(_equal_constants(model)):
        if any(_is_fused(constant) for constant, _ in group):
            log.skip(
                group[0][0].name,
                "equal codes stay apart: runtimes multiply by those that one layer alone reads",
            )
            continue
        # An output cannot be renamed or moved, so it is the one that stays.
        group.sort(key=lambda item: id(item[0]) not in outputs)
        (keep, home), *others = group
        if home is not model.graph and any(other is not home for _, other in others):
            name = name or Namer(model.graph)
            _move(keep, home, model.graph, name)
        for constant, _ in others:
            if constant.outputs:
                ir.replace_uses(constant, keep)
                log.change(constant.name, f"merged with '{keep.name}'", "equal constants")
    dead.remove_constants(model, unread)


def _is_fused(constant: Constant) -> bool:
    """Whether it belongs to codes that a layer computing in floating point reads: runtimes fuse such a layer
    with a DQ whose constants nothing else reads.
    """
    return any(
        has(node, Trait.DEQUANTIZES)
        and any(_is_layer_of_floats(reader) for reader in node.outputs[0].outputs)
        for node in constant.outputs
    )


def _is_layer_of_floats(node: Node) -> bool:
    maker = ir.producer(node.inputs[0])
    coded = maker is not None and has(maker, Trait.DEQUANTIZES)
    return spec_of(node).role is Role.LINEAR and not coded


def _move(constant: Constant, home: Graph, to: Graph, name: Namer) -> None:
    """Make a body's constant one of the main graph, where every body can read it."""
    del home.initializers[constant.name]
    constant.name = name(constant.name)
    to.initializers[constant.name] = constant


def _equal_constants(model: Model) -> Iterator[list[tuple[Constant, Graph]]]:
    """Constants that can stand for each other, with their graphs, in order."""
    alike: dict[Any, list[tuple[Constant, Graph]]] = defaultdict(list)
    for constant, home in _homes(model):
        small = constant.nbytes < MIN_SHARED_BYTES
        alike[constant.dtype, constant.shape, id(home) if small else 0].append((constant, home))
    for candidates in alike.values():
        if len(candidates) < 2:
            continue
        # Few share their first bytes, and only those are read to the end.
        heads = [_content(constant)[:HEAD_BYTES].tobytes() for constant, _ in candidates]
        shared = Counter(heads)
        equal: dict[bytes, list[tuple[Constant, Graph]]] = defaultdict(list)
        for head, (constant, home) in zip(heads, candidates, strict=True):
            if shared[head] > 1:
                equal[_digest(constant)].append((constant, home))
        for group in equal.values():
            first = _content(group[0][0])
            same = [item for item in group[1:] if np.array_equal(first, _content(item[0]))]
            if same:
                yield [group[0], *same]


def _homes(model: Model) -> list[tuple[Constant, Graph]]:
    """Constants, but for outputs of bodies, with the graph each is or will be declared in."""
    main = model.graph
    fixed = {id(tensor) for graph in model.graphs() if graph is not main for tensor in graph.outputs}
    found: dict[int, tuple[Constant, Graph]] = {}
    for graph in model.graphs():
        for constant in graph.initializers.values():
            found[id(constant)] = constant, graph
    for constant in model.constants():
        found.setdefault(id(constant), (constant, main))
    fixed.update(id(constant) for graph in model.graphs() for constant in graph.defaults.values())
    shadowed, _ = ir.shadowing(main)
    return [
        (constant, home)
        for key, (constant, home) in found.items()
        if key not in fixed
        and constant.name not in shadowed
        and not isinstance(constant.proto, SparseTensorProto)
    ]


def _digest(constant: Constant) -> bytes:
    return hashlib.blake2b(_content(constant).data).digest()


def _content(constant: Constant) -> Array:
    """The bytes of a constant as they are in a model file, mapped or copied only for the moment."""
    origin = constant.tensor_proto
    if origin is not None and origin.HasField("raw_data"):
        return np.frombuffer(origin.raw_data, np.uint8)
    values = constant.peek()
    if values.dtype.kind == "O":
        parts = (item.encode() if isinstance(item, str) else bytes(item) for item in values.reshape(-1))
        return np.frombuffer(b"".join(struct.pack("<q", len(part)) + part for part in parts), np.uint8)
    if ir.bit_width(values.dtype) % 8:
        return np.frombuffer(numpy_helper.from_array(values).raw_data, np.uint8)
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


# ----------------------------------------------------------------------------------------------- nodes


def _merge_nodes(model: Model, log: Log) -> None:
    """One sweep in the order of computation, so that the inputs of a node have been merged before it."""
    fixed, own = ir.protected(model.graph), model.functions
    shadowed, _ = ir.shadowing(model.graph)
    for graph in model.graphs():
        first: dict[Any, Node] = {}
        gone: set[int] = set()
        for node in graph.nodes:
            hidden = not shadowed.isdisjoint(tensor.name for tensor in node.outputs)
            key = signature(node) if _is_pure(node, own) and not hidden else None
            keep = first.setdefault(key, node) if key is not None else node
            if keep is node or _both_fixed(keep, node, fixed):
                continue
            log.change(node.label, f"merged with '{keep.label}'", "equal nodes")
            _stand_in(keep, node, fixed)
            gone.add(id(node))
        ir.sweep(graph, gone)


def _is_pure(node: Node, own: frozenset[tuple[str, str]]) -> bool:
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    return spec_of(node).pure and (domain, node.op) not in own and not node.bodies and bool(node.outputs)


def signature(node: Node) -> tuple[Any, ...] | None:
    """What two nodes must have in common to compute the same; None if that cannot be told."""
    attrs = tuple((name, _value_key(node.attrs[name])) for name in sorted(node.attrs))
    if any(value is None for _, value in attrs):
        return None
    inputs = [id(tensor) if tensor.name else 0 for tensor in node.inputs]
    while inputs and inputs[-1] == 0:
        inputs.pop()
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    made = tuple(bool(tensor.name) for tensor in node.outputs)
    overload = node.proto.overload if node.proto is not None else ""
    return node.op, domain, overload, attrs, tuple(inputs), made


def _value_key(value: Any) -> Any:
    """An attribute's value with its type, exact to the bit; None if it is of no type that is compared."""
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, (int, str, bytes)):
        return type(value).__name__, value
    if isinstance(value, (tuple, list)):
        return tuple(_value_key(item) for item in value)
    if isinstance(value, AttributeProto) and value.type == AttributeProto.TENSOR and not value.ref_attr_name:
        return "tensor", value.t.data_type, tuple(value.t.dims), _tensor_digest(value.t)
    return None


def _tensor_digest(tensor: TensorProto) -> bytes:
    return _digest(Constant("", proto=tensor, load=lambda: files.decode(tensor, None)))


def _both_fixed(keep: Node, node: Node, fixed: set[int]) -> bool:
    return any(
        id(first) in fixed and id(second) in fixed
        for first, second in zip(keep.outputs, node.outputs, strict=True)
    )


def _stand_in(keep: Node, node: Node, fixed: set[int]) -> None:
    """Let one node stand for another; what is an output of a graph keeps its name."""
    outputs = list(node.outputs)
    ir.detach(node)
    for index, tensor in enumerate(outputs):
        if id(tensor) in fixed:
            old = keep.outputs[index]
            keep.outputs[index] = tensor
            ir.replace_uses(old, tensor)
        else:
            ir.replace_uses(tensor, keep.outputs[index])
