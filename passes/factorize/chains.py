"""Layers that are factors of one another already, by whatever made them.

Two layers without anything between them are one linear map. Where the one layer that would do the same had
more weights, they are its factors: they are left alone, and a budget counts what they saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import networkx as nx
import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Attribute, Node
from onnxslim.ir.model import Model
from onnxslim.passes.factorize.layers import Sizes, Whole

# Two or more layers, each of which alone reads what the one before it makes.
Chain: TypeAlias = tuple[Whole, ...]


def find(layers: Iterable[Whole], outputs: frozenset[int]) -> list[Chain]:
    """All chains of factors.

    Args:
        layers: of one graph.
        outputs: ids of tensors that are outputs of the graph or of a body.
    """
    known = {id(layer.node): layer for layer in layers}
    after = {key: follower for key, layer in known.items() if (follower := _follower(layer, known, outputs))}
    # Each layer has one follower at most and follows one, so that what is connected is a path.
    paths = nx.DiGraph((key, id(follower.node)) for key, follower in after.items())
    parts = nx.weakly_connected_components(paths)
    return [tuple(known[key] for key in nx.topological_sort(paths.subgraph(part))) for part in parts]


def _follower(layer: Whole, known: Mapping[int, Whole], outputs: frozenset[int]) -> Whole | None:
    """The layer that is the second factor to this one, if there is one."""
    result = layer.node.outputs[0]
    readers: list[Node] = result.outputs
    if len(readers) != 1 or id(result) in outputs or layer.node.input(2) is not None:
        return None
    reader = known.get(id(readers[0]))
    if reader is None or len(reader.kernel) != len(layer.kernel) or not _within(layer, reader):
        return None
    sides = [(each.node.op, each.view.weight_index) for each in (reader, layer)]
    if not layer.kernel and sides[0] != sides[1]:
        return None
    if any(min(pair) > 1 for pair in zip(layer.kernel, reader.kernel, strict=True)):
        return None
    return reader if layer.weight.size + reader.weight.size < math.prod(_whole((layer, reader))) else None


def _within(layer: Whole, reader: Whole) -> bool:
    """Whether every group of a layer is read by one group, of as many or, if it is depthwise, of fewer."""
    if layer.groups == reader.groups:
        return True
    return layer.depthwise and layer.inputs == 1 and layer.groups % reader.groups == 0


def _whole(chain: Chain) -> Sizes:
    """Shape of the weight of the layer that does what a chain does."""
    kernel = (max(sizes) for sizes in zip(*(layer.kernel for layer in chain), strict=True))
    first, groups = chain[0], chain[-1].groups
    return (groups, first.groups * first.inputs // groups, chain[-1].outputs, *kernel)


def undone(model: Model, chains: Sequence[Chain]) -> Model:
    """A copy with each chain as one layer, to see what it costs: the weights of these layers are made up."""
    copy = model.copy()
    edit = Editor(copy)
    made_by = {node.outputs[0].name: node for node in copy.graph.nodes if node.outputs}
    for chain in chains:
        first, last = (made_by[layer.output] for layer in (chain[0], chain[-1]))
        data = first.inputs[1 - chain[0].view.weight_index]
        weight, attrs = np.zeros(_whole(chain), chain[0].weight.dtype), _joined(chain)
        like = next((each for each in chain if each.view.scatters), chain[-1])
        like.restore(edit, last, data, weight, attrs)
    edit.commit()
    return copy


def _joined(chain: Chain) -> dict[str, Attribute]:
    """Attributes of the one layer; where a factor has nothing to say about an axis, it says 1, or 0."""
    joined: dict[str, Attribute] = {}
    for name, value in (item for layer in chain for item in layer.node.attrs.items()):
        if isinstance(value, tuple) and name in joined:
            value = tuple(map(max, joined[name], value))
        joined[name] = value
    return {**joined, "group": chain[-1].groups} if "group" in joined else joined
