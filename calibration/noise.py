"""What is left of a signal in what stands for it: the one signal-to-noise ratio of the project."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim.ir.graph import Array


@dataclass
class Noise:
    """Running sums over a reference and what stands for it, in float64.

    Which elements count is the caller's to say; of those, the reference is finite.

    Attributes:
        signal: sum of the squares of the reference.
        noise: sum of the squares of the differences; infinite once one of them is not finite.
        total: sum of the reference.
        size: number of elements.
    """

    signal: float = 0.0
    noise: float = 0.0
    total: float = 0.0
    size: int = 0

    def add(self, reference: Array, actual: Array) -> None:
        """Take in arrays of numbers, both of one shape.

        Raises:
            ValueError: they are of two.
        """
        if reference.shape != actual.shape:
            raise ValueError(f"{actual.shape} stands for {reference.shape}")
        self.take(Noise.of(reference), reference, actual)

    def take(self, sums: Noise, reference: Array, actual: Array) -> None:
        """The same where the sums over the reference are known: many stand for one."""
        off = np.subtract(actual, reference, dtype=np.float64).reshape(-1)
        noise = float(off @ off)
        self.signal += sums.signal
        self.noise += noise if math.isfinite(noise) else math.inf
        self.total += sums.total
        self.size += sums.size

    @classmethod
    def of(cls, reference: Array) -> Noise:
        """What stands for itself, without noise."""
        wanted = reference.astype(np.float64, copy=False).reshape(-1)
        return cls(float(wanted @ wanted), 0.0, float(wanted.sum()), wanted.size)

    @property
    def sqnr(self) -> float:
        """10 log10(signal / noise) in dB; infinite where nothing differs, minus that where all is noise."""
        if not self.noise:
            return math.inf
        if not self.signal or not math.isfinite(self.noise):
            return -math.inf
        return decibels_of(self.signal / self.noise)

    @property
    def variation(self) -> float:
        """Sum of the squares of the reference around its mean; 0 for what is constant but for rounding."""
        around = self.signal - self.total**2 / max(self.size, 1)
        return around if around > 1e-12 * self.signal else 0.0


def sqnr(reference: Any, actual: Any) -> float:
    """SQNR in dB of arrays, of outputs by name, or of sequences of either, all elements together.

    Raises:
        ValueError: shapes do not agree.
    """
    found = Noise()
    for wanted, made in _pairs(reference, actual):
        found.add(wanted, made)
    return found.sqnr


def _pairs(reference: Any, actual: Any) -> Iterable[tuple[Array, Array]]:
    if isinstance(reference, Mapping):
        for name, value in reference.items():
            yield from _pairs(value, actual[name])
    elif isinstance(reference, np.ndarray):
        yield reference, actual
    else:
        for wanted, made in zip(reference, actual, strict=True):
            yield from _pairs(wanted, made)


def decibels_of(ratio: float) -> float:
    """A ratio of powers, greater than zero, in dB."""
    return 10.0 * math.log10(ratio)


def noise_of(sqnr: float) -> float:
    """The power of the noise, by that of the signal, that a ratio in dB stands for."""
    return float(10.0 ** (-sqnr / 10.0)) if sqnr > _LEAST else math.inf


# In dB: less than this does not fit into a float as a ratio.
_LEAST = -3000.0
