"""Hiding nodes from onnx's shape inference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx.shape_inference
from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto

from onnxslim.ir.model import DEFAULT_DOMAINS

# A domain inference knows nothing of.
OPAQUE = "opaque"
# Their inference reads the type of an input without looking whether there is one; the process dies where
# there is none, as behind an operator that nobody knows.
TRUSTING = frozenset(
    (("", "RegexFullMatch"), ("ai.onnx.ml", "DictVectorizer"), ("ai.onnx.ml", "LabelEncoder"))
)
MATCHES = tuple(name for domain, name in TRUSTING if not domain)


def hide_trusting(model: onnx.ModelProto) -> None:
    """Hide, in place, the nodes at which inference would end the process."""
    graphs = list(nested(model.graph))
    hidden = [node for graph in graphs for node in graph.node if _is_trusting(node)]
    in_functions = [node for each in model.functions for node in each.node if _is_trusting(node)]
    if not hidden and not in_functions:
        return
    if all(each.domain != OPAQUE for each in model.opset_import):
        model.opset_import.add(domain=OPAQUE, version=1)
    for each in model.functions:
        each.opset_import.add(domain=OPAQUE, version=1)
    domains = {id(node): node.domain for node in hidden}
    for node in (*hidden, *in_functions):
        node.domain = OPAQUE
    while hidden:
        known = _typed(model)
        shown = [node for node in hidden if all(name in known for name in node.input if name)]
        if not shown:
            return
        for node in shown:
            node.domain = domains[id(node)]
        hidden = [node for node in hidden if node.domain == OPAQUE]


def nested(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and the bodies in it."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(
            item.g for node in current.node for item in node.attribute if item.type == AttributeProto.GRAPH
        )


def _is_trusting(node: NodeProto) -> bool:
    return ("" if node.domain in DEFAULT_DOMAINS else node.domain, node.op_type) in TRUSTING


def _typed(model: onnx.ModelProto) -> set[str]:
    """Names of tensors that have a type wherever they are declared, for all that can be told as it is."""
    try:
        found = onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return set()
    graphs = list(nested(found.graph))
    infos = [info for each in graphs for info in (*each.input, *each.value_info, *each.output)]
    constants = {tensor.name for each in graphs for tensor in each.initializer}
    return (constants | set(_names(infos, typed=True))) - set(_names(infos, typed=False))


def _names(infos: Iterable[ValueInfoProto], *, typed: bool) -> Iterator[str]:
    return (info.name for info in infos if (info.type.WhichOneof("value") is not None) == typed)
