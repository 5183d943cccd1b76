"""Two elementwise operators with constants that are one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.passes import predicates
from onnxslim.passes.eliminate.view import NodePair, chain


class ConstantChain(Rule[NodePair]):
    """(x + a) + b = x + (a + b) and (x * a) * b = x * (a * b); likewise for two differences or quotients.

    Exact for integers, which wrap around; they are not divided in one go. In floating point it is done where
    it cannot cost precision or hide an overflow: sums of one sign, products that both grow or both shrink.
    """

    name = "constant-chain"
    ops = frozenset(("Add", "Sub", "Mul", "Div"))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> NodePair | None:
        for index in (0, 1) if node.op in ("Add", "Mul") else (0,):
            inner = predicates.made_by(node.inputs[index], node.op)
            if inner is not None and _constant_side(node) is not None and _constant_side(inner) is not None:
                alone = edit.sole_consumer(node.inputs[index]) is node
                return NodePair(node, inner) if alone else None
        return None

    def check(self, match: NodePair, edit: Editor) -> str | None:
        first, second = _values(match.inner), _values(match.outer)
        if first.dtype not in predicates.FLOATS:
            whole = first.dtype.kind in "iu" and match.outer.op != "Div"
            problem = None if whole else f"{match.outer.op} of {first.dtype} is not associative"
        else:
            problem = _imprecise(match.outer.op, first, second)
        if problem is None and self._merged(match) is None:
            problem = "the constant for both is larger, or does not fit its type"
        if predicates.is_gelu(_operand(match.inner)):
            return "one ends a GELU, which ONNX Runtime computes as one"
        return problem

    def rewrite(self, match: NodePair, edit: Editor) -> str:
        merged, side = self._merged(match), _constant_side(match.outer) or 0
        assert merged is not None
        edit.set_input(match.outer, 1 - side, _operand(match.inner))
        edit.set_values(match.outer, side, merged)
        return f"took over the constant of {match.inner.label}"

    def _merged(self, match: NodePair) -> Array | None:
        first, second = _values(match.inner), _values(match.outer)
        combine = np.add if match.outer.op in ("Add", "Sub") else np.multiply
        if np.broadcast_shapes(first.shape, second.shape) not in (first.shape, second.shape):
            return None
        if first.dtype in predicates.FLOATS:
            wide = combine(first.astype(np.float64), second.astype(np.float64))
            return predicates.rounded(wide, first.dtype)
        with np.errstate(over="ignore"):
            return np.asarray(combine(first, second))


def _constant_side(node: Node) -> int | None:
    """Which input of a binary operator is a constant, the other one not being."""
    known = [predicates.constant(node, index) is not None for index in (0, 1)]
    if node.op in ("Sub", "Div"):
        return 1 if known == [False, True] else None
    return known.index(True) if sum(known) == 1 else None


def _operand(node: Node) -> Tensor:
    return node.inputs[1 - (_constant_side(node) or 0)]


def _values(node: Node) -> Array:
    values = predicates.constant(node, _constant_side(node) or 0)
    assert values is not None
    return values


def _imprecise(op: str, first: Array, second: Array) -> str | None:
    one, other = first.astype(np.float64), second.astype(np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return "a constant is not finite"
    if op in ("Add", "Sub"):
        together = bool(
            ((one >= 0).all() and (other >= 0).all()) or ((one <= 0).all() and (other <= 0).all())
        )
        return None if together else "the constants differ in sign; rounding in between may be intended"
    one, other = np.abs(one), np.abs(other)
    grow, shrink = (one >= 1).all() and (other >= 1).all(), (one <= 1).all() and (other <= 1).all()
    if one.all() and other.all() and (grow or shrink):
        return None
    return "one factor grows what the other shrinks; an overflow in between may be intended"


@dataclass(frozen=True)
class Bounds:
    """What a Clip or Relu limits to."""

    low: float
    high: float

    def then(self, later: Bounds) -> Bounds:
        """The bounds of both in a row.

        With clip(x; l, h) = min(max(x, l), h), also for l > h, min(max(clip(x; l, h), l'), h') is
        clip(x; max(l, l'), min(max(h, l'), h')), as min and max distribute over each other.
        """
        return Bounds(max(self.low, later.low), min(max(self.high, later.low), later.high))


def widest(dtype: np.dtype[Any]) -> Bounds:
    """The bounds of a Clip that has none; infinities lie outside."""
    if dtype.kind in "iu":
        return Bounds(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    largest = predicates.largest(dtype)
    return Bounds(-largest, largest)


class ClipChain(Rule[NodePair]):
    """Clip of Clip, Relu of Clip and Clip of Relu are one Clip; NaN passes through all of them."""

    name = "clip-chain"
    ops = frozenset(("Clip", "Relu"))
    makes = frozenset(("Clip",))
    since: ClassVar[int] = 6

    def pattern(self, node: Node, edit: Editor) -> NodePair | None:
        found = chain(node, edit, "Clip", "Relu")
        return found if found and "Clip" in (found.outer.op, found.inner.op) else None

    def check(self, match: NodePair, edit: Editor) -> str | None:
        if edit.dtype(match.source) is None:
            return "its element type is not known"
        return None if self._bounds(match, edit) else "a bound is computed, or not a number"

    def rewrite(self, match: NodePair, edit: Editor) -> str:
        bounds = self._bounds(match, edit)
        assert bounds is not None
        limit(edit, match.outer, match.source, bounds)
        return f"took over the bounds of {match.inner.label}"

    def _bounds(self, match: NodePair, edit: Editor) -> Bounds | None:
        dtype = edit.dtype(match.source)
        inner, outer = bounds_of(match.inner, dtype), bounds_of(match.outer, dtype)
        return inner.then(outer) if inner and outer else None


def bounds_of(node: Node, dtype: np.dtype[Any] | None) -> Bounds | None:
    """What a Clip or Relu limits to; None if that is computed or not a number."""
    if dtype is None or not (dtype.kind in "iu" or dtype in predicates.FLOATS):
        return None
    if node.op == "Relu":
        return Bounds(0, np.inf)
    default = widest(dtype)
    low, high = _bound(node, "min", 1, default.low), _bound(node, "max", 2, default.high)
    return None if low is None or high is None else Bounds(low, high)


def _bound(node: Node, attr: str, index: int, default: float) -> float | None:
    if not predicates.given(node, attr, index):
        return default
    value = node.attrs.get(attr, predicates.number(predicates.constant(node, index)))
    return None if value is None or value != value else value


def limit(edit: Editor, node: Node, source: Tensor, bounds: Bounds) -> None:
    """Turn a node into a Clip of a tensor."""
    dtype = edit.dtype(source)
    assert dtype is not None
    default = widest(dtype)
    low = None if bounds.low == default.low else bounds.low
    high = None if bounds.high == default.high else bounds.high
    if edit.opset < 11:
        given = {key: float(value) for key, value in (("min", low), ("max", high)) if value is not None}
        edit.replace_node(node, "Clip", [source], given)
        return
    name = node.outputs[0].name
    inputs = [
        source,
        *(
            ir.empty() if value is None else edit.constant(f"{name}_{key}", np.array(value, dtype))
            for key, value in (("min", low), ("max", high))
        ),
    ]
    while not inputs[-1].name:
        inputs.pop()
    edit.replace_node(node, "Clip", inputs)


class TimesZero(Rule[tuple[Node, tuple[int, ...]]]):
    """x * 0 = 0 for integers, if the shape of the result is known and it is small."""

    name = "times-zero"
    ops = frozenset(("Mul",))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, tuple[int, ...]] | None:
        side = _constant_side(node)
        values = None if side is None else predicates.constant(node, side)
        if values is None or values.dtype.kind not in "iu" or not predicates.is_all(values, 0):
            return None
        shape = edit.shape(node.outputs[0])
        known = None if shape is None else tuple(dim for dim in shape if isinstance(dim, int))
        return (node, known) if known is not None and shape == known else None

    def check(self, match: tuple[Node, tuple[int, ...]], edit: Editor) -> str | None:
        node, shape = match
        if edit.is_output(node.outputs[0]) or edit.is_shadowed(node.outputs[0]):
            return "its name has to stay"
        return None if math.prod(shape) <= _values(node).size else "the zeros would take more space"

    def rewrite(self, match: tuple[Node, tuple[int, ...]], edit: Editor) -> str:
        node, shape = match
        dtype = _values(node).dtype
        edit.bypass(node, edit.constant(node.outputs[0].name, np.zeros(shape, dtype)))
        return "its result is zero"


RULES = (ConstantChain(), ClipChain(), TimesZero())
