"""OpSpec: everything onnxslim knows about an operator, in one row.

A new operator is one `register(OpSpec(...))` in the file of its family. What a row does not say has a safe
default: not quantized, not counted. The row's example feeds the conformance tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

from onnxslim.ir.graph import Array, Node, Shape
from onnxslim.ir.model import DEFAULT_DOMAINS, Model, constant_of
from onnxslim.ops.body import WriteBody, is_there
from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.labels import Trace
from onnxslim.ops.channels.scale_labels import ScaleTrace
from onnxslim.ops.layers import Layer

# Multiply-accumulates of a node whose shapes are all known; None if one that counts is not.
Macs: TypeAlias = Callable[[Node], int | None]


@dataclass(frozen=True)
class Channels:
    """How an operator carries slices of its tensors along.

    Attributes:
        trace: ties the labels of its inputs and labels its outputs.
        cut: brings its attributes and its constants of sizes in line with what was removed; None if it has
            none that say anything about sizes.
        ready: brings constants that it reads into shapes whose axes are slices; given what makes free names.
    """

    trace: Callable[[Trace], None]
    cut: Callable[[Cut], None] | None = None
    ready: Callable[[Node, Callable[[str], str]], None] | None = None


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


# What operators are written out for, each with those before it: nothing, as it costs no time; weights and
# codes inside; units, such as heads, that go together; standard operators alone. Beyond the first, ONNX
# Runtime's kernels are faster or files are smaller.
Which: TypeAlias = Literal["free", "layers", "units", "all"]
WHICH: tuple[Which, ...] = get_args(Which)


class Trait(Flag):
    """What holds for every node of an operator; `tests/ops/test_traits.py` runs each claim on its example.

    ELEMENTWISE: an element of its output depends on elements of its data inputs at its own place alone; these
        are broadcast against each other.
    MOVES: elements of its outputs are elements of input 0, whatever their values.
    SEARCHES: likewise, but it compares elements to choose between them, as pooling does.
    JOINS: puts several tensors into one.
    COPIES: its output is its input; runtimes drop such nodes.
    KEEPS_ZEROS: makes nothing but zeros of zeros.
    KEEPS_ORDER: of two elements along the last axis, the larger one stays the larger one, which leaves the
        choice of a class as it is.
    SQUASHES: inputs that differ much may make outputs that hardly do, near the ends of its range.
    TELLS_ZEROS: makes different numbers of -0 and +0 in its inputs, or may.
    MERGES_ZEROS: makes the same of both.
    DIVIDES: divides by input 1; by an integer of zero, that ends the process.
    MEASURES: depends on the shape of its input alone.
    GROWS: can make a large tensor of almost nothing.
    SENSITIVE: in half precision, loses what it is there for.
    PERIODIC: turns round and round, so that a large input must be as exact in absolute terms as a small one.
    QUANTIZES: turns numbers into integers on a grid (Q).
    DEQUANTIZES: turns them back (DQ).
    INTEGER: multiplies by weights in integers.
    STRUCTURED: makes a sequence or an optional, which is no tensor.
    COUNTS_OUTPUTS: whether its further outputs are there says what it does, or what it needs.
    """

    NONE = 0
    ELEMENTWISE = auto()
    MOVES = auto()
    SEARCHES = auto()
    JOINS = auto()
    COPIES = auto()
    KEEPS_ZEROS = auto()
    KEEPS_ORDER = auto()
    SQUASHES = auto()
    TELLS_ZEROS = auto()
    MERGES_ZEROS = auto()
    DIVIDES = auto()
    MEASURES = auto()
    GROWS = auto()
    SENSITIVE = auto()
    PERIODIC = auto()
    QUANTIZES = auto()
    DEQUANTIZES = auto()
    INTEGER = auto()
    STRUCTURED = auto()
    COUNTS_OUTPUTS = auto()
    CODES = QUANTIZES | DEQUANTIZES


@dataclass(frozen=True)
class OpSpec:
    """Facts about one operator.

    Attributes:
        op: operator type.
        domain: operator set; "" is ai.onnx.
        role: what quantization may do with it.
        traits: what holds for every node of it.
        data: inputs that carry data, as opposed to shapes, axes, sizes or weights; None means all.
        layer: for LINEAR, how it reads and writes its weight (input 1); see `view_of`, `layer_of`.
        classifies: for LINEAR, whether networks end in it to choose among classes.
        requantized: for LINEAR, whether its integer kernel makes integers only; others may leave the
            result in floating point.
        weight: of operators that multiply by weights, the input that these are.
        norm_axis: of a normalization, the axis that its scale and bias (inputs 1 and 2) run over.
        ranks: inputs with which it fails unless they have so many axes.
        at_most: where the size of its result depends on values, bytes of it per element read.
        limits: for CLAMP, the range a node lets through; None if that is not known.
        unfit: why a particular node cannot play its role (an attribute its kernels do not support).
        misread: why a particular node must not stand between a DQ and a Q either: ONNX Runtime would give it
            to an integer kernel that computes something else.
        channels: how it carries slices along; None pins every slice that it reads.
        scales: how it passes scales of slices on, with labels like those of `channels`; None fixes what it
            reads at one.
        macs: multiply-accumulates; None counts as zero.
        foldable: whether it can be computed once and for all when its inputs are constant.
        pure: whether two nodes with equal inputs and attributes make equal outputs.
        body: what it is in standard operators, where the standard domain does not have it.
        body_opset: what the body takes, where that is a late one.
        older: what it is in older opsets than the one that brought what a node asks for.
        written: for what the body is put in the place of a node, see `Which`.
        has_kernel: whether ONNX Runtime can compute it; where not, its body is written where the standard
            has the operator, too.
        qoperator: whether it takes codes, or makes them; its body has DQ and Q around what it does.
        example: a model of a few lines of ONNX text with this operator in it.
    """

    op: str
    domain: str = ""
    role: Role = Role.FLOAT
    traits: Trait = Trait.NONE
    data: tuple[int, ...] | None = None
    layer: type[Layer] | None = None
    classifies: bool = False
    requantized: bool = False
    weight: int = 1
    norm_axis: int | None = None
    ranks: Mapping[int, int] = field(default_factory=dict)
    at_most: int | None = None
    limits: Callable[[Node], tuple[float, float] | None] | None = None
    unfit: Callable[[Node], str | None] | None = None
    misread: Callable[[Node], str | None] | None = None
    channels: Channels | None = None
    scales: Callable[[ScaleTrace], None] | None = None
    macs: Macs | None = None
    foldable: bool = True
    pure: bool = True
    body: WriteBody | None = None
    body_opset: int = 0
    older: WriteBody | None = None
    written: Which = "free"
    has_kernel: bool = True
    qoperator: bool = False
    example: str = ""

    def data_inputs(self, node: Node) -> list[int]:
        """Positions of the inputs of this node that carry data."""
        return [index for index in range(len(node.inputs)) if self.data is None or index in self.data]

    @property
    def is_unary(self) -> bool:
        """Whether it works element by element on one tensor."""
        return Trait.ELEMENTWISE in self.traits and self.data == (0,)


REGISTRY: dict[tuple[str, str], OpSpec] = {}


def register(*specs: OpSpec) -> None:
    """Add operators to what is known; the last word on an operator counts."""
    for spec in specs:
        REGISTRY[spec.domain, spec.op] = spec


def spec_of(node: Node) -> OpSpec:
    """What is known of a node's operator; of an unknown one, that nothing may be done with it."""
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    return REGISTRY.get((domain, node.op)) or _unknown(node.op, domain)


def body_of(node: Node, model: Model, *, qoperators: bool = False) -> WriteBody | None:
    """How a node is written in standard operators; None where it is one of them, or nobody knows.

    Args:
        model: its opset says which standard operators there are, and it may define the operator itself.
        qoperators: whether those of the standard that take codes are to be written in others, too.
    """
    write = spec_of(node).body
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    if write is None or (domain, node.op) in model.functions:
        return None
    there = is_there(node, model.opset) and spec_of(node).has_kernel
    return write if not there or (qoperators and spec_of(node).qoperator) else None


@lru_cache(1024)
def _unknown(op: str, domain: str) -> OpSpec:
    return OpSpec(op, domain, foldable=domain == "", pure=domain == "")


def has(node: Node | None, traits: Trait) -> bool:
    """Whether there is a node, and one of these traits holds for its operator."""
    return node is not None and bool(spec_of(node).traits & traits)


def view_of(node: Node, weight_index: int = 1, given: Array | None = None) -> Layer | None:
    """The view of a layer, whether or not its weight is a constant; None if the operator is none.

    Args:
        node: in any graph.
        weight_index: which of its first two inputs is the weight.
        given: values of the weight where the node does not read them from a constant.
    """
    kind = spec_of(node).layer
    return kind(node, weight_index, given) if kind is not None else None


def layer_of(node: Node) -> Layer | str | None:
    """The layer a node is; why its weight cannot be fitted; None if it is no layer, or multiplies by data."""
    found = view_of(node)
    if found is None or (1 in spec_of(node).data_inputs(node) and constant_of(node.inputs[1]) is None):
        return None
    return found.unfit() or found


def sizes(shape: Shape) -> tuple[int, ...] | None:
    """A shape if every size in it is known."""
    if shape is None or any(not isinstance(dim, int) for dim in shape):
        return None
    return tuple(dim for dim in shape if isinstance(dim, int))
