"""What half precision costs nodes on data: each beside a twin that reads, and makes, rounded values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.noise import Noise
from onnxslim.calibration.stream import Taps, stream
from onnxslim.engine.base import Context
from onnxslim.ir import graph as ir
from onnxslim.ir import proto
from onnxslim.ir.graph import MASK_MAGNITUDE, Array, Constant, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.ops import Trait, has, spec_of
from onnxslim.passes.half.facts import SINGLE, STEP

MAKES = ("Cast",)

# Rounding moves a value by up to half a step, on its way in and on its way out. A node that makes more than
# this many times as much of it is where an answer gets lost: below 42 dB in float16, 24 dB in bfloat16.
MAGNIFIED = 16.0
# More batches say little that is new about rounding.
MOST_BATCHES = 4
# How far back from a node that loses much single precision may reach, and by how many nodes.
MOST_ROUNDS = 8
MOST_NODES = 64
# Larger constants are weights, whose roundings are as good as random: no copies are made of them.
MOST_BYTES = 4096


def lossy(
    model: Model, nodes: Sequence[Node], kind: np.dtype[Any], data: CalibrationData, ctx: Context
) -> dict[int, str]:
    """Why nodes stay in single precision, by id: rounding costs them, or what they feed, too much.

    Args:
        model: not modified.
        nodes: of its main graph, that may compute in half precision otherwise.
        kind: the type.
        data: batches of inputs; the first ones are enough.
        ctx: says where to run.

    Raises:
        CalibrationError: the model does not run on the data.
    """
    batches = list(itertools.islice(data, MOST_BATCHES))
    half = {id(node) for node in nodes}
    alone = {id(node): [node] for node in nodes if _loses(node)}
    trial = _Trial(model, kind, half, batches, ctx)
    bad = trial.below(alone, within=True)
    kept = dict.fromkeys(bad, f"it loses too much to rounding in {kind.name} on the data")
    open_ = {number: alone[number] for number in bad}
    for _ in range(MOST_ROUNDS):
        # Is it enough to compute this in single precision, from rounded values?
        still = trial.below(open_, within=False)
        for number, part in open_.items():
            if number not in still:
                for node in part:
                    kept.setdefault(id(node), f"rounding it costs '{part[0].label}' too much on the data")
        open_ = {number: _grown(open_[number], half) for number in still}
        open_ = {number: part for number, part in open_.items() if len(part) <= MOST_NODES}
    return kept


def worst_first(
    model: Model, nodes: Sequence[Node], kind: np.dtype[Any], data: CalibrationData, ctx: Context
) -> list[Node]:
    """The same nodes in the order of what rounding costs each on data; at the end those that round nothing.

    Args:
        model, nodes, kind, data, ctx: see `lossy`.

    Raises:
        CalibrationError: the model does not run on the data.
    """
    batches = list(itertools.islice(data, MOST_BATCHES))
    trial = _Trial(model, kind, {id(node) for node in nodes}, batches, ctx)
    found = trial.noise({id(node): [node] for node in nodes if _loses(node)}, within=True)
    lost = {number: _share(noise) for number, noise in found.items()}
    return sorted(nodes, key=lambda node: -lost.get(id(node), 0.0))


def worst_weights_first(model: Model, names: Iterable[str], kind: np.dtype[Any]) -> list[str]:
    """Initializers in the order of what rounding takes from each."""

    def lost(name: str) -> float:
        values, noise = np.asarray(model.graph.initializers[name].values), Noise()
        noise.add(values, values.astype(kind).astype(np.float64))
        return _share(noise)

    return sorted(names, key=lost, reverse=True)


def _share(noise: Noise) -> float:
    return noise.noise / noise.signal if noise.signal else 0.0


def _loses(node: Node) -> bool:
    """Whether there is anything to measure."""
    return spec_of(node).pure and not has(node, Trait.MOVES) and node.outputs[0].dtype == SINGLE


def _grown(part: Sequence[Node], half: set[int]) -> list[Node]:
    """A part, with the nodes that make what it reads."""
    makers = (ir.producer(tensor) for node in part for tensor in node.inputs)
    more = [maker for maker in makers if maker is not None and id(maker) in half]
    return list({id(node): node for node in (*part, *more)}.values())


class _Trial:
    """Runs parts of a model on rounded inputs beside the model itself."""

    def __init__(
        self,
        model: Model,
        kind: np.dtype[Any],
        half: set[int],
        batches: Sequence[Mapping[str, Array]],
        ctx: Context,
    ) -> None:
        self._model, self._kind, self._half = model, kind, half
        self._batches, self._ctx = batches, ctx
        self._limit = MAGNIFIED * STEP[kind.name] / 2

    def below(self, parts: Mapping[int, Sequence[Node]], *, within: bool) -> list[int]:
        """Which parts lose too much; see `noise`."""
        found = self.noise(parts, within=within)
        return [number for number, noise in found.items() if noise.noise > self._limit**2 * noise.signal]

    def noise(self, parts: Mapping[int, Sequence[Node]], *, within: bool) -> dict[int, Noise]:
        """What parts lose, judged by the first output of their first node.

        Args:
            parts: nodes of the model, by a number.
            within: whether they compute in half precision themselves: constants and results are rounded too.
        """
        if not parts:
            return {}
        twins = _Twins(self._model, self._kind, self._half, within)
        names = {number: twins.add(part) for number, part in parts.items()}
        ir.sort(twins.model.graph)
        found = {number: Noise() for number in parts}
        taps = Taps(twins.model, list(itertools.chain(*names.values())), self._ctx.target)
        for batch in stream(self._batches, taps, progress=self._ctx.progress, what="rounding"):
            for number, (name, twin) in names.items():
                actual = batch.values[twin]
                _add(found[number], batch.values[name], actual.astype(self._kind) if within else actual)
        return found


def _add(noise: Noise, wanted: Array, actual: Array) -> None:
    """Compare where the original has a value at all, and no mask."""
    usable = np.isfinite(wanted) & (np.abs(wanted) < MASK_MAGNITUDE)
    noise.add(wanted[usable], actual[usable].astype(np.float64))


class _Twins:
    """A copy of a model with further nodes in it, which read rounded values."""

    def __init__(self, model: Model, kind: np.dtype[Any], half: set[int], within: bool) -> None:
        self.model = model.copy()
        self._kind, self._within = kind, within
        pairs = list(zip(model.graph.nodes, self.model.graph.nodes, strict=True))
        self._copies = {id(node): twin for node, twin in pairs}
        self._half = {id(twin) for node, twin in pairs if id(node) in half}
        self._name = Namer(self.model.graph)
        self._rounded: dict[int, Tensor] = {}

    def add(self, part: Iterable[Node]) -> tuple[str, str]:
        """Twins of some nodes; names of the first output of the first, and of its twin's."""
        nodes = [self._copies[id(node)] for node in part]
        made = {id(t): self._twin(t, "twin") for node in nodes for t in node.outputs if t.name}
        for node in nodes:
            inputs = [made.get(id(tensor)) or self._read(tensor) for tensor in node.inputs]
            outputs = [made[id(tensor)] if tensor.name else ir.empty() for tensor in node.outputs]
            label = self._name(f"{node.label}_twin")
            self.model.graph.nodes.append(
                Node(node.op, label, dict(node.attrs), inputs, outputs, node.domain)
            )
        return nodes[0].outputs[0].name, made[id(nodes[0].outputs[0])].name

    def _read(self, tensor: Tensor) -> Tensor:
        """A tensor as the twins read it: rounded if it will be."""
        if not tensor.name and not isinstance(tensor, Constant):
            return ir.empty()
        if tensor.dtype != SINGLE or not self._will_be(tensor):
            return tensor
        if id(tensor) not in self._rounded:
            self._rounded[id(tensor)] = self._round(tensor)
        return self._rounded[id(tensor)]

    def _will_be(self, tensor: Tensor) -> bool:
        if isinstance(tensor, Constant):
            return self._within and tensor.nbytes <= MOST_BYTES
        maker = ir.producer(tensor)
        return self._within or (maker is not None and id(maker) in self._half)

    def _round(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, Constant):
            values = np.asarray(tensor.values).astype(self._kind).astype(SINGLE)
            return Constant(self._name(f"{tensor.name}_rounded"), values)
        short, wide = self._twin(tensor, "short", self._kind), self._twin(tensor, "rounded")
        for kind, source, result in ((self._kind, tensor, short), (SINGLE, short, wide)):
            attrs = {"to": int(proto.elem_type_of(kind))}
            self.model.graph.nodes.append(Node("Cast", self._name(result.name), attrs, [source], [result]))
        return wide

    def _twin(self, tensor: Tensor, word: str, kind: np.dtype[Any] | None = None) -> Variable:
        return Variable(self._name(f"{tensor.name}_{word}"), kind or tensor.dtype, tensor.shape)
