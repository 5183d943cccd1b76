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
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Gram
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize.storing import BLOCK, Blocks, nearest
from onnxslim.passes.quantize.weights import FOUR_BITS, MAX_PAIR, QMAX, Encoded

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

# Added to the diagonal, in parts of its mean: directions that the data hardly shows are not let loose.
DAMPING = 0.01
SWEEPS = 4
# With no more inputs than this, many starts are tried, with these parts of a scale.
FEW = 64
STARTS = tuple(np.linspace(0.65, 1.05, 9))
_BLOCK = 64


@dataclass(frozen=True)
class Rounder:
    """Makes better integers of the weight of one layer.

    Attributes:
        layer: whose weight it is; alpha of a Gemm is 1.
        gram: moments of what it sees.
        corrected: whether a bias takes in what the integers do to the mean.
        target: weights to come close to, as `Layer.matrix`, if not the layer's own.
        gptq: whether to start from `gptq` instead of the nearest codes.
    """

    layer: Layer
    gram: Gram
    corrected: bool
    target: Floats | None = None
    gptq: bool = False

    def four_bits(self, matrix: Floats) -> Blocks:
        """Four-bit codes of a matrix [inputs, outputs], and their scales; see `storing.Rounding`."""
        return round_blocks(matrix, self._moments()[0], self.gram.count, by_gptq=self.gptq)

    def _moments(self) -> Doubles:
        return self.gram.gram if self.corrected else self.gram.raw().gram

    def __call__(self, encoded: Encoded, pair_axis: int | None, limit: int, least: Floats | None) -> Encoded:
        """Better integers than these, under the same limits; arguments are those of `weights.encode`."""
        target = self.layer.matrix() if self.target is None else self.target
        if encoded.scales.size != target.shape[0] * target.shape[1]:
            return encoded
        codes = np.ascontiguousarray(self.layer.matrix_of(encoded.codes))
        saturates = pair_axis is not None and 2 * limit > MAX_PAIR
        channels = encoded.codes.shape[pair_axis] if saturates and pair_axis is not None else 0
        neighbours = Neighbours(channels, target.shape[2] // channels) if channels else None
        if self.gptq:
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
        )
        if target.shape[2] <= FEW and neighbours is None:
            best, scales = self._best_of_many(target, best, scales, limit, lower)
        lost = np.einsum("gmk,gk->gm", target - best * scales[..., None], self.gram.x_mean)
        return replace(
            encoded,
            codes=np.ascontiguousarray(self.layer.restored(best).astype(np.int8)),
            scales=scales.reshape(encoded.scales.shape),
            lost=lost.reshape(-1) if self.corrected else None,
        )

    def _best_of_many(
        self, target: Floats, codes: Floats, scales: Floats, limit: int, least: Floats | float
    ) -> tuple[Floats, Floats]:
        """Codes from many starts, the best for each output: with few inputs, chance counts for much."""
        moments, first = self._moments(), scales
        curvature = _damped(moments, self.gram.count)
        lowest = _losses(target, codes, scales, curvature)
        for factor in STARTS:
            tried = np.maximum(first * np.float32(factor), least).astype(np.float32)
            start = np.rint(target / tried[..., None]).clip(-limit, limit).astype(np.float32)
            found = refine(target, start, tried, moments, limit=limit, least=least, count=self.gram.count)
            loss = _losses(target, *found, curvature)
            better = loss < lowest
            codes, scales = np.where(better[..., None], found[0], codes), np.where(better, found[1], scales)
            lowest = np.minimum(loss, lowest)
        return codes, scales


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
    curvature = _damped(gram, count).astype(np.float64)
    steps = np.broadcast_to(scales[..., None] if scales.ndim == 2 else scales, target.shape)
    codes = np.empty(target.shape, np.float32)
    for group, matrix in enumerate(curvature):
        order = np.argsort(-np.diagonal(matrix), kind="stable")
        upper = np.linalg.cholesky(np.linalg.inv(matrix[np.ix_(order, order)])).T
        left, step = target[group][:, order].astype(np.float64), steps[group][:, order]
        for j, place in enumerate(order):
            code = np.rint(left[:, j] / step[:, j]).clip(-limit, limit)
            codes[group, :, place] = code
            error = (left[:, j] - code * step[:, j]) / upper[j, j]
            left[:, j:] -= error[:, None] * upper[j, j:]
    return codes


def _losses(target: Floats, codes: Floats, scales: Floats, curvature: Floats) -> Floats:
    error = codes * scales[..., None] - target
    return np.asarray(((error @ curvature) * error).sum(axis=2))


def round_blocks(matrix: Floats, gram: Doubles, count: int = 0, *, by_gptq: bool = False) -> Blocks:
    """Codes and scales of blocks, in turn, until the error of the outputs stays.

    Args:
        matrix: weights wanted, [inputs, outputs].
        gram: covariance of the inputs, float64.
        count: rows that it was taken from; 0 if it is exact.
        by_gptq: whether to start from `gptq` instead of the nearest codes.

    Returns:
        codes [inputs, outputs] and scales [blocks, outputs].
    """
    start, scales = nearest(matrix, np.diagonal(gram))
    curvature = _damped(gram[None], count)
    wanted, codes = np.ascontiguousarray(matrix.T)[None], np.ascontiguousarray(start.T)[None]
    if by_gptq:
        steps = np.ascontiguousarray(np.repeat(scales, BLOCK, axis=0)[: len(matrix)].T)[None]
        codes = gptq(wanted, steps, gram[None], limit=FOUR_BITS, count=count)
    for again in (True, True, False):
        steps = np.ascontiguousarray(np.repeat(scales, BLOCK, axis=0)[: len(matrix)].T)[None]
        codes = _descend(wanted, codes, steps, curvature, FOUR_BITS)
        if again:
            scales = _refitted_blocks(wanted[0], codes[0], scales, curvature[0])
    return np.ascontiguousarray(codes[0].T), scales


def _descend(target: Floats, codes: Floats, steps: Floats, curvature: Floats, limit: int) -> Floats:
    codes = codes.copy()
    for _ in range(SWEEPS):
        residual = np.asarray((codes * steps - target) @ curvature, np.float32)
        if not _sweep(codes, steps, residual, curvature, limit, None):
            break
    return codes


def _refitted_blocks(target: Floats, codes: Floats, scales: Floats, curvature: Floats) -> Floats:
    """Scales of least error for codes (outputs, inputs): least squares, one unknown per block and output."""
    outputs, inputs = codes.shape
    starts = np.arange(0, inputs, BLOCK)
    found = scales.T.copy()
    normal = np.empty((outputs, starts.size, starts.size), np.float64)
    for block, start in enumerate(starts):
        part = slice(start, start + BLOCK)
        pulled = (codes[:, part] @ curvature[part]) * codes
        normal[:, block] = np.add.reduceat(pulled, starts, axis=1)
    goal = np.add.reduceat((target @ curvature) * codes, starts, axis=1)
    diagonal = np.einsum("obb->ob", normal)
    # Held to what they are by a hundredth: a block of zeros says nothing about its scale.
    held = 0.01 * diagonal + 1e-6 * diagonal.mean() + 1e-30
    lacking = goal - np.einsum("obc,oc->ob", normal, found)
    np.einsum("obb->ob", normal)[...] += held
    found += np.linalg.solve(normal, lacking[..., None])[..., 0].astype(np.float32)
    return np.asarray(np.where(found > 0.5 * scales.T, found, scales.T).T, np.float32)


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

    Returns:
        codes and scales of the same shapes.
    """
    curvature = _damped(gram, count)
    codes = codes.copy()
    shared = scales.ndim == 2
    steps = np.ascontiguousarray(np.broadcast_to(scales[..., None] if shared else scales, target.shape))
    for sweep in range(SWEEPS):
        residual = np.asarray((codes * steps - target) @ curvature, np.float32)
        changed = _sweep(codes, steps, residual, curvature, limit, neighbours)
        if sweep == 0 and shared:
            scales = np.maximum(_refitted(target, codes, scales, curvature), least)
            steps = np.ascontiguousarray(np.broadcast_to(scales[..., None], target.shape))
        if not changed:
            break
    return codes, scales


def _damped(gram: Doubles, count: int = 0) -> Floats:
    """A covariance that few rows do not make certain of what they happened to show.

    Off the diagonal it shrinks the more, the fewer rows there are for each input.

    Args:
        gram: covariance of inputs, float64 (groups, inputs, inputs).
        count: rows it was taken from; 0 if it is exact.
    """
    size = gram.shape[-1]
    diagonal = np.einsum("gkk->gk", gram)
    mean = diagonal.mean(axis=1, keepdims=True)
    shrunk = gram * (count / (count + size) if count else 1.0)
    index = np.arange(size)
    shrunk[:, index, index] = diagonal + np.where(mean > 0, DAMPING * mean, 1.0)
    return shrunk.astype(np.float32)


def _sweep(
    codes: Floats,
    steps: Floats,
    residual: Floats,
    curvature: Floats,
    limit: int,
    neighbours: Neighbours | None,
) -> int:
    """One round over all inputs, in place; returns how many codes changed."""
    size, changed = codes.shape[-1], 0
    for start in range(0, size, _BLOCK):
        block = slice(start, min(start + _BLOCK, size))
        before = codes[..., block].copy()
        local = residual[..., block].copy()
        for j in range(block.start, block.stop):
            pull = local[..., j - start] / (steps[..., j] * curvature[:, None, j, j])
            low, high = neighbours.bounds(codes, j) if neighbours else (-limit, limit)
            wanted = np.rint(codes[..., j] - pull).clip(low, high)
            step = (wanted - codes[..., j]) * steps[..., j]
            codes[..., j] = wanted
            local += step[..., None] * curvature[:, None, j, block]
        delta = codes[..., block] - before
        changed += int(np.count_nonzero(delta))
        residual += (delta * steps[..., block]) @ curvature[:, block, :]
    return changed


def _refitted(target: Floats, codes: Floats, scales: Floats, curvature: Floats) -> Floats:
    """The scale of least error for each row of codes; as before where that is nothing sensible."""
    weighted = codes @ curvature
    along = np.einsum("gmk,gmk->gm", weighted, target)
    own = np.einsum("gmk,gmk->gm", weighted, codes)
    ratio = np.where(own > 0, along / np.maximum(own, 1e-30), scales)
    return np.where(np.abs(ratio / scales - 1) < 0.1, ratio, scales).astype(np.float32)


class Neighbours:
    """Which codes of a row are summed in one 16-bit step with which others.

    Kernels run over input channels fastest: the neighbours of a code are those of the channels before and
    after it at the same kernel position, and at the ends those of the next position where they may meet.

    Args:
        channels: input channels of a group.
        positions: kernel positions; inputs are ordered by channel, then position.
    """

    def __init__(self, channels: int, positions: int) -> None:
        order = np.arange(channels * positions).reshape(channels, positions).T.ravel()
        crosses = channels % 2 == 1
        self._of: list[list[int]] = [[] for _ in order]
        for place, (one, other) in enumerate(pairwise(order)):
            if crosses or (place + 1) % channels:
                self._of[one].append(int(other))
                self._of[other].append(int(one))

    def bounds(self, codes: Floats, j: int) -> tuple[Floats, Floats]:
        """Least and largest value the codes of input j may take, float32 (groups, outputs)."""
        shape = codes.shape[:-1]
        low = np.full(shape, -QMAX, np.float32)
        high = np.full(shape, QMAX, np.float32)
        for other in self._of[j]:
            beside = codes[..., other]
            np.minimum(high, MAX_PAIR - np.maximum(beside, 0), out=high)
            np.maximum(low, -MAX_PAIR - np.minimum(beside, 0), out=low)
        return low, high
