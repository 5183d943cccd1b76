"""Operators that only give a tensor another shape: Reshape, Flatten, Squeeze, Unsqueeze."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Dim, Node, Shape, Tensor
from onnxslim.passes import predicates
from onnxslim.passes.predicates import Bypass, Detour

MATCHES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze"))


class SameShape(Bypass):
    """A Reshape or Flatten to the shape the tensor has already."""

    name = "same-shape"
    ops = frozenset(("Reshape", "Flatten"))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        source = edit.shape(node.inputs[0])
        same = predicates.same_shape(source, viewed(node, source, edit)) or _keeps_every_axis(node, source)
        return (node, node.inputs[0]) if same else None


def _keeps_every_axis(node: Node, source: Shape) -> bool:
    """Whether a Reshape names every size as it is, but for one that then follows."""
    target = predicates.ints(node, "shape", 1) if node.op == "Reshape" else None
    if target is None or source is None or len(target) != len(source):
        return False
    copies = not node.attrs.get("allowzero", 0)
    others = [
        (wanted, dim) for wanted, dim in zip(target, source, strict=True) if not (wanted == 0 and copies)
    ]
    return sum(wanted == -1 for wanted, _ in others) <= 1 and all(
        wanted in (-1, dim) for wanted, dim in others
    )


@dataclass(frozen=True)
class NodePair:
    """Two operators of which the second alone reads what the first makes."""

    outer: Node
    inner: Node

    @property
    def source(self) -> Tensor:
        return self.inner.inputs[0]


def chain(node: Node, edit: Editor, *ops: str) -> NodePair | None:
    """The chain that ends at a node, if the one before is one of these operators."""
    inner = predicates.made_by(node.inputs[0], *ops)
    if inner is None or edit.sole_consumer(node.inputs[0]) is not node:
        return None
    return NodePair(node, inner)


class ThereAndBack(Bypass):
    """Views whose last shape is the first one: Squeeze and Unsqueeze of the same axes, or known shapes."""

    name = "there-and-back"
    ops = MATCHES

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        inner = predicates.made_by(node.inputs[0], *MATCHES)
        if inner is None:
            return None
        source = edit.shape(inner.inputs[0])
        same = _inverse(node, inner, edit) or predicates.same_shape(
            source, viewed(node, viewed(inner, source, edit), edit)
        )
        return (node, inner.inputs[0]) if same else None


def _inverse(outer: Node, inner: Node, edit: Editor) -> bool:
    if {outer.op, inner.op} != {"Squeeze", "Unsqueeze"}:
        return False
    one, other = predicates.ints(outer, "axes", 1), predicates.ints(inner, "axes", 1)
    if not one or not other:
        return False
    # Both count the axes of the tensor that has them.
    wide = edit.shape(inner.inputs[0] if inner.op == "Squeeze" else inner.outputs[0])
    count = predicates.rank(wide)
    if set(one) == set(other):
        return True
    first = predicates.positive_axes(one, count)
    return first is not None and first == predicates.positive_axes(other, count)


class AxesChain(Rule[NodePair]):
    """Squeeze of Squeeze, and Unsqueeze of Unsqueeze, with all axes at once."""

    name = "axes-chain"
    ops = frozenset(("Squeeze", "Unsqueeze"))

    def pattern(self, node: Node, edit: Editor) -> NodePair | None:
        return chain(node, edit, node.op) if predicates.given(node, "axes", 1) else None

    def check(self, match: NodePair, edit: Editor) -> str | None:
        return None if self._axes(match, edit) else "the axes are not known"

    def rewrite(self, match: NodePair, edit: Editor) -> str:
        axes = self._axes(match, edit)
        node, inner = match.outer, match.inner
        if edit.opset < 13:
            edit.replace_node(node, node.op, [match.source], {"axes": axes})
        else:
            name = f"{node.outputs[0].name}_axes"
            edit.replace_node(node, node.op, [match.source, edit.constant(name, np.array(axes, np.int64))])
        return f"took over the axes of {inner.label}"

    def _axes(self, match: NodePair, edit: Editor) -> tuple[int, ...]:
        squeeze = match.outer.op == "Squeeze"
        count = predicates.rank(edit.shape(match.source))
        inner, outer = _axes(match.inner, count), None
        if inner is not None:
            middle = None if count is None else count + (-len(inner) if squeeze else len(inner))
            outer = _axes(match.outer, middle)
        if inner is None or outer is None:
            return ()
        # The axes of the smaller tensor, counted among those of the larger one that are left.
        fixed, shifted = (inner, outer) if squeeze else (outer, inner)
        left = [axis for axis in range(max(shifted) + len(fixed) + 1) if axis not in fixed]
        return tuple(sorted((*fixed, *(left[axis] for axis in shifted))))


def _axes(node: Node, count: int | None) -> tuple[int, ...] | None:
    """Axes of a Squeeze or Unsqueeze whose input has this many."""
    axes = predicates.ints(node, "axes", 1)
    if not axes:
        return None
    if node.op == "Unsqueeze" and count is not None:
        count += len(axes)
    return predicates.positive_axes(axes, count)


class ViewChain(Rule[NodePair]):
    """Two views in a row are one Reshape.

    A Reshape after another view reads the original if no 0 in it copies a size from the view. In all other
    cases the last shape must be known, but for one axis. A Squeeze of an axis that may have another size than
    1 stays: it fails then, where a Reshape would mix up elements.
    """

    name = "view-chain"
    ops = MATCHES
    makes = frozenset(("Reshape",))

    def pattern(self, node: Node, edit: Editor) -> NodePair | None:
        return chain(node, edit, *MATCHES)

    def check(self, match: NodePair, edit: Editor) -> str | None:
        middle = viewed(match.inner, edit.shape(match.source), edit)
        if _may_fail(match.inner, edit.shape(match.source)) or _may_fail(match.outer, middle):
            return "it makes sure that an axis has size 1"
        known = _is_free(match.outer) or self._target(match, edit) is not None
        return None if known else "its shape is not known"

    def rewrite(self, match: NodePair, edit: Editor) -> str:
        target = self._target(match, edit)
        if _is_free(match.outer):
            edit.set_input(match.outer, 0, match.source)
        elif target is not None:
            predicates.reshape(edit, match.outer, match.source, target)
        return f"skipped {match.inner.label}"

    def _target(self, match: NodePair, edit: Editor) -> tuple[int, ...] | None:
        source = edit.shape(match.source)
        middle = viewed(match.inner, source, edit)
        return predicates.reshape_target(source, viewed(match.outer, middle, edit))


def _may_fail(node: Node, source: Shape) -> bool:
    """Whether a Squeeze names an axis that is not known to have size 1."""
    if node.op != "Squeeze" or not predicates.given(node, "axes", 1):
        return False
    axes = _axes(node, predicates.rank(source))
    return source is None or axes is None or any(source[axis] != 1 for axis in axes)


def _is_free(node: Node) -> bool:
    """Whether a Reshape does not depend on the shape of what it reads."""
    if node.op != "Reshape":
        return False
    if node.attrs.get("allowzero", 0):
        return True
    target = predicates.ints(node, "shape", 1)
    return target is not None and 0 not in target


def viewed(node: Node, source: Shape, edit: Editor) -> Shape:
    """The shape a view operator gives to a tensor of this shape, as far as is known."""
    found = _VIEWED[node.op](node, source)
    return found if predicates.is_known(found) else edit.shape(node.outputs[0]) or found


def _reshaped(node: Node, source: Shape) -> Shape:
    target = predicates.ints(node, "shape", 1)
    if target is None:
        return None
    dims: list[Dim] = list(target)
    if not node.attrs.get("allowzero", 0):
        for axis, size in enumerate(target):
            if size == 0:
                dims[axis] = source[axis] if source is not None and axis < len(source) else None
    if -1 in target:
        axis = target.index(-1)
        dims[axis] = _rest(source, (*dims[:axis], *dims[axis + 1 :]))
    return tuple(dims)


def _rest(source: Shape, others: tuple[Dim, ...]) -> Dim:
    """The size of the axis that takes up what the others leave."""
    if source is None or None in source or None in others:
        return None
    symbols = Counter(dim for dim in source if isinstance(dim, str))
    symbols.subtract(dim for dim in others if isinstance(dim, str))
    left = list(symbols.elements())
    total = math.prod(dim for dim in source if isinstance(dim, int))
    taken = math.prod(dim for dim in others if isinstance(dim, int))
    if min(symbols.values(), default=0) < 0 or taken == 0 or total % taken or len(left) > 1:
        return None
    if not left:
        return total // taken
    return left[0] if total == taken else None


def _flattened(node: Node, source: Shape) -> Shape:
    axis = node.attrs.get("axis", 1)
    if source is None:
        return None, None
    axis = predicates.positive_axis(axis, len(source))
    return _merged(source[:axis]), _merged(source[axis:])


def _merged(dims: tuple[Dim, ...]) -> Dim:
    """Size of the axis that several become."""
    several = [dim for dim in dims if dim != 1]
    return several[0] if len(several) == 1 else predicates.product(tuple(several))


def _squeezed(node: Node, source: Shape) -> Shape:
    if source is None:
        return None
    if not predicates.given(node, "axes", 1):
        return tuple(dim for dim in source if dim != 1) if predicates.product(source) is not None else None
    axes = _axes(node, len(source))
    return None if axes is None else tuple(dim for axis, dim in enumerate(source) if axis not in axes)


def _unsqueezed(node: Node, source: Shape) -> Shape:
    axes = _axes(node, predicates.rank(source))
    if source is None or axes is None:
        return None
    dims = iter(source)
    return tuple(1 if axis in axes else next(dims) for axis in range(len(source) + len(axes)))


_VIEWED = {"Reshape": _reshaped, "Flatten": _flattened, "Squeeze": _squeezed, "Unsqueeze": _unsqueezed}

RULES = (SameShape(), ThereAndBack(), AxesChain(), ViewChain())
