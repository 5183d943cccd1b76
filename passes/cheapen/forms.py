"""Functions of one value that runtimes may compute faster than those of a model, with values that are fitted.

Of two kinds. A formula is the same function in other operators: kernels that compute many values at a time
are rarer than operators. An approximation is another function, which comes close where the data are; its
values are those of least squared error on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import minimize

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Array, Attribute, Constant, Node, Tensor

MATCHES = ("Celu", "Elu", "Mish", "Selu", "Softplus")
MAKES = (
    *("Abs", "Add", "Clip", "Div", "Exp", "HardSigmoid", "HardSwish", "LeakyRelu"),
    *("Log", "Min", "Mul", "Neg", "Relu", "Sigmoid", "Sub"),
)

Values: TypeAlias = tuple[float, ...]
# Beyond this e^x stays finite in single precision when it is squared, and Mish is x.
LARGE = 20.0


@dataclass(frozen=True, eq=False)
class Term:
    """An operator applied to terms, to numbers and to the input of the function, which is None.

    Attributes:
        op: of the standard.
        args: its inputs; a term that is used twice is computed once.
        attrs: its attributes.
    """

    op: str
    args: tuple[Term | float | None, ...]
    attrs: Mapping[str, Attribute] = field(default_factory=dict)


def term(op: str, *args: Term | float | None, **attrs: Attribute) -> Term:
    """See `Term`."""
    return Term(op, args, attrs)


def write(edit: Editor, node: Node, whole: Term, data: Tensor, dtype: np.dtype[Any]) -> None:
    """Have a term make the output of a node in its place.

    Args:
        edit: of its model.
        node: makes one output.
        whole: the term.
        data: its input.
        dtype: of that.
    """
    made, stem = dict[int, Tensor](), node.outputs[0].name

    def value(arg: Term | float | None) -> Tensor:
        if arg is None:
            return data
        if not isinstance(arg, Term):
            return Constant(edit.name(f"{stem}_value"), np.asarray(arg, dtype))
        if id(arg) not in made:
            inputs = [value(each) for each in arg.args]
            made[id(arg)] = out = edit.variable(f"{stem}_{arg.op.lower()}", data)
            edit.add(node, arg.op, inputs, [out], arg.attrs)
        return made[id(arg)]

    edit.replace_node(node, whole.op, [value(each) for each in whole.args], whole.attrs)


@dataclass(frozen=True)
class Spelling:
    """The same function in other operators, up to rounding in single precision.

    Attributes:
        name: in options and reports.
        op: the operator that it stands for.
        spelled: from a node to the term.
        since: version of the standard operators that it needs.
    """

    name: str
    op: str
    spelled: Callable[[Node], Term]
    since: int = 8


@dataclass(frozen=True)
class Approximation:
    """Another function.

    Attributes:
        name: in options and reports.
        curve: what it makes of an array, with these values.
        spelled: the term with these values.
        start: values to begin with.
        since: version of the standard operators that it needs.
    """

    name: str
    curve: Callable[..., Array]
    spelled: Callable[..., Term]
    start: Values = ()
    since: int = 7

    def fitted(self, at: Array, wanted: Array) -> tuple[Values, float]:
        """Values of the least squared error, and its share of the variance of what is wanted.

        By the simplex method (Nelder and Mead, 1965), as curves have corners.

        Args:
            at: places, as many of each as it counts.
            wanted: values there, which differ.
        """
        at, wanted = at.astype(np.float64), wanted.astype(np.float64)

        def lost(values: Any) -> float:
            return float(np.square(self.curve(at, *values) - wanted).mean())

        found = self.start
        if found:
            start = np.array(found, np.float64)
            result = minimize(lost, start, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-9})
            found = tuple(float(np.float32(value)) for value in result.x)
        return found, lost(found) / float(wanted.var())


def _mish(node: Node) -> Term:
    """x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2)."""
    power = term("Exp", term("Min", None, LARGE))
    whole = term("Mul", power, term("Add", power, 2.0))
    return term("Mul", None, term("Div", whole, term("Add", whole, 2.0)))


def _softplus(node: Node) -> Term:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)."""
    small = term("Exp", term("Neg", term("Abs", None)))
    return term("Add", term("Relu", None), term("Log", term("Add", small, 1.0)))


def _exponential(scale: float, width: float = 1.0) -> Term:
    """max(x, 0) + scale (e^(min(x, 0) / width) - 1)."""
    below: Term = term("Min", None, 0.0)
    inner = below if width == 1.0 else term("Mul", below, 1.0 / width)
    bent = term("Sub", term("Exp", inner), 1.0)
    return term("Add", term("Relu", None), bent if scale == 1.0 else term("Mul", bent, scale))


def _alpha(node: Node, default: float = 1.0) -> float:
    return float(node.attrs.get("alpha", default))


def _selu(node: Node) -> Term:
    alpha, gamma = _alpha(node, 1.6732632423543772), float(node.attrs.get("gamma", 1.0507009873554805))
    return term("Mul", _exponential(alpha), gamma)


def _gate(x: Array, slope: float, offset: float) -> Array:
    return np.asarray(np.clip(slope * x + offset, 0.0, 1.0))


def _swish(x: Array, slope: float) -> Array:
    return np.asarray(x / (1.0 + np.exp(-np.clip(slope * x, -50.0, 50.0))))


FORMULAS = (
    Spelling("mish", "Mish", _mish),
    Spelling("softplus", "Softplus", _softplus),
    Spelling("elu", "Elu", lambda node: _exponential(_alpha(node))),
    Spelling("celu", "Celu", lambda node: _exponential(_alpha(node), _alpha(node))),
    Spelling("selu", "Selu", _selu),
)
APPROXIMATIONS = (
    Approximation("relu", lambda x: np.maximum(x, 0.0), lambda: term("Relu", None)),
    Approximation(
        "leaky_relu",
        lambda x, slope: np.where(x < 0, slope * x, x),
        lambda slope: term("LeakyRelu", None, alpha=slope),
        (0.1,),
    ),
    Approximation(
        "hard_swish", lambda x: x * _gate(x, 1 / 6, 0.5), lambda: term("HardSwish", None), since=14
    ),
    Approximation(
        "hard_gate",
        lambda x, slope, offset: x * _gate(x, slope, offset),
        lambda slope, offset: term("Mul", None, term("HardSigmoid", None, alpha=slope, beta=offset)),
        (1 / 6, 0.5),
    ),
    Approximation(
        "swish",
        _swish,
        lambda slope: term("Mul", None, term("Sigmoid", term("Mul", None, slope))),
        (1.0,),
    ),
    Approximation(
        "hard_sigmoid",
        _gate,
        lambda slope, offset: term("HardSigmoid", None, alpha=slope, beta=offset),
        (0.2, 0.5),
    ),
    Approximation(
        "clip",
        lambda x, low, high: np.clip(x, min(low, high), max(low, high)),
        lambda low, high: term("Clip", None, min(low, high), max(low, high)),
        (-0.9, 0.9),
        since=11,
    ),
)
NAMES = tuple(form.name for form in (*FORMULAS, *APPROXIMATIONS))
