"""What precedes a layer and works on each of its input channels by itself goes into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.passes import predicates
from onnxslim.passes.fuse.after import Place, normalization
from onnxslim.passes.fuse.layer import PRODUCTS, STORED, Absorber, Folded, absorber, store


@dataclass(frozen=True)
class Ahead(Place):
    """A layer and the neighbour before it.

    Attributes:
        source: what the neighbour works on.
    """

    source: Tensor


class Before(Rule[Ahead]):
    """A rule that takes the node before a layer into it."""

    makes = STORED

    def check(self, match: Ahead, edit: Editor) -> str | None:
        return match.folded if isinstance(match.folded, str) else None

    def rewrite(self, match: Ahead, edit: Editor) -> str:
        assert isinstance(match.folded, Folded)
        made = store(match.layer, edit, match.folded)
        edit.set_input(made, 0, match.source)
        return f"took in {match.node.label}"


def is_padded(node: Node) -> bool:
    """Whether a convolution or pooling adds elements at the borders."""
    automatic = node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "")
    return automatic or any(node.attrs.get("pads", ()))


class BatchNormBefore(Before):
    """L(s * x + t): s scales the input channels of the weight, and the weight times t is added to the bias.

    What a convolution pads with is not shifted by t, so it must pad nothing or t be 0. A transposed
    convolution adds t only where its windows reach, so there t must be 0.
    """

    name = "batchnorm-layer"
    ops = PRODUCTS
    matches = frozenset(("BatchNormalization",))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Ahead | None:
        norm = predicates.made_by(node.inputs[0], "BatchNormalization")
        alone = norm is not None and edit.sole_consumer(node.inputs[0]) is node
        found = absorber(node, edit) if alone else None
        if norm is None or found is None:
            return None
        return Ahead(norm, found, edit, self._factors(norm, found, edit), norm.inputs[0])

    def _factors(self, norm: Node, found: Absorber, edit: Editor) -> dict[str, Array] | str:
        node = found.node
        if (node.op == "MatMul" and found.rank != 2) or node.attrs.get("transA", 0):
            return "it normalizes another axis than the one the product sums over, or may"
        factors = normalization(norm, edit, found.inputs)
        if isinstance(factors, str):
            return factors
        if not factors["shift"].any():
            return {"inputs": factors["scale"]}
        if node.op == "ConvTranspose" or (node.op == "Conv" and is_padded(node)):
            return "the layer pads, and the padding would be shifted too"
        return {"inputs": factors["scale"], "input_shift": factors["shift"]}


class ScaleBefore(Before):
    """Conv(x * c) and Conv(x / c) with a constant per input channel; padded zeros stay zeros."""

    name = "scale-layer"
    ops = frozenset(("Conv", "ConvTranspose"))
    matches = frozenset(("Div", "Mul"))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Ahead | None:
        scale = predicates.made_by(node.inputs[0], "Mul", "Div")
        if scale is None or edit.sole_consumer(node.inputs[0]) is not node:
            return None
        for side in (1, 0) if scale.op == "Mul" else (1,):
            values = predicates.constant(scale, side)
            found = None if values is None else absorber(node, edit)
            if values is not None and found is not None:
                factors = self._factors(scale, side, values, found, edit)
                return Ahead(scale, found, edit, factors, scale.inputs[1 - side])
        return None

    def _factors(
        self, scale: Node, side: int, values: Array, found: Absorber, edit: Editor
    ) -> dict[str, Array] | str:
        if predicates.is_gelu(scale.inputs[1 - side]):
            return "it ends a GELU, which ONNX Runtime computes as one"
        if not predicates.broadcasts_into(values.shape, edit.shape(scale.inputs[1 - side])):
            return "the constant broadcasts its input to another shape, or may"
        vector = found.vector(values, found.inputs)
        if vector is None:
            return "the constant is not one value per input channel"
        with np.errstate(all="ignore"):
            return {"inputs": vector if scale.op == "Mul" else 1 / vector}


@dataclass(frozen=True)
class Padding:
    """A Pad, the operator that takes it over, and what that one then pads with."""

    pad: Node
    node: Node
    pads: tuple[int, ...] | str


class PadBefore(Rule[Padding]):
    """Conv(Pad(x, 0)) pads by itself; so does AveragePool, which must then count what it pads.

    Only zeros along the spatial axes, and none taken away. Max pooling pads with less than any number.
    """

    name = "pad-layer"
    ops = frozenset(("Conv", "AveragePool"))
    matches = frozenset(("Pad",))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Padding | None:
        pad = predicates.made_by(node.inputs[0], "Pad")
        if pad is None or edit.sole_consumer(node.inputs[0]) is not node:
            return None
        return Padding(pad, node, self._pads(pad, node, edit))

    def check(self, match: Padding, edit: Editor) -> str | None:
        return match.pads if isinstance(match.pads, str) else None

    def rewrite(self, match: Padding, edit: Editor) -> str:
        attrs = match.node.attrs
        attrs.pop("auto_pad", None)
        attrs["pads"] = match.pads
        if match.node.op == "AveragePool":
            attrs["count_include_pad"] = 1
        edit.set_input(match.node, 0, match.pad.inputs[0])
        return f"took in {match.pad.label}"

    def _pads(self, pad: Node, node: Node, edit: Editor) -> tuple[int, ...] | str:
        axes = self._rank(node, edit)
        if axes is None:
            return "the number of axes is not known"
        if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", ""):
            return "the amount of its own padding depends on the size"
        added = padding(pad, axes)
        if isinstance(added, str):
            return added
        spatial = axes - 2
        own = node.attrs.get("pads", (0,) * (2 * spatial))
        if any(added[axis] for axis in (0, 1, axes, axes + 1)):
            return "it pads the batch or the channels"
        total = tuple(
            mine + more for mine, more in zip(own, (*added[2:axes], *added[axes + 2 :]), strict=True)
        )
        return self._unpoolable(node, own, total) or total if node.op == "AveragePool" else total

    def _rank(self, node: Node, edit: Editor) -> int | None:
        if node.op == "AveragePool":
            return len(node.attrs.get("kernel_shape", ())) + 2
        return predicates.rank(edit.shape(node.inputs[1]))

    def _unpoolable(self, node: Node, own: tuple[int, ...], total: tuple[int, ...]) -> str:
        if any(own) and not node.attrs.get("count_include_pad", 0):
            return "its own padding does not count in the average"
        if node.attrs.get("ceil_mode", 0) or any(step != 1 for step in node.attrs.get("dilations", ())):
            return "its windows reach beyond the border, or are dilated"
        kernel = node.attrs["kernel_shape"]
        return (
            "it would pad a whole window"
            if any(n >= k for n, k in zip(total, (*kernel, *kernel), strict=True))
            else ""
        )


def padding(pad: Node, axes: int) -> tuple[int, ...] | str:
    """Zeros a Pad adds at the start and the end of each axis, or why it does something else."""
    if pad.attrs.get("mode", "constant") != "constant":
        return "it does not pad with a constant"
    filler = (
        pad.attrs.get("value", 0.0)
        if pad.input(2) is None
        else predicates.number(predicates.constant(pad, 2))
    )
    if filler != 0:
        return "it does not pad with zeros, or may not"
    pads, chosen = predicates.ints(pad, "pads", 1), predicates.ints(pad, "axes", 3)
    if pads is None or (chosen is None and predicates.given(pad, "axes", 3)):
        return "what it pads is computed"
    places = [axis + axes if axis < 0 else axis for axis in (range(axes) if chosen is None else chosen)]
    if any(amount < 0 for amount in pads):
        return "it takes elements away"
    if len(pads) != 2 * len(places) or not set(places) <= set(range(axes)):
        return "it pads another number of axes"
    found = [0] * (2 * axes)
    for place, start, end in zip(places, pads[: len(places)], pads[len(places) :], strict=True):
        found[place], found[place + axes] = start, end
    return tuple(found)


RULES = (BatchNormBefore(), ScaleBefore(), PadBefore())
