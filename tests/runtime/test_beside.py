"""Large weights are read where they are, and nothing else comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from onnxslim.errors import LoadError
from onnxslim.ir.model import Model
from onnxslim.runtime import native, ort
from onnxslim.runtime.backend import Opening
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import normal, parse

LARGE = normal(160, 160)
# What stays in the model is what a body declares, what the caller may override, and what no node reads.
MODELS = {
    "plain": ("g (float[N,160] x) => (float[N,160] y) <float[160,160] w> { y = MatMul(x, w) }", {"w"}),
    "twice": (
        "g (float[N,160] x) => (float[N,160] y) <float[160,160] w> { a = MatMul(x, w) y = MatMul(a, w) }",
        {"w"},
    ),
    "read in a body": (
        """g (float[N,160] x, bool b) => (float[N,160] y) <float[160,160] w> { y = If(b) <
        then_branch = t () => (float[N,160] c) { c = MatMul(x, w) },
        else_branch = e () => (float[N,160] d) { d = Identity(x) }> }""",
        {"w"},
    ),
    "of a body": (
        """g (float[N,160] x, bool b) => (float[N,160] y) { y = If(b) <
        then_branch = t () => (float[N,160] c) <float[160,160] w> { c = MatMul(x, w) },
        else_branch = e () => (float[N,160] d) { d = Identity(x) }> }""",
        set(),
    ),
    "overridable": (
        "g (float[N,160] x, float[160,160] w) => (float[N,160] y) <float[160,160] w> { y = MatMul(x, w) }",
        set(),
    ),
    "unread": ("g (float[N,160] x) => (float[N,160] y) <float[160,160] w> { y = Relu(x) }", set()),
    "an output": (
        "g (float[N,160] x) => (float[N,160] y, float[160,160] w) <float[160,160] w> { y = Relu(x) }",
        set(),
    ),
}


def _model(text: str, values: np.ndarray[Any, Any]) -> Model:
    """The model with these values wherever it declares `w`."""
    proto = parse(text.replace("<float[160,160] w>", "<float[1,1] w = {0}>")).to_proto()
    graphs = [
        proto.graph,
        *(item.g for node in proto.graph.node for item in node.attribute if item.HasField("g")),
    ]
    for graph in graphs:
        for tensor in graph.initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return Model.from_proto(proto)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """The weights that sessions are given beside their models, in turn."""
    found: list[Mapping[str, Any]] = []
    opened = native.open_model

    def noted(source: Any, settings: Any, weights: Mapping[str, Any] | None = None) -> native.OrtModel:
        found.append(weights or {})
        return opened(source, settings, weights or {})

    monkeypatch.setattr(native, "open_model", noted)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_sessions_compute_the_same_without_a_copy(name: str, given: list[Mapping[str, Any]]) -> None:
    text, beside = MODELS[name]
    model = _model(text, LARGE)
    feeds = {"x": normal(3, 160, seed=1), "b": np.array(True)}
    feeds = {spec.name: feeds[spec.name] for spec in model.inputs() if spec.name in feeds}
    found, wanted = (Session(each).run(feeds) for each in (model, model.to_proto()))
    assert set(given[0]) == beside
    for output, values in wanted.items():
        np.testing.assert_array_equal(found[output], values)


def test_types_that_onnx_runtime_lacks_are_left_to_it_to_refuse() -> None:
    model = parse(
        "g (complex64[N,160] x) => (complex64[N,160] y) { y = MatMul(x, w) }",
        {"w": LARGE.astype(np.complex64)},
    )
    with pytest.raises(LoadError, match="ONNX Runtime refuses the model"):
        Session(model)


@pytest.mark.parametrize(
    ("how", "copied"),
    [(Opening(), True), (Opening(spin=False), False), (Opening(once=True), False)],
)
def test_weights_of_large_models_are_copied_only_to_be_timed(
    how: Opening, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parse("g (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)})
    assert ort._settings(model, Target.cpu(), how).prepack
    monkeypatch.setattr(ort, "LARGE_BYTES", model.nbytes())
    assert ort._settings(model, Target.cpu(), how).prepack == copied


@pytest.mark.parametrize("floats", [False, True])
def test_products_with_blocks_round_as_they_will_where_few_floats_are_beside(
    floats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[N,64] x) => (float[N,64] y) {
            z = com.microsoft.MatMulNBits<K=64, N=64, bits=8, block_size=64, accuracy_level=4>(x, w, s)
            y = Add(z, b)
        }""",
        {
            "w": np.arange(64 * 64, dtype=np.uint8).reshape(64, 1, 64),
            "s": np.ones(64, np.float32),
            "b": normal(64),
        },
    )
    monkeypatch.setattr(ort, "LARGE_BYTES", 256 if floats else model.nbytes())
    assert ort._settings(model, Target.cpu(), Opening(spin=False)).prepack == (not floats)
