"""Learning behind what makes a model smaller: one option for all passes that have it."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from onnxslim.engine.base import Context, Log, Pass
from onnxslim.engine.demands import Demanding
from onnxslim.ir.model import Model
from onnxslim.passes.distill import Distill

# The option of every such pass, which declares it in its place: `distill: StepsBehind = None`.
StepsBehind: TypeAlias = Annotated[
    int | None,
    Field(
        ge=1,
        description="steps of learning behind it from the model that came into the pipeline, as the pass "
        "`distill` does, with PyTorch; where it goes in rounds, behind each of them. What require_sqnr and "
        "max_drop want has to be kept after it, which takes a learning for every candidate that lacks it",
    ),
]


class Learning(Demanding):
    """A pass behind which the model learns again what it was.

    It does so once the pass was checked and kept, as a step of its own: what is learnt is undone alone if it
    breaks the model.
    """

    distill: int | None

    @property
    def behind(self) -> tuple[Pass, ...]:
        """See `Pass.behind`."""
        return () if self.distill is None else (Distill(steps=self.distill),)

    @property
    def needs_data(self) -> bool:
        """To learn from, too."""
        return self.distill is not None or super().needs_data

    def learn(self, model: Model, ctx: Context, log: Log) -> None:
        """The same on the way, in place.

        Args:
            model: as a round leaves it.
            ctx: with data.
            log: told of what was not learnt, and why.
        """
        for each in self.behind:
            for skip in each.run(model, ctx).skipped:
                log.skip(skip.node, skip.reason)
