"""A clustering plan: which weights become codes of how many bits, with how many tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated

from pydantic import AfterValidator, Field

from onnxslim.engine.base import Effort
from onnxslim.engine.plans import PassPlan, distinct, require_fit, strict
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.cluster.weights import Weight


@strict
class WeightCodes:
    """How one weight is stored.

    Attributes:
        weight: its name.
        shape: of it.
        bits: of a code.
        group, scaled, price: see `Clustering`.
    """

    weight: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    bits: Annotated[int, Field(ge=1, le=8)]
    group: Annotated[int, Field(ge=0)]
    scaled: bool
    price: Annotated[float, Field(ge=0)] = 0.0


def _once(weights: tuple[WeightCodes, ...]) -> tuple[WeightCodes, ...]:
    distinct(each.weight for each in weights)
    return weights


@strict
class ClusteringPlan(PassPlan):
    """What becomes of the weights of a model; those that are not named stay as they are.

    Attributes:
        weights: in the order in which they are read.
    """

    weights: Annotated[tuple[WeightCodes, ...], AfterValidator(_once)]
    kind: str = field(default="cluster", init=False)
    version: int = field(default=1, init=False)

    @classmethod
    def of(cls, chosen: Mapping[Weight, Clustering]) -> ClusteringPlan:
        """The plan that makes these choices."""
        return cls(
            tuple(
                WeightCodes(weight.name, weight.shape, each.bits, each.group, bool(each.scaled), each.price)
                for weight, each in chosen.items()
            )
        )

    def joined(self, other: ClusteringPlan) -> ClusteringPlan:
        """The weights of both."""
        return replace(self, weights=(*self.weights, *other.weights))

    def choice(self, weights: Mapping[str, Weight], effort: Effort) -> dict[Weight, Clustering]:
        """The choices, for the weights of a model, fitted with this effort.

        Raises:
            UsageError: a weight is not among them, or has another shape.
        """
        shapes = {name: weight.shape for name, weight in weights.items()}
        require_fit(self.kind, "constant", {each.weight: each.shape for each in self.weights}, shapes)
        return {
            weights[each.weight]: Clustering(each.bits, each.group, bool(each.scaled), each.price, effort)
            for each in self.weights
        }
