"""What a search is asked for: what means nothing is refused, what is missed is told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from onnxslim.errors import UsageError
from onnxslim.search.goals import Goals, TrialFigures

FIGURES = TrialFigures(25.0, 0.98, None, 0.5, 0.3, 0.25, 0.6, 1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"latency": 0.0}, "latency=0 is no share"),
        ({"size": 1.5}, "size=1.5 is no share"),
        ({"download": math.nan}, "download=nan is no share"),
        ({"macs": -0.5}, "macs=-0.5 is no share"),
        ({"max_drop": -0.1}, "max_drop=-0.1 is no loss"),
        ({"max_drop": math.inf}, "max_drop=inf is no loss"),
        ({"require_sqnr": math.nan}, "require_sqnr=nan is no noise"),
    ],
)
def test_goals_that_mean_nothing(given: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Goals(**given)


@pytest.mark.parametrize(
    ("goals", "figures", "said"),
    [
        (Goals(require_sqnr=25.0), FIGURES, []),
        (Goals(require_sqnr=25.1), FIGURES, ["it keeps 25.0 dB, 25.1 are required"]),
        (Goals(require_sqnr=0.0), replace(FIGURES, sqnr=math.nan), ["it keeps nan dB, 0 are required"]),
        (Goals(max_drop=0.02), FIGURES, []),
        (Goals(max_drop=0.01), FIGURES, ["2.00 % of the decisions are others, more than 1.00 %"]),
        (Goals(max_drop=0.01), replace(FIGURES, metric=(0.9, 0.895)), []),
        (
            Goals(max_drop=0.01),
            replace(FIGURES, metric=(0.9, 0.85)),
            ["the metric drops from 0.9 to 0.85, by more than 0.01"],
        ),
    ],
)
def test_what_is_lost(goals: Goals, figures: TrialFigures, said: list[str]) -> None:
    assert goals.losses(figures) == said
    assert goals.excesses(figures) == []


@pytest.mark.parametrize(
    ("goals", "figures", "said"),
    [
        (Goals(latency=0.5, size=0.3, download=0.25, macs=0.6), FIGURES, []),
        (Goals(size=0.29), FIGURES, ["its size is 0.300 of the original's, more than 0.29"]),
        (Goals(macs=0.9), replace(FIGURES, macs=None), ["its macs is not known"]),
        (Goals(), replace(FIGURES, latency=1.5), ["it takes 1.50 times as long as the original"]),
        (Goals(macs=0.6), replace(FIGURES, latency=1.5), ["it takes 1.50 times as long as the original"]),
        (Goals(size=0.5), replace(FIGURES, latency=1.5), []),
        (
            Goals(size=0.5, latency=1),
            replace(FIGURES, latency=1.01),
            ["its latency is 1.010 of the original's, more than 1"],
        ),
        (Goals(), replace(FIGURES, latency=None), []),
    ],
)
def test_what_is_taken(goals: Goals, figures: TrialFigures, said: list[str]) -> None:
    assert goals.excesses(figures) == said


def test_where_nothing_is_asked_for_decisions_are_kept_or_else_decibels() -> None:
    assert Goals().completed(scored=False, deciding=100).given == {"max_drop": 0.01}
    assert Goals().completed(scored=False, deciding=99).given == {"require_sqnr": 20.0}, (
        "one is more than 1 %"
    )
    assert Goals().completed(scored=True, deciding=0).given == {"max_drop": 0.01}
    asked = Goals(size=0.5)
    assert asked.completed(scored=True, deciding=100) is asked


def test_a_gain_of_the_metric_is_worth_more_than_none() -> None:
    better, worse = replace(FIGURES, metric=(0.9, 0.91)), replace(FIGURES, metric=(0.9, 0.89), sqnr=40.0)
    assert better.worth > worse.worth
    assert replace(FIGURES, sqnr=30.0).worth > FIGURES.worth
