"""Weights refitted to what comes out behind an activation.

A regression of y on x counts errors that an activation f hides, such as those among negative values before a
Relu. What counts is E|f(y) - f(W x + b)|^2 (Zhang et al., "Accelerating Very Deep Convolutional Networks for
Classification and Detection", TPAMI 2016, who alternate between W and an auxiliary output). Here its gradient
is taken at the rows and preconditioned by the moments of x, which are the same for all outputs: every step
is a ridge regression of f'(Wx) (f(y) - f(Wx)) / max f'^2, all with one factorization, so that where f is a
straight line the first one ends at the ridge regression. Steps have Nesterov's momentum ("A method for
solving the convex programming problem with convergence rate O(1/k^2)", 1983).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from onnxslim.calibration.gram import Doubles, Gram
from onnxslim.ops.layers import Floats
from onnxslim.passes.repair.activation import Table
from onnxslim.passes.repair.solve import Fit, ridge, solved

STEPS = 10
# Steps without a new best after which there will be none.
_PATIENCE = 2


class Rows(NamedTuple):
    """What a layer sees, and what it should make and makes of it.

    Attributes:
        x: inputs, shape (groups, inputs, positions).
        wanted, present: before the activation, shape (groups, outputs, positions).
    """

    x: Floats
    wanted: Floats
    present: Floats


@dataclass(frozen=True)
class _Change:
    """D (x - mean) + shift, to be added to the present output."""

    weight: Doubles
    shift: Doubles

    def __call__(self, rows: Rows, mean: Doubles) -> Floats:
        offset = self.shift - (self.weight @ mean[..., None])[..., 0]
        made = self.weight.astype(np.float32) @ rows.x
        made += offset[..., None].astype(np.float32)
        made += rows.present
        return np.asarray(made)

    def beyond(self, other: _Change, share: float) -> _Change:
        """This, and a share of the way from another one to it."""
        weight = self.weight + share * (self.weight - other.weight)
        return _Change(weight, self.shift + share * (self.shift - other.shift))


def gradient_refine(
    linear: Fit,
    train: tuple[Gram, Sequence[Rows]],
    tune: tuple[Gram, Sequence[Rows]],
    function: Table,
    *,
    bias: bool = True,
) -> Fit:
    """Go on from the best linear fit, as far as what is chosen by wants it.

    Args:
        linear: found by `solve.fit`.
        train, tune: moments of x and of wanted - present output, and the rows they are of; without
            inputs, the shift alone is fitted.
        function: what the outputs go through.
        bias: whether there is a shift.

    Returns:
        The change of least error behind the function, which `before` and `after` are of: none, the linear one
        or one after some steps, which are then repeated on all rows.
    """
    fitted_on, chosen_by = ([_behind(rows, function) for rows in part] for _, part in (train, tune))
    errors = [_error(chosen_by, function, None, train[0].x_mean)]
    for change in _steps(train[0], fitted_on, function, linear.strength, bias):
        errors.append(_error(chosen_by, function, change, _center(train[0], bias)))
        if len(errors) - 1 - int(np.argmin(errors)) >= _PATIENCE and len(errors) > _PATIENCE + 1:
            break
    best = int(np.argmin(errors))
    found = Fit(linear.weight, linear.bias, linear.strength, errors[0], errors[best])
    if best < 2:
        return found
    whole = train[0].joined(tune[0])
    steps = _steps(whole, (*fitted_on, *chosen_by), function, linear.strength, bias)
    change = next(islice(steps, best - 1, None))
    shift = change.shift - (change.weight @ _center(whole, bias)[..., None])[..., 0]
    weight = change.weight if change.weight.size else None
    return Fit(weight, shift, linear.strength, errors[0], errors[best])


def _behind(rows: Rows, function: Table) -> Rows:
    """With what is wanted behind the activation."""
    return rows._replace(wanted=function(rows.wanted)[0])


def _center(moments: Gram, bias: bool) -> Doubles:
    return moments.x_mean if bias else np.zeros_like(moments.x_mean)


def _steps(
    moments: Gram, parts: Sequence[Rows], function: Table, strength: float, bias: bool
) -> Iterator[_Change]:
    """The ridge regression, and up to STEPS steps from there."""
    moments = moments if bias else moments.raw()
    inputs = moments.gram.shape[-1]
    mean, penalty = _center(moments, bias), ridge(moments, strength) if inputs else np.zeros((1, 1, 1))
    inverse = np.linalg.inv(moments.gram + penalty * np.eye(inputs))
    now = last = _Change(solved(moments, strength), moments.y_mean if bias else np.zeros_like(moments.y_mean))
    yield now
    for step in range(STEPS):
        at = now.beyond(last, step / (step + 3))
        cross, shift = _gradient(parts, function, at, mean)
        last, now = (
            now,
            _Change(
                at.weight + (cross - penalty * at.weight) @ inverse, at.shift + shift if bias else at.shift
            ),
        )
        yield now


def _gradient(
    parts: Sequence[Rows], function: Table, change: _Change, mean: Doubles
) -> tuple[Doubles, Doubles]:
    """Means of the residual times x - mean, and of the residual."""
    count = sum(rows.x.shape[2] for rows in parts)
    cross, total = np.zeros(change.weight.shape), np.zeros(change.shift.shape)
    for rows in parts:
        made, slope = function(change(rows, mean))
        residual = slope * (rows.wanted - made)
        cross += residual @ rows.x.swapaxes(1, 2)
        total += residual.sum(axis=2, dtype=np.float64)
    scale = 1.0 / (count * function.steepest**2)
    return scale * (cross - total[..., None] * mean[:, None]), scale * total


def _error(parts: Sequence[Rows], function: Table, change: _Change | None, mean: Doubles) -> float:
    """Mean squared error per row behind the function."""
    total, count = 0.0, 0
    for rows in parts:
        made = rows.present if change is None else change(rows, mean)
        total += float(np.square(rows.wanted - function(made)[0], dtype=np.float64).sum())
        count += rows.x.shape[2]
    return total / count
