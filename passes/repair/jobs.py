"""What can be refitted: layers with weights, and scales and shifts per channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxslim.calibration.gram import Doubles, Gram
from onnxslim.ir import graph as ir
from onnxslim.ir.files import aside
from onnxslim.ir.graph import Array, Constant, Graph, Node, Variable
from onnxslim.ir.model import constant_of
from onnxslim.ops import Trait, has
from onnxslim.ops.layers import Floats, Layer, Positions, per_channel, values_at
from onnxslim.passes.predicates import rounded
from onnxslim.passes.repair.solve import Fit
from onnxslim.passes.repair.support import Mask, support

MATCHES = ("Add", "BatchNormalization", "Gemm", "Mul")
# Weights behind a scale this much smaller than the largest of its channels are left alone: rounding of the
# others, 1e-7 in single precision, would come back as a tenth of what is asked of them.
_FAINT = 1e-6
# What is left of a weight, relative to what it was, that is rounding of its difference to zero.
_CANCELLED = 1e-12


@dataclass(frozen=True)
class Slot:
    """A constant with one value per output channel that is added behind the weights.

    Attributes:
        node, index: whose input it is; one past its inputs if it is still to be made.
        factor: what an addition to it is multiplied by until it reaches the target.
    """

    node: Node
    index: int
    factor: Doubles


@dataclass(frozen=True)
class RefitGoal:
    """A tensor to bring close to the teacher's: target = scale * (W x) + shift + other.

    Attributes:
        tensor: its name.
        scale, shift: one value per output channel.
        slot: the bias, if there is one or one can be added.
        other: a tensor added to it, such as the skip of a residual block.
        nodes: the nodes passed on the way from the layer.
    """

    tensor: str
    scale: Doubles
    shift: Doubles
    slot: Slot | None
    other: str | None = None
    nodes: tuple[Node, ...] = ()


class Job(ABC):
    """Something to refit.

    Attributes:
        node: where it is.
        goal: what it is refitted for.
        axis: of the goal, the one that runs over channels, counted from the end.
    """

    node: Node
    goal: RefitGoal
    axis: int

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.node.label

    @property
    @abstractmethod
    def width(self) -> int:
        """Inputs per group."""

    @property
    def size(self) -> int:
        """Inputs of all groups."""
        return self.goal.scale.size * self.width

    @property
    def takes_bias(self) -> bool:
        """Whether a shift can be stored."""
        return self.goal.slot is not None

    @property
    def mask(self) -> Mask | None:
        """What may change of a sparse weight, (groups, outputs, inputs); None if all of it may."""
        return None

    def reads(self) -> list[str]:
        """Tensors whose values it takes, as they will stay."""
        return []

    def peeks(self) -> list[Node]:
        """Nodes whose present outputs it takes."""
        return []

    @abstractmethod
    def count(self, values: Mapping[str, Array]) -> int:
        """Positions of the goal in a batch."""

    @abstractmethod
    def rows(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        """Inputs (groups, inputs, positions) and the present goal (groups, outputs, positions)."""

    @abstractmethod
    def write(self, graph: Graph, weight: Doubles | None, bias: Doubles) -> str | None:
        """Add a change to the constants; returns why that is not possible, if so.

        Args:
            graph: the main graph of the model.
            weight: change per input, shape (groups, outputs, inputs); None for no change.
            bias: change of the goal, shape (groups, outputs); without effect if there is no slot.
        """


@dataclass(eq=False)
class Linear(Job):
    """A layer with weights, and what follows it up to the goal."""

    layer: Layer
    goal: RefitGoal

    def __post_init__(self) -> None:
        self.node = self.layer.node
        self.axis = self.layer.axis
        self._matrix = self.layer.matrix()

    @property
    def width(self) -> int:
        """See `Job`."""
        return int(self._matrix.shape[2])

    @property
    def size(self) -> int:
        """See `Job`."""
        return int(self._matrix.shape[0]) * self.width

    @property
    def mask(self) -> Mask | None:
        """See `Job`."""
        return support(self._matrix)

    def reads(self) -> list[str]:
        """See `Job`."""
        return [self.node.inputs[0].name, *([self.goal.other] if self.goal.other else [])]

    def count(self, values: Mapping[str, Array]) -> int:
        """See `Job`."""
        return self.layer.count(values[self.node.inputs[0].name])

    def rows(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        """See `Job`."""
        x = self.layer.columns(values[self.node.inputs[0].name], at)
        y = self._matrix @ x
        y *= _grouped(self.goal.scale, y)
        y += _grouped(self.goal.shift, y)
        if self.goal.other:
            shape = self.layer.shape(values[self.node.inputs[0].name])
            y += self.layer.results(np.broadcast_to(values[self.goal.other], shape), at)
        return x, y

    def wanted(self, fitted: Fit | None) -> Floats | None:
        """The weights that a fit asks for, as `Layer.matrix`; None if they are not finite."""
        with np.errstate(divide="ignore", invalid="ignore"):  # told by what is not finite
            change = 0.0 if fitted is None or fitted.weight is None else fitted.weight / self._scale
        wanted = np.asarray(self._matrix + change, np.float32)
        return wanted if np.isfinite(wanted).all() else None

    def landed(self, restored: Floats, wanted: Floats, fitted: Fit | None, gram: Gram) -> Fit:
        """The change to weights that can be stored, instead of those wanted; a bias takes in the mean error.

        Args:
            restored, wanted: as `Layer.matrix`.
            fitted: what wants them; None if they are the layer's own.
            gram: moments of what the layer sees.
        """
        shift = np.zeros(wanted.shape[:2]) if fitted is None else fitted.bias
        if self.takes_bias:
            shift = shift + self._scale[..., 0] * np.einsum("gmk,gk->gm", wanted - restored, gram.x_mean)
        before, after = (0.0, 0.0) if fitted is None else (fitted.before, fitted.after)
        return Fit(np.asarray((restored - self._matrix) * self._scale, np.float64), shift, 0.0, before, after)

    @property
    def _scale(self) -> Doubles:
        """What stands between the layer's output and the goal, shape (groups, outputs, 1)."""
        return self.goal.scale.reshape(*self._matrix.shape[:2], 1)

    def write(self, graph: Graph, weight: Doubles | None, bias: Doubles) -> str | None:
        """See `Job`."""
        weights = biases = None
        if weight is not None:
            scale = self.goal.scale.reshape(weight.shape[0], -1, 1)
            change = np.divide(weight, scale, out=np.zeros_like(weight), where=_clear(scale))
            found = self._matrix + change
            found[np.abs(found) < _CANCELLED * np.abs(self._matrix)] = 0.0  # a sparse weight stays one
            weights = rounded(self.layer.restored(found), self.layer.weight.dtype)
            if weights is None:
                return f"its new weights do not fit into {self.layer.weight.dtype}"
        slot = self.goal.slot
        if slot is not None:
            old = constant_of(slot.node.input(slot.index))
            biases = self._biases(old, slot.factor, bias.reshape(-1))
            if biases is None:
                return "its new bias does not fit into its type"
            if old is None:
                slot.node.attrs.pop("beta", None)  # a Gemm without bias had no use for it
            put(graph, slot.node, slot.index, biases)
        if weights is not None:
            put(graph, self.node, 1, aside(weights))
        return None

    def _biases(self, old: Array | None, factor: Doubles, change: Doubles) -> Array | None:
        shift = np.divide(change, factor, out=np.zeros(factor.shape), where=_clear(factor))
        if old is None:
            return rounded(shift, self.layer.weight.dtype)
        return rounded(_added(old, shift), old.dtype)


@dataclass(eq=False)
class Affine(Job):
    """A scale and a shift per channel, or one of them.

    Attributes:
        scale: input of a node that holds the scale; None if only a shift is there.
        peeked: nodes to run for the present goal.
    """

    node: Node
    goal: RefitGoal
    axis: int
    scale: tuple[Node, int] | None
    peeked: tuple[Node, ...]

    @property
    def width(self) -> int:
        """See `Job`."""
        return 1 if self.scale else 0

    def peeks(self) -> list[Node]:
        """See `Job`."""
        return list(self.peeked)

    def count(self, values: Mapping[str, Array]) -> int:
        """See `Job`."""
        value = values[self.goal.tensor]
        return int(value.size // max(value.shape[self.axis], 1))

    def rows(self, values: Mapping[str, Array], at: Positions) -> tuple[Floats, Floats]:
        """See `Job`."""
        present = values_at(values[self.goal.tensor], self.axis, at)[:, None]
        return (present if self.scale else present[:, :0]), present

    def write(self, graph: Graph, weight: Doubles | None, bias: Doubles) -> str | None:
        """See `Job`."""
        gain = np.ones(bias.size) if weight is None or not self.scale else 1.0 + weight[..., 0].reshape(-1)
        slot = self.goal.slot
        changes: list[tuple[Node, int, Array | None]] = []
        if slot is not None:
            changes.append((slot.node, slot.index, _scaled(slot.node, slot.index, gain, bias.reshape(-1))))
        if self.scale is not None:
            changes.append((*self.scale, _scaled(*self.scale, gain, np.zeros(gain.size))))
        if any(values is None for _, _, values in changes):
            return "its new values do not fit into their type"
        for node, index, values in changes:
            assert values is not None
            put(graph, node, index, values)
        return None


def put(graph: Graph, node: Node, index: int, values: Array) -> None:
    """Make an input of a node a constant of these values, in place where nobody else reads it."""
    tensor = node.input(index)
    outputs = {id(each) for each in graph.outputs}
    if isinstance(tensor, Constant) and len(tensor.outputs) == 1 and id(tensor) not in outputs:
        tensor.values = values
        return
    name = tensor.name if tensor is not None else f"{node.outputs[0].name}_bias"
    made = Constant(ir.Namer(graph)(f"{name}_repaired" if tensor is not None else name), values)
    while len(node.inputs) <= index:
        node.inputs.append(ir.empty())
    node.inputs[index] = made


def goals(layer: Layer, graph: Graph) -> Iterator[RefitGoal]:
    """The tensors a layer can be refitted for, from its own output to the sum behind it."""
    goal = _own_goal(layer)
    if goal is None:
        return
    inner = {id(node) for node in graph.nodes}
    fixed = ir.protected(graph)
    tensor = layer.node.outputs[0]
    yield goal
    while id(tensor) not in fixed and len(tensor.outputs) == 1 and id(tensor.outputs[0]) in inner:
        reader = tensor.outputs[0]
        if _is_rounded(reader, tensor, fixed):
            tensor = reader.outputs[0].outputs[0].outputs[0]
            continue
        following = _followed(goal, reader, tensor, layer.axis)
        if following is None:
            return
        goal, tensor = following, reader.outputs[0]
        yield goal
        if goal.other:
            return


def _is_rounded(reader: Node, tensor: Variable, fixed: Collection[int]) -> bool:
    """Whether a tensor goes to integers and straight back, as far as all of its readers are concerned."""
    if not has(reader, Trait.QUANTIZES) or reader.inputs[0] is not tensor:
        return False
    codes = reader.outputs[0]
    if id(codes) in fixed or len(codes.outputs) != 1 or not has(codes.outputs[0], Trait.DEQUANTIZES):
        return False
    return constant_of(reader.input(1)) is not None and codes.outputs[0].inputs[0] is codes


def _own_goal(layer: Layer) -> RefitGoal | None:
    ones, bias = np.ones(layer.groups * layer.outputs), layer.bias()
    if bias is None:
        return None
    scale = 1.0 if layer.node.input(2) is None else layer.bias_scale
    slot = Slot(layer.node, 2, ones * scale) if layer.takes_bias else None
    return RefitGoal(layer.node.outputs[0].name, ones, bias, slot)


def _followed(goal: RefitGoal, reader: Node, tensor: Variable, axis: int) -> RefitGoal | None:
    """The goal behind the next node; None if that is more than a scale, a shift or a sum."""
    size, name = goal.scale.size, reader.outputs[0].name if reader.outputs else ""
    nodes = (*goal.nodes, reader)
    if reader.op == "BatchNormalization":
        return _normalized(goal, reader, tensor, axis)
    if reader.op not in ("Add", "Mul") or len(reader.inputs) != 2 or reader.domain not in ("", "ai.onnx"):
        return None
    index = 1 if reader.inputs[0] is tensor else 0
    operand = reader.inputs[index]
    constant = constant_of(operand)
    if constant is None:
        return replace(goal, tensor=name, other=operand.name, nodes=nodes) if reader.op == "Add" else None
    values = per_channel(constant, axis, size)
    if values is None:
        return None
    if reader.op == "Mul":
        slot = goal.slot and replace(goal.slot, factor=goal.slot.factor * values)
        return RefitGoal(name, goal.scale * values, goal.shift * values, slot, nodes=nodes)
    slot = Slot(reader, index, np.ones(size)) if constant.size == size else goal.slot
    return RefitGoal(name, goal.scale, goal.shift + values, slot, nodes=nodes)


def _normalized(goal: RefitGoal, node: Node, tensor: Variable, axis: int) -> RefitGoal | None:
    """Behind a BatchNormalization, whose bias then takes the shift."""
    inference = len([each for each in node.outputs if each.name]) == 1 and not node.attrs.get(
        "training_mode", 0
    )
    if node.inputs[0] is not tensor or not inference or (axis == -1 and tensor.inputs[0].op != "Gemm"):
        return None
    given = [constant_of(each) for each in node.inputs[1:5]]
    constants = [each for each in given if each is not None and each.shape == goal.scale.shape]
    if len(constants) < len(given):
        return None
    gamma, beta, mean, variance = (each.astype(np.float64) for each in constants)
    gain = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    slot = Slot(node, 2, np.ones(gain.size))
    shift = (goal.shift - mean) * gain + beta
    return RefitGoal(node.outputs[0].name, goal.scale * gain, shift, slot, nodes=(*goal.nodes, node))


def _grouped(values: Doubles, like: Floats) -> Floats:
    return values.reshape(*like.shape[:2], 1).astype(np.float32)


def _clear(scale: Doubles) -> Array:
    return np.asarray(np.abs(scale) > _FAINT * np.abs(scale).max(initial=0.0))


def _added(old: Array, shift: Doubles) -> Array:
    """A constant plus one value per channel, in its own shape unless it was a single value."""
    if old.size == shift.size:
        return np.asarray(old.astype(np.float64) + shift.reshape(old.shape))
    return np.asarray(old.astype(np.float64).reshape(-1) + shift)


def _scaled(node: Node, index: int, gain: Doubles, shift: Doubles) -> Array | None:
    old = constant_of(node.inputs[index])
    assert old is not None
    values = (old.astype(np.float64).reshape(-1) * gain + shift).reshape(old.shape)
    return rounded(values, old.dtype)
