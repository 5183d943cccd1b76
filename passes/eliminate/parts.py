"""Slices that together are the whole are one Split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Node, Tensor
from onnxslim.passes.eliminate.movement import cuts


@dataclass(frozen=True)
class Parts:
    """Slices of one tensor, one after the other along an axis.

    Attributes:
        source: the tensor.
        axis: counted from the front.
        slices, sizes: in order along the axis.
        complete: whether they take all there is.
    """

    source: Tensor
    axis: int
    slices: tuple[Node, ...]
    sizes: tuple[int, ...]
    complete: bool


class SlicesSplit(Rule[Parts]):
    """Slice(x, 0, a), Slice(x, a, b), …, Slice(x, z, end) along one axis of known size are Split(x)."""

    name = "slices-split"
    ops = frozenset(("Slice",))
    makes = frozenset(("Split",))
    since: ClassVar[int] = 2

    def pattern(self, node: Node, edit: Editor) -> Parts | None:
        first = _span(node, edit)
        if first is None or first[1] != 0:
            return None
        axis, _, end, size = first
        found, sizes = [node], [end]
        starts = {start: (each, stop) for each, start, stop in self._others(node, axis, edit)}
        while end < size and end in starts:
            each, stop = starts[end]
            found.append(each)
            sizes.append(stop - end)
            end = stop
        return Parts(node.inputs[0], axis, tuple(found), tuple(sizes), end == size) if found[1:] else None

    def _others(self, node: Node, axis: int, edit: Editor) -> Iterator[tuple[Node, int, int]]:
        home = edit.home(node)
        for each in node.inputs[0].outputs:
            same = each.op == node.op and each.domain == node.domain and each.inputs[0] is node.inputs[0]
            span = _span(each, edit) if same and home is not None and edit.home(each) is home else None
            if span is not None and span[0] == axis:
                yield each, span[1], span[2]

    def check(self, match: Parts, edit: Editor) -> str | None:
        if not match.complete:
            return "there are parts that nothing takes, or twice"
        after = [edit.sole_consumer(each.outputs[0]) for each in match.slices]
        if any(each is not None and each.op == "Slice" for each in after):
            return "a part is cut further, which one Slice does"
        dtype = edit.dtype(match.source)
        if dtype is None or dtype.kind == "c" or (dtype == ml_dtypes.bfloat16 and edit.opset < 13):
            return "ONNX Runtime does not split its type, or the type is not known"
        return None

    def rewrite(self, match: Parts, edit: Editor) -> str:
        first, *others = match.slices
        outputs = [each.outputs[0] for each in match.slices]
        attrs: dict[str, int | tuple[int, ...]] = {"axis": match.axis}
        inputs = [match.source]
        if len(set(match.sizes)) > 1:
            if edit.opset < 13:
                attrs["split"] = match.sizes
            else:
                sizes = np.array(match.sizes, np.int64)
                inputs.append(edit.constant(f"{match.source.name}_sizes", sizes))
        elif edit.opset >= 18:
            attrs["num_outputs"] = len(outputs)
        for each in match.slices:
            edit.remove(each)
        edit.add(first, "Split", inputs, outputs, attrs, name=first.name)
        return f"made it one Split with {', '.join(each.label for each in others)}"


def _span(node: Node, edit: Editor) -> tuple[int, int, int, int] | None:
    """Axis, first element, the one after the last, and size of what a Slice takes a part of."""
    found, shape = cuts(node, edit), edit.shape(node.inputs[0])
    if found is None or len(found) != 1 or found[0].step != 1 or shape is None:
        return None
    cut = found[0]
    size = shape[cut.axis] if cut.axis < len(shape) else None
    if not isinstance(size, int):
        return None
    start, end, _ = slice(cut.start, cut.end).indices(size)
    return (cut.axis, start, end, size) if start < end else None


RULES = (SlicesSplit(),)
