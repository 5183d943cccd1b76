"""Execution providers: really used, or refused; and the reference evaluator as an independent judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError, TargetError
from onnxslim.ir.model import Model, load
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.report.text import verdict_text
from onnxslim.runtime import reference, session
from onnxslim.runtime.session import Session, available, onnxruntime, placement
from onnxslim.runtime.targets import CPU, OPENVINO, Target
from onnxslim.validation.compare import validate
from onnxslim.validation.verdict import Verdict
from tests.helpers import parse

FASHION = Path(__file__).parents[2] / "models" / "fashion"
NETS = ("resnet", "mobilenet", "vit")
AZURE = "AzureExecutionProvider"
INSTALLED = onnxruntime().get_available_providers()
PRODUCT = "g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1,2,3,4}> { p = MatMul(x, w)  y = Relu(p) }"
X = {"x": np.ones((3, 2), np.float32)}


# --------------------------------------------------------------------------------------- what runs where


def test_operators_are_counted_where_they_run() -> None:
    assert placement(parse(PRODUCT), Target.cpu(), X) == {CPU: 2}


@pytest.mark.skipif(AZURE not in INSTALLED, reason=f"{AZURE} is not installed")
def test_a_provider_that_loads_but_runs_nothing_is_refused() -> None:
    """It is in every wheel of onnxruntime, takes no standard operator, and its sessions name it first."""
    silent = Target("azure", AZURE)
    assert Session(parse(PRODUCT), silent).run(X)["y"].shape == (3, 2)
    with pytest.raises(TargetError, match=f"{AZURE} loads, but runs no operator .* {CPU} runs 2"):
        placement(parse(PRODUCT), silent, X)
    with pytest.raises(TargetError, match="loads, but runs no operator"):
        validate(parse(PRODUCT), parse(PRODUCT), [X], [silent], rounds=0)


def test_what_is_available_really_works() -> None:
    found = available()
    assert found[-1] == Target.cpu()
    assert Target.reference() not in found
    for target in found:
        assert placement(parse(PRODUCT), target, X)[target.provider] >= 1


def test_a_provider_that_does_not_load_is_not_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        """ONNX Runtime with a provider whose libraries are missing, as onnxruntime-gpu without TensorRT."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def get_available_providers(self) -> list[str]:
            return ["TensorrtExecutionProvider", CPU]

        def InferenceSession(self, source: Any, options: Any, providers: Any, **more: Any) -> Any:
            if providers[0] != CPU and providers[0][0] != CPU:
                raise RuntimeError("/a/b.cc:1 void f(int) Please install TensorRT libraries")
            return real.InferenceSession(source, options, providers=providers, **more)

    real = onnxruntime()
    monkeypatch.setattr(session, "onnxruntime", Runtime)
    with pytest.raises(TargetError, match=r"^Tensorrt.* cannot be used here: Please install TensorRT lib"):
        Session(parse(PRODUCT), Target.tensorrt())
    with pytest.raises(LoadError, match="refuses the model"):
        Session(parse(PRODUCT.replace("Relu(p)", "my.op(p)"), opset=17), Target.tensorrt())


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
    monkeypatch.setattr(reference, "MAX_REFERENCE_BYTES", 15)
    with pytest.raises(TargetError, match="is for small models: this one has 16 bytes of constants"):
        Session(parse(PRODUCT), Target.reference())


def test_providers_that_disagree_on_the_original_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., list[Any]] = reference.ReferenceSession.run

    def wrong(self: Any, names: Any, feeds: Any) -> list[Any]:
        return [values * 1.5 for values in right(self, names, feeds)]

    monkeypatch.setattr(reference.ReferenceSession, "run", wrong)
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
    if target.provider not in INSTALLED:
        pytest.skip(f"{target.provider} is not in the installed onnxruntime")
    if target not in available():
        pytest.skip(f"{target.provider} is installed but cannot be used on this machine")


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
@pytest.mark.parametrize("target", [Target.cuda(), Target.tensorrt()], ids=lambda target: str(target.name))
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
    assert Target.named("OpenVINO").provider == OPENVINO
