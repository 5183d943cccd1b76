"""Where two models differ, as small graphs to draw: changed nodes with what is next to them.

Changes that are connected make one place; where that gets large, it falls into those around each node that
both models have. Places that look the same are drawn once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import networkx as nx

from onnxslim.ir.graph import Node
from onnxslim.report.matching import NodeMatching, Side

# Of one drawing: changed nodes, and unchanged ones around them. Of a page: kinds of places, names of others.
MOST_NODES, MOST_AROUND, MOST_PLACES, MOST_OTHERS = 16, 6, 48, 100


@dataclass(frozen=True)
class DrawnNode:
    """A node in a drawing.

    Attributes:
        state: "same", "changed", "gone" (of the first model only) or "new" (of the second only).
        done: by pass, what it did here; without actions where only passes are known.
        told: how it changed.
    """

    name: str
    op: str
    state: str
    done: Mapping[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A part of one model.

    Attributes:
        nodes: in the order of the graph.
        edges: positions of two nodes, of which the second reads what the first makes.
    """

    nodes: tuple[DrawnNode, ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DrawnPlace:
    """A place where models differ, before and after.

    Attributes:
        name: of the node it is named after.
        others: nodes that places of the same kind are named after; at most `MOST_OTHERS`.
        count: how many places of the kind there are.
        made_by: the last pass that did something there; empty if that is not known.
    """

    name: str
    count: int
    others: tuple[str, ...]
    made_by: str
    before: Drawing
    after: Drawing


def places(
    matching: NodeMatching, drawn: Mapping[int, DrawnNode], passes: Sequence[str]
) -> tuple[tuple[DrawnPlace, ...], int]:
    """Where two models differ, each kind of place once; and how many places are left out.

    Args:
        matching: of their nodes.
        drawn: how nodes of both are shown, by id.
        passes: names of those that did something, in order.
    """
    graph = _union(matching)
    changed = [key for key in graph if drawn[key].state != "same"]
    kinds: dict[object, DrawnPlace] = {}
    for keys in _parts(graph, changed, drawn):
        made = _place(matching, graph, keys, drawn, passes)
        kind = _kind(made)
        if kind in kinds:
            known = kinds[kind]
            others = (*known.others, made.name)[:MOST_OTHERS]
            kinds[kind] = replace(known, count=known.count + 1, others=others)
        else:
            kinds[kind] = made
    most = sorted(kinds.values(), key=lambda place: -place.count)
    return tuple(most[:MOST_PLACES]), sum(place.count for place in most[MOST_PLACES:])


def _union(matching: NodeMatching) -> nx.Graph:
    """Both models as one graph, in their order: nodes by the id of the first model's, or of the second's."""
    graph = nx.Graph()
    graph.add_nodes_from(id(node) for node in matching.first.nodes)
    for side in (matching.first, matching.second):
        for node in side.nodes:
            key = matching.mark(side, node)
            graph.add_edges_from((matching.mark(side, maker), key) for maker in side.read_from(node))
            graph.add_node(key)
    return graph


def _parts(graph: nx.Graph, changed: Sequence[int], drawn: Mapping[int, DrawnNode]) -> Iterator[list[int]]:
    order = {key: at for at, key in enumerate(graph)}
    part = graph.subgraph(changed)
    components = sorted(nx.connected_components(part), key=lambda keys: min(order[key] for key in keys))
    for component in components:
        cells = [set(component)]
        centres = {key for key in component if drawn[key].state == "changed"}
        if len(component) > MOST_NODES and centres:
            found = nx.voronoi_cells(part.subgraph(component), centres)
            cells = sorted(found.values(), key=lambda keys: min(order[key] for key in keys))
        for cell in cells:
            keys = iter(sorted(cell, key=order.__getitem__))
            while chunk := list(islice(keys, MOST_NODES)):
                yield chunk


def _place(
    matching: NodeMatching,
    graph: nx.Graph,
    keys: Sequence[int],
    drawn: Mapping[int, DrawnNode],
    passes: Sequence[str],
) -> DrawnPlace:
    inside = set(keys)
    beside = dict.fromkeys(other for key in keys for other in graph[key] if other not in inside)
    shown = inside | set(islice(beside, MOST_AROUND))
    main = next((key for key in keys if drawn[key].state == "changed"), keys[0])
    done = {name for key in keys for name in drawn[key].done}
    return DrawnPlace(
        drawn[main].name,
        1,
        (),
        next((name for name in reversed(passes) if name in done), ""),
        *(_drawing(matching, side, shown, inside, drawn) for side in (matching.first, matching.second)),
    )


def _drawing(
    matching: NodeMatching,
    side: Side,
    shown: Iterable[int],
    inside: Iterable[int],
    drawn: Mapping[int, DrawnNode],
) -> Drawing:
    own = set(inside)
    nodes = _of(matching, side, shown)
    known = {id(node) for node in nodes}
    pairs = [(maker, node) for node in nodes for maker in side.read_from(node) if id(maker) in known]
    # What is next to a place in the other model alone is not shown here.
    beside = {id(node) for pair in pairs for node in pair}
    nodes = [node for node in nodes if id(node) in beside or matching.mark(side, node) in own]
    at = {id(node): index for index, node in enumerate(nodes)}
    edges = [(at[id(maker)], at[id(node)]) for maker, node in pairs]
    # What is next to a place is drawn as such, whatever happens there.
    told = (
        drawn[id(node)]
        if matching.mark(side, node) in own
        else DrawnNode(drawn[id(node)].name, drawn[id(node)].op, "same")
        for node in nodes
    )
    return Drawing(tuple(told), tuple(dict.fromkeys(edges)))


def _of(matching: NodeMatching, side: Side, marks: Iterable[int]) -> list[Node]:
    """The nodes of one model that have these marks, in its order."""
    found = [node for mark in marks if (node := matching.node(side, mark)) is not None]
    return sorted(found, key=lambda node: side.order[id(node)])


def _kind(place: DrawnPlace) -> object:
    return place.made_by, *(
        (tuple((node.op, node.state, tuple(node.done)) for node in drawing.nodes), drawing.edges)
        for drawing in (place.before, place.after)
    )
