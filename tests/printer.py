"""A model as text that is the same on every run: for snapshots, diffs and reading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from onnx import AttributeProto, helper

from onnxslim.ir.graph import Array, Attribute, Constant, Dim, Graph, Node, Tensor
from onnxslim.ir.model import Model

MAX_PRINTED = 8


def text(model: Model) -> str:
    """Inputs, constants, nodes and outputs, one a line; values of larger constants as a digest."""
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opsets.items()))
    return "\n".join((f"model ir {model.ir_version} opset {opsets}", *_graph(model.graph, ""))) + "\n"


def _graph(graph: Graph, indent: str) -> Iterator[str]:
    yield f"{indent}graph {graph.name}"
    inner = indent + "  "
    for tensor in graph.inputs:
        default = f" = {_values(graph.defaults[tensor.name].values)}" if tensor.name in graph.defaults else ""
        yield f"{inner}input {_typed(tensor)}{default}"
    for constant in _constants(graph):
        yield f"{inner}const {_typed(constant)} = {_values(constant.values)}"
    for node in graph.nodes:
        yield from _node(node, inner)
    for output in graph.outputs:
        yield f"{inner}output {_typed(output)}"


def _constants(graph: Graph) -> list[Constant]:
    found = dict(graph.initializers)
    for node in graph.nodes:
        found.update({t.name: t for t in node.inputs if isinstance(t, Constant) and t.name not in found})
    return list(found.values())


def _node(node: Node, indent: str) -> Iterator[str]:
    outputs = ", ".join(tensor.name or "_" for tensor in node.outputs)
    inputs = ", ".join(tensor.name or "_" for tensor in node.inputs)
    attrs = [
        f"{name}={_attribute(value)}" for name, value in sorted(node.attrs.items()) if not _is_body(value)
    ]
    domain = f"{node.domain}." if node.domain else ""
    yield f"{indent}{outputs} = {domain}{node.op}{'<' + ', '.join(attrs) + '>' if attrs else ''}({inputs})"
    for body in node.bodies:
        yield from _graph(body, indent + "  ")


def _is_body(value: Attribute) -> bool:
    return isinstance(value, Graph)


def _attribute(value: Attribute) -> str:
    if isinstance(value, AttributeProto):
        return " ".join(str(helper.printable_attribute(value)).split())
    if isinstance(value, tuple):
        return "[" + ", ".join(_attribute(item) for item in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _typed(tensor: Tensor) -> str:
    dtype = tensor.dtype.name if tensor.dtype is not None else "?"
    if tensor.shape is None:
        return f"{dtype} {tensor.name}"
    return f"{dtype}[{','.join(_dim(dim) for dim in tensor.shape)}] {tensor.name}"


def _dim(dim: Dim) -> str:
    return "?" if dim is None else str(dim)


def _values(values: Array) -> str:
    if values.size > MAX_PRINTED:
        return "#" + hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:12]
    if values.dtype.kind == "f":
        return np.array2string(values.astype(np.float64), precision=6, separator=",", max_line_width=10_000)
    return np.array2string(values, separator=",", max_line_width=10_000)
