"""Quantize as a whole: what it keeps out of integers, how weights are stored, how codes are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.collect import Statistics, collect
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.engine.base import Context, Effort
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array, Constant, Node
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import Quantize, QuantizeFigures, calibrate, rounding, weights
from onnxslim.passes.quantize.descent import Neighbours
from onnxslim.passes.quantize.search import Search
from onnxslim.passes.quantize.trial import Trial
from onnxslim.runtime.metric import Metric, Run
from onnxslim.runtime.profile import optimized_model
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import (
    normal,
    ops,
    parse,
    quantize,
    reasons,
    replaced,
    skip_if_eight_bits_are_not_fused,
    sqnr_of,
)

CHAIN = """g (float[N,8,6,6] x) => (float[N,8,6,6] y)
<float[8,8,1,1] w1 = {0}, float[8] b1 = {0}, float[16,8,3,3] w2 = {0}, float[16] b2 = {0},
 float[8,16,1,1] w3 = {0}, float[8] b3 = {0}>
{ [first] a = Conv(x, w1, b1) ar = Relu(a)
  [middle] b = Conv<pads=[1,1,1,1]>(ar, w2, b2) br = Relu(b)
  [last] y = Conv(br, w3, b3) }"""


@pytest.fixture
def chain() -> Model:
    return replaced(
        parse(CHAIN),
        w1=normal(8, 8, 1, 1),
        b1=normal(8, seed=1),
        w2=normal(16, 8, 3, 3, seed=2) * np.geomspace(0.01, 1, 16).astype(np.float32)[:, None, None, None],
        b2=normal(16, seed=3),
        w3=normal(8, 16, 1, 1, seed=4),
        b3=normal(8, seed=5),
    )


@pytest.fixture
def batches() -> list[dict[str, Array]]:
    return [{"x": normal(4, 8, 6, 6, seed=seed)} for seed in range(8)]


def test_a_convolution_left_in_float_between_integers_is_really_left_alone(
    chain: Model, batches: list[dict[str, Array]]
) -> None:
    """ONNX Runtime quantizes float weights between a DQ and a Q itself, with one scale for all."""
    result, _ = quantize(chain, batches, exclude=("middle",))
    ran = {node.name: node.op_type for node in optimized_model(result).graph.node}
    assert ran["first"] == ran["last"] == "QLinearConv"
    assert ran["middle"] in ("Conv", "FusedConv")
    assert sqnr_of(chain, result, batches[0]) == pytest.approx(
        sqnr_of(chain, result, batches[0], "none"), abs=0.5
    )


def _with_outlier(chain: Model) -> Model:
    """One input channel of the middle layer is two hundred times the others, and hardly matters."""
    b1, w2 = chain.graph.initializers["b1"].values.copy(), chain.graph.initializers["w2"].values.copy()
    b1[0] += 800.0
    w2[:, 0] *= 1e-3
    return replaced(chain, b1=b1, w2=w2)


def test_the_layer_that_loses_most_is_kept_and_the_report_ranks_all(
    chain: Model, batches: list[dict[str, Array]]
) -> None:
    model = _with_outlier(chain)
    plain, _ = quantize(model, batches, require_sqnr=0, equalization=False, sequential=False)
    kept, changes = quantize(model, batches, require_sqnr=25, equalization=False, sequential=False)
    figures = QuantizeFigures.of(changes)
    assert figures.everything is not None
    assert figures.sqnr is not None
    assert figures.everything < 25 <= figures.sqnr
    rows = figures.layers or ()
    assert [row.sqnr for row in rows] == sorted(row.sqnr for row in rows)
    assert {row.node for row in rows} == {"first", "middle", "last"}
    assert 0 < sum(row.kept for row in rows) < 3
    fresh = {"x": normal(16, 8, 6, 6, seed=99)}
    assert sqnr_of(model, kept, fresh) > max(sqnr_of(model, plain, fresh), 23)


@pytest.mark.parametrize(
    ("part", "effort", "kind", "tried"),
    [
        (0.3, "normal", "auto", 0),
        (0.4, "normal", "auto", 2),
        (0.3, "thorough", "auto", 2),
        (0.3, "normal", "uint4", 2),
    ],
)
def test_better_integers_of_weights_are_looked_for_where_these_make_the_noise(
    chain: Model,
    batches: list[dict[str, Array]],
    monkeypatch: pytest.MonkeyPatch,
    part: float,
    effort: Effort,
    kind: Any,
    tried: int,
) -> None:
    """In eight bits; weights fitted to data of four take back of its noise, too."""
    steps: list[Trial] = []

    def step(self: Search, trial: Trial) -> Trial:
        steps.append(trial)
        return trial

    monkeypatch.setattr(Search, "weights", lambda self, trial: part)
    monkeypatch.setattr(Search, "fitted", step)
    monkeypatch.setattr(Search, "rounding", step)
    options: dict[str, Any] = {"equalization": False, "require_sqnr": 0, "activations": kind}
    quantize(_with_outlier(chain), batches, effort=effort, **options)
    assert len(steps) == tried


def test_nothing_is_searched_where_enough_is_kept(chain: Model, batches: list[dict[str, Array]]) -> None:
    _, changes = quantize(chain, batches, require_sqnr=15)
    assert QuantizeFigures.of(changes).layers is None
    _, changes = quantize(chain, batches, require_sqnr=15, layers=True)
    assert len(QuantizeFigures.of(changes).layers or ()) == 3
    assert not any(row.kept for row in QuantizeFigures.of(changes).layers or ())


# A metric of the caller's


def _closeness(model: Model) -> Metric:
    """Minus the relative error of the outputs on samples of its own, so that 0 is perfect."""
    feeds = {"x": normal(16, 8, 6, 6, seed=77)}
    wanted = Session(model).run(feeds)["y"]

    def closeness(run: Run) -> float:
        return -float(np.linalg.norm(run(feeds)["y"] - wanted) / np.linalg.norm(wanted))

    return closeness


def test_what_single_layers_need_is_calibrated_in_one_pass(
    batches: list[dict[str, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools between layers share the ranges of what they read, but not for a layer alone in integers."""
    text = """g (float[N,8,6,6] x) => (float[N,8,4,4] y)
    { a = Conv(x, u) b = MaxPool<kernel_shape=[2,2]>(a)
      c = Conv(b, v) d = MaxPool<kernel_shape=[2,2]>(c) y = Conv(d, w) }"""
    model = parse(text, {name: normal(8, 8, 1, 1, seed=seed) for seed, name in enumerate("uvw")})
    passes: list[list[str]] = []

    def counted(model: Model, data: CalibrationData, names: list[str], **how: Any) -> Statistics:
        passes.append(sorted(names))
        return collect(model, data, names, **how)

    monkeypatch.setattr(calibrate, "collect", counted)
    quantize(model, batches, equalization=False, sequential=False, layers=True)
    assert passes == [["a", "c", "x", "y"], ["b", "d"]]


def test_a_metric_decides_how_many_layers_stay_in_float(
    chain: Model, batches: list[dict[str, Array]]
) -> None:
    model = _with_outlier(chain)
    metric, rows, drops = _closeness(model), {}, {}
    for limit in (1.0, 0.1):
        result, changes = quantize(
            model, batches, metric=metric, max_drop=limit, equalization=False, sequential=False
        )
        before, after = QuantizeFigures.of(changes).metric or (-1.0, -1.0)
        assert before == 0.0
        assert after == pytest.approx(metric(Session(result).run), abs=1e-6)
        drops[limit] = -after
        rows[limit] = sum(row.kept for row in QuantizeFigures.of(changes).layers or ())
        assert not any("the metric" in skip.reason for skip in changes.skipped)
    assert all(drops[limit] <= limit for limit in drops)
    assert rows == {1.0: 0, 0.1: 2}, "the last layer alone loses little"


def test_a_goal_that_cannot_be_reached_is_told(chain: Model, batches: list[dict[str, Array]]) -> None:
    """To a metric that says that anything but the original is worthless, it is all the same."""
    values = iter([1.0])
    result, changes = quantize(chain, batches, metric=lambda run: next(values, 0.0), max_drop=0.5)
    reasons = [skip.reason for skip in changes.skipped]
    assert "the metric drops from 1 to 0, more than 0.5" in reasons
    assert not changes
    assert "every layer would have to stay in floating point to keep as much as is asked for" in reasons
    assert "QuantizeLinear" not in ops(result)


def test_a_limit_without_a_metric_is_the_callers_mistake(
    chain: Model, batches: list[dict[str, Array]]
) -> None:
    with pytest.raises(UsageError, match="max_drop needs a metric"):
        quantize(chain, batches, max_drop=0.1)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        Quantize(activations=None, max_drop=0.1).run(chain.copy(), Context(metric=lambda run: 1.0))


# Weights only

PRODUCTS = """g (int64[N,S] i) => (float[N,S,48] y)
<float[3000,64] table = {0}, float[64,96] w1 = {0}, float[96] b1 = {0}, float[96,48] w2 = {0}>
{ t = Gather(table, i) x = Tanh(t) [one] a = MatMul(x, w1) ab = Add(a, b1) ar = Relu(ab)
  [two] y = MatMul(ar, w2) }"""


@pytest.fixture
def products() -> Model:
    mixed = normal(64, 64, seed=7) * np.geomspace(0.05, 1, 64).astype(np.float32)
    return replaced(
        parse(PRODUCTS, opset=21),
        table=normal(3000, 64) @ mixed,
        w1=normal(64, 96, seed=1),
        b1=normal(96, seed=2),
        w2=normal(96, 48, seed=3),
    )


@pytest.fixture
def sentences() -> list[dict[str, Array]]:
    generator = np.random.default_rng(0)
    return [{"i": generator.integers(0, 3000, (4, 12))} for _ in range(16)]


@pytest.mark.parametrize(("bits", "size", "least"), [("int8", 0.3, 35.0), ("int4", 0.25, 15.0)])
def test_weights_alone_are_stored_as_integers(
    products: Model, sentences: list[dict[str, Array]], bits: str, size: float, least: float
) -> None:
    skip_if_eight_bits_are_not_fused(bits)
    result, _ = quantize(products, sentences, weights=bits, activations="none", require_sqnr=0)
    assert result.nbytes() < size * products.nbytes()
    assert "QuantizeLinear" not in ops(result)
    assert sqnr_of(products, result, sentences[0]) > least
    assert [node.op_type for node in optimized_model(result).graph.node].count("MatMulNBits") == 2


def test_four_bits_chosen_by_outputs_beat_the_nearest_ones(
    products: Model, sentences: list[dict[str, Array]]
) -> None:
    fresh = {"i": np.random.default_rng(9).integers(0, 3000, (16, 12))}
    found = {
        algorithm: sqnr_of(
            products,
            quantize(
                products, sentences, weights="int4", activations=None, algorithm=algorithm, require_sqnr=0
            )[0],
            fresh,
        )
        for algorithm in ("rtn", "cd")
    }
    assert found["cd"] > found["rtn"] + 2


def test_weights_alone_need_no_data(products: Model) -> None:
    twin = products.copy()
    changes = Quantize(activations=None).run(twin, Context())
    assert twin.nbytes() < 0.3 * products.nbytes()
    assert {change.node for change in changes.changed} >= {"one", "two"}


def test_four_bit_weights_run_in_integer_kernels(chain: Model, batches: list[dict[str, Array]]) -> None:
    result, changes = quantize(chain, batches, weights="int4", require_sqnr=0)
    assert QuantizeFigures.of(changes).fused == {"Conv": 3}
    stored = {constant.dtype.name for constant in result.constants()}
    assert "int4" in stored
    assert sqnr_of(chain, result, batches[0]) > 12
    assert sqnr_of(chain, result, batches[0]) == pytest.approx(
        sqnr_of(chain, result, batches[0], "none"), abs=1.0
    )


def test_four_bits_in_integer_kernels_gain_by_outputs_too(chain: Model) -> None:
    mixed = normal(3, 8, seed=5)
    images = [np.einsum("ncij,cd->ndij", normal(8, 3, 6, 6, seed=seed), mixed) for seed in range(9)]
    *data, fresh = ({"x": image} for image in images)
    found = {
        algorithm: sqnr_of(
            chain, quantize(chain, data, weights="int4", algorithm=algorithm, require_sqnr=0)[0], fresh
        )
        for algorithm in ("rtn", "cd")
    }
    assert found["cd"] > found["rtn"] + 1


# The judge


def test_parts_of_a_concat_are_judged_one_by_one() -> None:
    model = parse("""g (float[N,2,4] x, float[N,3,4] z) => (float[N,4,5] y)
        { c = Concat<axis=1>(x, z) y = Transpose<perm=[0,2,1]>(c) }""")
    feeds = {"x": 100 * normal(2, 2, 4), "z": normal(2, 3, 4, seed=1)}
    other = parse("""g (float[N,2,4] x, float[N,3,4] z) => (float[N,4,5] y)
        <float[1] h = {0.5}> { zh = Mul(z, h) c = Concat<axis=1>(x, zh) y = Transpose<perm=[0,2,1]>(c) }""")
    score = Judge(model, CalibrationData([feeds]), Target.cpu())(other)
    assert score.parts["y[0:2]"] == np.inf
    assert score.parts["y[2:5]"] == score.sqnr == pytest.approx(6.02, abs=0.01)


def test_error_is_the_share_of_the_variance_and_integers_count_only_alone() -> None:
    """A large mean hides noise from the SQNR, not from the error; a class found is not a quantity."""
    model = parse("""g (float[N,8] x) => (float[N,8] y, int64[N,1] c)
        <float h = {100}> { y = Add(x, h) c = ArgMax<axis=1>(y) }""")
    other = parse("""g (float[N,8] x) => (float[N,8] y, int64[N,1] c)
        <float h = {100}, float s = {0.5}, int64 z = {0}>
        { xs = Mul(x, s) y = Add(xs, h) a = ArgMax<axis=1>(y) c = Mul(a, z) }""")
    data = CalibrationData([{"x": normal(64, 8, seed=seed)} for seed in range(4)])
    score = Judge(model, data, Target.cpu(), 256)(other)
    assert score.parts.keys() == {"y"}
    assert score.error == pytest.approx(0.25, rel=0.01)
    assert score.sqnr == pytest.approx(46, abs=0.2)
    assert score.agreement == 1.0
    assert Judge(model, data, Target.cpu())(model).error == 0.0


# Rounding


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from((1, 4)), st.integers(0, 1 << 30)
)
def test_refined_codes_lower_the_error_and_keep_their_limits(
    groups: int, outputs: int, channels: int, positions: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    size = channels * positions
    target = generator.standard_normal((groups, outputs, size)).astype(np.float32)
    seen = generator.standard_normal((groups, size, 3 * size + 2)) * generator.uniform(0.1, 3, (size, 1))
    gram = seen @ seen.swapaxes(1, 2) / seen.shape[2]
    scales = np.abs(target).max(axis=2) / 127
    codes = np.rint(target / scales[..., None]).clip(-64, 64).astype(np.float32)
    neighbours = Neighbours(channels, positions)
    better, steps = rounding.refine(target, codes, scales, gram, neighbours=neighbours)

    def error(codes: Array, scales: Array) -> float:
        off = codes * scales[..., None] - target
        return float(np.einsum("gmk,gkl,gml->", off, rounding.damped(gram), off))

    assert error(better, steps) <= error(codes, scales) * (1 + 1e-4)
    assert np.array_equal(better, np.rint(better))
    assert np.abs(better).max() <= weights.QMAX
    table = better.reshape(groups * outputs, channels, positions).astype(np.int8)
    assert not weights._saturates(table).any()


# Targets


@pytest.mark.parametrize(
    ("layout", "activation", "bias", "symmetric"),
    [
        ("cpu", "uint8", "int32", False),
        ("openvino", "uint8", "int32", False),
        ("cuda", "int8", "float32", True),
        ("tensorrt", "int8", "float32", True),
        ("qnn", "uint16", "int32", False),
    ],
)
def test_graphs_obey_the_layout_of_a_target(
    chain: Model, batches: list[dict[str, Array]], layout: str, activation: str, bias: str, symmetric: bool
) -> None:
    result, _ = quantize(chain, batches, layout=layout, require_sqnr=0)
    pairs = [node for node in result.graph.nodes if node.op == "QuantizeLinear"]
    zeros = [node.inputs[2] for node in pairs if isinstance(node.inputs[2], Constant)]
    assert len(zeros) == len(pairs) > 0
    assert {zero.dtype.name for zero in zeros} == {activation}
    assert not symmetric or not any(zero.values.any() for zero in zeros)
    convs = [node for node in result.graph.nodes if node.op == "Conv"]
    for conv in convs:
        maker, stored = conv.inputs[2].inputs, conv.inputs[2]
        assert np.dtype((maker[0].inputs[0] if maker else stored).dtype).name == bias
        assert conv.inputs[1].inputs[0].inputs[0].dtype == np.int8
    assert sqnr_of(chain, result, batches[0], "none") > 25


def test_sixteen_bits_lose_less_than_eight(chain: Model, batches: list[dict[str, Array]]) -> None:
    found = {
        kind: sqnr_of(
            chain, quantize(chain, batches, activations=kind, algorithm="rtn")[0], batches[0], "none"
        )
        for kind in ("uint8", "uint16")
    }
    assert found["uint16"] > found["uint8"]


RESIDUAL = """g (float[N,8,6,6] x) => (float[N,8,6,6] y)
<float[8,8,1,1] w1 = {0}, float[8] b1 = {0}, float[8,8,3,3] w2 = {0}, float[8] b2 = {0}>
{ [one] a = Conv(x, w1, b1) r = Relu(a) [two] b = Conv<pads=[1,1,1,1]>(r, w2, b2) y = Add(b, r) }"""


def residual() -> Model:
    values = {"w1": normal(8, 8, 1, 1), "b1": normal(8, seed=1), "w2": normal(8, 8, 3, 3, seed=2)}
    return replaced(parse(RESIDUAL), **values, b2=normal(8, seed=3))


@pytest.mark.parametrize(("kind", "limits"), [("uint4", (0, 15)), ("int4", (-7, 7))])
def test_activations_of_four_bits_are_simulated_in_eight(
    batches: list[dict[str, Array]], kind: Any, limits: tuple[int, int]
) -> None:
    """Of 16 values, what weighted operators read; a sum gets floats, and biases stay such.

    Any optimization computes the same: ONNX Runtime makes no integers of biases either.
    """
    model = residual()
    result, changes = quantize(model, batches, activations=kind, require_sqnr=0)
    assert "nothing runs faster" in reasons(changes)[f"activations={kind}"]
    clips = [node for node in result.graph.nodes if node.op == "Clip"]
    assert len(clips) == 2
    (add,) = (node for node in result.graph.nodes if node.op == "Add")
    assert [tensor.inputs[0].op for tensor in add.inputs] == ["Conv", "Relu"]
    assert all(node.inputs[2].dtype == np.float32 for node in result.graph.nodes if node.op == "Conv")
    assert all(node.outputs[0].outputs for node in result.graph.nodes if node is not result.graph.nodes[-1])
    shown = result.copy()
    for clip in (node for node in shown.graph.nodes if node.op == "Clip"):
        shown.graph.outputs.append(clip.outputs[0])
    feeds = {"x": 3 * normal(64, 8, 6, 6, seed=99)}
    codes = [np.unique(each).tolist() for name, each in Session(shown).run(feeds).items() if name != "y"]
    assert codes == [[*range(limits[0], limits[1] + 1)], [*range(limits[1] + 1)]]
    plain, optimized = (Session(result, optimize=each).run(feeds)["y"] for each in ("none", "all"))
    np.testing.assert_allclose(plain, optimized, rtol=0, atol=1e-4)


def test_ranges_of_four_bits_are_those_of_least_error(batches: list[dict[str, Array]]) -> None:
    """Clipping what is rare leaves more than the range of all there is."""
    model = residual()
    kept = {
        observer: sqnr_of(
            model,
            quantize(
                model, batches, activations="uint4", observer=observer, equalization=False, require_sqnr=0
            )[0],
            {"x": normal(64, 8, 6, 6, seed=99)},
        )
        for observer in ("mse", "minmax")
    }
    assert kept["mse"] > kept["minmax"] + 1


def test_layers_that_cost_too_much_in_four_bits_stay_in_float(batches: list[dict[str, Array]]) -> None:
    """As in eight."""
    result, changes = quantize(residual(), batches, activations="uint4", require_sqnr=20)
    assert (QuantizeFigures.of(changes).sqnr or 0) >= 20
    assert ops(result)["Clip"] == 1
    nothing, changes = quantize(residual(), batches, activations="uint4")
    assert "every layer would have to stay" in " ".join(reasons(changes).values())
    assert "Clip" not in ops(nothing)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layout": "cuda"}, "activations=uint4 is a simulation, for target and layout cpu"),
        ({"optimize_for": "latency"}, "activations=uint4 is a simulation, which nothing runs faster"),
        ({"block_size": 32}, "block_size goes with activations=none"),
        ({"size": 0.5}, "size goes with weights=int4, int3 or int2"),
    ],
)
def test_what_a_simulation_does_not_go_with_is_said(
    batches: list[dict[str, Array]], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        quantize(residual(), batches, activations="uint4", **options)


def test_latency_is_measured_and_may_be_what_decides(
    chain: Model, batches: list[dict[str, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing itself is made up: only what is done with it can be tested."""
    monkeypatch.setattr(Judge, "latencies", lambda self, models, seconds: [float(_pairs(models[0]))])
    result, changes = quantize(chain, batches, optimize_for="latency", require_sqnr=0)
    assert QuantizeFigures.of(changes).latency == _pairs(result)
    reasons = [skip.reason for skip in changes.skipped]
    assert reasons.count("it is faster in floating point") == 2


@pytest.mark.parametrize("slower", [None, 1.2])
def test_what_does_not_pay_is_put_back_into_float(
    chain: Model, batches: list[dict[str, Array]], monkeypatch: pytest.MonkeyPatch, slower: float | None
) -> None:
    """Where integers take longer than floats, layers are tried in floats, the smallest and all of a kind."""
    asked: list[Model] = []

    def latencies(self: Judge, models: list[Model], seconds: float) -> list[float]:
        asked.extend(models)
        run = {node.name: _computes_in_integers(node) for node in models[0].graph.nodes}
        return [1.0 - 0.5 * run["first"] + 0.5 * run["middle"] + 0.5 * run["last"]]

    monkeypatch.setattr(Judge, "slowdown", lambda self, model: slower)
    monkeypatch.setattr(Judge, "latencies", latencies)
    result, changes = quantize(chain, batches, require_sqnr=0)
    left = {skip.node for skip in changes.skipped if skip.reason == "it is faster in floating point"}
    assert left == ({"middle", "last"} if slower else set())
    ran = {node.name: node.op_type for node in optimized_model(result).graph.node}
    assert ran["first"] == "QLinearConv"
    assert (ran["middle"] == "QLinearConv") == (slower is None)
    assert len(asked) == (1 if slower is None else 9)


def _pairs(model: Model) -> int:
    return sum(node.op == "QuantizeLinear" for node in model.graph.nodes)


def _computes_in_integers(node: Node) -> bool:
    return any(maker.op == "DequantizeLinear" for tensor in node.inputs[1:2] for maker in tensor.inputs)


def test_effort_is_how_much_is_tried(chain: Model, batches: list[dict[str, Array]]) -> None:
    efforts: tuple[Effort, ...] = ("quick", "normal", "thorough")
    steps: dict[Effort, list[str]] = {effort: [] for effort in efforts}
    kept: dict[Effort, float] = {}
    for effort in efforts:
        told = steps[effort]
        report = Pipeline(Quantize(effort=effort))(
            chain, data=CalibrationData(batches * 4), progress=lambda what, *_, told=told: told.append(what)
        ).report
        assert report.steps[0].kept is not None
        kept[effort] = report.steps[0].kept.sqnr
    tried = [steps[effort].count("trying candidates") for effort in efforts]
    assert 1 == tried[0] <= tried[1] < tried[2]
    assert "repairing" in steps["thorough"]
    assert "repairing" not in steps["quick"]
    assert kept["quick"] < kept["thorough"]


def test_quick_spares_layers_where_more_is_required(chain: Model, batches: list[dict[str, Array]]) -> None:
    _, plain = quantize(chain, batches, effort="quick")
    assert not any("cost too much" in skip.reason for skip in plain.skipped)
    _, changes = quantize(chain, batches, effort="quick", require_sqnr=60)
    assert any("cost too much" in skip.reason for skip in changes.skipped)


def test_a_constant_on_the_left_is_no_weight() -> None:
    text = "g (float[8,4] x) => (float[16,4] y) { [it] y = MatMul(w, x) }"
    model, batches = parse(text, {"w": normal(16, 8)}), [{"x": normal(8, 4)}] * 4
    for activations in ("auto", "none"):
        _, changes = quantize(model, batches, activations=activations)
        assert reasons(changes)["it"] == "its constant comes first, where layers read their data"
