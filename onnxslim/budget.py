"""Which results of constant parts of a graph are worth storing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from onnxslim.graph import Constant, Node, Tensor, Variable


@dataclass(frozen=True)
class Plan:
    """What to store and what thereby becomes unnecessary.

    Attributes:
        stored: tensors whose values are to be put into the model, in the order of their nodes.
        removed: nodes nothing needs any more then.
        refused: nodes that stay because their results are too large, with the bytes of these.
    """

    stored: tuple[Variable, ...]
    removed: tuple[Node, ...]
    refused: tuple[tuple[Node, int], ...]


def plan(nodes: Sequence[Node], nbytes: Callable[[Tensor], int], fixed: set[int], small: int) -> Plan:
    """Store as much as possible without making the model larger.

    Tensors of up to `small` bytes are free. Nodes that pass larger ones to each other, or read the same
    larger constant, form a group, which may store no more bytes of them than it frees.

    Args:
        nodes: those that depend on constants alone, in an order that can be run.
        nbytes: size of a tensor, made or constant.
        fixed: ids of the tensors that are outputs of a graph.
        small: bytes that need no account.
    """
    account = _Account(nodes, nbytes, fixed, small)
    while account.refuse():
        pass
    return account.plan()


class _Account:
    def __init__(
        self, nodes: Sequence[Node], nbytes: Callable[[Tensor], int], fixed: set[int], small: int
    ) -> None:
        self._nodes, self._nbytes, self._fixed, self._small = nodes, nbytes, fixed, small
        self._inside = {id(node) for node in nodes}
        self._group = _groups(nodes, lambda tensor: nbytes(tensor) > small)
        self._refused: dict[int, tuple[Node, int]] = {}
        self._kept: set[int] = set()
        self._credit = self._credits()
        self._stored = self._sweep()

    def plan(self) -> Plan:
        """The result, once `refuse` has nothing more to refuse."""
        removed = tuple(node for node in self._nodes if id(node) not in self._kept)
        return Plan(tuple(reversed(self._stored)), removed, tuple(self._refused.values()))

    def refuse(self) -> bool:
        """Refuse the largest result of each group that stores more than it frees; True if any did."""
        self._credit = self._credits()
        cost: dict[int, int] = defaultdict(int)
        worst: dict[int, Variable] = {}
        for tensor in self._stored:
            size, group = self._nbytes(tensor), self._group[id(tensor.inputs[0])]
            if size > self._small:
                cost[group] += size
                if group not in worst or size > self._nbytes(worst[group]):
                    worst[group] = tensor
        over = [tensor for group, tensor in worst.items() if cost[group] > self._credit[group]]
        for tensor in over:
            self._refuse(tensor.inputs[0], self._nbytes(tensor))
        if over:
            self._stored = self._sweep()
        return bool(over)

    def _refuse(self, node: Node, size: int) -> None:
        self._refused.setdefault(id(node), (node, size))

    def _sweep(self) -> list[Variable]:
        """What must be stored, last first, if only refused nodes and what feeds those stay."""
        self._kept = set()
        stored: list[Variable] = []
        for node in reversed(self._nodes):
            needed = [tensor for tensor in node.outputs if self._is_needed(tensor)]
            limit = max(self._small, self._credit[self._group[id(node)]])
            largest = max((self._nbytes(tensor) for tensor in needed), default=0)
            if largest > limit:
                self._refuse(node, largest)
            if id(node) in self._refused:
                self._kept.add(id(node))
            else:
                stored.extend(reversed(needed))
        return stored

    def _is_needed(self, tensor: Tensor) -> bool:
        return id(tensor) in self._fixed or any(self._stays(reader) for reader in tensor.outputs)

    def _stays(self, node: Node) -> bool:
        return id(node) not in self._inside or id(node) in self._kept

    def _credits(self) -> dict[int, int]:
        """Bytes of the large constants that only removed nodes read, by group."""
        credit: dict[int, int] = defaultdict(int)
        for constant, group in self._constants().values():
            if id(constant) not in self._fixed and not any(self._stays(node) for node in constant.outputs):
                credit[group] += self._nbytes(constant)
        return credit

    def _constants(self) -> dict[int, tuple[Constant, int]]:
        return {
            id(tensor): (tensor, self._group[id(node)])
            for node in self._nodes
            for tensor in node.inputs
            if isinstance(tensor, Constant) and self._nbytes(tensor) > self._small
        }


def _groups(nodes: Iterable[Node], large: Callable[[Tensor], bool]) -> dict[int, int]:
    """Group of each node, by id: nodes connected by large tensors are in one."""
    parent = {id(node): id(node) for node in nodes}

    def root(key: int) -> int:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    first_reader: dict[int, int] = {}
    for node in nodes:
        for tensor in node.inputs:
            if not large(tensor):
                continue
            other = first_reader.setdefault(id(tensor), id(node))
            parent[root(id(node))] = root(other)
            maker = id(tensor.inputs[0]) if tensor.inputs else None
            if maker in parent:
                parent[root(id(node))] = root(maker)
    return {key: root(key) for key in parent}
