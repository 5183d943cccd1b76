"""Weight-only quantization: integers in the file, floating point in the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from onnxslim.passes.quantize.tables import BlockTables, retie, table_of
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

    def blocking(
        self, inputs: int, bits: int = 8, *, even: bool = False, looked_up: bool = False
    ) -> Blocking:
        """How a weight over so many inputs is coded by so many bits.

        Args:
            inputs, bits: see above.
            even: blocks have to be full.
            looked_up: its rows are looked up.
        """
        size = self.settings.block_size or (FEW if bits < 8 else MANY if even else _least_bytes(inputs))
        size = math.gcd(inputs, size) if even else size
        # Where a row has an odd number of blocks, ONNX Runtime 1.23 and 1.24 look up wrong codes of zero.
        safe = not looked_up or math.ceil(inputs / size) % 2 == 0
        return Blocking(bits, size, self.layout.zero_points and bits < 8 and safe)


@dataclass(frozen=True)
class WeightOnlyBytes(WeightOnly):
    """The same with a scale for every few inputs, in either storage."""

    bits: ClassVar[int] = 8

    def looks_up(self, node: Node) -> bool:
        """Tables that nothing but lookups read, where there is a form for them."""
        table = table_of(node) if self._fused else None
        return table is not None and table.name not in self.settings.ties.values()

    @property
    def _fused(self) -> bool:
        return self.settings.storage == "matmulnbits"

    def compute(self, draft: Draft) -> QuantizeFigures:
        """Weights in blocks; those that cannot be written so as int8 per channel."""
        exact, rest = parted(draft, lambda node, label: self._reason(node, label, draft.variant))
        figures = self.insert(draft, exact)
        if self._fused:
            self._write(draft, rest)
        else:
            self._dequantize(draft, rest)
        return figures

    def _dequantize(self, draft: Draft, nodes: Sequence[Node]) -> None:
        storage = Storage(draft.model, draft.log)
        for node in nodes:
            layer = _layer(node)
            blocking = self.blocking(layer.inputs, self._bits(node, draft))
            if draft.coder.known(layer, blocking) is None:  # else it is put back as it was
                blocks = draft.coder.blocks(layer, blocking, refined=draft.variant.refined)
                storage.in_blocks(node, blocks)
        storage.finish()

    def _write(self, draft: Draft, nodes: Sequence[Node]) -> None:
        """In the form of ONNX Runtime, tables included."""
        products, tables = BlockProducts(draft.model, draft.log), BlockTables(draft.model, draft.log)
        ties = self.settings.ties
        looked_up = {name: node for node in draft.model.graph.nodes for name in _names(node, ties)}
        for node in nodes:
            layer, name = _layer(node), node.inputs[1].name
            tied, bits = name in ties, self._bits(node, draft)
            blocking = self.blocking(layer.inputs, bits, even=tied, looked_up=tied)
            blocks = draft.coder.blocks(layer, blocking, refined=draft.variant.refined)
            products.write(node, blocks)
            if tied:
                tables.share(looked_up[ties[name]].inputs[0], node, blocks)
        for node in draft.plan.tables:
            table = table_of(node)
            assert table is not None
            columns = table.shape[1]
            bits = 8 if columns % 2 else self._bits(node, draft)
            tables.write(node, draft.coder.table(table, self.blocking(columns, bits, looked_up=True)))
        self._keep(draft, products)
        tables.finish()
        retie(draft.model, ties)

    def _keep(self, draft: Draft, products: BlockProducts) -> None:
        """What came in this form, and is left alone, leaves in it."""
        for node in draft.model.graph.nodes:
            layer = view_of(node)
            blocks = draft.coder.kept(layer) if layer is not None and node.input(1) is not None else None
            if blocks is not None and unwritable(node) is None:
                products.write(node, blocks)

    def store(self, draft: Draft, storage: Storage) -> None:
        """Tables, where that is not done yet."""
        if not self._fused:
            super().store(draft, storage)

    def _reason(self, node: Node, label: str, variant: Variant) -> str | None:
        """Why a weight is int8 with a scale for each channel."""
        return unfit(node) or (unwritable(node) if self._fused else None)

    def _bits(self, node: Node, draft: Draft) -> int:
        return self.bits

    def code(
        self,
        coder: WeightCoder,
        layer: Layer,
        wanted: Floats,
        gram: Gram,
        *,
        corrected: bool,
        kept: bool,
        finer: bool,
        limit: int,
    ) -> tuple[Encoded | Blocks, Floats]:
        """With a scale for every few inputs."""
        blocking = self.blocking(layer.inputs, 8 if finer else self.bits)
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


def _names(node: Node, ties: Mapping[str, str]) -> list[str]:
    """The table that a node looks up, if a product has it as its weight."""
    name = node.inputs[0].name if node.inputs else ""
    return [name] if name in ties.values() else []


def _layer(node: Node) -> Layer:
    layer = view_of(node)
    assert layer is not None
    return layer
