"""What passes are asked to keep: they do as much as they may for it, and nothing where that is in vain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import FAILED, Score
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Changes, Context
from onnxslim.engine.demands import Demand, Demanding, FidelityGoal
from onnxslim.engine.pipeline import Pipeline, Step
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.model import Model
from onnxslim.passes import factorize, prune
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune
from onnxslim.passes.repair import repair
from tests.helpers import normal, parse, sqnr_of

# 64 are held out, 64 to choose by, the others to fit on.
X, UNSEEN = normal(2048, 24), normal(4096, 24, seed=9)
NET = """g (float[N,24] x) => (float[N,8] y)
{ a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) q = Relu(b) y = MatMul(q, u) }"""
VAIN = 200.0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSLIM_CACHE", str(tmp_path / "cache"))


def net() -> Model:
    """Hidden units, and directions of the weights, of which some matter much more than others."""
    fading = (0.9 ** np.arange(64)).astype(np.float32)
    weights = {"w": normal(24, 64) * fading, "v": (normal(64, 64, seed=1) * fading[:, None]) * fading}
    return parse(NET, {**weights, "u": normal(64, 8, seed=2)})


def step(each: Demanding, **options: Any) -> Step:
    (found,) = Pipeline(each, on_error="raise")(net(), data={"x": X}, **options).report.steps
    return found


def notes(found: Step) -> str:
    return " ".join(skip.reason for skip in found.changes.skipped)


# A way to make each pass, and by how many dB more to require than it keeps unasked.
PASSES: dict[str, tuple[Callable[..., Demanding], float]] = {
    "prune": (partial(Prune, params=0.3, align=4), 6.0),
    "prune by ratio": (partial(Prune, ratio=0.6, align=4), 6.0),
    "prune in steps": (partial(Prune, params=0.3, align=4, steps=2), 6.0),
    "factorize": (partial(Factorize, params=0.4, align=4), 6.0),
    "half": (Half, 2.0),
    "half of weights": (partial(Half, dtype="bfloat16", weights_only=True), 2.0),
}


@pytest.mark.parametrize("case", PASSES)
def test_passes_do_less_to_keep_what_is_required(case: str) -> None:
    make, more = PASSES[case]
    free = Pipeline(make())(net(), data={"x": X}).model
    reached = sqnr_of(net(), free, {"x": UNSEEN})
    held = Pipeline(make(require_sqnr=reached + more))(net(), data={"x": X}).model
    assert sqnr_of(net(), held, {"x": UNSEEN}) > reached + more / 2
    assert free.stats().bytes < held.stats().bytes < net().stats().bytes
    easy = Pipeline(make(require_sqnr=reached - 15))(net(), data={"x": X}).model
    assert easy.stats().bytes == pytest.approx(free.stats().bytes, rel=0.1)


@pytest.mark.parametrize("case", PASSES)
def test_what_cannot_be_kept_leaves_the_model_as_it_is(case: str) -> None:
    make, _ = PASSES[case]
    found = step(make(require_sqnr=VAIN))
    assert not found.changes
    assert found.kept is None
    assert "however little" in found.outcome
    assert f" dB are left, less than require_sqnr={VAIN:g}" in found.outcome


def test_decisions_are_kept_where_there_is_no_metric() -> None:
    free, held = step(Prune(ratio=0.6, align=4)), step(Prune(ratio=0.6, align=4, max_drop=0.02))
    assert free.kept is not None
    assert free.kept.agreement is not None
    assert 1 - free.kept.agreement > 0.02
    assert free.after.bytes < held.after.bytes
    assert "of the decisions are others, more than max_drop=0.02" in notes(held)


def test_nothing_is_told_of_a_trial_that_was_not_taken() -> None:
    make = partial(Prune, params=0.33, align=8)
    missed = "of the parameters are left instead of 0.33"
    assert missed in notes(step(make()))
    free = Pipeline(make())(net(), data={"x": X}).model
    held = step(make(require_sqnr=sqnr_of(net(), free, {"x": UNSEEN}) + 6))
    assert "of what was asked for goes" in notes(held)
    assert missed not in notes(held)


def test_a_metric_decides_where_there_is_one() -> None:
    wish = Prune(ratio=0.6, align=4, max_drop=0.0)
    assert step(wish, metric=lambda run: 1.0).after.bytes == step(Prune(ratio=0.6, align=4)).after.bytes
    values = iter([1.0])
    worthless = step(wish, metric=lambda run: next(values, 0.0))
    assert worthless.outcome.endswith("the metric drops from 1 to 0, more than 0")


def test_without_data_nothing_can_be_required() -> None:
    for make, _ in PASSES.values():
        with pytest.raises(CalibrationError, match="needs calibration data"):
            Pipeline(make(require_sqnr=20.0))(net())


@pytest.mark.parametrize(("case", "module"), [("prune", prune), ("factorize", factorize)])
def test_candidates_are_not_fitted_to_what_they_are_judged_by(
    case: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Samples] = []

    def spy(student: Model, teacher: Model, data: Samples, **options: Any) -> Changes:
        used.append(data)
        return repair(student, teacher, data, **options)

    monkeypatch.setattr(module, "repair", spy)
    found = step(PASSES[case][0](require_sqnr=20.0))
    assert found.changes
    *tried, last = used
    assert tried
    assert last.tuned
    assert all(not rows(each.seen) & rows(last.tune) for each in tried)


def rows(data: CalibrationData | None) -> set[bytes]:
    return {row.tobytes() for feeds in (data if data is not None else ()) for row in feeds["x"]}


def test_samples_to_choose_by_are_kept_apart_of_what_candidates_are_made_with() -> None:
    samples = Samples(CalibrationData.of({"x": X}), net())
    apart = samples.apart
    assert rows(apart.seen) == rows(samples.fit)
    assert rows(apart.tune)
    assert not rows(apart.seen) & (rows(samples.tune) | rows(samples.held))
    assert apart.held is None


@pytest.mark.parametrize(
    ("each", "said"),
    [
        (lambda: Half(everywhere=True, require_sqnr=40.0), "everywhere"),
        (lambda: Prune(ratio=0.5, allow_outputs=True, max_drop=0.1).run(net(), Context()), "allow_outputs"),
        (lambda: Prune(ratio=0.5, max_drop=-0.1), "max_drop"),
    ],
)
def test_what_cannot_be_judged_is_refused(each: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        each()


# ------------------------------------------------------------------------------ the goal, and the search


def score(sqnr: float, agreement: float | None = None) -> Score:
    return Score(sqnr, 0.0, {"y": sqnr}, agreement)


def goal(sqnr: float | None = None, max_drop: float | None = None, **ctx: Any) -> FidelityGoal:
    return FidelityGoal("prune", sqnr, max_drop, net(), Context(**ctx))


def test_a_goal_is_met_at_its_limit() -> None:
    assert goal(20.0).met(net(), score(20.0))
    assert not goal(20.0).met(net(), score(19.9))
    assert goal(max_drop=0.25).met(net(), score(0.0, 0.75))
    assert not goal(max_drop=0.25).met(net(), score(99.0, 0.74))
    assert goal().met(net(), score(-5.0))
    assert not goal().met(net(), FAILED)


def test_drops_need_something_to_drop() -> None:
    with pytest.raises(UsageError, match=r"max_drop needs a metric.*no output has shape \(batch, classes\)"):
        goal(max_drop=0.1).met(net(), score(30.0))


def test_the_metric_counts_and_not_decisions_where_it_is_given() -> None:
    values = iter((1.0, 0.8, 0.95))
    wanted = goal(max_drop=0.1, metric=lambda run: next(values))
    assert wanted.shortfall(net(), score(30.0, 1.0)) == "the metric drops from 1 to 0.8, more than 0.1"
    assert wanted.met(net(), score(30.0, 0.0))


@dataclass(frozen=True)
class Noisy:
    """A network whose last weight is off by so much."""

    model: Model
    back: int


def noisy(back: int) -> Noisy:
    model = net()
    weight = model.graph.initializers["u"]
    weight.values = (weight.values * (1 + 0.5 ** (back + 1) * normal(64, 8, seed=7))).astype(np.float32)
    return Noisy(model, back)


@pytest.mark.parametrize("sqnr", [0.0, 20.0, 40.0, 60.0])
def test_the_fewest_steps_back_that_are_enough_are_found(sqnr: float) -> None:
    ctx = Context(data=Samples(CalibrationData.of({"x": X}), net()))
    demand = Demand("prune", sqnr, None, net(), ctx)
    made = demand.least(noisy, 15)
    assert made is not None
    assert demand.met(noisy(made.back).model)
    assert not made.back or not demand.met(noisy(made.back - 1).model)
    assert (made.back == 0) == (sqnr == 0.0)


def test_what_is_out_of_reach_says_how_near_it_came() -> None:
    ctx = Context(data=Samples(CalibrationData.of({"x": X}), net()))
    demand = Demand("prune", VAIN, None, net(), ctx)
    assert demand.least(noisy, 3) is None
    nearest = demand.shortfall
    assert not demand.met(noisy(3).model)
    assert nearest == demand.shortfall
