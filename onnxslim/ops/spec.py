"""OpSpec: everything onnxslim knows about an operator, in one row.

A new operator is one `register(OpSpec(...))` in the file of its family. What a row does not say has a safe
default: not quantized, not counted. The row's example feeds the conformance tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from onnxslim.ir.graph import Node, Shape
from onnxslim.ir.model import DEFAULT_DOMAINS
from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.labels import Trace

# Multiply-accumulates of a node whose shapes are all known; None if one that counts is not.
Macs: TypeAlias = Callable[[Node], int | None]


@dataclass(frozen=True)
class Channels:
    """How an operator carries slices of its tensors along.

    Attributes:
        trace: ties the labels of its inputs and labels its outputs.
        cut: brings its attributes and its constants of sizes in line with what was removed; None if it has
            none that say anything about sizes.
    """

    trace: Callable[[Trace], None]
    cut: Callable[[Cut], None] | None = None


class Role(Enum):
    """What quantization may do with an operator.

    LINEAR: multiplies by weights and sums in integers; the reason why there is quantization at all.
    KERNEL: has an integer kernel on some targets, with its own scale for the output.
    MOVE: output elements are input elements, so both have one scale.
    CLAMP: limits the range of its input and disappears in the range of the integers.
    FLOAT: computes in floating point.
    """

    LINEAR = "linear"
    KERNEL = "kernel"
    MOVE = "move"
    CLAMP = "clamp"
    FLOAT = "float"


@dataclass(frozen=True)
class OpSpec:
    """Facts about one operator.

    Attributes:
        op: operator type.
        domain: operator set; "" is ai.onnx.
        role: what quantization may do with it.
        data: inputs that carry data, as opposed to shapes, axes, sizes or weights; None means all.
        channel_axis: for LINEAR, the axis of the weight (input 1) that runs over output channels.
        data_axis: for LINEAR, the axis of the data (input 0) that runs over the channels it sums over.
        classifies: for LINEAR, whether networks end in it to choose among classes.
        keeps_order: whether a larger element of its input makes a larger one of its output, which leaves the
            choice of a class as it is.
        squashes: whether inputs that differ much may make outputs that hardly do, near the ends of its range.
        copies: whether its output is its input; runtimes drop such nodes.
        requantized: for LINEAR, whether its integer kernel makes integers only; others may leave the
            result in floating point.
        searches: for MOVE, whether it compares elements to choose between them, as pooling does, instead of
            only copying.
        joins: whether it puts several tensors into one, which then have one scale.
        channelwise: for LINEAR, whether a node has one input channel per output channel.
        input_channels: for convolutions, the input channels that one output channel sums over.
        limits: for CLAMP, the range a node lets through; None if that is not known.
        unfit: why a particular node cannot play its role (an attribute its kernels do not support).
        misread: why a particular node must not stand between a DQ and a Q either: ONNX Runtime would give it
            to an integer kernel that computes something else.
        channels: how it carries slices along; None pins every slice that it reads.
        macs: multiply-accumulates; None counts as zero.
        foldable: whether it can be computed once and for all when its inputs are constant.
        pure: whether two nodes with equal inputs and attributes make equal outputs.
        example: a model of a few lines of ONNX text with this operator in it.
    """

    op: str
    domain: str = ""
    role: Role = Role.FLOAT
    data: tuple[int, ...] | None = None
    channel_axis: Callable[[Node], int] | None = None
    data_axis: Callable[[Node], int] | None = None
    classifies: bool = False
    keeps_order: bool = False
    squashes: bool = False
    copies: bool = False
    requantized: bool = False
    searches: bool = False
    joins: bool = False
    channelwise: Callable[[Node], bool] | None = None
    input_channels: Callable[[Node], int] | None = None
    limits: Callable[[Node], tuple[float, float] | None] | None = None
    unfit: Callable[[Node], str | None] | None = None
    misread: Callable[[Node], str | None] | None = None
    channels: Channels | None = None
    macs: Macs | None = None
    foldable: bool = True
    pure: bool = True
    example: str = ""

    def data_inputs(self, node: Node) -> list[int]:
        """Positions of the inputs of this node that carry data."""
        return [index for index in range(len(node.inputs)) if self.data is None or index in self.data]


REGISTRY: dict[tuple[str, str], OpSpec] = {}


def register(*specs: OpSpec) -> None:
    """Add operators to what is known; the last word on an operator counts."""
    for spec in specs:
        REGISTRY[spec.domain, spec.op] = spec


def spec_of(node: Node) -> OpSpec:
    """What is known of a node's operator; of an unknown one, that nothing may be done with it."""
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    found = REGISTRY.get((domain, node.op))
    return found or OpSpec(node.op, domain, foldable=domain == "", pure=domain == "")


def sizes(shape: Shape) -> tuple[int, ...] | None:
    """A shape if every size in it is known."""
    if shape is None or any(not isinstance(dim, int) for dim in shape):
        return None
    return tuple(dim for dim in shape if isinstance(dim, int))
