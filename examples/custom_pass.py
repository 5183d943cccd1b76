"""A pass of one's own: multiply by the reciprocal instead of dividing by a constant.

python examples/custom_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from pydantic import Field

from onnxslim import Changes, Context, Model, Pass, Pipeline, load
from onnxslim.engine import rewrite
from onnxslim.engine.base import Figures, Log, captioned, options
from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Array, Node
from onnxslim.ir.model import constant_of

Division: TypeAlias = tuple[Node, Array]


class Divide(Rule[Division]):
    """x / c = x * (1 / c)."""

    name = "divide"
    ops = frozenset(("Div",))
    makes = frozenset(("Mul",))
    since = 7  # before, Mul broadcasts in another way

    def __init__(self, exact: bool) -> None:
        self.exact = exact

    def pattern(self, node: Node, edit: Editor) -> Division | None:
        divisor = constant_of(node.input(1))
        return None if divisor is None else (node, divisor)

    def check(self, match: Division, edit: Editor) -> str | None:
        _, divisor = match
        if divisor.dtype != np.float32 or not (np.isfinite(divisor) & (divisor != 0)).all():
            return "its divisor is not float32, finite and without zeros"
        if self.exact and (np.abs(np.frexp(divisor)[0]) != 0.5).any():
            return "its divisor is no power of two"
        return None

    def rewrite(self, match: Division, edit: Editor) -> str:
        node, divisor = match
        factor = edit.constant(f"{node.inputs[1].name}_reciprocal", np.float32(1.0) / divisor)
        edit.replace_node(node, "Mul", [node.inputs[0], factor])
        return "multiplies instead of dividing"


@dataclass(frozen=True)
class ReciprocalFigures(Figures):
    """What became of the divisions of a model."""

    divisions: int | None = captioned("divisions that became products")


@options
class Reciprocal(Pass):
    """Multiply by the reciprocal of a constant instead of dividing by it."""

    name: ClassVar[str] = "reciprocal"
    lossless: ClassVar[bool] = True

    exact: bool = Field(False, description="only where the reciprocal is exact: powers of two")

    def run(self, model: Model, ctx: Context) -> Changes:
        """Rewrite every division."""
        log = Log()
        rewrite.apply([Divide(self.exact)], model, log)
        return log.done(ReciprocalFigures(len(log.done().changed)))


def main() -> None:
    """Run it on a model that comes along, once in each way."""
    from importlib import resources

    with resources.as_file(resources.files("onnxslim.models.fashion") / "resnet.onnx") as path:
        model = load(path)
    for step in Pipeline(Reciprocal(exact=True), Reciprocal())(model).report.steps:
        print(step.description, step.error)
        for change in step.changes.changed:
            print(f"  changed {change.node}: {change.action}")
        for skip in step.changes.skipped:
            print(f"  skipped {skip.node}: {skip.reason}")
        for caption, value in step.changes.figures.captions():
            print(f"  {caption}: {value}")


if __name__ == "__main__":
    main()
