"""Whole networks with PyTorch: what ONNX Runtime computes, and which constants are weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from onnxslim.engine.base import Context, Log
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.learn.door import UnknownError, to_numpy, to_torch
from onnxslim.learn.net import Net
from onnxslim.learn.weights import weights
from onnxslim.models import zoo
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.literals import lower_constants
from onnxslim.passes.learning.apart import taken_apart
from onnxslim.runtime.session import Session
from tests.helpers import FASHION, feeds_for, normal, parse

torch: Any = pytest.importorskip(
    "torch", reason="PyTorch is not installed: pip install 'onnx-slimkit[train]'"
)
pytestmark = pytest.mark.train

# Largest difference from ONNX Runtime by the largest magnitude, besides what that itself differs from double
# precision by.
SAME = 1e-5


def computed(model: Model, feeds: Mapping[str, Array], real: Any = None) -> dict[str, Array]:
    with torch.no_grad():
        found = Net(taken_apart(model, Context()), real=real)(
            {name: to_torch(x) for name, x in feeds.items()}
        )
    return {name: to_numpy(each) for name, each in found.items()}


def require_same(model: Model, feeds: Mapping[str, Array]) -> None:
    exact, found = computed(model, feeds, torch.float64), computed(model, feeds)
    for name, expected in Session(model, optimize="none").run(feeds).items():
        assert (found[name].shape, found[name].dtype) == (expected.shape, expected.dtype)
        largest = np.abs(expected.astype(np.float64)).max()
        rounding = np.abs(expected - exact[name]).max()
        assert np.abs(expected - found[name]).max() <= SAME * largest + rounding, name


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit", "vgg"])
def test_bundled_networks_compute_the_same(name: str) -> None:
    with np.load(FASHION / "calibration.npz") as data:
        require_same(load(FASHION / f"{name}.onnx"), {"image": data["image"][:3]})


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_real_models_compute_the_same(name: str) -> None:
    if not zoo.available(name):
        pytest.skip(f"{name} is not in the cache: python models/zoo.py fetch (or python models/export.py)")
    pytest.importorskip("skimage", reason="inputs are made from photographs: pip install 'onnx-slimkit[zoo]'")
    require_same(load(zoo.path(name)), zoo.inputs(name, 1, seed=5)[0])


BRANCHES = """g (float[N,2] x, bool c) => (float[N,2] y) {
    y = If (c) <then_branch = t () => (float[N,2] a) {
                    w = Constant<value = float[2,2] {1.0, 2.0, 3.0, 4.0}>() a = MatMul(x, w) },
                else_branch = e () => (float[N,2] b) {
                    v = Constant<value = float[2,2] {2.0, 3.0, 4.0, 5.0}>()
                    k = Constant<value_floats=[1.0, 2.0]>() m = MatMul(x, v) b = Add(m, k) }> }"""


def test_weights_in_bodies_are_learnt() -> None:
    model = parse(BRANCHES)
    lower_constants(Edits(model, Log()), 0)
    learnt = weights(model)
    assert sorted(each.name for each in learnt) == ["k", "v", "w"]
    net = Net(model, learnt)
    for taken, names in ((True, {"w"}), (False, {"k", "v"})):
        net({"x": torch.ones(3, 2), "c": torch.tensor(taken)})["y"].sum().backward()
        moved = {
            each.name
            for each, parameter in zip(learnt, net.parameters, strict=True)
            if parameter.grad is not None
        }
        assert moved == names
        for parameter in net.parameters:
            parameter.grad = None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = MatMul(x, w)", True),
        ("t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)", True),
        ("h = Cast<to=10>(w) t = Cast<to=1>(h) y = Mul(x, t)", True),
        ("y = Pow(x, w)", False),
        ("i = Cast<to=3>(x) y = DequantizeLinear(i, w)", False),
        ("y = Max(x, w)", False),
        ("c = Greater(x, w) y = Cast<to=1>(c)", False),
    ],
)
def test_weights_are_what_is_multiplied_or_added(body: str, expected: bool) -> None:
    model = parse(f"g (float[4,4] x) => (float[4,4] y) {{ {body} }}", {"w": normal(4, 4)})
    assert [each.name for each in weights(model)] == (["w"] if expected else [])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.triu(np.full((4, 4), -1e4, np.float32), 1), False),
        (np.triu(np.full((4, 4), -np.inf, np.float32), 1), False),
        (np.zeros((4, 4), np.float32), True),
        (np.full((4, 4), -100, np.float32), True),
        (np.full((), 2.0, np.float32), False),
    ],
)
def test_masks_and_single_numbers_are_no_weights(values: Array, expected: bool) -> None:
    model = parse("g (float[4,4] x) => (float[4,4] y) { y = Add(x, w) }", {"w": values})
    assert bool(weights(model)) is expected


def test_what_stops_gradients_is_named() -> None:
    model = parse(
        """g (float[N,4] x) => (float[N,4] y) {
            a = Mul(x, w) b = Round(a) c = Relu(b) d = Mul(x, v) y = Add(c, d) }""",
        {"w": normal(4), "v": normal(4, seed=1)},
    )
    net = Net(model, weights(model))
    net({"x": torch.ones(2, 4)})["y"].sum().backward()
    found = [net.in_the_way(at) for at in range(2)]
    assert [node and node.op for node in found] == ["Round", None]


def test_a_node_that_is_not_known_is_named() -> None:
    model = parse("g (float[4] x) => (float[4] y) { y = RandomUniformLike(x) }")
    with pytest.raises(UnknownError, match="RandomUniformLike is not known"):
        Net(model)


def test_tensors_are_forgotten_once_nobody_reads_them() -> None:
    model = parse("g (float[4] x) => (float[4] y) { a = Sin(x) b = Cos(a) y = Add(a, b) }")
    (steps,) = Net(model)._steps.values()
    made = {tensor.name: id(tensor) for node in model.graph.nodes for tensor in node.outputs}
    assert [set(step.drops) for step in steps] == [set(), set(), {made["a"], made["b"]}]


def test_half_precision_is_computed_in_single() -> None:
    model = parse(
        "g (float16[2,4] x) => (float16[2,4] y) { y = MatMul(x, w) }", {"w": normal(4, 4).astype(np.float16)}
    )
    net = Net(model, weights(model), torch.float32)
    assert net({name: to_torch(x) for name, x in feeds_for(model).items()})["y"].dtype == torch.float32
