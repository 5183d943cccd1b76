"""Error bars of scores: cases worked out by hand, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim.models.tasks.estimates import Outcomes, wilson


def hits(right: int, samples: int) -> Outcomes:
    return Outcomes.of("accuracy", np.arange(samples) < right)


def test_wilson_by_hand() -> None:
    # Of Wikipedia's formula with z = 1.96: p = 0.8, n = 10 gives (0.9921 ± 0.2265...) / 1.3841.
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.16113), abs=1e-5)
    assert wilson(1.0, 20) == pytest.approx((0.83887, 1.0), abs=1e-5)


@given(st.integers(1, 40), st.data())
def test_independent_samples_have_the_interval_of_wilson(samples: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, samples))
    found = hits(right, samples).estimate
    assert found == pytest.approx((right / samples, *wilson(right / samples, samples)))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_samples_of_a_group_that_agree_count_once() -> None:
    once = hits(6, 10)
    often = Outcomes.of("accuracy", np.repeat(once.gained, 12), groups=np.repeat(np.arange(10), 12))
    assert often.estimate == pytest.approx(once.estimate)
    alone = Outcomes.of("accuracy", np.repeat(once.gained, 12))
    assert alone.estimate.low > often.estimate.low


def test_names_of_groups_do_not_matter() -> None:
    gained, groups = np.array([1, 0, 1, 1]), np.array([7, 7, -3, 100])
    assert (
        Outcomes.of("a", gained, groups=groups).estimate
        == Outcomes.of("a", gained, groups=np.array([0, 0, 1, 2])).estimate
    )


def test_a_ratio_of_sums() -> None:
    # F1 of two clips: 2 tp = 8 and 2, 2 tp + fp + fn = 10 and 6.
    found = Outcomes.of("F1", np.array([8, 2]), np.array([10, 6]))
    assert found.value == pytest.approx(10 / 16)
    # Errors 8 - 6.25 and 2 - 3.75, by the mean of 8: variance 2 (1.75 / 8)² / 4, worth 9.796 samples.
    assert found.estimate[1:] == pytest.approx(wilson(0.625, 0.625 * 0.375 / (2 * (1.75 / 8) ** 2 / 4)))


def test_a_change_pair_by_pair() -> None:
    before, after = hits(90, 100), hits(80, 100)
    found = after.change(before)
    assert found.value == pytest.approx(-0.1)
    # Bonett and Price: 10 pairs got worse and none better, so that p = 11/102 and 1/102.
    middle = -10 / 102
    half = 1.959964 * np.sqrt((12 / 102 - (10 / 102) ** 2) / 102)
    assert found[1:] == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert found.certain
    assert not after.change(after).certain


@given(st.integers(2, 60))
def test_where_nothing_changed_something_could_have(samples: int) -> None:
    found = hits(samples - 1, samples).change(hits(samples - 1, samples))
    assert found.value == 0
    assert found.low == pytest.approx(-found.high)
    assert 0 < found.high < 2 / np.sqrt(samples)


def test_one_more_is_little_where_much_can_be_gained() -> None:
    clips = Outcomes.of("frames", np.full(50, 90.0), np.full(50, 100.0))
    assert clips.change(clips).high == pytest.approx(hits(45, 50).change(hits(45, 50)).high / 100)


def test_a_change_is_seen_that_two_intervals_do_not_tell_apart() -> None:
    before, after = hits(500, 1000), hits(480, 1000)
    assert after.change(before).certain
    assert after.estimate.high > before.estimate.low


@pytest.mark.parametrize("groups", [1, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(groups: int) -> None:
    rng, held, changed, runs = np.random.default_rng(3), 0, 0, 400
    for _ in range(runs):
        chance = np.repeat(rng.choice([0.5, 0.9], 300 // groups), groups)
        before, after = (
            Outcomes.of("a", rng.random(300 // groups * groups) < each, groups=np.arange(300) // groups)
            for each in (chance, chance - 0.1)
        )
        held += before.estimate.low <= 0.7 <= before.estimate.high
        change = after.change(before)
        changed += change.low <= -0.1 <= change.high
    assert 0.92 <= held / runs <= 0.98
    assert 0.92 <= changed / runs <= 0.98
