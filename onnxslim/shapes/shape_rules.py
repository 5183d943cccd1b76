"""Output shapes in terms of symbols, where onnx's inference only says that a size is unknown.

Each rule holds for every run of the model that does not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from onnxslim.ir.graph import Node
from onnxslim.ops import Trait, has, spec_of
from onnxslim.shapes import symbols
from onnxslim.shapes.ort_differences import OPEN_END
from onnxslim.shapes.symbols import Term
from onnxslim.shapes.value_rules import number
from onnxslim.shapes.vectors import KnownShapes

Sizes: TypeAlias = "tuple[Term | None, ...]"
Rule: TypeAlias = Callable[[Node, KnownShapes], "Sizes | None"]


def _range(node: Node, dims: KnownShapes) -> Sizes | None:
    start, limit, step = (dims.value(node.input(index)) for index in range(3))
    if limit is None or number(start) != 0 or number(step) != 1 or not symbols.is_size(limit.only):
        return None
    return (limit.only,)


def _expand(node: Node, dims: KnownShapes) -> Sizes | None:
    data, target = dims.shape(node.input(0)), dims.value(node.input(1))
    if data is None or target is None or target.scalar:
        return None
    return _broadcast([data, target.terms])


def _tile(node: Node, dims: KnownShapes) -> Sizes | None:
    data, repeats = dims.shape(node.input(0)), dims.value(node.input(1))
    if data is None or repeats is None or len(data) != len(repeats.terms):
        return None
    return tuple(
        symbols.product([size, count]) if count is not None else None
        for size, count in zip(data, repeats.terms, strict=True)
    )


def _elementwise(node: Node, dims: KnownShapes) -> Sizes | None:
    found = [dims.shape(node.inputs[index]) for index in spec_of(node).data_inputs(node)]
    known = [shape for shape in found if shape is not None]
    return _broadcast(known) if known and len(known) == len(found) else None


def _broadcast(shapes: Sequence[Sizes]) -> Sizes:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(symbols.broadcast(column) for column in zip(*padded, strict=True))


def _matmul(node: Node, dims: KnownShapes) -> Sizes | None:
    first, second = dims.shape(node.input(0)), dims.shape(node.input(1))
    if first is None or second is None or len(first) < 2 or len(second) < 2:
        return None
    return (*_broadcast([first[:-2], second[:-2]]), first[-2], second[-1])


def _slice(node: Node, dims: KnownShapes) -> Sizes | None:
    data = dims.shape(node.input(0))
    starts, ends, axes, steps = (dims.value(node.input(index)) for index in range(1, 5))
    if data is None or starts is None or ends is None or dims.opset < 10:
        return None
    at = tuple(range(len(starts.terms))) if node.input(3) is None else axes.numbers if axes else None
    if at is None or not len(at) == len(starts.terms) == len(ends.terms) or max(at) >= len(data):
        return None
    if node.input(4) is not None and (steps is None or set(steps.terms) != {1}):
        return None
    sizes: list[Term | None] = list(data)
    for axis, start, end in zip(at, starts.terms, ends.terms, strict=True):
        sizes[axis] = _cut(data[axis], end) if start == 0 else None
    return tuple(sizes)


def _cut(size: Term, end: Term | None) -> Term | None:
    """What is left of an axis up to `end`."""
    if isinstance(end, int) and end >= OPEN_END:
        return size
    if isinstance(end, int) and isinstance(size, int):
        return max(0, size + end) if end < 0 else min(size, end)
    return symbols.least(size, end) if end is not None and symbols.is_size(end) else None


def _reshape(node: Node, dims: KnownShapes) -> Sizes | None:
    data, target = dims.shape(node.input(0)), dims.value(node.input(1))
    if target is None or target.scalar:
        return None
    zeros = bool(node.attrs.get("allowzero", 0))
    # A zero copies the size of the data, be it known or not.
    copied: list[Term | None] = [*(data or ()), *[None] * len(target.terms)]
    sizes = [copied[axis] if size == 0 and not zeros else size for axis, size in enumerate(target.terms)]
    if sizes.count(-1) == 1:
        others = [size for size in sizes if size is not None and size != -1]
        rest = None
        if data is not None and len(others) == len(sizes) - 1:
            rest = symbols.exactly_over(symbols.product(data), symbols.product(others))
        sizes[sizes.index(-1)] = rest
    return tuple(size if symbols.is_size(size) else None for size in sizes)


def _flatten(node: Node, dims: KnownShapes) -> Sizes | None:
    data, axis = dims.shape(node.input(0)), node.attrs.get("axis", 1)
    return None if data is None else (symbols.product(data[:axis]), symbols.product(data[axis:]))


def _concat(node: Node, dims: KnownShapes) -> Sizes | None:
    shapes = [shape for tensor in node.inputs if (shape := dims.shape(tensor)) is not None]
    if len(shapes) != len(node.inputs) or len({len(shape) for shape in shapes}) != 1:
        return None
    axis = node.attrs.get("axis", 1) % len(shapes[0])
    total: Term = 0
    for shape in shapes:
        total = symbols.plus(total, shape[axis])
    return tuple(total if index == axis else size for index, size in enumerate(shapes[0]))


def _same(node: Node, dims: KnownShapes) -> Sizes | None:
    return dims.shape(node.input(0))


def _transpose(node: Node, dims: KnownShapes) -> Sizes | None:
    data = dims.shape(node.input(0))
    if data is None:
        return None
    order = node.attrs.get("perm") or tuple(reversed(range(len(data))))
    return tuple(data[axis] for axis in order) if len(order) == len(data) else None


def _unsqueeze(node: Node, dims: KnownShapes) -> Sizes | None:
    data, axes = dims.shape(node.input(0)), _axes(node, dims)
    if data is None or axes is None:
        return None
    rank = len(data) + len(axes)
    at, rest = {axis % rank for axis in axes}, iter(data)
    return tuple(1 if axis in at else next(rest) for axis in range(rank)) if len(at) == len(axes) else None


def _squeeze(node: Node, dims: KnownShapes) -> Sizes | None:
    data, axes = dims.shape(node.input(0)), _axes(node, dims)
    if not data or axes is None:
        return None
    at = {axis % len(data) for axis in axes}
    return tuple(size for axis, size in enumerate(data) if axis not in at)


def _axes(node: Node, dims: KnownShapes) -> tuple[int, ...] | None:
    """Axes that are an attribute in early opsets and an input in later ones; None if there are none known."""
    if "axes" in node.attrs:
        return tuple(node.attrs["axes"])
    wanted = dims.value(node.input(1))
    return None if wanted is None else wanted.numbers


# Of these onnx infers not even the type, which is that of the first input.
SAME_TYPE = ("GroupNormalization",)

_RULES: dict[str, Rule] = {
    "Range": _range,
    "Expand": _expand,
    "Tile": _tile,
    "MatMul": _matmul,
    "Slice": _slice,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Concat": _concat,
    "GroupNormalization": _same,
    "LayerNormalization": _same,
    "RMSNormalization": _same,
    "Softmax": _same,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
}
MATCHES = frozenset(_RULES)


def rule_of(node: Node) -> Rule | None:
    """What is known of the shape of a standard operator's result; None if that is left to inference."""
    return _RULES.get(node.op) or (_elementwise if has(node, Trait.ELEMENTWISE) else None)
