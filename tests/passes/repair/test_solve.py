"""Repair: which weights are best, seen from the layer, from the sum behind it, and from means alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import Moments
from onnxslim.passes.repair import jobs, plan
from onnxslim.passes.repair.solve import fit
from tests.helpers import normal, parse, replaced, stored
from tests.passes.repair.students import batches, block, error, mixing, refit, restored


def test_a_branch_makes_up_for_the_skip_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = {"x": normal(4, 4, 8, 8, seed=9)}
    student, teacher = block(16)
    plain = student.copy()
    refit(student, teacher, batches(4, 4, 8, 8, count=16))
    own = jobs.goals
    monkeypatch.setattr(plan, "goals", lambda *args: [goal for goal in own(*args) if not goal.other])
    refit(plain, teacher, batches(4, 4, 8, 8, count=16))
    assert error(student, teacher, feeds) < 0.9 * error(plain, teacher, feeds)


def test_what_is_added_may_be_one_value_per_channel() -> None:
    text = """g (float[N,4,H,W] x) => (float[N,4,A,B] y)
    { s = Conv(x, v) p = GlobalAveragePool(x) c = Conv(s, w) y = Add(p, c) }"""
    teacher = parse(text, {"v": mixing(4).reshape(4, 4, 1, 1), "w": normal(4, 4, 3, 3)})
    student = replaced(teacher, v=(mixing(4) @ mixing(4)).reshape(4, 4, 1, 1))
    changes = restored(student, teacher, {"x": normal(8, 4, 8, 7)})
    assert changes.changed[0].action == "refitted to 'y'"


def test_two_branches_of_a_sum_take_turns() -> None:
    text = """g (float[N,4,H,W] x) => (float[N,4,A,B] y)
    { s = Conv(x, v) a = Conv(s, w) k = Conv(s, z) y = Add(a, k) }"""
    weights = {"w": normal(4, 4, 1, 1), "z": normal(4, 4, 1, 1, seed=1)}
    teacher = parse(text, {"v": mixing(4).reshape(4, 4, 1, 1), **weights})
    student = replaced(teacher, v=(mixing(4) @ mixing(4)).reshape(4, 4, 1, 1))
    changes = restored(student, teacher, {"x": normal(8, 4, 6, 6)})
    assert changes.changed[0].action == "refitted to 'a'"


BIASES = {
    "bias": "z = Gemm(h, w, b)",
    "beta": "z = Gemm<beta=0.5>(h, w, b)",
    "unused beta": "z = Gemm<beta=0.5>(h, w)",
    "one value": "z = Gemm<beta=0.5>(h, w, o)",
    "scaled sum": "k = MatMul(h, w) i = Add(b, k) z = Mul(i, s)",
    "batch norm": "k = Gemm(h, w, b) z = BatchNormalization(k, s, b, b, s)",
}


@pytest.mark.parametrize("kind", BIASES)
def test_means_alone(kind: str) -> None:
    text = f"g (float[N,6] x) => (float[N,5] y) {{ h = Add(x, u) {BIASES[kind]} y = Relu(z) }}"
    constants = {"w": normal(6, 5), "b": normal(5), "o": normal(1), "s": np.abs(normal(5)) + 0.5}
    teacher = parse(text, {"u": np.zeros(6, np.float32), **constants})
    student = replaced(teacher, u=normal(6))
    changes = restored(student, teacher, {"x": normal(50, 6)}, method="bias", layers=["z"])
    assert len(changes.changed) == 1
    for name in "ws":
        np.testing.assert_array_equal(stored(student, name), constants[name])


def test_no_bias_to_correct_is_told() -> None:
    text = "g (float[N,6] x) => (float[N,5] y) { h = Relu(x) k = MatMul(h, w) y = Relu(k) }"
    teacher = parse(text, {"w": normal(6, 5)})
    student = teacher.copy()
    student.graph.nodes[0].op = "Abs"
    changes = refit(student, teacher, batches(50, 6), method="bias")
    assert not changes
    assert changes.skipped[0].reason == "it has no bias"


@given(st.integers(12, 40), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_the_error_on_rows_held_out_is_what_it_says_and_the_least(
    count: int, more: int, groups: int, bias: bool, seed: int
) -> None:
    x, r = normal(groups, 4, count + more, seed=seed), normal(groups, 2, count + more, seed=seed + 100)
    r += 0.3 * x[:, :2]
    train, held = Moments(), Moments()
    train.update(x[..., :count], r[..., :count])
    held.update(x[..., count:], r[..., count:])
    found = fit(train.result(), held.result(), bias=bias)
    assert found.before == pytest.approx(np.square(r[..., count:]).sum(axis=(0, 1)).mean(), rel=1e-4)
    mean_x, mean_r = (each[..., :count].mean(axis=2, keepdims=True) * bias for each in (x, r))
    dx, dr = (x[..., :count] - mean_x).astype(float), (r[..., :count] - mean_r).astype(float)
    left = r[..., count:] - mean_r
    if np.isfinite(found.strength):
        gram = dx @ dx.swapaxes(1, 2)
        ridge = found.strength * np.trace(gram, axis1=1, axis2=2)[:, None, None] / 4 * np.eye(4)
        left = left - dr @ dx.swapaxes(1, 2) @ np.linalg.inv(gram + ridge) @ (x[..., count:] - mean_x)
    assert found.after == pytest.approx(np.square(left).sum(axis=(0, 1)).mean(), rel=1e-2)
    assert found.after <= fit(train.result(), held.result(), method="bias", bias=bias).after


@given(st.integers(12, 40), st.integers(8, 40), st.booleans(), st.integers(0, 99))
def test_weights_come_from_all_rows(count: int, more: int, bias: bool, seed: int) -> None:
    x = normal(1, 4, count + more, seed=seed)
    r = x[:, 1:3] + normal(1, 2, count + more, seed=seed + 100) * np.float32(0.1) + np.float32(bias)
    train, held = Moments(), Moments()
    train.update(x[..., :count], r[..., :count])
    held.update(x[..., count:], r[..., count:])
    found = fit(train.result(), held.result(), bias=bias)
    assert found.weight is not None
    dx, dr = (each - each.mean(axis=2, keepdims=True) * bias for each in (x, r))
    gram = dx @ dx.swapaxes(1, 2)
    ridge = found.strength * np.trace(gram[0]) / 4 * np.eye(4)
    np.testing.assert_allclose(found.weight, dr @ dx.swapaxes(1, 2) @ np.linalg.inv(gram + ridge), atol=1e-3)
    shift = (r.mean(axis=2) - (found.weight @ x.mean(axis=2)[..., None])[..., 0]) * bias
    np.testing.assert_allclose(found.bias, shift, atol=1e-4)


def test_what_the_data_says_nothing_about_stays() -> None:
    """One channel of the input is constant: its weights and the bias could be traded for each other."""
    text = "g (float[N,3,H,W] x) => (float y) { h = Mul(x, u) z = Conv<group=3>(h, w, b) y = Relu(z) }"
    constants = {"w": normal(3, 1, 2, 2), "b": normal(3)}
    teacher = parse(text, {"u": np.ones((3, 1, 1), np.float32), **constants})
    student = replaced(teacher, u=np.array([0.5, 3, 2], np.float32).reshape(3, 1, 1))
    x = normal(9, 3, 6, 6)
    x[:, 1] = 0.3
    refit(student, teacher, CalibrationData([{"x": x[:4]}, {"x": x[4:]}]))
    assert error(student, teacher, {"x": x}) < 1e-4
    np.testing.assert_allclose(stored(student, "w")[1], constants["w"][1], atol=1e-5)
    np.testing.assert_allclose(stored(student, "w")[2] * 2, constants["w"][2], atol=1e-4)


def test_an_input_that_hardly_varies_gets_no_large_weight() -> None:
    x, r = normal(2, 3, 400), normal(2, 1, 400)
    x[1] *= np.float32(1e-10)
    moments = Moments()
    moments.update(x, r)
    found = fit(moments.result(), moments.result())
    assert found.weight is not None
    assert np.abs(found.weight[1]).max() < 1


def test_weights_stay_where_others_are_no_better() -> None:
    text = "g (float[N,30] x) => (float[N,5] y) { h = Relu(x) n = Neg(h) y = MatMul(h, w) }"
    teacher = parse(text, {"w": normal(30, 5) * np.float32(1e-3)})
    stayed = 0
    for seed in range(12):  # so few samples, of noise, that some tell nothing
        student = teacher.copy()
        student.graph.nodes[0].op = "Sin"
        changes = refit(student, teacher, CalibrationData([{"x": normal(8, 30, seed=seed)}]))
        if changes:
            before, after = map(float, changes.changed[0].reason.split("by ")[1].split(" -> "))
            assert after <= before  # as printed
        else:
            stayed += 1
            assert changes.skipped[0].reason == "other weights are no better"
            np.testing.assert_array_equal(stored(student, "w"), stored(teacher, "w"))
    assert stayed
