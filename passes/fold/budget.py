"""Which results of constant parts of a graph are worth storing.

Two accounts are kept, in bytes.

Large tensors: nodes that pass tensors on to each other, or read the same large constant, form a group, which
may store no more bytes of large tensors than it frees of large constants. So transposing a weight costs
nothing, but expanding a scalar to a large tensor is not done, and neither is copying a weight that another
node reads as it is.

Everything: all that is stored may exceed the constants and the nodes that it makes unnecessary by a given
number of bytes. What counts as large is lowered until that is so.

What is left of that number, if it is not zero, is then spent where it removes most nodes per byte, on results
in a narrower type as well, if that holds them exactly: a Cast is left of their nodes then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxslim.engine.allocate import fewest, settled
from onnxslim.ir.graph import Constant, Node, Tensor, Variable


@dataclass(frozen=True)
class FoldPlan:
    """What to store and what thereby becomes unnecessary.

    Attributes:
        stored: tensors whose values are to be put into the model, in the order of their nodes.
        removed: nodes nothing needs any more then.
        refused: nodes that stay because their results are too large, with the bytes of these.
        growth: bytes by which all this makes the model larger; negative if it gets smaller.
        narrowed: ids of the tensors that are stored in a narrower type.
        kept: nodes that stay, refused ones and those that feed them.
    """

    stored: tuple[Variable, ...]
    removed: tuple[Node, ...]
    refused: tuple[tuple[Node, int], ...]
    growth: int
    narrowed: frozenset[int] = frozenset()
    kept: tuple[Node, ...] = ()

    @property
    def gain(self) -> int:
        """Nodes the model has less."""
        return len(self.removed) - len(self.narrowed)


# A tensor is large from this many bytes on.
LARGE_BYTES = 1024
# A tensor is never large up to this many bytes: the node that makes it takes as much.
TINY_BYTES = 64
# Bytes of a stored tensor besides its name and values: type, dimensions, field headers.
HEADER_BYTES = 16
# Bytes of a Cast besides two names.
CAST_BYTES = 40
# Results that are considered for spending what is left, nodes that one may remove, and how often what is
# left over is tried on the next best.
MAX_OFFERS = 4096
MAX_CONE = 64
MAX_TRIALS = 16

Sizes = Callable[[Tensor], int]
# What is stored although the accounts refuse it: nodes by id, with the bytes of narrower results.
Bought = Mapping[int, "int | None"]


def plan(
    nodes: Sequence[Node],
    nbytes: Sizes,
    fixed: set[int],
    max_growth: int,
    narrow: Callable[[Tensor], int | None] = lambda _: None,
) -> FoldPlan:
    """Store as much as the budget allows.

    Args:
        nodes: those that depend on constants alone, in an order that can be run.
        nbytes: size of a tensor, made or constant.
        fixed: ids of the tensors that are outputs of a graph.
        max_growth: bytes by which the model may become larger.
        narrow: size of a tensor in a narrower type that holds it exactly; None if there is none or it is not
            known.
    """
    small = LARGE_BYTES

    def settle(bought: Bought) -> _Account:
        account = _Account(nodes, nbytes, fixed, small, bought)
        while account.refuse():
            pass
        return account

    while True:
        account = settle({})
        found = account.plan()
        if found.growth <= max_growth or small <= TINY_BYTES:
            break
        small //= 2
    if not max_growth or found.growth >= max_growth or not found.kept:
        return found
    return _spend(account.offers(narrow), found, lambda bought: settle(bought).plan(), max_growth)


def _spend(
    offers: list[_Offer], base: FoldPlan, settle: Callable[[Bought], FoldPlan], limit: int
) -> FoldPlan:
    """Buy results that remove most nodes per byte first, as many as the limit allows, and some more."""
    offers.sort(key=lambda offer: offer.cost / offer.gain)
    plans = {0: base}

    def exceeds(count: int) -> bool:
        plans[count] = settle(_bought(offers[:count]))
        return plans[count].growth > limit

    def more(now: tuple[Bought, FoldPlan], offer: _Offer) -> tuple[Bought, FoldPlan]:
        bought, found = {**now[0], offer.node: offer.narrow}, now[1]
        if found.growth + offer.cost > limit:
            return now
        trial = settle(bought)
        return (bought, trial) if trial.gain > found.gain else now

    count = fewest(exceeds, len(offers)) - 1
    further = offers[count : count + MAX_TRIALS]
    reached = _bought(offers[:count]), plans[count]
    return settled(reached, lambda now: now[1].growth <= limit, lambda _: further, more)[1]


def _bought(offers: Iterable[_Offer]) -> Bought:
    return {offer.node: offer.narrow for offer in offers}


@dataclass(frozen=True)
class _Offer:
    """A result that could be stored.

    Attributes:
        node: its maker's id.
        narrow: bytes of its values in a narrower type; None to store them as they are.
        gain: nodes the model has less then, at least.
        cost: bytes it has more then, at the most.
    """

    node: int
    narrow: int | None
    gain: int
    cost: int


class _Account:
    def __init__(
        self, nodes: Sequence[Node], nbytes: Sizes, fixed: set[int], small: int, bought: Bought
    ) -> None:
        self._nodes, self._nbytes, self._fixed, self._small = nodes, nbytes, fixed, small
        self._bought = bought
        self._inside = {id(node) for node in nodes}
        self._group = _groups(nodes, self._connects)
        self._refused: dict[int, tuple[Node, int]] = {}
        self._kept: set[int] = set()
        self._credit = self._credits()
        self._stored = self._sweep()

    def _connects(self, tensor: Tensor) -> bool:
        """Whether the nodes at a tensor belong together; tiny ones, such as sizes, say nothing."""
        return self._nbytes(tensor) > (TINY_BYTES if tensor.inputs else self._small)

    def plan(self) -> FoldPlan:
        """The result, once `refuse` has nothing more to refuse."""
        removed = tuple(node for node in self._nodes if id(node) not in self._kept)
        stored = tuple(reversed(self._stored))
        cost = sum(self._price(tensor) for tensor in stored)
        freed = sum(map(_declared, removed))
        freed += sum(self._written(constant) for constant in self._freed(0))
        narrowed = frozenset(id(tensor) for tensor in stored if self._narrower(tensor) is not None)
        refused = tuple(self._refused[id(node)] for node in self._nodes if id(node) in self._refused)
        kept = tuple(node for node in self._nodes if id(node) in self._kept)
        return FoldPlan(stored, removed, refused, cost - freed, narrowed, kept)

    def offers(self, narrow: Callable[[Tensor], int | None]) -> list[_Offer]:
        """What storing the results of each node that stays would cost and bring."""
        found: list[_Offer] = []
        for node in [node for node in self._nodes if id(node) in self._kept][:MAX_OFFERS]:
            gain, freed = self._cone(node)
            needed = [tensor for tensor in node.outputs if self._is_needed(tensor)]
            found.append(_Offer(id(node), None, gain, sum(map(self._written, needed)) - freed))
            size = narrow(needed[0]) if len(needed) == 1 else None
            if size is not None and gain > 1:
                price = size + _cast_bytes(needed[0])
                found.append(_Offer(id(node), size, gain - 1, price - freed))
        return found

    def _cone(self, node: Node) -> tuple[int, int]:
        """How many nodes, and bytes of nodes and constants, only serve this node, itself included."""
        cone, counted = {id(node)}, set[int]()
        freed, pending = _declared(node), [node]
        while pending and len(cone) < MAX_CONE:
            for tensor in pending.pop().inputs:
                others = [reader for reader in tensor.outputs if id(reader) not in cone]
                if id(tensor) in counted or id(tensor) in self._fixed or any(map(self._stays, others)):
                    continue
                maker = tensor.inputs[0] if tensor.inputs else None
                if maker is None or id(maker) not in self._kept:
                    counted.add(id(tensor))
                    freed += self._written(tensor)
                elif id(maker) not in cone and len(maker.outputs) == 1:
                    cone.add(id(maker))
                    freed += _declared(maker)
                    pending.append(maker)
        return len(cone), freed

    def _narrower(self, tensor: Tensor) -> int | None:
        return self._bought.get(id(tensor.inputs[0]))

    def _price(self, tensor: Tensor) -> int:
        """Bytes of a stored result, and of the Cast behind it."""
        size = self._narrower(tensor)
        if size is None:
            return self._written(tensor)
        return size + _cast_bytes(tensor)

    def _written(self, tensor: Tensor) -> int:
        """Bytes of a constant in a model file."""
        return self._nbytes(tensor) + len(tensor.name) + HEADER_BYTES

    def refuse(self) -> bool:
        """Refuse the largest result of each group that stores more than it frees; True if any did."""
        self._credit = self._credits()
        cost: dict[int, int] = defaultdict(int)
        worst: dict[int, Variable] = {}
        for tensor in self._stored:
            size, group = self._nbytes(tensor), self._group[id(tensor.inputs[0])]
            if size > self._small and id(tensor.inputs[0]) not in self._bought:
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
            if largest > limit and id(node) not in self._bought:
                self._refuse(node, largest)
            if id(node) not in self._refused:
                stored.extend(reversed(needed))
            elif needed:
                self._kept.add(id(node))
        return stored

    def _is_needed(self, tensor: Tensor) -> bool:
        return id(tensor) in self._fixed or any(self._stays(reader) for reader in tensor.outputs)

    def _stays(self, node: Node) -> bool:
        return id(node) not in self._inside or id(node) in self._kept

    def _credits(self) -> dict[int, int]:
        """Bytes of the large constants that are no longer read, by group."""
        credit: dict[int, int] = defaultdict(int)
        for constant in self._freed(self._small):
            reader = next(node for node in constant.outputs if id(node) in self._inside)
            credit[self._group[id(reader)]] += self._nbytes(constant)
        return credit

    def _freed(self, above: int) -> Iterator[Constant]:
        """Constants of more than so many bytes that only removed nodes read."""
        seen: set[int] = set()
        for node in self._nodes:
            for tensor in node.inputs:
                if isinstance(tensor, Constant) and id(tensor) not in seen and self._nbytes(tensor) > above:
                    seen.add(id(tensor))
                    if id(tensor) not in self._fixed and not any(map(self._stays, tensor.outputs)):
                        yield tensor


def _declared(node: Node) -> int:
    """Bytes of a node in a model file."""
    return node.proto.ByteSize() if node.proto is not None else 0


def _cast_bytes(tensor: Tensor) -> int:
    """Bytes of a Cast, and of the constant before it besides its values."""
    return CAST_BYTES + HEADER_BYTES + 3 * len(tensor.name)


def _groups(nodes: Iterable[Node], connects: Callable[[Tensor], bool]) -> dict[int, int]:
    """Group of each node, by id."""
    parent = {id(node): id(node) for node in nodes}

    def root(key: int) -> int:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    first_reader: dict[int, int] = {}
    for node in nodes:
        for tensor in node.inputs:
            if not connects(tensor):
                continue
            other = first_reader.setdefault(id(tensor), id(node))
            parent[root(id(node))] = root(other)
            maker = id(tensor.inputs[0]) if tensor.inputs else None
            if maker in parent:
                parent[root(id(node))] = root(maker)
    return {key: root(key) for key in parent}
