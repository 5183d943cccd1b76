"""Every row of the operator table, held against ONNX Runtime on the row's own example.

A new row needs no test code: what it claims is checked here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx.defs
import pytest

from onnxslim import shapes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.noise import sqnr
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context
from onnxslim.engine.check import wellformed
from onnxslim.ir.graph import Array, Constant, Node, Tensor, Variable, sort
from onnxslim.ir.model import Model
from onnxslim.ops import OpSpec, Role, layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.shapes.cost import macs
from tests.helpers import judge_of, parse, rows

EXAMPLES = {spec.op: spec for spec in rows() if spec.example}
KERNELS = Target.cpu().layout.kernels
# These sum over time steps as well, so that ones do not count their products.
RECURRENT = ("LSTM", "GRU", "RNN")


def _rows(*roles: Role, only: Collection[str] = EXAMPLES, but: Collection[str] = ()) -> Any:
    """Parameters of a test: the rows of these roles."""
    chosen = {
        op: spec for op, spec in EXAMPLES.items() if spec.role in roles and op in only and op not in but
    }
    return [pytest.param(spec, id=op) for op, spec in chosen.items()]


def _node(model: Model, spec: OpSpec) -> Node:
    return next(node for node in model.graph.nodes if node.op == spec.op)


def _feeds(model: Model, fill: float | None = None) -> dict[str, Array]:
    """Distinct values for every element, or one for all; a free axis has size 1."""
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for item in model.inputs():
        shape = tuple(dim if isinstance(dim, int) else 1 for dim in item.shape or ())
        assert item.dtype is not None
        if item.dtype.kind in "iub":
            feeds[item.name] = np.zeros(shape, item.dtype)
        elif fill is None:
            feeds[item.name] = np.asarray(
                random.permutation(int(np.prod(shape))).reshape(shape) - 7, item.dtype
            )
        else:
            feeds[item.name] = np.full(shape, fill, item.dtype)
    return feeds


def _with_weights(model: Model) -> Model:
    """All inputs but the first as initializers, with random values."""
    random = np.random.default_rng(1)
    for tensor in model.graph.inputs[1:]:
        shape = tuple(dim if isinstance(dim, int) else 1 for dim in tensor.shape or ())
        integer = tensor.dtype is not None and tensor.dtype.kind == "i"
        values = np.zeros(shape, np.int64) if integer else random.standard_normal(shape).astype(np.float32)
        constant = Constant(tensor.name, values)
        for node in model.graph.nodes:
            for index, used in enumerate(node.inputs):
                if used is tensor:
                    node.inputs[index] = constant
        model.graph.initializers[tensor.name] = constant
    model.graph.inputs = model.graph.inputs[:1]
    return model


def _between_products(model: Model) -> Model:
    """The model with products before and behind it that run in integers, and so does all between them."""
    data, result = model.graph.inputs[0], model.graph.outputs[0]
    before = Variable("before", data.dtype, data.shape)
    for node in model.graph.nodes:
        for index, used in enumerate(node.inputs):
            if used is data:
                node.inputs[index] = before
    # The data is never negative; a Relu behind the product makes ONNX Runtime want a Q there.
    _product(model, data, before, rectified=True)
    behind = Variable("behind", result.dtype, result.shape)
    _product(model, result, behind)
    model.graph.outputs[0] = behind
    sort(model.graph)
    return model


def _product(model: Model, source: Tensor, made: Variable, *, rectified: bool = False) -> None:
    size = source.shape[-1] if source.shape else None
    assert isinstance(size, int)
    identity = Constant(f"{made.name}_weight", np.eye(size, dtype=np.float32))
    product = Variable(f"{made.name}_product", source.dtype, source.shape) if rectified else made
    model.graph.nodes.append(Node("MatMul", made.name, {}, [source, identity], [product]))
    if rectified:
        model.graph.nodes.append(Node("Relu", f"{made.name}_relu", {}, [product], [made]))


@pytest.mark.parametrize("spec", _rows(*Role))
def test_examples_are_valid_and_run(spec: OpSpec) -> None:
    model = parse(spec.example)
    if onnx.defs.has(spec.op):  # ONNX Runtime has operators of its own in this domain
        wellformed(model)
    assert _node(model, spec)
    assert judge_of(model, "all").run(_feeds(model))


@pytest.mark.parametrize("spec", _rows(Role.LINEAR))
def test_multiply_accumulates_are_the_products_that_are_summed(spec: OpSpec) -> None:
    """With ones for data and weights and no bias, each output element counts its own products."""
    model = parse(spec.example)
    feeds = _feeds(model, 1.0)
    if "b" in feeds:
        feeds["b"] = np.zeros_like(feeds["b"])
    counted = sum(float(array.sum()) for array in Session(model).run(feeds).values())
    if spec.op == "ConvTranspose":
        # Products are spread over the output instead of being summed up: the total is the same.
        assert macs(model) == counted
    else:
        assert macs(model, {name: array.shape for name, array in feeds.items()}) == counted


@pytest.mark.parametrize("spec", _rows(Role.LINEAR))
def test_layers_are_what_their_operators_compute(spec: OpSpec) -> None:
    model = _with_weights(parse(spec.example))
    layer, feeds = layer_of(_node(model, spec)), _feeds(model)
    assert isinstance(layer, Layer)
    (data,), (expected,) = feeds.values(), Session(model).run(feeds).values()
    at, bias = np.arange(layer.count(data)), layer.bias()
    assert bias is not None
    found = layer.matrix() @ layer.columns(data, at) + bias.reshape(layer.groups, layer.outputs, 1)
    np.testing.assert_allclose(found, layer.results(expected, at), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(layer.stored(layer.kernels()), layer.weight)
    assert layer.weight.shape[layer.weight_axis] == layer.outputs


@pytest.mark.parametrize("op", RECURRENT)
def test_recurrent_layers_read_all_weights_at_every_step(op: str) -> None:
    model = parse(EXAMPLES[op].example)
    steps = 5
    weights = sum(array.size for name, array in _feeds(model).items() if name in ("w", "r"))
    assert macs(model) == steps * weights


@pytest.mark.parametrize("spec", _rows(Role.MOVE))
def test_moved_elements_are_elements_of_the_input(spec: OpSpec) -> None:
    model = parse(spec.example)
    feeds = _feeds(model)
    (first, *_) = feeds.values()
    for array in Session(model).run(feeds).values():
        assert np.isin(array, first).all()
        assert array.size


@pytest.mark.parametrize("spec", _rows(Role.CLAMP))
def test_clamps_let_through_what_they_say(spec: OpSpec) -> None:
    assert spec.limits is not None
    model = parse(spec.example)
    for node in model.graph.nodes:
        if node.op == "Constant":
            # As constant folding would do it.
            value = Constant(node.outputs[0].name, np.array(node.attrs["value_float"], np.float32))
            user = _node(model, spec)
            user.inputs[user.inputs.index(node.outputs[0])] = value
    limits = spec.limits(_node(model, spec))
    assert limits is not None
    feeds = _feeds(model)
    (data,) = feeds.values()
    (result,) = Session(model).run(feeds).values()
    np.testing.assert_array_equal(result, data.clip(*limits))


@pytest.mark.parametrize("spec", _rows(Role.LINEAR, Role.KERNEL, only=KERNELS))
def test_integer_kernels_are_used_and_right(spec: OpSpec) -> None:
    model = _with_weights(parse(spec.example))
    if spec.role is Role.KERNEL:
        model = _between_products(model)
    shapes.infer(model)
    random = np.random.default_rng(2)
    shape = tuple(dim if isinstance(dim, int) else 1 for dim in model.graph.inputs[0].shape or ())
    feeds = {model.graph.inputs[0].name: np.abs(random.standard_normal(shape)).astype(np.float32)}
    after = model.copy()
    # The example's few channels are the point here, not what pays.
    changes = Quantize(classifier=True).run(
        after, Context(target=_wide(), data=Samples(CalibrationData([feeds]), model))
    )
    assert QuantizeFigures.of(changes).unfused == ()
    label = _node(model, spec).label
    assert any(change.node == label for change in changes.changed), changes.skipped
    expected, actual = Session(model).run(feeds), Session(after).run(feeds)
    for name, reference in expected.items():
        assert sqnr(reference, actual[name]) > 28, name


def _wide() -> Target:
    from dataclasses import replace

    target = Target.cpu()
    return replace(target, layout=replace(target.layout, min_channels=1))


@pytest.mark.parametrize("spec", _rows(Role.MOVE, but=Target.cpu().layout.slow))
def test_moves_keep_one_scale_on_both_sides(spec: OpSpec) -> None:
    model = parse(spec.example)
    if len(model.graph.outputs) > 1:
        model.graph.outputs = model.graph.outputs[:1]
    model = _between_products(_with_weights(model))
    shapes.infer(model)
    feeds = {
        tensor.name: np.random.default_rng(3)
        .uniform(0, 1, tuple(dim if isinstance(dim, int) else 4 for dim in tensor.shape or ()))
        .astype(np.float32)
        for tensor in model.graph.inputs
    }
    after = model.copy()
    changes = Quantize(classifier=True).run(after, Context(data=Samples(CalibrationData([feeds]), model)))
    node = _node(after, spec)
    pair, behind = node.inputs[0].inputs[0], node.outputs[0].outputs[0]
    assert (pair.op, behind.op) == ("DequantizeLinear", "QuantizeLinear"), changes.skipped
    assert pair.inputs[1:] == behind.inputs[1:]
