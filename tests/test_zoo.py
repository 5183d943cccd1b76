"""Real exported models: nothing is lost, slim keeps what they compute, quantize fuses and stays close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.noise import sqnr
from onnxslim.engine.check import difference, interface
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import PassError
from onnxslim.ir.model import load
from onnxslim.models import zoo
from onnxslim.passes.legalize import Legalize
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.passes.slim import Slim
from onnxslim.passes.unfuse import Unfuse
from onnxslim.runtime.session import Session
from tests.helpers import as_fused
from tests.passes.test_unfuse import families

pytestmark = pytest.mark.zoo

# Models that have weights to run in integers, with the least SQNR (dB) of the quantized model, well below
# what is measured (see benchmarks/README.md): these tests catch mistakes, not losses.
QUANTIZABLE = {
    "efficientnet_lite0.torchscript": 14.0,
    "efficientnet_lite0.dynamo": 14.0,
    "minilm.torchscript": 16.0,
    "minilm.dynamo": 16.0,
    "ppocr_det": 12.0,
    "magika": 35.0,
}
# Of these, nothing is searched: one network of each kind is enough.
QUICKLY = ("efficientnet_lite0.torchscript", "minilm.torchscript", "ppocr_det")
PLAIN: dict[str, Any] = {"algorithm": "rtn", "equalization": False, "require_sqnr": 0}


def _fetched(name: str) -> str:
    if not zoo.available(name):
        pytest.skip(f"{name} is not in the cache: python models/zoo.py fetch (or python models/export.py)")
    pytest.importorskip("skimage", reason="inputs are made from photographs: pip install 'onnx-slimkit[zoo]'")
    return str(zoo.path(name))


@pytest.mark.parametrize("name", sorted(zoo.usual()))
def test_round_trip_is_byte_identical(name: str) -> None:
    proto = onnx.load(_fetched(name))
    written = load(proto).to_proto().SerializeToString(deterministic=True)
    assert written == proto.SerializeToString(deterministic=True)


# Maxima of int64 are not to be had before opset 12.
NOT_IN_11 = ("minilm.dynamo", "minilm.torchscript")


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("name", sorted(zoo.usual()))
def test_older_opsets_compute_the_same(name: str, opset: int) -> None:
    model, feeds = load(_fetched(name)), zoo.inputs(name, 2, seed=5)
    run = Pipeline(Legalize(opset=opset), on_error="raise", count=False)
    if opset == 11 and name in NOT_IN_11:
        with pytest.raises(PassError, match=r"has no form in opset 11"):
            run(model, data=CalibrationData(feeds))
        return
    result = run(model, data=CalibrationData(feeds))
    assert result.model.opset == opset
    assert interface(result.model) == interface(model)
    first, second = Session(model), Session(result.model)
    for batch in feeds:
        expected, found = first.run(batch), second.run(batch)
        assert not any(difference(expected[each], found[each], 10) for each in expected)


@pytest.mark.parametrize("name", ["ppocr_cls", "ppocr_det", "ppocr_rec", "silero_vad_16k_sequence"])
def test_files_that_onnx_runtime_has_optimized_have_the_families_of_their_originals(
    name: str, tmp_path: Path
) -> None:
    original = load(_fetched(name))
    result = Pipeline(Unfuse(), on_error="raise")(as_fused(original, tmp_path)).model
    assert not any(node.domain for node in result.nodes())
    assert families(result) == families(original)


@pytest.mark.parametrize("name", sorted(zoo.usual()))
def test_slim_keeps_outputs_and_interface_and_never_grows(name: str) -> None:
    model = load(_fetched(name))
    feeds = zoo.inputs(name, 2, seed=5)
    result = Pipeline(Slim(), on_error="raise")(model, data=CalibrationData(feeds))
    assert interface(result.model) == interface(model)
    before, after = model.stats(), result.model.stats()
    assert after.nodes <= before.nodes
    assert after.bytes <= before.bytes
    first, second = Session(model), Session(result.model)
    for batch in feeds:
        expected, actual = first.run(batch), second.run(batch)
        assert not any(difference(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("name", sorted(QUANTIZABLE))
def test_quantize_fuses_everything_and_stays_close(name: str) -> None:
    model = load(_fetched(name))
    data = CalibrationData(zoo.inputs(name, 8, seed=0))
    quantize = Quantize(**(PLAIN if name in QUICKLY else {}))
    result = Pipeline(Slim(), quantize, on_error="raise")(model, data=data)
    figures = QuantizeFigures.of(result.report.steps[-1].changes)
    assert figures.unfused == ()
    assert sum((figures.fused or {}).values()) > 2
    assert _sqnr(model, result.model, zoo.inputs(name, 8, seed=1)) > QUANTIZABLE[name]


def _sqnr(model: Any, quantized: Any, batches: list[dict[str, Any]]) -> float:
    first, second = Session(model), Session(quantized)
    return sqnr([first.run(feeds) for feeds in batches], [second.run(feeds) for feeds in batches])
