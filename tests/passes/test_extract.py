"""What the model is: cut out of a larger one, of fixed sizes, in single precision."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxslim import passes
from onnxslim.engine.base import Changes, Context, InterfacePart, Log, Pass, options
from onnxslim.engine.check import interface
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError, PassError, UsageError
from onnxslim.ir.model import Model
from onnxslim.passes.extract import Extract
from onnxslim.passes.half import Half
from onnxslim.passes.shapes import FixShapes
from onnxslim.passes.single import Single
from onnxslim.passes.slim import Slim
from onnxslim.runtime.session import Session
from tests.helpers import apply, ops, parse, run

CHAIN = """g (float[N,4] x, float[N,4] s) => (float[N,4] y)
<float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>
{ i = Identity(x) h = MatMul(i, w) a = Add(h, s) r = Relu(a) t = Identity(r) y = Neg(t) }"""


@pytest.fixture
def chain() -> Model:
    return parse(CHAIN)


def ends(model: Model) -> tuple[list[str], list[str]]:
    return [tensor.name for tensor in model.graph.inputs], [tensor.name for tensor in model.graph.outputs]


def test_what_is_cut_out_computes_what_it_did_inside(chain: Model) -> None:
    part, changes = apply(Extract(inputs=("h", "s"), outputs=("r", "a")), chain)
    assert ends(part) == (["h", "s"], ["r", "a"])
    assert [change.node for change in changes.changed] == ["h", "s", "r", "a"]
    x, s = np.ones((2, 4), np.float32), np.full((2, 4), -50, np.float32)
    inner = apply(Extract(outputs=("h", "r")), chain)[0]
    expected = run(inner, {"x": x, "s": s})
    actual = run(part, {"h": expected["h"], "s": s})
    np.testing.assert_array_equal(actual["r"], expected["r"], strict=True)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Extract(inputs=("h", "s"), outputs=("r:fp32",)), "extract:inputs=h,s,outputs=r:fp32"),
        (FixShapes(inputs={"x": (1, 4), "s": (2,)}), "shapes:inputs=x:1,4,s:2"),
        (FixShapes(inputs={"x:0": (1, 4), "s": ()}, infer=False), "shapes:inputs=x:0:1,4,s:,infer=no"),
        (Single(), "single"),
        (Half(everywhere=True), "half:everywhere=yes"),
    ],
)
def test_words_of_the_command_line(step: Pass, words: str) -> None:
    assert passes.parse(words) == step


@pytest.mark.parametrize("given", [{"x": [1, 4]}, ["x:1,4"], "x:1,4", ["x:1", "4"], '{"x": [1, 4]}'])
def test_sizes_in_python_in_recipes_and_in_words(given: Any) -> None:
    assert passes.create("shapes", {"inputs": given}) == FixShapes(inputs={"x": (1, 4)})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("shapes:inputs=z:1,4", "pass 'shapes': there is no input 'z'; known are: x, s"),
        ("shapes:inputs=x:1,4,1", "the input has 2 axes, not 3"),
        ("shapes:inputs=4", "'4' is not of the form name:1,3,224,224"),
        ("shapes:inputs=x:4.5", "'x:4.5' is not of the form"),
        ("extract:outputs=hh", "there is no tensor 'hh'"),
        ("extract:inputs=h", "the outputs also depend on input 's'"),
        ("half:everywhere=yes,weights_only=yes", "cannot be converted with weights_only"),
    ],
)
@pytest.mark.parametrize("on_error", ["revert", "raise"])
def test_mistakes_are_raised_and_never_reverted(chain: Model, step: str, message: str, on_error: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline(passes.parse(step), Slim(), on_error=on_error)(chain)
    assert message in str(caught.value)


def test_later_passes_are_held_to_the_new_interface(chain: Model) -> None:
    steps = FixShapes(inputs={"x": (3, 4), "s": (3, 4)}), Extract(inputs=("i", "s"), outputs=("t",)), Slim()
    result = Pipeline(*steps, on_error="raise")(chain)
    assert interface(result.model) == [
        ("i", np.float32, (3, 4)),
        ("s", np.float32, (3, 4)),
        ("t", np.float32, (3, 4)),
    ]
    assert "Identity" not in ops(result.model)
    assert [step.macs_before for step in result.report.steps] == [None, None, 3 * 4 * 4]


def test_the_model_may_be_cut_between_other_passes(chain: Model) -> None:
    result = Pipeline(Slim(), Extract(outputs=("r",)), Half(everywhere=True), Slim(), on_error="raise")(chain)
    assert ends(result.model) == (["x", "s"], ["r"])
    assert {tensor.dtype for tensor in result.model.graph.outputs} == {np.dtype(np.float16)}
    back = Pipeline(Single(), Slim(), on_error="raise")(result.model).model
    feeds = {"x": np.ones((2, 4), np.float32), "s": np.ones((2, 4), np.float32)}
    expected = run(apply(Extract(outputs=("r",)), chain)[0], feeds)["r"]
    np.testing.assert_allclose(run(back, feeds)["r"], expected, rtol=1e-2)


@options
class _Renames(Pass):
    """Says that it changes types, and changes a name."""

    name = "renames"
    prepares = True

    @property
    def interface(self) -> frozenset[InterfacePart]:
        return frozenset(("types",))

    def run(self, model: Model, ctx: Context) -> Changes:
        model.graph.inputs[0].name = "other"
        log = Log()
        log.change("x", "renamed")
        return log.done()


def test_nothing_changes_of_the_interface_but_what_is_declared(chain: Model) -> None:
    with pytest.raises(PassError, match="pass 'renames' failed: the inputs or outputs changed"):
        Pipeline(_Renames(), Slim())(chain)


def test_bfloat16_is_made_float32_where_no_kernel_takes_it() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        c = Cast<to=16>(x) d = MatMul(c, w) e = Neg(d) y = Cast<to=1>(e) }"""
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    model = parse(text, {"w": weight.astype(ml_dtypes.bfloat16)})
    advice = "few kernels take bfloat16: 'onnxslim slim --dtype fp32' makes it float32"
    with pytest.raises(LoadError, match=advice):
        Session(model)
    back = apply(Single(), model)[0]
    feeds = {"x": np.eye(4, dtype=np.float32)}
    np.testing.assert_array_equal(run(back, feeds)["y"], -weight)


def test_a_model_with_functions_is_not_widened() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float16[N] x) => (float16[N] y) { y = own.f(x) }
        <domain: "own", opset_import: ["" : 17]> f (a) => (b) { b = Relu(a) }"""
    )
    with pytest.raises(UsageError, match="functions of their own"):
        Pipeline(Single())(model)
