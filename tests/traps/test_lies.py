"""Wrong declarations, and such that contradict each other: what ONNX Runtime computes counts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.engine.check import interface
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes.slim import Slim
from tests.helpers import apply, parse, runs, same_outputs

HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>'
BLOCKS = re.split(r"^=== ", (Path(__file__).parent / "lies.graphs").read_text(), flags=re.MULTILINE)[1:]
LIES = dict(block.split("\n", 1) for block in BLOCKS)


def _feeds(model: Model, batch: int) -> dict[str, Array]:
    """Free axes of different inputs have different sizes."""
    generator = np.random.default_rng(batch)
    chosen: dict[object, int] = {}
    feeds: dict[str, Array] = {}
    for spec in model.inputs():
        shape = [
            dim
            if isinstance(dim, int)
            else chosen.setdefault(dim or (spec.name, axis), (batch, 1)[len(chosen) % 2])
            for axis, dim in enumerate(spec.shape or ())
        ]
        assert spec.dtype is not None
        feeds[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
    return feeds


@pytest.mark.parametrize("text", LIES.values(), ids=LIES)
def test_lies_are_not_believed(text: str) -> None:
    model = parse(f"{HEADER}\n{text}")
    raw, _ = apply(Slim(), model)
    checked = Pipeline(Slim())(model)
    for feeds in (_feeds(model, batch) for batch in (1, 3, 4)):
        if runs(model, feeds):
            same_outputs(model, raw, feeds)
            same_outputs(model, checked.model, feeds)
    assert interface(raw) == interface(model)
    assert not checked.report.steps[0].error
    again, more = apply(Slim(), raw)
    assert not more, more
    assert again.to_proto() == raw.to_proto()


@pytest.mark.parametrize("name", [name for name in LIES if not name.startswith("type")])
def test_most_of_them_run(name: str) -> None:
    model = parse(f"{HEADER}\n{LIES[name]}")
    assert any(runs(model, _feeds(model, batch)) for batch in (1, 3, 4))


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("declared", [(2, 3), (1,), (), None])
def test_an_initializer_that_is_an_input_of_another_shape(
    ir_version: int, declared: tuple[int, ...] | None
) -> None:
    graph = "g (float[N,3] x, float[7] w) => (float[A,B] y) { s = Shape(w) a = Add(x, w) y = Neg(a) }"
    made = parse(f'<ir_version: 8, opset_import: ["" : 8]>\n{graph}').to_proto()
    made.ir_version = ir_version
    made.graph.input[1].CopyFrom(helper.make_tensor_value_info("w", TensorProto.FLOAT, declared))
    made.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "w"))
    model = load(made)
    result, _ = apply(Slim(), model)
    checked = Pipeline(Slim())(model).model
    assert interface(result) == interface(checked) == interface(model)
    feeds = {"x": np.ones((2, 3), np.float32)}
    if runs(model, feeds):
        same_outputs(model, result, feeds)
        same_outputs(model, checked, feeds)
    other = {**feeds, "w": np.full(declared or 1, 5, np.float32)}
    if ir_version > 3 and runs(model, other):
        same_outputs(model, result, other)
