"""Which branches a model could do without: what lies between a skip and the sum that it flows into.

A sum of two tensors still computes something sensible when one of them, the branch, is taken to be zero and
the other, the skip, is what the branch was made of. What goes with a branch is found by structure: all nodes
from which every path leads into that operand of that sum. So nothing goes that somebody else reads, be it
another layer, a body or the caller, whatever the operators in between. (Stochastic depth, Huang et al., "Deep
Networks with Stochastic Depth", ECCV 2016, trains networks for that; others bear it within limits.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import Trait, has, spec_of
from onnxslim.ops.layers import Layer
from onnxslim.ops.spec import layer_of
from onnxslim.shapes.dims import Dims, dims_of

MATCHES = ("Add", "Sum", "Transpose")
SUMS = ("Add", "Sum")


@dataclass(frozen=True)
class Branch:
    """What could go, in names of tensors, which copies of a model share.

    Attributes:
        sum: what the sum makes.
        skip: its operand that stays.
        end: its operand that the branch makes.
        nodes: what each node that goes makes first, in the order of the graph; the sum is not among them.
        constants: what nobody reads but these nodes.
        axis: of the sum, the one that runs over its channels, counted from the end; None if not known.
        label: of the sum, for messages.
    """

    sum: str
    skip: str
    end: str
    nodes: tuple[str, ...]
    constants: tuple[str, ...]
    axis: int | None
    label: str


@dataclass(frozen=True)
class Branches:
    """Branches of a model.

    Attributes:
        found: in the order of the sums they flow into; one may lie inside another.
        refused: by label of a sum that has a branch, or of a node with bodies that have some, why that stays.
    """

    found: tuple[Branch, ...]
    refused: Mapping[str, str]


def branches(model: Model) -> Branches:
    """All branches of the main graph with a layer in them.

    Args:
        model: sorted; not modified.
    """
    search = _Search(model)
    found: list[Branch] = []
    for node in model.graph.nodes:
        if _is_sum(node, model):
            found.extend(search.at(node))
        if any(_has_branches(body, model) for body in node.bodies):
            search.refused[node.label] = "it lies in a body"
    return Branches(tuple(found), search.refused)


def _is_sum(node: Node, model: Model) -> bool:
    standard = node.domain in DEFAULT_DOMAINS and ("", node.op) not in model.functions
    operands = {id(each) for each in node.inputs if isinstance(each, Variable) and each.name}
    return standard and node.op in SUMS and len(node.inputs) == len(operands) == 2


def _has_branches(body: Graph, model: Model) -> bool:
    """Whether a body may have some: layers, and sums of two tensors."""
    nodes = list(ir.all_nodes(body))
    return any(spec_of(each).macs for each in nodes) and any(_is_sum(each, model) for each in nodes)


class _Search:
    def __init__(self, model: Model) -> None:
        self.refused: dict[str, str] = {}
        self._dims: Dims = dims_of(model)
        self._order = {id(node): index for index, node in enumerate(model.graph.nodes)}
        self._fixed = ir.protected(model.graph)

    def at(self, node: Node) -> Iterator[Branch]:
        """The branches into a sum: of two that make it together, either may be the one that goes."""
        first, second = node.inputs
        regions = {id(each): self._only_into(each, node) for each in node.inputs}
        for end, skip in ((second, first), (first, second)):
            inside = regions[id(end)]
            if not any(spec_of(each).macs is not None for each in inside):
                continue
            if not self._reads(inside) & {id(skip), *self._reads(regions[id(skip)])}:
                continue  # two things that are added, as tokens and positions, or a score and its mask
            if why := self._problem(skip, node.outputs[0]):
                self.refused[node.label] = why
            else:
                yield self._branch(node, end, skip, inside)

    def _problem(self, skip: Tensor, made: Tensor) -> str:
        """Why the skip alone cannot stand for the sum."""
        wanted, there = self._dims.shape(made), self._dims.shape(skip)
        if wanted is None or there is None:
            return f"not all sizes of '{made.name}' and '{skip.name}' are known"
        if wanted != there:
            return f"without it '{skip.name}' has another shape than '{made.name}', or may have"
        return ""

    def _reads(self, inside: Sequence[Node]) -> set[int]:
        """Ids of the floating-point data that nodes read of others; of what is only measured, none."""
        made = {id(tensor) for each in inside for tensor in each.outputs}
        return {
            id(tensor)
            for each in inside
            if not has(each, Trait.MEASURES)
            for tensor in (*each.inputs, *ir.captures(each))
            if id(tensor) not in made and isinstance(tensor, Variable) and self._is_float(tensor)
        }

    def _is_float(self, tensor: Tensor) -> bool:
        dtype = self._dims.dtype(tensor)
        return dtype is not None and dtype.kind in "fV"

    def _only_into(self, end: Tensor, reader: Node) -> list[Node]:
        """Nodes whose results reach nothing but this operand of the sum, in the order of the graph."""
        found = dict[int, Node]()
        pending = [end] if len(end.outputs) == 1 and end.outputs[0] is reader else []
        while pending:
            maker = ir.producer(pending.pop())
            if maker is None or id(maker) in found or id(maker) not in self._order:
                continue
            made = [tensor for tensor in maker.outputs if tensor.name]
            readers = {id(each) for tensor in made if tensor is not end for each in tensor.outputs}
            if readers <= found.keys() and not any(id(tensor) in self._fixed for tensor in made):
                found[id(maker)] = maker
                # A node that several inside read is looked at again from the last of them.
                pending.extend(maker.inputs)
        return sorted(found.values(), key=lambda each: self._order[id(each)])

    def _branch(self, node: Node, end: Tensor, skip: Tensor, inside: list[Node]) -> Branch:
        gone = {id(each) for each in inside}
        constants = dict.fromkeys(
            tensor.name
            for each in inside
            for tensor in each.inputs
            if isinstance(tensor, Constant) and id(tensor) not in self._fixed
            if all(id(reader) in gone for reader in tensor.outputs)
        )
        return Branch(
            node.outputs[0].name,
            skip.name,
            end.name,
            tuple(each.outputs[0].name for each in inside),
            tuple(constants),
            self._channels(inside, end, node),
            node.label,
        )

    def _channels(self, inside: list[Node], end: Tensor, node: Node) -> int | None:
        """The channel axis of the last layer of a branch, if what is behind it can be followed."""
        tensor, rank = end, len(self._dims.shape(node.outputs[0]) or ())
        makers = {id(each) for each in inside}
        moved: list[Sequence[int]] = []
        while (maker := ir.producer(tensor)) is not None and id(maker) in makers:
            layer = layer_of(maker)
            if isinstance(layer, Layer):
                axis = _followed(layer.axis + rank, moved)
                return axis - rank if len(self._dims.shape(end) or ()) == rank and axis >= 0 else None
            computed = [each for each in maker.inputs if each.inputs and id(each.inputs[0]) in makers]
            if len(computed) != 1 or not _keeps_places(maker):
                return None
            if maker.op == "Transpose":
                moved.append(maker.attrs.get("perm") or range(rank)[::-1])
            tensor = computed[0]
        return None


def _keeps_places(node: Node) -> bool:
    """Whether channels of what it reads are still told apart in what it makes."""
    passed_on = Trait.ELEMENTWISE | Trait.COPIES
    known = bool(spec_of(node).traits & passed_on) or spec_of(node).norm_axis is not None
    return node.domain in DEFAULT_DOMAINS and (known or node.op == "Transpose")


def _followed(axis: int, moved: Sequence[Sequence[int]]) -> int:
    """Where an axis comes out behind Transposes, the last one first; negative if it is none of theirs."""
    for perm in reversed(moved):
        if axis not in perm:
            return -1
        axis = list(perm).index(axis)
    return axis
