"""What follows a layer and works on each of its output channels by itself goes into weight and bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ops import Trait, has
from onnxslim.passes import predicates
from onnxslim.passes.fuse import uniform
from onnxslim.passes.fuse.layer import LAYERS, STORED, Absorber, Folded, absorber, fold, store, training


@dataclass(frozen=True)
class Place:
    """A layer and a neighbour that goes into it.

    Attributes:
        node: the neighbour.
        layer: the layer.
        edit: where they are.
        factors: what `fold` is to do; a text if that is not known.
    """

    node: Node
    layer: Absorber
    edit: Editor
    factors: Mapping[str, Array] | str

    @cached_property
    def folded(self) -> Folded | str:
        """The layer's new values, or why there are none."""
        return self.factors if isinstance(self.factors, str) else fold(self.layer, self.edit, **self.factors)


class After(Rule[Place]):
    """A rule that takes a node into the layer before it."""

    matches = LAYERS
    makes = STORED

    def check(self, match: Place, edit: Editor) -> str | None:
        if isinstance(match.folded, str):
            return match.folded
        return predicates.stuck((match.node, match.layer.node.outputs[0]), edit)

    def rewrite(self, match: Place, edit: Editor) -> str:
        assert isinstance(match.folded, Folded)
        name, op = match.layer.node.label, match.node.op
        made = store(match.layer, edit, match.folded)
        edit.bypass(match.node, made.outputs[0])
        return f"moved {op} into {name}"


def _layer_before(node: Node, index: int, edit: Editor) -> Absorber | None:
    """The layer whose output a node alone reads, at this input."""
    tensor = node.inputs[index]
    return absorber(predicates.made_by(tensor, *LAYERS), edit) if edit.sole_consumer(tensor) is node else None


class BatchNormAfter(After):
    """BatchNormalization(L(x)) = s * L(x) + t per channel, s = scale / sqrt(var + epsilon), t = B - s * mean.

    Outside training, after a convolution, a product of two matrices or another BatchNormalization; in grouped
    transposed convolutions the channels of the weight are those of one group.
    """

    name = "layer-batchnorm"
    ops = frozenset(("BatchNormalization",))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Place | None:
        found = _layer_before(node, 0, edit)
        if found is None:
            return None
        if found.node.op == "MatMul" and found.rank != 2:
            return Place(
                node, found, edit, "it normalizes another axis than the one the product makes, or may"
            )
        factors = normalization(node, edit, found.outputs)
        if not isinstance(factors, str):
            factors = {"outputs": factors["scale"], "shift": factors["shift"]}
        return Place(node, found, edit, factors)


def normalization(node: Node, edit: Editor, channels: int) -> dict[str, Array] | str:
    """Scale and shift per channel of a BatchNormalization, or why there are none."""
    problem = training(node, edit)
    if problem:
        return problem
    values = [uniform.value(node, index, edit) for index in (1, 2, 3, 4)]
    scale, shift, mean, variance = (
        None if value is None or value.shape != (channels,) else value.astype(np.float64) for value in values
    )
    if scale is None or shift is None or mean is None or variance is None:
        return "its statistics are not constants, or not one per channel"
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + np.float32(node.attrs.get("epsilon", 1e-5)))
        return {"scale": factor, "shift": shift - factor * mean}


class ArithmeticAfter(After):
    """L(x) + c, L(x) - c, c - L(x), L(x) * c and L(x) / c with a constant per output channel of a layer.

    The channels are axis 1 of a convolution or normalization and the last axis of a product: a vector of C
    values added to a convolution runs along the width, and is no bias even if the width is C.

    Attributes:
        layers: the operators that take the constant.
    """

    layers: ClassVar[tuple[str, ...]]
    ops = frozenset(("Add", "Sub", "Mul", "Div"))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Place | None:
        for side in (1,) if node.op == "Div" else (1, 0):
            values = uniform.value(node, side, edit)
            found = None if values is None else _layer_before(node, 1 - side, edit)
            if found is not None and found.node.op in self.layers and values is not None:
                return Place(node, found, edit, self._factors(node, side, values, found))
        return None

    def _factors(self, node: Node, side: int, values: Array, found: Absorber) -> dict[str, Array] | str:
        vector = found.vector(values, found.outputs)
        if vector is None:
            return "the constant is not one value per output channel"
        if node.op == "Add":
            return {"shift": vector}
        if node.op == "Sub":
            return {"shift": -vector} if side == 1 else {"shift": vector, "outputs": -np.ones_like(vector)}
        with np.errstate(all="ignore"):
            return {"outputs": vector if node.op == "Mul" else 1 / vector}


class ConvArithmetic(ArithmeticAfter):
    """L(x) + c, L(x) - c, c - L(x), L(x) * c and L(x) / c with a constant per channel of a convolution."""

    name = "layer-arithmetic"
    layers = ("Conv", "ConvTranspose", "BatchNormalization")


class GemmArithmetic(ArithmeticAfter):
    """Likewise for a constant per column of a Gemm."""

    name = "gemm-arithmetic"
    layers = ("Gemm",)


class MatMulArithmetic(ArithmeticAfter):
    """Likewise for a MatMul, which takes a summand by becoming a Gemm, where ONNX Runtime has one."""

    name = "matmul-arithmetic"
    layers = ("MatMul",)


class TransposedArithmetic(ArithmeticAfter):
    """Likewise behind a Transpose of a convolution, as in models that keep their channels last."""

    name = "transposed-arithmetic"
    matches = frozenset((*LAYERS, "Transpose"))
    layers = ("Conv", "ConvTranspose")

    def pattern(self, node: Node, edit: Editor) -> Place | None:
        for side in (1,) if node.op == "Div" else (1, 0):
            values = predicates.constant(node, side)
            moved = predicates.made_by(node.inputs[1 - side], "Transpose") if values is not None else None
            if values is None or moved is None or edit.sole_consumer(moved.outputs[0]) is not node:
                continue
            found = _layer_before(moved, 0, edit)
            perm = moved.attrs.get("perm")
            if found is not None and found.node.op in self.layers and perm and values.ndim <= len(perm):
                wide = values.reshape((1,) * (len(perm) - values.ndim) + values.shape)
                return Place(
                    node, found, edit, self._factors(node, side, wide.transpose(np.argsort(perm)), found)
                )
        return None

    def check(self, match: Place, edit: Editor) -> str | None:
        if isinstance(match.folded, str):
            return match.folded
        return predicates.stuck((match.node, _data(match.node)), edit)

    def rewrite(self, match: Place, edit: Editor) -> str:
        assert isinstance(match.folded, Folded)
        name, op, source = match.layer.node.label, match.node.op, _data(match.node)
        store(match.layer, edit, match.folded)
        edit.bypass(match.node, source)
        return f"moved {op} into {name}"


@dataclass(frozen=True)
class Behind(Place):
    """A layer, views of what it makes, and a node that multiplies the last of them by a number.

    Attributes:
        added: an Add of a constant right after the layer, if there is one.
    """

    added: Node | None

    @property
    def summand(self) -> tuple[int, Array]:
        """Index and values of the constant that is added."""
        assert self.added is not None
        side = 1 if predicates.constant(self.added, 1) is not None else 0
        values = predicates.constant(self.added, side)
        assert values is not None
        return side, values


class ScaleBehindViews(Rule[Behind]):
    """A number that multiplies a layer's output after it was reshaped and transposed goes into its weight."""

    name = "scale-behind-views"
    ops = frozenset(("Mul", "Div"))
    matches = frozenset((*LAYERS, "Add"))
    makes = STORED
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Behind | None:
        for side in (1,) if node.op == "Div" else (1, 0):
            values = predicates.constant(node, side)
            number = predicates.number(values)
            data = node.inputs[1 - side]
            if number and values is not None and predicates.broadcasts_into(values.shape, edit.shape(data)):
                return self._behind(node, data, 1 / number if node.op == "Div" else number, edit)
        return None

    def _behind(self, node: Node, data: Tensor, factor: float, edit: Editor) -> Behind | None:
        reader, current = node, data
        while (moved := self._moved(current, edit)) and edit.sole_consumer(current) is reader:
            reader, current = moved, moved.inputs[0]
        if reader is node or edit.sole_consumer(current) is not reader:
            return None
        added = predicates.made_by(current, "Add")
        side = next((i for i in (0, 1) if added and predicates.constant(added, i) is not None), None)
        if added is not None and side is not None:
            reader, current = added, added.inputs[1 - side]
        found = absorber(predicates.made_by(current, *LAYERS), edit)
        if found is None or edit.sole_consumer(current) is not reader:
            return None
        factors = {"outputs": np.full(found.outputs, factor)}
        return Behind(node, found, edit, factors, added if reader is added else None)

    def _moved(self, tensor: Tensor, edit: Editor) -> Node | None:
        node = ir.producer(tensor)
        moved = node is not None and edit.is_standard(node) and has(node, Trait.MOVES)
        return node if moved and node is not None and len(node.outputs) == 1 else None

    def check(self, match: Behind, edit: Editor) -> str | None:
        if isinstance(match.folded, str):
            return match.folded
        if match.added is not None and self._scaled(match) is None:
            return "the constant between is shared, or does not fit its type"
        return predicates.stuck((match.node, _data(match.node)), edit)

    def rewrite(self, match: Behind, edit: Editor) -> str:
        assert isinstance(match.folded, Folded)
        name, op = match.layer.node.label, match.node.op
        if match.added is not None:
            scaled = self._scaled(match)
            assert scaled is not None
            edit.set_values(match.added, match.summand[0], scaled)
        store(match.layer, edit, match.folded)
        edit.bypass(match.node, _data(match.node))
        return f"moved {op} into {name}"

    def _scaled(self, match: Behind) -> Array | None:
        assert match.added is not None
        assert not isinstance(match.factors, str)
        side, values = match.summand
        if len(match.added.inputs[side].outputs) > 1 and values.nbytes > predicates.MAX_COPY_BYTES:
            return None
        return predicates.rounded(values.astype(np.float64) * match.factors["outputs"][0], values.dtype)


def _data(node: Node) -> Tensor:
    """What a node combines with a constant."""
    return node.inputs[0 if predicates.constant(node, 1) is not None else 1]


RULES = (
    BatchNormAfter(),
    ConvArithmetic(),
    TransposedArithmetic(),
    GemmArithmetic(),
    MatMulArithmetic(),
    ScaleBehindViews(),
)
