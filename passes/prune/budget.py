"""How many units each family gives up, so that a cost is reached with the least damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxslim.families.analysis import Family

Cost = Callable[[Mapping[str, int]], int]
# A reached cost this close to what was asked for, relative to the cost before, is not worth a remark.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Limits:
    """What may be removed of a family.

    Attributes:
        allowed: numbers of units that may go, ascending, 0 first.
    """

    allowed: tuple[int, ...]

    @classmethod
    def of(cls, family: Family, align: int, max_ratio: float) -> Limits:
        """At least one unit stays; what stays is a multiple of `align` slices wherever something goes."""
        step = max(1, align // family.width)
        least = max(1, int(np.ceil(family.size * (1 - max_ratio) - 1e-9)))
        kept = [count for count in range(step, family.size, step) if count >= least]
        return cls((0, *(family.size - count for count in reversed(kept))))

    def nearest(self, wanted: float) -> int:
        """The allowed number next to a wanted one, at least one step if anything is wanted."""
        if wanted <= 0:
            return 0
        choices = self.allowed[1:] or self.allowed
        return min(choices, key=lambda count: abs(count - wanted))


def uniform(families: Mapping[str, Family], limits: Mapping[str, Limits], ratio: float) -> dict[str, int]:
    """The same share of every family, as near as the limits allow."""
    return {name: limits[name].nearest(ratio * family.size) for name, family in families.items()}


def allocate(
    limits: Mapping[str, Limits],
    damage: Mapping[str, Mapping[int, float]],
    cost: Cost,
    goal: float,
    start: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Units to remove of each family until the cost is no more than the goal.

    Costs of neighbouring layers multiply, so they are taken anew at every step: the next step is always the
    one with the least damage per cost saved, on curves of damage that are convex (the Lagrangian choice).
    What goes beyond the goal is then given back, most damage first.

    Args:
        limits: of each family.
        damage: by family, the damage of every allowed number of units; convex.
        cost: of the model after a removal.
        goal: the cost to reach.
        start: what is removed already.
    """
    gone = dict.fromkeys(limits, 0) | dict(start or {})
    now = cost(gone)
    while now > goal:
        steps = [
            (step, name)
            for name in limits
            if (step := _next(limits[name], damage[name], gone, name, now, cost)) is not None
        ]
        if not steps:
            break
        (_, count), name = min(steps)
        gone[name] = count
        now = cost(gone)
    return _given_back(gone, limits, damage, cost, goal)


def _next(
    limit: Limits, damage: Mapping[int, float], gone: Mapping[str, int], name: str, now: int, cost: Cost
) -> tuple[float, int] | None:
    """Damage per cost of the next step of a family, and where it leads; None if it saves nothing."""
    at = limit.allowed.index(gone[name])
    if at + 1 == len(limit.allowed):
        return None
    count = limit.allowed[at + 1]
    saved = now - cost({**gone, name: count})
    return ((damage[count] - damage[gone[name]]) / saved, count) if saved > 0 else None


def _given_back(
    gone: dict[str, int],
    limits: Mapping[str, Limits],
    damage: Mapping[str, Mapping[int, float]],
    cost: Cost,
    goal: float,
) -> dict[str, int]:
    """Take back steps that the goal does not need, those that hurt most first."""
    if cost(gone) > goal:
        return gone
    while True:
        best: tuple[float, str, int] | None = None
        for name, limit in limits.items():
            at = limit.allowed.index(gone[name])
            if at and cost({**gone, name: limit.allowed[at - 1]}) <= goal:
                relief = damage[name][gone[name]] - damage[name][limit.allowed[at - 1]]
                if best is None or relief > best[0]:
                    best = (relief, name, limit.allowed[at - 1])
        if best is None:
            return gone
        gone[best[1]] = best[2]


def convex(points: Mapping[int, float]) -> dict[int, float]:
    """The lower convex hull of a curve, at the places where it is known."""
    hull: list[tuple[int, float]] = []
    for x, y in sorted(points.items()):
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    xs, ys = zip(*hull, strict=True)
    return {x: float(np.interp(x, xs, ys)) for x in points}


def _is_above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
