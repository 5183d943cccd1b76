"""The bodies of a model's own functions in the place of their calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto

from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.editor import Editor
from onnxslim.ir import files, proto
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Graph, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.passes import dead


@options
class Inline(Pass):
    """Replace calls of functions that the model defines itself by what these do.

    A function that needs another version of an operator than the model imports stays, and so does a call that
    hands over a graph. What is repeated makes the file larger; see `Slim`, which then leaves functions alone.
    """

    name: ClassVar[str] = "inline"
    lossless: ClassVar[bool] = True

    def run(self, model: Model, ctx: Context) -> Changes:
        """Inline calls until those are left that cannot be."""
        log = Log()
        # Functions do not call themselves, so each round is one level of calls.
        for _ in model.shell.functions:
            if not _round(model, log):
                break
        changes = log.done()
        if changes:
            dead.remove_functions(model)
        return changes


def calls(model: Model) -> Iterator[tuple[Node, FunctionProto]]:
    """Nodes that call a function of the model, with that function."""
    own = {dead.call_of(item.domain, item.name, item.overload): item for item in model.shell.functions}
    for node in model.nodes() if own else ():
        function = own.get(dead.called_by(node))
        if function is not None:
            yield node, function


def _round(model: Model, log: Log) -> bool:
    """Inline the calls there are now; True if any was. What is put in may call other functions."""
    pending = list(calls(model))
    if not pending:
        return False
    edit, done = Editor(model), False
    for node, function in pending:
        why_not = _obstacle(model, node, function, edit)
        if why_not:
            log.skip(node.label, f"not inlined: {why_not}")
            continue
        log.change(node.label, f"inlined function '{function.name}'")
        _import_domains(model, function)
        edit.inline(node, _body(node, function, edit))
        done = True
    edit.commit()
    return done


def _obstacle(model: Model, node: Node, function: FunctionProto, edit: Editor) -> str:
    home = edit.home(node)
    if home is None or not edit.can_edit(home) or any(map(edit.is_shadowed, (*node.inputs, *node.outputs))):
        return "a body uses a name for another tensor than the graph around it does"
    if node.bodies:
        return "it hands over a graph"
    if any(item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for item in function.attribute_proto):
        return "an attribute is a graph"
    return _other_version(model, function)


def _other_version(model: Model, function: FunctionProto) -> str:
    """Which operator means another one in the function than in the model."""
    versions = {_domain(item.domain): item.version for item in function.opset_import}
    for domain, version in versions.items():
        here = model.opsets.get(domain, version)
        if here == version:
            continue
        for node in dead.nested(function.node):
            if _domain(node.domain) == domain and not _is_same(node.op_type, domain, version, here):
                return f"its {node.op_type} is of opset {version}, the model's of {here}"
    return ""


def _is_same(op: str, domain: str, one: int, other: int) -> bool:
    try:
        first, second = (onnx.defs.get_schema(op, version, domain) for version in (one, other))
    except onnx.defs.SchemaError:
        return False
    return bool(first.since_version == second.since_version)


def _domain(name: str) -> str:
    return "" if name in DEFAULT_DOMAINS else name


def _import_domains(model: Model, function: FunctionProto) -> None:
    for item in function.opset_import:
        model.opsets.setdefault(_domain(item.domain), item.version)


# ------------------------------------------------------------------------------------------ one call


def _body(node: Node, function: FunctionProto, edit: Editor) -> Graph:
    """What a call stands for, with names of its own, reading the tensors that the call reads."""
    given = dict(zip(function.input, node.inputs, strict=False))
    scope: dict[str, Tensor] = {name: tensor for name, tensor in given.items() if tensor.name}
    code = GraphProto(name=function.name)
    code.node.extend(function.node)
    code.output.extend(onnx.ValueInfoProto(name=name) for name in function.output[: len(node.outputs)])
    _fill_in(code, _arguments(node, function), set(function.input) - scope.keys())
    body = proto.import_graph(code, edit.model.ir_version, lambda item: files.decode(item, None), scope)
    _name_apart(body, edit)
    return body


def _arguments(node: Node, function: FunctionProto) -> dict[str, AttributeProto]:
    """Attributes of a call, with the defaults of those it does not state."""
    defaults = {item.name: item for item in function.attribute_proto}
    stated = {item.name: item for item in node.proto.attribute} if node.proto is not None else {}
    return {**defaults, **stated}


def _fill_in(code: GraphProto, arguments: Mapping[str, AttributeProto], left_out: set[str]) -> None:
    """Put attributes in the place of references to them, and nothing in that of inputs that were left out."""
    for node in dead.nested(code.node):
        for index, name in enumerate(node.input):
            if name in left_out:
                node.input[index] = ""
        for index in reversed(range(len(node.attribute))):
            item = node.attribute[index]
            if not item.ref_attr_name:
                continue
            if item.ref_attr_name in arguments:
                name = item.name
                item.CopyFrom(arguments[item.ref_attr_name])
                item.name = name
            else:
                del node.attribute[index]


def _name_apart(body: Graph, edit: Editor) -> None:
    """Give everything that comes into being in a body a name that nothing else has."""
    for graph in ir.walk(body):
        for tensor in ir.tensors(graph):
            tensor.name = edit.name(tensor.name)
        graph.initializers = {constant.name: constant for constant in graph.initializers.values()}
        for node in graph.nodes:
            node.name = edit.name(node.name) if node.name else ""
