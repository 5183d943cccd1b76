"""How many bits each weight gets: what the outputs lose by it, and which of them are worth their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxslim.calibration.fidelity import SAMPLES, Judge
from onnxslim.calibration.gram import observe
from onnxslim.calibration.noise import Noise
from onnxslim.calibration.samples import Samples
from onnxslim.engine.allocate import Additive, allocate
from onnxslim.engine.base import Context, Effort, Log
from onnxslim.ir.download import deflated
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Floats
from onnxslim.passes.cluster.apply import apply
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.cluster.weights import WIDTHS, Weight
from onnxslim.passes.codes.tables import MOST_BITS, even
from onnxslim.passes.quantize.coder import portions
from onnxslim.passes.quantize.rate import Priced, least_steps, power_of, price_within
from onnxslim.passes.quantize.rounding import damped

# Damage is measured with codes of so many bits, and a quarter of it is left with every bit more: 5 to 6 dB.
MEASURED_BITS, LEFT_PER_BIT = 4, 0.25
# Samples that the damage of a single weight is measured on.
JUDGED: Mapping[Effort, int] = {"quick": 8, "normal": SAMPLES, "thorough": 2 * SAMPLES}
_TINY = 1e-30


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
        judge = Judge(model, data.tune, self._ctx.target, JUDGED[self._how.effort])
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


class PriceChoice:
    """Chooses one price, in error of the outputs of the model, that a bit of any weight is worth.

    Args:
        model: not modified.
        weights: of it.
        choice: says what single weights cost the outputs.
        data: of which moments are taken, in one pass; None to go by the weights themselves.
        ctx: target.
    """

    def __init__(
        self, model: Model, weights: Sequence[Weight], choice: BitChoice, data: Samples | None, ctx: Context
    ) -> None:
        self._choice, self._weights = choice, list(weights)
        # Of each weight, the share of what its layer makes that costs the outputs all of theirs.
        self._rates: dict[str, float] = {}
        self._priced: list[Priced] = []
        for weight, curvature in _seen(model, weights, data, ctx):
            how, values = choice.how(weight, MEASURED_BITS), weight.constant.values
            error = values - how.of(values, weight.axis).values()
            if curvature is None or weight.layer is None:
                metric: Floats = np.ones((1, 1, 1), np.float32)
                target, error = (each.reshape(1, -1, 1).astype(np.float32) for each in (values, error))
            else:
                metric, matrix = curvature, weight.layer.matrix_of
                target, error = matrix(values), matrix(error)
            lost = power_of(error, metric) / max(power_of(target, metric), _TINY)
            rate = max(lost, _TINY) / max(choice.damage[weight.name][MEASURED_BITS], _TINY)
            steps = least_steps(target, metric, rate)
            apart = how.scaled and steps.size == weight.shape[weight.axis]
            self._rates[weight.name] = rate
            self._priced.append(Priced(values, weight.axis, steps if apart else steps[:1]))

    def within(self, sent: float) -> dict[Weight, Clustering]:
        """How weights are stored if the nearest codes of all of them are to take so many bytes."""
        price = price_within(self._sent, sent)
        return {
            weight: replace(self._choice.how(weight, MOST_BITS), price=price * self._rates[weight.name])
            for weight in self._weights
        }

    def _sent(self, price: float) -> int:
        """Bytes of the nearest codes, once deflated."""
        root = np.float32(np.sqrt(price))
        return deflated(
            even(each.weight, each.steps * root, each.axis).codes.tobytes() for each in self._priced
        )


def _seen(
    model: Model, weights: Sequence[Weight], data: Samples | None, ctx: Context
) -> Iterator[tuple[Weight, Floats | None]]:
    """Weights with the moments of what their layers see, where there are any."""
    left = {weight.name: weight for weight in weights}
    named = {weight.layer.node.outputs[0].name: weight for weight in weights if weight.layer is not None}
    if data is not None:
        for rows, layers in portions([weight.layer for weight in named.values() if weight.layer is not None]):
            names = [layer.node.outputs[0].name for layer in layers]
            grams = observe(model, data.fit, names, alone=True, rows=rows, target=ctx.target)
            for name, gram in grams.items():
                yield left.pop(named[name].name), damped(gram.gram, gram.count)
    yield from ((weight, None) for weight in left.values())


def _relative(wanted: Array, found: Array) -> float:
    noise = Noise()
    noise.add(wanted, found)
    return noise.noise / noise.variation if noise.variation > 0 else 0.0
