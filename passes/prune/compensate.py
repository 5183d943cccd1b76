"""Let the channels that stay stand in for those that go, before they go.

Where a layer reads channels x = (x_S, x_P) and P goes, x_P is predicted as M x_S with the least mean square
error, M = G_PS (G_SS + damping)^-1, and the weights that read P are added to those that read S through M.
Only second moments of the channels are needed, not those of all kernel positions; the sequential repair after
the cut starts from there. What is zero in a sparse weight stays zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxslim.calibration.gram import Gram
from onnxslim.calibration.stream import Channels
from onnxslim.families.analysis import Consumer
from onnxslim.families.removal import Removal
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.passes.prune.importance import DAMPING
from onnxslim.passes.repair.support import support


def compensate(model: Model, removal: Removal, grams: Mapping[Channels, Gram]) -> None:
    """Add what goes to what stays, in the weights of all layers that lose inputs.

    Args:
        model: edited in place: the analyzed model or a copy of it, before the cut.
        removal: what the cut will remove.
        grams: moments of the data that layers read; layers without are left as they are.
    """
    constants = {
        tensor.name: tensor
        for node in model.graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, Constant)
    }
    for (weight, axis), moments in _moments(removal, grams).items():
        kept = removal.masks.get((weight, axis))
        constant = constants.get(weight)
        if kept is not None and constant is not None and constant.dtype.kind in "fV":
            constant.values = _taken_over(constant.values, axis, kept, moments)


def _moments(removal: Removal, grams: Mapping[Channels, Gram]) -> dict[tuple[str, int], Array]:
    """Second moments of what each weight reads, summed over its readers."""
    found: dict[tuple[str, int], Array] = {}
    for consumer in unique(each for family in removal.analysis.families for each in family.consumers):
        key, data = (consumer.weight.tensor, consumer.weight.axis), (consumer.data.tensor, consumer.data.axis)
        if data in grams and data in removal.masks:
            moments = grams[data].raw().gram[0]
            found[key] = found[key] + moments if key in found else moments
    return found


def unique(consumers: Iterable[Consumer]) -> list[Consumer]:
    """One consumer for each axis of a layer, whichever family it was listed for."""
    found = {
        (each.node, each.data.tensor, each.data.axis, each.weight.tensor, each.weight.axis): each
        for each in consumers
    }
    return list(found.values())


def _taken_over(values: Array, axis: int, kept: Array, moments: Array) -> Array:
    rows = np.moveaxis(values, axis, 0)
    inside = moments[np.ix_(kept, kept)]
    scale = float(np.mean(np.diag(inside))) or 1.0
    ridge = DAMPING * scale * np.eye(len(inside))
    takes = np.linalg.solve(inside + ridge, moments[np.ix_(kept, ~kept)])
    flat = rows.reshape(rows.shape[0], -1).astype(np.float64)
    flat[kept] += takes @ flat[~kept]
    if support(values) is not None:
        flat[rows.reshape(flat.shape) == 0] = 0.0
    return np.moveaxis(flat.reshape(rows.shape), 0, axis).astype(values.dtype)
