"""Weights that are stored in fewer bits than they are computed with: tables, matrices, kept convolutions."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.passes.quantize.blocks import Blocks
from onnxslim.passes.quantize.choices import Refusal
from onnxslim.passes.quantize.tables import SHOWN, table_of
from onnxslim.passes.quantize.weights import Weights

# Types of codes, by their bits.
_SIGNED = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}


class Storage:
    """Rewrites how weights of one model are stored.

    Args:
        model: edited in place; `finish` puts the new nodes in.
        log: what is done goes here.
    """

    matches = frozenset(("Gemm",))
    makes = frozenset(("Cast", "DequantizeLinear"))

    def __init__(self, model: Model, log: Log) -> None:
        self._graph = model.graph
        self._log = log
        self._name = Namer(model.graph)
        self._outputs = {id(tensor) for tensor in model.graph.outputs}
        self._new: list[Node] = []

    def tables(self, refuse: Refusal) -> None:
        """Embeddings: rows are looked up as int8 and those found are turned back, one scale per column."""
        for node in self._graph.nodes:
            table = table_of(node)
            if table is None or refuse(node) is not None:
                continue
            if id(table) in self._outputs:
                self._log.skip(node.label, SHOWN)
                continue
            label = node.label
            codes, scales = _by_column(table.values)
            node.inputs[0] = self._constant(table, "quantized", codes)
            self._drop(table)
            self._dequantize_result(node, table, scales)
            self._log.change(label, "looks up its table as int8")

    def halve(self, nodes: Iterable[Node]) -> None:
        """Weights that stay in floating point: float16 in the file, float32 again when it is loaded."""
        for node in nodes:
            weight = node.input(1)
            if not isinstance(weight, Constant) or not _halves_well(weight):
                continue
            half = self._constant(weight, "float16", weight.values.astype(np.float16))
            restored = Variable(self._name(f"{weight.name}_float32"), np.dtype(np.float32), weight.shape)
            self._add("Cast", restored.name, [half], restored, to=1)
            node.inputs[1] = restored
            self._drop(weight)
            self._log.change(node.label, "stores its weight as float16")

    def in_blocks(self, node: Node, blocks: Blocks) -> None:
        """A matrix product's weight as these integers, dequantized where it is read."""
        weight, blocking = node.inputs[1], blocks.blocking
        assert isinstance(weight, Constant)
        kind = _SIGNED[blocking.bits]
        if node.op == "Gemm":
            node.attrs["transB"] = 0
        inputs: list[Tensor] = [
            self._constant(weight, kind.name, blocks.codes.astype(kind)),
            self._constant(weight, "scale", blocks.scales),
        ]
        if blocks.zeros is not None:
            inputs.append(self._constant(weight, "zero_point", blocks.zeros.astype(kind)))
        shape = blocks.codes.shape
        restored = Variable(self._name(f"{weight.name}_dequantized"), np.dtype(np.float32), shape)
        self._add("DequantizeLinear", restored.name, inputs, restored, axis=0, block_size=blocking.size)
        node.inputs[1] = restored
        self._drop(weight)
        self._log.change(node.label, f"{node.op} stores its weight as {kind.name}")

    def finish(self) -> None:
        """Put the new nodes into the graph."""
        if self._new:
            self._graph.nodes.extend(self._new)
            ir.sort(self._graph)

    def _dequantize_result(self, node: Node, table: Constant, scales: Array) -> None:
        result = node.outputs[0]
        found = Variable(self._name(f"{result.name}_quantized"), np.dtype(np.int8), result.shape)
        node.outputs[0] = found
        inputs: list[Tensor] = [found, self._constant(table, "scale", scales)]
        self._add("DequantizeLinear", f"{result.name}_DequantizeLinear", inputs, result, axis=-1)

    def _constant(self, like: Constant, what: str, values: Array) -> Constant:
        return Constant(self._name(f"{like.name}_{what}"), values)

    def _drop(self, weight: Constant) -> None:
        if not weight.outputs and id(weight) not in self._outputs:
            self._graph.initializers.pop(weight.name, None)

    def _add(self, op: str, name: str, inputs: list[Tensor], output: Variable, **attrs: int) -> None:
        self._new.append(Node(op, self._name(name), attrs, inputs, [output]))


def _by_column(table: Weights) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    largest = np.abs(table).max(axis=0)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    return np.rint(table / scales).astype(np.int8), scales


def _halves_well(weight: Constant) -> bool:
    """Whether float16 holds a weight to a thousandth of its largest value, and saving it is worth a node."""
    if weight.dtype != np.float32 or weight.nbytes < 4096 or len(weight.outputs) != 1:
        return False
    largest = float(np.abs(weight.values).max(initial=0.0))
    return 1e-4 < largest < 6e4
