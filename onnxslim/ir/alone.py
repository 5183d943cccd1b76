"""Nodes taken out of a model, to be asked about by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx

from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Attribute, Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import Model


def read_name(number: int, position: int) -> str:
    """What the input at a position of a node is called in its model."""
    return f"i{number}_{position}"


def alone(
    nodes: Sequence[Node],
    model: Model,
    twin: Callable[[Tensor, str], Tensor],
    attrs: Callable[[Node], Mapping[str, Attribute]] = lambda node: node.attrs,
) -> Model:
    """A model of some nodes side by side, each with inputs and outputs of its own.

    Args:
        nodes: without bodies.
        model: what they belong to; its opsets are taken over.
        twin: makes the tensor of a name that stands for one of theirs: a constant, which the model then
            holds, or a variable.
        attrs: the attributes of a node there.

    Nodes that differ in nothing but names make the same model. Inputs and outputs that are left out stay so.
    """
    graph = Graph("alone")
    for number, node in enumerate(nodes):
        reads = [_twin(each, read_name(number, at), twin) for at, each in enumerate(node.inputs)]
        makes = [_twin(each, f"o{number}_{at}", twin) for at, each in enumerate(node.outputs)]
        made = [each if isinstance(each, Variable) else ir.empty() for each in makes]
        graph.inputs.extend(each for each in reads if each.name and isinstance(each, Variable))
        graph.initializers.update({each.name: each for each in reads if isinstance(each, Constant)})
        graph.nodes.append(Node(node.op, f"n{number}", attrs(node), reads, made, node.domain))
        graph.outputs.extend(each for each in made if each.name)
    shell = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opsets.items():
        shell.opset_import.add(domain=domain, version=version)
    return Model(graph, shell)


def _twin(tensor: Tensor, name: str, twin: Callable[[Tensor, str], Tensor]) -> Tensor:
    return twin(tensor, name) if tensor.name else ir.empty()
