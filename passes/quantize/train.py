"""Quantization-aware training: what a candidate has as integers, learnt through its rounding.

What is trained is a twin of the candidate itself, of Q/DQ where the file has Q/DQ: weights are floats again,
with a Q in front of their DQ, biases too, in steps of both scales, and every scale is multiplied by a factor
that is learnt. Scales that are one constant in the file have one factor, and so have those that follow from
it. Codes and scales that come of it go to the places of those that the candidate had, so that nothing is
planned anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.learn import door
from onnxslim.learn.door import UnknownError, to_numpy, to_torch, torch
from onnxslim.learn.fake import Limits, straight_through
from onnxslim.learn.fit import Course, Learnt, fit
from onnxslim.learn.net import Net, unknown
from onnxslim.learn.weights import weights as plain_weights
from onnxslim.ops import Trait, has
from onnxslim.passes.learning.apart import taken_apart
from onnxslim.passes.learning.lessons import Lessons, lessons, note, require_features
from onnxslim.passes.quantize.build import Builder, Candidate
from onnxslim.passes.quantize.trained import Grid, constants_read
from onnxslim.passes.quantize.weights import (
    MAX_PAIR,
    Codes,
    encode_bias,
    least_scales,
    pair_axis_of,
    saturates,
    unsaturated,
)

MATCHES = ("Cast", "Clip", "QuantizeLinear")
MAKES = ("Mul", "QuantizeLinear")
# The largest step by default, and samples of a step.
RATE, BATCH = 1e-3, 64
# Scales do not become less than this part of what they were.
LEAST_FACTOR = 1 / 16
# How close to the middle between two codes a weight may begin, in steps.
EDGE = 0.49
FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class _Integers:
    """A constant of integers, learnt as floats.

    Attributes:
        values: the floats, in the twin.
        codes, scale: names of its integers and of their scale, in the candidate.
        factor: of the scale, in the twin.
        grid: scale and zero point before training.
        limits: least and largest code.
        pair_axis: the axis of neighbours that must not saturate together, if there is one.
    """

    values: Constant
    codes: str
    scale: str
    factor: Constant
    grid: Grid
    limits: Limits
    pair_axis: int | None = None

    def rounded(self, values: Array, factor: Array) -> tuple[Array, Array]:
        """Codes of some values, and scales in a shape that goes with them."""
        scale, zero = Grid(self.grid.scale * factor, self.grid.zero_point, self.grid.axis).spread(values)
        return np.clip(np.rint(values / scale) + zero.astype(FLOAT), *self.limits), scale


@dataclass(frozen=True)
class _Bias:
    """A bias in 32 bits, learnt as floats.

    Attributes:
        values: the floats, in the twin.
        codes, steps: names of its integers, and of their scale, in the candidate.
        weight: of the same layer.
        data: scale of its data, before training.
        factor: of that.
    """

    values: Constant
    codes: str
    steps: str
    weight: _Integers
    data: Array
    factor: Constant


@dataclass(frozen=True)
class _Unwritten:
    """What the candidate does not tell of the weight of a layer.

    Attributes:
        wanted: its floats.
        limit: largest magnitude of a code.
        pair_axis: see `_Integers`.
    """

    wanted: Array
    limit: int
    pair_axis: int | None


@dataclass(frozen=True)
class Training:
    """How a candidate is trained.

    Attributes:
        steps: how many.
        features: names of tensors inside that are to come close to the teacher's, too.
        checkpoint: file to keep the state in, and to go on from.
        rate: the largest step, relative to the size of weights, biases and scales.
    """

    steps: int
    features: tuple[str, ...] = ()
    checkpoint: Path | None = None
    rate: float | None = None

    def __call__(self, candidate: Candidate, build: Builder, teacher: Model, log: Log) -> TrainingOutcome:
        """Train a candidate, whose integers and scales change if that makes it better on fresh samples.

        Raises:
            UnknownError: PyTorch does not compute it, or something else, or there is nothing to learn from.
            UsageError: there is no such feature, or the checkpoint is of something else.
        """
        ctx = build.ctx
        require_features("quantize", self.features, candidate.model, teacher)
        twin = Twin(candidate, build, self.features)
        for node, why in unknown(twin.model):
            raise UnknownError(f"node '{node.label}': {why}")
        rows = {"QuantizeLinear": straight_through(twin.limits)}
        net = Net(twin.model, twin.chosen, torch.float32, self.features, rows)
        taught = lessons(net, candidate.model, teacher, ctx, log, features=self.features)
        course = Course(self.steps, self.rate or RATE, BATCH, ctx.seed, ctx.target.threads)
        learnt = fit(
            net,
            taught.aims,
            taught.examples,
            taught.unseen,
            course,
            ctx.progress,
            checkpoint=self.checkpoint,
            confine=twin.confine(net.parameters),
        )
        note(learnt, twin.chosen, log)
        if learnt.improved:
            twin.write(learnt.values)
        return TrainingOutcome(learnt, taught)


@dataclass(frozen=True)
class TrainingOutcome:
    """What came of training, and of what lessons."""

    learnt: Learnt
    taught: Lessons


class Twin:
    """A candidate made ready to be learnt.

    Args:
        candidate: written to, when something was learnt.
        build: made it.
        features: names of tensors that are to be handed out as integer operators read them.

    Attributes:
        model: the twin.
        chosen: constants of it to learn.
        limits: of codes that Q makes in the twin, by id of the node.

    Raises:
        UnknownError: there are no scales to learn.
    """

    def __init__(self, candidate: Candidate, build: Builder, features: Sequence[str] = ()) -> None:
        self._made, self._build = candidate.model, build
        self.model = taken_apart(candidate.model, build.ctx)
        self._name = Namer(self.model.graph)
        self._new: list[Node] = []
        self.limits: dict[int, Limits] = {}
        self._factors: dict[str, Constant] = {}
        self._integers: list[_Integers] = []
        self._biases: list[_Bias] = []
        layers = self._layers(candidate)
        self._bypass_clips()
        for node in list(self.model.graph.nodes):
            if has(node, Trait.QUANTIZES) and isinstance(node.inputs[1], Constant):
                node.inputs[1] = self._scaled(node.inputs[1], self._factor(node.inputs[1]))
        pairs = [node for node in self.model.graph.nodes if has(node, Trait.DEQUANTIZES)]
        for node in pairs:
            self._follow(node, layers)
        for node in list(self.model.graph.nodes):
            self._take_bias(node)
        if not self._factors:
            raise UnknownError("nothing in it runs in integers")
        self._show(features)
        self.model.graph.nodes.extend(self._new)
        ir.sort(self.model.graph)
        factors = {id(each): each for each in self._factors.values()}
        self.chosen = [*factors.values(), *(each.values for each in self._integers)]
        self.chosen += [each.values for each in self._biases]
        self.chosen += self._floats()

    # Made of the candidate

    def _layers(self, candidate: Candidate) -> dict[str, _Unwritten]:
        """By the name of its codes, what is known of the weight of a layer."""
        known = {node.label: node for node in self._build.model.graph.nodes}
        rules, linear = self._build.ctx.target.layout, {id(node) for node in candidate.plan.linear}
        found = {}
        for node in (*candidate.plan.linear, *candidate.plan.stored):
            pair, before = ir.producer(node.inputs[1]), known.get(candidate.plan.labels[id(node)])
            codes = None if pair is None else _stored(pair)
            if codes is not None and before is not None and isinstance(before.inputs[1], Constant):
                runs = id(node) in linear
                found[codes.name] = _Unwritten(
                    before.inputs[1].values,
                    candidate.plan.limits[id(node)],
                    pair_axis_of(node, rules) if runs else None,
                )
        return found

    def _bypass_clips(self) -> None:
        """Limit codes of fewer bits than their type has where they are made."""
        gone = set()
        for clip in self.model.graph.nodes:
            maker = ir.producer(clip.inputs[0]) if clip.op == "Clip" else None
            low, high = clip.constant(1), clip.constant(2)
            if maker is not None and has(maker, Trait.QUANTIZES) and low is not None and high is not None:
                self.limits[id(maker)] = low.item(), high.item()
                ir.replace_uses(clip.outputs[0], clip.inputs[0])
                ir.detach(clip)
                gone.add(id(clip))
        ir.sweep(self.model.graph, gone)

    def _follow(self, node: Node, layers: Mapping[str, _Unwritten]) -> None:
        """Have a DQ read what is learnt."""
        scale, maker = node.inputs[1], ir.producer(node.inputs[0])
        if not isinstance(scale, Constant) or scale.dtype != FLOAT or node.attrs.get("block_size"):
            return
        if maker is not None and has(maker, Trait.QUANTIZES):
            product = ir.producer(maker.inputs[1])
            if product is not None and product in self._new:
                node.inputs[1] = self._scaled(scale, product.inputs[1])
        elif (codes := _stored(node)) is not None and codes.dtype != np.int32 and codes.size > 1:
            self._take(node, codes, scale, layers.get(codes.name))

    def _take(self, node: Node, codes: Constant, scale: Constant, layer: _Unwritten | None) -> None:
        """Learn integers as floats: a Q in front of their DQ."""
        zero = node.constant(2)
        zero = np.zeros(scale.shape, np.int8) if zero is None else zero
        grid = Grid(scale.values, zero, int(node.attrs.get("axis", 1)))
        numbers = codes.values.astype(np.int32)
        limits, pair_axis = (0, 0), None
        if layer is not None:
            middle, most = int(zero.flat[0]), layer.limit
            limits = min(middle - most, int(numbers.min())), max(middle + most, int(numbers.max()))
            pair_axis = layer.pair_axis if 2 * most > MAX_PAIR and not middle else None
        else:
            info = np.iinfo(codes.dtype)
            limits = int(info.min), int(info.max)
        values = grid.values(numbers)
        if layer is not None and layer.wanted.shape == values.shape:
            values = _within(layer.wanted, numbers, grid, limits)
        made = _Integers(
            Constant(self._name(f"{codes.name}_learnt"), values),
            codes.name,
            scale.name,
            self._factor(scale),
            grid,
            limits,
            pair_axis,
        )
        self._integers.append(made)
        cast = ir.producer(node.inputs[0])
        self._round(node, made.values, codes, self._scaled(scale, made.factor), limits)
        if cast is not None and not cast.outputs[0].outputs:
            ir.detach(cast)
            ir.sweep(self.model.graph, {id(cast)})

    def _round(self, pair: Node, values: Constant, codes: Constant, steps: Tensor, limits: Limits) -> None:
        """Have a DQ read floats in place of its codes, rounded by a Q."""
        quantized = Variable(self._name(f"{codes.name}_rounded"), codes.dtype, codes.shape)
        attrs = {name: pair.attrs[name] for name in ("axis",) if name in pair.attrs}
        self._add("QuantizeLinear", attrs, [values, steps, *pair.inputs[2:]], quantized)
        self.limits[id(self._new[-1])] = limits
        pair.inputs[0], pair.inputs[1] = quantized, steps

    def _take_bias(self, node: Node) -> None:
        """Learn a bias in 32 bits as floats, rounded in steps of both scales."""
        pair = ir.producer(node.inputs[2]) if len(node.inputs) > 2 else None
        codes = _stored(pair) if pair is not None and has(pair, Trait.DEQUANTIZES) else None
        if pair is None or codes is None or codes.dtype != np.int32:
            return
        data, weight = (ir.producer(tensor) for tensor in node.inputs[:2])
        steps = pair.inputs[1]
        assert data is not None
        assert weight is not None
        found = next((each for each in self._integers if each.values in _read_by(weight)), None)
        product = ir.producer(data.inputs[1])
        if found is None or product is None or not isinstance(steps, Constant):
            return
        scale, factor = product.inputs
        values = Grid(steps.values, np.zeros(steps.shape, np.int32), 0).values(codes.values)
        learnt = Constant(self._name(f"{codes.name}_learnt"), values)
        assert isinstance(scale, Constant)
        assert isinstance(factor, Constant)
        self._biases.append(_Bias(learnt, codes.name, steps.name, found, scale.values, factor))
        both = Variable(self._name(f"{steps.name}_scaled"), FLOAT, steps.shape)
        self._add("Mul", {}, [data.inputs[1], weight.inputs[1]], both)
        info = np.iinfo(codes.dtype)
        self._round(pair, learnt, codes, both, (int(info.min), int(info.max)))

    def _factor(self, scale: Constant) -> Constant:
        """What a scale is multiplied by while it is learnt."""
        if scale.name not in self._factors:
            ones = np.ones(scale.shape, FLOAT)
            self._factors[scale.name] = Constant(self._name(f"{scale.name}_factor"), ones)
        return self._factors[scale.name]

    def _scaled(self, scale: Constant, factor: Tensor) -> Variable:
        """A scale times a factor; the scale gets that of its tie where it has none of its own."""
        assert isinstance(factor, Constant)
        self._factors.setdefault(scale.name, factor)
        result = Variable(self._name(f"{scale.name}_scaled"), FLOAT, scale.shape)
        self._add("Mul", {}, [scale, factor], result)
        return result

    def _add(self, op: str, attrs: Mapping[str, int], inputs: list[Tensor], output: Variable) -> None:
        self._new.append(Node(op, self._name(f"{output.name}_{op}"), dict(attrs), inputs, [output]))

    def _show(self, features: Sequence[str]) -> None:
        """Let the names of tensors be those of what integer operators read of them."""
        for node in self.model.graph.nodes:
            tensor = node.inputs[0] if has(node, Trait.QUANTIZES) else None
            if tensor is not None and tensor.name in features and node.outputs[0].outputs:
                shown = node.outputs[0].outputs[0].outputs[0]
                tensor.name, shown.name = self._name(f"{tensor.name}_exact"), tensor.name

    def _floats(self) -> list[Constant]:
        """Weights that the file has as floats."""
        mine = {id(each) for each in self._factors.values()} | {id(each.values) for each in self._biases}
        there = {each.name: each for each in constants_read(self._made)}
        found = [each for each in plain_weights(self.model) if id(each) not in mine]
        return [
            each
            for each in found
            if each.name in there and each.name not in self._factors and each.shape == there[each.name].shape
        ]

    # Learnt

    def confine(self, parameters: Sequence[door.Tensor]) -> Callable[[], None]:
        """What brings parameters back to what the file can hold.

        Scales stay above zero, and large enough for biases in 32 bits; weights of pairs of codes whose sums
        could saturate become those of the nearest pair whose sum cannot.

        Args:
            parameters: of a net, in the order of `chosen`.
        """
        of = {id(constant): each for constant, each in zip(self.chosen, parameters, strict=True)}

        def value(constant: Constant) -> Array:
            return to_numpy(of[id(constant)])

        def put(constant: Constant, values: Array) -> None:
            with torch.no_grad():
                of[id(constant)].copy_(to_torch(values))

        @np.errstate(all="ignore")  # what is no number ends the attempt in the next step
        def bring_back() -> None:
            for factor in {id(each): each for each in self._factors.values()}.values():
                put(factor, np.maximum(value(factor), np.float32(LEAST_FACTOR)))
            for bias in self._biases:
                scale = np.float32((bias.data * value(bias.factor)).item())
                least = least_scales(value(bias.values).reshape(-1), scale)
                own, grid = value(bias.weight.factor), bias.weight.grid
                bound = np.asarray(least / grid.scale if grid.scale.ndim else (least / grid.scale).max())
                if (own < bound).any():
                    put(bias.weight.factor, np.maximum(own, bound.astype(FLOAT)))
            for each in self._integers:
                if each.pair_axis is not None:
                    weight = value(each.values)
                    kept = _unsaturated(each, weight, value(each.factor))
                    if kept is not None:
                        put(each.values, kept)

        return bring_back

    def write(self, learnt: Sequence[Array]) -> None:
        """Put what was learnt into the candidate.

        Args:
            learnt: in the order of `chosen`.
        """
        values = {id(constant): each for constant, each in zip(self.chosen, learnt, strict=True)}
        there = {each.name: each for each in constants_read(self._made)}
        before = {name: there[name].values for name in self._factors}
        for each in self._integers:
            codes, _ = each.rounded(values[id(each.values)], values[id(each.factor)])
            there[each.codes].values = codes.astype(there[each.codes].dtype)
        for name, factor in self._factors.items():
            there[name].values = (before[name] * values[id(factor)]).astype(FLOAT)
        for bias in self._biases:
            weight, data = bias.weight, np.float32((bias.data * values[id(bias.factor)]).item())
            scales = (weight.grid.scale * values[id(weight.factor)]).astype(FLOAT)
            codes, steps = encode_bias(values[id(bias.values)].reshape(-1), scales, data)
            there[bias.codes].values, there[bias.steps].values = codes, steps
        for constant in self.chosen:
            if constant.name in there:
                there[constant.name].values = values[id(constant)].astype(constant.dtype)


def _stored(node: Node) -> Constant | None:
    """The constant whose integers a DQ turns back, packed ones included."""
    source = node.inputs[0]
    maker = ir.producer(source)
    if maker is not None and maker.op == "Cast":
        source = maker.inputs[0]
    return source if isinstance(source, Constant) else None


def _read_by(pair: Node) -> Sequence[Tensor]:
    """What the Q in front of a DQ reads."""
    maker = ir.producer(pair.inputs[0])
    return maker.inputs if maker is not None else ()


def _within(wanted: Array, codes: Array, grid: Grid, limits: Limits) -> Array:
    """The floats nearest to some that are rounded to given codes; beyond the limits as they are."""
    scale, zero = grid.spread(codes)
    steps = codes.astype(FLOAT) - zero.astype(FLOAT)
    low = np.where(codes == limits[0], -np.inf, (steps - EDGE) * scale)
    high = np.where(codes == limits[1], np.inf, (steps + EDGE) * scale)
    return np.clip(wanted, low, high).astype(FLOAT)


def _unsaturated(each: _Integers, weight: Array, factor: Array) -> Array | None:
    """Weights whose pairs of codes cannot saturate; None if those are such."""
    assert each.pair_axis is not None
    found, scale = each.rounded(weight, factor)
    codes: Codes = found.astype(np.int8)
    axis = each.grid.axis % codes.ndim if each.grid.scale.ndim else 1 - each.pair_axis
    if not saturates(codes, axis, each.pair_axis, 255):
        return None
    legal = unsaturated(codes, axis, each.pair_axis)
    return np.where(legal == codes, weight, legal * scale).astype(FLOAT)
