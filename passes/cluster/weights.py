"""The weights of a model that can be codes, whatever operator reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.engine.matching import excluded
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import MASK_MAGNITUDE, Constant, Node
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.cluster.storing import LEAST_OPSET, MAKES, stored_bytes
from onnxslim.passes.fold.weights import computed_weights, why_computed
from onnxslim.passes.predicates import FLOATS

MOST_BITS = 8
# What takes no more than this is not worth the nodes that look codes up.
LEAST_BYTES = 600
WIDTHS = tuple(range(1, MOST_BITS + 1))


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant that can be codes.

    Attributes:
        constant: of the main graph.
        label: of the first node that reads it.
        layer: what it is the weight of, where that is one layer that can be fitted; None for any other use.
        axis: its axis of output channels; of other constants the first one.
    """

    constant: Constant
    label: str
    layer: Layer | None
    axis: int

    @property
    def name(self) -> str:
        """Of the constant."""
        return self.constant.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the constant."""
        return self.constant.shape

    def stored(self, how: Clustering) -> Clustering:
        """How it is stored, with factors of output channels if that is left open and it is depthwise.

        Depthwise channels differ most, and their codes take least room.
        """
        if how.scaled is not None:
            return how
        return replace(how, scaled=self.layer is not None and self.layer.channelwise)

    def tables(self, how: Clustering) -> int:
        """How many tables it has."""
        return -(-self.shape[self.axis] // how.group) if how.group else 1

    def nbytes(self, how: Clustering) -> int:
        """Bytes of it as codes, with the nodes that look them up, about."""
        scales = self.shape[self.axis] if how.scaled else 0
        kind = self.constant.dtype
        return stored_bytes(self.name, self.shape, kind.itemsize, how.bits, self.tables(how), scales)

    def saves(self, how: Clustering) -> bool:
        """Whether codes take less room."""
        return self.nbytes(how) < self.constant.nbytes


def find(model: Model, exclude: Sequence[str], log: Log) -> list[Weight]:
    """The weights of the main graph, in the order in which they are read.

    Args:
        model: not modified.
        exclude: globs of nodes and constants to leave out.
        log: told of every weight that stays, and why.
    """
    problem = _problem(model)
    if problem:
        log.skip(model.graph.name or "model", problem)
        return []
    for node in computed_weights(model):
        weight = node.input(1)
        assert weight is not None
        log.skip(node.label, why_computed(weight))
    fixed, inner = ir.protected(model.graph), {id(node) for node in model.graph.nodes}
    found: list[Weight] = []
    for constant, readers in _constants(model).items():
        if not _is_weight(constant):
            continue
        label = next((node.label for node in readers if id(node) in inner), readers[0].label)
        why = _hindrance(constant, readers, exclude, fixed, inner)
        if why:
            log.skip(label, why)
        else:
            found.append(_weight(constant, readers, label))
    return found


def _problem(model: Model) -> str | None:
    """Why codes cannot be looked up in a model."""
    if model.opset < LEAST_OPSET:
        return f"its opset is {model.opset}, and codes are looked up by operators of opset {LEAST_OPSET}"
    own = sorted(op for op in MAKES if ("", op) in model.functions)
    return f"it has functions of its own for {', '.join(own)}" if own else None


def _constants(model: Model) -> Mapping[Constant, list[Node]]:
    """Constants of the main graph and all that reads them, by where they are first read."""
    own = {id(constant) for constant in model.graph.initializers.values()}
    elsewhere = {
        id(constant)
        for graph in model.graphs()
        if graph is not model.graph
        for constant in graph.initializers.values()
    }
    found: dict[Constant, list[Node]] = {}
    for node in model.nodes():
        for tensor in dict.fromkeys(node.inputs):
            mine = isinstance(tensor, Constant) and (id(tensor) in own or id(tensor) not in elsewhere)
            if isinstance(tensor, Constant) and mine:
                found.setdefault(tensor, []).append(node)
    return found


def _is_weight(constant: Constant) -> bool:
    """Whether a constant is large enough to count, and no vector, as biases and scales are."""
    plain = constant.dtype in FLOATS and constant.nbytes > LEAST_BYTES
    return plain and sum(size > 1 for size in constant.shape) > 1


def _hindrance(
    constant: Constant, readers: Sequence[Node], exclude: Sequence[str], fixed: set[int], inner: set[int]
) -> str | None:
    """Why a weight has to stay."""
    for node in readers:
        if why := excluded(exclude, node):
            return why
        if id(node) not in inner:
            return f"'{constant.name}' is read in the body of a control-flow node"
    if id(constant) in fixed:
        return f"'{constant.name}' is an output"
    values = constant.peek().astype(np.float64)
    if not (np.abs(values) < MASK_MAGNITUDE).all():
        return f"'{constant.name}' holds values that are no numbers to compute with"
    return None


def _weight(constant: Constant, readers: Sequence[Node], label: str) -> Weight:
    layer = layer_of(readers[0]) if len(constant.outputs) == 1 else None
    if not isinstance(layer, Layer) or layer.node.inputs[layer.weight_index] is not constant:
        return Weight(constant, label, None, 0)
    return Weight(constant, label, layer, layer.weight_axis)
