"""What inspecting tells of a model, on models whose figures can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.model import load
from onnxslim.passes.quantize import Quantize
from onnxslim.report.inspect import Coverage, Memory, inspect
from tests.helpers import FASHION, parse

RICH = """<ir_version: 10, producer_name: "me", producer_version: "2", opset_import: ["" : 20, "my" : 1]>
g (float[N,4] x, int64[M] ids) => (float[N,4] y, float[?] z) <float[4] w = {1,2,3,4}, int8[2] q = {1,2}> {
  a = Mul(x, w)
  y = my.twice(a)
  c = Gather(w, ids)
  z = my.unknown(c)
}
<domain: "my", opset_import: ["" : 20]> twice (p) => (q) { q = Add(p, p) }"""


def test_everything_is_counted() -> None:
    found = inspect(parse(RICH))
    assert found.opsets == {"": 20, "my": 1}
    assert (found.ir_version, found.producer) == (10, "me 2")
    assert found.inputs == {"x": "float32[N,4]", "ids": "int64[M]"}
    assert found.outputs["y"] == "float32[N,4]"
    assert found.operators == {"Mul": 1, "my.twice": 1, "Gather": 1, "my.unknown": 1}
    assert found.dtypes == {"float32": 16, "int8": 2}
    assert (found.nodes, found.parameters, found.macs) == (4, 6, 0)
    assert (found.functions, found.custom) == (("my.twice",), ("my.unknown",))
    assert found.free["x"] == ("N",)
    assert found.external == {}


def test_peak_memory_of_activations() -> None:
    # a and b are alive with c (400 + 400 + 200), x is not any more.
    text = """g (float[1,100] x) => (float[1,50] y) <float[100,50] w> {
        a = Relu(x)  b = Neg(a)  s = Add(a, b)  c = MatMul(s, w)  y = Abs(c) }"""
    found = inspect(parse(text, {"w": np.zeros((100, 50), np.float32)}, opset=13))
    assert found.memory == Memory(1200, found.memory.node, 0)
    assert found.memory.node.startswith("Add")
    chain = inspect(parse("g (float[N,100] x) => (float[N,100] y) { a = Relu(x)  b = Neg(a)  y = Abs(b) }"))
    assert chain.memory.peak == 800, "two tensors at a time, one sample"


def test_what_bodies_read_stays_alive() -> None:
    text = """g (float[100] x, bool c) => (float[100] y) {
        a = Relu(x)  b = Neg(x)  d = Abs(b)
        y = If (c) < then_branch = t () => (float[100] p) { p = Identity(a) },
                     else_branch = e () => (float[100] q) { q = Identity(d) }> }"""
    assert inspect(parse(text)).memory.peak == 1 + 4 * 400 - 400


def test_tensors_of_unknown_size_are_counted() -> None:
    found = inspect(parse(RICH))
    assert found.memory.unknown == 1, "what the unknown operator makes"


def test_data_files_are_listed(tmp_path: Path) -> None:
    text = "g (float[N,512] x, float[512] w) => (float[N,512] y) { y = Mul(x, w) }"
    parse(text, {"w": np.ones(512, np.float32)}).save(tmp_path / "m.onnx", external_data=True)
    assert inspect(tmp_path / "m.onnx").external == {"m.onnx.data": 2048}


def test_coverage_is_that_of_the_layers() -> None:
    model = load(FASHION / "resnet.onnx")
    assert inspect(model).coverage == Coverage(0, 0, 14, 0.0)
    data = CalibrationData.from_npz(FASHION / "calibration.npz")
    quantized = Pipeline(Quantize(), on_error="raise")(model, data=data).model
    found = inspect(quantized).coverage
    assert (found.quantized, found.total) == (12, 14)
    assert found.macs == pytest.approx(0.99, abs=0.02)


def test_weights_alone_may_be_quantized() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) <int8[2,2] w = {1,2,3,4}, float s = {0.5}> {
        d = DequantizeLinear(w, s)  y = MatMul(x, d) }"""
    assert inspect(parse(text)).coverage == Coverage(0, 1, 1, 0.0)
    assert inspect(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")).coverage == Coverage(0, 0, 0, 0.0)


def test_few_bits_count_as_what_is_computed_with() -> None:
    """Codes that a Cast unpacks are stored so; where a Clip takes codes of data away, nothing computes so."""
    text = """g (float[N,2] x) => (float[N,2] y)
        <int4[2,2] w, float s = {0.5}, uint8 z = {0}, uint8 t = {15}, int8 o = {0}> {
        q = QuantizeLinear(x, s, z) %s f = DequantizeLinear(c, s, z)
        b = Cast<to=3>(w) d = DequantizeLinear(b, s, o) y = MatMul(f, d) }"""
    for how, expected in (("Identity(q)", Coverage(1, 0, 1, 1.0)), ("Clip(q, z, t)", Coverage(0, 1, 1, 0.0))):
        model = parse(text % f"c = {how}", {"w": np.ones((2, 2), ml_dtypes.int4)}, opset=21, ir_version=10)
        assert inspect(model).coverage == expected


def test_operators_on_integers_count() -> None:
    text = """g (float[4,8] x, uint8[1,2,5,5] q, int8[8,3] w, uint8[3,2,3,3] v) =>
        (int32[4,3] y, uint8[1,3,3,3] z) <float s = {0.5}, uint8 o = {0}>
        { c, a, p = DynamicQuantizeLinear(x)  y = MatMulInteger(c, w, p)
          z = QLinearConv(q, s, o, v, s, o, s, o) }"""
    weights = {"w": np.ones((8, 3), np.int8), "v": np.ones((3, 2, 3, 3), np.uint8)}
    found = inspect(parse(text, weights))
    assert found.coverage == Coverage(2, 0, 2, 1.0)
    assert found.macs == 4 * 3 * 8 + 27 * 18


BASE = "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1,2}> { %s }"


# ----------------------------------------------------------------------------------- the command line


def test_the_command_line_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "[red]a.onnx", tmp_path / "b.onnx"
    parse(BASE % "[n] y = Relu(x)").save(first)
    parse(BASE % "[m] y = Neg(x)").save(second)
    assert cli.main(["inspect", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    for row in (
        "Model Name [red]a.onnx b.onnx",
        "IN: x float32[N,2] float32[N,2]",
        "Relu 1 0",
        "Neg 0 1",
        "constants of float32 8 bytes 8 bytes",
        "free sizes N N",
        "changed: 1",
        "n: Relu → Neg",
    ):
        assert row in rows, row
    assert cli.main(["inspect", str(first), str(second), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["difference"]["changed"] == {"n": ["Relu → Neg"]}
    assert [each["name"] for each in told["models"]] == ["[red]a.onnx", "b.onnx"]
    assert cli.main(["inspect", str(first), str(first)]) == 0
    assert "the same graph: 1 nodes" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "none.onnx")]) == 3


def test_rows_without_anything_in_them_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parse("g (float[2] x) => (float[2] y) { y = Relu(x) }").save(tmp_path / "m.onnx")
    assert cli.main(["inspect", str(tmp_path / "m.onnx")]) == 0
    out = capsys.readouterr().out
    assert "IR version" in out
    for name in ("made by", "in data files", "run in integers", "free sizes", "own functions", "counted for"):
        assert name not in out
