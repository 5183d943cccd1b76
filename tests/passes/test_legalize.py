"""Legalize: models in the operators of another opset, or in those that there are kernels for."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from onnxslim.engine.base import Context, Log
from onnxslim.engine.check import difference
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError, PassError, UsageError
from onnxslim.ir.model import DEFAULT_DOMAINS, Model, load
from onnxslim.ops import versions
from onnxslim.passes.legalize import Legalize, needed
from onnxslim.passes.opsets import raise_opset
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Recipe
from onnxslim.runtime.releases import release
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import FASHION, NETS, apply, feeds_for, normal, ops, parse, skip_if_opset_is_newer

X, Y = "float[N,4,4,4] x", "float[N,4,4,4] y"
THREE = "float[N,4,4,4] q, float[N,4,4,4] k, float[N,4,4,4] v"
# What ONNX Runtime 1.32 reads and has no kernel for: calls, inputs, outputs, opsets before and after.
LACKED = [
    ("y = SwiGLU(x, z)", f"{X}, float[N,4,4,4] z", Y, 28, 28),
    ("y = SwiGLU<alpha=1.5>(x, z)", f"{X}, float[N,4,4,4] z", Y, 28, 28),
    ("y = Swish(x)", X, Y, 28, 28),
    ("a = Relu(x) b = Swish<alpha=0.5>(a) y = Neg(b)", X, Y, 28, 28),
    ("y = QuantizeLinear(x, s)", f"{X}, float s", "uint8[N,4,4,4] y", 28, 27),
    ("y = DequantizeLinear(x, s)", "int8[N,4] x, float s", "float[N,4] y", 28, 27),
    (
        "y = RoiAlign<output_height=2, output_width=2>(x, r, b)",
        "float[2,2,8,8] x, float[2,4] r, int64[2] b",
        "float[2,2,2,2] y",
        22,
        21,
    ),
]
# Calls with what they read and make, and the opset they are of.
CALLS = [
    ("y = Swish<alpha=0.5>(x)", X, Y, 24),
    ("y = Gelu(x)", X, Y, 20),
    ('y = Gelu<approximate="tanh">(x)', X, Y, 20),
    ("y = HardSwish(x)", X, Y, 22),
    ("y = Mish(x)", X, Y, 22),
    ("y = Celu(x)", X, Y, 28),
    ("y = LayerNormalization(x, s, b)", f"{X}, float[4] s, float[4] b", Y, 17),
    ("y = LayerNormalization(x, s)", "double[N,4] x, double[4] s", "double[N,4] y", 17),
    ("y = LayerNormalization<axis=2>(x, s)", f"{X}, float[4,4] s", Y, 17),
    ("y, m, i = LayerNormalization(x, s)", f"{X}, float[4] s", f"{Y}, float[N,4,4,1] m", 17),
    ("y = GroupNormalization<num_groups=2>(x, s, b)", f"{X}, float[4] s, float[4] b", Y, 21),
    ("y = RMSNormalization(x, s)", f"{X}, float[4] s", Y, 23),
    ("y = RMSNormalization<axis=-2>(x, s)", f"{X}, float[4,4] s", Y, 23),
    ("y = RotaryEmbedding(x, c, s)", f"{X}, float[N,4,2] c, float[N,4,2] s", Y, 23),
    ("y = Attention(q, k, v)", THREE, Y, 25),
    ("y = Attention<is_causal=1>(q, k, v)", THREE, Y, 23),
    ("y = CastLike(x, z)", f"{X}, int32[1] z", "int32[N,4,4,4] y", 23),
    ("a = Shape<start=1, end=3>(x) b = Cast<to=1>(a) y = Mul(b, b)", X, "float[2] y", 19),
    ("a = Shape<start=-1>(x) y = Expand(z, a)", f"{X}, float[1] z", "float[4] y", 19),
    (
        "y, z = Split<axis=1, num_outputs=2>(x)",
        X,
        f"{Y}, float[N,2,4,4] z".replace("4,4,4] y", "2,4,4] y"),
        18,
    ),
    ("y, z = Split<axis=1, num_outputs=2>(x)", "float[N,5] x", "float[N,3] y, float[N,2] z", 18),
    (
        "a = Constant<value_ints=[1,3]>() y, z = Split<axis=1>(x, a)",
        X,
        "float[N,1,4,4] y, float[N,3,4,4] z",
        18,
    ),
    ("a = Constant<value_ints=[1]>() y = ReduceMean<keepdims=0>(x, a)", X, "float[N,4,4] y", 18),
    ("a = Constant<value_ints=[1]>() y = ReduceMax<noop_with_empty_axes=0>(x, a)", X, "float[N,1,4,4] y", 20),
    ("a = Constant<value_ints=[-1]>() y = ReduceSum(x, a)", X, "float[N,4,4,1] y", 13),
    ("a = Constant<value_ints=[0,0,-1]>() y = Reshape<allowzero=0>(x, a)", X, "float[N,4,16] y", 19),
    ("a = Constant<value_ints=[-1,16]>() y = Reshape<allowzero=1>(x, a)", X, "float[M,16] y", 14),
    ("a = Constant<value_float=2.0>() y = Mul(x, a)", X, Y, 17),
    ("y = Softmax<axis=1>(x)", X, Y, 13),
    ("y = LogSoftmax<axis=-2>(x)", X, Y, 13),
    (
        "a = Constant<value_ints=[2,-1]>() y = ReduceL2<noop_with_empty_axes=1>(x, a)",
        X,
        "float[N,4,1,1] y",
        18,
    ),
    ("a = Constant<value_ints=[0,-1]>() y = Unsqueeze(x, a)", "float[N,4] x", "float[1,N,4,1] y", 13),
    ("y = Softmax(x)", X, Y, 22),
    ("a = Constant<value_ints=[0,0,1,1,0,0,2,0]>() y = Pad(x, a)", X, "float[N,4,7,5] y", 21),
    (
        "a = Constant<value_ints=[1,2]>() b = Squeeze(x, a) y = Relu(b)",
        "float[N,1,1,4] x",
        "float[N,4] y",
        13,
    ),
    ("y = Dropout(x)", X, Y, 22),
    ("y = BatchNormalization(x, s, s, s, s)", f"{X}, float[4] s", Y, 15),
    ("y = Cast<to=11, saturate=1>(x)", X, "double[N,4,4,4] y", 19),
    ("y = AveragePool<kernel_shape=[2,2], ceil_mode=0>(x)", X, "float[N,4,3,3] y", 22),
    ("y = com.microsoft.BiasGelu(x, b)", f"{X}, float[4] b", Y, 20),
]
OLDER = (17, 13, 11)
NEWEST = onnx.defs.onnx_opset_version()


def of(call: str, inputs: str, outputs: str, opset: int) -> Model:
    if opset > NEWEST:
        pytest.skip(f"this onnx is older than opset {opset}")
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return parse(f"{text} g ({inputs}) => ({outputs}) {{ {call} }}")


def require_opset(model: Model, opset: int) -> None:
    """Every operator is there in that opset, and the checker finds nothing."""
    assert model.opset == opset
    for node in model.nodes():
        assert node.domain in DEFAULT_DOMAINS
        assert versions.since(node.op, opset), node.op
    onnx.checker.check_model(model.to_proto(), full_check=True)


@pytest.mark.parametrize(("call", "inputs", "outputs", "opset", "left"), LACKED)
def test_operators_without_kernels_run(call: str, inputs: str, outputs: str, opset: int, left: int) -> None:
    skip_if_opset_is_newer(opset)
    model = of(call, inputs, outputs, opset)
    with pytest.raises(LoadError, match="onnxslim legalize"):
        Session(model)
    result, changes = apply(Legalize(), model)
    assert changes
    assert result.opset == left
    feeds = feeds_for(model)
    expected, found = Session(model, Target.reference()).run(feeds), Session(result).run(feeds)
    assert difference(expected["y"], found["y"]) == ""


@pytest.mark.skipif(NEWEST < 28, reason="this onnx is older than opset 28")
def test_what_reads_structures_runs_in_an_older_opset() -> None:
    skip_if_opset_is_newer(28)
    model = parse(
        "g (optional(float[2]) x) => (bool y) { y = OptionalHasElement(x) }", opset=28, ir_version=13
    )
    with pytest.raises(LoadError, match="onnxslim legalize"):
        Session(model)
    result, _ = apply(Legalize(), model)
    assert result.opset == 27
    assert Session(result).run({"x": np.ones(2, np.float32)})["y"]


@pytest.mark.parametrize("older", OLDER)
@pytest.mark.parametrize(("call", "inputs", "outputs", "opset"), CALLS)
def test_older_opsets_compute_the_same(call: str, inputs: str, outputs: str, opset: int, older: int) -> None:
    model = of(call, inputs, outputs, opset)
    if older >= opset:
        return
    result = Pipeline(Legalize(opset=older), on_error="raise")(model)
    require_opset(result.model, older)
    # An ONNX Runtime that is older than the opset says so.
    assert all("is under development" in note for note in result.report.notes)
    assert [spec.shape for spec in result.model.inputs()] == [spec.shape for spec in model.inputs()]


def test_functions_of_the_standard_read_constants() -> None:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({X}) => ({Y})'
    model = parse(
        f"{text} {{ y = GroupNormalization<num_groups=2>(x, s, b) }}", {"s": normal(4), "b": normal(4)}
    )
    require_opset(Pipeline(Legalize(opset=13), on_error="raise")(model).model, 13)


@pytest.mark.parametrize(
    ("call", "opset", "newer"),
    [
        ("y = Relu(x)", 11, 22),
        ("y = ReduceMean<axes=[1]>(x)", 11, 22),
        ("a = Squeeze<axes=[1]>(z) y = Add(a, x)", 11, 13),
        ("y = Softmax<axis=1>(x)", 11, 17),
        ("y = BatchNormalization(x, s, s, s, s)", 11, 17),
    ],
)
def test_newer_opsets_compute_the_same(call: str, opset: int, newer: int) -> None:
    outputs = "float[N,1,4,4] y" if "Reduce" in call else Y
    model = of(call, f"{X}, float[4] s, float[N,1,4,4] z", outputs, opset)
    result = Pipeline(Legalize(opset=newer), on_error="raise")(model)
    require_opset(result.model, newer)
    assert not result.report.notes


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("name", NETS)
def test_networks_in_older_opsets(name: str, opset: int) -> None:
    result = Pipeline(Legalize(opset=opset), on_error="raise", count=False)(FASHION / f"{name}.onnx")
    require_opset(result.model, opset)
    assert not result.report.notes


@pytest.mark.parametrize(
    ("call", "inputs", "opset", "why"),
    [
        (
            "y = DequantizeLinear(x, s)",
            "int4[N,4] x, float s",
            21,
            r"node 'DequantizeLinear→y' \(DequantizeLinear\) has no form in opset 13: 'x' is int4, .* 21",
        ),
        (
            "y = BitwiseNot(x)",
            "uint8[N,4] x",
            18,
            r"\(BitwiseNot of opset 18\) has no form in opset 17: nothing",
        ),
        ("y = ReduceSum(x, z)", "float[N,4] x, int64[1] z", 18, None),
        ("y = ReduceMean(x, z)", "float[N,4] x, int64[1] z", 18, r"ReduceMean has no input 1 in opset 17"),
        (
            "y = AveragePool<kernel_shape=[2], dilations=[2]>(x)",
            "float[N,1,4] x",
            19,
            "no attribute 'dilations'",
        ),
        (
            "y = Reshape<allowzero=1>(x, z)",
            "float[N,4] x, int64[2] z",
            14,
            "a size of its target may be zero",
        ),
    ],
)
def test_what_an_older_opset_cannot_say_is_refused(
    call: str, inputs: str, opset: int, why: str | None
) -> None:
    kind = "uint8" if "uint8" in inputs else "float"
    model = of(call, inputs, f"{kind}[a,b] y" if "1,4" not in inputs else f"{kind}[a,b,c] y", opset)
    before = model.to_proto().SerializeToString()
    if why is None:
        assert Legalize(opset=13).run(model, Context())
        return
    with pytest.raises(PassError, match=why) as error:
        Legalize(opset=13).run(model, Context())
    assert "\n" not in str(error.value)
    assert model.to_proto().SerializeToString() == before


HEAD = '<ir_version: 10, opset_import: ["" : 20, "own" : 1]>'
FUNCTIONS = """
g (float[N,4] x) => (float[N,4] y) { a = own.plain(x) y = own.later(a) }
<domain: "own", opset_import: ["" : 20]> plain (x) => (y) { y = Relu(x) }
<domain: "own", opset_import: ["" : 20]> later (x) => (y) { y = Gelu(x) }
"""


def test_functions_stay_where_they_mean_the_same() -> None:
    text = HEAD + FUNCTIONS.replace("y = own.later(a)", "y = own.plain(a)")
    model = load(parser.parse_model(text[: text.index('<domain: "own", opset_import: ["" : 20]> later')]))
    result = Pipeline(Legalize(opset=13), on_error="raise")(model).model
    (kept,) = result.shell.functions
    assert ops(result) == {"plain": 2}
    assert [item.version for item in kept.opset_import] == [13]
    assert result.ir_version == 8


def test_functions_are_written_out_where_they_do_not() -> None:
    model = load(parser.parse_model(HEAD + FUNCTIONS))
    result = Pipeline(Legalize(opset=13), on_error="raise")(model).model
    require_opset(result, 13)
    assert "Erf" in ops(result)


def test_what_users_own_is_kept(tmp_path: Path) -> None:
    model = parse(
        "g (float[N,64] x, bool c) => (float[N,64] y) { a = MatMul(x, w) "
        "y = If(c) <then_branch = t () => (float[N,64] r) { r = Gelu(a) }, "
        "else_branch = e () => (float[N,64] r) { r = Relu(a) }> }",
        {"w": normal(64, 64)},
        opset=20,
        ir_version=10,
    )
    proto = model.to_proto()
    proto.metadata_props.add(key="mine", value="1")
    proto.doc_string, proto.producer_name = "a text", "somebody"
    proto.graph.node[1].doc_string = "of the branch"
    load(proto).save(tmp_path / "m.onnx", external_data=True)
    source = load(tmp_path / "m.onnx")
    result = Pipeline(Legalize(opset=13), on_error="raise")(source).model
    result.save(tmp_path / "n.onnx", external_data=True)
    again = onnx.load(tmp_path / "n.onnx", load_external_data=False)
    assert again.opset_import[0].version == 13
    assert (again.doc_string, again.producer_name) == ("a text", "somebody")
    assert again.metadata_props[0].key == "mine"
    assert again.graph.node[1].doc_string == "of the branch"
    assert list((tmp_path / "n.onnx.data").read_bytes()) == list(normal(64, 64).tobytes())
    assert "Erf" in ops(result)


def test_nothing_but_the_opset_changes_where_operators_stay_what_they_are() -> None:
    model = parse(
        "g (float[N,4] x) => (float[N,4] y) <float[4,4] w> { [a] h = MatMul(x, w) [b] y = Relu(h) }",
        {"w": normal(4, 4)},
        opset=11,
    )
    proto = model.to_proto()
    proto.graph.node[0].doc_string = "of the product"
    proto.graph.value_info.add(name="h").type.tensor_type.elem_type = 1
    proto.metadata_props.add(key="mine", value="1")
    raised = load(proto)
    assert raise_opset(raised, 17, Log()) is None
    expected = type(proto)()
    expected.CopyFrom(proto)
    expected.opset_import[0].version = 17
    assert raised.to_proto() == expected


CHAIN = [
    "{o} = Gelu({i})",
    "{o} = LayerNormalization({i}, s)",
    "{o} = Relu({i})",
    "{o} = Softmax<axis=1>({i})",
    "{o} = Mul({i}, s)",
    "a = Constant<value_ints=[1]>() m = ReduceMean(x, a) {o} = Sub({i}, m)",
]


@given(chain=st.lists(st.sampled_from(CHAIN), min_size=1, max_size=4, unique=True), older=st.integers(11, 20))
@settings(max_examples=15, deadline=None)
def test_legalizing_twice_is_legalizing_once(chain: list[str], older: int) -> None:
    names = ["x", *(f"t{index}" for index in range(1, len(chain))), "y"]
    body = " ".join(line.format(i=names[at], o=names[at + 1]) for at, line in enumerate(chain))
    model = of(body, f"{X}, float[4] s", Y, 20)
    once = model.copy()
    Legalize(opset=older).run(once, Context())
    assert once.opset == older
    feeds = feeds_for(model)
    expected, found = Session(model).run(feeds), Session(once).run(feeds)
    assert difference(expected["y"], found["y"], 10) == ""
    twice = once.copy()
    assert not Legalize(opset=older).run(twice, Context())
    assert twice.to_proto() == once.to_proto()


def test_other_defaults_are_seen_where_nothing_can_be_run() -> None:
    (node,) = of("y = Softmax(x)", X, Y, 13).graph.nodes
    assert versions.superfluous(node, 13, 12) == "Softmax has another 'axis' by default in opset 12"
    node.attrs["axis"] = 1
    assert versions.superfluous(node, 13, 12) == []
    (node,) = of("y = Cast<to=1, saturate=0>(x)", X, Y, 19).graph.nodes
    assert versions.superfluous(node, 19, 13) == "Cast has no attribute 'saturate' in opset 13"
    node.attrs["saturate"] = 1
    assert versions.superfluous(node, 19, 13) == ["saturate"]


def test_a_model_that_runs_is_left_alone() -> None:
    model = of("y = Swish(x)", X, Y, 24)
    assert not needed(model, Target.cpu())
    changes = Legalize().run(model, Context())
    assert not changes
    assert [skip.reason for skip in changes.skipped] == ["cpu has kernels for everything in it"]


def test_recipes_legalize_by_themselves() -> None:
    skip_if_opset_is_newer(28)
    model = of("a = Identity(x) y = Swish(a)", X, Y, 28)
    assert needed(model, Target.cpu()) == ["Swish→y"]
    outcome = Recipe(passes=(Slim(),)).run(model)
    assert [step.name for step in outcome.report.steps] == ["legalize", "slim"]
    assert (
        "cpu has no kernel for 'Swish→y': the model was legalized before anything else"
        in outcome.report.notes
    )
    assert outcome.report.steps[1].changes
    assert ops(outcome.model) == {"Sigmoid": 1, "Mul": 1}
    Session(outcome.model)
    asked = Recipe(passes=(Legalize(), Slim())).run(model)
    assert [step.name for step in asked.report.steps] == ["legalize", "slim"]
    assert asked.model.to_proto().graph == outcome.model.to_proto().graph


def test_releases_say_what_they_read() -> None:
    model = of("y = Gelu(x)", X, Y, 20)
    result, _ = apply(Legalize(onnxruntime="1.15"), model)
    assert (result.opset, result.ir_version) == (18, 8)
    changes = Legalize(onnxruntime="1.32").run(of("y = Relu(x)", X, Y, 17), Context())
    assert not changes
    assert [skip.reason for skip in changes.skipped] == ["it is of opset 17, which ONNX Runtime 1.32 reads"]
    assert release("1.20.1") == release("1.18")
    for word in ("1.3", "1.99", "2.0", "later"):
        with pytest.raises(UsageError, match=r"is not known, but of 1\.15 to"):
            Legalize(onnxruntime=word)
    with pytest.raises(UsageError, match="give one of them"):
        Legalize(onnxruntime="1.15", opset=13)
    with pytest.raises(UsageError, match="greater than or equal to 11"):
        Legalize(opset=9)


def test_types_that_numpy_lacks_are_compared() -> None:
    one = np.array([1.0, 2.0], ml_dtypes.float8_e5m2)
    assert difference(one, one) == ""
