"""Weights of few values, looked up in tables: what these are in integers, and the tables of them in the end.

A table becomes one of int8, its largest entry 127, and the factor of a channel its scale. So codes stay what
they are, and kernels get integers that runtimes look up when they load the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.ops import Trait, has
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.codes.lookups import restored
from onnxslim.passes.codes.storing import CodeWriter, stored_bytes
from onnxslim.passes.codes.tables import MOST_BITS, Codebook
from onnxslim.passes.quantize.weights import FACTORS, QMAX, TINY, Encoded, pair_axis_of, saturates


@dataclass(frozen=True, eq=False)
class Shared:
    """A weight in integers that are looked up.

    Attributes:
        floats: what the model looks up.
        integers: the same codes, with tables of int8.
        encoded: what these stand for, with a scale for every output channel.
    """

    floats: Codebook
    integers: Codebook
    encoded: Encoded

    @classmethod
    def of(cls, book: Codebook, pair_axis: int | None) -> Shared:
        """Of what a model looks up, with factors above zero.

        Args:
            book: what it is.
            pair_axis: see `encode`: entries are as large as they can be without sums that saturate.
        """
        tried = (cls._with(book, factor) for factor in (FACTORS if pair_axis is not None else (1.0,)))
        return next(
            each
            for each in tried
            if pair_axis is None or not saturates(each.encoded.codes, book.axis, pair_axis, 255)
        )

    @classmethod
    def _with(cls, book: Codebook, factor: float) -> Shared:
        count = book.codes.shape[book.axis]
        largest = np.abs(book.tables).max(axis=1, keepdims=True)
        steps = np.ones_like(largest) if book.even else np.maximum(largest / np.float32(QMAX), TINY)
        steps *= np.float32(factor)
        integers = replace(book, tables=np.rint(book.tables / steps).astype(np.int8), scales=None)
        factors = np.ones(1, np.float32) if book.scales is None else book.scales
        scales = factors * steps.ravel()[np.broadcast_to(book.which.ravel(), count)]
        return cls(book, integers, Encoded(integers.values(), scales.astype(np.float32)))

    @property
    def narrow(self) -> bool:
        """Whether its integers are looked up: codes of eight bits are as many as int8, which is finer."""
        return self.floats.even or self.floats.bits < MOST_BITS

    def unsigned(self) -> Codebook:
        """The same integers as uint8 with a zero point of 128."""
        tables = (self.integers.tables.astype(np.int16) + 128).astype(np.uint8)
        return replace(self.integers, tables=tables)


def taken(model: Model, rules: IntegerLayout) -> dict[str, Shared]:
    """Make plain constants of the weights of layers that are looked up; by their names, what they were."""
    found = restored(model)
    return {
        layer.node.inputs[1].name: Shared.of(book, pair_axis_of(layer.node, rules)) for layer, book in found
    }


def look_up(model: Model, shared: Mapping[str, Shared]) -> int:
    """Have the weights that are still what they were looked up again.

    Args:
        model: edited in place.
        shared: of `taken`.

    Returns:
        How many of them run in integers.
    """
    writer, integers = CodeWriter(model), 0
    narrow = [each for each in shared.values() if each.narrow]
    known = {_key(book.values()): book for each in narrow for book in (each.integers, each.unsigned())}
    codes = [node.inputs[0] for node in model.graph.nodes if has(node, Trait.DEQUANTIZES)]
    for constant in dict.fromkeys(each for each in codes if isinstance(each, Constant)):
        book = known.get(_key(constant.values))
        if book is not None and _saves(constant, book):
            writer.write(constant, book)
            integers += 1
    for name, each in shared.items():
        if (plain := model.graph.initializers.get(name)) is not None:
            writer.write(plain, each.floats)
    writer.finish()
    return integers


def _key(values: object) -> tuple[object, ...]:
    assert isinstance(values, np.ndarray)
    return values.dtype, values.shape, values.tobytes()


def _saves(constant: Constant, book: Codebook) -> bool:
    """Whether looking it up takes fewer bytes than to store it."""
    needed = stored_bytes(constant.name, constant.shape, 1, book.bits, len(book.tables), 0)
    return not book.even and needed < constant.nbytes
