"""Which factors each layer gets: a knapsack with several choices per layer.

Every layer has options with an error and a cost; what is asked for is the least sum of errors with a sum of
costs within the budget. For a price per unit of cost, the best option of each layer is found by itself, and
the price that just meets the budget by bisection (Lagrangian relaxation, Everett 1963). What that leaves of
the budget is then spent on the options that gain most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = 100


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        picks: index of the option of every layer.
        cost, error: sums over all layers.
        met: whether the cost is within the budget; if not, it is the least there is.
    """

    picks: tuple[int, ...]
    cost: float
    error: float
    met: bool


def choose(costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float) -> Choice:
    """Pick one option per layer.

    Args:
        costs: of every option of every layer, not negative.
        errors: likewise; finite.
        budget: for the sum of costs.
    """
    table = [(np.asarray(c, float), np.asarray(e, float)) for c, e in zip(costs, errors, strict=True)]
    cheapest = [_cheapest(cost, error) for cost, error in table]
    if _total(table, cheapest)[0] > budget:
        return _choice(table, cheapest, budget)
    return _choice(table, _filled(table, _priced(table, cheapest, budget), budget), budget)


_Table = Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]


def _priced(table: _Table, picks: list[int], budget: float) -> list[int]:
    """The picks at the lowest price at which they keep to the budget; those given at the highest."""
    free = _at(table, 0.0)
    if _total(table, free)[0] <= budget:
        return free
    low, high = -200.0, 200.0  # exponents of 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _at(table, 2.0**middle)
        if _total(table, found)[0] <= budget:
            high, picks = middle, found
        else:
            low = middle
    return picks


def _at(table: _Table, price: float) -> list[int]:
    """The best option of every layer at this price; of equals the cheaper one."""
    return [int(np.lexsort((cost, error + price * cost))[0]) for cost, error in table]


def _cheapest(cost: NDArray[np.float64], error: NDArray[np.float64]) -> int:
    return int(np.lexsort((error, cost))[0])


def _filled(table: _Table, picks: list[int], budget: float) -> list[int]:
    """Spend what is left of the budget where it gains most error per cost."""
    left = budget - _total(table, picks)[0]
    while True:
        best, gain = None, 0.0
        for layer, (cost, error) in enumerate(table):
            more, less = cost - cost[picks[layer]], error[picks[layer]] - error
            usable = (less > 0) & (more <= left)
            rate = np.where(usable, less / np.maximum(more, 1e-12), 0.0)
            option = int(rate.argmax())
            if rate[option] > gain:
                best, gain = (layer, option), float(rate[option])
        if best is None:
            return picks
        layer, option = best
        left -= float(table[layer][0][option] - table[layer][0][picks[layer]])
        picks = [*picks[:layer], option, *picks[layer + 1 :]]


def _total(table: _Table, picks: Sequence[int]) -> tuple[float, float]:
    return (
        math.fsum(cost[pick] for (cost, _), pick in zip(table, picks, strict=True)),
        math.fsum(error[pick] for (_, error), pick in zip(table, picks, strict=True)),
    )


def _choice(table: _Table, picks: list[int], budget: float) -> Choice:
    cost, error = _total(table, picks)
    return Choice(tuple(picks), cost, error, cost <= budget)


def curve(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Factor and exponent of the power law through measured points (local error, error of the whole model).

    The exponent is held between 1/2 and 2, beyond which two noisy points would make predictions absurd.
    """
    usable = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
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
