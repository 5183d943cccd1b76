"""What is put in the place of a node: its body, or what it is in another opset."""

from __future__ import annotations

from onnxslim.engine.editor import Editor
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Graph, Node
from onnxslim.ops import Role, spec_of
from onnxslim.ops.body import MIN_OPSET, Body, UnwrittenError, WriteBody


def obstacle(node: Node, edit: Editor) -> str:
    """Why nothing may be put in the place of a node; empty if it may."""
    home = edit.home(node)
    if home is None or not edit.can_edit(home) or any(map(edit.is_shadowed, (*node.inputs, *node.outputs))):
        return "a body uses a name for another tensor than the graph around it does"
    return f"that takes opset {MIN_OPSET}" if edit.opset < MIN_OPSET else ""


def written(node: Node, write: WriteBody, edit: Editor, opset: int) -> Graph:
    """The body of a node in operators of an opset, which its results are the outputs of.

    Raises:
        UnwrittenError: it has none, and why.
    """
    body = Body(node, opset, edit, edit.name)
    try:
        results = body.close(write(body))
        for index, (made, result) in enumerate(zip(node.outputs, results, strict=True)):
            body.require(
                result is not None or not edit.is_output(made), f"nothing is known of its output {index}"
            )
    except UnwrittenError:
        for each in body.nodes:
            ir.detach(each)
        raise
    graph = Graph("body")
    graph.nodes.extend(body.nodes)
    graph.outputs = [ir.empty() if result is None else result for result in results]
    return graph


def put(node: Node, body: Graph, edit: Editor) -> None:
    """Put a body in the place of a node.

    What it says of itself, its doc string and metadata, goes on where the body is a node of the same
    operator; its name goes to the layer in it, or else to what makes the result.
    """
    first = body.nodes[0] if len(body.nodes) == 1 else None
    if first is not None and first.op == node.op and len(first.outputs) == len(node.outputs):
        inputs, attrs = list(first.inputs), dict(first.attrs)
        ir.detach(first)
        edit.replace_node(node, first.op, inputs, attrs)
        return
    layers = [each for each in body.nodes if spec_of(each).role is Role.LINEAR]
    for each in (layers or body.nodes[-1:])[:1]:
        each.name = node.name
    edit.inline(node, body)
