"""The function of one value through which a tensor is seen by everything that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim.errors import OnnxSlimError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import spec_of
from onnxslim.ops.channels import elementwise
from onnxslim.ops.layers import Floats
from onnxslim.runtime.evaluate import evaluate

# Values in a table, and how far it goes beyond those seen, relative to their span.
_PLACES = 1 << 14
_MARGIN = 1.0
# Nodes that an activation consists of at most; GELU by its error function takes five, by tanh eight.
_LONGEST = 10


@dataclass(frozen=True)
class ElementwiseChain:
    """Nodes that compute one tensor from another, each element from the element in its place.

    Attributes:
        nodes: in an order that can be run.
        start, end: the tensors.
    """

    nodes: tuple[Node, ...]
    start: Variable
    end: Variable


def behind(graph: Graph, start: Variable) -> ElementwiseChain | None:
    """The longest chain that everything which reads a tensor sees it through; None if there is none."""
    fixed, inner = ir.protected(graph), {id(node) for node in graph.nodes}
    made, nodes, best = [start], list[Node](), None
    while len(nodes) < _LONGEST:
        taken = {id(node) for node in nodes}
        follow = next((node for node in _readers(made) if id(node) not in taken and _fits(node, made)), None)
        if follow is None or id(follow) not in inner:
            break
        nodes.append(follow)
        made.append(follow.outputs[0])
        taken.add(id(follow))
        seen = [each for each in made if id(each) in fixed or any(id(r) not in taken for r in each.outputs)]
        if len(seen) == 1 and seen[0] is not start:
            best = ElementwiseChain(tuple(nodes), start, seen[0])
    return best


def _readers(tensors: Iterable[Variable]) -> Iterator[Node]:
    yield from (node for tensor in tensors for node in tensor.outputs)


def _fits(node: Node, made: Sequence[Variable]) -> bool:
    """Whether a node computes each element from those of known tensors in its place, and from scalars."""
    channels = spec_of(node).channels if node.domain in DEFAULT_DOMAINS else None
    if channels is None or channels.trace not in (elementwise.same, elementwise.broadcast):
        return False
    return len(node.outputs) == 1 and all(
        any(each is known for known in made) or _is_scalar(each) for each in node.inputs if each.name
    )


def _is_scalar(tensor: Tensor) -> bool:
    return isinstance(tensor, Constant) and tensor.values.size == 1


@dataclass(frozen=True, eq=False)
class Table:
    """A function of straight pieces of equal length.

    Attributes:
        first, step: where the first piece begins, and the length of one.
        offsets, slopes: of each piece; its values are offset + slope * x.
    """

    first: float
    step: float
    offsets: Floats
    slopes: Floats

    @classmethod
    def of(cls, at: Floats, values: Floats) -> Table:
        """Through values at equal distances."""
        step = float(at[-1] - at[0]) / (at.size - 1)
        slopes = np.diff(values) / np.float32(step)
        return cls(float(at[0]), step, values[:-1] - slopes * at[:-1], slopes)

    def __call__(self, x: Floats) -> tuple[Floats, Floats]:
        """Values and slopes; the outermost pieces go on forever."""
        index = ((x - np.float32(self.first)) * np.float32(1 / self.step)).astype(np.int32)
        np.clip(index, 0, len(self.slopes) - 1, out=index)
        slopes = self.slopes.take(index)
        found = slopes * x
        found += self.offsets.take(index)
        return found, slopes

    @property
    def steepest(self) -> float:
        """The largest slope, without its sign."""
        return float(np.abs(self.slopes).max())


def tabulated(model: Model, chain: ElementwiseChain, least: float, most: float) -> Table | None:
    """The function of a chain over a range and as much again on both sides.

    None if it is a straight line there, or cannot be computed.
    """
    span = (most - least) * _MARGIN or 1.0
    at = np.linspace(least - span, most + span, _PLACES).astype(np.float32)
    try:
        known = {id(chain.start): at}
        found = evaluate(model, chain.nodes, [(chain.end, at.dtype)], known)[id(chain.end)].reshape(-1)
    except OnnxSlimError:  # it is in half precision, or in integers
        return None
    if found.shape != at.shape or not np.isfinite(found).all():
        return None
    table = Table.of(at, found)
    return None if np.ptp(table.slopes) <= 1e-3 * table.steepest else table
