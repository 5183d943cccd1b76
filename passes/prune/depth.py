"""Which branches go, one after the other, against all that the families of units offer for the same budget.

What a branch costs the outputs is measured with the branch gone and its stand-in there. Branches interact, so
each of them is measured again once it is next and others have gone before it: the damage that counts is what
it adds. Where another one then costs less, that one goes instead (a greedy choice with lazy evaluation:
Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnxslim import shapes
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import Samples
from onnxslim.engine.allocate import Refunding, allocate
from onnxslim.engine.base import Context, Log
from onnxslim.errors import TimeUp
from onnxslim.families.analysis import Family
from onnxslim.families.branches import Branch
from onnxslim.ir.model import Model
from onnxslim.passes.prune.standin import KINDS, Kind, StandIn, drop, fitted

# Branches that go, with what stands in for each; and what a model then costs, with so many units gone.
Cuts: TypeAlias = Mapping[Branch, Kind]
Price: TypeAlias = Callable[[Mapping[str, int], Cuts], float]
Curves: TypeAlias = Mapping[str, Mapping[int, float]]
# Beyond all reason; the sum of some of them is still a number.
_MOST = 1e6
# What a group of the allocator is called that is a branch: no tensor has this in its name.
_BRANCH = "branch\0"


@dataclass(frozen=True)
class _Measured:
    """What a cut adds to the error of the outputs, after others; None for those if it is but expected."""

    damage: float
    after: Cuts | None


_Known: TypeAlias = dict[tuple[Branch, Kind], _Measured]


class DepthSearch:
    """Chooses branches of one model, for any goal.

    Args:
        model: with all of its branches; not modified.
        found: those that may go.
        data: to fit stand-ins on and to choose by.
        samples: how many of those to choose by are run.
        families: of the model, that may lose units.
        curves: what numbers of them cost.
        price: what is left of the model costs, in the unit of the goal.
        ctx, log: of the pass.
    """

    def __init__(
        self,
        model: Model,
        found: Sequence[Branch],
        data: Samples,
        samples: int,
        families: Mapping[str, Family],
        curves: Curves,
        price: Price,
        ctx: Context,
        log: Log,
    ) -> None:
        self._model, self._curves, self._price = model, curves, price
        self._found = found
        self._within = {
            branch: [name for name in curves if _is_within(families[name], branch)] for branch in found
        }
        self._progress = ctx.progress
        # What candidates are judged by must not have been fitted to.
        self._stand_ins = fitted(model, found, data.apart if data.tuned else data, ctx)
        self._judge = Judge(model, data.tune, ctx.target, samples)
        self._errors: dict[frozenset[tuple[str, str, Kind]], float] = {frozenset(): 0.0}
        self._first: _Known = {}
        self._measure_all(log)

    def _measure_all(self, log: Log) -> None:
        """Each branch alone; those that there was no time for stay."""
        done = 0
        try:
            for branch in self._found:
                self._first |= {
                    (branch, each): self._measured({}, branch, each) for each in self._kinds(branch)
                }
                done += 1
                if self._progress:
                    self._progress("measuring branches", done, len(self._found))
        except TimeUp as error:
            for late in self._found[done:]:
                log.skip(late.label, f"its branch stays, as it was not measured what it does: {error}")
            self._found = self._found[:done]

    def stand_ins(self, cuts: Cuts) -> dict[Branch, StandIn]:
        """What branches were measured with: fitted to others than the samples to choose by."""
        return {branch: self._stand_ins[branch][kind] for branch, kind in cuts.items()}

    def within(self, goal: float) -> dict[Branch, Kind]:
        """The branches that go, so that with families that give up what is best the goal is met."""
        return next(reversed([{}, *self._steps(goal)]))

    def path(self) -> Iterator[tuple[dict[Branch, Kind], float]]:
        """One branch more at a time, the next best for what it saves, with the error of all that are gone.

        It ends where nothing is left of the outputs, or no branch.
        """
        for cuts in self._steps(-math.inf):
            error = self.error(cuts)
            if not error < 1.0:
                return
            yield cuts, error

    def _steps(self, goal: float) -> Iterator[dict[Branch, Kind]]:
        """What has gone after each step towards a goal."""
        cuts: dict[Branch, Kind] = {}
        known = dict(self._first)
        while (step := self._next(cuts, known, goal)) is not None:
            branch, kind = step
            for other in self._kinds(branch):  # what going further adds is now less by that
                if other != kind:
                    left = known[branch, other].damage - known[branch, kind].damage
                    known[branch, other] = _Measured(max(left, 0.0), None)
            cuts = {each: made for each, made in cuts.items() if each.sum not in branch.nodes}
            cuts[branch] = kind
            yield dict(cuts)

    def _next(self, cuts: Cuts, known: _Known, goal: float) -> tuple[Branch, Kind] | None:
        """The cut to make next, measured as things are now; None if families alone do better."""
        while True:
            wanted = list(self._wanted(cuts, known, goal))
            if not wanted:
                return None
            _, branch, kind = min(wanted, key=lambda each: each[0])
            if known[branch, kind].after == cuts:
                return branch, kind
            known[branch, kind] = self._measured(cuts, branch, kind)

    def _wanted(self, cuts: Cuts, known: _Known, goal: float) -> Iterator[tuple[float, Branch, Kind]]:
        """Cuts that the allocator makes besides, with the damage of each for what it saves."""
        ladders = (self._ladder(branch, cuts, known) for branch in self._left(cuts))
        offers = {f"{_BRANCH}{index}": each for index, each in enumerate(ladders) if each}
        damage = {
            name: dict(enumerate([0.0, *(rung.damage for rung in each)])) for name, each in offers.items()
        }

        def picked(picks: Mapping[str, int]) -> list[_Rung]:
            return [offers[name][pick - 1] for name, pick in picks.items() if pick and name in offers]

        def cost(picks: Mapping[str, int]) -> float:
            made = {rung.branch: rung.kind for rung in picked(picks)}
            units = {name: pick for name, pick in picks.items() if name not in offers}
            return self._price(units, {**cuts, **made})

        groups = {**self._curves, **damage}
        # With a branch, what families within it have lost so far is no loss any more.
        refunds = {
            name: dict.fromkeys(range(1, len(rungs) + 1), self._within[rungs[0].branch])
            for name, rungs in offers.items()
        }
        choices = Refunding(groups, cost, refunds)
        for rung in picked(allocate(choices, goal, dict.fromkeys(groups, 0))):
            yield rung.damage / max(rung.saved, 1e-12), rung.branch, rung.kind

    def _left(self, cuts: Cuts) -> Iterator[Branch]:
        """Branches that could still go: not inside another one that has gone, nor the rest of its sum."""
        for branch in self._found:
            gone = (each for each in cuts if each != branch)
            if not any(branch.sum in (each.sum, *each.nodes) for each in gone):
                yield branch

    def _ladder(self, branch: Branch, cuts: Cuts, known: _Known) -> list[_Rung]:
        """What may stand in for a branch, the dearest first, as long as each saves at the least damage."""
        now = self._price({}, cuts)
        kinds = [kind for kind in self._kinds(branch) if KINDS.index(kind) < _rank(cuts.get(branch))]
        rungs = [
            _Rung(branch, kind, known[branch, kind].damage, now - self._price({}, {**cuts, branch: kind}))
            for kind in kinds
        ]
        if len(rungs) == 2:
            dear, cheap = rungs
            further = (cheap.damage - dear.damage) * dear.saved
            if dear.saved <= 0 or further < dear.damage * (cheap.saved - dear.saved):
                rungs = [cheap]
        return [rung for rung in rungs if rung.saved > 0]

    def _kinds(self, branch: Branch) -> list[Kind]:
        """One linear map, if it is to be had, and the best of what costs next to nothing."""
        there = self._stand_ins[branch]
        *_, free = (kind for kind in KINDS if kind in there and kind != "linear")
        return ["linear", free] if "linear" in there else [free]

    def _measured(self, cuts: Cuts, branch: Branch, kind: Kind) -> _Measured:
        before, after = self.error(cuts), self.error({**cuts, branch: kind})
        return _Measured(min(max(after - before, 0.0), _MOST), dict(cuts))

    def error(self, cuts: Cuts) -> float:
        """Of the outputs, with these cuts and no other."""
        own = {branch: kind for branch, kind in cuts.items() if not _inside_another(branch, cuts)}
        key = frozenset((branch.sum, branch.end, kind) for branch, kind in own.items())
        if key not in self._errors:
            trial = shapes.copied(self._model)
            drop(trial, self.stand_ins(own))
            self._errors[key] = self._judge(trial).error
        return self._errors[key]


@dataclass(frozen=True)
class _Rung:
    """One way to cut a branch: what that adds to the error, and what it saves."""

    branch: Branch
    kind: Kind
    damage: float
    saved: float


def _is_within(family: Family, branch: Branch) -> bool:
    """Whether all that a family takes is gone with a branch."""
    return all(each.tensor in branch.constants for each in family.members if each.constant)


def _rank(kind: Kind | None) -> int:
    return len(KINDS) if kind is None else KINDS.index(kind)


def _inside_another(branch: Branch, cuts: Cuts) -> bool:
    return any(branch.sum in each.nodes for each in cuts)
