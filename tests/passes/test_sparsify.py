"""Sparsify: zeros in patterns, chosen and made up for, and kept by whatever comes after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim import cli, passes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import Gram, Moments
from onnxslim.calibration.noise import sqnr
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context, Effort
from onnxslim.engine.moves import Load, chosen
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Floats, Layer
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.codes.storing import CodeWriter
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.quantize.blocks import Blocking
from onnxslim.passes.quantize.rounding import gptq, refine, round_blocks
from onnxslim.passes.repair import repair
from onnxslim.passes.repair.support import support, within
from onnxslim.passes.slim import Slim
from onnxslim.passes.sparsify import Sparsify, SparsifyFigures, SparsityPlan
from onnxslim.passes.sparsify.fit import Criterion, Thinning
from onnxslim.passes.sparsify.patterns import Pattern
from onnxslim.passes.sparsify.plan import WeightZeros
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


def made(model: Model, feeds: list[dict[str, Array]] | None, **given: object) -> Result:
    data = None if feeds is None else CalibrationData(feeds)
    return Pipeline(Sparsify(**given), on_error="raise")(model, data=data)  # type: ignore[arg-type]


def kept(before: Model, after: Model, feeds: list[dict[str, Array]]) -> float:
    return sqnr(*(Session(each).run(feeds[0]) for each in (before, after)))


def stored(model: Model, name: str) -> Array:
    """A weight as layers read it, whether or not its zeros are stored."""
    plain = model.copy()
    store_weights(plain)
    found: Array = next(each for each in plain.constants() if each.name == name).values
    return found


def reasons(result: Result) -> str:
    return "; ".join(f"{skip.node}: {skip.reason}" for skip in result.report.steps[0].changes.skipped)


def zeros(model: Model, name: str) -> float:
    return float((stored(model, name) == 0).mean())


def all_zeros(model: Model) -> float:
    """Share of the weights of all layers."""
    return float(np.concatenate([stored(model, name).ravel() == 0 for name in "wvm"]).mean())


def two_of_four(rows: Array) -> bool:
    """Whether there are at most two numbers in every four along the last axis."""
    return bool((np.count_nonzero(rows.reshape(-1, 4), axis=1) <= 2).all())


# ------------------------------------------------------------------------------------------- patterns


@settings(max_examples=60)
@given(st.data())
def test_patterns_hold_and_keep_the_largest(data: st.DataObject) -> None:
    places = data.draw(st.sampled_from((1, 3, 9)))
    groups, outputs, inputs = data.draw(st.integers(1, 3)), 4 * data.draw(st.integers(1, 3)), 8
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).random((groups, outputs, inputs * places))
    by_place = scores.reshape(groups, outputs, inputs, places)

    mask = Pattern(kept=1, of=4).mask(scores, 0.0, places).reshape(by_place.shape)
    fours = mask.reshape(groups, outputs, 2, 4, places)
    assert (fours.sum(axis=3) == 1).all()
    assert (by_place.reshape(fours.shape).max(axis=3)[fours.any(axis=3)] == by_place[mask].max()).any()
    best = np.where(mask, by_place, 0).reshape(fours.shape).max(axis=3)
    np.testing.assert_array_equal(best, by_place.reshape(fours.shape).max(axis=3))

    share = data.draw(st.floats(0.15, 0.95))
    mask = Pattern(4, 2).mask(scores, share, places).reshape(by_place.shape)
    blocks = mask.reshape(groups, outputs // 4, 4, inputs // 2, 2, places).swapaxes(2, 3)
    whole = blocks.reshape(*blocks.shape[:3], -1, places)
    assert (whole.all(axis=3) == whole.any(axis=3)).all()
    assert whole.any(axis=3).sum() == max(round((1 - share) * mask.size / 8), 1)

    assert support(Pattern().mask(scores, 0.1, places)) is not None  # a tenth is enough to be sparse
    mask = Pattern().mask(scores, share, places)
    assert scores[mask].min() > scores[~mask].max(initial=0.0)


@settings(max_examples=30)
@given(st.integers(0, 999))
def test_what_is_left_is_the_best_there_is(seed: int) -> None:
    random = np.random.default_rng(seed)
    wanted, mask = random.standard_normal((2, 3, 10)), random.random((2, 3, 10)) < 0.5
    mixed = random.standard_normal((2, 10, 10))
    curvature = mixed @ mixed.swapaxes(1, 2) + 0.1 * np.eye(10)
    found = within(wanted, mask, curvature, 200)
    assert not found[~mask].any()
    for group in range(2):
        root = np.linalg.cholesky(curvature[group]).T
        for row in range(3):
            here = mask[group, row]
            best = np.linalg.lstsq(root[:, here], root @ wanted[group, row], rcond=None)[0]
            np.testing.assert_allclose(found[group, row, here], best, rtol=1e-4, atol=1e-5)


def moments_of(layer: Layer, x: Array) -> Gram:
    moments = Moments()
    columns = layer.columns(x, np.arange(layer.count(x)))
    moments.update(columns, np.zeros((len(columns), 0, columns.shape[2]), np.float32))
    return moments.result()


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(kept=2, of=4), Pattern(4, 1)])
def test_each_criterion_loses_less_than_the_one_before(
    net: Model, feeds: list[dict[str, Array]], pattern: Pattern
) -> None:
    layer = layer_of(net.graph.nodes[0])
    assert isinstance(layer, Layer)
    gram, wanted = moments_of(layer, feeds[0]["x"]), layer.matrix()

    def lost(found: Floats) -> float:
        return float(np.einsum("gmk,gkl,gml->", found - wanted, gram.gram, found - wanted))

    def fitted(criterion: Criterion, effort: str = "normal") -> float:
        how = Thinning(0.5, pattern, criterion, effort)  # type: ignore[arg-type]
        return lost(how.fitted(layer, wanted, gram, corrected=True))

    alone = lost(Thinning(0.5, pattern).of(layer))
    assert fitted("magnitude") < 0.8 * alone
    assert fitted("surgeon", "quick") < fitted("magnitude")
    assert fitted("surgeon") < 0.95 * fitted("surgeon", "quick")
    assert fitted("surgeon", "thorough") < 1.02 * fitted("surgeon")


# ---------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"sparsity": 0.5, "block": "4x1"}]
)
def test_data_keeps_far_more(net: Model, feeds: list[dict[str, Array]], options: dict[str, object]) -> None:
    alone, fitted = (made(net, each, **options).model for each in (None, feeds))
    assert kept(net, fitted, feeds) > kept(net, alone, feeds) + 3
    assert min(map(all_zeros, (alone, fitted))) > 0.49


def test_zeros_lie_along_what_is_summed_over(net: Model, feeds: list[dict[str, Array]]) -> None:
    for data in (None, feeds):
        found = made(net, data, pattern="2:4").model
        assert two_of_four(np.moveaxis(stored(found, "w"), 1, -1))
        assert two_of_four(stored(found, "m").T)
        assert zeros(found, "w") == zeros(found, "m") == 0.5


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("Conv(x, w)", (12, 8, 3, 3)),
        ("Conv<group = 2>(x, w)", (12, 4, 3, 3)),
        ("ConvTranspose<group = 2>(x, w)", (8, 6, 3, 3)),
        ("MatMul(x, w)", (6, 120)),
        ("Conv<group = 8>(x, w)", (16, 1, 3, 3)),
    ],
)
def test_every_layout_is_thinned_and_fitted(text: str, shape: tuple[int, ...]) -> None:
    model = parse(f"g (float[N,8,6,6] x) => (float[N,M,O,P] y) {{ y = {text} }}", {"w": normal(*shape)})
    feeds = [{"x": np.abs(normal(16, 8, 6, 6, seed=3)) + normal(16, 8, 6, 6, seed=4)}]
    alone, fitted = (made(model, each, sparsity=0.4, shares="same").model for each in (None, feeds))
    for each in (alone, fitted):
        assert zeros(each, "w") == pytest.approx(0.4, abs=0.01)
    assert kept(model, fitted, feeds) > kept(model, alone, feeds) - 1e-6


def test_a_factor_and_a_normalization_leave_exact_zeros() -> None:
    text = """g (float[N,16] x) => (float[N,40] y)
    { z = Gemm<alpha = 0.3, transB = 1>(x, w, b) y = BatchNormalization(z, s, t, m, v) }"""
    constants = normals(w=(40, 16), b=(40,), t=(40,), m=(40,))
    model = parse(text, {**constants, "s": normal(40) + 2.3, "v": normal(40) ** 2 + 0.7})
    found = made(model, [{"x": normal(64, 16)}], sparsity=0.5, shares="same").model
    assert zeros(found, "w") == 0.5
    assert kept(model, found, [{"x": normal(9, 16)}]) > 5


def test_half_precision_keeps_its_type() -> None:
    text = "g (float16[N,40] x) => (float16[N,40] y) { y = MatMul(x, w) }"
    model = parse(text, {"w": normal(40, 40).astype(np.float16)})
    found = made(model, [{"x": normal(32, 40).astype(np.float16)}], sparsity=0.5).model
    assert stored(found, "w").dtype == np.float16
    assert zeros(found, "w") == pytest.approx(0.5, abs=0.01)


def test_zeros_go_where_they_cost_least() -> None:
    text = """g (float[N,40] x, float[N,40] z) => (float[N,40] y)
    { a = MatMul(x, w) b = MatMul(z, v) c = Mul(b, k) y = Add(a, c) }"""
    net = parse(text, {**normals(w=(40, 40), v=(40, 40)), "k": np.array([0.01], np.float32)})
    feeds = [{"x": normal(64, 40, seed=9), "z": normal(64, 40, seed=8)}]
    found = made(net, feeds, sparsity=0.5).model
    assert zeros(found, "w") < 0.2 < 0.8 < zeros(found, "v")
    assert (zeros(found, "w") + zeros(found, "v")) / 2 >= 0.5
    same = made(net, feeds, sparsity=0.5, shares="same").model
    assert kept(net, found, feeds) > kept(net, same, feeds) + 4


def test_what_a_bias_takes_in_costs_nothing() -> None:
    text = """g (float[N,16] x, float[N,16] z) => (float[N,8] y)
    { c = Gemm(x, w, b) d = MatMul(z, v) y = Add(c, d) }"""
    model = parse(text, normals(w=(16, 8), b=(8,), v=(16, 8)))
    data = [{"x": normal(64, 16, seed=1) + np.float32(9), "z": 2 * normal(64, 16, seed=2)}]
    found = made(model, data, sparsity=0.3).model
    assert zeros(found, "w") > zeros(found, "v")


def test_weights_without_the_pattern_make_up_for_those_that_have_it() -> None:
    model = parse(
        "g (float[N,40] x) => (float[N,40] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }",
        normals(w=(40, 42), v=(42, 40)),
    )
    data = [{"x": normal(256, 40) @ normal(40, 40, seed=5)}]
    found, without = (made(model, data, pattern="2:4", exclude=each).model for each in ((), ("v",)))
    assert zeros(found, "w") == 0.5
    assert zeros(found, "v") == 0.0
    np.testing.assert_array_equal(stored(without, "v"), stored(model, "v"))
    fresh = [{"x": normal(99, 40, seed=3) @ normal(40, 40, seed=5)}]
    assert kept(model, found, fresh) > kept(model, without, fresh) + 0.2
    plan = SparsifyFigures.of(made(model, data, pattern="2:4").report.steps[0].changes).plan
    np.testing.assert_array_equal(stored(made(model, data, plan=plan).model, "v"), stored(found, "v"))


def test_a_second_run_only_adds_zeros(net: Model, feeds: list[dict[str, Array]]) -> None:
    once = made(net, feeds, sparsity=0.5, shares="same").model
    twice = made(once, feeds, sparsity=0.7, shares="same").model
    for name in "wvm":
        before, after = (stored(each, name) == 0 for each in (once, twice))
        assert after[before].all()
        assert after.mean() == pytest.approx(0.7, abs=0.01)


def test_enough_zeros_are_told(net: Model, feeds: list[dict[str, Array]]) -> None:
    once = made(net, feeds, sparsity=0.7).model
    assert "% of its weights are zero already, which is enough" in reasons(made(once, feeds, sparsity=0.5))
    assert "the plan leaves all of it as it is" in reasons(made(net, None, plan=SparsityPlan(())))


def test_zeros_that_are_there_count(net: Model, feeds: list[dict[str, Array]]) -> None:
    once = made(net, feeds, sparsity=0.7).model
    assert 0.7 <= all_zeros(made(once, feeds, sparsity=0.75).model) < 0.78


@settings(max_examples=20)
@given(st.integers(0, 999), st.sampled_from(("quick", "normal")), st.floats(0.5, 0.95))
def test_zeros_are_neither_counted_twice_nor_taken_back(seed: int, effort: Effort, share: float) -> None:
    random = np.random.default_rng(seed)
    layer = layer_of(parse("g (float[N,12] x) => (float[N,8] y) { y = MatMul(x, w) }",
                           normals(w=(12, 8))).graph.nodes[0])  # fmt: skip
    assert isinstance(layer, Layer)
    mixed = random.standard_normal((12, 12))
    curvature = (mixed @ mixed.T + 0.01 * np.eye(12))[None].astype(np.float32)
    wanted = random.standard_normal((1, 8, 12)) * (random.random((1, 8, 12)) > 0.7)
    mask = Thinning(share, Pattern(), "surgeon", effort).mask(layer, wanted.astype(np.float32), curvature)
    assert not mask[wanted == 0].any()
    assert mask.sum() == min(round((1 - share) * 96), np.count_nonzero(wanted))


def test_fits_leave_zeros_as_they_are(net: Model, feeds: list[dict[str, Array]]) -> None:
    student = made(net, None, sparsity=0.5, storage="dense").model
    before = [stored(student, name) == 0 for name in "vm"]
    worse = kept(net, student, feeds)
    repair(student, net, Samples(CalibrationData(feeds), net))
    assert kept(net, student, feeds) > worse + 3
    for was, name in zip(before, "vm", strict=True):
        np.testing.assert_array_equal(stored(student, name) == 0, was)
    assert support(np.ones((1, 2, 8))) is None


def test_what_stays_is_named(net: Model) -> None:
    words = reasons(made(net, None, exclude=("second", "firts")))
    assert "second: excluded by 'second'" in words
    assert "did you mean 'first'" in words
    text = (
        "g (float[N,40] x, int64[N] i) => (float[N,40] y) { a = Gather(t, i) b = MatMul(x, w) y = Add(a, b) }"
    )
    model = parse(text, normals(t=(50, 40), w=(40, 40)))
    result = made(model, None)
    assert "'t' is no weight of one layer that reads it as its second input" in reasons(result)
    assert zeros(result.model, "t") == 0
    double = parse("g (double[N,40] x) => (double[N,40] y) { y = MatMul(x, w) }", {"w": np.eye(40)})
    assert "its weight is of type float64, not float32 or float16" in reasons(made(double, None))
    odd = parse("g (float[N,42] x) => (float[N,40] y) { y = MatMul(x, w) }", normals(w=(42, 40)))
    assert "it sums over 42 channels, no multiple of 4" in reasons(made(odd, None, pattern="2:4"))
    assert "42, cannot be cut into blocks of 4x4" in reasons(made(odd, None, block="4x4"))
    none = made(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"), None)
    assert "it has no weights of layers that could be sparse" in reasons(none)


def test_fewer_zeros_where_more_is_required(net: Model, feeds: list[dict[str, Array]]) -> None:
    low, high = (made(net, feeds, sparsity=0.9, require_sqnr=dB, effort="quick") for dB in (5, 22))
    assert all_zeros(high.model) < all_zeros(low.model) - 0.05
    assert kept(net, high.model, feeds) > 20
    nothing = made(net, feeds, require_sqnr=300)
    assert not nothing.report.steps[0].changes
    assert "however few zeros" in reasons(nothing)
    some = made(net, feeds, pattern="2:4", require_sqnr=19.5)
    assert {zeros(some.model, name) for name in "wvm"} == {0.0, 0.5}


def test_a_plan_makes_the_same_bytes(net: Model, feeds: list[dict[str, Array]], tmp_path: Path) -> None:
    first = made(net, feeds, sparsity=0.6, block="4x1")
    plan = SparsifyFigures.of(first.report.steps[0].changes).plan
    assert plan is not None
    (tmp_path / "plan.json").write_text(plan.to_json())
    again = made(net, feeds, plan=tmp_path / "plan.json")
    assert again.model.to_proto() == first.model.to_proto()
    assert SparsityPlan.from_json(plan.to_json()) == plan
    with pytest.raises(UsageError, match="there is no constant 'w'"):
        made(
            parse("g (float[2] x) => (float[2] y) { y = MatMul(x, q) }", normals(q=(2, 400))), None, plan=plan
        )


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ({"outputs": 24}, "its outputs and inputs, 16x24, cannot be cut into blocks of 24x1"),
        ({"kept": 2, "of": 5}, "it sums over 24 channels, no multiple of 5"),
    ],
)
def test_a_plan_for_another_layout_is_refused(pattern: dict[str, int], why: str) -> None:
    text = "g (float[N,24] x) => (float[N,16] y) { y = Gemm<transB=1>(x, w) }"
    model = parse(text, normals(w=(16, 24)))
    plan = SparsityPlan((WeightZeros("w", (16, 24), 0.5, **pattern),))
    with pytest.raises(UsageError, match=f"does not fit the model: the weight of constant 'w': {why}"):
        made(model, None, plan=plan)


def test_patterns_that_are_none_are_no_plan() -> None:
    text = SparsityPlan((WeightZeros("w", (16, 24), 0.5, kept=2, of=4),)).to_json()
    with pytest.raises(UsageError, match="4 of 4 is no pattern"):
        SparsityPlan.from_json(text.replace('"kept": 2', '"kept": 4'))


def test_contradictions_are_refused(net: Model) -> None:
    with pytest.raises(UsageError, match="pattern or block, not both"):
        Sparsify(pattern="2:4", block="4x1")
    with pytest.raises(UsageError, match="such as 2:4, not '2-4'"):
        Sparsify(pattern="2-4")
    with pytest.raises(UsageError, match="such as 4x1, not '4'"):
        Sparsify(block="4")
    with pytest.raises(UsageError, match="at least a tenth of them is zero, not '4:4'"):
        Sparsify(pattern="4:4")
    with pytest.raises(UsageError, match="'sparsity'"):
        Sparsify(sparsity=0.05)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        made(net, None, criterion="wanda")


def test_moves_compete_for_bytes(net: Model) -> None:
    moves = Sparsify().propose(net, Context())
    load = Load.of(net)
    taken = chosen(moves, load, "bytes", 0.5 * load.total("bytes"))
    plan = taken[0].plan
    for move in taken[1:]:
        plan = plan.joined(move.plan)
    found = made(net, None, plan=plan).model
    assert all_zeros(found) > 0.45


def test_the_report_says_what_gets_faster(net: Model) -> None:
    plain, wide = (str(made(net, None, pattern=pattern).report) for pattern in (None, "2:4"))
    assert (
        "not on processors, whose kernels compute zeros as anything else; TensorRT takes 2:4 alone" in plain
    )
    assert "TensorRT runs wide layers (from about 256 channels) faster by 2:4" in wide
    assert "with deflate" in plain


def test_the_command_line_has_it(net: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    net.save(source)
    assert cli.main(["sparsify", str(source), str(target), "--pattern", "2:4"]) == 0
    assert "zeros of all weights looked at: 50.00 %" in capsys.readouterr().out
    assert passes.parse("sparsify:pattern=2:4,effort=quick") == Sparsify(pattern="2:4", effort="quick")
    assert run(net, {"x": normal(1, 8, 6, 6)})["y"].shape == (1, 40)


# -------------------------------------------------------------------------------------------- storage


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 99), st.booleans())
def test_values_are_put_back_where_they_were(shape: list[int], seed: int, half: bool) -> None:
    random = np.random.default_rng(seed)
    values = (random.standard_normal(shape) * (random.random(shape) < 0.3)).astype(
        np.float16 if half else "f"
    )
    kind, sizes = ("float16" if half else "float"), ",".join(map(str, shape))
    model = parse(f"g () => ({kind}[{sizes}] y) {{ y = Identity(w) }}", {"w": values}, opset=11)
    writer = CodeWriter(model)
    writer.write_sparse(next(iter(model.constants())))
    writer.finish()
    onnx.checker.check_model(model.to_proto(), full_check=True)
    np.testing.assert_array_equal(run(model, {})["y"], values)


def test_files_without_zeros_are_smaller_and_run_the_same(net: Model, feeds: list[dict[str, Array]]) -> None:
    packed, dense = (made(net, feeds, sparsity=0.7, storage=how).model for how in ("packed", "dense"))
    assert packed.stats().bytes < 0.45 * dense.stats().bytes
    np.testing.assert_array_equal(*(Session(each).run(feeds[0])["y"] for each in (packed, dense)))
    left = [[node.op_type for node in optimized_model(each).graph.node] for each in (packed, dense)]
    assert left[0] == left[1]
    assert ops(Pipeline(Slim(), on_error="raise")(packed).model)["CumSum"] == 3
    assert "CumSum" not in ops(made(net, feeds, pattern="2:4").model)
    little = made(net, None, sparsity=0.1, exclude=("first",)).model
    assert "CumSum" not in ops(little)  # a tenth less is not worth the nodes


def test_old_opsets_store_zeros(net: Model) -> None:
    text = "g (float[N,40] x) => (float[N,40] y) { y = MatMul(x, w) }"
    result = made(parse(text, normals(w=(40, 40)), opset=10), None)
    assert "zeros are stored, too: its opset is 10" in reasons(result)
    assert zeros(result.model, "w") == 0.5


@pytest.mark.parametrize(
    "words",
    [
        "quantize:require_sqnr=0",
        "quantize:activations=dynamic",
        "quantize:activations=none",
        "prune:ratio=0.25",
        "factorize:params=0.6",
        "cluster:bits=3",
        "sparsify:sparsity=0.8",
        "half:weights_only=true",
    ],
)
def test_passes_behind_it_see_plain_weights(net: Model, feeds: list[dict[str, Array]], words: str) -> None:
    data = CalibrationData(feeds)
    steps = [passes.parse(f"sparsify:sparsity=0.6,shares=same,storage={how}") for how in ("packed", "dense")]
    found = [Pipeline(step, passes.parse(words), on_error="raise")(net, data=data) for step in steps]
    assert all(each.report.steps[1].changes for each in found)
    outputs = [Session(each.model).run(feeds[0])["y"] for each in found]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------- what comes behind it


def sparse_matrix(seed: int) -> tuple[Floats, Array]:
    """A weight with half of its values zero, (1, outputs, inputs), and a covariance that pulls at them."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((32, 32))
    target = random.standard_normal((1, 6, 32)) * (random.random((1, 6, 32)) < 0.5)
    return target.astype(np.float32), (mixed @ mixed.T + 0.1 * np.eye(32))[None]


@settings(max_examples=20)
@given(st.integers(0, 999))
def test_integers_of_zeros_are_zero(seed: int) -> None:
    target, gram = sparse_matrix(seed)
    scales = np.abs(target).max(axis=2) / 7
    start = np.rint(target / scales[..., None])
    for codes in (
        refine(target, start, scales, gram, limit=7)[0],
        gptq(target, scales, gram, limit=7),
    ):
        assert not codes[target == 0].any()
    for zeros in (True, False):
        for by_gptq in (True, False):
            blocking = Blocking(4, 16, zeros)
            found = round_blocks(target[0].T, blocking, gram[0], by_gptq=by_gptq)
            assert not found.values()[target[0].T == 0].any()


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from((0, 2)), st.booleans())
def test_tables_of_sparse_weights_have_a_zero(seed: int, bits: int, group: int, scaled: bool) -> None:
    target, gram = sparse_matrix(seed)
    layer = layer_of(parse("g (float[N,32] x) => (float[N,6] y) { y = MatMul(x, w) }",
                           {"w": target[0].T}).graph.nodes[0])  # fmt: skip
    assert isinstance(layer, Layer)
    how, empty = Clustering(bits, group, scaled), np.zeros((1, 0))
    moments = Gram(gram, np.zeros((1, 0, 32)), empty, np.zeros((1, 32)), empty, 500)
    alone = how.of(target[0].T, 1).values()
    fitted = how.fitted(layer, target, moments, corrected=True)[0].values()
    for values in (alone, fitted):
        assert not values[target[0].T == 0].any()
        assert values.any()


def test_a_cut_leaves_zeros_where_they_were(net: Model, feeds: list[dict[str, Array]]) -> None:
    sparse = made(net, feeds, sparsity=0.5, shares="same").model
    data = CalibrationData(feeds)
    cut = Pipeline(passes.parse("prune:ratio=0.25"), on_error="raise")(sparse, data=data).model
    assert stored(cut, "v").size < stored(sparse, "v").size
    assert zeros(cut, "v") > 0.4


def test_factors_are_dense_and_that_is_told(net: Model, feeds: list[dict[str, Array]]) -> None:
    sparse = made(net, feeds, sparsity=0.5, shares="same").model
    step = passes.parse("factorize:params=0.6")
    result = Pipeline(step, on_error="raise")(sparse, data=CalibrationData(feeds))
    told = [change.action for change in result.report.steps[0].changes.changed if "factors" in change.reason]
    assert told
    assert all("; its zeros are lost" in each for each in told)
