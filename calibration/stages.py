"""A model run part by part over all batches, so that its weights can change on the way.

Refitting layer after layer means to run the network up to a layer, change that layer, and go on. Here each
node runs once per batch: a stage computes the tensors that are wanted next and keeps those that later stages
read; everything else is forgotten. Weights are read when a stage begins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxslim.calibration.stream import Runner, Values
from onnxslim.ir import graph as ir
from onnxslim.ir.files import spilled
from onnxslim.ir.graph import Array, Constant, Graph, Node, Variable
from onnxslim.ir.model import Model
from onnxslim.ops import Trait, has
from onnxslim.runtime.targets import Target


class SpillStore:
    """Arrays kept in memory up to a limit, and beyond it in temporary files.

    Args:
        limit: bytes to keep in memory.

    Attributes:
        held: bytes of those in memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._outside = set[int]()

    @property
    def outside(self) -> int:
        """How many arrays are in files."""
        return len(self._outside)

    def put(self, array: Array) -> Array:
        """The array to keep: the same, or one that lies in a file."""
        if self.held + array.nbytes <= self.limit or not array.size or array.dtype.hasobject:
            self.held += array.nbytes
            return array
        made = spilled(array)
        self._outside.add(id(made))
        return made

    def drop(self, array: Array) -> None:
        """Forget an array that `put` returned."""
        if id(array) in self._outside:
            self._outside.remove(id(array))
        else:
            self.held -= array.nbytes


@dataclass(frozen=True)
class Stop:
    """What is wanted at the end of a stage.

    Attributes:
        tensors: names of tensors; later stages go on from these.
        peeks: nodes whose outputs are wanted with the present weights, and later anew with others.
    """

    tensors: Sequence[str] = ()
    peeks: Sequence[Node] = ()


@dataclass
class Part:
    """The nodes of one stage.

    Attributes:
        nodes: in an order that can be run.
        reads: tensors that were there before.
        wanted: tensors to hand out.
        makes: tensors the nodes compute that are wanted or read later.
        keeps: those of them that later stages read as they are made here, not with weights of a peek.
    """

    nodes: list[Node]
    reads: set[str]
    wanted: set[str]
    makes: set[str] = field(default_factory=set)
    keeps: set[str] = field(default_factory=set)


class StagedRunner:
    """Runs a model stage by stage.

    Args:
        model: weights may be replaced between stages, nothing else.
        stops: what each stage has to compute.
        store: where tensors are kept between stages.
        given: tensors that come from outside instead of being computed; graph inputs always do.
        target: where to run.

    Attributes:
        parts: what each stage runs.
    """

    def __init__(
        self,
        model: Model,
        stops: Sequence[Stop],
        store: SpillStore,
        *,
        given: Collection[str] = (),
        target: Target | None = None,
    ) -> None:
        self._model = model
        self._store = store
        self._target = target
        self._given = set(given) | {tensor.name for tensor in model.graph.inputs}
        # Outputs that nothing computes.
        self._constants = {each.name: each for each in model.graph.outputs if isinstance(each, Constant)}
        self.parts = _plan(model.graph, stops, self._given)
        self._last: dict[str, int] = {name: k for k, part in enumerate(self.parts) for name in part.reads}
        self._kept: dict[int, Values] = {}
        self._runners: dict[int, Runner] = {}

    def requests(self, stage: int) -> list[str]:
        """Tensors from outside that this stage is the first to read."""
        before = {name for part in self.parts[:stage] for name in part.reads}
        return sorted((self.parts[stage].reads & self._given) - before)

    def run(self, stage: int, batch: int, fed: Mapping[str, Array]) -> Values:
        """Run one stage on one batch; stages go up, and all batches go through one before the next.

        Args:
            stage, batch: numbers from zero.
            fed: values of what the stage requests; others are ignored.

        Returns:
            Values of what is wanted, by name.

        Raises:
            CalibrationError: the part does not run; carries ONNX Runtime's message.
        """
        part = self.parts[stage]
        kept = self._kept.setdefault(batch, {})
        values = {name: np.asarray(kept[name]) if name in kept else fed[name] for name in part.reads}
        if part.makes:
            # Of a node that is run for one of its outputs, others may be there already.
            made = {tensor.name for node in part.nodes for tensor in node.outputs}
            fed_in = {name: value for name, value in values.items() if name not in made}
            values |= self._runner(stage, values).run(fed_in, sorted(part.makes))
        self._keep(stage, kept, values)
        constants = {name: self._constants[name].values for name in part.wanted - values.keys()}
        return {name: values[name] for name in part.wanted & values.keys()} | constants

    def _keep(self, stage: int, kept: Values, values: Values) -> None:
        part = self.parts[stage]
        for name, value in values.items():
            lasts = name in part.reads or name in part.keeps
            if lasts and name not in kept and self._last.get(name, -1) > stage:
                kept[name] = self._store.put(value)
        for name in [name for name in kept if self._last[name] <= stage]:
            self._store.drop(kept.pop(name))

    def _runner(self, stage: int, values: Values) -> Runner:
        if stage not in self._runners:
            self._runners.clear()
            self._runners[stage] = Runner(self._part_model(self.parts[stage], values), self._target)
        return self._runners[stage]

    def _part_model(self, part: Part, values: Values) -> Model:
        """The model of a part: the nodes themselves, in a graph of their own that is only written."""
        graph = Graph("stage")
        graph.nodes = part.nodes
        made = {tensor.name: tensor for node in part.nodes for tensor in node.outputs}
        graph.inputs = [_input(name, values[name]) for name in sorted(part.reads) if name not in made]
        graph.outputs = [made[name] for name in sorted(part.makes)]
        model = Model(graph, self._model.shell)
        model.ir_version, model.opsets = self._model.ir_version, dict(self._model.opsets)
        return model


def _input(name: str, value: Array) -> Variable:
    return Variable(name, value.dtype, (None,) * value.ndim)


def _plan(graph: Graph, stops: Sequence[Stop], given: set[str]) -> list[Part]:
    makers = {tensor.name: node for node in graph.nodes for tensor in node.outputs if tensor.name}
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    made: dict[str, int] = {}
    there = set(given)
    parts: list[Part] = []
    for stage, stop in enumerate(stops):
        part = _part(stop, makers, there)
        part.nodes.sort(key=lambda node: order[id(node)])
        peeks = {id(node) for node in stop.peeks}
        for node in part.nodes:
            if id(node) not in peeks and not has(node, Trait.STRUCTURED):
                made.update((tensor.name, stage) for tensor in node.outputs if _is_tensor(tensor))
                there.update(tensor.name for tensor in node.outputs if _is_tensor(tensor))
        parts.append(part)
        for name in part.reads - given:
            if made[name] < stage:
                parts[made[name]].makes.add(name)
                parts[made[name]].keeps.add(name)
    return parts


def _part(stop: Stop, makers: Mapping[str, Node], there: Collection[str]) -> Part:
    """The nodes that compute what is wanted from what is there."""
    peeked = [tensor.name for node in stop.peeks for tensor in node.outputs if tensor.name]
    nodes: dict[int, Node] = {id(node): node for node in stop.peeks}
    reads: set[str] = set()
    pending = [*stop.tensors, *(name for node in stop.peeks for name in _needs(node))]
    while pending:
        name = pending.pop()
        if name in there:
            reads.add(name)
        elif name in makers and id(makers[name]) not in nodes:
            nodes[id(makers[name])] = makers[name]
            pending.extend(_needs(makers[name]))
    computed = {tensor.name for node in nodes.values() for tensor in node.outputs}
    wanted = {*stop.tensors, *peeked}
    return Part(list(nodes.values()), reads, wanted, wanted & computed)


def _needs(node: Node) -> Iterator[str]:
    """Names of the tensors of the main graph that a node reads, constants apart."""
    tensors: Iterable[Any] = [*node.inputs, *ir.captures(node)] if node.bodies else node.inputs
    for tensor in tensors:
        if isinstance(tensor, Variable) and tensor.name:
            yield tensor.name


def _is_tensor(tensor: Variable) -> bool:
    return bool(tensor.name) and (
        tensor.proto is None or tensor.proto.type.WhichOneof("value") in ("tensor_type", None)
    )
