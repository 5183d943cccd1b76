"""What a model costs to run, from the facts of its operators."""

from __future__ import annotations

from collections.abc import Mapping

from onnxslim.ir.model import Model
from onnxslim.ops import spec_of
from onnxslim.shapes.dims import dims_of


def sized(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> Model:
    """A copy of which every tensor has the type and shape that follow from the operators.

    Args:
        model: not modified.
        inputs: shapes of the inputs; where there are none, a free axis is taken as 1.
    """
    copy = model.copy()
    for tensor in copy.graph.inputs:
        given = (inputs or {}).get(tensor.name, tensor.shape)
        if given is not None:
            tensor.shape = tuple(dim if isinstance(dim, int) else 1 for dim in given)
    facts = dims_of(copy).facts
    for made in (tensor for node in copy.nodes() for tensor in node.outputs):
        fact = facts.get(id(made))
        made.shape, made.dtype = (fact.shape, fact.dtype) if fact else (None, None)
    return copy


def macs(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> int | None:
    """Multiply-accumulates of one run over the main graph.

    Args:
        model: not modified.
        inputs: shapes of the inputs to count for; where there are none, a free axis counts as 1.

    Returns:
        None if the shape of an operator that counts is not determined by the inputs.
    """
    total = 0
    for found in by_node(model, inputs):
        if found is None:
            return None
        total += found
    return total


def by_node(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> list[int | None]:
    """The same for every node of the main graph, in order; None for those whose shapes are not determined."""
    counts = ((spec_of(node).macs, node) for node in sized(model, inputs).graph.nodes)
    return [count(node) if count else 0 for count, node in counts]
