"""Duplicates are merged where they are equal to the bit, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model, load
from onnxslim.passes import dedupe
from onnxslim.passes.dedupe import Dedupe
from tests.helpers import apply, ops, parse, run, same_outputs, settled


def with_initializers(text: str, *tensors: TensorProto) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(tensors)
    return load(proto)


# ------------------------------------------------------------------------------------------- constants

SUM = "g (float[2] x) => (float[2] y) { p = Add(x, a) y = Mul(p, b) }"


def test_equal_constants_become_one() -> None:
    result, changes = settled(
        Dedupe(), parse(SUM, {"a": np.array([1, 2], np.float32), "b": np.array([1, 2], np.float32)})
    )
    assert list(result.graph.initializers) == ["a"]
    assert [(change.node, change.action) for change in changes.changed] == [("b", "merged with 'a'")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.zeros(2, np.float32), np.zeros((1, 2), np.float32)),
        (np.array([0.0, 0.0], np.float32), np.array([0.0, -0.0], np.float32)),
        (np.array([1, 2], np.float32), np.array([1, 3], np.float32)),
    ],
)
def test_other_shapes_and_other_bits_are_other_constants(first: Any, second: Any) -> None:
    result, changes = apply(Dedupe(), parse(SUM, {"a": first, "b": second}))
    assert not changes
    assert len(result.graph.initializers) == 2


def test_other_types_with_the_same_bytes_are_other_constants() -> None:
    model = parse(
        "g (float[2] x, int32[2] i) => (float[2] y, int32[2] j) { y = Add(x, a) j = Add(i, b) }",
        {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.int32)},
    )
    assert not settled(Dedupe(), model)[1]


def test_not_a_number_is_equal_to_itself_but_not_to_others() -> None:
    bits = np.array([0x7FC00000, 0x7FC00000], np.uint32).view(np.float32)
    others = np.array([0x7FC00001, 0x7FC00000], np.uint32).view(np.float32)
    assert len(apply(Dedupe(), parse(SUM, {"a": bits, "b": bits.copy()}))[0].graph.initializers) == 1
    assert len(apply(Dedupe(), parse(SUM, {"a": bits, "b": others}))[0].graph.initializers) == 2


def test_how_a_tensor_is_stored_does_not_matter() -> None:
    raw = numpy_helper.from_array(np.array([1, 2], np.float32), "a")
    typed = helper.make_tensor("b", TensorProto.FLOAT, [2], [1.0, 2.0])
    assert raw.raw_data
    assert typed.float_data
    result, _ = settled(Dedupe(), with_initializers(SUM, raw, typed))
    assert list(result.graph.initializers) == ["a"]


def test_strings_and_packed_types() -> None:
    model = parse(
        'g (string[1] x) => (string[1] y) <string[1] a = {"ab"}, string[1] b = {"ab"}, string[1] c = {"a"}> '
        "{ p = StringConcat(x, a) q = StringConcat(p, b) y = StringConcat(q, c) }",
        opset=20,
    )
    assert set(settled(Dedupe(), model)[0].graph.initializers) == {"a", "c"}
    four = [
        helper.make_tensor(name, TensorProto.INT4, [3], values)
        for name, values in (("a", [1, 2, 3]), ("b", [1, 2, 3]), ("c", [1, 2, 4]))
    ]
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[3] x) => (float[3] y)
        <float s = {1.0}> { p = DequantizeLinear(a, s) q = DequantizeLinear(b, s) r = DequantizeLinear(c, s)
        t = Add(p, q) u = Add(t, r) y = Add(u, x) }"""
    )
    proto.graph.initializer.extend(four)
    result, _ = settled(Dedupe(), load(proto))
    assert set(result.graph.initializers) == {"a", "c", "s"}
    assert ops(result)["DequantizeLinear"] == 2


def test_a_constant_that_is_an_output_stays_and_so_does_its_equal() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] b, float[2] c) { p = Add(x, a) y = Mul(p, b) }"
    values = np.array([1, 2], np.float32)
    model = with_initializers(text, *(numpy_helper.from_array(values, name) for name in "abc"))
    result, _ = settled(Dedupe(), model)
    assert set(result.graph.initializers) == {"b", "c"}
    assert [tensor.name for tensor in result.graph.outputs] == ["y", "b", "c"]


def test_a_default_of_an_input_is_no_duplicate() -> None:
    text = "g (float[2] x, float[2] b) => (float[2] y) { p = Add(x, a) y = Mul(p, b) }"
    values = np.array([1, 2], np.float32)
    model = with_initializers(text, *(numpy_helper.from_array(values, name) for name in "ab"))
    result, changes = settled(Dedupe(), model)
    assert not changes
    feeds = {"x": values, "b": values * 3}
    np.testing.assert_array_equal(run(result, feeds)["y"], run(model, feeds)["y"])


@pytest.mark.parametrize(("data", "merged"), [("x, z", False), ("xq, zq", True)])
def test_codes_that_runtimes_fuse_with_one_layer_stay_apart(data: str, merged: bool) -> None:
    one, other = data.split(", ")
    text = f"""g (float[N,2] x, float[N,2] z) => (float[N,2] y, float[N,2] t)
    {{ c = QuantizeLinear(x, s) xq = DequantizeLinear(c, s)
      d = QuantizeLinear(z, s) zq = DequantizeLinear(d, s)
      v = DequantizeLinear(a, r) y = MatMul({one}, v) w = DequantizeLinear(b, q) t = MatMul({other}, w) }}"""
    codes = np.array([[1, 2], [3, 4]], np.int8)
    constants = {"a": codes, "b": codes, "r": np.float32(0.5), "q": np.float32(0.5), "s": np.float32(0.25)}
    model = with_initializers(
        text, *(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    )
    result, changes = settled(Dedupe(), model)
    assert bool(changes) == merged
    assert set(result.graph.initializers) == ({"a", "r", "s"} if merged else set(constants))
    assert merged or "stay apart" in changes.skipped[0].reason


def branches(size: int, inner: str = "a", outer: str = "c") -> Model:
    """Two branches and the graph around them, each with the same constant."""
    values = numpy_helper.from_array(np.arange(size, dtype=np.float32))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (bool t, float[{size}] x) => (float[{size}] y, float[{size}] z) {{
            z = Add(x, {outer})
            y = If(t) <then_branch = p () => (float[{size}] u) {{ u = Mul(x, {inner}) }},
                       else_branch = q () => (float[{size}] v) {{ v = Sub(x, b) }}>
        }}"""
    )
    for graph, name in (
        (proto.graph, outer),
        *((item.g, name) for item, name in zip(proto.graph.node[1].attribute, (inner, "b"), strict=True)),
    ):
        values.name = name
        graph.initializer.append(values)
    return load(proto)


@pytest.mark.parametrize("taken", [True, False])
def test_large_constants_of_bodies_are_shared(taken: bool) -> None:
    model = branches(400)
    result, _ = settled(Dedupe(), model)
    assert result.nbytes() == 1600
    feeds = {"t": np.array(taken), "x": np.ones(400, np.float32)}
    same_outputs(model, result, feeds, exact=True)


def test_small_constants_stay_in_their_bodies() -> None:
    assert not settled(Dedupe(), branches(4))[1]


def test_two_bodies_share_a_constant_that_moves_out() -> None:
    model = branches(400)
    model.graph.initializers["c"].values = np.zeros(400, np.float32)
    model.graph.initializers["c"].values.setflags(write=False)
    result, _ = apply(Dedupe(), model)
    assert [len(graph.initializers) for graph in result.graphs()] == [2, 0, 0]
    assert result.nbytes() == 3200
    for taken in (True, False):
        same_outputs(model, result, {"t": np.array(taken), "x": np.ones(400, np.float32)}, exact=True)


def test_a_body_cannot_read_a_constant_whose_name_it_has_itself() -> None:
    result, _ = apply(Dedupe(), branches(400, inner="c"))
    names = {tensor.name for node in result.nodes() for tensor in node.inputs if isinstance(tensor, Constant)}
    assert names == {"c", "b"}


def test_a_hash_is_not_taken_for_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedupe, "_digest", lambda constant: b"")
    model = parse(SUM, {"a": np.array([1, 2], np.float32), "b": np.array([1, 3], np.float32)})
    assert not settled(Dedupe(), model)[1]


def test_constants_that_begin_alike_are_compared_to_their_ends() -> None:
    first, second = np.zeros((2, 2048), np.float32)
    second[-1] = 1
    text = "g (float[2048] x) => (float[2048] y) { p = Add(x, a) q = Mul(p, b) y = Add(q, c) }"
    result, _ = settled(Dedupe(), parse(text, {"a": first, "b": second, "c": second}))
    assert list(result.graph.initializers) == ["a", "b"]


def test_training_information_keeps_constants_apart() -> None:
    model = parse(SUM, {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)})
    model.shell.training_info.add()
    result, changes = apply(Dedupe(), model)
    assert len(result.graph.initializers) == 2
    assert "training" in changes.skipped[0].reason


# ----------------------------------------------------------------------------------------------- nodes


def left(body: str, outputs: str = "float[] y", **constants: Any) -> dict[str, int]:
    """Operators left of a body over x, float[2,3], whose duplicates were merged."""
    return dict(ops(settled(Dedupe(), parse(f"g (float[2,3] x) => ({outputs}) {{ {body} }}", constants))[0]))


def test_whole_chains_of_equal_nodes_collapse() -> None:
    body = "a = Relu(x) b = Relu(x) c = Neg(a) d = Neg(b) e = Exp(c) f = Exp(d) y = Add(e, f)"
    assert left(body) == {"Relu": 1, "Neg": 1, "Exp": 1, "Add": 1}


@pytest.mark.parametrize(
    "body",
    [
        "a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.2>(x) y = Add(a, b)",
        "a = LeakyRelu<alpha = 0.0>(x) b = LeakyRelu<alpha = -0.0>(x) y = Add(a, b)",
        "a = Clip(x, k) b = Clip(x, , k) y = Add(a, b)",
        "a = Cast<to = 6>(x) b = Cast<to = 7>(x) c = Cast<to = 1>(a) d = Cast<to = 1>(b) y = Add(c, d)",
        "a = Sub(x, k) b = Sub(k, x) y = Add(a, b)",
        "a = Dropout(x) b = Dropout(x) y = Add(a, b)",
        "a = Concat<axis = 0>(x, x) b = Concat<axis = 0>(x, x, x) c = Concat<axis = 0>(a, b) y = Neg(c)",
        "c = Constant<value = float {1}>() d = Constant<value = double {1}>() "
        "e = Cast<to = 1>(d) y = Add(c, e)",
        "c = Constant<value = float {0}>() d = Constant<value = float {-0.0}>() y = Add(c, d)",
        "c = Constant<value_ints = [1]>() d = Constant<value_floats = [1.0]>() "
        "e = Cast<to = 1>(c) y = Add(d, e)",
        "a, i = MaxPool<kernel_shape = [1]>(z) b = MaxPool<kernel_shape = [1]>(z) c = Add(a, b) "
        "j = Cast<to = 1>(i) y = Add(c, j)",
    ],
)
def test_nodes_that_differ_are_kept(body: str) -> None:
    model = parse(
        f"g (float[2,3] x) => (float[] y) {{ {body} }}",
        {"k": np.array(0.5, np.float32), "z": np.ones((1, 2, 3), np.float32)},
    )
    assert not settled(Dedupe(), model)[1]


def test_random_nodes_are_kept() -> None:
    model = parse(
        "g (float[2,3] x) => (float[] y) { a = RandomUniformLike(x) b = RandomUniformLike(x) y = Sub(a, b) }"
    )
    result, changes = apply(Dedupe(), model)
    assert not changes
    assert np.abs(run(result)["y"]).max() > 0


@pytest.mark.parametrize(
    "body",
    [
        "a = Clip(x, k) b = Clip(x, k, ) y = Add(a, b)",
        "a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.1>(x) y = Add(a, b)",
        'a = Constant<value_string = "s">() b = Constant<value_string = "s">() '
        "c = Equal(a, b) y = Cast<to = 1>(c)",
        "a = Constant<value = float {1}>() b = Constant<value = float {1}>() y = Add(a, b)",
        "a, b = Split<axis = 0, num_outputs = 2>(x) c, d = Split<num_outputs = 2, axis = 0>(x) "
        "e = Add(a, d) f = Mul(b, c) y = Add(e, f)",
    ],
)
def test_nodes_that_are_equal_are_merged(body: str) -> None:
    model = parse(f"g (float[2,3] x) => (float[] y) {{ {body} }}", {"k": np.array(0.5, np.float32)}, opset=19)
    result, changes = settled(Dedupe(), model)
    assert len(changes.changed) == 1
    assert sum(ops(result).values()) == sum(ops(model).values()) - 1


def test_an_output_keeps_its_name_whichever_comes_first() -> None:
    for body in ("a = Relu(x) y = Relu(x) z = Neg(a)", "y = Relu(x) a = Relu(x) z = Neg(a)"):
        result, _ = settled(Dedupe(), parse(f"g (float[N] x) => (float[N] y, float[N] z) {{ {body} }}"))
        assert ops(result) == {"Relu": 1, "Neg": 1}


def test_two_outputs_need_two_nodes() -> None:
    model = parse("g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Relu(x) }")
    assert not settled(Dedupe(), model)[1]


def test_bodies_read_the_node_that_stays() -> None:
    model = parse(
        """g (bool t, float[2] x) => (float[2] y) {
            a = Neg(x) b = Neg(x)
            y = If(t) <then_branch = p () => (float[2] u) { u = Add(a, b) },
                       else_branch = q () => (float[2] v) { c = Exp(b) d = Exp(b) v = Mul(c, d) }>
        }"""
    )
    result, _ = settled(Dedupe(), model)
    assert ops(result) == {"Neg": 1, "If": 1, "Add": 1, "Exp": 1, "Mul": 1}
    for taken in (True, False):
        same_outputs(model, result, {"t": np.array(taken), "x": np.ones(2, np.float32)}, exact=True)


def test_control_flow_functions_and_other_domains_are_kept() -> None:
    branch = (
        "If(t) <then_branch = p{0} () => (float u{0}) {{ u{0} = Neg(x) }}, "
        "else_branch = q{0} () => (float v{0}) {{ v{0} = Exp(x) }}>"
    )
    model = parse(
        f"g (bool t, float x) => (float y) {{ a = {branch.format(1)} b = {branch.format(2)} y = Add(a, b) }}"
    )
    assert not settled(Dedupe(), model)[1]
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float x) => (float y) { a = own.F(x) b = own.F(x) y = Add(a, b) }
    <domain: "own", opset_import: ["" : 17]> F (v) => (w) { w = Neg(v) }"""
    assert not settled(Dedupe(), parse(text))[1]
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float x) => (float y) { a = Neg(x) b = Neg(x) y = Add(a, b) }
    <domain: "", opset_import: ["" : 17]> Neg (v) => (w) { w = RandomUniformLike(v) }"""
    assert not apply(Dedupe(), parse(text))[1]
