"""The function of one value through which a tensor is seen by everything that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim import graph as ir
from onnxslim.calibration.layers import Floats
from onnxslim.errors import OnnxSlimError
from onnxslim.evaluate import evaluate
from onnxslim.graph import Constant, Graph, Node, Tensor, Variable
from onnxslim.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import spec_of
from onnxslim.ops.channels import elementwise

# Values in a table, and how far it goes beyond those seen, relative to their span.
_PLACES = 1 << 14
_MARGIN = 1.0
# Nodes that an activation consists of at most; GELU by its error function takes five, by tanh eight.
_LONGEST = 10


@dataclass(frozen=True)
class Chain:
    """Nodes that compute one tensor from another, each element from the element in its place.

    Attributes:
        nodes: in an order that can be run.
        start, end: the tensors.
    """

    nodes: tuple[Node, ...]
    start: Variable
    end: Variable


def behind(graph: Graph, start: Variable) -> Chain | None:
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
            best = Chain(tuple(nodes), start, seen[0])
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
    """A function at equal distances, linear in between.

    Attributes:
        first, step: where the values are.
        values, slopes: of the function, and of the pieces between the values.
    """

    first: float
    step: float
    values: Floats
    slopes: Floats

    def __call__(self, x: Floats) -> tuple[Floats, Floats]:
        """Values and slopes; the outermost pieces go on forever."""
        places = (x - np.float32(self.first)) / np.float32(self.step)
        index = np.clip(places, 0, len(self.slopes) - 1).astype(np.intp)
        slope = self.slopes[index]
        return self.values[index] + (places - index) * np.float32(self.step) * slope, slope

    @property
    def steepest(self) -> float:
        """The largest slope, without its sign."""
        return float(np.abs(self.slopes).max())


def tabulated(model: Model, chain: Chain, least: float, most: float) -> Table | None:
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
    step = float(at[-1] - at[0]) / (_PLACES - 1)
    slopes = np.diff(found) / np.float32(step)
    if np.ptp(slopes) <= 1e-3 * np.abs(slopes).max():
        return None
    return Table(float(at[0]), step, found, slopes)
