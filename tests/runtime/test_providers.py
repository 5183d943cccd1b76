"""Execution providers: really used, or refused; and the reference evaluator as an independent judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim import cli, passes
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError, TargetError, UsageError
from onnxslim.ir.model import Model, load
from onnxslim.ops.layouts import LAYOUTS
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.quantize.run import QuantizeRun
from onnxslim.passes.slim import Slim
from onnxslim.report.text import verdict_text
from onnxslim.runtime import native, ort, profile, reference
from onnxslim.runtime.native import CPU, onnxruntime
from onnxslim.runtime.profile import available, counted, places
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import REGISTRY, Target
from onnxslim.validation.compare import validate
from onnxslim.validation.verdict import Verdict
from tests.helpers import FASHION, NETS, parse

AZURE = "AzureExecutionProvider"
INSTALLED = onnxruntime().get_available_providers()
PRODUCT = "g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1,2,3,4}> { p = MatMul(x, w)  y = Relu(p) }"
X = {"x": np.ones((3, 2), np.float32)}


# --------------------------------------------------------------------------------------- what runs where


def test_operators_are_counted_where_they_run() -> None:
    assert counted(places(parse(PRODUCT), Target.cpu(), X)) == {CPU: 2}


@pytest.mark.skipif(AZURE not in INSTALLED, reason=f"{AZURE} is not installed")
def test_a_provider_that_loads_but_runs_nothing_is_refused() -> None:
    """It is in every wheel of onnxruntime, takes no standard operator, and its sessions name it first."""
    silent = Target("azure", AZURE)
    assert Session(parse(PRODUCT), silent).run(X)["y"].shape == (3, 2)
    with pytest.raises(TargetError, match=f"{AZURE} loads, but runs no operator .* {CPU} runs 2"):
        places(parse(PRODUCT), silent, X)
    with pytest.raises(TargetError, match="loads, but runs no operator"):
        validate(parse(PRODUCT), parse(PRODUCT), [X], [silent], rounds=0)


def test_what_is_available_really_works() -> None:
    found = available()
    assert found[-1] == Target.cpu()
    assert Target.reference() not in found
    for target in found:
        assert counted(places(parse(PRODUCT), target, X))[target.provider] >= 1


class Runtime:
    """ONNX Runtime with a provider in its wheel that does not work on this machine.

    Args:
        gpu: opens a session on that provider.
    """

    def __init__(self, gpu: Callable[..., Any]) -> None:
        self._gpu = gpu

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime(), name)

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", CPU]

    def InferenceSession(self, source: Any, options: Any, providers: Any, **more: Any) -> Any:
        open_ = onnxruntime().InferenceSession if providers[0][0] == CPU or providers == [CPU] else self._gpu
        return open_(source, options, providers=providers, **more)


def test_a_provider_that_does_not_load_is_not_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("/a/b.cc:1 void f(int) Please install TensorRT libraries")

    monkeypatch.setattr(native, "onnxruntime", lambda: Runtime(missing))
    with pytest.raises(TargetError, match=r"^Tensorrt.* cannot be used here: Please install TensorRT lib"):
        Session(parse(PRODUCT), Target.tensorrt())
    with pytest.raises(LoadError, match="refuses the model"):
        Session(parse(PRODUCT.replace("Relu(p)", "my.op(p)"), opset=17), Target.tensorrt())


@pytest.mark.parametrize(
    "words", [["validate", "{0}", "{0}", "--provider", "tensorrt"], ["slim", "{0}", "--target", "tensorrt"]]
)
def test_a_silent_fallback_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime only logs that it took another provider; the session tells when it is asked."""

    def elsewhere(source: Any, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        assert [name for name, _ in providers] == ["TensorrtExecutionProvider"]
        return onnxruntime().InferenceSession(source, options, providers=[CPU])

    monkeypatch.setattr(native, "onnxruntime", lambda: Runtime(elsewhere))
    monkeypatch.setenv("ONNXSLIM_ISOLATE", "0")  # workers have the real one
    refused = f"TensorrtExecutionProvider was asked for, but cannot be used here: .* fell back to {CPU}"
    with pytest.raises(TargetError, match=refused):
        Session(parse(PRODUCT), Target.tensorrt())
    parse(PRODUCT).save(tmp_path / "a.onnx")
    profile.unusable.cache_clear()
    try:
        assert "fell back" in profile.unusable(Target.tensorrt())
        assert cli.main([word.format(tmp_path / "a.onnx") for word in words]) == TargetError.exit_code
    finally:
        profile.unusable.cache_clear()
    assert f"fell back to {CPU}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- the registry


def test_a_new_provider_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    npu = Target("npu", CPU, layout=LAYOUTS["qnn"])
    monkeypatch.setitem(REGISTRY, npu.name, npu)
    assert Target.named("NPU") is npu
    assert npu in available()
    with pytest.raises(TargetError, match=r"known are: .*cpu, .*npu"):
        Target.named("tpu")
    model = str(tmp_path / "a.onnx")
    parse(PRODUCT).save(model)
    assert cli.main(["slim", model, "--target", "npu"]) == 0
    capsys.readouterr()
    assert cli.main(["validate", model, model, "--provider", "npu", "--json"]) == 0
    (provider,) = json.loads(capsys.readouterr().out)["providers"]
    assert provider["target"] == "npu"
    assert cli.main(["quantize", "--help"]) == 0
    assert "npu" in capsys.readouterr().out
    assert QuantizeRun(Quantize(layout="npu"))._target(Target.cpu()).layout.activation == np.uint16
    with pytest.raises(UsageError, match=r"'layout': input should be 'target', .* or 'npu', not 'tpu'"):
        passes.create("quantize", {"layout": "tpu"})


def test_threads_reach_providers_that_do_not_go_by_the_session() -> None:
    told = ort._provider_options(Target.openvino().with_threads(3))
    assert dict(told) == {"device_type": "CPU", "num_of_threads": "3"}
    assert dict(ort._provider_options(Target.openvino())) == {"device_type": "CPU"}


# ------------------------------------------------------------------------------------ the third judge


def judged(a: Model, b: Model, data: Any = (X,)) -> Verdict:
    return validate(a, b, list(data), [Target.reference(), Target.cpu()], rounds=5)


def test_the_reference_evaluator_judges_too() -> None:
    verdict = judged(parse(PRODUCT), parse(PRODUCT))
    cpu, reference = verdict.providers
    assert (cpu.target, reference.target) == ("cpu", "reference")
    assert reference.outputs[0].equal == reference.original[0].equal == 1.0
    assert reference.latency is None
    assert cpu.latency is not None
    assert not [note for note in verdict.notes if "itself" in note]


def test_integer_models_of_old_opsets_can_be_judged() -> None:
    model = load(FASHION / "resnet.onnx")
    data = CalibrationData.from_npz(FASHION / "calibration.npz")
    quantized = Pipeline(Quantize(), on_error="raise")(model, data=data).model
    assert quantized.opset < reference.REFERENCE_OPSET
    batch = {"image": np.load(FASHION / "test.npz")["image"][:8]}
    verdict = judged(model, quantized, [batch])
    cpu, independent = (provider.outputs[0].sqnr for provider in verdict.providers)
    assert cpu is not None
    assert independent is not None
    assert abs(cpu - independent) < 3
    assert independent > 30


def test_what_the_reference_evaluator_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match=r"onnx.reference refuses the model: .*nonsense"):
        Session(parse(PRODUCT.replace("Relu(p)", "my.nonsense(p)")), Target.reference())
    with pytest.raises(LoadError, match=r"onnx.reference fails to run the model"):
        Session(parse(PRODUCT), Target.reference()).run({"x": np.ones((3, 5), np.float32)})
    with pytest.raises(TargetError, match="does not tell what ran where"):
        places(parse(PRODUCT), Target.reference(), X)
    monkeypatch.setattr(reference, "MAX_REFERENCE_BYTES", 15)
    with pytest.raises(TargetError, match="is for small models: this one has 16 bytes of constants"):
        Session(parse(PRODUCT), Target.reference())


def test_providers_that_disagree_on_the_original_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Sequence[Any]] = reference.ReferenceModel.run

    def wrong(self: Any, names: Any, feeds: Any, limits: Any) -> list[Any]:
        return [values * 1.5 for values in right(self, names, feeds, limits)]

    monkeypatch.setattr(reference.ReferenceModel, "run", wrong)
    verdict = judged(parse(PRODUCT), parse(PRODUCT))
    verdict.require(sqnr=100)
    (note,) = [note for note in verdict.notes if "itself" in note]
    assert note.startswith(
        "reference: output 'y' of the first model itself is not what it is on cpu: it differs by"
    )
    assert note.endswith("that lies between the providers, not in the second model")


def test_the_reference_evaluator_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parse(PRODUCT).save(tmp_path / "a.onnx")
    words = ["validate", *[str(tmp_path / "a.onnx")] * 2, "--provider", "reference", "--json"]
    assert cli.main(words) == 0
    (provider,) = json.loads(capsys.readouterr().out)["providers"]
    assert provider["target"] == "reference"
    assert provider["placed"] is None


# --------------------------------------------------------------------------- providers of other wheels


def require(target: Target) -> None:
    if not profile.installed(target):
        pytest.skip(f"{target.provider} is not installed")
    if why := profile.unusable(target):
        pytest.skip(why)


def compared(name: str, target: Target) -> Verdict:
    """A network in float and in integers made for this target, both here and on processors."""
    model = load(FASHION / f"{name}.onnx")
    data = CalibrationData.from_npz(FASHION / "calibration.npz")
    test = CalibrationData.from_npz(FASHION / "test.npz", batch_size=50, exclude=["label"])
    labels = np.load(FASHION / "test.npz")["label"]
    result = Pipeline(Slim(), Quantize(), on_error="raise")(model, data=data, target=target)
    return validate(model, result.model, test, [target, Target.cpu()], labels=labels, rounds=5)


def hold(verdict: Verdict, target: Target) -> None:
    here = verdict.providers[1]
    assert here.target == target.name
    assert here.placed is not None
    assert all(counts[target.provider] >= 1 for counts in here.placed)
    assert (here.original[0].sqnr or 0) > 100, "in float it computes what processors compute"
    verdict.require(sqnr=28, max_accuracy_drop=0.01)
    assert target.provider in verdict_text(verdict)


@pytest.mark.openvino
@pytest.mark.parametrize("name", NETS)
def test_openvino(name: str) -> None:
    require(Target.openvino())
    hold(compared(name, Target.openvino()), Target.openvino())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "target",
    [Target.cuda(), Target.tensorrt(), Target.named("tensorrt-rtx")],
    ids=lambda target: str(target.name),
)
def test_gpu(target: Target, name: str) -> None:
    require(target)
    hold(compared(name, target), target)


BROKEN = [t for t in (Target.cuda(), Target.tensorrt()) if t.provider in INSTALLED and t not in available()]


@pytest.mark.parametrize("target", [Target.cuda(), Target.tensorrt()], ids=lambda target: str(target.name))
def test_a_gpu_wheel_without_a_gpu_refuses(
    target: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if target.provider not in INSTALLED or target in available():
        pytest.skip(f"{target.provider} is not installed, or it works (nox -s gpu_fallback has it broken)")
    parse(PRODUCT).save(tmp_path / "a.onnx")
    model = str(tmp_path / "a.onnx")
    for words in (
        ["validate", model, model, "--provider", target.name],
        ["slim", model, "--target", target.name],
    ):
        assert cli.main(words) == 7
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "cannot be used here" in err
    assert cli.main(["validate", model, model, "--rounds", "0"]) == 0, (
        "without --provider, what works is used"
    )


def test_the_wheel_of_openvino_is_known_by_its_provider() -> None:
    assert Target.named("OpenVINOExecutionProvider") == Target.named("OpenVINO") == Target.openvino()


def test_threads_that_wait_leave_their_cores_alone() -> None:
    model = parse("g (float[512,512] x, float[512,512] w) => (float[512,512] y) { y = MatMul(x, w) }")
    square = np.ones((512, 512), np.float32)
    session = Session(model, Target.cpu(threads=2), spin=False)

    def seconds() -> float:
        session.run({"x": square, "w": square})
        start = time.process_time()
        time.sleep(0.2)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.01
