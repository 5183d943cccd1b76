"""What codes of weights cost besides error: bits, once the file is compressed.

Everything follows from one price: the error of a layer's outputs, relative to what the layer makes, that a
bit is worth. Rounding to steps s loses C s² / 12 a weight, C being what the square of its error counts, and a
step twice as large takes one bit less: at a price p both are worth the same where s² = 6 p / (C ln 2). Scales
do not fall below that, and descent goes on to codes that are frequent and near enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.ir.download import deflated
from onnxslim.passes.quantize.blocks import Limit
from onnxslim.passes.quantize.weights import QMAX, Scales, Weights, encode

Floats = NDArray[np.float32]
# From codes to what each of them loses.
Errors: TypeAlias = Callable[[Floats], Floats]
# Prices that are looked at, and how often what lies between them is halved.
LEAST, MOST, STEPS = 1e-14, 1e-2, 12


class Rate:
    """What codes cost besides the error: bits, by how many others are the same, at a price.

    A code that a share p of all has takes -log2(p) bits, which is what entropy coders come to (Chou,
    Lookabaugh and Gray, "Entropy-constrained vector quantization", 1989).

    Args:
        price: error of the outputs that a bit is worth.
        least, most: codes there are.
    """

    def __init__(self, price: float, least: int, most: int) -> None:
        self._price, self._least = np.float32(price), least
        self._costs = np.zeros(most - least + 1, np.float32)

    def renew(self, codes: Floats) -> None:
        """Count these codes; one that nothing has costs as much as if half a weight had it."""
        counts = np.bincount((codes.ravel() - self._least).astype(np.intp), minlength=len(self._costs))
        self._costs = -self._price * np.log2(np.maximum(counts, 0.5) / codes.size).astype(np.float32)

    def best(self, code: Floats, errors: Errors, least: Limit, most: Limit) -> Floats:
        """Of the nearest codes and those beside them, within limits, the ones that cost least.

        Args:
            code: the nearest, within the limits.
            errors: what codes instead of these lose.
            least, most: the limits.
        """
        best, cost = code, self._of(code, errors)
        for step in (-1, 1):
            other = np.minimum(np.maximum(code + step, least), most)
            theirs = self._of(other, errors)
            best, cost = np.where(theirs < cost, other, best), np.minimum(theirs, cost)
        return np.asarray(best, np.float32)

    def _of(self, code: Floats, errors: Errors) -> Floats:
        return np.asarray(errors(code) + self._costs[(code - self._least).astype(np.intp)])


def power_of(target: Floats, curvature: Floats) -> float:
    """Of what a layer makes of its data: W C W^T, summed over outputs.

    Args:
        target: its weights, (groups, outputs, inputs).
        curvature: moments of its inputs, (groups, inputs, inputs).
    """
    return float(((target @ curvature) * target).sum(dtype=np.float64))


def least_steps(target: Floats, curvature: Floats, price: float) -> Scales:
    """The scale of each output below which bits cost more than they save; the same for a whole group."""
    counts = np.maximum(np.einsum("gkk->g", curvature) / curvature.shape[-1], 1e-30)
    steps = np.sqrt(6.0 * price * power_of(target, curvature) / (np.log(2.0) * counts))
    return np.repeat(steps, target.shape[1]).astype(np.float32)


@dataclass(frozen=True)
class Priced:
    """A weight, as far as its size at a price depends on it.

    Attributes:
        weight: float32.
        axis: that of its output channels.
        steps: `least_steps` at a price of one, by output channel.
    """

    weight: Weights
    axis: int
    steps: Scales


def price_for(weights: Sequence[Priced], share: float, limit: int = QMAX) -> float:
    """The price at which codes take this share of the bytes of the nearest ones, once deflated, by halving.

    Args:
        weights: of all layers.
        share: of the bytes.
        limit: largest magnitude of a code.
    """

    def sent(price: float) -> int:
        least = (each.steps * np.float32(np.sqrt(price)) for each in weights)
        return deflated(
            encode(each.weight, each.axis, per_channel=True, least=steps, limit=limit).codes.tobytes()
            for each, steps in zip(weights, least, strict=True)
        )

    return price_within(sent, share * sent(0.0))


def price_within(sent: Callable[[float], int], goal: float) -> float:
    """The least price at which no more bytes than wanted are sent, by halving; `MOST` if there is none."""
    enough, lacking = MOST, LEAST
    for _ in range(STEPS):
        middle = float(np.sqrt(enough * lacking))
        enough, lacking = (middle, lacking) if sent(middle) <= goal else (enough, middle)
    return enough
