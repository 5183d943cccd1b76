"""Which node of one model is which of another, by what they are connected to; names only break ties.

Nodes are matched from what is certain to what is likely: those that compute the same from the same inputs and
constants; those in the same place from both ends; those with the same weights; those of one name among equal
neighbours; and then along the edges, from matched nodes to their neighbours, over nodes that only one of the
models has. Integers and their scales (Q and DQ) are looked through, and matched when the rest is.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from onnxslim.ir.graph import Array, Constant, Graph, Node, Tensor, captures, producer
from onnxslim.ir.model import DEFAULT_DOMAINS, Model, is_literal, literal
from onnxslim.ops import Trait, has

MATCHES = ("Cast", "Clip")
# A weight tells its node; a scalar, or a shape, does not.
TELLING = 16
# Over how many nodes that only one model has a neighbour is looked for.
REACH = 4
# Neighbours that a node is compared by.
MOST_NEIGHBOURS = 8

Pair: TypeAlias = tuple[Node, Node]
Key: TypeAlias = Hashable


def operator(node: Node) -> str:
    """The operator, with its domain unless that is the standard's."""
    return node.op if (node.domain or "") in DEFAULT_DOMAINS else f"{node.domain}.{node.op}"


def encoded(tensor: Tensor) -> Tensor:
    """What a tensor stands for: the one before a Q and DQ pair, and before what few bits take in it."""
    while (maker := producer(tensor)) is not None and has(maker, Trait.CODES):
        tensor = maker.inputs[0]
        if has(maker, Trait.DEQUANTIZES) and (narrow := narrowed(tensor)) is not None:
            tensor = narrow.inputs[0]
    return tensor


def narrowed(codes: Tensor) -> Node | None:
    """What makes codes of few bits of others: a Cast that unpacks them, a Clip that leaves fewer."""
    maker = producer(codes)
    return maker if maker is not None and maker.op in ("Cast", "Clip") else None


def stored(tensor: Tensor) -> Array | None:
    """The values of a constant, be it an initializer or a Constant node; for the moment."""
    if isinstance(tensor, Constant):
        return np.asarray(tensor.peek())
    maker = producer(tensor)
    return literal(maker) if maker is not None and is_literal(maker) else None


def same_attribute(first: Any, second: Any) -> bool:
    """Whether two attributes are the same; nodes of bodies are compared by themselves."""
    return (isinstance(first, Graph) and isinstance(second, Graph)) or bool(first == second)


class Side:
    """One of two models: its nodes, what they read and who reads them, and hashes of both."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.nodes = [node for node in model.nodes() if not is_literal(node)]
        self.by_id = {id(node): node for node in self.nodes}
        self.order = {id(node): at for at, node in enumerate(self.nodes)}
        graphs = list(enumerate(model.graphs()))
        self.sources = {id(t): f"in {at} of {n}" for n, each in graphs for at, t in enumerate(each.inputs)}
        self.ends = {id(t): f"out {at} of {n}" for n, each in graphs for at, t in enumerate(each.outputs)}
        self._digests: dict[int, bytes | None] = {}
        self.up = {id(node): self._makers(self._read(node)) for node in self.nodes}
        self.down: dict[int, list[Node]] = {id(node): [] for node in self.nodes}
        for node in self.nodes:
            for maker in self.up[id(node)]:
                self.down[id(maker)].append(node)
        self.beside: defaultdict[Key, list[Node]] = defaultdict(list)
        for node, up in ((node, up) for node in self.nodes for up in (True, False)):
            for end in self.ends_at(node, up):
                self.beside[end].append(node)
        self.values = self._hashes(self.nodes, self._read_values)
        self.above = self._hashes(self.nodes, self._read_places)
        self.below = self._hashes(reversed(self.nodes), self._read_by)

    def edge(self, up: bool) -> dict[int, list[Node]]:
        """By id of a node, those whose results it reads, or those which read its own."""
        return self.up if up else self.down

    def ends_at(self, node: Node, up: bool) -> list[str]:
        """Inputs of the graph that a node reads, or outputs that it makes, by their places."""
        if up:
            return [self.sources[id(t)] for t in map(encoded, node.inputs) if id(t) in self.sources]
        return [self.ends[id(t)] for t in node.outputs if id(t) in self.ends]

    def _read(self, node: Node) -> Iterator[Tensor]:
        yield from map(encoded, (*node.inputs, *captures(node)))

    def read_from(self, node: Node) -> list[Node]:
        """The nodes whose results one reads, Q and DQ among them."""
        return self._makers((*node.inputs, *captures(node)))

    def _makers(self, tensors: Iterable[Tensor]) -> list[Node]:
        makers = map(producer, tensors)
        return [maker for maker in makers if maker is not None and id(maker) in self.by_id]

    def digest(self, tensor: Tensor) -> bytes | None:
        """Of type, shape and values of a constant, computed once; None of others."""
        if id(tensor) not in self._digests:
            values = stored(tensor)
            self._digests[id(tensor)] = None if values is None else _digest(values)
        return self._digests[id(tensor)]

    def _hashes(
        self, nodes: Iterable[Node], told: Callable[[Node, dict[int, bytes]], Any]
    ) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for node in nodes:
            attributes = sorted((k, repr(v)) for k, v in node.attrs.items() if not isinstance(v, Graph))
            own = repr((operator(node), attributes, len(node.outputs), told(node, found)))
            found[id(node)] = hashlib.blake2b(own.encode(), digest_size=12).digest()
        return found

    def _read_values(self, node: Node, found: dict[int, bytes]) -> list[Any]:
        return [self.digest(tensor) or self._origin(tensor, found) for tensor in node.inputs]

    def _read_places(self, node: Node, found: dict[int, bytes]) -> list[Any]:
        read = map(encoded, node.inputs)
        return ["constant" if self.digest(tensor) else self._origin(tensor, found) for tensor in read]

    def _origin(self, tensor: Tensor, found: dict[int, bytes]) -> Any:
        maker = producer(tensor)
        if maker is None:
            return self.sources.get(id(tensor), "") if tensor.name else None
        return found.get(id(maker), ""), _position(tensor, maker)

    def _read_by(self, node: Node, found: dict[int, bytes]) -> list[Any]:
        ends = [self.ends[id(out)] for out in node.outputs if id(out) in self.ends]
        return [*ends, *sorted(found.get(id(reader), b"") for reader in self.down[id(node)])]


def _position(tensor: Tensor, maker: Node) -> int:
    return next(at for at, made in enumerate(maker.outputs) if made is tensor)


def _digest(values: Array) -> bytes:
    told = hashlib.blake2b(f"{values.dtype}{values.shape}".encode(), digest_size=12)
    if values.dtype == object:
        told.update(repr(values.tolist()).encode())
    elif values.size:
        told.update(np.ascontiguousarray(values).view(np.uint8).data)
    return told.digest()


class NodeMatching:
    """The nodes of two models, paired.

    Attributes:
        pairs: in the order of the first model.
        removed, added: nodes that only the first, or only the second, has.
        partner: of each node in a pair, by its id, the other one.
    """

    def __init__(self, before: Model, after: Model) -> None:
        self.first, self.second = Side(before), Side(after)
        self.partner: dict[int, Node] = {}
        self._pair_all()
        self.pairs: list[Pair] = [(n, self.partner[id(n)]) for n in self.first.nodes if id(n) in self.partner]
        self.removed = [node for node in self.first.nodes if id(node) not in self.partner]
        self.added = [node for node in self.second.nodes if id(node) not in self.partner]

    def near(self, side: Side, node: Node, up: bool) -> frozenset[Key]:
        """What is nearest before a node, or behind it, of what both models have.

        Nodes are told by the id of the first model's, inputs and outputs of the graph by their places.
        """
        found: set[Key] = set()
        layer, seen = [node], {id(node)}
        for _ in range(REACH):
            following: list[Node] = []
            for each in layer:
                found.update(side.ends_at(each, up))
                others = [other for other in side.edge(up)[id(each)] if id(other) not in seen]
                seen.update(map(id, others))
                found.update(self.mark(side, other) for other in others if id(other) in self.partner)
                following += [other for other in others if id(other) not in self.partner]
            layer = following
            if not layer or len(found) >= MOST_NEIGHBOURS:
                break
        return frozenset(found)

    def same_origin(self, first: Tensor, second: Tensor) -> bool:
        """Whether tensors of the two models are made at the same place of both."""
        made = producer(first), producer(second)
        if made[0] is None or made[1] is None:
            return self.first.sources.get(id(first)) == self.second.sources.get(id(second))
        same = self.partner.get(id(made[0])) is made[1]
        return same and _position(first, made[0]) == _position(second, made[1])

    def mark(self, side: Side, node: Node) -> int:
        """What stands for a node of either model: the id of the first one's, if both have it."""
        return id(self.partner.get(id(node), node) if side is self.second else node)

    def node(self, side: Side, mark: int) -> Node | None:
        """The node of one model that this stands for, if it has one."""
        if side is self.first:
            return side.by_id.get(mark)
        return self.partner.get(mark) if mark in self.first.by_id else side.by_id.get(mark)

    def _pair_all(self) -> None:
        self._equal(lambda side, node: side.values[id(node)], several=True)
        for key in (
            lambda side, node: (side.above[id(node)], side.below[id(node)]),
            _weights,
            _name,
            lambda side, node: side.above[id(node)],
            lambda side, node: side.below[id(node)],
        ):
            self._equal(_but_codes(key))
        self._along(up=True)
        self._along(up=False)
        self._equal(_but_codes(self._place))
        self._equal(lambda side, node: (operator(node), *self._places(side, node)), several=True)

    def _equal(self, key: Callable[[Side, Node], Key], several: bool = False) -> None:
        """Pair nodes of one key: the only ones that have it, or `several` in their order, equal names first.

        The key is None for nodes that are left for later.
        """
        groups: tuple[defaultdict[Key, list[Node]], ...] = (defaultdict(list), defaultdict(list))
        for side, group in zip((self.first, self.second), groups, strict=True):
            for node in side.nodes:
                if id(node) not in self.partner and (told := key(side, node)) is not None:
                    group[told].append(node)
        for told, nodes in groups[0].items():
            others = groups[1].get(told, [])
            if several:
                self._in_order(nodes, others)
            elif len(nodes) == len(others) == 1:
                self._join(nodes[0], others[0])

    def _in_order(self, nodes: Sequence[Node], others: Sequence[Node]) -> None:
        named = {node.label: node for node in others}
        for node in nodes:
            other = named.get(node.label)
            if other is not None and id(other) not in self.partner:
                self._join(node, other)
        left = ([node for node in each if id(node) not in self.partner] for each in (nodes, others))
        for node, other in zip(*left, strict=False):
            self._join(node, other)

    def _join(self, first: Node, second: Node) -> None:
        self.partner[id(first)], self.partner[id(second)] = second, first

    def _places(self, side: Side, node: Node) -> tuple[frozenset[Key], frozenset[Key]]:
        return self.near(side, node, up=True), self.near(side, node, up=False)

    def _place(self, side: Side, node: Node) -> Key:
        places = self._places(side, node)
        return places if all(places) else None

    def _along(self, up: bool) -> None:
        """Pair nodes with those near the partners of their neighbours, in the order of the graph."""
        nodes = self.first.nodes if up else reversed(self.first.nodes)
        for node in nodes:
            if id(node) in self.partner or has(node, Trait.CODES):
                continue
            near = self.near(self.first, node, up)
            scored = self._scored(node, near, up)
            best = max(scored, key=lambda found: found[0], default=None)
            if best is not None:
                self._join(node, best[1])

    def _scored(self, node: Node, near: frozenset[Key], up: bool) -> Iterator[tuple[float, Node]]:
        """Nodes that may be the same one: by neighbours, name, weights, attributes, and how near they are."""
        for hops, other in self._nearby(near, up):
            if id(other) not in self.partner and operator(other) == operator(node):
                score = 2.0 * (self.near(self.second, other, up) == near) - hops / REACH
                score += 4.0 * (other.label == node.label) + (_shapes(other) == _shapes(node))
                yield score + (other.attrs.keys() == node.attrs.keys()), other

    def _nearby(self, near: frozenset[Key], up: bool) -> Iterator[tuple[int, Node]]:
        """Nodes of the second model next to these, and over some that only it has."""
        edge = self.second.edge(not up)
        partners = (self.partner[key] for key in near if isinstance(key, int))
        starts = [other for node in partners for other in edge[id(node)]]
        starts += [other for key in near if not isinstance(key, int) for other in self.second.beside[key]]
        layer, seen = list(dict.fromkeys(starts)), set(map(id, starts))
        for hops in range(REACH):
            yield from ((hops, node) for node in layer)
            onward = (o for node in layer if id(node) not in self.partner for o in edge[id(node)])
            layer = [node for node in dict.fromkeys(onward) if id(node) not in seen]
            seen.update(map(id, layer))


def _but_codes(key: Callable[[Side, Node], Key]) -> Callable[[Side, Node], Key]:
    return lambda side, node: None if has(node, Trait.CODES) else key(side, node)


def _weights(side: Side, node: Node) -> Key:
    found = {tensor: stored(tensor) for tensor in map(encoded, node.inputs)}
    telling = [side.digest(t) for t, values in found.items() if values is not None and values.size >= TELLING]
    return (operator(node), *telling) if telling else None


def _name(side: Side, node: Node) -> Key:
    """Name and operator, name of what it makes, and operators around it."""
    around = (tuple(sorted(map(operator, side.edge(up)[id(node)]))) for up in (True, False))
    return (operator(node), node.label, node.outputs[0].name if node.outputs else "", *around)


def _shapes(node: Node) -> list[Any]:
    found = map(stored, map(encoded, node.inputs))
    return [values.shape for values in found if values is not None]
