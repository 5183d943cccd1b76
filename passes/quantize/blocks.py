"""Weights of few bits, with a scale for each block of the inputs of an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.passes.quantize.weights import TINY, Weights

# Parts of the scale that clips nothing, of which the one of least squared error is taken. With codes of eight
# bits it is almost always that scale itself.
_PARTS = tuple(np.linspace(0.7, 1.05, 15, dtype=np.float32))
_WIDE = 8


@dataclass(frozen=True)
class Blocking:
    """How weights are coded in blocks.

    Attributes:
        bits: of a code, in two's complement: all of them are used, the lowest included.
        size: inputs of an output that share a scale; runtimes take powers of two from 16 on.
        signed: whether a scale may be negative, so that the lowest code, which has no opposite, goes to the
            largest weight on either side. TensorRT takes none.
    """

    bits: int = 4
    size: int = 32
    signed: bool = True

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest code."""
        return -self.low - 1

    def spread(self, values: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
        """Values of blocks [blocks, outputs] for each input of them."""
        return np.repeat(values, self.size, axis=0)[:inputs]


@dataclass(frozen=True)
class Blocks:
    """A matrix in integers.

    Attributes:
        codes: int8 [inputs, outputs].
        scales: float32 [blocks, outputs], finite, not zero.
        blocking: of the codes.
        zeros: codes of zero, int8 [blocks, outputs]; None if all are 0.
    """

    codes: NDArray[np.int8]
    scales: Weights
    blocking: Blocking
    zeros: NDArray[np.int8] | None = None

    def values(self) -> Weights:
        """What the codes stand for, as DequantizeLinear computes it."""
        count = len(self.codes)
        steps = self.blocking.spread(self.scales, count)
        if self.zeros is None:
            return np.asarray(self.codes * steps, np.float32)
        zeros = np.repeat(self.zeros.astype(np.int16), self.blocking.size, axis=0)[:count]
        return np.asarray((self.codes - zeros) * steps, np.float32)


# From a matrix [inputs, outputs] to its integers.
Rounding: TypeAlias = Callable[[Weights], Blocks]


def nearest(matrix: Weights, blocking: Blocking, heard: NDArray[np.float64] | None = None) -> Blocks:
    """The nearest codes, with scales of least squared error.

    Args:
        matrix: float32 [inputs, outputs], finite.
        blocking: how to code them.
        heard: how much errors of each input's weights count; all the same by default.
    """
    weight = np.ones(len(matrix)) if heard is None else heard + 0.01 * heard.mean() + 1e-30
    scales = _scales(matrix, blocking, weight)
    steps = blocking.spread(scales, len(matrix))
    codes = np.rint(matrix / steps).clip(blocking.low, blocking.high).astype(np.int8)
    return Blocks(codes, scales, blocking)


def _scales(matrix: Weights, blocking: Blocking, weight: NDArray[np.float64]) -> Weights:
    """For each block of inputs and each output the scale of least squared error."""
    low, high, size = blocking.low, blocking.high, blocking.size
    padding = -len(matrix) % size
    blocks = np.pad(matrix, ((0, padding), (0, 0))).reshape(-1, size, matrix.shape[1])
    counts = np.pad(weight / weight.max(), (0, padding)).astype(np.float32).reshape(-1, size, 1)
    top, bottom = blocks.max(axis=1), blocks.min(axis=1)
    # The lowest code is one further from zero than the highest, and takes the side that reaches further.
    flipped = (top > -bottom) if blocking.signed else np.zeros(top.shape, bool)
    full = np.maximum(top / np.where(flipped, -low, high), bottom / np.where(flipped, -high, low))
    full = np.where(full > 0, np.maximum(full, TINY), 1.0).astype(np.float32)
    full = np.where(flipped, -full, full)
    if blocking.bits >= _WIDE:
        return np.asarray(full)
    best, least = full, np.full(full.shape, np.inf)
    for part in _PARTS:
        steps = (full * part)[:, None]
        error = np.rint(blocks / steps).clip(low, high) * steps - blocks
        squared = (counts * np.square(error)).sum(axis=1)
        best = np.where(squared < least, full * part, best)
        least = np.minimum(squared, least)
    return np.asarray(best, np.float32)
