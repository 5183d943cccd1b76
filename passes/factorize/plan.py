"""A factorization plan: which layers get which factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace
from operator import gt
from typing import Annotated

from pydantic import AfterValidator, Field

from onnxslim.engine.plans import PassPlan, distinct, require_fit, strict
from onnxslim.errors import UsageError, nearest
from onnxslim.passes.factorize.candidates import Factoring, LayerOptions
from onnxslim.passes.factorize.layers import Whole
from onnxslim.passes.factorize.schemes import SCHEMES

_Size = Annotated[int, Field(ge=1)]


@strict
class LayerFactors:
    """The factors of one layer.

    Attributes:
        layer: its name.
        output: the tensor it makes.
        weight: shape of its weight as [groups, inputs, outputs, *kernel].
        scheme, ranks: see `Scheme`; ranks are per group.
    """

    layer: str
    output: str
    weight: tuple[_Size, ...]
    scheme: str
    ranks: tuple[_Size, ...]


def _once(layers: tuple[LayerFactors, ...]) -> tuple[LayerFactors, ...]:
    distinct(each.output for each in layers)
    return layers


@strict
class FactorizationPlan(PassPlan):
    """What becomes of the layers of a model; those that are not named stay whole.

    Attributes:
        layers: in the order in which they run.
    """

    layers: Annotated[tuple[LayerFactors, ...], AfterValidator(_once)]
    kind: str = field(default="factorize", init=False)
    version: int = field(default=1, init=False)

    @classmethod
    def of(cls, picks: Iterable[tuple[LayerOptions, Factoring]]) -> FactorizationPlan:
        """The plan that makes these choices."""
        return cls(
            tuple(
                LayerFactors(layer.name, layer.output, layer.weight.shape, pick.scheme.name, pick.ranks)
                for layer, pick in ((entry.layer, pick) for entry, pick in picks)
            )
        )

    def joined(self, other: FactorizationPlan) -> FactorizationPlan:
        """The factors of both; those of the first are of layers that run earlier."""
        return replace(self, layers=(*self.layers, *other.layers))

    def picks(self, layers: Iterable[Whole]) -> list[tuple[LayerOptions, Factoring]]:
        """The choices, for the layers of a model.

        Raises:
            UsageError: a layer is not among them, has another weight, or cannot have such factors.
        """
        there = {layer.output: layer for layer in layers}
        shapes = {name: layer.weight.shape for name, layer in there.items()}
        require_fit(self.kind, "layer that makes", {each.output: each.weight for each in self.layers}, shapes)
        return [
            (LayerOptions(there[each.output], ()), _factoring(there[each.output], each))
            for each in self.layers
        ]


def _factoring(layer: Whole, entry: LayerFactors) -> Factoring:
    problem = f"the plan of pass 'factorize' does not fit layer '{entry.layer}': "
    if entry.scheme not in SCHEMES:
        raise UsageError(f"{problem}there is no scheme '{entry.scheme}'; {nearest(entry.scheme, SCHEMES)}")
    scheme = SCHEMES[entry.scheme]
    if why := scheme.refuses(layer):
        raise UsageError(f"{problem}it cannot have factors '{scheme.name}': {why}")
    most = scheme.largest(layer)
    if len(most) != len(entry.ranks) or any(map(gt, entry.ranks, most)):
        raise UsageError(
            f"{problem}ranks of '{scheme.name}' are at most {'x'.join(map(str, most))}, "
            f"not {'x'.join(map(str, entry.ranks))}"
        )
    return Factoring.of(layer, scheme, entry.ranks)
