"""Rounds weights so that the outputs of a layer change least, instead of the weights.

With C the covariance of what a layer sees and E the error of its weights, the error of its outputs is E C E^T
once the bias has taken in the mean. That is a quadratic function of integer codes: coordinate descent takes
one code of every row at a time to the best integer while the others stay, until little changes. Every step is
exact and can only lower the error, limits on codes are just limits of a step, and groups and depthwise layers
are small separate problems, solved side by side. (Starting from the nearest codes it ends about as well as
GPTQ; Frantar et al., "GPTQ", ICLR 2023, and Nair and Suggala, "CDQuant", 2024.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Gram
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize.blocks import Blocking, Blocks, Limit, nearest
from onnxslim.passes.quantize.choices import Algorithm
from onnxslim.passes.quantize.descent import Descent, Floats, Neighbours, Pulls, by_input, by_output
from onnxslim.passes.quantize.rate import Rate, least_steps, power_of
from onnxslim.passes.quantize.weights import MAX_PAIR, QMAX, Encoded, encode

Doubles = NDArray[np.float64]

# Added to the diagonal, in parts of its mean: directions that the data hardly shows are not let loose.
DAMPING = 0.01
SWEEPS = 4
# Of the codes, the part that has to change in a sweep for another one.
_ENOUGH_CHANGED = 0.005
# The same with a scale for every few inputs, from where GPTQ ends and from the nearest codes.
FEW_SWEEPS, MANY_SWEEPS = 3, 12
# With no more inputs than this, many starts are tried, with these parts of a scale.
FEW = 64
STARTS = tuple(np.linspace(0.65, 1.05, 9))


@dataclass(frozen=True)
class Rounder:
    """Makes better integers of the weight of one layer.

    Attributes:
        layer: whose weight it is; alpha of a Gemm is 1.
        gram: moments of what it sees.
        corrected: whether a bias takes in what the integers do to the mean.
        target: weights to come close to, as `Layer.matrix`, if not the layer's own.
        algorithm: which codes to start from: "gptq", the nearest ("cd"), or ("auto") those of GPTQ where
            scales are chosen with them, and else the nearest.
        price: share of the power of the outputs that a bit of the codes is worth; see `rate`.
    """

    layer: Layer
    gram: Gram
    corrected: bool
    target: Floats | None = None
    algorithm: Algorithm = "auto"
    price: float = 0.0

    def in_blocks(self, matrix: Floats, blocking: Blocking) -> Blocks:
        """Codes of a matrix [inputs, outputs] with a scale for each block; see `blocks.Rounding`."""
        by_gptq = self.algorithm != "cd"
        return round_blocks(matrix, blocking, self._moments()[0], self.gram.count, by_gptq=by_gptq)

    def _moments(self) -> Doubles:
        return self.gram.gram if self.corrected else self.gram.raw().gram

    def __call__(self, encoded: Encoded, pair_axis: int | None, limit: int, least: Floats | None) -> Encoded:
        """Better integers than these, under the same limits; arguments are those of `weights.encode`."""
        target = self.layer.matrix() if self.target is None else self.target
        if encoded.scales.size != target.shape[0] * target.shape[1]:
            return encoded
        if self.price:
            encoded, least = self._coarser(target, pair_axis, limit, least)
        codes = np.ascontiguousarray(self.layer.matrix_of(encoded.codes))
        saturates = pair_axis is not None and 2 * limit > MAX_PAIR
        channels = encoded.codes.shape[pair_axis] if saturates and pair_axis is not None else 0
        neighbours = Neighbours(channels, target.shape[2] // channels) if channels else None
        if self.algorithm == "gptq":
            fixed = encoded.scales.reshape(target.shape[:2])
            codes = gptq(target, fixed, self._moments(), limit=limit, count=self.gram.count)
        lower = 0.0 if least is None else least.reshape(target.shape[:2])
        best, scales = refine(
            target,
            codes,
            encoded.scales.reshape(target.shape[:2]),
            self._moments(),
            limit=limit,
            neighbours=neighbours,
            least=lower,
            count=self.gram.count,
            price=self.price,
        )
        if not self.price and target.shape[2] <= FEW and neighbours is None:
            best, scales = self._best_of_many(target, best, scales, limit, lower)
        lost = np.einsum("gmk,gk->gm", target - best * scales[..., None], self.gram.x_mean)
        return replace(
            encoded,
            codes=np.ascontiguousarray(self.layer.restored(best).astype(np.int8)),
            scales=scales.reshape(encoded.scales.shape),
            lost=lost.reshape(-1) if self.corrected else None,
        )

    def _coarser(
        self, target: Floats, pair_axis: int | None, limit: int, least: Floats | None
    ) -> tuple[Encoded, Floats]:
        """The nearest integers with scales that are worth their bits, and these."""
        steps = least_steps(target, damped(self._moments(), self.gram.count), self.price)
        bound = steps if least is None else np.maximum(least, steps)
        weight, axis = self.layer.restored(target).astype(np.float32), self.layer.weight_axis
        found = encode(weight, axis, per_channel=True, pair_axis=pair_axis, least=bound, limit=limit)
        return found, bound

    def _best_of_many(
        self, target: Floats, codes: Floats, scales: Floats, limit: int, least: Floats | float
    ) -> tuple[Floats, Floats]:
        """Codes from many starts, the best for each output: with few inputs, chance counts for much."""
        moments, outputs, many = self._moments(), target.shape[1], len(STARTS)
        bound = np.tile(np.broadcast_to(np.float32(least), scales.shape), (1, many))
        factors = np.repeat(np.array(STARTS, np.float32), outputs)
        tried, wanted = np.maximum(np.tile(scales, (1, many)) * factors, bound), np.tile(target, (1, many, 1))
        start = np.rint(wanted / tried[..., None]).clip(-limit, limit).astype(np.float32)
        found = refine(wanted, start, tried, moments, limit=limit, least=bound, count=self.gram.count)
        every = np.concatenate((codes, found[0]), axis=1), np.concatenate((scales, found[1]), axis=1)
        losses = _losses(np.concatenate((target, wanted), axis=1), *every, damped(moments, self.gram.count))
        best = losses.reshape(len(target), -1, outputs).argmin(axis=1) * outputs + np.arange(outputs)
        return np.take_along_axis(every[0], best[..., None], axis=1), np.take_along_axis(
            every[1], best, axis=1
        )


def gptq(target: Floats, scales: Floats, gram: Doubles, *, limit: int = QMAX, count: int = 0) -> Floats:
    """Codes by GPTQ with columns in the order of their power (Frantar et al., ICLR 2023).

    After each column is rounded, those still to come take back what they can of its error.

    Args:
        target: weights wanted, float32 (groups, outputs, inputs).
        scales: of each output, float32 (groups, outputs), or of each weight (groups, outputs, inputs).
        gram: covariance of the inputs, float64 (groups, inputs, inputs).
        limit: largest magnitude of a code.
        count: rows that the covariance was taken from; 0 if it is exact.

    Returns:
        float32 (groups, outputs, inputs).
    """
    return by_output(_by_gptq(by_input(target), _steps(scales), damped(gram, count), (-limit, limit)))


def _by_gptq(target: Floats, steps: Floats, curvature: Floats, limits: tuple[Limit, Limit]) -> Floats:
    order = np.argsort(-np.einsum("gkk->gk", curvature), axis=1, kind="stable")
    rows = np.take_along_axis(curvature, order[:, :, None], axis=1)
    pulls = Pulls.in_order(np.take_along_axis(rows, order[:, None], axis=2))
    places = order.T[..., None]
    wanted = np.take_along_axis(target, places, axis=0)
    steps = np.take_along_axis(np.broadcast_to(steps, target.shape), places, axis=0)
    low, high = (
        each if isinstance(each, int) else np.take_along_axis(each, places, axis=0) for each in limits
    )
    work = Descent(wanted, np.zeros_like(target), steps, (low, high))
    work.sweep(pulls)
    codes = np.empty_like(target)
    np.put_along_axis(codes, places, work.codes, axis=0)
    return codes


def _steps(scales: Floats) -> Floats:
    """Scales of outputs, or of each weight, as `Descent` takes them."""
    return scales[None] if scales.ndim == 2 else by_input(scales)


def round_blocks(
    matrix: Floats, blocking: Blocking, gram: Doubles, count: int = 0, *, by_gptq: bool = False
) -> Blocks:
    """Codes and scales of blocks, in turn, until the error of the outputs stays.

    Args:
        matrix: weights wanted, [inputs, outputs].
        blocking: how they are coded.
        gram: covariance of the inputs, float64.
        count: rows that it was taken from; 0 if it is exact.
        by_gptq: whether to start from `gptq` instead of the nearest codes.
    """
    start = nearest(matrix, blocking, np.diagonal(gram))
    low, high = blocking.limits(start.zeros, len(matrix))
    limits = _per_input(low), _per_input(high)
    target, codes = matrix[:, None], start.counted()[:, None].astype(np.float32)
    steps = blocking.spread(start.scales, len(matrix))[:, None]
    curvature = damped(gram[None], count)
    if by_gptq:
        codes = _by_gptq(target, steps, curvature, limits)
    work, pulls = Descent(target, codes, steps, limits, size=blocking.size), Pulls.of(curvature)
    for _ in range(FEW_SWEEPS if by_gptq else MANY_SWEEPS):
        if not work.sweep(pulls, scaled=True):
            break
    scales = np.ascontiguousarray(work.steps[:: blocking.size, 0])
    return Blocks.of(work.codes[:, 0], scales, blocking, start.zeros)


def _per_input(limit: Limit) -> Limit:
    """Limits of a matrix as `Descent` takes them."""
    return limit if isinstance(limit, int) else limit[:, None]


def refine(
    target: Floats,
    codes: Floats,
    scales: Floats,
    gram: Doubles,
    *,
    limit: int = QMAX,
    neighbours: Neighbours | None = None,
    least: Floats | float = 0.0,
    count: int = 0,
    price: float = 0.0,
) -> tuple[Floats, Floats]:
    """Better codes than the given ones, and better scales where there is one for each output.

    Args:
        target: weights wanted, float32 (groups, outputs, inputs), as `Layer.matrix`.
        codes: integers to start from, as float32, of the same shape; they keep all limits.
        scales: of each output, float32 (groups, outputs), or of each weight (groups, outputs, inputs).
        gram: covariance of the inputs, float64 (groups, inputs, inputs).
        limit: largest magnitude of a code.
        neighbours: which codes must not add up to more than `weights.MAX_PAIR`, if any.
        least: what scales must not fall below, of each output.
        count: rows that the covariance was taken from; 0 if it is exact.
        price: share of the power of the outputs that a bit of the codes is worth; see `rate`.

    Returns:
        codes and scales of the same shapes.
    """
    curvature = damped(gram, count)
    pulls, wanted = Pulls.of(curvature), by_input(target)
    rate = Rate(price * power_of(target, curvature), -limit, limit) if price else None
    work = Descent(wanted, by_input(codes), _steps(scales), (-limit, limit), neighbours, rate=rate)
    for sweep in range(SWEEPS):
        changed = work.sweep(pulls)
        if sweep == 0 and scales.ndim == 2:
            scales = np.maximum(_refitted(wanted, work.codes, scales, pulls), least)
            work.take(scales)
        if changed <= _ENOUGH_CHANGED * codes.size:
            break
    return by_output(work.codes), scales


def _losses(target: Floats, codes: Floats, scales: Floats, curvature: Floats) -> Floats:
    error = codes * scales[..., None] - target
    return np.asarray(((error @ curvature) * error).sum(axis=2))


def damped(gram: Doubles, count: int = 0) -> Floats:
    """A covariance that few rows do not make certain of what they happened to show.

    Off the diagonal it shrinks the more, the fewer rows there are for each input.

    Args:
        gram: covariance of inputs, float64 (groups, inputs, inputs).
        count: rows it was taken from; 0 if it is exact.
    """
    gram = np.asarray(gram)  # slices of one that lies in a file take ten times as long
    size = gram.shape[-1]
    diagonal = np.einsum("gkk->gk", gram)
    mean = diagonal.mean(axis=1, keepdims=True)
    shrunk = gram * (count / (count + size) if count else 1.0)
    index = np.arange(size)
    shrunk[:, index, index] = diagonal + np.where(mean > 0, DAMPING * mean, 1.0)
    return shrunk.astype(np.float32)


def _refitted(target: Floats, codes: Floats, scales: Floats, pulls: Pulls) -> Floats:
    """The scale of least error for each output's codes; as before where that is nothing sensible."""
    weighted = pulls.times(codes)
    along, own = (weighted * target).sum(axis=0), (weighted * codes).sum(axis=0)
    ratio = np.where(own > 0, along / np.maximum(own, 1e-30), scales)
    return np.where(np.abs(ratio / scales - 1) < 0.1, ratio, scales).astype(np.float32)
