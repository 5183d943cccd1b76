"""Elementwise operators that together are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Node, Tensor
from onnxslim.passes import predicates
from onnxslim.passes.eliminate.arithmetic import Bounds, limit

# Types ONNX Runtime clips; before opset 12 only the first.
_CLIPPED = tuple(map(np.dtype, (np.float32, np.float16, np.float64, np.int32, np.int64)))


@dataclass(frozen=True)
class Limit:
    """One side of a clip: a Max or Relu (from below) or a Min (from above) of a tensor and a number."""

    node: Node
    source: Tensor
    below: bool
    value: float
    shape: tuple[int, ...]


def _limit(node: Node | None) -> Limit | None:
    if node is None:
        return None
    if node.op == "Relu":
        return Limit(node, node.inputs[0], True, 0, ())
    for side in (0, 1) if len(node.inputs) == 2 else ():
        values = predicates.constant(node, side)
        value = predicates.number(values)
        if values is not None and value is not None:
            return Limit(node, node.inputs[1 - side], node.op == "Max", value, values.shape)
    return None


class MinMaxToClip(Rule[tuple[Limit, Limit]]):
    """min(max(x, l), h) = Clip(x, l, h), and max(min(x, h), l) likewise where l <= h; Relu is max(x, 0).

    Each bound is one number that does not broadcast x to more axes. NaN passes through all of them; a zero
    may get another sign, which must not be seen by what follows.
    """

    name = "min-max"
    ops = frozenset(("Min", "Max", "Relu"))
    makes = frozenset(("Clip",))
    since: ClassVar[int] = 8

    def pattern(self, node: Node, edit: Editor) -> tuple[Limit, Limit] | None:
        outer = _limit(node)
        inner = None if outer is None else _limit(predicates.made_by(outer.source, *self.ops))
        if outer is None or inner is None or outer.below == inner.below:
            return None
        return (inner, outer) if edit.sole_consumer(outer.source) is node else None

    def check(self, match: tuple[Limit, Limit], edit: Editor) -> str | None:
        inner, outer = match
        shape = edit.shape(inner.source)
        if not all(predicates.broadcasts_into(each.shape, shape) for each in match):
            return "a bound broadcasts its input to another shape, or may"
        if edit.dtype(inner.source) not in (_CLIPPED if edit.opset >= 12 else _CLIPPED[:1]):
            return "ONNX Runtime does not clip its type, or the type is not known"
        unordered = inner.value != inner.value or outer.value != outer.value
        if unordered or (outer.below and outer.value > inner.value):
            return "the lower bound is above the upper one, or not a number"
        if 0 in (inner.value, outer.value) and predicates.sign_of_zero_counts(outer.node.outputs[0], edit):
            return "it may change the sign of a zero, which a later operator may see"
        return None

    def rewrite(self, match: tuple[Limit, Limit], edit: Editor) -> str:
        inner, outer = match
        low, high = (inner, outer) if inner.below else (outer, inner)
        limit(edit, outer.node, inner.source, Bounds(low.value, high.value))
        return f"made it a Clip with {inner.node.label}"


RULES = (MinMaxToClip(),)
