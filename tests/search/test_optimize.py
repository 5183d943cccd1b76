"""Searches on real networks: what comes back meets the goals, is rebuilt byte for byte, and resumed."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

import onnxslim
from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.errors import CalibrationError, TargetError, UsageError, ValidationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.prune import Prune
from onnxslim.recipes.data import Data
from onnxslim.recipes.recipe import Recipe
from onnxslim.runtime.metric import Run
from onnxslim.search import Goals, SearchResult, SearchTrial, optimize, trials_in
from onnxslim.search.show import show_result
from onnxslim.validation.certificate import content_sha256
from onnxslim.validation.compare import validate
from tests.helpers import normal, parse

NET = """g (float[N,64] x) => (float[N,8] y)
{ a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) q = Relu(b) c = MatMul(q, u) s = Relu(c) y = MatMul(s, t) }"""


@pytest.fixture(scope="module")
def net() -> Model:
    """Layers of low rank, with units that hardly count."""
    rng = np.random.default_rng(0)

    def drawn(rows: int, columns: int) -> Array:
        low = rng.standard_normal((rows, 12)) @ rng.standard_normal((12, columns)) / np.sqrt(12 * rows)
        fading = 0.5 ** (np.arange(columns) * 8 / columns)
        return np.asarray(low * fading, np.float32)

    return parse(NET, {"w": drawn(64, 192), "v": drawn(192, 192), "u": drawn(192, 192), "t": normal(192, 8)})


@pytest.fixture(scope="module")
def data() -> Mapping[str, Array]:
    return {"x": normal(256, 64, seed=1)}


@pytest.fixture(scope="module")
def kept(
    net: Model, data: Mapping[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SearchResult]:
    work = tmp_path_factory.mktemp("work")
    return work, optimize(net, data, Goals(macs=0.5, require_sqnr=15.0), effort="quick", work=work)


def test_what_comes_back_meets_the_goals_on_other_samples(
    net: Model, kept: tuple[Path, SearchResult]
) -> None:
    found = kept[1].require()
    assert found.best is not None
    assert found.verified is not None
    assert found.verified.macs is not None
    assert found.verified.macs <= 0.5
    assert found.verified.sqnr >= 15.0
    assert found.samples == 32
    verdict = validate(net, found.model, CalibrationData([{"x": normal(64, 64, seed=5)}]), rounds=0)
    (row,) = verdict.providers[0].outputs
    assert row.sqnr is not None
    assert row.sqnr >= 12.0
    assert found.best in found.trials
    assert found.outcome is not None


def test_every_trial_is_made_again_by_its_recipe(
    net: Model, data: Mapping[str, Array], kept: tuple[Path, SearchResult]
) -> None:
    work, found = kept
    assert found.best is not None
    recipe = Recipe.load(work / found.best.key / "recipe.yaml", trust=True)
    again = recipe.run(net, data=data).model
    assert again.to_proto() == found.model.to_proto()
    assert {trial.key for trial in trials_in(work)} == {trial.key for trial in found.trials}


def test_a_search_goes_on_from_what_is_kept(
    net: Model, data: Mapping[str, Array], kept: tuple[Path, SearchResult]
) -> None:
    work, first = kept
    made: list[SearchTrial] = []
    again = optimize(
        net,
        data,
        Goals(macs=0.5, require_sqnr=15.0),
        effort="quick",
        work=work,
        time_limit=0.0,
        on_trial=made.append,
    )
    assert again.notes == first.notes == ()
    assert again.trials == first.trials
    assert content_sha256(again.model) == content_sha256(first.model)
    assert made == list(first.trials)
    # Other data is another search, for which there is no time here.
    other = optimize(net, {"x": normal(256, 64, seed=2)}, effort="quick", work=work, time_limit=0.0)
    assert other.trials == ()
    assert "time limit was over after 0 trials" in other.notes[0]
    assert other.problem == "no result meets the goals; nothing was made"


def test_what_could_be_left_away_is_found_once_for_all_goals(
    net: Model, data: Mapping[str, Array], kept: tuple[Path, SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, first = kept
    monkeypatch.setattr(Prune, "propose", lambda *details: pytest.fail("it was found out again"))
    other = optimize(net, data, Goals(macs=0.45), effort="quick", work=work)
    assert {trial.structure for trial in other.trials} > {trial.structure for trial in first.trials} & {0.42}
    (notes,) = (path for path in work.iterdir() if path.is_file())
    notes.write_text("[]")
    with pytest.raises(pytest.fail.Exception, match="found out again"):
        optimize(net, data, Goals(macs=0.41), effort="quick", work=work)


def test_where_nothing_meets_the_goals_the_original_comes_back_slimmed(
    net: Model, data: Mapping[str, Array], kept: tuple[Path, SearchResult]
) -> None:
    found = optimize(net, data, Goals(macs=0.5, require_sqnr=300.0), effort="quick", work=kept[0])
    assert found.best is None
    with pytest.raises(
        ValidationError, match=r"no result meets the goals; the nearest is .*: it keeps .* dB, 300 are"
    ):
        found.require()
    feeds = {"x": normal(4, 64)}
    verdict = validate(net, found.model, CalibrationData([feeds]), rounds=0)
    assert verdict.providers[0].outputs[0].max_abs == 0.0


def test_the_metric_decides_if_there_is_one(net: Model, data: Mapping[str, Array]) -> None:
    """A metric that only the original meets."""
    x = normal(4, 64, seed=3)
    expected = None

    def exact(run: Run) -> float:
        nonlocal expected
        (y,) = run({"x": x}).values()
        expected = y if expected is None else expected
        return -float(np.abs(y - expected).max())

    found = optimize(net, data, Goals(max_drop=0.0, macs=0.9), metric=exact, effort="quick")
    assert "the metric drops from" in found.problem
    (figures,) = {trial.figures.metric[0] for trial in found.trials if trial.figures and trial.figures.metric}
    assert figures == 0.0


def test_labels_make_accuracy_the_metric(net: Model, data: Mapping[str, Array]) -> None:
    labels = np.zeros(256, np.int64)
    found = optimize(
        net, data, Goals(max_drop=0.9, size=0.9), labels=labels, effort="quick", test=data, test_labels=labels
    )
    assert found.verified is not None
    assert found.verified.metric is not None
    assert found.samples == 256


def _nan(run: Run) -> float:
    return float("nan")


def _raising(run: Run) -> float:
    raise ValueError("no such file")


def test_wrong_inputs_are_told_before_any_trial(net: Model, data: Mapping[str, Array]) -> None:
    def refuse(trial: SearchTrial) -> None:
        pytest.fail("a trial was made")

    with pytest.raises(CalibrationError, match="needs data"):
        optimize(net, None, on_trial=refuse)
    with pytest.raises(UsageError, match="metric '_nan' is not a number"):
        optimize(net, data, metric=_nan, on_trial=refuse)
    with pytest.raises(UsageError, match="metric '_raising' fails: ValueError: no such file"):
        optimize(net, data, metric=_raising, on_trial=refuse)
    with pytest.raises(CalibrationError, match="'z'"):
        optimize(net, {"z": normal(4, 64)}, on_trial=refuse)
    with pytest.raises(TargetError, match="TensorrtExecutionProvider"):
        optimize(net, data, target="tensorrt", on_trial=refuse)
    with pytest.raises(UsageError, match="the metric of the original is inf"):
        optimize(net, data, metric=lambda run: math.inf, on_trial=refuse)
    wrong: list[tuple[dict[str, Any], str]] = [
        *(({"time_limit": limit}, "is no time: give 0 sec") for limit in (-1.0, math.nan, "5")),
        ({"goals": {"latency": 0.5}}, "goals are onnxslim.Goals, such as .*, not a dict"),
        ({"goals": Goals(size=1e-5)}, r"size=1e-05 is out of reach: layers alone are 0.00\d+$"),
        ({"goals": Goals(download=1e-5)}, r"download=1e-05 is out of reach: layers alone are 0.00\d+$"),
        ({"goals": Goals(max_drop=1)}, "max_drop=1 may be all: 0.01 is one in a hundred"),
        ({"goals": Goals(latency=0.5), "target": "reference"}, "the goal latency needs times: its operators"),
        ({"effort": "fast"}, "unknown effort 'fast': known are: quick"),
        ({"seed": 1.5}, "the seed 1.5 is no whole number"),
        ({"jobs": "2"}, "jobs='2' processes make nothing"),
        ({"backend": "slurm"}, "unknown backend 'slurm': known are: processes"),
    ]
    for given, message in wrong:
        with pytest.raises(UsageError, match=message):
            optimize(net, data, **given, on_trial=refuse)
    nothings: tuple[Any, ...] = ([], {"x": normal(0, 64)}, lambda: iter(()))
    for nothing in nothings:
        with pytest.raises(CalibrationError, match=r"no data|no samples"):
            optimize(net, nothing, on_trial=refuse)
    sequences = parse("g (float[N,4,8] x) => (float[N,4,3] y) { y = MatMul(x, w) }", {"w": normal(8, 3)})
    with pytest.raises(UsageError, match="the goal max_drop needs a metric or labels"):
        optimize(sequences, {"x": normal(16, 4, 8)}, Goals(max_drop=0.01), on_trial=refuse)


def test_trials_are_not_kept_by_a_metric_that_another_may_be_taken_for(
    net: Model, data: Mapping[str, Array], tmp_path: Path
) -> None:
    for metric in (lambda run: 1.0, partial(_nan)):
        with pytest.raises(UsageError, match="trials are kept by the metric's name: give a function of"):
            optimize(net, data, metric=metric, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert optimize(net, data, metric=lambda run: 1.0, time_limit=0.0).trials == ()


def _batches() -> Iterator[Mapping[str, Array]]:
    yield {"x": normal(8, 2, 4)}


def test_trials_on_data_that_is_code_are_kept_without_it(tmp_path: Path) -> None:
    net = parse("g (float[N,2,4] x) => (float[N,2,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)})
    named = Data(f"{__name__}:_batches")
    found = optimize(net, named, work=tmp_path, effort="quick").require()
    assert found.best is not None
    recipe = Recipe.load(tmp_path / found.best.key / "recipe.yaml")
    assert recipe.data is None
    assert recipe.run(net, data=named.read(net).data).model.to_proto() == found.model.to_proto()


def test_labels_that_are_no_classes_are_told_before_any_trial(net: Model, data: Mapping[str, Array]) -> None:
    for labels, message in ((np.full(256, 8), "label 8 is none of the 8"), (np.zeros(256), "one integer")):
        with pytest.raises(CalibrationError, match=message):
            optimize(net, data, labels=labels, time_limit=0.0)
    with pytest.raises(
        CalibrationError, match="data has labels and test has none: give both of them or none"
    ):
        optimize(net, data, labels=np.zeros(256, int), test=data)
    with pytest.raises(UsageError, match="the seed -1 is negative"):
        optimize(net, data, seed=-1)


def test_labels_may_be_a_list(net: Model, data: Mapping[str, Array], tmp_path: Path) -> None:
    given: tuple[tuple[Any, float], ...] = (np.zeros(256, int), 0.5), ([0] * 256, 0.0)
    made = [
        optimize(net, data, Goals(macs=0.9), labels=labels, effort="quick", work=tmp_path, time_limit=limit)
        for labels, limit in given
    ]
    assert made[0].trials == made[1].trials != ()


def test_trials_depend_on_the_sizes_that_are_counted_for(tmp_path: Path) -> None:
    net = parse("g (float[N,K,4] x) => (float[N,K,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)})
    data = {"x": normal(8, 2, 4)}
    made = [
        optimize(net, data, work=tmp_path, effort="quick", time_limit=limit, input_shapes={"x": sizes}).trials
        for sizes, limit in (((1, 2, 4), 60.0), ((1, 2, 4), 0.0), ((1, 9, 4), 0.0))
    ]
    assert made[0] == made[1] != ()
    assert made[2] == ()


def test_with_few_samples_it_is_told_what_figures_are_of(net: Model) -> None:
    found = optimize(net, {"x": normal(6, 64)}, Goals(macs=0.9), effort="quick")
    assert any("too few samples" in note for note in found.notes)
    assert found.samples == 0
    console = Console(record=True, width=300, file=io.StringIO())
    show_result(console, found)
    assert "; on what it was chosen by: " in console.export_text()


def test_a_goal_that_the_samples_cannot_tell_is_told(net: Model, data: Mapping[str, Array]) -> None:
    found = optimize(net, data, effort="quick", time_limit=0.0)
    assert not any("to choose by is" in note for note in found.notes), "nothing was asked for yet"
    found = optimize(net, data, Goals(max_drop=0.01), effort="quick", time_limit=0.0)
    (note,) = (note for note in found.notes if "to choose by is" in note)
    assert "one of the 32 samples to choose by is 3.12 % of them" in note
    assert "800 samples" in note
    for goals in (Goals(max_drop=0.04), Goals(require_sqnr=20.0), Goals(max_drop=0.0)):
        found = optimize(net, data, goals, effort="quick", time_limit=0.0)
        assert not any("to choose by is" in note for note in found.notes)


def test_public_names() -> None:
    assert onnxslim.optimize is optimize
    assert onnxslim.Goals is Goals


def test_the_command(
    net: Model, data: Mapping[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output, work = (str(tmp_path / name) for name in ("in.onnx", "out.onnx", "work"))
    net.save(source)
    np.savez(tmp_path / "x.npz", x=data["x"])
    words = ["auto", source, output, "--data", str(tmp_path / "x.npz"), "--effort", "quick", "--work", work]
    assert cli.main([*words, "--macs", "0.5"]) == 0
    text, err = capsys.readouterr()
    assert "asked for: macs 0.5" in text
    assert "chosen: " in text
    assert f"saved {output}" in err
    assert (tmp_path / "out.onnx").stat().st_size < 0.5 * (tmp_path / "in.onnx").stat().st_size
    (tmp_path / "out.onnx").unlink()
    assert cli.main([*words, "--macs", "0.5", "--require-sqnr", "300", "--json"]) == 4
    text, err = capsys.readouterr()
    told = json.loads(text)
    assert told["best"] is None
    assert f"error: {told['problem']}" in err
    assert not (tmp_path / "out.onnx").exists()
    assert cli.main(["trials", work, "--cost", "size", "--svg", str(tmp_path / "t.svg")]) == 0
    root = ElementTree.parse(tmp_path / "t.svg").getroot()
    titles = [each.text for each in root.iter("{http://www.w3.org/2000/svg}title")]
    assert {trial["label"] for trial in told["trials"] if trial["figures"]} == set(titles)
    shown = capsys.readouterr().out
    assert all(trial["label"] in shown for trial in told["trials"])
    assert "*" in shown
    assert cli.main(["auto", source]) == 2
    assert "a search measures what is lost: give it --data" in capsys.readouterr().err


def test_trials_that_are_damaged_are_told_and_made_anew(
    net: Model, data: Mapping[str, Array], tmp_path: Path
) -> None:
    goals = Goals(require_sqnr=15.0)
    first = optimize(net, data, goals, effort="quick", work=tmp_path)
    empty, cut = sorted(tmp_path.glob("*/trial.json"))[:2]
    empty.write_text("")
    cut.write_text(cut.read_text()[:40])
    again = optimize(net, data, goals, effort="quick", work=tmp_path)
    assert [trial.key for trial in again.trials] == [trial.key for trial in first.trials]
    (told,) = (note for note in again.notes if "could not be read" in note)
    assert empty.parent.name in told
    assert cut.parent.name in told
    third = optimize(net, data, goals, effort="quick", work=tmp_path, time_limit=0.0)
    assert third.trials == again.trials
    assert third.notes == first.notes
