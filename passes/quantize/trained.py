"""Q/DQ that a model brings along, as quantization-aware training leaves it.

`strip` takes it out and remembers scales, zero points and codes; the model is then quantized like any other,
on these grids. `Trained.restore` puts back what nothing has taken the place of.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import ml_dtypes
import numpy as np

from onnxslim.calibration.observers import Histogram, percentile
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Namer, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import Role, Trait, has, spec_of
from onnxslim.ops.layers import Layer
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.quantize.blocks import Blocking, Blocks
from onnxslim.passes.quantize.shared import Shared
from onnxslim.passes.quantize.weights import QMAX, Codes, Encoded

MAKES = ("QuantizeLinear", "DequantizeLinear")
# Share of values that may be clipped less than in training.
CLIPPED = 0.001
# How much larger than anything seen a value may become.
MARGIN = 1.1
BYTES = (np.dtype(np.int8), np.dtype(np.uint8))
# Types of codes with a scale for each block, by what takes them to the signed ones of as many bits.
BLOCKED = {
    np.dtype(np.int8): (8, 0),
    np.dtype(np.uint8): (8, 128),
    np.dtype(ml_dtypes.int4): (4, 0),
    np.dtype(ml_dtypes.uint4): (4, 8),
}


@dataclass(frozen=True)
class Grid:
    """The values a tensor may have, which fake quantization rounds it to in training.

    These are the multiples of a scale, for all codes of the zero point's type.

    Attributes:
        scale: float32; a scalar, or one per slice along `axis`, or of the rank of the values and one for each
            `block` of them along it.
        zero_point: int8, uint8 or, for biases, int32, or for blocks of codes of four bits theirs; of the
            scale's shape.
        block: 0 if there are none.
    """

    scale: Array
    zero_point: Array
    axis: int = 1
    block: int = 0

    def same(self, other: Grid) -> bool:
        """Whether both hold the same values."""
        return (
            np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
            and self.zero_point.dtype == other.zero_point.dtype
            and ((self.axis, self.block) == (other.axis, other.block) or not self.scale.ndim)
        )

    def spread(self, values: Array) -> tuple[Array, Array]:
        """Scale and zero point in a shape that goes with some values."""
        shape = [-1 if index == self.axis % values.ndim else 1 for index in range(values.ndim)]
        if not self.scale.ndim:
            return self.scale, self.zero_point
        if self.block:
            axis = self.axis % values.ndim
            spread = (np.repeat(each, self.block, axis) for each in (self.scale, self.zero_point))
            scale, zero = (np.take(each, range(values.shape[axis]), axis) for each in spread)
            return scale, zero
        return self.scale.reshape(shape), self.zero_point.reshape(shape)

    def codes(self, values: Array) -> Array:
        """The codes nearest to some values."""
        scale, zero = self.spread(values)
        info = np.iinfo(self.zero_point.dtype)
        found = np.rint(values / scale) + zero
        return np.asarray(found.clip(info.min, info.max).astype(self.zero_point.dtype))

    def values(self, codes: Array) -> Array:
        """What some codes stand for, float32."""
        scale, zero = self.spread(codes)
        return np.asarray((codes.astype(np.int32) - zero.astype(np.int32)) * scale, np.float32)


class KnownGrid(NamedTuple):
    """Scale and zero point of a tensor in the target's type, and the largest code it is likely to get."""

    scale: np.float32
    zero_point: int
    top: int


@dataclass(frozen=True)
class Stored:
    """A constant in integers."""

    codes: Array
    grid: Grid

    def encoded(self) -> Encoded | None:
        """The same as symmetric int8; None if it is not that."""
        if self.grid.block:
            return None
        middle = {"int8": 0, "uint8": 128}.get(self.codes.dtype.name)
        if middle is None or (self.grid.zero_point != middle).any():
            return None
        codes: Codes = (self.codes.astype(np.int16) - middle).astype(np.int8)
        return Encoded(codes, np.asarray(self.grid.scale, np.float32))

    def blocks(self, inputs_first: bool, size: int) -> Blocks | None:
        """The same with a scale for each block of inputs; None if these do not lie along the blocks.

        Args:
            inputs_first: whether the first axis of the matrix runs over inputs.
            size: inputs to a block, where there is one scale for all of an output's.
        """
        grid, known = self.grid, BLOCKED.get(self.codes.dtype)
        if known is None or self.codes.ndim != 2:
            return None
        bits, middle = known
        codes = self.codes if inputs_first else self.codes.T
        scales, zeros = grid.scale, grid.zero_point
        if grid.block:
            if grid.axis % 2 == int(inputs_first):
                return None
            scales, zeros = (each if inputs_first else each.T for each in (scales, zeros))
        elif scales.ndim and grid.axis % 2 != int(inputs_first):
            return None
        else:
            shape = math.ceil(len(codes) / size), codes.shape[1]
            scales, zeros = (np.broadcast_to(each, shape) for each in (scales, zeros))
        signed = (zeros.astype(np.int16) - middle).astype(np.int8)
        return Blocks(
            np.ascontiguousarray((codes.astype(np.int16) - middle).astype(np.int8)),
            np.ascontiguousarray(scales),
            Blocking(bits, grid.block or size),
            signed if signed.any() else None,
        )


@dataclass(frozen=True)
class Trained:
    """What a model brought along.

    Attributes:
        tensors: grids of activations, and of constants that are read as such, by name.
        constants: what weights, biases and such are stored as, by the name that their values now have.
        shared: weights that were looked up in tables, likewise.
    """

    tensors: dict[str, Grid] = field(default_factory=dict)
    constants: dict[str, Stored] = field(default_factory=dict)
    shared: Mapping[str, Shared] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.constants or self.shared)

    def covers(self, node: Node) -> bool:
        """Whether data and weight of a node both were integers in training."""
        return node.inputs[0].name in self.tensors and node.inputs[1].name in self.constants

    def codes(self, weight: Constant, axis: int, limit: int) -> Encoded | None:
        """Symmetric integers that a weight was trained with, if its channels lie along an axis."""
        if (shared := self.shared.get(weight.name)) is not None:
            return shared.encoded if shared.narrow and shared.floats.axis == axis and limit == QMAX else None
        stored = self.constants.get(weight.name)
        found = stored.encoded() if stored is not None else None
        if found is None or stored is None:
            return None
        along = not found.scales.ndim or stored.grid.axis % len(weight.shape) == axis
        fits = limit == QMAX or int(np.abs(found.codes).max(initial=0)) <= limit
        return found if along and fits else None

    def blocks(self, layer: Layer, size: int) -> Blocks | None:
        """Integers that the weight of a layer was stored as, with a scale for each block of inputs.

        Args:
            layer: of a matrix product.
            size: see `Stored.blocks`.
        """
        stored = self.constants.get(layer.node.inputs[1].name)
        return None if stored is None else stored.blocks(layer.weight_axis == 1, size)

    def known(self, tensor: Tensor, rules: IntegerLayout, seen: Histogram | None) -> KnownGrid | None:
        """Scale and zero point of a tensor in the target's type; None where it has none, or cannot have them.

        What is never negative does without the negative half of int8, so that a Relu disappears in the range
        of the integers, unless that would let through much of what was clipped in training.
        """
        found = self.tensors.get(tensor.name)
        if found is None or rules.activation not in BYTES:
            return None
        scale, zero = np.float32(found.scale), int(found.zero_point)
        zero += {"int8": 128, "uint8": 0}[found.zero_point.dtype.name]
        if zero == 128 and not rules.symmetric and _is_positive(tensor):
            zero = 0 if seen is not None and _high(seen) <= 127.5 * float(scale) else zero
        if rules.activation == np.int8:
            zero -= 128
        if rules.symmetric and zero:
            return None
        top = math.inf if seen is None else MARGIN * seen.high / float(scale) + zero
        return KnownGrid(scale, zero, int(min(top, np.iinfo(rules.activation).max)))

    def restore(self, model: Model, taken: Collection[str]) -> None:
        """Put back Q/DQ of all tensors but some, and DQ of constants that are still read."""
        name, new = Namer(model.graph), list[Node]()
        outputs = {id(tensor) for tensor in model.graph.outputs}
        for tensor in _variables(model):
            if tensor.name in self.tensors and tensor.name not in taken:
                new.extend(_pair(tensor, self.tensors[tensor.name], name, id(tensor) in outputs))
        for constant in constants_read(model):
            if constant.name in self.constants:
                new.append(_dequantized(constant, self.constants[constant.name], name))
                model.graph.initializers.pop(constant.name, None)
        model.graph.nodes.extend(new)
        ir.sort(model.graph)


def strip(model: Model) -> Trained:
    """Take out Q/DQ of tensors and constants; these become what their codes stand for."""
    found = Trained()
    outputs = {id(tensor) for tensor in model.graph.outputs}
    gone: set[int] = set()
    read: dict[int, Tensor] = {}
    for node in list(model.graph.nodes):
        if not has(node, Trait.CODES) or node.domain not in DEFAULT_DOMAINS or not node.inputs:
            continue
        grid = _grid(node)
        if grid is None:
            continue
        readers = _pairs(node, grid, outputs) if has(node, Trait.QUANTIZES) else [node]
        shown = [reader for reader in readers if id(reader.outputs[0]) in outputs]
        if not readers or (shown and not (len(readers) == 1 and _is_only_shown(node, outputs))):
            continue
        source = _origin(node.inputs[0])
        if isinstance(source, Constant):
            done = _strip_constant(model, node, source, grid, readers, found)
        else:
            done = has(node, Trait.QUANTIZES) and _strip_tensor(node, grid, readers, bool(shown), found)
        if done:
            for each in {id(node): node, **{id(reader): reader for reader in readers}}.values():
                read.update({id(tensor): tensor for tensor in each.inputs})
                ir.detach(each)
                gone.add(id(each))
    ir.sweep(model.graph, gone)
    _drop_unread(model, list(read.values()))
    return found


def _strip_tensor(node: Node, grid: Grid, readers: list[Node], shown: bool, found: Trained) -> bool:
    """Take out a pair; where what comes out of it is an output of the model, its maker makes that instead."""
    tensor = node.inputs[0]
    result = readers[0].outputs[0]
    known = found.tensors.get(result.name if shown else tensor.name)
    if grid.scale.ndim or grid.zero_point.dtype not in BYTES or (known and not known.same(grid)):
        return False
    if shown:
        maker = tensor.inputs[0]
        place = next(index for index, made in enumerate(maker.outputs) if made is tensor)
        readers[0].outputs.clear()
        maker.outputs[place] = result
        found.tensors[result.name] = grid
        return True
    found.tensors[tensor.name] = grid
    for reader in readers:
        ir.replace_uses(reader.outputs[0], tensor)
    return True


def _is_only_shown(node: Node, outputs: Collection[int]) -> bool:
    """Whether nothing but a Q reads a tensor that is computed."""
    tensor = node.inputs[0]
    return bool(tensor.inputs) and len(tensor.outputs) == 1 and id(tensor) not in outputs


def _strip_constant(
    model: Model, node: Node, source: Constant, grid: Grid, readers: list[Node], found: Trained
) -> bool:
    results = [reader.outputs[0] for reader in readers]
    if not all(_is_operand(result, grid) for result in results):
        return False
    codes = grid.codes(source.values) if has(node, Trait.QUANTIZES) else source.values
    values = grid.values(codes)
    for result in results:
        constant = model.graph.initializers[result.name] = Constant(result.name, values)
        found.constants[result.name] = Stored(codes, grid)
        if not grid.scale.ndim and codes.dtype in BYTES:
            found.tensors[result.name] = grid
        ir.replace_uses(result, constant)
    return True


def _is_operand(result: Tensor, grid: Grid) -> bool:
    """Whether something dequantized is read as weight or bias, or by an operator with integer kernels."""
    for reader in result.outputs:
        role = spec_of(reader).role
        if role is Role.LINEAR and any(tensor is result for tensor in reader.inputs[1:]):
            continue
        if role is not Role.KERNEL or grid.scale.ndim:
            return False
    return bool(result.outputs)


def _grid(node: Node) -> Grid | None:
    """Scale and zero point of Q or DQ; None where they are no constants, or of a kind that is left alone."""
    scale, zero = _values(node.inputs[1]), _values(node.input(2))
    if scale is None or scale.dtype != np.float32 or (zero is None and node.input(2) is not None):
        return None
    if zero is None:
        kind = node.inputs[0].dtype if has(node, Trait.DEQUANTIZES) else np.dtype(np.uint8)
        zero = np.zeros(scale.shape, kind)
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    if block:
        plain = has(node, Trait.DEQUANTIZES) and zero.dtype in BLOCKED and scale.ndim > 1
        return Grid(scale, zero, axis, block) if plain else None
    if zero.dtype not in (*BYTES, np.dtype(np.int32)):
        return None
    if scale.size and (scale == scale.flat[0]).all() and (zero == zero.flat[0]).all():
        return Grid(scale.reshape(-1)[0].reshape(()), zero.reshape(-1)[0].reshape(()), axis)
    return Grid(scale, zero, axis)


def _values(tensor: Tensor | None) -> Array | None:
    origin = _origin(tensor) if tensor is not None else None
    return origin.values if isinstance(origin, Constant) else None


def _origin(tensor: Tensor) -> Tensor:
    """Where a tensor comes from, as it is."""
    maker = ir.producer(tensor)
    while maker is not None and has(maker, Trait.COPIES) and maker.domain in DEFAULT_DOMAINS:
        tensor = maker.inputs[0]
        maker = ir.producer(tensor)
    return tensor


def _pairs(node: Node, grid: Grid, outputs: Collection[int]) -> list[Node]:
    """The DQ behind a Q; none if anything else reads it, or they do not match."""
    result = node.outputs[0]
    if id(result) in outputs:
        return []
    readers = list(result.outputs)
    for reader in readers:
        other = _grid(reader) if has(reader, Trait.DEQUANTIZES) and reader.inputs[0] is result else None
        if other is None or not grid.same(other):
            return []
    return readers


def _drop_unread(model: Model, tensors: list[Tensor]) -> None:
    """Drop those of some tensors, and the copies they are made by, that nothing reads any more."""
    outputs = {id(tensor) for tensor in model.graph.outputs}
    gone: set[int] = set()
    while tensors:
        tensor = tensors.pop()
        maker = ir.producer(tensor)
        if tensor.outputs or id(tensor) in outputs:
            continue
        if isinstance(tensor, Constant):
            model.graph.initializers.pop(tensor.name, None)
        elif maker is not None and has(maker, Trait.COPIES):
            tensors.extend(maker.inputs)
            ir.detach(maker)
            gone.add(id(maker))
    ir.sweep(model.graph, gone)


def _high(seen: Histogram) -> float:
    """What all but a few values are below."""
    return percentile(seen.result(), 100.0 * (1.0 - CLIPPED)).high


def _is_positive(tensor: Tensor) -> bool:
    maker = ir.producer(tensor)
    limits = spec_of(maker).limits if maker is not None else None
    found = limits(maker) if limits and maker is not None else None
    return found is not None and found[0] >= 0.0


def _variables(model: Model) -> Iterator[Variable]:
    yield from (tensor for tensor in model.graph.inputs if isinstance(tensor, Variable))
    for node in list(model.graph.nodes):
        yield from node.outputs


def constants_read(model: Model) -> list[Constant]:
    """Constants that nodes of the main graph read."""
    found = {
        id(tensor): tensor
        for node in model.graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, Constant)
    }
    return list(found.values())


def _pair(tensor: Variable, grid: Grid, name: Namer, shown: bool) -> list[Node]:
    """Q and DQ behind a tensor; before it, under its name, where it is an output of the model."""
    codes = Variable(name(f"{tensor.name}_quantized"), grid.zero_point.dtype, tensor.shape)
    other = Variable(name(f"{tensor.name}_dequantized"), np.dtype(np.float32), tensor.shape)
    parameters: list[Tensor] = [
        Constant(name(f"{tensor.name}_scale"), grid.scale),
        Constant(name(f"{tensor.name}_zero_point"), grid.zero_point),
    ]
    source, result = tensor, other
    if shown:
        maker = tensor.inputs[0]
        maker.outputs[next(index for index, made in enumerate(maker.outputs) if made is tensor)] = other
        source, result = other, tensor
    else:
        ir.replace_uses(tensor, other)
    return [
        Node("QuantizeLinear", name(f"{tensor.name}_QuantizeLinear"), None, [source, *parameters], [codes]),
        Node(
            "DequantizeLinear", name(f"{tensor.name}_DequantizeLinear"), None, [codes, *parameters], [result]
        ),
    ]


def _dequantized(constant: Constant, stored: Stored, name: Namer) -> Node:
    grid = stored.grid
    result = Variable(name(f"{constant.name}_dequantized"), np.dtype(np.float32), constant.shape)
    ir.replace_uses(constant, result)
    inputs: list[Tensor] = [
        Constant(name(f"{constant.name}_quantized"), stored.codes),
        Constant(name(f"{constant.name}_scale"), grid.scale),
    ]
    if stored.codes.dtype != np.int32:
        inputs.append(Constant(name(f"{constant.name}_zero_point"), grid.zero_point))
    attrs = {"axis": grid.axis} if grid.scale.ndim else {}
    if grid.block:
        attrs["block_size"] = grid.block
    return Node("DequantizeLinear", name(f"{constant.name}_DequantizeLinear"), attrs, inputs, [result])
