"""Functions in the place of their calls: attributes, defaults, optional inputs, names and versions."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes.dedupe import Dedupe
from onnxslim.passes.inline import Inline
from onnxslim.passes.slim import Slim
from tests.helpers import ONNX_RUNTIME, RECENT, apply, ops, run, same_outputs, settled

HEADER = '<ir_version: 10, opset_import: ["" : 21, "own" : 1]>'


def model(graph: str, *functions: str, version: int = 21) -> Model:
    header = f'<domain: "own", opset_import: ["" : {version}, "own" : 1]>'
    return load(
        onnx.parser.parse_model("\n".join([HEADER, graph, *(f"{header} {each}" for each in functions)]))
    )


ELU = "elu <alpha: float = 0.5> (a) => (r) { r = Elu<alpha: float = @alpha>(a) }"
X = np.array([[-2, -1, 0, 3], [1, -5, 2, -0.5]], np.float32)


def inlined(before: Model, feeds: dict[str, Array] | None = None) -> Model:
    after, changes = apply(Inline(), before)
    assert changes
    assert not after.shell.functions
    same_outputs(before, after, feeds or {"x": X}, exact=True)
    return after


def test_attributes_are_those_of_the_call_or_the_defaults() -> None:
    after = inlined(
        model(
            "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = own.elu<alpha = 2.0>(x) z = own.elu(y) }",
            ELU,
        )
    )
    assert [node.attrs["alpha"] for node in after.nodes()] == [2.0, 0.5]


def test_an_attribute_without_value_or_default_is_the_operators_own() -> None:
    after = inlined(
        model(
            "g (float[N,4] x) => (float[N,4] y) { y = own.elu(x) }",
            ELU.replace("<alpha: float = 0.5>", "<alpha>"),
        )
    )
    (node,) = after.nodes()
    assert "alpha" not in node.attrs


def test_functions_in_functions_and_in_bodies() -> None:
    outer = "outer <alpha: float = 3.0> (a) => (r) { b = own.elu<alpha: float = @alpha>(a) r = own.elu(b) }"
    branches = """own.outer(x)
        t = If(c) <then_branch = yes () => (float[A,B] p) { a = own.outer(x) p = Neg(a) },
        else_branch = no () => (float[C,D] q) { q = own.elu(x) }>"""
    before = model(
        f"g (float[N,4] x, bool c) => (float[N,4] y, float[N,4] t) {{ y = {branches} }}", ELU, outer
    )
    for flag in (True, False):
        after = inlined(before, {"x": X, "c": np.array(flag)})
    assert ops(after) == {"Elu": 5, "Neg": 1, "If": 1}


def test_branches_inside_a_function() -> None:
    function = """pick <alpha: float = 0.5> (a, c) => (r) { s = Neg(a) r = If(c) <
        then_branch = yes () => (float[A,B] p) { t = Elu<alpha: float = @alpha>(s) p = Neg(t) },
        else_branch = no () => (float[C,D] q) { t = Abs(s) q = Neg(t) }> }"""
    text = "{ s = Exp(x) t = own.pick(s, c) y = own.pick<alpha = 2.0>(t, c) }"
    before = model(f"g (float[N,4] x, bool c) => (float[N,4] y) {text}", function)
    for flag in (True, False):
        after = inlined(before, {"x": X, "c": np.array(flag)})
    names = [tensor.name for node in after.nodes() for tensor in node.outputs]
    assert len(set(names)) == len(names)


def test_inputs_that_are_left_out() -> None:
    function = "limit (a, low, high) => (r) { r = Clip(a, low, high) }"
    text = "g (float[N,4] x) => (float[N,4] y, float[N,4] z) <float one = {1}> "
    after = inlined(model(text + "{ y = own.limit(x, , one) z = own.limit(x, one) }", function))
    first, second = after.nodes()
    assert [tensor.name for tensor in first.inputs] == ["x", "", "one"]
    assert [tensor.name for tensor in second.inputs] in (["x", "one", ""], ["x", "one"])


def test_outputs_that_are_left_out() -> None:
    # ONNX Runtime wants all of them.
    function = "two (a) => (r, s) { r = Exp(a) s = Neg(a) }"
    after, _ = apply(Inline(), model("g (float[N,4] x) => (float[N,4] y) { y = own.two(x) }", function))
    assert np.allclose(run(after, {"x": X})["y"], np.exp(X))


@pytest.mark.parametrize(
    "body", ["{ y = own.same(x) }", "{ a = Exp(x) y = own.same(a) }", "{ a = own.same(x) y = Exp(a) }"]
)
def test_what_comes_out_is_what_went_in(body: str) -> None:
    # ONNX Runtime does not run such a function.
    before = model(f"g (float[N,4] x) => (float[N,4] y) {body}", "same (a) => (a) { }")
    after, _ = apply(Inline(), before)
    expected = np.exp(X) if "Exp" in body else X
    assert np.allclose(run(after, {"x": X})["y"], expected)


def test_a_function_that_hides_an_operator() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }\n'
        '<domain: "", opset_import: ["" : 21]> Relu (a) => (r) { r = Neg(a) }'
    )
    after, _ = apply(Inline(), load(proto))
    assert ops(after) == {"Neg": 1}


def test_names_stay_apart() -> None:
    after = inlined(
        model(
            "g (float[N,4] x) => (float[N,4] y) { t = Exp(x) u = own.f(t) v = own.f(u) y = Add(v, t) }",
            "f (x) => (y) { t = Neg(x) y = Abs(t) }",
        )
    )
    names = [tensor.name for node in after.nodes() for tensor in node.outputs]
    assert len(set(names)) == len(names)


def test_another_version_of_an_operator_stays_in_its_function() -> None:
    text = "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = own.f(x) z = own.h(x) }"
    functions = ("f (a) => (r) { r = Elu(a) }", "h (a) => (r) { r = ReduceSum<keepdims = 1>(a) }")
    after, changes = apply(Inline(), model(text, *functions, version=11))
    assert ops(after) == {"h": 1, "Elu": 1}
    assert [item.name for item in after.shell.functions] == ["h"]
    assert any("ReduceSum is of opset 11" in skip.reason for skip in changes.skipped)


def test_operators_of_a_domain_only_the_function_imports() -> None:
    before = model(
        "g (float[N,4] x) => (float[N,4] y) { y = own.f(x) }", "f (a) => (r) { r = ai.onnx.ml.Normalizer(a) }"
    )
    before.shell.functions[0].opset_import.add(domain="ai.onnx.ml", version=3)
    after = inlined(before)
    assert after.opsets["ai.onnx.ml"] == 3


def test_slim_inlines_unless_the_model_grows() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) {{ {} }}"
    long = (
        "f (a) => (r) { "
        + " ".join(
            f"{b} = {op}({a})"
            for a, b, op in zip("abcde", "bcder", ["Exp", "Sin", "Cos", "Exp", "Abs"], strict=True)
        )
        + " }"
    )
    once, _ = apply(Slim(), model(text.format("y = own.f(x)"), long))
    assert not once.shell.functions
    often = " ".join(f"{a} = own.f({b})" for a, b in zip("abcdefy", "xabcdef", strict=True))
    before = model(text.format(often), long)
    after, changes = apply(Slim(), before)
    assert ops(after) == {"f": 7}
    assert any(skip.node == "inline" and "larger" in skip.reason for skip in changes.skipped)
    assert after.to_proto().ByteSize() <= before.to_proto().ByteSize()
    assert ops(apply(Slim(skip=("inline",)), model(text.format("y = own.f(x)"), long))[0]) == {"f": 1}


def test_in_a_pipeline() -> None:
    result = Pipeline(Slim())(model("g (float[N,4] x) => (float[N,4] y) { y = own.elu(x) }", ELU))
    assert not result.report.steps[0].error
    assert ops(result.model) == {"Elu": 1}


@pytest.mark.skipif(ONNX_RUNTIME < RECENT, reason="it runs the first function for all overloads")
def test_overloads_are_inlined_each_with_its_own_body() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17, "own" : 1]>
        g (float[2] x) => (float[2] y, float[2] z) { y = own.F(x) z = own.F(x) }
        <domain: "own", opset_import: ["" : 17]> F (a) => (b) { b = Exp(a) }
        <domain: "own", opset_import: ["" : 17]> F (a) => (b) { b = Neg(a) }"""
    )
    proto.functions[1].overload = proto.graph.node[1].overload = "second"
    called = load(proto)
    assert not apply(Dedupe(), called)[1]
    result, _ = settled(Inline(), called)
    assert [node.op for node in result.graph.nodes] == ["Exp", "Neg"]
