"""Decoders of ONNX Runtime's own operators, compressed like others; ONNX Runtime is the judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.noise import sqnr
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.families.analysis import Analysis, analyze
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.factorize import Factorize, FactorizeFigures
from onnxslim.passes.prune import Prune, PruneFigures
from onnxslim.passes.prune.cut import prepare
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.passes.unfuse import unfuse
from onnxslim.runtime.session import Session
from onnxslim.runtime.timing import Bench, Timing
from onnxslim.shapes.cost import macs
from tests.decoders import Decoder
from tests.helpers import (
    ONNX_RUNTIME,
    RECENT,
    apply,
    normal,
    normals,
    ops,
    parse,
    reasons,
    skip_if_old,
    stored,
)

WIDE = Decoder(heads=8, shared=4)
FORMS: dict[str, dict[str, Any]] = {
    "apart": {},
    "packed": {"packed": True},
    "rotated before": {"rotary": False},
    "four bits": {"bits": 4},
    "four bits, embeddings too": {"bits": 4, "table": True},
    "eight bits, packed": {"bits": 8, "packed": True},
}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def _families(model: Model, *, interface: bool = False) -> Analysis:
    unfuse(model, "units")
    prepare(model)
    return analyze(model, allow_inputs=interface, allow_outputs=interface)


def _run(step: Any, model: Model, decoder: Decoder) -> Result:
    if decoder.packed and ONNX_RUNTIME < RECENT:
        pytest.skip("this ONNX Runtime infers the shape of what is packed for that of queries")
    return Pipeline(step, on_error="raise")(model, data=CalibrationData(decoder.tokens(12)))


def _kept(before: Model, after: Model, decoder: Decoder) -> float:
    """SQNR of the logits, of more tokens than there were."""
    runs = [
        [Session(model).run(feeds)["logits"] for feeds in decoder.tokens(4, length=11, seed=1)]
        for model in (before, after)
    ]
    return sqnr(np.stack(runs[0]), np.stack(runs[1]))


@FORM
def test_heads_in_groups_and_hidden_units_are_families(form: dict[str, Any]) -> None:
    decoder = replace(WIDE, **form)
    found = _families(decoder.model())
    block = 16 if decoder.bits else 1
    assert [family.size for family in found.families] == [64 // block, *[4, 96 // block] * 2]
    assert [bool(family.crosses) for family in found.families] == [True, *[False] * 4]


@FORM
def test_pruned(form: dict[str, Any]) -> None:
    decoder = replace(WIDE, **form)
    model = decoder.model()
    result = _run(Prune(ratio=0.5, align=1), model, decoder)
    figures = PruneFigures.of(result.report.steps[0].changes)
    assert figures.families == 5
    assert figures.oracle is not None
    assert figures.oracle < 1e-5
    assert figures.macs[1] < 0.3 * figures.macs[0]
    heads = {
        (node.attrs["num_heads"], node.attrs["kv_num_heads"])
        for node in result.model.graph.nodes
        if node.op == "GroupQueryAttention"
    }
    assert heads == {(4, 2)}
    assert ops(result.model)["MatMulNBits"] == ops(model)["MatMulNBits"]
    assert np.isfinite(_kept(model, result.model, decoder))


def test_caches_that_are_given_keep_their_heads_and_say_so() -> None:
    decoder = replace(WIDE, past=True)
    found = _families(decoder.model())
    assert [family.size for family in found.families] == [64, 96, 96]
    assert "'present0' is an output of the model" in found.explain("w_k0")[1]
    free = _families(decoder.model(), interface=True)
    heads = [family for family in free.families if any(each.tensor == "past0" for each in family.members)]
    assert [family.size for family in heads] == [4]


@FORM
def test_quantized(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether a small layer is faster in floats depends on the processor, and on what else it does.
    monkeypatch.setattr(Judge, "slowdown", lambda self, model: None)
    decoder = replace(WIDE, **form)
    model = decoder.model()
    result = _run(Quantize(), model, decoder)
    figures = QuantizeFigures.of(result.report.steps[0].changes)
    count = 11 if decoder.packed else 15
    named = reasons(result.report.steps[0].changes)
    assert len(named) <= 2  # the classifier, and at most one that would cost too much
    assert figures.fused == {"MatMul": count - len(named)}, figures
    assert ops(result.model)["GroupQueryAttention"] == 2
    assert _kept(model, result.model, decoder) > 20


def test_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of such sizes are no faster as factors, which is not the point here."""
    monkeypatch.setattr(
        Bench, "__call__", lambda self, what, first, others, feeds: Timing(1.0, dict.fromkeys(others, 0.5))
    )
    model = WIDE.model()
    result = _run(Factorize(params=0.7), model, WIDE)
    step = result.report.steps[0].changes
    factored = FactorizeFigures.of(step).layers or {}
    assert len(factored) >= 5
    assert ops(result.model)["MatMul"] == 15 + len(factored)
    assert result.model.stats().parameters < 0.75 * model.stats().parameters
    assert _kept(model, result.model, WIDE) > 10


def test_codes_are_not_factorized_and_say_so() -> None:
    decoder = replace(WIDE, bits=4)
    changes = _run(Factorize(), decoder.model(), decoder).report.steps[0].changes
    assert not changes.changed
    assert list(reasons(changes).values()).count("its weight is quantized") == 15


def test_attention_counts_what_it_multiplies() -> None:
    """Two products of each head, over all keys."""
    decoder = Decoder(layers=1)
    alone = macs(decoder.model(), {"tokens": (1, 8)})
    wide = macs(
        replace(decoder, past=True).model(),
        {"tokens": (1, 8), "past0": (1, 2, 3, 16), "past1": (1, 2, 3, 16)},
    )
    assert alone is not None
    assert wide is not None
    assert wide - alone == 2 * 4 * 16 * 8 * 3


_BEHIND = ", , , "  # no angles, no positions
OPTIONS = {
    "a bias for each head": ("", f"{_BEHIND}, bias", {"bias": normal(1, 4, 6, 6)}),
    "one bias": ("", f"{_BEHIND}, bias", {"bias": normal(1, 1, 6, 6)}),
    "sinks": ("", f"{_BEHIND}, , sinks", {"sinks": normal(4)}),
    "a window": (", local_window_size=2, softcap=3.0, scale=0.2", "", {}),
    "all to all": (", causal=0", "", {}),
}


@pytest.mark.parametrize(("attrs", "inputs", "constants"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_attention_go_with_its_heads(attrs: str, inputs: str, constants: dict[str, Array]) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[1,6,12] x) => (float[1,6,5] y)
{{ a = MatMul(x, w) k = MatMul(x, l) e = MatMul(x, m)
   z, p, q = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2{attrs}>
     (a, k, e, , , last, total{inputs})
   y = MatMul(z, v) }}"""
    weights = normals(w=(12, 32), l=(12, 16), m=(12, 16), v=(32, 5))
    lengths = {"last": np.array([5], np.int32), "total": np.array(6, np.int32)}
    model = parse(text, {**weights, **lengths, **constants})
    skip_if_old(model)
    small, changes = apply(Prune(ratio=0.5, align=1), model)
    figures = PruneFigures.of(changes)
    assert figures.families == 1
    assert figures.oracle is not None
    assert figures.oracle < 1e-5
    assert small.graph.nodes[3].attrs["num_heads"] == 2
    for name, values in constants.items():
        assert stored(small, name).shape == tuple(2 if size == 4 else size for size in values.shape)


@pytest.mark.parametrize(("bits", "units"), [(4, 2), (8, 4)])
@pytest.mark.parametrize("flat", [True, False])
def test_zero_points_that_share_a_byte_go_together(bits: int, units: int, flat: bool) -> None:
    random = np.random.default_rng(0)
    constants: dict[str, Array] = {}
    for name, rows, columns in (("w", 32, 64), ("v", 64, 5)):
        blocks = rows // 16
        points = random.integers(0, 256, (columns, blocks * bits // 8), np.uint8)
        scales = random.uniform(0.01, 0.02, (columns, blocks)).astype(np.float32)
        constants |= {
            name: random.integers(0, 256, (columns, blocks, 2 * bits), np.uint8),
            f"s{name}": scales.reshape(-1) if flat else scales,
            f"z{name}": points.reshape(-1) if flat else points,
        }
    attrs = f"bits={bits}, block_size=16"
    text = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[N,3,32] x) => (float[N,3,5] y)
{{ a = com.microsoft.MatMulNBits<K=32, N=64, {attrs}>(x, w, sw, zw) r = Relu(a)
   y = com.microsoft.MatMulNBits<K=64, N=5, {attrs}>(r, v, sv, zv) }}"""
    model = parse(text, constants)
    assert [family.size for family in _families(model.copy()).families] == [units]
    small, changes = apply(Prune(ratio=0.5, align=1), model)
    figures = PruneFigures.of(changes)
    assert figures.oracle is not None
    assert figures.oracle < 1e-5
    first, _, last = small.graph.nodes
    assert (first.attrs["N"], last.attrs["K"]) == (32, 32)
    assert last.inputs[3].shape == (5, 2 * bits // 8)
