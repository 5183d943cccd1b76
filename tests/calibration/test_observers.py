from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import joblib
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from onnxslim.calibration.observers import (
    Distribution,
    Histogram,
    MinMax,
    Range,
    affine_parameters,
    kl_divergence,
    min_max,
    mse,
    percentile,
    quantization_error,
)
from onnxslim.errors import CalibrationError
from onnxslim.ir.graph import MASK_MAGNITUDE

Array = NDArray[Any]
Method = Callable[..., Range]
METHODS: list[Method] = [min_max, percentile, kl_divergence, mse]
BINS = st.sampled_from([2, 3, 16, 100, 2048])


def floats(width: Any = 32, **limits: Any) -> st.SearchStrategy[Array]:
    dtype = {16: np.float16, 32: np.float32, 64: np.float64}[width]
    elements = st.floats(width=width, **limits)
    return hnp.arrays(dtype, st.integers(0, 60), elements=elements)


# Everyday activations, exact powers of two and bin borders, and all that floating point has to offer.
STREAMS = st.lists(
    st.one_of(
        floats(),
        floats(min_value=-8, max_value=8),
        floats(16),
        floats(64),
        hnp.arrays(np.int64, st.integers(0, 20)),
        hnp.arrays(
            np.float32, st.integers(0, 20), elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 256.0])
        ),
    ),
    max_size=6,
)
ORDINARY = hnp.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.one_of(
        st.floats(-1000, 1000, width=32),
        st.floats(-(2.0**99), 2.0**99, width=32),
        st.floats(0, 2.0**-120, width=32),
        st.sampled_from([0.0, 1.0, -1.0, 3.0]),
    ),
)


def f32(values: Sequence[float] | Sequence[Sequence[float]]) -> Array:
    return np.array(values, np.float32)


def ends(chosen: Range) -> tuple[float, float]:
    return chosen.low, chosen.high


def histogram(*arrays: Array, bins: int = 2048) -> Histogram:
    observer = Histogram(bins)
    for array in arrays:
        observer.update(array)
    return observer


def distribution(*arrays: Array, bins: int = 2048) -> Distribution:
    return histogram(*arrays, bins=bins).result()


def state(observer: MinMax | Histogram) -> bytes:
    return pickle.dumps({key: np.asarray(value).tobytes() for key, value in vars(observer).items()})


def merged(shards: Sequence[Histogram]) -> Histogram:
    total = Histogram(shards[0].bins)
    for shard in shards:
        total.merge(shard)
    return total


def activations(kind: str, size: int = 40_000) -> Array:
    generator = np.random.default_rng(7)
    x = generator.standard_normal(size).astype(np.float32)
    spiked = np.concatenate([x, f32([60, -45])])
    made = {
        "normal": x,
        "relu": np.maximum(x - 0.5, 0),
        "swish": x / (1 + np.exp(-x)),
        "outliers": spiked,
        "relu_outliers": np.maximum(spiked, 0),
        "laplace": generator.laplace(size=size).astype(np.float32),
        "negative": -np.abs(x) - 3,
        "offset": x + 20,
    }
    return np.asarray(made[kind], np.float32)


EVEN = ("negative", "offset")  # nothing to gain from clipping
KINDS = ["normal", "relu", "swish", "outliers", "relu_outliers", "laplace", "negative", "offset"]


@settings(deadline=None)
@given(STREAMS, BINS, st.data())
def test_any_split_order_and_merge_is_bit_identical(
    stream: list[Array], bins: int, data: st.DataObject
) -> None:
    one = histogram(*stream, bins=bins)
    pieces = [part for array in stream for part in np.array_split(array, 3)]
    pieces = data.draw(st.permutations(pieces))
    owners = [data.draw(st.integers(0, 3)) for _ in pieces]
    shards = [
        histogram(*itertools.compress(pieces, [owner == at for owner in owners]), bins=bins)
        for at in range(4)
    ]
    assert state(merged(shards)) == state(one)
    left, right = merged(shards[:2]), merged(shards[2:])
    right.merge(left)
    assert state(right) == state(one)


@settings(deadline=None)
@given(STREAMS)
def test_min_max_merges_bit_identically(stream: list[Array]) -> None:
    one, shards = MinMax(), [MinMax() for _ in stream]
    total = MinMax()
    for shard, array in zip(shards, stream, strict=True):
        one.update(array)
        shard.update(array)
    for shard in reversed(shards):
        total.merge(shard)
    assert state(total) == state(one)


@settings(deadline=None)
@given(ORDINARY, BINS)
def test_counts_match_exact_arithmetic(values: Array, bins: int) -> None:
    found = distribution(values, bins=bins)
    numbers = [float(value) for value in values]
    low, high = min(numbers), max(numbers)
    expected: dict[int, int] = {}
    for number in numbers:
        index = math.floor(math.ldexp(number, -found.exponent))
        expected[index] = expected.get(index, 0) + 1
    assert {found.start + at: count for at, count in enumerate(found.counts.tolist()) if count} == expected
    assert (found.low, found.high, found.zeros) == (low, high, numbers.count(0.0))
    assert found.counts.size <= bins
    finer = found.exponent - 1
    span = math.floor(math.ldexp(high, -finer)) - math.floor(math.ldexp(low, -finer)) + 1
    float32_spacing = math.ulp(max(abs(low), abs(high))) * 2.0**29
    assert span > bins or found.width <= max(float32_spacing, 2.0**-126)


@settings(deadline=None)
@given(STREAMS)
def test_every_element_is_counted_once(stream: list[Array]) -> None:
    observer = histogram(*stream)
    aside = observer.nan + observer.posinf + observer.neginf + observer.masked
    assert observer.count + aside == sum(array.size for array in stream)
    assert observer.counts.sum() == observer.count


def test_many_blocks_agree_with_numpy() -> None:
    values = np.random.default_rng(0).normal(3, 40, 300_001).astype(np.float32)
    found = distribution(values)
    expected, _ = np.histogram(values.astype(np.float64), found.edges)
    np.testing.assert_array_equal(found.counts, expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint64, np.bool_])
def test_other_types_count_as_their_float32_values(dtype: Any) -> None:
    values = np.random.default_rng(0).uniform(0, 100, 1000).astype(dtype)
    assert state(histogram(values)) == state(histogram(values.astype(np.float32)))


def test_byte_order_and_memory_layout_do_not_matter() -> None:
    values = np.random.default_rng(0).standard_normal((8, 30, 20)).astype(np.float32)
    reference = state(histogram(np.ascontiguousarray(values[:, ::2])))
    assert state(histogram(values[:, ::2])) == reference
    assert state(histogram(values[:, ::2].transpose(2, 0, 1))) == reference
    assert state(histogram(values[:, ::2].astype(">f4"))) == reference
    assert state(histogram(values[:, ::2].astype(">f8"))) == reference


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.25, 9e29, -9e29, 1e-45, -1e-45, 1e-38])
def test_constant_tensor(value: float) -> None:
    found = distribution(np.full((3, 5), value, np.float32))
    exact = float(np.float32(value))
    assert (found.low, found.high, found.counts.tolist()) == (exact, exact, [15])
    assert math.copysign(1, found.low) == (-1 if exact < 0 else 1)
    assert found.edges[0] <= exact < found.edges[1]


def test_tiny_spread_far_from_zero_keeps_every_float32_apart() -> None:
    base = np.float32(1000)
    values = np.array([base, np.nextafter(base, np.float32(2000))], np.float32)
    assert distribution(values).counts.tolist() == [1, 1]


def test_subnormal_below_zero_beside_a_wide_range() -> None:
    # Scaled to bins 8 wide it would underflow to -0.0 in float32.
    found = distribution(np.array([-1e-45, 8000.0, -1.0], np.float32), bins=1024)
    assert found.exponent > 0
    assert (found.start, found.counts[0], found.counts[1]) == (-1, 2, 0)


def test_masks_and_infinities_are_counted_and_kept_out() -> None:
    values = np.array([1, -2, -3.4e38, -1e38, 1e30, np.inf, -np.inf, -np.inf, np.nan, -10000], np.float32)
    for observer in (MinMax(), Histogram()):
        observer.update(values)
        assert (observer.low, observer.high, observer.count) == (-10000, 1, 3)
        assert (observer.masked, observer.posinf, observer.neginf, observer.nan) == (3, 1, 2, 1)


def test_float64_mask_is_not_taken_for_infinity() -> None:
    observer = histogram(np.array([np.finfo(np.float64).min, 0.1, 1e-320]))
    assert (observer.masked, observer.neginf, observer.count) == (1, 0, 2)
    assert observer.high == float(np.float32(0.1))


def test_below_the_mask_limit_everything_counts() -> None:
    limit = np.float32(MASK_MAGNITUDE)
    below = np.nextafter(limit, np.float32(0))
    assert histogram(np.array([below, -below, limit, -limit])).count == 2


def test_empty_arrays_have_no_effect() -> None:
    observer = histogram(f32([[1, 2]]))
    before = state(observer)
    observer.update(np.zeros((0, 3), np.float32))
    observer.merge(Histogram())
    assert state(observer) == before


@pytest.mark.parametrize("observer", [MinMax(), Histogram()])
def test_nothing_observed_is_an_error(observer: MinMax | Histogram) -> None:
    with pytest.raises(CalibrationError, match="no ordinary value was observed"):
        observer.result()
    observer.update(np.array([np.nan, -np.inf, 1e38]))
    with pytest.raises(CalibrationError, match="1 NaN, 1 infinite and 1 mask values"):
        observer.result()


@pytest.mark.parametrize("dtype", [np.complex64, np.str_, np.object_])
def test_values_that_are_not_real_numbers_are_refused(dtype: Any) -> None:
    with pytest.raises(CalibrationError, match="cannot be observed"):
        Histogram().update(np.zeros(3, dtype))


def test_histogram_settings_must_agree() -> None:
    with pytest.raises(ValueError, match="16 and 32 bins"):
        Histogram(16).merge(Histogram(32))
    with pytest.raises(ValueError, match="not 1"):
        Histogram(1)


def test_observers_pickle_small_and_go_on_counting() -> None:
    values = activations("normal", 200_000)
    observer = histogram(values)
    frozen = pickle.dumps(observer)
    assert len(frozen) < 20_000
    copy: Histogram = pickle.loads(frozen)
    for each in (copy, observer):
        each.update(values * 3)
    assert state(copy) == state(observer)


def test_threads_share_nothing() -> None:
    arrays = [activations(kind) for kind in KINDS]
    shards = joblib.Parallel(n_jobs=4, backend="threading")(joblib.delayed(histogram)(x) for x in arrays)
    assert state(merged(shards)) == state(histogram(*arrays))


@settings(deadline=None)
@given(ORDINARY, BINS)
def test_magnitudes_are_the_histogram_of_absolute_values(values: Array, bins: int) -> None:
    folded = distribution(values, bins=bins).magnitudes()
    magnitudes = np.abs(values.astype(np.float64))
    assert folded.high == magnitudes.max()
    assert folded.low <= magnitudes.min()
    assert folded.total == values.size
    # A negative value on a border belongs to the bin below it, the others to the bin above.
    scaled = values.astype(np.float64) / folded.width
    expected = np.where(scaled < 0, np.ceil(-scaled) - 1, np.floor(scaled)).astype(np.int64)
    index, counts = np.unique(expected, return_counts=True)
    filled = np.flatnonzero(folded.counts)
    np.testing.assert_array_equal(filled + folded.start, index)
    np.testing.assert_array_equal(folded.counts[filled], counts)


@settings(deadline=None)
@given(ORDINARY, BINS)
def test_with_zero_equals_having_seen_zero(values: Array, bins: int) -> None:
    extended = distribution(values, bins=bins).with_zero()
    seen = distribution(values, np.zeros(1, np.float32), bins=bins)
    counts = seen.counts.copy()
    counts[-seen.start] -= 1
    assert seen.zeros == extended.zeros + 1
    assert (extended.exponent, extended.start, extended.low, extended.high) == (
        seen.exponent,
        seen.start,
        seen.low,
        seen.high,
    )
    np.testing.assert_array_equal(extended.counts, counts)


@settings(deadline=None)
@given(ORDINARY, st.sampled_from(METHODS), st.booleans(), BINS)
def test_ranges_stay_within_the_data_and_zero(
    values: Array, method: Method, symmetric: bool, bins: int
) -> None:
    chosen = method(distribution(values, bins=bins), symmetric=symmetric)
    assert all(type(end) is float for end in (chosen.low, chosen.high))
    assert chosen.low <= chosen.high
    if symmetric:
        assert chosen.low == -chosen.high
        assert chosen.high <= np.abs(values).max()
    else:
        assert min(float(values.min()), 0) <= chosen.low
        assert chosen.high <= max(float(values.max()), 0)


@settings(deadline=None)
@given(ORDINARY, st.sampled_from(METHODS), st.sampled_from([2.0**-3, 2.0**5]))
def test_ranges_scale_with_the_data(values: Array, method: Method, factor: float) -> None:
    scaled = values * np.float32(factor)
    nonzero = np.abs(values[values != 0])
    assume(nonzero.size == 0 or (nonzero.min() > 2.0**-100 and np.abs(scaled).max() < MASK_MAGNITUDE))
    before, after = method(distribution(values)), method(distribution(scaled))
    assert (after.low, after.high) == pytest.approx((before.low * factor, before.high * factor), rel=1e-9)


# Not for KL: its minimum is flat and jagged, since groups of bins start elsewhere in the mirrored histogram.
@pytest.mark.parametrize("method", [min_max, percentile, mse])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mirrored_tensor_has_the_mirrored_range(kind: str, method: Method, symmetric: bool) -> None:
    values = activations(kind)
    chosen = method(distribution(values), symmetric=symmetric)
    other = method(distribution(-values), symmetric=symmetric)
    assert (-other.high, -other.low) == pytest.approx((chosen.low, chosen.high), rel=1e-3)


def test_min_max_is_exact() -> None:
    found = distribution(f32([0.1, 0.7, 0.30000001]))
    assert min_max(found) == Range(float(np.float32(0.1)), float(np.float32(0.7)))
    assert min_max(found, symmetric=True) == Range(-float(np.float32(0.7)), float(np.float32(0.7)))


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-100, 100, width=32)), st.floats(1, 100)
)
def test_percentile_agrees_with_sorted_data(values: Array, p: float) -> None:
    found = distribution(values)
    chosen = percentile(found, p)
    inside = (values >= chosen.low - found.width) & (values <= chosen.high + found.width)
    assert inside.mean() >= p / 100 - 1e-6
    cut = (100 - p) / (100 if found.low >= 0 or found.high <= 0 else 200)
    below, above = np.quantile(values, [cut, 1 - cut], method="inverted_cdf")
    if found.high > 0:
        assert abs(chosen.high - above) <= found.width * 1.0001
    if found.low < 0:
        # The value of that rank from the top: ties at a rank go to the other neighbour.
        other = np.quantile(values, cut, method="higher")
        assert below - found.width * 1.0001 <= chosen.low <= other + found.width * 1.0001


def test_percentile_interpolates_inside_the_bin() -> None:
    values = (np.arange(1000) / 1000).astype(np.float32)
    coarse = distribution(values, bins=4)
    assert coarse.counts.tolist() == [250, 250, 250, 250]
    assert percentile(coarse, 90.0).high == pytest.approx(0.9)
    assert ends(percentile(distribution(values - 0.5, bins=4), 90.0)) == pytest.approx((-0.45, 0.45))
    assert percentile(coarse, 100.0) == min_max(coarse)
    with pytest.raises(ValueError, match="not 0"):
        percentile(coarse, 0.0)


def test_percentile_cuts_the_far_end_of_one_sided_data() -> None:
    values = np.linspace(0, 1, 10_001, dtype=np.float32)
    up, down = percentile(distribution(values), 99.0), percentile(distribution(-values), 99.0)
    assert ends(up) == pytest.approx((0.0, 0.99), abs=1e-3)
    assert ends(down) == pytest.approx((-0.99, 0.0), abs=1e-3)


def quantized(values: Array, chosen: Range, *, symmetric: bool = False) -> Array:
    qmin, qmax = (-127, 127) if symmetric else (0, 255)
    scale, zero = affine_parameters(chosen, qmin=qmin, qmax=qmax, symmetric=symmetric)
    codes = np.clip(np.rint(values.astype(np.float64) / scale) + zero, qmin, qmax)
    return np.asarray((codes - zero) * float(scale))


def true_error(values: Array, chosen: Range, *, symmetric: bool = False) -> float:
    return float(np.mean((quantized(values, chosen, symmetric=symmetric) - values) ** 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shrink", [1.0, 0.5, 0.03])
def test_quantization_error_predicts_the_error_of_the_values(kind: str, shrink: float) -> None:
    values = activations(kind)
    found = distribution(values)
    chosen = Range(found.low * shrink, found.high * shrink)
    assert quantization_error(found, chosen) == pytest.approx(true_error(values, chosen), rel=0.03)


@settings(deadline=None)
@given(ORDINARY, BINS)
def test_mse_is_never_worse_than_min_max(values: Array, bins: int) -> None:
    found = distribution(values, bins=bins)
    best, full = quantization_error(found, mse(found)), quantization_error(found, min_max(found))
    assert best <= full * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_finds_the_best_of_a_dense_grid(kind: str) -> None:
    found = distribution(activations(kind), bins=512)
    chosen = mse(found)
    full = min_max(found).with_zero()
    grid = np.geomspace(1 / 100, 1, 60)
    bounds = itertools.product(grid if full.low else [1.0], grid if full.high else [1.0])
    errors = (quantization_error(found, Range(full.low * a, full.high * b)) for a, b in bounds)
    assert quantization_error(found, chosen) <= min(errors) * 1.005


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_lowers_the_error_of_the_values(kind: str, symmetric: bool) -> None:
    values = activations(kind)
    found = distribution(values)
    chosen = mse(found, symmetric=symmetric)
    full = min_max(found, symmetric=symmetric)
    before = true_error(values, full, symmetric=symmetric)
    assert true_error(values, chosen, symmetric=symmetric) <= before * (1.01 if kind in EVEN else 1)


def naive_divergence(counts: Array, first: int, last: int, levels: int) -> float:
    """The method as published, bin by bin, but for a trace in empty groups."""
    p = counts[first:last].astype(float)
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q = np.zeros_like(p)
    for level in range(levels):
        start, stop = ((last - first) * at // levels for at in (level, level + 1))
        filled = p[start:stop] > 0
        if filled.any():
            kept = counts[first:last][start:stop].sum()
            q[start:stop][filled] = max(kept, 1e-4) / filled.sum()
    p, q = p[p > 0] / p.sum(), q[p > 0] / counts[first:last].sum()
    return float(np.sum(p * np.log(p / q)))


def despiked(found: Distribution) -> Array:
    counts: Array = found.counts.copy()
    zero = -found.start
    counts[zero] -= found.zeros
    sides = [counts[at] for at in (zero - 1, zero + 1) if 0 <= at < counts.size]
    counts[zero] = min(counts[zero], max(sides))
    return counts


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(["abs", "laplace", "sparse", "spike"]))
def test_kl_chooses_the_end_with_least_divergence(seed: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    x = np.abs(generator.laplace(size=3000)).astype(np.float32)
    values = {
        "abs": x,
        "laplace": x**2,
        "sparse": np.append(x[:40], np.float32(50)),
        "spike": np.append(np.zeros(5000, np.float32), x),
    }[kind]
    found = distribution(values, bins=128).with_zero()
    counts, size = despiked(found), found.counts.size
    divergences = {
        min((found.start + last) * found.width, found.high): naive_divergence(counts, 0, last, 16)
        for last in range(16, size + 1)
    }
    chosen = kl_divergence(found, levels=16)
    assert chosen.low == 0.0
    assert divergences[chosen.high] <= min(divergences.values()) + 1e-9


@pytest.mark.parametrize("method", [kl_divergence, mse])
@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_codes_give_half_their_levels_to_the_magnitudes(method: Method, kind: str) -> None:
    found = distribution(activations(kind))
    assert method(found, symmetric=True).high == method(found.magnitudes(), 128).high
    assert method(found, 64, symmetric=True).high == method(found.magnitudes(), 32).high


def test_kl_searches_both_ends_of_signed_data() -> None:
    values = np.concatenate([activations("normal"), np.linspace(4, 30, 20, dtype=np.float32)])
    found = distribution(values)
    chosen = kl_divergence(found)
    edges = found.edges.clip(found.low, found.high)
    first, last = (int(np.flatnonzero(edges == end)[0]) for end in (chosen.low, chosen.high))
    counts = despiked(found)
    best = naive_divergence(counts, first, last, 256)
    assert chosen.low < -3 < 4 < chosen.high < 20
    others = itertools.product(range(0, -found.start, 31), range(found.counts.size, -found.start, -61))
    for low, high in others:
        if high - low >= 256:
            assert best <= naive_divergence(counts, low, high, 256) + 5e-4


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("method", [percentile, kl_divergence, mse])
@pytest.mark.parametrize("symmetric", [False, True])
def test_lone_outliers_are_clipped(relu: bool, method: Method, symmetric: bool) -> None:
    # One outlier is worth its squared distance r^2 among n values, and costs the others (r / 255)^2 / 12.
    bulk = activations("relu" if relu else "normal")
    found = distribution(*[bulk] * 200, f32([60, 1 if relu else -45]))
    chosen = method(found, symmetric=symmetric)
    assert 3 < chosen.high < 20
    assert -20 < chosen.low <= (0 if relu and not symmetric else -3)


@pytest.mark.parametrize("method", [kl_divergence, mse])
def test_zeros_left_by_relu_do_not_narrow_the_range(method: Method) -> None:
    values = np.maximum(activations("laplace"), 0)
    without = method(distribution(values[values > 0]))
    spiked = method(distribution(values, np.zeros(2_000_000, np.float32)))
    assert spiked.high >= without.high * 0.9
    signed = np.concatenate([activations("laplace"), np.zeros(2_000_000, np.float32)])
    assert method(distribution(signed)).high >= method(distribution(activations("laplace"))).high * 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "values", [[0.0], [-2.5], [7.0], [1e-45], [-1e-40, 1e-40], [9e29], [1000.0, 1000.0001]]
)
def test_degenerate_data_gives_usable_parameters(
    method: Method, symmetric: bool, values: list[float]
) -> None:
    array = f32(values)
    chosen = method(distribution(array), symmetric=symmetric)
    limits = {"qmin": -127, "qmax": 127} if symmetric else {"qmin": 0, "qmax": 255}
    scale, _ = affine_parameters(chosen, **limits, symmetric=symmetric)
    assert np.finfo(np.float32).tiny <= scale < np.inf
    back = quantized(array, chosen, symmetric=symmetric)
    np.testing.assert_allclose(back, array, rtol=0.005, atol=1e-37)


ENDS = st.floats(width=32, allow_nan=False, allow_infinity=False)
GRIDS = st.sampled_from(
    [(0, 255, False), (-128, 127, False), (-128, 127, True), (-127, 127, True), (0, 255, True)]
)
WIDE_GRIDS = st.sampled_from([(0, 65535, False), (0, 15, False), (-8, 7, True), (0, 15, True)])


@settings(deadline=None)
@given(ENDS, ENDS, GRIDS | WIDE_GRIDS)
def test_affine_parameters(a: float, b: float, grid: tuple[int, int, bool]) -> None:
    chosen = Range(min(a, b), max(a, b))
    qmin, qmax, symmetric = grid
    scale, zero = affine_parameters(chosen, qmin=qmin, qmax=qmax, symmetric=symmetric)
    assert isinstance(scale, np.float32)
    assert isinstance(zero, int)
    assert np.finfo(np.float32).tiny <= scale <= np.finfo(np.float32).max
    assert qmin <= zero <= qmax
    assert not symmetric or zero == (qmin + qmax + 1) // 2
    for end in (chosen.low, 0.0, chosen.high):
        code = min(max(round(end / float(scale)) + zero, qmin), qmax)
        assert abs((code - zero) * float(scale) - end) <= float(scale) * (0.5 + 1e-7 * (qmax - qmin))


def test_affine_parameters_known_values() -> None:
    assert affine_parameters(Range(-1, 1), qmin=-128, qmax=127, symmetric=True) == (np.float32(1 / 127), 0)
    assert affine_parameters(Range(0, 6), qmin=0, qmax=255) == (np.float32(6 / 255), 0)
    assert affine_parameters(Range(2, 6), qmin=0, qmax=255) == (np.float32(6 / 255), 0)
    assert affine_parameters(Range(-1, 3), qmin=0, qmax=255) == (np.float32(4 / 255), 64)
    assert affine_parameters(Range(0, 0), qmin=-128, qmax=127) == (np.float32(1), -128)


@pytest.mark.parametrize("bounds", [(math.inf, -math.inf), (0, math.inf), (math.nan, 1), (2, 1)])
def test_affine_parameters_refuse_what_is_not_a_range(bounds: tuple[float, float]) -> None:
    with pytest.raises(CalibrationError, match="not a range"):
        affine_parameters(Range(*bounds), qmin=0, qmax=255)
