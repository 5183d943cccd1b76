"""Second moments of what layers see and make, from one streaming pass over calibration data.

For every layer y = W x + b asked for, `observe` gives mean and covariance of x (im2col for convolutions) and
its covariance with y, or with any other tensor of y's shape: what least squares, whitening and scores of the
OBS kind take. Rows are a seeded, evenly spread sample of the positions of the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.stream import Channels, Progress, Taps, stream
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Floats, Layer, Positions, values_at
from onnxslim.runtime.targets import Target

Doubles = NDArray[np.float64]
K = TypeVar("K")

# Rows per layer; more than this changes the weights found from a few hundred images by less than their noise.
ROWS = 1 << 15
# Rows per product: as many as fit this number of elements, within bounds.
_ELEMENTS = 1 << 23
_LEAST, _BLOCK = 256, 2048


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

    @property
    def empty(self) -> bool:
        """Whether nothing was observed yet."""
        return not (self.count or self._filled)

    def result(self) -> Gram:
        """The moments so far.

        Raises:
            CalibrationError: nothing was observed, or something that is not finite.
        """
        self._flush()
        if self._shift is None or not self.count:
            raise CalibrationError("no rows were observed: it is empty in all of the data")
        gram, cross, power, x, y = (each / self.count for each in self._sums)
        if not (np.isfinite(gram).all() and np.isfinite(cross).all() and np.isfinite(power).all()):
            raise CalibrationError("the rows hold NaN, infinities or values too large to square in float32")
        gram -= x[:, :, None] * x[:, None, :]
        cross -= y[:, :, None] * x[:, None, :]
        return Gram(
            gram,
            cross,
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


def observe(
    model: Model,
    data: CalibrationData | Iterable[Mapping[str, Array]],
    layers: Sequence[str],
    *,
    against: Mapping[str, str] | None = None,
    alone: bool = False,
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
        alone: whether inputs are all that is wanted: then there are no outputs (m = 0).
        rows: about how many positions of each layer's output to look at, spread evenly over all samples.
        seed: of the choice of positions.
        target: where to run; processors by default.
        progress: called with ("observing", batches done, batches in all).

    Returns:
        By name of the layer, of those that were not empty in all of the data, as a cache is at first. Memory
        is 8 * g * k * k bytes for each: ask for few layers at a time where k (input channels per group times
        kernel size) is in the thousands.

    Raises:
        UsageError: a name is not that of a layer, or of a tensor; says why.
        CalibrationError: the data does not fit the model, is empty, or makes a tensor NaN or infinite.
    """
    source = (data if isinstance(data, CalibrationData) else CalibrationData(data)).bind(model.inputs())
    pairs = {name: _pair(model, name, (against or {}).get(name, name)) for name in layers}
    wanted = {name: _Inputs(pair) for name, pair in pairs.items()} if alone else pairs
    return _moments(model, source, wanted, rows, seed, target, progress)


def covariances(
    model: Model,
    data: CalibrationData,
    axes: Sequence[Channels],
    *,
    rows: int = ROWS,
    seed: int = 0,
    target: Target | None = None,
    progress: Progress | None = None,
) -> dict[Channels, Gram]:
    """Mean and covariance over all positions of the slices of a tensor along an axis.

    Args:
        model: not modified.
        data: batches of inputs.
        axes: names of floating-point tensors of the main graph, each with the axis of its channels.
        rows: about how many positions of each tensor to look at, spread evenly over all samples.
        seed: of the choice of positions.
        target: where to run; processors by default.
        progress: called with ("observing", batches done, batches in all).

    Returns:
        Moments with one group (g = 1) of as many inputs as there are channels, and no outputs; of
        tensors that were not empty in all of the data.

    Raises:
        CalibrationError: the data does not fit the model, is empty, or makes a tensor NaN or infinite.
    """
    slices = {key: _Slices(*key) for key in axes}
    return _moments(model, data.bind(model.inputs()), slices, rows, seed, target, progress)


def joint(
    model: Model,
    data: CalibrationData,
    pairs: Sequence[TensorPair],
    *,
    rows: int = ROWS,
    seed: int = 0,
    target: Target | None = None,
    progress: Progress | None = None,
) -> dict[TensorPair, Gram]:
    """Moments of the channels of one tensor together with those of another one.

    Args:
        model: not modified.
        data: batches of inputs.
        pairs: of floating-point tensors of the main graph.
        rows, seed, target, progress: see `covariances`.

    Returns:
        Moments with one group (g = 1), x and y of which are the channels; of pairs that were not empty in all
        of the data.

    Raises:
        CalibrationError: the data does not fit the model, is empty, or makes a tensor NaN or infinite.
    """
    wanted = {pair: pair for pair in pairs}
    return _moments(model, data.bind(model.inputs()), wanted, rows, seed, target, progress)


class _Rows(Protocol):
    """Something with positions, at each of which there is a pair of x and y."""

    @property
    def reads(self) -> Sequence[str]:
        """Names of the tensors."""

    def count(self, values: Mapping[str, Array]) -> int:
        """Positions in a batch."""

    def at(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        """x and y at some of them; see `Moments.update`."""


def _moments(
    model: Model,
    data: CalibrationData,
    wanted: Mapping[K, _Rows],
    rows: int,
    seed: int,
    target: Target | None,
    progress: Progress | None,
) -> dict[K, Gram]:
    moments = {key: Moments() for key in wanted}
    taps = Taps(model, [name for each in wanted.values() for name in each.reads], target)
    for batch in stream(data, taps, progress=progress):
        for key, each in wanted.items():
            at = batch.positions(each.count(batch.values), rows, seed)
            moments[key].update(*each.at(batch.values, at))
    return {key: _result(wanted[key], each) for key, each in moments.items() if not each.empty}


def _result(what: _Rows, moments: Moments) -> Gram:
    try:
        return moments.result()
    except CalibrationError as error:
        raise CalibrationError(f"{what}: {error}; check the calibration data") from error


@dataclass(frozen=True)
class TensorPair:
    """Two tensors, of which the second can be broadcast to the shape of the first.

    Attributes:
        x, y: their names.
        axis: of the first, the one that runs over its channels.
    """

    x: str
    y: str
    axis: int

    def __str__(self) -> str:
        return f"tensors '{self.x}' and '{self.y}'"

    @property
    def reads(self) -> Sequence[str]:
        """Names of the tensors."""
        return [self.x, self.y]

    def count(self, values: Mapping[str, Array]) -> int:
        """Positions in a batch."""
        x = values[self.x]
        return int(x.size // max(x.shape[self.axis], 1))

    def at(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        """Channels of both at some positions."""
        x = values[self.x]
        y = np.broadcast_to(values[self.y], x.shape)
        return values_at(x, self.axis, at)[None], values_at(y, self.axis, at)[None]


@dataclass(frozen=True)
class _Slices:
    """Channels of a tensor by its other positions, and no outputs."""

    name: str
    axis: int

    def __str__(self) -> str:
        return f"tensor '{self.name}'"

    @property
    def reads(self) -> Sequence[str]:
        return (self.name,)

    def count(self, values: Mapping[str, Array]) -> int:
        array = values[self.name]
        return int(array.size // max(array.shape[self.axis], 1))

    def at(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        array = np.moveaxis(values[self.name], self.axis, 0)
        x = array.reshape(len(array), -1)[:, at].astype(np.float32)[None]
        return x, np.zeros((1, 0, x.shape[2]), np.float32)


@dataclass(frozen=True)
class _Pair:
    """What a layer reads, and what it makes or another tensor of that shape."""

    layer: Layer
    x: str
    y: str

    def __str__(self) -> str:
        return f"layer '{self.layer.node.outputs[0].name}'"

    @property
    def reads(self) -> Sequence[str]:
        return self.x, self.y

    def count(self, values: Mapping[str, Array]) -> int:
        return self.layer.count(values[self.x])

    def at(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        return self.layer.columns(values[self.x], at), self.layer.results(values[self.y], at)


@dataclass(frozen=True)
class _Inputs:
    """What a layer reads, and no outputs."""

    of: _Pair

    def __str__(self) -> str:
        return str(self.of)

    @property
    def reads(self) -> Sequence[str]:
        return (self.of.x,)

    def count(self, values: Mapping[str, Array]) -> int:
        return self.of.count(values)

    def at(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        x = self.of.layer.columns(values[self.of.x], at)
        return x, np.zeros((len(x), 0, x.shape[2]), np.float32)


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
