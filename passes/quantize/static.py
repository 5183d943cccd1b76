"""Static quantization: integers on ranges that calibration has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from onnxslim.ir.model import Model
from onnxslim.ops import Role, spec_of
from onnxslim.passes.quantize.choices import Variant
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.storing import Storage
from onnxslim.passes.quantize.strategy import Draft, Strategy
from onnxslim.passes.quantize.weights import LIMITS, QMAX


@dataclass(frozen=True)
class Static(Strategy):
    """Weighted operators and what lies between them run in integers (QDQ)."""

    calibrated: ClassVar[bool] = True

    @property
    def limit(self) -> int:
        """Weights in fewer bits are computed with as int8."""
        return LIMITS[self.settings.weights]

    def in_floats(self, model: Model, variant: Variant) -> Mapping[str, str]:
        """What the variant keeps."""
        return variant.kept

    def without(self, variant: Variant, held: Mapping[str, str]) -> Variant:
        """What is more exact than fewer bits are eight; than those, floats."""
        return replace(variant, wide=dict(held)) if self.widens(variant) else super().without(variant, held)

    def held_back(self, variant: Variant) -> Mapping[str, str]:
        """See `without`."""
        return variant.wide if self.widens(variant) else super().held_back(variant)

    def sparing(self, variant: Variant, held: Mapping[str, str]) -> Variant:
        """See `Strategy.sparing`."""
        return super().without(variant, held)

    def widens(self, variant: Variant) -> bool:
        """See `Strategy.widens`."""
        return self.limit < QMAX and not variant.eight

    def compute(self, draft: Draft) -> QuantizeFigures:
        """Q/DQ after the plan."""
        for node in (*draft.plan.linear, *draft.plan.stored):
            if reason := draft.variant.wide.get(label := draft.plan.labels[id(node)]):
                draft.log.skip(label, reason)
        return self.insert(draft, draft.plan.stored)

    def store(self, draft: Draft, storage: Storage) -> None:
        """Also weights of layers kept in floating point, as float16; nothing that the target may not know."""
        if not self.layout.weight_only:
            return
        super().store(draft, storage)
        if draft.variant.only is not None:
            return
        stored = {id(node) for node in draft.plan.stored}
        labels = draft.variant.kept
        kept = [n for n in draft.model.graph.nodes if n.label in labels and id(n) not in stored]
        layers = [node for node in kept if spec_of(node).role is Role.LINEAR]
        storage.halve([node for node in layers if not draft.coder.is_looked_up(node)])
