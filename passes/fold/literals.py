"""Constants in the form the rest of the passes want them."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto

from onnxslim.ir import files, proto
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Node
from onnxslim.ir.model import Model, constant_of, is_literal, literal
from onnxslim.passes.fold.edits import Edits

MATCHES = ("Range",)


def lower_constants(edits: Edits, max_growth: int) -> None:
    """Make initializers of Constant nodes; those that are outputs of a graph stay as they are."""
    for graph in edits.model.graphs():
        gone: set[int] = set()
        for node in graph.nodes:
            if not is_literal(node) or not edits.is_standard(node) or id(node.outputs[0]) in edits.fixed:
                continue
            constant = _lowered(node, max_growth)
            if constant is None:
                edits.log.skip(node.label, "it is sparse, and would be larger as an initializer")
                continue
            edits.log.change(node.label, "made an initializer")
            tensor = node.outputs[0]
            ir.detach(node)
            gone.add(id(node))
            edits.substitute(tensor, constant, graph)
        ir.sweep(graph, gone)


def _lowered(node: Node, max_growth: int) -> Constant | None:
    name, value = node.outputs[0].name, node.attrs.get("value")
    if isinstance(value, AttributeProto):
        return Constant(name, proto=value.t, load=lambda: files.decode(value.t, None))
    sparse = node.attrs.get("sparse_value")
    if isinstance(sparse, AttributeProto):
        dense = Constant(
            name,
            proto=sparse.sparse_tensor,
            load=proto.dense(sparse.sparse_tensor, lambda tensor: files.decode(tensor, None)),
        )
        if dense.nbytes > max(max_growth, sparse.ByteSize()):
            return None
        return Constant(name, dense.values)
    for form in ("value_string", "value_strings"):
        if form in node.attrs:
            return Constant(name, np.array(node.attrs[form], np.object_))
    values = literal(node)
    return None if values is None else Constant(name, values)


def store_literals(model: Model) -> None:
    """Turn Constant nodes of the main graph into constants: some exporters write all weights that way."""
    fixed = {id(tensor) for tensor in model.graph.outputs}
    gone: set[int] = set()
    for node in model.graph.nodes:
        tensor = node.outputs[0]
        values = constant_of(tensor) if is_literal(node) and id(tensor) not in fixed else None
        if values is None:
            continue
        constant = model.graph.initializers[tensor.name] = Constant(tensor.name, values)
        ir.replace_uses(tensor, constant)
        ir.detach(node)
        gone.add(id(node))
    ir.sweep(model.graph, gone)


def make_scalars(edits: Edits) -> None:
    """Make scalars of constant vectors where Range wants scalars.

    ONNX Runtime takes a vector of one element there, but only as long as it is not a constant.
    """
    for graph in edits.model.graphs():
        for node in graph.nodes:
            if node.op != "Range" or not edits.is_standard(node):
                continue
            for index, tensor in enumerate(node.inputs):
                if isinstance(tensor, Constant) and tensor.shape == (1,):
                    edits.log.change(node.label, "reads a scalar instead of a vector of one", node.op)
                    edits.set_constant(node, index, f"{tensor.name}_scalar", tensor.values.reshape(()), graph)
