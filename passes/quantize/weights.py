"""Weights and biases as integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxslim.graph import Array

QMAX = 127
# Largest |a| + |b| of two neighbouring codes of one sign for which 255·a + 255·b fits in 16 bits.
MAX_PAIR = 128
# Bias codes stay this far below 2^31, which leaves room for the sum they are added to.
MAX_BIAS_CODE = 2.0**30
# Factors by which the scale of a channel may grow in the search for codes that do not saturate; with 2
# every code is at most 64, and no pair can.
_FACTORS = np.linspace(1.0, 2.0, 21)
_TINY = np.float32(np.finfo(np.float32).tiny)

Codes = NDArray[np.int8]
Scales = NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """Integer weights.

    Attributes:
        codes: int8, of the weight's shape.
        scales: float32, shape (channels,), or () if there is one for all.
        tightened: output channels whose codes would have saturated and were changed so that none can.
    """

    codes: Codes
    scales: Scales
    tightened: int = 0


def encode(
    weight: Array,
    axis: int,
    *,
    per_channel: bool,
    reduction: tuple[int, ...] | None = None,
    least: Scales | None = None,
) -> Encoded:
    """Round weights to symmetric int8, [-127, 127].

    Args:
        weight: float32, finite, any rank >= 2.
        axis: the one that runs over output channels.
        per_channel: one scale per output channel instead of one for all.
        reduction: the other axes in the order in which an x86 kernel runs over them; if given, codes are
            chosen so that no sum of two neighbouring products with uint8 activations leaves 16 bits.
        least: scales must be at least these, shape (channels,); see `least_scales`.
    """
    rows = _rows(weight, axis, reduction)
    absmax = np.abs(rows).max(axis=1, initial=0.0)
    if not per_channel:
        absmax = np.broadcast_to(absmax.max(initial=0.0), absmax.shape)
    scales = np.where(absmax > 0, np.maximum(absmax / QMAX, _TINY), 1.0).astype(np.float32)
    if least is not None:
        scales = np.maximum(scales, least if per_channel else least.max(initial=0.0))
    codes = _round(rows, scales)
    tightened = 0
    if reduction is not None:
        risky = np.flatnonzero(_saturates(codes))
        tightened = len(risky)
        if tightened and per_channel:
            codes[risky], scales[risky] = _tighten(rows[risky], scales[risky])
        elif tightened:
            codes = _limit_pairs(codes)
    restored = _restore(codes, weight.shape, axis, reduction)
    return Encoded(restored, scales if per_channel else scales[:1].reshape(()), tightened)


def _rows(weight: Array, axis: int, reduction: tuple[int, ...] | None) -> NDArray[np.float32]:
    order = reduction or tuple(i for i in range(weight.ndim) if i != axis)
    moved = np.transpose(weight, (axis, *order))
    return np.ascontiguousarray(moved.reshape(moved.shape[0], -1), dtype=np.float32)


def _restore(codes: Codes, shape: tuple[int, ...], axis: int, reduction: tuple[int, ...] | None) -> Codes:
    order = (axis, *(reduction or tuple(i for i in range(len(shape)) if i != axis)))
    moved = codes.reshape([shape[i] for i in order])
    return np.ascontiguousarray(np.transpose(moved, np.argsort(order)))


def _round(rows: NDArray[np.float32], scales: Scales) -> Codes:
    codes: Codes = np.clip(np.rint(rows / scales[:, None]), -QMAX, QMAX).astype(np.int8)
    return codes


def _saturates(codes: Codes) -> NDArray[np.bool_]:
    """Which rows have a pair of neighbours of one sign that adds up to more than `MAX_PAIR`."""
    wide = codes.astype(np.int16)
    return np.asarray((np.abs(wide[:, 1:] + wide[:, :-1]) > MAX_PAIR).any(axis=1))


def _limit_pairs(codes: Codes) -> Codes:
    """Shrink both codes of every pair that could saturate by equal parts, to the limit.

    Pairs start at even places; those that start at odd ones are limited too, so that a kernel may begin
    its pairs anywhere. Codes only shrink, so the second round does not undo the first.
    """
    wide = codes.astype(np.int16)
    for start in (0, 1):
        left, right = wide[:, start:-1:2], wide[:, start + 1 :: 2]
        total = left + right
        excess = np.maximum(np.abs(total) - MAX_PAIR, 0)
        sign = np.sign(total)
        left -= sign * (excess // 2)
        right -= sign * (excess - excess // 2)
    return wide.astype(np.int8)


def _tighten(rows: NDArray[np.float32], scales: Scales) -> tuple[Codes, Scales]:
    """For each row the scale, and the codes without saturating pairs, of least squared error."""
    best_codes = np.zeros(rows.shape, np.int8)
    best_scales = scales.copy()
    least = np.full(len(rows), np.inf)
    for factor in _FACTORS:
        trial = (scales * np.float32(factor)).astype(np.float32)
        codes = _limit_pairs(_round(rows, trial))
        error = np.square(codes * trial[:, None] - rows).sum(axis=1)
        better = error < least
        best_codes[better], best_scales[better], least[better] = codes[better], trial[better], error[better]
    return best_codes, best_scales


def least_scales(bias: Array, activation_scale: np.float32) -> Scales:
    """The weight scales, one per channel, below which a bias would not fit in int32.

    Matters only where all weights of a channel are next to nothing beside its bias.
    """
    steps = np.abs(bias.astype(np.float64)) / (float(activation_scale) * MAX_BIAS_CODE)
    return steps.astype(np.float32)


def encode_bias(bias: Array, scales: Scales, activation_scale: np.float32) -> tuple[Array, Scales]:
    """A bias as int32 in steps of activation scale times weight scale, and those steps, float32."""
    steps = (scales * activation_scale).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / steps.astype(np.float64))
    return codes.astype(np.int32), steps
