"""How operators pass scales on: every row with a rule stands between products that scale what it reads."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from onnxslim import shapes
from onnxslim.ir.graph import Constant, Node, Tensor, Variable, sort
from onnxslim.ir.model import Model
from onnxslim.ops import REGISTRY, OpSpec
from onnxslim.passes.fold import Fold
from onnxslim.passes.quantize.scaling import Scaling
from onnxslim.runtime.probe import make_feeds
from tests.helpers import apply, judge_of, parse, rows

ROWS = [pytest.param(spec, id=spec.op) for spec in rows() if spec.scales is not None and spec.example]
# These let no scale of what they read through, but give new ones to what they make.
FIXES = {spec.op for spec in REGISTRY.values() if spec.norm_axis and spec.op != "BatchNormalization"}


def test_rules_have_examples() -> None:
    assert [spec.op for spec in REGISTRY.values() if spec.scales is not None and not spec.example] == []


@pytest.mark.parametrize("spec", ROWS)
def test_a_scaled_example_computes_the_same(spec: OpSpec) -> None:
    """With scales along any axis of what it reads, read along any axis of what it makes."""
    model, _ = apply(Fold(), parse(spec.example))
    ranks = [len(tensor.shape or ()) for tensor in (model.graph.inputs[0], model.graph.outputs[0])]
    passed = [_is_scaled(model, spec, *axes) for axes in product(*map(range, ranks))]
    assert any(passed) is (spec.op not in FIXES)


def _is_scaled(model: Model, spec: OpSpec, axis: int, behind: int) -> bool:
    """Whether what the operator reads has scales; they change nothing."""
    twin = _constant(model.copy())
    data, result = twin.graph.inputs[0], twin.graph.outputs[0]
    scaled = _product(twin, data, axis)
    for node in twin.graph.nodes[:-3]:
        node.inputs = [scaled if tensor is data else tensor for tensor in node.inputs]
    twin.graph.outputs = [_product(twin, result, behind)]
    sort(twin.graph)
    shapes.infer(twin)
    before, scaling = twin.copy(), Scaling(twin)
    free = scaling.free
    if not free.any():
        return False
    scaling.apply(np.where(free, np.exp(np.random.default_rng(0).uniform(-2, 2, free.size)), 1.0))
    feeds = make_feeds(twin.inputs(), batch=5, size=5)
    ((expected,), (found,)) = (judge_of(each).run(feeds).values() for each in (before, twin))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    known = scaling.tensors.get(scaled.name)
    return known is not None and bool(free[known.labels].any())


def _constant(model: Model) -> Model:
    """All inputs but the first as positive constants, nothing but the first output, and five samples."""
    random = np.random.default_rng(1)
    for tensor in (*model.graph.inputs, *model.graph.outputs):
        assert isinstance(tensor, Variable)
        tensor.shape = _sizes(tensor)
    for tensor in model.graph.inputs[1:]:
        values = Constant(tensor.name, np.asarray(random.uniform(0.5, 1.5, _sizes(tensor)), np.float32))
        for node in model.graph.nodes:
            node.inputs = [values if used is tensor else used for used in node.inputs]
    del model.graph.inputs[1:], model.graph.outputs[1:]
    return model


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 5 for size in tensor.shape or ())


def _product(model: Model, tensor: Tensor, axis: int) -> Tensor:
    """A tensor multiplied by a matrix along one of its axes."""
    sizes, name = _sizes(tensor), tensor.name
    rank, size = len(sizes), sizes[axis]
    order = [*(each for each in range(rank) if each != axis), axis]
    weight = np.random.default_rng(2).standard_normal((size, size)).astype(np.float32)
    steps = [Variable(f"{name}_{what}_{axis}", np.dtype(np.float32)) for what in ("turn", "product", "back")]
    model.graph.nodes += [
        Node("Transpose", steps[0].name, {"perm": tuple(order)}, [tensor], [steps[0]]),
        Node("MatMul", steps[1].name, {}, [steps[0], Constant(f"{name}_w_{axis}", weight)], [steps[1]]),
        Node("Transpose", steps[2].name, {"perm": tuple(np.argsort(order).tolist())}, [steps[1]], [steps[2]]),
    ]
    return steps[2]
