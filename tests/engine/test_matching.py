"""Globs: they mean the same in every pass, and one that means nothing is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxslim import passes
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Log, Pass
from onnxslim.engine.matching import matches, tell_idle
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from tests.helpers import parse

# Every pass that takes globs, with options by which it changes both layers of the model.
FILTERING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("prune", {"ratio": 0.5}),
    ("factorize", {"params": 0.5, "repair": False}),
    ("quantize", {"observer": "minmax", "classifier": True}),
    ("quantize", {"activations": "none"}),
    ("cluster", {"bits": 4}),
    ("sparsify", {"pattern": "2:4"}),
    ("half", {}),
    ("half", {"weights_only": True}),
)
# Of other things than weights, or with PyTorch: tests of their own.
ELSEWHERE = {"cheapen", "distill"}
TEXT = """g (float[N,32] x) => (float[N,8] y)
{ [first] a = MatMul(x, w) r = Relu(a) [second] b = Gemm(r, v) t = Relu(b) [last] y = MatMul(t, u) }"""


def net() -> Model:
    random = np.random.default_rng(0)
    shapes = {"w": (32, 64), "v": (64, 64), "u": (64, 8)}
    return parse(TEXT, {n: random.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()})


def run(step: Pass) -> Result:
    samples = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32)
    data = CalibrationData([{"x": samples[at : at + 8]} for at in range(0, 32, 8)])
    return Pipeline(step, on_error="raise")(net(), data=data)


def is_whole(result: Model, weight: str) -> bool:
    """Whether a node still reads a weight as large, dense and exact as it was, though perhaps refitted."""
    original = next(tensor for tensor in net().constants() if tensor.name == weight)
    return any(
        (tensor.name, tensor.dtype, tensor.shape) == (weight, original.dtype, original.shape)
        for node in result.graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, Constant) and node.op != "QuantizeLinear" and tensor.values.all()
    )


def test_every_pass_with_globs_is_tested() -> None:
    options = {name: {each.name for each in passes.options_of(passes.get(name))} for name in passes.names()}
    taking = {name for name, known in options.items() if "exclude" in known}
    assert taking == {name for name, _ in FILTERING} | ELSEWHERE


@pytest.mark.parametrize(("name", "options"), FILTERING)
def test_the_model_has_something_to_leave_alone(name: str, options: dict[str, Any]) -> None:
    result = run(passes.create(name, options)).model
    assert not is_whole(result, "v")


@pytest.mark.parametrize(("name", "options"), FILTERING)
@pytest.mark.parametrize("glob", ["second", "sec*", "Gemm", "Ge*m", "v", "b"])
def test_a_glob_means_a_node_by_its_name_its_tensors_and_its_operator(
    name: str, options: dict[str, Any], glob: str
) -> None:
    changes = (step := run(passes.create(name, {**options, "exclude": [glob]}))).report.steps[0].changes
    if (name, glob) != ("prune", "b"):
        assert is_whole(step.model, "v")
    assert f"excluded by '{glob}'" in {skip.reason for skip in changes.skipped}
    assert not any(skip.warning for skip in changes.skipped)


def test_a_tensor_meant_by_itself_keeps_its_own_channels_only() -> None:
    result = run(passes.create("prune", {"ratio": 0.5, "exclude": ["b"]})).model
    assert {tensor.name: tensor.shape for tensor in result.constants()} == {
        "w": (32, 32),
        "v": (32, 64),
        "u": (64, 8),
    }


@pytest.mark.parametrize(("name", "options"), FILTERING)
@pytest.mark.parametrize(
    ("glob", "meant"), [("secnd", "second"), ("gemm", "Gemm"), ("SECOND", None), ("nowhere/*", None)]
)
def test_a_glob_that_means_nothing_is_told(
    name: str, options: dict[str, Any], glob: str, meant: str | None
) -> None:
    changes = run(passes.create(name, {**options, "exclude": [glob]})).report.steps[0].changes
    hint = f"; did you mean '{meant}'?" if meant else ""
    assert [(skip.node, skip.reason) for skip in changes.skipped if skip.warning] == [
        (glob, f"it matches no node, tensor or operator{hint}")
    ]


def test_names_are_taken_literally_before_they_are_globs() -> None:
    model = parse("g (float[N] x) => (float[N] y) { [a] y = Relu(x) }")
    node = model.graph.nodes[0]
    node.name = "layers[0]"
    assert matches(["layers[0]"], node) == "layers[0]"
    assert matches(["layers0", "layer?[[]?]"], node) == "layer?[[]?]"


def test_nodes_in_branches_are_known_by_name() -> None:
    model = parse(
        "g (bool c, float[N] x) => (float[N] y) { y = If(c)<then_branch = t () => (float[N] p)"
        " { [inside] p = Relu(x) }, else_branch = e () => (float[N] q) { q = Neg(x) }> }"
    )
    log = Log()
    tell_idle(["inside", "outside"], model, log)
    assert [skip.node for skip in log.done().skipped] == ["outside"]
