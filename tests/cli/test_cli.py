"""The command line: what it does, what it says where, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import pytest
from pydantic import Field

from onnxslim import cli, passes
from onnxslim.cli import words
from onnxslim.engine.base import Change, Changes, Context, Pass, options
from onnxslim.errors import PassError
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model, load
from onnxslim.runtime.session import Session
from tests.helpers import FASHION, ROOT, heed_interrupts, normal, normals, ops, parse, skip_if_opset_is_newer


@options
class Scale(Pass):
    """Multiplies every constant.

    A second paragraph that no summary shows.
    """

    name: ClassVar[str] = "scale"

    by: float = Field(default=1.0, gt=0, description="the factor")
    only: tuple[str, ...] = Field(default=(), description="names of the constants")
    how: Literal["all", 8] = Field(default="all", description="a way")
    loud: bool = Field(default=False, description="whether to say so")

    def run(self, model: Model, ctx: Context) -> Changes:
        changed = []
        for constant in model.constants():
            if self.by != 1 and (not self.only or constant.name in self.only):
                constant.values = constant.values * np.float32(self.by)
                changed.append(Change(constant.name, "scaled"))
        return Changes(tuple(changed))


@options
class Broken(Pass):
    """Renames an output, which no pass may do."""

    name: ClassVar[str] = "broken"

    def run(self, model: Model, ctx: Context) -> Changes:
        model.graph.outputs[0].name = "other"
        return Changes((Change("y", "renamed"),))


@options
class Failing(Pass):
    """Fails in a way that depends on its option."""

    name: ClassVar[str] = "failing"

    kind: Literal["pass", "bug", "interrupt", "disk"] = Field(default="pass", description="how")

    def run(self, model: Model, ctx: Context) -> Changes:
        raise {
            "pass": PassError("no such \x1b[2Jluck"),
            "bug": ZeroDivisionError("oops"),
            "interrupt": KeyboardInterrupt(),
            "disk": PermissionError(13, "Permission denied", "/some/file"),
        }[self.kind]


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three more passes."""
    for cls in (Scale, Broken, Failing):
        module = types.ModuleType(f"onnxslim.passes.{cls.name}")
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(passes, "REGISTRY", (*passes.REGISTRY, (cls.name, cls.__name__)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model `in.onnx`, inputs with labels in `data.npz`, and a folder of the same inputs."""
    model = parse("g (float[N,4] x) => (float[N,4] y) <float[4] w = {1, 1, 1, 1}> { y = Mul(x, w) }")
    model.save(tmp_path / "in.onnx")
    samples = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=samples, label=samples.argmax(1), words=np.array(["a", "b"]))
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", x=samples)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line on words, of which those with a file's suffix are taken to be in `folder`."""

    def run(*words: str) -> tuple[int, str, str]:
        suffixes = (".onnx", ".npz", ".json", "/")
        code = cli.main([str(folder / word) if word.endswith(suffixes) else word for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


Run = Callable[..., tuple[int, str, str]]


def weights(path: Path) -> list[float]:
    constant = next(load(path).constants())
    return list(constant.values.tolist())


# ------------------------------------------------------------------------------------------------ commands


def test_run_saves_the_result_and_tells(run: Run, folder: Path) -> None:
    code, out, err = run("run", "in.onnx", "out.onnx", "-p", "scale:by=2", "-p", "scale:by=3,only=w")
    assert code == 0
    assert weights(folder / "out.onnx") == [6.0] * 4
    assert "1 × scaled" in out
    warning, saved = err.splitlines()
    assert warning.startswith("onnxslim: warning: hardly the same model: the result keeps -14.0 dB, on 5 ")
    assert saved.startswith("onnxslim: saved ")
    assert weights(folder / "in.onnx") == [1.0] * 4


def test_a_model_may_be_replaced_in_place(run: Run, folder: Path) -> None:
    assert run("run", "in.onnx", "in.onnx", "-p", "scale:by=2")[0] == 0
    assert weights(folder / "in.onnx") == [2.0] * 4


def test_without_a_place_nothing_is_saved(run: Run, folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, err = run("run", "in.onnx", "-p", "scale:by=2")
    assert code == 0
    assert "scaled" in out
    assert "nothing was saved" in err
    assert sorted(folder.iterdir()) == before


def test_weights_go_outside_when_asked(run: Run, folder: Path) -> None:
    text = "g (float[N,512] x, float[512] w) => (float[N,512] y) { y = Mul(x, w) }"
    parse(text, {"w": np.ones(512, np.float32)}).save(folder / "in.onnx")
    assert run("run", "in.onnx", "out.onnx", "-p", "scale:by=2", "--external-data")[0] == 0
    assert (folder / "out.onnx.data").stat().st_size == 4 * 512


def test_a_report_never_replaces_a_model(run: Run, folder: Path) -> None:
    before = (folder / "in.onnx").read_bytes()
    for path in ("in.onnx", "out.onnx"):
        assert "would overwrite" in error(
            run("run", "in.onnx", "out.onnx", "-p", "scale", "--report", path), 2
        )
    assert (folder / "in.onnx").read_bytes() == before
    assert not (folder / "out.onnx").exists()


def test_a_first_word_that_is_no_command_is_the_model_to_slim(run: Run, folder: Path) -> None:
    assert run("in.onnx", "out.onnx")[0] == 0
    onnx.checker.check_model(str(folder / "out.onnx"))
    assert run("--quiet", "in.onnx", "other.onnx") == (0, "", "")
    assert (folder / "other.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_slim_with_nothing_to_do_saves_all_the_same(run: Run, folder: Path) -> None:
    code, _, err = run("slim", "in.onnx", "out.onnx")
    assert code == 0
    assert "changed nothing" in err
    assert weights(folder / "out.onnx") == [1.0] * 4


def test_why_nothing_was_done_is_told_once(run: Run, folder: Path) -> None:
    code, _, err = run("cluster", "in.onnx", "out.onnx")
    assert code == 4
    assert err.count("changed nothing") == 1
    assert "error: pass cluster() changed nothing: " in err
    code, _, err = run("cluster", "in.onnx", "out.onnx", "--on-error", "keep")
    assert (code, err.count("changed nothing")) == (0, 1)


def test_options_of_a_pass_command_are_the_fields_of_the_pass(run: Run) -> None:
    code, out, _ = run("quantize", "--help")
    assert code == 0
    for option in passes.options_of(passes.get("quantize")):
        assert f"--{option.name.replace('_', '-')}" in out


def test_quantize_from_the_command_line(run: Run, folder: Path) -> None:
    text = "g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {%s}> "
    text += "{ z = Relu(x)  p = MatMul(z, w)  y = Relu(p) }"
    parse(text % ",".join("1" * 16)).save(folder / "product.onnx")
    words = ("quantize", "product.onnx", "out.onnx", "--data", "data.npz")
    code, out, err = run(
        *words, "--observer", "minmax", "--exclude", "nothing", "--exclude", "else", "--classifier"
    )
    assert code == 0
    assert "onnxslim: warning: pass quantize, 'nothing': it matches no node, tensor or operator\n" in err
    assert "quantize(observer='minmax', exclude=('nothing', 'else'), classifier=True)" in out
    assert "QuantizeLinear" in {node.op for node in load(folder / "out.onnx").nodes()}


def test_no_option_of_a_pass_hides_one_of_the_command() -> None:
    common = {*words.ModelWords.__dataclass_fields__, *words.DataWords.__dataclass_fields__}
    for name in passes.names():
        assert not common & {option.name for option in passes.options_of(passes.get(name))}


def test_every_option_of_every_pass_is_explained() -> None:
    for name in passes.names():
        cls = passes.get(name)
        assert passes.summary(cls)
        for option in passes.options_of(cls):
            assert option.help, f"{name}.{option.name} has no description"


def test_passes_are_listed_with_their_options(run: Run) -> None:
    code, out, _ = run("passes", "scale")
    assert code == 0
    assert "scale: Multiplies every constant." in out
    assert "second paragraph" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["by", "float", "1.0", "the", "factor"] in rows
    assert ["only", "text,…", "none", "names", "of", "the", "constants"] in rows
    assert ["how", "all|8", "all", "a", "way"] in rows
    assert ["loud", "yes|no", "no", "whether", "to", "say", "so"] in rows
    everything = run("passes")[1]
    assert all(f"{name}: " in everything for name in passes.names())
    assert json.loads(run("passes", "scale", "--json")[1])["scale"]["options"][0]["default"] == "1.0"


def test_validate_compares_two_files(run: Run) -> None:
    run("run", "in.onnx", "out.onnx", "-p", "scale:by=2")
    code, out, err = run(
        "validate", "in.onnx", "out.onnx", "--data", "data.npz", "--provider", "CPU", "--rounds", "5"
    )
    assert (code, err) == (0, "")
    for told in ("accuracy 100.00 % → 100.00 %", "latency, batch of 8", "10 samples"):
        assert told in out
    assert ["y", "0.0", "1.000000"] in [line.split()[:3] for line in out.splitlines()]
    code, _, err = run(
        "validate", "in.onnx", "out.onnx", "--data", "data.npz", "--require", "sqnr=20", "--rounds", "0"
    )
    assert code == 4
    assert err == "onnxslim: error: cpu: output 'y' has SQNR 0 dB, required is at least 20 dB\n"


def test_made_up_inputs_are_announced(run: Run) -> None:
    code, out, err = run("validate", "in.onnx", "in.onnx", "--rounds", "0")
    assert code == 0
    assert "samples that are made up" in out
    assert "warning: the models were compared on made-up inputs" in err


def test_validate_prints_json(run: Run) -> None:
    code, out, _ = run("validate", "in.onnx", "in.onnx", "--data", "data.npz", "--json", "--rounds", "0")
    assert code == 0
    verdict = json.loads(out)
    assert verdict["providers"][0]["outputs"][0]["sqnr"] == "inf"
    assert verdict["samples"] == 10


# ------------------------------------------------------------------------------------------------- streams


def test_json_alone_is_on_the_standard_output(run: Run, folder: Path) -> None:
    words = ("run", "in.onnx", "out.onnx", "-p", "scale:by=1.001", "--json", "--report", "report.json")
    code, out, err = run(*words, "--data", "data.npz", "--check", "sqnr=20")
    assert code == 0
    document = json.loads(out)
    assert document["report"]["steps"][0]["description"] == "scale(by=1.001)"
    assert document["verdict"]["providers"][0]["outputs"][0]["sqnr"] == pytest.approx(60, abs=0.1)
    assert json.loads((folder / "report.json").read_text()) == document
    assert "saved" in err


def test_quiet_is_quiet(run: Run) -> None:
    assert run("run", "in.onnx", "out.onnx", "-p", "scale:by=1.1", "--quiet") == (0, "", "")


def test_idle_and_reverted_passes_are_told_in_one_line(run: Run, folder: Path) -> None:
    code, _, err = run("run", "in.onnx", "out.onnx", "-p", "scale", "-p", "broken", "--on-error", "keep")
    idle, reverted, saved = err.splitlines()
    assert code == 0
    assert idle == "onnxslim: pass scale() changed nothing: it found nothing to do"
    assert reverted.startswith("onnxslim: warning: pass broken() was reverted")
    assert "the inputs or outputs changed" in reverted
    assert "saved" in saved
    assert weights(folder / "out.onnx") == [1.0] * 4


@pytest.mark.parametrize(
    ("passes", "saved"),
    [
        (("scale",), False),
        (("broken",), False),
        (("scale", "broken"), False),
        (("slim",), True),
        (("slim", "scale"), False),
        (("broken", "scale:by=1.1"), True),
    ],
)
def test_a_command_whose_passes_did_nothing_fails(
    run: Run, folder: Path, passes: tuple[str, ...], saved: bool
) -> None:
    """But for what there was nothing left of to do without loss."""
    words = ("run", "in.onnx", "out.onnx", *(word for each in passes for word in ("-p", each)))
    code, _, err = run(*words)
    assert code == (0 if saved else 4)
    assert (folder / "out.onnx").exists() is saved
    if not saved:
        assert "on_error 'keep' takes the model as it is" in err.splitlines()[-1]
        assert run(*words, "--on-error", "keep")[0] == 0
        assert (folder / "out.onnx").exists()


# ---------------------------------------------------------------------------------------------- exit codes


def error(result: tuple[int, str, str], code: int) -> str:
    """The one line on the standard error stream."""
    assert result[0] == code
    lines = result[2].splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("onnxslim: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quantise", "in.onnx"), "did you mean 'quantize'?"),
        (("run", "in.onnx", "-p", "scael"), "there is no pass 'scael'; did you mean 'scale'?"),
        (("run", "in.onnx", "-p", "scale:bye=1"), "there is no option 'bye'; did you mean 'by'?"),
        (("run", "in.onnx", "-p", "scale:by=two"), "option 'by': input should be a valid number"),
        (("run", "in.onnx", "-p", "scale:by=-1"), "option 'by': input should be greater than 0, not '-1'"),
        (("run", "in.onnx", "-p", "scale:2"), "'2' is not of the form option=value"),
        (("run", "in.onnx", "-p", "scale:how=9"), "option 'how': input should be 'all' or 8"),
        (("run", "in.onnx"), "--pass"),
        (("run", "in.onnx", "-p", "scale", "--check", "snr=3"), "did you mean 'sqnr'?"),
        (
            ("run", "in.onnx", "-p", "scale", "--check", "sqnr=high"),
            "'sqnr=high' is not of the form sqnr=NUMBER",
        ),
        (("run", "in.onnx", "-p", "scale", "--on-error", "ignore"), "ignore"),
        (("quantize", "in.onnx", "--observr", "kl"), "no such option: --observr; did you mean --observer?"),
        (("quantize", "in.onnx", "--observer", "kll"), "option 'observer': input should be "),
        (("slim",), "'IN'"),
        (("slim", "in.onnx", "out.onnx", "third"), "third"),
        (("validate", "in.onnx", "--target", "cpu"), "no such option: --target; --help lists them"),
        (("passes", "scael"), "did you mean 'scale'?"),
        (("validate", "in.onnx", "in.onnx", "--require", "snr=3"), "did you mean 'sqnr'?"),
        (("demo", "--model", "alexnet"), "alexnet"),
    ],
)
def test_usage_errors(run: Run, words: tuple[str, ...], message: str) -> None:
    assert message in error(run(*words), 2)


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 28, reason="this onnx is older than opset 28")
def test_models_in_other_opsets(run: Run, folder: Path) -> None:
    skip_if_opset_is_newer(28)
    call = "a = Relu(x) y = Swish(a)"
    parse(f"g (float[N,4] x) => (float[N,4] y) {{ {call} }}", opset=28, ir_version=13).save(
        folder / "new.onnx"
    )
    code, _, _ = run("slim", "new.onnx", "out.onnx", "--quiet")
    assert code == 0
    assert ops(load(folder / "out.onnx")) == {"Relu": 1, "Sigmoid": 1, "Mul": 1}
    code, out, _ = run("legalize", "new.onnx", "old.onnx", "--opset", "13")
    assert code == 0
    assert "note: cpu has no kernel for 'Swish→y': the model was legalized before anything else" in out
    assert load(folder / "old.onnx").opset == 13
    text = "g (int4[2,4] x, float s) => (float[2,4] y) { y = DequantizeLinear(x, s) }"
    parse(text, opset=21, ir_version=10).save(folder / "bits.onnx")
    refused = error(run("legalize", "bits.onnx", "out13.onnx", "--opset", "13"), 3)
    assert "(DequantizeLinear) has no form in opset 13: 'x' is int4" in refused
    assert not (folder / "out13.onnx").exists()
    assert "1.15 to" in error(run("legalize", "bits.onnx", "--onnxruntime", "0.9"), 2)
    assert "onnxslim legalize" in error(run("validate", "new.onnx", "new.onnx", "--provider", "cpu"), 3)


def test_no_words_show_the_help(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert out == run("--help")[1]
    assert out.startswith("Usage: onnxslim")


def test_bad_models(run: Run, folder: Path) -> None:
    (folder / "bad.onnx").write_bytes(b"\x89PNG\r\n")
    assert "there is no file" in error(run("slim", "none.onnx"), 3)
    assert "bad.onnx' is not an ONNX model" in error(run("slim", "bad.onnx", "out.onnx"), 3)
    assert not (folder / "out.onnx").exists()


def test_a_failed_check_saves_nothing_but_the_report(run: Run, folder: Path) -> None:
    words = (
        "run",
        "in.onnx",
        "out.onnx",
        "-p",
        "scale:by=2",
        "--data",
        "data.npz",
        "--report",
        "report.json",
    )
    code, out, err = run(*words, "--check", "sqnr=20")
    assert code == 4
    assert err.endswith("onnxslim: error: cpu: output 'y' has SQNR 0 dB, required is at least 20 dB\n")
    assert "0.0" in out
    assert not (folder / "out.onnx").exists()
    (check,) = json.loads((folder / "report.json").read_text("utf-8"))["checks"]
    assert check["failures"] == ["cpu: output 'y' has SQNR 0 dB, required is at least 20 dB"]


def test_a_check_is_of_the_test_data_that_was_given(run: Run, folder: Path) -> None:
    np.savez(folder / "test.npz", x=normal(7, 4))
    words = ("run", "in.onnx", "out.onnx", "-p", "scale:by=2", "--test", "test.npz")
    assert (
        error(run(*words, "--check", "sqnr=-1"), 2) == "onnxslim: error: --test says nothing without --data"
    )
    code, out, _ = run(*words, "--data", "data.npz", "--check", "sqnr=-1")
    assert code == 0
    assert "second model against the first, 7 samples held out" in out


def test_what_there_was_no_time_for_is_told(run: Run, folder: Path) -> None:
    words = ("run", "in.onnx", "out.onnx", "-p", "scale:by=2", "--time-limit")
    code, _, err = run(*words, "1e-9")
    assert code == 4
    assert "pass 'scale' was not tried: the time limit of 1e-09 s was over before" in err
    assert "time_limit" in error(run(*words, "0"), 2)
    assert run(*words, "600", "--save-recipe", str(folder / "kept.yaml"))[0] == 0
    assert "time_limit: 600" in (folder / "kept.yaml").read_text("utf-8")


def test_a_failed_pass_saves_nothing_where_that_was_asked_for(run: Run, folder: Path) -> None:
    words = ("run", "in.onnx", "out.onnx", "--on-error", "raise", "-p")
    assert "no such \\x1b[2Jluck" in error(run(*words, "failing"), 3)
    assert "pass 'broken' broke the model" in error(run(*words, "broken"), 3)
    assert not (folder / "out.onnx").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none.npz", "No such file"),
        ("in.onnx", "expected an .npz or .npy file, or a folder"),
        ("text.npz", "not an .npz file"),
        ("other.npz", "its arrays are image, label; the model's inputs are x"),
        ("wide.npz", "has shape (8, 5), the model expects (N, 4)"),
        ("object.npz", "Python objects"),
    ],
)
def test_bad_data(run: Run, folder: Path, data: str, message: str) -> None:
    (folder / "text.npz").write_text("hello")
    np.savez(folder / "other.npz", image=np.zeros((2, 4), np.float32), label=np.zeros(2, int))
    np.savez(folder / "wide.npz", x=np.zeros((8, 5), np.float32))
    np.savez(folder / "object.npz", x=np.array([{}], object))
    assert message in error(run("run", "in.onnx", "-p", "scale", "--data", data), 5)


def _classifier(folder: Path) -> None:
    """Two matrix products, `net.onnx`, and what it says of some inputs as their labels, `net.npz`."""
    text = "g (float[N,16] x) => (float[N,8] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }"
    model = parse(text, normals(w=(16, 16), v=(16, 8)))
    model.save(folder / "net.onnx")
    x = normal(64, 16, seed=1)
    labels = Session(model).run({"x": x})["y"].argmax(1)
    np.savez(folder / "net.npz", x=x, label=labels)


METRIC = """
import numpy as np
def score(run):
    return float(run({"x": np.ones((2, 4), np.float32)})["y"].mean())
number = 5
"""


def test_a_metric_named_on_the_command_line(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("a_metric_of_mine.py").write_text(METRIC, encoding="utf-8")
    words = ("run", "in.onnx", "-p", "scale:by=0.8", "--metric", "a_metric_of_mine:score")
    assert "metric 1 → 0.8" in run(*words, "--check", "max_metric_drop=0.6")[1]
    strict = run(*words, "--data", "data.npz", "--check", "max_metric_drop=0.1")
    assert "metric drop 0.2, required is at most 0.1" in error(strict, 4)
    assert "metric 1 → 1" in run("validate", "in.onnx", "in.onnx", *words[-2:])[1]
    for name, problem in {
        "a_metric_of_mine:number": "is no function, but a int",
        "a_metric_of_mine:nothing": "AttributeError",
        "nowhere_at_all:score": "ModuleNotFoundError",
        "score": "not of the form module:function",
    }.items():
        assert problem in error(run("slim", "in.onnx", "--metric", name), 2)


def test_accuracy_on_labels_is_the_metric_where_none_is_given(run: Run, folder: Path) -> None:
    _classifier(folder)
    words = ("quantize", "net.onnx", "net.int8.onnx", "--max-drop", "0.05", "--classifier")
    told = json.loads(run(*words, "--data", "net.npz", "--json")[1])
    before, after = told["report"]["steps"][0]["changes"]["figures"]["metric"]
    assert before == 1.0
    assert 0.95 <= after <= 1.0
    np.savez(folder / "bare.npz", x=np.load(folder / "net.npz")["x"])
    told = json.loads(run(*words, "--data", "bare.npz", "--json")[1])
    (step,) = told["report"]["steps"]
    assert step["changes"]["figures"]["metric"] is None
    assert step["kept"]["agreement"] >= 0.95


def test_labels_of_another_name(run: Run, folder: Path) -> None:
    arrays = np.load(folder / "data.npz")
    np.savez(folder / "named.npz", x=arrays["x"], truth=arrays["label"])
    words = ("validate", "in.onnx", "in.onnx", "--rounds", "0", "--data", "named.npz")
    assert "accuracy" not in run(*words)[1]
    assert "accuracy 100.00 %" in run(*words, "--labels-key", "truth")[1]
    assert "no array 'lie'" in error(run(*words, "--labels-key", "lie"), 5)


def test_data_from_a_folder(run: Run) -> None:
    assert "10 samples" in run("validate", "in.onnx", "in.onnx", "--rounds", "0", "--data", "data/")[1]


def test_batches_are_of_the_size_asked_for(run: Run) -> None:
    words = ("validate", "in.onnx", "in.onnx", "--rounds", "0", "--data", "data.npz", "--json")
    assert json.loads(run(*words, "--batch-size", "3")[1])["batches"] == 4


def test_places_that_cannot_be_written_fail_before_any_work(run: Run, folder: Path) -> None:
    words = ("run", "in.onnx", "-p", "failing:kind=bug")
    assert "it is a folder" in error(run(*words, "data/"), 6)
    assert "there is no folder" in error(run(*words, "none/out.onnx"), 6)
    assert "there is no folder" in error(run(*words, "--report", "none/report.json"), 6)


def test_errors_of_the_system_are_named(run: Run) -> None:
    message = error(run("run", "in.onnx", "-p", "failing:kind=disk"), 6)
    assert message == "onnxslim: error: /some/file: Permission denied"


def test_providers_that_are_not_there(run: Run) -> None:
    words = ("validate", "in.onnx", "in.onnx", "--provider")
    assert "CUDAExecutionProvider is not available" in error(run(*words, "cuda"), 7)
    assert "unknown execution provider 'tpu'" in error(run(*words, "tpu"), 7)


def test_interruption(run: Run, folder: Path) -> None:
    code, out, err = run("run", "in.onnx", "out.onnx", "-p", "failing:kind=interrupt")
    assert (code, out, err) == (130, "", "onnxslim: interrupted\n")
    assert not (folder / "out.onnx").exists()


def test_a_pass_that_crashes_is_reverted_or_fails(run: Run) -> None:
    words = ("run", "in.onnx", "-p", "failing:kind=bug")
    code, _, err = run(*words)
    assert code == 4
    assert "pass 'failing' failed: it met something it was not made for, at tests.cli." in err
    assert "ZeroDivisionError" not in err
    assert "please report this" in error(run(*words, "--on-error", "raise"), 3)
    assert "ZeroDivisionError: oops" in run(*words, "--on-error", "raise", "--debug")[2]


def test_mistakes_of_ours_are_one_line_unless_debugged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("onnxslim.recipes.recipe.load", crash)
    words = ("run", "in.onnx", "-p", "scale")
    assert "internal error, ZeroDivisionError: oops" in error(run(*words), 1)
    code, _, err = run(*words, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("onnxslim: error: internal error")


# ------------------------------------------------------------------------------------------ whole processes


def onnxslim(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "onnxslim", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


def test_help_and_version_are_instant() -> None:
    for word in ("--help", "--version", "-h"):
        start = os.times()
        done = onnxslim(word)
        end = os.times()
        assert (done.returncode, done.stderr) == (0, "")
        # Of the processor, so that a busy machine does not count: 0.1 s.
        assert end.children_user + end.children_system - start.children_user - start.children_system < 0.5
    code = "import sys; from onnxslim import cli; cli.main(['--help']); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_terminals_without_unicode(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = onnxslim("slim", folder / "in.onnx", folder / "out.onnx", env=environment)
    assert done.returncode == 0
    assert (folder / "out.onnx").exists()


@pytest.mark.skipif(os.name == "nt", reason="named pipes and signals")
def test_control_c_ends_with_130_and_leaves_nothing(folder: Path) -> None:
    os.mkfifo(folder / "endless.npz")
    before = sorted(folder.iterdir())
    words = ("quantize", folder / "in.onnx", folder / "out.onnx", "--data", folder / "endless.npz")
    command = [sys.executable, "-m", "onnxslim", *map(str, words)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=heed_interrupts,
    )
    with process, (folder / "endless.npz").open("wb"):  # waits until the command reads it
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "onnxslim: interrupted\n")
    assert sorted(folder.iterdir()) == before


# ------------------------------------------------------------------------------- passes from words


def test_values_are_read_by_the_type_of_their_field() -> None:
    assert passes.parse("scale:by=2,only=a,b,c,how=8,loud=yes") == Scale(
        by=2.0, only=("a", "b", "c"), how=8, loud=True
    )
    assert passes.parse("scale:only=a:b=c") == Scale(only=("a:b=c",))
    assert passes.parse("scale") == passes.create("scale", {}) == Scale()


def test_words_of_hyphens_are_fields() -> None:
    with pytest.raises(Exception, match="no option 'per_channel'"):
        passes.parse("scale:per-channel=yes")


def test_constants_of_stand_ins_are_constants() -> None:
    """The stand-in does what the tests above take it to do."""
    model = parse("g (float[N,4] x) => (float[N,4] y) <float[4] w = {1, 1, 1, 1}> { y = Mul(x, w) }")
    assert Scale(by=2.0).run(model, Context())
    assert isinstance(next(model.constants()), Constant)
    assert not Scale().run(model, Context())


RESNET = FASHION / "resnet.onnx"


def test_prune_tells_families_and_replays_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, plan = RESNET, tmp_path / "plan.json"
    assert cli.main(["prune", str(source), "--families"]) == 0
    assert "stem.0.weight:0:0: 32 units of 1 channels" in capsys.readouterr().out
    assert cli.main(["prune", str(source), "--explain", "head.weight"]) == 0
    assert "is pinned: 'logits' is an output of the model" in capsys.readouterr().out
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    assert cli.main(["prune", str(source), str(first), "--ratio", "0.25", "--save-plan", str(plan)]) == 0
    assert cli.main(["prune", str(source), str(second), "--plan", str(plan)]) == 0
    assert onnx.load(first).graph == onnx.load(second).graph


def test_a_plan_saved_by_a_command_is_replayed_by_it(tmp_path: Path) -> None:
    source, plan = RESNET, tmp_path / "plan.json"
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    words = ["--params", "0.7", "--save-plan", str(plan)]
    assert cli.main(["factorize", str(source), str(first), *words]) == 0
    assert cli.main(["factorize", str(source), str(second), "--plan", str(plan)]) == 0
    assert onnx.load(first).graph == onnx.load(second).graph


def test_a_plan_does_not_overwrite_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(RESNET.read_bytes())
    assert cli.main(["factorize", str(model), "--params", "0.7", "--save-plan", str(model)]) == 2
    assert "--save-plan" in capsys.readouterr().err
    assert model.read_bytes() == RESNET.read_bytes()


def test_prune_without_a_goal_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", str(RESNET)]) == 2
    assert "exactly one of macs, params, latency, ratio and plan" in capsys.readouterr().err
