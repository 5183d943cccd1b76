"""What nothing reads goes; what a caller or an operator can see stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxslim.ir.model import load
from onnxslim.passes.dead import Dead
from tests.helpers import apply, ops, parse, run, same_outputs, settled


def test_unused_nodes_go_with_all_that_only_they_read() -> None:
    model = parse(
        "g (float x) => (float y) <float c = {1.0}, float d = {2.0}, float e = {3.0}> "
        "{ a = Neg(x) b = Exp(a) f = Add(b, c) y = Add(a, d) }"
    )
    result, changes = settled(Dead(), model)
    assert ops(result) == {"Neg": 1, "Add": 1}
    assert list(result.graph.initializers) == ["d"]
    assert {change.node for change in changes.changed} == {"Add→f", "Exp→b", "c", "e"}


def test_inputs_stay_used_or_not_and_so_do_constants_that_are_outputs() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float x, float z, float w) => (float y, float c) { y = Neg(x) }"""
    )
    for name in ("c", "w", "v"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.float32), name))
    result, changes = settled(Dead(), load(proto))
    assert [tensor.name for tensor in result.graph.inputs] == ["x", "z", "w"]
    assert list(result.graph.defaults) == ["w"]
    assert [change.node for change in changes.changed] == ["v"]


def test_bodies_are_cleared_and_what_they_read_stays() -> None:
    model = parse(
        """g (bool t, float x) => (float y) {
            a = Neg(x) b = Exp(x) c = Abs(x)
            y = If(t) <then_branch = p () => (float u) { d = Constant<value_float = 2.0>() u = Add(a, a) },
                       else_branch = q () => (float v) { e = Exp(c) v = Identity(b) }>
        }"""
    )
    result, _ = apply(Dead(), model)
    assert ops(result) == {"Neg": 1, "Exp": 1, "If": 1, "Add": 1, "Identity": 1}
    for taken in (True, False):
        same_outputs(model, result, {"t": np.array(taken), "x": np.array(1, np.float32)}, exact=True)


def test_a_dead_node_takes_its_bodies_and_what_only_they_read_along() -> None:
    model = parse(
        """g (bool t, float x) => (float y) {
            a = Neg(x) b = Exp(x) c = Abs(x)
            z = If(t) <then_branch = p () => (float u) { u = Add(a, c) },
                       else_branch = q () => (float v) { f = Not(t)
                          v = If(f) <then_branch = r () => (float h) { g = Neg(x) h = Identity(b) },
                                     else_branch = s () => (float w) { w = Exp(a) }> }>
            y = Sqrt(c)
        }"""
    )
    result, changes = settled(Dead(), model)
    assert ops(result) == {"Abs": 1, "Sqrt": 1}
    assert {change.node for change in changes.changed} == {"If→z", "Neg→a", "Exp→b"}
    assert [node.op for node in result.graph.nodes[0].outputs[0].outputs] == ["Sqrt"]


def test_what_only_a_dead_body_returned_goes() -> None:
    model = parse(
        """g (bool t, float x) => (float y) {
            a = Neg(x)
            z = If(t) <then_branch = p () => (float a) { }, else_branch = q () => (float v) { v = Exp(x) }>
            y = Sqrt(x)
        }"""
    )
    assert ops(apply(Dead(), model)[0]) == {"Sqrt": 1}


def test_foreign_nodes_without_outputs_may_act_otherwise() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float x) => (float y) { y = Neg(x) }'
    )
    proto.graph.node.append(onnx.helper.make_node("Print", ["x"], [], domain="own"))
    proto.graph.node.append(onnx.helper.make_node("Load", ["x"], ["unused"], domain="own"))
    result, _ = apply(Dead(), load(proto))
    assert ops(result) == {"Neg": 1, "Print": 1}


def test_constants_that_describe_quantization_stay() -> None:
    model = parse("g (float x) => (float y) <float s = {1.0}, float z = {0.0}> { y = Neg(x) }")
    assert model.graph.proto is not None
    note = model.graph.proto.quantization_annotation.add(tensor_name="y")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    result, _ = apply(Dead(), model)
    assert list(result.graph.initializers) == ["s"]


def test_training_information_keeps_constants() -> None:
    model = parse("g (float x) => (float y) <float s = {1.0}> { y = Neg(x) }")
    model.shell.training_info.add()
    assert not apply(Dead(), model)[1]


# ------------------------------------------------------------------------------------------- functions

FUNCTIONS = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (bool t, float x) => (float y) {
    y = If(t) <then_branch = p () => (float u) { u = own.Outer(x) },
               else_branch = q () => (float v) { v = Neg(x) }>
}
<domain: "own", opset_import: ["" : 17, "own" : 1]> Outer (a) => (b) { b = own.Inner(a) }
<domain: "own", opset_import: ["" : 17]> Inner (a) => (b) { b = Exp(a) }
<domain: "own", opset_import: ["" : 17, "own" : 1]> Unused (a) => (b) { b = own.Other(a) }
<domain: "own", opset_import: ["" : 17]> Other (a) => (b) { b = Exp(a) }"""


def test_functions_that_nothing_calls_go_from_the_copy_only() -> None:
    model = parse(FUNCTIONS)
    result, changes = settled(Dead(), model)
    assert [item.name for item in result.shell.functions] == ["Outer", "Inner"]
    assert [item.name for item in model.shell.functions] == ["Outer", "Inner", "Unused", "Other"]
    assert [change.node for change in changes.changed] == ["Unused", "Other"]


def test_overloads_are_functions_of_their_own() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17, "own" : 1]> g (float x) => (float y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 17]> F (a) => (b) { b = Exp(a) }
        <domain: "own", opset_import: ["" : 17]> F (a) => (b) { b = Neg(a) }"""
    )
    proto.functions[1].overload = proto.graph.node[0].overload = "second"
    result, _ = settled(Dead(), load(proto))
    assert [item.overload for item in result.shell.functions] == ["second"]


# ------------------------------------------------------------------------------ optional inputs, outputs


def lists(body: str, opset: int = 17, **constants: Any) -> tuple[int, int]:
    """Lengths of the lists of inputs and outputs of the first node after the pass."""
    model = parse(f"g (float[1,2,4,4] x) => (float[] y) {{ {body} }}", constants, opset=opset)
    result, _ = settled(Dead(), model)
    node = result.graph.nodes[0]
    return len(node.inputs), len(node.outputs)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y, mask = Dropout(x)", (1, 1)),
        ("y, indices = MaxPool<kernel_shape = [2,2]>(x)", (1, 1)),
        ("y, mean, deviation = LayerNormalization<axis = -1>(x, four)", (2, 1)),
        ("y, mean, deviation = LayerNormalization<axis = -1>(x, four, )", (2, 1)),
        ("a, mean, deviation = LayerNormalization<axis = -1>(x, four) y = Add(a, mean)", (2, 2)),
        ("a, mean, deviation = LayerNormalization<axis = -1>(x, four) y = Add(a, deviation)", (2, 3)),
        ("y = Clip(x, , )", (1, 1)),
        ("y = Clip(x, , one)", (3, 1)),
        ("y, unused = Split<axis = 2>(x)", (1, 2)),
        ("unused, y = Split<axis = 2>(x)", (1, 2)),
        ("y, unused = TopK(x, two)", (2, 2)),
        ("s = Identity(x) y, h, c = LSTM<hidden_size = 1>(w, w8, r8, , , , )", (1, 1)),
    ],
)
def test_lists_end_with_what_is_used(body: str, expected: tuple[int, int]) -> None:
    constants: dict[str, Any] = {
        "four": np.ones(4, np.float32),
        "one": np.array(1, np.float32),
        "two": np.array([2], np.int64),
        "w": np.ones((3, 1, 2), np.float32),
        "w8": np.ones((1, 4, 2), np.float32),
        "r8": np.ones((1, 4, 1), np.float32),
    }
    if "LSTM" in body:
        body, expected = body.removeprefix("s = Identity(x) "), (3, 1)
    assert lists(body, **constants) == expected


def test_outputs_that_say_what_is_to_be_computed_stay() -> None:
    body = "y, m, v = BatchNormalization<training_mode = 1>(x, two, two, two, two)"
    assert lists(body, two=np.ones(2, np.float32)) == (5, 3)
    past = np.ones((1, 2, 3, 4), np.float32)
    assert lists("y, k, v = Attention(x, x, x, , past, past)", opset=23, past=past) == (6, 3)


def test_inputs_that_an_operator_insists_on_stay() -> None:
    model = parse(
        """g (float x) => (float y) {
            one = Constant<value = bool {1}>()
            y = Loop(, one, x) <body = b (int64 i, bool c, float v) => (bool d, float w)
                { s = Constant<value_float = 40.0>() w = Add(v, v) d = Less(w, s) }>
        }"""
    )
    result, changes = settled(Dead(), model)
    assert not changes
    assert run(result, {"x": np.array(1, np.float32)})["y"] == 64
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float x) => (float y) { y = own.F(x, , ) }'
    )
    assert not apply(Dead(), load(proto))[1]


def test_many_nodes_take_linear_time() -> None:
    lines = "".join(f"a{index + 1} = Neg(a{index}) " for index in range(3000))
    model = parse(f"g (float a0) => (float y) {{ {lines} y = Exp(a0) }}")
    result, changes = settled(Dead(), model)
    assert ops(result) == {"Exp": 1}
    assert len(changes.changed) == 3000
