"""A tensor and a gated copy of it added up, as in squeeze-and-excite blocks with a skip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Node, Tensor
from onnxslim.passes import predicates
from onnxslim.passes.eliminate.arithmetic import Bounds, limit
from onnxslim.passes.fuse.layer import STORED, Absorber, Folded, absorber, fold, store

LAYERS = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Gate:
    """x + x * h.

    Attributes:
        total, product: the Add and the Mul.
        data: x.
        squash: the HardSigmoid that makes h, or None if the layer does.
        layer: what h is made of.
        edit: where they are.
    """

    total: Node
    product: Node
    data: Tensor
    squash: Node | None
    layer: Absorber
    edit: Editor

    @cached_property
    def folded(self) -> Folded | str:
        """The layer's new values, or why there are none."""
        channels = self.layer.outputs
        if self.squash is None:
            return fold(self.layer, self.edit, shift=np.ones(channels))
        slope, offset = self.squash.attrs.get("alpha", 0.2), self.squash.attrs.get("beta", 0.5)
        if slope == 0:
            return "its gate is constant"
        factors, shift = np.full(channels, slope), np.full(channels, offset + 1.0)
        return fold(self.layer, self.edit, outputs=factors, shift=shift)


class GatedSkip(Rule[Gate]):
    """x + x * L(z) = x * (1 + L(z)), and x + x * HardSigmoid(L(z)) = x * Clip(a L(z) + b + 1, 1, 2).

    The layer L takes up the 1, and the factor a and summand b of the HardSigmoid. Its bias must be there, or
    the model would get larger.
    """

    name = "gated-skip"
    ops = frozenset(("Add",))
    matches = frozenset((*LAYERS, "HardSigmoid", "Mul"))
    makes = frozenset((*STORED, "Clip", "Mul"))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> Gate | None:
        for side in (0, 1):
            product = predicates.made_by(node.inputs[1 - side], "Mul")
            if product is None or edit.sole_consumer(product.outputs[0]) is not node:
                continue
            for place in (0, 1):
                if product.inputs[place] is node.inputs[side]:
                    return self._gate(node, product, place, edit)
        return None

    def _gate(self, node: Node, product: Node, place: int, edit: Editor) -> Gate | None:
        factor = product.inputs[1 - place]
        squash = predicates.made_by(factor, "HardSigmoid")
        made = squash.inputs[0] if squash else factor
        alone = edit.sole_consumer(factor) is product and edit.sole_consumer(made) is (squash or product)
        found = absorber(predicates.made_by(made, *LAYERS), edit) if alone else None
        return Gate(node, product, product.inputs[place], squash, found, edit) if found else None

    def check(self, match: Gate, edit: Editor) -> str | None:
        if match.layer.weight.dtype != np.float32:
            return "it is put together for single precision only"
        if match.layer.node.input(2) is None:
            return "the layer has no bias, which would take space"
        return match.folded if isinstance(match.folded, str) else None

    def rewrite(self, match: Gate, edit: Editor) -> str:
        assert isinstance(match.folded, Folded)
        gate = store(match.layer, edit, match.folded).outputs[0]
        if match.squash is not None:
            gate = match.squash.outputs[0]
            limit(edit, match.squash, match.squash.inputs[0], Bounds(1, 2))
        edit.replace_node(match.total, "Mul", [match.data, gate])
        return f"multiplied by the gate of {match.product.label} plus one"


RULES = (GatedSkip(),)
