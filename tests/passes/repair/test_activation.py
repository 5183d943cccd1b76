"""Repair: what counts is what lies behind an activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from onnxslim.calibration.gram import Gram, Moments
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.repair.activation import Table, behind, tabulated
from onnxslim.passes.repair.descent import Rows, gradient_refine
from onnxslim.passes.repair.solve import fit
from onnxslim.runtime.session import Session
from tests.helpers import normal, parse, replaced
from tests.passes.repair.students import batches, error, refit

ACTIVATIONS = {
    "Relu": "y = Relu(z)",
    "Clip": "y = Clip(z, zero, six)",
    "LeakyRelu": "y = LeakyRelu<alpha=0.1>(z)",
    "HardSwish": "y = HardSwish(z)",
    "SiLU": "s = Sigmoid(z) y = Mul(z, s)",
    "GELU": "a = Div(z, root) e = Erf(a) o = Add(e, one) m = Mul(z, o) y = Mul(m, half)",
}


SCALARS = {
    "zero": np.zeros((), np.float32),
    "one": np.ones(1, np.float32),
    "half": np.full((), 0.5, np.float32),
    "six": np.full((), 6.0, np.float32),
    "root": np.full((1, 1), 2**0.5, np.float32),
}


def activated(kind: str, layer: str = "z = Gemm(h, w, b)", **weights: Array) -> Model:
    text = f"g (float[N,...] x) => (float[N,...] y) {{ h = Mul(x, u) {layer} {ACTIVATIONS[kind]} }}"
    return parse(text.replace("N,...", "N,4,6,6" if "Conv" in layer else "N,8"), {**SCALARS, **weights})


def linear_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxslim.passes.repair.behind", lambda *_: None)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_function_behind_a_layer_is_found(kind: str) -> None:
    model = activated(kind, w=normal(8, 8), b=normal(8), u=np.ones(8, np.float32))
    start = next(node.outputs[0] for node in model.graph.nodes if node.op == "Gemm")
    chain = behind(model.graph, start)
    assert chain is not None
    assert chain.end.name == "y"
    table = tabulated(model, chain, -3.0, 3.0)
    assert table is not None
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    part = parse(f"g (float[N] z) => (float[N] y) {{ {ACTIVATIONS[kind]} }}", SCALARS)
    np.testing.assert_allclose(table(x)[0], Session(part).run({"z": x})["y"].ravel(), atol=1e-3)


@pytest.mark.parametrize(
    "body",
    [
        "y = Softmax(z)",
        "r = Relu(z) y = Add(r, x)",
        "r = Relu(z) s = Sigmoid(z) y = MatMul(r, v)",
        "y = Mul(z, u)",
    ],
    ids=["mixes", "other operand", "two readers", "per channel"],
)
def test_what_is_no_function_of_one_value_is_not_taken_for_one(body: str) -> None:
    text = f"g (float[N,8] x) => (float[N,8] y) {{ z = MatMul(x, w) {body} }}"
    model = parse(text, {"w": normal(8, 8), "v": normal(8, 8), "u": normal(8)})
    chain = behind(model.graph, model.graph.nodes[0].outputs[0])
    assert chain is None or chain.end.name == "r"
    assert body.startswith("r") or chain is None


@pytest.mark.parametrize("method", ["ridge", "bias"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(
    "layer", ["z = Gemm(h, w, b)", "z = Conv<group=4>(h, k, b)", "z = Conv<group=2>(h, q, b)"]
)
def test_what_comes_out_of_an_activation_counts(
    kind: str, layer: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is negative is lost, so that no weights are right everywhere."""
    wide = 4 if "Conv" in layer else 8
    weights = {"w": normal(8, 8), "k": normal(4, 1, 3, 3), "q": normal(4, 2, 3, 3), "b": normal(wide)}
    teacher = activated(kind, layer, u=np.ones(1, np.float32), **weights)
    student = replaced(teacher, u=np.full(1, -0.3, np.float32))
    student.graph.nodes[0].op = "Max"
    plain, data = student.copy(), batches(400, 8) if wide == 8 else batches(40, 4, 6, 6)
    refit(student, teacher, data, method=method, layers=["z"])
    linear_only(monkeypatch)
    refit(plain, teacher, data, method=method, layers=["z"])
    fresh = {"x": normal(*((800, 8) if wide == 8 else (80, 4, 6, 6)), seed=99)}
    assert error(student, teacher, fresh) <= 1.002 * error(plain, teacher, fresh)
    if kind == "Relu":
        assert error(student, teacher, fresh) < 0.99 * error(plain, teacher, fresh)


@given(st.integers(20, 60), st.integers(1, 3), st.booleans(), st.floats(-2, 2), st.integers(0, 99))
def test_behind_a_straight_line_the_fit_is_the_ridge_regression(
    count: int, groups: int, bias: bool, slope: float, seed: int
) -> None:
    parts, moments = rows_of(count, groups, seed)
    linear = fit(moments[0], moments[1], bias=bias)
    assume(linear.weight is not None and abs(slope) > 0.1)
    at = np.linspace(-50, 50, 101, dtype=np.float32)
    line = Table.of(at, np.float32(slope) * at)
    found = gradient_refine(linear, (moments[0], [parts[0]]), (moments[1], [parts[1]]), line, bias=bias)
    assert found.weight is not None
    assert linear.weight is not None
    np.testing.assert_allclose(found.weight, linear.weight, atol=1e-3)
    np.testing.assert_allclose(found.bias, linear.bias, atol=1e-3)
    assert found.after == pytest.approx(slope**2 * linear.after, rel=1e-2)


@given(st.integers(20, 60), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_no_step_is_kept_that_samples_held_out_do_not_want(
    count: int, groups: int, bias: bool, seed: int
) -> None:
    parts, moments = rows_of(count, groups, seed)
    linear = fit(moments[0], moments[1], bias=bias)
    assume(linear.weight is not None)
    at = np.linspace(-20, 20, 4001, dtype=np.float32)
    relu = Table.of(at, np.maximum(at, 0))
    found = gradient_refine(linear, (moments[0], [parts[0]]), (moments[1], [parts[1]]), relu, bias=bias)
    wanted, present = (np.maximum(each, 0) for each in parts[1][1:])
    assert found.before == pytest.approx(np.square(wanted - present).sum(axis=(0, 1)).mean(), rel=1e-3)
    assert found.after <= found.before


def rows_of(count: int, groups: int, seed: int) -> tuple[list[Rows], list[Gram]]:
    """Rows to fit on and rows held out, and their moments."""
    parts, found = [], []
    for index in range(2):
        x, present = normal(groups, 4, count, seed=seed + index), normal(groups, 2, count, seed=seed + index)
        noise = normal(groups, 2, count, seed=seed + 7)
        change: Array = 0.5 * x[:, :2] - 0.3 * x[:, 2:] + 0.5 + 0.3 * noise
        wanted = (present + change).astype(np.float32)
        parts.append(Rows(x, wanted, present))
        moments = Moments()
        moments.update(x, wanted - present)
        found.append(moments.result())
    return parts, found
