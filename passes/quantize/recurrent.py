"""LSTMs whose data and state become integers as they come: ONNX Runtime's DynamicQuantizeLSTM.

The standard has no form for it. The state is turned into codes at every step, so that there are no ranges to
calibrate. There is no such kernel for GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.ir.graph import Array, Constant, Namer, Node, Tensor
from onnxslim.ir.graph import empty as left_out
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops.channels.recurrent import GATES
from onnxslim.ops.contrib import DOMAIN
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.quantize.weights import encode

MAKES = ("DynamicQuantizeLSTM",)

# Weights of data and of the state, by input.
WEIGHTS = (1, 2)
# With less weights than this many bytes, a step takes as long in floating point (64 hidden units are more).
MIN_BYTES = 1 << 16
# Why recurrent layers stay in floating point otherwise.
NO_RANGES = "its state has no ranges known beforehand: activations=dynamic turns it into integers as it comes"
_FIRST_SCALE = 8
_FLOAT = np.dtype(np.float32)


def is_recurrent(node: Node) -> bool:
    """Whether a node is a recurrent layer of the standard."""
    return node.op in GATES and node.domain in DEFAULT_DOMAINS


def unfit(node: Node, rules: IntegerLayout) -> str | None:
    """Why a recurrent layer cannot run in integers; None if it can."""
    if node.op not in rules.recurrent:
        return f"the target has no integer kernel for {node.op}"
    if node.attrs.get("layout", 0):
        return "its batch axis comes first"
    weights = [node.input(index) for index in WEIGHTS]
    constants = [each for each in weights if isinstance(each, Constant)]
    if len(constants) < len(weights):
        return "its weight is computed, not stored"
    if any(each.dtype != _FLOAT for each in constants) or node.inputs[0].dtype != _FLOAT:
        return "it is not in single precision"
    if not all(np.isfinite(each.values).all() for each in constants):
        return "its weight holds infinities or NaN"
    if any(len(each.outputs) > 1 for each in constants):
        return "other nodes read its weight too"
    if sum(each.nbytes for each in constants) < MIN_BYTES:
        return f"its weights take less than {MIN_BYTES} bytes, with which it is as fast in floating point"
    return None


class DynamicRecurrent:
    """Rewrites LSTMs of one model.

    Args:
        model: edited in place.
        rules: of the target.
        per_channel: one scale per gate of a hidden unit.
        log: what is done goes here.

    Attributes:
        tightened: how many channels were changed so that sums cannot saturate, by layer.
    """

    def __init__(self, model: Model, rules: IntegerLayout, per_channel: bool, log: Log) -> None:
        self._model = model
        self._rules = rules
        self._per_channel = per_channel
        self._log = log
        self._name = Namer(model.graph)
        self.tightened: dict[str, int] = {}

    def apply(self, nodes: Iterable[Node]) -> None:
        """Rewrite these nodes, all of them fit for it."""
        for node in nodes:
            self._rewrite(node)

    def _rewrite(self, node: Node) -> None:
        label, gone = node.label, [node.inputs[index] for index in WEIGHTS]
        coded = [self._coded(node, weight) for weight in gone if isinstance(weight, Constant)]
        reads: list[Tensor] = [*node.inputs, *(left_out() for _ in range(_FIRST_SCALE - len(node.inputs)))]
        for index, (codes, _, _) in zip(WEIGHTS, coded, strict=True):
            reads[index] = codes
        node.op, node.domain = "DynamicQuantizeLSTM", DOMAIN
        node.attrs = {name: value for name, value in node.attrs.items() if name != "layout"}
        node.inputs = [*reads, *(each for _, *steps in coded for each in steps)]
        for weight in gone:
            if not weight.outputs:
                self._model.graph.initializers.pop(weight.name, None)
        self._model.opsets.setdefault(DOMAIN, 1)
        self._log.change(label, "its data and state become integers as they come")

    def _coded(self, node: Node, weight: Constant) -> tuple[Constant, Constant, Constant]:
        """Codes, [directions, inputs, gates · units], scales and zero points of a weight with inputs last."""
        directions, channels, inputs = weight.shape
        parts = [self._encoded(node, each) for each in weight.values]
        codes = np.stack([part[0] for part in parts]).transpose(0, 2, 1)
        assert codes.shape == (directions, inputs, channels)
        scales = np.stack([part[1] for part in parts]).astype(np.float32)
        return (
            Constant(self._name(f"{weight.name}_quantized"), np.ascontiguousarray(codes)),
            Constant(self._name(f"{weight.name}_scale"), scales),
            Constant(self._name(f"{weight.name}_zero_point"), np.zeros(scales.shape, np.int8)),
        )

    def _encoded(self, node: Node, matrix: Array) -> tuple[Array, Array]:
        """Codes of the weights of one direction, [channels, inputs], and their scales."""
        pair_axis = 1 if self._rules.saturates else None
        encoded = encode(matrix, 0, per_channel=self._per_channel, pair_axis=pair_axis)
        if encoded.tightened:
            self.tightened[node.label] = self.tightened.get(node.label, 0) + encoded.tightened
        return encoded.codes, encoded.scales
