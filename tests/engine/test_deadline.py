"""A limit of time: at whatever moment it is over, what comes out runs, and what was not tried is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Pass
from onnxslim.engine.deadline import Deadline
from onnxslim.engine.pipeline import Pipeline, Step
from onnxslim.errors import TimeUp, UsageError
from onnxslim.ir.model import Model
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.runtime.session import Session
from tests.helpers import normal, parse

X = normal(64, 24)
TEXT = """g (float[N,24] x) => (float[N,8] y)
{ i = Identity(x) [a] a = MatMul(i, w) r = Relu(a) [b] b = MatMul(r, v) q = Relu(b) [c] y = MatMul(q, u) }"""
# Everything a search does: nothing is good enough.
WAYS: dict[str, Callable[[], Pass]] = {
    "quantize": lambda: Quantize(classifier=True, require_sqnr=36, effort="thorough"),
    "prune": lambda: Prune(params=0.4, align=4),
    "prune on demand": lambda: Prune(params=0.4, align=4, require_sqnr=15),
    "factorize": lambda: Factorize(params=0.6, align=4, cache=False),
    "factorize on demand": lambda: Factorize(params=0.6, align=4, cache=False, require_sqnr=30),
}


def net() -> Model:
    fading = (0.8 ** np.arange(32)).astype(np.float32)
    weights = {"w": normal(24, 32) * fading, "v": normal(32, 32, seed=1) * fading, "u": normal(32, 8, seed=2)}
    return parse(TEXT, weights)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Time goes by with each report of progress; `left` of them are in time."""
    count: dict[str, float] = {"left": float("inf"), "made": 0}

    def passed(self: Deadline) -> bool:
        return count["made"] > count["left"]

    def require(self: Deadline) -> None:
        count["made"] += 1
        if passed(self):
            raise TimeUp("the time limit of 9 s was over")

    monkeypatch.setattr(Deadline, "passed", property(passed))
    monkeypatch.setattr(Deadline, "require", require)
    return count


def run(each: Pass, model: Model) -> tuple[Model, Step]:
    data = CalibrationData([{"x": X[at : at + 8]} for at in range(0, 64, 8)])
    found = Pipeline(Slim(), each, on_error="revert")(model, data=data, time_limit=9)
    return found.model, found.report.steps[1]


def told(step: Step) -> str:
    return " ".join([step.outcome, *(skip.reason for skip in step.changes.skipped)])


@pytest.mark.parametrize("way", WAYS)
def test_whenever_the_time_is_over_something_that_runs_comes_out(way: str, calls: dict[str, float]) -> None:
    model = net()
    whole, step = run(WAYS[way](), model)
    assert step.changes, step.outcome
    assert "time limit" not in told(step)
    total = int(calls["made"])
    assert total > 5
    changed = []
    for left in sorted({0, 1, 2, total // 3, total // 2, 2 * total // 3, total - 2, total - 1}):
        calls.update(left=left, made=0)
        found, step = run(WAYS[way](), model)
        assert Session(found).run({"x": X})["y"].shape == (64, 8)
        assert "the time limit of 9 s was over" in told(step), left
        changed.append(bool(step.changes))
        if not step.changes:
            assert found.stats().parameters == model.stats().parameters
    assert changed == sorted(changed), "with more time there is a result, if there was with less"
    assert changed[-1]
    calls.update(left=total, made=0)
    again, _ = run(WAYS[way](), model)
    assert again.to_proto() == whole.to_proto()


def test_quantize_names_what_it_did_not_try(calls: dict[str, float]) -> None:
    calls["left"] = 9
    _, step = run(WAYS["quantize"](), net())
    (note,) = (skip.reason for skip in step.changes.skipped if "not tried" in skip.reason)
    untried = "weights fitted in turn, better rounding of weights, the fewest layers out of integers"
    assert note == f"the time limit of 9 s was over; not tried: {untried}, ranges of all samples"


def test_passes_that_lose_nothing_are_made_all_the_same(calls: dict[str, float]) -> None:
    calls["left"] = -1
    found = Pipeline(Slim(), Quantize(require_sqnr=0))(net(), data={"x": X}, time_limit=9).report.steps
    assert found[0].changes
    assert not found[1].changes
    assert found[1].error == "pass 'quantize' was not tried: the time limit of 9 s was over before"


def test_a_time_limit_is_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    deadline, seen = Deadline(2.0), list[Any]()
    watching = deadline.watching(lambda *what: seen.append(what))
    now[0] += 1.9
    watching("a", 1, 2)
    now[0] += 0.2
    with pytest.raises(TimeUp, match="the time limit of 2 s was over"):
        watching("a", 2, None)
    assert seen == [("a", 1, 2), ("a", 2, None)]
    with pytest.raises(UsageError, match="a time limit is a number of seconds above 0, not 0"):
        Deadline(0)
