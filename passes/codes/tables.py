"""Few values that stand for many: k-means in one dimension.

In one dimension clusters are intervals of the sorted values, so that the best ones are found by dynamic
programming (Bellman, "A note on cluster analysis and dynamic programming", 1973), here over intervals of a
histogram, and then moved by Lloyd's iterations on the values themselves, with sums of sorted prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxslim.ir.graph import Array
from onnxslim.passes.repair.support import support

Doubles = NDArray[np.float64]
Codes = NDArray[np.uint8]

# Bits of a code at the most.
MOST_BITS = 8
# Intervals that dynamic programming starts from, with few and with many clusters; iterations after it.
FEW_BINS, MANY_BINS, ITERATIONS = 256, 512, 100
_MANY = 32


@dataclass(frozen=True, eq=False)
class Codebook:
    """A weight as codes into tables.

    Attributes:
        codes: uint8, of the shape of the weight.
        tables: of the type of the weight, shape (tables, 2**bits), each in ascending order.
        axis: of the weight; its slices have tables of their own, as many next to one another as share one.
        group: how many these are; 0 if there is one table for all.
        scales: of the type of the weight, factor of every slice along the axis, or one of all; None if all
            are 1.
        even: whether entries are whole numbers that follow one another, so that no table need be stored.
    """

    codes: Codes
    tables: Array
    axis: int = 0
    group: int = 0
    scales: Array | None = None
    even: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.even else int(self.tables.shape[1]).bit_length() - 1

    @property
    def which(self) -> NDArray[np.intp]:
        """The table of every slice along the axis, in a shape that broadcasts against the codes."""
        return tables_along(self.codes.shape, self.axis, self.group)

    def values(self) -> Array:
        """What the codes stand for."""
        found = np.asarray(self.tables[self.which, self.codes])
        return found if self.scales is None else np.asarray(found * self.factors(self.scales))

    def factors(self, scales: Array) -> Array:
        """One value per slice along the axis, in a shape that broadcasts against the codes."""
        return along(scales, self.codes.ndim, self.axis)


def tables_along(shape: tuple[int, ...], axis: int, group: int) -> NDArray[np.intp]:
    """The number of the table of every slice along an axis, in a shape that broadcasts against the whole."""
    sizes = [1] * len(shape)
    if not group:
        return np.zeros(sizes, np.intp)
    sizes[axis] = shape[axis]
    return (np.arange(shape[axis]) // group).reshape(sizes)


def along(values: Array, rank: int, axis: int) -> Array:
    """Values along one axis, in a shape that broadcasts against all axes."""
    return values.reshape([-1 if at == axis else 1 for at in range(rank)])


def nearest(
    values: Array,
    bits: int,
    axis: int = 0,
    group: int = 0,
    weights: Array | None = None,
    *,
    scaled: bool = False,
) -> Codebook:
    """Codes of the least squared error; none where a table has no more than 2**bits different values.

    Tables of a sparse weight have an entry that is zero, which its zeros read.

    Args:
        values: finite, of any shape.
        bits: of a code, 1 to 8.
        axis, group: see `Codebook`.
        weights: what the square of the error of each value counts, not negative; the same for all if None.
        scaled: whether slices along the axis have factors, unless tables alone keep all values.
    """
    which = np.broadcast_to(tables_along(values.shape, axis, group), values.shape).ravel()
    places = [which == index if group else slice(None) for index in range(int(which.max(initial=0)) + 1)]
    flat, scales = values.ravel(), None
    weighed = None if weights is None else np.asarray(weights, np.float64).ravel()
    sparse = support(flat) is not None
    if scaled and any(len(np.unique(flat[here])) > 1 << bits for here in places):
        scales = _norms(values, axis)
        factors = np.broadcast_to(along(scales, values.ndim, axis), values.shape).astype(np.float64).ravel()
        flat = flat / factors
        weighed = factors**2 if weighed is None else weighed * factors**2
    codes = np.empty(flat.size, np.uint8)
    tables = []
    for here in places:
        table = _clustered(flat[here], 1 << bits, None if weighed is None else weighed[here], sparse=sparse)
        tables.append(table.astype(values.dtype))
        codes[here] = codes_of(flat[here], tables[-1])
    return Codebook(codes.reshape(values.shape), np.stack(tables), axis, group, scales)


def even(values: Array, steps: Array, axis: int = 0, group: int = 0) -> Codebook:
    """The nearest codes into tables of even steps around zero, of as many entries as it takes.

    Args:
        values: finite, of any shape.
        steps: of all slices along the axis, shape (1,), or of each of them, which are then factors; they are
            larger where 255 entries are not enough.
        axis, group: see `Codebook`.
    """
    rest = tuple(at for at in range(values.ndim) if at != axis)
    largest = np.abs(values.astype(np.float64)).max(axis=rest if steps.size > 1 else None)
    scales = np.maximum(np.maximum(steps, largest / 127), float(np.finfo(values.dtype).tiny))
    codes = np.rint(values / along(scales, values.ndim, axis))
    least, most = int(codes.min(initial=0)), int(codes.max(initial=0))
    count = -(-values.shape[axis] // group) if group else 1
    tables = np.tile(np.arange(least, most + 1).astype(values.dtype), (count, 1))
    scales = scales.astype(values.dtype)
    return Codebook((codes - least).astype(np.uint8), tables, axis, group, scales, even=True)


def _clustered(values: Array, count: int, weights: Doubles | None, *, sparse: bool) -> Doubles:
    """See `clustered`; of a sparse weight with an entry for zeros, whatever the others are."""
    if not sparse:
        return clustered(values, count, weights)
    others = values != 0
    found = clustered(values[others], count - 1, None if weights is None else weights[others])
    return np.sort(np.append(found, 0.0))


def _norms(values: Array, axis: int) -> Array:
    """Roots of the mean squares of slices along an axis; 1 where these are zero."""
    rest = tuple(at for at in range(values.ndim) if at != axis)
    found = np.sqrt(np.square(values.astype(np.float64)).mean(axis=rest)).astype(values.dtype)
    return np.asarray(np.where(found > 0, found, np.ones_like(found)))


def codes_of(values: Array, table: Array) -> Codes:
    """The nearest entry of an ascending table for each value, the lowest of several."""
    return np.asarray(np.searchsorted(middles(table), values.astype(np.float64), side="left"), np.uint8)


def middles(table: Array) -> Doubles:
    """Where the nearest entry of an ascending table becomes the next one."""
    wide = table.astype(np.float64)
    return np.asarray((wide[..., 1:] + wide[..., :-1]) / 2.0)


def clustered(values: Array, count: int, weights: Doubles | None = None) -> Doubles:
    """The values of least weighted squared error that so many clusters can have, ascending.

    Args:
        values: of one dimension, finite.
        count: clusters; where there are fewer different values, the highest is there several times.
        weights: of the values, not negative; the same for all if None.
    """
    found, place = np.unique(values.astype(np.float64), return_inverse=True)
    if len(found) <= count:
        return _filled(found if len(found) else np.zeros(1), count)
    weighed = np.bincount(place.ravel(), weights, minlength=len(found)).astype(np.float64)
    if not weighed.any():
        weighed += 1.0
    else:  # what counts nothing has a place all the same
        weighed += 1e-9 * weighed.mean()
    return _filled(_Sorted(found, weighed)(count), count)


def _filled(table: Doubles, count: int) -> Doubles:
    """A table with its highest value once more wherever there are fewer values than entries."""
    return np.concatenate((table, np.repeat(table[-1:], count - len(table))))


class _Sorted:
    """Different values in ascending order, with weights."""

    def __init__(self, values: Doubles, weights: Doubles) -> None:
        self._values = values
        zero = np.zeros(1)
        # Sums of prefixes cancel less around the mean.
        self._middle = float(np.average(values, weights=weights))
        around = values - self._middle
        self._w = np.concatenate((zero, np.cumsum(weights)))
        self._wx = np.concatenate((zero, np.cumsum(weights * around)))
        self._wxx = np.concatenate((zero, np.cumsum(weights * around**2)))

    def __call__(self, count: int) -> Doubles:
        """Centres of so many clusters, fewer than there are values; or of fewer."""
        centres = self._means(self._planned(self._bins(MANY_BINS if count > _MANY else FEW_BINS), count))
        for _ in range(ITERATIONS):
            inner = np.searchsorted(self._values, middles(centres), side="right")
            ends = np.concatenate(([0], inner, [len(self._values)]))
            if (np.diff(ends) == 0).any():  # bins of the plan always hold some value: no better one
                break
            moved = self._means(ends)
            if np.array_equal(moved, centres):
                break
            centres = moved
        return centres

    def _means(self, ends: NDArray[np.intp]) -> Doubles:
        return np.asarray(self._middle + np.diff(self._wx[ends]) / np.diff(self._w[ends]))

    def _bins(self, count: int) -> NDArray[np.intp]:
        """Ends of intervals, half of them of as much weight each, half as wide as one another."""
        if len(self._values) <= count:
            return np.arange(len(self._values) + 1)
        by_weight = np.searchsorted(self._w, np.linspace(0.0, self._w[-1], count // 2 + 1))
        by_width = np.searchsorted(
            self._values, np.linspace(self._values[0], self._values[-1], count // 2 + 1), side="left"
        )
        ends = np.unique(np.concatenate((by_weight, by_width, [0, len(self._values)])))
        if len(ends) > count // 2:
            return ends
        # Few of them hold nearly all values, or nearly all of the weight.
        by_number = np.linspace(0, len(self._values), count // 2 + 1).astype(np.intp)
        return np.unique(np.concatenate((ends, by_number)))

    def _planned(self, bins: NDArray[np.intp], count: int) -> NDArray[np.intp]:
        """Ends of the clusters of least error that consist of whole intervals."""
        w, wx, wxx = (sums[bins] for sums in (self._w, self._wx, self._wxx))
        # A row for each end, so that the best start is looked for along memory.
        weight, first, second = (each[:, None] - each[None, :] for each in (w, wx, wxx))
        cost = np.where(weight > 0, second - first**2 / np.where(weight > 0, weight, 1.0), np.inf)
        best, steps = cost[:, 0], []
        for _ in range(min(count, len(bins) - 1) - 1):
            total = cost + best
            steps.append(total.argmin(axis=1))
            best = np.take_along_axis(total, steps[-1][:, None], axis=1)[:, 0]
        ends = [len(bins) - 1]
        for step in reversed(steps):
            ends.append(int(step[ends[-1]]))
        return bins[[0, *reversed(ends)]]
