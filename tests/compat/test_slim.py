"""What callers of PyPI's OnnxSlim pass, and what its command line takes."""

from __future__ import annotations

import csv
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxslim
from onnxslim import cli, passes
from onnxslim.compat import names as theirs
from onnxslim.compat import slim
from onnxslim.engine.base import Changes, Context, Log
from onnxslim.engine.check import difference
from onnxslim.errors import LoadError, UsageError, ValidationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes import eliminate
from onnxslim.runtime.session import Session
from onnxslim.utils import print_model_info_as_table, summarize_model
from tests.helpers import feeds_for, parse

# Two products of which the second adds a bias, with operators to drop before and between them.
CHAIN = """g (float[N,4] x) => (float[N,2] y)
<float[4,3] v = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}> {
  i = Identity(x)  h = MatMul(i, v)  r = Relu(h)  p = MatMul(r, w)  y = Add(p, b) }"""
IMAGE = """g (float[N,3,H,W] x, float[N] s) => (float[N,K] y, float[N] t)
{ m = Shape(x)  one = Constant<value_ints=[1]>()  two = Constant<value_ints=[-1]>()
  z = Constant<value_ints=[0]>()  n = Slice(m, z, one)  k = Concat<axis=0>(n, two)
  r = Reshape(x, k)  y = Relu(r)  t = Abs(s) }"""
TWO_INPUTS = """g (float[N] a, float[N] b) => (float[N] y) { s = Relu(a)  t = Abs(b)  y = Add(s, t) }"""


def proto(text: str) -> onnx.ModelProto:
    return parse(text).to_proto()


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def sizes(info: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_value or dim.dim_param for dim in info.type.tensor_type.shape.dim]


def names(infos: Sequence[onnx.ValueInfoProto]) -> list[str]:
    return [info.name for info in infos]


def assert_same(first: onnx.ModelProto, second: onnx.ModelProto, feeds: Mapping[str, Array]) -> None:
    expected, actual = Session(first, optimize="none").run(feeds), Session(second, optimize="none").run(feeds)
    assert {name: difference(value, actual[name]) for name, value in expected.items()} == dict.fromkeys(
        expected, ""
    )


X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4) - 3}


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slim computes something else and nobody notices."""

    def run(self: passes.Slim, model: Model, ctx: Context) -> Changes:
        for constant in model.constants():
            constant.values = constant.values + 1
        log = Log()
        log.change("v", "spoilt")
        return log.done()

    monkeypatch.setattr(passes.Slim, "run", run)
    monkeypatch.setattr("onnxslim.engine.check.Checker.__call__", lambda *_, **__: None)


# --------------------------------------------------------------------------------- callers there are today


def test_as_ultralytics_calls_it() -> None:
    model = proto(CHAIN)
    model.metadata_props.add(key="stride", value="32")
    before = model.SerializeToString(deterministic=True)
    made = onnxslim.slim(model)
    assert model.SerializeToString(deterministic=True) == before
    assert isinstance(made, onnx.ModelProto)
    assert "Identity" not in ops(made)
    assert [(item.key, item.value) for item in made.metadata_props] == [("stride", "32")]
    assert_same(model, made, X)
    onnx.checker.check_model(made, full_check=True)


def test_as_nvidia_calls_it() -> None:
    model = proto(CHAIN)
    assert ops(onnxslim.slim(model))["Gemm"] == 1
    made = onnxslim.slim(model, skip_fusion_patterns=["FusionGemm"])
    assert ops(made) == {"MatMul": 2, "Relu": 1, "Add": 1}


def test_from_file_to_file_with_fixed_shapes_and_a_check(tmp_path: Path) -> None:
    source, target = str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")
    onnx.save(proto(IMAGE), source)
    made = onnxslim.slim(source, target, input_shapes=["x:2,3,4,5", "s:2"], model_check=True)
    assert made == onnx.load(target)
    assert sizes(made.graph.input[0]) == [2, 3, 4, 5]
    assert [sizes(out) for out in made.graph.output] == [[2, 60], [2]]
    assert ops(made) == {"Reshape": 1, "Relu": 1, "Abs": 1}


def test_summaries_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    load(proto(CHAIN)).save(tmp_path / "chain.onnx")
    first = summarize_model(str(tmp_path / "chain.onnx"))
    second = summarize_model(onnxslim.slim(proto(CHAIN)), "slimmed")
    assert (first.tag, first.op_set, first.ir_version) == ("chain.onnx", "17", "8")
    assert first.op_type_counts == {"Identity": 1, "MatMul": 2, "Relu": 1, "Add": 1}
    assert first.op_info["MatMul→h"].op == "MatMul"
    assert first.op_info["MatMul→h"].outputs[0].shape == ("N", 3)
    assert first.input_maps["x"].shape == ("N", 4)
    assert first.output_info[0].dtype == np.float32
    assert 0 < second.model_size < first.model_size < 1000
    print_model_info_as_table([first, second], 1.5)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Identity", "1", "0"] in rows
    assert ["Model", "Name", "chain.onnx", "slimmed"] in rows
    assert ["Elapsed", "Time", "1.50", "s"] in rows


def test_every_argument_of_theirs_is_there() -> None:
    known = list(inspect.signature(onnxslim.slim).parameters)
    assert known[:2] == ["model", "output_model"]
    wanted = "model_check input_shapes inputs outputs no_shape_infer skip_optimizations skip_fusion_patterns "
    wanted += "size_threshold dtype save_as_external_data model_check_inputs verbose inspect dump_to_disk"
    assert set(known[2:-1]) == set(wanted.split())


# -------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_shape": ["x:1,4"]}, "no argument 'input_shape'; did you mean 'input_shapes'?"),
        ({"zzz": 1}, "no argument 'zzz'; known are: output_model"),
        ({"dtype": "int8"}, "there is no dtype 'int8'; known are: fp16, fp32"),
        ({"size_threshold": -1}, "size_threshold -1"),
        ({"skip_optimizations": ["constant_fold"]}, "did you mean 'constant_folding'?"),
        ({"skip_fusion_patterns": ["layer-aritmetic"]}, "did you mean 'layer-arithmetic'?"),
        ({"input_shapes": ["X:1,4"]}, "there is no input 'X'; known are: x"),
        ({"input_shapes": ["x:1,4,1"]}, "the input has 2 axes, not 3"),
        ({"input_shapes": ["x:N,4"]}, "not of the form"),
        ({"input_shapes": ["x:-1,4"]}, "sizes are not negative"),
        ({"outputs": ["hh"]}, "there is no tensor 'hh'"),
        ({"outputs": ["h:int4"]}, "there is no type 'int4'; known are: fp16, fp32, int32, bool"),
        ({"outputs": ["h:int32"]}, "tensor 'h' is of type float32, not int32"),
        ({"model_check_inputs": ["x:none.npy"]}, "'none.npy' is not an .npy file"),
        ({"dump_to_disk": True}, "works only together with inspect"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        onnxslim.slim(proto(CHAIN), **given)
    assert message in str(caught.value)


def test_a_failed_check_raises_and_saves_nothing(wrong: None, tmp_path: Path) -> None:
    assert onnxslim.slim(proto(CHAIN)).graph.node
    with pytest.raises(ValidationError, match="model_check: output 'y' differs"):
        onnxslim.slim(proto(CHAIN), tmp_path / "out.onnx", model_check=True)
    assert not list(tmp_path.iterdir())


def test_a_check_without_inputs_to_run_on_raises() -> None:
    # Sizes nobody would guess.
    model = proto("""g (float[N,M] x) => (float[19,23] y) <int64[2] s = {19, 23}> { y = Reshape(x, s) }""")
    with pytest.raises(ValidationError, match="give model_check_inputs"):
        onnxslim.slim(model, model_check=True)
    onnxslim.slim(model, model_check=True, model_check_inputs=["x:19,23"])
    with pytest.raises(LoadError, match="fails to run"):
        onnxslim.slim(model, model_check=True, model_check_inputs=["x:19,22"])


# ------------------------------------------------------------------------------------- shapes and checks


def test_free_axes_stay_symbols_where_other_inputs_have_them() -> None:
    made = onnxslim.slim(proto(IMAGE), input_shapes=["x:2,3,4,5"])
    assert [sizes(info) for info in made.graph.input] == [[2, 3, 4, 5], ["N"]]
    assert [sizes(out) for out in made.graph.output] == [[2, 60], ["N"]]


def test_stale_shapes_are_forgotten() -> None:
    model = proto("""g (float[2,4] x) => (float[2,4] y) { h = Abs(x)  y = Relu(h) }""")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("h", 1, [2, 4]))
    made = onnxslim.slim(model, input_shapes=["x:3,5"])
    assert sizes(made.graph.output[0]) == [3, 5]
    assert [sizes(info) for info in made.graph.value_info] == [[3, 5]]
    assert sizes(model.graph.output[0]) == [2, 4]
    onnx.checker.check_model(made, full_check=True)


def test_output_shapes_stay_open_when_asked() -> None:
    made = onnxslim.slim(proto(IMAGE), input_shapes=["x:2,3,4,5"], no_shape_infer=True)
    assert [sizes(out) for out in made.graph.output] == [["", ""], [""]]
    onnx.checker.check_model(made, full_check=True)


def test_check_inputs_bind_the_sizes_of_the_others(tmp_path: Path) -> None:
    model = load(proto(IMAGE))
    np.save(tmp_path / "x.npy", np.ones((5, 3, 2, 2), np.float32))
    feeds = slim.check_inputs(model, [f"x:{tmp_path / 'x.npy'}"])
    assert feeds["x"].sum() == 60
    assert feeds["s"].shape == (5,)
    assert slim.check_inputs(model, ["x:2,3,4,5"])["x"].shape == (2, 3, 4, 5)
    assert slim.check_inputs(model, ["s:7"])["x"].shape == (7, 3, 1, 1)


def test_names_with_colons() -> None:
    model = proto(CHAIN)
    model.graph.input[0].name = model.graph.node[0].input[0] = "x:0"
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "h:0"
    made = onnxslim.slim(model, input_shapes=["x:0:1,4"], outputs=["h:0"], model_check=True)
    assert sizes(made.graph.input[0]) == [1, 4]
    assert names(made.graph.output) == ["h:0"]
    assert names(onnxslim.slim(model, outputs=["h:0:fp32"]).graph.output) == ["h:0"]


# ---------------------------------------------------------------------------------------------- cutting


def test_cut_at_outputs() -> None:
    model = proto(CHAIN)
    made = onnxslim.slim(model, outputs=["r", "h"], model_check=True)
    assert ops(made) == {"MatMul": 1, "Relu": 1}
    assert [(out.name, sizes(out)) for out in made.graph.output] == [("r", ["N", 3]), ("h", ["N", 3])]
    assert len(made.graph.initializer) == 1
    onnx.checker.check_model(made, full_check=True)
    product = X["x"] @ np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(Session(made).run(X)["h"], product)


def test_cut_at_inputs() -> None:
    made = onnxslim.slim(proto(CHAIN), inputs=["r"], model_check=True)
    assert [(info.name, sizes(info)) for info in made.graph.input] == [("r", ["N", 3])]
    assert ops(made) == {"Gemm": 1}
    assert not made.graph.value_info
    onnx.checker.check_model(made, full_check=True)


def test_declarations_that_are_wrong_do_not_spoil_a_part() -> None:
    model = proto(
        """g (float[N,4] x) => (float[N,2,2] y) <int64[3] t = {0, 2, 2}>
        { h = Abs(x)  r = Relu(h)  y = Reshape(r, t) }"""
    )
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("h", 1, [0, 4]))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("r", 1, [0, 4]))
    made = onnxslim.slim(model, inputs=["h"], model_check=True)
    assert sizes(made.graph.input[0]) == ["N", 4]
    onnx.checker.check_model(made, full_check=True)
    assert Session(made).run({"h": np.ones((3, 4), np.float32)})["y"].shape == (3, 2, 2)


def test_inputs_come_in_the_order_asked_for() -> None:
    made = onnxslim.slim(proto(TWO_INPUTS), inputs=["t", "a"])
    assert names(made.graph.input) == ["t", "a"]
    feeds = {"t": np.ones(2, np.float32), "a": np.array([-1, 1], np.float32)}
    assert Session(made).run(feeds)["y"].tolist() == [1, 2]


def test_inputs_the_outputs_do_not_need_are_dropped() -> None:
    assert names(onnxslim.slim(proto(TWO_INPUTS), outputs=["t"]).graph.input) == ["b"]
    # One that nothing ever needed was there on purpose.
    idle = "g (float[N] a, float[N] b) => (float[N] y) { h = Abs(a)  y = Relu(h) }"
    assert names(onnxslim.slim(proto(idle), outputs=["h"]).graph.input) == ["a", "b"]


def test_inputs_that_are_still_needed_are_missed() -> None:
    with pytest.raises(UsageError, match="also depend on input 'b'"):
        onnxslim.slim(proto(TWO_INPUTS), inputs=["s"])
    assert names(onnxslim.slim(proto(TWO_INPUTS), inputs=["s", "b"]).graph.input) == ["s", "b"]


def test_cut_where_a_body_reads() -> None:
    model = proto(
        """g (float[N] x, bool c) => (float[N] y) { h = Abs(x)
        y = If(c) <then_branch = t () => (float[N] p) { p = Relu(h) },
                   else_branch = e () => (float[N] q) { q = Neg(h) }> }"""
    )
    made = onnxslim.slim(model, inputs=["h", "c"], model_check=True)
    assert names(made.graph.input) == ["h", "c"]
    feeds = {"h": np.array([-1, 1], np.float32), "c": np.array(True)}
    assert Session(made).run(feeds)["y"].tolist() == [0, 1]


def test_cut_at_one_of_the_outputs_of_a_node() -> None:
    model = proto("g (float[4] x) => (float[2] y) { a, b = Split<axis=0>(x)  y = Sub(a, b) }")
    made = onnxslim.slim(model, inputs=["a", "x"], model_check=True)
    onnx.checker.check_model(made, full_check=True)
    feeds = {"a": np.ones(2, np.float32), "x": np.arange(4, dtype=np.float32)}
    assert Session(made).run(feeds)["y"].tolist() == [-1, -2]


def test_a_weight_may_become_an_input() -> None:
    made = onnxslim.slim(proto(CHAIN), inputs=["x", "v"])
    assert [sizes(info) for info in made.graph.input] == [["N", 4], [4, 3]]
    assert_same(made, made, {**X, "v": np.ones((4, 3), np.float32)})
    assert "v" not in [tensor.name for tensor in made.graph.initializer]


def test_an_untyped_tensor_needs_a_type() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N] x) => (float[N] y) { h = own.Op(x)  y = Relu(h) }"""
    with pytest.raises(UsageError, match="the type of tensor 'h' is not known; add it, as in h:fp32"):
        onnxslim.slim(proto(text), outputs=["h"])
    made = onnxslim.slim(proto(text), inputs=["h:fp32"])
    assert made.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert "Op" not in ops(made)


# ------------------------------------------------------------------------------------- what is left out


def test_all_names_to_skip_mean_rules_there_are() -> None:
    for mapping in (theirs.PATTERNS, theirs.OPTIMIZATIONS):
        for rules in mapping.values():
            passes.Slim(skip=rules)


def test_every_rule_belongs_to_one_optimization() -> None:
    counts = Counter(
        rule for name in ("graph_fusion", "dead_node_elimination") for rule in theirs.OPTIMIZATIONS[name]
    )
    assert counts == dict.fromkeys(("fuse", "dead", *(rule.name for rule in eliminate.RULES)), 1)


# Each with operators that only this optimization changes, and how many are left without and with it.
OPTIMIZED = {
    "constant_folding": (
        "g (float[2] x) => (float[2] y) <float[2] c = {1, 2}> { d = Sqrt(c) y = Mul(x, d) }",
        "Sqrt",
    ),
    "graph_fusion": (
        """g (float[2,3,4] x) => (float[4,2,3] y)
        { h = Transpose<perm=[0,2,1]>(x)  y = Transpose<perm=[1,0,2]>(h) }""",
        "Transpose",
    ),
    "dead_node_elimination": ("g (float[2] x) => (float[2] y) { h = Identity(x) y = Relu(h) }", "Identity"),
    "subexpression_elimination": (
        "g (float[2] x) => (float[2] y) { a = Sin(x) b = Sin(x) y = Mul(a, b) }",
        "Sin",
    ),
}


@pytest.mark.parametrize("name", OPTIMIZED)
def test_optimizations_can_be_skipped(name: str) -> None:
    text, op = OPTIMIZED[name]
    model = proto(text)
    assert ops(onnxslim.slim(model))[op] < ops(model)[op]
    assert ops(onnxslim.slim(model, skip_optimizations=[name]))[op] == ops(model)[op]
    assert onnxslim.slim(model, skip_optimizations=list(theirs.OPTIMIZATIONS)) == load(model).to_proto()


def test_weights_are_not_tied_when_asked() -> None:
    model = proto(
        """g (float[4] x) => (float[4] y) <float[4] a = {1,2,3,4}, float[4] b = {1,2,3,4}>
        { p = Mul(x, a)  q = Pow(p, b)  y = Relu(q) }"""
    )
    assert len(onnxslim.slim(model).graph.initializer) == 1
    assert len(onnxslim.slim(model, skip_optimizations=["weight_tying"]).graph.initializer) == 2


@pytest.mark.parametrize(
    ("pattern", "text", "op"),
    [
        ("FusionGemm", CHAIN, "Add"),
        ("matmul-arithmetic", CHAIN, "Add"),
        ("FusionConvBN", "BatchNormalization", "BatchNormalization"),
        ("FusionPadConv", "Pad", "Pad"),
    ],
)
def test_patterns_can_be_skipped(pattern: str, text: str, op: str) -> None:
    model = proto(text) if text == CHAIN else _convolution(text)
    assert ops(onnxslim.slim(model))[op] == 0
    assert ops(onnxslim.slim(model, skip_fusion_patterns=[pattern]))[op] == 1


def _convolution(neighbour: str) -> onnx.ModelProto:
    if neighbour == "Pad":
        constants: dict[str, Array] = {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
        body = "h = Pad(x, p)  y = Conv(h, w)"
    else:
        constants = {name: np.full(2, index + 1, np.float32) for index, name in enumerate("smbv")}
        body = "h = Conv(x, w)  y = BatchNormalization(h, s, m, b, v)"
    constants["w"] = np.ones((2, 1, 3, 3), np.float32)
    return parse(f"g (float[1,1,8,8] x) => (float[1,2,H,W] y) {{ {body} }}", constants).to_proto()


def test_patterns_without_counterpart_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    asked = slim.Request(skip_fusion_patterns=("FusionReduce", "FusionOfTomorrow", "FusionConvBN"))
    with caplog.at_level(logging.WARNING, "onnxslim"):
        report = asked.run(load(proto(CHAIN))).report
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2
    assert "'FusionOfTomorrow' has no counterpart" in logged[1]
    assert tuple(logged) == report.notes[-2:]
    assert "FusionReduce" in str(report)


def test_folding_may_grow_up_to_the_threshold() -> None:
    model = proto(
        """g (float[1000] x) => (float[1000] y)
        { s = Constant<value_ints=[1000]>()  c = Constant<value_float=2.0>()  e = Expand(c, s)  q = Sqrt(e)
          y = Pow(x, q) }"""
    )
    assert ops(onnxslim.slim(model))["Sqrt"] == 1
    assert ops(onnxslim.slim(model, size_threshold=100))["Sqrt"] == 1
    assert ops(onnxslim.slim(model, size_threshold=10_000)) == {"Pow": 1}


# ------------------------------------------------------------------------------ saving, seeing, inspecting


def test_external_data_when_asked(tmp_path: Path) -> None:
    model = parse(
        "g (float[512] x, float[512] w) => (float[512] y) { y = Mul(x, w) }",
        {"w": np.arange(512, dtype=np.float32)},
    ).to_proto()
    made = onnxslim.slim(model, tmp_path / "out.onnx", save_as_external_data=True)
    assert (tmp_path / "out.onnx.data").stat().st_size == 2048
    assert made == onnx.load(tmp_path / "out.onnx") or len(made.graph.initializer[0].raw_data) == 2048
    assert not made.graph.initializer[0].external_data


def test_a_result_too_large_for_one_protobuf_refers_to_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = parse(
        "g (float[512] x, float[512] w) => (float[512] y) { y = Mul(x, w) }",
        {"w": np.arange(512, dtype=np.float32)},
    ).to_proto()
    monkeypatch.setattr("onnxslim.ir.files.MAX_EMBEDDED_BYTES", 1000)
    made = onnxslim.slim(model, tmp_path / "out.onnx")
    assert made.graph.initializer[0].external_data[0].value == "out.onnx.data"


def test_verbose_tells_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("onnxslim")
    try:
        onnxslim.slim(proto(CHAIN), verbose=True)
    finally:
        logger.setLevel(logging.NOTSET)
    messages = [record.getMessage() for record in caplog.records]
    assert any("removed Identity" in message for message in messages)
    assert any("nodes" in message for message in messages)


def test_inspecting_prints_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.onnx").write_bytes(proto(CHAIN).SerializeToString())
    made = onnxslim.slim("a.onnx", inspect=True, dump_to_disk=True)
    assert ops(made)["Identity"] == 1
    assert "Identity" in capsys.readouterr().out
    with open("a.onnx_model_info.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "NodeName": "MatMul→h",
        "OpType": "MatMul",
        "OutputDtype": "float32",
        "OutputShape": "('N', 3)",
    }
    assert len(rows) == 5
    onnxslim.slim(["a.onnx", proto(TWO_INPUTS)])
    assert "OnnxModel" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in a folder with `chain.onnx`, `two.onnx` and `image.onnx`."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("chain", CHAIN), ("two", TWO_INPUTS), ("image", IMAGE)):
        Path(f"{name}.onnx").write_bytes(proto(text).SerializeToString())

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


Run = Callable[..., tuple[int, str, str]]


def test_command_line_of_theirs(run: Run) -> None:
    words = (
        "image.onnx out.onnx --input-shapes x:2,3,4,5 s:2 --model-check --model-check-inputs s:2 x:2,3,4,5"
    )
    assert run(*words.split())[0] == 0
    made = onnx.load("out.onnx")
    assert [sizes(info) for info in made.graph.input] == [[2, 3, 4, 5], [2]]


def test_command_line_cuts(run: Run) -> None:
    assert (
        run("two.onnx", "out.onnx", "--inputs", "t", "s:fp32", "--outputs", "y", "--save-as-external-data")[0]
        == 0
    )
    assert names(onnx.load("out.onnx").graph.input) == ["t", "s"]
    # The word before another option belongs to it, and one value may follow an equals sign.
    assert run("slim", "--outputs=t", "two.onnx", "out.onnx", "--no-shape-infer", "--verbose")[0] == 0
    assert names(onnx.load("out.onnx").graph.input) == ["b"]


def test_command_line_skips(run: Run) -> None:
    words = "--size-threshold 5 --skip-optimizations dead_node_elimination weight_tying --skip fold "
    words += "--skip-fusion-patterns FusionGemm FusionReduce"
    code, out, err = run("chain.onnx", "out.onnx", *words.split())
    assert code == 0
    assert "FusionReduce" in out
    assert "onnxslim: warning: fusion pattern 'FusionReduce' has no counterpart" in err
    assert ops(onnx.load("out.onnx")) == ops(proto(CHAIN))
    assert run("chain.onnx", "out.onnx", "--skip-optimizations", "all")[0] == 2


def test_command_line_fails_when_the_check_does(run: Run, wrong: None) -> None:
    code, _, err = run("chain.onnx", "out.onnx", "--model-check")
    assert code == 4
    assert "output 'y' differs" in err
    assert not Path("out.onnx").exists()


def test_command_line_refuses_what_is_not_there(run: Run) -> None:
    code, _, err = run("chain.onnx", "out.onnx", "--dtype", "int8")
    assert code == 2
    assert "known are: fp16, fp32" in err
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    "words",
    [
        "inspect chain.onnx two.onnx --dump-to-disk",
        "chain.onnx two.onnx --inspect --dump-to-disk",
        "--inspect --dump-to-disk chain.onnx two.onnx",
        "slim --inspect chain.onnx two.onnx --dump-to-disk",
    ],
)
def test_command_line_inspects(run: Run, words: str) -> None:
    code, out, _ = run(*words.split())
    assert code == 0
    assert ["Model", "Name", "chain.onnx", "two.onnx"] in [line.split() for line in out.splitlines()]
    assert Path("two.onnx_model_info.csv").is_file()
    assert ops(onnx.load("two.onnx")) == ops(proto(TWO_INPUTS))


def test_short_version(run: Run) -> None:
    assert run("-v") == run("--version")
    assert run("-v")[0] == 0


def test_two_owners_of_the_name_are_told_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "both install" not in run("chain.onnx", "out.onnx")[2]
    owners = {"onnxslim": ["onnxslim", "onnx-slimkit", "onnx-slimkit"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: owners)
    lines = [line for line in run("chain.onnx", "out.onnx")[2].splitlines() if "both install" in line]
    assert len(lines) == 1
    assert "onnx-slimkit and onnxslim both" in lines[0]


def test_half_precision_and_back() -> None:
    model = proto(
        """g (float[N,4] x) => (float[N,3] y)
        <float[4,3] w = {0,1,2,3,4,5,6,7,8,9,10,11}, float[3] b = {1,1,1}, float one = {1}>
        { p = MatMul(x, w) q = Add(p, b) r = Cast<to=10>(q) s = Cast<to=1>(r) y = Add(s, one) }"""
    )
    half = onnxslim.slim(model, dtype="fp16")
    assert {info.type.tensor_type.elem_type for info in (*half.graph.input, *half.graph.output)} == {10}
    assert all(tensor.data_type == 10 for tensor in half.graph.initializer)
    single = onnxslim.slim(half, dtype="fp32")
    assert {info.type.tensor_type.elem_type for info in (*single.graph.input, *single.graph.output)} == {1}
    assert "Cast" not in ops(single)
    expected = X["x"] @ np.arange(12).reshape(4, 3) + 2
    for made, kind in ((half, np.float16), (single, np.float32)):
        actual = Session(made).run({"x": X["x"].astype(kind)})["y"]
        assert actual.dtype == kind
        assert np.allclose(actual, expected, rtol=1e-3)
    assert model.graph.input[0].type.tensor_type.elem_type == 1


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("g (float[N,4] x) => (float[N,4] x) { z = Neg(x) }", {}),
        ("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Neg(x) z = Exp(y) }", {"Neg": 1, "Exp": 1}),
        ("g (float[N,4] x) => (float[N,4] y) <float big = {1e9}> { a = Neg(x) y = Min(a, big) }", {"Min": 1}),
        ("g (float[N,4] x, bool c) => (float[A,B] y) { y = If(c)<then_branch = t () => (float[N,4] u)"
         "{ u = Neg(x) }, else_branch = e () => (float[N,4] v) { v = Abs(x) }> }", {"If": 1}),
        ("g (float[N,4] x, int64[N,4] i) => (int64[N,4] j, float[N,4] y) { j = Neg(i) y = Identity(x) }", {}),
    ],
)  # fmt: skip
def test_half_precision_of_odd_interfaces(text: str, left: dict[str, int]) -> None:
    model = proto(text)
    made = onnxslim.slim(model, dtype="fp16")
    kinds = {1: 10}
    for before, after in ((model.graph.input, made.graph.input), (model.graph.output, made.graph.output)):
        types = [(item.name, item.type.tensor_type.elem_type) for item in before]
        wanted = [(name, kinds.get(kind, kind)) for name, kind in types]
        assert [(item.name, item.type.tensor_type.elem_type) for item in after] == wanted
    assert left.items() <= ops(made).items()
    feeds = feeds_for(load(model), batch=2)
    expected = Session(model).run(feeds)
    halves = {
        key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in feeds.items()
    }
    for key, value in Session(made).run(halves).items():
        assert np.allclose(value, expected[key], rtol=1e-2, atol=1e-2)


def test_equal_nodes_and_equal_weights_are_skipped_one_by_one() -> None:
    model = proto(
        """g (float[4] x) => (float[4] y) <float[4] a = {1,2,3,4}, float[4] b = {1,2,3,4}>
        { p = Exp(x) q = Exp(x) r = Mul(p, a) s = Pow(q, b) y = Add(r, s) }"""
    )
    neither, nodes, weights = (
        onnxslim.slim(model, skip_optimizations=skipped)
        for skipped in ([], ["subexpression_elimination"], ["weight_tying"])
    )
    assert (ops(neither)["Exp"], len(neither.graph.initializer)) == (1, 1)
    assert (ops(nodes)["Exp"], len(nodes.graph.initializer)) == (2, 1)
    assert (ops(weights)["Exp"], len(weights.graph.initializer)) == (1, 2)


def test_the_pattern_of_gemms_leaves_convolutions_alone() -> None:
    model = _convolution("BatchNormalization")
    assert ops(onnxslim.slim(model, skip_fusion_patterns=["FusionGemm"]))["BatchNormalization"] == 0
