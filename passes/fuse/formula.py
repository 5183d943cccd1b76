"""Formulas of one tensor and numbers, as polynomials, however they are written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Node, Tensor
from onnxslim.ir.model import constant_of
from onnxslim.passes import predicates

# Factors of the products of the two atoms, by their powers.
Polynomial: TypeAlias = Mapping[tuple[int, int], float]

# No formula looked for has more operators.
MAX_NODES = 12
MAX_POWER = 4
# Numbers of a formula may be off by the rounding of single precision.
TOLERANCE = 1e-6
_X: Polynomial = {(1, 0): 1.0}
_F: Polynomial = {(0, 1): 1.0}


class Formula:
    """A tensor as a polynomial of two atoms with positive factors only, so that nothing in it cancels out.

    Args:
        root: the tensor.
        x: the first atom; it has the shape of the result.
        f: the second atom, if any.
        edit: where they are.

    Attributes:
        polynomial: None if it is none.
        nodes: the operators between atoms and result, by id.
    """

    def __init__(self, root: Tensor, x: Tensor, f: Tensor | None, edit: Editor) -> None:
        self._shape = edit.shape(x)
        self._known: dict[int, Polynomial | None] = {id(x): _X}
        if f is not None:
            self._known[id(f)] = _F
        self.nodes: dict[int, Node] = {}
        self.polynomial = self._expand(root)

    def is_close(self, wanted: Polynomial) -> bool:
        """Whether it is this polynomial, but for rounding."""
        found = self.polynomial
        return (
            found is not None
            and found.keys() == wanted.keys()
            and all(abs(found[key] - wanted[key]) <= TOLERANCE * wanted[key] for key in wanted)
        )

    def _expand(self, tensor: Tensor) -> Polynomial | None:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = self._number(tensor) or self._operation(tensor)
        return self._known[id(tensor)]

    def _operation(self, tensor: Tensor) -> Polynomial | None:
        node = predicates.made_by(tensor, *_OPERATIONS)
        if node is None or len(self.nodes) == MAX_NODES:
            return None
        self.nodes[id(node)] = node
        first = self._expand(node.inputs[0])
        second = None if first is None else self._expand(node.inputs[1])
        return None if first is None or second is None else _OPERATIONS[node.op](first, second)

    def _number(self, tensor: Tensor) -> Polynomial | None:
        """A constant of one element that does not broadcast the result to more axes."""
        values = constant_of(tensor)
        number = predicates.number(values)
        if values is None or number is None or not predicates.broadcasts_into(values.shape, self._shape):
            return None
        return {(0, 0): float(number)} if 0 < number < float("inf") else None


def _sum(first: Polynomial, second: Polynomial) -> Polynomial:
    return {key: first.get(key, 0) + second.get(key, 0) for key in (*first, *second)}


def _product(first: Polynomial, second: Polynomial) -> Polynomial:
    result: dict[tuple[int, int], float] = {}
    for (i, j), a in first.items():
        for (k, m), b in second.items():
            result[i + k, j + m] = result.get((i + k, j + m), 0) + a * b
    return result


def _quotient(first: Polynomial, second: Polynomial) -> Polynomial | None:
    divisor = second.get((0, 0)) if len(second) == 1 else None
    return None if divisor is None else {key: factor / divisor for key, factor in first.items()}


def _power(first: Polynomial, second: Polynomial) -> Polynomial | None:
    exponent = second.get((0, 0)) if len(second) == 1 else None
    if exponent not in range(1, MAX_POWER + 1):
        return None
    result = first
    for _ in range(int(exponent or 1) - 1):
        result = _product(result, first)
    return result


_OPERATIONS = {"Add": _sum, "Mul": _product, "Div": _quotient, "Pow": _power}
MATCHES = frozenset(_OPERATIONS)
