"""Which channels of a network can be scaled without changing what it computes, and scaling them.

What makes a channel is divided by a number, what reads it multiplied: weights, biases and the constants of
normalizations take such numbers in; Relu, sums, pooling and whatever only moves data let them through (all
these are positively homogeneous). Every channel of every tensor gets a label, operators tie labels that
have to have one scale, and everything else fixes what it reads at one. So scales reach across residual
branches, concatenations, pooling and gates, not only from one layer to the next. The field calls this
cross-layer equalization, and smoothing where activations are to become easier (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019; Xiao et al., "SmoothQuant", ICML
2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from onnxslim.families.analysis import shapes_of, sized, visit
from onnxslim.ir.files import aside
from onnxslim.ir.graph import Constant, Namer, Node
from onnxslim.ir.model import Model
from onnxslim.ops import spec_of
from onnxslim.ops.channels.labels import PINNED, Block, Labels, joined
from onnxslim.ops.channels.scale_labels import Absorbed, Mixed, ScaleTrace, ScaleTracer
from onnxslim.ops.layers import Layer

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Labelled:
    """The channels of a tensor.

    Attributes:
        axes: they lie along, counted from the end; several, where an axis was split into these.
        labels: one for each, last axis fastest.
    """

    axes: tuple[int, ...]
    labels: Labels


@dataclass(frozen=True, eq=False)
class Mixer:
    """A layer with weights that takes scales in.

    Attributes:
        layer: it.
        reads: labels of its input channels, in the order of `Layer.matrix`; None where they are fixed.
        makes: labels of its output channels.
    """

    layer: Layer
    reads: Labels | None
    makes: Labels

    def columns(self, values: Doubles) -> Doubles:
        """One value per input channel as a factor of `Layer.matrix`, (groups, 1, inputs)."""
        wide = self.layer.inputs * math.prod(self.layer.kernel)
        split = values.reshape(self.layer.groups, -1)
        return np.repeat(split, wide // split.shape[1], axis=1)[:, None]

    @property
    def channelwise(self) -> bool:
        """Whether it has a scale of its own for each input channel, so that scaling these does nothing."""
        groups, outputs = self.layer.groups, self.layer.outputs
        return groups > 1 and outputs == 1 and self.reads is not None and self.reads.size == groups


class Scaling:
    """The scales of one model.

    Args:
        model: with shapes inferred.

    Attributes:
        tensors: channels of tensors, by name, labelled by component: one scale per number.
        mixers: layers with weights.
        free: for each component, whether it can have any scale but one.
    """

    def __init__(self, model: Model) -> None:
        self._graph = model.graph
        self._outputs = {id(tensor) for tensor in model.graph.outputs}
        tracer = ScaleTracer(shapes_of(sized(model, {})), model.opset, frozenset(self._outputs))
        for node in model.graph.nodes:
            trace, rule = ScaleTrace(node, tracer), spec_of(node).scales
            visit(trace, partial(rule, trace) if rule else None, model)
        for output in model.graph.outputs:
            tracer.pin(output, None, f"'{output.name}' is an output of the model")
        labelled = [(tensor, block) for tensor, blocks in tracer.labelled() for block in blocks]
        for tensor, block in labelled:
            sizes = [(tensor.shape or ())[axis : axis + 1] for axis in block.axes]
            if sizes != [(size,) for size in block.labels.shape]:
                tracer.pin(tensor, None, "its size is not known for certain")
        of = tracer.components()
        self.free = np.arange(int(of.max()) + 1) != PINNED
        self.tensors = {
            tensor.name: Labelled(_from_end(block, len(tensor.shape or ())), of[block.labels].reshape(-1))
            for tensor, block in labelled
        }
        self.mixers = [_mixer(each, of) for each in tracer.mixed]
        self._absorbed = [(each, of[each.labels]) for each in tracer.absorbed]

    def families(self) -> list[set[int]]:
        """Components whose tensors they share, those that are fixed left out."""
        edges = [np.stack([each.labels[:-1], each.labels[1:]]) for each in self.tensors.values()]
        pairs = np.concatenate(edges, axis=1) if edges else np.zeros((2, 0), np.int64)
        pairs = pairs[:, self.free[pairs].all(axis=0)]
        # Channels next to each other that are free may be kept apart by fixed ones: a rare loss.
        of = joined(pairs[0], pairs[1], self.free.size)
        found: dict[int, set[int]] = {}
        for component in np.flatnonzero(self.free):
            found.setdefault(int(of[component]), set()).add(int(component))
        return list(found.values())

    def apply(self, scales: Doubles) -> None:
        """Divide every channel by the scale of its component, in place of what makes and reads it.

        Args:
            scales: positive, one per component; 1 where it is not free.
        """
        for absorbed, labels in self._absorbed:
            self._scale(absorbed, scales[labels] ** absorbed.power)
        for mixer in self.mixers:
            makes = scales[mixer.makes]
            reads = np.ones(1) if mixer.reads is None else scales[mixer.reads]
            if (makes == 1).all() and (reads == 1).all():
                continue
            matrix = mixer.layer.matrix().astype(np.float64)
            matrix /= makes.reshape(*matrix.shape[:2], 1)
            if mixer.reads is not None:
                matrix *= mixer.columns(reads)
            self.replace(mixer.layer.node, 1, mixer.layer.restored(matrix).astype(np.float32))

    def _scale(self, absorbed: Absorbed, factors: Doubles) -> None:
        if (factors == 1).all():
            return
        old = absorbed.node.inputs[absorbed.index]
        assert isinstance(old, Constant)
        shape = [1] * -absorbed.axes[0]
        for axis, size in zip(absorbed.axes, factors.shape, strict=True):
            shape[axis] = size
        values = old.values.astype(np.float64) * factors.reshape(shape)
        self.replace(absorbed.node, absorbed.index, values.astype(np.float32))

    def replace(self, node: Node, index: int, values: NDArray[np.float32]) -> None:
        """Give a node a constant of its own."""
        old, values = node.inputs[index], aside(values)
        if isinstance(old, Constant) and len(old.outputs) == 1 and id(old) not in self._outputs:
            old.values = values
        else:
            node.inputs[index] = Constant(Namer(self._graph)(f"{old.name}_scaled"), values)


def _from_end(block: Block, rank: int) -> tuple[int, ...]:
    return tuple(axis - rank for axis in block.axes)


def _mixer(mixed: Mixed, of: Labels) -> Mixer:
    return Mixer(mixed.layer, None if mixed.reads is None else of[mixed.reads], of[mixed.makes])
