"""The order in which units go, beside the definition of it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.ir.graph import Array
from onnxslim.passes.prune.importance import DAMPING, _obs, _Source


def source(name: str, units: list[int], seed: int) -> tuple[_Source, Array]:
    """Moments of correlated channels, and weights that read them."""
    random = np.random.default_rng(seed)
    size = len(units)
    mixed = random.standard_normal((4 * size, size)) @ random.standard_normal((size, size))
    weight = random.standard_normal((size, 5))
    gram = mixed.T @ mixed / len(mixed)
    return _Source((name, 1), np.array(units), gram, weight @ weight.T), weight


@pytest.mark.parametrize(
    "units",
    [
        [[*range(20)]],
        [[*range(20)], [*range(19, -1, -1)]],
        [[each // 2 for each in range(24)], [-1, *range(12), -1]],
        [[0, 0, 0, *range(1, 12)]],
    ],
)
def test_units_go_in_the_order_of_what_the_others_cannot_make_up_for(units: list[list[int]]) -> None:
    """Every round anew, with inverses and weights of what is left, in place of updates of both."""
    made = [source(str(index), each, index) for index, each in enumerate(units)]
    size = 1 + max(units[0])
    ranking = _obs([each for each, _ in made], size, size)
    states: list[tuple[Array, Array, Array]] = []
    for each, weight in made:
        scale = float(np.mean(np.diag(each.gram)))
        damped = each.gram + DAMPING * scale * np.eye(len(each.gram))
        states.append((each.units, damped, weight / np.sqrt(each.total)))
    lost = 0.0
    for place, unit in enumerate(ranking.order):
        losses = {other: sum(_lost(*state, other) for state in states) for other in ranking.order[place:]}
        assert losses[unit] == pytest.approx(min(losses.values()), rel=1e-6)
        lost += losses[unit]
        assert ranking.damage[place + 1] == pytest.approx(lost, rel=1e-6)
        states = [_without(*state, unit) for state in states]


def _lost(units: Array, gram: Array, weight: Array, unit: int) -> float:
    """What the reader loses with a unit, if the others make up for it: the part they do not predict."""
    gone, stay = units == unit, units != unit
    unexplained = gram[gone][:, gone]
    if stay.any():
        unexplained = unexplained - gram[gone][:, stay] @ np.linalg.solve(
            gram[stay][:, stay], gram[stay][:, gone]
        )
    return float(np.sum(unexplained * (weight[gone] @ weight[gone].T)))


def _without(units: Array, gram: Array, weight: Array, unit: int) -> tuple[Array, Array, Array]:
    """The others, with weights that make up for the unit."""
    gone, stay = units == unit, units != unit
    shares = np.linalg.solve(gram[stay][:, stay], gram[stay][:, gone]) if stay.any() else gram[stay][:, gone]
    return units[stay], gram[stay][:, stay], weight[stay] + shares @ weight[gone]
