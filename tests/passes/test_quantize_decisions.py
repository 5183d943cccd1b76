"""What the search among quantized candidates decides, with scores that are given instead of measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.fidelity import Score
from onnxslim.engine.base import Context, Log
from onnxslim.engine.demands import STEP
from onnxslim.ir.graph import Constant
from onnxslim.passes.quantize.calibrate import Calibration
from onnxslim.passes.quantize.choices import ObserverChoice, Variant
from onnxslim.passes.quantize.search import ALIKE, ENOUGH, FASTER, HARMLESS, MARGIN, OBSERVERS, TRIES, Search


def scored(sqnr: float) -> Score:
    return Score(sqnr, 0.0, {"y": sqnr}, None)


@dataclass
class Judging:
    """Gives scores in the order in which they are asked for, and times."""

    scores: list[float]
    times: list[float] = field(default_factory=list)
    is_wary: bool = True  # candidates are run as wholes

    def __call__(self, model: Any, samples: int | None = None) -> Score:
        return scored(self.scores.pop(0))

    def latencies(self, models: list[Any], seconds: float) -> list[float]:
        return [self.times.pop(0) for _ in models]


class Building:
    """Stands for a builder: its candidates are the variants that they were asked for by."""

    def __init__(self, other: Building | None = None) -> None:
        self.other = other
        self.built: list[Variant] = []
        self.absorbed = False
        self.strategy = SimpleNamespace(
            without=self._without,
            sparing=self._without,
            held_back=lambda variant: variant.kept,
            widens=lambda variant: False,
        )
        self.model = SimpleNamespace(graph=SimpleNamespace(nodes=[]))

    def __call__(self, variant: Variant) -> Any:
        self.built.append(variant)
        plan = SimpleNamespace(labels={}, linear=[], stored=[])
        return SimpleNamespace(model=variant, plan=plan, groups=(), log=Log(), labels=list)

    def equalized(self, plan: Any, log: Log) -> Building | None:
        log.change("model", "scaled")
        return self.other

    def fitted(self, variant: Variant) -> Building | None:
        return self.other

    def in_floats(self, variant: Variant) -> Any:
        return variant

    def absorb(self, data: Any) -> None:
        self.absorbed = True

    def macs(self) -> dict[str, int]:
        return {}

    def announce(self, what: str, done: int, total: int | None) -> None:
        """Nobody listens."""

    @staticmethod
    def _without(variant: Variant, held: Mapping[str, str]) -> Variant:
        return replace(variant, kept=dict(held))


@dataclass
class Wanting:
    """Stands for a goal of so many dB."""

    sqnr: float

    def met(self, trial: Any) -> bool:
        return bool(trial.score.sqnr >= self.sqnr)

    def missing(self, trial: Any) -> float:
        return max(self.sqnr - float(trial.score.sqnr), 0.0)


def searching(*scores: float, times: list[float] | None = None) -> tuple[Any, Judging]:
    judge = Judging(list(scores), times or [])
    return Search(judge), judge  # type: ignore[arg-type]


def is_rounded(trial: Any) -> bool:
    """Weights are not fitted."""
    return False


# What the simpler one keeps, what the other one does, and whether that is clearly more.
CLOSE = [(20.0, 20.0 + 0.9 * MARGIN, False), (20.0, 20.0 + 1.1 * MARGIN, True), (20.0, 15.0, False)]


@pytest.mark.parametrize(("simple", "other", "taken"), CLOSE)
def test_a_later_observer_has_to_be_clearly_better(simple: float, other: float, taken: bool) -> None:
    search, _ = searching(simple, other, 0.0)
    trial = search.observer(Variant(), Building(), is_rounded)
    assert trial.variant.observer == OBSERVERS[taken]
    assert trial.score.sqnr == (other if taken else simple)


# What three ways keep, what activations keep by those that are alike, and which way is taken.
@pytest.mark.parametrize(
    ("kept", "activations", "taken"),
    [
        ((24.0, 24.3, 24.4), (29.7, 28.3, 29.1), 0),
        ((24.0, 24.3, 24.4), (28.3, 28.3, 29.1), 2),
        ((24.0, 23.0, 24.2 + ALIKE), (), 2),
        ((24.0, 23.0, 24.3), (28.0, 29.0), 2),
    ],
)
def test_ways_that_keep_alike_are_told_apart_by_activations_before_weights_are_fitted(
    kept: tuple[float, ...], activations: tuple[float, ...], taken: int
) -> None:
    search, judge = searching(*kept, *activations)
    trial = search.observer(Variant(), Building(), lambda trial: True)
    assert trial.variant.observer == OBSERVERS[taken]
    assert not judge.scores


def test_scaled_channels_are_taken_where_activations_keep_more() -> None:
    search, _ = searching(24.4, 24.5, 28.3, 30.5)
    trial, scaled = search.attempt(Variant(), Building(Building())), Log()
    found = search.equalized(trial, scaled, lambda trial: True, usual=True)
    assert found.score.sqnr == 24.5
    assert [change.action for change in scaled.done().changed] == ["scaled"]


@pytest.mark.parametrize(("floats", "part"), [(20.0, 0.0), (23.0, 0.5), (30.0, 0.9)])
def test_weights_have_the_part_in_the_noise_that_goes_with_them(floats: float, part: float) -> None:
    search, _ = searching(20.0, floats)
    assert search.weights(search.attempt(Variant(), Building())) == pytest.approx(part, abs=2e-3)


def test_no_other_observer_is_tried_where_enough_is_kept() -> None:
    search, judge = searching(ENOUGH, 99.0, 99.0)
    assert search.observer(Variant(), Building(), is_rounded).variant.observer == OBSERVERS[0]
    assert len(judge.scores) == 2


@pytest.mark.parametrize(("simple", "other", "taken"), CLOSE)
@pytest.mark.parametrize("step", ["rounding", "fitted", "equalized"])
def test_what_comes_on_top_has_to_be_clearly_better(
    step: str, simple: float, other: float, taken: bool
) -> None:
    search, _ = searching(simple, other)
    first, log = Building(Building()), Log()
    trial = search.attempt(Variant(), first)
    found = (
        search.equalized(trial, log, is_rounded, usual=True)
        if step == "equalized"
        else getattr(search, step)(trial)
    )
    assert (found is not trial) == taken
    assert found.score.sqnr == (other if taken else simple)
    # What was not taken was not done.
    assert bool(log.done()) == (taken and step == "equalized")


@pytest.mark.parametrize(("usual", "tried"), [(True, (OBSERVERS[0], OBSERVERS[2])), (False, OBSERVERS[2:])])
def test_scaled_channels_have_ranges_by_what_won_before_and_by_what_mostly_wins(
    usual: bool, tried: tuple[ObserverChoice, ...]
) -> None:
    search, judge = searching(20.0, *(22.0 + each for each, _ in enumerate(tried)))
    trial = search.attempt(Variant(OBSERVERS[2]), Building(Building()))
    assert search.equalized(trial, Log(), is_rounded, usual=usual).variant.observer == tried[-1]
    assert not judge.scores


@pytest.mark.parametrize(
    ("before", "after", "goal", "taken"),
    [
        (30.0, 30.0 - 0.9 * HARMLESS, 25.0, True),
        (30.0, 30.0 - 1.1 * HARMLESS, 25.0, False),
        (30.0, 29.5, 29.8, False),  # the goal was met, and would not be
        (20.0, 19.5, 25.0, True),
    ],
)
def test_ranges_of_all_data_may_do_no_harm(before: float, after: float, goal: float, taken: bool) -> None:
    search, _ = searching(before, after)
    build = Building()
    trial = search.attempt(Variant(), build)
    assert search.complete(trial, None, Wanting(goal)).score.sqnr == (after if taken else before)
    assert build.absorbed


def _layers(**noises: float) -> list[Any]:
    return [
        SimpleNamespace(node=name, noise=noise, cost=1.0, tensors=(name,)) for name, noise in noises.items()
    ]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([30.0], ["worst"]),  # what was foreseen is right at once
        ([20.0, 30.0, 30.0], ["worst", "middle"]),  # too few, enough, and fewer that are enough, too
        ([20.0, 30.0, 24.0], ["worst", "middle", "best"]),  # fewer are not
        ([20.0, 21.0], ["worst", "middle", "best"]),  # nothing reaches it: the best that was tried
        ([22.0, 21.0], ["worst"]),
    ],
)
def test_as_few_layers_as_that_takes_are_kept(scores: list[float], kept: list[str]) -> None:
    # The first score is that of everything in integers, the last ones are of kept layers put back.
    search, _ = searching(10.0, *scores, *[0.0] * 3)
    trial = search.attempt(Variant(), Building())
    layers = _layers(best=0.0002, worst=0.098, middle=0.0018)
    found = search.keep(trial, layers, Wanting(25.0))
    assert list(found.variant.kept) == kept
    assert found.score.sqnr == max(scores)


def test_kept_layers_go_back_where_the_goal_allows_it() -> None:
    search, judge = searching(5.0, 30.0, 9.5, 16.0)
    # Two layers are enough, the worst one alone is not, which is not tried again; without it the goal is met.
    trial = search.attempt(Variant(), Building())
    found = search.keep(trial, _layers(worst=0.17, middle=0.146), Wanting(10.0))
    assert found.variant.kept.keys() == {"middle"}
    assert found.score.sqnr == 16.0
    assert not judge.scores


def test_better_integers_may_be_left_to_candidates_that_keep_layers() -> None:
    search, _ = searching(5.0, 30.0, 9.0)
    trial = search.attempt(Variant(), Building())
    found = search.keep(trial, _layers(worst=0.3), Wanting(10.0), refined=True)
    assert found.variant.refined
    assert not trial.variant.refined


@pytest.mark.parametrize(
    ("scores", "back"),
    [
        ([24.0, 26.0, 24.0, 25.5, 30.0], "abd"),  # the four quietest, two of them, one more, and the next
        ([26.0, 24.0, 25.5, 24.0, 30.0], "abcde"),  # four, one of the next two, not the other
        ([26.0, 26.0, 26.0, 24.0], "abcdefg"),
    ],
)
def test_kept_layers_go_back_by_halves_of_them(scores: list[float], back: str) -> None:
    """The quietest first, at most as many times as it takes to halve them down to one."""
    search, judge = searching(28.0, *scores, 30.0, 30.0)
    held = dict.fromkeys("hgfedcba", "")
    trial = search.attempt(Variant(kept=held), Building())
    noises = {name: 1e-5 * (1 + place) for place, name in enumerate("abcdefgh")}
    found = search._spared(trial, Wanting(25.0), noises)
    assert held.keys() - found.variant.kept.keys() == set(back)
    assert len(judge.scores) == len(scores) + 2 - TRIES


@pytest.mark.parametrize(("everything", "tried"), [(10.0, 0), (25.0, 1)])
def test_kept_layers_that_are_sure_to_miss_the_goal_are_not_tried(everything: float, tried: int) -> None:
    """0.0028 are left of the noise, and a quarter of 0.1 is more; not where fitting took away most of it."""
    search, judge = searching(everything, 35.0, 24.0, 24.0)
    trial = search.attempt(Variant(), Building())
    found = search.keep(trial, _layers(worst=0.1), Wanting(25.0) if tried == 0 else Wanting(25.1))
    assert found.variant.kept.keys() == {"worst"}
    assert len(judge.scores) == 2 - tried


@pytest.mark.parametrize(
    ("times", "taken"), [([1.0, FASTER - 0.01, 1.2, 1.2], True), ([1.0, 0.99, 1.2, 1.2], False)]
)
def test_layers_in_float_have_to_be_measurably_faster(times: list[float], taken: bool) -> None:
    search, _ = searching(30.0, 29.0, 28.0, 27.0, times=times)
    trial = search.attempt(Variant(), Building())
    assert (search.fastest(trial) is not trial) == taken


@pytest.mark.parametrize(("simple", "other", "taken"), CLOSE)
def test_ranges_of_single_layers_have_to_be_clearly_better(simple: float, other: float, taken: bool) -> None:
    search, _ = searching(simple, 40.0, 30.0, other)  # everything, each layer with other ranges, both
    trial = search.attempt(Variant(), Building())
    trial.build.announce = lambda *_: None
    layers = [LayerLike("a", 0.01), LayerLike("b", 0.011)]
    found, ranked = search.ranges(trial, layers)
    assert (found is not trial) == taken
    noises: Mapping[str, float] = {layer.node: layer.noise for layer in ranked}
    assert noises == ({"a": 1e-4, "b": 1e-3} if taken else {"a": 0.01, "b": 0.011})


@dataclass(frozen=True)
class LayerLike:
    """Stands for what was measured of a layer."""

    node: str
    noise: float

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.node,)


def test_steps_towards_a_metric_are_small() -> None:
    assert 0 < STEP <= 1


def test_the_range_of_a_constant_is_that_of_its_values_now() -> None:
    # Fitting moves constants that candidates before it had ranges of.
    calibration = Calibration(Context(), means=False)
    for values in ([-1.0, 2.0], [-3.0, 4.0]):
        constant = Constant("c", np.array(values, np.float32))
        plan: Any = SimpleNamespace(tensors={0: constant}, scales={0: (constant,)}, own={0: ()})
        found = calibration.ranges(plan, Variant(OBSERVERS[1]))
        assert (found[0].low, found[0].high) == tuple(values)
