"""The forms that are measured faster at each place, what they cost the outputs, and which are chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxslim.calibration.fidelity import Judge
from onnxslim.engine.allocate import Additive, allocate
from onnxslim.engine.base import Context, Log
from onnxslim.engine.editor import Editor
from onnxslim.errors import OnnxSlimError, UsageError, nearest
from onnxslim.ir.graph import Array, Constant, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.passes.cheapen.forms import APPROXIMATIONS, FORMULAS, Approximation, Spelling, Values, write
from onnxslim.passes.cheapen.sites import Site
from onnxslim.passes.extract import cut_out
from onnxslim.runtime.evaluate import evaluate
from onnxslim.runtime.timing import Bench

# Share of the variance of a function that an approximation may lose on its data to be looked at.
MOST_LOST = 0.1


@dataclass(frozen=True)
class FormOffer:
    """A form at one place.

    Attributes:
        form: which.
        values: of an approximation.
        lost: share of the variance of the function on its data that it loses; 0 of a formula.
        time: of it and the operator before, relative to that now; NaN if it was not measured.
        error: what it alone costs the outputs, relative to their variance.
    """

    form: Spelling | Approximation
    values: Values = ()
    lost: float = 0.0
    time: float = math.nan
    error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether it computes the same."""
        return isinstance(self.form, Spelling)

    @property
    def label(self) -> str:
        """Names it among those of its place."""
        return " ".join((self.form.name, *(f"{value:.4g}" for value in self.values)))

    def install(self, edit: Editor, nodes: Sequence[Node], site: Site) -> None:
        """Put it in place.

        Args:
            edit: of the model, or of a copy.
            nodes: there, those of the place.
            site: the place, whose last node is the last of these.
        """
        if isinstance(self.form, Approximation):
            last = nodes[-1]
            write(edit, last, self.form.spelled(*self.values), _start(nodes, site), site.dtype)
            return
        for node in nodes:
            if node.op == self.form.op:
                write(edit, node, self.form.spelled(node), node.inputs[0], site.dtype)


def _start(nodes: Sequence[Node], site: Site) -> Tensor:
    name = site.chain.start.name
    return next(each for node in nodes for each in node.inputs if each.name == name)


@dataclass(frozen=True)
class SiteOffers:
    """A place with the forms there are to choose from.

    Attributes:
        site: the place.
        offers: those that are faster by enough.
        milliseconds: it takes as it is, with the operator before it.
    """

    site: Site
    offers: tuple[FormOffer, ...]
    milliseconds: float


Picks = list[tuple[Site, FormOffer]]


def with_forms(model: Model, picks: Sequence[tuple[Site, FormOffer]]) -> Model:
    """A copy of the model with these forms in it."""
    copy = model.copy()
    install(copy, picks)
    return copy


def install(model: Model, picks: Sequence[tuple[Site, FormOffer]]) -> None:
    """Put forms in the places of a model that they were found in, or of a copy of it."""
    edit = Editor(model)
    made_by = {tensor.name: node for node in model.graph.nodes for tensor in node.outputs if tensor.name}
    for site, offer in picks:
        nodes = [made_by[node.outputs[0].name] for node in site.chain.nodes if node is not site.last]
        offer.install(edit, [*nodes, made_by[site.output]], site)
    edit.commit()


@dataclass(frozen=True)
class MeasuredForm:
    """A form that was timed at one place.

    Attributes:
        site: name of its last node.
        form: its name and values.
        time: of it and the operator before, relative to that now.
        lost: share of the variance of the function on its data that it loses.
        passed: whether it is faster by enough.
    """

    site: str
    form: str
    time: float
    lost: float
    passed: bool


class FormSearch:
    """Finds what there is to choose from.

    Args:
        model: what the places are in.
        forms: names of those allowed.
        min_gain: they must be so many times as fast.
        ctx: target and progress.
        bench: does the timing.
        judge: measures what forms cost the outputs; None where there is no data, and formulas alone are
            looked at.
        log: told of places where nothing is faster.
    """

    def __init__(
        self,
        model: Model,
        forms: Sequence[str],
        min_gain: float,
        ctx: Context,
        bench: Bench,
        judge: Judge | None,
        log: Log,
    ) -> None:
        self._model, self._forms, self._limit = model, forms, 1.0 / min_gain
        self._ctx, self._bench, self._judge, self._log = ctx, bench, judge, log
        self.measured: list[MeasuredForm] = []

    def __call__(self, sites: Sequence[Site]) -> list[SiteOffers]:
        """Places where something is faster."""
        found = []
        for index, site in enumerate(sites):
            entry = self._entry(site)
            if entry is not None:
                found.append(entry)
            if self._ctx.progress:
                self._ctx.progress("measuring forms", index + 1, len(sites))
        return found

    def _entry(self, site: Site) -> SiteOffers | None:
        offers = list(self._offers(site))
        if not offers:
            self._log.skip(site.name, f"no form comes near to its {' '.join(site.ops)}{self._without()}")
            return None
        timed = self._timed(site, offers)
        passed = [each for each in timed.offers if each.time <= self._limit]
        self.measured += [
            MeasuredForm(site.name, each.label, each.time, each.lost, each in passed) for each in timed.offers
        ]
        if not passed:
            best = min(timed.offers, key=lambda each: each.time)
            where = f"{best.time:.2f} of the time on {self._ctx.target.provider}"
            self._log.skip(
                site.name, f"its fastest form ({best.label}) takes {where}, more than {self._limit:.2f}"
            )
            return None
        return replace(timed, offers=tuple(self._judged(site, each) for each in _unbeaten(passed)))

    def _without(self) -> str:
        return "" if self._judge is not None else "; without data, other functions are not tried"

    def _offers(self, site: Site) -> Iterator[FormOffer]:
        opset = self._model.opset
        if site.dtype == np.float32:
            yield from (
                FormOffer(form)
                for form in FORMULAS
                if form.name in self._forms and form.since <= opset and form.op in site.ops
            )
        function = self._function(site)
        if function is not None:
            for form in APPROXIMATIONS:
                if form.name in self._forms and form.since <= opset:
                    values, lost = form.fitted(*function)
                    if lost <= MOST_LOST and not _is(form, values, site):
                        yield FormOffer(form, values, lost)

    def _function(self, site: Site) -> tuple[Array, Array] | None:
        """What the place computes of its data; None if that cannot be told, or is always the same."""
        if site.at is None or self._judge is None or not len(site.at):
            return None
        chain, known = site.chain, {id(site.chain.start): site.at.astype(site.dtype)}
        try:
            made = evaluate(self._model, chain.nodes, [(chain.end, site.dtype)], known)[id(chain.end)]
        except OnnxSlimError:
            return None
        made = made.reshape(-1).astype(np.float64)
        return (site.at, made) if np.isfinite(made).all() and np.ptp(made) > 0 else None

    def _timed(self, site: Site, offers: Sequence[FormOffer]) -> SiteOffers:
        """With the operator before, into which runtimes may fuse a function."""
        generator = np.random.default_rng(0)
        feeds = {site.lead: generator.standard_normal(site.shapes[1], np.float32).astype(site.dtype)}
        makers = {each.label: (lambda each=each: self._alone(site, [(site, each)])) for each in offers}
        timing = self._bench(self._description(site), lambda: self._alone(site, []), makers, feeds)
        timed = tuple(replace(each, time=timing.ratios[each.label]) for each in offers)
        return SiteOffers(site, timed, timing.milliseconds)

    def _alone(self, site: Site, picks: Picks) -> Model:
        part = self._model.copy()
        for node in part.graph.nodes:
            for each in node.inputs:
                if isinstance(each, Variable) and each.name in (site.lead, site.chain.start.name):
                    each.dtype = site.dtype  # as it was seen: it need not follow from any rule
        cut_out(part, [], [site.output])
        cut_out(part, [site.lead], [])
        if picks:
            install(part, picks)
        return part

    def _description(self, site: Site) -> str:
        """Everything that the time of a place depends on."""
        before = [
            [node.op, dict(sorted(node.attrs.items())), [_shape(each) for each in node.inputs]]
            for node in site.before
        ]
        what = [self._model.opset, before, site.function, site.shapes, str(site.dtype)]
        return json.dumps(["cheapen", *what], default=str)

    def _judged(self, site: Site, offer: FormOffer) -> FormOffer:
        if offer.exact or self._judge is None:
            return offer
        return replace(offer, error=self._judge(with_forms(self._model, [(site, offer)])).error)


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.values.shape if isinstance(tensor, Constant) else None


def _is(form: Approximation, values: Values, site: Site) -> bool:
    """Whether a place has a form already."""
    pending, ops = [form.spelled(*values)], list[str]()
    while pending:
        each = pending.pop()
        ops.append(each.op)
        pending += [arg for arg in each.args if not isinstance(arg, float | None)]
    return sorted(ops) == sorted(site.ops)


def _unbeaten(offers: Sequence[FormOffer]) -> list[FormOffer]:
    """Without those that another one beats in time and in what it loses at its place."""
    return [
        each
        for each in offers
        if not any(
            other.time <= each.time and other.lost <= each.lost and other is not each for other in offers
        )
    ]


def chosen(entries: Sequence[SiteOffers], error: float) -> Picks:
    """The forms that save most time for errors that add up to no more than this.

    The allocator gives up what saves least for what it loses: time is what is lost, and errors the cost.
    """
    times, errors = {}, {}
    for entry in entries:
        key, whole = entry.site.output, entry.milliseconds
        times[key] = dict(enumerate([whole, *(whole * each.time for each in entry.offers)]))
        errors[key] = dict(enumerate([0.0, *(each.error for each in entry.offers)]))
    choices = Additive(times, errors)
    picks = allocate(choices, error, choices.best())
    found = ((entry, picks[entry.site.output]) for entry in entries)
    return [(entry.site, entry.offers[pick - 1]) for entry, pick in found if pick]


def planned(site: Site, name: str, values: Values, opset: int) -> FormOffer:
    """The form of a plan.

    Raises:
        UsageError: there is none of this name, or the place cannot have it.
    """
    problem, every = "the plan of pass 'cheapen' does not fit the model: ", (*FORMULAS, *APPROXIMATIONS)
    form = next((each for each in every if each.name == name), None)
    if form is None:
        raise UsageError(
            f"{problem}there is no form '{name}'; {nearest(name, [each.name for each in every])}"
        )
    if isinstance(form, Spelling) and form.op not in site.ops:
        raise UsageError(f"{problem}'{name}' is a form of {form.op}, and '{site.output}' has none")
    count = len(form.start) if isinstance(form, Approximation) else 0
    if len(values) != count:
        raise UsageError(f"{problem}'{name}' takes {count} values, not {len(values)}")
    if form.since > opset:
        raise UsageError(f"{problem}'{name}' needs opset {form.since}, and the model has {opset}")
    return FormOffer(form, values)


def at_least(entries: Sequence[SiteOffers]) -> float:
    """The sum of the errors of the fastest forms."""
    return sum(min(entry.offers, key=lambda each: each.time).error for entry in entries)


__all__ = [
    "FormOffer",
    "FormSearch",
    "MeasuredForm",
    "Picks",
    "SiteOffers",
    "at_least",
    "chosen",
    "install",
    "planned",
    "with_forms",
]
