"""Pattern rewriting: rules that look at one node, say why not, and edit around it.

A rule has three steps. `pattern` recognises a place by its structure; `check` looks up the facts that the
rewrite needs and says which is missing; `rewrite` edits. A fact that is not known is a reason not to fire.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from onnxslim import graph as ir
from onnxslim.graph import Array, Attribute, Constant, Graph, Namer, Node, Shape, Tensor, Variable
from onnxslim.model import DEFAULT_DOMAINS, Model
from onnxslim.pipeline import MAX_ROUNDS, Log

M = TypeVar("M")


class Editor:
    """The facts rules ask for and the edits they make, on one model.

    Attributes:
        model: what is edited.
        opset: version of the standard operators.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.opset = model.opset
        self.name = Namer(model.graph)
        self._fixed = ir.protected(model.graph)
        self._gone: set[int] = set()
        self._added: dict[int, list[Node]] = {}

    # Facts

    def is_output(self, tensor: Tensor) -> bool:
        """Whether a tensor is an output of the graph or of a body; its name and producer are fixed."""
        return id(tensor) in self._fixed

    def sole_consumer(self, tensor: Tensor) -> Node | None:
        """The node that alone reads a tensor, once; None if others do or if it is an output."""
        return tensor.outputs[0] if len(tensor.outputs) == 1 and not self.is_output(tensor) else None

    def is_gone(self, node: Node) -> bool:
        """Whether a rule removed this node."""
        return id(node) in self._gone

    # Edits

    def constant(self, wanted: str, values: Array) -> Constant:
        """A new constant, named after `wanted`."""
        return Constant(self.name(wanted), np.asarray(values))

    def variable(self, wanted: str, like: Tensor | None = None, shape: Shape = None) -> Variable:
        """A new inner tensor with the element type of `like`."""
        return Variable(self.name(wanted), like.dtype if like is not None else None, shape)

    def add(
        self,
        before: Node,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Variable],
        attrs: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> Node:
        """A new node in the graph of `before`, placed in front of it."""
        node = Node(op, self.name(name or f"{before.name or before.op}_{op}"), attrs, inputs, outputs, domain)
        self._added.setdefault(id(before), []).append(node)
        return node

    def replace_node(
        self,
        node: Node,
        op: str,
        inputs: Sequence[Tensor],
        attrs: Mapping[str, Attribute] | None = None,
    ) -> Node:
        """Turn a node into another one that makes the same outputs under the same name."""
        outputs = list(node.outputs)
        self.remove(node)
        twin = Node(op, node.name, attrs, inputs, outputs, "")
        self._added.setdefault(id(node), []).append(twin)
        return twin

    def remove(self, node: Node) -> None:
        """Take a node out; its outputs are left without a producer."""
        ir.detach(node)
        self._gone.add(id(node))

    def can_bypass(self, tensor: Variable, source: Tensor) -> bool:
        """Whether readers of `tensor` can read `source` instead with every output name kept."""
        if not self.is_output(tensor):
            return True
        # The maker of `source` takes over the output's name, if it has one in the same graph.
        return bool(
            source.inputs
            and not self.is_output(source)
            and self._same_graph(tensor, source)
            and isinstance(source, Variable)
        )

    def bypass(self, node: Node, source: Tensor) -> None:
        """Remove a node with one used output and let `source` stand for that output (see `can_bypass`)."""
        tensor = node.outputs[0]
        self.remove(node)
        if not self.is_output(tensor):
            ir.replace_uses(tensor, source)
            return
        maker = source.inputs[0]
        index = next(i for i, made in enumerate(maker.outputs) if made is source)
        maker.outputs[index] = tensor
        ir.replace_uses(source, tensor)

    def _same_graph(self, tensor: Tensor, source: Tensor) -> bool:
        for graph in self.model.graphs():
            mine = {id(node) for node in graph.nodes}
            if id(tensor.inputs[0]) in mine:
                added = {id(new) for key, items in self._added.items() if key in mine for new in items}
                return id(source.inputs[0]) in mine | added
        return False

    def commit(self) -> None:
        """Put new nodes in their places and drop removed ones."""
        for graph in list(self.model.graphs()):
            if not any(id(node) in self._added or id(node) in self._gone for node in graph.nodes):
                continue
            nodes: list[Node] = []
            for node in graph.nodes:
                nodes.extend(n for n in self._placed(node) if id(n) not in self._gone)
            graph.nodes[:] = nodes
            ir.sort(graph)
        self._gone.clear()
        self._added.clear()

    def _placed(self, node: Node) -> Iterable[Node]:
        # A new node may itself be the anchor of newer ones.
        for new in self._added.get(id(node), ()):
            yield from self._placed(new)
        yield node


class Rule(ABC, Generic[M]):
    """One rewrite.

    Attributes:
        name: for messages and for switching it off.
        ops: operators of the standard domain at which `pattern` is tried.
        since: first opset the result is valid in.
    """

    name: ClassVar[str]
    ops: ClassVar[frozenset[str]]
    since: ClassVar[int] = 1

    @abstractmethod
    def pattern(self, node: Node, edit: Editor) -> M | None:
        """What the rule found at this node by structure alone, or None if this is not its place."""

    @abstractmethod
    def check(self, match: M, edit: Editor) -> str | None:
        """Why the rewrite would be wrong or is not known to be right; None if it may go ahead."""

    @abstractmethod
    def rewrite(self, match: M, edit: Editor) -> str:
        """Edit the graph; returns what was done, for the report."""


def apply(rules: Sequence[Rule[Any]], model: Model, log: Log) -> bool:
    """Apply rules everywhere, bodies included, until none fires; True if any did."""
    table: dict[str, list[Rule[Any]]] = {}
    for rule in rules:
        if model.opset >= rule.since:
            for op in rule.ops:
                table.setdefault(op, []).append(rule)
    changed = False
    for _ in range(MAX_ROUNDS):
        edit = Editor(model)
        fired = sum(_visit(graph, table, edit, log) for graph in list(model.graphs()))
        edit.commit()
        if not fired:
            break
        changed = True
    return changed


def _visit(graph: Graph, table: Mapping[str, list[Rule[Any]]], edit: Editor, log: Log) -> int:
    fired = 0
    for node in list(graph.nodes):
        if node.domain not in DEFAULT_DOMAINS:
            continue
        for rule in table.get(node.op, ()):
            if edit.is_gone(node):
                break
            fired += _try(rule, node, edit, log)
    return fired


def _try(rule: Rule[Any], node: Node, edit: Editor, log: Log) -> bool:
    match = rule.pattern(node, edit)
    if match is None:
        return False
    label = node.label
    why_not = rule.check(match, edit)
    if why_not is not None:
        log.skip(label, f"{rule.name}: {why_not}")
        return False
    log.change(label, rule.rewrite(match, edit), rule.name)
    return True
