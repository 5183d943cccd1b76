"""LSTMs whose data and state become integers as they come."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.passes.quantize.weights import MAX_PAIR
from tests.helpers import filled, normal, ops, parse, quantize, reasons, sqnr_of, stored

_dynamic = partial(quantize, activations="dynamic")
HIDDEN = 64


def _model(
    attrs: str = "", reads: str = "x, w, r", *, op: str = "LSTM", directions: int = 1, gates: int = 4
) -> Model:
    """A recurrent layer of all the inputs that its call names."""
    size = gates * HIDDEN
    constants = (
        f"float[{directions},{size},48] w = {{0}}, float[{directions},{size},{HIDDEN}] r = {{0}}, "
        f"float[{directions},{2 * size}] b = {{0}}, float[{directions},{3 * HIDDEN}] p = {{0}}"
    )
    state = f"float[{directions},N,{HIDDEN}]"
    model = parse(
        f"g (float[S,N,48] x, {state} h, {state} c, int32[N] n) => "
        f"(float[S,{directions},N,{HIDDEN}] y, {state} last)"
        f"<{constants}> {{ [layer] y, last = {op}<hidden_size={HIDDEN}{attrs}>({reads}) }}"
    )
    return filled(model, 0.15)


FEEDS = {
    "x": normal(9, 3, 48, seed=5),
    "h": 0.3 * normal(1, 3, HIDDEN, seed=6),
    "c": 0.3 * normal(1, 3, HIDDEN, seed=7),
    "n": np.array([9, 4, 7], np.int32),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("attrs", "reads", "directions"),
    [
        ("", "x, w, r", 1),
        ("", "x, w, r, b", 1),
        ("", "x, w, r, b, , h, c", 1),
        ("", "x, w, r, b, n, h, c", 1),
        ("", "x, w, r, b, , h, c, p", 1),
        (', direction="reverse"', "x, w, r, b, n", 1),
        (', direction="bidirectional"', "x, w, r, b, n", 2),
        (", clip=0.5", "x, w, r, b", 1),
        (', activations=["HardSigmoid","Relu","Tanh"]', "x, w, r, b", 1),
    ],
)
def test_lstms_of_every_kind_run_in_integers(
    attrs: str, reads: str, directions: int, per_channel: bool
) -> None:
    model = _model(attrs, reads, directions=directions)
    result, changes = _dynamic(model, per_channel=per_channel)
    assert ops(result) == {"DynamicQuantizeLSTM": 1}
    assert QuantizeFigures.of(changes).fused == QuantizeFigures.of(changes).total == {"LSTM": 1}
    assert not QuantizeFigures.of(changes).unfused
    shape = (directions, 3, HIDDEN)
    feeds = {**FEEDS, "h": np.resize(FEEDS["h"], shape), "c": np.resize(FEEDS["c"], shape)}
    assert sqnr_of(model, result, feeds) > 28
    (node,) = result.graph.nodes
    assert node.name == "layer"
    assert {each.dtype for each in node.inputs[1:3]} == {np.dtype(np.int8)}
    assert not {"w", "r"} & result.graph.initializers.keys()
    assert result.stats().bytes < 0.35 * model.stats().bytes


def test_no_pair_of_codes_can_saturate() -> None:
    model = _model()
    for name in ("w", "r"):
        model.graph.initializers[name].values = np.abs(stored(model, name)) ** 0.1
    result, changes = _dynamic(model)
    assert QuantizeFigures.of(changes).tightened == {"layer": 8 * HIDDEN}
    for weight in result.graph.nodes[0].inputs[1:3]:
        assert isinstance(weight, Constant)
        codes = weight.values.astype(int)
        assert np.abs(codes[:, 0:-1:2] + codes[:, 1::2]).max() <= MAX_PAIR
    assert sqnr_of(model, result, FEEDS) > 28


@pytest.mark.parametrize(
    ("op", "gates", "reason"),
    [("GRU", 3, "no integer kernel for GRU"), ("RNN", 1, "no integer kernel for RNN")],
)
def test_other_recurrent_layers_stay_in_floating_point(op: str, gates: int, reason: str) -> None:
    model = _model(op=op, gates=gates)
    result, changes = _dynamic(model)
    assert reason in reasons(changes)["layer"]
    assert ops(result) == {op: 1}


def test_what_cannot_or_need_not_stays() -> None:
    small = parse(
        "g (float[S,N,8] x) => (float[S,1,N,8] y) <float[1,32,8] w = {0}, float[1,32,8] r = {0}>"
        " { [layer] y = LSTM<hidden_size=8>(x, w, r) }"
    )
    assert "as fast in floating point" in reasons(_dynamic(filled(small))[1])["layer"]
    shared = filled(
        parse(
            f"g (float[S,N,{HIDDEN}] x) => (float[S,1,N,{HIDDEN}] y) <float[1,256,{HIDDEN}] w = {{0}}>"
            f" {{ [layer] y = LSTM<hidden_size={HIDDEN}>(x, w, w) }}"
        )
    )
    assert "other nodes read its weight" in reasons(_dynamic(shared)[1])["layer"]
    model = _model()
    assert "excluded" in reasons(_dynamic(model, exclude=("layer",))[1])["layer"]
    model.graph.initializers["w"].values = np.full((1, 4 * HIDDEN, 48), np.inf, np.float32)
    assert "infinities" in reasons(_dynamic(model)[1])["layer"]


def test_static_integers_say_why_they_leave_it() -> None:
    model = _model()
    _, changes = quantize(model, [FEEDS])
    assert "activations=dynamic turns it into integers" in reasons(changes)["layer"]


def test_a_layer_that_loses_too_much_stays_in_floating_point(tmp_path: Path) -> None:
    model = _model("", "x, w, r, b, , h, c")
    data = [{**FEEDS, "x": normal(9, 3, 48, seed=seed)} for seed in range(4)]
    run = Pipeline(Quantize(activations="dynamic", require_sqnr=80), on_error="raise")
    result = run(model, data=data)
    assert ops(result.model) == {"LSTM": 1}
    fine = Pipeline(Quantize(activations="dynamic", require_sqnr=25), on_error="raise")(model, data=data)
    assert ops(fine.model) == {"DynamicQuantizeLSTM": 1}
    plan = QuantizeFigures.of(fine.report.steps[0].changes).plan
    assert plan is not None
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    again = Pipeline(Quantize(plan=tmp_path / "plan.json"), on_error="raise")(model, data=data)
    assert again.model.to_proto() == fine.model.to_proto()
