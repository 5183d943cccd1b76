"""Structured pruning: whole channels, heads and hidden units go, in every tensor that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from onnxslim.calibration.samples import Samples
from onnxslim.calibration.seen import NOTE, Sight, seen
from onnxslim.calibration.sources.arrays import Feeds
from onnxslim.engine import judging
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
from onnxslim.engine.demands import LEVELS, Demand, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS, tell_idle
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PlanOf
from onnxslim.errors import UsageError
from onnxslim.families.analysis import Analysis, analyze
from onnxslim.families.branches import Branch, branches
from onnxslim.families.costs import Costs
from onnxslim.families.removal import Removal
from onnxslim.formats import percent
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.ops import Role, spec_of
from onnxslim.ops.channels.cut import Kept
from onnxslim.passes.distill.behind import Learning, StepsBehind
from onnxslim.passes.prune.budget import uniform
from onnxslim.passes.prune.choose import spared
from onnxslim.passes.prune.cut import Twins, prepare, reshare
from onnxslim.passes.prune.exact import prove, prove_dropped
from onnxslim.passes.prune.importance import Importance
from onnxslim.passes.prune.plan import PruningPlan
from onnxslim.passes.prune.price import Stopwatch, Unit, left_of
from onnxslim.passes.prune.standin import Kind, blank, drop
from onnxslim.passes.prune.within import Choice, Stage, Way, What, Within, shortfall, without
from onnxslim.passes.repair import repair
from onnxslim.passes.unfuse import unfuse
from onnxslim.runtime.probe import make_feeds

__all__ = ["Prune", "PruneFigures", "PruningPlan"]

# From how much of what should go to what does.
_Chooser: TypeAlias = Callable[[float], Choice]
# What reports say of what stands in for a branch, of its skip.
STANDS_IN: Mapping[Kind, str] = {
    "nothing": "'{}' is left as it is",
    "mean": "a shift of '{}' per channel stands in for it",
    "affine": "a scale and a shift of '{}' per channel stand in for it",
    "linear": "one linear map of '{}' stands in for it",
}


@dataclass(frozen=True)
class PruneFigures(Figures):
    """What pruning has to tell of a model.

    Attributes:
        macs, params: multiply-accumulates of one sample, and parameters, before and after.
        plan: what went, to keep and to replay.
        repairs: layers that were fitted again, and what became of them.
        unrepaired: what the outputs kept before that.
        families: how many lost units.
        branches: what stands in for each branch that went, by the sum it flowed into.
        latency: time of one run, relative to that before; of a budget of latency only.
        oracle: largest difference, relative to the largest magnitude of an output, between the model that was
            cut and the one with the same slices and branches set to zero; None if it could not be run.
    """

    macs: tuple[int, int]
    params: tuple[int, int]
    plan: PruningPlan
    repairs: tuple[Change, ...] = ()
    unrepaired: judging.Kept | None = captioned("before layers were fitted again")
    families: int | None = captioned("families of units that became smaller")
    branches: Mapping[str, Kind] | None = captioned("branches that went, and what stands in for them")
    latency: float | None = captioned("time of one run, relative to that before")
    oracle: float | None = captioned("largest relative difference to the same set to zero")


WORK: Mapping[Effort, PassWork] = {
    "quick": PassWork(0.5, 1.5e-2, 35.0, 1e-6),
    "normal": PassWork(0.5, 2e-2, 90.0, 1e-6),
    "thorough": PassWork(0.5, 2.5e-2, 120.0, 1e-6),
}


@options
class Prune(Learning):
    """Remove whole channels, attention heads and hidden units, and branches; the rest makes up for them.

    What can go together is found on the graph. Which units go is chosen by what the layers that read them
    would lose, and how many of each family by what the outputs lose, measured on calibration data. The
    remaining weights are then fitted to what the original layers computed, without labels. Without data the
    norms of weights decide, and nothing is repaired.

    Within a budget of `macs`, `params` or `latency`, whole branches into sums (attention, perceptrons,
    residual convolutions) compete with units by what they cost the outputs on calibration data. A linear map
    of the skip, a scale and a shift of it, a shift, or nothing stands in for a branch. Branches go where the
    outputs keep more by that once layers are fitted again, as of transformers at half of the latency.

    `latency=0.6` keeps that share of the time of one run, measured on the target, on one thread unless the
    target says otherwise: `onnxslim prune model.onnx faster.onnx --latency 0.6 --data calibration.npz`.

    Matrices that are codes already (MatMulNBits) lose columns and whole blocks, but are not fitted: prune
    first, quantize then. Heads whose keys and values are inputs or outputs of the model stay.

    Where the outputs lose more than `require_sqnr` or `max_drop` allows, less goes than was asked for.
    """

    name: ClassVar[str] = "prune"
    beside_plan: ClassVar[tuple[str, ...]] = ("allow_outputs", "steps", "repair", "effort", "distill")

    macs: float | None = Field(None, gt=0, le=1, description="multiply-accumulates to keep, of 1")
    params: float | None = Field(None, gt=0, le=1, description="parameters to keep, of 1")
    latency: float | None = Field(
        None, gt=0, le=1, description="time of one run on the target to keep, of 1; it is measured"
    )
    ratio: float | None = Field(None, ge=0, lt=1, description="share of the units of every family to remove")
    importance: Importance = Field(
        "auto", description="which units go first; auto is obs with calibration data and l2 without"
    )
    align: int = Field(8, ge=1, description="what is left of a layer is a multiple of so many channels")
    max_ratio: float = Field(0.9, gt=0, lt=1, description="largest share of a family to remove")
    what: What = Field(
        "both",
        description="what may go: units of families, whole branches into sums, for which something linear "
        "stands in, or both; branches go within a budget only, and by calibration data",
    )
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
    distill: StepsBehind = None
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
            UsageError: not exactly one of macs, params, latency, ratio and plan is given; the plan does not
                fit.
            InvalidGraph: a cut is not what setting the same slices to zero is; names the family.
        """
        goals = (self.macs, self.params, self.latency, self.ratio, self.plan)
        if sum(goal is not None for goal in goals) != 1:
            raise UsageError("pass 'prune' needs exactly one of macs, params, latency, ratio and plan")
        if self.plan is not None:
            self.require_alone()
        if self.what == "branches" and self.ratio is not None:
            raise UsageError("pass 'prune': ratio is of units, and what='branches' leaves them whole")
        if self.allow_outputs and (self.require_sqnr is not None or self.max_drop is not None):
            raise UsageError(
                "pass 'prune': outputs that shrink (allow_outputs) cannot be compared with what they were, "
                "as require_sqnr and max_drop want"
            )
        self.require_data(ctx.data)
        return _Run(self, model, ctx).run()

    @property
    def needs_data(self) -> bool:
        """To measure what branches do, and to hold candidates to what is asked for."""
        return self.what == "branches" or super().needs_data

    @property
    def unit(self) -> Unit:
        """What the budget is in."""
        return "params" if self.params is not None else "latency" if self.latency is not None else "macs"

    @property
    def share(self) -> float:
        """What is to be left, of 1."""
        return self.macs or self.params or self.latency or 1.0

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        return WORK[self.effort]

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """Of every family all the numbers of units that may go; and more and more branches, with data."""
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
        self._watch = self._stopwatch(model) if settings.latency is not None else None
        for skip in unfuse(model, "units").skipped:
            self._log.skip(skip.node, skip.reason)
        self._demand = settings.demand(model, ctx)
        # What is held to something must not have been fitted to what it is judged by.
        self._data = ctx.given.apart if self._demand else ctx.data
        self._teacher = model.copy()
        self._model = model
        self._kept: Kept = {}  # slices of the original that are left
        self._cuts: dict[Branch, Kind] = {}  # branches of it that are not
        self._errors: list[float] = []
        self._repaired: tuple[Change, ...] = ()
        self._unrepaired: judging.Kept | None = None
        self._seen: dict[str, Sight] = {}  # what no rule tells the shape of
        self._spared: Mapping[str, str] = {}

    def _stopwatch(self, model: Model) -> Stopwatch:
        given = self._ctx.one_run()
        feeds = make_feeds(model.inputs(), batch=1, size=32) if given is None else given
        return Stopwatch(model.copy(), feeds, self._ctx.target)

    def run(self) -> Changes:
        """All steps."""
        tell_idle(self._settings.exclude, self._teacher, self._log)
        twins = self._prepared()
        self._first = self._analyze(self._model)
        self._before = Costs(self._model, self._first)
        self._whole = self._model.copy()
        done = False
        steps = self._settings.steps if self._settings.plan is None else 1  # a plan tells all at once
        for step in range(1, steps + 1):
            analysis = self._first if step == 1 else self._analyze(self._model)
            amount = self._step(analysis, step / steps)
            done = amount > 0 or done
            if self._demand and amount < 1.0:
                break
            if amount and step < steps:
                self._settings.learn(self._model, self._ctx, self._log)
        if not done:
            self._say_why(self._first)
            return Changes((), self._log.done().skipped)
        figures = self._told()
        reshare(self._model, twins)
        return self._log.done(figures)

    def _prepared(self) -> Twins:
        twins = prepare(self._model)
        self._spared = spared(self._model, self._settings.exclude)
        return twins

    def _origin(self) -> tuple[Analysis, Costs]:
        """What the families were before any unit went, in the model without the branches that went."""
        if not self._cuts:
            return self._first, self._before
        base = self._whole.copy()
        drop(base, {branch: blank(base, branch, kind) for branch, kind in self._cuts.items()})
        analysis = self._analyze(base)
        return analysis, Costs(base, analysis)

    def _start(self, now: Analysis) -> float:
        """What the model cost at first in the unit of the budget.

        Sizes that constants have are not tried, so that a batch may count as often as they say now.
        """
        if self._settings.unit != "macs":
            return self._before.parameters({}) if self._settings.unit == "params" else 1.0
        analysis, costs = self._origin()
        left = costs.macs(Removal.leaving(analysis, self._kept).counts)
        return self._before.macs({}) * (Costs(self._model, now).macs({}) / left if left else 1.0)

    def moves(self) -> list[Move]:
        """What could go, with the damage that decides; see `Pass.propose`."""
        self._prepared()
        stage = self._stage(self._analyze(self._model))
        return [*self._moves_of_branches(stage), *self._moves_of_units(stage)]

    def _moves_of_branches(self, stage: Stage) -> list[Move]:
        """In one group, as branches interact: more and more of them, measured together."""
        all_of = branches(self._model).found
        found = []
        for cuts, damage, _ in Within(stage, "macs", stage.costs.macs({}), 0.0).branch_rungs():
            gone = self._gone({name for each in cuts for name in each.nodes})
            move = Move(
                step=self._settings.name,
                group="branches",
                option=f"{len(cuts)} of {len(all_of)} branches",
                left=dict.fromkeys(gone, 0.0) | left_of(cuts, stage.costs, stage.analysis.sizes),
                damage=damage,
                measured=True,
                plan=PruningPlan.of(Removal(stage.analysis, {}), cuts, all_of),
                gone=frozenset(gone),
            )
            found.append(move)
        return found

    def _gone(self, made: set[str]) -> set[str]:
        """What nodes make first, and the constants that nobody else reads, which several may share."""
        nodes = {
            id(node): node
            for node in self._model.graph.nodes
            if node.outputs and node.outputs[0].name in made
        }
        read = (tensor for node in nodes.values() for tensor in node.inputs if isinstance(tensor, Constant))
        return made | {each.name for each in read if all(id(reader) in nodes for reader in each.outputs)}

    def _moves_of_units(self, stage: Stage) -> list[Move]:
        return [
            Move(
                step=self._settings.name,
                group=name,
                option=f"{count} of {stage.found.families[name].size} units",
                left=stage.costs.shares({name: count}),
                damage=damage,
                measured=self._data is not None,
                plan=PruningPlan.of(stage.ordered.removal({name: count})),
            )
            for name, curve in stage.curves.items()
            for count, damage in curve.items()
            if count
        ]

    def _analyze(self, model: Model) -> Analysis:
        sizes, told = None, dict[str, Sight]()
        for feeds in self._samples():
            sizes = {name: array.shape for name, array in feeds.items()}
            told = seen(model, feeds, self._ctx.target)
        self._seen.update(told)
        return analyze(
            model,
            sizes=sizes,
            seen={name: each.shape for name, each in told.items()},
            allow_outputs=self._settings.allow_outputs,
        )

    def _samples(self) -> list[Feeds]:
        """The first batch, if there is one."""
        return list(islice(self._data.fit, 1)) if self._data is not None else []

    def _stage(self, analysis: Analysis) -> Stage:
        """The model as it is now, and how to choose what goes of it."""
        wish = self._settings
        way = Way(
            wish.what,
            wish.importance,
            wish.align,
            wish.max_ratio,
            wish.effort,
            self._spared,
            self._data,
            self._ctx,
            self._log,
            self._teacher,
            self._analyze,
            lambda model, removal, data: self._repair(model, removal.after(self._kept), data),
        )
        return Stage(self._model, analysis, way)

    def _step(self, analysis: Analysis, progress: float) -> float:
        """Choose, prove, cut and repair; how much of what should go did, of 1."""
        choose = self._chooser(analysis, progress)
        amount = 1.0 if self._demand is None else self._amount(choose, self._demand)
        choice = choose(amount)
        if progress == amount == 1:
            self._tell(choose)
        if not choice:
            return 0.0
        self._prove(choice)
        choice.applied(self._model, self._settings.repair != "none")
        self._kept = choice.removal.after(self._kept)
        made = {branch: stand_in.kind for branch, stand_in in choice.cuts.items()}
        gone = {name for branch in made for name in branch.nodes}
        self._cuts = {branch: kind for branch, kind in self._cuts.items() if branch.sum not in gone} | made
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

    def _prove(self, choice: Choice) -> None:
        """That what goes of the model is what setting it to zero is."""
        target, samples = self._ctx.target, self._samples()
        left = self._model
        found = [prove_dropped(left, list(choice.cuts), target, samples)]
        if choice.cuts:
            left = left.copy()
            drop(left, choice.cuts)
        found.append(prove(left, choice.removal, target, samples))
        self._errors += [error for error in found if error is not None]

    def _amount(self, choose: _Chooser, demand: Demand) -> float:
        """The most that may go; 0, with the reason, if nothing may."""
        known: dict[str, _PruneTrial] = {}

        def make(back: int) -> _PruneTrial:
            amount = 1.0 - back / LEVELS
            choice = choose(amount)
            if choice.key not in known:
                model = self._model.copy()
                choice.applied(model, self._settings.repair != "none")
                self._repair(model, choice.removal.after(self._kept), self._data)
                known[choice.key] = _PruneTrial(model, amount)
            return known[choice.key]

        made = demand.least(make, LEVELS - 1)
        name = self._model.graph.name or "model"
        if made is None:
            self._log.skip(name, f"left as it is, however little goes: {demand.shortfall}")
        elif made.amount < 1.0:
            share = f"only {percent(made.amount)} of what was asked for"
            self._log.skip(name, f"{share} goes: with more, {demand.refused}")
        return made.amount if made is not None else 0.0

    def _chooser(self, analysis: Analysis, progress: float) -> _Chooser:
        """From how much of what this step should reach, of 1, to what goes."""
        settings, stage = self._settings, self._stage(analysis)
        if settings.plan is not None:
            plan = PruningPlan.given(settings.plan)
            planned = without(stage, plan.cuts(branches(self._model).found) if plan.branches else {})
            choice = Choice(planned.cuts, plan.removal(planned.analysis), None)
            return lambda _: choice
        if settings.ratio is not None:
            found = stage.way.candidates(self._model, analysis, self._data.seen if self._data else None)
            share = 1 - (1 - settings.ratio) ** (1 / settings.steps)
            return lambda amount: Choice(
                {}, found.removal(uniform(found.families, found.limits, share * amount)), found
            )
        return Within(stage, settings.unit, self._start(analysis), settings.share**progress, self._watch)

    def _tell(self, choose: _Chooser) -> None:
        """What the last choice of all leaves to be desired."""
        if not isinstance(choose, Within):
            return
        wish, name = self._settings, self._model.graph.name or "model"
        for branch in choose.spared:
            self._log.skip(branch.label, "its branch stays: the outputs keep more if units go alone")
        if missed := shortfall(choose.reached, wish.share, wish.unit, wish.what, wish.align, wish.max_ratio):
            self._log.skip(name, missed)

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

    def _told(self) -> PruneFigures:
        """Figures of the whole; in the log what became of each family."""
        analysis, origin = self._origin()
        removal = Removal.leaving(analysis, self._kept)
        for branch, kind in self._cuts.items():
            self._log.change(branch.label, "its branch is gone", STANDS_IN[kind].format(branch.skip))
        for family in analysis.families:
            if gone := removal.counts.get(family.name):
                self._log.change(family.name, f"{gone} of {family.size} units removed", _note(family.crosses))
        costs = Costs(self._model, self._analyze(self._model))
        for name in self._seen:
            self._log.skip(name, NOTE)
        all_of = branches(self._whole).found if self._cuts else ()
        return PruneFigures(
            macs=(self._before.macs({}), origin.macs(removal.counts)),
            params=(self._before.parameters({}), costs.parameters({})),
            plan=PruningPlan.of(removal, self._cuts, all_of),
            repairs=self._repaired,
            unrepaired=self._unrepaired,
            families=len(removal.counts),
            branches={branch.label: kind for branch, kind in self._cuts.items()} or None,
            latency=self._watch([self._model.copy])[0] if self._watch else None,
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
