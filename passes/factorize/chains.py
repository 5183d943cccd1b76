"""Layers that are factors of one another already, by whatever made them.

Two layers without anything between them are one linear map. Where the one layer that would do the same had
more weights, they are its factors: they are left alone, and a budget counts what they saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnxslim.graph import Node
from onnxslim.passes.factorize.layers import Layer


@dataclass(frozen=True)
class Chain:
    """Factors in order, and the weights and multiply-accumulates of the layer they stand for."""

    layers: tuple[Layer, ...]
    params: int
    macs: int

    @property
    def saved(self) -> dict[str, int]:
        """What the factors have less than that layer."""
        return {
            "params": self.params - sum(layer.weight.size for layer in self.layers),
            "macs": self.macs - sum(layer.macs for layer in self.layers),
        }


def find(layers: Iterable[Layer], outputs: frozenset[int]) -> list[Chain]:
    """All chains of two or more factors.

    Args:
        layers: of one graph.
        outputs: ids of tensors that are outputs of the graph or of a body.
    """
    known = {id(layer.node): layer for layer in layers}
    after = {key: follower for key, layer in known.items() if (follower := _follower(layer, known, outputs))}
    inner = {id(follower.node) for follower in after.values()}
    found = []
    for key, layer in known.items():
        if key in after and key not in inner:
            members = [layer]
            while id(members[-1].node) in after:
                members.append(after[id(members[-1].node)])
            found.append(_chain(members))
    return found


def _follower(layer: Layer, known: Mapping[int, Layer], outputs: frozenset[int]) -> Layer | None:
    """The layer that is the second factor to this one, if there is one."""
    result = layer.node.outputs[0]
    readers: list[Node] = result.outputs
    if len(readers) != 1 or id(result) in outputs or layer.node.input(2) is not None:
        return None
    reader = known.get(id(readers[0]))
    if reader is None or reader.groups != layer.groups or len(reader.kernel) != len(layer.kernel):
        return None
    if any(min(pair) > 1 for pair in zip(layer.kernel, reader.kernel, strict=True)):
        return None
    return reader if _chain([layer, reader]).saved["params"] > 0 else None


def _chain(members: list[Layer]) -> Chain:
    first, last = members[0], members[-1]
    kernel = [max(sizes) for sizes in zip(*(layer.kernel for layer in members), strict=True)]
    weights = first.groups * first.inputs * last.outputs * math.prod(kernel)
    scatters = any(layer.form.scatters for layer in members)
    positions = math.prod(first.entering if scatters else last.leaving)
    return Chain(tuple(members), weights, first.rows * weights * positions)
