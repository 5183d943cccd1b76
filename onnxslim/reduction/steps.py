"""Ways to make a model smaller, whatever becomes of what it computes.

Each has sites in an order, and edits a copy at some of them. What was idle before an edit stays, as that may
be what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np
import onnx

from onnxslim import shapes
from onnxslim.engine.base import Context
from onnxslim.engine.editor import Editor
from onnxslim.ir import graph as ir
from onnxslim.ir import proto
from onnxslim.ir.graph import Array, Constant, Graph, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model, constant_of, is_literal
from onnxslim.passes import dead
from onnxslim.passes.eliminate.control import If
from onnxslim.passes.fold.literals import store_literals
from onnxslim.passes.inline import Inline
from onnxslim.shapes import Fact

# Integers up to so many are sizes, axes and the like: what the model does, and not what it has learnt.
MAX_STRUCTURE = 16

MATCHES = ("If",)

Types: TypeAlias = Mapping[str, Fact]


@dataclass(frozen=True)
class Shrinker:
    """A way to make a model smaller.

    Attributes:
        sites: where, in order.
        shrink: edits a model at some of its sites; False if that cannot be.
    """

    sites: Callable[[Model], Sequence[Any]]
    shrink: Callable[[Model, Sequence[Any]], bool | None]

    def tried(self, model: Model, at: slice) -> Model | None:
        """A copy that is smaller by the sites in this place; None where that cannot be."""
        twin = model.copy()
        sites = self.sites(twin)[at]
        return twin if sites and self.shrink(twin, sites) is not False else None


def shrinkers(model: Model) -> tuple[tuple[Shrinker, ...], tuple[Shrinker, ...]]:
    """What to try first, at all sites at once, and what to try in turn until nothing changes."""
    types, origin = _types(model), values(model)
    notes = Shrinker(lambda _: (None,), lambda model, _: _drop_notes(model))
    inside = (
        Shrinker(_literals, lambda model, _: store_literals(model)),
        Shrinker(_learnt, _feed),
        Shrinker(_learnt, lambda model, sites: _fill(model, sites, origin, _one_value)),
        Shrinker(_learnt, lambda model, sites: _fill(model, sites, origin, _drawn)),
    )
    parts = (
        Shrinker(lambda model: list(enumerate(model.graph.outputs)), _drop_outputs),
        Shrinker(lambda model: list(model.graph.nodes), lambda model, gone: _cut(model, gone, types)),
        Shrinker(lambda model: model.shell.functions, lambda model, _: bool(Inline().run(model, Context()))),
        Shrinker(_branches, _take_branches),
        Shrinker(_inner, lambda model, gone: _cut(model, gone, types)),
        Shrinker(lambda model: list(model.nodes()), _bypass),
        Shrinker(_unread, lambda model, gone: _drop_unread(model, _idle(model) - set(map(id, gone)))),
    )
    rest = Shrinker(lambda _: (None,), lambda model, _: bool(dead.Dead().run(model, Context())))
    return (notes, *inside), (*parts, *inside, rest, notes)


def values(model: Model) -> dict[str, Constant]:
    """The constants with values that are learnt, by name, those in nodes and functions included."""
    plain = model.copy()
    try:
        Inline().run(plain, Context())
        store_literals(plain)
    except Exception:  # they may be what is wrong
        plain = model
    return {constant.name: constant for constant in _learnt(plain)}


def kept(model: Model, origin: Mapping[str, Constant]) -> list[str]:
    """What in a model still holds values that the original has learnt: constants, nodes and functions."""
    same = [each.name for each in _learnt(model) if _equal(each, origin.get(each.name, each))]
    told = [node.label for node in model.nodes() if any(map(_tells, node.attrs.values()))]
    return [*same, *told, *(function.name for function in model.shell.functions)]


def _learnt(model: Model) -> list[Constant]:
    """Constants whose values say more than what the model does: floats, and many integers, not all equal."""
    return [each for each in model.constants() if _is_long(each.dtype, each.size) and _differ(each.peek())]


def _is_long(dtype: np.dtype[Any] | None, size: int) -> bool:
    return size > (MAX_STRUCTURE if dtype is not None and dtype.kind in "iub" else 1)


def _differ(values: Array) -> bool:
    first = values.flat[0]
    return bool((values.flat[:MAX_STRUCTURE] != first).any() or (values != first).any())


def _equal(one: Constant, other: Constant) -> bool:
    return one.shape == other.shape and np.array_equal(one.peek(), other.peek())


def _tells(value: Any) -> bool:
    """Whether an attribute holds more than says what a node does."""
    if isinstance(value, onnx.AttributeProto):
        tensors = (value.t, value.sparse_tensor.values)
        return any(_is_long(proto.dtype_of(each.data_type), math.prod(each.dims)) for each in tensors)
    return isinstance(value, tuple | list | str | bytes) and len(value) > MAX_STRUCTURE


def _types(model: Model) -> Types:
    """Types and shapes by name, as far as the operators tell them and one name means one of them."""
    try:
        facts = shapes.deduce(model)
    except Exception:  # it may be what is wrong
        facts = {}
    found: dict[str, Fact] = {}
    twice = set()
    for tensor in (each for graph in model.graphs() for each in ir.tensors(graph)):
        fact = facts.get(id(tensor))
        if fact is not None and found.setdefault(tensor.name, fact) != fact:
            twice.add(tensor.name)
    return {name: fact for name, fact in found.items() if name not in twice and fact.dtype is not None}


# ------------------------------------------------------------------------------------------------- ends


def _drop_outputs(model: Model, gone: Sequence[tuple[int, Tensor]]) -> bool:
    idle, at = _idle(model), {index for index, _ in gone}
    model.graph.outputs = [each for index, each in enumerate(model.graph.outputs) if index not in at]
    _drop_unread(model, idle, [maker for _, each in gone if (maker := ir.producer(each)) is not None])
    return bool(model.graph.outputs)


def _idle(model: Model) -> set[int]:
    """Ids of inputs and constants that nothing reads."""
    return dead.unread(model) | {id(tensor) for tensor in model.graph.inputs if not tensor.outputs}


def _unread(model: Model) -> list[Tensor]:
    idle = _idle(model)
    return [each for graph in model.graphs() for each in ir.tensors(graph) if id(each) in idle]


def _drop_unread(model: Model, idle: set[int], nodes: Iterable[Node] = ()) -> None:
    """Drop these nodes where nothing reads them, and what was read only by nodes that are gone."""
    dead.remove_nodes(model, nodes)
    dead.remove_constants(model, idle)
    used = idle | {id(tensor) for tensor in model.graph.outputs}
    model.graph.inputs = [each for each in model.graph.inputs if each.outputs or id(each) in used]
    names = {each.name for each in model.graph.inputs}
    model.graph.defaults = {name: value for name, value in model.graph.defaults.items() if name in names}


# ------------------------------------------------------------------------------------------------ nodes


def _cut(model: Model, gone: Sequence[Node], types: Types) -> bool:
    """Take nodes out: what they make is fed, also to bodies, and what nothing else reads is handed out."""
    graph, idle = model.graph, _idle(model)
    reads = dict.fromkeys(each for node in gone for each in (*node.inputs, *ir.captures(node)) if each.name)
    makes = [tensor for node in gone for tensor in node.outputs if tensor.name]
    graph.outputs = [each for each in graph.outputs if all(each is not made for made in makes)]
    _take_out(model, gone)
    fixed, name = ir.protected(graph), Namer(graph)
    for tensor in (each for each in makes if each.outputs or id(each) in fixed):
        if id(tensor) in fixed or not _declare(tensor, types):
            return False
        if sum(each.name == tensor.name for inner in model.graphs() for each in ir.tensors(inner)):
            tensor.name = name(tensor.name)
        graph.inputs.append(tensor)
    mine = {id(node) for node in graph.nodes}
    loose = [each for each in reads if not each.outputs and id(each) not in fixed and ir.producer(each)]
    ends = [each for each in loose if id(each.inputs[0]) in mine and _declare(each, types)]
    graph.outputs.extend(ends)
    _drop_unread(model, idle, [each.inputs[0] for each in loose])
    return bool(graph.outputs)


def _take_out(model: Model, nodes: Sequence[Node]) -> None:
    inside = [*nodes, *(inner for node in nodes for body in node.bodies for inner in ir.all_nodes(body))]
    for graph in list(model.graphs()):
        ir.sweep(graph, {id(node) for node in inside})
    for node in inside:
        ir.detach(node)


def _declare(tensor: Tensor, types: Types) -> bool:
    """Give a tensor the type that it needs at an end of the model; whether it has one."""
    if isinstance(tensor, Variable) and (fact := types.get(tensor.name)) is not None:
        tensor.dtype, tensor.shape = fact.dtype, fact.shape
    return tensor.dtype is not None or tensor.proto is not None


def _inner(model: Model) -> list[Node]:
    return [node for graph in model.graphs() if graph is not model.graph for node in graph.nodes]


def _bypass(model: Model, nodes: Sequence[Node]) -> bool:
    """Let what nodes read stand for what they make, of the same type and shape."""
    edit, idle, done = Editor(model), _idle(model), False
    for node in nodes:
        source = None if edit.is_gone(node) else _stand_in(node, edit)
        if source is not None:
            edit.bypass(node, source)
            done = True
    edit.commit()
    _drop_unread(model, idle)
    return done


def _stand_in(node: Node, edit: Editor) -> Tensor | None:
    used = [each for each in node.outputs if each.outputs or edit.is_output(each)]
    if used != node.outputs[:1]:
        return None
    return next((each for each in node.inputs if each.name and _may_stand(each, used[0], edit)), None)


def _may_stand(source: Tensor, tensor: Variable, edit: Editor) -> bool:
    """Whether, as far as anybody knows, one tensor is of the type and shape of another."""
    types, sizes = ({ask(source), ask(tensor)} for ask in (edit.dtype, edit.shape))
    return len(types) == 1 and len(sizes - {None}) < 2 and edit.can_bypass(tensor, source)


def _branches(model: Model) -> list[tuple[Node, Graph]]:
    return [(node, body) for node in model.nodes() if node.op == "If" for body in node.bodies]


def _take_branches(model: Model, taken: Sequence[tuple[Node, Graph]]) -> bool:
    """Put branches in the place of their Ifs."""
    edit, idle, rule, done = Editor(model), _idle(model), If(), False
    for node, branch in taken:
        if not edit.is_gone(node) and rule.check((node, branch), edit) is None:
            rule.rewrite((node, branch), edit)
            done = True
    edit.commit()
    _drop_unread(model, idle)
    return done


# ----------------------------------------------------------------------------------------------- values


def _literals(model: Model) -> list[Node]:
    fixed = ir.protected(model.graph)
    return [
        node
        for node in model.graph.nodes
        if is_literal(node) and constant_of(node.outputs[0]) is not None and id(node.outputs[0]) not in fixed
    ]


def _feed(model: Model, constants: Sequence[Constant]) -> bool:
    """Make inputs of constants."""
    fixed, name = ir.protected(model.graph), Namer(model.graph)
    fed = [constant for constant in constants if id(constant) not in fixed]
    for constant in fed:
        if model.graph.defaults.get(constant.name) is constant:
            del model.graph.defaults[constant.name]
            continue
        homes = [each for each in model.graphs() if each.initializers.get(constant.name) is constant]
        for home in homes:
            del home.initializers[constant.name]
        wanted = constant.name if model.graph in homes else name(constant.name)
        made = Variable(wanted, constant.dtype, constant.shape)
        ir.replace_uses(constant, made)
        model.graph.inputs.append(made)
    return bool(fed)


def _fill(
    model: Model,
    constants: Sequence[Constant],
    origin: Mapping[str, Constant],
    made: Callable[[Constant], Array],
) -> bool:
    """Give constants other values, made of those in the original, of the same shape and type."""
    known = [constant for constant in constants if constant.name in origin]
    for constant in known:
        new = made(origin[constant.name])
        if model.graph.defaults.get(constant.name) is constant:  # copies of a model share these
            model.graph.defaults[constant.name] = Constant(constant.name, new)
        else:
            constant.values = new
    return bool(known)


def _one_value(constant: Constant) -> Array:
    if constant.dtype.kind == "O":
        return np.full(constant.shape, "", np.object_)
    return np.full(constant.shape, constant.dtype.kind not in "iub", constant.dtype)


def _drawn(origin: Constant) -> Array:
    """Values drawn by the name of a constant: as large as its own, negative only if some of these are."""
    random, values = np.random.default_rng(crc32(origin.name.encode())), origin.peek()
    if values.dtype.kind == "O":
        return np.array([f"{number}" for number in range(values.size)], np.object_).reshape(values.shape)
    if values.dtype.kind in "iub":
        return random.integers(values.min(), values.max(), values.shape, values.dtype, endpoint=True)
    numbers = values.astype(np.float64)
    drawn = random.standard_normal(values.shape) * np.sqrt(np.mean(np.square(numbers)))
    return np.asarray((drawn if (numbers < 0).any() else np.abs(drawn)).astype(values.dtype))


# ---------------------------------------------------------------------------------------------- the rest


def _drop_notes(model: Model) -> None:
    """Drop what no runtime reads: notes, metadata, and domains that nothing is of."""
    dead.Dead(drop_notes=True).run(model, Context())
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.functions.extend(model.shell.functions)
    if not bare.functions:
        used = {"", *(node.domain for node in model.nodes())}
        model.opsets = {domain: version for domain, version in model.opsets.items() if domain in used}
    model.shell = bare
    for graph in model.graphs():
        graph.proto = None
