"""Trials compared: which of them no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from onnxslim.search.goals import TrialFigures
from onnxslim.search.trials import SearchTrial

CostKind: TypeAlias = Literal["latency", "size", "download", "macs"]


def front(trials: Sequence[SearchTrial], kind: CostKind) -> list[SearchTrial]:
    """Trials that no other one beats in both cost and worth, the cheapest first (Pareto front).

    Args:
        trials: those without figures, or whose cost is not known, are left out.
        kind: of cost.
    """
    points = [(_cost(each.figures, kind), each) for each in trials if each.figures is not None]
    known = [(cost, each) for cost, each in points if cost is not None]
    best: list[SearchTrial] = []
    for _, trial in sorted(known, key=lambda point: (point[0], _worse(point[1]))):
        if not best or _worse(trial) < _worse(best[-1]):
            best.append(trial)
    return best


def _cost(figures: TrialFigures, kind: CostKind) -> float | None:
    value: float | None = getattr(figures, kind)
    return value


def _worse(trial: SearchTrial) -> tuple[float, float]:
    assert trial.figures is not None
    lost, kept = trial.figures.worth
    return -lost, -kept
