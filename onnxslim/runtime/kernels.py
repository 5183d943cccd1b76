"""Whether a target can run operators in another type, found out by opening models of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx

from onnxslim.errors import LoadError, TargetError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

MATCHES = ("Cast",)

# Larger constants are read as inputs: no kernel is chosen by the values of weights.
MAX_BYTES = 1024
_WIDE = np.dtype(np.float32)


def without_kernel(nodes: Sequence[Node], model: Model, kind: np.dtype[Any], target: Target) -> list[int]:
    """Ids of the nodes that a target refuses once they compute in a type instead of float32.

    Args:
        nodes: of the standard domain, without bodies.
        model: what they belong to.
        kind: the type.
        target: what is asked. Nodes that differ in nothing but tensors of other shapes are asked of together.
    """
    alike: dict[str, list[Node]] = {}
    for node in nodes:
        types = [tensor.dtype for tensor in (*node.inputs, *node.outputs)]
        alike.setdefault(f"{node.op} {sorted(node.attrs.items(), key=str)} {types}", []).append(node)
    groups = list(alike.values())
    return [id(node) for group in _refused(groups, model, kind, target) for node in group]


def _refused(groups: list[list[Node]], model: Model, kind: np.dtype[Any], target: Target) -> list[list[Node]]:
    """All at once, and in halves where that does not open."""
    if not groups or _opens(_alone([group[0] for group in groups], model, kind), target):
        return []
    if len(groups) == 1:
        return groups
    middle = len(groups) // 2
    halves = groups[:middle], groups[middle:]
    return [group for half in halves for group in _refused(half, model, kind, target)]


@lru_cache(256)
def _opens(model: bytes, target: Target) -> bool:
    try:
        Session(onnx.ModelProto.FromString(model), target, optimize="none")
    except (LoadError, TargetError):
        return False
    return True


def _alone(nodes: Sequence[Node], model: Model, kind: np.dtype[Any]) -> bytes:
    """A model of these nodes side by side, each with inputs of its own."""
    graph = Graph("kernels")
    for number, node in enumerate(nodes):
        inputs = [_input(tensor, f"i{number}_{at}", kind, graph) for at, tensor in enumerate(node.inputs)]
        outputs = [_made(tensor, f"o{number}_{at}", kind) for at, tensor in enumerate(node.outputs)]
        attrs = dict(node.attrs)
        if node.op == "Cast" and attrs.get("to") == onnx.TensorProto.FLOAT:
            attrs["to"] = int(onnx.helper.np_dtype_to_tensor_dtype(kind))
        graph.nodes.append(Node(node.op, f"n{number}", attrs, inputs, outputs))
        graph.outputs.extend(tensor for tensor in outputs if tensor.name)
    shell = onnx.ModelProto(ir_version=model.ir_version)
    shell.opset_import.add(domain="", version=model.opset)
    return bytes(Model(graph, shell).to_proto().SerializeToString())


def _input(tensor: Tensor, name: str, kind: np.dtype[Any], graph: Graph) -> Tensor:
    if isinstance(tensor, Constant) and tensor.nbytes <= MAX_BYTES:
        values = np.asarray(tensor.values)
        return Constant(name, values.astype(kind) if tensor.dtype == _WIDE else values)
    fed = _made(tensor, name, kind)
    if fed.name:
        graph.inputs.append(fed)
    return fed


def _made(tensor: Tensor, name: str, kind: np.dtype[Any]) -> Variable:
    if not tensor.name:
        return ir.empty()
    return Variable(name, kind if tensor.dtype == _WIDE else tensor.dtype, tensor.shape)
