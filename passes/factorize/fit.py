"""Factors fitted to data: what the layer has to compute on it, from moments of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import TypeAlias

import numpy as np

from onnxslim.calibration.collect import Progress, Runner, tapped
from onnxslim.calibration.data import CalibrationData, Feeds
from onnxslim.calibration.gram import ROWS, Gram, Moments, batch_samples, observe, quota_for, sampled
from onnxslim.calibration.layers import Layer as Observed
from onnxslim.calibration.layers import layer_of
from onnxslim.graph import Array
from onnxslim.model import Model
from onnxslim.passes.dead import remove_nodes
from onnxslim.passes.factorize.layers import Layer
from onnxslim.passes.factorize.schemes import Problem, Ranks, Scheme, merged, solve
from onnxslim.runtime import Target

# Inputs per result beyond which second moments, 8·k² bytes, are not taken.
MAX_PATCH = 4608
# Bytes of moments held at the same time.
MAX_BYTES = 1 << 29
# How much a weight fitted to other inputs is drawn to the one it replaces, relative to the mean moment.
SHRINK = 1e-3
# Elements from which a weight alone is taken apart in float32.
LARGE_WEIGHT = 1 << 24

Weights: TypeAlias = Sequence[Array]


@dataclass(frozen=True)
class Fitted:
    """Weights of factors, float64, and the bias that goes with them; None keeps the one there is."""

    weights: Weights
    bias: Array | None


def observable(layer: Layer) -> bool:
    """Whether moments of what the layer reads can be taken, and kept in memory."""
    return layer.form.gathers and layer.patch <= MAX_PATCH


def moments(
    model: Model, data: CalibrationData, layers: Sequence[Layer], target: Target, progress: Progress | None
) -> Iterator[tuple[Layer, Gram]]:
    """Of what layers read and make in the model itself, in as few passes over the data as memory allows."""
    for portion in _portions(layers):
        found = observe(model, data, [layer.output for layer in portion], target=target, progress=progress)
        for layer in portion:
            yield layer, found.pop(layer.output)


def _portions(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    portion, held = list[Layer](), 0
    for layer in layers:
        size = 8 * layer.groups * layer.patch * (layer.patch + layer.outputs)
        if portion and held + size > MAX_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(layer)
        held += size
    if portion:
        yield portion


def against(student: Model, teacher: Model, data: CalibrationData, layer: Layer, target: Target) -> Gram:
    """Moments of what a layer reads in one model and what it makes in another one.

    Args:
        student: holds the layer's node.
        teacher: makes a tensor of the same name.
        data: batches for both.
        layer: see `observable`.
        target: where to run.
    """
    seen = layer_of(layer.node)
    assert isinstance(seen, Observed)
    ours = _cut(student, layer.node.inputs[0].name, target)
    theirs = _cut(teacher, layer.output, target)
    found, first, batches = Moments(), 0, length_hint(data, 1)
    for feeds in data:
        x, y = ours(feeds), theirs(feeds)
        samples = batch_samples(feeds)
        at = sampled(seen.count(x), samples, first, quota_for(ROWS, samples * batches))
        found.update(seen.columns(x, at), seen.outputs(y, at))
        first += samples
    return found.result()


def _cut(model: Model, name: str, target: Target) -> Callable[[Feeds], Array]:
    """Computes one tensor, with no more of the model than that takes."""
    if any(tensor.name == name for tensor in model.graph.inputs):
        return lambda feeds: feeds[name]
    part = tapped(model, [name])
    part.graph.outputs[:] = [tensor for tensor in part.graph.outputs if tensor.name == name]
    remove_nodes(part, list(part.nodes()))
    runner = Runner(part, target)
    return lambda feeds: np.asarray(runner.run(feeds, [name])[name])


def problem_of(layer: Layer, gram: Gram | None, *, moved: bool = False) -> Problem:
    """What factors of a layer have to come close to.

    Args:
        layer: whose weight it is about.
        gram: moments of its inputs and outputs; None to come close to the weight.
        moved: whether outputs are those of other inputs, so that another weight explains them better.
    """
    weight = layer.weight.astype(np.float64 if layer.weight.size < LARGE_WEIGHT else np.float32)
    if gram is None:
        return Problem(weight)
    seen = _seen(layer, gram)
    if not moved:
        return Problem(weight, seen.gram)
    shrink = SHRINK * np.einsum("gkk->g", seen.gram)[:, None, None] / layer.patch
    target = seen.cross.swapaxes(1, 2) / layer.form.scale(layer.node) + shrink * layer.matrix()
    metric = seen.gram + shrink * np.eye(layer.patch)
    found = np.stack([solve(each, wanted) for each, wanted in zip(metric, target, strict=True)])
    back = found.reshape(layer.groups, layer.inputs, *layer.kernel, layer.outputs)
    return Problem(np.moveaxis(back, -1, 2), metric)


def fit(layer: Layer, scheme: Scheme, ranks: Ranks, gram: Gram | None, *, moved: bool = False) -> Fitted:
    """Factors of a layer; see `problem_of`."""
    weights = scheme.decompose(layer, problem_of(layer, gram, moved=moved), ranks).weights(ranks)
    if gram is None or not _biased(layer):
        return Fitted(weights, None)
    reads = np.einsum("gk,gko->go", gram.x_mean, merged(weights, layer.kernel))
    bias = gram.y_mean - reads * layer.form.scale(layer.node)
    return Fitted(weights, bias.reshape(-1).astype(layer.weight.dtype))


def _seen(layer: Layer, gram: Gram) -> Gram:
    """Moments around the means where a bias takes care of these, else around zero."""
    return gram if _biased(layer) else gram.raw()


def _biased(layer: Layer) -> bool:
    return layer.form.bias(layer.node, layer.groups * layer.outputs) is not None
