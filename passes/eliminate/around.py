"""Operators that undo each other, around others that look at each element by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ir.model import constant_of
from onnxslim.ops import Trait, has, spec_of
from onnxslim.passes import predicates
from onnxslim.passes.eliminate.movement import order

# Operators between the two.
MAX_LENGTH = 16


@dataclass(frozen=True)
class Crossing:
    """An operator between the two, and which of its inputs is the data."""

    node: Node
    data: int


@dataclass(frozen=True)
class Undone:
    """What two operators that undo each other do to a constant between them.

    Attributes:
        rank: axes of the tensors between.
        moved: a constant of so many axes, as what the first operator reads is laid out.
    """

    rank: int
    moved: Callable[[Array], Array]


@dataclass(frozen=True)
class Around:
    """Q(f(P(x))), where Q undoes P.

    Attributes:
        outer, inner: Q and P.
        steps: f, from x on.
        undone: what that means for constants.
    """

    outer: Node
    inner: Node
    steps: tuple[Crossing, ...]
    undone: Undone


class Cancelled(Rule[Around]):
    """A rule that drops two operators around others which work element by element.

    Attributes:
        first: the operator before them, which the one it is asked about undoes.
    """

    first: ClassVar[str]
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
        inner = predicates.made_by(tensor, self.first)
        undone = self.undone(node, inner, edit) if inner is not None and steps else None
        if inner is None or undone is None:
            return None
        return Around(node, inner, tuple(reversed(steps)), undone)

    @abstractmethod
    def undone(self, outer: Node, inner: Node, edit: Editor) -> Undone | None:
        """What is to become of constants; None if the one does not undo the other, or may not."""

    def check(self, match: Around, edit: Editor) -> str | None:
        for step in match.steps:
            for index, tensor in _others(step):
                values = constant_of(tensor)
                if values is None or values.ndim > match.undone.rank:
                    return f"input {index} of {step.node.label} is computed, or has more axes"
                shared = edit.sole_consumer(tensor) is not step.node
                if values.size > 1 and shared and values.nbytes > predicates.MAX_COPY_BYTES:
                    return f"a constant of {step.node.label} is read elsewhere"
                if values.size > 1 and spec_of(step.node).is_unary:
                    return f"input {index} of {step.node.label} is no number"
        return None

    def rewrite(self, match: Around, edit: Editor) -> str:
        # New tensors: those between the two have another shape from now on.
        current: Tensor = match.inner.inputs[0]
        for step in match.steps:
            node = step.node
            inputs = [self._moved(tensor, match.undone, edit) for tensor in node.inputs]
            inputs[step.data] = current
            if step is match.steps[-1]:
                edit.replace_node(match.outer, node.op, inputs, node.attrs)
            else:
                made = edit.variable(node.outputs[0].name, like=node.outputs[0])
                edit.add(match.outer, node.op, inputs, [made], node.attrs, name=node.name)
                current = made
        return f"cancelled {match.inner.label} around {', '.join(step.node.op for step in match.steps)}"

    def _moved(self, tensor: Tensor, undone: Undone, edit: Editor) -> Tensor:
        values = constant_of(tensor)
        if values is None or values.size <= 1:
            return tensor
        wide = values.reshape((1,) * (undone.rank - values.ndim) + values.shape)
        return edit.constant(tensor.name, np.ascontiguousarray(undone.moved(wide)))


class TransposeAround(Cancelled):
    """Transpose(f(Transpose(x, p)), q) = f(x) where q undoes p, f works element by element.

    Constants in f are transposed instead.
    """

    name = "transpose-around"
    ops = frozenset(("Transpose",))
    first = "Transpose"

    def undone(self, outer: Node, inner: Node, edit: Editor) -> Undone | None:
        back = order(outer, edit)
        there = order(inner, edit) if back is not None else None
        if back is None or there is None or len(there) != len(back):
            return None
        undone = all(there[axis] == place for place, axis in enumerate(back))
        return Undone(len(back), lambda wide: wide.transpose(back)) if undone else None


class AxesAround(Cancelled):
    """Unsqueeze(f(Squeeze(x, a)), a) = f(x), f works element by element: convolutions over one axis.

    Exporters write these as convolutions over two axes, of which one has size 1. Constants in f get the axes.
    """

    name = "axes-around"
    ops = frozenset(("Unsqueeze",))
    matches = frozenset(("Squeeze",))
    first = "Squeeze"

    def undone(self, outer: Node, inner: Node, edit: Editor) -> Undone | None:
        count = predicates.rank(edit.shape(inner.inputs[0]))
        there = predicates.positive_axes(predicates.ints(inner, "axes", 1) or (), count)
        back = predicates.positive_axes(predicates.ints(outer, "axes", 1) or (), count)
        if count is None or not there or there != back:
            return None
        return Undone(count - len(there), lambda wide: np.expand_dims(wide, there))


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


RULES = (TransposeAround(), AxesAround())
