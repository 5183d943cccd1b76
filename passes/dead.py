"""What nothing reads: nodes, constants, functions, and optional outputs nobody asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from typing import ClassVar, TypeAlias

import onnx
from onnx.defs import OpSchema
from pydantic import Field

from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Graph, Node
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ir.proto import fields_but
from onnxslim.ops import Trait, has

# What exporters note on nodes and attributes, and no runtime reads.
_NOTED = ("doc_string", "metadata_props")

Call: TypeAlias = tuple[str, str, str]  # domain, name, overload

_OPTIONAL = OpSchema.FormalParameterOption.Optional


NOTES = "drop doc strings and metadata of nodes, and types and shapes noted of tensors between them"


@options
class Dead(Pass):
    """Remove nodes, constants, functions and optional outputs that nothing reads.

    Graph inputs stay, used or not, and so do outputs and names.
    """

    name: ClassVar[str] = "dead"
    lossless: ClassVar[bool] = True

    drop_notes: bool = Field(False, description=NOTES)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Remove what nothing reads."""
        log = Log()
        if self.drop_notes:
            _drop_notes(model, log)
        for label in remove_nodes(model, list(model.nodes())):
            log.change(label, "removed", "nothing reads its outputs")
        fixed, own = ir.protected(model.graph), model.functions
        for node in model.nodes():
            if ("", node.op) not in own and _trim(node, model.opset, fixed):
                log.change(node.label, "optional inputs or outputs left out", "nothing uses them")
        for name in remove_constants(model):
            log.change(name, "removed", "nothing reads this constant")
        for name in remove_functions(model):
            log.change(name, "removed", "nothing calls this function")
        return log.done()


def remove_nodes(model: Model, seeds: Iterable[Node]) -> list[str]:
    """Remove those of the nodes that nothing reads, and what only they read, bodies included.

    Args:
        model: edited in place.
        seeds: nodes to begin with.

    Returns:
        Labels of the removed nodes.
    """
    fixed = Counter(id(tensor) for graph in model.graphs() for tensor in graph.outputs)
    gone: dict[int, Node] = {}
    labels: list[str] = []
    pending = list(reversed(list(seeds)))
    while pending:
        node = pending.pop()
        if id(node) in gone or _is_read(node, fixed):
            continue
        labels.append(node.label)
        reads = [*node.inputs, *ir.captures(node)]
        for body in node.bodies:
            for graph in ir.walk(body):
                fixed.subtract(id(tensor) for tensor in graph.outputs)
                gone.update((id(inner), inner) for inner in graph.nodes)
                for inner in graph.nodes:
                    ir.detach(inner)
        makers = [maker for tensor in reads if (maker := ir.producer(tensor)) is not None]
        ir.detach(node)
        gone[id(node)] = node
        pending.extend(makers)
    for graph in list(model.graphs()):
        ir.sweep(graph, set(gone))
    return labels


def _is_read(node: Node, fixed: Counter[int]) -> bool:
    """Whether anything reads an output; a foreign operator without outputs may act in another way."""
    if not node.outputs and node.domain not in DEFAULT_DOMAINS:
        return True
    return any(tensor.outputs or fixed[id(tensor)] > 0 for tensor in node.outputs)


def unread(model: Model) -> set[int]:
    """Ids of the declared constants that no node reads."""
    declared = (constant for graph in model.graphs() for constant in graph.initializers.values())
    return {id(constant) for constant in declared if not constant.outputs}


def remove_constants(model: Model, keep: Set[int] = frozenset()) -> list[str]:
    """Remove declared constants that nothing reads.

    Args:
        model: edited in place. One with training information keeps all, as that may refer to them.
        keep: ids of those that stay.

    Returns:
        Names of the removed constants.
    """
    if model.shell.training_info:
        return []
    spare = unread(model) - keep - ir.protected(model.graph)
    removed: list[str] = []
    for graph in model.graphs():
        annotated = _annotations(graph)
        for name, constant in list(graph.initializers.items()):
            if id(constant) in spare and name not in annotated:
                del graph.initializers[name]
                removed.append(name)
    return removed


def _annotations(graph: Graph) -> set[str]:
    """Names of constants that describe the quantization of other tensors."""
    if graph.proto is None:
        return set()
    pairs = (
        pair for item in graph.proto.quantization_annotation for pair in item.quant_parameter_tensor_names
    )
    return {pair.value for pair in pairs}


def _trim(node: Node, opset: int, fixed: set[int]) -> bool:
    """Drop optional inputs and outputs at the end of the lists that are left out or not read."""
    schema = _schema(node, opset)
    if schema is None:
        return False
    before = len(node.inputs), len(node.outputs)
    while len(node.inputs) > schema.min_input and node.inputs[-1].name == "":
        node.inputs.pop()
    while not has(node, Trait.COUNTS_OUTPUTS) and _has_spare_output(node, schema, fixed):
        node.outputs.pop()
    return before != (len(node.inputs), len(node.outputs))


def _schema(node: Node, opset: int) -> OpSchema | None:
    if node.domain not in DEFAULT_DOMAINS:
        return None
    try:
        return onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _has_spare_output(node: Node, schema: OpSchema, fixed: set[int]) -> bool:
    last = len(node.outputs) - 1
    if last < max(1, schema.min_output) or last >= len(schema.outputs):
        return False
    tensor = node.outputs[last]
    return schema.outputs[last].option == _OPTIONAL and not tensor.outputs and id(tensor) not in fixed


def remove_functions(model: Model) -> list[str]:
    """Remove the model's own functions that no node calls, directly or through others."""
    functions = {call_of(item.domain, item.name, item.overload): item for item in model.shell.functions}
    if not functions:
        return []
    import networkx as nx

    calls: dict[object, list[Call]] = {call: list(_calls(item.node)) for call, item in functions.items()}
    calls[model] = [called_by(node) for node in model.nodes()]
    reached = nx.descendants(nx.DiGraph(calls), model)
    unused = [call for call in functions if call not in reached]
    if unused:
        # The shell is shared with copies of the model.
        shell = fields_but(model.shell, "functions")
        shell.functions.extend(item for call, item in functions.items() if call in reached)
        model.shell = shell
    return [name for _, name, _ in unused]


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[Call]:
    for node in nested(nodes):
        yield call_of(node.domain, node.op_type, node.overload)


def nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those in their bodies."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        for item in node.attribute:
            for body in (item.g, *item.graphs) if item.HasField("g") else item.graphs:
                pending.extend(body.node)


def called_by(node: Node) -> Call:
    """What a node calls, if it is a function of the model."""
    return call_of(node.domain, node.op, node.proto.overload if node.proto is not None else "")


def call_of(domain: str, name: str, overload: str) -> Call:
    """What a node must name to call a function."""
    return "" if domain in DEFAULT_DOMAINS else domain, name, overload


def _drop_notes(model: Model, log: Log) -> None:
    """Drop what exporters note on every node; what is said of the model, its inputs and outputs stays."""
    for node in model.nodes():
        if node.proto is not None and _is_noted(node.proto):
            node.proto = _without_notes(node.proto)
            log.change(node.label, "dropped its notes", "doc strings and metadata")
    for graph in model.graphs():
        if graph.proto is not None and graph.proto.value_info:
            # Constants are written from their own protobufs; copied with the graph they would be there twice.
            lean = fields_but(graph.proto, "node", "initializer", "sparse_initializer", "value_info")
            log.change(graph.name or "model", f"dropped {len(graph.proto.value_info)} types and shapes")
            graph.proto = lean
            _forget(graph)


def _forget(graph: Graph) -> None:
    """Have no type or shape written of tensors between nodes."""
    fixed = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in (each for node in graph.nodes for each in node.outputs):
        if id(tensor) not in fixed:
            tensor.proto = None


def _is_noted(node: onnx.NodeProto) -> bool:
    own = any(getattr(node, field) for field in _NOTED)
    return own or any(item.doc_string for item in node.attribute)


def _without_notes(node: onnx.NodeProto) -> onnx.NodeProto:
    bare = fields_but(node, *_NOTED)
    for item in bare.attribute:
        item.ClearField("doc_string")
    return bare
