"""Weights that exporters left computed, made the constants that passes over layers look for.

A weight may stand behind Identity, Transpose, Reshape, Cast or arithmetic of constants, or be one constant
that several names are given to. `store_weights` is what every pass calls that works on layers, and
`stored_weights` what there is then, for those that give weights other values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim.engine.base import Log, Skip
from onnxslim.engine.matching import excluded
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import MASK_MAGNITUDE, Constant, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import Role, Trait, has, layer_of, spec_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.literals import store_literals
from onnxslim.passes.fold.values import Values, is_constant
from onnxslim.passes.predicates import FLOATS
from onnxslim.shapes.dims import Dims, dims_of

MATCHES = ("CumSum", "Gather")


def store_weights(model: Model, *, plain: bool = True) -> tuple[Skip, ...]:
    """Make constants of the floating-point tensors of the main graph that are computed from constants alone.

    What a constant is copied by goes, so that one that is shared through copies stays one. Weights that are
    stored without their zeros get them back. The rest is run ahead of time where that does not make the file
    larger (`onnxslim.passes.fold.budget`). Q and DQ stay, and
    so does what is computed from their results: they say how a constant is stored.

    Args:
        model: edited in place.
        plain: whether weights stored without their zeros get them back.

    Returns:
        Nodes that stay although they depend on constants alone, and why.
    """
    store_literals(model)
    if plain:
        restore_zeros(model)
    _bypass_copies(model)
    log = Log()
    edits = Edits(model, log)
    nodes = _constant_nodes(edits)
    if nodes:
        dims = dims_of(model)
        values = Values(edits, 0, _cones(nodes, dims))
        values.fold(dims)
        edits.clean_up()
        log = Log()
        for node, reason in values.notes():
            log.skip(node.label, reason)
    return log.done().skipped


def restore_zeros(model: Model) -> None:
    """Make plain constants of weights that are stored without their zeros, as passes over layers want them.

    Such a weight is looked up at places that are counted (`passes.codes.storing`).
    """
    edits = Edits(model, Log())
    counted = _counted(_constant_nodes(edits))
    if counted:
        Values(edits, sys.maxsize, counted).fold(dims_of(model))
        edits.clean_up()


def computed_weights(model: Model) -> Iterator[Node]:
    """Layers of the main graph whose weight is computed from constants, not from integers it is stored as."""
    nodes = _constant_nodes(Edits(model, Log()))
    made = {id(tensor) for node in nodes for tensor in node.outputs}
    for node in model.graph.nodes:
        weight = node.input(1)
        if spec_of(node).role is Role.LINEAR and weight is not None and id(weight) in made:
            yield node


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A constant of the main graph that may be given other values.

    Attributes:
        constant: the constant.
        label: of the first node that reads it.
        layer: what it is the weight of, where that is one layer that can be fitted; None for any other use.
        axis: its axis of output channels; of other constants the first one.
        unfit: why the one layer that reads it cannot be fitted; empty for any other use.
    """

    constant: Constant
    label: str
    layer: Layer | None
    axis: int
    unfit: str = ""

    @property
    def name(self) -> str:
        """Of the constant."""
        return self.constant.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the constant."""
        return self.constant.shape


def stored_weights(model: Model, exclude: Sequence[str], least: int, log: Log) -> Iterator[StoredWeight]:
    """Floating-point constants of the main graph with two axes or more, in the order in which they are read.

    Args:
        model: not modified.
        exclude: globs of nodes and constants to leave out.
        least: bytes up to which a constant is no weight.
        log: told of every weight that stays, and why.
    """
    for node in computed_weights(model):
        log.skip(node.label, why_computed(node.inputs[1]))
    fixed, inner = ir.protected(model.graph), {id(node) for node in model.graph.nodes}
    for constant, readers in _constants(model).items():
        if not _is_weight(constant, least):
            continue
        label = next((node.label for node in readers if id(node) in inner), readers[0].label)
        why = _hindrance(constant, readers, exclude, fixed, inner)
        if why:
            log.skip(label, why)
        else:
            yield _weight(constant, readers, label)


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


def _is_weight(constant: Constant, least: int) -> bool:
    """Whether a constant is large enough to count, and no vector, as biases and scales are."""
    plain = constant.dtype in FLOATS and constant.nbytes > least
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


def _weight(constant: Constant, readers: Sequence[Node], label: str) -> StoredWeight:
    layer = layer_of(readers[0]) if len(constant.outputs) == 1 else None
    if isinstance(layer, str) and readers[0].inputs[1] is constant:
        return StoredWeight(constant, label, None, 0, layer)
    if not isinstance(layer, Layer) or layer.node.inputs[layer.weight_index] is not constant:
        return StoredWeight(constant, label, None, 0)
    return StoredWeight(constant, label, layer, layer.weight_axis)


def why_no_weight(node: Node) -> str:
    """Why a layer has no constant where its weight is read."""
    if isinstance(node.inputs[0], Constant):
        return "its constant comes first, where layers read their data"
    return why_computed(node.inputs[1])


def why_computed(weight: Tensor) -> str:
    """Why a weight is no constant, once `store_weights` has been called, and which pass makes it one."""
    nodes = makers(weight)
    if nodes is None:
        return "its weight is computed, not stored"
    if any(has(maker, Trait.DEQUANTIZES) for maker in nodes):
        return "its weight is quantized"
    return (
        "its weight is computed from constants, and takes more room where it is stored: "
        "'onnxslim fold --max-growth BYTES' stores it all the same"
    )


def _bypass_copies(model: Model) -> None:
    """Have what reads copies of constants read the constants."""
    graph = model.graph
    hidden, _ = ir.shadowing(graph)
    fixed, gone = ir.protected(graph), set[int]()
    for node in graph.nodes:
        if not has(node, Trait.COPIES) or node.domain not in DEFAULT_DOMAINS:
            continue
        source, copy = node.inputs[0], node.outputs[0]
        if isinstance(source, Constant) and source.name not in hidden:
            ir.replace_uses(copy, source)
            if id(copy) not in fixed:
                ir.detach(node)
                gone.add(id(node))
    ir.sweep(graph, gone)


def _constant_nodes(edits: Edits) -> list[Node]:
    """Nodes of the main graph that depend on constants alone, but for Constant nodes, in order."""
    made: set[int] = set()
    found: list[Node] = []
    for node in edits.model.graph.nodes:
        reads = [tensor for tensor in node.inputs if tensor.name]
        if not reads or has(node, Trait.CODES) or not edits.is_standard(node):
            continue
        if all(id(tensor) in made or is_constant(tensor) for tensor in reads):
            made.update(id(tensor) for tensor in node.outputs)
            found.append(node)
    return found


def _counted(nodes: Sequence[Node]) -> frozenset[int]:
    """Ids of those of the nodes that look up values at places that are counted."""
    behind: dict[int, list[Node]] = {}
    found: set[int] = set()
    for node in nodes:
        cone = [node, *(each for tensor in node.inputs for each in behind.get(id(tensor), ()))]
        behind.update((id(tensor), cone) for tensor in node.outputs)
        if node.op == "Gather" and any(each.op == "CumSum" for each in cone):
            table = node.inputs[0]
            if isinstance(table, Constant) and table.dtype in FLOATS and len(table.shape) == 1:
                found.update(id(each) for each in cone)
    return frozenset(found)


def _cones(nodes: Sequence[Node], dims: Dims) -> frozenset[int]:
    """Ids of those of the nodes by which floating-point results are computed: sizes are not of interest."""
    cone: set[int] = set()
    needed: set[int] = set()
    for node in reversed(nodes):
        types = {dims.dtype(tensor) for tensor in node.outputs if tensor.name}
        if types & FLOATS or any(id(tensor) in needed for tensor in node.outputs):
            cone.add(id(node))
            needed.update(id(tensor) for tensor in node.inputs)
    return frozenset(cone)


def makers(tensor: Tensor) -> list[Node] | None:
    """All nodes that a tensor is computed by, if it depends on constants alone; None if not."""
    found: dict[int, Node] = {}
    pending = [tensor]
    while pending:
        tensor = pending.pop()
        maker = ir.producer(tensor)
        if not tensor.name or is_constant(tensor):
            continue
        if maker is None or maker.bodies or not maker.inputs:
            return None
        if id(maker) not in found:
            found[id(maker)] = maker
            pending.extend(maker.inputs)
    return list(found.values())
