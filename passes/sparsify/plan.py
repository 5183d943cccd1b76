"""A sparsity plan: which weights become sparse, by how much, and in which pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated

from pydantic import AfterValidator, Field

from onnxslim.engine.plans import PassPlan, distinct, require_fit, strict
from onnxslim.errors import UsageError
from onnxslim.passes.fold.weights import StoredWeight
from onnxslim.passes.sparsify.fit import Thinning
from onnxslim.passes.sparsify.patterns import Pattern


@strict
class WeightZeros:
    """The zeros of one weight.

    Attributes:
        weight: its name.
        shape: of it.
        share: of zeros.
        outputs, inputs, kept, of: see `Pattern`.
    """

    weight: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    share: Annotated[float, Field(ge=0, lt=1)]
    outputs: Annotated[int, Field(ge=1)] = 1
    inputs: Annotated[int, Field(ge=1)] = 1
    kept: Annotated[int, Field(ge=0)] = 0
    of: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        """Refuse numbers that contradict one another."""
        if not 0 < self.kept < self.of and self.kept | self.of:
            raise ValueError(f"{self.kept} of {self.of} is no pattern")

    @property
    def pattern(self) -> Pattern:
        """What they have in common."""
        return Pattern(self.outputs, self.inputs, self.kept, self.of)


def _once(weights: tuple[WeightZeros, ...]) -> tuple[WeightZeros, ...]:
    distinct(each.weight for each in weights)
    return weights


@strict
class SparsityPlan(PassPlan):
    """What becomes of the weights of a model; those that are not named stay as they are.

    Attributes:
        weights: in the order in which they are read.
    """

    weights: Annotated[tuple[WeightZeros, ...], AfterValidator(_once)]
    kind: str = field(default="sparsify", init=False)
    version: int = field(default=1, init=False)

    @classmethod
    def of(cls, chosen: Mapping[StoredWeight, Thinning]) -> SparsityPlan:
        """The plan that makes these choices."""
        return cls(
            tuple(
                WeightZeros(
                    weight.name,
                    weight.shape,
                    how.share,
                    how.pattern.outputs,
                    how.pattern.inputs,
                    how.pattern.kept,
                    how.pattern.of,
                )
                for weight, how in chosen.items()
            )
        )

    def joined(self, other: SparsityPlan) -> SparsityPlan:
        """The weights of both."""
        return replace(self, weights=(*self.weights, *other.weights))

    def choice(self, weights: Mapping[str, StoredWeight], how: Thinning) -> dict[StoredWeight, Thinning]:
        """The choices, for the weights of a model; how they are made is not in a plan.

        Raises:
            UsageError: a weight is not among them, has another shape, or cannot have its pattern.
        """
        shapes = {name: weight.shape for name, weight in weights.items()}
        require_fit(self.kind, "constant", {each.weight: each.shape for each in self.weights}, shapes)
        for each in self.weights:  # of the same shape, but read in another way
            layer = weights[each.weight].layer
            if layer is not None and (why := each.pattern.hindrance(layer)):
                problem = f"the plan of pass '{self.kind}' does not fit the model"
                raise UsageError(f"{problem}: the weight of constant '{each.weight}': {why}")
        return {
            weights[each.weight]: replace(how, share=each.share, pattern=each.pattern)
            for each in self.weights
        }
