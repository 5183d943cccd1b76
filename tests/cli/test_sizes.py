"""For which sizes of free axes costs are counted: it is named wherever they are, and can be said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.model import load
from onnxslim.passes.slim import Slim
from onnxslim.report.inspect import inspect
from onnxslim.validation.compare import validate
from tests.helpers import normal, parse

ONE = 4 * 3 * 9  # multiply-accumulates of one pixel
SHAPES = "image:5,3,10,20"


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    text = """g (float[N,3,height,width] image) => (float[N,4,h,w] y) {
        c = Conv<pads=[1,1,1,1]>(image, k)  r = Relu(c)  y = Conv(r, e) }"""
    path = tmp_path / "detector.onnx"
    parse(text, {"k": normal(4, 3, 3, 3), "e": np.zeros((4, 4, 1, 1), np.float32)}).save(path)
    return path


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_inspect_names_the_sizes_it_assumed(detector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "image 1x3x1x1 (assumed, see --input-shapes)" in told(capsys, "inspect", detector)
    shown = told(capsys, "inspect", detector, "--input-shapes", SHAPES)
    assert "image 1x3x10x20" in shown
    assert "assumed" not in shown
    found = json.loads(told(capsys, "inspect", detector, "--input-shapes", SHAPES, "--json"))["models"][0]
    assert found["macs"] == 200 * (ONE + 16), "one sample, whatever the batch"
    assert found["memory"]["peak"] == 200 * 4 * (4 + 4)


def test_passes_name_the_sizes_they_counted_for(detector: Path) -> None:
    model, sizes = load(detector), {"image": (5, 3, 10, 20)}
    made_up = Pipeline(Slim())(model).report
    assert any("(height, width assumed" in note for note in made_up.notes)
    asked = Pipeline(Slim())(model, input_shapes=sizes).report
    assert "MACs are counted for image 1x3x10x20 (height, width as asked for)" in asked.notes
    assert asked.steps[0].macs_before == 200 * (ONE + 16)
    data = CalibrationData([{"image": normal(2, 3, 6, 7)}])
    seen = Pipeline(Slim())(model, data=data).report
    assert "MACs are counted for image 1x3x6x7 (height, width as in the data)" in seen.notes
    verdict = validate(model, model, rounds=0, input_shapes=sizes)
    assert verdict.before.macs == 200 * (ONE + 16)
    assert any("10x20" in note for note in verdict.notes)


def test_a_batch_alone_is_not_told() -> None:
    report = Pipeline(Slim())(parse("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")).report
    assert report.notes == ()


def test_families_are_counted_for_one_sample(detector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "prune", detector, "--families", "--input-shapes", SHAPES)
    assert f"{200 * (27 + 4):,} MACs" in shown
    assert "image 1x3x10x20 (height, width as asked for)" in shown
    document = json.loads(told(capsys, "prune", detector, "--families", "--json"))
    assert "assumed" in document["notes"][0]


def test_commands_take_shapes_and_leave_the_model_free(
    detector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = detector.with_name("out.onnx")
    shown = told(capsys, "run", detector, out, "-p", "slim", "--input-shapes", SHAPES)
    assert "as asked for" in shown
    assert load(out).graph.inputs[0].shape == ("N", 3, "height", "width")
    for wrong in ("imag:1,3,8,8", "image:1,8", "image:1,4,8,8", "image"):
        for words in (["inspect"], ["half"], ["prune", "--families"], ["validate", str(detector)]):
            assert cli.main([*words, str(detector), "--input-shapes", wrong]) == 2
            assert "image" in capsys.readouterr().err


def test_recipes_keep_shapes(detector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, recipe = detector.with_name("out.onnx"), detector.with_name("recipe.yaml")
    words = ("-p", "slim", "--input-shapes", SHAPES, "--save-recipe")
    told(capsys, "run", detector, out, *words, recipe)
    first = out.read_bytes()
    assert "image 1x3x10x20 (height, width as asked for)" in told(capsys, "run", recipe, detector, out)
    assert out.read_bytes() == first
    other = told(capsys, "run", recipe, detector, out, "--input-shapes", "image:1,3,8,8")
    assert "image 1x3x8x8" in other
    recipe.write_text("passes: [slim]\ninput_shapes: {imag: [1, 3, 8, 8]}\n")
    assert cli.main(["run", str(recipe), str(detector), str(out)]) == 2
    assert "there is no input 'imag'; did you mean 'image'?" in capsys.readouterr().err


def test_layers_in_bodies_are_not_counted_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y) {
        y = If (c) <then_branch = t () => (float[N,4] p) { p = MatMul(x, w) },
                    else_branch = e () => (float[N,4] q) { q = MatMul(x, v) }> }"""
    model = parse(text, {"w": normal(4, 4, seed=1), "v": normal(4, 4, seed=2)})
    found = inspect(model)
    assert (found.macs, found.uncounted) == (0, 2)
    assert "MACs leave out 2 layers in bodies of If, Loop and Scan or in functions" in (
        Pipeline(Slim())(model).report.notes
    )
    text = """<ir_version: 10, opset_import: ["" : 20, "my" : 1]>
        g (float[N,4] x, float[4,4] w) => (float[N,4] y) { y = my.times(x, w) }
        <domain: "my", opset_import: ["" : 20]> times (a, b) => (c) { c = MatMul(a, b) }"""
    assert inspect(parse(text)).uncounted == 1
