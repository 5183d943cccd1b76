"""Fold: what is constant is computed once, the same to the bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.ir.model import Model, load
from onnxslim.passes.fold import Fold
from tests.helpers import apply, ops, parse, reasons, run, same_outputs, settled, stored

# --------------------------------------------------------------------------------------------- Constant nodes


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
    np.testing.assert_array_equal(stored(small, "c"), [0, 1, 0, 2, 0])
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


# -------------------------------------------------------------------------------------------- constant values


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
    assert stored(result, "c").dtype == np.dtype(ml_dtypes.bfloat16)
    assert [float(value) for value in stored(result, "c")] == [1.5, -2.0]


def test_strings_are_folded() -> None:
    model = parse(
        'g (string[2] x) => (string[2] y) <string[2] a = {"p", "q"}> '
        "{ b = StringConcat(a, a) y = StringConcat(x, b) }",
        opset=20,
    )
    result, _ = settled(Fold(), model)
    assert stored(result, "b").tolist() == ["pp", "qq"]


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
    np.testing.assert_array_equal(stored(result, "c"), [-2, -3])
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
    assert stored(result, "d").tolist() == [3]


def test_range_gets_the_scalars_it_wants() -> None:
    model = parse(
        "g (int64 n) => (int64[M] y) { y = Range(a, n, b) }",
        {"a": np.array([0], np.int64), "b": np.array([1], np.int64)},
    )
    result, _ = apply(Fold(), model)
    assert [tensor.shape for tensor in result.graph.nodes[0].inputs] == [(), (), ()]
    assert run(result, {"n": np.array(3)})["y"].tolist() == [0, 1, 2]
