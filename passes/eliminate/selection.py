"""What is picked of a result is picked of what it is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Constant, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS
from onnxslim.ops import Role, Trait, has, spec_of
from onnxslim.passes import predicates

# Inputs of a node that have a given axis of its output, and which of their axes that is.
_Axes = dict[int, int]


@dataclass(frozen=True)
class Region:
    """Nodes of whose results only what a Gather picks is used.

    Attributes:
        gather: the Gather.
        axis: of its data.
        axes: by id of a tensor, the axis along which it is picked.
        nodes: those that compute them, a reader before the makers of what it reads, and their inputs with
            that axis.
    """

    gather: Node
    axis: int
    axes: dict[int, int]
    nodes: list[tuple[Node, _Axes]]


class SelectFirst(Rule[Region]):
    """A Gather with constant indices moves before products, normalizations and functions of single values.

    Networks that read one token off a sequence compute the last block for that token alone.
    """

    name = "select-first"
    ops = frozenset(("Gather",))
    matches = frozenset(("LogSoftmax", "MatMul", "Reshape", "Softmax", "Transpose"))
    makes = frozenset(("Gather", "Identity", "Squeeze"))

    def pattern(self, node: Node, edit: Editor) -> Region | None:
        indices, shape = predicates.constant(node, 1), edit.shape(node.inputs[0])
        if indices is None or indices.ndim > 1 or not indices.size or not shape:
            return None
        axis = int(node.attrs.get("axis", 0)) % len(shape)
        size = shape[axis]
        if (indices.size if size is None or isinstance(size, str) else size) <= indices.size > 1 or size == 1:
            return None
        region = Region(node, axis, {id(node.inputs[0]): axis}, [])
        _grow(region, edit)
        return region if any(_is_product(each) for each, _ in region.nodes) else None

    def check(self, match: Region, edit: Editor) -> str | None:
        own = {each.name for each in edit.model.shell.functions if each.domain in DEFAULT_DOMAINS}
        taken = [each.op for each, _ in match.nodes if each.op in own]
        return f"{taken[0]} is a function of the model's own" if taken else None

    def rewrite(self, match: Region, edit: Editor) -> str:
        gather = match.gather
        indices = predicates.constant(gather, 1)
        assert indices is not None
        picked: dict[int, Tensor] = {}
        positions = edit.constant(f"{gather.inputs[1].name}_vector", indices.reshape(-1))
        for node, inputs in reversed(match.nodes):
            read = list(node.inputs)
            for index, axis in inputs.items():
                read[index] = _picked(read[index], axis, positions, picked, gather, edit)
            if node.op == "Reshape":
                read[1] = _target(node, match.axes[id(node.outputs[0])], indices.size, edit)
            old = node.outputs[0]
            new = edit.variable(f"{old.name}_picked", old)
            edit.add(gather, node.op, read, [new], node.attrs, name=f"{node.name or node.op}_picked")
            picked[id(old)] = new
        found = picked[id(gather.inputs[0])]
        if indices.ndim:
            edit.replace_node(gather, "Identity", [found])
        elif edit.opset < 13:
            edit.replace_node(gather, "Squeeze", [found], {"axes": (match.axis,)})
        else:
            axes = edit.constant(f"{gather.outputs[0].name}_axes", np.array([match.axis], np.int64))
            edit.replace_node(gather, "Squeeze", [found, axes])
        return f"picked before {len(match.nodes)} nodes instead of behind them"


def _picked(
    tensor: Tensor, axis: int, positions: Constant, picked: dict[int, Tensor], gather: Node, edit: Editor
) -> Tensor:
    """A tensor with the positions picked alone; where it is made from is given a Gather."""
    if id(tensor) not in picked:
        new = edit.variable(f"{tensor.name}_picked", tensor)
        edit.add(gather, "Gather", [tensor, positions], [new], {"axis": axis})
        picked[id(tensor)] = new
    return picked[id(tensor)]


def _target(node: Node, axis: int, count: int, edit: Editor) -> Tensor:
    """The target of a Reshape whose output has `count` positions along an axis."""
    target = predicates.constant(node, 1)
    assert target is not None
    if target[axis] <= 0:
        return node.inputs[1]
    changed = target.copy()
    changed[axis] = count
    return edit.constant(f"{node.inputs[1].name}_picked", changed)


def _grow(region: Region, edit: Editor) -> None:
    """Add nodes as long as there are any all of whose readers pick."""
    inside: dict[int, _Axes] = {id(region.gather): {0: region.axis}}
    pending: list[Tensor] = [region.gather.inputs[0]]
    settled = False
    while not settled:
        settled = True
        for tensor in list(pending):
            axis = region.axes[id(tensor)]
            node = _maker(tensor, edit)
            if node is None or edit.home(node) is not edit.home(region.gather):
                continue
            uses = [
                (id(reader), index)
                for reader in dict.fromkeys(tensor.outputs)
                for index in _uses(reader, tensor)
            ]
            inputs = _along(node, axis, edit)
            if inputs is None or any(inside.get(reader, {}).get(index) != axis for reader, index in uses):
                continue
            reached = {id(node.inputs[index]): along for index, along in inputs.items()}
            if any(region.axes.get(key, along) != along for key, along in reached.items()):
                continue
            pending.remove(tensor)
            pending += [each for each in node.inputs if id(each) in reached and id(each) not in region.axes]
            inside[id(node)] = inputs
            region.axes.update(reached)
            region.nodes.append((node, inputs))
            settled = False


def _maker(tensor: Tensor, edit: Editor) -> Node | None:
    if not isinstance(tensor, Variable) or not tensor.inputs or edit.is_output(tensor):
        return None
    node = tensor.inputs[0]
    made = [each for each in node.outputs if each.name]
    return node if made == [tensor] and node.domain in DEFAULT_DOMAINS else None


def _uses(reader: Node, tensor: Tensor) -> Iterator[int]:
    """At which inputs a node reads a tensor; -1 if a body of it does."""
    found = [index for index, each in enumerate(reader.inputs) if each is tensor]
    yield from found or [-1]


def _is_product(node: Node) -> bool:
    return spec_of(node).role is Role.LINEAR and isinstance(node.input(1), Constant)


def _along(node: Node, axis: int, edit: Editor) -> _Axes | None:
    """Which inputs have an axis of the output; None if positions along it are not computed one by one."""
    shape = edit.shape(node.outputs[0])
    if shape is None:
        return None
    rank = len(shape)
    if node.op == "MatMul":
        return _rows(node, axis, rank, edit)
    if node.op == "Transpose":
        perm = node.attrs.get("perm") or tuple(reversed(range(rank)))
        return {0: perm[axis]}
    if node.op == "Reshape":
        source, target = edit.shape(node.inputs[0]), predicates.constant(node, 1)
        same = source is not None and source[: axis + 1] == shape[: axis + 1]
        return {0: axis} if same and target is not None and None not in shape[: axis + 1] else None
    if node.op in ("Softmax", "LogSoftmax"):
        return {0: axis} if edit.opset >= 13 and int(node.attrs.get("axis", -1)) % rank != axis else None
    if spec_of(node).norm_axis == -1:
        return (
            {0: axis}
            if int(node.attrs.get("axis", -1)) % rank > axis and _narrow(node, axis, rank, edit)
            else None
        )
    return _aligned(node, axis, edit) if has(node, Trait.ELEMENTWISE) else None


def _rows(node: Node, axis: int, rank: int, edit: Editor) -> _Axes | None:
    """Of a product, an axis of the left operand that the right one does not have."""
    left, right = (edit.shape(each) for each in node.inputs)
    if left is None or right is None or len(left) != rank or len(right) < 2:
        return None
    return {0: axis} if axis == rank - 2 or (axis < rank - 2 and len(right) == 2) else None


def _narrow(node: Node, axis: int, rank: int, edit: Editor) -> bool:
    """Whether scale and bias do not reach as far as an axis."""
    shapes = [edit.shape(each) for each in node.inputs[1:] if each.name]
    return all(each is not None and len(each) < rank - axis for each in shapes)


def _aligned(node: Node, axis: int, edit: Editor) -> _Axes | None:
    """Of operands aligned from the right, those that are not stretched along an axis."""
    shape, found = edit.shape(node.outputs[0]), _Axes()
    assert shape is not None
    for index, tensor in enumerate(node.inputs):
        operand = edit.shape(tensor)
        if not tensor.name:
            continue
        if operand is None:
            return None
        at = axis - (len(shape) - len(operand))
        if at < 0 or operand[at] == 1:
            continue
        if operand[at] is None or operand[at] != shape[axis]:
            return None
        found[index] = at
    return found or None


RULES = (SelectFirst(),)
