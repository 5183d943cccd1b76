"""Where commands are to write is tried before they work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxslim import cli
from onnxslim.cli.running import require_writable
from onnxslim.engine.pipeline import Pipeline
from tests.helpers import parse


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a model in it, whose passes must not run."""

    def run(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(Pipeline, "__call__", run)
    monkeypatch.setattr("onnxslim.validation.compare.validate", run)
    monkeypatch.setattr("onnxslim.cli.demo._run", run)
    monkeypatch.setattr("onnxslim.report.inspect.inspect", run)
    parse("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }").save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones((4, 4), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS: list[Callable[[str], list[str]]] = [
    lambda place: ["slim", "m.onnx", f"{place}/x.onnx"],
    lambda place: ["m.onnx", f"{place}/x.onnx"],
    lambda place: ["half", "m.onnx", "--report", f"{place}/x.html"],
    lambda place: ["run", "m.onnx", "-p", "slim", "--save-recipe", f"{place}/x.yaml"],
    lambda place: ["prune", "m.onnx", "--macs", "0.5", "--save-plan", f"{place}/x.json"],
    lambda place: ["validate", "m.onnx", "m.onnx", "--report", f"{place}/x.json"],
    lambda place: ["slim", "m.onnx", "--data", "d.npz", "--show-inputs", f"{place}/x.png"],
    lambda place: ["validate", "m.onnx", "m.onnx", "--data", "d.npz", "--show-inputs", f"{place}/x.png"],
    lambda place: ["demo", "--keep", place],
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_place_where_nothing_can_be_written_is_noticed_first(
    unused: Path, capsys: pytest.CaptureFixture[str], words: Callable[[str], list[str]]
) -> None:
    (unused / "file").touch()
    places = ["/proc", f"{unused}/file", *([] if words("")[0] == "demo" else [f"{unused}/none"])]
    for place in places:
        assert cli.main(words(place)) == 6
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("onnxslim: error: cannot ")
        assert place in line


def test_trying_a_place_leaves_nothing_there(unused: Path) -> None:
    before = sorted(unused.iterdir())
    require_writable(unused / "x.onnx")
    assert sorted(unused.iterdir()) == before


def test_the_working_folder_is_tried_before_models_are_dumped(
    unused: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")
    assert cli.main(["inspect", str(unused / "m.onnx"), "--dump-to-disk"]) == 6
    assert "the folder '/proc' is not writable" in capsys.readouterr().err
