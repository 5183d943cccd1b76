"""What callers in Python may pass, and the one line that answers what they may not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxslim import load, validate
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Changes, Context, Pass
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError, LoadError, OnnxSlimError, TargetError, UsageError
from onnxslim.ir.model import Model
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from tests.helpers import normal, parse

X = normal(20, 4)


def network(batch: int | str = "N") -> Model:
    text = f"net (float[{batch},4] x) => (float[{batch},2] y) {{ a = Identity(x) y = MatMul(a, w) }}"
    return parse(text, {"w": normal(4, 2)})


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data in the usual forms."""
    monkeypatch.chdir(tmp_path)
    network().save("net.onnx")
    np.savez("x.npz", x=X)
    np.save("x.npy", X)
    (tmp_path / "batches").mkdir()
    for index in range(2):
        np.savez(f"batches/{index}.npz", x=X[index::2])
    return tmp_path


SOURCES: dict[str, Callable[[], Any]] = {
    "text": lambda: "net.onnx",
    "path": lambda: Path("net.onnx"),
    "protobuf": lambda: onnx.load("net.onnx"),
    "bytes": lambda: Path("net.onnx").read_bytes(),
    "model": network,
}
DATA: dict[str, Callable[[], Any]] = {
    "npz": lambda: "x.npz",
    "npy": lambda: Path("x.npy"),
    "folder": lambda: "batches",
    "samples": lambda: {"x": X},
    "samples of the only input": lambda: X,
    "batches": lambda: [{"x": X[:10]}, {"x": X[10:]}],
    "data": lambda: CalibrationData([{"x": X}]),
}


@pytest.mark.parametrize("source", SOURCES)
def test_models_in_every_form(source: str, places: Path) -> None:
    result = Pipeline(Slim())(SOURCES[source]())
    assert [node.op for node in result.model.graph.nodes] == ["MatMul"]
    assert validate(SOURCES[source](), result.model, targets="cpu").providers[0].target == "cpu"


@pytest.mark.parametrize("source", DATA)
def test_data_in_every_form(source: str, places: Path) -> None:
    given, seen = DATA[source](), []

    class Look(Pass):
        name = "look"

        def run(self, model: Model, ctx: Context) -> Changes:
            seen.append(ctx.given.data)
            return Changes()

    Pipeline(Look(), on_error="raise")(network(), data=given, target="cpu")
    rows = np.concatenate([batch["x"] for batch in seen[0]])
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(X, axis=0))
    assert validate(network(), network(), data=given, targets=["cpu"]).samples == 20


def test_samples_are_cut_as_the_model_wants_them() -> None:
    model = network(5)
    assert CalibrationData.of({"x": X}, model.inputs()).sizes() == (5, 5, 5, 5)
    assert validate(model, model, data=X, targets="cpu").batch == 5


def test_passes_may_come_in_a_list() -> None:
    assert Pipeline([Slim(), Prune(ratio=0.5)]).passes == Pipeline(Slim(), Prune(ratio=0.5)).passes


MISUSES: dict[str, tuple[Callable[[], object], type[OnnxSlimError], str]] = {
    "no model": (lambda: load(None), LoadError, "a path, a ModelProto or a Model, not NoneType"),  # type: ignore[arg-type]
    "a model that is no model": (lambda: validate(network(), 1), LoadError, "not int"),  # type: ignore[arg-type]
    "bytes that are none": (lambda: load(b"\xff\xff"), LoadError, "the bytes are not an ONNX model"),
    "a class": (lambda: Pipeline(Slim), UsageError, r"as Slim\(\)"),  # type: ignore[arg-type]
    "a name": (lambda: Pipeline("slim"), UsageError, "onnxslim.passes.parse"),  # type: ignore[arg-type]
    "nonsense": (lambda: Pipeline(3), UsageError, "not 3"),  # type: ignore[arg-type]
    "a word": (lambda: Pipeline(on_error="ignore"), UsageError, "'ignore'"),  # type: ignore[arg-type]
    "an option": (
        lambda: Quantize(observr="kl"),  # type: ignore[call-arg]
        UsageError,
        "pass 'quantize': there is no option 'observr'; did you mean 'observer'?",
    ),
    "a value": (
        lambda: Quantize(observer="klm"),  # type: ignore[arg-type]
        UsageError,
        "pass 'quantize': option 'observer': input should be .*, not 'klm'",
    ),
    "a target": (lambda: Pipeline(Slim())(network(), target="cpuu"), TargetError, "'cpuu'; known are"),
    "targets": (lambda: validate(network(), network(), targets=[3]), TargetError, "not 3"),  # type: ignore[list-item]
    "a name of an input": (
        lambda: Pipeline(Slim())(network(), data={"z": X}),
        CalibrationError,
        "no input 'z'",
    ),
    "a shape": (lambda: Pipeline(Slim())(network(), data={"x": X[:, :3]}), CalibrationError, "'x'"),
    "no data": (lambda: Pipeline(Slim())(network(), data=5), CalibrationError, "cannot be iterated"),
    "nothing there": (
        lambda: Pipeline(Slim())(network(), data="there.is.none"),
        CalibrationError,
        "there.is.none",
    ),
}


@pytest.mark.parametrize("kind", MISUSES)
def test_misuse_is_answered_in_one_line(kind: str) -> None:
    call, error, message = MISUSES[kind]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_is_shown_of_objects() -> None:
    result = Pipeline(Slim())(network())
    assert repr(network()) == "<Model 'net': 2 nodes, 32 bytes of constants, x -> y>"
    assert repr(Pipeline(Slim(), Prune(ratio=0.5))) == "Pipeline(slim(), prune(ratio=0.5))"
    assert repr(result.report) == "<Report of slim()>"
    assert repr(CalibrationData([{"x": X}], name="mine")) == "<CalibrationData 'mine': 1 batches>"
    assert result._repr_html_().startswith("<pre>pass")
    assert network()._repr_html_().startswith("&lt;Model")


def test_models_and_results_can_be_pickled_and_copied() -> None:
    result = Pipeline(Slim(), Prune(ratio=0.5))(network(), data=X)
    twin = pickle.loads(pickle.dumps(result))
    assert twin.model.to_proto() == result.model.to_proto()
    assert str(twin.report) == str(result.report)
    other = copy.deepcopy(result.model)
    other.graph.nodes[0].name = "changed"
    assert "changed" not in {node.name for node in result.model.graph.nodes}
