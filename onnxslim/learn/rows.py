"""What an operator computes, in PyTorch: a row for each, beside the one in `onnxslim/ops/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from onnx import AttributeProto, helper, numpy_helper

from onnxslim.ir.graph import Array, Graph, Node
from onnxslim.ir.model import DEFAULT_DOMAINS
from onnxslim.learn.door import DType, Tensor, UnknownError, torch, torch_type

A = TypeVar("A", int, float, str)
F = TypeVar("F", bound="Callable[..., Any]")


@dataclass
class Call:
    """A node, as its forward function sees it.

    Attributes:
        node: that one.
        opset: of the standard operators.
        real: the type that floating-point numbers are computed in; None for the types the model states.
        run: computes a graph that the node holds, given its inputs.
    """

    node: Node
    opset: int
    real: DType = None
    run: Callable[[Graph, Sequence[Tensor]], list[Tensor]] = field(default=lambda graph, inputs: [])

    def get(self, name: str, default: A) -> A:
        """An attribute of the type of its default."""
        value = self.node.attrs.get(name, default)
        if isinstance(default, str):
            return value.decode() if isinstance(value, bytes) else value
        return type(default)(value)

    def has(self, name: str) -> bool:
        """Whether an attribute is there."""
        return name in self.node.attrs

    def ints(self, name: str) -> list[int] | None:
        """An attribute of several integers, None where it is left out."""
        value = self.node.attrs.get(name)
        return None if value is None else [int(each) for each in value]

    def numbers(self, name: str) -> list[float]:
        """An attribute of several numbers; none where it is left out."""
        return [float(each) for each in self.node.attrs.get(name, ())]

    def words(self, name: str) -> list[str]:
        """An attribute of several words; none where it is left out."""
        found = self.node.attrs.get(name, ())
        return [each.decode() if isinstance(each, bytes) else str(each) for each in found]

    def array(self, name: str) -> Array | None:
        """An attribute that is a tensor, None where it is left out."""
        value = self.node.attrs.get(name)
        return numpy_helper.to_array(value.t) if isinstance(value, AttributeProto) else None

    def kind(self, number: int) -> DType:
        """The type that a number of ONNX's stands for."""
        return torch_type(np.dtype(helper.tensor_dtype_to_np_dtype(number)), self.real)

    def wants(self, index: int) -> bool:
        """Whether an output has a name."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def require(self, condition: bool, what: str) -> None:
        """Raise UnknownError with what is not known if a condition does not hold."""
        if not condition:
            raise UnknownError(what)


Forward: TypeAlias = Callable[..., "Tensor | Sequence[Tensor]"]


@dataclass(frozen=True)
class ForwardRow:
    """How an operator is computed.

    Attributes:
        run: the function, of a `Call` and the inputs, None for those that are left out.
        weights: positions of inputs that it multiplies or adds, so that a constant there can be trained.
        flat: whether its result is constant wherever it has a slope: what is behind it learns nothing.
    """

    run: Forward
    weights: tuple[int, ...] = ()
    flat: bool = False


ROWS: dict[str, ForwardRow] = {}


def forward(*ops: str, weights: tuple[int, ...] = (), flat: bool = False) -> Callable[[F], F]:
    """Have a function compute some operators of the standard domain."""

    def taken(run: F) -> F:
        ROWS.update(dict.fromkeys(ops, ForwardRow(run, weights, flat)))
        return run

    return taken


def row_of(node: Node) -> ForwardRow | None:
    """How a node is computed; None where nobody knows."""
    from onnxslim.learn import forward as families

    families.load()
    return ROWS.get(node.op) if node.domain in DEFAULT_DOMAINS else None


def int_list(tensor: Tensor) -> list[int]:
    """The values of a tensor of integers."""
    return [int(each) for each in tensor.reshape(-1).tolist()]


def axes_of(call: Call, given: Tensor | None, rank: int) -> list[int] | None:
    """Axes as an input, or as an attribute in older opsets, none of them negative; None if left out."""
    axes = int_list(given) if given is not None else call.ints("axes")
    return None if axes is None else [axis % max(rank, 1) for axis in axes]


def full_precision(tensor: Tensor) -> Tensor:
    """At least single precision, where half of it would lose what is summed up."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
