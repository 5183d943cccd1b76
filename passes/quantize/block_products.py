"""Matrix products that read weights of few bits in ONNX Runtime's own form: MatMulNBits.

It is what ONNX Runtime makes of a DequantizeLinear by blocks and a MatMul when it loads a file. The codes are
the same, in another order, so that going from one to the other loses nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Namer, Node, Tensor
from onnxslim.ir.model import Model, constant_of
from onnxslim.ops import Role, spec_of, view_of
from onnxslim.ops.blocks import ACCURACY, packed
from onnxslim.ops.contrib import DOMAIN
from onnxslim.ops.layers import Product
from onnxslim.passes.quantize.blocks import Blocks

MAKES = ("MatMulNBits",)


def is_product(node: Node) -> bool:
    """Whether a node is a matrix product in this form."""
    return node.op in MAKES and node.domain == DOMAIN


def clamped(model: Model) -> Iterator[Node]:
    """Products that ONNX Runtime runs in floating point behind a DequantizeLinear, which it runs each time.

    It leaves them alone for the Relu or Clip that alone reads them: this may disappear in the range of a Q.
    """
    outputs = {id(tensor) for tensor in model.graph.outputs}
    for node in model.graph.nodes:
        if not isinstance(view_of(node), Product) or constant_of(node.inputs[1]) is None:
            continue
        result = node.outputs[0]
        if len(result.outputs) == 1 and spec_of(result.outputs[0]).role is Role.CLAMP:
            behind = result.outputs[0].outputs[0]
            if not {id(result), id(behind)} & outputs:
                yield node


def unfit(node: Node) -> str | None:
    """Why a matrix product by a constant cannot have a scale for each block of its weight."""
    if len(node.inputs[1].shape or ()) != 2:
        return "its weight is no matrix"
    return None


def unwritable(node: Node) -> str | None:
    """Why it cannot be written as MatMulNBits."""
    layer, bias = view_of(node), node.input(2)
    assert layer is not None
    if node.attrs.get("transA", 0):
        return "its data is transposed"
    if layer.scale != 1.0:
        return "its alpha is not 1"
    if bias is None:
        return None
    if layer.bias_scale != 1.0:
        return "its beta is not 1"
    values = node.constant(2)
    if values is None:
        return "its bias is computed, not stored"
    return None if values.size in (values.shape[-1:] or (1,)) else "its bias is not the same for all rows"


class BlockProducts:
    """Rewrites matrix products of one model.

    Args:
        model: edited in place.
        log: what is done goes here.
    """

    def __init__(self, model: Model, log: Log) -> None:
        self._model = model
        self._log = log
        self._name = Namer(model.graph)
        self._outputs = {id(tensor) for tensor in model.graph.outputs}
        self._there: defaultdict[tuple[Any, ...], list[Constant]] = defaultdict(list)
        for constant in model.constants():
            self._there[constant.dtype, constant.shape].append(constant)

    def write(self, node: Node, blocks: Blocks) -> None:
        """Have a node, which is not `unwritable`, read these integers of its weight."""
        weight, bias = node.inputs[1], node.constant(2)
        assert isinstance(weight, Constant)
        blocking, (rows, columns) = blocks.blocking, blocks.codes.shape
        count = math.ceil(rows / blocking.size)
        inputs: list[Tensor] = [
            node.inputs[0],
            self._constant(weight, f"int{blocking.bits}", _codes(blocks).reshape(columns, count, -1)),
            self._constant(weight, "scale", np.ascontiguousarray(blocks.scales.T)),
        ]
        if blocks.zeros is not None:
            zeros = packed(_unsigned(blocks.zeros.T, blocking.low), blocking.bits)
            inputs.append(self._constant(weight, "zero_point", zeros))
        if bias is not None:
            told = self._constant(node.inputs[2], "row", np.broadcast_to(bias.reshape(-1), (columns,)).copy())
            inputs.extend([ir.empty()] * (5 - len(inputs)))
            inputs.append(told)
        was = node.op
        node.op = "MatMulNBits"
        node.domain, node.inputs = DOMAIN, inputs
        node.attrs = {
            "K": rows,
            "N": columns,
            "bits": blocking.bits,
            "block_size": blocking.size,
            "accuracy_level": ACCURACY,
        }
        self._model.opsets.setdefault(DOMAIN, 1)
        self._drop(weight)
        self._log.change(node.label, f"{was} reads its weight as int{blocking.bits}")

    def _constant(self, like: Tensor, what: str, values: Array) -> Constant:
        """A new constant, or one that holds the same: lookups may have kept it."""
        there = self._there[values.dtype, values.shape]
        found = next((each for each in there if np.array_equal(each.values, values)), None)
        return found or Constant(self._name(f"{like.name}_{what}"), values)

    def _drop(self, weight: Constant) -> None:
        if not weight.outputs and id(weight) not in self._outputs:
            self._model.graph.initializers.pop(weight.name, None)


def _codes(blocks: Blocks) -> Array:
    """Bytes of each output's codes, the last block filled up."""
    blocking = blocks.blocking
    filling = -len(blocks.codes) % blocking.size
    whole = np.pad(blocks.codes.T, ((0, 0), (0, filling)))
    return packed(_unsigned(whole, blocking.low), blocking.bits)


def _unsigned(codes: Array, low: int) -> Array:
    """Codes counted from the lowest one, uint8."""
    return np.asarray((codes.astype(np.int16) - low).astype(np.uint8))
