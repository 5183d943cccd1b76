"""Weight-only quantization: integers in the file, floating point in the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxslim.calibration.gram import Gram
from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize.choices import Variant
from onnxslim.passes.quantize.coder import Floats, WeightCoder
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.storing import Blocks, Storage
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


@dataclass(frozen=True)
class WeightOnlyBlocks(Strategy):
    """Weights of matrix products as int4, a scale for every few inputs; int8 where that is too coarse."""

    def in_floats(self, model: Model, variant: Variant) -> Mapping[str, str]:
        """All nodes."""
        return {node.label: WEIGHTS_ONLY for node in model.graph.nodes}

    def _parts(self, draft: Draft) -> tuple[list[Node], list[Node]]:
        """Nodes with weights in eight bits, and in four."""
        return parted(draft, lambda node, label: draft.variant.kept.get(label))

    def compute(self, draft: Draft) -> QuantizeFigures:
        """A DQ behind each weight of eight bits."""
        return self.insert(draft, self._parts(draft)[0])

    def store(self, draft: Draft, storage: Storage) -> None:
        """A DQ by blocks behind each weight of four."""
        super().store(draft, storage)
        refined = draft.variant.refined
        for node in self._parts(draft)[1]:
            storage.four_bits(node, draft.coder.blocks(node.inputs[1].name, refined=refined))

    def code(
        self, coder: WeightCoder, layer: Layer, wanted: Floats, gram: Gram, *, corrected: bool, kept: bool
    ) -> tuple[Encoded | Blocks, Floats]:
        """With a scale for every few inputs."""
        return coder.coded_in_blocks(layer, wanted, gram, corrected=corrected)
