"""Constant folding with a budget.

Three things are computed ahead of time: what depends on constants alone, by running it in ONNX Runtime; sizes
that are known although the tensor is not; and targets of Reshape and Expand that can be stated without
looking at their input.

What is stored must not make the model larger: see `onnxslim.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper
from pydantic import Field

from onnxslim import budget, files, proto
from onnxslim import graph as ir
from onnxslim.dims import Dims
from onnxslim.errors import LoadError
from onnxslim.evaluate import evaluate
from onnxslim.graph import Array, Constant, Graph, Namer, Node, Tensor, Variable
from onnxslim.model import DEFAULT_DOMAINS, Model, literal
from onnxslim.ops import spec_of
from onnxslim.passes import dead
from onnxslim.pipeline import MAX_ROUNDS, Changes, Context, Log, Pass, options
from onnxslim.terms import Term

# A node is not run ahead of time if it makes this much more than the largest constant it depends on.
WORKING_BYTES = 64 << 20
# Sessions opened in one run; more are needed only to find out what ONNX Runtime cannot compute.
MAX_SESSIONS = 256
# The size of their results depends on values, but has at most so many bytes per element they read.
_BYTES_PER_INPUT = {"NonZero": 64, "Compress": 16, "Unique": 16}
_DIVISIONS = frozenset(("Div", "Mod"))


@options
class Fold(Pass):
    """Compute what does not depend on the inputs: constants, known sizes, targets of reshapes.

    Results are stored only where that does not make the model larger by more than `max_growth` bytes.
    """

    name: ClassVar[str] = "fold"
    lossless: ClassVar[bool] = True

    max_growth: int = Field(0, ge=0, description="bytes by which stored results may make the model larger")

    def run(self, model: Model, ctx: Context) -> Changes:
        """Fold until nothing more can be computed."""
        log = Log()
        edits = _Edits(model, log)
        _lower_constants(edits, self.max_growth)
        values = _Values(edits, self.max_growth)
        _make_scalars(edits)
        for _ in range(MAX_ROUNDS):
            if not any(values.may_fold(node) or _is_sizing(node) for node in model.nodes()):
                break
            dims = Dims(model)
            folded = [_fold_sizes(edits, dims), _settle_targets(edits, dims), values.fold(dims)]
            if not any([*folded, _share_sizes(edits, dims)]):
                break
        edits.clean_up()
        for node, reason in values.notes():
            log.skip(node.label, reason)
        return log.done()


class _Edits:
    """Replaces nodes by their values, and cleans up after that."""

    def __init__(self, model: Model, log: Log) -> None:
        self.model, self.log = model, log
        self.fixed = ir.protected(model.graph)
        self._own = model.functions
        self._storable = _constant_types(model.opset)
        self._name: Namer | None = None
        self._unread = dead.unread(model)
        # Nodes that lost a reader.
        self._makers: list[Node] = []

    def is_standard(self, node: Node) -> bool:
        """Whether a node is of the standard domain and not of a function of the model that hides it."""
        return node.domain in DEFAULT_DOMAINS and ("", node.op) not in self._own

    def can_store(self, tensor: Variable, dtype: np.dtype[Any]) -> bool:
        """Whether a tensor can be replaced by values; early Constant nodes, for outputs, only hold floats."""
        return id(tensor) not in self.fixed or dtype in self._storable

    def replace(self, nodes: Iterable[Node], values: Mapping[int, Array]) -> None:
        """Put values, by id of the tensor, in the place of nodes."""
        gone = {id(node) for node in nodes}
        for graph in self.model.graphs():
            if gone.isdisjoint(id(node) for node in graph.nodes):
                continue
            kept: list[Node] = []
            for node in graph.nodes:
                kept.extend(self._store(node, values, graph) if id(node) in gone else [node])
            graph.nodes[:] = kept

    def _store(self, node: Node, values: Mapping[int, Array], graph: Graph) -> Iterator[Node]:
        """Store the outputs of a node; an output of the graph gets a Constant node, which is returned."""
        self.log.change(node.label, "computed ahead of time", node.op)
        outputs = list(node.outputs)
        self.forget_inputs(node)
        for tensor in outputs:
            if id(tensor) not in values:
                continue
            if id(tensor) in self.fixed:
                yield Node("Constant", node.name, {"value": _attribute(values[id(tensor)])}, [], [tensor])
            else:
                self.substitute(tensor, Constant(tensor.name, np.asarray(values[id(tensor)])), graph)

    def forget_inputs(self, node: Node) -> None:
        """Unlink a node and remember what it read."""
        self._makers.extend(maker for tensor in node.inputs if (maker := ir.producer(tensor)))
        ir.detach(node)

    def release(self, node: Node) -> None:
        """Remember that a node has lost readers."""
        self._makers.append(node)

    def substitute(self, tensor: Variable, constant: Constant, graph: Graph) -> None:
        """Let a constant stand for a tensor that has lost its maker."""
        self.declare(constant, graph)
        ir.replace_uses(tensor, constant)

    def set_constant(self, node: Node, index: int, wanted: str, values: Array, graph: Graph) -> None:
        """Give a node of a graph a constant input, named after `wanted`."""
        constant = Constant(self.fresh(wanted), values)
        self.declare(constant, graph)
        self._makers.extend(node.inputs[index].inputs)
        node.inputs[index] = constant

    def declare(self, constant: Constant, graph: Graph) -> None:
        """Add a constant to a graph; a body of an old model cannot have any, so it goes to the main graph."""
        if graph is self.model.graph or self.model.ir_version >= proto.OVERRIDABLE_SINCE_IR:
            graph.initializers[constant.name] = constant
        else:
            constant.name = self.fresh(constant.name)

    def fresh(self, wanted: str) -> str:
        """A name that nothing in the model has."""
        if self._name is None:
            self._name = Namer(self.model.graph)
        return self._name(wanted)

    def clean_up(self) -> None:
        """Remove what nothing reads any more."""
        dead.remove_nodes(self.model, self._makers)
        dead.remove_constants(self.model, self._unread)


def _constant_types(opset: int) -> set[np.dtype[Any]]:
    """Element types of Constant nodes."""
    allowed = onnx.defs.get_schema("Constant", opset, "").type_constraints[0].allowed_type_strs
    names = {name.removeprefix("tensor(").removesuffix(")").upper() for name in allowed}
    types = (proto.dtype_of(number) for name, number in TensorProto.DataType.items() if name in names)
    return {dtype for dtype in types if dtype is not None}


def _attribute(values: Array) -> AttributeProto:
    return AttributeProto(name="value", type=AttributeProto.TENSOR, t=numpy_helper.from_array(values))


# ------------------------------------------------------------------------------------- Constant nodes


def _lower_constants(edits: _Edits, max_growth: int) -> None:
    """Make initializers of Constant nodes; those that are outputs of a graph stay as they are."""
    for graph in edits.model.graphs():
        gone: set[int] = set()
        for node in graph.nodes:
            if node.op != "Constant" or not edits.is_standard(node) or id(node.outputs[0]) in edits.fixed:
                continue
            constant = _lowered(node, max_growth)
            if constant is None:
                edits.log.skip(node.label, "it is sparse, and would be larger as an initializer")
                continue
            edits.log.change(node.label, "made an initializer")
            tensor = node.outputs[0]
            ir.detach(node)
            gone.add(id(node))
            edits.substitute(tensor, constant, graph)
        ir.sweep(graph, gone)


def _lowered(node: Node, max_growth: int) -> Constant | None:
    name, value = node.outputs[0].name, node.attrs.get("value")
    if isinstance(value, AttributeProto):
        return Constant(name, proto=value.t, load=lambda: files.decode(value.t, None))
    sparse = node.attrs.get("sparse_value")
    if isinstance(sparse, AttributeProto):
        dense = Constant(
            name,
            proto=sparse.sparse_tensor,
            load=proto.dense(sparse.sparse_tensor, lambda tensor: files.decode(tensor, None)),
        )
        if dense.nbytes > max(max_growth, sparse.ByteSize()):
            return None
        return Constant(name, dense.values)
    for form in ("value_string", "value_strings"):
        if form in node.attrs:
            return Constant(name, np.array(node.attrs[form], np.object_))
    values = literal(node)
    return None if values is None else Constant(name, values)


def _make_scalars(edits: _Edits) -> None:
    """Make scalars of constant vectors where Range wants scalars.

    ONNX Runtime takes a vector of one element there, but only as long as it is not a constant.
    """
    for graph in edits.model.graphs():
        for node in graph.nodes:
            if node.op != "Range" or not edits.is_standard(node):
                continue
            for index, tensor in enumerate(node.inputs):
                if isinstance(tensor, Constant) and tensor.shape == (1,):
                    edits.log.change(node.label, "reads a scalar instead of a vector of one", node.op)
                    edits.set_constant(node, index, f"{tensor.name}_scalar", tensor.values.reshape(()), graph)


# ---------------------------------------------------------------------------------------- known sizes


def _is_sizing(node: Node) -> bool:
    """Whether sizes may be all it takes to simplify this node."""
    return node.op in _SIZING or (node.op in _TARGETED and not _has_known_target(node))


def _has_known_target(node: Node) -> bool:
    target = node.input(1)
    maker = ir.producer(target)
    return target is None or isinstance(target, Constant) or (maker is not None and maker.op == "Constant")


def _fold_sizes(edits: _Edits, dims: Dims) -> bool:
    """Replace integers that are known although the tensors whose sizes they are are not."""
    known: dict[int, Array] = {}
    nodes: dict[int, Node] = {}
    for node in edits.model.nodes():
        if len(node.outputs) == 1 and node.op != "Constant":
            vector = dims.value(node.outputs[0])
            values = vector.array() if vector is not None else None
            if values is not None and edits.can_store(node.outputs[0], values.dtype):
                nodes[id(node)] = node
                known[id(node.outputs[0])] = values
    needed = {
        id(tensor): known[id(tensor)]
        for node in nodes.values()
        for tensor in node.outputs
        if id(tensor) in edits.fixed or any(id(reader) not in nodes for reader in tensor.outputs)
    }
    edits.replace(nodes.values(), needed)
    return bool(nodes)


def _settle_targets(edits: _Edits, dims: Dims) -> bool:
    """Give Reshape and Expand nodes constant targets where those can be stated."""
    changed = False
    for graph in edits.model.graphs():
        for node in graph.nodes:
            rule = _TARGETED.get(node.op)
            if rule is None or not edits.is_standard(node) or _has_known_target(node):
                continue
            target = rule(node, dims)
            if target is not None:
                edits.log.change(node.label, f"target shape stated as {target}", node.op)
                values = np.array(target, np.int64)
                # Zeros of a stated target copy.
                node.attrs.pop("allowzero", None)
                edits.set_constant(node, 1, f"{node.outputs[0].name}_shape", values, graph)
                changed = True
    return changed


def _reshape_target(node: Node, dims: Dims) -> list[int] | None:
    sizes = dims.sizes(node.outputs[0])
    if sizes is not None and 0 not in sizes:
        return list(sizes)
    wanted = dims.value(node.inputs[1])
    if wanted is None or wanted.scalar or None in wanted.terms:
        return None
    if node.attrs.get("allowzero") and 0 in wanted.terms:
        return None
    return _stated(wanted.terms, dims.shape(node.inputs[0]) or ())


def _stated(wanted: Sequence[Term | None], own: Sequence[Term]) -> list[int] | None:
    """A target with 0 for sizes that are kept and -1 for one that follows from the others.

    -1 is right only beside sizes that are not zero: an empty tensor does not say what it stands for.
    """
    target: list[int] = []
    unknown: list[int] = []
    for axis, term in enumerate(wanted):
        if isinstance(term, int):
            target.append(term)
        elif axis < len(own) and own[axis] == term:
            target.append(0)
        else:
            unknown.append(axis)
            target.append(-1)
    others = [size for axis, size in enumerate(target) if axis not in unknown]
    right = not unknown or (len(unknown) == 1 and all(size > 0 for size in others))
    return target if right else None


def _share_sizes(edits: _Edits, dims: Dims) -> bool:
    """Let integers that are sizes of one tensor stand for those that are the same sizes of others."""
    shadowed, _ = ir.shadowing(edits.model.graph)
    changed = False
    for graph in edits.model.graphs():
        first: dict[Any, Variable] = {}
        for node in graph.nodes:
            vector = dims.value(node.outputs[0]) if len(node.outputs) == 1 and node.inputs else None
            if vector is None or None in vector.terms or vector.numbers is not None:
                continue
            tensor = node.outputs[0]
            same = first.setdefault(vector, tensor)
            if same is not tensor and tensor.outputs and same.name not in shadowed:
                edits.log.change(node.label, f"replaced by '{same.name}', which is equal", node.op)
                ir.replace_uses(tensor, same)
                edits.release(node)
                changed = True
    return changed


def _expand_target(node: Node, dims: Dims) -> list[int] | None:
    sizes = dims.sizes(node.outputs[0])
    if sizes is not None:
        return list(sizes)
    wanted, own = dims.value(node.inputs[1]), dims.shape(node.inputs[0])
    if wanted is None or wanted.scalar or own is None:
        return None
    # Aligned at the end; 1 keeps the size of the input.
    padded = (*(None,) * (len(wanted.terms) - len(own)), *own)[-len(wanted.terms) :]
    target = [
        term if isinstance(term, int) else 1
        for term, size in zip(wanted.terms, padded, strict=True)
        if isinstance(term, int) or (term is not None and term == size)
    ]
    return target if len(target) == len(wanted.terms) else None


_SIZING = frozenset(("Shape", "Size"))
_TARGETED = {"Reshape": _reshape_target, "Expand": _expand_target}


# ------------------------------------------------------------------------------------ constant values


class _Values:
    """Computes what depends on constants alone."""

    def __init__(self, edits: _Edits, max_growth: int) -> None:
        self._edits, self._max_growth = edits, max_growth
        self._sessions = 0
        self._failed: dict[int, tuple[Node, str]] = {}
        self._notes: dict[int, tuple[Node, str]] = {}
        self._values: dict[int, Array] = {}
        self._dims: Dims

    def may_fold(self, node: Node) -> bool:
        """Whether this node may be computed ahead of time, as far as its operator and inputs tell."""
        return self._is_allowed(node) and all(self._is_constant(tensor) for tensor in _reads(node))

    def notes(self) -> Iterator[tuple[Node, str]]:
        """Nodes that stayed although they depend on constants alone, and why."""
        yield from self._notes.values()
        yield from self._failed.values()

    def fold(self, dims: Dims) -> bool:
        """Replace nodes by their values; True if any was."""
        self._dims, self._values = dims, self._literals()
        while True:
            nodes = self._candidates()
            plan = budget.plan(nodes, self._nbytes, self._edits.fixed, self._max_growth)
            missing = {id(tensor) for tensor in plan.stored if id(tensor) not in self._values}
            if not missing:
                break
            self._compute(nodes, missing)
        for node, size in plan.refused:
            self._note(node, f"storing its result of {size} bytes would make the model larger")
        self._edits.replace(plan.removed, {id(tensor): self._values[id(tensor)] for tensor in plan.stored})
        self._values = {}
        return bool(plan.removed)

    def _note(self, node: Node, reason: str) -> None:
        self._notes[id(node)] = (node, reason)

    def _is_allowed(self, node: Node) -> bool:
        return (
            self._edits.is_standard(node)
            and not node.bodies
            and bool(_reads(node))
            and spec_of(node).foldable
            and id(node) not in self._failed
        )

    def _is_constant(self, tensor: Tensor) -> bool:
        node = ir.producer(tensor)
        return isinstance(tensor, Constant) or (node is not None and node.op == "Constant")

    def _literals(self) -> dict[int, Array]:
        """Values of the Constant nodes that had to stay."""
        nodes = (node for node in self._edits.model.nodes() if node.op == "Constant")
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
            if node.op in _DIVISIONS and self._may_trap(node):
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
            return math.prod(sizes) * max(ir.bit_width(dtype), 8)
        read = [self._dims.sizes(each) for each in _reads(node)]
        if node.op not in _BYTES_PER_INPUT or None in read:
            return None
        return _BYTES_PER_INPUT[node.op] * sum(math.prod(sizes) for sizes in read if sizes is not None)

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


def _stored_bytes(values: Array) -> int:
    if values.dtype.kind == "O":
        return sum(len(str(item)) for item in values.reshape(-1))
    return (values.size * ir.bit_width(values.dtype) + 7) // 8
