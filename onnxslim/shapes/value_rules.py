"""What operators make of short vectors of sizes: one rule for each with which exporters compute shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxslim.ir import files, proto
from onnxslim.ir.graph import Constant, Node, Tensor
from onnxslim.ir.model import constant_of
from onnxslim.shapes import symbols
from onnxslim.shapes.ort_differences import OPEN_END
from onnxslim.shapes.symbols import Term
from onnxslim.shapes.vectors import INTEGERS, MAX_LENGTH, KnownShapes, Vector

Rule: TypeAlias = Callable[[Node, KnownShapes], "Vector | None"]


def literal(tensor: Tensor) -> Vector | None:
    """The integers of a short constant, be it an initializer or the output of a Constant node."""
    if isinstance(tensor, Constant):
        short = len(tensor.shape) <= 1 and tensor.size <= MAX_LENGTH
        if not short or tensor.dtype not in INTEGERS:
            return None
    values = constant_of(tensor)
    if values is None or values.dtype not in INTEGERS or values.ndim > 1 or values.size > MAX_LENGTH:
        return None
    return Vector(tuple(int(item) for item in values.reshape(-1)), values.dtype, values.ndim == 0)


def number(vector: Vector | None) -> int | None:
    """The one number of a vector of one element."""
    only = vector.only if vector is not None else None
    return only if isinstance(only, int) else None


def _shape(node: Node, dims: KnownShapes) -> Vector | None:
    shape = dims.shape(node.input(0))
    if shape is None:
        return None
    # Python's slices clamp and count from the end as the operator does.
    return Vector(shape[node.attrs.get("start", 0) : node.attrs.get("end")])


def _size(node: Node, dims: KnownShapes) -> Vector | None:
    shape = dims.shape(node.input(0))
    return None if shape is None else Vector((symbols.product(shape),), scalar=True)


def _gather(node: Node, dims: KnownShapes) -> Vector | None:
    data, at = dims.value(node.input(0)), dims.value(node.input(1))
    if data is None or data.scalar or at is None or at.numbers is None:
        return None
    length = len(data.terms)
    if any(not -length <= index < length for index in at.numbers):
        return None
    return replace(data, terms=tuple(data.terms[index] for index in at.numbers), scalar=at.scalar)


def _slice(node: Node, dims: KnownShapes) -> Vector | None:
    data = dims.value(node.input(0))
    if data is None or data.scalar or dims.opset < 10:
        return None
    start, end, step = (number(dims.value(node.input(index))) for index in (1, 2, 4))
    if node.input(4) is None:
        step = 1
    if start is None or end is None or not step or (step < 0 and end >= OPEN_END):
        return None
    return replace(data, terms=data.terms[start:end:step])


def _concat(node: Node, dims: KnownShapes) -> Vector | None:
    parts = [dims.value(tensor) or _of_length(tensor, dims) for tensor in node.inputs]
    known = [part for part in parts if part is not None and not part.scalar]
    if len(known) != len(node.inputs) or len({part.dtype for part in known}) != 1:
        return None
    return replace(known[0], terms=tuple(term for part in known for term in part.terms))


def _of_length(tensor: Tensor, dims: KnownShapes) -> Vector | None:
    """A vector of which no more is known than its length."""
    sizes, dtype = dims.sizes(tensor), dims.dtype(tensor)
    if sizes is None or len(sizes) != 1 or sizes[0] > MAX_LENGTH or dtype is None or dtype not in INTEGERS:
        return None
    return Vector((None,) * sizes[0], dtype)


def _unsqueeze(node: Node, dims: KnownShapes) -> Vector | None:
    data = dims.value(node.input(0))
    return replace(data, scalar=False) if data is not None and dims.sizes(node.outputs[0]) == (1,) else None


def _squeeze(node: Node, dims: KnownShapes) -> Vector | None:
    data = dims.value(node.input(0))
    return replace(data, scalar=True) if data is not None and len(data.terms) == 1 else None


def _reshape(node: Node, dims: KnownShapes) -> Vector | None:
    data, target = dims.value(node.input(0)), dims.value(node.input(1))
    if data is None or target is None or len(target.terms) > 1:
        return None
    if not target.terms:
        return replace(data, scalar=True)
    return replace(data, scalar=False) if target.terms[0] in (-1, len(data.terms)) else None


def _same(node: Node, dims: KnownShapes) -> Vector | None:
    return dims.value(node.input(0))


def _cast(node: Node, dims: KnownShapes) -> Vector | None:
    data = dims.value(node.input(0))
    wanted = proto.dtype_of(node.attrs.get("to", 0))
    if data is None or wanted is None or wanted not in INTEGERS[:2]:
        return None
    # A size that does not fit 32 bits cannot occur: the model as it is would fail on it.
    return replace(data, dtype=wanted) if _fits(data.terms, wanted) else None


def _fits(found: Sequence[Term | None], dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "b":
        return True
    info = np.iinfo(dtype)
    return all(info.min <= term <= info.max for term in found if isinstance(term, int))


def _elementwise(combine: Callable[[Term, Term], Term | None]) -> Rule:
    def rule(node: Node, dims: KnownShapes) -> Vector | None:
        first, second = (dims.value(node.input(index)) for index in (0, 1))
        if first is None or second is None or first.dtype != second.dtype:
            return None
        rows = _aligned(first, second)
        if rows is None:
            return None
        made = tuple(None if a is None or b is None else combine(a, b) for a, b in rows)
        dtype = INTEGERS[2] if combine is _is_equal else first.dtype
        return Vector(made, dtype, first.scalar and second.scalar) if _fits(made, dtype) else None

    return rule


def _aligned(*vectors: Vector) -> list[tuple[Term | None, ...]] | None:
    lengths = {len(vector.terms) for vector in vectors} - {1}
    if len(lengths) > 1:
        return None
    length = lengths.pop() if lengths else 1
    wide = (vector.terms * length if len(vector.terms) == 1 else vector.terms for vector in vectors)
    return list(zip(*wide, strict=True))


def _is_equal(first: Term, second: Term) -> Term | None:
    if first == second:
        return 1
    if isinstance(first, int) and isinstance(second, int):
        return 0
    numbers = [term for term in (first, second) if isinstance(term, int) and term < 0]
    sizes = [term for term in (first, second) if symbols.is_size(term)]
    return 0 if numbers and sizes else None


def _where(node: Node, dims: KnownShapes) -> Vector | None:
    condition, first, second = (dims.value(node.input(index)) for index in range(3))
    if condition is None or first is None or second is None or first.dtype != second.dtype:
        return None
    rows = _aligned(condition, first, second)
    if rows is None:
        return None
    made = tuple(None if choice is None else yes if choice else no for choice, yes, no in rows)
    return Vector(made, first.dtype, condition.scalar and first.scalar and second.scalar)


def _constant_of_shape(node: Node, dims: KnownShapes) -> Vector | None:
    length, value = number(dims.value(node.input(0))), node.attrs.get("value")
    if length is None or not 0 <= length <= MAX_LENGTH or not isinstance(value, onnx.AttributeProto):
        return None
    values = files.decode(value.t, None)
    if values.dtype not in INTEGERS:
        return None
    return Vector((int(values.reshape(-1)[0]),) * length, values.dtype)


def _reduce_prod(node: Node, dims: KnownShapes) -> Vector | None:
    data = dims.value(node.input(0))
    if data is None or data.scalar or node.attrs.get("noop_with_empty_axes"):
        return None
    result = symbols.product(term for term in data.terms if term is not None)
    known = None not in data.terms and _fits((result,), data.dtype)
    return replace(data, terms=(result if known else None,), scalar=not node.attrs.get("keepdims", 1))


RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Identity": _same,
    "Cast": _cast,
    "Add": _elementwise(symbols.plus),
    "Sub": _elementwise(symbols.minus),
    "Mul": _elementwise(symbols.times),
    "Div": _elementwise(symbols.over),
    "Equal": _elementwise(_is_equal),
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _reduce_prod,
}
MATCHES = frozenset(RULES)
