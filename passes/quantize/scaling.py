"""Which channels of a network can be scaled without changing what it computes, and scaling them.

What makes a channel is divided by a number, what reads it multiplied: weights, biases and the constants of
normalizations take such numbers in; Relu, sums, pooling and whatever only moves data let them through (all
these are positively homogeneous). Every channel of every tensor gets a label, operators tie labels that have
to have one scale, and everything else fixes what it reads at one. So scales reach across residual branches,
concatenations, pooling and gates, not only from one layer to the next (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", ICCV 2019; Xiao et al., "SmoothQuant", ICML 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from onnxslim.ir.graph import Constant, Graph, Namer, Node, Shape, Tensor, Variable, captures
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.predicates import ints

Labels = NDArray[np.intp]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Labelled:
    """The channels of a tensor.

    Attributes:
        axis: they lie along, counted from the end.
        labels: one for each.
    """

    axis: int
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
        groups, _, inputs = self.layer.matrix().shape
        return np.repeat(values.reshape(groups, -1), inputs * groups // values.size, axis=1)[:, None]

    @property
    def channelwise(self) -> bool:
        """Whether it has a scale of its own for each input channel, so that scaling these does nothing."""
        groups, outputs, _ = self.layer.matrix().shape
        return groups > 1 and outputs == 1 and self.reads is not None and self.reads.size == groups


@dataclass(frozen=True, eq=False)
class _Vector:
    """A constant that is multiplied by scales to the power of 1 or -1; the axis counts from the end."""

    node: Node
    index: int
    axis: int
    labels: Labels
    power: int


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
        trace = _Trace(model.graph)
        self.free, of = trace.components()
        self.tensors = {name: Labelled(each.axis, of[each.labels]) for name, each in trace.known.items()}
        self.mixers = [
            Mixer(each.layer, None if each.reads is None else of[each.reads], of[each.makes])
            for each in trace.mixers
        ]
        self._vectors = [
            _Vector(each.node, each.index, each.axis, of[each.labels], each.power) for each in trace.vectors
        ]

    def families(self) -> list[set[int]]:
        """Components whose tensors they share, those that are fixed left out."""
        edges = [np.stack([each.labels[:-1], each.labels[1:]]) for each in self.tensors.values()]
        pairs = np.concatenate(edges, axis=1) if edges else np.zeros((2, 0), np.intp)
        pairs = pairs[:, self.free[pairs].all(axis=0)]
        # Channels next to each other that are free may be kept apart by fixed ones: a rare loss.
        count, of = _joined(pairs, self.free.size)
        found: list[set[int]] = [set() for _ in range(count)]
        for component in np.flatnonzero(self.free):
            found[of[component]].add(int(component))
        return [family for family in found if family]

    def apply(self, scales: Doubles) -> None:
        """Divide every channel by the scale of its component, in place of what makes and reads it.

        Args:
            scales: positive, one per component; 1 where it is not free.
        """
        for vector in self._vectors:
            self._scale(vector, scales)
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

    def _scale(self, vector: _Vector, scales: Doubles) -> None:
        factors = scales[vector.labels] ** vector.power
        if (factors == 1).all():
            return
        old = vector.node.inputs[vector.index]
        assert isinstance(old, Constant)
        values = old.values.astype(np.float64) * factors.reshape(-1, *(1,) * (-vector.axis - 1))
        self.replace(vector.node, vector.index, values.astype(np.float32))

    def replace(self, node: Node, index: int, values: NDArray[np.float32]) -> None:
        """Give a node a constant of its own."""
        old = node.inputs[index]
        if isinstance(old, Constant) and len(old.outputs) == 1 and id(old) not in self._outputs:
            old.values = values
        else:
            node.inputs[index] = Constant(Namer(self._graph)(f"{old.name}_scaled"), values)


class _Trace:
    """Goes through a graph once and labels what it meets."""

    def __init__(self, graph: Graph) -> None:
        self.known: dict[str, Labelled] = {}
        self.mixers: list[Mixer] = []
        self.vectors: list[_Vector] = []
        self._count = 0
        self._ties: list[tuple[Labels, Labels]] = []
        self._fixed: list[Labels] = []
        outside = {tensor.name for tensor in graph.outputs}
        outside |= {tensor.name for node in graph.nodes if node.bodies for tensor in captures(node)}
        for node in graph.nodes:
            rule = _RULES.get(node.op) if node.domain in DEFAULT_DOMAINS else None
            if rule is None or not rule(self, node):
                self.fix(*node.inputs)
            self.fix(*(tensor for tensor in node.outputs if tensor.name in outside))

    def components(self) -> tuple[NDArray[np.bool_], Labels]:
        """Whether each component is free, and the component of each label."""
        empty = [np.zeros((2, 0), np.intp)]
        pairs = np.concatenate([*empty, *(np.stack(tie) for tie in self._ties)], axis=1)
        count, of = _joined(pairs, self._count)
        free = np.ones(count, bool)
        for labels in self._fixed:
            free[of[labels]] = False
        return free, of

    def of(self, tensor: Tensor | None) -> Labelled | None:
        """The channels of a tensor, if they are known."""
        return self.known.get(tensor.name) if isinstance(tensor, Variable) else None

    def new(self, tensor: Tensor, axis: int, count: int) -> Labels:
        """Label a tensor's channels anew."""
        labels = np.arange(self._count, self._count + count)
        self._count += count
        self.known[tensor.name] = Labelled(axis, labels)
        return labels

    def carry(self, tensor: Tensor, axis: int, labels: Labels) -> bool:
        """Give a tensor these labels, if it has that many channels."""
        shape = tensor.shape
        if shape is None or len(shape) < -axis or shape[axis] != labels.size:
            return False
        self.known[tensor.name] = Labelled(axis, labels)
        return True

    def tie(self, one: Labels, other: Labels) -> None:
        """Both have to have the same scales."""
        self._ties.append((one, other))

    def fix(self, *tensors: Tensor) -> None:
        """Their scales have to be one."""
        self._fixed.extend(found.labels for tensor in tensors if (found := self.of(tensor)))

    def vector(self, node: Node, index: int, axis: int, labels: Labels, power: int) -> None:
        """A constant takes these scales in, if it is there."""
        if node.input(index) is not None:
            self.vectors.append(_Vector(node, index, axis, labels, power))


def _joined(pairs: Labels, count: int) -> tuple[int, Labels]:
    matrix = sparse.coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), (count, count))
    found, of = csgraph.connected_components(matrix, directed=False)
    return int(found), np.asarray(of, np.intp)


# Each rule says whether it knew what to do; where not, all that the node reads is fixed.
Rule = Callable[[_Trace, Node], bool]


def _mixes(trace: _Trace, node: Node) -> bool:
    layer = layer_of(node)
    if not isinstance(layer, Layer) or not _own(node.input(1)) or not _floats(node.input(2)):
        return False
    if len(node.inputs) > 3 or node.attrs.get("transA", 0):
        return False
    groups, outputs, inputs = layer.matrix().shape
    kernel = math.prod(layer.weight.shape[2:]) if node.op not in ("Gemm", "MatMul") else 1
    read = trace.of(node.inputs[0])
    reads = None
    if read is not None and read.axis == layer.axis and read.labels.size == groups * inputs // kernel:
        reads = read.labels
    else:
        trace.fix(node.inputs[0])
    makes = trace.new(node.outputs[0], layer.axis, groups * outputs)
    trace.mixers.append(Mixer(layer, reads, makes))
    trace.vector(node, 2, -1, makes, -1)
    return True


def _normalizes(trace: _Trace, node: Node) -> bool:
    """What it reads is fixed; what it makes it scales itself."""
    trace.fix(node.inputs[0])
    last = node.attrs.get("axis", -1) == -1 or not node.op.endswith(
        ("LayerNormalization", "RMSNormalization")
    )
    axis = -1 if node.op.endswith(("LayerNormalization", "RMSNormalization")) else _second(node.inputs[0])
    scale = node.constant(1)
    grouped = node.op == "GroupNormalization" and scale is not None and node.attrs["num_groups"] == scale.size
    if len([tensor for tensor in node.outputs if tensor.name]) > 1 or not last or not axis or grouped:
        return True
    if scale is None or scale.ndim != 1 or scale.size < 2 or not all(map(_floats, node.inputs[1:3])):
        return True
    made = trace.new(node.outputs[0], axis, scale.size)
    for index in (1, 2):
        trace.vector(node, index, -1, made, -1)
    return True


def _batch_normalizes(trace: _Trace, node: Node) -> bool:
    read = trace.of(node.inputs[0])
    if read is None or read.axis != _second(node.inputs[0]) or not all(map(_own, node.inputs[1:5])):
        return False
    if node.attrs.get("training_mode", 0) or len([tensor for tensor in node.outputs if tensor.name]) > 1:
        return False
    made = trace.new(node.outputs[0], read.axis, read.labels.size)
    trace.vector(node, 1, -1, read.labels, 1)
    trace.vector(node, 3, -1, read.labels, -1)
    for index in (1, 2):
        trace.vector(node, index, -1, made, -1)
    return True


def _passes(trace: _Trace, node: Node) -> bool:
    read = trace.of(node.inputs[0])
    named = [tensor for tensor in node.outputs if tensor.name]
    return read is not None and len(named) == 1 and trace.carry(node.outputs[0], read.axis, read.labels)


def _bends(trace: _Trace, node: Node) -> bool:
    """PRelu, whose slopes have no scale."""
    return isinstance(node.inputs[1], Constant) and _passes(trace, node)


def _pools(trace: _Trace, node: Node) -> bool:
    read = trace.of(node.inputs[0])
    if read is None or read.axis != _second(node.inputs[0]):
        return False
    return trace.carry(node.outputs[0], read.axis, read.labels)  # positions of maxima have no scale


def _resizes(trace: _Trace, node: Node) -> bool:
    mode = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    return mode != "tf_crop_and_resize" and len(node.outputs) == 1 and _passes(trace, node)


def _pads(trace: _Trace, node: Node) -> bool:
    read, pads = trace.of(node.inputs[0]), ints(node, "pads", 1)
    filling = node.constant(2) if node.input(2) is not None else np.zeros(1)
    if read is None or pads is None or filling is None or filling.any() or node.input(3) is not None:
        return False
    if node.attrs.get("value", 0.0) or len(pads) % 2:
        return False
    rank = len(pads) // 2
    begin = rank + read.axis
    return not pads[begin] and not pads[begin + rank] and _passes(trace, node)


def _reduces(trace: _Trace, node: Node) -> bool:
    read, axes = trace.of(node.inputs[0]), ints(node, "axes", 1)
    rank = len(node.inputs[0].shape or ())
    if read is None or not axes or not rank:
        return False
    gone = {axis % rank - rank for axis in axes}
    if read.axis in gone:
        return False
    shift = 0 if node.attrs.get("keepdims", 1) else sum(axis > read.axis for axis in gone)
    return trace.carry(node.outputs[0], read.axis + shift, read.labels)


def _transposes(trace: _Trace, node: Node) -> bool:
    read, perm = trace.of(node.inputs[0]), node.attrs.get("perm")
    if read is None or perm is None:
        return False
    axis = list(perm).index(len(perm) + read.axis) - len(perm)
    return trace.carry(node.outputs[0], axis, read.labels)


def _reshapes(trace: _Trace, node: Node) -> bool:
    """The axis stays one of its own, with as many elements behind it as before."""
    read = trace.of(node.inputs[0])
    old, new = node.inputs[0].shape, node.outputs[0].shape
    if read is None or old is None or new is None or read.labels.size < 2:
        return False
    behind = _behind(old, read.axis)
    fits = [
        axis
        for axis in range(-len(new), 0)
        if new[axis] == read.labels.size and behind is not None and _behind(new, axis) == behind
    ]
    return len(fits) == 1 and trace.carry(node.outputs[0], fits[0], read.labels)


def _joins(trace: _Trace, node: Node) -> bool:
    reads, out = [trace.of(tensor) for tensor in node.inputs], node.outputs[0]
    first = reads[0]
    if first is None or out.shape is None or any(each is None or each.axis != first.axis for each in reads):
        return False
    known = [each.labels for each in reads if each is not None]
    axis = node.attrs["axis"]
    if axis - len(out.shape) * (axis >= 0) == first.axis:
        return trace.carry(out, first.axis, np.concatenate(known))
    if any(labels.size != first.labels.size for labels in known):
        return False
    for labels in known[1:]:
        trace.tie(first.labels, labels)
    return trace.carry(out, first.axis, first.labels)


def _splits(trace: _Trace, node: Node) -> bool:
    read, shape = trace.of(node.inputs[0]), node.inputs[0].shape
    if read is None or shape is None:
        return False
    axis, at = node.attrs.get("axis", 0), 0
    for tensor in node.outputs:
        labels = read.labels
        if axis - len(shape) * (axis >= 0) == read.axis:
            size = tensor.shape[read.axis] if tensor.shape else None
            if not isinstance(size, int):
                return False
            labels, at = read.labels[at : at + size], at + size
        if not trace.carry(tensor, read.axis, labels):
            return False
    return True


def _slices(trace: _Trace, node: Node) -> bool:
    read, shape = trace.of(node.inputs[0]), node.inputs[0].shape
    starts, ends = ints(node, "starts", 1), ints(node, "ends", 2)
    if read is None or shape is None or starts is None or ends is None:
        return False
    axes = ints(node, "axes", 3) if node.input(3) is not None or "axes" in node.attrs else range(len(starts))
    steps = ints(node, "", 4) if node.input(4) is not None else (1,) * len(starts)
    if axes is None or steps is None:
        return False
    labels = read.labels
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis - len(shape) * (axis >= 0) == read.axis:
            if step < 1:
                return False
            labels = labels[start:end:step]
    return trace.carry(node.outputs[0], read.axis, labels)


def _sums(trace: _Trace, node: Node) -> bool:
    """Add and Sub: both operands have one scale; a constant takes it in."""
    left, right = map(trace.of, node.inputs)
    for index, read in ((1, left), (0, right)):
        if read is not None and isinstance(node.inputs[index], Constant):
            if not _floats(node.inputs[index]) or not trace.carry(node.outputs[0], read.axis, read.labels):
                return False
            trace.vector(node, index, read.axis, read.labels, -1)
            return True
    if left is None or right is None or left.axis != right.axis or left.labels.size != right.labels.size:
        return False
    trace.tie(left.labels, right.labels)
    return trace.carry(node.outputs[0], left.axis, left.labels)


def _multiplies(trace: _Trace, node: Node) -> bool:
    """Of two tensors the second, or the gate, has no scale; nor has a constant, which may become integers."""
    left, right = map(trace.of, node.inputs)
    if right is not None and (left is not None or node.op == "Div"):
        trace.fix(node.inputs[1])
        right = None
    read = left or right
    return read is not None and trace.carry(node.outputs[0], read.axis, read.labels)


def _own(tensor: Tensor | None) -> bool:
    return isinstance(tensor, Constant) and len(tensor.outputs) == 1 and _floats(tensor)


def _floats(tensor: Tensor | None) -> bool:
    """Whether it is not there, or a constant in single precision."""
    if tensor is None or not tensor.name:
        return True
    return (
        isinstance(tensor, Constant) and tensor.dtype == np.float32 and bool(np.isfinite(tensor.values).all())
    )


def _second(tensor: Tensor) -> int:
    """The second axis counted from the end; 0 if that is not known."""
    return 1 - len(tensor.shape) if tensor.shape else 0


def _behind(shape: Shape, axis: int) -> Any:
    """How many elements lie behind an axis, or their sizes in symbols; None if that is not known."""
    rest: Sequence[Any] = [dim for dim in (shape or ())[axis + 1 :] if dim != 1] if axis != -1 else []
    if any(dim is None for dim in rest):
        return None
    return math.prod(rest) if all(isinstance(dim, int) for dim in rest) else tuple(rest)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _mixes),
    **dict.fromkeys(
        (
            "LayerNormalization",
            "RMSNormalization",
            "SimplifiedLayerNormalization",
            "InstanceNormalization",
            "GroupNormalization",
        ),
        _normalizes,
    ),
    "BatchNormalization": _batch_normalizes,
    **dict.fromkeys(("Relu", "LeakyRelu", "Identity", "Dropout"), _passes),
    "PRelu": _bends,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pools),
    "Resize": _resizes,
    "Pad": _pads,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduces),
    "Transpose": _transposes,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshapes),
    "Concat": _joins,
    "Split": _splits,
    "Slice": _slices,
    **dict.fromkeys(("Add", "Sub"), _sums),
    **dict.fromkeys(("Mul", "Div"), _multiplies),
}
