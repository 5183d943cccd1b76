"""The weights of a model that can be codes, whatever operator reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxslim.engine.base import Log
from onnxslim.ir.model import Model
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.codes.storing import stored_bytes, why_not
from onnxslim.passes.codes.tables import MOST_BITS
from onnxslim.passes.fold.weights import StoredWeight, stored_weights

# What takes no more than this is not worth the nodes that look codes up.
LEAST_BYTES = 600
WIDTHS = tuple(range(1, MOST_BITS + 1))


class Weight(StoredWeight):
    """A constant that can be codes."""

    def stored(self, how: Clustering) -> Clustering:
        """How it is stored, with factors of output channels if that is left open and it is depthwise.

        Depthwise channels differ most, and their codes take least room.
        """
        if how.scaled is not None:
            return how
        return replace(how, scaled=self.layer is not None and self.layer.channelwise)

    def tables(self, how: Clustering) -> int:
        """How many tables it has; with a price, none that is worth mentioning."""
        if how.price:
            return 0
        return -(-self.shape[self.axis] // how.group) if how.group else 1

    def nbytes(self, how: Clustering) -> int:
        """Bytes of it as codes, with the nodes that look them up, about."""
        scales = self.shape[self.axis] if how.scaled else 0
        kind = self.constant.dtype
        return stored_bytes(self.name, self.shape, kind.itemsize, how.bits, self.tables(how), scales)

    def saves(self, how: Clustering) -> bool:
        """Whether codes take less room."""
        return self.nbytes(how) < self.constant.nbytes


def find(model: Model, exclude: Sequence[str], log: Log) -> list[Weight]:
    """The weights of the main graph, in the order in which they are read.

    Args:
        model: not modified.
        exclude: globs of nodes and constants to leave out.
        log: told of every weight that stays, and why.
    """
    problem = why_not(model)
    if problem:
        log.skip(model.graph.name or "model", problem)
        return []
    found = stored_weights(model, exclude, LEAST_BYTES, log)
    return [Weight(each.constant, each.label, each.layer, each.axis) for each in found]
