"""Weights of a model made sparse: fitted in turn to what the original computes, or by themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxslim.calibration.gram import Gram
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context, Log
from onnxslim.errors import TimeUp
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Floats, Layer
from onnxslim.passes.fold.weights import StoredWeight
from onnxslim.passes.predicates import rounded
from onnxslim.passes.repair import in_turn
from onnxslim.passes.sparsify.fit import Thinning


def apply(
    model: Model, chosen: Mapping[StoredWeight, Thinning], data: Samples | None, ctx: Context, log: Log
) -> None:
    """Make weights sparse.

    Args:
        model: edited in place.
        chosen: how, of its weights or those of a model it is a copy of. Those whose share is zero are fitted
            to what the others leave them, and stay dense.
        data: samples to fit layers to, one after the other; None to leave what is not zero as it is.
        ctx: target and progress.
        log: told of layers that could not be fitted.
    """
    left = {weight.name: how for weight, how in chosen.items() if how.share}
    if data is not None:
        _fit(model, chosen, left, data, ctx, log)
    constants = {constant.name: constant for constant in reversed([*model.constants()])}
    for weight in chosen:
        if weight.name in left:
            assert weight.layer is not None
            _thin(constants[weight.name], weight.layer, left[weight.name])


def _thin(constant: Constant, layer: Layer, how: Thinning) -> None:
    thin = layer.restored(how.of(layer)).astype(constant.dtype)
    constant.values = np.where(thin == 0, np.zeros_like(thin), constant.values)


def _fit(
    model: Model,
    chosen: Mapping[StoredWeight, Thinning],
    left: dict[str, Thinning],
    data: Samples,
    ctx: Context,
    log: Log,
) -> None:
    """Refit layers in turn, and take those that are sparse by that out of what is left."""

    def store(layer: Layer, wanted: Floats, gram: Gram, corrected: bool) -> Floats:
        how = left.get(layer.node.inputs[1].name)
        if how is None:
            return wanted
        found = how.fitted(layer, wanted, gram, corrected=corrected)
        if rounded(layer.restored(found), layer.weight.dtype) is not None:
            del left[layer.node.inputs[1].name]
        return found

    makes = [weight.layer.node.outputs[0].name for weight in chosen if weight.layer is not None]
    try:
        told = in_turn(model, model.copy(), data, makes, store, target=ctx.target, progress=ctx.progress)
    except TimeUp as error:
        log.skip(model.graph.name or "model", f"not all layers were fitted: {error}")
        return
    for skip in told.skipped:
        log.skip(skip.node, f"not fitted: {skip.reason}")
