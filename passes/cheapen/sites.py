"""Where a model computes a function of one value, element by element, that is no straight line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxslim.calibration.stream import Taps, stream
from onnxslim.engine.base import Log
from onnxslim.engine.matching import excluded
from onnxslim.errors import CalibrationError
from onnxslim.ir.graph import Array, Constant, Node, Variable, producer
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import Trait, has
from onnxslim.passes.cheapen.forms import FORMULAS
from onnxslim.passes.repair.activation import ElementwiseChain, behind, tabulated
from onnxslim.runtime.targets import Target

# The range on which a function is looked at where nobody knows its data.
RANGE = (-4.0, 4.0)
# A function of no more different slopes than this is made of straight pieces, and cheap.
PIECES = 4
# Values of the data by which forms are fitted, and taken of each batch to choose these from; and places over
# twice their span, so that no form ends where the data happened to.
PLACES, ROWS, BEYOND = 1024, 4096, 64
# Nodes before a function that are timed with it, such as a product and the Add of its bias.
BEFORE = 2


@dataclass(frozen=True)
class Site:
    """One place.

    Attributes:
        chain: the nodes that compute it.
        before: the nodes that make its data of one tensor, up to the operator with weights among them.
        lead: that tensor, or its data if there are none.
        shapes: of the data, and of the lead, in one run.
        dtype: of the data.
        at: values of the data, all of which count the same, and a few beyond; None if nobody knows them.
    """

    chain: ElementwiseChain
    before: tuple[Node, ...]
    lead: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: np.dtype[Any]
    at: Array | None = None

    @property
    def name(self) -> str:
        """For messages: the last of its nodes."""
        return self.last.label

    @property
    def last(self) -> Node:
        """The node that makes its result."""
        return next(node for node in self.chain.nodes if node.outputs[0] is self.chain.end)

    @property
    def output(self) -> str:
        """The tensor it makes."""
        return self.chain.end.name

    @property
    def ops(self) -> tuple[str, ...]:
        """The operators of its nodes."""
        return tuple(node.op for node in self.chain.nodes)

    @property
    def function(self) -> str:
        """Everything that sets what it computes apart, but for what it computes it of."""
        return json.dumps([_described(node) for node in self.chain.nodes], default=str)


def _described(node: Node) -> list[Any]:
    constants = [each.values.tolist() if isinstance(each, Constant) else None for each in node.inputs]
    return [node.op, dict(sorted(node.attrs.items())), constants]


def find(
    model: Model, exclude: Sequence[str], sample: Mapping[str, Array], target: Target, log: Log
) -> list[Site]:
    """All places in the main graph, in the order in which they run.

    Args:
        model: what they are from.
        exclude: globs of nodes to leave alone.
        sample: inputs of one run, for sizes.
        target: where to run.
        log: told of places that are left out, and why.
    """
    found = list(_chains(model, log))
    allowed = []
    for chain in found:
        reasons = filter(None, (excluded(exclude, node) for node in chain.nodes))
        if (why := next(reasons, None)) is not None:
            log.skip(chain.nodes[-1].label, why)
        else:
            allowed.append(chain)
    if not allowed:
        return []
    made = [_before(chain.start) for chain in allowed]
    names = [tensor.name for tensor in (*(lead for _, lead in made), *(each.start for each in allowed))]
    try:
        values = Taps(model, names, target)(0, sample)
    except CalibrationError as error:
        log.skip(model.graph.name or "model", f"sizes are not known, as it does not run: {error}")
        return []
    pairs = zip(allowed, made, strict=True)
    sites = [_site(chain, before, lead, values) for chain, (before, lead) in pairs]
    return [site for site in sites if 0 not in site.shapes[0]]


def _site(
    chain: ElementwiseChain, before: tuple[Node, ...], lead: Variable, values: Mapping[str, Array]
) -> Site:
    """A place, given values in one run; what makes its data of integers is not timed with it."""
    data, first = values[chain.start.name], values[lead.name]
    if first.dtype != data.dtype:
        before, lead, first = (), chain.start, data
    return Site(chain, before, lead.name, (data.shape, first.shape), data.dtype)


def _chains(model: Model, log: Log) -> Iterator[ElementwiseChain]:
    """Chains of nodes that are not straight pieces, and single nodes for which there is a formula."""
    graph, own, taken, bent = model.graph, model.functions, set[int](), dict[str, bool]()
    tensors = [*graph.inputs, *(tensor for node in graph.nodes for tensor in node.outputs)]
    main = {id(node) for node in graph.nodes}
    for node in (node for node in model.nodes() if id(node) not in main and _spelled(node, own)):
        log.skip(node.label, "it is inside a branch or a loop")
    for tensor in tensors:
        if not any(has(reader, Trait.ELEMENTWISE) for reader in tensor.outputs):
            continue
        chain = behind(graph, tensor)
        if chain is None or taken & (mine := {id(node) for node in chain.nodes}):
            continue
        redefined = any(("", node.op) in own for node in chain.nodes)
        if not redefined and _is_bent(model, chain, bent):
            taken |= mine
            yield chain
    for node in graph.nodes:
        if id(node) not in taken and _spelled(node, own) and isinstance(node.inputs[0], Variable):
            yield ElementwiseChain((node,), node.inputs[0], node.outputs[0])


def _spelled(node: Node, own: frozenset[tuple[str, str]]) -> bool:
    """Whether there is a formula for a node, whose operator no function of the model hides."""
    standard = node.domain in DEFAULT_DOMAINS and ("", node.op) not in own
    return standard and any(form.op == node.op for form in FORMULAS)


def _is_bent(model: Model, chain: ElementwiseChain, known: dict[str, bool]) -> bool:
    """Whether it computes anything but a few straight pieces; looked up by what it is."""
    key = json.dumps([_described(node) for node in chain.nodes], default=str)
    if key not in known:
        table = tabulated(model, chain, *RANGE)
        slopes = () if table is None else np.round(table.slopes / max(table.steepest, 1e-30), 3)
        known[key] = len(np.unique(slopes)) > PIECES
    return known[key]


def _before(start: Variable) -> tuple[tuple[Node, ...], Variable]:
    """What makes the data of one tensor and constants, up to the first operator with weights; that tensor."""
    found, at = list[Node](), start
    while len(found) < BEFORE:
        node = producer(at)
        if node is None or node.bodies or node.domain not in DEFAULT_DOMAINS or len(node.outputs) != 1:
            break
        read = [each for each in node.inputs if each.name and not isinstance(each, Constant)]
        if len(read) != 1 or not isinstance(read[0], Variable):
            break
        found.append(node)
        at = read[0]
        if not has(node, Trait.ELEMENTWISE):
            break
    return tuple(found), at


def seen(sites: Sequence[Site], model: Model, data: Any, target: Target) -> list[Site]:
    """The places with what their data are like."""
    names = [site.chain.start.name for site in sites]
    rows: dict[str, list[Array]] = {name: [] for name in names}
    for batch in stream(data, Taps(model, names, target)):
        for name in rows:
            flat = batch.values[name].reshape(-1)
            rows[name].append(flat[batch.positions(flat.size, max(ROWS, batch.total))])
    return [replace(site, at=_quantiles(rows[site.chain.start.name])) for site in sites]


def _quantiles(rows: Sequence[Array]) -> Array:
    every = np.sort(np.concatenate(rows).astype(np.float32))
    every = every[np.isfinite(every)]
    if not len(every):
        return every
    places = np.linspace(0, len(every) - 1, min(PLACES, len(every)))
    half = np.ptp(every) / 2
    around = np.linspace(every[0] - half, every[-1] + half, BEYOND, dtype=np.float32)
    return np.concatenate((every[places.astype(np.intp)], around))
