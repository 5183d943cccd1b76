"""Weights that are looked up in tables run in integers, which are looked up in tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.passes.cluster import Cluster
from onnxslim.passes.codes.lookups import restored
from onnxslim.passes.codes.storing import CodeWriter
from onnxslim.passes.codes.tables import Codebook, even, nearest
from onnxslim.passes.quantize import QuantizationPlan, Quantize, QuantizeFigures
from onnxslim.passes.quantize.shared import Shared
from onnxslim.passes.quantize.weights import saturates
from onnxslim.runtime.profile import optimized_model
from tests.helpers import filled, normal, ops, parse, run

NET = """g (float[N,16,6,6] x) => (float[N,64] y)
<float[64,16,3,3] w = {0}, float[64] b = {0}, float[64,64,1,1] v = {0}, float[64,64] m = {0}>
{ [first] a = Conv(x, w, b) c = Relu(a) [second] d = Conv(c, v) e = Relu(d)
  p = GlobalAveragePool(e) f = Flatten(p) [last] y = MatMul(f, m) }"""
DATA = CalibrationData([{"x": np.maximum(normal(64, 16, 6, 6, seed=1), 0)}])
WAYS: list[dict[str, Any]] = [{"bits": 4}, {"bits": 3, "scaled": True}, {"bits": 4, "group": 8}, {"bits": 6}]


@pytest.fixture
def net() -> Model:
    return filled(parse(NET), 0.2)


def made(model: Model, way: dict[str, Any], **options: Any) -> tuple[Model, Result]:
    """A model with weights in tables, and what quantizing makes of that."""
    few = Pipeline(Cluster(**way), on_error="raise")(model, data=DATA).model
    quantize = Quantize(**{"classifier": True, "require_sqnr": 0, **options})
    return few, Pipeline(quantize, on_error="raise")(few, data=DATA)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_looked_up_runs_in_integers_in_as_few_bytes(net: Model, way: dict[str, Any]) -> None:
    few, result = made(net, way)
    assert result.report.steps[-1].kept is not None
    assert result.report.steps[-1].kept.sqnr > 28
    kinds = [node.op_type for node in optimized_model(result.model).graph.node]
    assert kinds.count("QLinearConv") == 2
    whole = Pipeline(Quantize(classifier=True, require_sqnr=0))(net, data=DATA).model
    assert result.model.nbytes() < few.nbytes() + 2000 < whole.nbytes()
    figures = QuantizeFigures.of(result.report.steps[-1].changes)
    assert figures.shared == 3
    assert isinstance(figures.plan, QuantizationPlan)
    again = Pipeline(Quantize(plan=figures.plan), on_error="raise")(few, data=DATA).model
    assert again.to_proto() == result.model.to_proto()


@pytest.mark.parametrize("pair_axis", [None, 1])
def test_even_steps_are_the_integers_themselves_unless_these_saturate(pair_axis: int | None) -> None:
    book = even(normal(6, 20), np.full(6, 0.01, np.float32))
    found = Shared.of(book, pair_axis)
    scales = found.encoded.scales[:, None]
    assert (np.abs(found.encoded.codes * scales - book.values()) <= 0.501 * scales).all()
    same = np.array_equal(found.encoded.codes, book.codes.astype(np.int16) + int(book.tables[0, 0]))
    assert same == (pair_axis is None)
    assert pair_axis is None or not saturates(found.encoded.codes, 0, 1, 255)


def test_even_steps_run_in_integers(net: Model) -> None:
    few, result = made(net, {"download": 0.28})
    assert any(constant.dtype == np.int8 for constant in few.constants())
    kinds = [node.op_type for node in optimized_model(result.model).graph.node]
    assert kinds.count("QLinearConv") == 2
    assert result.model.nbytes() < few.nbytes() + 4000


def test_what_stays_in_floats_is_looked_up_as_it_was(net: Model) -> None:
    few, result = made(net, {"bits": 4}, exclude=("second",))
    figures = QuantizeFigures.of(result.report.steps[-1].changes)
    assert figures.shared == 2
    (before,), (after,) = (
        [node.values for node in weights(model) if node.shape == (64, 64, 1, 1)]
        for model in (few, result.model)
    )
    assert np.array_equal(before, after)


def test_where_nothing_runs_in_integers_nothing_changes(net: Model) -> None:
    few, result = made(net, {"bits": 4}, exclude=("*",))
    assert not result.report.steps[-1].changes
    assert result.model.to_proto() == few.to_proto()
    twin = few.copy()
    assert not Quantize(exclude=("*",)).run(twin, Context(data=Samples(DATA, twin)))
    assert twin.to_proto() == few.to_proto()


def weights(model: Model) -> list[Constant]:
    """Constants of a copy in which what is looked up in floats is plain."""
    twin = model.copy()
    restored(twin)
    return list(twin.graph.initializers.values())


@given(
    st.integers(0, 99),
    st.integers(1, 8),
    st.sampled_from((0, 3)),
    st.booleans(),
    st.sampled_from((None, 1)),
    st.sampled_from((0.0, 2.0)),
)
def test_integers_are_near_and_their_sums_do_not_saturate(
    seed: int, bits: int, group: int, scaled: bool, pair_axis: int | None, spread: float
) -> None:
    sizes = np.exp(spread * normal(6, seed=seed + 1)).reshape(6, 1)
    book = nearest(normal(6, 20, seed=seed) * sizes, bits, 0, group, scaled=scaled)
    found = Shared.of(book, pair_axis)
    scales = found.encoded.scales[:, None]
    assert (np.abs(found.encoded.codes * scales - book.values()) <= 0.501 * scales).all()
    assert pair_axis is None or not saturates(found.encoded.codes, 0, 1, 255)
    assert pair_axis is not None or np.abs(found.encoded.codes).max() >= 127
    assert np.array_equal(found.integers.codes, book.codes)


@pytest.mark.parametrize("group", [0, 3])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8, "even"])
def test_what_is_written_is_read_back(group: int, scaled: bool, bits: Any) -> None:
    model = parse("g (float[N,20] x) => (float[N,7] y) { y = Gemm<transB=1>(x, w) }", {"w": normal(7, 20)})
    weight = model.graph.initializers["w"]
    if bits == "even":
        book = even(weight.values, np.full(7 if scaled else 1, 0.05, np.float32))
    else:
        book = nearest(weight.values, bits, 0, group, scaled=scaled)
    written = model.copy()
    writer = CodeWriter(written)
    writer.write(written.graph.initializers["w"], book)
    writer.finish()
    before = written.to_proto()
    ((layer, found),) = restored(twin := written.copy())
    assert layer.node.op == "Gemm"
    assert ops(twin) == {"Gemm": 1}
    assert np.array_equal(found.values(), book.values())
    assert same(found, book)
    assert written.to_proto() == before
    feeds = {"x": normal(3, 20)}
    assert np.array_equal(run(written, feeds)["y"], run(twin, feeds)["y"])


def same(one: Codebook, two: Codebook) -> bool:
    if one.even:
        return two.even
    return np.array_equal(one.tables, two.tables) and np.array_equal(one.codes, two.codes)


def test_layers_that_had_better_be_floats_take_no_more_room(net: Model) -> None:
    few, result = made(net, {"bits": 4}, require_sqnr=42)
    figures = QuantizeFigures.of(result.report.steps[-1].changes)
    assert any(layer.kept for layer in figures.layers or ())
    assert result.model.nbytes() < few.nbytes() + 2000


@pytest.mark.parametrize("table", [[1.0, 2.0, 3.0], [1.0, 3.0, 2.0, 4.0], [1.0]])
def test_tables_that_codes_do_not_fill_are_left_alone(table: list[float]) -> None:
    model = parse(
        """g (float[N,2] x) => (float[N,2] y) <int64[2,2] at = {0,0,0,0}>
        { w = Gather(t, at) y = MatMul(x, w) }""",
        {"t": np.array(table, np.float32)},
    )
    before = model.to_proto()
    assert restored(model) == []
    assert model.to_proto() == before


def test_factors_of_inputs_are_none_of_outputs() -> None:
    """What goes with another axis is a weight like any other, and means what it did."""
    model = parse(
        """g (float[N,3] x) => (float[N,3] y) <int64[3,3] at = {0,1,2,3,2,1,0,1,2}>
        { found = Gather(t, at) w = Mul(found, s) y = MatMul(x, w) }""",
        {"t": np.array([1, 2, 3, 4], np.float32), "s": np.array([[1], [2], [4]], np.float32)},
    )
    feeds = {"x": normal(4, 3)}
    before = run(model, feeds)["y"]
    assert restored(model) == []
    assert np.array_equal(run(model, feeds)["y"], before)


@pytest.mark.parametrize(
    "change",
    ["w = Mul(g, minus)", "w = Add(g, minus)", "h = Mul(g, minus) w = Mul(h, minus)"],
    ids=["negative", "added", "twice"],
)
def test_other_ways_to_compute_a_weight_are_left_alone(change: str) -> None:
    text = f"""g (float[N,2] x) => (float[N,2] y)
    <int64[2,2] at = {{0,1,1,2}}, float[1] minus = {{-1.0}}, float[4] t = {{1.0, 2.0, 3.0, 4.0}}>
    {{ g = Gather(t, at) {change} y = MatMul(x, w) }}"""
    model = parse(text)
    before = model.to_proto()
    assert restored(model) == []
    assert model.to_proto() == before
