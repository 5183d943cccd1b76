"""The edits that folding makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir import proto
from onnxslim.ir.graph import Array, Constant, Graph, Namer, Node, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.passes import dead

MAKES = ("Cast", "Constant")

_NONE: Mapping[int, Array | None] = MappingProxyType({})


class Edits:
    """Replaces nodes by their values, and cleans up after that."""

    def __init__(self, model: Model, log: Log) -> None:
        self.model, self.log = model, log
        self.fixed = ir.protected(model.graph)
        self._own = model.functions
        self._storable = _constant_types(model.opset)
        self._name: Namer | None = None
        self._unread = dead.unread(model)
        # Nodes that lost a reader.
        self._makers: list[Node] = []

    def is_standard(self, node: Node) -> bool:
        """Whether a node is of the standard domain and not of a function of the model that hides it."""
        return node.domain in DEFAULT_DOMAINS and ("", node.op) not in self._own

    def can_store(self, tensor: Variable, dtype: np.dtype[Any]) -> bool:
        """Whether a tensor can be replaced by values; early Constant nodes, for outputs, only hold floats."""
        return id(tensor) not in self.fixed or dtype in self._storable

    def replace(
        self, nodes: Iterable[Node], values: Mapping[int, Array], narrowed: Mapping[int, Array | None] = _NONE
    ) -> None:
        """Put values, by id of the tensor, in the place of nodes; some in a narrower type, with a Cast."""
        gone = {id(node) for node in nodes}
        for graph in self.model.graphs():
            if gone.isdisjoint(id(node) for node in graph.nodes):
                continue
            kept: list[Node] = []
            for node in graph.nodes:
                kept.extend(self._store(node, values, narrowed, graph) if id(node) in gone else [node])
            graph.nodes[:] = kept

    def _store(
        self, node: Node, values: Mapping[int, Array], narrowed: Mapping[int, Array | None], graph: Graph
    ) -> Iterator[Node]:
        """Store the outputs of a node; yields the Cast of a narrower one, and the Constant of an output."""
        self.log.change(node.label, "computed ahead of time", node.op)
        outputs = list(node.outputs)
        self.forget_inputs(node)
        for tensor in outputs:
            if id(tensor) not in values:
                continue
            narrow = narrowed.get(id(tensor))
            if narrow is not None:
                yield self._cast(node.name, narrow, values[id(tensor)].dtype, tensor, graph)
            elif id(tensor) in self.fixed:
                yield Node("Constant", node.name, {"value": _attribute(values[id(tensor)])}, [], [tensor])
            else:
                self.substitute(tensor, Constant(tensor.name, np.asarray(values[id(tensor)])), graph)

    def _cast(self, name: str, narrow: Array, dtype: np.dtype[Any], tensor: Variable, graph: Graph) -> Node:
        constant = Constant(self.fresh(f"{tensor.name}_narrow"), narrow)
        self.declare(constant, graph)
        return Node("Cast", name, {"to": proto.elem_type_of(dtype)}, [constant], [tensor])

    def forget_inputs(self, node: Node) -> None:
        """Unlink a node and remember what it read."""
        self._makers.extend(maker for tensor in node.inputs if (maker := ir.producer(tensor)))
        ir.detach(node)

    def release(self, node: Node) -> None:
        """Remember that a node has lost readers."""
        self._makers.append(node)

    def substitute(self, tensor: Variable, constant: Constant, graph: Graph) -> None:
        """Let a constant stand for a tensor that has lost its maker."""
        self.declare(constant, graph)
        ir.replace_uses(tensor, constant)

    def set_constant(self, node: Node, index: int, wanted: str, values: Array, graph: Graph) -> None:
        """Give a node of a graph a constant input, named after `wanted`."""
        constant = Constant(self.fresh(wanted), values)
        self.declare(constant, graph)
        self._makers.extend(node.inputs[index].inputs)
        node.inputs[index] = constant

    def declare(self, constant: Constant, graph: Graph) -> None:
        """Add a constant to a graph; a body of an old model cannot have any, so it goes to the main graph."""
        if graph is self.model.graph or self.model.ir_version >= proto.OVERRIDABLE_SINCE_IR:
            graph.initializers[constant.name] = constant
        else:
            constant.name = self.fresh(constant.name)

    def fresh(self, wanted: str) -> str:
        """A name that nothing in the model has."""
        if self._name is None:
            self._name = Namer(self.model.graph)
        return self._name(wanted)

    def clean_up(self) -> None:
        """Remove what nothing reads any more."""
        dead.remove_nodes(self.model, self._makers)
        dead.remove_constants(self.model, self._unread)


def _constant_types(opset: int) -> set[np.dtype[Any]]:
    """Element types of Constant nodes."""
    allowed = onnx.defs.get_schema("Constant", opset, "").type_constraints[0].allowed_type_strs
    names = {name.removeprefix("tensor(").removesuffix(")").upper() for name in allowed}
    types = (proto.dtype_of(number) for name, number in TensorProto.DataType.items() if name in names)
    return {dtype for dtype in types if dtype is not None}


def _attribute(values: Array) -> AttributeProto:
    return AttributeProto(name="value", type=AttributeProto.TENSOR, t=numpy_helper.from_array(values))
