"""Casts around the nodes that compute in half precision, and around the constants that are stored so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from onnxslim.engine.base import Log
from onnxslim.engine.matching import excluded
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Graph, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.passes.half.facts import LARGEST, SINGLE

MATCHES = MAKES = ("Cast",)

MIN_BYTES = 4096
_NONE: Mapping[str, str] = MappingProxyType({})


class Converter:
    """Makes some nodes of a model compute in another type, with Casts around them."""

    def __init__(self, model: Model, kind: np.dtype[Any], log: Log) -> None:
        self._graph = model.graph
        self._kind = kind
        self._log = log
        self._name = Namer(model.graph)
        self._outputs = {id(tensor) for tensor in model.graph.outputs}
        self._captured = {id(t) for node in model.graph.nodes if node.bodies for t in ir.captures(node)}
        self._halves: dict[int, Tensor] = {}
        self._new: list[Node] = []

    def apply(self, chosen: list[Node]) -> None:
        """Convert these nodes."""
        half = {id(node) for node in chosen}
        for node in chosen:
            label = node.label
            if node.op == "Cast" and node.attrs.get("to") == onnx.TensorProto.FLOAT:
                node.attrs["to"] = int(onnx.helper.np_dtype_to_tensor_dtype(self._kind))
            for index, tensor in enumerate(node.outputs):
                if tensor.dtype == SINGLE and tensor.name:
                    node.outputs[index] = self._made(tensor, half)
            for index, read in enumerate(node.inputs):
                if read.dtype == SINGLE and (read.name or isinstance(read, Constant)):
                    node.inputs[index] = self._read(read)
            self._log.change(label, f"{node.op} computes in {self._kind.name}", "half precision")
        self._graph.nodes.extend(self._new)
        self._drop_unread()
        ir.sort(self._graph)

    def _made(self, tensor: Variable, half: set[int]) -> Variable:
        """The half-precision result that takes the place of a tensor, and what others read instead."""
        known = self._halves.get(id(tensor))
        result = known if isinstance(known, Variable) and not known.inputs else self._twin(tensor)
        self._halves[id(tensor)] = result
        fixed = id(tensor) in self._outputs or id(tensor) in self._captured
        if fixed or any(id(reader) not in half for reader in tensor.outputs):
            self._new.append(Node("Cast", self._name(f"{tensor.name}_Cast"), {"to": 1}, [result], [tensor]))
        return result

    def _read(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._halves:
            if isinstance(tensor, Constant):
                values = np.asarray(tensor.values).astype(self._kind)
                self._halves[id(tensor)] = Constant(self._name(f"{tensor.name}_{self._kind.name}"), values)
            elif (narrow := self._widened(tensor)) is not None:
                self._halves[id(tensor)] = narrow
            else:
                result = self._twin(tensor)
                attrs = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(self._kind))}
                self._new.append(Node("Cast", self._name(f"{result.name}_Cast"), attrs, [tensor], [result]))
                self._halves[id(tensor)] = result
        return self._halves[id(tensor)]

    def _widened(self, tensor: Tensor) -> Tensor | None:
        """What a Cast made single precision of, where that is the type."""
        maker = ir.producer(tensor)
        source = maker.input(0) if maker is not None and maker.op == "Cast" else None
        return source if source is not None and source.dtype == self._kind else None

    def _twin(self, tensor: Variable) -> Variable:
        return Variable(self._name(f"{tensor.name}_{self._kind.name}"), self._kind, tensor.shape)

    def _drop_unread(self) -> None:
        kept = self._graph.initializers
        for name in [name for name, constant in kept.items() if id(constant) in self._halves]:
            if not kept[name].outputs and id(kept[name]) not in self._outputs:
                del kept[name]


def narrow_interface(model: Model, kind: np.dtype[Any], log: Log) -> None:
    """Take and give half precision where it was single precision; Casts to what the model computes in."""
    graph, name = model.graph, Namer(model.graph)
    graph.defaults = {
        key: Constant(key, value.values.astype(kind) if value.dtype == SINGLE else value.values)
        for key, value in graph.defaults.items()
    }
    for tensor in graph.inputs:
        if tensor.dtype == SINGLE:
            wide = Variable(name(f"{tensor.name}_float32"), SINGLE, tensor.shape)
            ir.replace_uses(tensor, wide)
            tensor.dtype = kind
            graph.nodes.insert(0, Node("Cast", name(f"{tensor.name}_Cast"), {"to": 1}, [tensor], [wide]))
            log.change(tensor.name, f"taken in {kind.name}", "half precision")
    for index, output in enumerate(graph.outputs):
        if output.dtype == SINGLE and not any(output is tensor for tensor in graph.outputs[:index]):
            _narrow_output(graph, output, kind, name)
            log.change(graph.outputs[index].name, f"given in {kind.name}", "half precision")


def _narrow_output(graph: Graph, output: Tensor, kind: np.dtype[Any], name: Namer) -> None:
    """Give an output, which keeps its name, the type of half precision."""
    narrow = Variable(output.name, kind, output.shape)
    graph.outputs[:] = [narrow if tensor is output else tensor for tensor in graph.outputs]
    if isinstance(output, Constant):
        graph.initializers.pop(output.name, None)
    output.name = name(f"{output.name}_float32")
    attrs = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(kind))}
    graph.nodes.append(Node("Cast", name(f"{narrow.name}_Cast"), attrs, [output], [narrow]))


def store(
    model: Model, kind: np.dtype[Any], exclude: Sequence[str], log: Log, kept: Mapping[str, str] = _NONE
) -> None:
    """Keep large constants in half precision, with a Cast that runtimes compute once on loading.

    Args:
        model: edited in place.
        kind: the type.
        exclude: globs of nodes whose constants stay as they are.
        log: told of each.
        kept: names of constants that stay as they are, and why.
    """
    name, added = Namer(model.graph), []
    most = LARGEST[kind.name]
    fixed = {id(tensor) for tensor in model.graph.outputs}
    for constant in list(model.graph.initializers.values()):
        if constant.dtype != SINGLE or constant.nbytes < MIN_BYTES or id(constant) in fixed:
            continue
        values: Array = constant.values
        reason = next(filter(None, (excluded(exclude, node) for node in constant.outputs)), None)
        reason = reason or kept.get(constant.name)
        if reason is None and not np.abs(values).max(initial=0.0) < most:
            reason = f"it exceeds what {kind.name} holds"
        if reason is not None:
            log.skip(constant.name, reason)
            continue
        half = Constant(name(f"{constant.name}_{kind.name}"), values.astype(kind))
        restored = Variable(name(f"{constant.name}_float32"), SINGLE, constant.shape)
        ir.replace_uses(constant, restored)
        added.append(Node("Cast", name(f"{constant.name}_Cast"), {"to": 1}, [half], [restored]))
        if not constant.outputs:
            del model.graph.initializers[constant.name]
        log.change(constant.name, f"stored as {kind.name}", "half precision")
    model.graph.nodes.extend(added)
    ir.sort(model.graph)
