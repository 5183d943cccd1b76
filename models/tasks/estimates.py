"""Scores with their error bars: how far the truth may lie from what some samples say, at 95 %."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from onnxslim.ir.graph import Array

# Of the normal distribution, two-sided, 95 %.
Z = 1.959963984540054


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def told(self, scale: float = 100.0) -> str:
        """For people, in percent unless told otherwise."""
        value, low, high = (scale * each for each in self)
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    @property
    def certain(self) -> bool:
        """Of a change: whether it is one, since 0 is not in the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Outcomes:
    """What a model gained of what could be gained, sample by sample, each in order.

    Attributes:
        name: of the score: "accuracy".
        gained: float [samples], of accuracy 1 where the class is right.
        possible: float [samples], of accuracy 1 everywhere.
        groups: int [samples]; samples of one group, such as pictures of one object, are not independent.
    """

    name: str
    gained: Array
    possible: Array
    groups: Array

    @classmethod
    def of(
        cls, name: str, gained: Array, possible: Array | float = 1.0, groups: Array | None = None
    ) -> Outcomes:
        """Outcomes of samples that are independent unless groups are given."""
        values = np.asarray(gained, np.float64)
        return cls(
            name,
            values,
            np.broadcast_to(np.asarray(possible, np.float64), values.shape),
            np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1],
        )

    @property
    def value(self) -> float:
        """The share of all that could be gained."""
        return float(self.gained.sum() / self.possible.sum())

    @property
    def estimate(self) -> Estimate:
        """The value in Wilson's interval (Wilson 1927), for as many independent samples as these are worth.

        That is p (1 - p) by the variance of the share between groups (of a ratio of sums, by linearization:
        Cochran, Sampling Techniques, 6.4). Of independent samples that are right or wrong it is their number;
        where nothing varies it is the number of groups.
        """
        value = min(max(self.value, 0.0), 1.0)
        errors = self._errors()
        variance = float(np.square(errors).sum()) / len(errors) ** 2
        samples = value * (1 - value) / variance if variance > 0 else float(len(errors))
        return Estimate(value, *wilson(value, samples))

    def _errors(self) -> Array:
        """What each group adds to the error of the share, [groups]; their mean is zero."""
        left = np.bincount(self.groups, self.gained - self.value * self.possible)
        return np.asarray(left / (self.possible.sum() / len(left)))

    def change(self, before: Outcomes) -> Estimate:
        """How much more was gained than before, on the same samples, pair by pair.

        A normal interval over the differences of groups, with one that gained 1 and one that lost 1 beside
        them (Bonett and Price, Statistics in Medicine 31, 2012): where nothing changed, it still has a width.
        """
        difference = self.value - before.value
        pairs = self._errors() - before._errors()
        one = len(pairs) / float(before.possible.sum())
        spread = np.concatenate([pairs + difference, [one, -one]])
        middle = len(pairs) * difference / len(spread)
        half = Z * math.sqrt(float(np.square(spread - middle).mean()) / len(spread))
        return Estimate(difference, min(difference, middle - half), max(difference, middle + half))


def wilson(share: float, samples: float) -> tuple[float, float]:
    """The score interval of a share of independent samples."""
    spread = Z * math.sqrt(share * (1 - share) / samples + (Z / samples) ** 2 / 4)
    low, high = ((share + Z**2 / (2 * samples) + side) / (1 + Z**2 / samples) for side in (-spread, spread))
    return min(max(low, 0.0), share), max(min(high, 1.0), share)
