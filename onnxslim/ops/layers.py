"""Layers with weights, seen as matrix products.

Whatever the operator, a layer is y = W x + b at every position of its output: W has one matrix of shape
(outputs, inputs) per group, and x is what the layer looks at for that position (im2col for convolutions).
Positions are numbered through the output, channels left out, first axis slowest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim.ir.graph import Array, Node
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of

Floats = NDArray[np.float32]
Positions = NDArray[np.intp]

_FLOATS = tuple(map(np.dtype, (np.float16, np.float32)))


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """A node with a constant weight.

    Attributes:
        node: the node; its weight is input 1, its data input 0.
        groups: independent parts of the weight.
        axis: of the output, the one that runs over output channels, counted from the end.
    """

    node: Node
    groups: int
    axis: int

    @property
    def weight(self) -> Array:
        """The weight as it is in the model."""
        values = constant_of(self.node.inputs[1])
        assert values is not None
        return values

    @property
    def label(self) -> str:
        """How messages name the layer."""
        return self.node.label

    @abstractmethod
    def matrix(self) -> Floats:
        """The weight as float32 (groups, outputs per group, inputs per group); inputs are ordered by channel,
        then by kernel position."""

    @abstractmethod
    def restored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """A weight of the operator's own layout from one of `matrix()`'s."""

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
        """What the layer sees at some positions: float32 (groups, inputs per group, positions)."""

    def outputs(self, y: Array, at: Positions) -> Floats:
        """Values of a tensor of the output's shape: float32 (groups, outputs per group, positions)."""
        found = values_at(y, self.axis, at)
        return found.reshape(self.groups, len(found) // self.groups, at.size)


def values_at(y: Array, axis: int, at: Positions) -> Floats:
    """Values along one axis at positions that count all the others: float32 (size of the axis, positions)."""
    axis %= y.ndim
    inner = math.prod(y.shape[axis + 1 :])
    outer, rest = np.divmod(at, inner)
    picked = y.reshape(-1, y.shape[axis], inner)[outer, :, rest]
    return np.ascontiguousarray(picked.T, dtype=np.float32)


def layer_of(node: Node) -> Layer | str | None:
    """The layer a node is; why it cannot be treated as one; None if it is no such operator."""
    if node.domain not in DEFAULT_DOMAINS or node.op not in _KINDS:
        return None
    weight = constant_of(node.input(1))
    if weight is None:
        return None if node.op == "MatMul" else "its weight is not a constant"
    if weight.dtype not in _FLOATS:
        return f"its weight is of type {weight.dtype}, not float32 or float16"
    if node.op in ("Gemm", "MatMul"):
        return _product(node, weight)
    return _window(node, weight)


def _product(node: Node, weight: Array) -> Layer | str:
    if weight.ndim != 2:
        return "its weight is not a matrix"
    if node.attrs.get("alpha", 1.0) == 0:
        return "its alpha is zero"
    return Product(node, 1, -1, flipped=node.op == "Gemm" and bool(node.attrs.get("transB", 0)))


def _window(node: Node, weight: Array) -> Layer | str:
    axes, groups = weight.ndim - 2, int(node.attrs.get("group", 1))
    if axes < 1 or weight.shape[0] % groups or not weight.size:
        return f"its weight has shape {weight.shape}, which does not fit {groups} groups"
    ones = (1,) * axes
    return Window(
        node,
        groups,
        -(axes + 1),
        transposed=node.op == "ConvTranspose",
        kernel=weight.shape[2:],
        strides=tuple(node.attrs.get("strides", ones)),
        dilations=tuple(node.attrs.get("dilations", ones)),
    )


@dataclass(frozen=True, eq=False)
class Product(Layer):
    """Gemm, or MatMul by a matrix on the right.

    Attributes:
        flipped: whether the weight is stored as (outputs, inputs).
    """

    flipped: bool = False

    def matrix(self) -> Floats:
        """See `Layer`; alpha of a Gemm is part of it."""
        weight = self.weight.astype(np.float32) * np.float32(self._alpha)
        return np.asarray(weight if self.flipped else weight.T)[None]

    def restored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """See `Layer`."""
        weight = np.asarray(matrix[0]) / self._alpha
        return np.ascontiguousarray(weight if self.flipped else weight.T)

    def shape(self, x: Array) -> tuple[int, ...]:
        """See `Layer`."""
        rows = x.shape[1:] if self._transposed else x.shape[:-1]
        return *rows, self.weight.shape[0 if self.flipped else 1]

    def columns(self, x: Array, at: Positions) -> Floats:
        """See `Layer`."""
        return np.ascontiguousarray(self._rows(x)[at].T, dtype=np.float32)[None]

    @property
    def _transposed(self) -> bool:
        return self.node.op == "Gemm" and bool(self.node.attrs.get("transA", 0))

    @property
    def _alpha(self) -> float:
        return float(self.node.attrs.get("alpha", 1.0)) if self.node.op == "Gemm" else 1.0

    def _rows(self, x: Array) -> Array:
        return np.asarray(x.T) if self._transposed else x.reshape(-1, x.shape[-1])


@dataclass(frozen=True, eq=False)
class Window(Layer):
    """Conv or ConvTranspose with any number of axes.

    Attributes:
        transposed: whether it is a ConvTranspose.
        kernel, strides, dilations: one number per spatial axis.
    """

    transposed: bool = False
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    def matrix(self) -> Floats:
        """See `Layer`."""
        weight = self.weight.astype(np.float32)
        if not self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        split = weight.reshape(self.groups, -1, weight.shape[1], math.prod(self.kernel))
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(self.groups, weight.shape[1], -1)

    def restored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """See `Layer`."""
        shape = self.weight.shape
        if not self.transposed:
            return np.asarray(matrix).reshape(shape)
        split = matrix.reshape(self.groups, shape[1], -1, math.prod(self.kernel))
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(shape)

    def shape(self, x: Array) -> tuple[int, ...]:
        """See `Layer`."""
        outputs = self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]
        return x.shape[0], outputs, *self._frame(x.shape[2:])[0]

    def columns(self, x: Array, at: Positions) -> Floats:
        """See `Layer`."""
        samples, channels = x.shape[:2]
        size = math.prod(x.shape[2:])
        flat = np.zeros((channels, samples * size + 1), np.float32)  # the last column is the padding
        flat[:, :-1].reshape(channels, samples, size)[...] = x.reshape(samples, channels, size).swapaxes(0, 1)
        index = self._sources(x.shape[2:], at, samples * size)
        found = flat.take(index.reshape(-1), axis=1, mode="clip")
        return found.reshape(self.groups, channels // self.groups * len(index), at.size)

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

    def _table(self, axis: int, size: int, begin: int) -> Positions:
        """The input index each kernel position (row) reads for each output index (column); -1 for none."""
        stride = self.strides[axis]
        taps = np.arange(self.kernel[axis])[:, None] * self.dilations[axis]
        if not self.transposed:
            return np.arange(size) * stride + taps - begin
        index = np.arange(size) - taps + begin
        return np.where(index % stride == 0, index // stride, -1)

    def _frame(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Spatial sizes of the output, and padding at the beginning of each axis."""
        axes = range(len(self.kernel))
        frame = self._transposed_axis if self.transposed else self._axis
        frames = [frame(axis, sizes[axis]) for axis in axes]
        return tuple(out for out, _ in frames), tuple(begin for _, begin in frames)

    def _axis(self, axis: int, size: int) -> tuple[int, int]:
        stride, reach = self.strides[axis], (self.kernel[axis] - 1) * self.dilations[axis] + 1
        mode = self._auto_pad
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            out = -(-size // stride)
            total = max((out - 1) * stride + reach - size, 0)
            return out, total // 2 if mode == "SAME_UPPER" else total - total // 2
        begin, end = (0, 0) if mode == "VALID" else self._pads(axis)
        return max((size + begin + end - reach) // stride + 1, 0), begin

    def _transposed_axis(self, axis: int, size: int) -> tuple[int, int]:
        reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
        extra = self.node.attrs.get("output_padding", (0,) * len(self.kernel))[axis]
        full = self.strides[axis] * (size - 1) + extra + reach
        mode, wanted = self._auto_pad, self.node.attrs.get("output_shape")
        if mode in ("SAME_UPPER", "SAME_LOWER") or wanted:
            out = wanted[-len(self.kernel) :][axis] if wanted else size * self.strides[axis]
            total = max(full - out, 0)
            # A kernel narrower than its stride makes less than was asked for.
            out = out if wanted else full - total
            return out, total // 2 if mode == "SAME_UPPER" else total - total // 2
        begin, end = (0, 0) if mode == "VALID" else self._pads(axis)
        return full - begin - end, begin

    @property
    def _auto_pad(self) -> str:
        return str(self.node.attrs.get("auto_pad", "NOTSET"))

    def _pads(self, axis: int) -> tuple[int, int]:
        axes = len(self.kernel)
        pads = self.node.attrs.get("pads", (0,) * (2 * axes))
        return pads[axis], pads[axis + axes]


_KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
