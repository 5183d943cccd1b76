"""What goes of a model so that it keeps to a budget: branches and units of families, at the least damage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import SAMPLES, Samples
from onnxslim.engine.allocate import Joint, allocate, convex
from onnxslim.engine.base import Context, Effort, Log
from onnxslim.families.analysis import Analysis, Family
from onnxslim.families.branches import Branch, branches
from onnxslim.families.costs import Costs
from onnxslim.families.removal import Removal
from onnxslim.ir.model import Model
from onnxslim.passes.prune.budget import TOLERANCE
from onnxslim.passes.prune.choose import MEASURED, Candidates, candidates, criterion_of, damages
from onnxslim.passes.prune.compensate import compensate
from onnxslim.passes.prune.cut import cut
from onnxslim.passes.prune.depth import Cuts, DepthSearch, Price
from onnxslim.passes.prune.importance import Importance
from onnxslim.passes.prune.price import NAMES, Probe, Stopwatch, Unit, counted, timed
from onnxslim.passes.prune.standin import NOTHING, StandIn, drop, fitted

Curves: TypeAlias = dict[str, dict[int, float]]
# What may go of a model.
What: TypeAlias = Literal["both", "units", "branches"]
# How often a budget of time is corrected by what the chosen model takes.
CORRECTIONS = 4


@dataclass(frozen=True)
class Way:
    """How to choose.

    Attributes:
        what, importance, align, max_ratio, effort: options of the pass.
        spared: what is to stay whole, see `choose.spared`.
        data: None if there is none.
        ctx, log: of the pass.
        teacher: the original model.
        analyze: finds the families of a model.
        refit: fits a model that has lost units again, to data.
    """

    what: What
    importance: Importance
    align: int
    max_ratio: float
    effort: Effort
    spared: Mapping[str, str]
    data: Samples | None
    ctx: Context
    log: Log
    teacher: Model
    analyze: Callable[[Model], Analysis]
    refit: Callable[[Model, Removal, Samples], object]

    def candidates(
        self,
        model: Model,
        analysis: Analysis,
        data: CalibrationData | None,
        most: Mapping[str, int] | None = None,
    ) -> Candidates:
        """Units in the order in which they would go, of all families, or so many of some."""
        if self.what == "branches":
            return Candidates(analysis, {}, {}, {}, {})
        return candidates(
            model,
            analysis,
            criterion=criterion_of(self.importance, self.data, self.log, model),
            align=self.align,
            max_ratio=self.max_ratio,
            spared=self.spared,
            data=data,
            ctx=self.ctx,
            log=self.log,
            most=most,
        )

    def curves(self, model: Model, found: Candidates) -> Curves:
        """What numbers of them cost the outputs."""
        tune = self.data.tune if self.data else None
        return damages(model, found, tune, self.ctx, self.log, self.effort)


@dataclass(frozen=True)
class Choice:
    """What goes.

    Attributes:
        cuts: branches, with what stands in for each.
        removal: units of what is left then.
        found: what these were chosen from; None if they were given.
    """

    cuts: Mapping[Branch, StandIn]
    removal: Removal
    found: Candidates | None

    def __bool__(self) -> bool:
        return bool(self.cuts or self.removal)

    @property
    def key(self) -> str:
        """The same for choices of as much."""
        kinds = sorted((branch.sum, branch.end, made.kind) for branch, made in self.cuts.items())
        return repr((kinds, sorted(self.removal.counts.items())))

    def applied(self, model: Model, stand_in: bool = True) -> None:
        """Take it out of a model, which is edited; what stays stands in for it if that is wanted."""
        if self.cuts:
            drop(model, self.cuts)
        if self.found is not None and stand_in:
            compensate(model, self.removal, self.found.grams)
        cut(model, self.removal)


@dataclass
class Stage:
    """A model without some of its branches, and what could go of its families.

    Attributes:
        model: not modified.
        analysis: of the model.
        cuts: what was dropped of the whole.
    """

    model: Model
    analysis: Analysis
    way: Way
    cuts: Mapping[Branch, StandIn] = field(default_factory=dict)
    _begun: tuple[Mapping[str, int], Candidates] | None = field(default=None, init=False)

    @cached_property
    def found(self) -> Candidates:
        """What numbers are chosen by."""
        data = self.way.data
        return self.way.candidates(self.model, self.analysis, data.fit if data else None)

    @cached_property
    def ordered(self) -> Candidates:
        """The same once numbers are chosen: then all samples may say which units."""
        data = self.way.data
        if data is None or not data.tuned:
            return self.found
        return self.way.candidates(self.model, self.analysis, data.seen)

    @cached_property
    def curves(self) -> Curves:
        """What numbers of units of each family cost the outputs."""
        return self.way.curves(self.model, self.found)

    @cached_property
    def costs(self) -> Costs:
        """Of the model, and what it is cut to."""
        return Costs(self.model, self.analysis)

    def choice(self, gone: Mapping[str, int]) -> Choice:
        """Of so many units of each family."""
        ordered = self._ordered(gone)
        return Choice(self.cuts, ordered.removal(gone), ordered)

    def _ordered(self, gone: Mapping[str, int]) -> Candidates:
        """The same as `ordered`, for the units of a choice; the first is mostly the largest."""
        data = self.way.data
        if data is None or not data.tuned:
            return self.found
        if self._begun is None:
            self._begun = gone, self.way.candidates(self.model, self.analysis, data.seen, gone)
        most, found = self._begun
        return found if all(count <= most.get(name, 0) for name, count in gone.items()) else self.ordered

    def most(self, names: Iterable[str]) -> dict[str, int]:
        """As many units of families as may go."""
        return {name: self.found.limits[name].allowed[-1] for name in names}


def without(whole: Stage, cuts: Cuts) -> Stage:
    """A stage of the model with branches dropped, and stand-ins of these kinds fitted to all of the data."""
    if not cuts:
        return whole
    there = fitted(whole.model, cuts, whole.way.data, whole.way.ctx)
    made: dict[Branch, StandIn] = {}
    for branch, kind in cuts.items():
        made[branch] = there[branch].get(kind, NOTHING)
        if made[branch].kind != kind:
            whole.way.log.skip(branch.label, f"nothing stands in for its branch: no {kind} is to be had")
    model = whole.model.copy()
    drop(model, made)
    return Stage(model, whole.way.analyze(model), whole.way, made)


class BranchRung(NamedTuple):
    """Branches that go together, the error of the outputs by that, and what it saves."""

    cuts: Cuts
    damage: float
    saved: float


class _Met(NamedTuple):
    """Units that go of a stage, and what is left costs."""

    stage: Stage
    gone: Mapping[str, int]
    cost: float


class Within:
    """Choices within a budget.

    Args:
        whole: the model as it is, with nothing cut.
        unit: of the budget.
        start: what the model cost in that unit before anything went.
        goal: of that, what may be left.
        watch: for a budget of latency.
    """

    def __init__(
        self, whole: Stage, unit: Unit, start: float, goal: float, watch: Stopwatch | None = None
    ) -> None:
        self._whole, self._unit, self._start, self._goal = whole, unit, start, goal
        self._watch = watch
        self._stages: dict[frozenset[tuple[Branch, str]], Stage] = {}
        self._prices: dict[int, Price] = {}  # by id of a stage
        self._errors: dict[str, float] = {}
        self.reached = 1.0  # share of the start that the last choice leaves
        self.spared: tuple[Branch, ...] = ()  # what the last choice would have dropped, but for the outputs

    def __call__(self, amount: float) -> Choice:
        """What goes to get so far, of 1, from what the model costs now to the goal."""
        here = self._price(self._whole)({}, {})
        goal = here + amount * (self._start * self._goal - here)
        cuts = self._depth.within(goal) if self._depth else {}
        found, self.spared = self._met(self._stage(cuts), goal), ()
        if cuts and self._whole.way.what == "both":
            units = self._met(self._whole, goal)
            if units.cost <= goal + TOLERANCE * self._start and self._error(units) < self._error(found, cuts):
                found, self.spared = units, tuple(cuts)
        self.reached = found.cost / self._start if self._start else 1.0
        return found.stage.choice(found.gone)

    def _error(self, met: _Met, cuts: Cuts = MappingProxyType({})) -> float:
        """Of the outputs on the samples to choose by, with everything fitted to the others.

        Regression gives back more where units went than where branches did, in which all there is to fit has
        been fitted already: damage alone does not tell which of the two the model can better do without.
        """
        way, found = self._whole.way, met.stage.found
        assert way.data is not None
        made = self._depth.stand_ins(cuts) if self._depth else {}
        choice = Choice(made, found.removal(met.gone), found)
        if choice.key not in self._errors:
            model = self._whole.model.copy()
            choice.applied(model)
            way.refit(model, choice.removal, way.data.apart if way.data.tuned else way.data)
            judge = Judge(way.teacher, way.data.tune, way.ctx.target, SAMPLES)
            self._errors[choice.key] = judge(model).error
        return self._errors[choice.key]

    def _met(self, stage: Stage, goal: float) -> _Met:
        """The units to go of a stage; for a budget of time corrected by what it takes with that much gone."""
        price, curves, budget = self._price(stage), stage.curves, goal
        gone = _units(curves, price, goal)
        if self._watch is None:
            return _Met(stage, gone, price(gone, {}))
        for _ in range(CORRECTIONS):
            (cost,) = self._watch([partial(_cut, stage, gone)])
            budget -= cost - goal
            again = gone if abs(cost - goal) <= TOLERANCE else _units(curves, price, budget)
            if again == gone:
                break
            gone = again
        return _Met(stage, gone, cost)

    def _stage(self, cuts: Cuts) -> Stage:
        key = frozenset(cuts.items())
        if key not in self._stages:
            self._stages[key] = without(self._whole, cuts)
        return self._stages[key]

    @cached_property
    def _depth(self) -> DepthSearch | None:
        """The search among branches; None if there are none that may go."""
        way, found = self._whole.way, self._may_go
        if way.data is None or not found:
            return None
        return self._searching(found, way.data, self._whole.found.families, self._whole.curves)

    def _searching(
        self, found: Sequence[Branch], data: Samples, families: Mapping[str, Family], curves: Curves
    ) -> DepthSearch:
        whole, way = self._whole, self._whole.way
        samples = MEASURED[way.effort].samples
        return DepthSearch(
            whole.model, found, data, samples, families, curves, self._price(whole), way.ctx, way.log
        )

    def branch_rungs(self) -> list[BranchRung]:
        """More and more branches that could go by themselves, those that are best at some price."""
        way, found = self._whole.way, self._may_go
        if way.data is None or not found:
            return []
        price, search = self._price(self._whole), self._searching(found, way.data, {}, {})
        rungs = [BranchRung(cuts, error, self._start - price({}, cuts)) for cuts, error in search.path()]
        hull = convex({0.0: 0.0, **{rung.saved: rung.damage for rung in rungs}})
        return [rung for rung in rungs if rung.saved > 0 and rung.damage <= hull[rung.saved]]

    @cached_property
    def _may_go(self) -> list[Branch]:
        """Branches that may go, of which something can be measured."""
        way = self._whole.way
        if way.what == "units" or way.data is None:
            return []
        found = branches(self._whole.model)
        for label, why in found.refused.items():
            way.log.skip(label, f"its branch stays: {why}")
        return [each for each in found.found if not _is_spared(each, way.spared, way.log)]

    def _price(self, stage: Stage) -> Price:
        """What is left of a stage costs."""
        key = id(stage)
        if key not in self._prices:
            sizes = stage.analysis.sizes
            if self._watch is None:
                self._prices[key] = counted(self._unit, stage.costs, sizes)
            else:
                probes = self._probes(stage)
                self._prices[key] = timed(
                    stage.costs, sizes, probes, self._watch(each.make for each in probes)
                )
        return self._prices[key]

    def _probes(self, stage: Stage) -> list[Probe]:
        """The model as it is, without as much of each family as may go, and without each branch."""
        gone = [stage.most([name]) for name in stage.curves]
        dropped = self._may_go if stage is self._whole else []
        return [
            Probe(partial(Model.copy, stage.model), {}, {}),
            *(Probe(partial(_cut, stage, each), each, {}) for each in gone),
            *(Probe(partial(_dropped, stage, each), {}, {each: "nothing"}) for each in dropped),
        ]


def _units(curves: Curves, price: Price, goal: float) -> dict[str, int]:
    """So many of each family that the goal is met at the least damage."""
    return allocate(Joint(curves, lambda picks: price(picks, {})), goal, dict.fromkeys(curves, 0))


def _cut(stage: Stage, gone: Mapping[str, int]) -> Model:
    """A model of the right sizes; what is in it does not matter."""
    model = stage.model.copy()
    cut(model, stage.found.removal(gone))
    return model


def _dropped(stage: Stage, branch: Branch) -> Model:
    model = stage.model.copy()
    drop(model, {branch: NOTHING})
    return model


def _is_spared(branch: Branch, spared: Mapping[str, str], log: Log) -> bool:
    names = (*branch.nodes, *branch.constants)
    glob = next((spared[name] for name in names if name in spared), None)
    if glob is not None:
        log.skip(branch.label, f"its branch stays: excluded by '{glob}'")
    return glob is not None


def shortfall(reached: float, goal: float, unit: Unit, what: What, align: int, max_ratio: float) -> str:
    """How far a choice is from what was asked for; empty if that is not worth a remark."""
    if abs(reached - goal) <= TOLERANCE:
        return ""
    if what == "branches":
        why = "no other branch can go" if reached > goal else "one branch is larger than what was left to go"
    elif reached > goal:
        why = f"no family can lose more (align={align}, max_ratio={max_ratio:g})"
    else:
        why = f"one step of {align} channels is larger than what was left to go"
    return f"{reached:.3f} of the {NAMES[unit]} are left instead of {goal:g}: {why}"
