"""Edits of a graph that keep both sides of its links in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from onnxslim import shapes
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Attribute, Constant, Graph, Namer, Node, Shape, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model

MAKES = ("Identity",)


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
        self._freed: list[Tensor] = []
        self._hidden, self._hiding = ir.shadowing(model.graph)
        self._facts = shapes.deduce(model)
        # Facts are kept by id, which would be given to another object if one of these went away.
        self._alive = [list(ir.tensors(graph)) for graph in model.graphs()]

    # Facts

    def is_output(self, tensor: Tensor) -> bool:
        """Whether a tensor is an output of the graph or of a body; its name and producer are fixed."""
        return id(tensor) in self._fixed

    def sole_consumer(self, tensor: Tensor) -> Node | None:
        """The node that alone reads a tensor, once; None if others do or if it is an output."""
        return tensor.outputs[0] if len(tensor.outputs) == 1 and not self.is_output(tensor) else None

    def shape(self, tensor: Tensor) -> Shape:
        """What is certain about a shape; annotations that exporters or users got wrong do not count."""
        if isinstance(tensor, Constant):
            return tensor.shape
        fact = self._facts.get(id(tensor))
        return fact.shape if fact else None

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        """What is certain about an element type."""
        if isinstance(tensor, Constant):
            return tensor.dtype
        fact = self._facts.get(id(tensor))
        return fact.dtype if fact else None

    def is_shadowed(self, tensor: Tensor) -> bool:
        """Whether a body has a tensor of its own under this name, and so its nodes cannot read this one."""
        return tensor.name in self._hidden

    def can_edit(self, graph: Graph) -> bool:
        """Whether every tensor around a graph is known in it by name; only then are its nodes rewritten."""
        return id(graph) not in self._hiding

    def is_standard(self, node: Node) -> bool:
        """Whether a node is of the standard domain, and not of a function of the model that hides it."""
        return node.domain in DEFAULT_DOMAINS and ("", node.op) not in self._own

    @cached_property
    def _own(self) -> frozenset[tuple[str, str]]:
        return self.model.functions

    @cached_property
    def _homes(self) -> dict[int, Graph]:
        return {id(node): graph for graph in self.model.graphs() for node in graph.nodes}

    @cached_property
    def _holders(self) -> dict[int, Node]:
        return {id(body): node for node in self.model.nodes() for body in node.bodies}

    def home(self, node: Node) -> Graph | None:
        """The graph a node is in; None if it was added in this round."""
        return self._homes.get(id(node))

    def around(self, node: Node, graph: Graph) -> Node | None:
        """The node of this graph that a node is, or that holds it in a body; None if it lies elsewhere."""
        current: Node | None = node
        while current is not None and (home := self.home(current)) is not graph:
            current = None if home is None else self._holders.get(id(home))
        return current

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
        # The declaration carries doc string and metadata; operator and attributes are written anew.
        twin = Node(op, node.name, attrs, inputs, outputs, "", node.proto)
        self._added.setdefault(id(node), []).append(twin)
        return twin

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make a node read another tensor at an input, which may be one it did not have."""
        while len(node.inputs) <= index:
            node.inputs.append(ir.empty())
        self._freed.append(node.inputs[index])
        node.inputs[index] = tensor

    def set_values(self, node: Node, index: int, values: Array) -> None:
        """Give a node other values at a constant input; what else reads the old ones keeps them."""
        tensor = node.inputs[index]
        # What is declared of a constant, as old files do among the inputs, stays true.
        same_type = (tensor.shape, tensor.dtype) == (values.shape, values.dtype)
        if isinstance(tensor, Constant) and same_type and self.sole_consumer(tensor) is node:
            tensor.values = values
        else:
            self.set_input(node, index, self.constant(tensor.name, values))

    def remove(self, node: Node) -> None:
        """Take a node out with the graphs in it; its outputs are left without a producer.

        What only it read is dropped too, at `commit`.
        """
        for each in (node, *(inner for body in node.bodies for inner in ir.all_nodes(body))):
            self._freed.extend(each.inputs)
            ir.detach(each)
            self._gone.add(id(each))

    def can_bypass(self, tensor: Variable, source: Tensor) -> bool:
        """Whether readers of `tensor` can read `source` instead with every output name kept."""
        if self.is_shadowed(tensor) or self.is_shadowed(source):
            return False
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
        self._rename_output(source, tensor)

    def _same_graph(self, tensor: Tensor, source: Tensor) -> bool:
        for graph in self.model.graphs():
            mine = {id(node) for node in graph.nodes}
            if id(tensor.inputs[0]) in mine:
                added = {id(new) for key, items in self._added.items() if key in mine for new in items}
                return id(source.inputs[0]) in mine | added
        return False

    def inline(self, node: Node, body: Graph) -> None:
        """Put the nodes of a body without inputs in place of the node that holds it.

        The outputs of the body become those of the node; names that others have too are replaced.
        """
        wanted = [(out, result) for out, result in zip(node.outputs, body.outputs, strict=True) if out.name]
        self._rename_apart(body)
        for key in [key for key, value in node.attrs.items() if value is body]:
            del node.attrs[key]
        self.remove(node)
        moved = self._added.setdefault(id(node), [])
        moved.extend(body.nodes)
        made = {id(tensor) for inner in body.nodes for tensor in inner.outputs}
        self._fixed -= made
        stand_in: dict[int, Tensor] = {}
        for output, result in wanted:
            if id(result) in made and id(result) not in stand_in:
                self._rename_output(result, output)
                stand_in[id(result)] = output
                continue
            source = stand_in.get(id(result), result)
            if self.is_output(output):
                moved.append(Node("Identity", self.name(f"{output.name}_Identity"), {}, [source], [output]))
            else:
                ir.replace_uses(output, source)

    def _rename_output(self, source: Tensor, tensor: Variable) -> None:
        """Let the maker of `source` make `tensor` instead."""
        maker = source.inputs[0]
        index = next(i for i, made in enumerate(maker.outputs) if made is source)
        maker.outputs[index] = tensor
        ir.replace_uses(source, tensor)

    @cached_property
    def _counts(self) -> tuple[Counter[str], Counter[str]]:
        """How often each name of a tensor and of a node was used when this editor started."""
        return (
            Counter(tensor.name for graph in self.model.graphs() for tensor in ir.tensors(graph)),
            Counter(node.name for node in self.model.nodes()),
        )

    def _rename_apart(self, body: Graph) -> None:
        tensors, nodes = self._counts
        for tensor in ir.tensors(body):
            if tensors[tensor.name] > 1:
                tensor.name = self.name(tensor.name)
        for node in body.nodes:
            if node.name and nodes[node.name] > 1:
                node.name = self.name(node.name)

    def commit(self) -> None:
        """Put new nodes in their places, drop removed ones and what nobody reads because of that."""
        self._drop_unread()
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

    def _drop_unread(self) -> None:
        unread: set[int] = set()
        while self._freed:
            tensor = self._freed.pop()
            if tensor.outputs or self.is_output(tensor):
                continue
            if isinstance(tensor, Constant):
                unread.add(id(tensor))
                continue
            node = ir.producer(tensor)
            if node is not None and not any(out.outputs or self.is_output(out) for out in node.outputs):
                self.remove(node)
        for graph in self.model.graphs() if unread else ():
            for name in [name for name, value in graph.initializers.items() if id(value) in unread]:
                del graph.initializers[name]

    def _placed(self, node: Node) -> Iterable[Node]:
        # A new node may itself be the anchor of newer ones.
        for new in self._added.get(id(node), ()):
            yield from self._placed(new)
        yield node
