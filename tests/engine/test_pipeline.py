"""Pipeline: what passes do is checked, undone where it is wrong, and reported."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError, InvalidGraph, PassError
from onnxslim.ir.model import Model
from onnxslim.passes.fuse import Fuse
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from tests.helpers import ROOT, filled, ops, parse

TEXT = """g (float[N,8] x) => (float[N,8] y) <float[8,8] w = {1}, float[8,8] v = {1}>
{ i = Identity(x) [first] a = MatMul(i, w) r = Relu(a) [second] b = MatMul(r, v) y = Tanh(b) }"""


@pytest.fixture
def model() -> Model:
    return filled(parse(TEXT), 0.3)


class _Edit(Pass):
    """A pass made for a test: renames an operator."""

    lossless: ClassVar[bool] = True
    old: ClassVar[str]
    new: ClassVar[str]

    def run(self, model: Model, ctx: Context) -> Changes:
        """Rename."""
        log = Log()
        for node in model.graph.nodes:
            if node.op == self.old:
                log.change(node.label, f"is {self.new} now")
                node.op = self.new
        return log.done()


@options
class Wrong(_Edit):
    """Changes what the model computes."""

    name: ClassVar[str] = "wrong"
    old: ClassVar[str] = "Tanh"
    new: ClassVar[str] = "Sin"


@options
class Invalid(_Edit):
    """Leaves a model that no runtime accepts."""

    name: ClassVar[str] = "invalid"
    old: ClassVar[str] = "Tanh"
    new: ClassVar[str] = "NoSuchOperator"


@options
class Crash(Pass):
    """Fails with an exception of its own."""

    name: ClassVar[str] = "crash"

    def run(self, model: Model, ctx: Context) -> Changes:
        """Spoil the model, then fail."""
        model.graph.nodes.clear()
        raise KeyError("nothing there")


@options
class Half(Pass):
    """Two parts, of which one is wrong."""

    name: ClassVar[str] = "half"
    lossless: ClassVar[bool] = True

    def parts(self) -> tuple[Pass, ...]:
        """A right one and a wrong one."""
        return Slim(), Wrong()

    def run(self, model: Model, ctx: Context) -> Changes:
        """Run both."""
        log = Log()
        for part in self.parts():
            log.add(part.run(model, ctx))
        return log.done()


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (Wrong(), "output 'y' differs"),
        (Invalid(), "NoSuchOperator"),
        (Crash(), "engine.test_pipeline:"),
    ],
)
def test_a_step_that_breaks_the_model_is_reverted_and_named(model: Model, step: Pass, why: str) -> None:
    result = Pipeline(step, Slim())(model)
    first, second = result.report.steps
    assert why in first.error
    assert step.name in first.error
    assert first.after == first.before
    assert ops(result.model)["Tanh"] == 1
    assert second.error == ""
    assert ops(result.model)["Identity"] == 0, "the pipeline went on"


def test_raising_stops_and_tells_what_was_done(model: Model) -> None:
    with pytest.raises(InvalidGraph) as caught:
        Pipeline(Slim(), Wrong(), on_error="raise")(model)
    assert caught.value.pass_name == "wrong"
    assert caught.value.done == ("slim()",)
    assert caught.value.node == "Tanh→y"


def test_a_crash_is_a_pass_error_with_its_cause(model: Model) -> None:
    with pytest.raises(PassError, match=r"pass 'crash' failed: it met something .*; please report") as caught:
        Pipeline(Crash(), on_error="raise")(model)
    assert "nothing there" not in str(caught.value), "what Python says of it means nothing to the user"
    assert isinstance(caught.value.__cause__, PassError)
    assert isinstance(caught.value.__cause__.__cause__, KeyError)


def test_of_a_pass_with_parts_what_is_right_is_kept(model: Model) -> None:
    result = Pipeline(Half())(model)
    (step,) = result.report.steps
    assert ops(result.model) == {"MatMul": 2, "Relu": 1, "Tanh": 1}
    assert "wrong" in step.error
    assert any("reverted" in skip.reason for skip in step.changes.skipped)


def test_parts_run_one_by_one_do_not_let_the_file_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    body = " ".join(f"t{i} = Cos(t{i - 1})" for i in range(1, 40))
    calls = " ".join(f"x{i} = com.example.F(x{i - 1})" for i in range(1, 9))
    head = '<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>'
    function = f'<domain: "com.example", opset_import: ["" : 17]> F (t0) => (t39) {{ {body} }}'
    graph = f"g (float[N] x0) => (float[N] y) {{ a = Identity(x0) b = Tanh(a) {calls} y = Add(b, x8) }}"
    model = parse(f"{head}\n{graph}\n{function}")
    monkeypatch.setattr(Fuse, "run", Wrong.run)
    monkeypatch.setattr(Fuse, "old", "Tanh", raising=False)
    monkeypatch.setattr(Fuse, "new", "Sin", raising=False)
    result = Pipeline(Slim())(model)
    assert result.model.stats().bytes <= model.stats().bytes
    assert "fuse" in result.report.steps[0].error
    assert "Identity" not in ops(result.model)
    assert any("larger" in skip.reason for skip in result.report.steps[0].changes.skipped)


def test_the_input_is_never_touched(model: Model) -> None:
    before = model.to_proto().SerializeToString()
    Pipeline(Slim(), Wrong(), Crash())(model)
    assert model.to_proto().SerializeToString() == before


def test_lossless_passes_may_follow_lossy_ones(model: Model) -> None:
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    result = Pipeline(Quantize(require_sqnr=0), Slim(), Wrong())(model, data=CalibrationData([{"x": x}]))
    quantize, slim, wrong = result.report.steps
    assert (quantize.error, slim.error) == ("", "")
    assert ops(result.model)["Identity"] == 0
    assert ops(result.model)["QuantizeLinear"] == 2
    assert "differs" in wrong.error


def test_quantizing_twice_does_nothing_new(model: Model) -> None:
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    data = CalibrationData([{"x": x}])
    once = Pipeline(Slim(), Quantize(require_sqnr=0))(model, data=data).model
    twice = Pipeline(Quantize(require_sqnr=0))(once, data=data)
    assert ops(twice.model) == ops(once)


def test_what_cannot_be_checked_is_noted() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[N] x) => (float[N] y) { a = Identity(x) b = my.Op(a) y = Relu(b) }"""
    )
    result = Pipeline(Slim())(model)
    assert ops(result.model) == {"Op": 1, "Relu": 1}
    assert any("does not run" in note for note in result.report.notes)


def test_a_list_of_batches_is_data_enough(model: Model) -> None:
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    (step,) = Pipeline(Quantize())(model, data=[{"x": x}]).report.steps
    assert step.error == ""
    assert step.changes


def test_empty_data_is_an_error(model: Model) -> None:
    with pytest.raises(CalibrationError, match="there is no data"):
        Pipeline(Quantize())(model, data=CalibrationData([]))


def test_steps_count_before_and_after(model: Model) -> None:
    (step,) = Pipeline(Slim())(model).report.steps
    assert (step.before.nodes, step.after.nodes) == (5, 4)
    assert step.macs_before == step.macs_after == 2 * 8 * 8
    assert step.after.bytes < step.before.bytes
    assert step.seconds > 0


def test_what_happens_is_in_the_log_for_who_asks(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    data = CalibrationData([{"x": np.ones((4, 8), np.float32)}])
    with caplog.at_level(logging.DEBUG, "onnxslim"):
        Pipeline(Slim(), Wrong(), Quantize(require_sqnr=0))(model, data=data)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [text.split()[0] for level, text in told if level == "INFO"] == [
        "slim()",
        "wrong()",
        "quantize(require_sqnr=0.0)",
    ]
    assert any(level == "DEBUG" and text.startswith("calibrating: 1 of") for level, text in told)
    assert any(level == "WARNING" and "pass wrong() was reverted" in text for level, text in told)
    assert {record.name for record in caplog.records} == {"onnxslim.engine.pipeline"}


def test_nobody_hears_of_it_who_does_not_ask() -> None:
    code = """if True:
        import numpy as np, onnxslim
        from onnxslim.passes import Quantize
        from tests.helpers import normal, parse
        model = parse("g (float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", {"w": normal(8, 8)})
        found = onnxslim.Pipeline(Quantize(classifier=True))(model, data={"x": np.zeros((2, 8), np.float32)})
        assert found.report.warnings"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
