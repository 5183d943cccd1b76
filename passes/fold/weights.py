"""Weights that exporters left computed, made the constants that passes over layers look for.

A weight may stand behind Identity, Transpose, Reshape, Cast or arithmetic of constants, or be one constant
that several names are given to. `store_weights` is what every pass calls that works on layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxslim.engine.base import Log, Skip
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import Role, Trait, has, spec_of
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.literals import store_literals
from onnxslim.passes.fold.values import Values, is_constant
from onnxslim.passes.predicates import FLOATS
from onnxslim.shapes.dims import Dims, dims_of


def store_weights(model: Model) -> tuple[Skip, ...]:
    """Make constants of the floating-point tensors of the main graph that are computed from constants alone.

    What a constant is copied by goes, so that one that is shared through copies stays one. The rest is run
    ahead of time where that does not make the file larger (`onnxslim.passes.fold.budget`). Q and DQ stay, and
    so does what is computed from their results: they say how a constant is stored.

    Returns:
        Nodes that stay although they depend on constants alone, and why.
    """
    store_literals(model)
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


def computed_weights(model: Model) -> Iterator[Node]:
    """Layers of the main graph whose weight is computed from constants, not from integers it is stored as."""
    nodes = _constant_nodes(Edits(model, Log()))
    made = {id(tensor) for node in nodes for tensor in node.outputs}
    for node in model.graph.nodes:
        weight = node.input(1)
        if spec_of(node).role is Role.LINEAR and weight is not None and id(weight) in made:
            yield node


def why_no_weight(node: Node) -> str:
    """Why a layer has no constant where its weight is read."""
    if isinstance(node.inputs[0], Constant):
        return "its constant comes first, where layers read their data"
    return why_computed(node.inputs[1])


def why_computed(weight: Tensor) -> str:
    """Why a weight is no constant, once `store_weights` has been called, and which pass makes it one."""
    makers = _makers(weight)
    if makers is None:
        return "its weight is computed, not stored"
    if any(has(maker, Trait.DEQUANTIZES) for maker in makers):
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


def _makers(tensor: Tensor) -> list[Node] | None:
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
