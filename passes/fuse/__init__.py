"""Fold what surrounds a layer into its weights, and make one operator of several."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from onnxslim.engine import rewrite
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.model import Model
from onnxslim.passes import predicates
from onnxslim.passes.fold.weights import computed_weights
from onnxslim.passes.fuse import activation, after, before, gate, product, recompose

RULES: tuple[Rule[Any], ...] = (
    *after.RULES,
    *before.RULES,
    *product.RULES,
    *gate.RULES,
    *activation.RULES,
    *recompose.RULES,
)

COMPUTED = (
    "its weight is computed from constants: 'onnxslim fold' stores it, with --max-growth where that takes "
    "more room"
)


@options
class Fuse(Pass):
    """Fold normalizations, biases, factors and paddings into the layers beside them."""

    name = "fuse"
    lossless = True

    skip: tuple[str, ...] = Field((), description="names of rules to leave out")

    def __post_init__(self) -> None:
        predicates.selected(RULES, self.skip)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Apply the rules everywhere, bodies of If, Loop and Scan included, until none fires."""
        log = Log()
        rewrite.apply(predicates.selected(RULES, self.skip), model, log, lossless=True)
        for node in computed_weights(model):
            log.skip(node.label, COMPUTED)
        return log.done()
