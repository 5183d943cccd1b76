"""Constant folding with a budget.

Four things are computed ahead of time: what depends on constants alone, by running it in ONNX Runtime; sizes
that are known although the tensor is not; targets of Reshape and Expand that can be stated without looking at
their input; and sizes that were computed before. What is stored must not make the model larger: see
`onnxslim.passes.fold.budget`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.pipeline import MAX_ROUNDS
from onnxslim.ir.model import Model
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.literals import lower_constants, make_scalars
from onnxslim.passes.fold.sizes import fold_sizes, is_sizing, settle_targets, share_sizes
from onnxslim.passes.fold.values import Values
from onnxslim.shapes.dims import dims_of, keep


@options
class Fold(Pass):
    """Compute what does not depend on the inputs: constants, known sizes, targets of reshapes.

    Results are stored only where that does not make the model larger by more than `max_growth` bytes.
    """

    name: ClassVar[str] = "fold"
    lossless: ClassVar[bool] = True

    max_growth: int = Field(0, ge=0, description="bytes by which stored results may make the model larger")

    def run(self, model: Model, ctx: Context) -> Changes:
        """Fold until nothing more can be computed."""
        log = Log()
        edits = Edits(model, log)
        lower_constants(edits, self.max_growth)
        values = Values(edits, self.max_growth)
        make_scalars(edits)
        for _ in range(MAX_ROUNDS):
            if not any(values.may_fold(node) or is_sizing(node) for node in model.nodes()):
                break
            dims = dims_of(model)
            folded = [fold_sizes(edits, dims), settle_targets(edits, dims), values.fold(dims)]
            if not any([*folded, share_sizes(edits, dims)]):
                break
            keep(model)
        edits.clean_up()
        for node, reason in values.notes():
            log.skip(node.label, reason)
        return log.done()
