"""Factors fitted to data: what the layer has to compute on it, from moments of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import ROWS, Gram, Moments, observe
from onnxslim.calibration.samples import Samples
from onnxslim.calibration.stream import Progress, Taps, stream, tapped
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.dead import remove_nodes
from onnxslim.passes.factorize.layers import Whole
from onnxslim.passes.factorize.schemes import Problem, Ranks, Scheme, merged, solve
from onnxslim.runtime.targets import Target

# Bytes of moments of one layer beyond which they are not taken, and of all layers that are observed together.
MAX_LAYER_BYTES, MAX_BYTES = 1 << 28, 1 << 29
# How much weights are drawn to those there are, relative to the mean moment, when ranks are chosen, and what
# is tried when factors are fitted.
SHRINK = 1e-2
SHRINKS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Elements from which a weight alone is taken apart in float32.
LARGE_WEIGHT = 1 << 24

Weights: TypeAlias = Sequence[Array]


@dataclass(frozen=True)
class Fitted:
    """Weights of factors, float64, and the bias that goes with them; None keeps the one there is."""

    weights: Weights
    bias: Array | None


def observable(layer: Whole) -> bool:
    """Whether moments of what the layer reads can be taken, and kept in memory."""
    readable = layer.view.weight_index == 1 and layer.view.unfit() is None
    return readable and _moment_bytes(layer) <= MAX_LAYER_BYTES


def _moment_bytes(layer: Whole) -> int:
    return 8 * layer.groups * layer.patch * (layer.patch + layer.outputs)


def moments(
    model: Model, data: CalibrationData, layers: Sequence[Whole], target: Target, progress: Progress | None
) -> Iterator[tuple[Whole, Gram | None]]:
    """Of what layers read and make in the model itself, in as few passes over the data as memory allows.

    None for a layer that the data leave empty.
    """
    for portion in _portions(layers):
        found = observe(model, data, [layer.output for layer in portion], target=target, progress=progress)
        for layer in portion:
            yield layer, found.pop(layer.output, None)


def _portions(layers: Sequence[Whole]) -> Iterator[list[Whole]]:
    portion, held = list[Whole](), 0
    for layer in layers:
        size = _moment_bytes(layer)
        if portion and held + size > MAX_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(layer)
        held += size
    if portion:
        yield portion


def against(student: Model, teacher: Model, data: Samples, layer: Whole, target: Target) -> tuple[Gram, Gram]:
    """Moments of what a layer reads in one model and what it makes in another one.

    Args:
        student: holds the layer's node.
        teacher: makes a tensor of the same name.
        data: samples for both.
        layer: see `observable`.
        target: where to run.

    Returns:
        Of the samples to fit on, and of those to choose by.
    """
    seen = layer.view
    ours = _cut(student, layer.node.inputs[0].name, target)
    theirs = _cut(teacher, layer.output, target)
    train, chosen_by = Moments(), Moments()
    fitted = data.fit.samples()
    for batch in stream(data.seen, lambda _, feeds: (ours(feeds), theirs(feeds))):
        x, y = batch.values
        at = batch.positions(seen.count(x), ROWS)
        moments = train if batch.first < fitted else chosen_by
        moments.update(seen.columns(x, at), seen.results(y, at))
    fitted_to = train.result()
    return fitted_to, chosen_by.result() if data.tuned else fitted_to


def _cut(model: Model, name: str, target: Target) -> Callable[[Mapping[str, Array]], Array]:
    """Computes one tensor, with no more of the model than that takes."""
    if any(tensor.name == name for tensor in model.graph.inputs):
        return lambda feeds: feeds[name]
    part = tapped(model, [name])
    part.graph.outputs[:] = [tensor for tensor in part.graph.outputs if tensor.name == name]
    remove_nodes(part, list(part.nodes()))
    taps = Taps(part, [name], target)
    return lambda feeds: taps(0, feeds)[name]


def problem_of(layer: Whole, gram: Gram | None) -> Problem:
    """What factors of a layer have to come close to: what it makes of its own inputs, or its weight.

    Args:
        layer: whose weight it is about.
        gram: moments of its inputs; None to come close to the weight.
    """
    weight = layer.weight.astype(np.float64 if layer.weight.size < LARGE_WEIGHT else np.float32)
    if gram is None or not gram.gram.any():  # data that is always the same says nothing
        return Problem(weight)
    return Problem(weight, _drawn(layer, gram, SHRINK)[0])


def _moved(layer: Whole, gram: Gram, shrink: float) -> Problem:
    """The same where the outputs are not those of the inputs: the best weight is another one.

    It is drawn to the weight there is, by as much as `shrink` times the mean moment, as if that much data of
    independent inputs had been seen in addition, on which the layer is to stay what it is.
    """
    if not gram.gram.any():
        return problem_of(layer, None)
    metric, seen, drawn = _drawn(layer, gram, shrink)
    wanted = seen.cross.swapaxes(1, 2) / layer.view.scale + drawn * layer.matrix()
    found = np.stack([solve(each, right) for each, right in zip(metric, wanted, strict=True)])
    back = found.reshape(layer.groups, layer.inputs, *layer.kernel, layer.outputs)
    return Problem(np.moveaxis(back, -1, 2), metric)


def _drawn(layer: Whole, gram: Gram, shrink: float) -> tuple[Array, Gram, float]:
    """Moments with a multiple of the identity added, moments without, and that multiple.

    They are around the means where a bias takes care of these, else around zero.
    """
    seen = gram if layer.biased else gram.raw()
    drawn = shrink * float(np.einsum("gkk->", seen.gram)) / (layer.groups * layer.patch)
    return seen.gram + drawn * np.eye(layer.patch), seen, drawn


def fit(layer: Whole, scheme: Scheme, ranks: Ranks, gram: Gram | None = None) -> Fitted:
    """Factors that come close to a layer on its own inputs; see `problem_of`."""
    return _fitted(layer, scheme, ranks, problem_of(layer, gram), gram)


def fit_moved(layer: Whole, scheme: Scheme, ranks: Ranks, train: Gram, tune: Gram) -> Fitted:
    """Factors that make the given outputs of the given inputs.

    How much they are drawn to the layer's weight is what does best on the second moments; then they are
    fitted to both.
    """
    tried = {
        shrink: _error(layer, _fitted(layer, scheme, ranks, _moved(layer, train, shrink), train), train, tune)
        for shrink in SHRINKS
    }
    gram = train.joined(tune)
    return _fitted(layer, scheme, ranks, _moved(layer, gram, min(tried, key=tried.__getitem__)), gram)


def _error(layer: Whole, fitted: Fitted, train: Gram, tune: Gram) -> float:
    """Mean squared error of factors on what is chosen by, but for a constant."""
    seen = tune.around(train.x_mean, train.y_mean) if layer.biased else tune.raw()
    weight = merged(fitted.weights, layer.kernel) * layer.view.scale
    explained = np.einsum("gok,gko->", seen.cross, weight)
    return float(np.einsum("gko,gko->", weight, seen.gram @ weight) - 2.0 * explained)


def _fitted(layer: Whole, scheme: Scheme, ranks: Ranks, problem: Problem, gram: Gram | None) -> Fitted:
    weights = scheme.decompose(layer, problem, ranks).weights(ranks)
    if gram is None or not layer.biased:
        return Fitted(weights, None)
    reads = np.einsum("gk,gko->go", gram.x_mean, merged(weights, layer.kernel))
    bias = gram.y_mean - reads * layer.view.scale
    return Fitted(weights, bias.reshape(-1).astype(layer.weight.dtype))
