"""Sizes that are known although the tensor is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Node, Variable
from onnxslim.ir.model import is_literal
from onnxslim.ops import Trait, has
from onnxslim.passes.fold.edits import Edits
from onnxslim.shapes.dims import Dims
from onnxslim.shapes.symbols import Term


def is_sizing(node: Node) -> bool:
    """Whether sizes may be all it takes to simplify this node."""
    return has(node, Trait.MEASURES) or (node.op in _TARGETED and not _has_known_target(node))


def _has_known_target(node: Node) -> bool:
    target = node.input(1)
    return target is None or isinstance(target, Constant) or is_literal(ir.producer(target))


def fold_sizes(edits: Edits, dims: Dims) -> bool:
    """Replace integers that are known although the tensors whose sizes they are are not."""
    known: dict[int, Array] = {}
    nodes: dict[int, Node] = {}
    for node in edits.model.nodes():
        if len(node.outputs) == 1 and not is_literal(node):
            vector = dims.value(node.outputs[0])
            values = vector.array() if vector is not None else None
            if values is not None and edits.can_store(node.outputs[0], values.dtype):
                nodes[id(node)] = node
                known[id(node.outputs[0])] = values
    needed = {
        id(tensor): known[id(tensor)]
        for node in nodes.values()
        for tensor in node.outputs
        if id(tensor) in edits.fixed or any(id(reader) not in nodes for reader in tensor.outputs)
    }
    edits.replace(nodes.values(), needed)
    return bool(nodes)


def settle_targets(edits: Edits, dims: Dims) -> bool:
    """Give Reshape and Expand nodes constant targets where those can be stated."""
    changed = False
    for graph in edits.model.graphs():
        for node in graph.nodes:
            rule = _TARGETED.get(node.op)
            if rule is None or not edits.is_standard(node) or _has_known_target(node):
                continue
            target = rule(node, dims)
            if target is not None:
                edits.log.change(node.label, f"target shape stated as {target}", node.op)
                values = np.array(target, np.int64)
                # Zeros of a stated target copy.
                node.attrs.pop("allowzero", None)
                edits.set_constant(node, 1, f"{node.outputs[0].name}_shape", values, graph)
                changed = True
    return changed


def _reshape_target(node: Node, dims: Dims) -> list[int] | None:
    sizes = dims.sizes(node.outputs[0])
    if sizes is not None and 0 not in sizes:
        return list(sizes)
    wanted = dims.value(node.inputs[1])
    if wanted is None or wanted.scalar or None in wanted.terms:
        return None
    if node.attrs.get("allowzero") and 0 in wanted.terms:
        return None
    return _stated(wanted.terms, dims.shape(node.inputs[0]) or ())


def _stated(wanted: Sequence[Term | None], own: Sequence[Term]) -> list[int] | None:
    """A target with 0 for sizes that are kept and -1 for one that follows from the others.

    -1 is right only beside sizes that are not zero: an empty tensor does not say what it stands for. The
    -1 of the model itself stays: beside it the standard allows no size of zero, unless it is copied.
    """
    target: list[int] = []
    unknown: list[int] = []
    for axis, term in enumerate(wanted):
        if isinstance(term, int):
            target.append(term)
        elif axis < len(own) and own[axis] == term:
            target.append(0)
        else:
            unknown.append(axis)
            target.append(-1)
    others = [size for axis, size in enumerate(target) if axis not in unknown]
    right = not unknown or (len(unknown) == 1 and all(size > 0 for size in others))
    return target if right else None


def share_sizes(edits: Edits, dims: Dims) -> bool:
    """Let integers that are sizes of one tensor stand for those that are the same sizes of others."""
    shadowed, _ = ir.shadowing(edits.model.graph)
    changed = False
    for graph in edits.model.graphs():
        first: dict[Any, Variable] = {}
        for node in graph.nodes:
            vector = dims.value(node.outputs[0]) if len(node.outputs) == 1 and node.inputs else None
            if vector is None or None in vector.terms or vector.numbers is not None:
                continue
            tensor = node.outputs[0]
            same = first.setdefault(vector, tensor)
            if same is not tensor and tensor.outputs and same.name not in shadowed:
                edits.log.change(node.label, f"replaced by '{same.name}', which is equal", node.op)
                ir.replace_uses(tensor, same)
                edits.release(node)
                changed = True
    return changed


def _expand_target(node: Node, dims: Dims) -> list[int] | None:
    sizes = dims.sizes(node.outputs[0])
    if sizes is not None:
        return list(sizes)
    wanted, own = dims.value(node.inputs[1]), dims.shape(node.inputs[0])
    if wanted is None or wanted.scalar or own is None:
        return None
    # Aligned at the end; 1 keeps the size of the input.
    padded = (*(None,) * (len(wanted.terms) - len(own)), *own)[-len(wanted.terms) :]
    target = [
        term if isinstance(term, int) else 1
        for term, size in zip(wanted.terms, padded, strict=True)
        if isinstance(term, int) or (term is not None and term == size)
    ]
    return target if len(target) == len(wanted.terms) else None


_TARGETED = {"Reshape": _reshape_target, "Expand": _expand_target}
MATCHES = frozenset(_TARGETED)
