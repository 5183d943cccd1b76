"""What depends on constants alone, computed by ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set

import numpy as np

from onnxslim.errors import LoadError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Node, Tensor, Variable
from onnxslim.ir.model import is_literal, literal
from onnxslim.ops import Trait, has, spec_of
from onnxslim.passes.fold import budget
from onnxslim.passes.fold.edits import Edits
from onnxslim.runtime.evaluate import evaluate
from onnxslim.shapes.dims import Dims

# A node is not run ahead of time if it makes this much more than the largest constant it depends on.
WORKING_BYTES = 64 << 20
# Why a result that could be computed is not stored.
TOO_LARGE = "would make the model larger"
# Sessions opened in one run; more are needed only to find out what ONNX Runtime cannot compute.
MAX_SESSIONS = 256
# Bytes of a string in memory, besides its characters.
_STRING_BYTES = 32
# Types that take less space and are understood everywhere, by type; bool takes zeros and ones.
_NARROWER = {
    np.dtype(np.float64): (np.bool_, np.float16, np.float32),
    np.dtype(np.float32): (np.bool_, np.float16),
    np.dtype(np.int64): (np.bool_, np.int32),
}
# At best so many bytes become one.
_NARROWING = 8
# Before, Cast named types with words.
_CAST_SINCE = 6


class Values:
    """Computes what depends on constants alone.

    Args:
        edits: of the model.
        max_growth: bytes by which stored results may make the model larger.
        only: ids of the nodes to look at; all by default.
    """

    def __init__(self, edits: Edits, max_growth: int, only: Set[int] | None = None) -> None:
        self._edits, self._max_growth, self._only = edits, max_growth, only
        self._sessions = 0
        self._failed: dict[int, tuple[Node, str]] = {}
        self._notes: dict[int, tuple[Node, str]] = {}
        self._values: dict[int, Array] = {}
        self._dims: Dims

    def may_fold(self, node: Node) -> bool:
        """Whether this node may be computed ahead of time, as far as its operator and inputs tell."""
        return self._is_allowed(node) and all(map(is_constant, _reads(node)))

    def notes(self) -> Iterator[tuple[Node, str]]:
        """Nodes that stayed although they depend on constants alone, and why."""
        yield from self._notes.values()
        yield from self._failed.values()

    def fold(self, dims: Dims) -> bool:
        """Replace nodes by their values; True if any was."""
        self._dims, self._values = dims, self._literals()
        priced: set[int] = set()
        while True:
            nodes = self._candidates()
            plan = budget.plan(nodes, self._nbytes, self._edits.fixed, self._max_growth, self._narrow)
            missing = {id(tensor) for tensor in plan.stored if id(tensor) not in self._values}
            missing = missing or self._to_be_priced(plan) - priced
            if not missing:
                break
            priced |= missing
            self._compute(nodes, missing)
        for node, size in plan.refused:
            self._note(node, f"storing its result of {size} bytes {TOO_LARGE}")
        self._max_growth -= max(plan.growth, 0)
        values = {id(tensor): self._values[id(tensor)] for tensor in plan.stored}
        self._edits.replace(plan.removed, values, {key: narrower(values[key]) for key in plan.narrowed})
        self._values = {}
        return bool(plan.removed)

    def _to_be_priced(self, plan: budget.FoldPlan) -> set[int]:
        """Results of nodes that stay and could be stored in a narrower type, as far as their size tells."""
        results = {id(tensor): tensor for node in plan.kept for tensor in node.outputs if tensor.name}
        sizes = sorted((self._nbytes(tensor), key) for key, tensor in results.items())
        limit, total = self._max_growth * _NARROWING, np.cumsum([size for size, _ in sizes])
        return {
            key
            for (size, key), together in zip(sizes, total, strict=True)
            if size <= limit and together <= WORKING_BYTES and key not in self._values
        }

    def _narrow(self, tensor: Tensor) -> int | None:
        """Bytes of a result in the narrower type it fits into, if any."""
        values = self._values.get(id(tensor))
        narrow = None if values is None or self._edits.model.opset < _CAST_SINCE else narrower(values)
        return None if narrow is None else narrow.nbytes

    def _note(self, node: Node, reason: str) -> None:
        self._notes[id(node)] = (node, reason)

    def _is_allowed(self, node: Node) -> bool:
        return (
            (self._only is None or id(node) in self._only)
            and self._edits.is_standard(node)
            and not node.bodies
            and bool(_reads(node))
            and spec_of(node).foldable
            and id(node) not in self._failed
        )

    def _literals(self) -> dict[int, Array]:
        """Values of the Constant nodes that had to stay."""
        nodes = (node for node in self._edits.model.nodes() if is_literal(node))
        found = ((node.outputs[0], literal(node)) for node in nodes if self._edits.is_standard(node))
        return {id(tensor): values for tensor, values in found if values is not None and tensor.outputs}

    def _candidates(self) -> list[Node]:
        """Nodes that depend on constants alone and can be run without needing too much memory."""
        self._notes.clear()
        nodes: list[Node] = []
        largest: dict[int, int] = {}
        for node in self._edits.model.nodes():
            reads = _reads(node)
            if not self._is_allowed(node):
                continue
            if not all(id(tensor) in largest or self._is_known(tensor) for tensor in reads):
                continue
            room = max(largest.get(id(tensor)) or self._nbytes(tensor) for tensor in reads)
            obstacle = self._obstacle(node, room + WORKING_BYTES)
            if obstacle:
                self._note(node, obstacle)
                continue
            nodes.append(node)
            largest.update((id(tensor), room) for tensor in node.outputs)
        return nodes

    def _obstacle(self, node: Node, room: int) -> str:
        """Why a node cannot be run ahead of time; empty if it can."""
        total = 0
        for tensor in node.outputs:
            if not tensor.name:
                continue
            if has(node, Trait.DIVIDES) and self._may_trap(node):
                return "dividing these integers ahead of time could end the process"
            dtype = self._dims.dtype(tensor)
            if dtype is None:
                return "the type of its result is not known"
            if not self._edits.can_store(tensor, dtype):
                return f"it makes an output, and this opset has no Constant of type {dtype}"
            size = self._limit(tensor, node)
            if size is None:
                return "the size of its result is not known"
            total += size
        return f"its result of {total} bytes is too large" if total > room else ""

    def _may_trap(self, node: Node) -> bool:
        """Whether integers are divided by zero, or the least one by -1, as far as one can see."""
        dividend, divisor = (self._known(tensor) for tensor in node.inputs)
        if divisor is None:
            dtype = self._dims.dtype(node.inputs[1])
            return dtype is None or dtype.kind in "iu"
        if divisor.dtype.kind not in "iu":
            return False
        if (divisor == 0).any():
            return True
        if divisor.dtype.kind == "u" or not (divisor == -1).any():
            return False
        return dividend is None or bool((dividend == np.iinfo(dividend.dtype).min).any())

    def _known(self, tensor: Tensor) -> Array | None:
        return tensor.values if isinstance(tensor, Constant) else self._values.get(id(tensor))

    def _limit(self, tensor: Variable, node: Node) -> int | None:
        """Bytes a result can have at the most."""
        sizes, dtype = self._dims.sizes(tensor), self._dims.dtype(tensor)
        if sizes is not None and dtype is not None:
            return math.prod(sizes) * (dtype.itemsize if dtype.kind != "O" else _STRING_BYTES)
        read, most = [self._dims.sizes(each) for each in _reads(node)], spec_of(node).at_most
        if most is None or None in read:
            return None
        return most * sum(math.prod(sizes) for sizes in read if sizes is not None)

    def _is_known(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Constant) or id(tensor) in self._values

    def _nbytes(self, tensor: Tensor) -> int:
        """Bytes of a tensor in the file; 0 as long as they are not known."""
        if id(tensor) in self._values:
            return _stored_bytes(self._values[id(tensor)])
        if isinstance(tensor, Constant):
            return tensor.nbytes
        sizes, dtype = self._dims.sizes(tensor), self._dims.dtype(tensor)
        if sizes is None or dtype is None:
            return 0
        return (math.prod(sizes) * ir.bit_width(dtype) + 7) // 8

    def _compute(self, nodes: Sequence[Node], wanted: set[int]) -> None:
        """Compute tensors; where that fails, halve the nodes until it is known which ones are to blame."""
        ready = self._computable(_cone(nodes, wanted - self._values.keys()))
        outputs = [tensor for node in ready for tensor in node.outputs if id(tensor) in wanted]
        if not outputs:
            return
        try:
            self._values.update(self._run(ready, outputs))
        except LoadError as error:
            if len(ready) == 1 or self._sessions >= MAX_SESSIONS:
                self._failed.update((id(node), (node, str(error))) for node in ready)
                return
            first, second = ready[: len(ready) // 2], ready[len(ready) // 2 :]
            self._compute(first, wanted | {id(tensor) for node in second for tensor in node.inputs})
            self._compute(second, wanted)

    def _computable(self, nodes: Sequence[Node]) -> list[Node]:
        """Those of the nodes that depend on nothing that failed."""
        made: set[int] = set()
        ready: list[Node] = []
        for node in nodes:
            if id(node) not in self._failed and all(
                id(tensor) in made or self._is_known(tensor) for tensor in _reads(node)
            ):
                ready.append(node)
                made.update(id(tensor) for tensor in node.outputs)
        return ready

    def _run(self, nodes: Sequence[Node], outputs: Sequence[Variable]) -> dict[int, Array]:
        self._sessions += 1
        wanted = [(tensor, dtype) for tensor in outputs if (dtype := self._dims.dtype(tensor)) is not None]
        return evaluate(self._edits.model, nodes, wanted, self._values)


def _cone(nodes: Sequence[Node], wanted: set[int]) -> list[Node]:
    """Those of the nodes that it takes to make these tensors, by id."""
    needed = set(wanted)
    cone: list[Node] = []
    for node in reversed(nodes):
        if any(id(tensor) in needed for tensor in node.outputs):
            needed.update(id(tensor) for tensor in node.inputs)
            cone.append(node)
    return cone[::-1]


def _reads(node: Node) -> list[Tensor]:
    return [tensor for tensor in node.inputs if tensor.name]


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor is in the model, be it an initializer or the output of a Constant node."""
    return isinstance(tensor, Constant) or is_literal(ir.producer(tensor))


def narrower(values: Array) -> Array | None:
    """The same values in a type that takes less space, if there is one that holds every bit of them."""
    with np.errstate(all="ignore"):
        for dtype in _NARROWER.get(values.dtype, ()):
            narrow = values.astype(dtype)
            if narrow.astype(values.dtype).tobytes() == values.tobytes():
                return narrow
    return None


def _stored_bytes(values: Array) -> int:
    if values.dtype.kind == "O":
        return sum(len(str(item)) for item in values.reshape(-1))
    return (values.size * ir.bit_width(values.dtype) + 7) // 8
