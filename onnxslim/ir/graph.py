"""The graph that passes edit: graphsurgeon's objects with identity, and the edits they share.

graphsurgeon links nodes and tensors both ways, which is what a rewrite needs. Three things are added:

* equality is identity. graphsurgeon compares nodes field by field, which makes every removal from a list
  quadratic and lets it remove a look-alike;
* every object remembers the protobuf it came from, so that what graphsurgeon has no field for survives;
* a constant is decoded when somebody looks at it, and not before.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from onnxslim.errors import LoadError

Array: TypeAlias = NDArray[Any]
Dim: TypeAlias = int | str | None
Shape: TypeAlias = tuple[Dim, ...] | None
Attribute: TypeAlias = Any  # int, float, str, bytes, a tuple of those, a Graph, or the AttributeProto itself

# Types that share bytes in a model file.
_PACKED_BITS = {
    **dict.fromkeys(("float6_e2m3fn", "float6_e3m2fn"), 6),
    **dict.fromkeys(("int4", "uint4", "float4_e2m1fn"), 4),
    **dict.fromkeys(("int2", "uint2"), 2),
}
_PENDING = np.empty(0, np.uint8)

# Attention masks are built from constants such as float32's lowest value (-3.4e38) or -1e38. They mean
# "never look here"; a range that reached out to one would leave no level for anything else. No activation a
# network computes with comes near 1e30. Masks of -10000 are ordinary values: such numbers do occur.
MASK_MAGNITUDE = 1e30


class Variable(gs.Variable):
    """A tensor that is computed, or fed by the caller.

    Attributes:
        dtype: NumPy type of its elements; None if unknown or if it is not a tensor.
        shape: a size, a symbol or None for each axis; None if the rank is unknown.
        proto: the declaration it was read from; sequences, optionals and maps exist only there.
        declared: name, type and shape in that; None where nobody has asked yet.
        inputs: the node that makes it, if any.
        outputs: every node that reads it, once per use, those of nested graphs included.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    inputs: list[Node]
    outputs: list[Node]
    dtype: np.dtype[Any] | None
    shape: Shape
    declared: tuple[str, np.dtype[Any] | None, Shape] | None

    def __init__(
        self,
        name: str,
        dtype: np.dtype[Any] | None = None,
        shape: Shape = None,
        proto: onnx.ValueInfoProto | None = None,
    ) -> None:
        super().__init__(name, dtype, shape)
        self.proto = proto
        self.declared = None if proto is None else (name, dtype, shape)


class Constant(gs.Constant):
    """A tensor whose values are in the model.

    Args:
        name: its name.
        values: its values, treated as immutable from here on.
        proto: what it was read from, written back unless `values` is replaced.
        load: decodes `proto` when the values are first needed.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    inputs: list[Node]
    outputs: list[Node]

    def __init__(
        self,
        name: str,
        values: Array | None = None,
        *,
        proto: onnx.TensorProto | onnx.SparseTensorProto | None = None,
        load: Callable[[], Array] | None = None,
    ) -> None:
        super().__init__(name, _PENDING)
        self._values: Array | None = values
        self.proto = proto
        self.load = load

    @property
    def values(self) -> Array:
        """The values, shape and dtype as declared; of a memory map where they lie outside the file."""
        if self._values is None:
            assert self.load is not None
            self._values = self.load()
        return self._values

    @values.setter
    def values(self, values: Array) -> None:
        self._values, self.proto, self.load = values, None, None

    def peek(self) -> Array:
        """The values for the moment: what has not been decoded yet is not kept, and no file stays mapped."""
        return self.load() if self._values is None and self.load is not None else self.values

    @property
    def tensor_proto(self) -> onnx.TensorProto | None:
        """The dense proto it was read from, if there is one."""
        return self.proto if isinstance(self.proto, onnx.TensorProto) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size along each axis."""
        return tuple(self.proto.dims) if self.proto is not None else self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of its elements (ml_dtypes for what NumPy lacks; object for strings)."""
        if self.proto is None:
            return self.values.dtype
        dense = self.proto if isinstance(self.proto, onnx.TensorProto) else self.proto.values
        return np.dtype(helper.tensor_dtype_to_np_dtype(dense.data_type))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values in a model file."""
        return (self.size * bit_width(self.dtype) + 7) // 8


Tensor: TypeAlias = Variable | Constant


class Node(gs.Node):
    """One operator.

    Attributes:
        proto: the declaration it was read from: doc string, metadata, overload and device placement
            exist only there.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    inputs: list[Tensor]
    outputs: list[Variable]
    attrs: dict[str, Attribute]
    domain: str

    def __init__(
        self,
        op: str,
        name: str = "",
        attrs: Mapping[str, Attribute] | None = None,
        inputs: Iterable[Tensor] = (),
        outputs: Iterable[Variable] = (),
        domain: str = "",
        proto: onnx.NodeProto | None = None,
    ) -> None:
        super().__init__(op, name, dict(attrs or {}), list(inputs), list(outputs), domain)
        self.proto = proto
        self.imported: dict[str, Attribute] = {}

    @property
    def label(self) -> str:
        """How messages name this node: its name, or its operator and first output."""
        return self.name or f"{self.op}→{self.outputs[0].name if self.outputs else '?'}"

    @property
    def bodies(self) -> list[Graph]:
        """The graphs this node runs (branches of If, bodies of Loop and Scan)."""
        return [value for value in self.attrs.values() if isinstance(value, Graph)]

    def input(self, index: int) -> Tensor | None:
        """The tensor at an input, or None where an optional one is left out."""
        if index >= len(self.inputs) or self.inputs[index].name == "":
            return None
        return self.inputs[index]

    def constant(self, index: int) -> Array | None:
        """The values at an input if they are in the model, else None."""
        tensor = self.input(index)
        return tensor.values if isinstance(tensor, Constant) else None


class Graph(gs.Graph):
    """A graph or a nested body.

    Attributes:
        initializers: the constants declared here, by name, used or not.
        defaults: values of graph inputs which the caller may leave out, by name.
        proto: the declaration without nodes, tensors and values: doc string, metadata, annotations.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    nodes: list[Node]
    inputs: list[Variable]
    outputs: list[Tensor]

    def __init__(self, name: str = "graph", proto: onnx.GraphProto | None = None) -> None:
        super().__init__([], [], [], name=name)
        self.initializers: dict[str, Constant] = {}
        self.defaults: dict[str, Constant] = {}
        self.proto = proto


def empty() -> Variable:
    """What stands for an optional input or output that is left out."""
    return Variable("")


@cache
def bit_width(dtype: np.dtype[Any]) -> int:
    """Bits of one element in a model file; sub-byte types are packed, strings count as 0."""
    if dtype.kind == "O":
        return 0
    return _PACKED_BITS.get(dtype.name, dtype.itemsize * 8)


def walk(graph: Graph) -> Iterator[Graph]:
    """The graph and every graph nested in it, outer before inner, without recursion."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        for node in reversed(current.nodes):
            # This runs for every node, over and over; hardly any has a body.
            for value in node.attrs.values():
                if isinstance(value, Graph):
                    pending.extend(reversed(node.bodies))
                    break


def all_nodes(graph: Graph) -> Iterator[Node]:
    """Every node of the graph and of those nested in it."""
    for each in walk(graph):
        yield from each.nodes


def captures(node: Node) -> Iterator[Tensor]:
    """The tensors of enclosing graphs that the bodies of this node read."""
    for body in node.bodies:
        local: set[int] = set()
        for graph in walk(body):
            local.update(id(tensor) for tensor in graph.inputs)
            local.update(id(tensor) for tensor in graph.initializers.values())
            local.update(id(out) for inner in graph.nodes for out in inner.outputs)
        for graph in walk(body):
            for inner in graph.nodes:
                yield from (tensor for tensor in inner.inputs if tensor.name and id(tensor) not in local)
            yield from (tensor for tensor in graph.outputs if id(tensor) not in local)


def protected(graph: Graph) -> set[int]:
    """Ids of the tensors that are outputs of the graph or of one nested in it: their names are fixed."""
    return {id(tensor) for each in walk(graph) for tensor in each.outputs}


def tensors(graph: Graph) -> Iterator[Tensor]:
    """The tensors that come into being in this graph itself."""
    yield from graph.inputs
    yield from graph.initializers.values()
    yield from (tensor for node in graph.nodes for tensor in node.outputs if tensor.name)


def shadowing(graph: Graph) -> tuple[set[str], set[int]]:
    """Names a body declares although a graph around it has them too, and the ids of the graphs inside
    which such a name does not mean the outer tensor."""
    names: set[str] = set()
    inside: set[int] = set()
    pending: list[tuple[Graph, tuple[frozenset[str], ...]]] = [(graph, ())]
    while pending:
        current, around = pending.pop()
        mine = frozenset(tensor.name for tensor in tensors(current))
        hidden = {name for name in mine if any(name in outer for outer in around)}
        if hidden:
            names |= hidden
            inside.update(id(each) for each in walk(current))
        pending.extend((body, (*around, mine)) for node in current.nodes for body in node.bodies)
    return names, inside


def producer(tensor: Tensor | None) -> Node | None:
    """The node that makes this tensor; None for inputs, constants and omitted tensors."""
    return tensor.inputs[0] if tensor is not None and tensor.inputs else None


def replace_uses(old: Tensor, new: Tensor) -> None:
    """Make every node that reads `old` read `new`; graph outputs stay what they are."""
    for node in dict.fromkeys(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def detach(node: Node) -> None:
    """Unlink a node from its tensors; `sweep` drops it from its graph."""
    node.inputs.clear()
    node.outputs.clear()


def sweep(graph: Graph, gone: set[int]) -> None:
    """Drop the nodes with these ids from this graph, in one pass."""
    if gone:
        graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]


def names_in_use(graph: Graph) -> set[str]:
    """Names of all nodes and tensors of the graph and those nested in it."""
    names: set[str] = set()
    for each in walk(graph):
        names.update(each.initializers)
        names.update(tensor.name for tensor in (*each.inputs, *each.outputs))
        for node in each.nodes:
            names.add(node.name)
            names.update(tensor.name for tensor in (*node.inputs, *node.outputs))
    return names


class Namer:
    """Gives new tensors and nodes readable names that nothing in the graph has, the same on every run."""

    def __init__(self, graph: Graph) -> None:
        self._taken = names_in_use(graph)

    def __call__(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def sort(graph: Graph) -> None:
    """Put the nodes of this graph (not of nested ones) in an order that can be run.

    Kahn's algorithm on the present order as priority, so a graph that is in order stays as it is. Our own, as
    it runs after every edit: networkx takes two to three times as long, most of it to build its graph.

    Raises:
        LoadError: the nodes form a cycle; names one on it.
    """
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    blockers = [0] * len(graph.nodes)
    dependents: list[list[int]] = [[] for _ in graph.nodes]
    for index, node in enumerate(graph.nodes):
        reads = list(node.inputs) if not node.bodies else [*node.inputs, *captures(node)]
        made_by = {position.get(id(tensor.inputs[0])) for tensor in reads if tensor.inputs}
        for earlier in made_by:
            if earlier is not None:
                dependents[earlier].append(index)
                blockers[index] += 1
    ready = [index for index, count in enumerate(blockers) if count == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for later in dependents[index]:
            blockers[later] -= 1
            if blockers[later] == 0:
                heapq.heappush(ready, later)
    if len(order) != len(graph.nodes):
        stuck = graph.nodes[_first_on_a_cycle(dependents)]
        raise LoadError(f"the graph has a cycle through node '{stuck.label}' ({stuck.op})")
    graph.nodes[:] = [graph.nodes[index] for index in order]


def _first_on_a_cycle(dependents: Sequence[Sequence[int]]) -> int:
    """The first node of a cycle; what merely depends on one is not on it."""
    import networkx as nx

    first: int = min(tail for tail, _ in nx.find_cycle(nx.DiGraph(dict(enumerate(dependents)))))
    return first


def copy(graph: Graph) -> Graph:
    """A deep copy of the structure; values and protobufs are shared, as nobody changes them in place."""
    return _copy_into(graph, {})


def _copy_into(graph: Graph, known: dict[int, Tensor]) -> Graph:
    twin = Graph(graph.name, graph.proto)

    def of(tensor: Tensor) -> Tensor:
        if not tensor.name:
            return empty()
        if id(tensor) not in known:
            known[id(tensor)] = _copy_tensor(tensor)
        return known[id(tensor)]

    twin.inputs = [of(tensor) for tensor in graph.inputs]  # type: ignore[misc]
    twin.initializers = {name: of(value) for name, value in graph.initializers.items()}  # type: ignore[misc]
    twin.defaults = dict(graph.defaults)
    # Tensors first: a body may read what an outer node makes only further down the list.
    outputs = [[of(tensor) for tensor in node.outputs] for node in graph.nodes]
    for node, makes in zip(graph.nodes, outputs, strict=True):
        attrs = {
            name: _copy_into(value, known) if isinstance(value, Graph) else value
            for name, value in node.attrs.items()
        }
        reads = [of(tensor) for tensor in node.inputs]
        copied = Node(node.op, node.name, attrs, reads, makes, node.domain, node.proto)  # type: ignore[arg-type]
        copied.imported = node.imported
        twin.nodes.append(copied)
    twin.outputs = [of(tensor) for tensor in graph.outputs]
    return twin


def _copy_tensor(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Variable):
        twin = Variable(tensor.name, tensor.dtype, tensor.shape, tensor.proto)
        twin.declared = tensor.declared
        return twin
    return Constant(tensor.name, tensor._values, proto=tensor.proto, load=tensor.load)
