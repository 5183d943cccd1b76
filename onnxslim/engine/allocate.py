"""What to give up, and how much of it, so that a goal is met with the least damage.

Pruning gives up units of families, factorization ranks of layers, quantization integers where they cost too
much, folding the results that would make a file too large. The loop is the same: concede in the order of what
hurts least for what it saves until the goal is met, then take back what the goal can spare (`settled`).

How far to go is found in one of two ways. Where the cost of a state can be computed, every step is chosen
anew (`allocate`): on convex curves of damage that is the choice at a price per unit of cost, which rises
until the goal is met (Lagrangian relaxation, Everett 1963). Where every state has to be built and measured,
the order is fixed beforehand, and how many of the first ones it takes is found by halving (`fewest`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

State = TypeVar("State")
Offer = TypeVar("Offer", bound=Hashable)
N = TypeVar("N", int, float)
# The option that is chosen of every group.
Picks: TypeAlias = Mapping[str, int]


def settled(
    reached: State,
    met: Callable[[State], bool],
    offers: Callable[[State], Iterable[Offer]],
    without: Callable[[State, Offer], State],
) -> State:
    """A state that meets a goal, with all concessions taken back that the goal can spare.

    Args:
        reached: as far as conceding has come; returned as it is if that does not meet the goal.
        met: whether a state does.
        offers: concessions of a state that could be taken back, the best first. Each is tried once: what
            cannot be spared now cannot be spared later either.
        without: the state without one of them.
    """
    if not met(reached):
        return reached
    tried = set[Offer]()
    while (offer := next((each for each in offers(reached) if each not in tried), None)) is not None:
        tried.add(offer)
        found = without(reached, offer)
        reached = found if met(found) else reached
    return reached


def fewest(enough: Callable[[int], bool], most: int, guess: Callable[[int], int] | None = None) -> int:
    """The least number, from 1 to `most`, that is enough; `most` + 1 if none is.

    Args:
        enough: whether a number is; then, so are larger ones.
        most: the largest.
        guess: the number to try next after one that was not enough, as long as none was: greater than it, and
            `most` at the most. By default it is found by halving from the start.
    """
    lacking, least = 0, most + 1
    while least - lacking > 1:
        count = guess(lacking) if guess is not None and least > most else (lacking + least) // 2
        if enough(count):
            least = count
        else:
            lacking = count
    return least


class Trade(NamedTuple):
    """Another option for one group; less is better.

    Attributes:
        rate: damage for what is saved, or its negative where something is taken back.
        option: the new one.
        group: whose.
    """

    rate: float
    option: int
    group: str


class Choices(ABC):
    """Groups of which each has options: the rungs that pruning may go down, the factors a layer may get.

    Args:
        damage: by group, what each of its options loses.
    """

    def __init__(self, damage: Mapping[str, Mapping[int, float]]) -> None:
        self.damage = damage

    @abstractmethod
    def cost(self, picks: Picks) -> float:
        """Of all groups together."""

    @abstractmethod
    def concessions(self, picks: Picks) -> Iterator[Trade]:
        """Options that cost less than those picked."""

    @abstractmethod
    def returns(self, picks: Picks) -> Iterator[Trade]:
        """Options that lose less than those picked."""

    def relief(self, picks: Picks, group: str, option: int) -> float:
        """How much less damage an option does than the one picked."""
        return self.damage[group][picks[group]] - self.damage[group][option]


class Additive(Choices):
    """Costs add up, so that a rate holds for any option, however far away.

    Args:
        damage: by group, what each of its options loses.
        costs: likewise, what each of them costs.
    """

    def __init__(
        self, damage: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, float]]
    ) -> None:
        super().__init__(damage)
        self._costs = costs

    def cost(self, picks: Picks) -> float:
        """The sum."""
        return math.fsum(self._costs[group][option] for group, option in picks.items())

    def best(self) -> dict[str, int]:
        """Of every group the option that loses least, the cheapest of several."""
        found = {}
        for group, costs in self._costs.items():
            damage = self.damage[group]
            found[group] = min(zip(damage.values(), costs.values(), costs, strict=True))[-1]
        return found

    def concessions(self, picks: Picks) -> Iterator[Trade]:
        """All that are cheaper, by damage per cost."""
        for group, option, less in self._others(picks):
            if less > 0:
                yield Trade(-self.relief(picks, group, option) / less, option, group)

    def returns(self, picks: Picks) -> Iterator[Trade]:
        """All that lose less, by damage per cost: there may be better ways to spend what a step costs."""
        for group, option, less in self._others(picks):
            relief = self.relief(picks, group, option)
            if relief > 0:
                yield Trade(-relief / max(-less, 1e-12), option, group)

    def _others(self, picks: Picks) -> Iterator[tuple[str, int, float]]:
        """Every other option, and by how much it is cheaper than the one picked."""
        for group, costs in self._costs.items():
            now = costs[picks[group]]
            yield from ((group, option, now - cost) for option, cost in costs.items())


class Joint(Choices):
    """Costs of neighbouring groups multiply: rates are those of one step, and are taken anew after each.

    Args:
        damage: by group, what each of its options loses, in the order in which they are conceded; convex.
        cost: of all picks together.
    """

    def __init__(
        self, damage: Mapping[str, Mapping[int, float]], cost: Callable[[Mapping[str, int]], float]
    ) -> None:
        super().__init__(damage)
        self._cost = cost
        self._rungs = {group: tuple(options) for group, options in damage.items()}

    def cost(self, picks: Picks) -> float:
        """As it was given."""
        return self._cost(picks)

    def concessions(self, picks: Picks) -> Iterator[Trade]:
        """The next option of each group that saves something by that, by damage per cost."""
        now = self._cost(picks)
        for group, option in self._neighbours(picks, 1):
            saved = now - self._cost({**picks, group: option})
            if saved > 0:
                yield Trade(-self.relief(picks, group, option) / saved, option, group)

    def returns(self, picks: Picks) -> Iterator[Trade]:
        """The option before, by damage: what is left of the goal is less than a step, and cannot be saved."""
        for group, option in self._neighbours(picks, -1):
            yield Trade(-self.relief(picks, group, option), option, group)

    def _neighbours(self, picks: Picks, step: int) -> Iterator[tuple[str, int]]:
        for group, rungs in self._rungs.items():
            at = rungs.index(picks[group]) + step
            if 0 <= at < len(rungs):
                yield group, rungs[at]


class Refunding(Joint):
    """Groups that lie in what an option of another one takes away: what they have lost is no loss any more.

    Args:
        damage, cost: see `Joint`.
        refunds: by group and option, the groups that go with it.
    """

    def __init__(
        self,
        damage: Mapping[str, Mapping[int, float]],
        cost: Callable[[Mapping[str, int]], float],
        refunds: Mapping[str, Mapping[int, Collection[str]]],
    ) -> None:
        super().__init__(damage, cost)
        self._refunds = refunds

    def relief(self, picks: Picks, group: str, option: int) -> float:
        """See `Choices`."""
        refunds = self._refunds.get(group, {})
        now, then = (
            math.fsum(self.damage[name][picks[name]] for name in refunds.get(each, ()))
            for each in (picks[group], option)
        )
        return super().relief(picks, group, option) + then - now


def allocate(choices: Choices, goal: float, start: Picks) -> dict[str, int]:
    """An option for each group, so that together they cost no more than the goal, if that can be.

    Args:
        choices: groups and their options.
        goal: for the cost.
        start: where to begin; nothing better is looked for than this.
    """
    picks = dict(start)
    while choices.cost(picks) > goal:
        step = min(choices.concessions(picks), default=None)
        if step is None:
            return picks
        picks[step.group] = step.option

    def offers(now: dict[str, int]) -> list[tuple[str, int]]:
        ordered = sorted(choices.returns(now), key=lambda step: step.rate)  # of equal ones, in their order
        return [(step.group, step.option) for step in ordered]

    return settled(
        picks,
        lambda now: choices.cost(now) <= goal,
        offers,
        lambda now, offer: {**now, offer[0]: offer[1]},
    )


def convex(points: Mapping[N, float]) -> dict[N, float]:
    """The lower convex hull of a curve, at the places where it is known."""
    hull: list[tuple[N, float]] = []
    for x, y in sorted(points.items()):
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    xs, ys = zip(*hull, strict=True)
    return {x: float(np.interp(x, xs, ys)) for x in points}


def _is_above(a: tuple[N, float], b: tuple[N, float], c: tuple[N, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
