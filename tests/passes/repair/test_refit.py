"""Repair: what a layer lost upstream comes back in any model, the same every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.stages import SpillStore
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from tests.helpers import normal, parse, replaced, stored
from tests.passes.repair.students import batches, error, mixing, refit, restored, run_repair

WEIGHTS = {"v": normal(4, 4), "w": normal(4, 4, seed=1)}

# -------------------------------------------------------------------------------------------- what comes back


@settings(max_examples=15)
@given(st.permutations(range(6)), st.integers(0, 99))
def test_channels_that_follow_from_others_can_go(order: list[int], seed: int) -> None:
    first = normal(6, 3, 3, 3, seed=seed)
    gain = np.abs(normal(3, seed=seed)) + 0.5
    first[order[3:]] = first[order[:3]] * gain[:, None, None, None]  # a Relu keeps positive multiples
    text = """g (float[N,3,H,W] x) => (float[N,4,A,B] y)
    { c = Conv(x, v) r = Relu(c) y = Conv<pads=[1,1,1,1]>(r, w, b) }"""
    teacher = parse(text, {"v": first, "w": normal(4, 6, 3, 3, seed=seed), "b": normal(4)})
    keep = np.sort(order[:3])
    student = replaced(teacher, v=first[keep], w=stored(teacher, "w")[:, keep])
    restored(student, teacher, {"x": normal(8, 3, 9, 9, seed=seed)}, kept={("c", 1): keep, ("r", 1): keep})
    np.testing.assert_array_equal(stored(student, "v"), first[keep])


CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]] = {
    "plain": ("Conv(h, w, b)", (6, 9, 8), (5, 6, 3, 3), 1),
    "no bias": ("Conv(h, w)", (6, 9, 8), (5, 6, 3, 3), 1),
    "padded": ("Conv<pads=[1,0,2,1]>(h, w, b)", (6, 9, 8), (5, 6, 3, 3), 1),
    "strides": ("Conv<strides=[2,3]>(h, w, b)", (6, 9, 8), (5, 6, 3, 2), 1),
    "dilations": ("Conv<dilations=[2,1], pads=[2,1,2,1]>(h, w)", (6, 9, 8), (5, 6, 3, 3), 1),
    "same": ('Conv<auto_pad="SAME_UPPER", strides=[2,2]>(h, w, b)', (6, 9, 8), (5, 6, 3, 3), 1),
    "same lower": ('Conv<auto_pad="SAME_LOWER">(h, w, b)', (6, 9, 8), (5, 6, 2, 2), 1),
    "grouped": ("Conv<group=2, pads=[1,1,1,1]>(h, w, b)", (6, 9, 8), (4, 3, 3, 3), 2),
    "depthwise": ("Conv<group=6, pads=[1,1,1,1]>(h, w, b)", (6, 9, 8), (6, 1, 3, 3), 6),
    "depthwise times two": ("Conv<group=6>(h, w, b)", (6, 9, 8), (12, 1, 3, 3), 6),
    "1-D": ("Conv<pads=[1,1], strides=[2]>(h, w, b)", (6, 40), (5, 6, 3), 1),
    "3-D": ("Conv<pads=[1,0,0,1,0,0]>(h, w, b)", (4, 5, 4, 5), (5, 4, 2, 2, 2), 1),
    "transposed": ("ConvTranspose<strides=[2,2], pads=[1,0,0,1]>(h, w, b)", (6, 5, 6), (6, 5, 3, 3), 1),
    "transposed groups": ("ConvTranspose<group=2, strides=[2,1]>(h, w)", (6, 5, 6), (6, 2, 3, 3), 2),
    "followed by scale": ("Conv(h, w) m = Mul(z0, s) y = Add(m, t)", (6, 9, 8), (5, 6, 3, 3), 1),
    "batch norm": ("Conv(h, w) y = BatchNormalization(z0, p, q, p, p)", (6, 9, 8), (5, 6, 3, 3), 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_undo_a_map_of_their_input(kind: str) -> None:
    call, size, shape, groups = CONVOLUTIONS[kind]
    tail = call if "y =" in call else f"{call} y = Relu(z0)"
    free = ",".join("HWD"[: len(size) - 1])
    text = f"g (float[N,{size[0]},{free}] x) => (float y) {{ h = Conv(x, v) z0 = {tail} }}"
    ones = (1,) * (len(size) - 1)
    positive = np.abs(normal(5)) + 0.5
    present = {"b": normal(12)[: shape[0]] if "Transpose" not in call else normal(5), "s": normal(5, 1, 1)}
    present |= {"t": normal(5, 1, 1, seed=1), "p": positive, "q": normal(5)}
    weights = {"v": mixing(size[0]).reshape(size[0], size[0], *ones), "w": normal(*shape)}
    teacher = parse(text, {**weights, **present})
    changed = mixing(size[0], groups) @ mixing(size[0])
    student = replaced(teacher, v=changed.reshape(size[0], size[0], *ones))
    restored(student, teacher, {"x": normal(16, *size)})
    np.testing.assert_array_equal(stored(student, "v").reshape(changed.shape), changed)


PRODUCTS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "gemm": ("Gemm(h, w, b)", (40, 6), (6, 5)),
    "gemm without bias": ("Gemm<beta=0.25>(h, w)", (40, 6), (6, 5)),
    "gemm scaled": ("Gemm<alpha=0.5, beta=-2.0, transB=1>(h, w, b)", (40, 6), (5, 6)),
    "gemm of a row": ("Gemm(h, w, r)", (40, 6), (6, 5)),
    "gemm of a scalar": ("Gemm(h, w, o)", (40, 6), (6, 5)),
    "gemm transposed": ("Transpose(h) y = Gemm<transA=1>(z0, w, b)", (40, 6), (6, 5)),
    "matmul": ("MatMul(h, w)", (2, 20, 6), (6, 5)),
    "matmul and bias": ("MatMul(h, w) y = Add(b, z0)", (2, 20, 6), (6, 5)),
    "matmul, bias, scale": ("MatMul(h, w) a = Add(z0, b) y = Mul(a, b)", (40, 6), (6, 5)),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_undo_a_map_of_their_input(kind: str) -> None:
    call, size, shape = PRODUCTS[kind]
    tail = call if "y =" in call else f"{call} y = Relu(z0)"
    text = f"g (float[{','.join('NABC'[: len(size)])}] x) => (float y) {{ h = MatMul(x, v) z0 = {tail} }}"
    biases = {"b": normal(5) + 0.1, "r": normal(1, 5), "o": normal(1)}
    teacher = parse(text, {"v": mixing(6), "w": normal(*shape), **biases})
    student = replaced(teacher, v=mixing(6) @ mixing(6))
    restored(student, teacher, {"x": normal(*size)})


NORMALIZATIONS = {
    "layer norm": "y = LayerNormalization(h, g, e)",
    "layer norm without bias": "y = LayerNormalization(h, g)",
    "instance norm": "y = InstanceNormalization(h, g, e)",
    "batch norm": "r = Relu(h) y = BatchNormalization(r, g, e, e, g)",
    "by hand": "m = Mul(h, g) y = Add(m, e)",
    "scale": "y = Mul(g, h)",
    "shift": "y = Add(h, e)",
}


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_scales_and_shifts_are_refitted(kind: str) -> None:
    text = f"g (float[N,6,6] x) => (float y) {{ a = Mul(x, v) h = Add(a, u) {NORMALIZATIONS[kind]} }}"
    constants = {"v": np.ones(6, np.float32), "u": np.zeros(6, np.float32)}
    teacher = parse(text, {**constants, "g": np.abs(normal(6)) + 0.5, "e": np.abs(normal(6)) + 0.1})
    gain = np.abs(normal(6, seed=1)) + 0.5 if kind != "shift" else constants["v"]
    shift = normal(6, seed=3) if kind not in ("scale", "layer norm without bias") else constants["u"]
    student = replaced(teacher, v=gain, u=shift)
    feeds = {"x": normal(3, 6, 6, seed=9)}
    before = error(student, teacher, feeds)
    changes = refit(student, teacher, batches(30, 6, 6), layers=["y"])
    after = error(student, teacher, feeds)
    assert len(changes.changed) == 1
    exact = kind in ("by hand", "scale", "shift")  # elsewhere the map is more than a scale and a shift
    assert after < (1e-4 if exact else 0.98 * before)


# -------------------------------------------------------------------------------------------------- any model


def test_bodies_of_control_flow_are_left_alone_and_what_they_read_is_there() -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y)
    { h = MatMul(x, v) a = MatMul(h, w) k = If(c) <
        then_branch = t () => (float[N,4] p) { p = Gemm(h, z) },
        else_branch = e () => (float[N,4] q) { q = Add(h, a) } >
      y = MatMul(k, u) }"""
    constants = {"v": mixing(4), "w": normal(4, 4), "z": normal(4, 4, seed=1), "u": normal(4, 4, seed=2)}
    teacher = parse(text, constants)
    student = replaced(teacher, v=mixing(4) + 0.1 * normal(4, 4, seed=8))
    data = [{"x": normal(20, 4, seed=i), "c": np.array(i % 2 == 0)} for i in range(6)]
    changes = refit(student, teacher, CalibrationData(data))
    assert [change.node for change in changes.changed] == ["MatMul→a", "MatMul→y"]
    told = [(skip.node, skip.reason) for skip in changes.skipped]
    assert told == [("Gemm→p", "it is in the body of a control-flow node")]
    np.testing.assert_array_equal(stored(student, "z"), stored(teacher, "z"))


def test_layers_behind_a_body_wait_for_what_it_reads() -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y)
    { h = MatMul(x, v) a = MatMul(h, w) k = If(c) <
        then_branch = t () => (float[N,4] p) { p = Relu(a) },
        else_branch = e () => (float[N,4] q) { q = Neg(a) } >
      y = MatMul(k, u) }"""
    teacher = parse(text, {"v": mixing(4), "w": normal(4, 4), "u": normal(4, 4, seed=2)})
    student = replaced(teacher, v=mixing(4) @ mixing(4))
    data = [{"x": normal(20, 4, seed=i), "c": np.array(i % 2 == 0)} for i in range(6)]
    changes = restored(student, teacher, data[0], data=CalibrationData(data))
    assert [change.node for change in changes.changed] == ["MatMul→a"]


def test_half_precision_is_fitted_in_single() -> None:
    text = "g (float16[N,6] x) => (float16[N,5] y) { h = MatMul(x, v) z = Gemm(h, w, b) y = Relu(z) }"
    constants = {"v": mixing(6), "w": normal(6, 5), "b": normal(5)}
    teacher = parse(text, {name: array.astype(np.float16) for name, array in constants.items()})
    student = replaced(teacher, v=(mixing(6) @ mixing(6)).astype(np.float16))
    restored(student, teacher, {"x": normal(200, 6).astype(np.float16)}, limit=3e-3)
    assert stored(student, "w").dtype == stored(student, "b").dtype == np.float16


def test_weights_in_constant_nodes_and_old_files() -> None:
    text = """<ir_version: 3, opset_import: ["" : 9]>
    g (float[N,3] x) => (float[N,2] y)
    { h = MatMul(x, v) w = Constant<value = float[3,2] {1,2,3,4,5,6}>() y = MatMul(h, w) }"""
    teacher = parse(text, {"v": np.eye(3, dtype=np.float32)})
    student = replaced(teacher, v=mixing(3))
    restored(student, teacher, {"x": normal(60, 3)})


def test_several_inputs_of_other_types_and_batches_of_all_sizes() -> None:
    text = """g (int64[N,M] i, float[N,M] s) => (float[N,M,3] y)
    { e = Gather(t, i) o = Constant<value_ints=[2]>() u = Unsqueeze(s, o) p = Mul(e, u) h = MatMul(p, v)
      n = Shape(h) r = Reshape(h, n) y = MatMul(r, w) }"""
    teacher = parse(text, {"t": normal(50, 4), "v": mixing(4), "w": normal(4, 3)})
    student = replaced(teacher, v=mixing(4) @ mixing(4))

    def feeds(rows: int, columns: int) -> dict[str, Array]:
        return {"i": np.arange(rows * columns).reshape(rows, columns) % 50, "s": normal(rows, columns)}

    data = CalibrationData([feeds(8, 5), feeds(8, 7), feeds(3, 4)])
    restored(student, teacher, feeds(8, 9), data=data)


# ----------------------------------------------------------------------------------------------- same results


def test_the_same_data_gives_the_same_bytes() -> None:
    one, two = (run_repair(batches(4, 4, 8, 8))[0].to_proto() for _ in range(2))
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)


def test_the_cut_into_batches_does_not_matter() -> None:
    whole = normal(24, 4, 40, 40)  # more positions than are looked at
    data = [CalibrationData([{"x": whole[i : i + step]} for i in range(0, 24, step)]) for step in (24, 5)]
    one, two = (run_repair(each)[0] for each in data)
    for name in "wz":
        np.testing.assert_allclose(stored(one, name), stored(two, name), atol=1e-4)


def test_tensors_beyond_the_limit_go_to_files(monkeypatch: pytest.MonkeyPatch) -> None:
    put, most = SpillStore.put, list[int]()

    def noted(self: SpillStore, array: Array) -> Array:
        made = put(self, array)
        most[-1] = max(most[-1], self.outside)
        return made

    monkeypatch.setattr(SpillStore, "put", noted)
    found = list[Model]()
    for limit in (1 << 30, 0):
        most.append(0)
        found.append(run_repair(batches(4, 4, 8, 8), memory=limit)[0])
    (inside, outside), (few, many) = found, most
    assert few == 0 < many
    for name in "wz":
        np.testing.assert_array_equal(stored(inside, name), stored(outside, name))


def test_progress_counts_layers() -> None:
    calls: list[tuple[str, int, int | None]] = []
    run_repair(batches(4, 4, 8, 8), progress=lambda *call: calls.append(call))
    assert calls == [("repairing", 1, 2), ("repairing", 2, 2)]


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        (batches(2, 4, 8, 8), {"layers": ["nope"]}, UsageError, "cannot repair 'nope'"),
        (CalibrationData([], name="set"), {}, CalibrationError, "set: there is no data"),
        (batches(2, 3, 8, 8), {}, CalibrationError, "shape"),
        (batches(2, 4, 8, 8, name="z"), {}, CalibrationError, "no input 'z'"),
    ],
)
def test_errors(data: CalibrationData, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run_repair(data, **options)


def test_values_that_are_not_finite_leave_a_layer_alone() -> None:
    feeds = normal(4, 4, 8, 8)
    feeds[0, 0, 0, 0] = np.inf
    _, changes = run_repair(CalibrationData([{"x": feeds}]))
    assert not changes
    assert "NaN" in changes.skipped[0].reason


def test_too_few_values_are_told_as_that() -> None:
    teacher = parse("g (float[N,4] x) => (float[N,4] y) { a = MatMul(x, v) y = MatMul(a, w) }", WEIGHTS)
    student = replaced(teacher, v=WEIGHTS["v"] * np.float32(1.1))
    (skip,) = refit(student, teacher, batches(1, 4, count=1)).skipped
    assert "too few values in all of the data" in skip.reason
