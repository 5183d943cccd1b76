"""What a model costs to run, from the facts of its operators."""

from __future__ import annotations

from collections.abc import Mapping

from onnxslim import shapes
from onnxslim.model import Model
from onnxslim.ops import spec_of


def macs(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> int | None:
    """Multiply-accumulates of one run over the main graph.

    Args:
        model: not modified.
        inputs: shapes of the inputs to count for; where there are none, a free axis counts as 1.

    Returns:
        None if the shape of an operator that counts is not determined by the inputs.
    """
    total = 0
    for node in sized(model, inputs).graph.nodes:
        count = spec_of(node).macs
        found = count(node) if count else 0
        if found is None:
            return None
        total += found
    return total


def sized(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> Model:
    """A copy of the model whose tensors have the types and shapes of one run, as far as they are certain.

    Args:
        model: not modified.
        inputs: shapes of the inputs; where there are none, a free axis counts as 1.
    """
    twin = model.copy()
    for tensor in twin.graph.inputs:
        given = (inputs or {}).get(tensor.name, tensor.shape)
        if given is not None:
            tensor.shape = tuple(dim if isinstance(dim, int) else 1 for dim in given)
    facts = shapes.deduce(twin)
    for made in (tensor for node in twin.graph.nodes for tensor in node.outputs):
        fact = facts.get(id(made))
        made.shape, made.dtype = (fact.shape, fact.dtype) if fact else (None, None)
    return twin
