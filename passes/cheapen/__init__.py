"""Cheaper forms of activations, where the target is measured to run them faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import SAMPLES, Samples
from onnxslim.engine import judging
from onnxslim.engine.base import Changes, Context, Figures, Log, PassWork, captioned, options
from onnxslim.engine.demands import LEVELS, Demand, Demanding, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS, tell_idle
from onnxslim.engine.plans import PlanOf
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.cheapen import search, sites
from onnxslim.passes.cheapen.forms import NAMES
from onnxslim.passes.cheapen.plan import CheapeningPlan, CheaperForm
from onnxslim.passes.cheapen.search import FormSearch, MeasuredForm, Picks, SiteOffers
from onnxslim.passes.cheapen.sites import Site
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.repair import repair
from onnxslim.passes.unfuse import unfuse
from onnxslim.runtime import timing
from onnxslim.runtime.probe import make_feeds

FormName = Literal[
    "auto",
    "mish",
    "softplus",
    "elu",
    "celu",
    "selu",
    "relu",
    "leaky_relu",
    "hard_swish",
    "hard_gate",
    "swish",
    "hard_sigmoid",
    "clip",
]
# What all forms together may be expected to cost the outputs, relative to their variance, if nothing is said.
ERROR = 1e-2


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class CheapenFigures(Figures):
    """What cheaper forms have to tell of a model.

    Attributes:
        candidates: forms that were timed.
        forms: by the last node of a function, what it became.
        without: what was not tried without data.
        unrepaired: what the outputs kept before layers were fitted again.
        repaired: how many of them were.
        latency: time of one run, relative to that before.
        plan: what was chosen, to keep and to replay.
    """

    candidates: tuple[MeasuredForm, ...] = ()
    forms: Mapping[str, str] | None = captioned("cheaper forms")
    without: str | None = captioned("tried")
    unrepaired: judging.Kept | None = captioned("before layers were fitted again")
    repaired: int | None = captioned("layers fitted again to what they computed before")
    latency: float | None = captioned("time of one run, relative to that before")
    plan: CheapeningPlan | None = None


@options
class Cheapen(Demanding):
    """Write activations in forms that the target is measured to run faster.

    Some are the same function in other operators: Mish, Softplus, Elu, Celu and Selu by Exp. With calibration
    data, others come close to it where the data are (HardSwish, a product with HardSigmoid or with Sigmoid,
    LeakyRelu, …), with values fitted to these, and the layers behind are fitted again. What saves most time
    for what it costs the outputs is taken, up to a hundredth of their variance (20 dB) before that, or as far
    as `require_sqnr` and `max_drop` allow. A model that is not certainly faster as a whole stays as it is.
    """

    name: ClassVar[str] = "cheapen"
    beside_plan: ClassVar[tuple[str, ...]] = ("repair",)

    forms: Annotated[tuple[FormName, ...], BeforeValidator(_several)] = Field(
        ("auto",), description="forms to choose from; auto is all of them"
    )
    min_gain: float = Field(
        1.1,
        ge=1,
        description="a form must be measured to be so many times as fast, with the operator before it",
    )
    repair: bool = Field(True, description="fit all layers again afterwards, as the repair pass does")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to leave as they are")
    cache: bool = Field(True, description="keep measured times in the user's cache folder")
    require_sqnr: LeastSqnr = None
    max_drop: MostDrop = None
    plan: Annotated[Path | CheapeningPlan | None, PlanOf(CheapeningPlan)] = Field(
        None, description="file of a plan to replay, instead of choosing"
    )

    def __post_init__(self) -> None:
        """Refuse a choice beside a plan."""
        if self.plan is not None:
            self.require_alone()

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        return PassWork(1.0, 5e-2, 20.0, 2e-6)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Rewrite the model in place.

        Raises:
            CalibrationError: the calibration data does not fit the model.
            UsageError: the plan cannot be read, or does not fit the model.
        """
        return _CheapenRun(self, model, ctx)()


@dataclass(frozen=True)
class _CheapTrial:
    """A model with cheaper forms."""

    model: Model
    picks: Picks


class _CheapenRun:
    """One run of the pass.

    Args:
        wish: its options.
        model: edited in place.
        ctx: see `Context`.
    """

    def __init__(self, wish: Cheapen, model: Model, ctx: Context) -> None:
        self._wish, self._model, self._ctx = wish, model, ctx
        self._plan = None if wish.plan is None else CheapeningPlan.given(wish.plan)
        self._log, self._figures = Log(), CheapenFigures()
        self._name = model.graph.name or "model"
        self._demand = wish.demand(model, ctx)
        # What is held to something must not have been fitted to what it is judged by.
        self._data = ctx.given.apart if self._demand else ctx.data
        self._sample = _sample(model, ctx)

    def __call__(self) -> Changes:
        """Find, measure, choose, write, fit."""
        tell_idle(self._wish.exclude, self._model, self._log)
        for skip in (*unfuse(self._model, "layers").skipped, *store_weights(self._model)):
            self._log.skip(skip.node, skip.reason)
        found = sites.find(self._model, self._wish.exclude, self._sample, self._ctx.target, self._log)
        if not found:
            self._log.skip(self._name, "it has no activations but such as are straight pieces")
            return self._log.done(self._figures)
        picks = self._searched(found) if self._plan is None else self._planned(self._plan, found)
        return self._written(picks) if picks else self._log.done(self._figures)

    def _planned(self, plan: CheapeningPlan, found: Sequence[Site]) -> Picks:
        there, opset = {site.output: site for site in found}, self._model.opset
        plan.require({name: site.ops for name, site in there.items()})
        if not plan.forms:
            self._log.skip(self._name, "the plan leaves all of it as it is")
        return [
            (there[each.output], search.planned(there[each.output], each.form, each.values, opset))
            for each in plan.forms
        ]

    def _searched(self, found: Sequence[Site]) -> Picks:
        wish, data, target = self._wish, self._data, self._ctx.target
        names = NAMES if "auto" in wish.forms else wish.forms
        bench = timing.Bench(target, timing.folder() if wish.cache else None)
        judge = None
        if data is None:
            self._figures = replace(self._figures, without="formulas of the same functions, without data")
        else:
            found = sites.seen(found, self._model, data.fit, target)
            judge = Judge(self._model, data.tune, target, SAMPLES)
        look = FormSearch(self._model, names, wish.min_gain, self._ctx, bench, judge, self._log)
        entries = look(found)
        self._figures = replace(self._figures, candidates=tuple(look.measured))
        if self._demand is not None and entries:
            return self._as_demanded(self._demand, entries)
        return self._told(entries, search.chosen(entries, ERROR), f"more than {ERROR:g} of the variance")

    def _told(self, entries: Sequence[SiteOffers], picks: Picks, why: str) -> Picks:
        """The same, having said what is left as it is although something would be faster."""
        taken = {site.output for site, _ in picks}
        for entry in (each for each in entries if each.site.output not in taken):
            best = min(entry.offers, key=lambda each: each.error)
            error = f"{best.label} alone costs the outputs {best.error:.2g} of their variance"
            self._log.skip(entry.site.name, f"{error}, and with all that save more it would be {why}")
        return picks

    def _as_demanded(self, demand: Demand, entries: Sequence[SiteOffers]) -> Picks:
        """The forms that save most and keep enough; none, with a reason, if nothing does."""
        most = max(search.at_least(entries), 1e-12)

        def make(back: int) -> _CheapTrial:
            picks = search.chosen(entries, most * 0.5**back)
            model = search.with_forms(self._model, picks)
            if self._data is not None and self._wish.repair:
                self._repair(model, self._data)
            return _CheapTrial(model, picks)

        made = demand.least(make, LEVELS)
        if made is None:
            self._log.skip(self._name, f"left as it is, however little is changed: {demand.shortfall}")
            return []
        return self._told(entries, made.picks, f"too much: {demand.refused}")

    # Rewriting

    def _written(self, picks: Picks) -> Changes:
        """The model with these forms; as it was if it is not faster."""
        made = search.with_forms(self._model, picks)
        lossy = any(not offer.exact for _, offer in picks)
        if self._ctx.data is not None and self._wish.repair and lossy:
            unrepaired = self._ctx.judge(made)
            repaired = self._repair(made, self._ctx.data)
            for skip in repaired.skipped:
                self._log.skip(skip.node, skip.reason)
            self._figures = replace(self._figures, unrepaired=unrepaired, repaired=len(repaired.changed))
        _, (_, ratio) = timing.compare([self._model, made], self._sample, self._ctx.target)
        self._figures = replace(self._figures, latency=ratio)
        faster = timing.slowdown(made, self._model, self._sample, self._ctx.target, telling=0.0)
        if faster is None and self._plan is None:
            told = f"with {len(picks)} cheaper forms the whole model takes {ratio:.2f} of its time"
            self._log.skip(self._name, f"{told}, which is not certainly less by a twentieth")
            return self._log.done(self._figures)
        self._figures = self._finished(picks)
        self._model.graph = made.graph
        return self._log.done(self._figures)

    def _finished(self, picks: Picks) -> CheapenFigures:
        forms = {}
        for site, offer in picks:
            forms[site.name] = f"{' '.join(site.ops)} as {offer.label}"
            self._log.change(site.name, forms[site.name])
        plan = (CheaperForm(site.output, site.ops, offer.form.name, offer.values) for site, offer in picks)
        return replace(self._figures, forms=forms, plan=CheapeningPlan(tuple(plan)))

    def _repair(self, model: Model, data: Samples) -> Changes:
        """Fit all layers of a copy again to what they computed before."""
        return repair(model, self._model, data, target=self._ctx.target, progress=self._ctx.progress)


def _sample(model: Model, ctx: Context) -> Mapping[str, Array]:
    """Inputs of one run."""
    given = ctx.one_run()
    return make_feeds(model.inputs(), batch=1, size=32) if given is None else given


__all__ = ["Cheapen", "CheapenFigures", "CheapeningPlan"]
