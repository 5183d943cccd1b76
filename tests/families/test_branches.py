"""Which branches are found by structure alone, and which are none."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.families.branches import Branch, branches
from onnxslim.ir.model import Model
from tests.helpers import normals, parse

W = normals(w=(8, 8), v=(8, 8), u=(8, 8))
IMAGE = "g (float[N,4,6,6] x) => (float[N,4,6,6] y)"
ROWS = "g (float[N,8] x) => (float[N,8] y)"


def found(text: str, constants: dict[str, np.ndarray] | None = None, opset: int = 17) -> list[Branch]:
    return list(branches(parse(text, W if constants is None else constants, opset=opset)).found)


def told(each: Branch) -> tuple[str, str, tuple[str, ...]]:
    return each.sum, each.skip, each.nodes


def test_a_branch_is_what_lies_between_the_skip_and_the_sum() -> None:
    inner = "a = MatMul(t, w) r = Relu(a) b = MatMul(r, v)"
    text = f"{ROWS} {{ t = MatMul(x, u) {inner} s = Add(b, t) y = Relu(s) }}"
    (each,) = found(text)
    assert told(each) == ("s", "t", ("a", "r", "b"))
    assert (each.end, each.constants, each.axis) == ("b", ("w", "v"), -1)


@pytest.mark.parametrize("operator", ["Sub", "Mul", "Div", "Max"])
def test_a_gate_is_no_branch(operator: str) -> None:
    assert not found(f"{ROWS} {{ a = MatMul(x, w) y = {operator}(x, a) }}")


def test_the_skip_may_be_the_input_and_the_sum_the_output() -> None:
    (each,) = found(f"{ROWS} {{ a = MatMul(x, w) y = Sum(x, a) }}")
    assert told(each) == ("y", "x", ("a",))


def test_normalization_may_come_first_or_last() -> None:
    scale = {**W, **normals(g=(8,), h=(8,))}
    before = f"{ROWS} {{ n = LayerNormalization(x, g, h) a = MatMul(n, w) s = Add(x, a) y = MatMul(s, v) }}"
    after = f"{ROWS} {{ a = MatMul(x, w) s = Add(x, a) n = LayerNormalization(s, g, h) y = MatMul(n, v) }}"
    assert [each.nodes for each in found(before, scale)] == [("n", "a")]
    assert [each.nodes for each in found(after, scale)] == [("a",)]


def test_what_is_read_elsewhere_too_is_no_branch() -> None:
    assert not found(
        "g (float[N,8] x) => (float[N,8] y, float[N,8] z) { a = MatMul(x, w) y = Add(x, a) z = Relu(a) }"
    )
    inner = (
        "g (float[N,8] x) => (float[N,8] y, float[N,8] z) { z = MatMul(x, w) a = MatMul(z, v) y = Add(x, a) }"
    )
    assert not found(inner)  # what is left of it does not read the skip


def test_a_body_that_reads_it_keeps_it() -> None:
    text = """g (float[N,8] x, bool c) => (float[N,8] y, float[N,8] z) { a = MatMul(x, w) y = Add(x, a)
    z = If (c) <then_branch = t () => (float[N,8] p) { p = Relu(a) },
                else_branch = e () => (float[N,8] q) { q = Neg(x) }> }"""
    assert not found(text)


def test_sums_in_bodies_are_left_alone_and_told_of() -> None:
    text = """g (float[N,8] x, bool c) => (float[N,8] z) {
    z = If (c) <then_branch = t () => (float[N,8] p) { a = MatMul(x, w) p = Add(x, a) },
                else_branch = e () => (float[N,8] q) { q = Neg(x) }> }"""
    model = parse(text, W)
    assert branches(model).found == ()
    assert branches(model).refused == {"If→z": "it lies in a body"}


def test_nested_branches_are_both_found() -> None:
    text = f"{ROWS} {{ a = MatMul(x, w) b = MatMul(a, v) s = Add(a, b) c = MatMul(s, u) y = Add(x, c) }}"
    inner, outer = found(text)
    assert told(inner) == ("s", "a", ("b",))
    assert told(outer) == ("y", "x", ("a", "b", "s", "c"))
    assert outer.constants == ("w", "v", "u")


def test_of_a_projection_and_its_branch_either_may_go() -> None:
    text = f"{ROWS} {{ a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) p = MatMul(x, u) y = Add(b, p) }}"
    assert [told(each) for each in found(text)] == [("y", "b", ("p",)), ("y", "p", ("a", "r", "b"))]


def test_two_things_that_are_added_are_no_branches() -> None:
    text = """g (int64[N] i, int64[N] p) => (float[N,8] y)
    { a = Gather(w, i) b = Gather(v, p) c = MatMul(a, u) y = Add(c, b) }"""
    assert not found(text)


def test_a_mask_is_no_skip() -> None:
    text = """g (float[N,4,8] x, float[N,1,4] m) => (float[N,4,8] y)
    { q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(x) s = MatMul(q, t)
    k = Add(s, m) p = Softmax<axis=-1>(k) v0 = MatMul(p, x) y = Add(x, v0) }"""
    (each,) = found(text)
    assert each.sum == "y"
    assert each.nodes == ("q", "t", "s", "k", "p", "v0")


def test_identity_and_dropout_may_lie_between() -> None:
    text = f"{ROWS} {{ i = Identity(x) a = MatMul(x, w) d = Dropout(a) y = Add(i, d) }}"
    assert told(found(text)[0]) == ("y", "i", ("a", "d"))


def test_a_branch_may_be_broadcast_but_a_skip_may_not() -> None:
    text = f"{IMAGE} {{ p = GlobalAveragePool(x) c = Conv(p, k) y = Add(x, c) }}"
    (each,) = found(text, normals(k=(4, 4, 1, 1)))
    assert told(each) == ("y", "x", ("p", "c"))
    assert each.axis == -3
    wide = "g (float[N,1,6,6] x) => (float[N,4,6,6] y) { c = Conv(x, k) y = Add(x, c) }"
    model = parse(wide, normals(k=(4, 1, 1, 1)))
    assert not branches(model).found
    (why,) = branches(model).refused.values()
    assert why == "without it 'x' has another shape than 'y', or may have"


def test_state_may_go_with_a_branch() -> None:
    text = """g (float[5,N,8] x) => (float[5,N,8] y)
    { l, h, c = LSTM<hidden_size=8>(x, k, r) s = Squeeze(l, one) y = Add(x, s) }"""
    constants = {**normals(k=(1, 32, 8), r=(1, 32, 8)), "one": np.array([1])}
    (each,) = found(text, constants)
    assert each.nodes == ("l", "s")
    assert each.axis is None
    assert not found(text.replace("(float[5,N,8] y)", "(float[5,N,8] y, float[1,N,8] h)"), constants)


def test_channels_are_followed_through_transposes() -> None:
    text = f"""{IMAGE} {{ c = Conv<group=4,pads=[1,1,1,1]>(x, k)
    t = Transpose<perm=[0,2,3,1]>(c) a = MatMul(t, m)
    g0 = Relu(a) b = MatMul(g0, n) o = Transpose<perm=[0,3,1,2]>(b) y = Add(x, o) }}"""
    (each,) = found(text, normals(k=(4, 1, 3, 3), m=(4, 16), n=(16, 4)))
    assert each.axis == -3


def test_what_is_only_measured_is_no_skip() -> None:
    text = f"{ROWS} {{ n = Shape(x) e = Expand(one, n) a = MatMul(e, w) y = Add(x, a) }}"
    assert not found(text, {**W, "one": np.ones((1, 8), np.float32)})


def test_a_function_of_the_model_that_is_called_add_is_left_alone() -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    {ROWS} {{ a = MatMul(x, w) y = own.Add(x, a) }}
    <domain: "own", opset_import: ["" : 17]> Add (p, q) => (r) {{ r = Sub(p, q) }}"""
    assert not found(text)


def test_names_are_those_of_copies() -> None:
    model: Model = parse(f"{ROWS} {{ a = MatMul(x, w) y = Add(x, a) }}", W)
    assert branches(model.copy()) == branches(model)
