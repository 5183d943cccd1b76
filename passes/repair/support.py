"""Sparse weights, and the one rule that keeps them sparse: what is zero in one of them stays zero.

A weight of which a share of at least `LEAST_ZEROS` is exactly zero is sparse, whoever made it so. Fits to
data, integers and codes of few bits then change the others alone (`passes.sparsify` makes no weight with
fewer zeros).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.passes.repair.conjugate import conjugate_gradients

Mask: TypeAlias = NDArray[np.bool_]

LEAST_ZEROS = 0.1
# Steps of conjugate gradients; the bundled networks' layers lose 1e-3 of what they still lose after 30.
STEPS = 30


def support(weight: NDArray[Any]) -> Mask | None:
    """Where a sparse weight is not zero; None if it is not sparse."""
    found = weight != 0
    return found if np.count_nonzero(found) <= (1.0 - LEAST_ZEROS) * found.size else None


def within(wanted: NDArray[Any], mask: Mask, curvature: NDArray[Any], steps: int = STEPS) -> NDArray[Any]:
    """The weights that do most nearly what others do, and are zero outside a mask.

    With C the curvature and E the difference, E C E^T is least: what is not zero makes up for what is.

    Args:
        wanted: weights, or changes of them, (groups, outputs, inputs).
        mask: where they may be, of the same shape.
        curvature: covariances of inputs (groups, inputs, inputs), with a positive diagonal.
        steps: of conjugate gradients, at the most.

    Returns:
        Of the type of `wanted`.
    """
    start = np.where(mask, wanted, 0.0)
    flat = curvature.astype(wanted.dtype, copy=False)

    def times(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.where(mask, values.astype(wanted.dtype) @ flat, 0.0))

    right = times(wanted - start).astype(np.float64)
    diagonal = np.where(mask, np.einsum("gkk->gk", curvature)[:, None], 0.0)
    change = conjugate_gradients(times, right, diagonal, steps)
    return np.asarray(start + change, wanted.dtype)
