"""The demonstration: it runs on the models that come along and its figures are true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxslim import cli
from onnxslim.cli import demo
from onnxslim.formats import to_json
from onnxslim.ir.model import load
from onnxslim.runtime.session import Session
from onnxslim.runtime.timing import Latency
from tests.helpers import FASHION


def accuracy(model: Path) -> float:
    """Fraction of test images whose top class is the label, with no help from the product's validation."""
    arrays = np.load(FASHION / "test.npz")
    session = Session(model)
    scores = [session.run({"image": part})["logits"] for part in np.array_split(arrays["image"], 50)]
    return float((np.concatenate(scores).argmax(1) == arrays["label"]).mean())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "results"


@pytest.fixture(scope="module")
def outcome(kept: Path) -> demo.DemoOutcome:
    return demo.run(["mobilenet"], keep=kept)[0]


def test_sizes_are_those_of_the_files(outcome: demo.DemoOutcome, kept: Path) -> None:
    assert outcome.bytes_before == (FASHION / "mobilenet.onnx").stat().st_size
    assert outcome.bytes_after == (kept / "mobilenet.int8.onnx").stat().st_size < 0.5 * outcome.bytes_before
    assert [path.name for path in kept.iterdir()] == ["mobilenet.int8.onnx"]


def test_accuracy_is_the_true_one(outcome: demo.DemoOutcome, kept: Path) -> None:
    found = outcome.verdict.providers[-1].accuracy
    assert found is not None
    assert found.before == pytest.approx(accuracy(FASHION / "mobilenet.onnx"), abs=1e-12)
    assert found.after == pytest.approx(accuracy(kept / "mobilenet.int8.onnx"), abs=1e-12)
    assert found.before > 0.9
    outcome.verdict.require(max_accuracy_drop=0.01, sqnr=20, top1=0.98)


def test_integer_operators_are_counted(outcome: demo.DemoOutcome) -> None:
    convolutions = sum(node.op == "Conv" for node in load(FASHION / "mobilenet.onnx").nodes())
    assert outcome.total["Conv"] == convolutions
    assert 0.9 * convolutions <= outcome.fused["Conv"] <= convolutions


def test_everything_is_measured(outcome: demo.DemoOutcome) -> None:
    provider = outcome.verdict.providers[-1]
    assert outcome.verdict.batch == 8
    assert outcome.verdict.samples == 2000
    assert provider.latency is not None
    assert not outcome.verdict.made_up
    assert [step.name for step in outcome.report.steps] == ["slim", "quantize"]
    assert not any(step.error for step in outcome.report.steps)
    assert 0 < outcome.seconds < 60


def test_outcomes_are_plain_data(outcome: demo.DemoOutcome) -> None:
    found = json.loads(to_json(outcome))
    assert found["fused"] == outcome.fused
    assert found["verdict"]["samples"] == 2000


def test_the_table_tells_it_all(
    outcome: demo.DemoOutcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run", lambda names, **_: [outcome] if list(names) == ["mobilenet"] else [])
    assert cli.main(["demo", "--model", "mobilenet"]) == 0
    rows = capsys.readouterr().out
    for word in ("file", "parameters", "MACs", "nodes", "latency of 8 images, cpu", "accuracy, cpu", "SQNR"):
        assert word in rows
    assert f"{outcome.fused['Conv']} of {outcome.total['Conv']} Conv" in rows
    assert cli.main(["demo", "--model", "mobilenet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "mobilenet"


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--keep", str(tmp_path / "file" / "results")]) == 6
    assert "cannot make the folder" in capsys.readouterr().err


def test_unsteady_times_are_told(outcome: demo.DemoOutcome) -> None:
    def told(median: float) -> list[str]:
        provider = replace(outcome.verdict.providers[-1], latency=(Latency(1.0, 1.0), Latency(median, 1.0)))
        return list(demo._unsteady(replace(outcome, verdict=replace(outcome.verdict, providers=(provider,)))))

    assert told(1.19) == []
    (line,) = told(1.5)
    assert "times are unsteady, medians lie up to 50.00 % above the fastest calls" in line
