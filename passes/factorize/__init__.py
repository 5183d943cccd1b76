"""Low-rank factorization of convolutions and matrix products, where it is measured to pay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from onnxslim.calibration.samples import Samples
from onnxslim.calibration.seen import NOTE, Sight, seen
from onnxslim.engine import judging
from onnxslim.engine.base import Changes, Context, Effort, Figures, Log, PassWork, captioned, options, several
from onnxslim.engine.demands import LEVELS, Demand, LeastSqnr, MostDrop
from onnxslim.engine.editor import Editor
from onnxslim.engine.matching import GLOBS, tell_idle
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PlanOf
from onnxslim.errors import TimeUp, UsageError
from onnxslim.formats import percent
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.distill.behind import Learning, StepsBehind
from onnxslim.passes.factorize import candidates, chains, fit
from onnxslim.passes.factorize.candidates import Factoring, LayerOptions, Unit
from onnxslim.passes.factorize.fit import FactorGoals, Fitted
from onnxslim.passes.factorize.gate import SpeedGate
from onnxslim.passes.factorize.layers import Whole
from onnxslim.passes.factorize.plan import FactorizationPlan
from onnxslim.passes.factorize.schemes import SCHEMES
from onnxslim.passes.factorize.search import FactorSearch, MeasuredFactors, Wanted, layers_of, with_factors
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.repair import repair
from onnxslim.passes.repair.support import support
from onnxslim.passes.unfuse import unfuse
from onnxslim.runtime import timing
from onnxslim.runtime.probe import make_feeds
from onnxslim.shapes import cost

SchemeName = Literal["auto", "svd", "output", "input", "spatial", "tucker", "separable"]
Picks = list[tuple[LayerOptions, Factoring]]

# What is asked for if nothing is said: half of the multiply-accumulates.
DEFAULT_MACS = 0.5
# How often a budget of time is corrected by what the whole model takes, and how exactly it is to be met.
CORRECTIONS, TOLERANCE = 5, 0.02


@dataclass(frozen=True)
class FactorizeFigures(Figures):
    """What factorizing has to tell of a model.

    Attributes:
        candidates: factors that were timed.
        budget: what is left of what was to become less, and what was wanted.
        layers: the factors of each layer that has some now.
        fitted: to what factors were fitted, if not to data.
        unrepaired: what the outputs kept before layers were fitted again.
        repaired: how many of them were.
        latency: time of one run, relative to that before.
        plan: what was chosen, to keep and to replay.
    """

    candidates: tuple[MeasuredFactors, ...] = ()
    budget: str | None = captioned("left")
    layers: Mapping[str, str] | None = captioned("factors")
    fitted: str | None = captioned("fitted")
    unrepaired: judging.Kept | None = captioned("before layers were fitted again")
    repaired: int | None = captioned("layers fitted again to what they computed before")
    latency: float | None = captioned("time of one run, relative to that before")
    plan: FactorizationPlan | None = None


WORK: Mapping[Effort, PassWork] = {
    "quick": PassWork(0.5, 1e-2, 60.0, 2e-6),
    "normal": PassWork(0.5, 1e-2, 90.0, 2e-6),
    "thorough": PassWork(0.5, 1e-2, 150.0, 2e-6),
}


@options
class Factorize(Learning):
    """Write convolutions and matrix products as two or three smaller ones, where these are measured faster.

    Each layer is left whole or gets the scheme and ranks that cost the outputs least for what they save, so
    that the model keeps to one of the budgets `macs`, `params`, `energy` and `speedup` (half of the
    multiply-accumulates if none is given). With calibration data, factors are fitted to what the layer
    computes on them, one layer after the other; without, to the weights, which costs much more accuracy.

    Where the outputs lose more than `require_sqnr` or `max_drop` allows, less is saved than was asked for:
    the layers that cost most get higher ranks, or are given back.
    """

    name: ClassVar[str] = "factorize"
    beside_plan: ClassVar[tuple[str, ...]] = ("fitted", "repair", "effort", "distill")

    macs: float | None = Field(None, gt=0, lt=1, description="share of the multiply-accumulates to keep")
    params: float | None = Field(None, gt=0, lt=1, description="share of the parameters to keep; no timing")
    energy: float | None = Field(
        None, gt=0, lt=1, description="share of the power of its output that every factorized layer keeps"
    )
    speedup: float | None = Field(None, gt=1, description="how many times as fast the model is to be")
    schemes: Annotated[tuple[SchemeName, ...], BeforeValidator(several)] = Field(
        ("auto",), description="kinds of factors to choose from; auto is all of them"
    )
    align: int = Field(8, ge=1, description="ranks are multiples of this")
    min_gain: float = Field(
        1.1, ge=1, description="factors must be measured to be so many times as fast as their layer"
    )
    fitted: bool = Field(True, description="fit factors to the calibration data, if there are any")
    repair: bool = Field(True, description="fit all layers again afterwards, as the repair pass does")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to leave whole")
    effort: Effort = Field(
        "normal",
        description="how much to try: quick judges factors on few samples and fits layers by "
        "regression alone; thorough tries every rank in the network",
    )
    cache: bool = Field(True, description="keep measured times in the user's cache folder")
    distill: StepsBehind = None
    require_sqnr: LeastSqnr = None
    max_drop: MostDrop = None
    plan: Annotated[Path | FactorizationPlan | None, PlanOf(FactorizationPlan)] = Field(
        None, description="file of a plan to replay, instead of choosing"
    )

    def __post_init__(self) -> None:
        """Refuse two budgets, and a choice beside a plan."""
        if self.plan is not None:
            self.require_alone()
        given = [name for name in ("macs", "params", "energy", "speedup") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"pass 'factorize' takes one budget, not {' and '.join(given)}")

    @property
    def unit(self) -> Unit:
        """What the budget is in."""
        return "params" if self.params is not None else "time" if self.speedup is not None else "macs"

    def run(self, model: Model, ctx: Context) -> Changes:
        """Factorize the model in place.

        Raises:
            CalibrationError: the calibration data does not fit the model.
            UsageError: the plan cannot be read, or does not fit the model.
        """
        return _Work(self, model, ctx)()

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        return WORK[self.effort]

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """Of every layer the factors that are worth it at some price of the unit of the budget."""
        return _Work(self, model.copy(), ctx).moves()


@dataclass(frozen=True)
class _FactorTrial:
    """A model with factors of some layers: to save so much of what was asked for, of 1."""

    model: Model
    picks: Picks
    amount: float


class _Work:
    """One run of the pass.

    Args:
        wish: its options.
        model: edited in place.
        ctx: see `Context`.
    """

    def __init__(self, wish: Factorize, model: Model, ctx: Context) -> None:
        self._wish = wish
        self._plan = None if wish.plan is None else FactorizationPlan.given(wish.plan)
        self._model = model
        self._ctx = ctx
        self._log = Log()
        self._figures = FactorizeFigures()
        self._name = model.graph.name or "model"
        self._demand = wish.demand(model, ctx)
        # What is held to something must not have been fitted to what it is judged by.
        given = ctx.given.apart if self._demand else ctx.data
        self._data = given if wish.fitted else None
        self._sample = _sample(model, ctx)
        self._shapes = {name: array.shape for name, array in self._sample.items()}
        self._entries: list[LayerOptions] = []  # what there is to choose from
        self._size = 0.0  # of the whole, in the unit of the budget

    def __call__(self) -> Changes:
        """Search, choose, rewrite, measure."""
        told = self._prepared()
        picks = self._searched(told) if self._plan is None else self._planned(self._plan, told)
        teacher = self._model.copy()
        if self._demand is not None and picks:
            picks = self._as_demanded(self._demand, picks, teacher)
        if not picks:
            return self._log.done(self._figures)
        for name in told or ():
            self._log.skip(name, NOTE)
        data = self._ctx.data if self._wish.fitted else None
        # What is not to be had of what has factors.
        names = [entry.layer.name for entry, _ in picks]
        sparse = {entry.layer.name for entry, _ in picks if support(entry.layer.weight) is not None}
        plans = [FactorizationPlan.of([each]) for each in picks]
        done = self._install(self._model, picks, teacher, data)
        for name, (_, pick) in zip(names[:done], picks, strict=False):
            lost = "; its zeros are lost" if name in sparse else ""
            self._log.change(name, pick.told + lost, f"{pick.scheme.name} factors")
        self._figures = replace(
            self._figures,
            layers={name: pick.told for name, (_, pick) in zip(names[:done], picks, strict=False)},
            plan=reduce(lambda one, other: one.joined(other), plans[:done]),
            fitted=None if self._data else "to the weights: with calibration data, factors lose much less",
        )
        if data is not None and self._wish.repair:
            unrepaired = self._ctx.judge(self._model)
            repaired = self._repair(self._model, teacher, data)
            for skip in repaired.skipped:
                self._log.skip(skip.node, skip.reason)
            self._figures = replace(self._figures, unrepaired=unrepaired, repaired=len(repaired.changed))
        return self._judged(teacher)

    def moves(self) -> list[Move]:
        """What could be done to which layer; see `Pass.propose`."""
        layers, _ = layers_of(self._model, self._shapes, self._wish.exclude, self._log, self._prepared())
        return [
            Move(
                step=self._wish.name,
                group=entry.layer.output,
                option=pick.label,
                left={entry.layer.output: pick.macs, entry.layer.node.inputs[1].name: pick.params},
                damage=pick.error,
                measured=self._data is not None,
                plan=FactorizationPlan.of([(entry, pick)]),
                seconds=None if math.isnan(pick.time) else entry.milliseconds * (1.0 - pick.time) / 1e3,
            )
            for entry in self._search(layers)
            for pick in candidates.ladder(entry, self._wish.unit)
        ]

    def _prepared(self) -> dict[str, Sight] | None:
        """Weights as constants; what data tells of shapes that follow from no rule."""
        tell_idle(self._wish.exclude, self._model, self._log)
        for skip in (*unfuse(self._model, "layers").skipped, *store_weights(self._model)):
            self._log.skip(skip.node, skip.reason)
        return seen(self._model, self._sample, self._ctx.target) if self._data is not None else None

    def _planned(self, plan: FactorizationPlan, told: Mapping[str, Sight] | None) -> Picks:
        """What the plan says; it also knows layers that a search takes for factors."""
        if not plan.layers:
            self._log.skip(self._name, "the plan leaves all layers whole")
        layers, known = layers_of(self._model, self._shapes, (), Log(), told)
        return plan.picks((*layers, *itertools.chain.from_iterable(known)))

    def _searched(self, told: Mapping[str, Sight] | None) -> Picks:
        """What costs the outputs least; nothing where the budget is met already."""
        layers, known = layers_of(self._model, self._shapes, self._wish.exclude, self._log, told)
        whole = chains.undone(self._model, known) if known else self._model
        if known and self._is_met(whole):
            return []
        return self._choose(self._search(layers), whole)

    def _search(self, layers: Sequence[Whole]) -> list[LayerOptions]:
        wish = self._wish
        schemes = tuple(SCHEMES) if "auto" in wish.schemes else wish.schemes
        wanted = Wanted(wish.unit, schemes, wish.align, wish.min_gain, wish.effort)
        bench = timing.Bench(self._ctx.target, timing.folder() if wish.cache else None)
        search = FactorSearch(
            self._model, wanted, self._ctx, SpeedGate(self._model, bench), self._data, self._log
        )
        self._entries = search(layers)
        self._figures = replace(self._figures, candidates=tuple(search.measured))
        return self._entries

    # Choosing

    def _is_met(self, whole: Model) -> bool:
        """Whether factors that are there already save what is asked for."""
        if self._wish.energy is not None:
            return False
        if self._wish.unit == "time":
            _, (_, share) = timing.compare([whole, self._model], self._sample, self._ctx.target)
        else:
            share = self._total(self._model) / self._total(whole)
        met = share <= self._share + (TOLERANCE if self._wish.unit == "time" else 0.0)
        if met:
            self._log.skip(
                self._name, f"the factors in it leave {share:.1%} of its {self._wish.unit} already"
            )
        return met

    @property
    def _share(self) -> float:
        wish = self._wish
        return wish.params or wish.macs or (1.0 / wish.speedup if wish.speedup else DEFAULT_MACS)

    def _total(self, model: Model) -> float:
        """Parameters or multiply-accumulates of a model; of the latter, those of its layers at least."""
        if self._wish.unit == "params":
            return model.stats().parameters
        return cost.macs(model, self._shapes) or self._layer_macs(model)

    def _layer_macs(self, model: Model) -> int:
        found, known = layers_of(model, self._shapes, (), Log())
        return sum(layer.macs for layer in (*found, *itertools.chain.from_iterable(known)))

    def _choose(self, entries: Sequence[LayerOptions], whole: Model) -> Picks:
        """A candidate for each layer that gets one; says what keeps others whole."""
        wish, why = self._wish, "the budget is met without it"
        if not entries:
            self._log.skip(self._name, "no layer has factors that save anything")
            return []
        if wish.energy is not None:
            found = candidates.by_energy(entries, 1.0 - wish.energy, wish.unit)
            why = f"no factors that save keep {wish.energy:.1%} of its power"
        elif wish.unit == "time":
            found = self._in_time(entries, whole)
        else:
            found = self._in_size(entries, whole)
        for entry, pick in zip(entries, found, strict=True):
            if pick is None:
                self._log.skip(entry.layer.name, f"left whole: {why}")
        return [(entry, pick) for entry, pick in zip(entries, found, strict=True) if pick is not None]

    def _in_size(self, entries: Sequence[LayerOptions], whole: Model) -> list[Factoring | None]:
        unit, total = self._wish.unit, self._total(whole)
        self._size = total
        fixed = self._total(self._model) - sum(entry.cost(unit) for entry in entries)
        found, met = candidates.chosen(entries, unit, self._share * total - fixed)
        left = self._left([(entry, pick) for entry, pick in zip(entries, found, strict=True) if pick], total)
        self._figures = replace(self._figures, budget=self._told(left))
        if not met:
            why = f"budget out of reach: {left:.1%} of its {unit} is the least, not {self._share:.1%}"
            self._log.skip(self._name, why)
        return found

    def _left(self, picks: Picks, total: float) -> float:
        """What is left of the size of a model with factors like these, of 1."""
        unit = self._wish.unit
        saved = sum(entry.cost(unit) * (1.0 - pick.cost(unit)) for entry, pick in picks)
        return (self._total(self._model) - saved) / total

    def _told(self, left: float) -> str:
        return f"{left:.1%} of {self._wish.unit}, {self._share:.1%} wanted"

    def _in_time(self, entries: Sequence[LayerOptions], whole: Model) -> list[Factoring | None]:
        """Candidates with which the whole model is as fast as asked for: a budget for layers, corrected."""
        (first, _), (_, now) = timing.compare([whole, self._model], self._sample, self._ctx.target)
        budget = sum(entry.milliseconds for entry in entries) - first.median * (now - self._share)
        found: list[Factoring | None] = []
        ratio = now
        for _ in range(CORRECTIONS):
            found, met = candidates.chosen(entries, "time", budget)
            picks = [(entry, pick) for entry, pick in zip(entries, found, strict=True) if pick]
            _, (_, ratio) = timing.compare([whole, self._shaped(picks)], self._sample, self._ctx.target)
            if not met or abs(ratio - self._share) <= TOLERANCE:
                break
            budget -= (ratio - self._share) * first.median
        self._figures = replace(
            self._figures, budget=f"{1 / ratio:.2f} times as fast, {1 / self._share:.2f} wanted"
        )
        if ratio > self._share + TOLERANCE:
            why = f"budget out of reach: {1 / ratio:.2f} times as fast is the most that was measured"
            self._log.skip(self._name, why)
        return found

    def _shaped(self, picks: Picks) -> Model:
        """The model with factors of the right sizes; what is in them does not matter."""
        return with_factors(
            self._model,
            [
                (
                    entry.layer,
                    pick,
                    Fitted([np.ones(shape) for shape in pick.scheme.shapes(entry.layer, pick.ranks)], None),
                )
                for entry, pick in picks
            ],
        )

    # Doing less

    def _as_demanded(self, demand: Demand, picks: Picks, teacher: Model) -> Picks:
        """Factors that save as much of what these do as they may; none, with a reason, if nothing."""

        def make(back: int) -> _FactorTrial:
            amount = 1.0 - back / LEVELS
            less = self._less(picks, amount)
            model = teacher.copy()
            self._install(model, less, teacher, self._data)
            if self._data is not None and self._wish.repair:
                self._repair(model, teacher, self._data)
            return _FactorTrial(model, less, amount)

        made = demand.least(make, LEVELS - 1)
        if made is None or not made.picks:
            self._log.skip(self._name, f"left whole, however little is saved: {demand.shortfall}")
            return []
        if made.amount < 1.0:
            share = f"only {percent(made.amount)} of what could be saved"
            self._log.skip(self._name, f"{share} is: with more, {demand.refused}")
            self._figures = replace(self._figures, budget=self._told_of(made.picks))
        return made.picks

    def _told_of(self, picks: Picks) -> str | None:
        """What is left with other factors than were chosen; of time nobody knows before it is measured."""
        if self._wish.energy is not None or self._wish.unit == "time":
            return None
        return self._told(self._left(picks, self._size))

    def _less(self, picks: Picks, amount: float) -> Picks:
        """Factors that save so much, of 1, of what these do; those that cost the outputs least for it."""
        wish = self._wish
        if amount == 1.0:
            return picks
        entries, unit = self._entries, wish.unit
        saved = sum(entry.cost(unit) * (1.0 - pick.cost(unit)) for entry, pick in picks)
        whole = sum(entry.cost(unit) for entry in entries)
        if wish.energy is not None:
            found = candidates.by_energy(entries, (1.0 - wish.energy) * amount, unit)
        else:
            found, _ = candidates.chosen(entries, unit, whole - amount * saved)
        return [(entry, pick) for entry, pick in zip(entries, found, strict=True) if pick is not None]

    # Rewriting

    def _install(self, model: Model, picks: Picks, teacher: Model, data: Samples | None) -> int:
        """Put factors in place, each fitted to what the ones before make; how many there was time for."""
        edit = Editor(model)
        made_by = {node.outputs[0].name: node for node in model.graph.nodes if node.outputs}
        goals = None
        if data is not None:
            seen = [entry.layer for entry, _ in picks if fit.observable(entry.layer)]
            goals = fit.FactorGoals(teacher, data, seen, self._ctx.target)
        for index, (entry, pick) in enumerate(picks):
            layer = entry.layer
            fitted = self._fitted(model, layer, pick, goals)
            factors = pick.scheme.factors(layer, fitted.weights)
            layer.install(edit, made_by[layer.output], factors, fitted.bias)
            edit.commit()
            try:
                if self._ctx.progress:
                    self._ctx.progress("fitting", index + 1, len(picks))
            except TimeUp as error:
                for late, _ in picks[index + 1 :]:
                    self._log.skip(late.layer.name, f"left whole, as its factors were not fitted: {error}")
                return index + 1
        return len(picks)

    def _repair(self, model: Model, teacher: Model, data: Samples) -> Changes:
        """Fit all layers again to what they computed before."""
        return repair(
            model,
            teacher,
            data,
            target=self._ctx.target,
            progress=self._ctx.progress,
            descend=self._wish.effort != "quick",
        )

    @staticmethod
    def _fitted(model: Model, layer: Whole, pick: Factoring, goals: FactorGoals | None) -> Fitted:
        if goals is None or not fit.observable(layer):
            return fit.fit(layer, pick.scheme, pick.ranks)
        return fit.fit_moved(layer, pick.scheme, pick.ranks, *fit.against(model, goals, layer))

    def _judged(self, teacher: Model) -> Changes:
        """What was done; nothing, if speed was asked for and the whole is not faster."""
        _, ratios = timing.compare([teacher, self._model], self._sample, self._ctx.target)
        self._figures = replace(self._figures, latency=ratios[1])
        if ratios[1] >= 1.0:
            slower = f"the whole model is not faster: it takes {ratios[1]:.2f} of its time"
            self._log.skip(self._name, slower)
            if self._wish.unit == "time":
                self._model.graph = teacher.graph
                return Changes((), self._log.done().skipped, self._figures)
        return self._log.done(self._figures)


def _sample(model: Model, ctx: Context) -> Mapping[str, Array]:
    """Inputs of one run."""
    given = ctx.one_run()
    return make_feeds(model.inputs(), batch=1, size=32) if given is None else given


__all__ = ["FactorizationPlan", "Factorize", "FactorizeFigures"]
