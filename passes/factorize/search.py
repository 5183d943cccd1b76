"""Finds the layers of a model, their candidates, and what each candidate costs and loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxslim import shapes
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.gram import Gram
from onnxslim.calibration.samples import SAMPLES, Samples
from onnxslim.calibration.seen import Sight
from onnxslim.engine.base import Context, Effort, Log
from onnxslim.engine.editor import Editor
from onnxslim.engine.matching import excluded
from onnxslim.errors import TimeUp
from onnxslim.ir import graph as ir
from onnxslim.ir.model import Model
from onnxslim.ops import spec_of
from onnxslim.ops.layers import Layer
from onnxslim.ops.spec import sizes
from onnxslim.passes.factorize import candidates, chains, fit
from onnxslim.passes.factorize.candidates import Factoring, LayerOptions, Unit
from onnxslim.passes.factorize.chains import Chain
from onnxslim.passes.factorize.fit import Fitted
from onnxslim.passes.factorize.gate import SpeedGate
from onnxslim.passes.factorize.layers import Whole, weighted, whole_of
from onnxslim.passes.factorize.schemes import Decomposition
from onnxslim.shapes import cost

# Samples that candidates are judged on where it has to be quick.
QUICK_SAMPLES = 8


@dataclass(frozen=True)
class MeasuredFactors:
    """Factors of one layer that the gate has timed.

    Attributes:
        layer: its name.
        factors: their scheme and ranks.
        macs, time: relative to the layer's.
        passed: whether they are faster by enough.
    """

    layer: str
    factors: str
    macs: float
    time: float
    passed: bool


@dataclass(frozen=True)
class Wanted:
    """What to look for.

    Attributes:
        unit: what is to become less.
        schemes: names of those allowed.
        align: ranks are multiples of it.
        min_gain: factors must be so many times as fast as their layer, unless `params` are.
        effort: how many candidates are tried in the network, and on how many samples.
    """

    unit: Unit
    schemes: tuple[str, ...]
    align: int
    min_gain: float
    effort: Effort = "normal"

    @property
    def most(self) -> float:
        """Cost relative to the layer's above which there is no gain."""
        return 1.0 - 1e-9 if self.unit == "params" else 1.0 / self.min_gain


def layers_of(
    model: Model,
    inputs: Mapping[str, tuple[int, ...]],
    exclude: Sequence[str],
    log: Log,
    told: Mapping[str, Sight] | None = None,
) -> tuple[list[Whole], list[Chain]]:
    """The layers that can be factorized, in the order they run, and those that are factors already.

    Args:
        model: what they are from.
        inputs: shapes of the inputs in one run.
        exclude: globs of layers to leave out.
        log: told of every layer that cannot be factorized, and why.
        told: what was seen, in a run on such inputs, of tensors whose shapes follow from no rule; None if
            nobody could look.
    """
    shapes, fixed = _shapes(model, inputs), frozenset(ir.protected(model.graph))
    shapes.update((name, each.shape) for name, each in (told or {}).items())
    found: dict[int, Whole] = {}
    for seen in _candidates(model, log):
        node = seen.node
        layer = excluded(exclude, node) or whole_of(seen, shapes, model.opset, fixed)
        if isinstance(layer, str):
            log.skip(node.label, layer)
        else:
            found[id(node)] = layer
    known = chains.find(found.values(), fixed)
    for member in (layer for chain in known for layer in chain):
        log.skip(member.name, "it is a factor already")
        del found[id(member.node)]
    return list(found.values()), known


def _candidates(model: Model, log: Log) -> Iterator[Layer]:
    """Layers of the main graph, as far as the operators tell."""
    own = model.functions
    main = {id(node) for node in model.graph.nodes}
    for node in model.nodes():
        layer = weighted(node)
        if spec_of(node).qoperator:  # one that was not written out
            log.skip(node.label, "its weight is quantized")
        if layer is None or ("", node.op) in own:
            continue
        if id(node) in main:
            yield layer
        else:
            log.skip(node.label, "it is inside a branch or a loop")


def _shapes(model: Model, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the main graph in one run, as far as they are known."""
    graph = cost.sized(model, inputs).graph
    tensors = [*graph.inputs, *(tensor for node in graph.nodes for tensor in node.outputs)]
    known = {tensor.name: sizes(tensor.shape) for tensor in tensors}
    return {name: shape for name, shape in known.items() if shape is not None}


class FactorSearch:
    """Judges candidates.

    Args:
        model: what the layers are from.
        wanted: what to look for.
        ctx: target and progress.
        gate: times candidates.
        data: calibration data; None to judge by the weights alone.
        log: told of layers without candidates.
    """

    def __init__(
        self,
        model: Model,
        wanted: Wanted,
        ctx: Context,
        gate: SpeedGate,
        data: Samples | None,
        log: Log,
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._ctx = ctx
        self._gate = gate
        self._data = data.fit if data else None
        self._judge = (
            Judge(model, data.tune, ctx.target, QUICK_SAMPLES if wanted.effort == "quick" else SAMPLES)
            if data
            else None
        )
        self._log = log
        self.measured: list[MeasuredFactors] = []

    def __call__(self, layers: Sequence[Whole]) -> list[LayerOptions]:
        """Layers that have candidates, with what is known of these."""
        found, usable = list[LayerOptions](), [layer for layer in layers if self._proposals(layer)]
        judged = set[int]()
        try:
            for index, (layer, gram) in enumerate(self._observed(usable)):
                entry = self._entry(layer, gram)
                judged.add(id(layer))
                if entry is not None:
                    found.append(entry)
                if self._ctx.progress:
                    self._ctx.progress("judging layers", index + 1, len(usable))
        except TimeUp as error:
            for layer in (each for each in usable if id(each) not in judged):
                self._log.skip(layer.name, f"left whole, as its factors were not judged: {error}")
        order = {id(layer): index for index, layer in enumerate(layers)}
        return sorted(found, key=lambda entry: order[id(entry.layer)])

    def _proposals(self, layer: Whole) -> list[candidates.Proposal]:
        wanted = self._wanted
        found = list(candidates.proposals(layer, wanted.schemes, wanted.align, wanted.unit, wanted.most))
        if not found and layer.depthwise:
            self._log.skip(
                layer.name, "it is depthwise, and has factors along two axes of its kernel at best"
            )
        elif not found:
            self._log.skip(layer.name, f"no rank that is a multiple of {wanted.align} saves enough")
        return found

    def _observed(self, layers: Sequence[Whole]) -> Iterator[tuple[Whole, Gram | None]]:
        """Layers with moments of their data, where these can be had."""
        seen = [layer for layer in layers if self._data is not None and fit.observable(layer)]
        if self._data is not None:
            yield from fit.moments(self._model, self._data, seen, self._ctx.target, self._ctx.progress)
        others = {id(layer) for layer in seen}
        yield from ((layer, None) for layer in layers if id(layer) not in others)

    def _entry(self, layer: Whole, gram: Gram | None) -> LayerOptions | None:
        found, parts = candidates.factorings(layer, self._proposals(layer), gram)
        entry = LayerOptions(layer, tuple(candidates.undominated(found, self._wanted.unit)))
        if self._wanted.unit != "params":
            entry = self._passed(candidates.timed(entry, self._gate))
        if not entry.candidates:
            return None
        return candidates.unbeaten(candidates.expected(entry, self._measured(entry, parts, gram)))

    def _passed(self, entry: LayerOptions) -> LayerOptions:
        """Without the candidates that are not faster by enough."""
        limit = 1.0 / self._wanted.min_gain
        self.measured += [
            MeasuredFactors(entry.layer.name, each.label, each.macs, each.time, each.time <= limit)
            for each in entry.candidates
        ]
        passed = tuple(each for each in entry.candidates if each.time <= limit)
        if not passed:
            best = min(entry.candidates, key=lambda each: each.time)
            self._log.skip(
                entry.layer.name,
                f"its fastest factors ({best.label}) take {best.time:.2f} of its time, more than {limit:.2f}",
            )
        return replace(entry, candidates=passed)

    def _measured(
        self, entry: LayerOptions, parts: Mapping[str, Decomposition], gram: Gram | None
    ) -> dict[str, float]:
        """Error of the model's outputs with single candidates in place, by label."""
        if self._judge is None:
            return {}
        tried = entry.candidates if self._wanted.effort == "thorough" else candidates.probed(entry)
        errors = {}
        for each in tried:
            fitted = fit.of_rank(entry.layer, parts[each.scheme.name], each.ranks, gram)
            model = with_factors(self._model, [(entry.layer, each, fitted)])
            errors[each.label] = self._judge(model).error
        return errors


def with_factors(model: Model, parts: Sequence[tuple[Whole, Factoring, Fitted]]) -> Model:
    """A copy of the model with factors in place of layers."""
    copy = shapes.copied(model)
    made_by = {node.outputs[0].name: node for node in copy.graph.nodes if node.outputs}
    edit = Editor(copy)
    for layer, candidate, fitted in parts:
        factors = candidate.scheme.factors(layer, fitted.weights)
        layer.install(edit, made_by[layer.output], factors, fitted.bias)
    edit.commit()
    return copy
