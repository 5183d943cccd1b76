"""Transposes around operators that look at each element by itself, as exporters of NHWC models leave them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ir.model import constant_of
from onnxslim.ops import Trait, has, spec_of
from onnxslim.passes import predicates
from onnxslim.passes.eliminate.movement import Order, order

# Operators between two transposes.
MAX_LENGTH = 16


@dataclass(frozen=True)
class Crossing:
    """An operator between the transposes, and which of its inputs is the data."""

    node: Node
    data: int


@dataclass(frozen=True)
class Around:
    """Transpose(f(Transpose(x))).

    Attributes:
        outer, inner: the transposes.
        steps: f, from x on.
        back: the order of the outer one.
    """

    outer: Node
    inner: Node
    steps: tuple[Crossing, ...]
    back: Order


class TransposeAround(Rule[Around]):
    """Transpose(f(Transpose(x, p)), q) = f(x) where q undoes p, f works element by element.

    Constants in f are transposed instead.
    """

    name = "transpose-around"
    ops = frozenset(("Transpose",))
    since = 7  # before, binary operators do not broadcast by themselves

    def pattern(self, node: Node, edit: Editor) -> Around | None:
        steps: list[Crossing] = []
        tensor = node.inputs[0]
        reader = node
        while len(steps) < MAX_LENGTH and edit.sole_consumer(tensor) is reader:
            step = _step(tensor, edit)
            if step is None:
                break
            steps.append(step)
            reader, tensor = step.node, step.node.inputs[step.data]
        inner = predicates.made_by(tensor, "Transpose")
        back = order(node, edit) if inner is not None and steps else None
        first = order(inner, edit) if inner is not None and back is not None else None
        if inner is None or back is None or first is None or len(first) != len(back):
            return None
        undone = all(first[axis] == place for place, axis in enumerate(back))
        return Around(node, inner, tuple(reversed(steps)), back) if undone else None

    def check(self, match: Around, edit: Editor) -> str | None:
        for step in match.steps:
            for index, tensor in _others(step):
                values = constant_of(tensor)
                if values is None or values.ndim > len(match.back):
                    return f"input {index} of {step.node.label} is computed, or has more axes"
                shared = edit.sole_consumer(tensor) is not step.node
                if values.size > 1 and shared and values.nbytes > predicates.MAX_COPY_BYTES:
                    return f"a constant of {step.node.label} is read elsewhere"
                if values.size > 1 and spec_of(step.node).is_unary:
                    return f"input {index} of {step.node.label} is no number"
        return None

    def rewrite(self, match: Around, edit: Editor) -> str:
        # New tensors: those between the transposes have another shape from now on.
        current: Tensor = match.inner.inputs[0]
        for step in match.steps:
            node = step.node
            inputs = [self._moved(tensor, match.back, edit) for tensor in node.inputs]
            inputs[step.data] = current
            if step is match.steps[-1]:
                edit.replace_node(match.outer, node.op, inputs, node.attrs)
            else:
                made = edit.variable(node.outputs[0].name, like=node.outputs[0])
                edit.add(match.outer, node.op, inputs, [made], node.attrs, name=node.name)
                current = made
        return f"cancelled {match.inner.label} around {', '.join(step.node.op for step in match.steps)}"

    def _moved(self, tensor: Tensor, back: Order, edit: Editor) -> Tensor:
        values = constant_of(tensor)
        if values is None or values.size <= 1:
            return tensor
        return edit.constant(tensor.name, _transposed(values, back))


def _transposed(values: Array, back: Order) -> Array:
    wide = values.reshape((1,) * (len(back) - values.ndim) + values.shape)
    return np.ascontiguousarray(wide.transpose(back))


def _step(tensor: Tensor, edit: Editor) -> Crossing | None:
    node = ir.producer(tensor)
    if node is None or not edit.is_standard(node) or not has(node, Trait.ELEMENTWISE):
        return None
    if spec_of(node).is_unary:
        return Crossing(node, 0)
    varying = [index for index, each in enumerate(node.inputs) if constant_of(each) is None]
    return Crossing(node, varying[0]) if len(node.inputs) == 2 and len(varying) == 1 else None


def _others(step: Crossing) -> list[tuple[int, Tensor]]:
    return [(at, each) for at, each in enumerate(step.node.inputs) if at != step.data and each.name]


RULES = (TransposeAround(),)
