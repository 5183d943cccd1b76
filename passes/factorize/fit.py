"""Factors fitted to data: what the layer has to compute on it, from moments of its inputs and outputs."""

from __future__ import annotations

import math
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
from onnxslim.passes.factorize.schemes import Decomposition, Problem, Ranks, Scheme, merged, solve
from onnxslim.passes.repair.solve import downhill
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
    for portion in _portions(layers, _moment_bytes):
        found = observe(model, data, [layer.output for layer in portion], target=target, progress=progress)
        for layer in portion:
            yield layer, found.pop(layer.output, None)


def _portions(layers: Sequence[Whole], bytes_of: Callable[[Whole], int]) -> Iterator[list[Whole]]:
    """Layers one after the other that may be in memory together."""
    portion, held = list[Whole](), 0
    for layer in layers:
        size = bytes_of(layer)
        if portion and held + size > MAX_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(layer)
        held += size
    if portion:
        yield portion


class FactorGoals:
    """What layers are to make: their outputs in another model, at the positions that moments are taken of.

    Args:
        teacher: makes tensors of the same names.
        data: samples for it.
        layers: in the order in which they are asked for; see `observable`.
        target: where to run.
    """

    def __init__(self, teacher: Model, data: Samples, layers: Sequence[Whole], target: Target) -> None:
        self.data, self.target = data, target
        self._teacher = teacher
        self._left = list(layers)
        self._known: dict[str, list[Array]] = {}

    def of(self, layer: Whole) -> list[Array]:
        """Of one layer, once, batch by batch; those behind it are seen in the same run, as memory allows."""
        if layer.output not in self._known:
            self._left = self._left[self._left.index(layer) :]
            self._see(next(_portions(self._left, self._bytes)))
        return self._known.pop(layer.output)

    def _bytes(self, layer: Whole) -> int:
        channels = layer.groups * layer.outputs
        return 4 * channels * min(ROWS, self.data.seen.samples() * math.prod(layer.result) // channels)

    def _see(self, layers: Sequence[Whole]) -> None:
        self._known = {layer.output: [] for layer in layers}
        reads = [layer.node.inputs[0].name for layer in layers]
        run = _cut(self._teacher, [*dict.fromkeys((*self._known, *reads))], self.target)
        for batch in stream(self.data.seen, run):
            for layer, read in zip(layers, reads, strict=True):
                at = batch.positions(layer.view.count(batch.values[read]), ROWS)
                self._known[layer.output].append(layer.view.results(batch.values[layer.output], at))


def against(student: Model, goals: FactorGoals, layer: Whole) -> tuple[Gram, Gram]:
    """Moments of what a layer reads in one model and what it is to make.

    Args:
        student: holds the layer's node.
        goals: of it.
        layer: see `observable`.

    Returns:
        Of the samples to fit on, and of those to choose by.
    """
    seen, data, read = layer.view, goals.data, layer.node.inputs[0].name
    train, chosen_by = Moments(), Moments()
    fitted, ours = data.fit.samples(), _cut(student, [read], goals.target)
    for batch, wanted in zip(stream(data.seen, ours), goals.of(layer), strict=True):
        x = batch.values[read]
        moments = train if batch.first < fitted else chosen_by
        moments.update(seen.columns(x, batch.positions(seen.count(x), ROWS)), wanted)
    fitted_to = train.result()
    return fitted_to, chosen_by.result() if data.tuned else fitted_to


def _cut(
    model: Model, names: Sequence[str], target: Target
) -> Callable[[int, Mapping[str, Array]], Mapping[str, Array]]:
    """Computes some tensors, with no more of the model than that takes."""
    if {tensor.name for tensor in model.graph.inputs}.issuperset(names):
        return lambda _, feeds: feeds
    part = tapped(model, names)
    part.graph.outputs[:] = [tensor for tensor in part.graph.outputs if tensor.name in names]
    remove_nodes(part, list(part.nodes()))
    return Taps(part, names, target)


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
    return of_rank(layer, scheme.decompose(layer, problem_of(layer, gram), ranks), ranks, gram)


def fit_moved(layer: Whole, scheme: Scheme, ranks: Ranks, train: Gram, tune: Gram) -> Fitted:
    """Factors that make the given outputs of the given inputs.

    How much they are drawn to the layer's weight is what does best on the second moments; then they are
    fitted to both.
    """

    def fitted(gram: Gram, shrink: float) -> Fitted:
        parts = scheme.decompose(layer, _moved(layer, gram, shrink), ranks)
        return of_rank(layer, parts, ranks, gram)

    def error(index: int) -> float:
        return _error(layer, fitted(train, SHRINKS[index]), train, tune)

    shrink = SHRINKS[downhill(error, len(SHRINKS), len(SHRINKS) // 2)]
    return fitted(train.joined(tune), shrink)


def _error(layer: Whole, fitted: Fitted, train: Gram, tune: Gram) -> float:
    """Mean squared error of factors on what is chosen by, but for a constant."""
    seen = tune.around(train.x_mean, train.y_mean) if layer.biased else tune.raw()
    weight = merged(fitted.weights, layer.kernel) * layer.view.scale
    return float((weight * (seen.gram @ weight - 2.0 * seen.cross.swapaxes(1, 2))).sum())


def of_rank(layer: Whole, parts: Decomposition, ranks: Ranks, gram: Gram | None) -> Fitted:
    """Factors of these ranks, with the bias that keeps the mean of what the layer makes."""
    weights = parts.weights(ranks)
    if gram is None or not layer.biased:
        return Fitted(weights, None)
    reads = np.einsum("gk,gko->go", gram.x_mean, merged(weights, layer.kernel))
    bias = gram.y_mean - reads * layer.view.scale
    return Fitted(weights, bias.reshape(-1).astype(layer.weight.dtype))
