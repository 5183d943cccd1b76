"""Weights and biases as integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim.ir.download import deflated
from onnxslim.ir.graph import Array, Constant, Node
from onnxslim.ops import view_of
from onnxslim.ops.layouts import IntegerLayout

QMAX = 127
FOUR_BITS = 7
# Largest magnitude of a code by the type of weights; ONNX has no type of three bits.
LIMITS = {"int8": QMAX, "int4": FOUR_BITS, "int3": 3, "int2": 1}
# Largest |a| + |b| of two neighbouring codes of one sign for which 255·a + 255·b fits in 16 bits.
MAX_PAIR = 128
# Bias codes stay this far below 2^31, which leaves room for the sum they are added to.
MAX_BIAS_CODE = 2.0**30
# Factors by which the scale of a channel may grow in the search for codes that do not saturate; with 2
# every code is at most 64, and no pair can.
FACTORS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 2.0)
# How often the floor of scales that a share of the bytes takes is halved in.
FLOOR_STEPS = 10
TINY = np.float32(np.finfo(np.float32).tiny)

Weights = NDArray[np.float32]
Codes = NDArray[np.int8]
Scales = NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """Integer weights.

    Attributes:
        codes: int8, of the weight's shape.
        scales: float32, shape (channels,), or () if there is one for all.
        tightened: output channels whose codes would have saturated and were changed so that none can.
        lost: what the integers take from the mean of each output channel, float64, if that is known already.
    """

    codes: Codes
    scales: Scales
    tightened: int = 0
    lost: Array | None = None


def encode(
    weight: Array,
    axis: int,
    *,
    per_channel: bool,
    pair_axis: int | None = None,
    least: Scales | None = None,
    limit: int = QMAX,
) -> Encoded:
    """Round weights to symmetric integers, [-limit, limit], in int8.

    Args:
        weight: float32, finite, any rank >= 2.
        axis: the one that runs over output channels.
        per_channel: one scale per output channel instead of one for all.
        pair_axis: the one that x86 kernels run over fastest in a sum, where such sums may saturate; codes are
            then chosen so that no sum of two neighbouring products with uint8 activations leaves 16 bits.
        least: scales must be at least these, shape (channels,); see `least_scales`.
        limit: largest magnitude of a code; with fewer than eight bits, scales are chosen for the least error
            and larger weights clipped.
    """
    rest = pair_axis if pair_axis is not None else (axis + 1) % weight.ndim
    # Views: [channels, neighbours, rest], in whatever order the weight lies in memory.
    moved = np.moveaxis(weight, (axis, rest), (0, 1))
    table = moved.reshape(*moved.shape[:2], -1)
    scales = _scales(table, per_channel, least, limit)
    codes = _round(table, scales, limit)
    tightened = 0
    if pair_axis is not None:
        risky = np.flatnonzero(_saturates(codes))
        tightened = len(risky)
        if tightened and per_channel:
            codes[risky], scales[risky] = _tighten(table[risky], scales[risky])
        elif tightened:
            codes, scales = _tighten(table, scales, together=True)
    restored = np.moveaxis(codes.reshape(moved.shape), (0, 1), (axis, rest))
    kept = scales if per_channel else scales[:1].reshape(())
    return Encoded(np.ascontiguousarray(restored), kept, tightened)


def pair_axis_of(node: Node, rules: IntegerLayout) -> int | None:
    """The weight's axis along which kernels add products in pairs, where their sums could saturate.

    It is that of the input channels, the only other one of a matrix and the first other of a convolution.
    """
    layer = view_of(node)
    if not rules.saturates or layer is None or layer.channelwise:
        return None  # depthwise kernels widen before they multiply
    return 1 if layer.weight_axis == 0 else 0


def stored_limit(limit: int) -> int:
    """Largest magnitude of a code of a weight that is only stored as integers, where others have this one.

    With fewer than four bits that is the last product before an output, mostly, which stays in eight.
    """
    return limit if limit >= FOUR_BITS else QMAX


def floored(weight: Array, axis: int, least: Scales | None, floor: float) -> Scales | None:
    """Least scales that leave quiet channels fewer codes.

    An error counts the same in every channel, so that one with small weights gains little by codes of its
    own fineness, and fewer different codes take less room once they are compressed.

    Args:
        weight: float32.
        axis: that of output channels.
        least: what scales must be at least anyway.
        floor: in parts of the root mean square of the weight; 0 for none.
    """
    if not floor:
        return least
    value = np.float32(floor * np.sqrt(np.square(weight, dtype=np.float64).mean()))
    scales = np.zeros(weight.shape[axis], np.float32) if least is None else least
    return np.asarray(np.maximum(scales, value), np.float32)


def floor_for(weights: Sequence[tuple[Array, int]], share: float, limit: int = QMAX) -> float:
    """The floor with which the nearest codes take this share of their bytes once deflated, by halving.

    Args:
        weights: float32, each with its axis of output channels.
        share: of the bytes without a floor.
        limit: largest magnitude of a code.
    """

    def codes(floor: float) -> Iterator[bytes]:
        for weight, axis in weights:
            least = floored(weight, axis, None, floor)
            yield encode(weight, axis, per_channel=True, least=least, limit=limit).codes.tobytes()

    def sent(floor: float) -> int:
        return deflated(codes(floor))

    enough, lacking, goal = 1.0, 0.0, share * sent(0.0)
    for _ in range(FLOOR_STEPS):
        middle = (enough + lacking) / 2.0
        enough, lacking = (middle, lacking) if sent(middle) <= goal else (enough, middle)
    return enough


class Encoder:
    """`encode`, which remembers what it made of a constant: candidates differ in few weights.

    Args:
        better: by name of a constant, what makes better integers of these; it is given them, `pair_axis`, the
            limit and the least scales.
        known: by name of a constant, integers of it that are known already.
        kept: integers of a constant with an axis of channels that must stay what they are, for a limit.
        floor: see `floored`.
    """

    def __init__(
        self,
        better: Mapping[str, Callable[[Encoded, int | None, int, Scales | None], Encoded]] | None = None,
        known: Mapping[str, Encoded] | None = None,
        kept: Callable[[Constant, int, int], Encoded | None] = lambda constant, axis, limit: None,
        floor: float = 0.0,
    ) -> None:
        self._floor = floor
        self._better = {} if better is None else better
        self._given = {} if known is None else known
        self._kept = kept
        self._known: dict[tuple[Any, ...], Encoded] = {}

    def __call__(
        self,
        weight: Constant,
        axis: int,
        *,
        per_channel: bool,
        pair_axis: int | None = None,
        least: Scales | None = None,
        limit: int = QMAX,
    ) -> Encoded:
        """The constant's values as integers; see `encode`."""
        if (kept := self._kept(weight, axis, limit)) is not None:
            return kept if least is None else _holding(kept, least)
        loose = self._of(weight, axis, per_channel, pair_axis, None, limit)
        if least is None or bool((loose.scales >= least).all()):
            return loose
        return self._of(weight, axis, per_channel, pair_axis, least, limit)

    def _of(
        self,
        weight: Constant,
        axis: int,
        per_channel: bool,
        pair_axis: int | None,
        least: Scales | None,
        limit: int,
    ) -> Encoded:
        given = self._given.get(weight.name)
        if given is not None and per_channel and (least is None or bool((given.scales >= least).all())):
            return given
        key = (weight.name, axis, per_channel, pair_axis, None if least is None else least.tobytes(), limit)
        if key not in self._known:
            if per_channel:
                least = floored(weight.values, axis, least, self._floor)
            found = encode(
                weight.values,
                axis,
                per_channel=per_channel,
                pair_axis=pair_axis,
                least=least,
                limit=limit,
            )
            better = self._better.get(weight.name) if per_channel else None
            self._known[key] = better(found, pair_axis, limit, least) if better else found
        return self._known[key]


def _scales(table: Weights, per_channel: bool, least: Scales | None, limit: int = QMAX) -> Scales:
    absmax = np.maximum(table.max(axis=(1, 2)), -table.min(axis=(1, 2)))
    if not per_channel:
        absmax = np.broadcast_to(absmax.max(), absmax.shape)
    scales = np.where(absmax > 0, np.maximum(absmax / limit, TINY), 1.0).astype(np.float32)
    if limit < QMAX:
        scales = _clipping(table, scales, limit, together=not per_channel)
    if least is not None:
        scales = np.maximum(scales, least if per_channel else least.max(initial=0.0))
    return scales


def _clipping(table: Weights, scales: Scales, limit: int, *, together: bool) -> Scales:
    """Of some parts of these scales, those of least squared error, clipping included."""
    best, least = scales, np.full(len(scales), np.inf)
    for factor in np.linspace(1.0, 0.5, 21, dtype=np.float32):
        trial = scales * factor
        error = _round(table, trial, limit) * trial[:, None, None] - table
        squared = np.square(error).sum(axis=(1, 2))
        if together:
            squared[:] = squared.sum()
        best, least = np.where(squared < least, trial, best), np.minimum(squared, least)
    return np.asarray(best, np.float32)


def _round(table: Weights, scales: Scales, limit: int = QMAX) -> Codes:
    codes: Codes = np.rint(table * (1.0 / scales)[:, None, None]).clip(-limit, limit).astype(np.int8)
    return codes


def _pairs(codes: Codes) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Sums of neighbours along the second axis, and of its ends where a pair may reach across them."""
    inner = codes[:, 1:].astype(np.int16) + codes[:, :-1]
    across = codes[:, -1, :-1].astype(np.int16) + codes[:, 0, 1:]
    # With an even number of neighbours, pairs never reach from one group of them into the next.
    return inner, across if codes.shape[1] % 2 else across[:, :0]


def _saturates(codes: Codes, limit: int = MAX_PAIR) -> NDArray[np.bool_]:
    """Which channels have a pair of one sign that adds up to more than a limit."""
    inner, across = _pairs(codes)
    risky = (np.abs(inner) > limit).any(axis=(1, 2)) | (np.abs(across) > limit).any(axis=1)
    return np.asarray(risky)


def saturates(codes: Codes, axis: int, pair_axis: int, top: int) -> bool:
    """Whether sums of two neighbouring products with codes of up to `top` may leave 16 bits.

    See `encode` for the axes.
    """
    moved = np.moveaxis(codes, (axis, pair_axis), (0, 1))
    limit = MAX_PAIR * 255 // max(top, 1)
    return bool(_saturates(moved.reshape(*moved.shape[:2], -1), limit).any())


def unsaturated(codes: Codes, axis: int, pair_axis: int) -> Codes:
    """The same with every pair shrunk whose sum could saturate; see `encode` for the axes."""
    moved = np.moveaxis(codes, (axis, pair_axis), (0, 1))
    limited = _limit_pairs(moved.reshape(*moved.shape[:2], -1)).reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(limited, (0, 1), (axis, pair_axis)))


def _limit_pairs(codes: Codes) -> Codes:
    """Shrink both codes of every pair that could saturate by equal parts, to the limit.

    Pairs that start at even places come first, then those at odd ones, so that a kernel may begin its pairs
    anywhere. Codes only shrink, so that no round undoes one before it.
    """
    wide = codes.astype(np.int16)
    for start in (0, 1):
        _shrink(wide[:, start:-1:2], wide[:, start + 1 :: 2])
    if codes.shape[1] % 2:
        _shrink(wide[:, -1, :-1], wide[:, 0, 1:])
    return wide.astype(np.int8)


def _shrink(left: NDArray[np.int16], right: NDArray[np.int16]) -> None:
    total = left + right
    mask = np.abs(total) > MAX_PAIR
    if not mask.any():
        return
    over = np.nonzero(mask)
    sign, excess = np.sign(total[over]), np.abs(total[over]) - MAX_PAIR
    left[over] -= sign * (excess >> 1)
    right[over] -= sign * (excess - (excess >> 1))


def _tighten(table: Weights, scales: Scales, *, together: bool = False) -> tuple[Codes, Scales]:
    """For each channel, or all of them together, the scale and codes of least squared error that have no
    saturating pairs.
    """
    best_codes = np.zeros(table.shape, np.int8)
    best_scales = scales.copy()
    least = np.full(len(table), np.inf)
    left, failed = np.arange(len(table)), np.zeros(len(table), int)
    for factor in FACTORS:
        rows = table if len(left) == len(table) else table[left]
        trial = scales[left] * np.float32(factor)
        codes = _limit_pairs(_round(rows, trial))
        error = codes * trial[:, None, None]
        error -= rows
        squared = np.einsum("cpr,cpr->c", error, error)
        if together:
            squared[:] = squared.sum()
        better = squared < least[left]
        chosen = left[better]
        best_codes[chosen], best_scales[chosen], least[chosen] = codes[better], trial[better], squared[better]
        # Rounding loses more with every step, saturation less: what gets worse twice has passed its best.
        failed[left] = np.where(better, 0, failed[left] + 1)
        left = left[failed[left] < 2]
        if not len(left):
            break
    return best_codes, best_scales


def lost_mean(weight: Array, encoded: Encoded, axis: int, means: Array) -> Array | None:
    """What rounding the weights takes from the mean of each output channel: sum of (W - W_q) E[x].

    Added to the bias it removes the error's mean, which is most of the error where weights are few and
    activations never negative (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", ICCV 2019, with measured means). What padding takes from the mean is left out of account.

    Args:
        weight: float32.
        encoded: the same in integers.
        axis: the one that runs over output channels; the next one, or the one before, over input channels.
        means: of each input channel, shape (channels,).

    Returns:
        float64, shape (output channels,); None if the weight is not laid out in equal groups of channels.
    """
    inputs = 1 if axis == 0 else 0
    scales = encoded.scales.reshape(
        [-1 if i == axis and encoded.scales.ndim else 1 for i in range(weight.ndim)]
    )
    moved = np.moveaxis(weight - encoded.codes * scales, (axis, inputs), (0, 1))
    rest = moved.reshape(*moved.shape[:2], -1).sum(axis=2, dtype=np.float64)
    groups, left = divmod(len(means), rest.shape[1])
    if left or len(rest) % max(groups, 1) or (groups > 1 and axis != 0):
        return None
    by_group = rest.reshape(groups, -1, rest.shape[1])
    return np.asarray(np.einsum("goi,gi->go", by_group, means.reshape(groups, -1)).reshape(-1))


def least_scales(bias: Array, activation_scale: np.float32) -> Scales:
    """The weight scales, one per channel, below which a bias would not fit in int32.

    Matters only where all weights of a channel are next to nothing beside its bias.
    """
    steps = np.abs(bias.astype(np.float64)) / (float(activation_scale) * MAX_BIAS_CODE)
    return steps.astype(np.float32)


def _holding(encoded: Encoded, least: Scales) -> Encoded:
    """The same codes, on larger scales where a bias would not fit: weights count for nothing there."""
    scales = np.where(2.0 * encoded.scales < least, least, encoded.scales).astype(np.float32)
    return encoded if np.array_equal(scales, encoded.scales) else replace(encoded, scales=scales)


def encode_bias(bias: Array, scales: Scales, activation_scale: np.float32) -> tuple[Array, Scales]:
    """A bias as int32 in steps of activation scale times weight scale, and those steps, float32."""
    steps = (scales * activation_scale).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / steps.astype(np.float64))
    return codes.astype(np.int32), steps
