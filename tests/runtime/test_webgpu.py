"""WebGPU, really run: on a graphics card, or on one made of software (`nox -s webgpu`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.noise import Noise
from onnxslim.engine.base import Pass
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import TargetError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.models import zoo
from onnxslim.passes.factorize import Factorize, SchemeName
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.runtime import profile
from onnxslim.runtime.session import Session, no_latency
from onnxslim.runtime.targets import Target
from onnxslim.validation.compare import validate
from tests.helpers import FASHION, NETS, ROOT, normal, parse

pytestmark = pytest.mark.webgpu
WEBGPU = Target.webgpu()
WHOLE: tuple[SchemeName, ...] = ("svd", "output", "input", "spatial", "tucker")
MADE: Mapping[str, tuple[Pass, ...]] = {
    "float": (),
    "int8": (Slim(), Quantize(effort="quick")),
    "int4 weights": (Slim(), Quantize(activations="none", weights="int4", effort="quick")),
    "int4 blocks": (
        Slim(),
        Quantize(activations="none", weights="int4", layout="webgpu", effort="quick"),
    ),
    "pruned": (Prune(macs=0.7), Slim()),
    # By parameters: the times of layers on this processor say nothing here.
    # Not separable: see `test_convolutions_with_several_outputs_of_a_group_are_told_in_the_docs`.
    "factorized": (Factorize(params=0.7, effort="quick", schemes=WHOLE), Slim()),
}
NET = "g (float[N,8] x) => (float[N,8] y) { a = MatMul(x, w) y = Relu(a) }"
# What may run on the processor: quantizing has no WebGPU kernel, and shapes are computed where they are read.
LEFT = frozenset(
    ("QuantizeLinear", "Shape", "Slice", "Concat", "Gather", "Unsqueeze", "Reshape", "Cast", "Expand")
)
# The same of a model that computes a mask from numbers of words.
MASKING = LEFT | {"Range", "Max", "GatherND", "GatherElements", "Squeeze", "IsNaN", "GreaterOrEqual"}
WEIGHTED = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "MatMulNBits"}
# What may lie between a processor and WebGPU, in dB: rounding; with Q, a code next to the one that is meant.
ALIKE = {"int8": 40.0}


@pytest.fixture(autouse=True)
def _webgpu() -> None:
    if not profile.installed(WEBGPU):
        pytest.skip(f"{WEBGPU.provider} is not installed")
    if why := profile.unusable(WEBGPU):
        pytest.skip(why)


@cache
def images(count: int) -> dict[str, Array]:
    with np.load(FASHION / "test.npz") as kept:
        return {"image": kept["image"][:count]}


@cache
def made(net: str, how: str) -> Model:
    """A bundled network, changed on the processor."""
    model = load(FASHION / f"{net}.onnx")
    if not MADE[how]:
        return model
    data = CalibrationData.from_npz(FASHION / "calibration.npz").take(range(64), 8)
    result = Pipeline(*MADE[how], on_error="raise", count=False)(model, data=data)
    assert all(step.changes for step in result.report.steps[:1])
    return result.model


def in_floats(model: Model) -> Model:
    """The same, with products by blocks that do not turn their data into integers.

    At level 4 both do, each in its own way: processors always, WebGPU where blocks and sizes suit it.
    """
    copy = model.copy()
    for node in copy.graph.nodes:
        if node.op == "MatMulNBits":
            node.attrs["accuracy_level"] = 1
    return copy


def compared(
    model: Model, feeds: Mapping[str, Array], folder: Path, least: float, left: frozenset[str] = LEFT
) -> dict[str, profile.PlacedNode]:
    """Run a model here and on processors, in float between Q and DQ; returns what ran where."""
    model = in_floats(model)
    session = Session(model, WEBGPU, profile=folder)
    here, there = session.run(feeds), Session(model, Target.cpu().simulated()).run(feeds)
    for name, wanted in there.items():
        noise = Noise()
        noise.add(wanted.astype(np.float64).reshape(-1), here[name].astype(np.float64).reshape(-1))
        assert noise.sqnr > least, f"{name}: {noise.sqnr:.1f} dB"
    nodes = profile.placed_in(session.end_profile())
    weighted = {name: node for name, node in nodes.items() if node.op in WEIGHTED}
    assert weighted
    assert {node.provider for node in weighted.values()} == {WEBGPU.provider}
    assert {node.op for node in nodes.values() if node.provider != WEBGPU.provider} <= left
    return nodes


# One network for each way to change them; the others take longer than everybody's tests may.
QUICK = {how: "vit" if "int4" in how else "resnet" for how in MADE}
CASES = [
    pytest.param(net, how, marks=[pytest.mark.slow] * (QUICK[how] != net)) for how in MADE for net in NETS
]


@pytest.mark.parametrize(("net", "how"), CASES)
def test_networks_compute_what_they_do_on_processors(net: str, how: str, tmp_path: Path) -> None:
    model = made(net, how)
    nodes = compared(model, images(1), tmp_path, ALIKE.get(how, 100.0))
    if how == "int8":
        quantizing = [node for node in nodes.values() if node.op == "QuantizeLinear"]
        assert quantizing
        assert {node.provider for node in quantizing} == {"CPUExecutionProvider"}
    if how == "int4 blocks" and net == "vit":
        assert "MatMulNBits" in {node.op for node in nodes.values()}


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("how", MADE)
def test_a_sentence_model(how: str, tmp_path: Path) -> None:
    name = "minilm.dynamo"
    if not zoo.available(name):
        pytest.skip(f"{name} is not in the cache: python models/zoo.py fetch (or python models/export.py)")
    model, data = load(zoo.path(name)), CalibrationData(zoo.inputs(name, 16))
    if MADE[how]:
        model = Pipeline(*MADE[how], on_error="raise", count=False)(model, data=data).model
    (feeds,) = zoo.inputs(name, 1, seed=1)
    compared(model, feeds, tmp_path, ALIKE.get(how, 100.0), MASKING)


def test_half_precision_on_a_device_without_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SwiftShader has none; where there is some, it is used."""
    net, model = parse(NET, {"w": normal(8, 8)}), str(tmp_path / "net.onnx")
    net.save(model)
    half = Pipeline(Half())(net).model
    half.save(tmp_path / "half.onnx")
    words = ["validate", model, str(tmp_path / "half.onnx"), "--provider", "webgpu", "--rounds", "0"]
    try:
        Session(half, WEBGPU).run({"x": normal(2, 8)})
    except TargetError:
        for asked in (words, ["half", model, str(tmp_path / "out.onnx"), "--target", "webgpu", "--quiet"]):
            capfd.readouterr()
            assert cli.main(asked) == TargetError.exit_code
            out, err = capfd.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert "requires f16 but the device does not support it" in err
        assert not (tmp_path / "out.onnx").exists()
    else:
        assert cli.main(words) == 0


def test_times_of_a_device_made_of_software_are_not_told() -> None:
    model = parse(NET, {"w": normal(8, 8)})
    verdict = validate(model, model, [{"x": normal(2, 8)}], [WEBGPU], rounds=2)
    (row,) = verdict.providers
    software = no_latency(WEBGPU)
    assert (row.latency is None) == (row.ratio is None) == bool(software)
    assert any("no latency is told" in note for note in verdict.notes) == bool(software)


@pytest.mark.parametrize("words", [["validate", "{0}", "{0}", "--provider"], ["slim", "{0}", "--target"]])
def test_without_a_device_it_is_refused(words: list[str]) -> None:
    """ONNX Runtime itself would print a banner and take the processor."""
    model = str(FASHION / "resnet.onnx")
    nothing = {"VK_DRIVER_FILES": os.devnull, "VK_ICD_FILENAMES": os.devnull}
    done = subprocess.run(
        [sys.executable, "-m", "onnxslim", *(word.format(model) for word in words), "webgpu"],
        capture_output=True,
        text=True,
        env={**os.environ, **nothing, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))},
    )
    assert (done.returncode, done.stdout) == (TargetError.exit_code, "")
    assert done.stderr.count("\n") == 1
    assert "WebGpuExecutionProvider cannot be used here" in done.stderr


@pytest.mark.parametrize(("outputs", "right"), [(1, True), (2, True), (4, True), (6, False)])
def test_convolutions_with_several_outputs_of_a_group_are_told_in_the_docs(
    outputs: int, right: bool, tmp_path: Path
) -> None:
    """A fault of ONNX Runtime 1.27, which docs/providers.md tells: this fails once it is mended."""
    model = parse(
        f"g (float[1,48,14,14] x) => (float[1,{48 * outputs},14,14] y) "
        "{ y = Conv<group=48, pads=[1,1,1,1]>(x, w) }",
        {"w": normal(48 * outputs, 1, 3, 3)},
    )
    feeds = {"x": normal(1, 48, 14, 14)}
    (here,), (there,) = (Session(model, where).run(feeds).values() for where in (WEBGPU, Target.cpu()))
    assert np.allclose(here, there, atol=1e-4) is right
