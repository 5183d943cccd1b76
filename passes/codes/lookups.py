"""Weights that a model looks up in tables, read back as `passes.codes.storing` writes them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.ir.graph import Array, Node, Tensor, producer
from onnxslim.ir.model import Model
from onnxslim.ops import Role, layer_of, spec_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.codes.tables import MOST_BITS, Codebook
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.values import Values
from onnxslim.passes.fold.weights import makers
from onnxslim.shapes.dims import dims_of

MATCHES = ("Add", "Cast", "Gather", "Mul")


@dataclass(frozen=True)
class _Lookup:
    """How one weight is looked up.

    Attributes:
        cone: the nodes that do it.
        tables: shape (tables, 2**bits); None where codes themselves are multiplied.
        starts: where the table of every slice begins, in a shape that goes with the weight; None if there is
            one.
        scales: factors of the slices, likewise; None if there are none.
    """

    cone: tuple[Node, ...]
    tables: Array | None
    starts: Array | None
    scales: Array | None

    def book(self, values: Array, axis: int) -> Codebook | None:
        """Codes of the weight, from what it holds and the axis of its output channels.

        None where they do not stand for it: factors or tables may go with another axis.
        """
        sizes = {1, values.shape[axis]}
        if any(each is not None and each.size not in sizes for each in (self.scales, self.starts)):
            return None
        found = self._read(values, axis)
        fits = len(found.tables) * (found.group or values.shape[axis]) >= values.shape[axis]
        return found if fits and np.array_equal(found.values(), values) else None

    def _read(self, values: Array, axis: int) -> Codebook:
        plain = values if self.scales is None else values / self.scales
        scales = None if self.scales is None else self.scales.ravel()
        if self.tables is None:
            codes = np.rint(plain)
            low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
            tables = np.arange(low, high + 1, dtype=values.dtype)[None]
            return Codebook((codes - low).astype(np.uint8), tables, axis, 0, scales, even=True)
        group = 0 if self.starts is None else int((self.starts == 0).sum())
        book = Codebook(np.zeros(values.shape, np.uint8), self.tables, axis, group, scales)
        which = np.broadcast_to(book.which, values.shape)
        for index, table in enumerate(self.tables):
            here = which == index
            middles = (table[1:].astype(np.float64) + table[:-1]) / 2.0
            book.codes[here] = np.searchsorted(middles, plain[here])
        return book


def restored(model: Model) -> list[tuple[Layer, Codebook]]:
    """Make plain constants of the float32 weights of layers that are looked up in tables.

    Args:
        model: edited in place.

    Returns:
        These layers, and what was looked up.
    """
    found = {}
    for node in model.graph.nodes:
        weight = node.input(1) if spec_of(node).role is Role.LINEAR else None
        if weight is not None and (lookup := _lookup(weight)) is not None:
            found[weight.name] = lookup
    if not found:
        return []
    edits = Edits(model, Log())
    cones = frozenset(id(node) for lookup in found.values() for node in lookup.cone)
    Values(edits, sys.maxsize, cones).fold(dims_of(model))
    edits.clean_up()
    layers = [layer for layer in map(layer_of, model.graph.nodes) if isinstance(layer, Layer)]
    named = ((layer, found.get(layer.node.inputs[1].name)) for layer in layers)
    read = ((layer, how.book(layer.weight, layer.weight_axis)) for layer, how in named if how is not None)
    return [(layer, book) for layer, book in read if book is not None]


def _lookup(weight: Tensor) -> _Lookup | None:
    """How a weight is looked up; None if it is not, or not in this way."""
    cone, maker, scales = makers(weight), producer(weight), None
    if not cone or maker is None:
        return None
    if maker.op == "Mul" and (scales := maker.constant(1)) is not None:
        maker = producer(maker.inputs[0])
    fit = scales is None or (scales.dtype == np.float32 and bool((scales > 0).all()))
    if maker is None or not fit:
        return None
    table, at = maker.constant(0), maker.input(1)
    if maker.op == "Cast" and scales is not None and table is not None and table.dtype == np.int8:
        return _Lookup(tuple(cone), None, None, scales)
    if maker.op != "Gather" or at is None or table is None or table.dtype != np.float32 or table.ndim != 1:
        return None
    places = producer(at)
    starts = places.constant(1) if places is not None and places.op == "Add" else None
    count = 1 if starts is None else np.unique(starts).size
    if table.size % count:
        return None
    tables = table.reshape(count, -1)
    # Weights without their zeros are looked up, too, but not by codes.
    widths = [1 << bits for bits in range(1, MOST_BITS + 1)]
    coded = tables.shape[1] in widths and bool((np.diff(tables, axis=1) >= 0).all())
    return _Lookup(tuple(cone), tables, starts, scales) if coded else None
