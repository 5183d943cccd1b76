"""Removing slices: every axis, every attribute and every constant of sizes that has to follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TypeAlias, TypeGuard

import numpy as np

from onnxslim import shapes
from onnxslim.engine.base import Context
from onnxslim.families.analysis import Analysis
from onnxslim.families.removal import Removal
from onnxslim.ir.graph import (
    Array,
    Constant,
    Namer,
    Node,
    Tensor,
    Variable,
    detach,
    producer,
    replace_uses,
    sweep,
)
from onnxslim.ir.model import Model
from onnxslim.ir.proto import forget_shards
from onnxslim.ops import Trait, has, spec_of
from onnxslim.ops.channels.cut import Cut, Masks
from onnxslim.ops.channels.size_vectors import TARGETS, Sizes
from onnxslim.passes.dedupe import signature
from onnxslim.passes.fold import Fold
from onnxslim.passes.fold.weights import restore_zeros

Twins: TypeAlias = list[tuple[Tensor, Tensor]]


def prepare(model: Model) -> Twins:
    """Fold what is constant, which shapes often depend on, and undo sharing that would tie layers."""
    restore_zeros(model)
    Fold().run(model, Context())
    free = Namer(model.graph)
    for node in model.graph.nodes:
        channels = spec_of(node).channels
        if channels is not None and channels.ready is not None:
            channels.ready(node, free)
    return unshare(model)


def unshare(model: Model) -> Twins:
    """Give every reader of a vector its own copy, of a constant as well as of computed sizes.

    Simplifiers merge equal biases and equal shapes of layers that have nothing else in common; a cut must not
    tie those layers. Shared matrices are meant to be shared (tied embeddings) and stay so.

    Returns:
        Tensors with their copies, for `reshare`.
    """
    free = Namer(model.graph)
    twins: Twins = []
    seen: set[int] = {id(tensor) for tensor in model.graph.outputs}
    nodes: list[Node] = []
    for node in model.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if id(tensor) in seen and _is_vector(tensor):
                node.inputs[index] = Constant(free(tensor.name), tensor.values)
                twins.append((tensor, node.inputs[index]))
            elif id(tensor) in seen and TARGETS.get(node.op) == index and _is_only_output(tensor):
                nodes.append(_twin(tensor.inputs[0], tensor, free))
                node.inputs[index] = nodes[-1].outputs[0]
                twins.append((tensor, node.inputs[index]))
            seen.add(id(tensor))
        nodes.append(node)
    model.graph.nodes[:] = nodes
    return twins


def reshare(model: Model, twins: Twins) -> None:
    """Put together again what is still equal, so that a model does not grow by what was not cut apart."""
    gone: set[int] = set()
    for tensor, twin in twins:
        if tensor.outputs and twin.outputs and _is_same(tensor, twin):
            replace_uses(twin, tensor)
            for node in twin.inputs:
                gone.add(id(node))
                detach(node)
    sweep(model.graph, gone)


def _is_same(tensor: Tensor, twin: Tensor) -> bool:
    if isinstance(tensor, Constant) and isinstance(twin, Constant):
        return tensor.shape == twin.shape and bool(np.array_equal(tensor.values, twin.values))
    maker, other = producer(tensor), producer(twin)
    return maker is not None and other is not None and signature(maker) == signature(other) is not None


def _is_vector(tensor: Tensor) -> TypeGuard[Constant]:
    return isinstance(tensor, Constant) and sum(size > 1 for size in tensor.shape) == 1


def _is_only_output(tensor: Tensor) -> bool:
    return bool(tensor.inputs) and len(tensor.inputs[0].outputs) == 1


def _twin(node: Node, tensor: Tensor, free: Namer) -> Node:
    output = Variable(free(tensor.name), tensor.dtype, tensor.shape)
    return Node(node.op, free(node.name), node.attrs, list(node.inputs), [output], node.domain)


def cut(model: Model, removal: Removal) -> None:
    """Remove units from a model.

    Args:
        model: edited in place; the analyzed model or a copy of it.
        removal: from it.
    """
    masks = removal.masks
    changed = {name for name, _ in masks}
    free = Namer(model.graph)
    shape = _shapes(model, removal.analysis)
    for node in model.graph.nodes:
        channels = spec_of(node).channels
        if channels is not None and channels.cut is not None and _touches(node, changed):
            channels.cut(Cut(node, shape, masks, free, model.opset))
        ranks = {tensor.name: len(shape(tensor) or ()) for tensor in (*node.inputs, *node.outputs)}
        forget_shards(node, partial(_is_cut, masks, ranks))
    for constant, axis, kept in _masked(model, masks):
        constant.values = np.compress(kept, constant.values, axis)
    _forget_shapes(model, masks)


def _is_cut(masks: Masks, ranks: Mapping[str, int], name: str, axis: int) -> bool:
    """Whether an axis of a tensor, which may be counted from behind, loses slices."""
    return (name, axis % ranks[name]) in masks if ranks.get(name) else False


def _touches(node: Node, changed: set[str]) -> bool:
    return any(tensor.name in changed for tensor in (*node.inputs, *node.outputs))


def zero(model: Model, removal: Removal) -> None:
    """Set to zero what layers would read of the slices that a cut removes: the model the cut has to equal."""
    weights = _weights(model)
    for constant, axis, kept in _masked(model, removal.masks):
        if id(constant) in weights:
            constant.values = _zeroed(constant.values, axis, ~kept, weights[id(constant)])


def _keeps_zeros(node: Node) -> bool:
    """Whether zeros of what it reads are zeros of what it makes, wherever they go."""
    return has(node, Trait.KEEPS_ZEROS)


def _weights(model: Model) -> dict[int, Array]:
    """What stands for zero in each constant that a layer weights its data with, by its id."""
    found: dict[int, Array] = {}
    layers = (node for node in model.graph.nodes if spec_of(node).macs is not None)
    pending = [tensor for node in layers for tensor in node.inputs]
    seen: set[int] = set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        maker = tensor.inputs[0] if tensor.inputs else None
        if isinstance(tensor, Constant) and tensor.dtype.kind in "fV":
            found[id(tensor)] = np.zeros((), tensor.dtype)
        elif maker is not None and has(maker, Trait.DEQUANTIZES):
            found[id(maker.inputs[0])] = _code_of_zero(maker)
        elif maker is not None and _keeps_zeros(maker):
            pending.extend(maker.inputs)
    return found


def _code_of_zero(node: Node) -> Array:
    """The zero point, as long as its axis is long and 1 elsewhere."""
    values, point = node.inputs[0], node.constant(2)
    rank = len(values.shape or ())
    if point is None or point.ndim != 1 or point.size == 1:
        return np.asarray(0 if point is None else point.reshape(-1)[0])
    shape = [1] * rank
    shape[node.attrs.get("axis", 1) % rank] = point.size
    return point.reshape(shape)


def _zeroed(values: Array, axis: int, gone: Array, code: Array) -> Array:
    shape = [1] * values.ndim
    shape[axis] = gone.size
    return np.where(gone.reshape(shape), code, values).astype(values.dtype)


def _shapes(model: Model, analysis: Analysis) -> Sizes:
    constants = {id(tensor): tensor.shape for tensor in _constants(model)}

    def shape(tensor: Tensor) -> tuple[int, ...] | None:
        if isinstance(tensor, Constant):
            return constants.get(id(tensor), tensor.shape)
        return analysis.sizes.get(tensor.name)

    return shape


def _constants(model: Model) -> Iterator[Constant]:
    found = {id(tensor): tensor for node in model.graph.nodes for tensor in node.inputs}
    found |= {id(tensor): tensor for tensor in (*model.graph.initializers.values(), *model.graph.outputs)}
    yield from (tensor for tensor in found.values() if isinstance(tensor, Constant))


def _masked(model: Model, masks: Masks) -> Iterator[tuple[Constant, int, Array]]:
    by_name = {constant.name: constant for constant in _constants(model)}
    for (name, axis), kept in masks.items():
        if name in by_name:
            yield by_name[name], axis, kept


def _forget_shapes(model: Model, masks: Masks) -> None:
    """What was declared of tensors that lost slices is not true any more; infer that of inner ones anew."""
    for tensor in (*model.graph.inputs, *model.graph.outputs):
        if isinstance(tensor, Variable) and tensor.shape is not None:
            left = [masks.get((tensor.name, axis)) for axis in range(len(tensor.shape))]
            tensor.shape = tuple(
                size if kept is None else int(kept.sum())
                for size, kept in zip(tensor.shape, left, strict=True)
            )
    changed = {name for name, _ in masks}
    fixed = {id(tensor) for tensor in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            if isinstance(tensor, Variable) and tensor.name in changed and id(tensor) not in fixed:
                tensor.shape, tensor.proto = None, None
    shapes.infer(model)
