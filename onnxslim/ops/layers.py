"""Layers with weights, one view for all who read or write them.

Whatever the operator, a layer is y = W x + b at every position of its output, x being what it looks at for
that position (im2col for convolutions). Its weight has two layouts here besides the operator's own:

* `Layer.matrix`, [groups, outputs, inputs * kernel], what regression, rounding and scaling work on;
* `Layer.kernels`, [groups, inputs, outputs, *kernel], what factorization works on.

Inputs and outputs are those of one group throughout. Positions are numbered through the output, channels left
out, first axis slowest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ir.model import constant_of

Floats = NDArray[np.float32]
Positions = NDArray[np.intp]

_FLOATS = tuple(map(np.dtype, (np.float16, np.float32)))


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """A node that multiplies data by a weight. Made by `ops.view_of` and `ops.layer_of`.

    Everything is looked up when it is asked for, so that a view stays true when the node gets another weight.

    Attributes:
        node: the node.
        weight_index: which of its first two inputs is the weight; the other one is the data.
        given: values of the weight where the node does not read them from a constant.
        scatters: whether every input, not every output, is multiplied with the whole kernel.
    """

    node: Node
    weight_index: int = 1
    given: Array | None = None
    scatters: ClassVar[bool] = False

    @property
    def weight(self) -> Array:
        """The weight as it is in the model; ask only where it is a constant, or given."""
        values = constant_of(self.node.inputs[self.weight_index]) if self.given is None else self.given
        assert values is not None
        return values

    @property
    def weight_shape(self) -> tuple[Any, ...]:
        """The shape of the weight, which a computed one may have, too; () if it is not known."""
        if self.given is not None:
            return self.given.shape
        tensor = self.node.inputs[self.weight_index]
        if tensor.shape is not None:
            return tensor.shape
        values = constant_of(tensor)  # of a Constant node, whose output need not say its shape
        return values.shape if values is not None else ()

    @property
    def data(self) -> Tensor:
        """The input that is not the weight."""
        return self.node.inputs[1 - self.weight_index]

    @property
    def label(self) -> str:
        """How messages name the layer."""
        return self.node.label

    # -- sizes

    @property
    def groups(self) -> int:
        """Independent parts of the weight."""
        return 1

    @property
    @abstractmethod
    def inputs(self) -> int:
        """Input channels of a group."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Output channels of a group."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size along each kernel axis."""
        return ()

    @property
    def channelwise(self) -> bool:
        """Whether it is a convolution with one input channel per output channel."""
        return False

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """How many axes its data and its output have, where the operator says so."""

    @property
    @abstractmethod
    def axis(self) -> int:
        """The axis of the output that runs over its channels, counted from the end."""

    @property
    @abstractmethod
    def data_axis(self) -> int:
        """The axis of the data that runs over the channels it sums over, counted from the end."""

    @property
    @abstractmethod
    def weight_axis(self) -> int:
        """The axis of the weight that runs over output channels: all of them, or those of a group."""

    # -- weight and bias

    @property
    def scale(self) -> float:
        """Factor of the product of data and weight, the alpha of a Gemm."""
        return 1.0

    @property
    def bias_scale(self) -> float:
        """Factor of the bias, the beta of a Gemm."""
        return 1.0

    @property
    def takes_bias(self) -> bool:
        """Whether the operator has an input for a bias."""
        return True

    @abstractmethod
    def kernels_of(self, values: Array) -> Array:
        """Values laid out as the weight, as [groups, inputs, outputs, *kernel]."""

    @abstractmethod
    def stored(self, kernels: Array) -> Array:
        """The inverse of `kernels_of`."""

    @abstractmethod
    def along_outputs(self, values: Array) -> Array:
        """One value per output channel of all groups, in a shape that broadcasts against the weight."""

    @abstractmethod
    def along_inputs(self, values: Array) -> Array:
        """One value per input channel of all groups, in a shape that broadcasts against the weight."""

    def kernels(self) -> Array:
        """The weight as it is stored, but as [groups, inputs, outputs, *kernel]."""
        return self.kernels_of(self.weight)

    def matrix(self) -> Floats:
        """The weight as float32 (groups, outputs, inputs * kernel); inputs are ordered by channel, then by
        kernel position. What the product is multiplied by is part of it."""
        weight = self.matrix_of(self.weight)
        return weight if self.scale == 1.0 else weight * np.float32(self.scale)

    def matrix_of(self, values: NDArray[Any]) -> Floats:
        """Values laid out as the weight, as float32 (groups, outputs, inputs * kernel)."""
        split: Floats = self.kernels_of(values).swapaxes(1, 2).astype(np.float32)
        return split.reshape(*split.shape[:2], -1) if self.kernel else split

    def restored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """A weight of the operator's own layout from one of `matrix()`'s."""
        split = matrix if self.scale == 1.0 else matrix / self.scale
        return self.stored(split.reshape(*split.shape[:2], self.inputs, *self.kernel).swapaxes(1, 2))

    def bias(self) -> NDArray[np.float64] | None:
        """What it adds to each output channel of all groups; None if that is computed, or something else."""
        if self.node.input(2) is None:
            return np.zeros(self.groups * self.outputs)
        values = constant_of(self.node.inputs[2])
        return None if values is None else self.bias_of(values)

    def bias_of(self, values: Array) -> NDArray[np.float64] | None:
        """The same for these values of input 2."""
        channels = self.groups * self.outputs
        found = per_channel(values, self.axis if values.ndim > 1 else -1, channels)
        return None if found is None else found * self.bias_scale

    # -- positions

    @abstractmethod
    def shape(self, x: Array) -> tuple[int, ...]:
        """Shape of the output for this input."""

    def count(self, x: Array) -> int:
        """How many positions the output has for this input."""
        shape = list(self.shape(x))
        del shape[self.axis]
        return math.prod(shape)

    @abstractmethod
    def columns(self, x: Array, at: Positions) -> Floats:
        """What the layer sees at some positions: float32 (groups, inputs * kernel, positions)."""

    def results(self, y: Array, at: Positions) -> Floats:
        """Values of a tensor of the output's shape: float32 (groups, outputs, positions)."""
        found = values_at(y, self.axis, at)
        return found.reshape(self.groups, len(found) // self.groups, at.size)

    # -- what cannot be read

    def unfit(self) -> str | None:
        """Why the weight is no constant matrix that can be fitted; None if it is one."""
        weight = constant_of(self.node.inputs[self.weight_index])
        if weight is None:
            return "its weight is not a constant"
        if weight.dtype not in _FLOATS:
            return f"its weight is of type {weight.dtype}, not float32 or float16"
        return self._misshapen()

    @abstractmethod
    def _misshapen(self) -> str | None:
        """Why a weight of this shape is no matrix."""


def values_at(y: Array, axis: int, at: Positions) -> Floats:
    """Values along one axis at positions that count all the others: float32 (size of the axis, positions)."""
    axis %= y.ndim
    inner = math.prod(y.shape[axis + 1 :])
    outer, rest = np.divmod(at, inner)
    picked = y.reshape(-1, y.shape[axis], inner)[outer, :, rest]
    return np.ascontiguousarray(picked.T, dtype=np.float32)


def per_channel(values: Array, axis: int, channels: int) -> NDArray[np.float64] | None:
    """One value per channel from a constant, if it varies along no other axis of a tensor.

    Args:
        values: to be broadcast against the tensor without changing its shape.
        axis: of the tensor, the one that runs over its channels, counted from the end.
        channels: their number.
    """
    varying = {place - values.ndim for place, size in enumerate(values.shape) if size != 1}
    if not varying <= {axis} or (varying and values.shape[axis] != channels):
        return None
    return np.array(np.broadcast_to(values.astype(np.float64).reshape(-1), (channels,)))


class Product(Layer):
    """Gemm, or MatMul by a matrix on either side.

    A matrix on the left is transposed here, and the data with it, so that data always comes from the left.
    """

    @property
    def inputs(self) -> int:
        """See `Layer`."""
        return int(self.weight_shape[-2 if self._last else -1])

    @property
    def outputs(self) -> int:
        """See `Layer`."""
        return int(self.weight_shape[-1 if self._last else -2])

    @property
    def rank(self) -> int | None:
        """See `Layer`."""
        return None if self.node.op == "MatMul" else 2

    @property
    def axis(self) -> int:
        """See `Layer`."""
        return -1 if self.weight_index else -2

    @property
    def data_axis(self) -> int:
        """See `Layer`."""
        return -1 if bool(self.weight_index) != self._flips(1 - self.weight_index) else -2

    @property
    def weight_axis(self) -> int:
        """See `Layer`."""
        return max(len(self.weight_shape), 1) - (1 if self._last else 2)

    @property
    def scale(self) -> float:
        """See `Layer`."""
        return float(self.node.attrs.get("alpha", 1.0))

    @property
    def bias_scale(self) -> float:
        """See `Layer`."""
        return float(self.node.attrs.get("beta", 1.0))

    @property
    def takes_bias(self) -> bool:
        """See `Layer`."""
        return self.node.op != "MatMul"

    def kernels_of(self, values: Array) -> Array:
        """See `Layer`."""
        return (values if self._last else values.T)[None]

    def stored(self, kernels: Array) -> Array:
        """See `Layer`."""
        return np.ascontiguousarray(kernels[0] if self._last else kernels[0].T)

    def along_outputs(self, values: Array) -> Array:
        """See `Layer`."""
        return values if self._last else values.reshape(-1, 1)

    def along_inputs(self, values: Array) -> Array:
        """See `Layer`."""
        return values.reshape(-1, 1) if self._last else values

    def shape(self, x: Array) -> tuple[int, ...]:
        """See `Layer`."""
        rows = np.delete(x.shape, self.data_axis)
        return tuple(np.insert(rows, len(rows) + 1 + self.axis, self.outputs).tolist())

    def columns(self, x: Array, at: Positions) -> Floats:
        """See `Layer`."""
        rows = (x if self.data_axis == -1 else x.swapaxes(-1, -2)).reshape(-1, self.inputs)
        return np.ascontiguousarray(rows[at].T, dtype=np.float32)[None]

    @property
    def _last(self) -> bool:
        """Whether outputs run along the last axis of the weight, not the one before."""
        return bool(self.weight_index) != self._flips(self.weight_index)

    def _flips(self, index: int) -> bool:
        return bool(self.node.attrs.get("transB" if index else "transA", 0))

    def _misshapen(self) -> str | None:
        if self.weight.ndim != 2:
            return "its weight is not a matrix"
        return "its alpha is zero" if self.scale == 0 else None


class Window(Layer):
    """Conv or ConvTranspose with any number of axes."""

    @property
    def groups(self) -> int:
        """See `Layer`."""
        return int(self.node.attrs.get("group", 1))

    @property
    def kernel(self) -> tuple[int, ...]:
        """See `Layer`."""
        return self.weight_shape[2:]

    @property
    def strides(self) -> tuple[int, ...]:
        """Along each kernel axis."""
        return tuple(self.node.attrs.get("strides", (1,) * len(self.kernel)))

    @property
    def dilations(self) -> tuple[int, ...]:
        """Along each kernel axis."""
        return tuple(self.node.attrs.get("dilations", (1,) * len(self.kernel)))

    @property
    def rank(self) -> int | None:
        """See `Layer`."""
        return len(self.weight_shape)

    @property
    def axis(self) -> int:
        """See `Layer`."""
        return 1 - len(self.weight_shape)

    @property
    def data_axis(self) -> int:
        """See `Layer`."""
        return self.axis

    @staticmethod
    @abstractmethod
    def pack(kernels: Array) -> Array:
        """What an operator of this kind stores for a weight [groups, inputs, outputs, *kernel]."""

    def stored(self, kernels: Array) -> Array:
        """See `Layer`."""
        return self.pack(kernels)

    def bias_of(self, values: Array) -> NDArray[np.float64] | None:
        """See `Layer`."""
        return values.astype(np.float64)

    def shape(self, x: Array) -> tuple[int, ...]:
        """See `Layer`."""
        return x.shape[0], self.groups * self.outputs, *self._frame(x.shape[2:])[0]

    def columns(self, x: Array, at: Positions) -> Floats:
        """See `Layer`."""
        samples, channels = x.shape[:2]
        size = math.prod(x.shape[2:])
        flat = np.zeros((channels, samples * size + 1), np.float32)  # the last column is the padding
        flat[:, :-1].reshape(channels, samples, size)[...] = x.reshape(samples, channels, size).swapaxes(0, 1)
        index = self._sources(x.shape[2:], at, samples * size)
        found = flat.take(index.reshape(-1), axis=1, mode="clip")
        return found.reshape(self.groups, channels // self.groups * len(index), at.size)

    def _misshapen(self) -> str | None:
        shape = self.weight_shape
        if len(shape) < 3 or self.groups < 1 or shape[0] % self.groups or not math.prod(shape):
            return f"its weight has shape {shape}, which does not fit {self.groups} groups"
        return None

    def _sources(self, sizes: Sequence[int], at: Positions, padding: int) -> Positions:
        """For each kernel position and output position, where in (samples, space) the input is read."""
        out, begins = self._frame(sizes)
        sample, rest = np.divmod(at, math.prod(out))
        found, inside = sample[None], np.ones((1, 1), bool)
        for axis, position in enumerate(np.unravel_index(rest, out)):
            table = self._table(axis, out[axis], begins[axis])
            valid = (table >= 0) & (table < sizes[axis])
            taps = len(found) * len(table)
            found = (found[:, None] * sizes[axis] + table[None, :, position]).reshape(taps, at.size)
            inside = (inside[:, None] & valid[None, :, position]).reshape(taps, at.size)
        return np.where(inside, found, padding)

    @abstractmethod
    def _table(self, axis: int, size: int, begin: int) -> Positions:
        """The input index each kernel position (row) reads for each output index (column); -1 for none."""

    @abstractmethod
    def _along(self, axis: int, size: int) -> tuple[int, int]:
        """Size of an axis of the output, and padding at its beginning."""

    def _frame(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Spatial sizes of the output, and padding at the beginning of each axis."""
        frames = [self._along(axis, sizes[axis]) for axis in range(len(self.kernel))]
        return tuple(out for out, _ in frames), tuple(begin for _, begin in frames)

    def _reach(self, axis: int) -> int:
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def _by_row(self, values: Array) -> Array:
        """One value per channel of all groups, for each row of the weight those of its group."""
        groups, rows = self.groups, self.weight_shape[0]
        spread = np.repeat(values.reshape(groups, -1), rows // groups, axis=0)
        return spread.reshape(*spread.shape, *(1,) * len(self.kernel))

    @property
    def _auto_pad(self) -> str:
        return str(self.node.attrs.get("auto_pad", "NOTSET"))

    def _pads(self, axis: int) -> tuple[int, int]:
        axes = len(self.kernel)
        pads = self.node.attrs.get("pads", (0,) * (2 * axes))
        return pads[axis], pads[axis + axes]


class Convolution(Window):
    """Conv: W [outputs of all groups, inputs, *kernel]."""

    @property
    def inputs(self) -> int:
        """See `Layer`."""
        return int(self.weight_shape[1])

    @property
    def outputs(self) -> int:
        """See `Layer`."""
        return int(self.weight_shape[0]) // self.groups

    @property
    def channelwise(self) -> bool:
        """See `Layer`."""
        return self.weight_shape[1:2] == (1,) and self.groups == self.weight_shape[0]

    @property
    def weight_axis(self) -> int:
        """See `Layer`."""
        return 0

    def kernels_of(self, values: Array) -> Array:
        """See `Layer`."""
        return np.swapaxes(values.reshape(self.groups, -1, *values.shape[1:]), 1, 2)

    @staticmethod
    def pack(kernels: Array) -> Array:
        """See `Window`."""
        swapped: Array = kernels.swapaxes(1, 2)
        return np.ascontiguousarray(swapped.reshape(-1, *swapped.shape[2:]))

    def along_outputs(self, values: Array) -> Array:
        """See `Layer`."""
        return values.reshape(-1, 1, *(1,) * len(self.kernel))

    def along_inputs(self, values: Array) -> Array:
        """See `Layer`: the first M / groups rows read the first C / groups channels."""
        return self._by_row(values)

    def _table(self, axis: int, size: int, begin: int) -> Positions:
        taps = np.arange(self.kernel[axis])[:, None] * self.dilations[axis]
        return np.arange(size) * self.strides[axis] + taps - begin

    def _along(self, axis: int, size: int) -> tuple[int, int]:
        stride, reach = self.strides[axis], self._reach(axis)
        mode = self._auto_pad
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            out = -(-size // stride)
            total = max((out - 1) * stride + reach - size, 0)
            return out, total // 2 if mode == "SAME_UPPER" else total - total // 2
        begin, end = (0, 0) if mode == "VALID" else self._pads(axis)
        return max((size + begin + end - reach) // stride + 1, 0), begin


class TransposedConvolution(Window):
    """ConvTranspose: W [inputs of all groups, outputs, *kernel]."""

    scatters = True

    @property
    def inputs(self) -> int:
        """See `Layer`."""
        return int(self.weight_shape[0]) // self.groups

    @property
    def outputs(self) -> int:
        """See `Layer`."""
        return int(self.weight_shape[1])

    @property
    def weight_axis(self) -> int:
        """See `Layer`."""
        return 1

    def kernels_of(self, values: Array) -> Array:
        """See `Layer`."""
        return values.reshape(self.groups, -1, *values.shape[1:])

    @staticmethod
    def pack(kernels: Array) -> Array:
        """See `Window`."""
        return np.ascontiguousarray(kernels.reshape(-1, *kernels.shape[2:]))

    def along_outputs(self, values: Array) -> Array:
        """See `Layer`: the first C / groups rows make the first M / groups channels."""
        return self._by_row(values)

    def along_inputs(self, values: Array) -> Array:
        """See `Layer`."""
        return values.reshape(-1, 1, *(1,) * len(self.kernel))

    def _table(self, axis: int, size: int, begin: int) -> Positions:
        stride = self.strides[axis]
        taps = np.arange(self.kernel[axis])[:, None] * self.dilations[axis]
        index = np.arange(size) - taps + begin
        return np.where(index % stride == 0, index // stride, -1)

    def _along(self, axis: int, size: int) -> tuple[int, int]:
        extra = self.node.attrs.get("output_padding", (0,) * len(self.kernel))[axis]
        full = self.strides[axis] * (size - 1) + extra + self._reach(axis)
        mode, wanted = self._auto_pad, self.node.attrs.get("output_shape")
        if mode in ("SAME_UPPER", "SAME_LOWER") or wanted:
            out = wanted[-len(self.kernel) :][axis] if wanted else size * self.strides[axis]
            total = max(full - out, 0)
            # A kernel narrower than its stride makes less than was asked for.
            out = out if wanted else full - total
            return out, total // 2 if mode == "SAME_UPPER" else total - total // 2
        begin, end = (0, 0) if mode == "VALID" else self._pads(axis)
        return full - begin - end, begin
