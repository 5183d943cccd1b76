"""Ranks worth a try, and what those that were not tried are expected to cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def curve(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Factor and exponent of the power law through measured points (local error, error of the whole model).

    The exponent is held between 1/2 and 2, beyond which two noisy points would make predictions absurd.
    Points without a finite error say nothing.
    """
    usable = [(math.log(x), math.log(y)) for x, y in points if 0 < x < math.inf and 0 < y < math.inf]
    if not usable:
        return 0.0, 1.0
    x, y = np.array(usable).T
    spread = float(np.square(x - x.mean()).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 1e-9 else 1.0
    slope = min(max(slope, 0.5), 2.0)
    return math.exp(float(y.mean()) - slope * float(x.mean())), slope


def step(align: int, groups: int) -> int:
    """Ranks per group whose multiples, times the groups, are multiples of `align`."""
    return align // math.gcd(align, groups)


def steps(most: int, align: int, groups: int, count: int) -> list[int]:
    """Ranks per group worth a try below the full one, smallest first.

    Args:
        most: full rank per group.
        align: the ranks of all groups together are multiples of it.
        groups: their number.
        count: how many ranks at most, spread geometrically.
    """
    every = np.arange(step(align, groups), most, step(align, groups))
    if len(every) <= count:
        return [int(rank) for rank in every]
    wanted = np.geomspace(every[0], every[-1], count)
    return sorted({int(every[np.abs(every - rank).argmin()]) for rank in wanted})
