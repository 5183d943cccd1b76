"""Empty tensors, sequences and optionals: what they touch stays as it is, and the passes do the rest."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Pass
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.half import Half
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.validation.compare import validate
from tests.helpers import normal, parse, quantize, reasons

CONSTANTS = {
    "w": 0.1 * normal(64, 64),
    "v": 0.1 * normal(64, 64, seed=1),
    "u": 0.1 * normal(64, 64, seed=2),
    "zero": np.array([0]),
}
TEXTS = {
    "an empty cache": """g (float[N,64] x, float[P,64] past) => (float[N,64] y, float[Q,64] present) {
        [first] k = MatMul(x, w) [cached] c = MatMul(past, v) present = Concat<axis=0>(c, k)
        r = Relu(k) y = MatMul(r, u)
    }""",
    "a slice of nothing": """g (float[N,64] x) => (float[N,64] y, float[M,64] z) {
        [first] k = MatMul(x, w) e = Slice(k, zero, zero, zero) f = Relu(e) [cached] z = MatMul(f, v)
        r = Relu(k) y = MatMul(r, u)
    }""",
    "a sequence as an output": """g (float[N,64] x) => (float[N,64] y, seq(float[N,M]) s) {
        [first] k = MatMul(x, w) b, c, d = Split<axis=1, num_outputs=3>(k) s = SequenceConstruct(b, d)
        r = Relu(k) y = MatMul(r, u)
    }""",
    "an optional as an output": """g (float[N,64] x) => (float[N,64] y, optional(float[N,64]) z) {
        [first] k = MatMul(x, w) r = Relu(k) z = Optional(r) y = MatMul(r, u)
    }""",
    "a sequence on the way": """g (float[N,64] x) => (float[N,64] y) {
        [first] k = MatMul(x, w) s = SplitToSequence<axis=1>(k) j = ConcatFromSequence<axis=1>(s)
        r = Relu(j) y = MatMul(r, u)
    }""",
}


def odd(what: str) -> tuple[Model, list[dict[str, Array]]]:
    model = parse(TEXTS[what], CONSTANTS, opset=18)
    batches = [{"x": normal(8, 64, seed=seed)} for seed in range(8)]
    if "past" in TEXTS[what]:
        batches = [batch | {"past": normal(0, 64)} for batch in batches]
    return model, batches


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize(
    "step",
    [Quantize(), Quantize(classifier=True), Quantize(activations="dynamic"), Factorize(params=0.7), Half()],
    ids=Pass.describe,
)
def test_the_rest_goes_on(what: str, step: Pass) -> None:
    model, batches = odd(what)
    result = Pipeline(step)(model, data=CalibrationData(batches))
    assert not result.report.steps[0].error
    assert result.model.nbytes() < 0.95 * model.nbytes()
    (verdict,) = validate(model, result.model, data=CalibrationData(batches)).providers
    assert {row.name: row.problem for row in verdict.outputs} == {
        tensor.name: "" for tensor in model.graph.outputs
    }


@pytest.mark.parametrize("what", ["an empty cache", "a slice of nothing"])
def test_a_layer_whose_data_is_empty_stays_in_float(what: str) -> None:
    _, changes = quantize(*odd(what), classifier=True)
    assert reasons(changes)["cached"] == "its data holds no element"
    assert "first" in {change.node for change in changes.changed}


def test_the_elements_of_a_sequence_are_judged() -> None:
    _, changes = quantize(*odd("a sequence as an output"))
    parts = QuantizeFigures.of(changes).parts
    assert parts is not None
    assert parts.keys() == {"y", "s"}
    assert 20 < parts["s"] < 60


def test_what_makes_a_sequence_stays_in_single_precision() -> None:
    model, batches = odd("a sequence as an output")
    result = Pipeline(Half())(model, data=CalibrationData(batches))
    (step,) = result.report.steps
    assert "'s' is a sequence" in " ".join(reasons(step.changes).values())
    assert len(step.changes.changed) >= 4
