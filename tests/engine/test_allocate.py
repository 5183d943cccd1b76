"""One loop for all budgets: close to the best there is, whatever kind of cost, and no wider than the goal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.engine.allocate import Additive, Joint, allocate, convex, fewest, settled

Table = Mapping[str, Mapping[int, float]]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, Table, float]:
    """Damage, cost and a budget."""
    damage, costs = {}, {}
    for group in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 4))
        costs[str(group)] = {option: float(draw(st.integers(1, 20))) for option in range(count)}
        damage[str(group)] = {option: float(draw(st.integers(0, 20))) for option in range(count)}
    return damage, costs, float(draw(st.integers(1, 60)))


def combinations(table: Table) -> Iterator[dict[str, int]]:
    for options in itertools.product(*table.values()):
        yield dict(zip(table, options, strict=True))


def total(table: Table, picks: Mapping[str, int]) -> float:
    return math.fsum(table[group][option] for group, option in picks.items())


@given(tables())
def test_where_costs_add_up_the_choice_is_close_to_the_best(problem: tuple[Table, Table, float]) -> None:
    damage, costs, budget = problem
    choices = Additive(damage, costs)
    found = allocate(choices, budget, choices.best())
    within = [total(damage, picks) for picks in combinations(costs) if total(costs, picks) <= budget]
    if not within:
        assert choices.cost(found) == min(total(costs, picks) for picks in combinations(costs))
        return
    assert choices.cost(found) <= budget
    # A price per cost misses the best by less than one group's choice is worth.
    worth = max(max(each.values()) - min(each.values()) for each in damage.values())
    assert total(damage, found) <= min(within) + worth


def test_a_choice_that_no_price_picks_spends_what_is_left() -> None:
    """The line from (10, 0) to (1, 9) runs below (5, 6); the budget fits it."""
    choices = Additive({"a": {0: 0.0, 1: 6.0, 2: 9.0}}, {"a": {0: 10.0, 1: 5.0, 2: 1.0}})
    assert allocate(choices, 6.0, choices.best()) == {"a": 1}


def test_what_is_left_is_spent_where_it_gains_most_for_its_cost() -> None:
    """All three steps are needed, and too much; `b` would gain more than `a` does, but less for its cost."""
    damage = {"a": {0: 0.0, 1: 1.0}, "b": {0: 0.0, 1: 2.0}, "c": {0: 0.0, 1: 100.0}}
    costs = {"a": {0: 5.0, 1: 1.0}, "b": {0: 10.0, 1: 1.0}, "c": {0: 51.0, 1: 1.0}}
    choices = Additive(damage, costs)
    assert allocate(choices, 12.0, choices.best()) == {"a": 0, "b": 1, "c": 1}


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_where_costs_are_known_of_the_whole_the_choice_is_close_to_the_best(draw: st.DataObject) -> None:
    """What the choice step by step leaves on the table is at most one step's damage."""
    sizes = draw.draw(st.lists(st.integers(2, 5), min_size=3, max_size=3))
    damage = {
        str(group): convex({n: draw.draw(st.floats(0, 1)) * n for n in range(size)})
        for group, size in enumerate(sizes)
    }
    price = {group: draw.draw(st.integers(1, 9)) for group in damage}
    whole = sum(price[group] * len(options) for group, options in damage.items())

    def cost(gone: Mapping[str, int]) -> int:
        return whole - sum(price[group] * n for group, n in gone.items())

    goal = draw.draw(st.integers(sum(price.values()), whole))
    found = allocate(Joint(damage, cost), goal, dict.fromkeys(damage, 0))
    fitting = [total(damage, picks) for picks in combinations(damage) if cost(picks) <= goal]
    steps = [np.diff(list(options.values())).max(initial=0) for options in damage.values()]
    if fitting:
        assert cost(found) <= goal
        assert total(damage, found) <= min(fitting) + max(steps) + 1e-9


def test_steps_that_the_goal_does_not_need_are_taken_back_the_worst_first() -> None:
    """The first step is the cheapest per cost, and not needed once the second is made."""
    damage = {"a": {0: 0.0, 1: 1.0}, "b": {0: 0.0, 1: 9.0}}
    choices = Joint(damage, lambda gone: 20.0 - 2.0 * gone["a"] - 10.0 * gone["b"])
    assert allocate(choices, 10.0, {"a": 0, "b": 0}) == {"a": 0, "b": 1}


@given(st.integers(0, 40), st.integers(0, 41), st.integers(1, 9))
def test_the_fewest_are_found_however_they_are_guessed(most: int, bound: int, stride: int) -> None:
    tried: list[int] = []

    def enough(count: int) -> bool:
        tried.append(count)
        return count >= bound

    expected = min(max(bound, 1), most + 1)
    assert fewest(enough, most) == expected
    assert fewest(enough, most, lambda lacking: min(lacking + stride, most)) == expected
    assert set(tried) <= set(range(1, most + 1))
    assert len(tried) <= 2 * (most.bit_length() + 1) + most // stride + 1


def test_each_concession_is_tried_once() -> None:
    tried: list[int] = []

    def without(state: frozenset[int], offer: int) -> frozenset[int]:
        tried.append(offer)
        return state - {offer}

    found = settled(frozenset(range(5)), lambda state: sum(state) >= 7, sorted, without)
    assert found == {3, 4}
    assert tried == [0, 1, 2, 3, 4]
    assert settled(frozenset({1}), lambda state: sum(state) >= 7, sorted, without) == {1}
