"""Types and shapes behind operators that nobody knows: seen in a run, for passes that are judged on data."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration.seen import NOTE, Sight, seen
from onnxslim.engine.base import Pass
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from tests.helpers import apply, normal, normals, ops, parse, reasons

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
FUSED = f"""{HEAD} g (float[1,S,32] x) => (float[1,S,32] y)
{{ l = com.microsoft.Trilu(x) a = MatMul(l, w) r = Relu(a) b = MatMul(r, v) n = com.microsoft.Trilu(b)
  y = MatMul(n, u) }}"""


def fused() -> Model:
    low = normal(32, 4) @ normal(4, 64, seed=1)
    return parse(FUSED, {"w": low, **normals(v=(64, 32), u=(32, 32))})


def data(samples: int = 12) -> list[dict[str, Array]]:
    return [{"x": normal(1, 5, 32, seed=seed)} for seed in range(samples)]


def test_what_follows_from_rules_is_not_looked_at() -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Tanh(a) }")
    assert seen(model, {}) == {}
    assert seen(model, {"x": normal(2, 4)}) == {}


def test_what_is_behind_unknown_operators_is_seen_in_a_run() -> None:
    told = seen(fused(), data()[0])
    assert told["a"] == Sight(np.dtype(np.float32), (1, 5, 64))
    assert "x" not in told
    assert seen(fused(), {"x": normal(1, 5, 31)}) == {}, "the model does not run on this"


def test_sequences_are_not_seen() -> None:
    text = f"""{HEAD} g (float[4,2] x) => (float[K,2] y)
    {{ a = com.microsoft.Trilu(x) s = SplitToSequence<axis=0>(a) y = ConcatFromSequence<axis=0>(s) }}"""
    assert seen(parse(text), {"x": normal(4, 2)}).keys() == {"a", "y"}


@pytest.mark.parametrize(
    ("step", "of", "changed"),
    [
        (Prune(ratio=0.5), "w", "shape"),
        (Factorize(params=0.7), "a", "factors"),
        (Quantize(classifier=True), "a", "integers"),
    ],
)
def test_passes_that_are_judged_on_data_use_it_and_say_so(step: Pass, of: str, changed: str) -> None:
    model = fused()
    result, changes = apply(step, model, data())
    assert NOTE in reasons(changes).values()
    assert not any("None" in reason or "give data" in reason for reason in reasons(changes).values())
    if changed == "shape":
        assert result.graph.initializers["w"].shape == (32, 32)
    elif changed == "factors":
        assert ops(result)["MatMul"] > ops(model)["MatMul"]
    else:
        assert ops(result)["QuantizeLinear"] >= 2
    assert {info.name for info in result.to_proto().graph.value_info} == set()
