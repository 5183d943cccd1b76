"""Which slices of a model's tensors can be removed together: units, and families of like units.

The operators' rules (`OpSpec.channels`) label and tie slices, see `labels.py`. Here the graph is walked
once, the connected components become units, and units that occur in the same places become a family: any of
them can go without changing what the others look like. (Elsewhere this graph of ties is called a dependency
graph, and a family a structured group or coupled channels: Fang et al., "DepGraph", CVPR 2023.) Of
everything else the chain of operators that pins it can be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from onnxslim import shapes
from onnxslim.errors import UsageError, nearest
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Tensor
from onnxslim.ir.model import Model
from onnxslim.ops import spec_of
from onnxslim.ops.channels.labels import (
    PINNED,
    Block,
    Contraction,
    Labels,
    Shape,
    Trace,
    Tracer,
    UnknownSizesError,
)
from onnxslim.runtime.probe import FREE_SIZES

MATCHES = ("Reshape",)
UNKNOWN = "not all shapes around this {} are known"

# Sizes for a free batch axis while tracing: the first that the model has nowhere else.
BATCHES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
# Longer vectors of integers are not sizes.
MAX_RANK = 16


@dataclass(frozen=True)
class Member:
    """An axis of a tensor along which units of a family lie.

    Attributes:
        tensor: its name.
        axis: of the tensor.
        units: for each slice, the unit it belongs to; -1 for none of this family.
        constant: whether the values are in the model.
    """

    tensor: str
    axis: int
    units: NDArray[np.int64]
    constant: bool

    @cached_property
    def width(self) -> int:
        """Slices per unit."""
        return int((self.units == 0).sum())


@dataclass(frozen=True)
class Consumer:
    """A layer that sums over the units of a family.

    Attributes:
        node: name of the layer.
        data, weight: the tensor it sums over and the constant that weights it, each with its axis.
    """

    node: str
    data: Member
    weight: Member


@dataclass(frozen=True)
class Family:
    """Units that occur in the same places.

    Attributes:
        name: of the first tensor of the model that has them.
        size: how many units there are.
        members: where they occur, in the order of the graph.
        consumers: layers that sum over them.
        crosses: normalizations whose statistics change when units go; none if a cut is exact.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    consumers: tuple[Consumer, ...]
    crosses: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Slices that the widest member loses with a unit."""
        return max(member.width for member in self.members)


@dataclass(frozen=True)
class Analysis:
    """What can be removed from a model and what cannot.

    Attributes:
        families: in the order of the graph.
        sizes: shapes of the tensors, with a number where an axis is free.
    """

    families: tuple[Family, ...]
    sizes: Mapping[str, Shape]
    _trace: _Traced = field(repr=False)

    def explain(self, tensor: str) -> list[str]:
        """For each axis of a tensor: the family along it, or the operators that pin it, first to last.

        Raises:
            UsageError: no axis of a tensor of this name was followed.
        """
        return self._trace.explain(tensor, self.families)


def analyze(
    model: Model,
    *,
    sizes: Mapping[str, Shape] | None = None,
    seen: Mapping[str, Shape] | None = None,
    allow_inputs: bool = False,
    allow_outputs: bool = False,
) -> Analysis:
    """Find the families of a model.

    Args:
        model: not modified.
        sizes: shapes of inputs that fix its free axes; several sizes are tried where there are none.
        seen: shapes, in a run on inputs of these sizes, of tensors whose shapes follow from no rule.
        allow_inputs, allow_outputs: whether axes of the model's inputs and outputs may lose slices.
    """
    found = sized(model, sizes or {}, seen)
    tracer = Tracer(
        shapes_of(found),
        model.opset,
        frozenset(id(tensor) for tensor in model.graph.outputs),
    )
    if allow_inputs:
        for tensor in model.graph.inputs:
            shape = found.get(tensor.name, ())
            tracer.label(tensor, [Block((axis,), tracer.fresh(size)) for axis, size in enumerate(shape)])
    for node in model.graph.nodes:
        trace, channels = Trace(node, tracer), spec_of(node).channels
        visit(trace, partial(channels.trace, trace) if channels else None, model)
    for output in model.graph.outputs if not allow_outputs else ():
        tracer.pin(output, None, f"'{output.name}' is an output of the model")
    traced = _Traced(tracer)
    return Analysis(traced.families(), found, traced)


def visit(trace: Trace, rule: Callable[[], None] | None, model: Model) -> None:
    """Run an operator's rule at a node of the main graph; what it does not know of is pinned.

    Args:
        trace: of the node.
        rule: None if the operator has none.
        model: the node is from.
    """
    node, tracer = trace.node, trace.tracer
    tensors = [tensor for tensor in (*node.inputs, *node.outputs[:1]) if tensor.name]
    if rule is None or (node.domain, node.op) in model.functions:
        trace.finish(f"{node.op} is not known to carry slices along")
    elif any(tracer.shape(tensor) is None for tensor in tensors):
        trace.finish(UNKNOWN.format(node.op))
    else:
        _follow(trace, rule)
    for tensor in ir.captures(node):
        tracer.pin(tensor, node, f"a body of this {node.op} reads it")


def _follow(trace: Trace, rule: Callable[[], None]) -> None:
    """Run a rule, or pin all around a node whose shapes contradict each other.

    At sizes that are tried for free axes, a model may contradict itself that runs at others: a batch in the
    place of channels.
    """
    node, tracer = trace.node, trace.tracer
    try:
        rule()
        trace.finish(f"{node.op} reads it as a whole")
    except (ValueError, IndexError) as error:
        why = f"the shapes around this {node.op} contradict each other at the sizes tried"
        if isinstance(error, UnknownSizesError):
            why = UNKNOWN.format(node.op)
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name:
                tracer.pin(tensor, node, why)


def shapes_of(found: Mapping[str, Shape]) -> Callable[[Tensor], Shape | None]:
    """How a `Tracer` looks shapes up: those of constants, and of other tensors by name."""
    return lambda tensor: tensor.shape if isinstance(tensor, Constant) else found.get(tensor.name)


def sized(
    model: Model, given: Mapping[str, Shape], seen: Mapping[str, Shape] | None = None
) -> dict[str, Shape]:
    """Shapes of the tensors of the main graph that are certain, at the first sizes that tell all.

    Where none does, those that were seen at the given sizes count too.
    """
    best: dict[str, Shape] = {}
    wanted = sum(1 for node in model.graph.nodes for tensor in node.outputs if tensor.name)
    for fixed, batch in _ways(model, given):
        for size, uneven in product(FREE_SIZES, (True, False)):
            found = _deduced(model, fixed, batch, size, uneven)
            if len(found) > len(best):
                best = found
            if len(found) >= wanted + len(model.graph.inputs):
                return best
            if not _is_free(model, given):
                break
    run = _deduced(model, given, 1, FREE_SIZES[0], True) | dict(seen) if seen else {}
    return run if len(run) > len(best) else best


def _ways(
    model: Model, given: Mapping[str, Shape]
) -> Iterator[tuple[Mapping[str, tuple[int | None, ...]], int]]:
    """Shapes to give inputs, and a size for a free batch that they leave open, best ones first.

    A batch that nothing else measures tells most. But exporters that specialise a model leave its batch free
    in the interface alone, and write a batch of one, or that of their data, into its Reshapes.
    """
    unusual = _size_of_batch(model)
    without = _without_batch(model, given)
    yield without, unusual
    if without is not given:
        yield given, unusual
    if any(each.shape and not isinstance(each.shape[0], int) for each in model.graph.inputs):
        yield without, 1


def _without_batch(model: Model, given: Mapping[str, Shape]) -> Mapping[str, tuple[int | None, ...]]:
    """Given shapes without their first sizes where those are one free batch: a batch of one hides much."""
    inputs = model.graph.inputs
    free = [each.name for each in inputs if each.shape and not isinstance(each.shape[0], int)]
    if len({given[name][:1] for name in free if name in given}) != 1:
        return given
    return {name: (None, *shape[1:]) if name in free else shape for name, shape in given.items()}


def _is_free(model: Model, given: Mapping[str, Shape]) -> bool:
    return any(
        not isinstance(dim, int)
        for tensor in model.graph.inputs
        if tensor.name not in given
        for dim in tensor.shape or ()
    )


def _size_of_batch(model: Model) -> int:
    """A size that no constant has or, as an element of a vector of sizes, writes."""
    taken: set[int] = set()
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, Constant):
                taken.update(tensor.shape)
                if tensor.dtype.kind == "i" and tensor.size <= MAX_RANK:
                    taken.update(tensor.values.reshape(-1).tolist())
    return next((size for size in BATCHES if size not in taken), BATCHES[0])


def _deduced(
    model: Model, given: Mapping[str, tuple[int | None, ...]], size_of_batch: int, size: int, uneven: bool
) -> dict[str, Shape]:
    sized = model.copy()
    free: dict[object, int] = {}
    batch = {tensor.shape[0] for tensor in sized.graph.inputs if tensor.shape} - {None}
    for tensor in sized.graph.inputs:
        tensor.shape = given.get(tensor.name, tensor.shape)
        if tensor.shape is None:
            continue
        chosen = []
        for axis, dim in enumerate(tensor.shape):
            if not isinstance(dim, int):
                factor = 1 + len(free) % 3 if uneven else 1
                is_batch = axis == 0 or dim in batch
                dim = (
                    size_of_batch if is_batch else free.setdefault(dim or (tensor.name, axis), size * factor)
                )
            chosen.append(dim)
        tensor.shape = tuple(chosen)
    facts = shapes.deduce(sized)
    found: dict[str, Shape] = {}
    made = (tensor for node in sized.graph.nodes for tensor in node.outputs)
    for tensor in (*sized.graph.inputs, *made):
        fact = facts.get(id(tensor))
        shape = fact.shape if fact is not None else None
        if shape is not None and all(isinstance(dim, int) for dim in shape):
            found[tensor.name] = tuple(dim for dim in shape if isinstance(dim, int))
    for name in _contradictions(sized, found):
        del found[name]
    return found


def _contradictions(model: Model, found: Mapping[str, Shape]) -> list[str]:
    """Names of what a Reshape is to make of more, or fewer, elements than there are at these sizes."""
    shape = shapes_of(found)
    pairs = ((node.inputs[0], node.outputs[0]) for node in model.graph.nodes if node.op == "Reshape")
    return [
        after.name
        for before, after in pairs
        if (read := shape(before)) is not None
        and (made := shape(after)) is not None
        and math.prod(read) != math.prod(made)
    ]


@dataclass(frozen=True)
class _LabelledAxis:
    """A labelled axis with the component that each of its slices belongs to."""

    tensor: Tensor
    axis: int
    roots: Labels


class _Traced:
    """Components of a finished trace."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._make_rectangular()

    def _make_rectangular(self) -> None:
        """Tie labels until what is removed of each block of several axes is a slice along one of them."""
        while True:
            self._roots = self._tracer.components()
            before = len(self._tracer.ties)
            for _, blocks in self._tracer.labelled():
                for block in blocks:
                    if len(block.axes) > 1:
                        self._straighten(block)
            if len(self._tracer.ties) == before:
                return

    def _straighten(self, block: Block) -> None:
        roots = self._roots[block.labels]
        differs = [axis for axis in range(roots.ndim) if (roots != np.take(roots, [0], axis)).any()]
        if len(differs) > 1:
            stays = max(differs, key=lambda axis: (roots.shape[axis], axis))
            corner = tuple(slice(None) if axis == stays else slice(0, 1) for axis in range(roots.ndim))
            self._tracer.tie(block.labels, block.labels[corner], None, "a block loses whole slices")

    def _places(self) -> Iterator[_LabelledAxis]:
        for tensor, blocks in self._tracer.labelled():
            for block in blocks:
                roots = self._roots[block.labels]
                differs = [axis for axis in range(roots.ndim) if (roots != np.take(roots, [0], axis)).any()]
                at = differs[0] if differs else int(np.argmax(roots.shape))
                line = tuple(slice(None) if axis == at else 0 for axis in range(roots.ndim))
                yield _LabelledAxis(tensor, block.axes[at], roots[line])

    def families(self) -> tuple[Family, ...]:
        """Units with equal occurrences, numbered in the order of the first tensor that has them."""
        places = list(self._places())
        count = int(self._roots.max(initial=0)) + 1
        signature, owned = self._signatures(places, count)
        owned[self._roots[PINNED]] = False
        crossing = self._crossings(count)
        chosen = np.flatnonzero(owned)
        order: dict[int, list[int]] = {}
        for root in chosen:
            order.setdefault(int(signature[root]), []).append(int(root))
        unit, family_of = np.full(count, -1), np.full(count, -1)
        for number, roots in enumerate(order.values()):
            unit[roots], family_of[roots] = np.arange(len(roots)), number
        members: list[list[Member]] = [[] for _ in order]
        for place in places:
            for number in np.unique(family_of[place.roots]):
                if number >= 0:
                    units = np.where(family_of[place.roots] == number, unit[place.roots], -1)
                    constant = isinstance(place.tensor, Constant)
                    members[number].append(Member(place.tensor.name, place.axis, units, constant))
        families = [
            self._family(members[number], roots, crossing) for number, roots in enumerate(order.values())
        ]
        return tuple(family for family in families if family.size > 1)

    def _signatures(self, places: Sequence[_LabelledAxis], count: int) -> tuple[NDArray[np.uint64], Labels]:
        """A hash of where each component occurs and how often, and whether in something that is given."""
        random = np.random.default_rng(0).integers(0, 2**64, len(places), np.uint64)
        signature, owned = np.zeros(count, np.uint64), np.zeros(count, bool)
        for place, mark in zip(places, random, strict=True):
            np.add.at(signature, place.roots, mark)
            if isinstance(place.tensor, Constant) or not place.tensor.inputs:
                owned[place.roots] = True
        return signature, owned

    def _crossings(self, count: int) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for labels, node in self._tracer.inexact:
            for root in np.unique(self._roots[labels]):
                found.setdefault(int(root), []).append(node.label)
        return found

    def _family(
        self, members: Sequence[Member], roots: Sequence[int], crossing: Mapping[int, list[str]]
    ) -> Family:
        where = {(member.tensor, member.axis): member for member in members}
        consumers = [
            Consumer(each.node.label, where[data], where[weight])
            for each in self._tracer.contractions
            if (data := (each.data.name, each.data_axis)) in where and (weight := self._source(each)) in where
        ]
        first = next((member for member in members if member.constant), members[0])
        name = f"{first.tensor}:{first.axis}:{int(np.flatnonzero(first.units >= 0)[0])}"
        crosses = tuple(dict.fromkeys(node for root in roots for node in crossing.get(root, ())))
        return Family(name, len(roots), tuple(members), tuple(consumers), crosses)

    def _source(self, contraction: Contraction) -> tuple[str, int]:
        return contraction.weight.name, contraction.weight_axis

    def explain(self, tensor: str, families: Sequence[Family]) -> list[str]:
        places = [place for place in self._places() if place.tensor.name == tensor]
        known = [each for each, _ in self._tracer.labelled() if each.name == tensor]
        if not known:
            names = dict.fromkeys(each.name for each, _ in self._tracer.labelled())
            raise UsageError(
                f"no axis of a tensor '{tensor}' can be followed; {nearest(tensor, names)} (`onnxslim prune "
                "--families --json` lists those of all families)"
            )
        along = {(member.tensor, member.axis): family for family in families for member in family.members}
        lines = []
        for place in places:
            family = along.get((tensor, place.axis))
            what = f"axis {place.axis} of '{tensor}' ({place.roots.size})"
            if family is not None:
                lines.append(f"{what}: {family.size} units of family '{family.name}'")
            elif self._roots[PINNED] in place.roots:
                chain = self._chain(place) or ["it runs along data alone"]
                lines.append(f"{what} is pinned: {' <- '.join(chain)}")
            else:
                lines.append(f"{what} has no weights of its own, or a single unit")
        return lines

    def _chain(self, place: _LabelledAxis) -> list[str]:
        """What pins the first pinned slice of an axis, from there on."""
        pinned = place.roots == self._roots[PINNED]
        labels = next(block.labels for block in self._tracer.blocks(place.tensor) if place.axis in block.axes)
        label = int(labels.reshape(-1)[0] if labels.ndim > 1 else labels[pinned][0])
        return self._steps(label)

    def _steps(self, label: int) -> list[str]:
        before, blame = self._tree
        steps: list[str] = []
        while label != PINNED and before[label] >= 0:
            tie = self._tracer.ties[blame[label, before[label]] - 1]
            where = f"{tie.node.op} '{tie.node.label}'" if tie.node is not None else ""
            told = ": ".join(part for part in (where, tie.why) if part)
            if told and (not steps or steps[-1] != told):
                steps.append(told)
            label = int(before[label])
        return steps

    @cached_property
    def _tree(self) -> tuple[Labels, sparse.csr_array[Any, tuple[int, int]]]:
        """The shortest way from each pinned label to PINNED, and the tie behind each step."""
        ties = self._tracer.ties
        first = np.concatenate([tie.first for tie in ties])
        second = np.concatenate([tie.second for tie in ties])
        number = np.repeat(np.arange(1, len(ties) + 1), [tie.first.size for tie in ties])
        pairs = np.stack([np.concatenate([first, second]), np.concatenate([second, first])])
        pairs, where = np.unique(pairs, axis=1, return_index=True)
        shape = (self._tracer.count, self._tracer.count)
        graph = sparse.csr_array((np.tile(number, 2)[where], (pairs[0], pairs[1])), shape=shape)
        _, before = csgraph.breadth_first_order(graph, PINNED, directed=False)
        return before.astype(np.int64), graph
