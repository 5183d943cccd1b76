"""Sizes of axes and the computations made with them, in numbers or symbols, without running the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Dim, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.shapes import shape_rules, symbols, value_rules
from onnxslim.shapes.asking import answer
from onnxslim.shapes.inference import MAX_STEERING_ELEMENTS, Fact, Inference
from onnxslim.shapes.symbols import Term
from onnxslim.shapes.vectors import MAX_LENGTH, Vector

# Each round lets onnx's inference go on from what the rules found; chains of more steps are rare, but a
# transformer in an old opset takes a step for every layer.
MAX_ROUNDS = 12


class Dims:
    """Sizes of the axes of all tensors of a model, and what is computed from them.

    Holds for the model as it is when this is made; what is known of new constants is looked up. One thing is
    not considered: a size that is zero in some run means "copy" to a Reshape, of a tensor that is not empty.

    Args:
        model: not modified.
        before: what is still true of the tensors it knows, for a start.

    Attributes:
        opset: of the model.
        facts: types and shapes by id of the tensor.
    """

    def __init__(self, model: Model, before: Dims | None = None) -> None:
        self.opset = model.opset
        self.facts: dict[int, Fact] = {}
        self._values: dict[int, Vector | None] = {}
        self._better: dict[int, tuple[Term | None, ...]] = {}
        self._meaning: dict[str, Term] = {}
        self._nodes = _standard_nodes(model)
        # Tensors that an edit drops must stay, lest a new one gets the same id.
        self._kept = [list(ir.tensors(graph)) for graph in model.graphs()]
        inference = Inference(model)
        self._symbols = inference.symbols
        # Tensors whose shapes inference does not find by itself.
        self._stated: set[int] = set()
        if before is not None:
            self._meaning.update(before._meaning)
            self._stated.update(before._stated)
            inference.state(self._carried(model, before.facts), before.facts)
        for _ in range(MAX_ROUNDS):
            self.facts = inference.facts()
            if not self._sweep():
                break
            self._stated.update(self._better)
            inference.state({key: self._named(shape) for key, shape in self._better.items()}, self.facts)

    def of_copy(self, model: Model, twin: Model) -> Dims:
        """The same of a copy of the model, which nobody has edited."""
        pairs = zip(model.graphs(), twin.graphs(), strict=True)
        both = (zip(ir.tensors(one), ir.tensors(other), strict=True) for one, other in pairs)
        ids = {id(old): id(new) for old, new in chain.from_iterable(both)}
        found = copy(self)
        found._nodes = _standard_nodes(twin)
        found._kept = [list(ir.tensors(graph)) for graph in twin.graphs()]
        found._stated = {ids[key] for key in self._stated if key in ids}
        found.facts = {ids[key]: fact for key, fact in self.facts.items() if key in ids}
        found._values = {
            ids[key]: known and replace(known, terms=tuple(symbols.moved(term, ids) for term in known.terms))
            for key, known in self._values.items()
            if key in ids
        }
        return found

    def _carried(self, model: Model, facts: Mapping[int, Fact]) -> dict[int, tuple[Dim, ...]]:
        """Shapes that need no second inference.

        Inference goes on looking at integers, whose values may steer others, unless it never did.
        """
        shapes: dict[int, tuple[Dim, ...]] = {}
        for node in model.graph.nodes:
            made = {id(tensor): facts.get(id(tensor)) for tensor in node.outputs if tensor.name}
            if node.bodies or not all(map(self._is_settled, made, made.values())):
                continue
            for key, fact in made.items():
                if fact is not None and fact.shape is not None:
                    shapes[key] = fact.shape
        return shapes

    def _is_settled(self, key: int, fact: Fact | None) -> bool:
        if fact is None or fact.dtype is None or fact.shape is None:
            return False
        steering = fact.dtype.kind in "iu" and key not in self._stated
        return not steering and all(map(self._is_known, fact.shape))

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        """Type of a tensor's elements, if it is certain."""
        if isinstance(tensor, Constant):
            return tensor.dtype
        fact = self.facts.get(id(tensor))
        return fact.dtype if fact else None

    def shape(self, tensor: Tensor | None) -> tuple[Term, ...] | None:
        """Size of each axis of a tensor; None if its rank is not certain."""
        if tensor is None or isinstance(tensor, Constant):
            return tensor.shape if tensor is not None else None
        fact = self.facts.get(id(tensor))
        if fact is None or fact.shape is None:
            return None
        return tuple(
            ("axis", id(tensor), axis) if dim is None else self._term(dim)
            for axis, dim in enumerate(fact.shape)
        )

    def sizes(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Shape of a tensor if all of it is known."""
        shape = self.shape(tensor)
        return None if shape is None else Vector(shape).numbers

    def value(self, tensor: Tensor | None) -> Vector | None:
        """What is known of the elements of a short integer tensor."""
        if tensor is None:
            return None
        if isinstance(tensor, Constant) or ir.producer(tensor) is None:
            return value_rules.literal(tensor)
        if id(tensor) not in self._values:
            self._values[id(tensor)] = value_rules.literal(tensor)
        return self._values[id(tensor)]

    def _sweep(self) -> bool:
        """Apply the rules to every node; True if a shape became known better than it was."""
        self._values.clear()
        self._better.clear()
        for node in self._nodes:
            tensor = node.outputs[0]
            if isinstance(tensor, Variable):
                self._improve(node, tensor)
            if node.op in value_rules.RULES:
                found = answer(value_rules.RULES[node.op], node, self)
                if found is not None and len(found.terms) <= MAX_LENGTH:
                    self._values[id(tensor)] = found
        return bool(self._better)

    def _improve(self, node: Node, tensor: Variable) -> None:
        fact = self.facts.get(id(tensor))
        if fact is None and node.op in shape_rules.SAME_TYPE and node.inputs:
            fact = Fact(self.dtype(node.inputs[0]), None)
        if fact is None or fact.dtype is None or (fact.shape and all(map(self._is_known, fact.shape))):
            return
        rule = shape_rules.rule_of(node)
        found = answer(rule, node, self) if rule else None
        if found is None or (fact.shape is not None and len(fact.shape) != len(found)):
            return
        before: tuple[Dim, ...] = fact.shape if fact.shape is not None else (None,) * len(found)
        after = tuple(
            new if not self._is_known(old) and self._is_known(new) else old
            for old, new in zip(before, found, strict=True)
        )
        if after != fact.shape:
            self._better[id(tensor)] = after
            self.facts[id(tensor)] = Fact(fact.dtype, self._named(after))

    def _is_known(self, term: Term | None) -> bool:
        """Whether a size is a number or made of sizes of the inputs; inference renames all other symbols."""
        if isinstance(term, tuple):
            return term[0] != "axis" and all(map(self._is_known, term[1:]))
        return isinstance(term, int) or term in self._symbols or term in self._meaning

    def _named(self, shape: tuple[Term | None, ...]) -> tuple[Dim, ...]:
        return tuple(self._name(term) if isinstance(term, tuple) else term for term in shape)

    def _name(self, term: Term) -> str:
        name = symbols.spell(term)
        while name in self._symbols:
            name += "'"
        self._meaning[name] = term
        return name

    def _term(self, dim: int | str) -> Term:
        return self._meaning.get(dim, dim) if isinstance(dim, str) else dim


_latest: WeakKeyDictionary[Model, tuple[list[object], Dims]] = WeakKeyDictionary()
_still_true: WeakSet[Model] = WeakSet()


def dims_of(model: Model) -> Dims:
    """The sizes in a model, found anew only if it has changed since the last time."""
    state = list(_state(model))
    known = _latest.get(model)
    if known is None or len(known[0]) != len(state) or not all(map(is_, known[0], state)):
        before = known[1] if known is not None and model in _still_true else None
        # Once it is in use, another thread may replace it, but not change it.
        known = _latest[model] = state, Dims(model, before)
    _still_true.discard(model)
    return known[1]


def copied(model: Model) -> Model:
    """A copy to edit, of which the sizes are known without looking for them again."""
    twin = model.copy()
    _latest[twin] = list(_state(twin)), dims_of(model).of_copy(model, twin)
    return twin


def keep(model: Model) -> None:
    """State that the edits since `dims_of` left each tensor that is still there with its type and sizes."""
    _still_true.add(model)


def _state(model: Model) -> Iterator[object]:
    """All objects that sizes depend on; as long as these are the same ones, so are the sizes.

    Values are never written into, only replaced.
    """
    yield from (sys.intern(f"{domain}:{version}") for domain, version in model.opsets.items())
    yield model.shell
    for graph in model.graphs():
        yield graph
        for tensor in (*graph.inputs, *graph.outputs):
            yield from (tensor, tensor.dtype, tensor.shape if isinstance(tensor, Variable) else None)
        yield from graph.defaults.values()
        for node in graph.nodes:
            yield from (node, node.op, node.domain, *node.attrs.values())
            yield from node.outputs
            for tensor in node.inputs:
                yield tensor
                if isinstance(tensor, Constant):
                    yield tensor.values if tensor.size <= MAX_STEERING_ELEMENTS else None


def _standard_nodes(model: Model) -> list[Node]:
    own = model.functions
    return [
        node
        for node in model.nodes()
        if node.domain in DEFAULT_DOMAINS and ("", node.op) not in own and len(node.outputs) == 1
    ]
