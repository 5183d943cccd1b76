"""Writes a plan into the graph as QuantizeLinear / DequantizeLinear pairs of the standard operators."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from onnxslim.calibration.observers import Range, affine_parameters
from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Graph, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.ops import Role, Trait, has, spec_of, view_of
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.quantize import weights
from onnxslim.passes.quantize.plan import Plan, is_movable
from onnxslim.passes.quantize.trained import KnownGrid
from onnxslim.passes.quantize.weights import pair_axis_of


@dataclass(frozen=True)
class Scale:
    """Scale and zero point shared by one or more tensors."""

    scale: Constant
    zero_point: Constant

    def covers(self, low: float, high: float) -> bool:
        """Whether clipping to [low, high] changes nothing that survives rounding to these integers."""
        step, zero = float(self.scale.values), int(self.zero_point.values)
        info = np.iinfo(self.zero_point.dtype)
        slack = 0.5 * step
        return (info.min - zero) * step >= low - slack and (info.max - zero) * step <= high + slack


class Inserter:
    """Edits one model according to a plan.

    Args:
        model: edited in place.
        plan: made for this model.
        rules: of the target.
        log: what is done goes here.
        encoder: rounds the weights.
    """

    makes = frozenset(("Add", "Cast", "Clip", "DequantizeLinear", "Identity", "QuantizeLinear"))

    def __init__(
        self, model: Model, plan: Plan, rules: IntegerLayout, log: Log, encoder: weights.Encoder | None = None
    ) -> None:
        self._graph: Graph = model.graph
        self._plan = plan
        self._rules = rules
        self._log = log
        self._encode = encoder or weights.Encoder()
        self._name = Namer(model.graph)
        self._outputs = {id(tensor) for tensor in model.graph.outputs}
        self._weights: dict[tuple[int, int], tuple[Tensor, weights.Encoded]] = {}
        self._new: list[Node] = []
        self._replaced: set[int] = set()
        self._means: Mapping[int, Array] = {}
        self._known: Mapping[int, KnownGrid] = {}
        self._tops: dict[int, int] = {}
        self._limits: list[Constant] = []
        self.tightened: dict[str, int] = {}
        self.corrected = 0

    def apply(
        self,
        ranges: Mapping[int, Range],
        per_channel: bool,
        means: Mapping[int, Array] | None = None,
        known: Mapping[int, KnownGrid] | None = None,
        stored: Collection[str] = (),
        *,
        activations_only: bool = False,
    ) -> None:
        """Insert all pairs.

        Args:
            ranges: of each tensor of the plan, by id; tensors that share a scale have equal ones.
            per_channel: one weight scale per output channel.
            means: of each channel of the data of a weighted node, by the id of the node; corrects its bias.
            known: scale and zero point of tensors that have them already, by id.
            stored: names of constants that will be dequantized ones.
            activations_only: leave weights, and the Relu and Clip that ranges imply, as they are.
        """
        self._means = means or {}
        self._known = known or {}
        scales = self._scales(ranges)
        if not activations_only:
            self._fold_clamps(scales)
        dequantized = {key: self._pair(tensor, scales[key]) for key, tensor in self._plan.tensors.items()}
        self._tops = {
            id(result): self._known[key].top for key, result in dequantized.items() if key in self._known
        }
        for node in (*self._plan.linear, *self._plan.followers):
            self._rewire(node, dequantized)
        for node in () if activations_only else self._plan.linear:
            self._quantize_weight(node, per_channel)
        for node in () if activations_only else self._plan.stored:
            self._store_weight(node, per_channel)
        self._shield_outputs()
        self._graph.nodes.extend(self._new)
        self._shield_floats(stored)
        self._drop_replaced()
        ir.sort(self._graph)

    def _drop_replaced(self) -> None:
        """Take out of the model what only nodes that now read integers used to read."""
        kept = self._graph.initializers
        for name in [name for name, constant in kept.items() if id(constant) in self._replaced]:
            if not kept[name].outputs and id(kept[name]) not in self._outputs:
                del kept[name]

    # Activations

    def _scales(self, ranges: Mapping[int, Range]) -> dict[int, Scale]:
        made: dict[tuple[object, ...], Scale] = {}
        found: dict[int, Scale] = {}
        kind, (low, high) = self._rules.activation, self._rules.codes
        for key, tensor in self._plan.tensors.items():
            known = self._known.get(key)
            group = (*(id(source) for source in self._plan.scales[key]), known)
            if group not in made:
                scale, zero = (
                    known[:2]
                    if known
                    else affine_parameters(ranges[key], qmin=low, qmax=high, symmetric=self._rules.symmetric)
                )
                made[group] = Scale(
                    Constant(self._name(f"{tensor.name}_scale"), np.asarray(scale, np.float32)),
                    Constant(self._name(f"{tensor.name}_zero_point"), np.asarray(zero, kind)),
                )
            found[key] = made[group]
        return found

    def _pair(self, tensor: Tensor, scale: Scale) -> Variable:
        """Put Q and DQ behind a tensor; returns what integer operators read."""
        if isinstance(tensor, Constant):
            return self._dequantize(self._encode_constant(tensor, scale), scale, tensor)
        # Any reader of the float result would keep the integer kernel from being used: all read the pair.
        fused = self._fused(tensor)
        source = self._rename(tensor) if id(tensor) in self._outputs and fused else tensor
        quantized = Variable(self._name(f"{tensor.name}_quantized"), self._rules.activation, tensor.shape)
        inputs: list[Tensor] = [source, scale.scale, scale.zero_point]
        self._add("QuantizeLinear", f"{tensor.name}_QuantizeLinear", inputs, quantized)
        if source is not tensor:
            self._add(
                "DequantizeLinear",
                f"{tensor.name}_DequantizeLinear",
                [quantized, scale.scale, scale.zero_point],
                tensor,
            )
            return tensor
        if self._rules.bits is not None:
            quantized = self._clip(quantized)
        result = self._dequantize(quantized, scale, tensor)
        if fused:
            self._redirect(tensor, result)
        return result

    def _clip(self, codes: Variable) -> Variable:
        """The same without the codes that fewer bits do not have."""
        self._limits = self._limits or [
            Constant(self._name(f"{which}_code"), np.asarray(code, self._rules.activation))
            for which, code in zip(("least", "most"), self._rules.codes, strict=True)
        ]
        result = Variable(self._name(f"{codes.name}_clipped"), codes.dtype, codes.shape)
        self._add("Clip", f"{codes.name}_Clip", [codes, *self._limits], result)
        return result

    def _shield_outputs(self) -> None:
        """Keep outputs apart from what is moved and then quantized behind them.

        ONNX Runtime moves a Q to the front of operators that move data, and does not mind if what it then
        rounds and clips is an output of the model. It leaves tensors with a second reader alone.
        """
        for tensor in self._plan.tensors.values():
            maker = ir.producer(tensor)
            while maker is not None and is_movable(maker):
                source = maker.inputs[0]
                maker = ir.producer(source)
                if maker is not None and id(source) in self._outputs:
                    inner = self._rename(source)  # type: ignore[arg-type]
                    ir.replace_uses(source, inner)
                    self._add("Identity", f"{source.name}_Identity", [inner], source)  # type: ignore[arg-type]

    def _shield_floats(self, stored: Collection[str]) -> None:
        """Keep ONNX Runtime from quantizing the weights of nodes that are to stay in floating point.

        And biases of those that simulate fewer bits, which would be in steps of both scales.
        It does so, with one scale for all of a weight, between a DQ with a single scale and a Q. A DQ with
        the same scale for every channel computes the same and is left alone.
        """
        start, gone = len(self._new), set[int]()
        for node in self._graph.nodes:
            layer, maker = view_of(node), ir.producer(node.inputs[0]) if node.inputs else None
            at = 1 if self._rules.bits is None else 2
            if layer is None or not (layer.rank or at > 1) or not isinstance(node.input(at), Constant):
                continue
            if maker is None or not has(maker, Trait.DEQUANTIZES) or not _reaches_q(node):
                continue
            if node.inputs[1].name in stored:
                continue
            axis, channels = (layer.rank or 0) + layer.data_axis, layer.groups * layer.inputs
            codes, scale, zero_point = maker.inputs[0], maker.input(1), maker.input(2)
            if isinstance(scale, Constant) and isinstance(zero_point, Constant) and scale.values.ndim == 0:
                node.inputs[0] = self._spread(codes, scale, zero_point, channels, axis)
                if not maker.outputs[0].outputs:
                    ir.detach(maker)
                    gone.add(id(maker))
        self._graph.nodes.extend(self._new[start:])
        ir.sweep(self._graph, gone)

    def _spread(
        self, codes: Tensor, scale: Constant, zero_point: Constant, channels: int, axis: int
    ) -> Tensor:
        """A tensor dequantized with one scale given once per channel."""
        result = Variable(self._name(f"{codes.name}_float"), np.dtype(np.float32), codes.shape)
        inputs: list[Tensor] = [
            codes,
            Constant(self._name(f"{scale.name}_channels"), np.repeat(scale.values, channels)),
            Constant(self._name(f"{zero_point.name}_channels"), np.repeat(zero_point.values, channels)),
        ]
        self._add("DequantizeLinear", f"{result.name}_DequantizeLinear", inputs, result, {"axis": axis})
        return result

    def _fused(self, tensor: Variable) -> bool:
        """Whether the pair behind a tensor is part of the integer kernel that makes it."""
        if self._rules.bits is not None:
            return False
        maker = ir.producer(tensor)
        while maker is not None and spec_of(maker).role is Role.CLAMP:
            maker = ir.producer(maker.inputs[0])
        return maker is not None and id(maker) in self._plan.integer

    @staticmethod
    def _redirect(tensor: Variable, result: Variable) -> None:
        """Make all readers of a tensor but its Q read what comes back from the integers."""
        ir.replace_uses(tensor, result)
        pair = ir.producer(ir.producer(result).inputs[0])  # type: ignore[union-attr]
        assert pair is not None
        pair.inputs[0] = tensor

    def _rename(self, tensor: Variable) -> Variable:
        """Give the maker of a tensor a new output; the old name is made by the pair from now on."""
        maker = tensor.inputs[0]
        source = Variable(self._name(f"{tensor.name}_float"), tensor.dtype, tensor.shape)
        index = next(i for i, made in enumerate(maker.outputs) if made is tensor)
        maker.outputs[index] = source
        return source

    def _dequantize(self, quantized: Tensor, scale: Scale, like: Tensor) -> Variable:
        result = Variable(self._name(f"{like.name}_dequantized"), np.dtype(np.float32), like.shape)
        inputs: list[Tensor] = [quantized, scale.scale, scale.zero_point]
        self._add("DequantizeLinear", f"{like.name}_DequantizeLinear", inputs, result)
        return result

    def _encode_constant(self, tensor: Constant, scale: Scale) -> Constant:
        codes = np.rint(tensor.values / scale.scale.values) + scale.zero_point.values
        values = codes.clip(*self._rules.codes).astype(self._rules.activation)
        return Constant(self._name(f"{tensor.name}_quantized"), values)

    def _rewire(self, node: Node, dequantized: Mapping[int, Variable]) -> None:
        spec = spec_of(node)
        for index in spec.data_inputs(node)[: 1 if spec.role is Role.LINEAR else None]:
            if (replacement := dequantized.get(id(node.inputs[index]))) is not None:
                self._replaced.add(id(node.inputs[index]))
                node.inputs[index] = replacement
        bits = self._rules.bits
        how = "runs in integers" if bits is None else f"reads data of {bits} bits"
        self._log.change(self._plan.labels[id(node)], f"{node.op} {how}")
        if lower := _LOWERED.get(node.op):
            lower(self, node)

    def _lower_hard_sigmoid(self, node: Node) -> None:
        """max(0, min(1, alpha·x + beta)) as one integer Add.

        Reading the codes of x with alpha times their scale multiplies by alpha for free, and the range of the
        result, which lies in [0, 1], does the clipping.
        """
        pair = ir.producer(node.inputs[0])
        assert pair is not None
        codes, scale, zero_point = pair.inputs
        assert isinstance(scale, Constant)
        alpha, beta = np.float32(node.attrs.get("alpha", 0.2)), node.attrs.get("beta", 0.5)
        scaled = Scale(
            Constant(self._name(f"{node.outputs[0].name}_alpha_scale"), scale.values * alpha),
            zero_point,  # type: ignore[arg-type]
        )
        left = self._dequantize(codes, scaled, node.outputs[0])
        info = np.iinfo(self._rules.activation)
        step = np.float32(beta / info.max)
        right = self._dequantized(
            Variable(f"{node.outputs[0].name}_beta"), np.array(info.max, info.dtype), np.array(step), None, 0
        )
        node.op, node.attrs = "Add", {}
        node.inputs = [left, right]

    def _fold_clamps(self, scales: Mapping[int, Scale]) -> None:
        """Drop each Relu and Clip that the range of the integers behind it implies."""
        gone: set[int] = set()
        for key, tensor in self._plan.tensors.items():
            clamp = ir.producer(tensor)
            while isinstance(tensor, Variable) and clamp is not None and self._implied(clamp, scales[key]):
                source = clamp.inputs[0]
                maker = source.inputs[0]
                self._log.change(clamp.label, f"{clamp.op} is implied by the integer range")
                ir.detach(clamp)
                gone.add(id(clamp))
                maker.outputs[next(i for i, made in enumerate(maker.outputs) if made is source)] = tensor
                clamp = maker
        ir.sweep(self._graph, gone)

    def _implied(self, clamp: Node, scale: Scale) -> bool:
        if spec_of(clamp).role is not Role.CLAMP or not clamp.inputs[0].inputs:
            return False
        source = clamp.inputs[0]
        if len(source.outputs) != 1 or id(source) in self._outputs or not self._rules.fuses_relu:
            return False
        maker = source.inputs[0]
        if id(maker) not in self._plan.integer and spec_of(maker).role is not Role.CLAMP:
            return False
        limits = spec_of(clamp).limits
        found = limits(clamp) if limits else None
        return found is not None and scale.covers(*found)

    # Weights

    def _quantize_weight(self, node: Node, per_channel: bool) -> None:
        weight, bias = node.inputs[1], node.constant(2)
        assert isinstance(weight, Constant)
        activation = self._activation_scale(node)
        least = None
        if bias is not None and self._rules.integer_bias:
            least = weights.least_scales(bias.reshape(-1), activation)
        self._replaced.update(id(tensor) for tensor in node.inputs[1:])
        node.inputs[1], encoded = self._encoded_weight(node, per_channel, least)
        if bias is None:
            return
        corrected = self._corrected_bias(node, weight, encoded, bias)
        if self._rules.integer_bias:
            node.inputs[2] = self._encoded_bias(node.inputs[2], corrected, encoded.scales, activation)
        elif corrected is not bias:
            node.inputs[2] = Constant(self._name(f"{node.inputs[2].name}_corrected"), corrected)

    def _corrected_bias(self, node: Node, weight: Constant, encoded: weights.Encoded, bias: Array) -> Array:
        """The bias that gives every output channel the mean it had before its weights were rounded."""
        means, layer = self._means.get(id(node)), view_of(node)
        assert layer is not None
        if means is None:
            return bias
        lost = encoded.lost
        if lost is None:
            lost = weights.lost_mean(weight.values, encoded, layer.weight_axis, means)
        if lost is None or lost.size != bias.size:
            return bias
        self.corrected += 1
        return (bias + lost.reshape(bias.shape)).astype(bias.dtype)

    def _store_weight(self, node: Node, per_channel: bool) -> None:
        """Keep a node in floating point but its weight, the bulk of a small network, in integers."""
        weight, layer = node.inputs[1], view_of(node)
        assert isinstance(weight, Constant)
        assert layer is not None
        axis = layer.weight_axis
        self._replaced.add(id(weight))
        encoded = self._encode(weight, axis, per_channel=per_channel, limit=self._limit(node))
        node.inputs[1] = self._dequantized(weight, encoded.codes, encoded.scales, 0, axis)
        self._log.change(self._plan.labels[id(node)], f"{node.op} stores its weight as int8")

    def _activation_scale(self, node: Node) -> np.float32:
        pair = ir.producer(node.inputs[0])
        assert pair is not None
        scale = pair.inputs[1]
        assert isinstance(scale, Constant)
        value: np.float32 = np.float32(scale.values.item())
        return value

    def _encoded_weight(
        self, node: Node, per_channel: bool, least: weights.Scales | None
    ) -> tuple[Tensor, weights.Encoded]:
        """The dequantized weight of a node and its integers; shared by all nodes that read one weight."""
        layer, weight = view_of(node), node.inputs[1]
        assert layer is not None
        assert isinstance(weight, Constant)
        axis = layer.weight_axis
        known = self._weights.get((id(weight), axis))
        if known is not None and (least is None or bool((known[1].scales >= least).all())):
            return known
        pair_axis = pair_axis_of(node, self._rules)
        limit = self._limit(node)
        encoded = self._encode(
            weight, axis, per_channel=per_channel, pair_axis=pair_axis, least=least, limit=limit
        )
        if encoded.tightened:
            self.tightened[self._plan.labels[id(node)]] = encoded.tightened
        result = self._dequantized(weight, *self._unsaturated(node, encoded, axis, pair_axis), axis)
        if limit <= weights.FOUR_BITS:
            self._pack(result, limit)
        self._weights[id(weight), axis] = result, encoded
        return result, encoded

    def _limit(self, node: Node) -> int:
        """Largest magnitude of a code of its weight."""
        return self._plan.limits.get(id(node), weights.QMAX)

    def _unsaturated(
        self, node: Node, encoded: weights.Encoded, axis: int, pair_axis: int | None
    ) -> tuple[Array, Array, int]:
        """Codes, scales and zero point of a weight. Codes that must stay as they are may saturate as int8;
        kernels for uint8 widen first.
        """
        top = self._tops.get(id(node.inputs[0]), 255)
        if pair_axis is None or not weights.saturates(encoded.codes, axis, pair_axis, top):
            return encoded.codes, encoded.scales, 0
        self._log.change(self._plan.labels[id(node)], "weight stored as uint8", "its codes could saturate")
        return (encoded.codes.astype(np.int16) + 128).astype(np.uint8), encoded.scales, 128

    def _encoded_bias(
        self, tensor: Tensor, bias: Array, steps: weights.Scales, activation: np.float32
    ) -> Variable:
        codes, sizes = weights.encode_bias(bias.reshape(-1), steps, activation)
        return self._dequantized(tensor, codes, sizes, None, 0)

    def _dequantized(
        self, like: Tensor, codes: Array, scales: Array, zero: int | None, axis: int
    ) -> Variable:
        """Stored integers and the DQ that turns them back.

        Without a zero point DQ assumes zero; of weights ONNX Runtime asks for it all the same.
        """
        result = Variable(self._name(f"{like.name}_dequantized"), np.dtype(np.float32), codes.shape)
        inputs: list[Tensor] = [
            Constant(self._name(f"{like.name}_quantized"), codes),
            Constant(self._name(f"{like.name}_scale"), scales),
        ]
        if zero is not None:
            zeros = np.full(scales.shape, zero, codes.dtype)
            inputs.append(Constant(self._name(f"{like.name}_zero_point"), zeros))
        attrs = {"axis": axis} if scales.ndim else {}
        self._add("DequantizeLinear", f"{like.name}_DequantizeLinear", inputs, result, attrs)
        return result

    def _pack(self, weight: Variable, limit: int) -> None:
        """Keep the codes behind a weight in four bits or two; kernels get int8, made once on loading."""
        pair = self._new[-1]
        assert pair.outputs[0] is weight
        codes = pair.inputs[0]
        assert isinstance(codes, Constant)
        kind = ml_dtypes.int2 if limit == weights.LIMITS["int2"] else ml_dtypes.int4
        packed = Constant(self._name(f"{codes.name}_packed"), codes.values.astype(kind))
        unpacked = Variable(codes.name, np.dtype(np.int8), codes.shape)
        self._add("Cast", f"{codes.name}_Cast", [packed], unpacked, {"to": 3})
        pair.inputs[0] = unpacked

    def _add(
        self,
        op: str,
        name: str,
        inputs: list[Tensor],
        output: Variable,
        attrs: Mapping[str, int] | None = None,
    ) -> None:
        self._new.append(Node(op, self._name(name), attrs, inputs, [output]))


def _reaches_q(node: Node) -> bool:
    """Whether the result of a node has one reader, a Q, behind nothing but Relu and Clip."""
    readers = node.outputs[0].outputs
    while len(readers) == 1 and spec_of(readers[0]).role is Role.CLAMP:
        readers = readers[0].outputs[0].outputs
    return len(readers) == 1 and has(readers[0], Trait.QUANTIZES)


# Operators that run in integers as another operator.
_LOWERED = {"HardSigmoid": Inserter._lower_hard_sigmoid}
MATCHES = frozenset(_LOWERED)
