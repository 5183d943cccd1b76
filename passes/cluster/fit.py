"""Codes and tables by what layers see: codes by coordinate descent, tables by regression, in turn.

With C the covariance of what a layer sees and E the error of its weights, the error of its outputs is
E C E^T. Given the tables, every code is taken to the best entry while the others stay, as integers are when
weights are rounded (`passes.quantize.descent`). Given the codes, the entries are linear parameters of the
layer, and the best ones those of a linear regression: with S the matrix that tells which entry each weight
reads, S^T C S t = S^T C w, solved by conjugate gradients (Hestenes and Stiefel, 1952), since C times a weight
costs the same however many entries there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Doubles, Gram
from onnxslim.ir.graph import Array
from onnxslim.ops.layers import Floats, Layer
from onnxslim.passes.cluster.tables import Codebook, middles, nearest
from onnxslim.passes.quantize.descent import Descent, Pulls, by_input, by_output
from onnxslim.passes.quantize.rounding import damped
from onnxslim.passes.repair.conjugate import conjugate_gradients

# Rounds of descent and regression.
ROUNDS = 6


@dataclass(frozen=True)
class Clustering:
    """How one weight is stored.

    Attributes:
        bits: of a code.
        group: output channels that share a table; 0 if all do.
        scaled: whether output channels have factors; None leaves it open, and there are none.
    """

    bits: int
    group: int = 0
    scaled: bool | None = None

    def of(self, values: Floats, axis: int) -> Codebook:
        """Codes that come nearest to values, without data; see `tables.nearest`."""
        return nearest(values, self.bits, axis, self.group, scaled=bool(self.scaled))

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
        kind, axis = layer.weight.dtype, layer.weight_axis
        weight = layer.restored(wanted).astype(kind)
        counts = layer.stored(_split(layer, np.broadcast_to(diagonal, wanted.shape)))
        start = nearest(weight, self.bits, axis, self.group, counts, scaled=bool(self.scaled))
        scale = np.float32(layer.scale)
        scales = np.ones(weight.shape[axis], kind) if start.scales is None else start.scales
        work = TableDescent(
            by_input(np.asarray(wanted / scale, np.float32)),
            by_input(layer.matrix_of(start.codes)),
            start.tables.astype(np.float32),
            _of_outputs(layer, start.which).astype(np.intp),
            _of_outputs(layer, start.factors(scales)),
        )
        work.fit(Pulls.of(curvature))
        codes = layer.stored(_split(layer, by_output(work.codes))).astype(np.uint8)
        book = replace(start, codes=codes, tables=work.tables.astype(kind))
        restored: Floats = layer.matrix_of(book.values())
        return book, restored * scale


def _of_outputs(layer: Layer, values: Array) -> Floats:
    """Values that broadcast against a weight and do not differ by input, as (groups, outputs)."""
    spread: Floats = layer.matrix_of(np.broadcast_to(values, layer.weight.shape))
    return spread[..., 0]


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
    """

    def __init__(
        self, target: Floats, codes: Floats, tables: Floats, which: NDArray[np.intp], scales: Floats
    ) -> None:
        self._which, self._scales = which, scales
        super().__init__(target, codes, tables, (0, tables.shape[1] - 1))

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

    def fit(self, pulls: Pulls) -> None:
        """Codes and tables in turn, until the codes stay or rounds are over."""
        for _ in range(ROUNDS):
            changed = self.sweep(pulls)
            self.regress(pulls)
            if not changed:
                break

    def _nearest(self, at: int, wanted: Floats) -> tuple[Floats, Floats]:
        wanted = wanted / self._scales
        if len(self.steps) == 1:
            code = np.searchsorted(self._middles[0], wanted)
        else:
            code = (wanted[..., None] > self._middles[self._which]).sum(axis=-1)
        if self._held is not None:
            code = np.where(self._held[at], code, self._zeros)
        return code.astype(np.float32), self.steps[self._which, code.astype(np.intp)] * self._scales

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
        tables, before = self.steps, self._lost(pulls)
        self.take((tables + change.reshape(tables.shape)).astype(np.float32))
        if self._lost(pulls) < before:
            self._ordered(self.steps)
        else:
            self.take(tables)

    def _lost(self, pulls: Pulls) -> float:
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
