"""The command that reduces a model: what counts as the same fault, what is written, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxslim import cli
from onnxslim.cli import reducing
from onnxslim.ir.model import load
from tests.helpers import normal, ops, parse

TEXT = "g (float[4,4] x) => (float[4,4] y) { a = Relu(x) b = Tanh(a) c = MatMul(b, w) d = Neg(c) y = Sin(d) }"
Reduce = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parse(TEXT, {"w": normal(4, 4)}).save(tmp_path / "in.onnx")
    return tmp_path


@pytest.fixture
def reduce(folder: Path, capsys: pytest.CaptureFixture[str]) -> Reduce:
    """Runs the command on in.onnx, to out.onnx."""

    def run(command: str, *words: str) -> tuple[int, str, str]:
        code = cli.main(
            ["reduce", str(folder / "in.onnx"), str(folder / "out.onnx"), "--command", command, *words]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_command_finds_is_left(folder: Path, reduce: Reduce) -> None:
    before = (folder / "in.onnx").read_bytes()
    code, out, err = reduce("grep -q Tanh {}", "--exit-code", "0")
    assert (code, out, list(ops(load(folder / "out.onnx")))) == (0, "", ["Tanh"])
    assert "1 of 5 nodes" in err
    assert "no values of the original's weights are in it" in err
    assert (folder / "in.onnx").read_bytes() == before
    assert files(folder) == ["in.onnx", "out.onnx"]


def test_json_tells_the_same(reduce: Reduce) -> None:
    code, out, err = reduce("grep -q MatMul {}", "--exit-code", "0", "--json", "--quiet")
    told = json.loads(out)
    assert (code, err, told["before"]["nodes"], told["after"]["nodes"], told["kept"]) == (0, "", 5, 1, [])


def test_an_error_is_the_same_whatever_numbers_are_in_it(folder: Path, reduce: Reduce) -> None:
    """The command says how long the file is, and fails in another way without Tanh."""
    script = "test $(grep -c Tanh {}) -gt 0 || exit 3; wc -c {} >&2; exit 3"
    code, _, err = reduce(f"sh -c '{script}'")
    assert code == 0
    assert "exit code 3 and '# {}'" in err
    assert list(ops(load(folder / "out.onnx"))) == ["Tanh"]


def test_a_text_may_say_what_is_wrong(folder: Path, reduce: Reduce) -> None:
    assert reduce("cat {}", "--text", "Neg")[0] == 0
    assert list(ops(load(folder / "out.onnx"))) == ["Neg"]


def test_our_own_command_fails_on_what_is_left(folder: Path, reduce: Reduce) -> None:
    code, _, err = reduce("onnxslim inspect {} --profile", "--time-limit", "0.01")
    assert code == 0
    assert "exit code 2 and 'onnxslim: error: --report and --profile say nothing" in err
    assert "when the time was over" in err
    assert "warning: these hold values of the original: 'w'" in err


def test_a_signal_and_a_hang_are_not_the_same(
    folder: Path, reduce: Reduce, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = reduce("sh -c 'grep -q Sin {} && kill -SEGV $$'", "--time-limit", "0.01")
    assert code == 0
    assert "exit code -11" in err
    monkeypatch.setattr(reducing, "PATIENCE", 0)
    monkeypatch.setattr(reducing, "GRACE", 0.2)
    code, _, _ = reduce("sh -c 'grep -q Sin {} || sleep 60'", "--exit-code", "0", "--time-limit", "1")
    assert code == 0
    assert "Sin" in ops(load(folder / "out.onnx"))


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("true", [], "it has to name the model"),
        ("grep 'x {}", [], "No closing quotation"),
        ("/no/such/thing {}", [], "cannot run '/no/such/thing': No such file"),
        ("true {}", [], "ends with 0: give --text or --exit-code"),
        ("true {}", ["--exit-code", "3"], "the command ends with 0 and ''"),
        ("ls {}", ["--text", "nothing"], "the command ends with 0 and '{}'"),
    ],
)
def test_what_is_not_wrong_is_refused(
    folder: Path, reduce: Reduce, command: str, words: list[str], told: str
) -> None:
    code, out, err = reduce(command, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert files(folder) == ["in.onnx"]


def test_places_are_checked_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(folder / "in.onnx")
    assert cli.main(["reduce", source, source, "--command", "false {}"]) == 2
    assert "is the model itself" in capsys.readouterr().err
    assert cli.main(["reduce", source, str(folder / "no" / "out.onnx"), "--command", "false {}"]) == 6
    assert "there is no folder" in capsys.readouterr().err
    assert (
        cli.main(["reduce", str(folder / "no.onnx"), str(folder / "out.onnx"), "--command", "false {}"]) == 3
    )


def test_interrupted_it_writes_nothing(folder: Path, reduce: Reduce, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(reducing.Symptom, "__call__", interrupt)
    code, _, err = reduce("false {}")
    assert (code, err.splitlines()[-1]) == (130, "onnxslim: interrupted")
    assert files(folder) == ["in.onnx"]
