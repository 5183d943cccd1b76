"""The change of weights that brings a layer's output closest to another one, from second moments alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from onnxslim.calibration.gram import Doubles, Gram
from onnxslim.passes.repair.support import Mask, within

Method: TypeAlias = Literal["ridge", "bias"]

# Strengths to choose from, in units of the mean square of an input.
STRENGTHS = tuple(10.0**power for power in range(1, -8, -1))
# Where to look first.
USUAL = STRENGTHS[len(STRENGTHS) // 3]
# Outputs per group that a strength is chosen by; whether it helps is then decided by all. Not tuned.
FEW = 128
# A dead input has no variance of its own to scale the strength by.
_FLOOR = 1e-9


@dataclass(frozen=True, eq=False)
class Fit:
    """Change d W and shift d b of a layer y = W x + b.

    Attributes:
        weight: d W, shape (groups, outputs, inputs); None if W had best stay what it is.
        bias: d b, shape (groups, outputs); zero if there is to be none.
        strength: of the regularization; infinite where W stays.
        before, after: mean squared error per row on the samples to choose by, of the present weights and of
            those found on the other samples.
    """

    weight: Doubles | None
    bias: Doubles
    strength: float
    before: float
    after: float


def fit(
    train: Gram,
    tune: Gram,
    *,
    method: Method = "ridge",
    bias: bool = True,
    mask: Mask | None = None,
    near: float = USUAL,
) -> Fit:
    """Regress what a layer's output lacks on its input, with a penalty on the change.

    Minimises E|r - D x - d|^2 + s m |D|^2 over D and d, m the mean square of an input of the group. Shrinking
    the change instead of the weights keeps what the data says nothing about. s is the strength with the least
    error on those to choose by, which takes their moments alone; the weights then come from all samples.

    Args:
        train, tune: moments of x and r = wanted - present output, of two disjoint sets of samples.
        method: "bias" leaves W as it is.
        bias: whether there is a d.
        mask: what may change of W, of its shape (groups, outputs, inputs); all of it by default.
        near: the one of `STRENGTHS` to go downhill from.
    """
    start, check = _centred(train, tune, bias=bias)
    before = float(tune.around(tune.x_mean, np.zeros_like(tune.y_mean)).power.sum())
    candidates = [(float(check.power.sum()), np.inf)]
    if method == "ridge":
        strength = _downhill(_few(start), _few(check), near)
        candidates.append((_error(solved(start, strength, mask), check), strength))
    after, strength = min(candidates)
    whole = train.joined(tune)
    centred = whole if bias else whole.raw()
    shift = centred.y_mean
    weight = None if strength == np.inf else solved(centred, strength, mask)
    if weight is not None:
        shift = shift - (weight @ centred.x_mean[..., None])[..., 0]
    return Fit(weight, shift if bias else np.zeros_like(shift), strength, before, after)


def _few(moments: Gram) -> Gram:
    """Of some outputs, evenly spread: enough to choose a strength by."""
    every = -(-moments.power.shape[1] // FEW)
    return replace(moments, cross=moments.cross[:, ::every], power=moments.power[:, ::every])


def _downhill(train: Gram, tune: Gram, near: float) -> float:
    """The strength of least error, downhill from another one."""

    def error(index: int) -> float:
        return _error(solved(train, STRENGTHS[index]), tune)

    return STRENGTHS[downhill(error, len(STRENGTHS), STRENGTHS.index(near))]


def downhill(error: Callable[[int], float], count: int, at: int) -> int:
    """Which of so many choices has the least error, from one of them on: there is one valley as a rule."""
    errors = dict[int, float]()
    while True:
        for index in (at - 1, at, at + 1):
            if index not in errors and 0 <= index < count:
                errors[index] = error(index)
        best = min(errors, key=lambda index: (errors[index], index))
        if best == at:
            return at
        at = best


def _centred(train: Gram, tune: Gram, *, bias: bool) -> tuple[Gram, Gram]:
    """Both around the means of the first; around zero where no bias can take them up."""
    if not bias:
        return train.raw(), tune.raw()
    return train, tune.around(train.x_mean, train.y_mean)


def ridge(moments: Gram, strength: float) -> Doubles:
    """What a strength adds to the diagonal of each group's moments, shape (groups, 1, 1)."""
    mean = np.trace(moments.gram, axis1=1, axis2=2) / moments.gram.shape[-1]
    return np.asarray(strength * mean + _FLOOR * mean.mean() + np.finfo(np.float32).tiny)[:, None, None]


def solved(moments: Gram, strength: float, mask: Mask | None = None) -> Doubles:
    """The ridge regression on moments that are centred as they should be, within a mask if there is one."""
    if not moments.gram.shape[-1]:
        return np.zeros_like(moments.cross)
    matrix = moments.gram.copy()
    np.einsum("gkk->gk", matrix)[...] += ridge(moments, strength)[..., 0]
    found = np.asarray(np.linalg.solve(matrix, moments.cross.swapaxes(1, 2)).swapaxes(1, 2))
    return found if mask is None else np.asarray(within(found, mask, matrix))


def _error(weight: Doubles, moments: Gram) -> float:
    """Mean squared residual of a linear map, summed over outputs."""
    explained = 2 * moments.cross - weight @ moments.gram
    return float(moments.power.sum() - (weight * explained).sum())
