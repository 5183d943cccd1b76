"""Fold: what is stored for it makes a model no larger than it may be."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.errors import UsageError
from onnxslim.ir.graph import Node, Variable
from onnxslim.passes.fold import Fold
from onnxslim.passes.fold.budget import FoldPlan, _Offer, _spend
from onnxslim.passes.fold.values import WORKING_BYTES, narrower
from tests.helpers import apply, feeds_for, normal, ops, parse, reasons, same_outputs, settled, stored


def test_transposing_a_weight_is_free() -> None:
    model = parse(
        "g (float[N,64] x) => (float[N,32] y) { t = Transpose(w) y = MatMul(x, t) }",
        {"w": normal(32, 64, seed=7)},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"MatMul": 1}
    assert result.nbytes() == model.nbytes()


def test_large_weights_are_transposed_too() -> None:
    large = np.zeros((WORKING_BYTES >> 14, 2048), np.float32)
    model = parse("g (float[N,2048] x) => (float[N,M] y) { t = Transpose(w) y = MatMul(x, t) }", {"w": large})
    result, _ = apply(Fold(), model)
    assert ops(result) == {"MatMul": 1}
    assert result.nbytes() == model.nbytes()


def test_a_tied_weight_is_not_copied() -> None:
    model = parse(
        "g (int64[N] i, float[M,64] x) => (float[N,64] e, float[M,32] y) "
        "{ e = Gather(w, i) t = Transpose(w) y = MatMul(x, t) }",
        {"w": normal(32, 64, seed=7)},
    )
    _, changes = settled(Fold(), model)
    assert not changes
    assert "8192 bytes" in str(reasons(changes))


def test_two_layouts_of_one_weight_are_not_both_stored() -> None:
    model = parse(
        "g (float[N,64] x, float[M,32] z) => (float[N,32] y, float[M,64] v) "
        "{ t = Transpose(w) n = Neg(w) y = MatMul(x, t) v = MatMul(z, n) }",
        {"w": normal(32, 64, seed=7)},
    )
    result, _ = settled(Fold(), model)
    assert result.nbytes() <= model.nbytes()
    assert ops(result)["MatMul"] == 2


def test_pieces_of_a_weight_are_stored_as_they_add_up_to_it() -> None:
    model = parse(
        "g (float[N,64] x) => (float[N,32] y) "
        "{ a, b = Split<axis = 1>(w) c = MatMul(x, a) d = MatMul(x, b) y = Add(c, d) }",
        {"w": normal(64, 64, seed=7)},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"MatMul": 2, "Add": 1}
    assert result.nbytes() == model.nbytes()


def test_results_that_have_no_size_in_advance_are_judged_by_their_real_size() -> None:
    mask = np.zeros(2000, np.bool_)
    mask[:3] = True
    text = "g (int64[N] x) => (int64[1,M] y) { n = NonZero(m) y = Add(x, n) }"
    feeds = {"x": np.ones(1, np.int64)}
    model = parse(text, {"m": mask})
    result, _ = apply(Fold(), model)
    assert stored(result, "n").tolist() == [[0, 1, 2]]
    same_outputs(model, result, feeds, exact=True)
    result, changes = apply(Fold(), parse(text, {"m": np.ones(2000, np.bool_)}))
    assert ops(result) == {"NonZero": 1, "Add": 1}
    assert "16000 bytes" in str(reasons(changes))


@pytest.mark.parametrize(
    "make",
    [
        "big = Expand(one, shape)",
        "big = Tile(one, shape)",
        "big = ConstantOfShape(shape)",
        "n = ReduceProd<keepdims = 0>(shape) f = Cast<to = 1>(n) z = Sub(f, f) o = Exp(z) "
        "big = Range(z, f, o)",
        "n = ReduceProd(shape) pads = Concat<axis = 0>(zero, n) v = Reshape(one, all) big = Pad(v, pads)",
    ],
)
@pytest.mark.parametrize("sides", [(64, 64), (2**20, 2**20)])
def test_bombs_are_neither_stored_nor_allocated(make: str, sides: tuple[int, int]) -> None:
    model = parse(
        f"g (float[1] x) => (float y) {{ {make} a = Mul(big, x) y = ReduceMax<keepdims = 0>(a) }}",
        {
            "one": np.ones((1, 1), np.float32),
            "shape": np.array(sides, np.int64),
            "zero": np.array([0], np.int64),
            "all": np.array([-1], np.int64),
        },
    )
    tracemalloc.start()
    result, changes = apply(Fold(), model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert result.nbytes() < 200
    assert ops(result)["Mul"] == 1
    assert "bytes" in str(reasons(changes)) or "not known" in str(reasons(changes))


def test_only_what_is_stored_counts_within_reason() -> None:
    text = (
        "g (float x) => (float y) { big = Expand(one, shape) s = ReduceSum<keepdims = 0>(big) y = Add(x, s) }"
    )
    constants: dict[str, Any] = {"one": np.ones(1, np.float32), "shape": np.array([1 << 20], np.int64)}
    result, _ = settled(Fold(), parse(text, constants))
    assert ops(result) == {"Add": 1}
    constants["shape"] = np.array([(WORKING_BYTES >> 2) + 1000], np.int64)
    result, changes = apply(Fold(), parse(text, constants))
    assert ops(result)["Expand"] == 1
    assert "too large" in str(reasons(changes))


def test_growth_is_a_matter_of_the_option() -> None:
    text = "g (float[N,512] x) => (float[N,512] y) { big = Expand(one, shape) y = Add(x, big) }"
    model = parse(text, {"one": np.ones(1, np.float32), "shape": np.array([512], np.int64)})
    assert not apply(Fold(), model)[1]
    result, _ = apply(Fold(max_growth=4096), model)
    assert ops(result) == {"Add": 1}
    with pytest.raises(UsageError, match="greater than or equal to 0"):
        Fold(max_growth=-1)


GRIDS = """g (float[N,2048] x, float[N,512] z) => (float[N,2048] y, float[N,512] w) {
    a = Expand(one, large) f = Abs(a) b = Neg(f) c = Exp(b) y = Add(x, c)
    d = Expand(third, small) e = Sqrt(d) w = Add(z, e) }"""


def test_what_is_left_is_spent_where_it_removes_most_nodes() -> None:
    constants = {"one": np.zeros(1, np.float32), "third": np.full(1, 1 / 3, np.float32)}
    constants |= {"large": np.array([2048]), "small": np.array([512])}
    model = parse(GRIDS, constants)
    left = [ops(apply(Fold(max_growth=growth), model)[0]) for growth in (1500, 3500, 6000, 12000)]
    # Ones take a quarter of the space as flags; a third takes all of it.
    assert left[0] == {"Add": 2, "Expand": 2, "Abs": 1, "Neg": 1, "Exp": 1, "Sqrt": 1}
    assert left[1] == {"Add": 2, "Cast": 1, "Expand": 1, "Sqrt": 1}
    assert left[2] == {"Add": 2, "Cast": 1}
    assert left[3] == {"Add": 2}


def test_what_removes_nothing_more_is_not_bought() -> None:
    """Offers look at results one by one; of what was bought, another may have nothing left to remove."""
    tensors, nodes = [Variable(name) for name in "abc"], [Node("Abs", name) for name in "abc"]
    growth = {(): 0, (0,): 10, (0, 1): 30, (0, 2): 20, (0, 3): 20}
    gain = {(): 0, (0,): 1, (0, 1): 2, (0, 2): 1, (0, 3): 2}

    def settle(bought: Mapping[int, int | None]) -> FoldPlan:
        which = tuple(sorted(bought))
        stored = tuple(tensors[0] if index == 0 else tensors[1] for index in which)
        return FoldPlan(stored, tuple(nodes[: gain.get(which, 3)]), (), growth.get(which, 40))

    offers = [_Offer(index, None, 1, 8 + index) for index in range(3)]
    assert _spend(offers, settle({}), settle, 25) == settle({0: None})
    assert _spend([*offers, _Offer(3, None, 1, 12)], settle({}), settle, 25) == settle({0: None, 3: None})


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0, 1, 1], np.float32), np.bool_),
        (np.array([-0.0, 1, 1], np.float32), np.float16),
        (np.array([0.5, -65504, np.inf, 2**-24], np.float32), np.float16),
        (np.array([0.1], np.float32), None),
        (np.array([65520], np.float32), None),
        (np.array([0.1], np.float32).astype(np.float64), np.float32),
        (np.array([0.1], np.float64), None),
        (np.array([-(2**31), 2**31 - 1]), np.int32),
        (np.array([2**31]), None),
        (np.array([3], np.int32), None),
        (np.array(["a"], np.object_), None),
    ],
)
def test_a_narrower_type_holds_every_bit(values: Any, dtype: Any) -> None:
    narrow = narrower(values)
    assert (None if narrow is None else narrow.dtype) == dtype


def test_a_narrower_result_is_the_same() -> None:
    constants = {"one": np.zeros(1, np.float32), "third": np.full(1, 1 / 3, np.float32)}
    model = parse(GRIDS, constants | {"large": np.array([2048]), "small": np.array([512])})
    result, _ = apply(Fold(max_growth=6000), model)
    same_outputs(model, result, feeds_for(model, batch=2))
    assert result.stats().bytes - model.stats().bytes <= 6000
    assert not apply(Fold(), result)[1]


FORMS = {
    "turn": "Transpose({})",
    "same": "Neg({})",
    "double": "Concat<axis = 0>({0}, {0})",
    "half": "Slice({}, a, b)",
}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(FORMS)), st.integers(0, 8), st.booleans()), min_size=1, max_size=9
    )
)
@settings(max_examples=60, deadline=None)
def test_a_model_never_grows(steps: list[tuple[str, int, bool]]) -> None:
    lines, results = ["y = Mul(w, x)"], ["float[] y"]
    tensors = ["w"]
    for index, (form, source, used) in enumerate(steps):
        tensors.append(f"t{index}")
        lines.append(f"t{index} = {FORMS[form].format(tensors[source % (index + 1)])}")
        if used:
            lines.append(f"y{index} = Mul(t{index}, x)")
            results.append(f"float[] y{index}")
    constants = {"w": normal(20, 20, seed=7), "a": np.array([0]), "b": np.array([10])}
    model = parse(f"g (float x) => ({', '.join(results)}) {{ {' '.join(lines)} }}", constants)
    result, _ = settled(Fold(), model)
    assert result.to_proto().ByteSize() <= model.to_proto().ByteSize()
