"""Parts of a graph computed with ONNX Runtime, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxslim.errors import LoadError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

MAKES = ("Cast",)

# Larger constants are handed over in memory instead of being written into the model.
MAX_WRITTEN_BYTES = 4096
_IR_VERSIONS = (4, 10)


class _Excerpt:
    """The model that computes some nodes, under names that cannot clash."""

    def __init__(self, known: Mapping[int, Array]) -> None:
        self.graph = Graph("part")
        self.feeds: dict[str, Array] = {}
        self._known = known
        self._twins: dict[int, Tensor] = {}

    def add(self, node: Node) -> None:
        """Add a node; what it reads must be known or made by a node added before."""
        inputs = [self._read(tensor) for tensor in node.inputs]
        outputs = [self._made(tensor) for tensor in node.outputs]
        twin = Node(node.op, "", node.attrs, inputs, outputs, node.domain, node.proto)
        twin.imported = node.imported
        self.graph.nodes.append(twin)

    def want(self, tensor: Variable, dtype: np.dtype[Any]) -> str:
        """Make a tensor an output and return its name there."""
        twin = self._twins[id(tensor)]
        if _native(dtype):
            output = twin
        else:
            # ONNX Runtime cannot hand these types to NumPy; float32 holds each of their values.
            output = Variable(f"{twin.name}_wide")
            self.graph.nodes.append(Node("Cast", "", {"to": onnx.TensorProto.FLOAT}, [twin], [output]))
        self.graph.outputs.append(output)
        return output.name

    def _made(self, tensor: Variable) -> Variable:
        if not tensor.name:
            return ir.empty()
        twin = self._twins[id(tensor)] = Variable(f"t{len(self._twins)}")
        return twin

    def _read(self, tensor: Tensor) -> Tensor:
        if not tensor.name:
            return ir.empty()
        if id(tensor) not in self._twins:
            self._twins[id(tensor)] = self._constant(tensor, f"t{len(self._twins)}")
        return self._twins[id(tensor)]

    def _constant(self, tensor: Tensor, name: str) -> Tensor:
        values = np.asarray(tensor.values if isinstance(tensor, Constant) else self._known[id(tensor)])
        if values.nbytes <= MAX_WRITTEN_BYTES or not _native(values.dtype):
            return Constant(name, values)
        self.feeds[name] = values
        fed = Variable(name, values.dtype, values.shape)
        self.graph.inputs.append(fed)
        return fed


def evaluate(
    model: Model,
    nodes: Sequence[Node],
    wanted: Iterable[tuple[Variable, np.dtype[Any]]],
    known: Mapping[int, Array],
) -> dict[int, Array]:
    """Values of tensors that nodes make from constants.

    Args:
        model: what the nodes belong to.
        nodes: in an order that can be run, of the standard domain and without bodies.
        wanted: tensors they make, with their types.
        known: values, by id, of the tensors they read that are no constants.

    Returns:
        Values by id of the tensor.

    Raises:
        LoadError: ONNX Runtime cannot compute one of them; carries its message.
    """
    part = _Excerpt(known)
    for node in nodes:
        part.add(node)
    asked = [(tensor, dtype, part.want(tensor, dtype)) for tensor, dtype in wanted]
    lowest, highest = _IR_VERSIONS
    shell = onnx.ModelProto(ir_version=max(lowest, min(highest, model.ir_version)))
    shell.opset_import.add(domain="", version=model.opset)
    # One thread, so that sums are the same on every machine.
    session = Session(Model(part.graph, shell), Target.cpu(threads=1), optimize="none", once=True)
    found = session.run(part.feeds)
    return {id(tensor): _as(found[name], dtype, tensor) for tensor, dtype, name in asked}


def _as(values: Array, dtype: np.dtype[Any], tensor: Variable) -> Array:
    if not _native(dtype):
        return values.astype(dtype)
    if values.dtype != dtype:
        raise LoadError(f"tensor '{tensor.name}' is of type {values.dtype}, not {dtype}")
    return values


def _native(dtype: np.dtype[Any]) -> bool:
    """Whether NumPy has this type itself."""
    return dtype.isbuiltin == 1
