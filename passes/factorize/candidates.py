"""Candidates for every layer, what they cost and lose, and which are chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from onnxslim.calibration.gram import Gram
from onnxslim.engine.allocate import Additive, allocate, convex
from onnxslim.passes.factorize.fit import problem_of
from onnxslim.passes.factorize.gate import SpeedGate, label
from onnxslim.passes.factorize.layers import Whole
from onnxslim.passes.factorize.ranks import curve, step, steps
from onnxslim.passes.factorize.schemes import SCHEMES, Decomposition, Ranks, Scheme

Proposal: TypeAlias = tuple[Scheme, Ranks]
Unit: TypeAlias = Literal["macs", "params", "time"]

# Ranks tried per layer and scheme.
RANKS = 10
# A candidate is not timed if another one loses no more and has this few of its MACs. Of pairs of factors for
# one layer (of the bundled resnet and of a text recognizer, timed by the gate), the one with fewer MACs took
# longer in 35 of 100 where it had 0.90 to 0.95 of the other's, in 36 of 293 for 0.80 to 0.90, in 16 of 544
# for less.
DOMINATED = 0.9
# What loses no more than this is exact but for rounding.
EXACT = 1e-9


@dataclass(frozen=True)
class Factoring:
    """A way to factorize one layer.

    Attributes:
        scheme, ranks: which.
        macs, params: relative to the layer's.
        lost: share of the layer's power on the data, or of its weight's, that it does not explain; NaN if
            nobody asked.
        time: relative to the layer's; NaN if it was not measured.
        error: what it is expected to cost the outputs of the model, relative to their variance.
    """

    scheme: Scheme
    ranks: Ranks
    macs: float
    params: float
    lost: float
    time: float = math.nan
    error: float = math.nan

    @classmethod
    def of(cls, layer: Whole, scheme: Scheme, ranks: Ranks, lost: float = math.nan) -> Factoring:
        """With what it costs of this layer."""
        macs, parameters = scheme.macs(layer, ranks), scheme.parameters(layer, ranks)
        return cls(scheme, ranks, macs / layer.macs, parameters / layer.weight.size, lost)

    @property
    def label(self) -> str:
        """Names it among those of its layer."""
        return label(self.scheme, self.ranks)

    @property
    def told(self) -> str:
        """For reports."""
        time = "" if math.isnan(self.time) else f", {self.time:.2f} of the time"
        return f"{self.label}: {self.macs:.2f} of the MACs, {self.params:.2f} of the weights{time}"

    def cost(self, unit: Unit) -> float:
        """Relative to the layer's."""
        return {"macs": self.macs, "params": self.params, "time": self.time}[unit]


@dataclass(frozen=True)
class LayerOptions:
    """A layer with its candidates.

    Attributes:
        layer: which.
        candidates: those left to choose from.
        milliseconds: the layer takes by itself; NaN if it was not measured.
    """

    layer: Whole
    candidates: tuple[Factoring, ...]
    milliseconds: float = math.nan

    def cost(self, unit: Unit) -> float:
        """Of the layer as it is."""
        return {"macs": self.layer.macs, "params": self.layer.weight.size, "time": self.milliseconds}[unit]


def proposals(
    layer: Whole, schemes: Sequence[str], align: int, unit: Unit, most: float
) -> Iterator[Proposal]:
    """Schemes and ranks worth a look at one layer.

    Args:
        layer: to be factorized.
        schemes: names of those allowed.
        align: ranks of all groups together are multiples of it.
        unit: what is to become less.
        most: cost relative to the layer's above which there is no gain.
    """
    for name in schemes:
        scheme = SCHEMES[name]
        if scheme.refuses(layer) is None and (scheme.within_channels or not layer.depthwise):
            for ranks in _ranks(layer, scheme, align):
                if _cost(layer, scheme, ranks, unit) <= most:
                    yield scheme, ranks


def _cost(layer: Whole, scheme: Scheme, ranks: Ranks, unit: Unit) -> float:
    if unit == "params":
        return scheme.parameters(layer, ranks) / layer.weight.size
    return scheme.macs(layer, ranks) / layer.macs


def _ranks(layer: Whole, scheme: Scheme, align: int) -> Iterator[Ranks]:
    largest = scheme.largest(layer)
    if layer.depthwise:  # of more in between, groups have several channels, for which there is no such kernel
        yield from ((1,) for most in largest if most > 1)
        return
    if len(largest) == 1:
        yield from ((rank,) for rank in steps(largest[0], align, scheme.parts(layer), RANKS))
        return
    # Both widths of Tucker-2 are the same share of the channels; the second is at most what the first fills.
    unit, positions = step(align, layer.groups), math.prod(layer.kernel)
    for share in np.linspace(1 / RANKS, 1.0, RANKS):
        first, second = (min(max(round(share * size / unit), 1) * unit, size) for size in largest)
        yield first, min(second, first * positions)


def factorings(
    layer: Whole, found: Sequence[Proposal], gram: Gram | None
) -> tuple[list[Factoring], dict[str, Decomposition]]:
    """What each of these costs and loses, and by scheme the decomposition that serves all of its ranks."""
    problem = problem_of(layer, gram)
    result, decompositions = list[Factoring](), dict[str, Decomposition]()
    for scheme, group in itertools.groupby(found, key=lambda pair: pair[0]):
        every = list(dict.fromkeys(ranks for _, ranks in group))
        most = tuple(max(column) for column in zip(*every, strict=True))
        decompositions[scheme.name] = parts = scheme.decompose(layer, problem, most)
        result += [Factoring.of(layer, scheme, ranks, parts.lost(ranks)) for ranks in every]
    return result, decompositions


def undominated(found: Sequence[Factoring], unit: Unit) -> list[Factoring]:
    """Without those that another one beats clearly: in parameters at all, in MACs by `DOMINATED`."""
    margin = 1.0 if unit == "params" else DOMINATED
    costs = [candidate.cost("params" if unit == "params" else "macs") for candidate in found]
    return [
        each
        for each, cost in zip(found, costs, strict=True)
        if not any(
            other.lost <= each.lost and (theirs < margin * cost)
            for other, theirs in zip(found, costs, strict=True)
        )
    ]


def timed(entry: LayerOptions, gate: SpeedGate) -> LayerOptions:
    """The entry with the time of the layer and of every candidate."""
    timing = gate(entry.layer, [(each.scheme, each.ranks) for each in entry.candidates])
    measured = tuple(replace(each, time=timing.ratios[each.label]) for each in entry.candidates)
    return LayerOptions(entry.layer, measured, timing.milliseconds)


def expected(entry: LayerOptions, points: Mapping[str, float]) -> LayerOptions:
    """The entry with the error of every candidate, from what a few of them were measured to cost.

    Args:
        entry: of which some candidates were measured.
        points: their error, by label; without any, what is lost counts as it is.
    """
    curves = {scheme: _curve(of_kind, points) for scheme, of_kind in _by_scheme(entry).items()}
    judged = []
    for each in entry.candidates:
        factor, exponent = curves[each.scheme.name]
        judged.append(replace(each, error=factor * each.lost**exponent))
    return replace(entry, candidates=tuple(judged))


def unbeaten(entry: LayerOptions) -> LayerOptions:
    """Without candidates of optimistic schemes that one of another scheme beats in time and in error."""
    others = [each for each in entry.candidates if not each.scheme.optimistic]
    left = tuple(
        each
        for each in entry.candidates
        if not each.scheme.optimistic
        or not any(other.time <= each.time and other.error <= each.error for other in others)
    )
    return replace(entry, candidates=left)


def _curve(found: Sequence[Factoring], points: Mapping[str, float]) -> tuple[float, float]:
    known = [(each.lost, points[each.label]) for each in found if each.label in points]
    return curve(known) if known else (1.0, 1.0)


def _by_scheme(entry: LayerOptions) -> dict[str, list[Factoring]]:
    """Candidates by scheme, those that lose least first."""
    found: dict[str, list[Factoring]] = {}
    for each in sorted(entry.candidates, key=lambda each: each.lost):
        found.setdefault(each.scheme.name, []).append(each)
    return found


def probed(entry: LayerOptions) -> list[Factoring]:
    """The candidates to measure end to end: of each scheme the one that loses most, and one halfway down.

    Schemes that lose as much of a layer do not lose the same directions of it.
    """
    found: dict[str, Factoring] = {}
    for kind in _by_scheme(entry).values():
        usable = [each for each in kind if each.lost > EXACT]
        found.update((each.label, each) for each in (*usable[-1:], *usable[(len(usable) - 1) // 2 :][:1]))
    return list(found.values())


def chosen(entries: Sequence[LayerOptions], unit: Unit, budget: float) -> tuple[list[Factoring | None], bool]:
    """A candidate for each layer, or None to leave it whole, within a budget for all of them together.

    Returns:
        The choice, and whether it is within the budget.
    """
    costs, errors = {}, {}
    for entry in entries:
        whole, key = entry.cost(unit), entry.layer.output
        costs[key] = dict(enumerate([whole, *(whole * each.cost(unit) for each in entry.candidates)]))
        errors[key] = dict(enumerate([0.0, *(each.error for each in entry.candidates)]))
    choices = Additive(errors, costs)
    found = allocate(choices, budget, choices.best())
    picks = [entry.candidates[pick - 1] if (pick := found[entry.layer.output]) else None for entry in entries]
    return picks, choices.cost(found) <= budget


def ladder(entry: LayerOptions, unit: Unit) -> list[Factoring]:
    """The candidates that are best at some price of the unit, those that save least first."""
    best: dict[float, Factoring] = {}
    for each in sorted(entry.candidates, key=lambda each: -each.error):
        best[1.0 - each.cost(unit)] = each
    hull = convex({0.0: 0.0, **{saved: each.error for saved, each in best.items()}})
    return [each for saved, each in sorted(best.items()) if saved > 0 and each.error <= hull[saved]]


def by_energy(entries: Sequence[LayerOptions], lost: float, unit: Unit) -> list[Factoring | None]:
    """For each layer the cheapest candidate that loses no more than this share, if there is one."""
    found: list[Factoring | None] = []
    for entry in entries:
        usable = [each for each in entry.candidates if each.lost <= lost]
        found.append(min(usable, key=lambda each: each.cost(unit), default=None))
    return found
