"""Drop operators that change nothing, and merge neighbours that are one."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from onnxslim.engine import rewrite
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.model import Model
from onnxslim.passes import predicates
from onnxslim.passes.eliminate import (
    arithmetic,
    around,
    control,
    default,
    movement,
    noop,
    parts,
    selection,
    view,
)

RULES: tuple[Rule[Any], ...] = (
    *control.RULES,
    *noop.RULES,
    *view.RULES,
    *movement.RULES,
    *around.RULES,
    *parts.RULES,
    *arithmetic.RULES,
    *default.RULES,
    *selection.RULES,
)


@options
class Eliminate(Pass):
    """Remove operators that change nothing, and merge neighbours that do one operator's work."""

    name = "eliminate"
    lossless = True

    skip: tuple[str, ...] = Field((), description="names of rules to leave out")

    def __post_init__(self) -> None:
        predicates.selected(RULES, self.skip)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Apply the rules everywhere, bodies of If, Loop and Scan included, until none fires."""
        log = Log()
        rewrite.apply(predicates.selected(RULES, self.skip), model, log, lossless=True)
        return log.done()
