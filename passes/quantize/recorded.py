"""A quantization plan: what a search has chosen, to be built again without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated

from pydantic import AfterValidator, Field

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Log, OneOf
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PassPlan, distinct, require_fit, strict
from onnxslim.errors import UsageError, nearest
from onnxslim.ir.graph import Constant, Node
from onnxslim.ir.model import Model
from onnxslim.passes.quantize.build import Builder, Candidate
from onnxslim.passes.quantize.choices import Activations, Algorithm, Bits, Observer, StorageChoice, Variant
from onnxslim.passes.quantize.search import Sensitivity, stored
from onnxslim.passes.quantize.tables import weight_of
from onnxslim.passes.quantize.trial import Trial
from onnxslim.runtime.targets import layouts

LayoutName = Annotated[str, OneOf(lambda: ("target", *layouts()))]


@strict
class QuantizeOptions:
    """What holds for the whole model, whatever is measured: options of `Quantize`, under their names."""

    weights: Bits
    activations: Activations
    layout: LayoutName
    exclude: tuple[str, ...]
    classifier: bool
    bias_correction: bool
    per_channel: bool
    algorithm: Algorithm
    storage: StorageChoice = "auto"
    block_size: int | None = None
    download: float | None = None


@strict
class RangeChoice:
    """How the range of one tensor is chosen, and of those on its scale.

    Attributes:
        tensor: its name.
        observer: the way.
        percentile: of it, in percent, if it is one.
    """

    tensor: str
    observer: Observer
    percentile: float


@strict
class LayerChoice:
    """What becomes of one weighted node.

    Attributes:
        node: its label.
        weight: shape of its weight.
        stays: why it is left out of integers, or one step more exact than in few bits; None if it is not.
        wide: whether its weight has eight bits where those of others have fewer.
    """

    node: str
    weight: tuple[Annotated[int, Field(ge=0)], ...]
    stays: str | None
    wide: bool = False


def _once(layers: tuple[LayerChoice, ...]) -> tuple[LayerChoice, ...]:
    distinct(each.node for each in layers)
    return layers


@strict
class QuantizationPlan(PassPlan):
    """What was chosen for a model.

    Attributes:
        options: of the pass.
        observer, percentile: how ranges are chosen.
        special: the same of single tensors.
        equalized: whether channels are scaled.
        fitted: whether weights are fitted to quantized inputs: labels of the layers left out of integers
            while that was done; None if it is not.
        refined: whether weights are rounded by what their layers see.
        complete: whether the samples held out have a part in ranges.
        layers: all weighted nodes that could run in integers.
        eight: whether all weights have eight bits, whatever the options say.
    """

    options: QuantizeOptions
    observer: Observer
    percentile: float
    equalized: bool
    fitted: tuple[str, ...] | None
    refined: bool
    complete: bool
    special: tuple[RangeChoice, ...]
    layers: Annotated[tuple[LayerChoice, ...], AfterValidator(_once)]
    eight: bool = False
    kind: str = field(default="quantize", init=False)
    version: int = field(default=1, init=False)

    @classmethod
    def of(
        cls, options: QuantizeOptions, variant: Variant, build: Builder, candidate: Candidate, complete: bool
    ) -> QuantizationPlan:
        """The plan that makes a candidate again.

        Args:
            options: of the pass.
            variant, build: what the candidate was made of.
            candidate: it.
            complete: whether the data held out were absorbed before.
        """
        held = {**variant.refused, **variant.kept, **variant.wide}
        layers = {
            node.label: LayerChoice(
                node.label, _weight(node), held.get(node.label), node.label in variant.wide
            )
            for node in build.model.graph.nodes
            if node.label in held or node.label in candidate.labels()
        }
        special = (RangeChoice(name, *choice) for name, choice in variant.special.items())
        return cls(
            options,
            *variant.observer,
            build.is_equalized,
            build.fitted_without,
            variant.refined,
            complete,
            tuple(special),
            tuple(layers.values()),
            variant.eight,
        )

    def joined(self, other: QuantizationPlan) -> QuantizationPlan:
        """In integers what one of them has there; all else is the same in both."""
        pairs = zip(self.layers, other.layers, strict=True)
        return replace(self, layers=tuple(one if one.stays is None else two for one, two in pairs))

    @property
    def needs_data(self) -> bool:
        """Whether some of it can be done on data only."""
        return self.equalized or self.fitted is not None or self.refined or self.complete

    def require_fit(self, model: Model) -> None:
        """Insist that a model, prepared, has the layers of the plan.

        Raises:
            UsageError: it does not; names the layer.
        """
        there = {node.label: _weight(node) for node in model.graph.nodes if len(node.inputs) > 1}
        require_fit(self.kind, "layer", {each.node: each.weight for each in self.layers}, there)
        for name in self.fitted or ():
            if name not in there:
                raise UsageError(f"{MISFIT}there is no layer '{name}'; {nearest(name, there)}")

    def variant(self, build: Builder) -> Variant:
        """What the candidate differs in from others of this builder."""
        held = {each.node: each.stays for each in self.layers if each.stays is not None and not each.wide}
        wide = {each.node: each.stays or "" for each in self.layers if each.wide}
        special = {each.tensor: (each.observer, each.percentile) for each in self.special}
        observer = self.observer, self.percentile
        plain = Variant(observer, special, wide=wide, eight=self.eight, refined=self.refined)
        return build.strategy.sparing(plain, held)

    def builder(self, build: Builder, held: CalibrationData | None, log: Log) -> Builder:
        """What makes the candidate.

        Args:
            build: of the model as it is prepared.
            held: samples held out; None without data.
            log: what is done to the model before goes here.

        Raises:
            UsageError: a tensor is not there.
        """
        # What is observed together has an effect on roundings: first all that a search sees first.
        plain = Variant((self.observer, self.percentile))
        plan = build.observed(plain)
        if self.equalized:
            build = build.equalized(plan, log) or build
            build.observed(plain)
        self._require_tensors(build.model)
        variant = self.variant(build)
        if self.fitted is not None:
            out = dict.fromkeys(self.fitted, "it was left out while weights were fitted")
            plain = replace(variant, kept={}, refused={}, wide={})
            build = build.fitted(build.strategy.without(plain, out)) or build
        if self.complete and held is not None:
            build.observed(variant)
            build.absorb(held)
        return build

    def require_whole(self, candidate: Candidate) -> None:
        """Insist that a candidate has no layer in integers that the plan says nothing of.

        Raises:
            UsageError: it has; names the layer.
        """
        for name in candidate.labels() - {each.node for each in self.layers}:
            raise UsageError(f"{MISFIT}it says nothing of layer '{name}'")

    def _require_tensors(self, model: Model) -> None:
        names: Mapping[str, object] = {
            tensor.name: tensor for node in model.graph.nodes for tensor in (*node.inputs, *node.outputs)
        }
        for each in self.special:
            if each.tensor not in names:
                raise UsageError(f"{MISFIT}there is no tensor '{each.tensor}'; {nearest(each.tensor, names)}")


def moves_of(trial: Trial, layers: Sequence[Sensitivity], options: QuantizeOptions) -> list[Move]:
    """The layers of a candidate as moves into integers.

    Args:
        trial: the candidate, all in integers.
        layers: what each of them does alone.
        options: of the pass.
    """
    build, labels = trial.build, trial.candidate.labels()
    nothing = stored(build(replace(trial.variant, only=frozenset())).model)
    weights = {
        node.label: weight
        for node in build.model.graph.nodes
        if node.label in labels and isinstance(weight := weight_of(node), Constant)
    }
    found = []
    for layer in layers:
        weight = weights[layer.node]
        others = dict.fromkeys(sorted(labels - {layer.node}), "it was not chosen")
        variant = build.strategy.sparing(trial.variant, others)
        found.append(
            Move(
                step="quantize",
                group=layer.node,
                option=options.weights,
                # A recurrent layer has a second weight, which counts with the first.
                left={weight.name: max(1.0 - (nothing - layer.bytes) / weight.nbytes, 0.0)},
                damage=layer.error,
                measured=True,
                plan=QuantizationPlan.of(options, variant, build, trial.candidate, False),
            )
        )
    return found


def _weight(node: Node) -> tuple[int, ...]:
    weight = weight_of(node)
    return tuple(weight.values.shape) if isinstance(weight, Constant) else ()


MISFIT = "the plan of pass 'quantize' does not fit the model: "
