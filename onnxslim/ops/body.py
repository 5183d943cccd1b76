"""Function bodies: one node written out in operators of the standard domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
import onnx.defs
from onnx import FunctionProto, helper, numpy_helper

from onnxslim.ir import graph as ir
from onnxslim.ir import proto
from onnxslim.ir.graph import Array, Attribute, Constant, Node, Shape, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of

A = TypeVar("A", int, float, str)
# Operators broadcast as they do today since 7; Erf and Where are there since this one.
MIN_OPSET = 9
# In bodies that are only inferred over: the first with everything that is written where little is known.
_INFERRED_OPSET = 18
_SINGLE = np.dtype(np.float32)
_FLOATS = tuple(map(np.dtype, (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)))
_PLAIN = (int, float, str, tuple)


class UnwrittenError(Exception):
    """Why a node has no body; a sentence without a full stop."""


class Facts(Protocol):
    """What is certain about tensors; None where nothing is."""

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        """The type of its elements."""

    def shape(self, tensor: Tensor) -> Shape:
        """A size, a symbol or None per axis."""


class Body:
    """What a node is in standard operators, put together by the row of its operator.

    What of the node nobody has looked at, an attribute, an input or an output, is not understood: then there
    is no body.

    Args:
        node: not modified.
        opset: version of the standard operators.
        facts: of the inputs.
        name: makes a name of its own out of a wanted one.
        generic: whether types and ranks need not be known, at the price of operators that are slow.

    Attributes:
        nodes: what was written so far.
        opset, generic: as given.
    """

    def __init__(
        self, node: Node, opset: int, facts: Facts, name: Callable[[str], str], *, generic: bool = False
    ) -> None:
        self.nodes: list[Node] = []
        self.opset = opset
        self.generic = generic
        self._node = node
        self._facts = facts
        self._name = name
        self._read: set[int] = set()
        self._known: set[str] = set()

    # The node

    def input(self, index: int) -> Tensor:
        """An input that has to be there."""
        found = self.optional(index)
        if found is None:
            raise UnwrittenError(f"it has no input {index}")
        return found

    def optional(self, index: int) -> Tensor | None:
        """An input, None where it is left out."""
        self._read.add(index)
        return self._node.input(index)

    def attr(self, name: str, default: A) -> A:
        """An attribute of the type of its default; real numbers in single precision, as files hold them."""
        self._known.add(name)
        value = self._node.attrs.get(name, default)
        if not isinstance(value, type(default)):
            raise UnwrittenError(f"its attribute '{name}' is no {type(default).__name__}")
        # 1e-5 is 9.99999975e-6 to every runtime: that shows in double precision.
        return type(default)(np.float32(value)) if isinstance(value, float) else value

    def numbers(self, name: str) -> tuple[float, ...]:
        """An attribute of several numbers, none where it is left out."""
        self._known.add(name)
        value = self._node.attrs.get(name, ())
        self.require(isinstance(value, tuple), f"its attribute '{name}' is no list")
        return tuple(value)

    def passed(self, *names: str) -> dict[str, Attribute]:
        """Those of some attributes that are there, to be handed on."""
        self._known.update(names)
        given = {name: self._node.attrs[name] for name in names if name in self._node.attrs}
        for name, value in given.items():
            self.require(isinstance(value, _PLAIN) and value != (), f"its attribute '{name}' is odd")
        return given

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes that are there."""
        return tuple(self._node.attrs)

    def has_output(self, index: int) -> bool:
        """Whether an output has a name."""
        return index < len(self._node.outputs) and bool(self._node.outputs[index].name)

    @property
    def results(self) -> int:
        """How many outputs there are."""
        return len(self._node.outputs)

    @property
    def count(self) -> int:
        """How many inputs there are, those included that are left out between others."""
        return len(self._node.inputs)

    def values(self, tensor: Tensor) -> Array | None:
        """The values of an input that is a constant."""
        return constant_of(tensor)

    def dtype(self, *tensors: Tensor) -> np.dtype[Any] | None:
        """The element type of inputs that all have the same."""
        return next((kind for each in tensors if (kind := self._facts.dtype(each)) is not None), None)

    def shape(self, tensor: Tensor) -> Shape:
        """The shape of an input."""
        return self._facts.shape(tensor)

    def size(self, tensor: Tensor, axis: int) -> int:
        """The size of an input along an axis."""
        shape = self.shape(tensor)
        found = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        if not isinstance(found, int):
            raise UnwrittenError(f"the size of '{tensor.name}' along axis {axis} is not known")
        return found

    def rank(self, tensor: Tensor) -> int:
        """The number of axes of an input."""
        shape = self.shape(tensor)
        if shape is None:
            raise UnwrittenError(f"the rank of '{tensor.name}' is not known")
        return len(shape)

    def is_last(self, tensor: Tensor, axis: int) -> bool:
        """Whether an axis of an input is its last one."""
        shape = self.shape(tensor)
        return axis == -1 or (self.generic if shape is None else axis == len(shape) - 1)

    def require(self, holds: bool, otherwise: str) -> None:
        """Have no body, for that reason, unless something holds."""
        if not holds:
            raise UnwrittenError(otherwise)

    # What is written

    def add(self, op: str, *inputs: Tensor | None, **attrs: Attribute) -> Variable:
        """A node with one output."""
        return self.add_many(op, 1, *inputs, **attrs)[0]

    def add_many(self, op: str, count: int, *inputs: Tensor | None, **attrs: Attribute) -> list[Variable]:
        """A node with several outputs."""
        reads = [ir.empty() if tensor is None else tensor for tensor in inputs]
        while reads and not reads[-1].name:
            reads.pop()
        label = self._node.name or f"{self._node.op}_{self._node.outputs[0].name}"
        name = f"{label}_{op}"
        made = [Variable(self._name(name if count == 1 else f"{name}_{index}")) for index in range(count)]
        self.nodes.append(Node(op, self._name(name), attrs, reads, made))
        return made

    def constant(self, values: Array) -> Constant:
        """A constant."""
        label = self._node.name or f"{self._node.op}_{self._node.outputs[0].name}"
        return Constant(self._name(f"{label}_constant"), values)

    def integers(self, *values: int) -> Constant:
        """A vector of int64."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float, *like: Tensor) -> Tensor:
        """A number of the element type of inputs."""
        kind = self.dtype(*like)
        self.require(kind is None or kind in _FLOATS, f"it reads {kind}")
        if kind is not None:
            return self.constant(np.array(value, kind))
        if not self.generic:
            raise UnwrittenError(f"the type of '{like[0].name}' is not known")
        return self.add("CastLike", self.constant(np.array(value, _SINGLE)), like[0])

    def transposed(self, tensor: Tensor) -> Tensor:
        """An input with its last two axes swapped; one with a single axis as it is."""
        shape = self.shape(tensor)
        if shape is None:
            if not self.generic:
                raise UnwrittenError(f"the rank of '{tensor.name}' is not known")
            return self.add("Einsum", tensor, equation="...ij->...ji")
        if len(shape) < 2:
            return tensor
        order = list(range(len(shape)))
        return self.add("Transpose", tensor, perm=(*order[:-2], order[-1], order[-2]))

    def swapped(self, tensor: Tensor, *order: int) -> Variable:
        """A tensor with its axes in another order."""
        return self.add("Transpose", tensor, perm=order)

    def reduced(self, op: str, tensor: Tensor, *axes: int) -> Variable:
        """A reduction over some axes, which stay with size 1."""
        if self.opset < 18:
            return self.add(op, tensor, axes=axes, keepdims=1)
        return self.add(op, tensor, self.integers(*axes), keepdims=1)

    def unsqueezed(self, tensor: Tensor, *axes: int) -> Variable:
        """A tensor with more axes, of size 1."""
        if self.opset < 13:
            return self.add("Unsqueeze", tensor, axes=axes)
        return self.add("Unsqueeze", tensor, self.integers(*axes))

    def split(self, tensor: Tensor, sizes: Sequence[int], axis: int) -> list[Variable]:
        """The parts of a tensor along an axis."""
        if self.opset < 13:
            return self.add_many("Split", len(sizes), tensor, axis=axis, split=tuple(sizes))
        return self.add_many("Split", len(sizes), tensor, self.integers(*sizes), axis=axis)

    def cast(self, tensor: Tensor, kind: np.dtype[Any]) -> Variable:
        """A tensor in another type."""
        return self.add("Cast", tensor, to=proto.elem_type_of(kind))

    def close(self, results: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The results, once everything of the node was looked at.

        Raises:
            UnwrittenError: something was not.
        """
        node = self._node
        for index, tensor in enumerate(node.inputs):
            self.require(index in self._read or not tensor.name, f"nothing is known of its input {index}")
        for name in node.attrs:
            self.require(name in self._known, f"nothing is known of its attribute '{name}'")
        padded = [*results, *(None for _ in node.outputs[len(results) :])]
        for index, tensor in enumerate(node.outputs):
            self.require(
                padded[index] is not None or not tensor.outputs,
                f"nothing is known of its output {index}",
            )
        return padded[: len(node.outputs)]


# What a row knows of its operator: the results of a node, None for those that are not known.
WriteBody: TypeAlias = Callable[[Body], Sequence[Tensor | None]]


def is_there(node: Node, opset: int) -> bool:
    """Whether the standard domain has the operator of a node in this version."""
    if node.domain not in DEFAULT_DOMAINS:
        return False
    try:
        onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return False
    return True


@dataclass(frozen=True)
class _Stated:
    """Facts of tensors that carry them."""

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        return tensor.dtype

    def shape(self, tensor: Tensor) -> Shape:
        return tensor.shape


def function(node: Node, write: WriteBody, domain: str, name: str) -> FunctionProto | None:
    """The body of a node as a function that shapes and types can be inferred over; None if it has none.

    It need not know what the node reads, but for constants.
    """
    reads: list[Tensor] = []
    for index, tensor in enumerate(node.inputs):
        stated = (tensor.dtype, tensor.shape) if isinstance(tensor, Constant) else (None, None)
        reads.append(Variable(f"i{index}" if tensor.name else "", *stated))
    makes = [Variable(f"o{index}" if tensor.name else "") for index, tensor in enumerate(node.outputs)]
    twin = Node(node.op, "body", node.attrs, reads, makes, node.domain)
    taken = [0]

    def fresh(wanted: str) -> str:
        taken[0] += 1
        return f"{wanted}_{taken[0]}"

    body = Body(twin, _INFERRED_OPSET, _Stated(), fresh, generic=True)
    try:
        results = body.close(write(body))
    except UnwrittenError:
        return None
    return _function(twin, body.nodes, results, domain, name)


def _function(
    node: Node, nodes: Sequence[Node], results: Sequence[Tensor | None], domain: str, name: str
) -> FunctionProto:
    made: dict[str, onnx.NodeProto] = {}
    written = []
    for each in nodes:
        for tensor in each.inputs:
            if isinstance(tensor, Constant) and tensor.name not in made:
                value = numpy_helper.from_array(tensor.values, tensor.name)
                made[tensor.name] = helper.make_node("Constant", [], [tensor.name], value=value)
        names = [tensor.name for tensor in each.inputs], [tensor.name for tensor in each.outputs]
        written.append(helper.make_node(each.op, *names, **each.attrs))
    outputs = []
    for index, result in enumerate(results):
        wanted = node.outputs[index].name or f"unread{index}"
        outputs.append(wanted)
        if result is not None:
            written.append(helper.make_node("Identity", [result.name], [wanted]))
    inputs = [tensor.name or f"none{index}" for index, tensor in enumerate(node.inputs)]
    opsets = [helper.make_opsetid("", _INFERRED_OPSET)]
    return helper.make_function(domain, name, inputs, outputs, [*made.values(), *written], opsets)
