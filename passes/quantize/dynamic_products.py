"""Matrix products in integers whose data becomes integers while the model runs: no ranges, no calibration.

In standard operators, in the form that ONNX Runtime fuses to DynamicQuantizeMatMul, or to
MatMulIntegerToFloat where several products read the same data.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.ops import view_of
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.quantize.weights import Encoder

MATCHES = ("Gemm",)
MAKES = ("Add", "Cast", "DynamicQuantizeLinear", "MatMulInteger", "Mul")

FLOAT = 1


def unfit(node: Node) -> str | None:
    """Why a matrix product by a constant cannot be written this way."""
    if len(node.inputs[1].shape or ()) != 2:
        return "its weight is no matrix"
    if node.op == "Gemm":
        bias = node.input(2)
        if node.attrs.get("transA", 0):
            return "its data is transposed"
        if bias is not None and node.attrs.get("beta", 1.0) != 1.0:
            return "its beta is not 1"
    return None


class DynamicProducts:
    """Rewrites matrix products of one model.

    Args:
        model: edited in place.
        rules: of the target.
        encoder: rounds the weights.
        per_channel: one scale per output channel.
        log: what is done goes here.
    """

    def __init__(
        self, model: Model, rules: IntegerLayout, encoder: Encoder, per_channel: bool, log: Log
    ) -> None:
        self._graph = model.graph
        self._rules = rules
        self._encode = encoder
        self._per_channel = per_channel
        self._log = log
        self._name = Namer(model.graph)
        self._data: dict[int, tuple[Variable, Variable, Variable]] = {}
        self._weights: dict[tuple[int, int, float], tuple[Constant, Constant]] = {}
        self._new: list[Node] = []
        self.tightened: dict[str, int] = {}

    def apply(self, nodes: Iterable[Node]) -> None:
        """Rewrite these nodes, all of them MatMul or Gemm by a constant and fit for it."""
        for node in nodes:
            self._rewrite(node)
        self._graph.nodes.extend(self._new)
        ir.sort(self._graph)

    def _rewrite(self, node: Node) -> None:
        label, op, result = node.label, node.op, node.outputs[0]
        data, weight, bias = node.inputs[0], node.inputs[1], node.input(2)
        assert isinstance(weight, Constant)
        codes, scale, zero_point = self._quantized(data)
        matrix, scales = self._matrix(node, weight)
        node.op, node.attrs = "MatMulInteger", {}
        node.inputs = [codes, matrix, zero_point]
        sums = Variable(self._name(f"{result.name}_sums"), np.dtype(np.int32), result.shape)
        node.outputs = [sums]
        real = self._add("Cast", f"{label}_Cast", [sums], self._like(result, "unscaled"), to=FLOAT)
        both = self._add("Mul", f"{label}_scales", [scale, scales], self._like(scales, "both"))
        product = self._like(result, "product") if bias is not None else result
        self._add("Mul", f"{label}_Mul", [real, both], product)
        if bias is not None:
            self._add("Add", f"{label}_Add", [product, bias], result)
        if not weight.outputs:
            self._graph.initializers.pop(weight.name, None)
        self._log.change(label, f"{op} turns its data into integers as they come")

    def _matrix(self, node: Node, weight: Constant) -> tuple[Constant, Constant]:
        """Integers of a weight, [inputs, outputs], and their scales, which take in a Gemm's alpha."""
        layer = view_of(node)
        assert layer is not None
        axis, alpha = layer.weight_axis, np.float32(layer.scale)
        key = id(weight), axis, float(alpha)
        if key in self._weights:
            return self._weights[key]
        pair_axis = 1 - axis if self._rules.saturates else None
        encoded = self._encode(weight, axis, per_channel=self._per_channel, pair_axis=pair_axis)
        if encoded.tightened:
            self.tightened[node.label] = encoded.tightened
        codes = encoded.codes if axis == 1 else np.ascontiguousarray(encoded.codes.T)
        self._weights[key] = (
            Constant(self._name(f"{weight.name}_quantized"), codes),
            Constant(self._name(f"{weight.name}_scale"), np.asarray(encoded.scales * alpha, np.float32)),
        )
        return self._weights[key]

    def _quantized(self, data: Tensor) -> tuple[Variable, Variable, Variable]:
        """Codes, scale and zero point of some data, computed once for all that read it."""
        if id(data) not in self._data:
            found = (
                Variable(self._name(f"{data.name}_quantized"), np.dtype(np.uint8), data.shape),
                Variable(self._name(f"{data.name}_scale"), np.dtype(np.float32), ()),
                Variable(self._name(f"{data.name}_zero_point"), np.dtype(np.uint8), ()),
            )
            name = self._name(f"{data.name}_DynamicQuantizeLinear")
            self._new.append(Node("DynamicQuantizeLinear", name, None, [data], list(found)))
            self._data[id(data)] = found
        return self._data[id(data)]

    def _like(self, tensor: Tensor, what: str) -> Variable:
        return Variable(self._name(f"{tensor.name}_{what}"), np.dtype(np.float32), tensor.shape)

    def _add(self, op: str, name: str, inputs: list[Tensor], output: Variable, **attrs: int) -> Variable:
        self._new.append(Node(op, self._name(name), attrs, inputs, [output]))
        return output
