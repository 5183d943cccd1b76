"""Repair: for which tensors layers, scales and shifts are refitted, and what becomes of their constants."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Layer
from onnxslim.ops.spec import layer_of
from onnxslim.passes.repair.jobs import goals
from onnxslim.passes.repair.plan import unchanged
from tests.helpers import normal, parse, replaced, stored
from tests.passes.repair.students import batches, mixing, refit, restored


def goals_of(model: Model) -> list[str]:
    """Names of the tensors that the first layer can be refitted for."""
    layer = next(each for each in map(layer_of, model.graph.nodes) if isinstance(each, Layer))
    return [goal.tensor for goal in goals(layer, model.graph)]


@pytest.mark.parametrize(
    ("outputs", "body", "found"),
    [
        ("float[N,4,4] y", "h = MatMul(x, w) s = Mul(h, v) y = Add(s, v)", ["h", "s", "y"]),
        ("float[N,4,4] y, float[N,4,4] h", "h = MatMul(x, w) y = Mul(h, v)", ["h"]),
        ("float[N,4,4] y", "h = MatMul(x, w) s = Mul(h, v) t = Relu(h) y = Add(s, t)", ["h"]),
        (
            "float[N,4,4] y",
            "h = MatMul(x, w) q = QuantizeLinear(h, one) d = DequantizeLinear(q, one) y = Add(d, v)",
            ["h", "y"],
        ),
        (
            "float[N,4,4] y, uint8[N,4,4] q",
            "h = MatMul(x, w) q = QuantizeLinear(h, one) d = DequantizeLinear(q, one) y = Add(d, v)",
            ["h"],
        ),
        (
            "float[N,4,4] y, float[N,4,4] z",
            """h = MatMul(x, w) q = QuantizeLinear(h, one) d = DequantizeLinear(q, one) y = Add(d, v)
            z = DequantizeLinear(q, one)""",
            ["h"],
        ),
        ("float[N,4,4] y", "h = MatMul(x, w) y = BatchNormalization(h, v, v, v, v)", ["h"]),
    ],
)
def test_what_is_followed_behind_a_layer(outputs: str, body: str, found: list[str]) -> None:
    """Scales, shifts and rounding that only the layer goes through; channels of 3-D products are last."""
    constants = {"w": normal(4, 4), "v": np.abs(normal(4)), "one": np.array(1, np.float32)}
    assert goals_of(parse(f"g (float[N,4,4] x) => ({outputs}) {{ {body} }}", constants)) == found


@pytest.mark.parametrize("training", [0, 1])
def test_statistics_of_a_batch_are_not_followed(training: int) -> None:
    text = f"""g (float[N,4] x) => (float[N,4] y)
    {{ h = Gemm(x, w) y = BatchNormalization<training_mode={training}>(h, v, v, v, v) }}"""
    model = parse(text, {"w": normal(4, 4), "v": np.abs(normal(4))})
    assert goals_of(model) == ["h", "y"][: 2 - training]


def test_a_shift_of_all_channels_at_once_is_no_place_for_one_per_channel() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { k = MatMul(x, u) h = Gemm(k, w, b) y = Add(h, c) }"
    teacher = parse(text, {"u": mixing(4), "w": mixing(4), "b": normal(4), "c": np.array([0.5], np.float32)})
    student = replaced(teacher, u=mixing(4) @ mixing(4))
    restored(student, teacher, {"x": normal(60, 4)})
    np.testing.assert_array_equal(stored(student, "c"), stored(teacher, "c"))


@pytest.mark.parametrize("body", ["s = Mul(h, v) y = Add(s, b)", "s = Mul(h, v) y = Relu(s)"])
def test_channels_that_are_switched_off_behind_a_layer_stay_as_they_are(body: str) -> None:
    """Nothing a layer could do would come through a scale of zero."""
    text = f"g (float[N,4] x) => (float[N,4] y) {{ k = MatMul(x, u) h = Gemm(k, w, b) {body} }}"
    constants: dict[str, Array] = {
        "u": mixing(4),
        "w": mixing(4),
        "v": np.array([1, 0, 2, 1e-30], np.float32),
        "b": normal(4),
    }
    teacher = parse(text, constants)
    student = replaced(teacher, u=mixing(4) @ mixing(4))
    restored(student, teacher, {"x": normal(60, 4)})
    for index in (1, 3):
        np.testing.assert_array_equal(stored(student, "w")[:, index], stored(teacher, "w")[:, index])


def test_a_scale_and_a_shift_along_other_axes_are_two() -> None:
    text = "g (float[N,4,5,4] x) => (float[N,4,5,4] y) { h = Mul(x, u) m = Mul(h, g) y = Add(m, e) }"
    constants: dict[str, Array] = {
        "u": np.ones(4, np.float32),
        "g": np.abs(normal(4)) + 0.5,
        "e": normal(4, 1, 1),
    }
    teacher = parse(text, constants)
    gain = np.abs(normal(4, seed=2)) + 0.5
    restored(replaced(teacher, u=gain), teacher, {"x": normal(20, 4, 5, 4)}, layers=["m"])


def test_a_shift_of_another_size_than_its_scale_is_left_alone() -> None:
    text = "g (float[N,6] x) => (float[N,6] y) { h = Mul(x, u) n = LayerNormalization(h, g, e) y = Relu(n) }"
    teacher = parse(text, {"u": np.ones(6, np.float32), "g": normal(6), "e": np.array([0.5], np.float32)})
    student = replaced(teacher, u=np.abs(normal(6, seed=1)) + 0.5)
    changes = refit(student, teacher, batches(20, 6), layers=["n"])
    assert not changes


def test_what_does_not_fit_into_half_precision_is_not_stored() -> None:
    text = "g (float16[N,4] x) => (float16[N,4] y) { h = Mul(x, u) y = Mul(h, g) }"
    teacher = parse(text, {"u": np.ones(4, np.float16), "g": np.full(4, 900, np.float16)})
    student = replaced(teacher, u=np.full(4, 0.01, np.float16))
    data = CalibrationData([{"x": normal(20, 4, seed=i).astype(np.float16)} for i in range(3)])
    changes = refit(student, teacher, data, layers=["y"])
    assert [skip.reason for skip in changes.skipped] == ["its new values do not fit into their type"]
    np.testing.assert_array_equal(stored(student, "g"), stored(teacher, "g"))


DIFFERENT = {
    "attributes": ("y = Flatten(x)", "y = Flatten<axis=2>(x)"),
    "attributes that are there": ("y = Selu(x)", "y = Selu<alpha=0.5>(x)"),
    "inputs": ("y = Clip(x)", "y = Clip(x, a)"),
    "types of constants": ("t = Div(a, b) c = Cast<to=1>(t) y = Add(x, c)",) * 2,
    "values of constants": ("y = Add(x, a)", "y = Add(x, b)"),
    "operators": ("y = Abs(x)", "y = Exp(x)"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_is_computed_in_another_way_is_not_the_same(kind: str) -> None:
    """Tensors of one name in two models; a division of integers rounds."""
    models = []
    for body, dtype in zip(DIFFERENT[kind], (np.int64, np.float32), strict=True):
        typed = dtype if "types" in kind else np.float32
        models.append(
            parse(
                f"g (float[N,2,2] x) => (float y) {{ {body} }}",
                {"a": np.array(3, typed), "b": np.array(2, typed)},
            )
        )
    assert unchanged(models[0], models[0].copy()) >= {"x", "y"}
    assert unchanged(*models) == {"x"}
