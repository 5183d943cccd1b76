"""Codes and tables by what layers see: codes by coordinate descent, tables by regression, in turn.

With C the covariance of what a layer sees and E the error of its weights, the error of its outputs is
E C E^T. Given the tables, every code is taken to the best entry while the others stay, as integers are when
weights are rounded (`passes.quantize.descent`). Given the codes, the entries are linear parameters of the
layer, and the best ones those of a linear regression: with S the matrix that tells which entry each weight
reads, S^T C S t = S^T C w, solved by conjugate gradients (Hestenes and Stiefel, 1952), since C times a weight
costs the same however many entries there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Doubles, Gram
from onnxslim.engine.base import Effort
from onnxslim.ir.graph import Array
from onnxslim.ops.layers import Floats, Layer
from onnxslim.passes.codes.storing import sent_bytes
from onnxslim.passes.codes.tables import Codebook, even, middles, nearest
from onnxslim.passes.quantize.descent import Descent, Pulls, by_input, by_output
from onnxslim.passes.quantize.rate import Rate, least_steps, power_of
from onnxslim.passes.quantize.rounding import damped
from onnxslim.passes.repair.conjugate import conjugate_gradients

# Bits of codes of one length beside even ones at a price, at the most.
MOST_PACKED = 6
# Rounds of descent and regression.
ROUNDS: Mapping[Effort, int] = {"quick": 2, "normal": 6, "thorough": 12}


@dataclass(frozen=True)
class Clustering:
    """How one weight is stored.

    Attributes:
        bits: of a code.
        group: output channels that share a table; 0 if all do.
        scaled: whether output channels have factors; None leaves it open, and there are none.
        price: share of the power of what a layer makes, or of the weight by itself, that a bit is worth once
            the file is deflated; tables then have no more than `bits` asks for. See `passes.quantize.rate`.
        effort: how many rounds codes and tables are fitted.
    """

    bits: int
    group: int = 0
    scaled: bool | None = None
    price: float = 0.0
    effort: Effort = "normal"

    def of(self, values: Floats, axis: int) -> Codebook:
        """Codes that come nearest to values, without data; see `tables.nearest`."""
        if not self.price:
            return nearest(values, self.bits, axis, self.group, scaled=bool(self.scaled))
        shape = values.shape
        laid = _Layout(shape, lambda each: each.reshape(1, -1, 1).astype(np.float32), lambda each: each)
        alone = np.ones((1, 1, 1), np.float32)
        return self._descended(laid, laid.matrix(values), alone, self._start(values, axis, None, None))

    def fitted(self, layer: Layer, wanted: Floats, gram: Gram, *, corrected: bool) -> tuple[Codebook, Floats]:
        """Codes and tables by which a layer makes most nearly what it makes of what it sees.

        Args:
            layer: how its weight is laid out.
            wanted: weights it should have, as `Layer.matrix`.
            gram: moments of what it sees.
            corrected: whether a bias takes in the mean of the error.

        Returns:
            The codebook, and the matrix that it stands for.
        """
        curvature = damped(gram.gram if corrected else gram.raw().gram, gram.count)
        diagonal = np.einsum("gkk->gk", curvature)[:, None]
        weight = layer.restored(wanted).astype(layer.weight.dtype)
        laid = _Layout(weight.shape, layer.matrix_of, lambda each: layer.stored(_split(layer, each)))
        scale = np.float32(layer.scale)
        target = np.asarray(wanted / scale, np.float32)
        counts = laid.stored(np.broadcast_to(diagonal, wanted.shape))
        steps = least_steps(target, curvature, self.price)
        start = self._start(weight, layer.weight_axis, counts, steps)
        book = self._descended(laid, target, curvature, start)
        return book, laid.matrix(book.values()) * scale

    def _start(self, values: Array, axis: int, counts: Array | None, steps: Floats | None) -> Codebook:
        """Codes to start from: the nearest, or even ones whose steps are as fine as is worth their bits."""
        if not self.price:
            return nearest(values, self.bits, axis, self.group, counts, scaled=bool(self.scaled))
        if steps is None:
            flat = values.astype(np.float32).reshape(1, -1, 1)
            steps = least_steps(flat, np.ones((1, 1, 1), np.float32), self.price)
        apart = bool(self.scaled) and counts is not None and steps.size == values.shape[axis]
        return even(values, steps if apart else steps[:1], axis, self.group)

    def _descended(self, laid: _Layout, target: Floats, curvature: Floats, start: Codebook) -> Codebook:
        """Codes and tables fitted in turn, with bits at their price."""
        price, pulls = self.price * power_of(target, curvature), Pulls.of(curvature)
        work = self._work(laid, target, start, price)
        work.fit(pulls, ROUNDS[self.effort], regress=not price)
        found = self._book(laid, work, start)
        if not price:
            return found
        cost = work.lost(pulls) + price * 8 * sent_bytes(found)
        for other in self._packed(laid, target, curvature, found):
            work = self._work(laid, target, other, 0.0)
            work.fit(pulls, ROUNDS[self.effort])
            book = self._book(laid, work, other)
            theirs = work.lost(pulls) + price * 8 * sent_bytes(book)
            if theirs < cost:
                found, cost = book, theirs
        return found

    def _packed(self, laid: _Layout, target: Floats, curvature: Floats, even: Codebook) -> Iterator[Codebook]:
        """Codes of one length, about as many bits as even ones take."""
        shares = np.bincount(even.codes.ravel()) / even.codes.size
        bits = float(-(shares * np.log2(np.maximum(shares, 1e-30))).sum())
        diagonal = np.einsum("gkk->gk", curvature)[:, None]
        weight, counts = (
            laid.stored(each).reshape(laid.shape)
            for each in (target, np.broadcast_to(diagonal, target.shape))
        )
        scaled = even.scales is not None and even.scales.size > 1
        kind = even.tables.dtype
        for each in {math.floor(bits), math.ceil(bits)}.intersection(range(1, MOST_PACKED + 1)):
            yield nearest(weight.astype(kind), each, even.axis, even.group, counts, scaled=scaled)

    def _work(self, laid: _Layout, target: Floats, start: Codebook, price: float) -> TableDescent:
        scales = np.ones(laid.shape[start.axis], target.dtype) if start.scales is None else start.scales
        return TableDescent(
            by_input(target),
            by_input(laid.matrix(start.codes)),
            start.tables.astype(np.float32),
            laid.of_outputs(start.which).astype(np.intp),
            laid.of_outputs(start.factors(scales)),
            Rate(price, 0, start.tables.shape[1] - 1) if price else None,
        )

    def _book(self, laid: _Layout, work: TableDescent, start: Codebook) -> Codebook:
        """What has been found so far."""
        codes = laid.stored(by_output(work.codes)).reshape(laid.shape).astype(np.uint8)
        return replace(start, codes=codes, tables=work.tables.astype(start.tables.dtype))


@dataclass(frozen=True)
class _Layout:
    """How values of a weight are laid out to be fitted.

    Attributes:
        shape: of the weight.
        matrix: from values of that shape to float32 (groups, outputs, inputs).
        stored: the way back.
    """

    shape: tuple[int, ...]
    matrix: Callable[[Array], Floats]
    stored: Callable[[Floats], Array]

    def of_outputs(self, values: Array) -> Floats:
        """Values that broadcast against the weight and do not differ by input, as (groups, outputs)."""
        return self.matrix(np.broadcast_to(values, self.shape))[..., 0]


def _split(layer: Layer, matrix: Floats) -> Floats:
    """Values laid out as `Layer.matrix`, as [groups, inputs, outputs, *kernel]."""
    split = matrix.reshape(*matrix.shape[:2], layer.inputs, *layer.kernel)
    return np.asarray(split.swapaxes(1, 2))


class TableDescent(Descent):
    """Codes into tables on their way down, and the tables with them.

    Of a sparse weight, each table has an entry that is zero: it stays zero, and zeros stay with it.

    Args:
        target: weights wanted, float32 (inputs, groups, outputs).
        codes: to start from, of the same shape; not modified.
        tables: float32 (tables, entries), ascending.
        which: the table of every output, (groups, outputs).
        scales: the factor of every output, not zero, of the same shape.
        rate: what codes cost besides the error; None for nothing.
    """

    def __init__(
        self,
        target: Floats,
        codes: Floats,
        tables: Floats,
        which: NDArray[np.intp],
        scales: Floats,
        rate: Rate | None = None,
    ) -> None:
        self._which, self._scales = which, scales
        super().__init__(target, codes, tables, (0, tables.shape[1] - 1), rate=rate)

    @property
    def tables(self) -> Floats:
        """As they are now."""
        return self.steps

    def take(self, steps: Floats) -> None:
        """Have codes look up other tables from now on, ascending."""
        self.steps = steps
        self._middles = middles(steps).astype(np.float32)
        self._zeros = np.abs(steps).argmin(axis=1)[self._which].astype(np.float32)
        self._errors = self._looked_up(steps) - self._target

    def fit(self, pulls: Pulls, rounds: int, *, regress: bool = True) -> None:
        """Codes, and tables if they are to be moved, in turn, until the codes stay or rounds are over."""
        for _ in range(rounds):
            changed = self.sweep(pulls)
            if regress:
                self.regress(pulls)
            if not changed:
                break

    def _nearest(self, at: int, wanted: Floats) -> tuple[Floats, Floats]:
        place = wanted / self._scales
        if len(self.steps) == 1:
            code = np.searchsorted(self._middles[0], place).astype(np.float32)
        else:
            code = (place[..., None] > self._middles[self._which]).sum(axis=-1).astype(np.float32)
        if self._rate is not None:
            weight = self._weight[at]
            code = self._rate.best(
                code, lambda each: weight * np.square(self._worth(each) - wanted), *self._limits
            )
        if self._held is not None:
            code = np.where(self._held[at], code, self._zeros)
        return code, self._worth(code)

    def _worth(self, code: Floats) -> Floats:
        """What codes of one input stand for."""
        return np.asarray(self.steps[self._which, code.astype(np.intp)] * self._scales)

    def regress(self, pulls: Pulls) -> None:
        """The tables of least error for the codes; entries that are read nowhere stay."""
        place = (self.codes.astype(np.intp) + self.steps.shape[1] * self._which).ravel()
        shape, size = self._target.shape, self.steps.size

        def summed(values: Floats) -> Doubles:
            return np.asarray(np.bincount(place, (values * self._scales).ravel(), size), np.float64)

        def times(entries: Doubles) -> Doubles:
            spread = entries[place].reshape(shape).astype(np.float32) * self._scales
            return summed(pulls.times(spread))

        diagonal = summed(np.broadcast_to(pulls.weight * self._scales, shape))
        if self._held is not None:  # what has no diagonal stays
            diagonal *= self.steps.ravel() != 0
        change = conjugate_gradients(times, -summed(pulls.times(self._errors)), diagonal)
        tables, before = self.steps, self.lost(pulls)
        self.take((tables + change.reshape(tables.shape)).astype(np.float32))
        if self.lost(pulls) < before:
            self._ordered(self.steps)
        else:
            self.take(tables)

    def lost(self, pulls: Pulls) -> float:
        """E C E^T, summed over outputs."""
        return float((self._errors * pulls.times(self._errors)).sum(dtype=np.float64))

    def _ordered(self, tables: Floats) -> None:
        """Take tables whose entries may have passed one another."""
        order = np.argsort(tables, axis=1, kind="stable")
        places = np.argsort(order, axis=1, kind="stable")
        self.codes = places[self._which, self.codes.astype(np.intp)].astype(np.float32)
        self.take(np.take_along_axis(tables, order, axis=1))

    def _looked_up(self, tables: Floats) -> Floats:
        return np.asarray(tables[self._which, self.codes.astype(np.intp)] * self._scales)
