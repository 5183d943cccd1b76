"""The search itself, in a world of made-up figures: what it tries, what it ends with, and when it stops."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim.engine.allocate import fewest
from onnxslim.errors import OnnxSlimError
from onnxslim.search.chains import SHARES
from onnxslim.search.explore import Explorer, ahead
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.trials import SearchTrial, TrialConfig, front

# Time and bytes of what is stored in this way, all of the work left.
WAYS: Mapping[str, tuple[float, float]] = {"float": (1.0, 1.0), "int8": (0.5, 0.27), "slow": (1.4, 0.2)}
# Likewise, of what is tried only instead of another way.
NARROW: Mapping[str, tuple[float, float]] = {"int4": (0.5, 0.15)}


def falling(share: float, way: str) -> float:
    """In dB: less of what is left, and less of what has few bits."""
    return 60 * share - (10.0 if way == "int8" else 0.0)


@dataclass
class World:
    """Trials whose figures follow from what is left of the work and how it is stored.

    Attributes:
        sqnr: of a structure and a way to store.
        failing: ways that cannot be made.
        leaves: whether anything can be left away.
        known: ways whose trials are kept from before.
        log: trials that were made, in order.
        kept: the one whose model is kept.
        expected: what was told ahead, each time.
    """

    sqnr: Callable[[float, str], float] = falling
    failing: tuple[str, ...] = ()
    leaves: bool = True
    known: tuple[str, ...] = ()
    log: list[tuple[float, str]] = field(default_factory=list)
    kept: SearchTrial | None = None
    expected: list[list[TrialConfig]] = field(default_factory=list)

    def prefetch(self, configs: Sequence[TrialConfig]) -> None:
        self.expected.append(list(configs))

    def run(self, config: TrialConfig, begin: Callable[[], None]) -> SearchTrial:
        structure, encoding, _ = config
        if encoding not in self.known:
            begin()
        self.log.append((structure, encoding))
        name = f"{structure} {encoding}"
        if encoding in self.failing:
            return SearchTrial(name, name, structure, encoding, None, "it cannot be had")
        seconds, size = (structure * each for each in {**WAYS, **NARROW}[encoding])
        sqnr = self.sqnr(structure, encoding)
        figures = TrialFigures(sqnr, None, None, seconds, size, 0.9 * size, structure, 0.0)
        return SearchTrial(name, name, structure, encoding, figures)

    def possible(self, config: TrialConfig, begin: Callable[[], None]) -> bool:
        begin()
        return self.leaves

    def keep(self, trial: SearchTrial) -> None:
        self.kept = trial

    def search(self, goals: Goals, **options: Any) -> Explorer:
        explorer = Explorer(self, options.pop("ways", dict.fromkeys(WAYS, "")), goals, **options)
        explorer.explore()
        return explorer


def test_without_budgets_the_fastest_that_keeps_enough() -> None:
    world = World()
    explorer = world.search(Goals(require_sqnr=20.0))
    best = explorer.eligible()[0]
    # 60 s - 10 >= 20 down to a half of the work.
    assert (best.structure, best.encoding) == (0.5, "int8")
    assert world.kept == best
    assert explorer.untried == ""
    # Every way once, and by halving the share that just keeps enough; float is twice as slow, and not tried.
    assert world.log[: len(WAYS)] == [(1.0, way) for way in WAYS]
    assert {way for _, way in world.log[len(WAYS) :]} == {"int8"}
    assert len(world.log) <= len(WAYS) + 4
    thorough = World()
    thorough.search(Goals(require_sqnr=20.0), effort="thorough")
    assert {way for _, way in thorough.log[len(WAYS) :]} >= {"int8", "float"}


@pytest.mark.parametrize(("sqnr", "best"), [(22.0, "int4"), (18.0, "int8")])
def test_what_is_fastest_is_tried_in_fewer_bytes(sqnr: float, best: str) -> None:
    world = World(lambda share, way: sqnr if way == "int4" else falling(share, way))
    explorer = world.search(Goals(require_sqnr=20.0), narrower={"int8": "int4"})
    assert [each for each in world.log if each[1] == "int4"] == [(1.0, "int4"), (0.5, "int4")]
    assert explorer.eligible()[0].config == TrialConfig(0.5, best)


def test_within_budgets_what_loses_least() -> None:
    explorer = World().search(Goals(size=0.15))
    best = explorer.eligible()[0]
    # int8 0.27 s <= 0.15 from 0.5 of the work on keeps 20 dB; "slow" 0.2 s from 0.72 on keeps 43.
    assert (best.structure, best.encoding) == (0.72, "slow")
    faster = World().search(Goals(size=0.15, latency=0.4)).eligible()[0]
    assert (faster.structure, faster.encoding) == (0.5, "int8")


def test_what_is_within_budgets_is_not_shrunk_and_what_loses_more_cannot_win() -> None:
    world = World()
    best = world.search(Goals(size=0.3)).eligible()[0]
    # "slow" takes 0.2 and keeps 60 dB; float is as good and can come within, int8 is within and loses more.
    assert (best.structure, best.encoding) == (1.0, "slow")
    assert len(world.log) == len(WAYS)
    world = World(lambda share, way: 60 * share - (10.0 if way == "slow" else 0.0))
    world.search(Goals(size=0.25))
    assert {way for share, way in world.log if share < 1} == {"int8", "float"}


def test_the_work_that_was_asked_for_is_left_not_the_next_less() -> None:
    for macs in (0.55, 0.07):
        assert World().search(Goals(macs=macs)).eligible()[0].structure == macs


def test_what_may_be_asked_next_is_told_ahead() -> None:
    world = World()
    world.search(Goals(require_sqnr=20.0))
    assert world.expected[0] == [TrialConfig(1.0, way) for way in WAYS]
    asked = [config for config, _ in zip(world.log[len(WAYS) :], world.expected[len(WAYS) :], strict=True)]
    for (share, way), ahead_of in zip(asked, world.expected[len(WAYS) :], strict=True):
        assert ahead_of[0] == TrialConfig(share, way)
        assert len(set(ahead_of)) == len(ahead_of)


@given(st.integers(1, 40), st.integers(0, 41))
def test_every_number_that_halving_asks_for_was_told_ahead(most: int, least: int) -> None:
    known: dict[int, bool] = {}
    first_told = [*itertools.islice(ahead(most, {}), 64)]
    assert sorted(first_told) == [*range(1, most + 1)]

    def enough(number: int) -> bool:
        assert next(ahead(most, known)) == number
        known[number] = number >= least
        return known[number]

    assert fewest(enough, most) == max(min(least, most + 1), 1)
    assert list(ahead(most, known)) == []


def test_ways_to_leave_away_are_tried_one_after_the_other() -> None:
    world = World()
    world.search(Goals(latency=0.3), cuts=("work", "time"))
    ways = [config.cut for config in itertools.chain(*world.expected) if config.structure < 1]
    assert set(ways) == {"work", "time"}


def test_what_is_slower_is_not_taken_unless_only_bytes_were_asked_for() -> None:
    def keeps(share: float, way: str) -> float:
        return 30.0 if share == 1 and way == "slow" else 5.0

    assert World(keeps).search(Goals(require_sqnr=20.0)).eligible() == []
    assert World(keeps).search(Goals(require_sqnr=20.0, macs=1.0)).eligible() == []
    assert World(keeps).search(Goals(require_sqnr=20.0, size=0.5)).eligible()[0].encoding == "slow"


def test_where_nothing_meets_the_goals_the_nearest_says_what_it_lacks() -> None:
    explorer = World().search(Goals(size=0.01, require_sqnr=50.0))
    assert explorer.eligible() == []
    nearest = explorer.nearest()
    assert nearest is not None
    assert "more than 0.01" in nearest[1] or "50 are required" in nearest[1]


def test_a_way_that_cannot_be_had_is_a_trial_with_its_reason() -> None:
    explorer = World(failing=("slow",)).search(Goals(size=0.15))
    assert explorer.eligible()[0].encoding == "int8"
    assert [each.error for each in explorer.trials if each.figures is None] == ["it cannot be had"]
    with pytest.raises(OnnxSlimError, match="it cannot be had"):
        World(failing=tuple(WAYS)).search(Goals())


def test_layers_are_spared_only_where_the_plain_way_loses_too_much() -> None:
    ways = {"float": "", "int8": "", "slow": "int8"}
    enough, lacking = World(), World(lambda share, way: 15.0 if way == "int8" else 60 * share)
    for world in (enough, lacking):
        world.search(Goals(require_sqnr=20.0), ways=ways)
    assert "slow" not in {way for _, way in enough.log}
    assert (1.0, "slow") in lacking.log
    failing = World(failing=("int8",))
    failing.search(Goals(require_sqnr=20.0), ways=ways)
    assert (1.0, "slow") not in failing.log, "what cannot be had is no better with less of it"


def test_where_nothing_can_be_left_away_only_ways_to_store_are_tried() -> None:
    world = World(leaves=False)
    assert world.search(Goals(require_sqnr=20.0)).eligible()[0].label == "1.0 int8"
    assert len(world.log) == len(WAYS)


def test_what_is_to_be_kept_is_asked_of_the_first_trials_too() -> None:
    """Also where time is over before every way to store was tried."""
    world = World(lambda share, way: 60.0 if way == "float" else 5.0)
    explorer = Explorer(world, dict.fromkeys(WAYS, ""), Goals(require_sqnr=20.0))

    def stop(trial: SearchTrial) -> None:
        explorer.until = time.monotonic() - (1 if trial.encoding == "int8" else -60)

    explorer.on_trial = stop
    explorer.explore()
    assert [each.encoding for each in explorer.trials] == ["float", "int8"]
    assert [each.encoding for each in explorer.eligible()] == ["float"]
    assert world.kept == explorer.trials[0]


def test_trials_that_are_known_take_no_time() -> None:
    explorer = World(known=("slow",)).search(Goals(require_sqnr=20.0), until=time.monotonic() - 1)
    assert [each.encoding for each in explorer.trials] == ["slow"]
    assert "after 1 trials" in explorer.untried


def test_what_can_be_left_away_is_not_found_out_once_time_is_over() -> None:
    """It takes as long as several trials."""
    world = World()
    explorer = Explorer(world, dict.fromkeys(WAYS, ""), Goals(require_sqnr=20.0))

    def stop(trial: SearchTrial) -> None:
        explorer.until = time.monotonic() - 1 if len(explorer.trials) == len(WAYS) else explorer.until

    explorer.on_trial = stop
    explorer.explore()
    assert "after 3 trials" in explorer.untried


def test_no_trial_is_begun_once_time_is_over() -> None:
    world = World()
    explorer = world.search(Goals(require_sqnr=20.0), until=time.monotonic() - 1)
    assert world.log == []
    assert "after 0 trials" in explorer.untried
    assert explorer.nearest() is None


def test_milder_trials_leave_more_until_all_is_left() -> None:
    explorer = World().search(Goals(require_sqnr=20.0))
    trial = explorer.eligible()[0]
    shares = []
    while (milder := explorer.milder(trial)) is not None:
        shares.append(milder.structure)
        trial = milder
    assert shares[0] == 0.56
    assert shares[-1] == 1.0
    assert shares == sorted(set(shares))


@given(st.floats(5.0, 55.0))
def test_halving_finds_what_trying_all_would(least: float) -> None:
    explorer = World().search(Goals(require_sqnr=least), effort="thorough")
    every = [(share, way) for share in (1.0, *SHARES) for way in ("float", "int8")]
    fastest = min(share * WAYS[way][0] for share, way in every if falling(share, way) >= least)
    found = explorer.eligible()[0].figures
    assert found is not None
    assert found.latency == pytest.approx(fastest, rel=0.03)


points = st.lists(
    st.tuples(st.floats(0.1, 1.0), st.floats(0.0, 0.2), st.floats(0.0, 60.0)), min_size=1, max_size=12
)


@given(points)
def test_no_trial_beats_one_of_the_front_and_each_other_is_beaten(
    found: list[tuple[float, float, float]],
) -> None:
    trials = [
        SearchTrial(str(at), "", 1.0, "", TrialFigures(sqnr, 1.0 - drop, None, cost, 1.0, 1.0, None, 0.0))
        for at, (cost, drop, sqnr) in enumerate(found)
    ]
    best = front(trials, "latency")

    def place(trial: SearchTrial) -> tuple[float, tuple[float, float]]:
        assert trial.figures is not None
        assert trial.figures.latency is not None
        return trial.figures.latency, trial.figures.worth

    def beats(one: SearchTrial, other: SearchTrial) -> bool:
        (cost, worth), (more, less) = place(one), place(other)
        return cost <= more and worth >= less and (cost, worth) != (more, less)

    assert not any(beats(one, other) for one in trials for other in best)
    for trial in trials:
        assert any(place(other) == place(trial) or beats(other, trial) for other in best)
