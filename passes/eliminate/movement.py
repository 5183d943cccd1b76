"""Operators that move elements: Transpose, Concat, Split, Slice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Node, Tensor
from onnxslim.passes import predicates
from onnxslim.passes.eliminate.view import NodePair, chain
from onnxslim.passes.predicates import Bypass, Detour

Order: TypeAlias = tuple[int, ...]

# Inputs of a Concat that others were merged into.
MAX_JOINED = 256


def order(node: Node, edit: Editor) -> Order | None:
    """The input axis that each output axis of a Transpose comes from."""
    perm = node.attrs.get("perm")
    axes = predicates.rank(edit.shape(node.inputs[0]))
    if perm:
        return tuple(perm) if axes in (None, len(perm)) else None
    return None if axes is None else tuple(reversed(range(axes)))


def _is_identity(found: Order) -> bool:
    return found == tuple(range(len(found)))


class TransposeNothing(Bypass):
    """Transpose that leaves every axis in its place."""

    name = "transpose"
    ops = frozenset(("Transpose",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        found = order(node, edit)
        return (node, node.inputs[0]) if found is not None and _is_identity(found) else None


def _composed(node: Node, inner: Node, edit: Editor) -> Order | None:
    """The order of two transposes in a row; one without an order of its own reverses as many axes."""
    first, second = order(inner, edit), order(node, edit)
    first = first or (second and tuple(reversed(range(len(second)))))
    second = second or (first and tuple(reversed(range(len(first)))))
    if not first or not second or len(first) != len(second):
        return None
    return tuple(first[axis] for axis in second)


class TransposeBack(Bypass):
    """Transpose(Transpose(x, p), q) = x where q undoes p."""

    name = "transpose-back"
    ops = frozenset(("Transpose",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        inner = predicates.made_by(node.inputs[0], "Transpose")
        found = _composed(node, inner, edit) if inner else None
        return (node, inner.inputs[0]) if inner and found and _is_identity(found) else None


class TransposeChain(Rule[NodePair]):
    """Transpose(Transpose(x, p), q) = Transpose(x, p[q])."""

    name = "transpose-chain"
    ops = frozenset(("Transpose",))

    def pattern(self, node: Node, edit: Editor) -> NodePair | None:
        return chain(node, edit, "Transpose")

    def check(self, match: NodePair, edit: Editor) -> str | None:
        return None if _composed(match.outer, match.inner, edit) else "the number of axes is not known"

    def rewrite(self, match: NodePair, edit: Editor) -> str:
        match.outer.attrs["perm"] = _composed(match.outer, match.inner, edit)
        edit.set_input(match.outer, 0, match.source)
        return f"took over the order of {match.inner.label}"


class TransposeMerged(Rule[tuple[Node, Node, Order]]):
    """A Transpose between a Reshape that merges the first axes and one that splits them is a Transpose."""

    name = "transpose-merged"
    ops = frozenset(("Reshape",))
    matches = makes = frozenset(("Transpose",))

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, Node, Order] | None:
        middle = predicates.made_by(node.inputs[0], "Transpose")
        merging = predicates.made_by(middle.inputs[0], "Reshape") if middle else None
        if middle is None or merging is None or edit.sole_consumer(node.inputs[0]) is not node:
            return None
        found = self._order(node, middle, merging, edit)
        return (node, merging, found) if found else None

    def _order(self, node: Node, middle: Node, merging: Node, edit: Editor) -> Order | None:
        whole, merged, swap = (
            edit.shape(merging.inputs[0]),
            edit.shape(merging.outputs[0]),
            order(middle, edit),
        )
        if whole is None or merged is None or swap is None or swap[0] != 0 or None in whole:
            return None
        first = len(whole) - len(merged) + 1
        if first < 2 or whole[first:] != merged[1:]:
            return None
        found = (*range(first), *(axis + first - 1 for axis in swap[1:]))
        wanted = tuple(whole[axis] for axis in found)
        return found if predicates.same_shape(wanted, edit.shape(node.outputs[0])) else None

    def check(self, match: tuple[Node, Node, Order], edit: Editor) -> str | None:
        return None

    def rewrite(self, match: tuple[Node, Node, Order], edit: Editor) -> str:
        node, merging, found = match
        edit.replace_node(node, "Transpose", [merging.inputs[0]], {"perm": found})
        return f"made it a Transpose of what {merging.label} reads"


class TransposeView(Rule[Node]):
    """A Transpose that moves nothing but axes of size 1 is a Reshape, which copies nothing."""

    name = "transpose-view"
    ops = frozenset(("Transpose",))
    makes = frozenset(("Reshape",))

    def pattern(self, node: Node, edit: Editor) -> Node | None:
        shape, found = edit.shape(node.inputs[0]), order(node, edit)
        if shape is None or found is None or self._beside_another(node):
            return None
        moving = [axis for axis in found if shape[axis] != 1]
        return node if moving == sorted(moving) and not _is_identity(found) else None

    def check(self, match: Node, edit: Editor) -> str | None:
        return None if self._target(match, edit) is not None else "more than one size is not known"

    def rewrite(self, match: Node, edit: Editor) -> str:
        target = self._target(match, edit)
        assert target is not None
        predicates.reshape(edit, match, match.inputs[0], target)
        return "made it a Reshape"

    def _target(self, node: Node, edit: Editor) -> Order | None:
        shape, found = edit.shape(node.inputs[0]), order(node, edit)
        if shape is None or found is None:
            return None
        return predicates.reshape_target(shape, tuple(shape[axis] for axis in found))

    def _beside_another(self, node: Node) -> bool:
        """Two transposes in a row may undo each other, which they no longer do once one is a Reshape."""
        after = any(reader.op == "Transpose" for reader in node.outputs[0].outputs)
        return after or predicates.made_by(node.inputs[0], "Transpose") is not None


class ConcatConcat(Rule[tuple[Node, list[Node]]]):
    """Concat(Concat(a, b), c) = Concat(a, b, c) along one axis; an inner one may be there repeatedly."""

    name = "concat-concat"
    ops = frozenset(("Concat",))
    makes = ops

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, list[Node]] | None:
        inner = [
            maker
            for tensor in dict.fromkeys(node.inputs)
            if (maker := predicates.made_by(tensor, "Concat"))
            and not edit.is_output(tensor)
            and all(reader is node for reader in tensor.outputs)
        ]
        return (node, inner) if inner else None

    def check(self, match: tuple[Node, list[Node]], edit: Editor) -> str | None:
        node, inner = match
        alike = self._alike(node, inner, edit)
        if not alike:
            return "the axes differ, or may"
        # A chain of Concat(x, x) would double the list of inputs at every step.
        sizes = {id(each.outputs[0]): len(each.inputs) for each in alike}
        joined = sum(sizes.get(id(tensor), 1) for tensor in node.inputs)
        return f"it would read more than {MAX_JOINED} tensors" if joined > MAX_JOINED else None

    def rewrite(self, match: tuple[Node, list[Node]], edit: Editor) -> str:
        node, inner = match
        parts = {id(each.outputs[0]): list(each.inputs) for each in self._alike(node, inner, edit)}
        inputs = [part for tensor in node.inputs for part in parts.get(id(tensor), (tensor,))]
        edit.replace_node(node, "Concat", inputs, node.attrs)
        return f"took over the inputs of {len(parts)} more"

    def _alike(self, node: Node, inner: list[Node], edit: Editor) -> list[Node]:
        return [each for each in inner if _one_axis(node, each, predicates.rank(edit.shape(each.outputs[0])))]


class ConcatNothing(Rule[tuple[Node, list[Tensor]]]):
    """Concat(a, e, b) = Concat(a, b) where e is empty along the axis, as a Slice of nothing is."""

    name = "concat-nothing"
    ops = frozenset(("Concat",))
    makes = ops

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, list[Tensor]] | None:
        left = [tensor for tensor in node.inputs if not self._is_empty(tensor, _axis(node), edit)]
        return (node, left or node.inputs[:1]) if len(left) < len(node.inputs) > 1 else None

    def check(self, match: tuple[Node, list[Tensor]], edit: Editor) -> str | None:
        return None

    def rewrite(self, match: tuple[Node, list[Tensor]], edit: Editor) -> str:
        node, left = match
        edit.replace_node(node, "Concat", left, node.attrs)
        return f"left out {len(node.inputs) - len(left)} that are empty"

    def _is_empty(self, tensor: Tensor, axis: int, edit: Editor) -> bool:
        shape = edit.shape(tensor)
        place = predicates.positive_axis(axis, predicates.rank(shape))
        return shape is not None and place is not None and place < len(shape) and shape[place] == 0


def _one_axis(one: Node, other: Node, count: int | None) -> bool:
    """Whether two nodes that split or join are known to do it along one axis of this many."""
    first, second = _axis(one), _axis(other)
    known = predicates.positive_axis(first, count)
    return first == second or (known is not None and known == predicates.positive_axis(second, count))


def _axis(node: Node) -> int:
    # Before opset 4 the axis of Concat had a default.
    return int(node.attrs.get("axis", 0 if node.op == "Split" else 1))


class SplitConcat(Bypass):
    """Concat(Split(x)) = x if all parts are put together again in order along one axis."""

    name = "split-concat"
    ops = frozenset(("Concat",))
    matches = frozenset(("Split",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        split = predicates.made_by(node.inputs[0], "Split")
        if split is None or [id(part) for part in split.outputs] != [id(part) for part in node.inputs]:
            return None
        return node, split.inputs[0]

    def check(self, match: Detour, edit: Editor) -> str | None:
        node, source = match
        split = node.inputs[0].inputs[0]
        if not _one_axis(split, node, predicates.rank(edit.shape(source))):
            return "the axes differ, or may"
        return super().check(match, edit)


@dataclass(frozen=True)
class SliceWindow:
    """What a Slice takes along one axis."""

    axis: int
    start: int
    end: int
    step: int = 1


def cuts(node: Node, edit: Editor) -> tuple[SliceWindow, ...] | None:
    """What a Slice takes, axes counted from the front; None if that is not known."""
    starts, ends = predicates.ints(node, "starts", 1), predicates.ints(node, "ends", 2)
    if starts is None or ends is None:
        return None
    axes, steps = predicates.ints(node, "axes", 3), predicates.ints(node, "steps", 4)
    if (axes is None and predicates.given(node, "axes", 3)) or (
        steps is None and predicates.given(node, "steps", 4)
    ):
        return None
    if {len(ends), len(axes or starts), len(steps or starts)} != {len(starts)}:
        return None
    count = predicates.rank(edit.shape(node.inputs[0]))
    found = []
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = predicates.positive_axis(axes[place] if axes else place, count)
        if axis is None:
            return None
        found.append(SliceWindow(axis, start, end, steps[place] if steps else 1))
    return tuple(found)


class SliceNothing(Bypass):
    """Slice from the first to the last element of every axis."""

    name = "slice"
    ops = frozenset(("Slice",))

    def pattern(self, node: Node, edit: Editor) -> Detour | None:
        found, shape = cuts(node, edit), edit.shape(node.inputs[0])
        if found is None:
            return None
        # An axis the data does not have makes a model that cannot run; that is not for a rule to say.
        known = dict(enumerate(shape or ()))
        return (node, node.inputs[0]) if all(_takes_all(cut, known.get(cut.axis)) for cut in found) else None


def _takes_all(cut: SliceWindow, size: int | str | None) -> bool:
    if not isinstance(size, int):
        return cut.step == 1 and cut.start == 0 and cut.end >= predicates.OPEN_END
    return cut.step == 1 and (cut.start == 0 or cut.start <= -size) and cut.end >= size


class SliceChain(Rule[NodePair]):
    """Slice(Slice(x)) is one Slice of all axes.

    Axes only one of them cuts are independent of each other. Along an axis both cut, [a, b) of x and then
    [c, d) of that is [a + c, min(b, a + d)) of x, if all four count from the front and no step is taken.
    """

    name = "slice-chain"
    ops = frozenset(("Slice",))
    makes = ops

    def pattern(self, node: Node, edit: Editor) -> NodePair | None:
        return chain(node, edit, "Slice")

    def check(self, match: NodePair, edit: Editor) -> str | None:
        inner, outer = cuts(match.inner, edit), cuts(match.outer, edit)
        if inner is None or outer is None:
            return "where they cut is not known"
        return None if joined(inner, outer) else "they cut one axis in steps or from its end"

    def rewrite(self, match: NodePair, edit: Editor) -> str:
        found = joined(cuts(match.inner, edit) or (), cuts(match.outer, edit) or ())
        name = match.outer.outputs[0].name
        columns = {
            "starts": [cut.start for cut in found],
            "ends": [cut.end for cut in found],
            "axes": [cut.axis for cut in found],
            "steps": [cut.step for cut in found],
        }
        if all(cut.step == 1 for cut in found):
            del columns["steps"]
        if edit.opset < 10:
            edit.replace_node(match.outer, "Slice", [match.source], columns)
        else:
            given = [
                edit.constant(f"{name}_{key}", np.array(values, np.int64)) for key, values in columns.items()
            ]
            edit.replace_node(match.outer, "Slice", [match.source, *given])
        return f"took over the cuts of {match.inner.label}"


def joined(inner: tuple[SliceWindow, ...], outer: tuple[SliceWindow, ...]) -> tuple[SliceWindow, ...]:
    """One list of cuts for both; () if there is none."""
    found = {cut.axis: cut for cut in inner}
    for cut in outer:
        before = found.get(cut.axis)
        if before is None:
            found[cut.axis] = cut
            continue
        if before.step != 1 or cut.step != 1 or min(before.start, before.end, cut.start, cut.end) < 0:
            return ()
        end = min(before.end, before.start + cut.end)
        found[cut.axis] = replace(before, start=min(before.start + cut.start, before.end), end=end)
    return tuple(found[axis] for axis in sorted(found))


RULES = (
    TransposeNothing(),
    TransposeBack(),
    TransposeChain(),
    TransposeMerged(),
    TransposeView(),
    SplitConcat(),
    ConcatConcat(),
    ConcatNothing(),
    SliceNothing(),
    SliceChain(),
)
