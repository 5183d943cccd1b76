"""Which layers to refit, for which goal, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.errors import UsageError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model, constant_of
from onnxslim.ops import layer_of, spec_of
from onnxslim.ops.layers import Layer, per_channel
from onnxslim.passes.repair.jobs import Affine, Job, Linear, RefitGoal, Slot, goals

MATCHES = ("Add", "Mul")
# Shifts beyond this are attention masks.
_MASK = 1e3


@dataclass(frozen=True)
class Refit:
    """A layer that may be refitted, and its goals, nearest first."""

    layer: Layer
    goals: tuple[RefitGoal, ...]


def schedule(
    student: Model, teacher: Model, clean: set[str], layers: Collection[str] | None, log: Log
) -> list[list[Job]]:
    """The jobs of each stage; those of one stage do not depend on each other.

    Args:
        student, teacher: not modified.
        clean: tensors of the student that are the teacher's, see `unchanged`.
        layers: output tensors of the layers to refit; None for all whose input has changed.
        log: told what is left alone.

    Raises:
        UsageError: a name in `layers` is not that of a layer.
    """
    _require_known(student, layers)
    known = {tensor.name for node in teacher.graph.nodes for tensor in node.outputs}
    found, taken = _linear(student, clean, known, layers, log)
    affine = list(_affine(student, clean, known, layers, taken))
    if layers is None:
        _note_bodies(student, log)
    return _scheduled(student.graph, found, affine)


def unchanged(student: Model, teacher: Model) -> set[str]:
    """Names of the tensors that both models compute in the same way from the same inputs."""
    twins = {tensor.name: node for node in teacher.graph.nodes for tensor in node.outputs if tensor.name}
    inputs = {tensor.name for tensor in teacher.graph.inputs}
    same = {tensor.name for tensor in student.graph.inputs} & inputs
    if student.opsets != teacher.opsets:  # the same node may mean something else
        return same
    for node in student.graph.nodes:
        twin = twins.get(node.outputs[0].name) if node.outputs else None
        if twin is not None and _alike(node, twin, same):
            same.update(tensor.name for tensor in node.outputs if tensor.name)
    return same


def _alike(node: Node, twin: Node, same: set[str]) -> bool:
    if (node.op, node.domain) != (twin.op, twin.domain):
        return False
    if [out.name for out in node.outputs] != [out.name for out in twin.outputs]:
        return False
    if node.attrs.keys() != twin.attrs.keys() or len(node.inputs) != len(twin.inputs):
        return False
    if not all(bool(value == twin.attrs[name]) for name, value in node.attrs.items()):
        return False
    return all(_same_tensor(a, b, same) for a, b in zip(node.inputs, twin.inputs, strict=True))


def _same_tensor(one: Tensor, other: Tensor, same: set[str]) -> bool:
    if isinstance(one, Constant) and isinstance(other, Constant):
        if one.proto is not None and one.proto is other.proto:
            return True
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and (one.values is other.values or bool(np.array_equal(one.values, other.values)))
    return type(one) is type(other) and one.name == other.name and (not one.name or one.name in same)


# ------------------------------------------------------------------------------------------- layers


def _linear(
    student: Model, clean: set[str], known: set[str], layers: Collection[str] | None, log: Log
) -> tuple[list[Refit], set[int]]:
    """Layers to refit, and ids of the nodes behind layers that belong to them."""
    found: list[Refit] = []
    taken: set[int] = set()
    for node in student.graph.nodes:
        layer = layer_of(node)
        if layer is None or not isinstance(node.inputs[0], Variable):
            continue
        names = {node.outputs[0].name}
        if isinstance(layer, Layer):
            steps = tuple(goals(layer, student.graph))
            names |= {goal.tensor for goal in steps if goal.other is None}
        if (node.inputs[0].name in clean) if layers is None else not names.intersection(layers):
            if isinstance(layer, Layer):
                taken.update(id(each) for goal in steps if not goal.other for each in goal.nodes)
            continue
        reason = layer if isinstance(layer, str) else _hindrance(layer, steps, known)
        if reason or isinstance(layer, str):
            log.skip(node.label, reason or "")
            continue
        reached = tuple(goal for goal in steps if goal.tensor in known)
        own = [goal for goal in reached if not goal.other] or list(reached)
        taken.update(id(each) for each in own[-1].nodes)
        found.append(Refit(layer, reached))
    return found, taken


def _hindrance(layer: Layer, steps: Sequence[RefitGoal], known: set[str]) -> str | None:
    """Why a layer cannot be refitted."""
    weight = layer.node.inputs[1]
    readers = [node for node in weight.outputs if node is not layer.node]
    if readers or len(weight.outputs) > 1:
        return f"its weight is shared with '{readers[0].label if readers else layer.label}'"
    if not steps:
        return "its bias is not one constant per channel"
    if not any(goal.tensor in known for goal in steps):
        return f"the original model has no tensor '{layer.node.outputs[0].name}' to compare with"
    return None


def _require_known(student: Model, layers: Collection[str] | None) -> None:
    made = {tensor.name for node in student.graph.nodes for tensor in node.outputs}
    for name in layers or ():
        if name not in made:
            raise UsageError(f"cannot repair '{name}': no node of the main graph makes a tensor of this name")


def _note_bodies(student: Model, log: Log) -> None:
    for graph in student.graphs():
        if graph is student.graph:
            continue
        for node in graph.nodes:
            if isinstance(layer_of(node), Layer):
                log.skip(node.label, "it is in the body of a control-flow node")


# --------------------------------------------------------------------------------- scales and shifts


def _affine(
    student: Model, clean: set[str], known: set[str], layers: Collection[str] | None, taken: set[int]
) -> Iterator[Affine]:
    """Scales and shifts per channel that belong to no layer."""
    used = set(taken)
    for node in student.graph.nodes:
        if id(node) in used or node.domain not in DEFAULT_DOMAINS or not node.outputs:
            continue
        axis = spec_of(node).norm_axis
        job = _elementwise(node) if axis is None else _normalization(node, axis)
        if job is None or job.goal.tensor not in known:
            continue
        used.update(id(each) for each in job.peeked)
        data = [tensor.name for tensor in node.inputs if isinstance(tensor, Variable) and tensor.name]
        names = {each.outputs[0].name for each in job.peeked}
        if not all(name in clean for name in data) if layers is None else names.intersection(layers):
            yield job


def _normalization(node: Node, axis: int) -> Affine | None:
    scale, bias = constant_of(node.input(1)), constant_of(node.input(2))
    if scale is None or scale.ndim != 1 or (node.input(2) is not None and bias is None):
        return None
    if node.attrs.get("training_mode", 0) or node.attrs.get("num_groups") == scale.size:
        return None  # until opset 20, a GroupNormalization has one scale per group
    if bias is not None and bias.shape != scale.shape:
        return None
    slot = Slot(node, 2, np.ones(scale.size)) if bias is not None else None
    goal = RefitGoal(node.outputs[0].name, np.ones(scale.size), np.zeros(scale.size), slot)
    return Affine(node, goal, axis, (node, 1), (node,))


def _elementwise(node: Node) -> Affine | None:
    """A Mul by one constant per channel, with the Add behind it if it has one; or such an Add alone."""
    found = _vector(node) if node.op in ("Mul", "Add") else None
    if found is None:
        return None
    index, axis, size = found
    ones, zeros, out = np.ones(size), np.zeros(size), node.outputs[0]
    if node.op == "Add":
        return Affine(node, RefitGoal(out.name, ones, zeros, Slot(node, index, ones)), axis, None, (node,))
    after = out.outputs[0] if len(out.outputs) == 1 else None
    if after is not None and after.op == "Add" and (behind := _vector(after)) is not None:
        position, *rest = behind
        if rest == [axis, size]:
            goal = RefitGoal(after.outputs[0].name, ones, zeros, Slot(after, position, ones))
            return Affine(node, goal, axis, (node, index), (node, after))
    return Affine(node, RefitGoal(out.name, ones, zeros, None), axis, (node, index), (node,))


def _vector(node: Node) -> tuple[int, int, int] | None:
    """Of an operand with one constant per channel: its index, its channel axis from the end, its size."""
    for index, tensor in enumerate(node.inputs[:2]):
        values = constant_of(tensor)
        if values is None or values.dtype not in (np.float16, np.float32) or values.size < 2:
            continue
        axis = int(np.argmax(values.shape)) - values.ndim
        vector = axis in (-1, -3) and per_channel(values, axis, values.size) is not None
        if vector and np.abs(values).max() < _MASK and isinstance(node.inputs[1 - index], Variable):
            return index, axis, values.size
    return None


# ----------------------------------------------------------------------------------------- schedule


def _scheduled(graph: Graph, layers: Sequence[Refit], affine: Sequence[Affine]) -> list[list[Job]]:
    """Jobs by stage.

    A sum's other operand can be taken into account only if nothing before it is still to be refitted. Where
    layers meet in a sum, that is so for the last one in order of depth.
    """
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    sites: list[Refit | Affine] = sorted((*layers, *affine), key=lambda each: position[id(_site(each))])
    masks, before = _ancestors(graph, {id(_site(each)): index for index, each in enumerate(sites)})
    depth: list[int] = []
    for each in sites:
        depth.append(max((depth[i] + 1 for i in _bits(before[id(_site(each))])), default=0))
    stage = [0] * len(sites)
    ready, jobs = 0, list[list[Job]]()
    for index in sorted(range(len(sites)), key=lambda i: (depth[i], i)):
        each, needed = sites[index], before[id(_site(sites[index]))]
        if isinstance(each, Refit):
            goal = _reachable(each.goals, masks, ready)
            needed |= masks.get(goal.other, 0) if goal.other else 0
            job: Job = Linear(each.layer, goal)
        else:
            job = each
        stage[index] = max((stage[i] + 1 for i in _bits(needed)), default=0)
        jobs.extend([] for _ in range(len(jobs), stage[index] + 1))
        jobs[stage[index]].append(job)
        ready |= 1 << index
    return jobs


def _site(each: Refit | Affine) -> Node:
    return each.layer.node if isinstance(each, Refit) else each.node


def _reachable(steps: Sequence[RefitGoal], masks: Mapping[str, int], ready: int) -> RefitGoal:
    """The farthest goal for which everything needed has been refitted."""
    for goal in reversed(steps):
        if goal.other is None or not masks.get(goal.other, 0) & ~ready:
            return goal
    return steps[0]


def _ancestors(graph: Graph, sites: Mapping[int, int]) -> tuple[dict[str, int], dict[int, int]]:
    """Bit sets of the jobs that tensors (by name) and nodes with jobs (by id) depend on."""
    masks: dict[str, int] = {}
    before: dict[int, int] = {}
    for node in graph.nodes:
        mask = 0
        for tensor in (*node.inputs, *ir.captures(node)) if node.bodies else node.inputs:
            mask |= masks.get(tensor.name, 0)
        if id(node) in sites:
            before[id(node)] = mask
            mask |= 1 << sites[id(node)]
        masks.update((tensor.name, mask) for tensor in node.outputs if tensor.name)
    return masks, before


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
