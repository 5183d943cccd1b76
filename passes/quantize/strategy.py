"""What the ways to quantize differ in: which nodes run how, and what is written for them.

`Static` runs on ranges known beforehand, `Dynamic` on those of every single input, `WeightOnly` computes in
floating point. The builder asks the strategy at every step; what they have in common is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from onnxslim.calibration.gram import Gram
from onnxslim.calibration.observers import Range
from onnxslim.engine.base import Log
from onnxslim.ir.graph import Array, Node
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Layer
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.quantize.blocks import Blocks
from onnxslim.passes.quantize.choices import Settings, Variant, refusal
from onnxslim.passes.quantize.coder import Floats, WeightCoder
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.insert import Inserter
from onnxslim.passes.quantize.plan import Plan
from onnxslim.passes.quantize.storing import Storage
from onnxslim.passes.quantize.trained import KnownGrid
from onnxslim.passes.quantize.weights import QMAX, Encoded, stored_limit


@dataclass(frozen=True)
class Draft:
    """A candidate while it is written.

    Attributes:
        model: edited.
        plan: of it.
        variant: what it differs in.
        coder: integers of its weights.
        ranges: of each tensor of the plan, by id.
        means: of the channels that nodes with a bias to correct read, by the node's id.
        grids: scales and zero points that tensors brought along, by id.
        dequantized: names of constants that will be dequantized ones.
        log: what is done goes here.
    """

    model: Model
    plan: Plan
    variant: Variant
    coder: WeightCoder
    ranges: Mapping[int, Range]
    means: Mapping[int, Array]
    grids: Mapping[int, KnownGrid]
    dequantized: Collection[str]
    log: Log


@dataclass(frozen=True)
class Strategy(ABC):
    """A way to quantize.

    Attributes:
        settings: of all candidates.
        layout: of the target.
        calibrated: whether ranges of activations are known beforehand, from data.
        fits_in_turn: whether weights can be fitted to what the quantized layers before them make.
        recurs: whether recurrent layers turn their data and state into integers.
        sharing: whether a weight that several nodes read may be stored as integers.
    """

    settings: Settings
    layout: IntegerLayout

    calibrated: ClassVar[bool] = False
    fits_in_turn: ClassVar[bool] = True
    recurs: ClassVar[bool] = False
    sharing: ClassVar[bool] = False

    @property
    def limit(self) -> int:
        """Largest magnitude of a code of a weight, where nothing asks for more."""
        return QMAX

    def limit_of(self, label: str, variant: Variant, *, stored: bool) -> int:
        """The same of a node; `stored`: whether it computes in floating point, see `stored_limit`."""
        if variant.eight or label in variant.wide:
            return QMAX
        return stored_limit(self.limit) if stored else self.limit

    def limits(self, plan: Plan, variant: Variant) -> dict[int, int]:
        """The same of all weighted nodes of a plan, by id."""
        parts = (plan.linear, False), (plan.stored, True)
        return {
            id(node): self.limit_of(plan.labels[id(node)], variant, stored=stored)
            for nodes, stored in parts
            for node in nodes
        }

    def looks_up(self, node: Node) -> bool:
        """Whether a node looks up a table whose size of integers is chosen like that of a weight."""
        return False

    @abstractmethod
    def in_floats(self, model: Model, variant: Variant) -> Mapping[str, str]:
        """Labels of the nodes that compute in floating point whatever the plan, and why."""

    @abstractmethod
    def compute(self, draft: Draft) -> QuantizeFigures:
        """Make nodes run in integers, or read weights that are stored so."""

    def store(self, draft: Draft, storage: Storage) -> None:
        """Store what takes less room in the file than it computes with; tables, at least."""
        storage.tables(refusal(self.settings, draft.variant))

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
        """Integers of weights that a layer is to have, and what they stand for; see `WeightCoder.coded`.

        Args:
            coder, layer, wanted, gram, corrected, kept, limit: as there.
            finer: whether the layer is one step more exact than others.
        """
        return coder.coded(layer, wanted, gram, corrected=corrected, kept=kept, limit=limit)

    def without(self, variant: Variant, held: Mapping[str, str]) -> Variant:
        """The variant with just these weighted nodes one step more exact, by label with the reason."""
        return replace(variant, kept=dict(held))

    def sparing(self, variant: Variant, held: Mapping[str, str]) -> Variant:
        """The variant with just these weighted nodes as exact as can be, by label with the reason."""
        return self.without(variant, held)

    def widens(self, variant: Variant) -> bool:
        """Whether what `without` makes more exact gets weights of eight bits, and stays in integers."""
        return False

    def held_back(self, variant: Variant) -> Mapping[str, str]:
        """The weighted nodes that `without` made more exact."""
        return variant.kept

    def insert(self, draft: Draft, stored: Sequence[Node]) -> QuantizeFigures:
        """Q/DQ for the nodes of the plan that run in integers, DQ for weights that are only stored so.

        What came with a scale for every few inputs is put back as it was.
        """
        fresh = [node for node in stored if not draft.coder.came_in_blocks(node)]
        plan, log = replace(draft.plan, stored=fresh), draft.log
        if not plan.linear and not fresh:
            return QuantizeFigures()
        encoder = draft.coder.encoder(refined=draft.variant.refined)
        inserter = Inserter(draft.model, plan, self.layout, log, encoder)
        per_channel = self.settings.per_channel
        inserter.apply(draft.ranges, per_channel, draft.means, draft.grids, draft.dequantized)
        return QuantizeFigures(tightened=inserter.tightened, corrected=inserter.corrected)


def parted(draft: Draft, exact: Callable[[Node, str], str | None]) -> tuple[list[Node], list[Node]]:
    """Nodes that store their weights and have a reason to be more exact, which is noted, and the others.

    Args:
        draft: its nodes may have been edited already.
        exact: the reason, from a node and its label.
    """
    parts: tuple[list[Node], list[Node]] = [], []
    for node in draft.plan.stored:
        label = draft.plan.labels[id(node)]
        reason = exact(node, label)
        parts[reason is None].append(node)
        if reason:
            draft.log.skip(label, reason)
    return parts
