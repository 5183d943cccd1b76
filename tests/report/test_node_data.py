"""Figures for Model Explorer: the form it reads, and values that can be counted by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from onnxslim import cli
from tests.helpers import normal, parse

TEXT = "g (float[N,4] x) => (float[N,3] y) <float[4,3] w> { [first] t = MatMul(x, w) [second] y = Relu(t) }"


def test_figures_of_nodes_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, report = (str(tmp_path / name) for name in ("a.onnx", "b.onnx", "r.json"))
    weight = normal(4, 3)
    parse(TEXT, {"w": weight}).save(first)
    parse(TEXT, {"w": weight + np.float32(0.01)}).save(second)
    np.savez(tmp_path / "d.npz", x=normal(5, 4))
    words = ["validate", first, second, "--data", str(tmp_path / "d.npz"), "--rounds", "0", "--quiet"]
    assert cli.main([*words, "--report", report]) == 0
    assert cli.main(["inspect", first, "--node-data", str(tmp_path), "--report", report, "--profile"]) == 0
    read = {
        name: json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("macs", "bytes", "decibels", "microseconds")
    }
    assert read["macs"]["results"] == {"t": {"value": 12}}
    assert read["bytes"]["results"] == {"t": {"value": 48}}
    assert set(read["decibels"]["results"]) == set(read["microseconds"]["results"]) == {"t", "y"}
    assert all(each["value"] >= 0 for each in read["microseconds"]["results"].values())
    layers = {
        each["tensor"]: each["sqnr"] for each in json.loads(Path(report).read_text())["analysis"]["fidelity"]
    }
    assert read["decibels"]["results"]["t"]["value"] == pytest.approx(layers["t"])
    for figure in read.values():
        # As GraphNodeData, NodeDataResult and GradientItem of ai-edge-model-explorer 0.1 have it.
        assert set(figure) == {"results", "gradient"}
        assert all(set(each) == {"value"} for each in figure["results"].values())
        assert all(set(each) == {"stop", "bgColor"} for each in figure["gradient"])
        assert all(re.fullmatch("#[0-9a-f]{6}", each["bgColor"]) for each in figure["gradient"])
        assert [each["stop"] for each in figure["gradient"]] == [0, 1]
    assert "decibels.json: 2 nodes" in capsys.readouterr().err


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "a.onnx")
    parse(TEXT, {"w": normal(4, 3)}).save(model)
    assert cli.main(["inspect", model, "--profile"]) == 2
    assert cli.main(["inspect", model, "--node-data", str(tmp_path), "--report", model]) == 3
    assert "has no layers: take the JSON of --report" in capsys.readouterr().err
    assert cli.main(["inspect", model, "--node-data", model]) == 6
    assert cli.main(["inspect", model, "--node-data", str(tmp_path / "none" / "there")]) == 6
    assert cli.main(["inspect", model, "--node-data", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / "macs.json").is_file()
