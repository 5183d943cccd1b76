"""What shape computations compute, as far as it is known without running them.

A size is a number, or a symbol that stands for one number throughout a run of the model. Vectors of sizes
are followed through the operators with which exporters take shapes apart and put them together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxslim import files, proto, quirks, shapes
from onnxslim import graph as ir
from onnxslim.graph import Constant, Node, Tensor, Variable
from onnxslim.model import DEFAULT_DOMAINS, Model, constant_of

# A number; a symbol of the model or of shape inference; an axis of a tensor; an expression over these.
Term: TypeAlias = int | str | tuple[Any, ...]

# Longer vectors than any shape computation needs are not followed.
MAX_LENGTH = 64
_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.bool_))


@dataclass(frozen=True)
class Vector:
    """A scalar or a vector of integers.

    Attributes:
        terms: its elements; None where nothing is known.
        dtype: int64, int32 or bool.
        scalar: whether it has no axis, rather than one.
    """

    terms: tuple[Term | None, ...]
    dtype: np.dtype[Any] = _INTEGERS[0]
    scalar: bool = False

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """The elements if all of them are numbers."""
        found = tuple(term for term in self.terms if isinstance(term, int))
        return found if len(found) == len(self.terms) else None

    def array(self) -> ir.Array | None:
        """The tensor, if all elements are numbers."""
        numbers = self.numbers
        if numbers is None:
            return None
        return np.array(numbers[0] if self.scalar else numbers, self.dtype)


class Dims:
    """Sizes of the axes of all tensors of a model, and what is computed from them.

    Holds for the model as it is when this is made; what is known of new constants is looked up.
    """

    def __init__(self, model: Model) -> None:
        self.opset = model.opset
        self._facts = shapes.deduce(model)
        self._values: dict[int, Vector | None] = {}
        # Tensors that an edit drops must stay, lest a new one gets the same id.
        self._kept: list[Variable] = []
        own = model.functions
        for graph in model.graphs():
            self._kept.extend(graph.inputs)
            for node in graph.nodes:
                self._kept.extend(node.outputs)
                if node.domain in DEFAULT_DOMAINS and ("", node.op) not in own:
                    self._visit(node)

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        """Type of a tensor's elements, if it is certain."""
        if isinstance(tensor, Constant):
            return tensor.dtype
        fact = self._facts.get(id(tensor))
        return fact.dtype if fact else None

    def shape(self, tensor: Tensor | None) -> tuple[Term, ...] | None:
        """Size of each axis of a tensor; None if its rank is not certain."""
        if tensor is None or isinstance(tensor, Constant):
            return tensor.shape if tensor is not None else None
        fact = self._facts.get(id(tensor))
        if fact is None or fact.shape is None:
            return None
        return tuple(
            ("axis", id(tensor), axis) if dim is None else dim for axis, dim in enumerate(fact.shape)
        )

    def sizes(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Shape of a tensor if all of it is known."""
        shape = self.shape(tensor)
        if shape is None:
            return None
        return Vector(shape).numbers

    def value(self, tensor: Tensor | None) -> Vector | None:
        """What is known of the elements of a short integer tensor."""
        if tensor is None:
            return None
        if isinstance(tensor, Constant) or ir.producer(tensor) is None:
            return _literal(tensor)
        if id(tensor) not in self._values:
            self._values[id(tensor)] = _literal(tensor)
        return self._values[id(tensor)]

    def _visit(self, node: Node) -> None:
        rule = _RULES.get(node.op)
        if rule is not None and len(node.outputs) == 1:
            found = rule(node, self)
            if found is not None and len(found.terms) <= MAX_LENGTH:
                self._values[id(node.outputs[0])] = found


def _literal(tensor: Tensor) -> Vector | None:
    if isinstance(tensor, Constant) and (len(tensor.shape) > 1 or tensor.size > MAX_LENGTH):
        return None
    if isinstance(tensor, Constant) and tensor.dtype not in _INTEGERS:
        return None
    values = constant_of(tensor)
    if values is None or values.dtype not in _INTEGERS or values.ndim > 1 or values.size > MAX_LENGTH:
        return None
    return Vector(tuple(int(item) for item in values.reshape(-1)), values.dtype, values.ndim == 0)


# --------------------------------------------------------------------------------------------- operators


def _shape(node: Node, dims: Dims) -> Vector | None:
    shape = dims.shape(node.input(0))
    if shape is None:
        return None
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    # Python's slices clamp and count from the end as the operator does.
    return Vector(tuple(shape[start:end]))


def _size(node: Node, dims: Dims) -> Vector | None:
    shape = dims.shape(node.input(0))
    return None if shape is None else Vector((_product(shape),), scalar=True)


def _gather(node: Node, dims: Dims) -> Vector | None:
    data, at = dims.value(node.input(0)), dims.value(node.input(1))
    if data is None or data.scalar or at is None or at.numbers is None:
        return None
    length = len(data.terms)
    if any(not -length <= index < length for index in at.numbers):
        return None
    return replace(data, terms=tuple(data.terms[index] for index in at.numbers), scalar=at.scalar)


def _slice(node: Node, dims: Dims) -> Vector | None:
    data = dims.value(node.input(0))
    if data is None or data.scalar or dims.opset < 10:
        return None
    parts = [dims.value(node.input(index)) for index in (1, 2, 4)]
    start, end, step = (_only(part) for part in parts)
    if node.input(4) is None:
        step = 1
    if start is None or end is None or not step or (step < 0 and end >= quirks.OPEN_END):
        return None
    return replace(data, terms=data.terms[start:end:step])


def _only(vector: Vector | None) -> int | None:
    """The one number of a vector of length one."""
    numbers = vector.numbers if vector is not None else None
    return numbers[0] if numbers is not None and len(numbers) == 1 else None


def _concat(node: Node, dims: Dims) -> Vector | None:
    parts = [dims.value(tensor) or _unknown(tensor, dims) for tensor in node.inputs]
    known = [part for part in parts if part is not None and not part.scalar]
    if len(known) != len(node.inputs) or len({part.dtype for part in known}) != 1:
        return None
    return replace(known[0], terms=tuple(term for part in known for term in part.terms))


def _unknown(tensor: Tensor, dims: Dims) -> Vector | None:
    """A vector of which no more is known than its length."""
    sizes, dtype = dims.sizes(tensor), dims.dtype(tensor)
    if sizes is None or len(sizes) != 1 or sizes[0] > MAX_LENGTH or dtype not in _INTEGERS or dtype is None:
        return None
    return Vector((None,) * sizes[0], dtype)


def _unsqueeze(node: Node, dims: Dims) -> Vector | None:
    data = dims.value(node.input(0))
    sizes = dims.sizes(node.outputs[0])
    return replace(data, scalar=False) if data is not None and sizes == (1,) else None


def _squeeze(node: Node, dims: Dims) -> Vector | None:
    data = dims.value(node.input(0))
    return replace(data, scalar=True) if data is not None and len(data.terms) == 1 else None


def _reshape(node: Node, dims: Dims) -> Vector | None:
    data, target = dims.value(node.input(0)), dims.value(node.input(1))
    if data is None or target is None or len(target.terms) > 1:
        return None
    if not target.terms:
        return replace(data, scalar=True)
    return replace(data, scalar=False) if target.terms[0] in (-1, len(data.terms)) else None


def _same(node: Node, dims: Dims) -> Vector | None:
    return dims.value(node.input(0))


def _cast(node: Node, dims: Dims) -> Vector | None:
    data = dims.value(node.input(0))
    wanted = proto.dtype_of(node.attrs.get("to", 0))
    if data is None or wanted is None or wanted not in _INTEGERS[:2]:
        return None
    # A size that does not fit 32 bits cannot occur: the model as it is would fail on it.
    return replace(data, dtype=wanted) if _fits(data.terms, wanted) else None


def _fits(terms: Sequence[Term | None], dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "b":
        return True
    info = np.iinfo(dtype)
    return all(info.min <= term <= info.max for term in terms if isinstance(term, int))


def _elementwise(combine: Callable[[Term, Term], Term | None]) -> Callable[[Node, Dims], Vector | None]:
    def rule(node: Node, dims: Dims) -> Vector | None:
        first, second = (dims.value(node.input(index)) for index in (0, 1))
        if first is None or second is None or first.dtype != second.dtype:
            return None
        pairs = _broadcast(first, second)
        if pairs is None:
            return None
        terms = tuple(None if a is None or b is None else combine(a, b) for a, b in pairs)
        dtype = _INTEGERS[2] if combine is _is_equal else first.dtype
        scalar = first.scalar and second.scalar
        return Vector(terms, dtype, scalar) if _fits(terms, dtype) else None

    return rule


def _broadcast(*vectors: Vector) -> list[tuple[Term | None, ...]] | None:
    lengths = {len(vector.terms) for vector in vectors} - {1}
    if len(lengths) > 1:
        return None
    length = lengths.pop() if lengths else 1
    wide = (vector.terms * length if len(vector.terms) == 1 else vector.terms for vector in vectors)
    return list(zip(*wide, strict=True))


def _sum(first: Term, second: Term) -> Term | None:
    if isinstance(first, int) and isinstance(second, int):
        return first + second
    if 0 in (first, second):
        return second if first == 0 else first
    return ("+", *sorted((first, second), key=repr))


def _difference(first: Term, second: Term) -> Term | None:
    if isinstance(first, int) and isinstance(second, int):
        return first - second
    if first == second:
        return 0
    return first if second == 0 else ("-", first, second)


def _times(first: Term, second: Term) -> Term:
    if isinstance(first, int) and isinstance(second, int):
        return first * second
    if 0 in (first, second):
        return 0
    if 1 in (first, second):
        return second if first == 1 else first
    return ("*", *sorted((*_factors(first), *_factors(second)), key=repr))


def _factors(term: Term) -> tuple[Any, ...]:
    return term[1:] if isinstance(term, tuple) and term[0] == "*" else (term,)


def _product(terms: Sequence[Term]) -> Term:
    product: Term = 1
    for term in terms:
        product = _times(product, term)
    return product


def _quotient(first: Term, second: Term) -> Term | None:
    if isinstance(first, int) and isinstance(second, int):
        # Integers divide towards zero.
        return None if second == 0 else abs(first) // abs(second) * (-1 if (first < 0) != (second < 0) else 1)
    return first if second == 1 else ("/", first, second)


def _is_equal(first: Term, second: Term) -> Term | None:
    if first == second:
        return 1
    if isinstance(first, int) and isinstance(second, int):
        return 0
    # Sizes are not negative; expressions may be.
    number, other = (first, second) if isinstance(first, int) else (second, first)
    size = isinstance(other, str) or (isinstance(other, tuple) and other[0] == "axis")
    return 0 if isinstance(number, int) and number < 0 and size else None


def _where(node: Node, dims: Dims) -> Vector | None:
    condition, first, second = (dims.value(node.input(index)) for index in range(3))
    if condition is None or first is None or second is None or first.dtype != second.dtype:
        return None
    rows = _broadcast(condition, first, second)
    if rows is None:
        return None
    terms = tuple(None if choice is None else yes if choice else no for choice, yes, no in rows)
    return Vector(terms, first.dtype, condition.scalar and first.scalar and second.scalar)


def _constant_of_shape(node: Node, dims: Dims) -> Vector | None:
    shape, value = dims.value(node.input(0)), node.attrs.get("value")
    length = _only(shape)
    if length is None or not 0 <= length <= MAX_LENGTH or not isinstance(value, onnx.AttributeProto):
        return None
    values = files.decode(value.t, None)
    if values.dtype not in _INTEGERS:
        return None
    return Vector((int(values.reshape(-1)[0]),) * length, values.dtype)


def _reduce_prod(node: Node, dims: Dims) -> Vector | None:
    data = dims.value(node.input(0))
    if data is None or data.scalar or node.attrs.get("noop_with_empty_axes"):
        return None
    product = _product([term for term in data.terms if term is not None])
    known = None not in data.terms and _fits((product,), data.dtype)
    return replace(data, terms=(product if known else None,), scalar=not node.attrs.get("keepdims", 1))


_RULES: dict[str, Callable[[Node, Dims], Vector | None]] = {
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
    "Add": _elementwise(_sum),
    "Sub": _elementwise(_difference),
    "Mul": _elementwise(_times),
    "Div": _elementwise(_quotient),
    "Equal": _elementwise(_is_equal),
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _reduce_prod,
}
