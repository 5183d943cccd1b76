"""Candidates that differ from a model in one place, run from there on.

What every layer, or family of channels, does alone is measured on as many candidates as there are of them,
each of which repeats what the model does before it. The tensors at a few places of that, kept for the samples
to rank on, are where candidates begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnxslim.calibration.fidelity import Judge, Score
from onnxslim.calibration.stages import SpillStore, StagedRunner, Stop
from onnxslim.calibration.stream import Values
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Node
from onnxslim.ir.model import Model
from onnxslim.passes.repair.plan import unchanged
from onnxslim.runtime.targets import Target

# How many places to begin at, and bytes of tensors there that stay in memory.
PLACES = 8
MEMORY = 64 << 20


class Onward:
    """Runs candidates from the last of some places before which they are what a model is.

    Args:
        model: what candidates were made of; sorted.
        costs: multiply-accumulates of its nodes by label; places divide them evenly.
        target: where to run.
    """

    def __init__(self, model: Model, costs: Mapping[str, int], target: Target) -> None:
        self._model = model
        self._target = target
        self._outputs = Stop([tensor.name for tensor in model.graph.outputs])
        self._store = SpillStore(MEMORY)
        self._names = list(dict.fromkeys(name for place in _places(model, costs) for name in place))
        self._whole = StagedRunner(model, [Stop(self._names)], self._store, target=target)
        self._kept: dict[int, Values] = {}

    def __call__(self, candidate: Model) -> StagedRunner:
        """What computes the outputs of a candidate in its only stage, fed with `at` of a batch."""
        clean = unchanged(candidate, self._model)
        given = [name for name in self._names if name in clean]
        return StagedRunner(candidate, [self._outputs], self._store, given=given, target=self._target)

    @classmethod
    def of(cls, model: Model, costs: Mapping[str, int], target: Target) -> Onward | None:
        """The same; None where tensors cannot be kept."""
        return cls(model, costs, target) if is_plain(model) else None

    def judged(self, judge: Judge, candidate: Model, samples: int) -> Score:
        """What a candidate keeps of the model's outputs on about so many samples."""
        rest = self(candidate)
        return judge.judged(lambda batch, feeds: rest.run(0, batch, self.at(batch, feeds)), samples)

    def at(self, batch: int, feeds: Mapping[str, Array]) -> Values:
        """Inputs of a batch, and the model's tensors at all places.

        Raises:
            CalibrationError: the model does not run on it.
        """
        if batch not in self._kept:
            made = self._whole.run(0, batch, feeds)
            self._kept[batch] = {name: self._store.put(array) for name, array in made.items()}
        return {**feeds, **self._kept[batch]}


def _places(model: Model, costs: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of the tensors at places between nodes, where few are: what is made before and read behind."""
    nodes = model.graph.nodes
    share = max(sum(costs.get(node.label, 0) for node in nodes), 1) / PLACES
    fewest: dict[int, list[str]] = {}
    spent = 0
    for node, names in zip(nodes, _between(model), strict=True):
        spent += costs.get(node.label, 0)
        part = int(spent / share)
        if names and part and (part not in fewest or len(names) <= len(fewest[part])):
            fewest[part] = names
    yield from fewest.values()


def _between(model: Model) -> Iterator[list[str]]:
    """Names of the tensors that are needed behind each node, made by it or before it."""
    nodes = model.graph.nodes
    last = {id(tensor): index for index, node in enumerate(nodes) for tensor in _reads(node)}
    last.update((id(tensor), len(nodes)) for tensor in model.graph.outputs)
    open_: dict[int, str] = {}
    for index, node in enumerate(nodes):
        open_.update((id(tensor), tensor.name) for tensor in node.outputs if last.get(id(tensor), -1) > index)
        open_ = {key: name for key, name in open_.items() if last[key] > index}
        yield list(open_.values())


def _reads(node: Node) -> list[ir.Tensor]:
    tensors = [*node.inputs, *ir.captures(node)] if node.bodies else node.inputs
    return [tensor for tensor in tensors if not isinstance(tensor, Constant)]


def is_plain(model: Model) -> bool:
    """Whether all that a model computes is known to be tensors, which can be kept."""
    return all(
        tensor.dtype is not None for node in model.graph.nodes for tensor in node.outputs if tensor.name
    )
