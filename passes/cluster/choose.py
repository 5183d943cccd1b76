"""How many bits each weight gets: what the outputs lose by it, and which of them are worth their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.noise import Noise
from onnxslim.calibration.samples import Samples
from onnxslim.engine.allocate import Additive, allocate
from onnxslim.engine.base import Context, Log
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.cluster.apply import apply
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.cluster.weights import MOST_BITS, WIDTHS, Weight

# Damage is measured with codes of so many bits, and a quarter of it is left with every bit more: 5 to 6 dB.
MEASURED_BITS, LEFT_PER_BIT = 4, 0.25


class BitChoice:
    """Chooses the bits of each weight of one model.

    Args:
        model: not modified.
        weights: of it.
        how: weights are stored, but for the bits.
        data: to measure what single weights cost the outputs; None to go by their own error.
        ctx: target and progress.
    """

    def __init__(
        self, model: Model, weights: Sequence[Weight], how: Clustering, data: Samples | None, ctx: Context
    ) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._how, self._ctx = how, ctx
        self.measured = data is not None
        self._rest = model.stats().bytes - sum(weight.constant.nbytes for weight in weights)
        errors = self._by_outputs(model, data) if data is not None else self._by_weights()
        self.damage = {
            name: {bits: error * LEFT_PER_BIT ** (bits - MEASURED_BITS) for bits in WIDTHS}
            for name, error in zip(self._weights, errors, strict=True)
        }
        self._costs = {
            name: {bits: float(weight.nbytes(self.how(weight, bits))) for bits in WIDTHS}
            for name, weight in self._weights.items()
        }

    def how(self, weight: Weight, bits: int) -> Clustering:
        """A weight in codes of so many bits."""
        return replace(weight.stored(self._how), bits=bits)

    def _by_outputs(self, model: Model, data: Samples) -> Iterator[float]:
        """Error of the outputs with one weight alone as codes, not fitted."""
        judge = Judge(model, data.tune, self._ctx.target)
        for done, weight in enumerate(self._weights.values()):
            trial = model.copy()
            apply(trial, {weight: self.how(weight, MEASURED_BITS)}, None, self._ctx, Log())
            yield judge(trial).error
            if self._ctx.progress:
                self._ctx.progress("measuring weights", done + 1, len(self._weights))

    def _by_weights(self) -> Iterator[float]:
        """Error of the weights themselves, relative to their variance."""
        for weight in self._weights.values():
            values = weight.constant.values
            yield _relative(values, self.how(weight, MEASURED_BITS).of(values, weight.axis).values())

    def bytes_at(self, bits: float) -> float:
        """Bytes of the model with so many bits for each weight, between whole numbers in proportion."""
        low = min(int(bits), MOST_BITS - 1)
        at = [self._rest + sum(costs[each] for costs in self._costs.values()) for each in (low, low + 1)]
        return at[0] + (bits - low) * (at[1] - at[0])

    def within(self, budget: float) -> dict[Weight, Clustering]:
        """The bits that cost the outputs least for so many bytes of the model; the fewest if those are not
        enough."""
        choices = Additive(self.damage, self._costs)
        picks = allocate(choices, budget - self._rest, choices.best())
        chosen = ((self._weights[name], bits) for name, bits in picks.items())
        return {weight: self.how(weight, bits) for weight, bits in chosen}

    def nbytes(self, chosen: Mapping[Weight, Clustering]) -> float:
        """Bytes of the model with these choices, about."""
        return self._rest + sum(weight.nbytes(how) for weight, how in chosen.items())


def _relative(wanted: Array, found: Array) -> float:
    noise = Noise()
    noise.add(wanted, found)
    return noise.noise / noise.variation if noise.variation > 0 else 0.0
