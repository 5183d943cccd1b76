"""Factorize: rewrites that are exact at full rank, what is chosen, and what is left alone and why."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Changes, Context, Log
from onnxslim.engine.editor import Editor
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import UsageError
from onnxslim.formats import plain
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes import create
from onnxslim.passes.dead import Dead
from onnxslim.passes.factorize import Factorize, FactorizeFigures, candidates, chains, fit, ranks, schemes
from onnxslim.passes.factorize.layers import Factor, Whole
from onnxslim.passes.factorize.plan import FactorizationPlan, LayerFactors
from onnxslim.passes.factorize.schemes import (
    SCHEMES,
    Problem,
    SeparableDecomposition,
    balanced,
    directions,
    merged,
)
from onnxslim.passes.factorize.search import layers_of
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.runtime import timing
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import Bench, Latency
from onnxslim.shapes import cost
from tests.helpers import apply, feeds_for, filled, normal, ops, parse, reasons, run, same_outputs

SEVERAL = [name for name in SCHEMES if name != "svd"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSLIM_CACHE", str(tmp_path / "cache"))


def _layers(model: Model, exclude: tuple[str, ...] = ()) -> tuple[list[Whole], dict[str, str]]:
    log = Log()
    inputs = {name: array.shape for name, array in feeds_for(model).items()}
    found, _ = layers_of(model, inputs, exclude, log)
    return found, {skip.node: skip.reason for skip in log.done().skipped}


def _layer(model: Model) -> Whole:
    found, skipped = _layers(model)
    assert len(found) == 1, skipped
    return found[0]


def _at_full_rank(model: Model, scheme: str, gram: Array | None = None) -> Model:
    twin = model.copy()
    layer, edit = _layer(twin), Editor(twin)
    kind = SCHEMES[scheme]
    problem = Problem(layer.weight.astype(np.float64), gram)
    most = kind.largest(layer)
    weights = kind.decompose(layer, problem, most).weights(most)
    layer.install(edit, layer.node, kind.factors(layer, weights), None)
    edit.commit()
    return twin


def _assert_exact(model: Model, scheme: str) -> None:
    """Same outputs as the layer, and as many multiply-accumulates as the scheme says."""
    layer = _layer(model)
    found = _at_full_rank(model, scheme)
    before, after = run(model), run(found)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-4 * max(1.0, np.abs(value).max()))
    inputs = {name: array.shape for name, array in feeds_for(model).items()}
    most = SCHEMES[scheme].largest(layer)
    assert cost.macs(found, inputs) == SCHEMES[scheme].macs(layer, most)
    assert cost.macs(model, inputs) == layer.macs
    sizes = [sum(c.size for c in each.constants() if c.size > 1) for each in (model, found)]
    assert sizes[1] - sizes[0] == SCHEMES[scheme].parameters(layer, most) - layer.weight.size


# ----------------------------------------------------------------------------------------- exact rewrites


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool = False, least: int = 2) -> Model:
    """A model of one convolution of 1 to 3 axes, with `least` channels per group and any valid attributes."""
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2)))
    inputs, outputs = (groups * draw(st.integers(least, least + 1)) for _ in range(2))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    assume(math.prod(kernel) > 1)
    strides = [draw(st.integers(1, 2)) for _ in range(axes)]
    mode = draw(st.sampled_from(("pads", "pads", "VALID", "SAME_UPPER", "SAME_LOWER")))
    # ONNX Runtime has no kernel that dilates and finds the padding itself.
    dilations = [draw(st.integers(1, 1 if "SAME" in mode else 2)) for _ in range(axes)]
    attrs = {"strides": strides, "dilations": dilations, "group": groups}
    if mode == "pads":
        attrs["pads"] = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    if transposed and mode == "pads":
        attrs["output_padding"] = [draw(st.integers(0, stride - 1)) for stride in strides]
    shape = [2, inputs, *(draw(st.integers(6, 8)) for _ in range(axes))]
    words = [f"{name}={json.dumps(value)}" for name, value in attrs.items()]
    words += [] if mode == "pads" else [f'auto_pad="{mode}"']
    weight = [inputs, outputs // groups] if transposed else [outputs, inputs // groups]
    constants = {"w": normal(*weight, *kernel)}
    bias = draw(st.booleans())
    if bias:
        constants["b"] = normal(outputs, seed=1)
    op = "ConvTranspose" if transposed else "Conv"
    free = ",".join("ABCDE"[: axes + 2])
    text = (
        f"g (float{shape} x) => (float[{free}] y) "
        f"{{ [layer] y = {op}<{', '.join(words)}>(x, w{', b' if bias else ''}) }}"
    )
    return parse(text, constants)


@settings(max_examples=40)
@given(convolutions(), st.sampled_from(SEVERAL))
def test_convolution_is_exact_at_full_rank(model: Model, scheme: str) -> None:
    assume(SCHEMES[scheme].refuses(_layer(model)) is None)
    _assert_exact(model, scheme)


@settings(max_examples=40)
@given(convolutions(transposed=True), st.sampled_from(SEVERAL))
def test_transposed_convolution_is_exact_at_full_rank(model: Model, scheme: str) -> None:
    assume(SCHEMES[scheme].refuses(_layer(model)) is None)
    _assert_exact(model, scheme)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_a_kernel_of_one_position_is_a_matrix(op: str, stride: int) -> None:
    model = parse(
        f"g (float[N,6,5,7] x) => (float[N,C,H,W] y) {{ y = {op}<strides=[{stride},{stride}]>(x, w, b) }}",
        {"w": normal(6, 6, 1, 1), "b": normal(6)},
    )
    for scheme in SEVERAL:
        assert SCHEMES[scheme].refuses(_layer(model))
    _assert_exact(model, "svd")
    if op == "Conv":  # the stride comes first, where it saves the most
        assert _at_full_rank(model, "svd").graph.nodes[0].attrs["strides"] == (stride, stride)


@settings(max_examples=40)
@given(
    flips=st.tuples(st.booleans(), st.booleans()),
    alpha=st.sampled_from((None, 0.5)),
    beta=st.sampled_from((None, 2.0)),
    bias=st.sampled_from((None, (5,), (1, 5), (1,), (4, 5))),
    left=st.booleans(),
    opset=st.sampled_from((9, 13, 17)),
)
def test_gemm_is_exact_at_full_rank(
    flips: tuple[bool, bool],
    alpha: float | None,
    beta: float | None,
    bias: tuple[int, ...] | None,
    left: bool,
    opset: int,
) -> None:
    assume(bias is not None or opset >= 11)
    trans_a, trans_b = flips
    a, b = ((3, 4) if trans_a else (4, 3)), ((5, 3) if trans_b else (3, 5))
    attrs = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha, "beta": beta}
    words = ", ".join(f"{name}={value}" for name, value in attrs.items() if value)
    constants = {"w": normal(*(a if left else b))}
    if bias is not None:
        constants["c"] = normal(*bias, seed=1)
    sides = ("w, x" if left else "x, w") + ("" if bias is None else ", c")
    shape = list(b if left else a)
    text = f"g (float{shape} x) => (float[4,5] y) {{ y = Gemm<{words}>({sides}) }}".replace("<>", "")
    model = parse(text, constants, opset=opset)
    _assert_exact(model, "svd")


@pytest.mark.parametrize(
    ("data", "product", "weight"),
    [
        ("float[N,5,4] x", "x, w", (4, 6)),
        ("float[4] x", "x, w", (4, 6)),
        ("float[N,5,4] x", "w, x", (6, 5)),
        ("float[5] x", "w, x", (6, 5)),
        ("float16[N,5,4] x", "x, w", (4, 6)),
    ],
)
def test_matmul_is_exact_at_full_rank(data: str, product: str, weight: tuple[int, ...]) -> None:
    kind = data.split("[")[0]
    rank = {1: "A", 3: "A,B,C"}[data.count(",") + 1]
    constants = {"w": normal(*weight).astype(np.float16 if kind == "float16" else np.float32)}
    model = parse(f"g ({data}) => ({kind}[{rank}] y) {{ y = MatMul({product}) }}", constants)
    if kind == "float16":
        before, after = run(model)["y"], run(_at_full_rank(model, "svd"))["y"]
        np.testing.assert_allclose(after, before, atol=2e-2)
    else:
        _assert_exact(model, "svd")


# ------------------------------------------------------------------------------------------ linear algebra


def _gram(rows: Array) -> Array:
    found: Array = (rows.T @ rows).astype(np.float64)[None]
    return found


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 99), st.booleans())
def test_directions_lose_what_they_say_and_nothing_loses_less(
    rows: int, columns: int, seed: int, weighted: bool
) -> None:
    matrix = normal(rows, columns, seed=seed).astype(np.float64)
    data = normal(40, rows, seed=seed + 1).astype(np.float64)
    metric = data.T @ data if weighted else np.eye(rows)
    # What is best is known: the singular values of the product with the data.
    values = np.linalg.svd(data @ matrix if weighted else matrix, compute_uv=False)
    most = min(rows, columns)
    found = directions(matrix, most, metric if weighted else None)
    for rank in range(1, most + 1):
        rest = matrix - found.left[:, :rank] @ found.right[:rank]
        lost = float(np.trace(rest.T @ metric @ rest))
        total = float(np.square(values).sum())
        np.testing.assert_allclose(lost, np.square(values[rank:]).sum(), atol=1e-5 * total)
        np.testing.assert_allclose(total - found.power[:rank].sum(), lost, atol=1e-5 * total)


def test_random_projection_comes_close_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (np.linalg.qr(normal(200, 200, seed=seed))[0] for seed in (0, 1))
    matrix = (left * 0.9 ** np.arange(200)) @ right.T
    best = directions(matrix, 20)
    monkeypatch.setattr(schemes, "LARGE", 100)
    found = directions(matrix, 20)
    assert not np.array_equal(found.left, best.left)
    assert found.power.sum() > 0.999 * best.power.sum()


def _patches(layer: Whole, x: Array) -> Array:
    """im2col of a 3x3 convolution without padding: [positions, inputs·kernel]."""
    window = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return np.moveaxis(window, 1, 3).reshape(-1, layer.patch)


@pytest.mark.parametrize(
    ("scheme", "ranks"),
    [("output", (3,)), ("input", (2,)), ("spatial", (5,)), ("tucker", (3, 4)), ("separable", (2,))],
)
def test_last_factor_is_the_least_squares_solution(scheme: str, ranks: tuple[int, ...]) -> None:
    model = parse("g (float[N,4,8,8] x) => (float[N,C,H,W] y) { y = Conv(x, w) }", {"w": normal(6, 4, 3, 3)})
    layer, kind = _layer(model), SCHEMES[scheme]
    x = normal(8, 4, 8, 8) * np.array([3, 1, 0.3, 0.1], np.float32)[:, None, None]
    rows = _patches(layer, x)
    problem = Problem(layer.weight.astype(np.float64), _gram(rows))
    parts = kind.decompose(layer, problem, kind.largest(layer))
    weights = parts.weights(ranks)
    whole = merged(weights, layer.kernel)[0]
    wanted = rows @ layer.matrix()[0]
    lost = float(np.square(wanted - rows @ whole).sum() / np.square(wanted).sum())
    assert lost == pytest.approx(parts.lost(ranks), rel=1e-3)
    # No other last factor does better: what is left has nothing to do with what it reads.
    *first, last = weights
    for change in np.eye(last.size)[:: max(last.size // 25, 1)]:
        other = [*first, last + 0.05 * change.reshape(last.shape)]
        worse = float(
            np.square(wanted - rows @ merged(other, layer.kernel)[0]).sum() / np.square(wanted).sum()
        )
        assert worse >= lost - 1e-9
    plain = kind.decompose(layer, Problem(problem.weight), kind.largest(layer)).weights(ranks)
    assert lost < float(
        np.square(wanted - rows @ merged(plain, layer.kernel)[0]).sum() / np.square(wanted).sum()
    )


@settings(max_examples=20)
@given(st.integers(1, 5), st.sampled_from((1, 2)), st.integers(0, 99))
def test_filters_of_channels_get_better_by_what_mixes_them(rank: int, groups: int, seed: int) -> None:
    """Each half is least squares for the other one, so that no turn loses more than the one before."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((groups, 3, 7, 3, 2))
    rows = generator.standard_normal((groups, 60, 18)) @ generator.standard_normal((18, 18))
    problem = Problem(weight, rows.swapaxes(1, 2) @ rows)
    found = SeparableDecomposition.of(problem, rank)
    assert found.moments is not None
    filters = np.stack([part.left[:, :rank] for part in found.parts[:3]])
    kept, moments = [], found.moments[0]
    for _ in range(4):
        mix = moments.mix(filters)
        kept.append(moments.explained(filters, mix))
        filters = moments.filters(filters, mix)
    assert all(more >= less * (1 - 1e-4) for less, more in itertools.pairwise(kept))
    assert 0.0 <= found.lost((rank,)) < 1.0
    # Of the channel that came last, the error that is left has nothing to do with what the mix reads of it.
    made = np.concatenate([filters[at] @ mix[at * rank : (at + 1) * rank] for at in range(3)])
    left = moments.wanted - moments.gram @ made
    assert np.abs(left[-6:] @ mix[-rank:].T).max() < 1e-4 * np.abs(moments.wanted[-6:] @ mix[-rank:].T).max()
    if rank < 5:
        assert kept[-1] > kept[0], "turns change something"


def test_of_few_inputs_and_many_outputs_no_more_directions_are_wanted_than_there_are() -> None:
    text = "g (float[N,16,40] x) => (float[N,C,W] y) { y = Conv(x, w) }"
    model = parse(text, {"w": normal(512, 16, 7)})
    for first, second in candidates._ranks(_layer(model), SCHEMES["tucker"], 8):
        assert second <= first * 7
    result, changes = apply(Factorize(params=0.9, schemes=("tucker",)), model)
    assert changes
    assert ops(result) == {"Conv": 3}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("node", "weight", "scheme"),
    [
        *itertools.product(("Conv<pads=[1,0,1,2], strides=[2,1]>",), ((6, 4, 3, 3),), SEVERAL),
        *itertools.product(('Conv<group=2, auto_pad="SAME_UPPER">',), ((6, 2, 3, 3),), SEVERAL),
        *itertools.product(("ConvTranspose<strides=[2,1], pads=[1,0,0,1]>",), ((4, 6, 3, 3),), SEVERAL),
        ("Gemm<alpha=0.5, transB=1>", (6, 4), "svd"),
        ("MatMul", (4, 6), "svd"),
    ],
)
def test_factors_lose_on_the_data_what_they_are_said_to(
    node: str, weight: tuple[int, ...], scheme: str, bias: bool
) -> None:
    data = "float[N,4] x" if len(weight) == 2 else "float[N,4,9,8] x"
    result = "float[A,B] y" if len(weight) == 2 else "float[A,B,C,D] y"
    added = bias and node != "MatMul"
    op, _, attrs = node.partition("<")
    text = (
        f"g ({data}) => ({result}) {{ y = {op}{'<' + attrs if attrs else ''}(x, w{', b' if added else ''}) }}"
    )
    model = parse(text, {"w": normal(*weight), **({"b": normal(6)} if added else {})})
    layer, kind = _layer(model), SCHEMES[scheme]
    # Not centred, so that a bias has something to do.
    x = normal(16, *layer.shape[1:]) + 1.0
    (_, gram), *_ = fit.moments(model, CalibrationData([{"x": x}]), [layer], Target.cpu(1), None)
    ranks_ = tuple(max(most // 2, 1) for most in kind.largest(layer))
    lost = kind.decompose(layer, fit.problem_of(layer, gram), ranks_).lost(ranks_)
    found = fit.fit(layer, kind, ranks_, gram)
    edit = Editor(model)
    before = run(model, {"x": x})["y"]
    layer.install(edit, layer.node, kind.factors(layer, found.weights), found.bias)
    edit.commit()
    after = run(model, {"x": x})["y"]
    axis = tuple(a for a in range(before.ndim) if a != 1)
    centre = 0.0 if found.bias is None else before.mean(axis, keepdims=True)
    share = float(np.square(after - before).sum() / np.square(before - centre).sum())
    assert share == pytest.approx(lost, rel=0.05, abs=2e-3)


@pytest.mark.parametrize("limit", [1, fit.MAX_BYTES])
def test_goals_are_the_outputs_of_the_teacher_however_many_are_seen_together(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "g (float[N,4] x) => (float[N,5] y) { a = MatMul(x, v) r = Relu(a) y = MatMul(r, w) }"
    teacher = parse(text, {"v": normal(4, 6), "w": normal(6, 5, seed=1)})
    student = parse(text, {"v": normal(4, 6), "w": normal(6, 5, seed=2)})
    layers, _ = layers_of(student, {"x": (8, 4)}, (), Log())
    data = Samples(CalibrationData([{"x": normal(8, 4, seed=seed)} for seed in range(12)]), teacher)
    monkeypatch.setattr(fit, "MAX_BYTES", limit)
    goals = fit.FactorGoals(teacher, data, layers, Target.cpu(1))
    for layer in layers:
        seen, _ = fit.against(student, goals, layer)
        (_, own), *_ = fit.moments(teacher, data.fit, [layer], Target.cpu(1), None)
        for field in ("gram", "cross", "power", "x_mean", "y_mean"):
            np.testing.assert_allclose(getattr(seen, field), getattr(own, field), rtol=1e-4, atol=1e-6)


BEHIND = {
    "vector": ("y = Add(z, b)", "", True),
    "other order": ("y = Add(c, z)", "", True),
    "output": ("y = Add(z, b)", ", float[N,6] z", False),
    "two readers": ("r = Relu(z) a = Add(z, b) y = Add(a, r)", "", False),
    "one value": ("y = Add(z, o)", "", False),
}


@pytest.mark.parametrize("kind", BEHIND)
def test_a_bias_that_is_added_behind_a_product_is_fitted_with_it(kind: str) -> None:
    body, outputs, moves = BEHIND[kind]
    constants = {"w": normal(4, 6), "b": normal(6), "c": normal(1, 6), "o": normal(1)}
    text = f"g (float[N,4] x) => (float[N,6] y{outputs}) {{ z = MatMul(x, w) {body} }}"
    model = parse(text, constants)
    (layer,), _ = layers_of(model, {"x": (8, 4)}, (), Log())
    x = normal(64, 4) + 3.0
    (_, gram), *_ = fit.moments(model, CalibrationData([{"x": x}]), [layer], Target.cpu(1), None)
    found = fit.fit(layer, SCHEMES["svd"], (2,), gram)
    assert (found.bias is not None) == moves
    edit, before = Editor(model), run(model, {"x": x})
    layer.install(edit, layer.node, SCHEMES["svd"].factors(layer, found.weights), found.bias)
    edit.commit()
    lost = (run(model, {"x": x})["y"] - before["y"]).mean(axis=0)
    assert np.abs(lost).max() < 1e-4 if moves else np.abs(lost).max() > 0.01
    if moves:
        scattered = before["y"] - before["y"].mean(axis=0)
        left = np.square(run(model, {"x": x})["y"] - before["y"]).sum() / np.square(scattered).sum()
        lost_at = SCHEMES["svd"].decompose(layer, fit.problem_of(layer, gram), (2,)).lost((2,))
        assert left == pytest.approx(lost_at, rel=0.05, abs=2e-3)


@settings(max_examples=20)
@given(st.sampled_from(SEVERAL), st.integers(0, 99))
def test_balancing_leaves_the_product_alone(scheme: str, seed: int) -> None:
    model = parse(
        "g (float[N,4,8,8] x) => (float[N,C,H,W] y) { y = Conv(x, w) }", {"w": normal(6, 4, 3, 3, seed=seed)}
    )
    layer, kind = _layer(model), SCHEMES[scheme]
    most = kind.largest(layer)
    weights = kind.decompose(layer, Problem(layer.weight.astype(np.float64)), most).weights(most)
    even = balanced(weights)
    np.testing.assert_allclose(merged(even, (3, 3)), merged(weights, (3, 3)), atol=1e-9)
    before, after = even[-2:]
    into = np.square(before).sum(axis=(1, *range(3, before.ndim)))
    out = np.square(after).sum(axis=tuple(range(2, after.ndim)))
    np.testing.assert_allclose(into.ravel(), out.ravel(), rtol=1e-6)


# --------------------------------------------------------------------------------------------- the choice


def test_power_law_goes_through_its_points() -> None:
    factor, exponent = ranks.curve([(0.1, 0.02), (0.4, 0.08)])
    assert factor == pytest.approx(0.2)
    assert exponent == pytest.approx(1.0)
    assert ranks.curve([(0.1, 0.02), (0.11, 5.0)])[1] == 2.0
    assert ranks.curve([(0.0, 0.0)]) == (0.0, 1.0)
    assert ranks.curve([(0.1, 0.02), (0.4, math.inf), (0.4, 0.08)]) == (factor, exponent)


@given(st.integers(1, 200), st.integers(1, 16), st.sampled_from((1, 2, 4, 8)))
def test_ranks_are_aligned_and_smaller_than_full(most: int, align: int, groups: int) -> None:
    found = ranks.steps(most, align, groups, 8)
    assert len(found) <= 8
    assert all(0 < rank < most and rank * groups % align == 0 for rank in found)
    assert found == sorted(set(found))


# --------------------------------------------------------------------------------------- what is left alone

NET = """g (float[N,8,10,10] x) => (float[N,5] y)
{
    [one] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    ra = Relu(a)
    [two] c = Conv<pads=[1,1,1,1]>(ra, w2)
    rc = Relu(c)
    [three] d = Conv<pads=[1,1,1,1], strides=[2,2]>(rc, w3, b3)
    rd = Relu(d)
    m = GlobalAveragePool(rd)
    f = Flatten(m)
    [head] y = Gemm<transB=1>(f, w4, b4)
}"""


def _low(outputs: int, inputs: int, *kernel: int, rank: int, seed: int) -> Array:
    """A weight that is close to one of low rank, as trained ones are."""
    inner = inputs * math.prod(kernel)
    left, right = normal(outputs, rank, seed=seed), normal(rank, inner, seed=seed + 100)
    noise = 0.05 * normal(outputs, inner, seed=seed + 200)
    weight: Array = (left @ right / np.sqrt(rank) + noise) / np.sqrt(inner)
    return weight.reshape(outputs, inputs, *kernel).astype(np.float32)


@pytest.fixture
def net() -> Model:
    constants = {
        "w1": _low(32, 8, 3, 3, rank=6, seed=1),
        "b1": normal(32, seed=11),
        "w2": _low(32, 32, 3, 3, rank=8, seed=2),
        "w3": _low(48, 32, 3, 3, rank=12, seed=3),
        "b3": normal(48, seed=13),
        "w4": normal(5, 48, seed=4),
        "b4": normal(5, seed=14),
    }
    return parse(NET, constants)


def _data(count: int = 6, batch: int = 4) -> CalibrationData:
    return CalibrationData([{"x": normal(batch, 8, 10, 10, seed=seed)} for seed in range(count)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Time runs as fast as multiply-accumulates do, times `slow` for factors and plus `base` for a model."""
    speed = {"slow": 1.0, "base": 0.0}

    def seconds(model: Model, feeds: Mapping[str, Array]) -> float:
        macs = cost.macs(model, {name: array.shape for name, array in feeds.items()})
        assert macs is not None
        factored = any("factor" in node.name for node in model.nodes())
        return speed["base"] + macs * (speed["slow"] if factored else 1.0)

    def compare(
        models: list[Model], feeds: Mapping[str, Array], target: Target
    ) -> tuple[list[Latency], list[float]]:
        times = [seconds(model, feeds) for model in models]
        return [Latency(time, time) for time in times], [time / times[0] for time in times]

    def bench(self: Bench, what: str, first: Any, others: Any, feeds: Mapping[str, Array]) -> timing.Timing:
        whole = seconds(first(), feeds)
        return timing.Timing(whole, {name: seconds(make(), feeds) / whole for name, make in others.items()})

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(Bench, "__call__", bench)
    return speed


@pytest.mark.parametrize(
    ("unit", "dearer", "left"), [("time", 1.05, 2), ("time", 1.15, 1), ("macs", 1.05, 2), ("params", 1.05, 1)]
)
@pytest.mark.parametrize("lost", [0.1, 0.2])
def test_candidates_that_others_beat_clearly_are_not_timed(
    unit: candidates.Unit, dearer: float, left: int, lost: float
) -> None:
    """MACs only hint at time, so a few more of them say nothing; and what loses less always stays."""
    cheap = candidates.Factoring(SCHEMES["svd"], (4,), 0.5, 0.5, 0.1)
    dear = candidates.Factoring(SCHEMES["svd"], (8,), 0.5 * dearer, 0.5 * dearer, lost)
    better = candidates.Factoring(SCHEMES["svd"], (9,), 0.9, 0.9, 0.05)
    kept = candidates.undominated([cheap, dear, better], unit)
    assert len(kept) == 1 + left
    assert cheap in kept
    assert better in kept


@pytest.mark.parametrize(("time", "error", "kept"), [(0.5, 0.1, False), (0.3, 0.3, True), (0.6, 0.01, True)])
def test_separable_factors_stay_where_no_others_are_as_fast_for_as_little(
    time: float, error: float, kept: bool
) -> None:
    model = parse("g (float[N,4,8,8] x) => (float[N,C,H,W] y) { y = Conv(x, w) }", {"w": normal(6, 4, 3, 3)})
    layer = _layer(model)
    own = candidates.Factoring(SCHEMES["separable"], (1,), 0.1, 0.2, 0.3, time, error)
    worse = replace(own, ranks=(2,), time=time + 0.5)
    other = candidates.Factoring(SCHEMES["spatial"], (8,), 0.5, 0.5, 0.1, 0.4, 0.1)
    assert _unbeaten(layer, own, other) == ((own, other) if kept else (other,))
    alone = (own, worse)
    assert _unbeaten(layer, *alone) == alone, "by itself it is what was asked for"
    untimed = tuple(replace(each, time=math.nan) for each in (worse, other))
    assert _unbeaten(layer, *untimed) == untimed


def _unbeaten(layer: Whole, *found: candidates.Factoring) -> tuple[candidates.Factoring, ...]:
    return candidates.unbeaten(candidates.LayerOptions(layer, found)).candidates


def _factorize(model: Model, data: CalibrationData | None = None, **options: Any) -> tuple[Model, Changes]:
    twin = model.copy()
    samples = None if data is None else Samples(data, model)
    context = Context(target=Target.cpu(1), data=samples, sample={"x": normal(1, 8, 10, 10)})
    return twin, Factorize(**{"align": 4, "repair": False, **options}).run(twin, context)


@pytest.mark.parametrize("budget", [{"energy": 0.8}, {"macs": 0.4}, {"speedup": 2.0}])
def test_ranks_rise_for_what_is_required(net: Model, clock: dict[str, float], budget: Any) -> None:
    data = _data(8, 8)
    free, _ = _factorize(net, data, **budget)
    judge = Judge(net, Samples(data, net).tune, Target.cpu(1))
    reached = judge(free).sqnr
    held, changes = _factorize(net, data, require_sqnr=reached + 3, **budget)
    assert changes
    assert judge(held).sqnr >= reached + 2
    assert free.stats().parameters < held.stats().parameters < net.stats().parameters
    told = FactorizeFigures.of(changes).budget
    if "macs" in budget:
        shape = {"x": (1, 8, 10, 10)}
        left = (cost.macs(held, shape) or 0) / (cost.macs(net, shape) or 1)
        assert told == f"{left:.1%} of macs, 40.0% wanted"
    else:
        assert told is None


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("data", [False, True])
def test_depthwise_kernels_have_factors_along_each_axis(multiplier: int, data: bool) -> None:
    """Kernels that are products of two are the same; each factor has the attributes of its axis."""
    tall, wide = normal(8, 1, 5, 1), normal(8 * multiplier, 1, 1, 3, seed=1)
    model = parse(
        """g (float[N,8,10,10] x) => (float[N,C,H,W] y)
        { y = Conv<group=8, pads=[4,1,4,1], strides=[1,2], dilations=[2,1]>(x, w, b) }""",
        {"w": np.repeat(tall, multiplier, axis=0) * wide, "b": normal(8 * multiplier)},
    )
    batches = CalibrationData([{"x": normal(16, 8, 10, 10, seed=seed)} for seed in (3, 4)])
    found, changes = _factorize(model, batches if data else None, params=0.9)
    told = FactorizeFigures.of(changes).layers
    assert told is not None
    assert f"{(5 / multiplier + 3) / 15:.2f} of the weights" in told["Conv→y"]
    first, second = (node for node in found.graph.nodes if node.op == "Conv")
    assert (first.attrs["group"], second.attrs["group"]) == (8, 8)
    assert [node.attrs["strides"] for node in (first, second)] == [(1, 1), (1, 2)]
    same_outputs(model, found)
    again, changes = _factorize(found, None, params=0.9)
    assert "it is a factor already" in set(reasons(changes).values())
    assert len(again.graph.nodes) == 2


def test_depthwise_kernels_of_one_axis_have_no_factors() -> None:
    for kernel in ((3, 1), (1, 1)):
        text = "g (float[N,8,10,10] x) => (float[N,8,H,W] y) { y = Conv<group=8>(x, w) }"
        changes = _factorize(parse(text, {"w": normal(8, 1, *kernel)}))[1]
        assert "it is depthwise, and has factors along two axes" in reasons(changes)["Conv→y"]


@pytest.mark.parametrize(
    ("text", "shapes", "reason"),
    [
        ("a = Conv(x, w) [it] b = Conv(x, w) y = Add(a, b)", {"w": (4, 4, 3, 3)}, "shared"),
        ("v = Relu(x) [it] y = MatMul(v, x)", {}, "its weight is computed, not stored"),
        ("[it] y = MatMul(x, w)", {"w": (2, 8, 8, 9)}, "not a matrix"),
    ],
)
def test_what_cannot_be_factorized_is_named(
    text: str, shapes: dict[str, tuple[int, ...]], reason: str
) -> None:
    model = parse(
        f"g (float[2,4,8,8] x) => (float[A,B,C,D] y) {{ {text} }}",
        {k: normal(*v) for k, v in shapes.items()},
    )
    assert reason in _layers(model)[1]["it"]


def test_quantized_weights_are_left_alone() -> None:
    model = parse(
        "g (float[N,4] x) => (float[N,M] y) { w = DequantizeLinear(q, s, z) [it] y = MatMul(x, w) }",
        {"q": np.ones((4, 6), np.int8), "s": np.float32(0.1), "z": np.int8(0)},
    )
    assert _layers(model)[1] == {"it": "its weight is quantized"}


def test_layers_in_branches_and_excluded_ones_are_left_alone(net: Model) -> None:
    assert _layers(net, ("t*", "Gemm"))[1] == {
        **dict.fromkeys(("two", "three"), "excluded by 't*'"),
        "head": "excluded by 'Gemm'",
    }
    branch = "g () => (float[2,4] y) { [inner] y = MatMul(x, w) }"
    model = parse(
        f"g (float[2,4] x, bool c) => (float[2,4] y) {{ y = If(c) <then_branch = {branch}, "
        f"else_branch = {branch.replace('inner', 'other')}> }}",
        {"w": normal(4, 4)},
    )
    assert set(_layers(model)[1].values()) == {"it is inside a branch or a loop"}


def test_unknown_sizes_are_a_reason() -> None:
    model = parse(
        "g (float[N,4,H,W] x) => (float[A,B,C,D] y) { [it] y = Conv(x, w) }", {"w": normal(4, 4, 3, 3)}
    )
    log = Log()
    assert layers_of(model, {"x": (1, 4, 8, 8)}, (), log)[0]
    model.graph.inputs[0].shape = None
    assert not layers_of(model, {}, (), log)[0]
    assert "size" in log.done().skipped[0].reason


# ------------------------------------------------------------------------------------------------ the pass


@pytest.mark.parametrize("share", [0.75, 0.5, 0.35])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_budgets_in_size_are_kept(net: Model, clock: dict[str, float], unit: str, share: float) -> None:
    found, changes = _factorize(net, _data(), **{unit: share})
    assert changes
    if unit == "macs":
        before, after = (cost.macs(model, {"x": (1, 8, 10, 10)}) for model in (net, found))
    else:
        before, after = net.stats().parameters, found.stats().parameters
        assert not FactorizeFigures.of(changes).candidates, "timed although only the size counts"
    assert before
    assert after
    assert 0.7 * share < after / before <= share


def test_data_is_worth_more_than_weights_alone(net: Model, clock: dict[str, float]) -> None:
    judge = Judge(net, CalibrationData([{"x": normal(64, 8, 10, 10, seed=99)}]), Target.cpu(1))
    fitted, _ = _factorize(net, _data(12, 8), macs=0.4)
    plain, changes = _factorize(net, macs=0.4)
    assert "calibration" in (FactorizeFigures.of(changes).fitted or "")
    assert judge(net).error == 0.0
    assert judge(fitted).error < 0.5 * judge(plain).error


def test_what_was_kept_before_the_repair_is_told(net: Model, clock: dict[str, float]) -> None:
    step = Pipeline(Factorize(macs=0.2, cache=False))(net, data=_data(12, 8)).report.steps[0]
    before, after = FactorizeFigures.of(step.changes).unrepaired, step.kept
    assert before is not None
    assert after is not None
    assert before.sqnr < after.sqnr
    assert before.samples == after.samples
    step = Pipeline(Factorize(macs=0.4, cache=False, repair=False))(net, data=_data(12, 8)).report.steps[0]
    assert FactorizeFigures.of(step.changes).unrepaired is None


def test_speed_is_reached_by_measuring_the_whole(net: Model, clock: dict[str, float]) -> None:
    clock["base"] = 5e4
    found, _ = _factorize(net, _data(), speedup=1.5)
    _, (_, ratio) = timing.compare([net, found], {"x": normal(1, 8, 10, 10)}, Target.cpu(1))
    assert 1.4 < 1 / ratio < 1.8


def test_energy_bounds_what_every_layer_loses(net: Model, clock: dict[str, float]) -> None:
    kept = {}
    for energy in (0.8, 0.99):
        _, changes = _factorize(net, _data(), energy=energy)
        kept[energy] = FactorizeFigures.of(changes).layers
        assert kept[energy]
    assert kept[0.8] != kept[0.99]
    _, changes = _factorize(net, _data(), energy=0.999999)
    assert not changes
    assert "of its power" in reasons(changes)["two"]


def test_nothing_slower_gets_through_the_gate(net: Model, clock: dict[str, float]) -> None:
    clock["slow"] = 100.0
    found, changes = _factorize(net, _data(), macs=0.5)
    assert not changes
    assert "of its time, more than 0.91" in reasons(changes)["two"]
    assert {node.name for node in found.nodes()} == {node.name for node in net.nodes()}
    _, changes = _factorize(net, _data(), params=0.5)
    assert changes, "time does not count where only the size does"


def test_a_whole_that_is_not_faster_is_taken_back_if_speed_was_asked_for(
    net: Model, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "compare", lambda *_: ([Latency(1e6, 1e6)] * 2, [1.0, 1.2]))
    found, changes = _factorize(net, _data(), speedup=1.3)
    assert not changes
    assert any("1.20 of its time" in reason for reason in reasons(changes).values())
    same_outputs(net, found, exact=True)
    _, changes = _factorize(net, _data(), macs=0.5)
    assert changes
    assert any("1.20 of its time" in reason for reason in reasons(changes).values())


def test_a_budget_out_of_reach_is_said_to_be(net: Model, clock: dict[str, float]) -> None:
    _, changes = _factorize(net, _data(), macs=0.01)
    assert changes
    assert any("out of reach" in reason for reason in reasons(changes).values())


@pytest.mark.parametrize("options", [{"macs": 0.5}, {"params": 0.5}, {"energy": 0.9}, {"speedup": 1.5}])
def test_factorizing_twice_does_nothing_new(
    net: Model, clock: dict[str, float], options: dict[str, float]
) -> None:
    once, _ = _factorize(net, _data(), **options)
    twice, changes = _factorize(once, _data(), **options)
    assert not changes
    assert changes.skipped
    same_outputs(once, twice, exact=True)


def _undone(model: Model) -> Model:
    _, known = layers_of(model, {name: array.shape for name, array in feeds_for(model).items()}, (), Log())
    assert known
    return chains.undone(model, known)


@settings(max_examples=30)
@given(st.one_of(convolutions(least=4), convolutions(transposed=True, least=4)), st.sampled_from(SEVERAL))
def test_factors_are_recognised_and_count_as_the_layer_they_stand_for(model: Model, scheme: str) -> None:
    layer, kind = _layer(model), SCHEMES[scheme]
    assume(kind.refuses(layer) is None)
    twin = model.copy()
    target, edit = _layer(twin), Editor(twin)
    shapes = kind.shapes(layer, (1,) * len(kind.largest(layer)))
    target.install(edit, target.node, kind.factors(layer, [np.ones(shape) for shape in shapes]), None)
    edit.commit()
    found, skipped = _layers(twin)
    assert not found
    assert set(skipped.values()) == {"it is a factor already"}
    back, inputs = _undone(twin), {name: array.shape for name, array in feeds_for(model).items()}
    assert cost.macs(back, inputs) == cost.macs(model, inputs)
    assert back.stats().parameters == model.stats().parameters
    assert {name: value.shape for name, value in run(back).items()} == {
        name: value.shape for name, value in run(model).items()
    }


@pytest.mark.parametrize(
    "node", ["Gemm<transB=1, alpha=0.5>(x, w, b)", "MatMul(x, w)", "Gemm<transA=1>(w, x)"]
)
def test_products_are_recognised_as_factors(node: str) -> None:
    shape = (24, 16) if "transB" in node else (16, 24)
    data = "float[16,3] x" if "transA" in node else "float[3,16] x"
    model = parse(f"g ({data}) => (float[A,B] y) {{ y = {node} }}", {"w": normal(*shape), "b": normal(24)})
    twin = model.copy()
    layer, edit = _layer(twin), Editor(twin)
    factors = [Factor(np.ones((1, 16, 2), np.float32)), Factor(np.ones((1, 2, 24), np.float32))]
    layer.install(edit, layer.node, factors, None)
    edit.commit()
    assert set(_layers(twin)[1].values()) == {"it is a factor already"}
    back, inputs = _undone(twin), {name: array.shape for name, array in feeds_for(model).items()}
    assert cost.macs(back, inputs) == cost.macs(model, inputs)
    assert run(back)["y"].shape == run(model)["y"].shape


def test_layers_that_are_no_factors(net: Model) -> None:
    """Two layers in a row are one map; they are factors of it only if they are the smaller for it."""
    wide = "g (float[N,8] x) => (float[N,M] y) { [a] h = MatMul(x, w1) [b] y = MatMul(h, w2) }"
    found, skipped = _layers(parse(wide, {"w1": normal(8, 32), "w2": normal(32, 8)}))
    assert len(found) == 2, skipped
    seen = "g (float[N,8] x) => (float[N,M] y, float[N,2] h) { [a] h = MatMul(x, w1) [b] y = MatMul(h, w2) }"
    found, skipped = _layers(parse(seen, {"w1": normal(8, 2), "w2": normal(2, 8)}))
    assert len(found) == 2, skipped


@pytest.mark.parametrize("scheme", SEVERAL)
def test_single_schemes(net: Model, clock: dict[str, float], scheme: str) -> None:
    found, changes = _factorize(net, _data(), macs=0.6, schemes=scheme)
    assert {change.reason for change in changes.changed} == {f"{scheme} factors"}
    names = {node.name for node in found.nodes()}
    assert {"two", "two_factor1"} <= names
    assert {t.name for node in net.nodes() for t in node.outputs} <= {
        t.name for node in found.nodes() for t in node.outputs
    }


def test_one_budget_at_a_time() -> None:
    with pytest.raises(UsageError, match="one budget, not macs and params"):
        Factorize(macs=0.5, params=0.5)
    with pytest.raises(UsageError, match="macs"):
        create("factorize", {"macs": "1.5"})
    assert create("factorize", {"schemes": "spatial", "macs": "0.4"}) == Factorize(
        macs=0.4, schemes=("spatial",)
    )


def test_pipeline_then_quantized_runs_in_integers(net: Model, clock: dict[str, float]) -> None:
    result = Pipeline(
        Factorize(macs=0.5, align=4, repair=False), Quantize(classifier=True), on_error="raise"
    )(net, data=_data(), target=Target.cpu(1))
    figures = QuantizeFigures.of(result.report.steps[-1].changes)
    assert figures.fused == figures.total
    assert (figures.total or {})["Conv"] > 3
    assert "candidates" not in str(result.report)
    assert json.dumps(result.report.to_dict())


@pytest.mark.parametrize("samples", [1, 3])
def test_few_samples_do(net: Model, clock: dict[str, float], samples: int) -> None:
    found, changes = _factorize(net, _data(1, samples), macs=0.5)
    assert changes
    assert np.isfinite(run(found)["y"]).all()


def test_data_that_says_nothing(clock: dict[str, float]) -> None:
    """Inputs that are always zero behind a Relu, and a weight of zeros."""
    text = "g (float[N,32] x) => (float[N,M] y) { h = MatMul(x, w1) r = Relu(h) [it] y = Gemm(r, w2) }"
    weights = {"w1": -np.abs(normal(32, 32)), "w2": _low(32, 32, rank=3, seed=2)}
    data = CalibrationData([{"x": np.abs(normal(4, 32, seed=seed))} for seed in range(4)])
    for constants in (weights, {**weights, "w2": np.zeros((32, 32), np.float32)}):
        model = parse(text, constants)
        samples = Samples(data, model.copy())
        context = Context(target=Target.cpu(1), data=samples, sample={"x": normal(1, 32)})
        changes = Factorize(params=0.5, align=4, repair=False).run(model, context)
        assert "it" in {change.node for change in changes.changed}
        assert np.isfinite(run(model, {"x": normal(4, 32)})["y"]).all()


def test_on_the_command_line(
    net: Model, clock: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tmp_path / "in.onnx", tmp_path / "data.npz"
    net.save(model)
    np.savez(data, x=normal(16, 8, 10, 10))
    words = ["factorize", str(model), str(tmp_path / "out.onnx"), "--data", str(data), "--batch-size", "4"]
    assert cli.main([*words, "--macs", "0.5", "--align", "4", "--schemes", "spatial", "--no-cache"]) == 0
    assert "spatial factors" in capsys.readouterr().out
    before, after = (load(tmp_path / name).stats().parameters for name in ("in.onnx", "out.onnx"))
    assert after < before
    assert cli.main([*words, "--macs", "0.5", "--params", "0.5"]) == 2
    assert "one budget" in capsys.readouterr().err


def test_after_pruning(net: Model, clock: dict[str, float]) -> None:
    chain = (Prune(macs=0.8), Factorize(macs=0.7, align=4, repair=False))
    result = Pipeline(*chain, on_error="raise")(net, data=_data(), target=Target.cpu(1))
    pruned, factorized = result.report.steps
    assert pruned.changes
    assert factorized.changes
    assert pruned.macs_after
    assert factorized.macs_after
    assert factorized.macs_after <= 0.7 * pruned.macs_after


def test_layers_without_a_name_go_by_their_output(clock: dict[str, float]) -> None:
    text = "g (float[N,32] x) => (float[N,M] y) { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"
    model = parse(text, {"w1": _low(32, 32, rank=3, seed=1), "w2": _low(32, 32, rank=3, seed=2)})
    context = Context(target=Target.cpu(1), sample={"x": normal(1, 32)})
    changes = Factorize(params=0.4, align=4).run(model, context)
    assert [change.node for change in changes.changed] == ["MatMul→h", "MatMul→y"]
    assert list(FactorizeFigures.of(changes).layers or {}) == ["MatMul→h", "MatMul→y"]


def test_first_factors_have_no_bias(net: Model, clock: dict[str, float]) -> None:
    found, _ = _factorize(net, _data(), macs=0.5)
    for node in found.nodes():
        if "_factor" in node.name:
            assert node.input(2) is None


# ---------------------------------------------------------------------------------------------- the bench


def test_times_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def latencies(sessions: list[Session], *_: Any, **__: Any) -> Any:
        calls.append(len(sessions))
        return [Latency(2.0, 1.0)] * len(sessions), [1.0, 0.5, 0.25][: len(sessions)]

    monkeypatch.setattr(timing, "latencies", latencies)
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    feeds = {"x": np.zeros(2, np.float32)}

    def ask(threads: int = 1, *names: str) -> timing.Timing:
        bench = Bench(Target.cpu(threads), tmp_path)
        return bench("it", lambda: model, {name: lambda: model for name in names}, feeds)

    assert ask(1, "a", "b") == timing.Timing(2.0, {"a": 0.5, "b": 0.25})
    assert ask(1, "b", "a").ratios == {"a": 0.5, "b": 0.25}
    assert calls == [3]
    assert ask(1, "a", "c").ratios == {"a": 0.5, "c": 0.5}
    assert calls == [3, 2], "only what is new is timed"
    ask(2, "a")
    assert calls == [3, 2, 2], "another number of threads is another time"
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert ask(1, "a").ratios == {"a": 0.5}
    assert len(calls) == 4, "a broken file counts as none"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    bench = Bench(Target.cpu(1), tmp_path / "file" / "folder")
    found = bench("it", lambda: model, {"same": lambda: model}, {"x": np.zeros(2, np.float32)})
    assert found.ratios["same"] > 0


def test_dead_nodes_and_real_times(net: Model) -> None:
    """Everything as users have it: real times, the cache, all layers fitted anew."""
    result = Pipeline(Factorize(macs=0.6, align=4), Dead(), on_error="raise")(
        net, data=_data(), target=Target.cpu(1)
    )
    first = result.report.steps[0]
    figures = FactorizeFigures.of(first.changes)
    assert figures.latency is not None or not first.changes
    assert all(row.passed == (row.time <= 1 / 1.1) for row in figures.candidates)
    assert ops(result.model)["Conv"] >= 3
    assert list(timing.folder().iterdir())


def test_layers_that_see_nothing_have_no_moments() -> None:
    model = parse(
        """g (float[N,8] x, float[P,8] past) => (float[N,8] y, float[P,8] z)
        { y = MatMul(x, w) z = MatMul(past, v) }""",
        {"w": normal(8, 8), "v": normal(8, 8, seed=1)},
    )
    layers, _ = layers_of(model, {"x": (4, 8), "past": (4, 8)}, (), Log())
    data = CalibrationData([{"x": normal(4, 8), "past": normal(0, 8)}])
    seen = {layer.name: gram for layer, gram in fit.moments(model, data, layers, Target.cpu(), None)}
    assert [name for name, gram in seen.items() if gram is None] == ["MatMul→z"]


PLANNED = """g (float[N,32] x) => (float[N,8] y)
<float[32,64] w = {0}, float[64,32] v = {0}, float[32,8] u = {0}>
{ [first] a = MatMul(x, w) r = Relu(a) [second] b = MatMul(r, v) s = Tanh(b) [last] y = MatMul(s, u) }"""


def _planned(model: Model, plan: FactorizationPlan, folder: Path, **options: Any) -> Model:
    path = folder / "plan.json"
    path.write_text(plan.to_json())
    return apply(Factorize(plan=path, **options), model, _batches())[0]


def _batches() -> list[dict[str, Array]]:
    return [{"x": normal(8, 32, seed=seed)} for seed in range(8)]


@pytest.mark.parametrize("options", [{}, {"fitted": False}, {"repair": False}])
def test_a_plan_that_is_replayed_makes_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    model = filled(parse(PLANNED))
    first, changes = apply(Factorize(params=0.6, **options), model, _batches())
    plan = FactorizeFigures.of(changes).plan
    assert plan is not None
    assert plan.layers
    assert plain(changes.figures)["plan"] == plan.to_dict()
    second = _planned(model, plan, tmp_path, **options)
    assert second.to_proto().SerializeToString() == first.to_proto().SerializeToString()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output": "other"}, "there is no layer that makes 'other'; known are: a, b, y"),
        ({"output": "r"}, "there is no layer that makes 'r'"),
        ({"weight": (1, 32, 32)}, "the weight of layer that makes 'a' is 1x32x64, not 1x32x32"),
        ({"scheme": "svt"}, "'first': there is no scheme 'svt'; did you mean 'svd'"),
        ({"scheme": "output"}, "'first': it cannot have factors 'output': its kernel has one position"),
        ({"ranks": (33,)}, "'first': ranks of 'svd' are at most 32, not 33"),
        ({"ranks": (4, 4)}, "'first': ranks of 'svd' are at most 32, not 4x4"),
    ],
)
def test_a_plan_of_another_model_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "fit", None)  # nothing is done before
    entry = LayerFactors("first", "a", (1, 32, 64), "svd", (4,))
    with pytest.raises(UsageError) as caught:
        _planned(filled(parse(PLANNED)), FactorizationPlan((replace(entry, **changed),)), tmp_path)
    assert message in str(caught.value)


def test_a_plan_knows_layers_that_a_search_takes_for_factors(tmp_path: Path) -> None:
    text = """g (float[N,32] x) => (float[N,32] y) <float[32,8] w = {0}, float[8,32] v = {0}>
    { a = MatMul(x, w) y = MatMul(a, v) }"""
    plan = FactorizationPlan((LayerFactors("MatMul→a", "a", (1, 32, 8), "svd", (2,)),))
    assert ops(_planned(filled(parse(text)), plan, tmp_path)) == {"MatMul": 3}
