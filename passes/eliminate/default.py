"""What a node is told and would assume anyway."""

from __future__ import annotations

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ir.model import constant_of
from onnxslim.passes import predicates


class ZeroState(Rule[tuple[Node, tuple[int, ...]]]):
    """An RNN, GRU or LSTM starts from zeros if nobody says otherwise."""

    name = "zero-state"
    ops = frozenset(("RNN", "GRU", "LSTM"))

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, tuple[int, ...]] | None:
        states = (5, 6) if node.op == "LSTM" else (5,)
        told = [index for index in states if (tensor := node.input(index)) and _is_zero(tensor)]
        return (node, tuple(told)) if told else None

    def check(self, match: tuple[Node, tuple[int, ...]], edit: Editor) -> str | None:
        return None

    def rewrite(self, match: tuple[Node, tuple[int, ...]], edit: Editor) -> str:
        node, told = match
        inputs = [ir.empty() if index in told else tensor for index, tensor in enumerate(node.inputs)]
        while not inputs[-1].name:
            inputs.pop()
        edit.replace_node(node, node.op, inputs, node.attrs)
        return "left out an initial state of zeros"


def _is_zero(tensor: Tensor) -> bool:
    """Whether all elements are known to be +0, from a constant or copies of elements of one."""
    source = predicates.origin(tensor)
    values = constant_of(source)
    values = predicates.filling(source) if values is None else values
    return values is not None and _all_zero(values)


def _all_zero(values: Array) -> bool:
    return values.dtype in predicates.FLOATS and not values.any() and not np.signbit(values).any()


RULES = (ZeroState(),)
