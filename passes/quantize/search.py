"""Which of many candidates to take: everything is decided by what comes out of the network in the end.

Errors of layers add up almost exactly (each is small and has little to do with the others), so that what
every layer does on its own, measured once (a sensitivity analysis), tells beforehand which ones have to be
kept for a wanted fidelity. Candidates chosen that way are measured as wholes before they are believed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TypeVar
from weakref import WeakKeyDictionary

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import FAILED, Judge, Score
from onnxslim.calibration.noise import decibels_of
from onnxslim.engine.allocate import Additive, allocate, fewest
from onnxslim.engine.base import Log
from onnxslim.errors import LoadError, TimeUp
from onnxslim.ir.graph import Constant, Dim, Node
from onnxslim.ir.model import Model
from onnxslim.passes.quantize.build import Builder
from onnxslim.passes.quantize.choices import ObserverChoice, Variant
from onnxslim.passes.quantize.goal import TrialGoal
from onnxslim.passes.quantize.tables import weight_of
from onnxslim.passes.quantize.trial import Trial

T = TypeVar("T")

OBSERVERS: tuple[ObserverChoice, ...] = (
    ("mse", 0.0),
    ("minmax", 0.0),
    ("percentile", 99.999),
)
# In dB: what keeps more is not worth a search. At 30 dB the bundled networks decide as before on 99.65 % of
# images or more (README), and a search takes 10 to 20 seconds more (decision 38).
ENOUGH = 30.0
# A simple candidate that comes before others has to be beaten by this much, in dB: the rest is chance.
# Not tuned: repeated runs of a network on other samples move by more.
MARGIN = 0.2
# In dB: candidates that keep alike, and whose weights are fitted next, are told apart by the noise of their
# activations, of which fitting takes nothing back. EfficientNet-Lite0 keeps 24.0 to 24.5 dB by all ways, and
# once fitted 27.6 to 29.3, in the order of what its activations keep (decision 119).
ALIKE = 0.5
# What ranges of all data may cost, in dB, on the samples chosen by: they are worth it on what is unseen.
# Not tuned: more was lost where samples to choose by have values of their own that stretch a range.
HARMLESS = 1.0
# Samples that rank layers; verification takes all there are. Noise of layers adds up (decision 29), so that
# few samples tell their order.
RANKING = 8
# A candidate has to be that much faster than the one it replaces: times that are taken in turn agree to 2 %.
FASTER = 0.97
# Of the layers kept out of integers, how many of the largest are tried in integers again.
SPARED = 16
# How many candidates that takes at the most.
TRIES = 4
# Of the noise that a layer is expected to add in integers again, the part that has to fit in what the goal
# leaves for it to be tried. Not tuned: noise of layers adds up almost exactly (decision 29).
SURE = 0.25
# Kinds of layers that are tried in floating point, one kind at a time.
KINDS = 8
_TINY = 1e-30
# Options of a layer, and by how much steps of eight bits are finer than those of four.
FEW, MANY, FINER = 0, 1, 16.0
ROOM = "there is room for it in eight bits"
SLOWER = "it is faster in floating point"
REASON = "in integers it would cost too much accuracy"
COARSE = "in fewer bits its weight would cost too much accuracy"


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one weighted node does to the outputs.

    Attributes:
        node, op: its label and operator.
        noise: power of the noise by that of the signal, with this node alone in integers.
        error: the same by its variance, over all of the outputs.
        bytes: of all constants then.
        tensors: names of those whose ranges it depends on.
        cost: mean of its shares of multiply-accumulates and of weights, 1 for an average layer.
    """

    node: str
    op: str
    noise: float
    error: float
    bytes: int
    cost: float
    tensors: tuple[str, ...] = ()

    @property
    def sqnr(self) -> float:
        """The same in dB."""
        return -decibels_of(self.noise) if self.noise > 0 else math.inf


class Search:
    """Looks for a good variant.

    Args:
        judge: measures candidates.
        enough: in dB; what keeps more is not worth a search.

    Attributes:
        late: the time that was over, if it was, and what was not tried for it.
    """

    def __init__(self, judge: Judge, enough: float = ENOUGH) -> None:
        self._judge = judge
        self.enough = enough
        self.late: tuple[TimeUp, list[str]] | None = None
        self._attempts = 0
        self._activations: WeakKeyDictionary[Trial, Score] = WeakKeyDictionary()

    def step(self, what: str, found: T, improve: Callable[[], T]) -> T:
        """What a step makes of what was found; that itself, and the step noted, where the time is over."""
        try:
            return improve()
        except TimeUp as error:
            self.late = error, [*(self.late[1] if self.late else ()), what]
            return found

    def attempt(self, variant: Variant, build: Builder) -> Trial:
        """Build and measure a candidate; one that does not run is as bad as can be.

        Raises:
            TimeUp: there is no time left to.
        """
        self._announce(build)
        candidate = build(variant)
        try:
            score = self._judge(candidate.model)
        except LoadError:
            score = FAILED
        return Trial(variant, build, candidate, score)

    def _announce(self, build: Builder) -> None:
        self._attempts += 1
        build.announce("trying candidates", self._attempts, None)

    def observer(self, variant: Variant, build: Builder, fits: Callable[[Trial], bool]) -> Trial:
        """The best way to choose ranges for all tensors; the first one if that is good enough.

        Args:
            variant, build: of the candidates.
            fits: whether weights of a candidate are fitted next.
        """
        tried = [self.attempt(replace(variant, observer=OBSERVERS[0]), build)]
        for choice in OBSERVERS[1:] if tried[0].score.sqnr < self.enough else ():
            other = partial(self.attempt, replace(variant, observer=choice), build)
            tried = self.step(f"ranges by {choice[0]}", tried, partial(self._with, tried, other))
        return self._chosen(tried, fits)

    @staticmethod
    def _with(tried: Sequence[Trial], other: Callable[[], Trial]) -> list[Trial]:
        """One more, without what keeps clearly less than it or they: models of those are let go."""
        found = [*tried, other()]
        least = max(each.score.sqnr for each in found) - ALIKE
        return [each for each in found if each.score.sqnr >= least]

    def _chosen(self, tried: Sequence[Trial], fits: Callable[[Trial], bool]) -> Trial:
        """The first that no other is clearly better than; before weights are fitted, see `ALIKE`."""
        best = reduce(_better, tried)
        alike = [each for each in tried if abs(each.score.sqnr - best.score.sqnr) < ALIKE]
        if len(alike) < 2 or not fits(best):
            return best
        return max(alike, key=lambda each: self._in_floats(each).sqnr)

    def _in_floats(self, trial: Trial) -> Score:
        """What a candidate keeps whose activations alone are integers."""
        if trial not in self._activations:
            try:
                self._activations[trial] = self._judge(trial.build.in_floats(trial.variant))
            except LoadError:
                self._activations[trial] = FAILED
        return self._activations[trial]

    def equalized(self, trial: Trial, log: Log, fits: Callable[[Trial], bool], *, usual: bool) -> Trial:
        """The same of a model whose channels were scaled, if that does better.

        Args:
            trial: the best way to choose ranges is that of the scaled model, too, as a rule.
            log: what was scaled goes here.
            fits: whether weights of a candidate are fitted next.
            usual: whether the way that is usually the best is tried besides.
        """
        done = Log()
        build = trial.build.equalized(trial.candidate.plan, done)
        if build is None:
            return trial
        choices = dict.fromkeys((*OBSERVERS[: int(usual)], trial.variant.observer))
        tried = [trial]
        for choice in choices:
            other = partial(self.attempt, replace(trial.variant, observer=choice), build)
            tried = self._with(tried, other)
        best = self._chosen(tried, fits)
        if best is not trial:
            log.add(done.done())
        return best

    def complete(self, trial: Trial, tune: CalibrationData, goal: TrialGoal) -> Trial:
        """The same with ranges that samples to choose by have a part in, too, if that does no harm."""
        trial.build.absorb(tune)
        completed = self.attempt(trial.variant, trial.build)
        harmless = completed.score.sqnr >= trial.score.sqnr - HARMLESS
        return completed if harmless and (goal.met(completed) or not goal.met(trial)) else trial

    def rounding(self, trial: Trial) -> Trial:
        """The same with weights rounded by what their layers see, if that does better as a whole."""
        return _better(trial, self.attempt(replace(trial.variant, refined=True), trial.build))

    def weights(self, trial: Trial) -> float:
        """The part that integers of weights have in all the noise: better ones take back no more."""
        self._announce(trial.build)
        without = self._in_floats(trial)
        return 1.0 if without is FAILED else 1.0 - without.noise / max(trial.score.noise, _TINY)

    def fitted(self, trial: Trial) -> Trial:
        """The same with weights fitted to the quantized inputs of their layers, if that does better."""
        build = trial.build.fitted(trial.variant)
        if build is None:
            return trial
        return _better(trial, self.attempt(replace(trial.variant, refined=True), build))

    def smaller(self, trial: Trial, *, sequential: bool) -> Trial:
        """The same with codes that take fewer bits, whatever that loses; fitted in turn, if that can be."""
        build = (trial.build.fitted(trial.variant) if sequential else None) or trial.build
        return self.attempt(replace(trial.variant, refined=True), build)

    def layers(self, trial: Trial) -> list[Sensitivity]:
        """What every weighted node of a candidate does on its own, the worst first."""
        nodes = [node for node in trial.build.model.graph.nodes if node.label in trial.candidate.labels()]
        macs = trial.build.macs()
        mean = sum(macs.get(node.label, 0) for node in nodes) / max(len(nodes), 1)
        size = sum(map(_size, nodes)) / max(len(nodes), 1)
        variants = [replace(trial.variant, only=frozenset((node.label,))) for node in nodes]
        trial.build.foresee(variants)
        found = []
        for index, (node, variant) in enumerate(zip(nodes, variants, strict=True)):
            alone = trial.build(variant)
            score = self._alone(trial.build, alone.model)
            cost = 0.5 * (macs.get(node.label, mean) / mean if mean else 1.0) + 0.5 * _size(node) / size
            tensors = tuple(name for group in alone.groups for name in group)
            found.append(
                Sensitivity(node.label, node.op, score.noise, score.error, stored(alone.model), cost, tensors)
            )
            trial.build.announce("measuring layers", index + 1, len(nodes))
        return sorted(found, key=lambda layer: -layer.noise)

    def _alone(self, build: Builder, model: Model) -> Score:
        """Judge a candidate that differs from what it was built of in one layer, on the samples that rank."""
        onward = None if self._judge.is_wary else build.onward()
        return self._judge(model, RANKING) if onward is None else onward.judged(self._judge, model, RANKING)

    def ranges(self, trial: Trial, layers: Sequence[Sensitivity]) -> tuple[Trial, list[Sensitivity]]:
        """The same with another way to choose the ranges of single layers, if that does better as a whole.

        Tried on the layers that do more than half an average share of all noise. With what layers do then.
        """
        other = OBSERVERS[1] if trial.variant.observer != OBSERVERS[1] else OBSERVERS[0]
        mean = sum(layer.noise for layer in layers) / max(len(layers), 1)
        worst = [layer for layer in layers if layer.noise > 0.5 * mean]
        gains: defaultdict[str, float] = defaultdict(float)
        noises: dict[str, float] = {}
        for index, layer in enumerate(worst):
            special = dict.fromkeys(layer.tensors, other)
            alone = trial.build(replace(trial.variant, special=special, only=frozenset((layer.node,))))
            noise = self._alone(trial.build, alone.model).noise
            noises[layer.node] = noise
            for name in layer.tensors:
                gains[name] += layer.noise - noise
            trial.build.announce("choosing ranges", index + 1, len(worst))
        better = {name: other for name, gain in gains.items() if gain > 0}
        found = self.attempt(replace(trial.variant, special=better), trial.build)
        if found.score.sqnr <= trial.score.sqnr + MARGIN:
            return trial, list(layers)
        changed = {layer.node for layer in worst if better.keys() >= set(layer.tensors)}
        quieter = [
            replace(each, noise=noises[each.node]) if each.node in changed else each for each in layers
        ]
        return found, sorted(quieter, key=lambda layer: -layer.noise)

    @property
    def untimed(self) -> str:
        """Why times say nothing about the target; empty if they do."""
        return self._judge.untimed

    def within(self, trial: Trial, plain: Trial, layers: Sequence[Sensitivity], budget: float) -> Trial:
        """The same with the layers one step more exact that gain most by it for the bytes that it takes.

        Args:
            trial: a candidate of weights of few bits.
            plain: likewise, with the nearest codes.
            layers: of that.
            budget: bytes of the constants of what is to come out; kept unless `trial` itself takes more.
        """
        without = plain.build.strategy.without
        costs, damage = {}, {}
        for index, layer in enumerate(layers):
            alone = replace(plain.variant, only=frozenset((layer.node,)))
            exact = plain.build(without(alone, {layer.node: ROOM})).model
            costs[layer.node] = {FEW: 0.0, MANY: float(stored(exact) - layer.bytes)}
            # Where data is integers, too, finer weights take only a part of the noise.
            left = self._alone(plain.build, exact).noise if plain.build.strategy.calibrated else 0.0
            damage[layer.node] = {FEW: layer.noise, MANY: max(left, layer.noise / FINER**2)}
            trial.build.announce("weighing bytes", index + 1, len(layers))
        choices = Additive(damage, costs)
        picks = allocate(choices, budget - stored(trial.candidate.model), choices.best())
        held = {node: ROOM for node, option in picks.items() if option == MANY}
        if not held:
            return trial
        nearest = self.attempt(without(plain.variant, held), plain.build)
        if trial is plain:
            return nearest
        # What was fitted to layers all in four bits may not suit some of them in eight.
        found = (self.attempt(without(trial.variant, held), trial.build), self.fitted(nearest))
        return max(found, key=lambda each: each.score.sqnr)

    def latency(self, trial: Trial, seconds: float = 0.5) -> float:
        """Time of a candidate relative to the float model's, on the first batch judged on."""
        return self._judge.latencies([trial.candidate.model], seconds)[0]

    def paying(self, trial: Trial) -> Trial:
        """The same, or if it takes longer than the float model, without what of it does not pay."""
        return trial if self._judge.slowdown(trial.candidate.model) is None else self.fastest(trial)

    def fastest(self, trial: Trial, seconds: float = 3.0) -> Trial:
        """The same with the layers in floating point that are measured to be faster so.

        Tried are the smallest ones, as many as pays, those of one kind, and all kinds that pay alone.
        """
        kinds = self._kinds(trial)
        choices = [*self._smallest(trial), *kinds]
        budget = seconds / (len(choices) + 1)
        now = self.latency(trial, budget)
        times = [self._time_without(trial, labels, budget) for labels in choices]
        alone = zip(kinds, times[len(times) - len(kinds) :], strict=True)
        gaining = [kind for kind, time in alone if time < FASTER * now]
        if len(gaining) > 1:
            choices.append(frozenset().union(*gaining))
            times.append(self._time_without(trial, choices[-1], budget))
        quickest = min(range(len(times)), key=lambda index: times[index])
        if times[quickest] >= FASTER * now:
            return trial
        return self.attempt(self._sparing(trial, choices[quickest]), trial.build)

    def _time_without(self, trial: Trial, labels: frozenset[str], seconds: float) -> float:
        """Time relative to the float model's; infinite if it does not run."""
        self._announce(trial.build)
        made = trial.build(self._sparing(trial, labels))
        try:
            return self._judge.latencies([made.model], seconds)[0]
        except LoadError:
            return math.inf

    @staticmethod
    def _sparing(trial: Trial, labels: frozenset[str]) -> Variant:
        """The variant of a candidate with more of its layers in floating point."""
        held = {**dict.fromkeys(labels, SLOWER), **trial.variant.refused, **trial.variant.kept}
        return trial.build.strategy.sparing(trial.variant, held)

    @staticmethod
    def _smallest(trial: Trial) -> list[frozenset[str]]:
        """Growing parts of the layers in integers, in the order of their multiply-accumulates."""
        macs = trial.build.macs()
        order = sorted(trial.candidate.labels(), key=lambda label: macs.get(label, 0))
        return [frozenset(order[: round(part * len(order))]) for part in (0.25, 0.5, 0.75)]

    @staticmethod
    def _kinds(trial: Trial) -> list[frozenset[str]]:
        """The layers in integers by operator and shape of their weight, those with most of them first."""
        found: defaultdict[tuple[str, tuple[Dim, ...] | None], set[str]] = defaultdict(set)
        within = trial.candidate.labels()
        for node in trial.build.model.graph.nodes:
            if node.label in within and len(node.inputs) > 1:
                found[node.op, weight_of(node).shape].add(node.label)
        return [frozenset(kind) for kind in sorted(found.values(), key=len, reverse=True)[:KINDS]]

    def keep(
        self,
        trial: Trial,
        layers: Sequence[Sensitivity],
        goal: TrialGoal,
        gain: float = 0.0,
        *,
        refined: bool = False,
    ) -> Trial:
        """The candidate with the fewest multiply-accumulates kept out of integers that reaches a goal.

        Layers are taken in the order of noise per cost. How many is predicted from the sum of what each does,
        measured, and corrected until the number is known.

        Args:
            trial: everything in integers.
            layers: of `layers`.
            goal: what is to be kept.
            gain: what fitting weights to quantized inputs has brought, in dB; tried where it may decide.
            refined: whether candidates get better integers than `trial` has, which only they need then.

        Returns:
            The best candidate tried where none reaches it.
        """
        order = sorted(layers, key=lambda layer: -layer.noise / (1.0 + layer.cost))
        best, last, reached = trial, trial, False
        variant = replace(trial.variant, refined=refined or trial.variant.refined)
        why = COARSE if trial.build.strategy.widens(trial.variant) else REASON
        missed: set[frozenset[str]] = set()

        def enough(count: int) -> bool:
            nonlocal best, last, reached
            held = dict.fromkeys((layer.node for layer in order[:count]), why)
            last = self.attempt(trial.build.strategy.without(variant, held), trial.build)
            if not goal.met(last) and goal.missing(last) <= gain:
                last = self.fitted(last)
            met = goal.met(last)
            if not met:
                missed.add(frozenset(held))
            if met or (not reached and last.score.sqnr > best.score.sqnr):
                best = last
            reached = reached or met
            return met

        def guess(lacking: int) -> int:
            return lacking + _needed(order[lacking:], last.score.noise, goal.missing(last))

        self.step("fewer layers kept out of integers", 0, lambda: fewest(enough, len(order), guess))
        relief = min(trial.score.noise / max(sum(layer.noise for layer in layers), _TINY), 1.0)
        noises = {layer.node: SURE * relief * layer.noise for layer in layers}
        return self.step(
            "kept layers in integers again", best, lambda: self._spared(best, goal, noises, missed)
        )

    def _spared(
        self,
        trial: Trial,
        goal: TrialGoal,
        noises: Mapping[str, float],
        missed: Collection[frozenset[str]] = (),
    ) -> Trial:
        """The same with the largest of the kept layers back in integers, where the goal allows it.

        The quietest half of them goes back first, and half as many of the others; where that is too many,
        half of these. Every try chooses by the same few samples, so that many would choose by chance.

        Args:
            trial: with some layers more exact than the others.
            goal: what is to be kept.
            noises: what layers add at least, by label; those that then miss the goal are not tried.
            missed: kept layers by which the goal is known to be missed.
        """
        build, best, at = trial.build, trial, 0
        held_back, without = build.strategy.held_back, build.strategy.without
        sizes = {node.label: _size(node) for node in build.model.graph.nodes if len(node.inputs) > 1}
        order = self._quietest(trial, goal, noises, sizes)
        size = SPARED // 2
        while size > 1 and size >= len(order):
            size //= 2
        for _ in range(TRIES if goal.met(trial) else 0):
            if not (part := order[at : at + size]):
                break
            left = {each: why for each, why in held_back(best.variant).items() if each not in part}
            found = best if frozenset(left) in missed else self.attempt(without(best.variant, left), build)
            met = found is not best and goal.met(found)
            best = found if met else best
            at += size if met or size == 1 else 0
            size = max(size // 2, 1)
        return best

    @staticmethod
    def _quietest(
        trial: Trial, goal: TrialGoal, noises: Mapping[str, float], sizes: Mapping[str, int]
    ) -> list[str]:
        """The largest of the kept layers that may be in integers again, in the order of noise per byte."""

        def may_go(label: str) -> bool:
            expected = -decibels_of(max(trial.score.noise + noises.get(label, 0.0), _TINY))
            foreseen = replace(trial, score=replace(trial.score, sqnr=expected))
            return goal.missing(foreseen) <= goal.missing(trial)

        held = trial.build.strategy.held_back(trial.variant)
        largest = sorted(filter(may_go, held), key=lambda each: -sizes.get(each, 0))[:SPARED]
        return sorted(largest, key=lambda each: noises.get(each, 0.0) / max(sizes.get(each, 0), 1))


def stored(model: Model) -> int:
    """Bytes of the constants of a model."""
    return sum(constant.nbytes for constant in model.constants())


def _size(node: Node) -> int:
    """Bytes of a node's weight."""
    weight = weight_of(node)
    return weight.nbytes if isinstance(weight, Constant) else 0


def _better(first: Trial, second: Trial) -> Trial:
    """The second if it keeps clearly more than the first, the simpler one."""
    return second if second.score.sqnr > first.score.sqnr + MARGIN else first


def _needed(order: Sequence[Sensitivity], noise: float, missing: float) -> int:
    """How many layers, the first ones, have to go for `missing` dB: at least one, unless there is none."""
    total = sum(layer.noise for layer in order)
    left, wanted = 1.0, 10.0 ** (-missing / 10.0)
    for count, layer in enumerate(order):
        if left <= wanted and count:
            return count
        left -= layer.noise / max(total, noise)
    return len(order)
