"""Collecting statistics of inner tensors: exact, streaming, and clear about what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration.collect import KEPT, collect, thinning
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import Histogram
from onnxslim.calibration.stream import tapped
from onnxslim.errors import CalibrationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.session import Session
from tests.helpers import normal, parse


@pytest.fixture
def model() -> Model:
    return parse(
        """g (float[N,3,H,W] x) => (float[N,K] y)
        { c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) p = GlobalAveragePool(r) y = Flatten(p) }""",
        {"w": normal(4, 3, 3, 3)},
    )


def _batches(*shapes: tuple[int, int, int]) -> list[dict[str, Array]]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((n, 3, h, w)).astype(np.float32)} for n, h, w in shapes]


def _equal(a: Histogram, b: Histogram) -> bool:
    same = (a.low, a.high, a.count, a.exponent, a.start) == (b.low, b.high, b.count, b.exponent, b.start)
    return same and bool(np.array_equal(a.counts, b.counts))


def test_histograms_are_those_of_the_tensors(model: Model) -> None:
    batches = _batches((2, 8, 8), (1, 5, 7))
    found = collect(model, CalibrationData(batches), ["x", "r", "y"]).histograms
    session = Session(tapped(model, ["r", "y"]))
    for name in ("x", "r", "y"):
        expected = Histogram()
        for feeds in batches:
            expected.update(feeds["x"] if name == "x" else session.run(feeds)[name])
        assert _equal(found[name], expected)


@pytest.mark.parametrize("size", [8, 130])
def test_the_batching_of_the_samples_does_not_matter(model: Model, size: int) -> None:
    whole = _batches((6, size, size))  # the large ones are thinned out
    assert (thinning(whole[0]["x"]) > 1) == (size > 8)
    single = [{"x": whole[0]["x"][i : i + 1]} for i in range(6)]
    first = collect(model, CalibrationData(whole), ["x"]).histograms["x"]
    assert _equal(first, collect(model, CalibrationData(single), ["x"]).histograms["x"])


@pytest.mark.parametrize("shape", [(1, 8, 112, 112), (2, 64, 56, 56), (1, 300_000), (3, 5), (600_000,), ()])
def test_large_arrays_are_thinned_out_evenly(shape: tuple[int, ...]) -> None:
    every = thinning(np.empty(shape, np.float32))
    counted = np.zeros(shape, bool)
    counted.reshape(-1)[::every] = True
    samples = counted.reshape(shape[0] if len(shape) > 1 else 1, -1)
    assert (samples.sum(axis=1) >= min(samples.shape[1], KEPT)).all()
    if len(shape) == 4:
        assert counted.any(axis=(0, 1, 2)).all()
        assert counted.any(axis=(0, 1, 3)).all()


def test_thinning_keeps_the_exact_range() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    whole, thin = Histogram(), Histogram()
    whole.update(values)
    thin.update(values, every=7)
    assert (thin.low, thin.high, thin.count) == (whole.low, whole.high, whole.count)
    assert abs(thin.counts.sum() - values.size / 7) < 2
    assert np.abs(thin.counts * 7.0 - whole.counts).max() < 0.01 * values.size


def test_processes_give_the_bits_of_one(model: Model) -> None:
    data = CalibrationData(_batches((2, 8, 8), (3, 8, 8), (1, 9, 4)))
    alone = collect(model, data, ["x", "r"], channels=[("r", 1)])
    shared = collect(model, data, ["x", "r"], channels=[("r", 1)], jobs=2)
    assert all(_equal(alone.histograms[name], shared.histograms[name]) for name in ("x", "r"))
    (one,), (two,) = alone.means.values(), shared.means.values()
    np.testing.assert_array_equal(one.result(), two.result(), strict=True)


def test_means_are_those_of_the_channels(model: Model) -> None:
    batches = _batches((2, 8, 8), (1, 5, 7))
    found = collect(model, CalibrationData(batches), [], channels=[("r", 1), ("x", 1)])
    session = Session(tapped(model, ["r"]))
    values = [session.run(feeds)["r"] for feeds in batches]
    pixels = np.concatenate([np.moveaxis(value, 1, 0).reshape(4, -1) for value in values], axis=1)
    np.testing.assert_allclose(found.means["r", 1].result(), pixels.mean(axis=1), atol=1e-6)
    assert found.means["x", 1].result().shape == (3,)


def test_progress_is_reported(model: Model) -> None:
    calls: list[tuple[str, int, int | None]] = []
    collect(
        model,
        CalibrationData(_batches((1, 4, 4), (1, 4, 4))),
        ["r"],
        progress=lambda what, done, total: calls.append((what, done, total)),
    )
    assert calls == [("calibrating", 1, 2), ("calibrating", 2, 2)]


def test_nan_in_the_data_is_named_and_nan_in_an_activation_is_told() -> None:
    model = parse("g (float[N] x) => (float[N] y) { a = Log(x) y = Relu(a) }")
    data = CalibrationData([{"x": np.array([-1.0, 0.0, 2.0], np.float32)}])
    assert collect(model, data, ["a"]).histograms["a"].irregular == "NaN or infinite values"
    data = CalibrationData([{"x": np.array([np.nan, 2.0], np.float32)}])
    with pytest.raises(CalibrationError, match="input 'x' of the calibration data holds 1 NaN"):
        collect(model, data, ["x", "a"])


def test_a_tensor_no_sample_reached_is_named(model: Model) -> None:
    data = CalibrationData([{"x": np.empty((0, 3, 4, 4), np.float32)}])
    with pytest.raises(CalibrationError, match="no sample of the calibration data reached tensor 'x'"):
        collect(model, data, ["x"])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.zeros((1, 4, 8, 8), np.float32)}, "shape"),
        ({"x": np.zeros((1, 3, 8, 8), np.float64)}, "float64"),
        ({"z": np.zeros((1, 3, 8, 8), np.float32)}, "no input 'z'"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error(model: Model, feeds: dict[str, Array], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        collect(model, CalibrationData([feeds]), ["x"])


def test_a_batch_that_fails_halfway_is_an_error() -> None:
    model = parse("g (float[N, M] x, float[K, L] z) => (float[N, L] y) { y = MatMul(x, z) }")
    good = {"x": np.ones((2, 3), np.float32), "z": np.ones((3, 2), np.float32)}
    bad = {"x": np.ones((2, 3), np.float32), "z": np.ones((4, 2), np.float32)}
    with pytest.raises(CalibrationError, match=r"does not run on a batch of x \(2, 3\), z \(4, 2\)"):
        collect(model, CalibrationData([good, bad]), ["y"])
