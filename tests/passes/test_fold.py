"""Folding: exact values and types, within the budget, and only where the outcome is certain."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim.errors import LoadError
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model, load
from onnxslim.passes.fold import Fold
from onnxslim.passes.fold.values import WORKING_BYTES, narrower
from tests.helpers import apply, feeds_for, normal, ops, parse, reasons, run, same_outputs, settled


def constant(model: Model, name: str) -> np.ndarray[Any, Any]:
    return model.graph.initializers[name].values


# ------------------------------------------------------------------------------------- Constant nodes


def test_every_form_of_constant_keeps_its_type() -> None:
    model = parse(
        """g (float[N] x, int64[N] i)
        => (float[N] a, float[N] b, int64[N] c, int64[N] d, string[2] e, string f) {
            half = Constant<value_float = 0.5>()
            halves = Constant<value_floats = [0.25]>()
            one = Constant<value_int = 1>()
            ones = Constant<value_ints = [1]>()
            words = Constant<value_strings = ["a", "b"]>()
            word = Constant<value_string = "c">()
            a = Add(x, half)
            b = Add(x, halves)
            c = Add(i, one)
            d = Add(i, ones)
            e = Identity(words)
            f = Identity(word)
        }"""
    )
    result, changes = settled(Fold(), model)
    assert ops(result) == {"Add": 4, "Constant": 2}
    kinds = {name: (value.dtype, value.shape) for name, value in result.graph.initializers.items()}
    assert kinds == {
        "half": (np.dtype(np.float32), ()),
        "halves": (np.dtype(np.float32), (1,)),
        "one": (np.dtype(np.int64), ()),
        "ones": (np.dtype(np.int64), (1,)),
    }
    assert len(changes.changed) == 8


def sparse_constant(size: int) -> Model:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[{size}] x) => (float[{size}] y) {{ c = Constant<value_float = 0.0>() y = Add(x, c) }}"""
    )
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "c")
    indices = numpy_helper.from_array(np.array([1, 3], np.int64))
    sparse = helper.make_sparse_tensor(values, indices, [size])
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    return load(model)


def test_a_sparse_constant_becomes_dense_only_if_that_is_not_larger() -> None:
    small, _ = settled(Fold(), sparse_constant(5))
    np.testing.assert_array_equal(constant(small, "c"), [0, 1, 0, 2, 0])
    large, changes = settled(Fold(), sparse_constant(5000))
    assert ops(large) == {"Constant": 1, "Add": 1}
    assert "sparse" in str(reasons(changes))


def test_a_constant_that_is_an_output_stays_a_node_and_is_folded_through() -> None:
    model = parse(
        "g (float x) => (float c, float y) { c = Constant<value_float = 3.0>() d = Neg(c) y = Add(x, d) }"
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"Constant": 1, "Add": 1}


BRANCHES = """g (bool b, float[2] x) => (float[2] y) {
    y = If(b) <
        then_branch = t () => (float[2] p) { c = Constant<value_float = 2.0>() p = Mul(x, c) },
        else_branch = e () => (float[2] q) { c = Constant<value_float = 3.0>() d = Sqrt(c) q = Mul(x, d) }
    >
}"""


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("taken", [True, False])
def test_two_bodies_with_one_name_for_different_constants(ir_version: int, taken: bool) -> None:
    model = parse(BRANCHES, ir_version=ir_version, opset=12)
    result, _ = settled(Fold(), model)
    assert ops(result) == {"If": 1, "Mul": 2}
    feeds = {"b": np.array(taken), "x": np.ones(2, np.float32)}
    same_outputs(model, result, feeds, exact=True)
    assert run(result, feeds)["y"][0] == np.float32(2.0 if taken else np.sqrt(np.float32(3)))


# ------------------------------------------------------------------------------------- constant values


def test_a_chain_becomes_one_constant_and_leaves_nothing_behind() -> None:
    model = parse(
        """g (float[N,4] x) => (float[N,4] y) <float[4] a = {1, 2, 3, 4}, float[4] b = {4, 3, 2, 1}> {
            c = Mul(a, b) d = Sqrt(c) e = Neg(d) y = Add(x, e)
        }"""
    )
    result, changes = settled(Fold(), model)
    assert ops(result) == {"Add": 1}
    assert list(result.graph.initializers) == ["e"]
    assert [change.node for change in changes.changed] == ["Mul→c", "Sqrt→d", "Neg→e"]


def test_unused_constants_that_were_there_before_are_not_its_business() -> None:
    model = parse("g (float x) => (float y) <float a = {1.0}, float z = {2.0}> { b = Neg(a) y = Add(x, b) }")
    result, _ = settled(Fold(), model)
    assert set(result.graph.initializers) == {"b", "z"}


def test_a_folded_output_keeps_its_name_type_and_declared_shape() -> None:
    model = parse("g (float x) => (float[M] y, float z) <float[2] a = {1, 2}> { y = Neg(a) z = Neg(x) }")
    result, _ = settled(Fold(), model)
    assert ops(result) == {"Constant": 1, "Neg": 1}


def test_an_output_that_an_old_constant_node_cannot_hold_stays() -> None:
    model = parse("g (float x) => (bool y, float z) <bool a = {1}> { y = Not(a) z = Neg(x) }", opset=8)
    result, changes = settled(Fold(), model)
    assert ops(result) == {"Not": 1, "Neg": 1}
    assert "no Constant of type bool" in str(reasons(changes))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint16, np.bool_, ml_dtypes.bfloat16])
def test_types_are_exact(dtype: Any) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = parse(
        f"g (float[3] x) => (float[3] y) {{ c = Cast<to = {kind}>(w) d = Cast<to = 1>(c) y = Add(x, d) }}",
        {"w": np.array([1.3, 0.0, 2.7], np.float32)},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"Add": 1}
    # Stopped half way, the constant has the type itself.
    model = parse(
        f"g (bool b) => (float[3] y) {{ c = Cast<to = {kind}>(w) y = If(b) <"
        "then_branch = t () => (float[3] p) { p = Cast<to = 1>(c) },"
        "else_branch = e () => (float[3] q) { q = Identity(w) }> }",
        {"w": np.array([1.3, 0.0, 2.7], np.float32)},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"If": 1, "Constant": 2}


def test_bfloat16_constants_are_stored_as_such() -> None:
    text = (
        f"g (bfloat16[2] x) => (bfloat16[2] y) {{ c = Cast<to = {TensorProto.BFLOAT16}>(w) y = Add(x, c) }}"
    )
    result, _ = apply(Fold(), parse(text, {"w": np.array([1.5, -2.0], np.float32)}))
    assert constant(result, "c").dtype == np.dtype(ml_dtypes.bfloat16)
    assert [float(value) for value in constant(result, "c")] == [1.5, -2.0]


def test_strings_are_folded() -> None:
    model = parse(
        'g (string[2] x) => (string[2] y) <string[2] a = {"p", "q"}> '
        "{ b = StringConcat(a, a) y = StringConcat(x, b) }",
        opset=20,
    )
    result, _ = settled(Fold(), model)
    assert constant(result, "b").tolist() == ["pp", "qq"]


@pytest.mark.parametrize(
    "body",
    [
        "r = RandomNormalLike(w) y = Add(x, r)",
        "r = QuantizeLinear(w, s) d = DequantizeLinear(r, s) y = Add(x, d)",
        "r, m = Dropout(w) y = Add(x, r)",
        "r = If(t) <then_branch = a () => (float[2] p) { p = Identity(x) }, "
        "else_branch = b () => (float[2] q) { q = Neg(x) }> y = Add(x, r)",
    ],
)
def test_what_is_random_quantized_or_control_flow_is_left_alone(body: str) -> None:
    constants = {"w": np.ones(2, np.float32), "s": np.array(0.5, np.float32), "t": np.array(True)}
    model = parse(f"g (float[2] x) => (float[2] y) {{ {body} }}", constants)
    result, changes = apply(Fold(), model)
    assert not changes
    assert ops(result) == ops(model)


def test_operators_of_other_domains_and_functions_that_hide_standard_ones_are_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float x) => (float y) <float a = {4.0}> { b = own.Twice(a) y = Add(x, b) }
    <domain: "own", opset_import: ["" : 17]> Twice (v) => (w) { w = Add(v, v) }"""
    assert not settled(Fold(), parse(text))[1]
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float x) => (float y) <float a = {4.0}> { b = Sqrt(a) y = Add(x, b) }
    <domain: "", opset_import: ["" : 17]> Sqrt (v) => (w) { w = Neg(v) }"""
    assert not apply(Fold(), parse(text))[1]


def test_a_default_that_the_caller_may_replace_is_no_constant() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float[2] w, int64[1] s) => (float[M] y)
        { v = Neg(w) z = Add(x, v) y = Reshape(z, s) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "s"))
    assert not settled(Fold(), load(model))[1]


def test_what_onnx_runtime_cannot_compute_stays_and_stops_nothing_else() -> None:
    model = parse(
        f"""g (float[2] x) => (float[2] y, bfloat16[2] z) <float[2] a = {{4, 9}}> {{
            h = Cast<to = {TensorProto.BFLOAT16}>(a)
            k = Neg(h)
            z = Abs(k)
            b = Sqrt(a)
            c = Neg(b)
            y = Add(x, c)
        }}"""
    )
    result, changes = apply(Fold(), model)
    assert ops(result) == {"Neg": 1, "Abs": 1, "Add": 1}
    np.testing.assert_array_equal(constant(result, "c"), [-2, -3])
    assert "ONNX Runtime refuses" in reasons(changes)["Neg→k"]
    assert "Abs" not in str(reasons(changes))


@pytest.mark.parametrize("op", ["Div", "Mod"])
@pytest.mark.parametrize(("dividend", "divisor"), [(1, 0), (-(2**31), -1)])
def test_divisions_that_would_end_the_process_are_not_tried(op: str, dividend: int, divisor: int) -> None:
    model = parse(
        f"""g (bool b, int32[1] x) => (int32[1] y) {{
            z = Neg(n)
            y = If(b) <then_branch = t () => (int32[1] p) {{ p = Identity(x) }},
                       else_branch = e () => (int32[1] q) {{ d = {op}(a, z) q = Add(x, d) }}>
        }}""",
        {"a": np.array([dividend], np.int32), "n": np.array([-divisor], np.int32)},
    )
    result, changes = apply(Fold(), model)
    assert ops(result) == {"If": 1, "Identity": 1, op: 1, "Add": 1}
    assert "end the process" in str(reasons(changes))


def test_divisions_by_what_was_folded_before_are() -> None:
    model = parse(
        "g (int32[1] x) => (int32[1] y) { z = Neg(n) d = Div(a, z) y = Add(x, d) }",
        {"a": np.array([7], np.int32), "n": np.array([-2], np.int32)},
    )
    result, _ = settled(Fold(), model)
    assert constant(result, "d").tolist() == [3]


def test_range_gets_the_scalars_it_wants() -> None:
    model = parse(
        "g (int64 n) => (int64[M] y) { y = Range(a, n, b) }",
        {"a": np.array([0], np.int64), "b": np.array([1], np.int64)},
    )
    result, _ = apply(Fold(), model)
    assert [tensor.shape for tensor in result.graph.nodes[0].inputs] == [(), (), ()]
    assert run(result, {"n": np.array(3)})["y"].tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- budget


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
    assert constant(result, "n").tolist() == [[0, 1, 2]]
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
    with pytest.raises(ValueError, match="greater than or equal to 0"):
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


# ---------------------------------------------------------------------------------------- known sizes


def sizes_of(text: str, **constants: Any) -> str:
    """What is left of a model of a few lines over x, float[N,3,H,8]."""
    model = parse(
        f"g (float[N,3,H,8] x) => (int64[] y) {{ {text} }}",
        {name: np.array(value, np.int64) for name, value in constants.items()},
    )
    result, _ = settled(Fold(), model)
    values = run(result)["y"]
    return f"{values.tolist()}" if ops(result) == {"Constant": 1} else " ".join(sorted(ops(result)))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("y = Shape(x)", "Shape"),
        ("y = Shape<start = 1, end = 2>(x)", "[3]"),
        ("y = Shape<start = -1>(x)", "[8]"),
        ("y = Shape<start = -9, end = -2>(x)", "Shape"),
        ("y = Shape<start = 3, end = 1>(x)", "[]"),
        ("y = Shape<start = 1, end = 9>(x)", "Shape"),
        ("y = Size(x)", "Size"),
        ("s = Shape(x) y = Gather(s, one)", "3"),
        ("s = Shape(x) y = Gather(s, minus)", "8"),
        ("s = Shape(x) y = Gather(s, both)", "[3, 8]"),
        ("s = Shape(x) y = Gather(s, zero)", "Gather Shape"),
        ("s = Shape(x) y = Slice(s, ones, twos)", "[3]"),
        ("s = Shape(x) y = Slice(s, minuses, zeros, zeros, minuses)", "Gather Shape"),
        ("s = Shape(x) t = Slice(s, threes, zeros, zeros, minustwos) y = Mul(t, t)", "[64, 9]"),
        ("s = Shape(x) a = Gather(s, one) b = Unsqueeze(a, zeros) y = Concat<axis = 0>(b, twos)", "[3, 2]"),
        ("s = Shape(x) a = Gather(s, both) y = ReduceProd<keepdims = 0>(a)", "24"),
        ("s = Shape(x) a = Gather(s, one) b = Cast<to = 6>(a) c = Cast<to = 7>(b) y = Div(c, two)", "1"),
        ("s = Shape(x) a = Gather(s, zero) b = Gather(s, zero) y = Sub(a, b)", "0"),
        ("s = Shape(x) b = Equal(s, minus) y = Where(b, one, zero)", "[0, 0, 0, 0]"),
        ("s = Shape(x) b = Equal(s, three) y = Where(b, one, zero)", "Equal Shape Where"),
    ],
)
def test_sizes_that_are_known_become_numbers(text: str, left: str) -> None:
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3, "minus": -1, "both": [1, 3]}
    vectors = {"zeros": [0], "ones": [1], "twos": [2], "threes": [3], "minuses": [-1], "minustwos": [-2]}
    found = sizes_of(text, **numbers, **vectors)
    assert found == left or (left == "Gather Shape" and found in ("Gather Shape", "Shape Slice"))


def test_a_wrong_annotation_of_an_inner_tensor_is_not_believed() -> None:
    model = parse(
        """g (float[N,4] x, int64[2] shape) => (float[A,B] y, int64[2] s) <float[7,7] t>
        { t = Reshape(x, shape) s = Shape(t) y = Neg(t) }"""
    )
    feeds: dict[str, Any] = {"x": np.ones((2, 4), np.float32), "shape": np.array([4, 2], np.int64)}
    result, changes = apply(Fold(), model)
    assert not changes
    assert run(result, feeds)["s"].tolist() == [4, 2]


def test_a_wrong_declaration_of_an_output_is_not_believed() -> None:
    model = parse(
        "g (float[N,4] x, int64[2] shape) => (float[7,7] t, int64[2] s) "
        "{ t = Reshape(x, shape) s = Shape(t) }"
    )
    assert not apply(Fold(), model)[1]


def test_an_annotation_that_no_longer_holds_is_dropped() -> None:
    model = parse(
        "g (int64[2,M] x) => (int64[2,M] y) <int64[2,9] n> { n = NonZero(m) y = Add(x, n) }",
        {"m": np.eye(2, dtype=np.float32)},
    )
    result, _ = apply(Fold(), model)
    assert ops(result) == {"Add": 1}
    same_outputs(model, result, {"x": np.ones((2, 2), np.int64)}, exact=True)


def test_sizes_that_onnx_runtime_computes_in_its_own_way() -> None:
    model = parse(
        "g (float[1,2,8,9] x) => (float[1,2,A,B] p, int64[4] s, int64[4] t) {"
        "p = MaxPool<kernel_shape = [2,1], strides = [4,4], ceil_mode = 1>(x) s = Shape(p)"
        ' r = Resize<mode = "nearest">(x, , c) t = Shape(r) }',
        {"c": np.array([1, 1, 3.1, 1.1], np.float32)},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"MaxPool": 1, "Constant": 2}


# -------------------------------------------------------------------------------------------- targets

PIECES = {
    "N": "s{0} = Shape<start = 0, end = 1>(x)",
    "S": "s{0} = Shape<start = 1, end = 2>(x)",
    "NS": "a{0} = Shape<start = 0, end = 2>(x) s{0} = ReduceProd(a{0})",
    "2S": "a{0} = Shape<start = 1, end = 2>(x) s{0} = Mul(a{0}, two)",
    "12": "s{0} = Identity(twelve)",
    "2": "s{0} = Identity(two)",
    "6": "s{0} = Identity(six)",
    "0": "s{0} = Identity(zero)",
    "-1": "s{0} = Identity(minus)",
}
NUMBERS = {"two": [2], "six": [6], "twelve": [12], "zero": [0], "minus": [-1]}


def reshape(pieces: list[str], allowzero: bool = False) -> Model:
    """A model that reshapes float[N,S,12] to the given sizes, which it computes from the input."""
    lines = [PIECES[piece].format(index) for index, piece in enumerate(pieces)]
    target = f"t = Concat<axis = 0>({', '.join(f's{index}' for index in range(len(pieces)))})"
    return parse(
        f"g (float[N,S,12] x) => (float[] y) {{ {' '.join(lines)} {target} "
        f"z = Reshape<allowzero = {int(allowzero)}>(x, t) y = Neg(z) }}",
        {name: np.array(value, np.int64) for name, value in NUMBERS.items()},
    )


@pytest.mark.parametrize(
    ("pieces", "target"),
    [
        (["N", "S", "2", "6"], [0, 0, 2, 6]),
        (["NS", "12"], [-1, 12]),
        (["N", "2S", "6"], None),
        (["N", "-1"], [0, -1]),
        (["0", "S", "-1"], [0, 0, -1]),
        (["S", "N", "12"], None),
        (["NS", "2", "6"], [-1, 2, 6]),
        (["-1", "12"], [-1, 12]),
    ],
)
def test_targets_that_can_be_stated(pieces: list[str], target: list[int] | None) -> None:
    model = reshape(pieces)
    result, _ = apply(Fold(), model)
    node = next(node for node in result.graph.nodes if node.op == "Reshape")
    stated = node.inputs[1].values.tolist() if isinstance(node.inputs[1], Constant) else None
    assert stated == target
    assert ("Shape" in ops(result)) == (target is None)


def test_a_zero_that_does_not_copy_stays_computed() -> None:
    assert "Shape" in ops(apply(Fold(), reshape(["0", "S", "12"], allowzero=True))[0])
    for pieces in (["NS", "12"], ["N", "S", "2", "6"]):
        result, _ = settled(Fold(), reshape(pieces, allowzero=True))
        assert ops(result) == {"Reshape": 1, "Neg": 1}
        assert "allowzero" not in result.graph.nodes[0].attrs


@given(
    st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([(2, 3), (1, 1), (0, 3), (3, 0), (0, 0), (2, 1)]),
)
@settings(max_examples=150, deadline=None)
def test_stated_targets_are_right_for_all_sizes_empty_ones_included(
    pieces: list[str], allowzero: bool, sizes: tuple[int, int]
) -> None:
    # The standard forbids 0 beside -1 where zeros do not copy, computed ones included: any size would do for
    # the -1. ONNX Runtime notices only if they are constant.
    axes = {"N": sizes[0], "S": sizes[1], "NS": sizes[0] * sizes[1], "2S": 2 * sizes[1]}
    assume(not (allowzero and {0, -1} <= {axes[each] if each in axes else int(each) for each in pieces}))
    model = reshape(pieces, allowzero)
    feeds = {"x": np.arange(sizes[0] * sizes[1] * 12, dtype=np.float32).reshape(*sizes, 12)}
    try:
        expected = run(model, feeds)["y"]
    except LoadError:
        return
    result, _ = apply(Fold(), model)
    np.testing.assert_array_equal(run(result, feeds)["y"], expected, strict=True)


@pytest.mark.parametrize(
    ("target", "stated"),
    [
        ("s", [1, 1]),
        ("Concat<axis = 0>(n, four)", [1, 4]),
        ("Concat<axis = 0>(two, s)", [2, 1, 1]),
        ("m", None),
    ],
)
def test_expand_to_its_own_size(target: str, stated: list[int] | None) -> None:
    line = f"t = {target}" if "(" in target else f"t = Identity({target})"
    model = parse(
        f"""g (float[N,S] x, float[2] z) => (float[] y) {{
            s = Shape(x) n = Shape<end = 1>(x) q = Shape(z) m = Concat<axis = 0>(q, n)
            {line} e = Expand(x, t) y = Neg(e)
        }}""",
        {"two": np.array([2]), "four": np.array([4])},
    )
    result, _ = apply(Fold(), model)
    node = next(node for node in result.graph.nodes if node.op == "Expand")
    assert (node.inputs[1].values.tolist() if isinstance(node.inputs[1], Constant) else None) == stated
    feeds = feeds_for(model, size=4) if stated != [1, 4] else feeds_for(model, size=1)
    if stated is not None:
        same_outputs(model, result, feeds, exact=True)


def test_equal_sizes_of_several_tensors_are_computed_once() -> None:
    model = parse(
        """g (float[N,S] x) => (float[] y, float[] z, int64[1] n) {
            a = Exp(x) s = Shape(x) t = Shape(a) n = Shape<end = 1>(a)
            i = Slice(s, zero, one) j = Slice(t, zero, one) k = Slice(t, one, two)
            p = Concat<axis = 0>(i, j) q = Concat<axis = 0>(j, k)
            y = ConstantOfShape(p) z = ConstantOfShape(q)
        }""",
        {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"Exp": 1, "Shape": 2, "Concat": 1, "ConstantOfShape": 2}


def test_a_body_does_not_read_a_size_whose_name_it_has_itself() -> None:
    model = parse(
        """g (float[N] x, bool t) => (int64[1] y) {
            n = Shape(x) a = Exp(x) k = Shape(a)
            y = If(t) <then_branch = p () => (int64[1] u) { n = Neg(k) u = Add(n, k) },
                       else_branch = q () => (int64[1] v) { v = Neg(n) }>
        }"""
    )
    assert not apply(Fold(), model)[1]


def test_axes_without_a_name_are_told_apart() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[?,?,4] x, float[?,8] z) => (float[] y, float[] v) <int64[1] two = {2}> {
            a = Shape<start = 0, end = 1>(x)  b = Shape<start = 1, end = 2>(x)
            t = Concat<axis = 0>(a, b, two, two)  y = Reshape(x, t)
            u = Concat<axis = 0>(a, two, two, two)  v = Reshape(z, u)
        }"""
    )
    result, _ = apply(Fold(), load(model))
    targets = [node.inputs[1] for node in result.graph.nodes if node.op == "Reshape"]
    assert [tensor.values.tolist() for tensor in targets if isinstance(tensor, Constant)] == [
        [0, 0, 2, 2],
        [-1, 2, 2, 2],
    ]
