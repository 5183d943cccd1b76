"""Channels of the tensors that become integers, scaled to make even use of their ranges.

A tensor has one scale in integers, so that small channels get the noise of the largest. Where scales can be
moved (`scaling`), each family of channels gets those that a model of both noises likes best: that of
activations, which wants all channels alike, and that of weights, where columns grow by what their inputs
shrink. Where they cannot be moved but the tensor is made in floating point, a Mul in front of the layers that
read it does the same for the price of that Mul.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.stream import Taps, stream
from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Namer, Node, Variable, producer
from onnxslim.ir.model import Model
from onnxslim.ops import Role, spec_of
from onnxslim.passes.quantize.plan import Plan
from onnxslim.passes.quantize.scaling import Labelled, Mixer, Scaling
from onnxslim.runtime.targets import Target

MAKES = ("Mul",)

Doubles = NDArray[np.float64]

# How much of the differences between activations goes over to weights; the rest stays where it is.
SHARES = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
# What rounding by second moments leaves of the noise of the nearest codes. Not tuned: of weights and
# activations together it leaves 0.56 (23.7 to 26.2 dB, decision 28).
ROUNDED = 0.4
# A Mul has to lower the noise that it is there for by this factor.
WORTH = 2.0
# Channels are not made larger by more than this: what calibration did not see may still come.
# Without this and the next, unseen samples lost 15 dB (decision 37).
LARGEST = 16.0
# Positions of a tensor below which its channels' ranges are chance.
FEWEST = 128


@dataclass
class Seen:
    """Of the channels of a tensor: least and largest value, and mean square."""

    low: Doubles
    high: Doubles
    square: Doubles
    count: int = 0

    def update(self, rows: Array) -> None:
        """Take in values, shape (channels, positions)."""
        if not rows.shape[1]:
            return
        np.minimum(self.low, rows.min(axis=1), out=self.low)
        np.maximum(self.high, rows.max(axis=1), out=self.high)
        total = self.count + rows.shape[1]
        self.square += (np.square(rows, dtype=np.float64).sum(axis=1) - rows.shape[1] * self.square) / total
        self.count = total


def equalize(
    model: Model, plan: Plan, data: CalibrationData, levels: tuple[int, int], log: Log, target: Target | None
) -> bool:
    """Scale the channels of a float model for the good of what a plan makes integers of it.

    Args:
        model: edited in place; computes the same afterwards.
        plan: of this model or a copy of it.
        data: batches of inputs.
        levels: integers that activations and weights are rounded to.
        log: what is done goes here.
        target: where to run.

    Returns:
        Whether anything was scaled.
    """
    work = _Equalizer(model, plan, levels)
    work.observe(data, target)
    return bool(work.move(log) + work.insert(log))


class _Equalizer:
    """One call of `equalize`."""

    def __init__(self, model: Model, plan: Plan, levels: tuple[int, int]) -> None:
        self._model = model
        self._scaling = Scaling(model)
        self._levels = levels
        self._integer = {plan.labels[key] for key in plan.integer}
        linear = {plan.labels[id(node)] for node in plan.linear}
        names = {tensor.name for tensor in plan.tensors.values() if isinstance(tensor, Variable)}
        self._mixers = [mixer for mixer in self._scaling.mixers if mixer.layer.label in linear]
        made = {tensor.name for node in model.graph.nodes for tensor in node.outputs}
        self._quantized = {name for name in names if name in made}
        self._seen: dict[str, Seen] = {}

    def observe(self, data: CalibrationData, target: Target | None) -> None:
        """Go through the data once."""
        axes = {name: each.axes for name, each in self._scaling.tensors.items() if name in self._quantized}
        for mixer in self._mixers:
            name = mixer.layer.node.inputs[0].name
            if name in self._quantized:
                axes.setdefault(name, (mixer.layer.axis,))
        for batch in stream(data.bind(self._model.inputs()), Taps(self._model, list(axes), target)):
            for name, along in axes.items():
                channels = np.moveaxis(batch.values[name], along, range(len(along)))
                rows = channels.reshape(math.prod(channels.shape[: len(along)]), -1)
                self._seen.setdefault(name, _nothing(len(rows))).update(rows)

    def move(self, log: Log) -> int:
        """Scale whatever can be scaled; returns the number of tensors that are quantized otherwise then."""
        scales = np.ones(self._scaling.free.size)
        count = 0
        for family in self._scaling.families():
            members = np.array(sorted(family))
            tensors = self._members(members)
            readers = self._readers(members)
            if not readers or max((seen.count for _, _, seen in tensors), default=0) < FEWEST:
                continue
            found, gain = _best(_Problem(members, tensors, readers, self._levels))
            if gain > 1.0:
                scales[members] = found
                count += len(tensors)
                log.change(tensors[0][0], f"channels of {len(tensors)} tensors scaled alike")
        self._scaling.apply(scales)
        return count

    def insert(self, log: Log) -> int:
        """Put a Mul where that is worth it; returns how many."""
        by_tensor: dict[str, list[Mixer]] = {}
        for mixer in self._mixers:
            name = mixer.layer.node.inputs[0].name
            if name in self._seen and not mixer.channelwise:
                by_tensor.setdefault(name, []).append(mixer)
        return sum(self._insert(name, mixers, log) for name, mixers in by_tensor.items())

    def _insert(self, name: str, mixers: Sequence[Mixer], log: Log) -> bool:
        tensor, layer = mixers[0].layer.node.inputs[0], mixers[0].layer
        maker, known = producer(tensor), self._scaling.tensors.get(name)
        while maker is not None and spec_of(maker).role in (Role.CLAMP, Role.MOVE):
            maker = producer(maker.inputs[0])
        if maker is None or maker.label in self._integer or any(m.layer.axis != layer.axis for m in mixers):
            return False
        if self._seen[name].count < FEWEST:
            return False
        if known is not None and self._scaling.free[known.labels].any():
            return False
        size = self._seen[name].square.size
        members, labels = np.arange(size), Labelled((layer.axis,), np.arange(size))
        readers = [Mixer(mixer.layer, labels.labels, np.zeros(0, np.int64)) for mixer in mixers]
        if any(reader.layer.matrix().shape[0] * reader.layer.matrix().shape[2] % size for reader in readers):
            return False
        problem = _Problem(
            members, [(name, labels, self._seen[name])], readers_of(readers, self._seen), self._levels
        )
        scales, gain = _best(problem)
        if gain < WORTH:
            return False
        self._multiply(tensor, readers, scales)
        log.change(name, "channels scaled by a Mul before they become integers")
        return True

    def _multiply(self, tensor: ir.Tensor, readers: Sequence[Mixer], scales: Doubles) -> None:
        graph = self._model.graph
        unique = Namer(graph)
        values = (1.0 / scales).astype(np.float32)
        axis = readers[0].layer.axis
        factor = Constant(unique(f"{tensor.name}_balance"), values.reshape(-1, *(1,) * (-axis - 1)))
        result = Variable(unique(f"{tensor.name}_balanced"), tensor.dtype, tensor.shape)
        node = Node("Mul", unique(f"{tensor.name}_Mul"), {}, [tensor, factor], [result])
        for reader in readers:
            target = reader.layer.node
            matrix = reader.layer.matrix() * reader.columns(1.0 / values.astype(np.float64))
            self._scaling.replace(target, 1, reader.layer.restored(matrix).astype(np.float32))
            target.inputs[0] = result
        graph.nodes.append(node)
        ir.sort(graph)

    def _members(self, members: Array) -> list[tuple[str, Labelled, Seen]]:
        return [
            (name, self._scaling.tensors[name], seen)
            for name, seen in self._seen.items()
            if name in self._scaling.tensors and np.isin(self._scaling.tensors[name].labels, members).any()
        ]

    def _readers(self, members: Array) -> list[tuple[Mixer, Doubles]]:
        own = [each for each in self._mixers if each.reads is not None and np.isin(each.reads, members).any()]
        return readers_of(own, self._seen)


def readers_of(mixers: Iterable[Mixer], seen: Mapping[str, Seen]) -> list[tuple[Mixer, Doubles]]:
    """Layers with the mean square of each channel that they read."""
    found = []
    for mixer in mixers:
        name = mixer.layer.node.inputs[0].name
        if name in seen:
            found.append((mixer, seen[name].square))
    return found


@dataclass
class _Problem:
    """One family of channels.

    Attributes:
        members: numbers of its components.
        tensors: those that become integers, with their channels.
        readers: layers that read some of it, with the mean squares of their input channels.
        levels: of activations and weights.
    """

    members: Array
    tensors: Sequence[tuple[str, Labelled, Seen]]
    readers: Sequence[tuple[Mixer, Doubles]]
    levels: tuple[int, int]

    def __post_init__(self) -> None:
        size = int(self.members.max()) + 1
        place = np.full(max(size, *(int(labels.max()) + 1 for labels in self._all())), -1)
        place[self.members] = np.arange(self.members.size)
        self._place = place
        self.reach = self._reach()
        self._columns = [self._column(mixer, square) for mixer, square in self.readers]
        self.heard = self._heard()

    def _all(self) -> Iterable[Array]:
        yield from (labelled.labels for _, labelled, _ in self.tensors)
        yield from (mixer.reads for mixer, _ in self.readers if mixer.reads is not None)

    def _reach(self) -> Doubles:
        """How far each component reaches, relative to the ranges of the tensors it is in."""
        found = np.zeros(self.members.size)
        for _, labelled, seen in self.tensors:
            at, inside = self._at(labelled.labels)
            span = np.maximum(seen.high, -seen.low)[inside]
            np.maximum.at(found, at, span / max(seen.high.max(), -seen.low.min(), 1e-30))
        floor = max(float(found.max(initial=0.0)), 1e-30) / LARGEST
        return np.asarray(np.maximum(found, floor))

    def _at(self, labels: Array) -> tuple[Array, Array]:
        at = self._place[labels]
        return at[at >= 0], at >= 0

    def _column(self, mixer: Mixer, square: Doubles) -> tuple[Doubles, Doubles, Doubles, Array]:
        """Of a layer: power of each input channel, largest weights, in parts of its output's power."""
        matrix = mixer.layer.matrix().astype(np.float64)
        groups, rows, _ = matrix.shape
        assert mixer.reads is not None
        split = matrix.reshape(groups, rows, mixer.reads.size // groups, -1)
        power = np.square(split).sum(axis=(1, 3)).reshape(-1)
        largest = np.abs(split).max(axis=3)
        total = float((power * square).sum())
        return power / max(total, 1e-30), largest, square / max(total, 1e-30) * split.shape[3], mixer.reads

    def _heard(self) -> Doubles:
        """How much of noise in each component is heard behind the layers."""
        found = np.zeros(self.members.size)
        for power, _, _, reads in self._columns:
            at, inside = self._at(reads)
            np.add.at(found, at, power[inside])
        return found

    def noise(self, scales: Doubles) -> float:
        """Expected noise of activations and weights, with these scales."""
        return self._activations(scales) + self._weights(scales)

    def _activations(self, scales: Doubles) -> float:
        loud = float((np.square(scales) * self.heard).sum())
        total = 0.0
        for _, labelled, seen in self.tensors:
            by = self._scales(labelled.labels, scales)
            span = max((seen.high / by).max(), 0.0) - min((seen.low / by).min(), 0.0)
            total += (span / self.levels[0]) ** 2 / 12 * loud
        return total

    def _weights(self, scales: Doubles) -> float:
        total = 0.0
        for (mixer, _), (_, largest, square, reads) in zip(self.readers, self._columns, strict=True):
            if mixer.channelwise:
                continue
            groups = largest.shape[0]
            by = self._scales(reads, scales).reshape(groups, 1, -1)
            steps = 2 * (largest * by).max(axis=2) / self.levels[1]
            power = (square.reshape(groups, -1) / np.square(by[:, 0])).sum(axis=1)
            total += ROUNDED / 12 * float((np.square(steps).sum(axis=1) * power).sum())
        return total

    def _scales(self, labels: Array, scales: Doubles) -> Doubles:
        at = self._place[labels]
        return np.where(at >= 0, scales[at], 1.0)

    def weight(self) -> Doubles:
        """How large the weights are that read each component, relative to their layers'."""
        found = np.full(self.members.size, 1e-30)
        for (mixer, _), (_, largest, _, reads) in zip(self.readers, self._columns, strict=True):
            if not mixer.channelwise:
                at, inside = self._at(reads)
                size = largest.max(axis=1).reshape(-1)
                np.maximum.at(found, at, size[inside] / max(size.max(), 1e-30))
        return np.asarray(np.maximum(found, max(float(found.max()), 1e-30) / LARGEST))


def _best(problem: _Problem) -> tuple[Doubles, float]:
    """The scales of least noise, and by what factor they lower it."""
    before = problem.noise(np.ones(problem.members.size))
    best, least = np.ones(problem.members.size), before
    weight = problem.weight()
    for share in SHARES:
        for rest in (1.0 - share, 0.0) if share else (1.0,):
            scales = problem.reach**share / weight**rest
            scales /= np.exp(np.log(scales).mean())
            noise = problem.noise(scales)
            if noise < least:
                best, least = scales, noise
    return best, before / max(least, 1e-30)


def _nothing(channels: int) -> Seen:
    return Seen(np.full(channels, np.inf), np.full(channels, -np.inf), np.zeros(channels))
