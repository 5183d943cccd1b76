"""Weight-only quantization: integers in the file, floating point in the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from onnxslim.calibration.gram import Gram
from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.ops import view_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize.block_products import BlockProducts, unfit, unwritable
from onnxslim.passes.quantize.blocks import Blocking, Blocks
from onnxslim.passes.quantize.choices import Variant
from onnxslim.passes.quantize.coder import Floats, WeightCoder
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.storing import Storage
from onnxslim.passes.quantize.strategy import Draft, Strategy, parted
from onnxslim.passes.quantize.weights import Encoded

WEIGHTS_ONLY = "only weights are asked for, which it does not read as integers"


@dataclass(frozen=True)
class WeightOnly(Strategy):
    """Weights of matrix products and embeddings as int8, with a scale for every output channel."""

    def in_floats(self, model: Model, variant: Variant) -> Mapping[str, str]:
        """All nodes."""
        return {node.label: WEIGHTS_ONLY for node in model.graph.nodes}

    def compute(self, draft: Draft) -> QuantizeFigures:
        """A DQ behind each weight."""
        return self.insert(draft, draft.plan.stored)

    def without(self, variant: Variant, held: Mapping[str, str]) -> Variant:
        """What is more exact than int8 are floats."""
        return replace(variant, refused=dict(held))

    def held_back(self, variant: Variant) -> Mapping[str, str]:
        """See `without`."""
        return variant.refused

    def blocking(self, layer: Layer, bits: int = 8) -> Blocking:
        """How the weight of a layer is coded in blocks by so many bits."""
        size = self.settings.block_size or (FEW if bits < 8 else _least_bytes(layer.inputs))
        return Blocking(bits, size, self.layout.signed_scales)


@dataclass(frozen=True)
class WeightOnlyBytes(WeightOnly):
    """The same with a scale for every few inputs, in either storage."""

    bits: ClassVar[int] = 8

    def compute(self, draft: Draft) -> QuantizeFigures:
        """Weights in blocks; those that cannot be written so as int8 per channel."""
        fused = self.settings.storage == "matmulnbits"
        exact, rest = parted(draft, lambda node, label: self._reason(node, label, draft.variant))
        figures = self.insert(draft, exact)
        storage, products = Storage(draft.model, draft.log), BlockProducts(draft.model, draft.log)
        for node in rest:
            layer = _layer(node)
            blocking = self.blocking(layer, self._bits(node, draft))
            if not fused and draft.coder.known(layer, blocking) is not None:
                continue  # it is put back as it was
            blocks = draft.coder.blocks(layer, blocking, refined=draft.variant.refined)
            if fused:
                products.write(node, blocks)
            else:
                storage.in_blocks(node, blocks)
        storage.finish()
        return figures

    def _reason(self, node: Node, label: str, variant: Variant) -> str | None:
        """Why a weight is int8 with a scale for each channel."""
        fused = self.settings.storage == "matmulnbits"
        return unfit(node) or (unwritable(node) if fused else None)

    def _bits(self, node: Node, draft: Draft) -> int:
        return self.bits

    def code(
        self, coder: WeightCoder, layer: Layer, wanted: Floats, gram: Gram, *, corrected: bool, kept: bool
    ) -> tuple[Encoded | Blocks, Floats]:
        """With a scale for every few inputs."""
        blocking = self.blocking(layer, self.bits)
        return coder.coded_in_blocks(layer, wanted, gram, blocking, corrected=corrected)


@dataclass(frozen=True)
class WeightOnlyBlocks(WeightOnlyBytes):
    """Weights of matrix products as int4, a scale for every few inputs; int8 where that is too coarse."""

    bits: ClassVar[int] = 4

    def _reason(self, node: Node, label: str, variant: Variant) -> str | None:
        if reason := super()._reason(node, label, variant):
            return reason
        return variant.kept.get(label) if self.settings.storage == "qdq" else None

    def _bits(self, node: Node, draft: Draft) -> int:
        label = draft.plan.labels[id(node)]
        reason = draft.variant.kept.get(label)
        if reason is None:
            return self.bits
        draft.log.skip(label, reason)
        return super().bits

    def without(self, variant: Variant, held: Mapping[str, str]) -> Variant:
        """What is more exact than int4 is int8."""
        return replace(variant, kept=dict(held))

    def held_back(self, variant: Variant) -> Mapping[str, str]:
        """See `without`."""
        return variant.kept


# Inputs that share a scale in four bits, and in eight at most. ONNX Runtime is the faster the more there are;
# in four bits 128 instead of 32 cost 1.5 dB.
FEW, MANY = 32, 128


def _least_bytes(inputs: int) -> int:
    """How many inputs are to share a scale in eight bits, with the last block filled up."""
    return min(
        (MANY, MANY // 2, MANY // 4, MANY // 8), key=lambda size: math.ceil(inputs / size) * (size + 4)
    )


def _layer(node: Node) -> Layer:
    layer = view_of(node)
    assert layer is not None
    return layer
