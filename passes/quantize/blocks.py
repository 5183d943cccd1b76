"""Weights of few bits, with a scale for each block of the inputs of an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxslim.passes.quantize.weights import TINY, Weights

Number = TypeVar("Number", bound=np.generic)
Limit: TypeAlias = NDArray[np.float32] | int
# Parts of the scale that clips nothing, of which the one of least squared error is taken. With codes of eight
# bits it is almost always that scale itself.
_PARTS = tuple(np.linspace(0.7, 1.0, 13, dtype=np.float32))
_WIDE = 8


@dataclass(frozen=True)
class Blocking:
    """How weights are coded in blocks.

    Attributes:
        bits: of a code, in two's complement: all of them are used, the lowest included.
        size: inputs of an output that share a scale; runtimes take powers of two from 16 on.
        zeros: whether each block has a code of zero of its own, so that codes reach as far to either side as
            weights do. TensorRT takes none.
    """

    bits: int = 4
    size: int = 32
    zeros: bool = True

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest code."""
        return -self.low - 1

    def spread(self, values: NDArray[Number], inputs: int) -> NDArray[Number]:
        """Values of blocks [blocks, outputs] for each input of them."""
        return np.repeat(values, self.size, axis=0)[:inputs]

    def limits(self, zeros: NDArray[np.int8] | None, inputs: int) -> tuple[Limit, Limit]:
        """The lowest and highest code of each input, counted from zero."""
        if zeros is None:
            return self.low, self.high
        middle = self.spread(zeros.astype(np.float32), inputs)
        return self.low - middle, self.high - middle


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

    def counted(self) -> NDArray[np.int16]:
        """The codes, counted from that of zero."""
        if self.zeros is None:
            return self.codes.astype(np.int16)
        zeros = self.blocking.spread(self.zeros.astype(np.int16), len(self.codes))
        return np.asarray(self.codes - zeros)

    def values(self) -> Weights:
        """What the codes stand for, as DequantizeLinear computes it."""
        steps = self.blocking.spread(self.scales, len(self.codes))
        return np.asarray(self.counted() * steps, np.float32)

    @classmethod
    def of(
        cls,
        counted: NDArray[np.float32],
        scales: Weights,
        blocking: Blocking,
        zeros: NDArray[np.int8] | None,
    ) -> Blocks:
        """The same by codes that are counted from that of zero."""
        codes = counted if zeros is None else counted + blocking.spread(zeros, len(counted))
        return cls(
            codes.astype(np.int8), scales, blocking, zeros if zeros is not None and zeros.any() else None
        )


def nearest(matrix: Weights, blocking: Blocking, heard: NDArray[np.float64] | None = None) -> Blocks:
    """The nearest codes, with scales of least squared error.

    Args:
        matrix: float32 [inputs, outputs], finite.
        blocking: how to code them.
        heard: how much errors of each input's weights count; all the same by default.
    """
    weight = np.ones(len(matrix)) if heard is None else heard + 0.01 * heard.mean() + 1e-30
    scales, zeros = _grids(matrix, blocking, weight)
    low, high = blocking.limits(zeros, len(matrix))
    counted = np.rint(matrix / blocking.spread(scales, len(matrix))).clip(low, high)
    return Blocks.of(counted, scales, blocking, zeros)


def _grids(
    matrix: Weights, blocking: Blocking, weight: NDArray[np.float64]
) -> tuple[Weights, NDArray[np.int8] | None]:
    """For each block of inputs and each output the scale of least squared error, and the code of zero."""
    low, high, size = blocking.low, blocking.high, blocking.size
    padding = -len(matrix) % size
    blocks = np.pad(matrix, ((0, padding), (0, 0))).reshape(-1, size, matrix.shape[1])
    counts = np.pad(weight / weight.max(), (0, padding)).astype(np.float32).reshape(-1, size)
    top, bottom = blocks.max(axis=1).clip(0, None), blocks.min(axis=1).clip(None, 0)
    whole = (top - bottom) / (high - low) if blocking.zeros else np.maximum(top / high, bottom / low)
    full = np.where(whole > 0, np.maximum(whole, TINY), 1.0).astype(np.float32)
    middle = 0.5 * (top + bottom)
    best, least = full, np.full(full.shape, np.inf, np.float32)
    zero = np.zeros(full.shape, np.float32)
    for part in _PARTS if blocking.bits < _WIDE else _PARTS[-1:]:
        steps = full * part
        # What lies in the middle gets the middle of the codes.
        point = np.rint(-0.5 - middle / steps).clip(low, high) if blocking.zeros else zero
        error = np.rint(blocks / steps[:, None])
        np.clip(error, (low - point)[:, None], (high - point)[:, None], out=error)
        error *= steps[:, None]
        error -= blocks
        with np.errstate(over="ignore"):  # what is infinitely wrong is not better
            squared = np.einsum("bk,bko,bko->bo", counts, error, error, optimize=True)
        better = squared < least
        best, zero = np.where(better, steps, best), np.where(better, point, zero)
        least = np.where(better, squared, least)
    return np.asarray(best, np.float32), zero.astype(np.int8) if blocking.zeros else None
