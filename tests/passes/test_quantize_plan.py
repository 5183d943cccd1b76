"""Plans of quantization: replayed they make the same bytes, and on another model they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim.engine.base import Context
from onnxslim.engine.check import wellformed
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.formats import plain
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes.quantize import Quantize, QuantizeFigures, search
from onnxslim.passes.quantize.build import Builder
from onnxslim.passes.quantize.recorded import LayerChoice, QuantizationPlan, RangeChoice
from onnxslim.passes.quantize.search import Search
from tests.helpers import FASHION, normal, parse, quantize

CHAIN = """g (float[N,8,6,6] x) => (float[N,8,6,6] y)
{ [first] a = Conv(x, w1, b1) ar = Relu(a)
  [middle] b = Conv<pads=[1,1,1,1]>(ar, w2, b2) br = Relu(b)
  [last] y = Conv(br, w3, b3) }"""
PRODUCTS = """g (float[N,64] x) => (float[N,32] y)
{ [first] a = MatMul(x, w) r = Relu(a) [last] y = MatMul(r, v) }"""


def convolutions() -> Model:
    uneven = np.geomspace(0.01, 1, 16).astype(np.float32)[:, None, None, None]
    weights = {"w2": normal(16, 8, 3, 3, seed=2) * uneven, "w3": normal(8, 16, 1, 1, seed=4)}
    biases = {"b1": normal(8, seed=1), "b2": normal(16, seed=3), "b3": normal(8, seed=5)}
    return parse(CHAIN, {"w1": normal(8, 8, 1, 1), **weights, **biases})


def products() -> Model:
    return parse(PRODUCTS, {"w": normal(64, 64), "v": normal(64, 32, seed=1)})


def batches(model: Model) -> list[dict[str, Array]]:
    shape = [size if isinstance(size, int) else 4 for size in model.inputs()[0].shape or ()]
    return [{"x": normal(*shape, seed=seed)} for seed in range(8)]


def planned(model: Model, **options: Any) -> tuple[Model, QuantizationPlan]:
    result, changes = quantize(model, batches(model), **options)
    plan = QuantizeFigures.of(changes).plan
    assert isinstance(plan, QuantizationPlan)
    assert plain(changes.figures)["plan"] == plan.to_dict()
    return result, plan


def replay(model: Model, plan: QuantizationPlan, folder: Path) -> Model:
    path = folder / "plan.json"
    path.write_text(plan.to_json())
    return quantize(model, batches(model), plan=path)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"observer": "percentile", "algorithm": "gptq", "exclude": ("middle",)},
        {"weights": "int4", "require_sqnr": 26, "algorithm": "cd"},
        {"require_sqnr": 36, "bias_correction": False},
        {"algorithm": "cd", "classifier": True, "activations": "int8"},
    ],
)
def test_a_plan_that_is_replayed_makes_the_same_bytes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convolutions()
    result, plan = planned(model, **options)
    for step in ("observer", "equalized", "rounding", "fitted", "layers", "ranges", "keep", "complete"):
        monkeypatch.setattr(Search, step, None)  # nothing is searched
    again = replay(model, plan, tmp_path)
    assert again.to_proto().SerializeToString() == result.to_proto().SerializeToString()


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "none"},
        {"activations": "none", "weights": "int4", "require_sqnr": 30},
        {"activations": "dynamic", "require_sqnr": 40, "classifier": True},
    ],
)
def test_the_other_ways_have_plans_too(options: dict[str, Any], tmp_path: Path) -> None:
    model = products()
    result, plan = planned(model, **options)
    again = replay(model, plan, tmp_path)
    assert again.to_proto().SerializeToString() == result.to_proto().SerializeToString()


def test_every_step_of_a_search_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels scaled, weights rounded and fitted in turn: all of it taken, whatever it does."""
    monkeypatch.setattr(search, "_better", lambda first, second: second)
    model = convolutions()
    result, plan = planned(model, weights="int4", algorithm="cd", require_sqnr=0)
    assert plan.equalized
    assert plan.refined
    assert plan.fitted == ()
    again = replay(model, plan, tmp_path)
    assert again.to_proto().SerializeToString() == result.to_proto().SerializeToString()
    other = replay(model, replace(plan, fitted=("middle",)), tmp_path)
    assert other.to_proto().SerializeToString() != result.to_proto().SerializeToString()


def test_a_plan_without_data_asks_for_none(tmp_path: Path) -> None:
    model, path = products(), tmp_path / "plan.json"
    result, changes = quantize(model, activations="none")
    plan = QuantizeFigures.of(changes).plan
    assert isinstance(plan, QuantizationPlan)
    path.write_text(plan.to_json())
    assert quantize(model, plan=path)[0].to_proto() == result.to_proto()
    path.write_text(replace(plan, refined=True).to_json())
    with pytest.raises(CalibrationError, match="needs calibration data"):
        quantize(model, plan=path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": (LayerChoice("other", (8, 8, 1, 1), None),)}, "there is no layer 'other'; known are: "),
        ({"layers": (LayerChoice("first", (8, 4, 1, 1), None),)}, "of layer 'first' is 8x8x1x1, not 8x4x1x1"),
        ({"fitted": ("midle",)}, "there is no layer 'midle'; did you mean 'middle'"),
        ({"special": (RangeChoice("other", "mse", 0.0),)}, "there is no tensor 'other'"),
    ],
)
def test_a_plan_of_another_model_is_refused_before_any_work(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convolutions()
    _, plan = planned(model, equalization=False)
    monkeypatch.setattr(Builder, "__call__", None)
    with pytest.raises(UsageError) as caught:
        replay(model, replace(plan, **changed), tmp_path)
    assert f"the plan of pass 'quantize' does not fit the model: {message}" in str(caught.value).replace(
        "the weight of", "of"
    )


def test_a_plan_has_to_speak_of_all_layers(tmp_path: Path) -> None:
    model = convolutions()
    _, plan = planned(model)
    with pytest.raises(UsageError, match="it says nothing of layer"):
        replay(model, replace(plan, layers=plan.layers[:1]), tmp_path)


def test_a_file_that_is_no_plan_is_refused_before_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}")
    with pytest.raises(
        UsageError, match=r"plan\.json' is not a plan of pass 'quantize': it is of pass 'prune'"
    ):
        Quantize(plan=path).run(products(), Context())


def test_layers_that_shared_a_bias_get_their_own() -> None:
    """Each is fitted to what it sees; two constants of one name would be no model."""
    with np.load(FASHION / "calibration.npz") as file:
        data = [{"image": images} for images in np.split(file["image"][:32], 4)]
    result, _ = quantize(load(FASHION / "resnet.onnx"), data, weights="int4")
    wellformed(result)
