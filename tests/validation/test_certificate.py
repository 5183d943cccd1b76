"""What models say of themselves: that it is read back, that changes are noticed, and that it is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.judging import Kept
from onnxslim.errors import UsageError, ValidationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Recipe
from onnxslim.validation.certificate import Certificate, content_sha256, require, verify
from tests.helpers import parse

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,8] x) => (float[N,4] y) <float[8,8] w, float[8,4] v>
{ a = MatMul(x, w) b = Relu(a) d = Identity(b) y = MatMul(d, v) }"""


def _original() -> Model:
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in (("w", (8, 8)), ("v", (8, 4)))}
    return parse(TEXT, drawn)


def _data(seed: int, scale: float = 1.0) -> CalibrationData:
    drawn = np.random.default_rng(seed).standard_normal((256, 8), np.float32)
    return CalibrationData([{"x": scale * drawn[i : i + 32]} for i in range(0, 256, 32)])


@pytest.fixture(scope="module")
def made() -> tuple[Model, Model]:
    original = _original()
    return original, Recipe(passes=(Slim(), Quantize(observer="minmax"))).run(original, data=_data(1)).model


def test_what_was_made_says_so(made: tuple[Model, Model]) -> None:
    original, model = made
    told = Certificate.read(model)
    assert told.passes == ["slim", {"quantize": {"observer": "minmax"}}]
    assert told.kept is not None
    assert told.kept.whose == "held out"
    assert 20 < told.kept.sqnr < 60
    found = verify(model, original, _data(2))
    assert [each.holds for each in found] == [True, True, True]
    require(found)
    assert [each.holds for each in verify(model)] == [True, None, None]


@pytest.mark.parametrize("external", [False, True])
def test_how_values_are_stored_is_no_change(
    made: tuple[Model, Model], tmp_path: Path, external: bool
) -> None:
    made[1].save(tmp_path / "a.onnx", external_data=external)
    told = onnx.load(tmp_path / "a.onnx")
    for tensor in told.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.ClearField("raw_data")
            tensor.float_data.extend(values.ravel().tolist())
    onnx.save(told, tmp_path / "b.onnx")
    for name in ("a.onnx", "b.onnx"):
        assert content_sha256(load(tmp_path / name)) == Certificate.read(made[1]).content_sha256


def _weight(model: onnx.ModelProto) -> None:
    scale = next(each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT)
    values = np.array(onnx.numpy_helper.to_array(scale))
    values.flat[0] += 1e-3
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))


def _node(model: onnx.ModelProto) -> None:
    model.graph.node[0].doc_string = "edited"


def _foreign_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="author", value="somebody")


@pytest.mark.parametrize("edit", [_weight, _node, _foreign_metadata])
def test_changes_are_noticed(
    made: tuple[Model, Model], tmp_path: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    proto = made[1].to_proto()
    edit(proto)
    onnx.save(proto, tmp_path / "edited.onnx")
    found = verify(load(tmp_path / "edited.onnx"))
    assert found[0].holds is False
    with pytest.raises(ValidationError, match="content has been changed since it was made"):
        require(found)


@pytest.mark.parametrize(
    ("kept", "other"),
    [
        (np.array(["a"], object), np.array(["b"], object)),
        (np.array([1, -2], ml_dtypes.int4), np.array([1, -3], ml_dtypes.int4)),
        (np.array([[0.0, 1.0]], np.float32), np.array([[0.0], [1.0]], np.float32)),
        (np.zeros(0, np.float32), np.zeros(0, np.float64)),
    ],
)
def test_hashes_of_all_kinds_of_values(kept: Array, other: Array) -> None:
    text = "g (float[N] x) => (float[N] y) { y = Relu(x) }"
    first, same, second = (parse(text, {"c": each}) for each in (kept, kept.copy(), other))
    assert content_sha256(first) == content_sha256(same) != content_sha256(second)


def test_another_original_and_other_samples(made: tuple[Model, Model]) -> None:
    original, model = made
    other = parse(TEXT, {"w": np.ones((8, 8), np.float32), "v": np.ones((8, 4), np.float32)})
    assert [each.holds for each in verify(model, other, _data(2))] == [True, False, False]
    # Ranges of values a hundred times as large were never seen.
    content, source, figures = verify(model, original, _data(2, 100.0))
    assert (content.holds, source.holds, figures.holds) == (True, True, False)


@pytest.mark.parametrize(("whose", "holds"), [("held out", False), ("fitted on", None), ("made up", None)])
def test_only_samples_held_out_are_a_measure_for_others(
    made: tuple[Model, Model], whose: str, holds: bool | None
) -> None:
    original, model = made
    told = Certificate.read(model)
    assert told.kept is not None
    claimed: Kept = replace(told.kept, sqnr=told.kept.sqnr + 10.0, whose=whose)  # type: ignore[arg-type]
    bold = replace(told, kept=claimed).stamped(model)
    found = verify(bold, original, _data(2))
    assert [each.holds for each in found] == [True, True, holds]


def test_lossless_passes_claim_all_but_rounding() -> None:
    original = _original()
    model = Recipe(passes=(Slim(),)).run(original).model
    assert Certificate.read(model).kept is None
    assert [each.holds for each in verify(model, original, _data(2))] == [True, True, True]


def test_where_files_lie_is_not_told(tmp_path: Path) -> None:
    original, plan = _original(), tmp_path / "secret" / "plan.json"
    plan.parent.mkdir()
    found = Recipe(passes=(Prune(ratio=0.5, align=1),)).run(original)
    figures = found.report.steps[0].changes.figures
    plan.write_text(figures.plan.to_json())  # type: ignore[attr-defined]
    model = Recipe(passes=(Prune(plan=plan),)).run(original).model
    assert Certificate.read(model).passes == [{"prune": {"plan": "plan.json"}}]
    assert not any("secret" in value for value in model.metadata.values())
    given = Prune(plan=figures.plan)  # type: ignore[attr-defined]
    (told,) = Certificate.read(Recipe(passes=(given,)).run(original).model).passes
    assert told["prune"]["plan"].startswith("<prune plan ")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "no 'onnxslim.version'"),
        ({"onnxslim.passes": "[3]"}, "cannot be read"),
        ({"onnxslim.passes": "["}, "cannot be read"),
        ({"onnxslim.kept": '{"sqnr": "many"}'}, "cannot be read"),
    ],
)
def test_none_or_a_broken_one(
    made: tuple[Model, Model],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metadata: dict[str, str],
    said: str,
) -> None:
    model = made[1].with_metadata(metadata) if metadata else made[0]
    model.save(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=said):
        Certificate.read(load(tmp_path / "m.onnx"))
    assert cli.main(["verify", str(tmp_path / "m.onnx")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_command(made: tuple[Model, Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, model = str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")
    made[0].save(original)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).standard_normal((256, 8), np.float32))
    data = ["--data", str(tmp_path / "x.npz")]
    assert cli.main(["quantize", original, model, *data, "--report", str(tmp_path / "r.json")]) == 0
    told = json.loads((tmp_path / "r.json").read_text("utf-8"))["metadata"]
    assert told["onnxslim.passes"] == '["quantize"]'
    capsys.readouterr()
    assert cli.main(["verify", model, "--original", original, *data]) == 0
    text = capsys.readouterr().out
    assert "made by onnxslim" in text
    assert "as it was made" in text
    assert cli.main(["verify", model, *data]) == 2
    assert "--data says nothing without --original" in capsys.readouterr().err
    assert cli.main(["verify", model, "--original", model, "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert [each["holds"] for each in told["findings"]] == [True, False, None]
