"""How many zeros each weight gets: what the outputs lose by them, and where they are cheapest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.gram import Gram, observe
from onnxslim.calibration.samples import SAMPLES, Samples
from onnxslim.engine.allocate import Additive, allocate
from onnxslim.engine.base import Context, Effort, Log
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Floats, Layer
from onnxslim.passes.fold.weights import StoredWeight
from onnxslim.passes.quantize.rounding import damped
from onnxslim.passes.repair import refitted
from onnxslim.passes.repair.conjugate import STEPS
from onnxslim.passes.repair.support import LEAST_ZEROS, within
from onnxslim.passes.sparsify.apply import apply
from onnxslim.passes.sparsify.fit import Thinning, scored

# Shares of zeros to choose from, in percent, besides those that a pattern says.
PERCENT = (0, *range(round(100 * LEAST_ZEROS), 96, 5))
# Shares of zeros, in percent, with which the damage of a single weight is measured, and on how many samples.
MEASURED: Mapping[Effort, tuple[int, ...]] = {
    "quick": (50,),
    "normal": (20, 50, 80),
    "thorough": (20, 50, 80),
}
JUDGED: Mapping[Effort, int] = {"quick": 8, "normal": SAMPLES, "thorough": 2 * SAMPLES}
# Bytes of second moments that are in memory at a time.
MEMORY = 1 << 28
_TINY = 1e-30


class ShareChoice:
    """Chooses the share of zeros of each weight of one model.

    Args:
        model: not modified.
        weights: of layers of it.
        how: they become sparse, but for the share.
        data: to measure what single weights cost the outputs; None to go by their own error.
        ctx: target and progress.
    """

    def __init__(
        self,
        model: Model,
        weights: Sequence[StoredWeight],
        how: Thinning,
        data: Samples | None,
        ctx: Context,
    ) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._how, self._ctx, self._model = how, ctx, model
        self.measured = data is not None
        fixed = how.pattern.share
        self.percent: tuple[int, ...] = PERCENT if fixed is None else (0, round(100 * fixed))
        self._costs = {name: self._left(weight) for name, weight in self._weights.items()}
        lost = self._of_layers(data) if data is not None else self._of_weights()
        self.damage = {weight.name: dict(zip(self.percent, each, strict=True)) for weight, each in lost}

    def _left(self, weight: StoredWeight) -> dict[int, float]:
        """Values of a weight that are not zero, with each share; zeros that are there already stay."""
        size, there = weight.constant.size, float(np.count_nonzero(weight.constant.values))
        stays, share = self._how.pattern.stays, self._share
        return {each: min(float(stays(share(each), size)), there) if each else there for each in self.percent}

    def _share(self, percent: int) -> float:
        """Of zeros: so many in a hundred, or what the pattern says."""
        fixed = self._how.pattern.share
        return percent / 100.0 if fixed is None or not percent else fixed

    def how(self, percent: int) -> Thinning:
        """A weight with so many zeros in a hundred."""
        return replace(self._how, share=self._share(percent))

    def within(self, share: float) -> dict[StoredWeight, Thinning]:
        """The shares that cost the outputs least where so much of all weights is zero."""
        choices = Additive(self.damage, self._costs)
        whole = sum(weight.constant.size for weight in self._weights.values())
        picks = allocate(choices, (1.0 - share) * whole, choices.best())
        return {self._weights[name]: self.how(percent) for name, percent in picks.items()}

    # -- damage

    def _of_weights(self) -> Iterator[tuple[StoredWeight, list[float]]]:
        """Squares of the weights that go, relative to those of all."""
        for weight in self._weights.values():
            layer = _layer(weight)
            whole = float(np.square(layer.matrix(), dtype=np.float64).sum()) or 1.0
            yield weight, [self._lost_of(layer, percent) / whole for percent in self.percent]

    def _lost_of(self, layer: Layer, percent: int) -> float:
        return float(np.square(layer.matrix() - self.how(percent).of(layer), dtype=np.float64).sum())

    def _of_layers(self, data: Samples) -> Iterator[tuple[StoredWeight, list[float]]]:
        """Error of the outputs with one weight alone sparse, and in between as its layer's error says."""
        judge = Judge(self._model, data.tune, self._ctx.target, JUDGED[self._how.effort])
        done = 0
        for weights in _groups([*self._weights.values()]):
            grams = self._observed(weights, data)
            for weight in weights:
                yield weight, self._of_weight(weight, grams.get(_layer(weight).node.outputs[0].name), judge)
                done += 1
                if self._ctx.progress:
                    self._ctx.progress("measuring weights", done, len(self._weights))

    def _tried(self, weight: StoredWeight) -> Collection[int]:
        """Of the shares that make a difference to a weight, those it is measured with."""
        costs = self._costs[weight.name]
        telling = [each for each in self.percent if costs[each] < costs[0]] or self.percent
        measured = [each for each in MEASURED[self._how.effort] if each in telling]
        return measured or [telling[(len(telling) - 1) // 2]]

    def _observed(self, weights: Sequence[StoredWeight], data: Samples) -> dict[str, Gram]:
        names = [_layer(weight).node.outputs[0].name for weight in weights]
        return observe(self._model, data.fit, names, alone=True, target=self._ctx.target)

    def _of_weight(self, weight: StoredWeight, gram: Gram | None, judge: Judge) -> list[float]:
        """What the outputs lose with each share, the rest making up for it."""
        layer, tried = _layer(weight), self._tried(weight)
        lost, rates = list[float](), dict[int, float]()
        for percent, found in self._sparse(layer, gram):
            lost.append(_error(layer, found, gram))
            if percent in tried:
                error = judge(self._with(weight, percent, found, gram)).error
                rates[percent] = max(error, _TINY) / max(lost[-1], _TINY)
        logs = np.interp(self.percent, [*rates], np.log([*rates.values()]))
        return [float(np.exp(rate)) * each for rate, each in zip(logs, lost, strict=True)]

    def _sparse(self, layer: Layer, gram: Gram | None) -> Iterator[tuple[int, Floats]]:
        """The weights of a layer with each share of zeros."""
        wanted = layer.matrix()
        curvature = None if gram is None else damped(gram.gram, gram.count)
        scores = np.square(wanted) if curvature is None else scored(self._how.criterion, wanted, curvature)
        for percent in self.percent:
            mask = self.how(percent).kept(scores, layer)
            alone = np.where(mask, wanted, np.float32(0))
            yield percent, alone if curvature is None else within(wanted, mask, curvature, STEPS)

    def _with(self, weight: StoredWeight, percent: int, found: Floats, gram: Gram | None) -> Model:
        """The model with one sparse weight; as it will be where it cannot be fitted."""
        trial = self._model.copy()
        if gram is None or not refitted(trial, _layer(weight), found, gram):
            apply(trial, {weight: self.how(percent)}, None, self._ctx, Log())
        return trial


def _layer(weight: StoredWeight) -> Layer:
    assert weight.layer is not None
    return weight.layer


def _error(layer: Layer, found: Floats, gram: Gram | None) -> float:
    """Squared error of the outputs of a layer; without moments, of its weights."""
    error = layer.matrix() - found
    pulled = error if gram is None else error @ damped(gram.gram, gram.count)
    return float((pulled * error).sum(dtype=np.float64))


def _groups(weights: Sequence[StoredWeight]) -> Iterator[list[StoredWeight]]:
    """Weights whose second moments are in memory at the same time."""
    found: list[StoredWeight] = []
    size = 0
    for weight in weights:
        groups, _, inputs = _layer(weight).matrix().shape
        needed = 8 * groups * inputs**2
        if found and size + needed > MEMORY:
            yield found
            found, size = [], 0
        found.append(weight)
        size += needed
    if found:
        yield found
