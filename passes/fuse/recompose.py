"""Operators that exporters and older opsets take apart, put together again.

Only where ONNX Runtime is not slower for it: it computes GELU and normalizations as one either way, HardSwish
in two steps either way; Swish it takes apart in a slower way than the one it was in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Attribute, Node, Shape, Tensor
from onnxslim.ir.model import constant_of
from onnxslim.passes import predicates
from onnxslim.passes.fuse import formula
from onnxslim.passes.fuse.formula import TOLERANCE, Formula, Polynomial

# Half precision overflows between the steps where the whole operator does not, and for double precision ONNX
# Runtime lacks kernels.
_DTYPE = np.dtype(np.float32)


@dataclass(frozen=True)
class Found:
    """An operator that was taken apart.

    Attributes:
        op, attrs, inputs: the operator.
        last: the node that makes its result.
        inner: all other nodes it consists of.
    """

    op: str
    inputs: tuple[Tensor, ...]
    attrs: dict[str, Attribute]
    last: Node
    inner: tuple[Node, ...]


class Recompose(Rule[Found]):
    """A rule that puts one operator in the place of several."""

    def check(self, match: Found, edit: Editor) -> str | None:
        if edit.dtype(match.inputs[0]) != _DTYPE:
            return f"{match.op} is put together for single precision only"
        if not is_closed(match.last, match.inner, edit):
            return f"something else reads a step of what could be a {match.op}"
        return None

    def rewrite(self, match: Found, edit: Editor) -> str:
        edit.replace_node(match.last, match.op, list(match.inputs), match.attrs)
        return f"made it a {match.op}"


def is_closed(last: Node, inner: Iterable[Node], edit: Editor) -> bool:
    """Whether nothing but these nodes reads what the inner ones make."""
    inside = {id(last), *(id(node) for node in inner)}
    return not any(
        edit.is_output(made) or any(id(reader) not in inside for reader in made.outputs)
        for node in inner
        for made in node.outputs
    )


# ---------------------------------------------------------------------------------------- activations


def _ancestors(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor is computed from, nearest first, over a few operators."""
    seen = [tensor]
    for current in seen:
        yield current
        node = predicates.made_by(current, *formula.MATCHES) if len(seen) < 16 else None
        for read in node.inputs if node else ():
            if all(read is not other for other in seen):
                seen.append(read)


def _results(tensor: Tensor, edit: Editor) -> Iterator[Node]:
    """What is computed from a tensor one step after the other, each of which only the next one reads."""
    for _ in range(4):
        node = edit.sole_consumer(tensor)
        if node is None or node.op not in ("Add", "Mul", "Div"):
            return
        yield node
        tensor = node.outputs[0]


def _whole(
    function: Node, argument: Polynomial, result: Polynomial, edit: Editor
) -> tuple[Tensor, Node, tuple[Node, ...]] | None:
    """x, the last node and all others of a formula of x and a function of another formula of x."""
    made = function.outputs[0]
    for x in _ancestors(function.inputs[0]):
        before = Formula(function.inputs[0], x, None, edit)
        if not before.is_close(argument):
            continue
        for last in _results(made, edit):
            after = Formula(last.outputs[0], x, made, edit)
            if after.is_close(result):
                inner = {**before.nodes, **after.nodes, id(function): function}
                del inner[id(last)]
                return x, last, tuple(inner.values())
    return None


_HALVED: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_GELU: dict[str, tuple[Polynomial, dict[str, Attribute]]] = {
    "Erf": ({(1, 0): math.sqrt(0.5)}, {}),
    "Tanh": (
        {(1, 0): math.sqrt(2 / math.pi), (3, 0): 0.044715 * math.sqrt(2 / math.pi)},
        {"approximate": "tanh"},
    ),
}


class Gelu(Recompose):
    """x/2 * (1 + erf(x / sqrt(2))) and x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) are Gelu(x)."""

    name = "gelu"
    ops = frozenset(_GELU)
    matches = formula.MATCHES
    makes = frozenset(("Gelu",))
    since: ClassVar[int] = 20

    def pattern(self, node: Node, edit: Editor) -> Found | None:
        argument, attrs = _GELU[node.op]
        found = _whole(node, argument, _HALVED, edit)
        return Found("Gelu", (found[0],), attrs, found[1], found[2]) if found else None


class HardSwish(Recompose):
    """x * HardSigmoid(x) and x * Clip(x + 3, 0, 6) / 6 are HardSwish(x)."""

    name = "hard-swish"
    ops = frozenset(("HardSigmoid", "Clip"))
    matches = formula.MATCHES
    makes = frozenset(("HardSwish",))
    since: ClassVar[int] = 14

    def pattern(self, node: Node, edit: Editor) -> Found | None:
        high = _high(node)
        if high is None:
            return None
        argument: Polynomial = {(1, 0): high / 6, (0, 0): high / 2} if node.op == "Clip" else {(1, 0): 1.0}
        found = _whole(node, argument, {(1, 1): 1 / high}, edit)
        return Found("HardSwish", (found[0],), {}, found[1], found[2]) if found else None


def _high(node: Node) -> float | None:
    """The upper bound of a Clip from zero, or of a HardSigmoid that HardSwish has in it."""
    if node.op == "HardSigmoid":
        fits = abs(node.attrs.get("alpha", 0.2) * 6 - 1) <= TOLERANCE and node.attrs.get("beta", 0.5) == 0.5
        return 1.0 if fits else None
    low = node.attrs.get("min", predicates.number(predicates.constant(node, 1)))
    high = node.attrs.get("max", predicates.number(predicates.constant(node, 2)))
    return float(high) if low == 0 and high is not None and 0 < high < math.inf else None


# ------------------------------------------------------------------------------------- normalizations


@dataclass(frozen=True)
class Quotient:
    """A product of a tensor and a constant over the root of a mean of squares.

    Attributes:
        data: what is divided, which is also what is squared.
        scale: the constant.
        mean: the node that takes the mean of the squares.
        epsilon: what is added to it.
        inner: all nodes but the last.
    """

    data: Tensor
    scale: Tensor
    mean: Node
    epsilon: float
    inner: tuple[Node, ...]


class Normalization(Recompose):
    """w (x - m) / sqrt(mean (x - m)^2 + e) with m = mean x is a LayerNormalization; with m = 0 an RMS one.

    The means run over the last axes, and the constant w has one value for each element there.
    """

    name = "normalization"
    ops = frozenset(("Mul", "Div"))
    matches = frozenset(("Add", "Pow", "Reciprocal", "ReduceMean", "Sqrt", "Sub"))
    makes = frozenset(("LayerNormalization", "RMSNormalization"))
    since: ClassVar[int] = 17

    def pattern(self, node: Node, edit: Editor) -> Found | None:
        found = _quotient(node, edit)
        if found is None:
            return None
        centred = _centred(found)
        source = centred[0] if centred else found.data
        axis = _first_axis(found.mean, edit.shape(source))
        scale = None if axis is None else _scale(found.scale, edit.shape(source), axis)
        if axis is None or scale is None or (centred is None and edit.opset < 23):
            return None
        op = "LayerNormalization" if centred else "RMSNormalization"
        inner = (*found.inner, *centred[1]) if centred else found.inner
        return Found(op, (source, scale), {"axis": axis, "epsilon": found.epsilon}, node, inner)


def _quotient(node: Node, edit: Editor) -> Quotient | None:
    above, below, inner = _terms(node, edit)
    scales = [tensor for tensor in above if constant_of(tensor) is not None]
    others = [tensor for tensor in above if constant_of(tensor) is None]
    if len(scales) != 1 or len(others) != 1 or len(below) != 1:
        return None
    root = predicates.made_by(below[0], "Sqrt")
    shifted = predicates.made_by(root.inputs[0], "Add") if root else None
    for side in (0, 1) if root and shifted else ():
        epsilon = predicates.plain_number(predicates.constant(shifted, 1 - side)) if shifted else None
        mean = predicates.made_by(shifted.inputs[side], "ReduceMean") if shifted else None
        square = predicates.made_by(mean.inputs[0], "Pow", "Mul") if mean else None
        if root and shifted and mean and square and _squares(square, others[0]) and epsilon and epsilon > 0:
            nodes = (*inner, root, shifted, mean, square)
            return Quotient(others[0], scales[0], mean, epsilon, nodes)
    return None


def _terms(node: Node, edit: Editor) -> tuple[list[Tensor], list[Tensor], list[Node]]:
    """What is multiplied, what that is divided by, and the nodes that do it, but for the last one."""
    above, below, inner = list[Tensor](), list[Tensor](), list[Node]()
    pending = [node]
    while pending:
        current = pending.pop()
        if current is not node:
            inner.append(current)
        factors = [] if current.op == "Reciprocal" else [current.inputs[0]]
        (factors if current.op == "Mul" else below).append(current.inputs[-1])
        for tensor in factors:
            maker = predicates.made_by(tensor, "Mul", "Div", "Reciprocal")
            if maker is not None and edit.sole_consumer(tensor) is current and len(inner) < 4:
                pending.append(maker)
            elif predicates.plain_number(constant_of(tensor)) != 1:
                above.append(tensor)
    return above, below, inner


def _squares(node: Node, data: Tensor) -> bool:
    """Whether a Pow or Mul makes the square of a tensor."""
    if node.inputs[0] is not data:
        return False
    return (
        node.inputs[1] is data
        if node.op == "Mul"
        else predicates.plain_number(predicates.constant(node, 1)) == 2
    )


def _centred(found: Quotient) -> tuple[Tensor, tuple[Node, Node]] | None:
    """The tensor whose mean, over the same axes, was subtracted, and the nodes that did it."""
    difference = predicates.made_by(found.data, "Sub")
    mean = predicates.made_by(difference.inputs[1], "ReduceMean") if difference else None
    if difference is None or mean is None or mean.inputs[0] is not difference.inputs[0]:
        return None
    same = _axes(mean) == _axes(found.mean) and mean.attrs.get("keepdims", 1)
    return (difference.inputs[0], (difference, mean)) if same else None


def _axes(node: Node) -> tuple[int, ...] | None:
    return predicates.ints(node, "axes", 1)


def _first_axis(mean: Node, shape: Shape) -> int | None:
    """The axis from which on a mean runs over all, counted from the end; None if it does not."""
    axes = _axes(mean)
    if shape is None or not axes or not mean.attrs.get("keepdims", 1):
        return None
    reduced = predicates.positive_axes(axes, len(shape))
    return -len(axes) if reduced == tuple(range(len(shape)))[-len(axes) :] else None


def _scale(tensor: Tensor, shape: Shape, axis: int) -> Tensor | None:
    """A constant that has the shape of the last axes."""
    values = constant_of(tensor)
    return tensor if values is not None and shape is not None and values.shape == shape[axis:] else None


class NormalizationBias(Rule[Found]):
    """A constant added to a LayerNormalization is its bias."""

    name = "normalization-bias"
    ops = frozenset(("Add",))
    matches = makes = frozenset(("LayerNormalization",))
    since: ClassVar[int] = 17

    def pattern(self, node: Node, edit: Editor) -> Found | None:
        for side in (0, 1):
            norm = predicates.made_by(node.inputs[side], "LayerNormalization")
            if norm is not None and edit.sole_consumer(node.inputs[side]) is node and norm.input(2) is None:
                inputs = (*norm.inputs[:2], node.inputs[1 - side])
                return Found(norm.op, inputs, dict(norm.attrs), node, (norm,))
        return None

    def check(self, match: Found, edit: Editor) -> str | None:
        _, scale, added = match.inputs
        shapes = [None if values is None else values.shape for values in map(constant_of, (scale, added))]
        if shapes[0] is None or shapes[0] != shapes[1] or match.inner[0].outputs[1:]:
            return "what is added is not one constant for each element that is normalized"
        return None

    def rewrite(self, match: Found, edit: Editor) -> str:
        edit.replace_node(match.last, match.op, list(match.inputs), match.attrs)
        return f"made it the bias of {match.inner[0].label}"


RULES = (Gelu(), HardSwish(), Normalization(), NormalizationBias())
