"""What a report says that a lossy pass left of the outputs, of which samples, and when it warns."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.judging import Kept
from onnxslim.engine.pipeline import Pipeline, Report
from onnxslim.ir.model import Model
from onnxslim.passes.slim import Slim
from onnxslim.runtime import timing
from tests.helpers import normal, parse, products

X = normal(256, 6)


@options
class Disturb(Pass):
    """Adds a part of itself, row by row from the back, to a weight."""

    name: ClassVar[str] = "disturb"
    by: float = 0.1

    def run(self, model: Model, ctx: Context) -> Changes:
        """Disturb."""
        log = Log()
        weight = model.graph.initializers["w"]
        log.change("w", "disturbed")
        weight.values = (weight.values + self.by * weight.values[::-1]).astype(np.float32)
        return log.done()


def model() -> Model:
    return parse(
        "g (float[N,6] x) => (float[N,4] y) { i = Identity(x) y = MatMul(i, w) }", {"w": normal(6, 4)}
    )


def kept(by: float, samples: int) -> Kept:
    data = {"x": X[:samples]} if samples else None
    found = Pipeline(Slim(), Disturb(by))(model(), data=data).report.steps[1].kept
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("samples", "seen", "whose"), [(256, 16, "held out"), (64, 64, "fitted on"), (0, 5, "made up")]
)
def test_results_are_judged_on_what_no_pass_has_seen_if_there_is_enough(
    samples: int, seen: int, whose: str
) -> None:
    found = kept(0.1, samples)
    assert (found.samples, found.whose) == (seen, whose)
    assert whose.split()[0] in str(found)
    assert (found.agreement is None) == (whose == "made up")


def test_figures_are_those_of_the_samples_held_out() -> None:
    held = Samples(CalibrationData.of({"x": X}), model()).held
    assert held is not None
    x = np.concatenate([feeds["x"] for feeds in held]).astype(np.float64)
    weight = normal(6, 4).astype(np.float64)
    noise = x @ (0.1 * weight[::-1])
    found = kept(0.1, 256)
    assert found.sqnr == pytest.approx(
        10 * np.log10(np.square(x @ weight).sum() / np.square(noise).sum()), abs=1e-3
    )
    same = ((x @ weight).argmax(1) == (x @ weight + noise).argmax(1)).mean()
    assert found.agreement == pytest.approx(same)


def test_lossless_passes_are_not_judged_and_chains_are_as_wholes() -> None:
    report = Pipeline(Slim(), Disturb(0.1), Slim(), Disturb(0.1))(model(), data={"x": X}).report
    first, once, again, twice = (step.kept for step in report.steps)
    assert first is again is None
    assert once is not None
    assert twice is not None
    assert twice.sqnr < once.sqnr - 3


@options
class Burden(Pass):
    """Makes a model of more products of it."""

    name: ClassVar[str] = "burden"
    count: int = 1

    def run(self, model: Model, ctx: Context) -> Changes:
        """Burden."""
        log = Log()
        log.change("model", "burdened")
        model.graph = products(self.count).graph
        return log.done()


@pytest.mark.parametrize(
    ("steps", "slower"), [([20], False), ([200], True), ([200, 20], False), ([40, 200], True)]
)
def test_a_slower_result_is_told_first(
    steps: list[int], slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "TELLING", 0.0)  # whatever processor this is
    report = Pipeline(Slim(), *map(Burden, steps))(products(40), data={"x": normal(64, 256)}).report
    assert (report.slowdown is not None) == slower
    told = [warning for warning in report.warnings if "slower than what came in: a run takes" in warning]
    assert len(told) == slower
    if slower:
        assert report.slowdown is not None
        assert f"{report.slowdown:.2f} times as long" in told[0]


def test_only_lossy_passes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxslim.engine.pipeline.slowdown", lambda *_: 2.0)
    assert Pipeline(Slim())(model(), data={"x": X}).report.slowdown is None
    assert Pipeline(Disturb(0.1))(model(), data={"x": X}).report.slowdown == 2.0
    monkeypatch.setattr("onnxslim.engine.pipeline.UNTIMED_BYTES", model().nbytes() - 1)
    assert Pipeline(Disturb(0.1))(model(), data={"x": X}).report.slowdown is None


def test_parts_of_outputs_are_told_apart() -> None:
    text = """g (float[N,6] x) => (float[N,8] y)
    { a = MatMul(x, w) b = MatMul(x, v) y = Concat<axis=1>(a, b) }"""
    parted = parse(text, {"w": normal(6, 4), "v": 1000 * normal(6, 4, seed=2)})
    found = Pipeline(Disturb(0.1))(parted, data={"x": X}).report.steps[0].kept
    assert found is not None
    assert found.parts["y[4:8]"] > 100
    assert found.sqnr == found.parts["y[0:4]"] < 25
    assert "of 'y[0:4]', its worst part" in str(found)


@pytest.mark.parametrize(("by", "warned"), [(0.1, False), (2.0, True)])
def test_what_hardly_works_is_told_first(by: float, warned: bool) -> None:
    report = Pipeline(Disturb(by))(model(), data={"x": X}).report
    assert [("hardly the same model" in warning) for warning in report.warnings] == [True] * warned
    assert str(report).startswith("warning: hardly the same model: the result keeps") is warned


@pytest.mark.parametrize(
    ("sqnr", "agreement", "little"),
    [(9.9, None, True), (10.1, None, False), (20.0, 0.49, True), (20.0, 0.51, False)],
)
def test_little_is_less_than_ten_decibels_or_half_of_the_decisions(
    sqnr: float, agreement: float | None, little: bool
) -> None:
    assert Kept(sqnr, {"y": sqnr}, agreement, 16, "held out").little is little


def test_a_result_that_grew_is_told() -> None:
    @options
    class Widen(Pass):
        """Stores the weight in double precision, and casts it."""

        name: ClassVar[str] = "widen"

        def run(self, model: Model, ctx: Context) -> Changes:
            """Widen."""
            log = Log()
            log.change("w", "widened")
            model.become(parse(WIDE, {"w": normal(6, 4).astype(np.float64)}))
            return log.done()

    report = Pipeline(Widen(), on_error="raise")(model()).report
    (warning,) = report.warnings
    assert warning.startswith("the result is larger than what came in: ")
    assert warning.endswith(" bytes more")
    assert Report().warnings == ()


WIDE = "g (float[N,6] x) => (float[N,4] y) { i = Identity(x) v = Cast<to=1>(w) y = MatMul(i, v) }"


def test_noise_where_all_is_zero_is_not_told_as_exact() -> None:
    assert "to the last bit" in str(Kept(np.inf, {"y": np.inf}, None, 16, "held out"))
    told = str(Kept(np.inf, {"y": np.inf, "z": -np.inf}, None, 16, "held out"))
    assert "nothing but noise, where all that the original computes is zero" in told
