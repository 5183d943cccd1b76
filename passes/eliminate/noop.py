"""Nodes that hand on what they get."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir import proto
from onnxslim.ir.graph import Node, Shape
from onnxslim.passes import predicates
from onnxslim.passes.predicates import Bypass, Detour


class Identity(Bypass):
    """Identity(x) = x."""

    name = "identity"
    ops = frozenset(("Identity",))

    def pattern(self, node: Node, edit: Editor) -> Detour:
        return node, node.inputs[0]


class Dropout(Bypass):
    """Dropout(x) = x outside training, if nobody wants the mask.

    Until opset 6 training is the default and `is_test` ends it; from opset 12 on an input starts it.
    """

    name = "dropout"
    ops = frozenset(("Dropout",))

    def pattern(self, node: Node, edit: Editor) -> Detour:
        return node, node.inputs[0]

    def check(self, match: Detour, edit: Editor) -> str | None:
        node, _ = match
        if any(mask.outputs or edit.is_output(mask) for mask in node.outputs[1:]):
            return "its mask is used"
        if self._may_train(node, edit.opset):
            return "it is, or may be switched to, training"
        return super().check(match, edit)

    def _may_train(self, node: Node, opset: int) -> bool:
        if opset < 7:
            return not node.attrs.get("is_test", 0)
        mode = predicates.constant(node, 2)
        return node.input(2) is not None and (mode is None or bool(mode.any()))


class Cast(Bypass):
    """Cast and CastLike to the type the input has already."""

    name = "cast"
    ops = frozenset(("Cast", "CastLike"))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        wanted = cast_type(node, edit)
        return (node, node.inputs[0]) if wanted is not None and wanted == edit.dtype(node.inputs[0]) else None


def cast_type(node: Node, edit: Editor) -> np.dtype[Any] | None:
    """The type a Cast or CastLike makes."""
    if node.op == "CastLike":
        return edit.dtype(node.inputs[1])
    to = node.attrs.get("to")
    return proto.dtype_of(to) if isinstance(to, int) else None


class CastBack(Bypass):
    """Cast(Cast(x, wide), type of x) = x if every value of x exists in the wider type."""

    name = "cast-back"
    ops = frozenset(("Cast",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        inner = predicates.made_by(node.inputs[0], "Cast")
        if inner is None:
            return None
        source, wide = edit.dtype(inner.inputs[0]), cast_type(inner, edit)
        if source is None or wide is None or cast_type(node, edit) != source or not widens(source, wide):
            return None
        return node, inner.inputs[0]


class CastCast(Rule[tuple[Node, Node]]):
    """Cast(Cast(x, wide), to) = Cast(x, to) if every value of x exists in the wider type.

    Valid where the second cast does the same to the narrow type: within integers, within floating point, or
    from integers to floating point. Floating point to integer is left alone: out-of-range values are
    undefined and kernels differ.
    """

    name = "cast-cast"
    ops = frozenset(("Cast",))

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, Node] | None:
        inner = predicates.made_by(node.inputs[0], "Cast")
        return None if inner is None or edit.sole_consumer(node.inputs[0]) is not node else (node, inner)

    def check(self, match: tuple[Node, Node], edit: Editor) -> str | None:
        node, inner = match
        source, wide, to = edit.dtype(inner.inputs[0]), cast_type(inner, edit), cast_type(node, edit)
        if source is None or wide is None or to is None:
            return "an element type is not known"
        if not widens(source, wide):
            return f"{source} to {wide} loses values"
        if not _same_from(source, wide, to):
            return f"{source} to {to} may differ from {wide} to {to}"
        return None

    def rewrite(self, match: tuple[Node, Node], edit: Editor) -> str:
        node, inner = match
        edit.set_input(node, 0, inner.inputs[0])
        return f"skipped {inner.label}"


def _same_from(narrow: np.dtype[Any], wide: np.dtype[Any], to: np.dtype[Any]) -> bool:
    if _is_whole(narrow):
        return to in predicates.FLOATS or (_is_whole(wide) and _is_whole(to))
    return narrow in predicates.FLOATS and to in predicates.FLOATS


def _is_whole(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iub"


def widens(narrow: np.dtype[Any], wide: np.dtype[Any]) -> bool:
    """Whether every value of one type exists in the other; only for the common ones."""
    if narrow == wide:
        return True
    if narrow.kind == "b":
        return wide.kind in "iu" or wide in predicates.FLOATS
    if wide.kind == "f" and wide in predicates.FLOATS and narrow.kind in "iu":
        bits = narrow.itemsize * 8 - (narrow.kind == "i")
        return bool(bits <= np.finfo(wide).nmant + 1)
    if narrow in predicates.FLOATS:
        return wide in predicates.FLOATS and wide.itemsize > narrow.itemsize
    return narrow.kind in "iu" and wide.kind in "iu" and bool(np.can_cast(narrow, wide, "safe"))


class SingleOperand(Bypass):
    """Concat, Sum, Max, Min or Mean of one tensor, and Split into one."""

    name = "single"
    ops = frozenset(("Concat", "Sum", "Max", "Min", "Mean", "Split"))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        many = node.outputs if node.op == "Split" else node.inputs
        return (node, node.inputs[0]) if len(many) == 1 else None


class Pad(Bypass):
    """Pad by nothing on every side, in any mode; negative pads cut and are not nothing."""

    name = "pad"
    ops = frozenset(("Pad",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        pads = predicates.ints(node, "paddings" if edit.opset < 2 else "pads", 1)
        return (node, node.inputs[0]) if pads is not None and not any(pads) else None


class Expand(Bypass):
    """Expand to a shape that broadcasting leaves as it is."""

    name = "expand"
    ops = frozenset(("Expand",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        source, wanted = edit.shape(node.inputs[0]), predicates.constant(node, 1)
        target: Shape = None if wanted is None else tuple(int(size) for size in wanted)
        fits = predicates.broadcasts_into(target, source) or predicates.same_shape(
            source, edit.shape(node.outputs[0])
        )
        return (node, node.inputs[0]) if fits else None


class Tile(Bypass):
    """Tile once along every axis."""

    name = "tile"
    ops = frozenset(("Tile",))
    since: ClassVar[int] = 6

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        repeats = predicates.constant(node, 1)
        return (node, node.inputs[0]) if repeats is not None and bool((repeats == 1).all()) else None


class Unit(Bypass):
    """x + 0, x - 0, x * 1, x / 1 and x ** 1, where the other one does not broadcast x to another shape.

    x + 0 turns -0 into +0. Where something later could make that a difference, it stays; adding -0 and
    subtracting +0 change nothing at all.
    """

    name = "unit"
    ops = frozenset(("Add", "Sub", "Mul", "Div", "Pow"))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        unit = 0 if node.op in ("Add", "Sub") else 1
        for index in (1, 0) if node.op in ("Add", "Mul") else (1,):
            if predicates.is_uniform(node.inputs[index], unit):
                return node, node.inputs[1 - index]
        return None

    def check(self, match: Detour, edit: Editor) -> str | None:
        node, source = match
        other = node.inputs[1 - node.inputs.index(source)]
        if not predicates.broadcasts_into(edit.shape(other), edit.shape(source)):
            return f"'{other.name}' broadcasts '{source.name}' to another shape, or may"
        if predicates.is_normalized(source):
            return "it belongs to a layer normalization, which ONNX Runtime computes as one"
        clears_sign = node.op in ("Add", "Sub") and self._clears_sign(node, node.inputs.index(other), edit)
        if clears_sign and predicates.sign_of_zero_counts(node.outputs[0], edit):
            return "it turns -0 into +0, which a later operator may see"
        return super().check(match, edit)

    def _clears_sign(self, node: Node, index: int, edit: Editor) -> bool:
        dtype, values = edit.dtype(node.inputs[index]), predicates.constant(node, index)
        if values is None or dtype not in predicates.FLOATS:
            return dtype is None or dtype in predicates.FLOATS
        negative = np.signbit(values.astype(np.float64))
        return not bool(negative.all() if node.op == "Add" else not negative.any())


class Where(Bypass):
    """Where(c, x, y) is x or y if c is constant and all alike, and broadcasting changes nothing."""

    name = "where"
    ops = frozenset(("Where",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        condition = predicates.constant(node, 0)
        if condition is None or not condition.size or condition.any() != condition.all():
            return None
        return node, node.inputs[1 if condition.all() else 2]

    def check(self, match: Detour, edit: Editor) -> str | None:
        node, source = match
        others = (tensor for tensor in node.inputs if tensor is not source)
        if not all(predicates.broadcasts_into(edit.shape(other), edit.shape(source)) for other in others):
            return f"'{source.name}' is broadcast to another shape, or may be"
        return super().check(match, edit)


class Idempotent(Bypass):
    """f(f(x)) = f(x)."""

    name = "idempotent"
    ops = frozenset(("Relu", "Ceil", "Floor", "Round", "Sign", "Abs"))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        return (node, node.inputs[0]) if predicates.made_by(node.inputs[0], node.op) else None


class Involution(Bypass):
    """f(f(x)) = x."""

    name = "involution"
    ops = frozenset(("Not", "Neg", "BitwiseNot"))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        inner = predicates.made_by(node.inputs[0], node.op)
        return (node, inner.inputs[0]) if inner else None


class Clip(Bypass):
    """Clip to all of the type's values; for floating point that takes explicit infinities.

    Without them, Clip turns infinities into the largest finite values.
    """

    name = "clip"
    ops = frozenset(("Clip",))
    since: ClassVar[int] = 11

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        dtype = edit.dtype(node.inputs[0])
        if dtype is None or not (dtype.kind in "iu" or dtype in predicates.FLOATS):
            return None
        whole = dtype.kind in "iu"
        widest = (np.iinfo(dtype).min, np.iinfo(dtype).max) if whole else (-np.inf, np.inf)
        reaches = [self._reaches(node, index, widest[index - 1], whole) for index in (1, 2)]
        return (node, node.inputs[0]) if all(reaches) else None

    def _reaches(self, node: Node, index: int, limit: float, default: bool) -> bool:
        if node.input(index) is None:
            return default
        values = predicates.constant(node, index)
        return values is not None and predicates.is_all(values, limit)


# Reductions that give back a single element as it is; the first two may start from +0.
_SUMS = frozenset(("ReduceSum", "ReduceMean"))
_REDUCTIONS = frozenset((*_SUMS, "ReduceMax", "ReduceMin", "ReduceProd"))


class ReduceOne(Rule[tuple[Node, tuple[int, ...]]]):
    """A sum, mean, product or extreme over axes of size 1 is a Squeeze, or nothing at all."""

    name = "reduce-one"
    ops = _REDUCTIONS
    makes = frozenset(("Squeeze",))

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, tuple[int, ...]] | None:
        shape = edit.shape(node.inputs[0])
        if shape is None:
            return None
        axes = _reduced(node, len(shape))
        return (node, axes) if axes is not None and all(shape[axis] == 1 for axis in axes) else None

    def check(self, match: tuple[Node, tuple[int, ...]], edit: Editor) -> str | None:
        node, _ = match
        if node.op in _SUMS and predicates.sign_of_zero_counts(node.outputs[0], edit):
            return "it may turn -0 into +0, which a later operator may see"
        return predicates.stuck((node, node.inputs[0]), edit) if self._keeps(match) else None

    def rewrite(self, match: tuple[Node, tuple[int, ...]], edit: Editor) -> str:
        node, axes = match
        op, source = node.op, node.inputs[0]
        if self._keeps(match):
            edit.bypass(node, source)
            return f"removed {op}"
        if edit.opset < 13:
            edit.replace_node(node, "Squeeze", [source], {"axes": axes})
        else:
            name = f"{node.outputs[0].name}_axes"
            edit.replace_node(node, "Squeeze", [source, edit.constant(name, np.array(axes, np.int64))])
        return "made it a Squeeze"

    def _keeps(self, match: tuple[Node, tuple[int, ...]]) -> bool:
        """Whether the result has as many axes as the input."""
        node, axes = match
        return bool(node.attrs.get("keepdims", 1)) or not axes


def _reduced(node: Node, rank: int) -> tuple[int, ...] | None:
    """The axes a reduction runs over; None if they are not known."""
    if not predicates.given(node, "axes", 1):
        return () if node.attrs.get("noop_with_empty_axes", 0) else tuple(range(rank))
    axes = predicates.ints(node, "axes", 1)
    return predicates.positive_axes(axes, rank) if axes else None


RULES = (
    Identity(),
    Dropout(),
    Cast(),
    CastBack(),
    CastCast(),
    SingleOperand(),
    Pad(),
    Expand(),
    Tile(),
    Unit(),
    Where(),
    Idempotent(),
    Involution(),
    Clip(),
    ReduceOne(),
)
