"""Linear systems solved by conjugate gradients (Hestenes and Stiefel, 1952), many side by side.

They pay where a matrix is known by what it does to a vector, and where every output has a system of its own:
which weights of a layer may change, or which entry of a table each of them reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

# Steps that are enough where no more than a start is wanted: codes change afterwards, or masks.
STEPS = 12
# What is left of the error, in a norm of the gradient, that ends them.
_ENOUGH = 1e-12
# Curvature along a direction, relative to that of the diagonal, that is rounding in single precision.
_FLAT = 1e-5


def conjugate_gradients(
    times: Callable[[Doubles], NDArray[Any]], right: Doubles, diagonal: Doubles, steps: int = STEPS
) -> Doubles:
    """Solutions of A x = b after a few steps from zero; zero where the diagonal is.

    Args:
        times: multiplies vectors, along the last axis, each by its A, which is symmetric and has no negative
            eigenvalues.
        right: b, vectors along the last axis.
        diagonal: of matrices like A, not negative; broadcasts against b.
        steps: at the most.
    """
    found, left = np.zeros_like(right), right.copy()
    along, before = np.zeros_like(right), np.ones((*right.shape[:-1], 1))
    enough: Doubles | None = None
    for _ in range(steps):
        ahead = np.divide(left, diagonal, out=np.zeros_like(left), where=diagonal > 0)
        power = _product(left, ahead)
        enough = _ENOUGH * power if enough is None else enough
        along = ahead + power / before * along
        moved = np.asarray(times(along), np.float64)
        bend, least = _product(along, moved), _FLAT * _product(along, diagonal * along)
        open_ = (power > enough) & (bend > least)  # else what is left is rounding of the products
        if not open_.any():
            break
        share = np.divide(power, bend, out=np.zeros_like(power), where=open_)
        found += share * along
        left -= share * moved
        before = np.where(power > 0, power, 1.0)
    return found


def _product(one: Doubles, other: Doubles) -> Doubles:
    return np.asarray(np.einsum("...k,...k->...", one, other)[..., None])
