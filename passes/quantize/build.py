"""Quantized candidates of one model: calibrated once, built as often as a search wants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim import shapes
from onnxslim.calibration import observers
from onnxslim.calibration.collect import Channels, Statistics, collect, merge
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import Gram, observe
from onnxslim.calibration.observers import Distribution, Histogram, Range
from onnxslim.engine.base import Context, Log
from onnxslim.engine.matching import excluded
from onnxslim.ir.graph import Array, Constant, Node, Tensor, producer
from onnxslim.ir.model import Model
from onnxslim.ops import Role, cost, spec_of
from onnxslim.ops.layers import Layer, layer_of
from onnxslim.passes.quantize import dynamic
from onnxslim.passes.quantize.equalize import equalize
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.quantize.insert import Inserter, pair_axis_of
from onnxslim.passes.quantize.plan import LAST, Plan, Planner, exceeds
from onnxslim.passes.quantize.rounding import Rounder, as_matrix
from onnxslim.passes.quantize.sequential import Sequential
from onnxslim.passes.quantize.storing import BLOCK, Blocks, Rounding, Storage, nearest
from onnxslim.passes.quantize.trained import KeptEncoder, Known, Trained
from onnxslim.passes.quantize.weights import FOUR_BITS, QMAX, Encoded, Encoder, encode, least_scales

Bits = Literal["int8", "int4"]
Kind = Literal["static", "dynamic", "none"]
Observer = Literal["minmax", "percentile", "kl", "mse"]
ObserverChoice: TypeAlias = tuple[Observer, float]  # with the percentile, if it is one
Group: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What holds for every candidate; see the options of `Quantize`.

    Attributes:
        exclude: globs of nodes that stay in floating point.
        weights: their integer type; int4 has a scale for every few inputs where activations are not integers.
        activations: whether they become integers on ranges known beforehand ("static"), as they come
            ("dynamic"), or not at all ("none"): then weights only are stored as such.
        gptq: whether coordinate descent starts from what GPTQ finds instead of the nearest codes.
    """

    exclude: tuple[str, ...] = ()
    classifier: bool = False
    bias_correction: bool = True
    per_channel: bool = True
    weights: Bits = "int8"
    activations: Kind = "static"
    gptq: bool = False

    @property
    def static(self) -> bool:
        """Whether ranges have to be calibrated."""
        return self.activations == "static"


@dataclass(frozen=True)
class Recipe:
    """What one candidate differs in.

    Attributes:
        observer: how ranges are chosen, and the percentile if it is one.
        special: the same for single tensors, by name, and those that share their scale.
        kept: labels of nodes that stay in floating point, and why.
        refused: labels of nodes whose weights stay in floating point as well, and why.
        only: if given, labels of the only weighted nodes to quantize.
        refined: whether weights are rounded for the least error of outputs; see `rounding`.
    """

    observer: ObserverChoice = ("mse", 0.0)
    special: Mapping[str, ObserverChoice] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    only: frozenset[str] | None = None
    refined: bool = False


@dataclass(frozen=True)
class Candidate:
    """A quantized model, the plan it was made after, and what was done to it."""

    model: Model
    plan: Plan
    log: Log
    groups: tuple[Group, ...]
    figures: QuantizeFigures


class Builder:
    """Builds candidates of a prepared model, whose calibration data is gone through as rarely as possible.

    Args:
        model: prepared, with shapes inferred; never modified.
        ctx: with `CalibrationData`.
        settings: for all candidates.
        trained: what was quantized in the model already, and was taken out of it.
    """

    def __init__(
        self, model: Model, ctx: Context, settings: Settings, trained: Trained | None = None
    ) -> None:
        self.model = model
        self._trained = trained or Trained()
        self.ctx = ctx
        self._settings = settings
        self._seen = Statistics({}, {})
        limit = FOUR_BITS if settings.static and settings.weights == "int4" else QMAX
        self._rounders: dict[str, Rounder] = {}
        self._blocks: Mapping[str, Blocks] = {}
        self._nearest, self._refined = KeptEncoder(limit), KeptEncoder(limit, self._rounders)
        self._nearest.trained = self._refined.trained = self._trained

    def __call__(self, recipe: Recipe) -> Candidate:
        """Build one candidate.

        Raises:
            CalibrationError: the data does not fit the model.
        """
        twin, log = self.model.copy(), Log()
        plan = self._plan(twin, recipe, log)
        ranges = self._ranges(plan, recipe)
        groups = tuple(dict.fromkeys(_names(group) for group in plan.scales.values()))
        stored, others = self._parted(plan, recipe, log)
        encoder = self._refined if recipe.refined else self._nearest
        if recipe.refined:
            self._observe(plan)
        figures = QuantizeFigures()
        if plan.linear or stored:
            figures = self._insert(twin, replace(plan, stored=stored), ranges, log, encoder)
        if self._settings.activations == "dynamic":
            figures = replace(figures, tightened=self._run_dynamically(twin, others, log, encoder))
        if self._trained:
            self._trained.restore(twin, {tensor.name for tensor in plan.tensors.values()})
        self._store(twin, plan, recipe, others if self._four_bits else [], log)
        return Candidate(twin, plan, log, groups, figures)

    def _parted(self, plan: Plan, recipe: Recipe, log: Log) -> tuple[list[Node], list[Node]]:
        """Nodes that store their weight as int8, and those that run dynamically or store it in four bits."""
        if not self._four_bits and self._settings.activations != "dynamic":
            return plan.stored, []
        parts: tuple[list[Node], list[Node]] = [], []
        for node in plan.stored:
            reason = recipe.kept.get(node.label)
            if not self._four_bits:
                reason = reason or (LAST if id(node) in plan.last else None) or dynamic.unfit(node)
            parts[reason is None].append(node)
            if reason:
                log.skip(node.label, reason)
        return parts

    def _run_dynamically(
        self, model: Model, nodes: Sequence[Node], log: Log, encoder: Encoder
    ) -> dict[str, int]:
        """Channels that were tightened for it, by layer."""
        writer = dynamic.Dynamic(model, self.ctx.target.quantized, encoder, self._settings.per_channel, log)
        writer.apply(nodes)
        return writer.tightened

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of weighted nodes on the first batch, by label, where shapes tell."""
        feeds: Mapping[str, Array] = next(iter(self.ctx.data), {})
        counts = cost.by_node(self.model, {name: array.shape for name, array in feeds.items()})
        nodes = self.model.graph.nodes
        return {node.label: count for node, count in zip(nodes, counts, strict=True) if count}

    def equalized(self, plan: Plan, log: Log) -> Builder | None:
        """Of the same model with its channels scaled for a plan of it; None where that changes nothing.

        Scales and codes from training fit the channels as they are.
        """
        if self._trained:
            return None
        twin = self.model.copy()
        levels = (1 << 8 * self.ctx.target.quantized.activation.itemsize) - 1, 2 * self._nearest.limit
        if not equalize(twin, plan, self.ctx.data, levels, log, self.ctx.target):
            return None
        shapes.infer(twin)
        return Builder(twin, self.ctx, self._settings)

    def sequential(self, recipe: Recipe) -> Builder | None:
        """Of the model with its weights fitted and rounded in turn, for a recipe; None if there are none.

        Codes from training stay what they are.
        """
        if self._trained or self._settings.activations == "dynamic":
            return None
        student, log = self.model.copy(), Log()
        plan = self._plan(student, recipe, log)
        known = {tensor.name for node in self.model.graph.nodes for tensor in node.outputs}
        layers = [
            node.outputs[0] for node in (*plan.linear, *plan.stored) if len(node.inputs[1].outputs) == 1
        ]
        stored = {node.inputs[1].name for node in plan.stored}
        if self._settings.static:
            inserter = Inserter(student, plan, self.ctx.target.quantized, log, self._nearest)
            inserter.apply(self._ranges(plan, recipe), True, activations_only=True)
        names = [tensor.name for tensor in layers if tensor.name in known]
        if not names or not self._settings.per_channel:
            return None
        work = Sequential(student, partial(self._code, stored))
        work.run(self.model, names, self.ctx.data, self.ctx)
        twin = work.refitted(self.model)
        shapes.infer(twin)
        build = Builder(twin, self.ctx, self._settings)
        build._seen = self._seen
        build._blocks = work.blocks
        build._refined = KeptEncoder(self._nearest.limit, build._rounders, work.codes)
        return build

    def _code(
        self, stored: Collection[str], layer: Layer, wanted: NDArray[np.float32], gram: Gram, corrected: bool
    ) -> tuple[Encoded | Blocks, NDArray[np.float32]]:
        """Integers of a layer's weights by what it sees, and the matrix they stand for."""
        rounder = Rounder(layer, gram, corrected, wanted, self._settings.gptq)
        if self._four_bits:
            codes, scales = rounder.four_bits(wanted[0].T)
            return (codes, scales), (codes * np.repeat(scales, BLOCK, axis=0)[: len(codes)]).T[None]
        spec, limit = spec_of(layer.node), self._nearest.limit
        assert spec.channel_axis is not None
        kept = layer.node.inputs[1].name in stored
        pair_axis = None if kept else pair_axis_of(layer.node, self.ctx.target.quantized)
        weight = layer.restored(wanted).astype(np.float32)
        axis, least = spec.channel_axis(layer.node), None if kept else self._least(layer.node)
        start = encode(weight, axis, per_channel=True, pair_axis=pair_axis, least=least, limit=limit)
        found = rounder(start, pair_axis, limit, least)
        return found, as_matrix(layer, found.codes) * found.scales.reshape(*wanted.shape[:2], 1)

    def _least(self, node: Node) -> NDArray[np.float32] | None:
        """Scales below which the bias of a node behind a DQ would not fit, with room for what it becomes."""
        bias, pair = node.constant(2), producer(node.inputs[0])
        scale = pair.constant(1) if pair is not None else None
        if bias is None or scale is None or not self.ctx.target.quantized.integer_bias:
            return None
        return np.asarray(ROOM * least_scales(bias.reshape(-1), np.float32(scale.max())), np.float32)

    def announce(self, what: str, done: int, total: int) -> None:
        """Tell the caller of the pass how far a long step is."""
        if self.ctx.progress:
            self.ctx.progress(what, done, total)

    def _plan(self, model: Model, recipe: Recipe, log: Log) -> Plan:
        """A plan whose tensors are all calibrated; made anew where one turns out to hold a mask."""
        while True:
            seen = self._seen.histograms.items()
            irregular = {name: histogram.irregular for name, histogram in seen if histogram.irregular}
            refuse = self._refusal(recipe)
            planner = Planner(
                model,
                self.ctx.target.quantized,
                log,
                refuse=refuse,
                kept=self._kept(recipe),
                weights_only=not self._settings.static,
                sharing=self._settings.activations == "dynamic",
                classifier=self._settings.classifier,
                irregular=irregular,
                trained=self._trained.covers,
            )
            plan = planner.plan()
            if not self._calibrate(plan):
                return plan

    def _refusal(self, recipe: Recipe) -> Callable[[Node], str | None]:
        """Why a node must not be quantized, whatever its operator."""

        def refuse(node: Node) -> str | None:
            if reason := excluded(self._settings.exclude, node) or recipe.refused.get(node.label):
                return reason
            if (
                recipe.only is not None
                and node.label not in recipe.only
                and spec_of(node).role is Role.LINEAR
            ):
                return "another one is looked at"
            return None

        return refuse

    @property
    def _four_bits(self) -> bool:
        """Whether weights alone are stored, in four bits."""
        return not self._settings.static and self._settings.weights == "int4"

    def _kept(self, recipe: Recipe) -> Mapping[str, str]:
        """Nodes that compute in floating point: those of the recipe, or all of them."""
        if self._settings.static:
            return recipe.kept
        reason = WEIGHTS_ONLY if self._settings.activations == "none" else AS_THEY_COME
        return {node.label: reason for node in self.model.graph.nodes}

    def without(self, recipe: Recipe, labels: Iterable[str], reason: str) -> Recipe:
        """The recipe with these weighted nodes one step more exact."""
        more = dict.fromkeys(labels, reason)
        if self._settings.activations == "none" and not self._four_bits:
            return replace(recipe, refused=more)
        return replace(recipe, kept=more)

    def held_back(self, recipe: Recipe) -> Mapping[str, str]:
        """The weighted nodes that `without` made more exact."""
        weights_only = self._settings.activations == "none" and not self._four_bits
        return recipe.refused if weights_only else recipe.kept

    def absorb(self, data: CalibrationData) -> None:
        """Take more data into the ranges: what was held out to choose among candidates."""
        seen = self._seen
        more = collect(
            self.model,
            data,
            list(seen.histograms),
            channels=list(seen.means),
            target=self.ctx.target,
            jobs=self.ctx.jobs,
        )
        seen.merge(more)

    def _store(self, model: Model, plan: Plan, recipe: Recipe, four_bits: Sequence[Node], log: Log) -> None:
        """What takes less room in the file than it computes with."""
        if self._settings.static and not self.ctx.target.quantized.weight_only:
            return  # the target may not know what to do with them
        storage = Storage(model, log)
        storage.tables(self._refusal(recipe))
        for node in four_bits:
            storage.four_bits(node, self._rounding(node.inputs[1].name, recipe))
        if self._settings.static and recipe.only is None:
            stored = {id(node) for node in plan.stored}
            kept = [n for n in model.graph.nodes if n.label in recipe.kept and id(n) not in stored]
            storage.halve([node for node in kept if spec_of(node).role is Role.LINEAR])
        storage.finish()

    def _rounding(self, weight: str, recipe: Recipe) -> Rounding:
        """How the blocks of a weight are rounded."""
        if recipe.refined and weight in self._blocks:
            return lambda matrix: self._blocks[weight]
        rounder = self._rounders.get(weight) if recipe.refined else None
        return rounder.four_bits if rounder else nearest

    def _calibrate(self, plan: Plan) -> bool:
        """See to it that all tensors of a plan were observed; returns whether any had to be."""
        missing = [name for name in plan.sources() if name not in self._seen.histograms]
        channels = [key for key in self._channels(plan).values() if key not in self._seen.means]
        if not missing:
            return False
        found = collect(
            self.model,
            self.ctx.data,
            missing,
            channels=list(dict.fromkeys(channels)),
            target=self.ctx.target,
            jobs=self.ctx.jobs,
            progress=self.ctx.progress,
        )
        self._seen.histograms.update(found.histograms)
        self._seen.means.update(found.means)
        return True

    def _channels(self, plan: Plan) -> dict[int, Channels]:
        """For each node whose bias can be corrected, by id, the data whose channel means that takes."""
        found: dict[int, Channels] = {}
        for node in plan.linear if self._settings.bias_correction else ():
            axis = spec_of(node).data_axis
            if axis is not None and node.constant(2) is not None:
                found[id(node)] = (node.inputs[0].name, axis(node))
        return found

    def _observe(self, plan: Plan) -> None:
        """See what the layers of a plan see, once, and make ready to round their weights by it."""
        labels = {plan.labels[id(node)] for node in (*plan.linear, *plan.stored)}
        nodes = [node for node in self.model.graph.nodes if node.label in labels]
        found = [layer for layer in map(layer_of, nodes) if isinstance(layer, Layer)]
        done = {*self._rounders, *self._blocks, *self._refined.given}
        new = [layer for layer in found if layer.node.inputs[1].name not in done]
        linear = {plan.labels[id(node)] for node in plan.linear}
        for rows, part in _portions([layer for layer in new if len(layer.node.inputs[1].outputs) == 1]):
            names = [layer.node.outputs[0].name for layer in part]
            grams = observe(self.model, self.ctx.data, names, rows=rows, target=self.ctx.target)
            for layer, name in zip(part, names, strict=True):
                node = layer.node
                corrected = self._settings.bias_correction and node.label in linear and len(node.inputs) > 2
                self._rounders[node.inputs[1].name] = Rounder(
                    layer, grams[name], corrected, gptq=self._settings.gptq
                )

    def _insert(
        self, model: Model, plan: Plan, ranges: Mapping[int, Range], log: Log, encoder: Encoder
    ) -> QuantizeFigures:
        channels, seen = self._channels(plan), self._seen.means
        means = {node: seen[key].result() for node, key in channels.items() if key in seen}
        inserter = Inserter(model, plan, self.ctx.target.quantized, log, encoder)
        inserter.apply(ranges, self._settings.per_channel, means, self._grids(plan), self._trained.constants)
        return QuantizeFigures(tightened=inserter.tightened, corrected=inserter.corrected)

    def _ranges(self, plan: Plan, recipe: Recipe) -> dict[int, Range]:
        """The range of each tensor of the plan; tensors on one scale get the same."""
        known: dict[Group, Range] = {}

        def of(sources: tuple[Tensor, ...]) -> Range:
            group = _names(sources)
            if group not in known:
                parts = [_statistics(source, self._seen.histograms) for source in sources]
                known[group] = self._choose(merge(parts), _special(group, recipe))
            return known[group]

        for key in list(plan.tensors):
            # A Relu that the common range does not imply would stand in the way of the integer kernel.
            if any(exceeds(source, of(plan.scales[key])) for source in plan.own[key]):
                plan.scales[key] = plan.own[key]
        return {key: of(plan.scales[key]) for key in plan.tensors}

    def _grids(self, plan: Plan) -> dict[int, Known]:
        """Scales and zero points that are known already: of a tensor, or of one that shares its scale."""
        rules, seen = self.ctx.target.quantized, self._seen.histograms
        own = {
            key: grid
            for key, tensor in plan.tensors.items()
            if (grid := self._trained.known(tensor, rules, seen.get(tensor.name))) is not None
        }
        groups = {_names(plan.scales[key]): grid for key, grid in reversed(own.items())}
        shared = {key: groups[names] for key in plan.tensors if (names := _names(plan.scales[key])) in groups}
        return {**shared, **own}

    def _choose(self, values: Distribution, observer: ObserverChoice) -> Range:
        name, percent = observer
        symmetric = self.ctx.target.quantized.symmetric
        levels = 1 << 8 * self.ctx.target.quantized.activation.itemsize
        if name == "minmax":
            return observers.min_max(values, symmetric=symmetric)
        if name == "percentile":
            return observers.percentile(values, percent, symmetric=symmetric)
        if name == "kl":
            return observers.kl_divergence(values, symmetric=symmetric)
        return observers.mse(values, levels, symmetric=symmetric)


def _portions(layers: Sequence[Layer]) -> Iterator[tuple[int, list[Layer]]]:
    """Layers to observe together, as far as memory allows, and how many rows of what they see to take.

    There are more rows than inputs, or the moments would be those of too few directions; but no more than
    some thousand, which tell the codes of eight bits well enough.
    """
    waiting: dict[int, list[Layer]] = {}
    sizes: Counter[int] = Counter()
    for layer in layers:
        groups, outputs, inputs = layer.matrix().shape
        rows = 1 << max(2 * inputs - 1, ROWS if inputs > NARROW else ROWS // 4).bit_length()
        # Sums in double precision, and the rows that wait to be summed up.
        size = groups * (inputs + outputs) * (8 * inputs + 4 * min(rows, WAITING))
        if sizes[rows] + size > MAX_BYTES and waiting.get(rows):
            yield rows, waiting.pop(rows)
            sizes[rows] = 0
        waiting.setdefault(rows, []).append(layer)
        sizes[rows] += size
    yield from waiting.items()


AS_THEY_COME = "without ranges, only matrix products by constants run in integers"
WEIGHTS_ONLY = "only weights are asked for, which it does not read as integers"
# By how much a bias may grow while its layer is fitted.
ROOM = 4.0
# Rows for a layer's second moments; a quarter for one with no more inputs than a depthwise convolution has.
ROWS = 4095
NARROW = 64
# About how many rows are summed up at a time, and how much memory all of it may take at a time.
WAITING = 2048
MAX_BYTES = 256 << 20


def _special(group: Group, recipe: Recipe) -> ObserverChoice:
    """How the range of tensors on one scale is chosen."""
    return next((recipe.special[name] for name in group if name in recipe.special), recipe.observer)


def _names(group: Sequence[Tensor]) -> Group:
    return tuple(tensor.name for tensor in group)


def _statistics(source: Tensor, seen: Mapping[str, Histogram]) -> Histogram:
    """Of a calibrated tensor, or of a constant's own values."""
    if isinstance(source, Constant):
        histogram = Histogram()
        histogram.update(np.asarray(source.values))
        return histogram
    return seen[source.name]
