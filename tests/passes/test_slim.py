"""All lossless parts together: complete, stable, never larger, and fast."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim.engine.base import Changes, Context
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import UsageError
from onnxslim.ir.files import MAX_EMBEDDED_BYTES
from onnxslim.ir.model import Model, load
from onnxslim.passes import eliminate, fuse
from onnxslim.passes.slim import Slim
from tests.helpers import (
    ONNX_RUNTIME,
    RECENT,
    apply,
    calls_of,
    feeds_for,
    normal,
    normals,
    ops,
    parse,
    reasons,
    same_outputs,
    taken,
)
from tests.shapes.test_dims import FREE, Program

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))


def slimmed(model: Model, **options: Any) -> Model:
    """A slimmed copy; slimming it again changes nothing, and slimming the model again gives the same file."""
    result, _ = apply(Slim(**options), model)
    proto = result.to_proto().SerializeToString(deterministic=True)
    assert apply(Slim(**options), model)[0].to_proto().SerializeToString(deterministic=True) == proto
    again, changes = apply(Slim(**options), load(result.to_proto()))
    assert not changes
    assert again.to_proto().SerializeToString(deterministic=True) == proto
    return result


# What PyTorch exports for one attention block with a free batch and a free length.
ATTENTION = """g (float[N,S,64] x) => (float[N,S,64] y) {
    zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>()
    heads = Constant<value_ints = [4]>() size = Constant<value_ints = [16]>()
    wide = Constant<value_ints = [64]>()
    first = Constant<value_ints = [0]>()
    s1 = Shape(x) n1 = Gather<axis = 0>(s1, zero) u1 = Unsqueeze(n1, first)
    s2 = Shape(x) l1 = Gather<axis = 0>(s2, one) u2 = Unsqueeze(l1, first)
    split = Concat<axis = 0>(u1, u2, heads, size)
    q0 = MatMul(x, wq) q1 = Reshape(q0, split) q = Transpose<perm = [0, 2, 1, 3]>(q1)
    s3 = Shape(x) n2 = Gather<axis = 0>(s3, zero) u3 = Unsqueeze(n2, first)
    s4 = Shape(x) l2 = Gather<axis = 0>(s4, one) u4 = Unsqueeze(l2, first)
    split2 = Concat<axis = 0>(u3, u4, heads, size)
    k0 = MatMul(x, wk) k1 = Reshape(k0, split2) k = Transpose<perm = [0, 2, 3, 1]>(k1)
    v0 = MatMul(x, wv) v1 = Reshape(v0, split2) v = Transpose<perm = [0, 2, 1, 3]>(v1)
    width = Constant<value_float = 16.0>() root = Sqrt(width) scale = Reciprocal(root)
    a0 = MatMul(q, k) a1 = Mul(a0, scale) a = Softmax<axis = -1>(a1) d = Identity(a)
    o0 = MatMul(d, v) o1 = Transpose<perm = [0, 2, 1, 3]>(o0)
    s5 = Shape(o1) n3 = Gather<axis = 0>(s5, zero) u5 = Unsqueeze(n3, first)
    s6 = Shape(o1) l3 = Gather<axis = 0>(s6, one) u6 = Unsqueeze(l3, first)
    join = Concat<axis = 0>(u5, u6, wide)
    o = Reshape(o1, join) w = Transpose(wo) y = MatMul(o, w)
}"""


def attention() -> Model:
    square = (64, 64)
    return parse(ATTENTION, normals(wq=square, wk=square, wv=square, wo=square))


def test_an_exported_attention_block_becomes_what_it_is() -> None:
    model = attention()
    result = slimmed(model)
    assert ops(result) == {"MatMul": 6, "Reshape": 4, "Transpose": 4, "Mul": 1, "Softmax": 1}
    assert result.nbytes() < model.nbytes() + 100
    for batch, length in ((2, 3), (1, 1), (3, 7)):
        same_outputs(model, result, feeds_for(model, batch=batch, size=length))


def test_parts_profit_from_each_other() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] c = {1, 4}> "
        "{ d = Dropout(c) e = Sqrt(d) f = Dropout(e) h = Neg(f) y = Div(x, h) }"
    )
    result = slimmed(model)
    assert ops(result) == {"Div": 1}
    same_outputs(model, result, exact=True)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_computations_of_shapes_stay_right_for_every_size(seed: int) -> None:
    program = Program(seed)
    model = program.model()
    # ONNX Runtime returns whatever is in memory for products over an axis without elements.
    empty = not any("MatMul" in line for line in program.lines)
    working = taken(model, [sized(free) for free in FREE if empty or 0 not in free])
    assume(working)
    result, _ = apply(Slim(), model)
    same_outputs(model, result, working[0][0], exact=True)
    found = taken(result, [feeds for feeds, _ in working])
    for (_, expected), (_, actual) in zip(working, found, strict=True):
        for name, value in expected.items():
            np.testing.assert_array_equal(actual[name], value, err_msg=name, strict=True)


def sized(free: tuple[int, int]) -> dict[str, Any]:
    """Inputs of a `Program` of these sizes."""
    batch, length = free
    x = np.arange(batch * length * 4, dtype=np.float32).reshape(batch, length, 4)
    return {"x": x, "z": np.ones((length, 4), np.float32)}


def test_parts_and_rules_can_be_left_out() -> None:
    model = attention()
    assert "Shape" in ops(slimmed(model, skip=("fold",)))
    assert "Identity" in ops(slimmed(model, skip=("eliminate",)))
    assert [part.name for part in Slim(skip=("fuse", "dead")).parts()] == [
        "inline",
        "unfuse",
        "fold",
        "eliminate",
        "dedupe",
    ]
    with pytest.raises(UsageError, match="no part or rule 'nonsense'"):
        Slim(skip=("nonsense",))


def test_single_rules_reach_their_part() -> None:
    first, second = eliminate.RULES[0].name, fuse.RULES[0].name
    parts = Slim(skip=(first, second)).parts()
    assert eliminate.Eliminate(skip=(first,)) in parts
    assert fuse.Fuse(skip=(second,)) in parts


def test_a_pipeline_accepts_it() -> None:
    result = Pipeline(Slim())(attention())
    (step,) = result.report.steps
    assert not step.error
    assert step.after.nodes < step.before.nodes / 2


def test_a_rule_that_makes_the_file_larger_is_left_out() -> None:
    model = parse("g (float[2,1,1,3] x) => (float[1,2,1,3] y) { y = Transpose<perm = [1,0,2,3]>(x) }")
    result, changes = apply(Slim(), model)
    assert ops(result) == {"Transpose": 1}
    assert "transpose-view" in {skip.node for skip in changes.skipped}
    assert ops(apply(Slim(max_growth=100), model)[0]) == {"Reshape": 1}


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem.removeprefix("light_"))
def test_models_whose_weights_are_computed_do_not_grow(path: Path) -> None:
    model = load(path)
    result = slimmed(model)
    assert result.to_proto().ByteSize() <= path.stat().st_size
    assert sum(ops(result).values()) < sum(ops(model).values())


def chain(blocks: int) -> Model:
    """Four nodes per block, of which one does nothing."""
    nodes = []
    for index in range(blocks):
        names = [f"x{index}", f"a{index}", f"b{index}", f"c{index}", f"x{index + 1}"]
        for step, op in enumerate(("Add", "Relu", "Identity", "Mul")):
            inputs = [names[step], *(["k"] if op == "Add" else [f"w{index}"] if op == "Mul" else [])]
            nodes.append(helper.make_node(op, inputs, [names[step + 1]], name=f"{op}_{index}"))
    weights = [
        numpy_helper.from_array(np.full(4, 2 + index, np.float32), f"w{index}") for index in range(blocks)
    ]
    weights.append(numpy_helper.from_array(np.ones(4, np.float32), "k"))
    ends = [helper.make_tensor_value_info(f"x{index}", TensorProto.FLOAT, ["N", 4]) for index in (0, blocks)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_nodes_in_a_row_take_work_in_proportion_and_no_recursion() -> None:
    small, large = chain(200), chain(800)
    calls = [calls_of(partial(Slim().run, model, Context())) for model in (small, large)]
    assert ops(large) == {"Add": 800, "Relu": 800, "Mul": 800}
    assert calls[1] < 4.4 * calls[0]


def test_ifs_in_ifs_need_no_recursion() -> None:
    depth = 25 if ONNX_RUNTIME >= RECENT else 8  # ONNX Runtime 1.23 takes twice as long with every level
    inner, made = "r = Neg(x)", "r"
    for level in range(depth):
        branches = (
            f"then_branch = t{level} () => (float[N] {made}) {{ {inner} }}, "
            f"else_branch = e{level} () => (float[N] q{level}) {{ q{level} = Relu(i{level}) }}"
        )
        made = f"z{level}"
        inner = f"i{level} = Identity(x) {made} = If(c) <{branches}>"
    model = parse(f"g (float[N] x, bool c) => (float[N] {made}) {{ {inner} }}")
    result = slimmed(model)
    assert ops(result) == {"If": depth, "Relu": depth, "Neg": 1}
    for flag in (True, False):
        same_outputs(model, result, feeds_for(model) | {"c": np.array(flag)})


# Peak memory of slimming a file and saving the result, in kilobytes; a process of its own, to see only that.
# getrusage would count what the process was before it became this one.
PEAK = """
import re, sys
from pathlib import Path
from onnxslim.ir.model import load
from onnxslim.passes.slim import Slim
from onnxslim.engine.base import Changes, Context
model = load(sys.argv[1])
assert Slim().run(model, Context())
model.save(sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc")
def test_weights_that_no_protobuf_holds_take_little_memory(tmp_path: Path) -> None:
    side, count = 8192, 8
    size = side * side * 4
    assert count * size > MAX_EMBEDDED_BYTES
    with (tmp_path / "weights").open("wb") as file:
        for index in range(count):
            file.seek(index * size)
            file.write(np.float32(index + 1).tobytes())
        file.truncate(count * size)
    nodes, weights = [], []
    for index in range(count):
        weight = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[side, side])
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", index * size), ("length", size)):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        nodes.append(helper.make_node("Identity", [f"x{index}"], [f"i{index}"]))
        nodes.append(helper.make_node("MatMul", [f"i{index}", f"w{index}"], [f"x{index + 1}"]))
    ends = [
        helper.make_tensor_value_info(f"x{index}", TensorProto.FLOAT, ["N", side]) for index in (0, count)
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    source = tmp_path / "model.onnx"
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out" / "model.onnx")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2 * size / 2**10 + 500_000


def noted() -> onnx.ModelProto:
    """A model with a note in every place where exporters leave one, and where people do."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (float[N,4] x, bool c) => (float[N,4] y)
        <float[4] w = {1,2,3,4}> { a = Add(x, w) b = Softmax<axis=1>(a) y = If(c) <
          then_branch = h () => (float[N,4] t) { k = Exp(b) t = Tanh(k) },
          else_branch = i () => (float[N,4] e) { e = Sin(b) }> }"""
    )
    then = next(item.g for item in model.graph.node[2].attribute if item.name == "then_branch")
    for node in (*model.graph.node, *then.node):
        node.doc_string = "in forward at model.py, line 12"
        node.metadata_props.add(key="namespace", value="encoder.layer")
    model.graph.node[1].attribute[0].doc_string = "axis"
    for graph, name in ((model.graph, "a"), (then, "k")):
        graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]))
    for kept in (model, model.graph, model.graph.input[0], model.graph.output[0]):
        kept.doc_string = "of a user"
    model.metadata_props.add(key="licence", value="of a user")
    return model


def test_notes_of_exporters_go_if_asked_and_those_of_users_stay() -> None:
    before = noted()
    assert Slim().run(plain := load(before), Context()) == Changes()
    assert plain.to_proto() == before, "never by default"
    after = Pipeline(Slim(drop_notes=True))(load(before)).model.to_proto()
    text = str(after)
    assert "line 12" not in text
    assert "encoder.layer" not in text
    assert "value_info" not in text
    assert '"axis"' not in text.replace('name: "axis"', "")
    assert text.count("of a user") == 5
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert after.graph.initializer == before.graph.initializer
    assert not Pipeline(Slim(drop_notes=True))(load(after)).report.steps[0].changes


def test_a_convolution_over_one_axis_needs_no_views_around_its_bias() -> None:
    """As Keras exports a chain of Conv1D."""
    text = """g (float[N,L,3] x) => (float[N,K,8] y) <int64[1] two = {2}>
    { t = Transpose<perm=[0,2,1]>(x) e = Unsqueeze(t, two) f = Conv(e, v) g = Squeeze(f, two)
      h = Transpose<perm=[0,2,1]>(g) i = Add(h, b) j = Relu(i) k = Transpose<perm=[0,2,1]>(j)
      l = Unsqueeze(k, two) m = Conv(l, w) n = Squeeze(m, two) y = Transpose<perm=[0,2,1]>(n) }"""
    model = parse(text, normals(v=(8, 3, 1, 3), w=(8, 8, 1, 3), b=(8,)))
    result = Pipeline(Slim())(model).model
    same_outputs(model, result, {"x": normals(x=(2, 9, 3))["x"]})
    assert [node.op for node in result.graph.nodes] == [
        "Transpose", "Unsqueeze", "Conv", "Relu", "Conv", "Squeeze", "Transpose"
    ]  # fmt: skip
    assert len(result.graph.nodes[2].inputs) == 3, "the bias is in the convolution"


def test_a_gate_whose_constants_take_more_than_its_nodes_stays() -> None:
    text = """g (float[N,4,6,6] x) => (float[N,4,6,6] y)
    { a = Conv(x, w, b) s = HardSigmoid<alpha=0.3>(a) m = Mul(s, x) t = Add(x, m) y = Relu(t) }"""
    model = parse(text, {"w": normal(4, 4, 1, 1), "b": normal(4)})
    slim, changes = apply(Slim(), model)
    assert len(slim.to_proto().SerializeToString()) <= len(model.to_proto().SerializeToString())
    assert reasons(changes)["gated-skip"] == "left out: the model would be larger for it"
    assert ops(apply(Slim(max_growth=100), model)[0])["Clip"] == 1
