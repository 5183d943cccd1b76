"""For another machine: laid out for a target that is not here, and checked where it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxslim import cli
from onnxslim.errors import CalibrationError, TargetError, UsageError, ValidationError
from onnxslim.ir.model import load
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Recipe
from onnxslim.runtime import reference
from onnxslim.runtime.profile import optimized_model
from onnxslim.runtime.targets import Target
from onnxslim.validation import later
from tests.helpers import normal, parse

NET = (
    "g (float[N,4,6,6] x) => (float[N,8] y) { a = Conv<pads = [1,1,1,1]>(x, v) b = Relu(a) "
    "c = GlobalAveragePool(b) d = Flatten(c) i = Identity(d) y = MatMul(i, w) }"
)
# What is not installed where these tests run, in the plain environment or in that of another provider.
ABSENT = "tensorrt-rtx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, and in it."""
    parse(NET, {"v": normal(8, 4, 3, 3), "w": normal(8, 8)}).save(tmp_path / "in.onnx")
    np.savez(tmp_path / "x.npz", x=normal(96, 4, 6, 6))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    return cli.main(list(words))


def made(*more: str) -> None:
    assert run("slim", "in.onnx", "out.onnx", "--target", ABSENT, "--data", "x.npz", "--quiet", *more) == 0


# ----------------------------------------------------------------------------------------- at home


def test_what_is_not_here_is_said_to_have_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("slim", "in.onnx", "out.onnx", "--target", ABSENT, "--json", "--check", "sqnr=90") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert f"{ABSENT} itself has not run" in told["report"]["doubts"][0]
    assert [each["target"] for each in told["verdict"]["providers"]] == ["cpu"], (
        "it is the processor that ran"
    )
    assert f"warning: {ABSENT} itself has not run" in err
    assert f"to check it on {ABSENT}, take out.onnx, out.check.json and out.check.npz there" in err
    kept = later.read(Path("out.check.json"))
    assert (kept.target, kept.model, kept.limits, kept.made_up) == (ABSENT, "out.onnx", {"sqnr": 90.0}, True)


def test_names_are_quoted_in_what_to_call(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("slim", "in.onnx", "o ut.onnx", "--target", ABSENT) == 0
    assert "validate --resume 'o ut.check.json'" in capsys.readouterr().err


def test_nothing_is_left_for_a_target_that_runs_here(folder: Path) -> None:
    assert run("slim", "in.onnx", "out.onnx", "--simulate") == 0
    assert not list(folder.glob("*.check.*"))


def test_it_is_laid_out_for_the_target(folder: Path) -> None:
    recipe = Recipe(passes=(Quantize(effort="normal", optimize_for="latency"),), target=ABSENT)
    outcome = recipe.run("in.onnx", data="x.npz")
    zeros = [node.inputs[2] for node in outcome.model.nodes() if node.op == "QuantizeLinear"]
    assert zeros
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8)}
    (step,) = outcome.report.steps
    figures: Any = step.changes.figures
    assert figures.latency is None
    assert not figures.total, "what processors make of it is not counted"
    assert any(f"it is in the place of {ABSENT}" in skip.reason for skip in step.changes.skipped)


def test_simulation_has_no_integer_kernels(folder: Path) -> None:
    model = Recipe(passes=(Quantize(effort="quick"),)).run("in.onnx", data="x.npz").model
    fused, simulated = (
        {node.op_type for node in optimized_model(model, target).graph.node}
        for target in (Target.cpu(), Target.cpu().simulated())
    )
    assert "QLinearConv" in fused
    assert not {op for op in simulated if op.startswith(("QLinear", "QGemm", "MatMulInteger"))}
    assert {"QuantizeLinear", "Conv"} <= simulated


def test_a_target_without_integer_kernels_says_what_it_takes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", "in.onnx", "out.onnx", "--target", "webgpu", "--data", "x.npz", "--simulate"]
    assert run(*words) == UsageError.exit_code
    assert (
        "webgpu has no integer kernels; with activations=none weights are stored" in capsys.readouterr().err
    )
    assert run(*words, "--activations", "none", "--on-error", "keep") == 0


def test_few_samples_are_kept(folder: Path) -> None:
    made("--batch-size", "8")
    kept = later.read(Path("out.check.json"))
    assert (kept.batches, kept.samples, kept.made_up) == (8, later.MOST_SAMPLES, False)
    with np.load("out.check.npz") as arrays:
        assert arrays["input.7.x"].shape == (8, 4, 6, 6)
    made("--batch-size", "96")
    assert later.read(Path("out.check.json")).samples == 96, "one batch in any case"


def test_inputs_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    text = "g (bfloat16[2] x) => (float[2] y) { y = Cast<to = 1>(x) }"
    parse(text).save(tmp_path / "a.onnx")
    data = [{"x": np.ones(2, ml_dtypes.bfloat16)}]
    outcome = Recipe(passes=(Slim(),), target=ABSENT).run(parse(text), data=data)
    with pytest.raises(CalibrationError, match=r"input 'x' is of a type that .npz files do not hold"):
        outcome.save_check(tmp_path / "a.onnx")


# ----------------------------------------------------------------------------------------- where it is


def test_the_check_is_run_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("--check", "sqnr=60", "--check", "max_abs=0.001")
    (folder / "in.onnx").unlink()
    assert run("validate", "--resume", "out.check.json", "--provider", "reference", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    before, here = told["providers"]
    assert (before["target"], here["target"], told["samples"]) == ("cpu", "reference", 64)
    assert max(each["outputs"][0]["max_abs"] for each in (before, here)) < 1e-5
    assert any("the first model was not run here" in note for note in told["notes"])


def test_the_target_is_used_or_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made()
    assert run("validate", "--resume", "out.check.json") == TargetError.exit_code
    assert "is not available here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("factor", "refused"),
    [(-1.0, "output 'y' keeps -6.0 dB of the original, on processors inf dB"), (np.nan, "-inf dB")],
)
def test_a_target_that_computes_something_else_fails(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    refused: str,
) -> None:
    made()
    right: Callable[..., Sequence[Any]] = reference.ReferenceModel.run

    def wrong(self: Any, names: Any, feeds: Any, limits: Any) -> list[Any]:
        return [values * np.float32(factor) for values in right(self, names, feeds, limits)]

    monkeypatch.setattr(reference.ReferenceModel, "run", wrong)
    words = ["validate", "--resume", "out.check.json", "--provider", "reference"]
    assert run(*words) == ValidationError.exit_code
    out, err = capsys.readouterr()
    assert refused in err
    assert "note: reference: output 'y' of the second model is not what it is on cpu: it" in out


def test_limits_hold_there_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", "--resume", "out.check.json", "--provider", "reference"]
    made("--check", "max_abs=0.001")
    assert run(*words) == 0
    right: Callable[..., Sequence[Any]] = reference.ReferenceModel.run
    monkeypatch.setattr(
        reference.ReferenceModel, "run", lambda *told: [values + 0.01 for values in right(*told)]
    )
    assert run(*words) == ValidationError.exit_code
    assert "reference: output 'y' has max abs difference 0.01" in capsys.readouterr().err
    made()
    assert run(*words) == 0
    assert run(*words, "--require", "sqnr=90") == ValidationError.exit_code


def test_another_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made()
    load("in.onnx").save("out.onnx")
    assert run("validate", "--resume", "out.check.json", "--provider", "cpu") == ValidationError.exit_code
    assert "is not the model that 'out.check.json' is for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda told: told | {"model": "../in.onnx"}, "its model is not a file beside it"),
        (lambda told: told | {"version": 2}, "is a check of version 2"),
        (lambda told: told | {"plugin": "a.so"}, "plugin: Unexpected keyword argument"),
        (lambda told: told | {"batches": 0}, "it has no samples"),
        (lambda told: told | {"batches": 99}, "lacks output 'y' of batch"),
        (lambda told: told | {"limits": {"sqr": 3.0}}, "unknown requirement 'sqr'"),
        (lambda told: [told], "is no check: Input should be an object"),
    ],
)
def test_checks_are_read_strictly(folder: Path, change: Callable[[Any], Any], problem: str) -> None:
    made()
    file = Path("out.check.json")
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UsageError, match=problem):
        later.resume(file, Target.cpu())


def test_samples_are_no_code(folder: Path) -> None:
    made()
    np.savez("out.check.npz", x=np.array([print], object))
    with pytest.raises(UsageError, match=r"cannot read the samples 'out.check.npz': .*allow_pickle"):
        later.resume(Path("out.check.json"), Target.cpu())
    Path("out.check.npz").unlink()
    with pytest.raises(UsageError, match="cannot read the samples"):
        later.resume(Path("out.check.json"), Target.cpu())


@pytest.mark.parametrize(
    "words",
    [
        ["--resume", "a.check.json", "in.onnx"],
        ["--resume", "a.check.json", "--data", "x.npz"],
        ["in.onnx"],
        [],
    ],
)
def test_a_check_stands_alone(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", *words) == UsageError.exit_code
    assert "resume" in capsys.readouterr().err
