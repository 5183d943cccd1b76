"""Second moments of what layers see and make, from one streaming pass over calibration data.

For every layer y = W x + b asked for, `observe` gives mean and covariance of x (im2col for convolutions) and
its covariance with y, or with any other tensor of y's shape: what least squares, whitening and scores of the
OBS kind take. Rows are a seeded, evenly spread sample of the positions of the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.collect import Progress, Runner, tapped
from onnxslim.calibration.data import CalibrationData
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Floats, Layer, Positions, layer_of
from onnxslim.runtime.targets import Target

Doubles = NDArray[np.float64]

# Rows per layer; more than this changes the weights found from a few hundred images by less than their noise.
ROWS = 1 << 15
# Rows per product: as many as fit this number of elements, within bounds.
_ELEMENTS = 1 << 23
_LEAST, _BLOCK = 256, 2048
_MANY = 512  # samples to reckon with where the source does not know how many it has


@dataclass(frozen=True, eq=False)
class Gram:
    """Moments of rows x (inputs of a layer) and y (values at the same positions), float64, centred.

    g is the number of groups, k the inputs per group (channel by channel, kernel positions innermost), m the
    outputs per group.

    Attributes:
        gram: E[(x - mean)(x - mean)^T], shape (g, k, k).
        cross: E[(y - mean)(x - mean)^T], shape (g, m, k).
        power: E[(y - mean)^2], shape (g, m).
        x_mean, y_mean: shapes (g, k) and (g, m).
        count: number of rows.
    """

    gram: Doubles
    cross: Doubles
    power: Doubles
    x_mean: Doubles
    y_mean: Doubles
    count: int

    def around(self, x: Doubles, y: Doubles) -> Gram:
        """The same rows with moments taken around other points than their means, shapes (g, k) and (g, m)."""
        dx, dy = self.x_mean - x, self.y_mean - y
        return Gram(
            self.gram + dx[:, :, None] * dx[:, None, :],
            self.cross + dy[:, :, None] * dx[:, None, :],
            self.power + dy**2,
            x,
            y,
            self.count,
        )

    def raw(self) -> Gram:
        """Moments around zero: `gram` is E[x x^T] and so on."""
        return self.around(np.zeros_like(self.x_mean), np.zeros_like(self.y_mean))

    def joined(self, other: Gram) -> Gram:
        """Of the rows of both."""
        count = self.count + other.count
        a, b = self.count / count, other.count / count
        x, y = a * self.x_mean + b * other.x_mean, a * self.y_mean + b * other.y_mean
        one, two = self.around(x, y), other.around(x, y)
        gram, cross, power = (
            a * p + b * q for p, q in ((one.gram, two.gram), (one.cross, two.cross), (one.power, two.power))
        )
        return Gram(gram, cross, power, x, y, count)


class Moments:
    """Sums up moments of pairs of matrices.

    Products are taken in float32, over blocks of rows from which the mean of the first block is subtracted,
    and added up in float64. Floating-point sums depend on their order: the same order gives the same bits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._filled = 0
        self._blocks: tuple[Floats, Floats] | None = None
        self._shift: tuple[Floats, Floats] | None = None
        self._sums: list[Doubles] = []

    def update(self, x: Floats, y: Floats) -> None:
        """Take in pairs: x (g, k, n) and y (g, m, n), float32; g, k and m are the same in every call."""
        if x.ndim != 3 or y.ndim != 3 or x.shape[::2] != y.shape[::2]:
            raise ValueError(f"shapes must be (g, k, n) and (g, m, n), not {x.shape} and {y.shape}")
        if not x.shape[2]:
            return
        with np.errstate(invalid="ignore", over="ignore"):  # result() tells
            blocks, shifts = self._begin(x, y)
            start, size = 0, blocks[0].shape[2]
            while start < x.shape[2]:
                step = min(x.shape[2] - start, size - self._filled)
                for each, block, shift in zip((x, y), blocks, shifts, strict=True):
                    part = each[..., start : start + step]
                    np.subtract(part, shift, out=block[..., self._filled : self._filled + step])
                start, self._filled = start + step, self._filled + step
                if self._filled == size:
                    self._flush()

    def _begin(self, x: Floats, y: Floats) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
        if self._blocks is None or self._shift is None:
            size = int(np.clip(_ELEMENTS // max(x.shape[0] * x.shape[1], 1), _LEAST, _BLOCK))
            self._blocks = _empty(x, size), _empty(y, size)
            self._shift = x.mean(axis=2, keepdims=True), y.mean(axis=2, keepdims=True)
        return self._blocks, self._shift

    def result(self) -> Gram:
        """The moments so far.

        Raises:
            CalibrationError: nothing was observed, or something that is not finite.
        """
        self._flush()
        if self._shift is None or not self.count:
            raise CalibrationError("no rows were observed")
        gram, cross, power, x, y = (each / self.count for each in self._sums)
        if not (np.isfinite(gram).all() and np.isfinite(cross).all() and np.isfinite(power).all()):
            raise CalibrationError("the rows hold NaN, infinities or values too large to square in float32")
        return Gram(
            gram - x[:, :, None] * x[:, None, :],
            cross - y[:, :, None] * x[:, None, :],
            np.maximum(power - y**2, 0.0),
            x + self._shift[0][..., 0],
            y + self._shift[1][..., 0],
            self.count,
        )

    def _flush(self) -> None:
        if self._blocks is None or not self._filled:
            return
        with np.errstate(invalid="ignore", over="ignore"):
            sums = _sums(*(block[..., : self._filled] for block in self._blocks))
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.count += self._filled
        self._filled = 0


def _empty(like: Floats, size: int) -> Floats:
    return np.empty((*like.shape[:2], size), np.float32)


def _sums(x: Floats, y: Floats) -> list[Doubles]:
    """Of x x^T, y x^T, y^2, x and y over the last axis."""
    flipped = x.swapaxes(1, 2)
    return [
        (x @ flipped).astype(np.float64),
        (y @ flipped).astype(np.float64),
        np.square(y).sum(axis=2).astype(np.float64),
        x.sum(axis=2).astype(np.float64),
        y.sum(axis=2).astype(np.float64),
    ]


def sampled(rows: int, samples: int, first: int, quota: int, seed: int = 0) -> Positions:
    """Positions of a batch to look at: one at random from each of `quota` equal stretches per sample.

    Args:
        rows: positions in the batch.
        samples: samples in the batch.
        first: number of samples in the batches before; which positions are chosen for a sample depends on its
            number and not on how the samples were cut into batches.
        quota: positions per sample; all are taken where there are no more.
        seed: of the choice.
    """
    if quota * samples >= rows:
        return np.arange(rows)
    ends = np.arange(quota * samples + 1) * rows // (quota * samples)
    chance = _uniform(np.arange(first * quota, (first + samples) * quota, dtype=np.uint64), seed)
    return ends[:-1] + (chance * np.diff(ends)).astype(np.intp)


def _uniform(numbers: NDArray[np.uint64], seed: int) -> Doubles:
    """Random numbers in [0, 1), a function of each number and the seed (the mixer of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(seed * 0x632BE5AB + 1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.asarray((z >> np.uint64(11)) * 2.0**-53)


def batch_samples(feeds: Mapping[str, Array]) -> int:
    """Samples in a batch: the size of the first axis of its first input that has one."""
    return next((array.shape[0] for array in feeds.values() if array.ndim), 1)


def observe(
    model: Model,
    data: CalibrationData | Iterable[Mapping[str, Array]],
    layers: Sequence[str],
    *,
    against: Mapping[str, str] | None = None,
    rows: int = ROWS,
    seed: int = 0,
    target: Target | None = None,
    progress: Progress | None = None,
) -> dict[str, Gram]:
    """Moments of the inputs of layers, and of these with their outputs, in one pass over the data.

    Args:
        model: not modified.
        data: batches of inputs, of any size and shape the model takes.
        layers: names of the output tensors of Conv, ConvTranspose, Gemm and MatMul nodes of the main graph
            whose weight (input 1) is a constant.
        against: by such a name, another floating-point tensor of the same shape whose values are to be y,
            such as the sum behind a residual branch; by default y is the layer's own output, bias included.
        rows: about how many positions of each layer's output to look at, spread evenly over all samples.
        seed: of the choice of positions.
        target: where to run; processors by default.
        progress: called with ("observing", batches done, batches in all).

    Returns:
        By name of the layer. Memory is 8 * g * k * k bytes for each: ask for few layers at a time where k
        (input channels per group times kernel size) is in the thousands.

    Raises:
        UsageError: a name is not that of a layer, or of a tensor; says why.
        CalibrationError: the data does not fit the model, is empty, or makes a tensor NaN or infinite.
    """
    source = (data if isinstance(data, CalibrationData) else CalibrationData(data)).bind(model.inputs())
    pairs = {name: _pair(model, name, (against or {}).get(name, name)) for name in layers}
    moments = {name: Moments() for name in layers}
    wanted = list(dict.fromkeys(tensor for pair in pairs.values() for tensor in (pair.x, pair.y)))
    runner, first, quota, total = Runner(tapped(model, wanted), target), 0, 0, length_hint(source, -1)
    for index, feeds in enumerate(source):
        values = {**feeds, **runner.run(feeds, [name for name in wanted if name not in feeds])}
        samples = batch_samples(feeds)
        quota = quota or quota_for(rows, samples * total if total > 0 else _MANY)
        for name, (layer, x, y) in pairs.items():
            at = sampled(layer.count(values[x]), samples, first, quota, seed)
            moments[name].update(layer.columns(values[x], at), layer.outputs(values[y], at))
        first += samples
        if progress:
            progress("observing", index + 1, None if total < 0 else total)
    return {name: _result(name, each) for name, each in moments.items()}


def quota_for(rows: int, samples: int) -> int:
    """Positions to take of each sample."""
    return max(-(-rows // max(samples, 1)), 1)


def _result(name: str, moments: Moments) -> Gram:
    try:
        return moments.result()
    except CalibrationError as error:
        raise CalibrationError(f"layer '{name}': {error}; check the calibration data") from error


class _Pair(NamedTuple):
    """A layer and the names of the tensors x and y."""

    layer: Layer
    x: str
    y: str


def _pair(model: Model, name: str, y: str) -> _Pair:
    made = {tensor.name: node for node in model.graph.nodes for tensor in node.outputs}
    if name not in made:
        raise UsageError(f"no node of the main graph makes a tensor '{name}'")
    layer = layer_of(made[name])
    if not isinstance(layer, Layer):
        what = f"'{made[name].label}' ({made[name].op})"
        raise UsageError(f"{what} is not a layer with weights: {layer or 'another operator'}")
    x = layer.node.inputs[0].name
    for tensor in (x, y):
        if tensor not in made and all(tensor != each.name for each in model.graph.inputs):
            raise UsageError(f"'{tensor}' is neither an input nor computed in the main graph")
    return _Pair(layer, x, y)
