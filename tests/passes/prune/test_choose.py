"""What a number of units that go is said to cost, and which may not go."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Context, Log
from onnxslim.families.analysis import analyze
from onnxslim.ir.model import Model
from onnxslim.passes.prune import choose
from tests.helpers import normal, normals, parse

WIDTH = 22


def layers() -> Model:
    return parse(
        "g (float[N,3] x) => (float[N,2] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }",
        normals(w=(3, WIDTH), v=(WIDTH, 2)),
    )


def candidates_of(
    model: Model,
    *,
    align: int = 1,
    spared: Mapping[str, str] = MappingProxyType({}),
    data: CalibrationData | None = None,
    log: Log | None = None,
) -> choose.Candidates:
    """What could go of a model, by the size of weights."""
    return choose.candidates(
        model,
        analyze(model),
        criterion="l2",
        align=align,
        max_ratio=0.9,
        spared=spared,
        data=data,
        ctx=Context(),
        log=log or Log(),
    )


def test_damage_is_told_where_it_was_measured_though_steps_are_uneven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """22 units in eights: 6 go, then 8 more. What is measured at a number is the curve at that number."""

    class Judged:
        error = 0.0

    class Judge:
        """Says the square of the number that went."""

        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, trial: Model) -> Judged:
            judged = Judged()
            judged.error = float(WIDTH - trial.graph.initializers["v"].shape[0]) ** 2
            return judged

    monkeypatch.setattr(choose, "Judge", Judge)
    model, data = layers(), CalibrationData([{"x": normal(8, 3)}])
    found = candidates_of(model, align=8, data=data)
    [curve] = choose.damages(model, found, data, Context(), Log()).values()
    assert curve == {0: 0.0, 6: 36.0, 14: 196.0}


@pytest.mark.parametrize("name", ["reader", "r", "v"])
def test_a_layer_that_is_spared_keeps_what_it_reads(name: str) -> None:
    model = layers()
    model.graph.nodes[-1].name = "reader"
    log = Log()
    found = candidates_of(model, spared=choose.spared(model, [name]), log=log)
    assert not found.families
    assert [skip.reason for skip in log.done().skipped] == [f"excluded by '{name}'"]


def test_curves_without_data_are_what_the_criterion_says() -> None:
    model = layers()
    found = candidates_of(model)
    [curve] = choose.damages(model, found, None, Context(), Log()).values()
    [ranking] = found.rankings.values()
    assert curve[1] == pytest.approx(ranking.damage[1])
    assert np.all(np.diff(list(curve.values())) >= 0)
