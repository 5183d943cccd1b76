"""Validation against formulas written out in numpy, on models whose difference is known."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxslim.validation.compare
from onnxslim.calibration.data import CalibrationData
from onnxslim.errors import CalibrationError, TargetError, UsageError, ValidationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.metric import Metric, Run
from onnxslim.runtime.targets import Target
from onnxslim.validation.compare import validate
from onnxslim.validation.verdict import OutputRow, Verdict
from tests.helpers import normal, parse

CPU = (Target.cpu(),)


def classifier(*weights: float) -> Model:
    """Four inputs times as many weights: the logits."""
    values = ", ".join(str(weight) for weight in weights)
    return parse(
        f"g (float[N,4] x) => (float[N,4] y) <float[4] w = {{{values}}}> {{ y = Mul(x, w) }}",
    )


A = classifier(1, 1, 1, 1)
B = classifier(1, 1, 1, 1.5)
X = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


def f32(values: list[float]) -> Array:
    return np.array(values, np.float32)


def batches(samples: Array, size: int = 4) -> list[dict[str, Array]]:
    return [{"x": samples[start : start + size]} for start in range(0, len(samples), size)]


def compare(first: Model, second: Model, data: Any = None, **options: Any) -> Verdict:
    return validate(first, second, data, CPU, **{"rounds": 0, **options})


def row(first: Model, second: Model, data: Any = None) -> OutputRow:
    return compare(first, second, data).providers[0].outputs[0]


def test_a_model_is_the_same_as_itself() -> None:
    assert row(A, A, batches(X)) == OutputRow("y", 1.0, 0.0, math.inf, 1.0, 1.0)


def test_figures_follow_their_formulas() -> None:
    found = row(A, B, batches(X))
    expected, actual = X.astype(np.float64), (X * f32([1, 1, 1, 1.5])).astype(np.float64)
    noise = expected - actual
    norms = np.linalg.norm(expected) * np.linalg.norm(actual)
    assert found.max_abs == np.abs(noise).max()
    assert found.sqnr == pytest.approx(10 * np.log10((expected**2).sum() / (noise**2).sum()), rel=1e-12)
    assert found.cosine == pytest.approx((expected * actual).sum() / norms, rel=1e-12)
    assert found.top1 == (expected.argmax(1) == actual.argmax(1)).mean() < 1.0
    assert found.equal == (noise == 0).mean() == 0.75


@given(cuts=st.sets(st.integers(1, 9)))
@settings(max_examples=15, deadline=None)
def test_how_samples_are_cut_into_batches_changes_nothing(cuts: set[int]) -> None:
    ends = [0, *sorted(cuts), 10]
    parts = [{"x": X[start:end]} for start, end in pairwise(ends)]
    whole, found = row(A, B, [{"x": X}]), row(A, B, parts)
    for name in ("equal", "max_abs", "sqnr", "cosine", "top1"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_sums_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = row(A, B, batches(X))
    monkeypatch.setattr(onnxslim.validation.compare, "BLOCK", 3)
    found = row(A, B, batches(X))
    assert found.sqnr == pytest.approx(whole.sqnr, rel=1e-12)
    assert found.equal == whole.equal


def test_integers_are_counted_not_subtracted() -> None:
    first = parse("g (float[N,4] x) => (int64[N,1] i) { i = ArgMax<axis = 1>(x) }")
    second = parse(
        "g (float[N,4] x) => (int64[N,1] i) <float[4] w = {1, 1, 1, 9}> "
        "{ s = Mul(x, w)  i = ArgMax<axis = 1>(s) }"
    )
    same = (X.argmax(1) == (X * f32([1, 1, 1, 9])).argmax(1)).mean()
    assert 0 < same < 1
    assert row(first, second, batches(X)) == OutputRow("i", same)


def test_sequences_are_compared_for_equality() -> None:
    text = "g (float[N,4] x) => (seq(float[N,4]) s) <float[4] w = {%s}> "
    text += "{ y = Mul(x, w)  s = SequenceConstruct(y) }"
    first, second = parse(text % "1,1,1,1"), parse(text % "1,1,1,2")
    assert row(first, first, batches(X)) == OutputRow("s", 1.0)
    assert row(first, second, batches(X)) == OutputRow("s", 0.0)


def test_nan_where_there_was_none_is_infinite_noise() -> None:
    root = parse("g (float[N,4] x) => (float[N,4] y) { y = Sqrt(x) }")
    found = row(A, root, batches(X))
    assert (found.max_abs, found.sqnr) == (math.inf, -math.inf)
    assert math.isnan(found.cosine or 0.0)
    for limit in ({"sqnr": -1e9}, {"cosine": -1.0}, {"max_abs": 1e30}):
        with pytest.raises(ValidationError):
            compare(A, root, batches(X)).require(**limit)


def test_nan_on_both_sides_is_no_noise() -> None:
    root = parse("g (float[N,4] x) => (float[N,4] y) { y = Sqrt(x) }")
    found = row(root, root, batches(X))
    assert (found.equal, found.max_abs, found.sqnr) == (1.0, 0.0, math.inf)


def test_noise_on_a_silent_output() -> None:
    found = row(classifier(0, 0, 0, 0), A, batches(X))
    assert (found.sqnr, found.cosine) == (-math.inf, 0.0)


def test_outputs_of_other_shapes_are_a_problem_that_fails_every_requirement() -> None:
    text = "g (float[4] x) => (float[M] y) <float c = {%s}> { m = Greater(x, c)  y = Compress(x, m) }"
    first, second = parse(text % "0"), parse(text % "0.5")
    data = [{"x": f32([1, 2, 3, 4])}, {"x": f32([0.1, 0.2, 3, 4])}]
    found = row(first, second, data)
    assert found.problem == "changed its shape from (4,) to (2,) (in 1 of 2 batches)"
    with pytest.raises(ValidationError, match=r"^cpu: output 'y' changed its shape"):
        compare(first, second, data).require(sqnr=1)


def test_accuracy_of_both_models() -> None:
    labels = X.argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    found = compare(A, B, batches(X), labels=labels).providers[0].accuracy
    assert found is not None
    assert found.before == 0.7
    assert found.after == ((X * f32([1, 1, 1, 1.5])).argmax(1) == labels).mean()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(9, int), "9 labels for at least 10 samples"),
        (np.zeros(11, int), "11 labels for 10 samples"),
        (np.zeros((10, 1), int), "one integer per sample"),
        (np.zeros(10), "one integer per sample"),
        (np.full(10, 4), "label 4 is none of the 4 classes, which count from 0"),
        (np.full(10, -1), "label -1 is none of the 4 classes"),
    ],
)
def test_labels_that_do_not_fit(labels: Array, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        compare(A, B, batches(X), labels=labels)


def test_labels_need_a_classifier() -> None:
    total = parse("g (float[N,4] x) => (float[N,1] y) <int64[1] a = {1}> { y = ReduceSum(x, a) }")
    with pytest.raises(CalibrationError, match=r"no output has shape \(batch, classes\)"):
        compare(total, total, batches(X), labels=np.zeros(10, int))


def _third(run: Run) -> float:
    return float(run({"x": X})["y"][:, 3].mean())


def test_own_metric_runs_both_models() -> None:
    found = compare(A, B, batches(X[:2]), metric=_third)
    metric = found.providers[0].metric
    assert metric is not None
    assert metric.before == pytest.approx(float(X[:, 3].mean()), rel=1e-5)
    assert metric.after == pytest.approx(1.5 * float(X[:, 3].mean()), rel=1e-5)
    drop = metric.before - metric.after
    found.require(max_metric_drop=drop + 1e-3)
    with pytest.raises(ValidationError, match="metric drop"):
        found.require(max_metric_drop=drop - 1e-3)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda run: float("nan"), "not a number"),
        (lambda run: run({"x": X})["nothing"], "KeyError: 'nothing'"),
        (lambda run: "much", "could not convert"),
    ],
)
def test_a_metric_that_fails_is_the_callers(metric: Metric, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(A, B, batches(X), metric=metric)


def test_latency_is_measured_unless_switched_off() -> None:
    timed = compare(A, B, batches(X), rounds=5, seconds=0.1)
    provider = timed.providers[0]
    assert provider.latency is not None
    assert provider.ratio is not None
    assert min(provider.latency[0].median, provider.latency[1].median, provider.ratio) > 0
    timed.require(latency=1e6)
    with pytest.raises(ValidationError, match="latency ratio was not measured"):
        compare(A, B, batches(X)).require(latency=1e6)


def test_sizes_of_both_models() -> None:
    longer = parse(
        "g (float[N,4] x) => (float[N,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> "
        "{ z = Relu(x)  y = MatMul(z, w) }"
    )
    found = compare(longer, longer, batches(X)).before
    assert (found.nodes, found.parameters, found.macs) == (2, 8, 8)
    assert found.bytes == longer.stats().bytes > 8 * 4


def test_made_up_inputs_are_announced() -> None:
    found = compare(A, A)
    assert found.made_up
    assert "made up" in str(found)
    assert not compare(A, A, batches(X)).made_up


def test_samples_and_batches_are_counted() -> None:
    found = compare(A, A, batches(X))
    assert (found.samples, found.batches, found.batch) == (10, 3, 4)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []
    compare(A, A, batches(X), progress=lambda *words: told.append(words))
    assert told == [("validating", 1, 3), ("validating", 2, 3), ("validating", 3, 3)]


def test_data_is_streamed() -> None:
    seen: list[weakref.ref[Array]] = []
    alive: list[int] = []

    def stream() -> Iterator[dict[str, Array]]:
        for _ in range(12):
            alive.append(sum(ref() is not None for ref in seen))
            array = X.copy()
            seen.append(weakref.ref(array))
            yield {"x": array}
            del array

    compare(A, B, CalibrationData.from_callable(stream))
    assert len(alive) == 12
    assert max(alive) <= 2  # the first one, which latency is measured on, and the one at hand


def test_empty_or_unfit_data() -> None:
    with pytest.raises(CalibrationError, match="no data"):
        compare(A, A, [])
    with pytest.raises(CalibrationError, match="no input 'z'"):
        compare(A, A, [{"z": X}])
    with pytest.raises(CalibrationError, match="float64"):
        compare(A, A, [{"x": X.astype(np.float64)}])


def test_a_result_with_another_interface() -> None:
    renamed = parse("g (float[N,4] x) => (float[N,4] z) { z = Relu(x) }")
    with pytest.raises(ValidationError, match="no output 'y'"):
        compare(A, renamed, batches(X))
    greedy = parse("g (float[N,4] x, float[4] w) => (float[N,4] y) { y = Mul(x, w) }")
    with pytest.raises(ValidationError, match="needs an input 'w'"):
        compare(A, greedy, batches(X))
    frugal = parse("g (float[N,4] x) => (float[4] y) { y = ReduceMean<axes = [0], keepdims = 0>(x) }")
    assert compare(greedy, frugal, [{"x": X, "w": X[0]}]).providers[0].outputs[0].problem


def test_a_result_that_takes_fewer_shapes() -> None:
    fixed = parse(
        "g (float[N,4] x) => (float[N,4] y) <int64[2] s = {4, 4}> { y = Reshape(x, s) }",
    )
    with pytest.raises(ValidationError, match="the second model fails where the first one does not"):
        compare(A, fixed, batches(X))


def test_unavailable_targets_are_refused() -> None:
    with pytest.raises(TargetError, match="CUDAExecutionProvider"):
        validate(A, A, batches(X), [Target.cuda()])
    with pytest.raises(UsageError):
        validate(A, A, batches(X), [])


def test_the_original_is_compared_across_providers() -> None:
    other = replace(Target.cpu(), name="cpu with one thread", threads=1)
    found = validate(A, B, batches(X), [Target.cpu(), other], rounds=0)
    assert found.providers[0].original == ()
    assert found.providers[1].original == (OutputRow("y", 1.0, 0.0, math.inf, 1.0, 1.0),)
    assert found.providers[1].outputs == found.providers[0].outputs
    assert "first model against itself on cpu" in str(found)


def test_random_outputs_are_noted() -> None:
    noise = parse("g (float[N,4] x) => (float[N,4] y) { y = RandomNormalLike(x) }")
    assert any("differ from run to run" in note for note in compare(noise, noise, batches(X)).notes)


# ------------------------------------------------------------------------------------------------ limits


def test_limits_that_are_met() -> None:
    verdict = compare(A, B, batches(X), labels=X.argmax(1))
    limits = {"sqnr": 1.0, "top1": 0.5, "cosine": 0.9, "max_abs": 5.0, "max_accuracy_drop": 0.5}
    assert verdict.require(**limits) is verdict
    assert verdict.require(sqnr=None) is verdict


@pytest.mark.parametrize(
    "limit",
    [{"sqnr": 60.0}, {"top1": 1.0}, {"cosine": 0.99999}, {"max_abs": 0.01}, {"max_accuracy_drop": 0.01}],
)
def test_limits_that_are_not_met(limit: dict[str, float]) -> None:
    verdict = compare(A, B, batches(X), labels=X.argmax(1))
    with pytest.raises(ValidationError) as caught:
        verdict.require(**limit)
    assert caught.value.verdict is verdict
    assert "\n" not in str(caught.value)
    assert "cpu: " in str(caught.value)
    assert f"{next(iter(limit.values())):g}" in str(caught.value)


def test_limits_hold_on_every_provider() -> None:
    verdict = compare(A, B, batches(X))
    (provider,) = verdict.providers
    other = replace(provider, target="other", outputs=(replace(provider.outputs[0], sqnr=1.0),))
    with pytest.raises(ValidationError, match="other: output 'y' has SQNR 1 dB"):
        replace(verdict, providers=(provider, other)).require(sqnr=2.0)


def test_the_message_names_everything() -> None:
    verdict = compare(A, B, batches(X))
    measured = verdict.providers[0].outputs[0].sqnr
    with pytest.raises(ValidationError) as caught:
        verdict.require(sqnr=60, cosine=1.0)
    assert str(caught.value) == (
        f"cpu: output 'y' has SQNR {measured:.4g} dB, required is at least 60 dB (and 1 more)"
    )


def test_limits_on_what_was_not_measured() -> None:
    with pytest.raises(ValidationError, match="no labels were given"):
        compare(A, A, batches(X)).require(max_accuracy_drop=0.5)
    counts = parse("g (float[N,4] x) => (int64[2] s) { s = Shape(x) }")
    with pytest.raises(ValidationError, match="no output is a floating-point tensor"):
        compare(counts, counts, batches(X)).require(sqnr=1)


def test_unknown_limits() -> None:
    with pytest.raises(UsageError, match="did you mean 'sqnr'"):
        compare(A, A, batches(X)).require(snr=20)


def test_verdicts_are_plain_data() -> None:
    found = compare(A, A, batches(X)).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["providers"][0]["outputs"][0]["sqnr"] == "inf"
    assert found["before"]["nodes"] == 1


def test_parts_of_an_output_have_rows_and_limits_of_their_own() -> None:
    """Boxes and scores in one output: the larger numbers do not hide what the smaller ones lose."""
    text = "g (float[N,4] x) => (float[N,8] y) { s = Mul(x, a) b = Mul(x, c) y = Concat<axis=1>(b, s) }"
    first, second = (
        parse(text, {"a": np.float32(scale) * np.ones(1, np.float32), "c": np.full(1, 1000, np.float32)})
        for scale in (1.0, 1.1)
    )
    verdict = compare(first, second, batches(X))
    rows = {row.name: row for row in verdict.providers[0].outputs}
    assert list(rows) == ["y", "y[0:4]", "y[4:8]"]
    assert (rows["y"].sqnr or 0) > 70
    assert rows["y[4:8]"].sqnr == pytest.approx(20, abs=0.1)
    assert rows["y[4:8]"].top1 is None
    with pytest.raises(ValidationError, match=r"output 'y\[4:8\]' has SQNR 20 dB"):
        verdict.require(sqnr=30)


@pytest.mark.parametrize(("right", "told"), [(0.1, True), (0.5, False)])
def test_an_original_that_only_guesses_is_told_of(right: float, told: bool) -> None:
    model = parse("g (float[N,10] x) => (float[N,10] y) { y = Identity(x) }")
    x = normal(100, 10)
    labels = (x.argmax(1) + (np.arange(100) >= 100 * right)) % 10
    verdict = validate(model, model, [{"x": x}], [Target.cpu()], labels=labels, rounds=0)
    assert [("guessing among 10 classes" in note) for note in verdict.notes] == [True] * told
