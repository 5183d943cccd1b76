"""Dynamic quantization: ranges are those of every single input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.passes.quantize.choices import Variant
from onnxslim.passes.quantize.dynamic_products import DynamicProducts, unfit
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.plan import LAST
from onnxslim.passes.quantize.recurrent import DynamicRecurrent
from onnxslim.passes.quantize.strategy import Draft, Strategy, parted

AS_THEY_COME = "without ranges, only matrix products by constants and LSTMs run in integers"


@dataclass(frozen=True)
class Dynamic(Strategy):
    """Matrix products by constants, and LSTMs, turn data into integers as they come; others store weights."""

    fits_in_turn: ClassVar[bool] = False
    recurs: ClassVar[bool] = True
    sharing: ClassVar[bool] = True

    def in_floats(self, model: Model, variant: Variant) -> Mapping[str, str]:
        """All nodes, as far as a plan of ranges is concerned."""
        return {node.label: AS_THEY_COME for node in model.graph.nodes}

    def compute(self, draft: Draft) -> QuantizeFigures:
        """MatMulInteger, or a DQ behind a weight."""
        plan, kept = draft.plan, draft.variant.kept

        def exact(node: Node, label: str) -> str | None:
            return kept.get(label) or (LAST if id(node) in plan.last else None) or unfit(node)

        stored, products = parted(draft, exact)
        figures = self.insert(draft, stored)
        encoder = draft.coder.encoder(refined=draft.variant.refined)
        per_channel = self.settings.per_channel
        writer = DynamicProducts(draft.model, self.layout, encoder, per_channel, draft.log)
        writer.apply(products)
        layers = DynamicRecurrent(draft.model, self.layout, per_channel, draft.log)
        for node in draft.plan.recurrent:
            if reason := kept.get(draft.plan.labels[id(node)]):
                draft.log.skip(node.label, reason)
            else:
                layers.apply([node])
        return replace(figures, tightened={**writer.tightened, **layers.tightened})
