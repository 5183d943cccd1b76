"""Coordinate descent and GPTQ beside what their definitions say, on small problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.ir.graph import Array
from onnxslim.passes.quantize import coder, rounding, weights
from onnxslim.passes.quantize.blocks import Blocking, nearest
from onnxslim.passes.quantize.descent import BLOCK, Descent, Neighbours, Pulls, by_input, by_output
from onnxslim.passes.quantize.search import Search
from onnxslim.passes.quantize.trial import Trial
from tests.helpers import normal, parse, quantize

SEEDS = st.integers(0, 1 << 31)


def _problem(groups: int, outputs: int, inputs: int, seed: int) -> tuple[Array, Array]:
    """Weights wanted, and a covariance of inputs that go together."""
    rng = np.random.default_rng(seed)
    seen = rng.standard_normal((groups, inputs, inputs)) * np.geomspace(1, 0.05, inputs)
    target = rng.standard_normal((groups, outputs, inputs)).astype(np.float32)
    return target, seen @ seen.swapaxes(1, 2) / inputs


def _loss(error: Array, gram: Array) -> float:
    return float(np.einsum("gok,gkl,gol->", *(error.astype(np.float64), gram, error.astype(np.float64))))


def _by_definition(target: Array, codes: Array, steps: Array, curvature: Array, limit: int) -> Array:
    """One round of coordinate descent, every code the one of least loss of all that are allowed."""
    codes, allowed = codes.astype(np.float64), np.arange(-limit, limit + 1)
    for g, m, k in itertools.product(*map(range, target.shape)):
        error = codes[g, m] * steps[g, m] - target[g, m]
        others = curvature[g, k] @ error - curvature[g, k, k] * error[k]
        tried = allowed * steps[g, m] - target[g, m, k]
        codes[g, m, k] = allowed[np.argmin(curvature[g, k, k] * tried**2 + 2 * others * tried)]
    return codes


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2 * BLOCK + 7), st.sampled_from((7, 127)), SEEDS)
@settings(max_examples=40, deadline=None)
def test_sweeps_end_as_low_as_by_definition(
    groups: int, outputs: int, inputs: int, limit: int, seed: int
) -> None:
    target, gram = _problem(groups, outputs, inputs, seed)
    curvature = rounding.damped(gram)
    scales = (np.abs(target).max(axis=2) / limit).astype(np.float32)
    naive = start = np.rint(target / scales[..., None]).clip(-limit, limit).astype(np.float32)
    work, pulls = (
        Descent(by_input(target), by_input(start), scales[None], (-limit, limit)),
        Pulls.of(curvature),
    )
    for _ in range(4):
        naive = _by_definition(target, naive, scales, curvature, limit)
        work.sweep(pulls)
    found, wanted = (
        _loss(codes * scales[..., None] - target, curvature) for codes in (by_output(work.codes), naive)
    )
    assert found <= wanted * 1.001 + 1e-9


@pytest.mark.parametrize("inputs", [1, 5, BLOCK, 2 * BLOCK + 7])
def test_gptq_is_that_of_the_paper(inputs: int) -> None:
    """By the inverse of the covariance, the inputs of most power first."""
    target, gram = _problem(2, 40, inputs, seed=inputs)
    scales = (np.abs(target).max(axis=2) / 7).astype(np.float32)
    curvature = rounding.damped(gram).astype(np.float64)
    wanted = np.empty(target.shape)
    for g, matrix in enumerate(curvature):
        order = np.argsort(-np.diagonal(matrix), kind="stable")
        upper = np.linalg.cholesky(np.linalg.inv(matrix[np.ix_(order, order)])).T
        left = target[g][:, order].astype(np.float64)
        for j, place in enumerate(order):
            wanted[g, :, place] = np.rint(left[:, j] / scales[g]).clip(-7, 7)
            error = left[:, j] - wanted[g, :, place] * scales[g]
            left[:, j:] -= error[:, None] * upper[j, j:] / upper[j, j]
    found = rounding.gptq(target, scales, gram, limit=7)
    # A code halfway between two integers may go either way, and then others behind it do.
    assert (found == wanted).all(axis=2).mean() > 0.9


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.sampled_from((1, 4, 9)), SEEDS)
@settings(max_examples=30, deadline=None)
def test_what_is_given_stays_and_neighbours_keep_their_limit(
    groups: int, outputs: int, channels: int, positions: int, seed: int
) -> None:
    target, gram = _problem(groups, outputs, channels * positions, seed)
    start = by_input(np.rint(target * 20).clip(-64, 64).astype(np.float32))
    before, steps = start.copy(), np.full((1, groups, outputs), 0.015, np.float32)
    work = Descent(
        by_input(target), start, steps, (-weights.QMAX, weights.QMAX), Neighbours(channels, positions)
    )
    work.sweep(Pulls.of(rounding.damped(gram)))
    assert np.array_equal(start, before)
    table = by_output(work.codes).reshape(groups * outputs, channels, positions).astype(np.int8)
    assert not weights._saturates(table).any()


@given(
    st.integers(1, 5),
    st.integers(1, 3 * BLOCK),
    st.sampled_from((16, 32, 64)),
    st.sampled_from((4, 8)),
    SEEDS,
)
@settings(max_examples=30, deadline=None)
def test_steps_of_blocks_only_lower_the_loss(
    outputs: int, inputs: int, size: int, bits: int, seed: int
) -> None:
    target, gram = _problem(1, outputs, inputs, seed)
    matrix, curvature = target[0].T, rounding.damped(gram)
    blocking = Blocking(bits, size)
    start = nearest(matrix, blocking, np.diagonal(gram[0]))
    steps = blocking.spread(start.scales, inputs)[:, None]
    codes = start.counted()[:, None].astype(np.float32)
    low, high = (
        each[:, None] if isinstance(each, np.ndarray) else each
        for each in blocking.limits(start.zeros, inputs)
    )
    limits = low, high
    work = Descent(matrix[:, None], codes, steps, limits, size=size)
    last = np.inf
    for _ in range(3):
        loss = _loss(by_output(work.codes * work.steps) - target, curvature)
        assert loss <= last * (1 + 1e-5) + 1e-9
        last = loss
        work.sweep(Pulls.of(curvature), scaled=True)
    assert np.array_equal(work.steps, np.repeat(work.steps[::size], size, axis=0)[:inputs])


def test_each_weight_is_rounded_once_for_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """g (float[N,64] x, float[64,64] w1, float[64,48] w2) => (float[N,48] y)
    { a = MatMul(x, w1) b = Tanh(a) y = MatMul(b, w2) }"""
    model = parse(text, {"w1": normal(64, 64) / 8, "w2": normal(64, 48, seed=1) / 8})
    calls = {"nearest": 0, "round_blocks": 0}

    def counted(name: str, made: object) -> None:
        assert callable(made)

        def call(*args: object, **options: object) -> object:
            calls[name] += 1
            return made(*args, **options)

        monkeypatch.setattr(coder if name == "nearest" else rounding, name, call)

    counted("nearest", nearest)
    counted("round_blocks", rounding.round_blocks)
    data = [{"x": normal(16, 64, seed=seed)} for seed in range(8)]
    quantize(model, data, weights="int4", activations="none", require_sqnr=25, sequential=False)
    assert calls == {"nearest": 2, "round_blocks": 2}


def test_what_four_bits_are_far_from_is_not_fitted_in_turn_before_layers_get_eight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "g (float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul(x, w) }"
    data = [{"x": normal(16, 64, seed=seed)} for seed in range(8)]
    fitted = list[float]()

    def fit(_: Search, trial: Trial) -> Trial:
        fitted.append(trial.score.sqnr)
        return trial

    monkeypatch.setattr(Search, "fitted", fit)
    for wanted in (25, 35):
        quantize(
            parse(text, {"w": normal(64, 64)}), data, weights="int4", activations="none", require_sqnr=wanted
        )
        assert len(fitted) == 1
