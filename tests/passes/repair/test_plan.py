"""Repair: which layers are refitted, and why others are not."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Changes
from onnxslim.runtime.session import Session
from tests.helpers import normal, parse, replaced, stored
from tests.passes.repair.students import batches, block, mixing, refit, restored


def test_layers_that_see_what_they_saw_are_not_touched() -> None:
    text = """g (float[N,4] x) => (float[N,4] y, float[N,4] z)
    { a = Gemm(x, w, b) h = Relu(a) z = Gemm(h, v, b) c = Gemm(x, u, b) k = Relu(c) y = Gemm(k, t, d) }"""
    constants = {name: normal(4, 4, seed=i) for i, name in enumerate("wvut")}
    teacher = parse(text, {**constants, "b": normal(4), "d": normal(4)})
    harmed = constants["u"] + 0.2 * normal(4, 4, seed=7)
    student = replaced(teacher, u=harmed)
    changes = refit(student, teacher, batches(40, 4))
    assert [change.node for change in changes.changed] == ["Gemm→y"]
    for name in "wvb":
        np.testing.assert_array_equal(stored(student, name), stored(teacher, name))
    np.testing.assert_array_equal(stored(student, "u"), harmed)
    assert not refit(teacher.copy(), teacher, batches(2, 4))


def test_nothing_changes_where_only_the_opset_does() -> None:
    student, teacher = block()
    student, before = teacher.copy(), teacher.to_proto().SerializeToString(deterministic=True)
    student.opsets[""] = 18
    changes = refit(student, teacher, batches(4, 4, 8, 8))
    assert not changes
    assert {skip.reason for skip in changes.skipped} == {"it computes what the original does"}
    student.opsets[""] = 17
    assert student.to_proto().SerializeToString(deterministic=True) == before


def test_only_the_layers_asked_for() -> None:
    """The last factor of a pair has other weights than the teacher, and only its output in common with it."""
    bias = normal(5)
    full = (normal(8, 2) @ normal(2, 5)).astype(np.float32)
    teacher = parse(
        "g (float[N,8] x) => (float[N,5] y) { h = Relu(x) z = MatMul(h, w) y = Add(z, b) }",
        {"w": full, "b": bias},
    )
    student = parse(
        "g (float[N,8] x) => (float[N,5] y) { h = Relu(x) p = MatMul(h, s) z = MatMul(p, t) y = Add(z, b) }",
        {"s": normal(8, 2), "t": normal(2, 5, seed=4), "b": bias + 1},
    )
    changes = restored(student, teacher, {"x": normal(60, 8)}, layers=["y"])
    assert [change.node for change in changes.changed] == ["MatMul→z"]
    np.testing.assert_array_equal(stored(student, "s"), normal(8, 2))


def test_shared_weights_are_left_alone_and_shared_biases_are_parted() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, v) a = Gemm(h, w, b) k = Relu(a)
      c = Gemm(k, w, b) l = Relu(c) d = Gemm(l, z, b) y = Relu(d) }"""
    weights = {"w": normal(4, 4), "z": normal(4, 4, seed=1), "b": normal(4)}
    teacher = parse(text, {"v": mixing(4), **weights})
    student = replaced(teacher, v=mixing(4) @ mixing(4))
    changes = refit(student, teacher, batches(40, 4))
    assert [change.node for change in changes.changed] == ["Gemm→d"]
    told = [skip.reason for skip in changes.skipped]
    assert told == [f"its weight is shared with 'Gemm→{name}'" for name in "ca"]
    np.testing.assert_array_equal(stored(student, "b"), stored(teacher, "b"))
    assert student.graph.nodes[-2].inputs[2].name == "b_repaired"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "f = Cast<to=11>(h) g = MatMul(f, wide) y = Cast<to=1>(g)",
            "its weight is of type float64, not float32 or float16",
        ),
        ("y = Gemm(h, w, full)", "its bias is not one constant per channel"),
        ("y = Gemm(h, other)", "its weight is not a constant"),
        ("q = Gemm(h, w) y = Mul(q, h)", "the original model has no tensor 'new' to compare with"),
    ],
)
def test_what_cannot_be_refitted_says_why(body: str, reason: str) -> None:
    text = f"g (float[3,4] x, float[4,4] other) => (float y) {{ h = MatMul(x, v) {body} }}"
    constants = {"v": mixing(4), "w": normal(4, 4), "wide": np.eye(4), "full": normal(3, 4)}
    teacher = parse(text, constants)
    student = replaced(teacher, v=mixing(4) @ mixing(4))
    if "q =" in body:
        student.graph.nodes[1].outputs[0].name = "new"
    data = CalibrationData([{"x": normal(3, 4, seed=i), "other": normal(4, 4)} for i in range(9)])
    changes = refit(student, teacher, data)
    assert not changes
    assert [skip.reason for skip in changes.skipped] == [reason]


@pytest.mark.parametrize(
    "body",
    [
        "r = Relu(h) y = Add(r, m)",
        "r = Reshape(h, q) n = GroupNormalization<num_groups=2>(r, g, g) y = Flatten(n)",
    ],
)
def test_masks_and_scales_of_groups_are_no_channels(body: str) -> None:
    text = f"g (float[N,4] x) => (float[N,4] y) {{ h = MatMul(x, v) {body} }}"
    mask = np.array([0, 0, -1e4, 0], np.float32)
    constants = {"m": mask, "g": np.ones(2, np.float32), "q": np.array([-1, 4, 1])}
    teacher = parse(text, {"v": mixing(4), **constants}, opset=18)
    changes = refit(replaced(teacher, v=mixing(4) @ mixing(4)), teacher, batches(9, 4))
    assert changes == Changes()


def test_other_shapes_than_told_are_named() -> None:
    text = "g (float[N,4] x) => (float[N,K] y) { h = MatMul(x, v) z = MatMul(h, w) y = Relu(z) }"
    teacher = parse(text, {"v": mixing(4), "w": normal(4, 6)})
    student = replaced(teacher, v=mixing(4) @ mixing(4), w=stored(teacher, "w")[:, :3])
    changes = refit(student, teacher, batches(9, 4))
    assert changes.skipped[0].reason.startswith("the original's 'z' has another shape, (")
    assert refit(student, teacher, batches(9, 4), kept={("z", 1): np.array([0, 1, 2])})


def test_kept_along_several_axes() -> None:
    text = "g (float[N,5,4] x) => (float y) { h = MatMul(x, v) z = MatMul(h, w) y = Relu(z) }"
    teacher = parse(text, {"v": mixing(4), "w": normal(4, 6)})
    student = parse(
        """g (float[N,5,4] x) => (float y)
        { k = MatMul(x, v) h = Gather<axis=1>(k, i) z = MatMul(h, w) y = Relu(z) }""",
        {"v": mixing(4) @ mixing(4), "w": normal(4, 6)[:, [4, 0]], "i": np.array([3, 1])},
    )
    refit(student, teacher, batches(20, 5, 4), kept={("z", 1): np.array([3, 1]), ("z", 2): np.array([4, 0])})
    feeds = {"x": normal(7, 5, 4)}
    wanted, found = (Session(model).run(feeds)["y"] for model in (teacher, student))
    np.testing.assert_allclose(found, wanted[:, [3, 1]][:, :, [4, 0]], atol=1e-3)
