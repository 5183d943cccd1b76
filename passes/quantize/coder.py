"""Integers of the weights of one model, kept from candidate to candidate: they differ in few weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Gram, observe
from onnxslim.engine.base import Context
from onnxslim.ir.files import aside
from onnxslim.ir.graph import Constant, Node, producer
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize.blocks import Blocking, Blocks, nearest
from onnxslim.passes.quantize.choices import Settings
from onnxslim.passes.quantize.plan import Plan
from onnxslim.passes.quantize.rate import Priced, least_steps
from onnxslim.passes.quantize.rounding import Rounder, damped
from onnxslim.passes.quantize.trained import Trained
from onnxslim.passes.quantize.weights import Encoded, Encoder, encode, floored, least_scales, pair_axis_of

Floats = NDArray[np.float32]

# By how much a bias may grow while its layer is fitted.
ROOM = 4.0
# Rows for a layer's second moments; a quarter for one with no more inputs than a depthwise convolution has.
ROWS = 4095
NARROW = 64
# About how many rows are summed up at a time, and how much memory all of it may take at a time.
WAITING = 2048
MAX_BYTES = 256 << 20


class WeightCoder:
    """Nearest integers of weights, and better ones by what their layers see.

    Args:
        ctx: with the data.
        settings: of all candidates.
        trained: what the model brought along; codes of it stay what they are.
        codes: by name of a weight, integers that were found for it already.
        blocks: the same where they have a scale for every few inputs.
    """

    def __init__(
        self,
        ctx: Context,
        settings: Settings,
        trained: Trained,
        codes: Mapping[str, Encoded] | None = None,
        blocks: Mapping[str, Blocks] | None = None,
    ) -> None:
        self._ctx = ctx
        self._settings = settings
        self._rounders: dict[str, Rounder] = {}
        self._codes = codes or {}
        # By name of a weight, how it is coded, and whether that is better than the nearest.
        self._blocks = {(name, each.blocking, True): each for name, each in (blocks or {}).items()}
        self._trained = trained
        floor = settings.floor
        self._nearest = Encoder(kept=trained.codes, floor=floor)
        self._refined = Encoder(self._rounders, self._codes, kept=trained.codes, floor=floor)

    def encoder(self, *, refined: bool = False) -> Encoder:
        """What rounds weights: to the nearest codes, or to those found by what layers see; see `observe`."""
        return self._refined if refined else self._nearest

    def blocks(self, layer: Layer, blocking: Blocking, *, refined: bool) -> Blocks:
        """The weight of a layer in integers with a scale for every few inputs."""
        if (known := self.known(layer, blocking)) is not None:
            return known
        weight = layer.node.inputs[1].name
        rounder = self._rounders.get(weight) if refined else None
        key = weight, blocking, refined and (rounder is not None or (weight, blocking, True) in self._blocks)
        if key not in self._blocks:
            matrix = layer.kernels()[0]
            self._blocks[key] = rounder.in_blocks(matrix, blocking) if rounder else nearest(matrix, blocking)
        return self._blocks[key]

    def table(self, table: Constant, blocking: Blocking) -> Blocks:
        """A table [rows, columns] in integers, as [columns, rows] with a scale for every few columns."""
        key = table.name, blocking, False
        if key not in self._blocks:
            self._blocks[key] = nearest(np.ascontiguousarray(table.values.T), blocking)
        return self._blocks[key]

    def known(self, layer: Layer, blocking: Blocking) -> Blocks | None:
        """Integers that a weight was stored as, of as many bits at the most; None if it was not.

        More bits than those would say nothing more, and other scales something else: they stay what they are,
        whatever the size of their blocks.
        """
        found = self._trained.blocks(layer, blocking.size)
        return found if found is not None and found.blocking.bits <= blocking.bits else None

    def kept(self, layer: Layer) -> Blocks | None:
        """Integers with a scale for every few inputs that a weight was stored as, whatever their bits."""
        return self._trained.blocks(layer, 0) if self.came_in_blocks(layer.node) else None

    def is_looked_up(self, node: Node) -> bool:
        """Whether the weight of a node came in tables, in which it takes less room than in any other way."""
        return node.inputs[1].name in self._trained.shared

    def came_in_blocks(self, node: Node) -> bool:
        """Whether the weight of a node was stored with a scale for every few inputs."""
        stored = self._trained.constants.get(node.inputs[1].name)
        return stored is not None and bool(stored.grid.block)

    def observe(self, model: Model, plan: Plan) -> None:
        """See what the layers of a plan see, once, and make ready to round their weights by it."""
        labels = {plan.labels[id(node)] for node in (*plan.linear, *plan.stored)}
        nodes = [node for node in model.graph.nodes if node.label in labels]
        found = [layer for layer in map(layer_of, nodes) if isinstance(layer, Layer)]
        done = {*self._rounders, *self._codes, *(name for name, _, better in self._blocks if better)}
        new = [layer for layer in found if layer.node.inputs[1].name not in done]
        linear = {plan.labels[id(node)] for node in plan.linear}
        for rows, part in portions([layer for layer in new if len(layer.node.inputs[1].outputs) == 1]):
            names = [layer.node.outputs[0].name for layer in part]
            data, target = self._ctx.given.fit, self._ctx.target
            grams = observe(model, data, names, alone=True, rows=rows, target=target)
            for layer, name in zip(part, names, strict=True):
                if name not in grams:
                    continue  # it saw nothing: its weights are rounded to the nearest
                node = layer.node
                corrected = self._settings.bias_correction and node.label in linear and len(node.inputs) > 2
                seen = grams.pop(name)
                seen = replace(seen, gram=aside(seen.gram))
                self._rounders[node.inputs[1].name] = self._rounder(layer, seen, corrected)

    def coded(
        self, layer: Layer, wanted: Floats, gram: Gram, *, corrected: bool, kept: bool, limit: int
    ) -> tuple[Encoded, Floats]:
        """Integers of weights that a layer is to have, by what it sees, and the matrix they stand for.

        Args:
            layer: its node reads its data from a DQ, if that runs in integers.
            wanted: as `Layer.matrix`.
            gram: moments of what it sees.
            corrected: whether a bias takes in what the integers do to the mean.
            kept: whether the layer stays in floating point and only stores its weight so.
            limit: largest magnitude of a code.
        """
        axis, rules = layer.weight_axis, self._ctx.target.layout
        pair_axis = None if kept else pair_axis_of(layer.node, rules)
        weight = layer.restored(wanted).astype(np.float32)
        least = None if kept or not rules.integer_bias else _least(layer.node)
        least = floored(weight, axis, least, self._settings.floor)
        start = encode(weight, axis, per_channel=True, pair_axis=pair_axis, least=least, limit=limit)
        found = self._rounder(layer, gram, corrected, wanted)(start, pair_axis, limit, least)
        codes = np.ascontiguousarray(layer.matrix_of(found.codes))
        return found, codes * found.scales.reshape(*wanted.shape[:2], 1)

    def coded_in_blocks(
        self, layer: Layer, wanted: Floats, gram: Gram, blocking: Blocking, *, corrected: bool
    ) -> tuple[Blocks, Floats]:
        """The same with a scale for every few inputs."""
        found = self._rounder(layer, gram, corrected, wanted).in_blocks(wanted[0].T, blocking)
        return found, found.values().T[None]

    def _rounder(self, layer: Layer, gram: Gram, corrected: bool, wanted: Floats | None = None) -> Rounder:
        settings = self._settings
        return Rounder(layer, gram, corrected, wanted, settings.algorithm, settings.price)


def _least(node: Node) -> Floats | None:
    """Scales below which the bias of a node behind a DQ would not fit, with room for what it becomes."""
    bias, pair = node.constant(2), producer(node.inputs[0])
    scale = pair.constant(1) if pair is not None else None
    if bias is None or scale is None:
        return None
    return np.asarray(ROOM * least_scales(bias.reshape(-1), np.float32(scale.max())), np.float32)


def priced(model: Model, ctx: Context) -> list[Priced]:
    """The weights of the layers of the main graph that see something, with what they see.

    Outputs of groups that share a scale have no price: their weights are rounded to the nearest (`Rounder`).
    """
    layers = [layer for layer in map(layer_of, model.graph.nodes) if isinstance(layer, Layer)]
    found = []
    for rows, part in portions([layer for layer in layers if layer.unfit() is None and _is_apart(layer)]):
        names = [layer.node.outputs[0].name for layer in part]
        grams = observe(model, ctx.given.fit, names, alone=True, rows=rows, target=ctx.target)
        for layer, name in zip(part, names, strict=True):
            if name in grams:
                gram = grams.pop(name)
                steps = least_steps(layer.matrix(), damped(gram.gram, gram.count), 1.0)
                found.append(Priced(layer.weight.astype(np.float32), layer.weight_axis, steps))
    return found


def _is_apart(layer: Layer) -> bool:
    """Whether each of its outputs has a scale of its own; those of transposed groups share theirs."""
    return int(layer.weight.shape[layer.weight_axis]) == layer.groups * layer.outputs


def portions(layers: Sequence[Layer]) -> Iterator[tuple[int, list[Layer]]]:
    """Layers to observe together, as far as memory allows, and how many rows of what they see to take.

    There are more rows than inputs, or the moments would be those of too few directions; but no more than
    some thousand, which tell the codes of eight bits well enough.
    """
    waiting: dict[int, list[Layer]] = {}
    sizes: Counter[int] = Counter()
    for layer in layers:
        groups, _, inputs = layer.matrix().shape
        rows = 1 << max(2 * inputs - 1, ROWS if inputs > NARROW else ROWS // 4).bit_length()
        # Sums in double precision, and the rows that wait to be summed up.
        size = groups * inputs * (8 * inputs + 4 * min(rows, WAITING))
        if sizes[rows] + size > MAX_BYTES and waiting.get(rows):
            yield rows, waiting.pop(rows)
            sizes[rows] = 0
        waiting.setdefault(rows, []).append(layer)
        sizes[rows] += size
    yield from waiting.items()
