"""Streaming statistics of activations, and the quantization ranges chosen from them.

An observer sees an array at a time and keeps a summary of fixed size. `MinMax` and `Histogram` are exact:
however the values are cut into arrays, whichever order those come in and however shards are merged, the
result is the same to the last bit.

`Histogram.result()` is a `Distribution`, from which `min_max`, `percentile`, `kl_divergence` and `mse` each
choose a `Range`, and `affine_parameters` turns a range into a scale and a zero point.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxslim.errors import CalibrationError
from onnxslim.ir.graph import MASK_MAGNITUDE

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[Any]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_BLOCK = 1 << 17  # values per step: a block and its bin indices stay in the L2 cache
_LANES = 4
_MIN_EXPONENT = -126  # 2**126 and its inverse are both normal float32 numbers
_RUN = 256
_LARGE = 28 * 28  # positions of a map of which every other row and column are enough for a mean
_GRID = 2.0**-20  # sums of up to 8e12 fit
_TINY = math.ldexp(1.0, _MIN_EXPONENT)  # smallest normal float32
_TRACE = 1e-4  # counts given to a group of bins that clipped values alone fall into, as MXNet does
_COARSE = 2.0**0.6
# Factors for the ends of a range: all of it down to 1/512, then three times a finer look around the best.
_SHRINKS = (
    _COARSE ** -np.arange(16.0),
    *((_COARSE**zoom) ** np.linspace(1.0, -1.0, 9) for zoom in (1.0, 0.25, 0.0625)),
)


class Observer(ABC):
    """A mergeable summary of a stream of arrays."""

    @abstractmethod
    def update(self, array: Array) -> None:
        """Take in every element of an array."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in everything another observer of the same kind and settings has seen."""

    @abstractmethod
    def result(self) -> object:
        """The summary so far; raises CalibrationError when nothing usable was seen."""


@dataclass(frozen=True)
class Range:
    """A closed interval of real values."""

    low: float
    high: float

    def with_zero(self) -> Range:
        """The smallest range that holds this one and zero, as every quantized range must."""
        return Range(min(self.low, 0.0), max(self.high, 0.0))


class _Bounds(Observer):
    """The exact range of a stream, and counts of what stays out of it.

    Any real dtype is accepted; float64 and wide integers are rounded to float32 first. NaN, infinities and
    mask constants (`MASK_MAGNITUDE` and beyond) are only counted and never reach the range: whether one of
    them is an error is for the caller to say, who knows the tensor's name.

    Attributes:
        low, high: the range so far; +inf and -inf while there is none.
        count: ordinary elements seen.
        nan, posinf, neginf, masked: elements kept out, by kind.
    """

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self.count = 0
        self.nan = 0
        self.posinf = 0
        self.neginf = 0
        self.masked = 0

    @property
    def irregular(self) -> str:
        """What keeps the range from telling all, in words; empty if it holds every value."""
        if self.nan or self.posinf or self.neginf:
            return "NaN or infinite values"
        return "mask values" if self.masked else ""

    def update(self, array: Array) -> None:
        """Take in every element of an array of any shape and real dtype."""
        for block in _blocks(np.asarray(array)):
            low, high = block.min(), block.max()
            if low > -MASK_MAGNITUDE and high < MASK_MAGNITUDE:  # false for NaN as well
                self._admit(block, low, high)
            elif (ordinary := self._set_aside(block)).size:
                self._admit(ordinary, ordinary.min(), ordinary.max())

    def merge(self, other: Self) -> None:
        """Take in what another observer has seen."""
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)
        self.count += other.count
        self.nan += other.nan
        self.posinf += other.posinf
        self.neginf += other.neginf
        self.masked += other.masked

    def _admit(self, block: Array, low: float, high: float) -> None:
        # Adding 0.0 turns -0.0 into 0.0, so that the sign of zero cannot depend on which came first.
        self.low = min(self.low, float(np.float32(low)) + 0.0)
        self.high = max(self.high, float(np.float32(high)) + 0.0)
        self.count += block.size

    def _set_aside(self, block: Array) -> Array:
        ordinary: Array = block[np.abs(block) < MASK_MAGNITUDE]
        nan = int(np.isnan(block).sum())
        posinf = int((block == math.inf).sum())
        neginf = int((block == -math.inf).sum())
        self.nan += nan
        self.posinf += posinf
        self.neginf += neginf
        self.masked += block.size - ordinary.size - nan - posinf - neginf
        return ordinary

    def _require_values(self) -> None:
        if not self.count:
            aside = f"{self.nan} NaN, {self.posinf + self.neginf} infinite and {self.masked} mask values"
            raise CalibrationError(f"no ordinary value was observed (besides {aside})")


class MinMax(_Bounds):
    """Smallest and largest ordinary value, exact in float32."""

    def result(self) -> Range:
        """The range of the ordinary values."""
        self._require_values()
        return Range(self.low, self.high)


class Histogram(_Bounds):
    """Counts in bins of equal width over the exact range of the values, signed.

    A bin is w = 2**exponent wide and holds the values with floor(x / w) = its index. w is the smallest power
    of two for which the range seen so far fits into `bins` bins; doubling it merges indices 2i and 2i + 1.
    Scaling by a power of two is exact, so the counts depend on the values alone and not on how they came.

    Args:
        bins: most bins to use, at least 2; between half of them and all are in use, unless the values
            are so close together that float32 itself is coarser.

    Attributes:
        zeros: how many values are exactly zero.
        exponent, start, counts: width and index of the first bin, and all counts; see `Distribution`.
    """

    def __init__(self, bins: int = 2048) -> None:
        if not 2 <= bins <= 1 << 20:
            raise ValueError(f"bins must be between 2 and {1 << 20}, not {bins}")
        super().__init__()
        self.bins = bins
        self.zeros = 0
        self._every = 1
        self.exponent = _MIN_EXPONENT
        self.start = 0
        self.counts: Counts = np.zeros(bins, np.int64)

    def update(self, array: Array, every: int = 1) -> None:
        """Take in every element of an array of any shape and real dtype.

        Args:
            array: the values.
            every: put only every n-th of them into bins; range and `count` are those of all the same.
        """
        self._every = every
        super().update(array)

    def merge(self, other: Self) -> None:
        """Take in what another histogram with the same number of bins has seen."""
        if other.bins != self.bins:
            raise ValueError(f"cannot merge histograms of {self.bins} and {other.bins} bins")
        super().merge(other)
        self.zeros += other.zeros
        if other.count:
            self._cover()
            self.counts += _regroup(
                other.counts, other.exponent, other.start, self.exponent, self.start, self.bins
            )

    def result(self) -> Distribution:
        """What was seen, with the unused bins cut off."""
        self._require_values()
        counts = self.counts[: _index(self.high, self.exponent) - self.start + 1].copy()
        return Distribution(self.low, self.high, self.zeros, self.exponent, self.start, counts, self.bins)

    def _admit(self, block: Array, low: float, high: float) -> None:
        grown = low < self.low or high > self.high
        super()._admit(block, low, high)
        if grown:
            self._cover()
        values = block[:: self._every].astype(np.float32, copy=False)
        self.zeros += int(np.count_nonzero(values == 0))
        self.counts += _tally(values, self.exponent, self.start, self.bins)

    def _cover(self) -> None:
        exponent, start = _layout(self.low, self.high, self.bins)
        if (exponent, start) != (self.exponent, self.start):
            self.counts = _regroup(self.counts, self.exponent, self.start, exponent, start, self.bins)
            self.exponent, self.start = exponent, start


@dataclass(frozen=True, eq=False)
class Distribution:
    """A finished histogram.

    Attributes:
        low, high: exact range of the values.
        zeros: how many of them are exactly zero.
        exponent: bins are 2**exponent wide.
        start: index of the first bin; bin i covers [(start + i) * width, (start + i + 1) * width).
        counts: values per bin, int64, shape (used bins,).
        bins: most bins it may be given.
    """

    low: float
    high: float
    zeros: int
    exponent: int
    start: int
    counts: Counts
    bins: int

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> Floats:
        """Bin boundaries, float64, shape (used bins + 1,)."""
        return np.arange(self.start, self.start + self.counts.size + 1, dtype=np.float64) * self.width

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def with_zero(self) -> Distribution:
        """The same counts in bins that reach to zero: a quantized range cannot leave it out."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        exponent = max(_layout(low, high, self.bins)[0], self.exponent)
        start = _index(low, exponent)
        used = _index(high, exponent) - start + 1
        counts = _regroup(self.counts, self.exponent, self.start, exponent, start, used)
        return Distribution(low, high, self.zeros, exponent, start, counts, self.bins)

    def magnitudes(self) -> Distribution:
        """The distribution of |x|; zero is a bin boundary, so that no bin is split."""
        index = self.start + np.arange(self.counts.size)
        index = np.where(index < 0, -index - 1, index)
        start = int(index.min())
        counts = np.zeros(int(index.max()) - start + 1, np.int64)
        np.add.at(counts, index - start, self.counts)
        low, high = max(self.low, -self.high, 0.0), max(-self.low, self.high)
        return Distribution(low, high, self.zeros, self.exponent, start, counts, self.bins)


def min_max(distribution: Distribution, *, symmetric: bool = False) -> Range:
    """The exact range of the values; with `symmetric`, the smallest that also holds their negatives."""
    if symmetric:
        return _mirrored(max(-distribution.low, distribution.high))
    return Range(distribution.low, distribution.high)


def percentile(distribution: Distribution, p: float = 99.99, *, symmetric: bool = False) -> Range:
    """The range that keeps `p` percent of the values.

    Half of the rest is cut from either end, or all of it from the far end where zero is not inside the range.
    With `symmetric`, the percentile of the magnitudes. Values are taken to be spread evenly over their bin.
    """
    if not 0.0 < p <= 100.0:
        raise ValueError(f"a percentile is above 0 and at most 100, not {p}")
    cut = 1.0 - p / 100.0
    if symmetric:
        return _mirrored(_quantile(distribution.magnitudes(), 1.0 - cut))
    if distribution.low >= 0.0:
        return Range(distribution.low, _quantile(distribution, 1.0 - cut))
    if distribution.high <= 0.0:
        return Range(_quantile(distribution, cut), distribution.high)
    return Range(_quantile(distribution, cut / 2.0), _quantile(distribution, 1.0 - cut / 2.0))


def kl_divergence(distribution: Distribution, levels: int = 256, *, symmetric: bool = False) -> Range:
    """The clipped range that loses least information on being reduced to `levels` values.

    Minimises KL(P || Q) over the places to clip: P is the histogram with the clipped mass moved into its end
    bins, Q the unclipped part averaged over `levels` groups of bins, bins empty in P left empty (Migacz,
    "8-bit Inference with TensorRT", GTC 2017). Here both ends are searched where values lie on either side of
    zero, and the bin of zero counts no more than its neighbours: zero is always exact, so that the spike a
    Relu leaves there says nothing about the range. A candidate has at least `levels` bins. Where clipped
    values land in an empty group, Q has a trace there instead of nothing, or no gap below an outlier could
    ever be cut at.
    """
    if symmetric:
        return _mirrored(kl_divergence(distribution.magnitudes(), levels // 2).high)
    whole = distribution.with_zero()
    first, last = _windows(whole, levels)
    if not first.size:
        return Range(whole.low, whole.high)
    divergence = _divergences(_without_spike(whole), first, last, levels)
    best = int(np.argmin(divergence))
    edges = whole.edges.clip(whole.low, whole.high)
    return Range(float(edges[first[best]]), float(edges[last[best]]))


def mse(distribution: Distribution, levels: int = 256, *, symmetric: bool = False) -> Range:
    """The range with the least mean squared quantization error, rounding and clipping together.

    Both ends are shrunk independently: over a geometric grid down to 1/512 of the full range, then in ever
    smaller steps around the best pair, to 2.6 percent of an end.
    """
    if symmetric:
        return _mirrored(mse(distribution.magnitudes(), levels // 2).high)
    whole = distribution.with_zero()
    low, high = whole.low, whole.high
    for fractions in _SHRINKS:
        lows = np.unique((low * fractions).clip(min=whole.low))
        highs = np.unique((high * fractions).clip(max=whole.high))[::-1]
        lows, highs = (ends.ravel() for ends in np.meshgrid(lows, highs))
        best = int(np.argmin(_errors(whole, lows, highs, levels)))
        low, high = float(lows[best]), float(highs[best])
    return Range(low, high)


def quantization_error(distribution: Distribution, chosen: Range, levels: int = 256) -> float:
    """Mean squared error of quantizing the values to `levels` even steps over a range.

    The range is widened to hold zero, and shifted by up to half a step to make zero exact. The error is
    integrated over every bin as if its values were spread evenly, exact zeros apart.
    """
    widened = chosen.with_zero()
    ends = np.array([widened.low]), np.array([widened.high])
    return float(_errors(distribution.with_zero(), *ends, levels)[0])


def affine_parameters(
    chosen: Range, *, qmin: int, qmax: int, symmetric: bool = False
) -> tuple[np.float32, int]:
    """Scale and zero point of x ~ scale * (q - zero_point), q in [qmin, qmax].

    The range is widened to hold zero, which always falls on an integer. `symmetric` puts the zero point in
    the middle (0 for int8, 128 for uint8). The scale is a normal float32: 1 for the range [0, 0].

    Raises:
        CalibrationError: the range is not finite or is upside down.
    """
    if not (math.isfinite(chosen.low) and math.isfinite(chosen.high) and chosen.low <= chosen.high):
        raise CalibrationError(f"[{chosen.low}, {chosen.high}] is not a range that can be quantized")
    low, high = chosen.with_zero().low, chosen.with_zero().high
    if symmetric:
        middle = (qmin + qmax + 1) // 2
        return _safe_scale(max(-low, high) / min(qmax - middle, middle - qmin)), middle
    # Divided one by one: the difference of two large float64 ends may overflow.
    scale = _safe_scale(high / (qmax - qmin) - low / (qmax - qmin))
    return scale, min(max(round(qmin - low / float(scale)), qmin), qmax)


class ChannelMeans(Observer):
    """The mean of each channel, the same to the last bit in whatever order batches and shards come.

    Of large maps, every other row and column is counted.

    Sums of a batch are rounded to a fixed grid, on which adding up is exact.

    Args:
        axis: the one that runs over channels; the others are averaged over.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0
        self._sums: Counts | None = None

    def update(self, array: Array) -> None:
        """Take in an array whose number of channels is the same in every call."""
        if self.axis == 1 and array.ndim == 4 and math.prod(array.shape[2:]) >= _LARGE:
            array = array[:, :, ::2, ::2]  # neighbours on a large map tell the same
        moved = np.moveaxis(array, self.axis, 0)
        if not moved.size:
            return
        # Partial sums in single precision, over runs short enough not to lose digits.
        rows = moved.reshape(len(moved), -1).astype(np.float32, copy=False)
        partial = np.add.reduceat(rows, np.arange(0, rows.shape[1], _RUN), axis=1)
        sums = partial.sum(axis=1, dtype=np.float64)
        # What becomes NaN or infinite is not quantized, so that its means are of no use.
        steps = np.rint(np.nan_to_num(sums, nan=0.0, posinf=0.0, neginf=0.0) / _GRID)
        self._add(steps.astype(np.int64), rows.shape[1])

    def merge(self, other: Self) -> None:
        """Take in what another observer of the same axis has seen."""
        if other._sums is not None:
            self._add(other._sums, other.count)

    def result(self) -> Floats:
        """The means, float64, shape (channels,)."""
        if self._sums is None:
            raise CalibrationError("no value was observed")
        return np.asarray(self._sums * _GRID / self.count)

    def _add(self, sums: Counts, count: int) -> None:
        self._sums = sums if self._sums is None else self._sums + sums
        self.count += count


def _blocks(array: Array) -> Iterator[Array]:
    """The elements in pieces that fit the cache: float64 as it is, everything else as float32."""
    if not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise CalibrationError(f"values of type {array.dtype} cannot be observed: only real numbers can")
    flat = array.ravel(order="K")
    # Wide floats are narrowed only once their mask constants are out: as float32 those would be infinite.
    dtype = np.float64 if array.dtype.kind == "f" and array.dtype.itemsize > 4 else np.float32
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK].astype(dtype, copy=False)


def _index(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _layout(low: float, high: float, bins: int) -> tuple[int, int]:
    """Exponent of the narrowest bins that cover [low, high], and the index of the first.

    Bins are never narrower than the spacing of float32 numbers at the far end: indices then stay below 2**24,
    where float32 counts exactly.
    """
    spacing = math.frexp(max(-low, high, _TINY))[1] - 24
    exponent = max(spacing, _MIN_EXPONENT)
    while _index(high, exponent) - _index(low, exponent) >= bins:
        exponent += 1
    return exponent, _index(low, exponent)


def _regroup(
    counts: Counts, exponent: int, start: int, new_exponent: int, new_start: int, size: int
) -> Counts:
    """The counts in `size` bins that are as wide as before or wider."""
    used = np.flatnonzero(counts)
    result = np.zeros(size, np.int64)
    np.add.at(result, ((start + used) >> (new_exponent - exponent)) - new_start, counts[used])
    return result


@lru_cache(maxsize=8)
def _lanes(bins: int) -> NDArray[np.int32]:
    """Offsets that send neighbours to separate counters.

    After a Relu most neighbours are equal, and every count in one place would wait for the one before it.
    """
    offsets = np.tile(np.arange(_LANES, dtype=np.int32) * bins, _BLOCK // _LANES)
    offsets.setflags(write=False)
    return offsets


def _tally(values: NDArray[np.float32], exponent: int, start: int, bins: int) -> Counts:
    """How many of at most `_BLOCK` values fall into each bin."""
    # Wide bins scale down, and a tiny negative number would underflow to -0.0 and into the wrong bin.
    exact = np.float64 if exponent > 0 else np.float32
    scaled = np.multiply(values, exact(math.ldexp(1.0, -exponent)), dtype=exact)
    if start < 0:
        np.floor(scaled, out=scaled)
    codes = scaled.astype(np.int32)  # cuts off, which above zero is floor
    if start:
        codes -= start
    codes += _lanes(bins)[: codes.size]
    counts: Counts = np.bincount(codes, minlength=_LANES * bins).reshape(_LANES, bins).sum(axis=0)
    return counts


def _mirrored(magnitude: float) -> Range:
    return Range(-magnitude, magnitude)


def _quantile(distribution: Distribution, fraction: float) -> float:
    """The value below which a fraction of the values lies, linear inside a bin."""
    cumulative = np.cumsum(distribution.counts)
    target = fraction * cumulative[-1]
    at = min(int(np.searchsorted(cumulative, target)), cumulative.size - 1)
    inside = (target - cumulative[at]) / distribution.counts[at] + 1.0
    value = (distribution.start + at + inside) * distribution.width
    return min(max(float(value), distribution.low), distribution.high)


def _inexact(distribution: Distribution) -> Floats:
    """Counts of the values other than zero, which every grid has; the distribution reaches to zero."""
    counts = distribution.counts.astype(np.float64)
    counts[-distribution.start] -= distribution.zeros
    return counts


def _without_spike(distribution: Distribution) -> Floats:
    """Counts with no more around zero than in the fuller of the bins beside it."""
    counts = _inexact(distribution)
    zero = -distribution.start
    beside = np.concatenate([counts[max(zero - 1, 0) : zero], counts[zero + 1 : zero + 2]])
    if beside.size:
        counts[zero] = min(counts[zero], beside.max())
    return counts


def _windows(distribution: Distribution, levels: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First and one-past-last bin of every candidate range: they hold zero and at least `levels` bins."""
    size, zero = distribution.counts.size, -distribution.start
    one_sided = zero == 0 or zero == size - 1
    steps = size if one_sided else 48
    lows = np.unique(np.linspace(0, zero, min(steps, zero + 1)).astype(np.intp))
    highs = np.unique(np.linspace(size, zero + 1, min(steps, size - zero)).astype(np.intp))[::-1]
    first, last = (ends.ravel() for ends in np.meshgrid(lows, highs))
    enough = last - first >= levels
    return first[enough], last[enough]


def _divergences(
    counts: Floats, first: NDArray[np.intp], last: NDArray[np.intp], levels: int, chunk: int = 256
) -> Floats:
    """KL(P || Q) of every candidate window, see `kl_divergence`; infinite for a window without values."""
    pieces = range(0, first.size, chunk)
    return np.concatenate(
        [_divergence(counts, first[i : i + chunk], last[i : i + chunk], levels) for i in pieces]
    )


def _divergence(counts: Floats, first: NDArray[np.intp], last: NDArray[np.intp], levels: int) -> Floats:
    # Q is constant over the filled bins of a group, so that sums over groups replace sums over bins:
    # T * KL = sum_bins P log P - sum_groups P log(mass / filled) - T log T + T log S.
    mass, filled, entropy = (_cumulative(x) for x in (counts, counts > 0, _xlogx(counts)))
    group = first[:, None] + np.arange(levels + 1) * (last - first)[:, None] // levels
    inside, support = np.diff(mass[group]), np.diff(filled[group])
    reference = inside.copy()
    own = entropy[last] - entropy[first]
    for column, end, clipped in ((0, first, mass[first]), (-1, last - 1, mass[-1] - mass[last])):
        reference[:, column] += clipped
        support[:, column] += (counts[end] == 0) & (clipped > 0)
        own += _xlogx(counts[end] + clipped) - _xlogx(counts[end])
    average = np.maximum(inside, _TRACE) / np.maximum(support, 1.0)
    cross = (reference * np.log(average)).sum(axis=1)
    kept = mass[last] - mass[first]
    divergence = (own - cross) / mass[-1] + np.log(np.maximum(kept, _TRACE) / mass[-1])
    return np.where(kept > 0, divergence, np.inf)


def _cumulative(values: Array) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values)])


def _xlogx(values: Floats) -> Floats:
    return values * np.log(np.maximum(values, 1.0))  # counts: nothing lies between 0 and 1


def _errors(distribution: Distribution, lows: Floats, highs: Floats, levels: int, chunk: int = 32) -> Floats:
    """Mean squared error of each candidate range over a distribution that reaches to zero.

    In units of the step, t = x / step, the error of one value is (t - r)^2 with r its rounded and clipped
    code; r / 12 + (t - r)^3 / 3 is the integral of that from zero, up to a constant.
    """
    steps = np.maximum((highs - lows) / (levels - 1), _TINY)
    counts, result = _inexact(distribution), np.empty(steps.size)
    for i in range(0, steps.size, chunk):
        step = steps[i : i + chunk, None]
        scaled = distribution.edges / step
        least = np.rint(lows[i : i + chunk, None] / step)
        code = np.rint(scaled).clip(least, least + levels - 1)
        off = scaled - code
        integral = np.diff(code / 12.0 + off * off * off / 3.0) @ counts
        result[i : i + chunk] = integral * step[:, 0] ** 3
    return result / (distribution.width * distribution.total)


def _safe_scale(scale: float) -> np.float32:
    """The scale as a normal float32 that can be divided by."""
    bounded = min(max(scale, _TINY), float(np.finfo(np.float32).max))
    safe: np.float32 = np.float32(bounded if scale else 1.0)
    return safe
