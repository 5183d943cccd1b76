"""Weights of a model made codes: fitted in turn to what the original computes, or by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from onnxslim.calibration.gram import Gram
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context, Log
from onnxslim.errors import TimeUp
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Floats, Layer
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.cluster.weights import Weight
from onnxslim.passes.codes.storing import CodeWriter
from onnxslim.passes.codes.tables import Codebook
from onnxslim.passes.repair import in_turn


def apply(
    model: Model, chosen: Mapping[Weight, Clustering], data: Samples | None, ctx: Context, log: Log
) -> dict[str, Codebook]:
    """Store weights as codes.

    Args:
        model: edited in place.
        chosen: how its weights, or those of a model it is a copy of, are stored.
        data: samples to fit layers to, one after the other; None to come close to the weights.
        ctx: target and progress.
        log: told of layers that could not be fitted.

    Returns:
        By name of a weight, what it is now.
    """
    # Bodies come last, whose constants may have names of the main graph.
    constants = {constant.name: constant for constant in reversed([*model.constants()])}
    books: dict[str, Codebook] = {}

    def by_itself(weight: Weight) -> None:
        constant = constants[weight.name]
        books[weight.name] = chosen[weight].of(constant.values, weight.axis)
        constant.values = books[weight.name].values()

    if data is not None:
        teacher = model.copy()
        for weight in chosen:
            if weight.layer is None:  # layers make up for what is not fitted
                by_itself(weight)
        _fit(model, teacher, chosen, books, data, ctx, log)
    writer = CodeWriter(model)
    for weight in chosen:
        if weight.name not in books:
            by_itself(weight)
        writer.write(constants[weight.name], books[weight.name])
    writer.finish()
    return books


def _fit(
    model: Model,
    teacher: Model,
    chosen: Mapping[Weight, Clustering],
    books: dict[str, Codebook],
    data: Samples,
    ctx: Context,
    log: Log,
) -> None:
    """Refit the layers of a model in turn, and have their weights be codes."""
    hows = {weight.name: how for weight, how in chosen.items() if weight.layer is not None}
    makes = [weight.layer.node.outputs[0].name for weight in chosen if weight.layer is not None]

    def store(layer: Layer, wanted: Floats, gram: Gram, corrected: bool) -> Floats:
        name = layer.node.inputs[1].name
        books[name], restored = hows[name].fitted(layer, wanted, gram, corrected=corrected)
        return restored

    try:
        told = in_turn(model, teacher, data, makes, store, target=ctx.target, progress=ctx.progress)
    except TimeUp as error:
        log.skip(model.graph.name or "model", f"not all layers were fitted: {error}")
        return
    for skip in told.skipped:
        log.skip(skip.node, f"not fitted: {skip.reason}")
