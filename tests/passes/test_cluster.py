"""Cluster: weights as codes into tables, looked up exactly, fitted, chosen, and folded at load."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim import cli, passes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import Moments
from onnxslim.calibration.noise import sqnr
from onnxslim.engine.base import Context
from onnxslim.engine.moves import Load, chosen
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.errors import UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.cluster import Cluster, ClusterFigures
from onnxslim.passes.cluster.fit import Clustering, TableDescent
from onnxslim.passes.cluster.plan import ClusteringPlan
from onnxslim.passes.codes.storing import CodeWriter
from onnxslim.passes.codes.tables import Codebook, clustered, even, nearest
from onnxslim.passes.quantize.descent import Pulls
from onnxslim.passes.slim import Slim
from onnxslim.runtime.profile import optimized_model
from onnxslim.runtime.session import Session
from tests.helpers import filled, normal, normals, ops, parse, run

NET = """g (float[N,8,6,6] x) => (float[N,40] y)
<float[32,8,3,3] w = {0}, float[32] b = {0}, float[32,32,1,1] v = {0}, float[32,40] m = {0},
 float[40] n = {0}>
{ [first] a = Conv(x, w, b) c = Relu(a) [second] d = Conv(c, v) e = Relu(d)
  p = GlobalAveragePool(e) f = Flatten(p) [last] y = Gemm(f, m, n) }"""


@pytest.fixture
def net() -> Model:
    return filled(parse(NET), 0.2)


@pytest.fixture
def feeds() -> list[dict[str, Array]]:
    """Inputs whose channels go together, as those of pictures do."""
    mixed = np.einsum("nchw,cd->ndhw", normal(64, 8, 6, 6, seed=1), normal(8, 8, seed=2))
    return [{"x": np.maximum(mixed, 0)}]


def clustered_by(model: Model, feeds: list[dict[str, Array]] | None, **given: object) -> Result:
    data = None if feeds is None else CalibrationData(feeds)
    return Pipeline(Cluster(**given), on_error="raise")(model, data=data)  # type: ignore[arg-type]


def kept(before: Model, after: Model, feeds: list[dict[str, Array]]) -> float:
    return sqnr(*(Session(each).run(feeds[0]) for each in (before, after)))


def reasons(result: Result) -> str:
    return "; ".join(f"{skip.node}: {skip.reason}" for skip in result.report.steps[0].changes.skipped)


# ------------------------------------------------------------------------------------ codes and tables


@settings(max_examples=60)
@given(st.data())
def test_codes_look_up_exactly_what_tables_hold(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 8))
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    group = data.draw(st.integers(0, shape[axis]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    count = -(-shape[axis] // group) if group else 1
    kind = data.draw(st.sampled_from((np.float32, np.float16)))
    tables = np.sort(random.standard_normal((count, 1 << bits)).astype(kind))
    scales = random.standard_normal(shape[axis]).astype(kind) if data.draw(st.booleans()) else None
    book = Codebook(random.integers(0, 1 << bits, shape).astype(np.uint8), tables, axis, group, scales)
    name, sizes = ("float", "float16")[kind is np.float16], ",".join(map(str, shape))
    model = parse(f"g () => ({name}[{sizes}] y) {{ y = Identity(w) }}", {"w": np.zeros(shape, kind)})
    writer = CodeWriter(model)
    writer.write(next(each for each in model.constants() if each.name == "w"), book)
    writer.finish()
    onnx.checker.check_model(model.to_proto(), full_check=True)
    np.testing.assert_array_equal(run(model, {})["y"], book.values())
    stored = next(each for each in model.constants() if each.name == "w_codes")
    assert stored.nbytes <= -(-book.codes.size * bits // 8) + bits


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_few_values_are_kept_exactly(bits: int, seed: int, grouped: bool) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal(1 << bits).astype(np.float32)[random.integers(0, 1 << bits, (6, 50))]
    book = nearest(values, bits, 0, 2 if grouped else 0, scaled=True)
    np.testing.assert_array_equal(book.values(), values)
    assert len(book.tables) == (3 if grouped else 1)


@settings(max_examples=40)
@given(st.integers(2, 4), st.integers(0, 999))
def test_no_other_clusters_have_less_error(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values, weights = np.sort(random.standard_normal(9)), random.uniform(0.1, 3, 9)

    def error(ends: tuple[int, ...]) -> float:
        parts = zip((0, *ends), (*ends, 9), strict=True)
        spread = [(values[a:b], weights[a:b]) for a, b in parts]
        return sum(float((w * (v - np.average(v, weights=w)) ** 2).sum()) for v, w in spread)

    best = min(error(ends) for ends in combinations(range(1, 9), count - 1))
    found = clustered(values, count, weights)
    reached = float((weights * ((values[:, None] - found) ** 2).min(axis=1)).sum())
    assert reached == pytest.approx(best, rel=1e-9)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(0, 999), st.booleans())
def test_tables_are_full_and_ascending_whatever_the_values(bits: int, seed: int, weighted: bool) -> None:
    random = np.random.default_rng(seed)
    values = np.concatenate((random.standard_cauchy(random.integers(1, 700)), [-90.0, 60.0])).astype(
        np.float32
    )
    weights = random.standard_cauchy(values.size) ** 2 * (random.random(values.size) > 0.5)
    book = nearest(values.reshape(1, -1), bits, weights=weights.reshape(1, -1) if weighted else None)
    assert book.tables.shape == (1, 1 << bits)
    assert (np.diff(book.tables) >= 0).all()
    assert book.bits == bits


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(0, 3))
def test_regression_finds_the_best_tables(seed: int, group: int) -> None:
    random = np.random.default_rng(seed)
    target = random.standard_normal((10, 1, 6)).astype(np.float32)
    mixed = random.standard_normal((10, 10))
    curvature = (mixed @ mixed.T + np.eye(10)).astype(np.float32)[None]
    which = (np.arange(6) // group if group else np.zeros(6, int))[None]
    codes = random.integers(0, 4, target.shape).astype(np.float32)
    tables = np.sort(random.standard_normal((which.max() + 1, 4)).astype(np.float32))
    scales = random.uniform(0.5, 2, (1, 6)).astype(np.float32)
    work = TableDescent(target, codes, tables, which, scales)
    work.regress(Pulls.of(curvature))
    found = (work.tables[which, work.codes.astype(int)] * scales)[:, 0]
    root = np.linalg.cholesky(curvature[0].astype(np.float64)).T
    onehot = np.zeros((10, 6, tables.size))
    place = codes[:, 0].astype(int) + 4 * which
    np.put_along_axis(onehot, place[..., None], scales[0][None, :, None], axis=2)
    design = np.einsum("ij,jok->iok", root, onehot).reshape(60, -1)
    best = np.linalg.lstsq(design, (root @ target[:, 0]).ravel(), rcond=None)[0]
    wanted = onehot @ best
    lost = [float(np.square(root @ (each - target[:, 0])).sum()) for each in (found, wanted)]
    assert lost[0] <= lost[1] * 1.001
    assert (np.diff(work.tables) >= 0).all()


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("Conv(x, w)", (12, 8, 3, 3)),
        ("Conv<group = 2>(x, w)", (12, 4, 3, 3)),
        ("ConvTranspose<group = 2>(x, w)", (8, 6, 3, 3)),
        ("MatMul(x, w)", (6, 120)),
        ("MatMul(w, x)", (120, 6)),
    ],
)
@pytest.mark.parametrize(("group", "scaled"), [(0, False), (5, False), (0, True), (5, True)])
def test_every_layout_is_fitted_and_looked_up(
    text: str, shape: tuple[int, ...], group: int, scaled: bool
) -> None:
    model = parse(f"g (float[N,8,6,6] x) => (float[N,M,O,P] y) {{ y = {text} }}", {"w": normal(*shape)})
    feeds = [{"x": np.abs(normal(16, 8, 6, 6, seed=3)) + normal(16, 8, 6, 6, seed=4)}]
    alone = clustered_by(model, None, bits=3, group=group, scaled=scaled).model
    fitted = clustered_by(model, feeds, bits=3, group=group, scaled=scaled).model
    assert ops(fitted)["Gather"] == 1
    assert kept(model, alone, feeds) > 11
    gain = kept(model, fitted, feeds) - kept(model, alone, feeds)
    assert gain > -1e-6


def test_a_factor_of_the_product_is_taken_into_account() -> None:
    text = "g (float[N,16] x) => (float[N,40] y) { y = Gemm<alpha = 0.5, transB = 1>(x, w, b) }"
    model = parse(text, {"w": normal(40, 16), "b": normal(40, seed=1)})
    assert (
        kept(model, clustered_by(model, [{"x": normal(64, 16)}], bits=6).model, [{"x": normal(9, 16)}]) > 30
    )


def test_fitted_codes_lose_less_than_the_nearest(net: Model, feeds: list[dict[str, Array]]) -> None:
    node = net.graph.nodes[0]
    layer = layer_of(node)
    assert isinstance(layer, Layer)
    moments = Moments()
    columns = layer.columns(feeds[0]["x"], np.arange(64 * 16))
    moments.update(columns, np.zeros((1, 0, columns.shape[2]), np.float32))
    gram, wanted = moments.result(), layer.matrix()
    book, restored = Clustering(2).fitted(layer, wanted, gram, corrected=True)
    np.testing.assert_allclose(layer.matrix_of(book.values()), restored, rtol=1e-6)
    plain = layer.matrix_of(nearest(layer.weight, 2).values())
    lost = [np.einsum("gmk,gkl,gml->", each - wanted, gram.gram, each - wanted) for each in (restored, plain)]
    assert lost[0] < 0.8 * lost[1]


# ---------------------------------------------------------------------------------------- whole models


def test_data_keeps_far_more(net: Model, feeds: list[dict[str, Array]]) -> None:
    alone, fitted = (clustered_by(net, each, bits=2).model for each in (None, feeds))
    assert kept(net, fitted, feeds) > kept(net, alone, feeds) + 4
    assert fitted.stats().bytes < 0.2 * net.stats().bytes
    assert fitted.opsets == net.opsets


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_onnx_runtime_folds_all_of_it(net: Model, bits: int) -> None:
    made = clustered_by(net, None, bits=bits, group=16).model
    assert len(made.graph.nodes) > len(net.graph.nodes)
    left = [[node.op_type for node in optimized_model(each).graph.node] for each in (net, made)]
    assert left[0] == left[1]


def test_slim_and_a_second_run_leave_codes_as_they_are(net: Model) -> None:
    once = clustered_by(net, None).model
    twice = Pipeline(Slim(), Cluster(), on_error="raise")(once)
    assert twice.model.stats().bytes <= once.stats().bytes
    assert ops(twice.model)["Gather"] == 3
    assert "computed from constants" in "".join(skip.reason for skip in twice.report.steps[1].changes.skipped)


def test_weights_of_any_operator_are_codes() -> None:
    text = """g (int64[N] i, float[3,N,8] x) => (float[N,64] y, float[3,1,N,16] z)
    { y = Gather(t, i) z, h, c = LSTM<hidden_size = 16>(x, w, r) }"""
    model = parse(text, normals(t=(50, 64), w=(1, 64, 8), r=(1, 64, 16)))
    made = clustered_by(model, None, bits=6).model
    feeds = [{"i": np.arange(4), "x": normal(3, 4, 8)}]
    assert {constant.name for constant in made.constants()} >= {"t_codes", "w_codes", "r_codes"}
    assert kept(model, made, feeds) > 25


def test_what_stays_is_named(net: Model) -> None:
    words = reasons(clustered_by(net, None, exclude=("second", "firts")))
    assert "second: excluded by 'second'" in words
    assert "did you mean 'first'" in words
    text = """g (float[N,40] x) => (float[N,40] y, float[40,40] o)
    { a = MatMul(x, o) b = MatMul(x, m) y = Add(a, b) }"""
    mask = np.triu(np.full((40, 40), np.float32(-3e38)), 1) + normal(40, 40)
    model = parse(text, {"o": normal(40, 40), "m": mask})
    words = reasons(clustered_by(model, None))
    assert "'o' is an output" in words
    assert "'m' holds values that are no numbers to compute with" in words
    old = parse("g (float[N,40] x) => (float[N,40] y) { y = MatMul(x, w) }", {"w": normal(40, 40)}, opset=9)
    assert "its opset is 9" in reasons(clustered_by(old, None))


def test_weights_in_bodies_stay() -> None:
    text = """g (bool t, float[4,40] x) => (float[4,40] y)
    { y = If (t) <then_branch = a () => (float[4,40] p) { p = MatMul(x, w) },
                  else_branch = b () => (float[4,40] q) { q = Neg(x) }> }"""
    result = clustered_by(parse(text, {"w": normal(40, 40)}), None)
    assert "'w' is read in the body" in reasons(result)
    assert not result.report.steps[0].changes


def test_small_and_shared_weights() -> None:
    text = "g (float[N,40] x) => (float[N,40] y) { a = MatMul(x, w) b = MatMul(a, w) y = Mul(b, s) }"
    model = parse(text, {"w": normal(40, 40) / 8, "s": normal(1, 40)})
    feeds = [{"x": normal(32, 40)}]
    made = clustered_by(model, feeds, bits=6)
    assert ops(made.model)["Gather"] == 1  # one for both, none for the vector
    assert kept(model, made.model, feeds) > 20
    tight = parse("g (float[N,14] x) => (float[N,14] y) { y = MatMul(x, w) }", {"w": normal(14, 14)})
    assert "as codes" in reasons(clustered_by(tight, None, bits=8))


def test_half_precision_keeps_its_type(feeds: list[dict[str, Array]]) -> None:
    text = "g (float16[N,40] x) => (float16[N,40] y) { y = MatMul(x, w) }"
    model = parse(text, {"w": normal(40, 40).astype(np.float16)})
    made = clustered_by(model, [{"x": normal(32, 40).astype(np.float16)}], bits=4).model
    table = next(each for each in made.constants() if each.name == "w_table")
    assert table.dtype == np.float16


# ------------------------------------------------------------------------------------- choice of bits


def test_size_is_met_by_the_bits_that_matter() -> None:
    text = """g (float[N,40] x, float[N,40] z) => (float[N,40] y)
    { a = MatMul(x, w) b = MatMul(z, v) c = Mul(b, k) y = Add(a, c) }"""
    net = parse(text, {**normals(w=(40, 40), v=(40, 40)), "k": np.array([0.01], np.float32)})
    feeds = [{"x": normal(64, 40, seed=9), "z": normal(64, 40, seed=8)}]
    uniform = clustered_by(net, feeds, bits=4).model
    share = uniform.stats().bytes / net.stats().bytes
    result = clustered_by(net, feeds, size=share + 0.01)
    assert result.model.stats().bytes <= (share + 0.01) * net.stats().bytes
    plan = ClusterFigures.of(result.report.steps[0].changes).plan
    assert plan is not None
    bits = {each.weight: each.bits for each in plan.weights}
    assert bits["w"] > 4 > bits["v"]
    assert kept(net, result.model, feeds) > kept(net, uniform, feeds) + 4


# Around a fifth the few weights of this network go over from even steps to packed codes, all but at once.
@pytest.mark.parametrize(("share", "least"), [(0.25, 0.24), (0.2, 0.17), (0.15, 0.138)])
def test_the_download_is_met(net: Model, feeds: list[dict[str, Array]], share: float, least: float) -> None:
    result = clustered_by(net, feeds, download=share)
    assert result.report.download is not None
    before, after = result.report.download
    assert least * before.deflate < after.deflate <= share * before.deflate


def test_a_download_out_of_reach_is_said(net: Model) -> None:
    assert "once it is deflated" in reasons(clustered_by(net, None, download=0.01))


@pytest.mark.parametrize("data", [True, False])
def test_a_plan_of_prices_makes_the_same_bytes(net: Model, feeds: list[dict[str, Array]], data: bool) -> None:
    given = feeds if data else None
    result = clustered_by(net, given, download=0.25)
    plan = ClusterFigures.of(result.report.steps[0].changes).plan
    assert plan is not None
    assert all(each.price > 0 for each in plan.weights)
    again = clustered_by(net, given, plan=ClusteringPlan.from_json(plan.to_json())).model
    assert again.to_proto() == result.model.to_proto()


def test_small_downloads_have_tables_and_larger_ones_none(net: Model, feeds: list[dict[str, Array]]) -> None:
    """Few bits without gaps take less than bytes of even steps, which deflate makes smaller."""
    few, many = (clustered_by(net, feeds, download=each).model for each in (0.15, 0.28))
    assert ops(few)["Gather"] > 0
    assert "Gather" not in ops(many)


@given(st.integers(0, 99), st.sampled_from((3e-7, 1e-6, 3e-6)))
@settings(max_examples=8)
def test_a_price_buys_bits_for_error(seed: int, price: float) -> None:
    """What is lost and what is sent, at the price, is no more than with codes of any width that have none."""
    sizes = np.geomspace(0.1, 1, 96, dtype=np.float32)[:, None]
    weight = normal(96, 200, seed=seed) * sizes

    def total(book: Codebook) -> float:
        lost = np.square(book.values() - weight).sum() / np.square(weight).sum()
        _, counts = np.unique(book.codes, return_counts=True)
        return float(lost - price * (counts * np.log2(counts / weight.size)).sum())

    found = Clustering(8, price=price).of(weight, 0)
    assert total(found) <= min(total(Clustering(bits).of(weight, 0)) for bits in range(2, 9))
    assert found.codes.max() < 1 << found.bits
    assert (np.diff(found.tables, axis=1) >= 0).all()


@pytest.mark.parametrize("price", [1e-5, 1e-1])
def test_zeros_of_a_sparse_weight_stay_at_any_price(price: float) -> None:
    weight = normal(24, 40) * (normal(24, 40, seed=1) > 0)
    assert (Clustering(8, price=price).of(weight, 0).values()[weight == 0] == 0).all()


def test_even_tables_have_an_entry_for_zero_and_no_more_than_bytes_hold() -> None:
    weight = normal(6, 50) * np.geomspace(1e-3, 1e3, 6, dtype=np.float32)[:, None]
    for steps in (np.array([1e-9]), np.full(6, 1e-9), np.array([1e9])):
        book = even(weight, steps)
        assert (book.tables == 0).sum() == 1
        assert book.tables.shape[1] <= 255
        widest = np.abs(weight).max(axis=1, keepdims=True) if len(steps) > 1 else np.abs(weight).max()
        assert (np.abs(book.values() - weight) <= np.maximum(widest / 127, steps.max()) * 0.5001).all()
        model = parse("g () => (float[6,50] y) { y = Identity(w) }", {"w": weight})
        writer = CodeWriter(model)
        writer.write(next(each for each in model.constants() if each.name == "w"), book)
        writer.finish()
        np.testing.assert_array_equal(run(model, {})["y"], book.values())
        assert ops(model) == {"Cast": 1, "Mul": 1, "Identity": 1}  # no table is stored


def test_effort_says_how_often_codes_are_fitted(net: Model, feeds: list[dict[str, Array]]) -> None:
    quick, normally = (clustered_by(net, feeds, bits=3, effort=each).model for each in ("quick", "normal"))
    assert kept(net, normally, feeds) > kept(net, quick, feeds)


def test_a_size_out_of_reach_is_told(net: Model) -> None:
    assert "with one bit for every weight there is" in reasons(clustered_by(net, None, size=0.01))


def test_bits_rise_until_enough_is_kept(net: Model, feeds: list[dict[str, Array]]) -> None:
    low, high = (clustered_by(net, feeds, require_sqnr=dB) for dB in (12, 35))
    assert low.model.stats().bytes < high.model.stats().bytes < 0.4 * net.stats().bytes
    assert kept(net, high.model, feeds) > 33
    nothing = clustered_by(net, feeds, require_sqnr=300)
    assert not nothing.report.steps[0].changes
    assert "even with codes of 8 bits" in reasons(nothing)


def test_a_plan_makes_the_same_bytes(net: Model, feeds: list[dict[str, Array]], tmp_path: Path) -> None:
    first = clustered_by(net, feeds, size=0.16)
    plan = ClusterFigures.of(first.report.steps[0].changes).plan
    assert plan is not None
    (tmp_path / "plan.json").write_text(plan.to_json())
    again = clustered_by(net, feeds, plan=tmp_path / "plan.json")
    assert again.model.to_proto() == first.model.to_proto()
    assert ClusteringPlan.from_json(plan.to_json()) == plan
    with pytest.raises(UsageError, match="there is no constant 'w'"):
        clustered_by(parse("g (float[2] x) => (float[2] y) { y = MatMul(x, q) }", {"q": normal(2, 400)}),
                     None, plan=plan)  # fmt: skip


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="one of bits, size and download, not bits and size"):
        Cluster(bits=4, size=0.1)
    with pytest.raises(UsageError, match="'bits'"):
        Cluster(bits=9)


def test_moves_compete_for_bytes(net: Model) -> None:
    moves = Cluster().propose(net, Context())
    load = Load.of(net)
    taken = chosen(moves, load, "bytes", 0.2 * load.total("bytes"))
    plan = taken[0].plan
    for move in taken[1:]:
        plan = plan.joined(move.plan)
    made = clustered_by(net, None, plan=plan).model
    assert made.stats().bytes < 0.25 * net.stats().bytes


def test_the_command_line_has_it(net: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made = tmp_path / "in.onnx", tmp_path / "out.onnx"
    net.save(source)
    assert cli.main(["cluster", str(source), str(made), "--bits", "3", "--group", "16"]) == 0
    assert made.stat().st_size < 0.3 * source.stat().st_size
    assert "bits of a code, on average: 3" in capsys.readouterr().out
    assert passes.parse("cluster:bits=3,group=16") == Cluster(bits=3, group=16)
