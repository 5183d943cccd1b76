"""Structured pruning: whole channels, heads and hidden units go, in every tensor that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples
from onnxslim.calibration.seen import NOTE, Sight, seen
from onnxslim.calibration.sources.arrays import Feeds
from onnxslim.engine import judging
from onnxslim.engine.allocate import Joint, allocate
from onnxslim.engine.base import (
    Change,
    Changes,
    Context,
    Effort,
    Figures,
    InterfacePart,
    Log,
    PassWork,
    captioned,
    options,
)
from onnxslim.engine.demands import LEVELS, Demand, Demanding, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS, tell_idle
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PlanOf
from onnxslim.errors import UsageError
from onnxslim.families.analysis import Analysis, analyze
from onnxslim.families.costs import Costs
from onnxslim.families.removal import Removal
from onnxslim.formats import percent
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.ops import Role, spec_of
from onnxslim.ops.channels.cut import Kept
from onnxslim.passes.prune.budget import TOLERANCE, uniform
from onnxslim.passes.prune.choose import Candidates, candidates, criterion_of, damages, spared
from onnxslim.passes.prune.compensate import compensate
from onnxslim.passes.prune.cut import cut, prepare, reshare
from onnxslim.passes.prune.exact import prove
from onnxslim.passes.prune.importance import Importance
from onnxslim.passes.prune.plan import PruningPlan
from onnxslim.passes.repair import repair
from onnxslim.passes.unfuse import unfuse

__all__ = ["Prune", "PruneFigures", "PruningPlan"]

Curves: TypeAlias = dict[str, dict[int, float]]
# From how much of what should go to what does, and what that was chosen from.
_Chooser: TypeAlias = Callable[[float], "tuple[Removal, Candidates | None]"]


@dataclass(frozen=True)
class PruneFigures(Figures):
    """What pruning has to tell of a model.

    Attributes:
        macs, params: multiply-accumulates of one sample, and parameters, before and after.
        plan: what went, to keep and to replay.
        repairs: layers that were fitted again, and what became of them.
        unrepaired: what the outputs kept before that.
        families: how many lost units.
        oracle: largest difference, relative to the largest magnitude of an output, between the model that was
            cut and the one with the same slices set to zero; None if it could not be run.
    """

    macs: tuple[int, int]
    params: tuple[int, int]
    plan: PruningPlan
    repairs: tuple[Change, ...] = ()
    unrepaired: judging.Kept | None = captioned("before layers were fitted again")
    families: int | None = captioned("families of units that became smaller")
    oracle: float | None = captioned("largest relative difference to the same slices set to zero")


WORK: Mapping[Effort, PassWork] = {
    "quick": PassWork(0.5, 1.5e-2, 35.0, 1e-6),
    "normal": PassWork(0.5, 2e-2, 90.0, 1e-6),
    "thorough": PassWork(0.5, 2.5e-2, 120.0, 1e-6),
}


@options
class Prune(Demanding):
    """Remove whole channels, attention heads and hidden units, and let the rest make up for them.

    What can go together is found on the graph. Which units go is chosen by what the layers that read them
    would lose, and how many of each family by what the outputs lose, measured on calibration data. The
    remaining weights are then fitted to what the original layers computed, without labels. Without data the
    norms of weights decide, and nothing is repaired.

    Matrices that are codes already (MatMulNBits) lose columns and whole blocks, but are not fitted: prune
    first, quantize then. Heads whose keys and values are inputs or outputs of the model stay.

    Where the outputs lose more than `require_sqnr` or `max_drop` allows, less goes than was asked for.
    """

    name: ClassVar[str] = "prune"
    beside_plan: ClassVar[tuple[str, ...]] = ("allow_outputs", "steps", "repair", "effort")

    macs: float | None = Field(None, gt=0, le=1, description="multiply-accumulates to keep, of 1")
    params: float | None = Field(None, gt=0, le=1, description="parameters to keep, of 1")
    ratio: float | None = Field(None, ge=0, lt=1, description="share of the units of every family to remove")
    importance: Importance = Field(
        "auto", description="which units go first; auto is obs with calibration data and l2 without"
    )
    align: int = Field(8, ge=1, description="what is left of a layer is a multiple of so many channels")
    max_ratio: float = Field(0.9, gt=0, lt=1, description="largest share of a family to remove")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to leave whole")
    allow_outputs: bool = Field(False, description="let axes of the model's outputs shrink")
    steps: int = Field(1, ge=1, description="rounds of choosing, cutting and repairing on the way")
    repair: Literal["ridge", "bias", "none"] = Field(
        "ridge",
        description="fit what stays to the original's layers; bias: only have it stand in, and fit biases",
    )
    effort: Effort = Field(
        "normal",
        description="how much to try: quick measures damage on few samples and fits layers by "
        "regression alone; thorough measures it closely",
    )
    require_sqnr: LeastSqnr = None
    max_drop: MostDrop = None
    plan: Annotated[Path | PruningPlan | None, PlanOf(PruningPlan)] = Field(
        None, description="file of a plan to replay, instead of choosing"
    )

    @property
    def interface(self) -> frozenset[InterfacePart]:
        """Outputs shrink only where that was asked for."""
        return frozenset(("shapes",) if self.allow_outputs else ())

    def run(self, model: Model, ctx: Context) -> Changes:
        """Prune the model in place.

        Raises:
            UsageError: not exactly one of macs, params, ratio and plan is given, or the plan does not fit.
            InvalidGraph: a cut is not what setting the same slices to zero is; names the family.
        """
        goals = [goal for goal in (self.macs, self.params, self.ratio, self.plan) if goal is not None]
        if len(goals) != 1:
            raise UsageError("pass 'prune' needs exactly one of macs, params, ratio and plan")
        if self.plan is not None:
            self.require_alone()
        if self.allow_outputs and (self.require_sqnr is not None or self.max_drop is not None):
            raise UsageError(
                "pass 'prune': outputs that shrink (allow_outputs) cannot be compared with what they were, "
                "as require_sqnr and max_drop want"
            )
        return _Run(self, model, ctx).run()

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        return WORK[self.effort]

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """Of every family all the numbers of units that may go."""
        return _Run(self, model.copy(), ctx).moves()


@dataclass(frozen=True)
class _PruneTrial:
    """A model without so much of what should go, of 1."""

    model: Model
    amount: float


class _Run:
    """One run of the pass: the model as it shrinks, and what is left of its axes."""

    def __init__(self, settings: Prune, model: Model, ctx: Context) -> None:
        self._settings = settings
        self._ctx = ctx
        self._log = Log()
        for skip in unfuse(model, "units").skipped:
            self._log.skip(skip.node, skip.reason)
        self._demand = settings.demand(model, ctx)
        # What is held to something must not have been fitted to what it is judged by.
        self._data = ctx.given.apart if self._demand else ctx.data
        self._teacher = model.copy()
        self._model = model
        self._kept: Kept = {}  # slices of the original that are left
        self._errors: list[float] = []
        self._repaired: tuple[Change, ...] = ()
        self._unrepaired: judging.Kept | None = None
        self._seen: dict[str, Sight] = {}  # what no rule tells the shape of
        self._missed = ""  # how far what was chosen last is from what was asked for
        self._whole = 0.0, 0.0  # multiply-accumulates and parameters of the model as it was

    def run(self) -> Changes:
        """All steps."""
        tell_idle(self._settings.exclude, self._teacher, self._log)
        twins = prepare(self._model)
        self._spared = spared(self._model, self._settings.exclude)
        first = self._analyze()
        before = Costs(self._model, first)
        done = False
        steps = self._settings.steps if self._settings.plan is None else 1  # a plan tells all at once
        for step in range(1, steps + 1):
            analysis = first if step == 1 else self._analyze()
            self._whole = before.macs({}) * self._scale(before, first, analysis), before.parameters({})
            amount = self._step(analysis, step / steps)
            done = amount > 0 or done
            if self._demand and amount < 1.0:
                break
        if not done:
            self._say_why(first)
            return Changes((), self._log.done().skipped)
        figures = self._told(first, before)
        reshare(self._model, twins)
        return self._log.done(figures)

    def _scale(self, before: Costs, first: Analysis, now: Analysis) -> float:
        """How many times the first batch is looked at: sizes that constants have are not tried."""
        left = before.macs(Removal.leaving(first, self._kept).counts)
        return Costs(self._model, now).macs({}) / left if left else 1.0

    def moves(self) -> list[Move]:
        """What could go, with the damage that decides; see `Pass.propose`."""
        prepare(self._model)
        self._spared = spared(self._model, self._settings.exclude)
        analysis = self._analyze()
        found = self._candidates(analysis, self._data.fit if self._data else None)
        curves, costs, ordered = self._curves(found), Costs(self._model, analysis), self._ordered(found)
        return [
            Move(
                step=self._settings.name,
                group=name,
                option=f"{count} of {found.families[name].size} units",
                left=costs.shares({name: count}),
                damage=damage,
                measured=self._data is not None,
                plan=PruningPlan.of(ordered.removal({name: count})),
            )
            for name, curve in curves.items()
            for count, damage in curve.items()
            if count
        ]

    def _analyze(self) -> Analysis:
        sizes, told = None, dict[str, Sight]()
        for feeds in self._samples():
            sizes = {name: array.shape for name, array in feeds.items()}
            told = seen(self._model, feeds, self._ctx.target)
        self._seen.update(told)
        return analyze(
            self._model,
            sizes=sizes,
            seen={name: each.shape for name, each in told.items()},
            allow_outputs=self._settings.allow_outputs,
        )

    def _samples(self) -> list[Feeds]:
        """The first batch, if there is one."""
        return list(islice(self._data.fit, 1)) if self._data is not None else []

    def _step(self, analysis: Analysis, progress: float) -> float:
        """Choose, prove, cut and repair; how much of what should go did, of 1."""
        choose = self._chooser(analysis, progress)
        amount = 1.0 if self._demand is None else self._amount(choose, self._demand)
        removal, found = choose(amount)
        if self._missed:
            self._log.skip(self._model.graph.name or "model", self._missed)
        if not removal:
            return 0.0
        error = prove(self._model, removal, self._ctx.target, self._samples())
        if error is not None:
            self._errors.append(error)
        self._cut(self._model, removal, found)
        self._kept = removal.after(self._kept)
        chosen = progress == 1 or amount < 1.0  # then all samples may be fitted to
        if chosen and self._data is not None and self._settings.repair != "none":
            self._unrepaired = self._ctx.judge(self._model)
        repaired = self._repair(self._model, self._kept, self._ctx.data if chosen else self._data)
        for change in repaired.changed:
            self._log.change(change.node, "refitted to what the original computes")
        for skip in repaired.skipped:
            self._log.skip(skip.node, skip.reason)
        self._repaired = repaired.changed
        return amount

    def _amount(self, choose: _Chooser, demand: Demand) -> float:
        """The most that may go; 0, with the reason, if nothing may."""
        known: dict[str, _PruneTrial] = {}

        def make(back: int) -> _PruneTrial:
            amount = 1.0 - back / LEVELS
            removal, found = choose(amount)
            key = repr(sorted(removal.counts.items()))
            if key not in known:
                model = self._model.copy()
                self._cut(model, removal, found)
                self._repair(model, removal.after(self._kept), self._data)
                known[key] = _PruneTrial(model, amount)
            return known[key]

        made = demand.least(make, LEVELS - 1)
        name = self._model.graph.name or "model"
        if made is None:
            self._log.skip(name, f"left as it is, however little goes: {demand.shortfall}")
        elif made.amount < 1.0:
            share = f"only {percent(made.amount)} of what was asked for"
            self._log.skip(name, f"{share} goes: with more, {demand.refused}")
        return made.amount if made is not None else 0.0

    def _cut(self, model: Model, removal: Removal, found: Candidates | None) -> None:
        """Remove units from a model, which is edited, and let the others stand in for them."""
        if found is not None and self._settings.repair != "none":
            compensate(model, removal, found.grams)
        cut(model, removal)

    def _chooser(self, analysis: Analysis, progress: float) -> _Chooser:
        """From how much of what this step should reach, of 1, to what goes."""
        settings, data = self._settings, self._data
        if settings.plan is not None:
            planned = PruningPlan.given(settings.plan).removal(analysis)
            return lambda _: (planned, None)
        by_outputs = settings.ratio is None
        found = self._candidates(analysis, (data.fit if by_outputs else data.seen) if data else None)
        curves = self._curves(found) if by_outputs else {}
        last = self._ordered(found) if by_outputs else found

        def choose(amount: float) -> tuple[Removal, Candidates | None]:
            return last.removal(self._numbers(found, curves, progress, amount)), last

        return choose

    def _ordered(self, found: Candidates) -> Candidates:
        """The same once numbers are chosen: then all samples may say which units."""
        if self._data is None or not self._data.tuned:
            return found
        return self._candidates(found.analysis, self._data.seen)

    def _candidates(self, analysis: Analysis, data: CalibrationData | None) -> Candidates:
        settings = self._settings
        return candidates(
            self._model,
            analysis,
            criterion=criterion_of(settings.importance, self._data, self._log, self._model),
            align=settings.align,
            max_ratio=settings.max_ratio,
            spared=self._spared,
            data=data,
            ctx=self._ctx,
            log=self._log,
        )

    def _curves(self, found: Candidates) -> Curves:
        return damages(
            self._model,
            found,
            self._data.tune if self._data else None,
            self._ctx,
            self._log,
            self._settings.effort,
        )

    def _numbers(self, found: Candidates, curves: Curves, progress: float, amount: float) -> dict[str, int]:
        """Units to remove of each family, so that this step gets so far on its way."""
        settings = self._settings
        if settings.ratio is not None:
            share = 1 - (1 - settings.ratio) ** (1 / settings.steps)
            return uniform(found.families, found.limits, share * amount)
        costs = Costs(self._model, found.analysis)
        cost, goal, whole = (
            (costs.macs, settings.macs, self._whole[0])
            if settings.macs is not None
            else (costs.parameters, settings.params, self._whole[1])
        )
        assert goal is not None
        here, there = cost({}), whole * goal**progress
        gone = allocate(Joint(curves, cost), here + amount * (there - here), dict.fromkeys(curves, 0))
        reached = cost(gone) / whole if whole else 1.0
        self._missed = ""
        if progress == amount == 1 and abs(reached - goal) > TOLERANCE:
            what = "MACs" if settings.macs is not None else "parameters"
            why = _shortfall(reached, goal, settings)
            self._missed = f"{reached:.3f} of the {what} are left instead of {goal:g}: {why}"
        return gone

    def _repair(self, model: Model, kept: Kept, data: Samples | None) -> Changes:
        method = self._settings.repair
        if method == "none":
            return Changes()
        if data is None:
            self._log.skip(
                self._model.graph.name or "model",
                "weights are left as they are cut: repair needs calibration data",
            )
            return Changes()
        return repair(
            model,
            self._teacher,
            data,
            kept=kept,
            method=method,
            target=self._ctx.target,
            progress=self._ctx.progress,
            descend=self._settings.effort != "quick",
        )

    def _told(self, first: Analysis, before: Costs) -> PruneFigures:
        """Figures of the whole; in the log what became of each family."""
        removal = Removal.leaving(first, self._kept)
        for family in first.families:
            if gone := removal.counts.get(family.name):
                self._log.change(family.name, f"{gone} of {family.size} units removed", _note(family.crosses))
        costs = Costs(self._model, self._analyze())
        for name in self._seen:
            self._log.skip(name, NOTE)
        return PruneFigures(
            macs=(before.macs({}), before.macs(removal.counts)),
            params=(before.parameters({}), costs.parameters({})),
            plan=PruningPlan.of(removal),
            repairs=self._repaired,
            unrepaired=self._unrepaired,
            families=len(removal.counts),
            oracle=max(self._errors, default=None),
        )

    def _say_why(self, analysis: Analysis) -> None:
        """Nothing was pruned: name what stands in the way of the first layers."""
        if analysis.families:
            if all(skip.warning for skip in self._log.done().skipped):
                self._log.skip(self._model.graph.name or "model", "the goal is met as it is")
            return
        told = 0
        for node in self._model.graph.nodes:
            weight = node.input(1)
            if spec_of(node).role is Role.LINEAR and isinstance(weight, Constant) and told < 3:
                for line in _explained(weight, analysis):
                    self._log.skip(node.label, line)
                told += 1
        if not told:
            bodies = sorted({node.op for node in self._model.graph.nodes if node.bodies})
            inside = f"; layers in bodies of {', '.join(bodies)} are left whole" if bodies else ""
            name = self._model.graph.name or "model"
            self._log.skip(name, f"no layer of the main graph has constant weights to cut{inside}")


def _explained(weight: Constant, analysis: Analysis) -> list[str]:
    try:
        return analysis.explain(weight.name)
    except UsageError:  # it says what else the user could have asked for, who did not ask
        return [f"no axis of '{weight.name}' can be followed, or each has a single slice"]


def _note(crosses: Sequence[str]) -> str:
    """What a family that is not exact goes through."""
    if not crosses:
        return ""
    return f"changes the statistics of '{crosses[0]}'" + (
        f" and {len(crosses) - 1} more" if len(crosses) > 1 else ""
    )


def _shortfall(reached: float, goal: float, settings: Prune) -> str:
    if reached > goal:
        return f"no family can lose more (align={settings.align}, max_ratio={settings.max_ratio:g})"
    return f"one step of {settings.align} channels is larger than what was left to go"
