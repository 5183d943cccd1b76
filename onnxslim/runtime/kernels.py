"""Whether a target can run operators in another type, found out by models of nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx.parser

from onnxslim.errors import LoadError, TargetError
from onnxslim.ir import graph as ir
from onnxslim.ir import proto
from onnxslim.ir.alone import alone
from onnxslim.ir.graph import Array, Constant, Node, Tensor, Variable
from onnxslim.ir.model import Model, load
from onnxslim.runtime.native import LACKING
from onnxslim.runtime.profile import may_stray
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

MATCHES = ("Cast",)

# Larger constants are read as inputs: no kernel is chosen by the values of weights.
MAX_BYTES = 1024
# Nodes that read more are opened and not run; so are those with axes whose number is not known.
MAX_FED = 1 << 20
# Size of free axes where nodes are run.
FREE = 2
_WIDE = np.dtype(np.float32)


def without_kernel(nodes: Sequence[Node], model: Model, kind: np.dtype[Any], target: Target) -> list[int]:
    """Ids of the nodes that a target refuses once they compute in a type instead of float32.

    Args:
        nodes: of the standard domain, without bodies.
        model: what they belong to.
        kind: the type.
        target: what is asked. Nodes that differ in nothing but tensors of other shapes are asked of together.
    """
    alike: dict[str, list[Node]] = {}
    for node in nodes:
        alike.setdefault(kernel_key(node), []).append(node)
    first = {id(group[0]): group for group in alike.values()}

    def opens(some: Sequence[Node], held: np.dtype[Any] = kind) -> bool:
        return _opens(_alone(some, model, held), target)

    def runs(some: Sequence[Node], held: np.dtype[Any] = kind) -> bool:
        return _runs(_alone(some, model, held), target)

    refused = _failing([group[0] for group in first.values()], opens)
    # Some kernels refuse a type only when they run, for what an attribute asks. NumPy has no bfloat16.
    light = [node for node in _others(first, refused) if _is_light(node)] if kind.kind == "f" else []
    refused += [node for node in _failing(light, runs) if runs([node], _WIDE)]
    return [id(node) for each in refused for node in first[id(each)]]


def require_type(kind: np.dtype[Any], target: Target) -> None:
    """See that a device computes in a type at all, before nodes are asked for one by one.

    Args:
        kind: the type.
        target: what is asked; processors, which turn what they lack into float32, are not.

    Raises:
        TargetError: a small product runs there in float32, but not in the type.
    """
    if may_stray(target) and _runs(_product(_WIDE), target):
        try:
            _run_on_zeros(_product(kind), target)
        except (LoadError, TargetError) as error:
            raise TargetError(f"{target.name} does not compute in {kind.name} here: {error}") from error


def _product(kind: np.dtype[Any]) -> bytes:
    name = "float" if kind == _WIDE else kind.name
    text = f"g ({name}[2,2] x) => ({name}[2,2] y) {{ y = MatMul(x, x) }}"
    return bytes(
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13]> {text}').SerializeToString()
    )


def kernel_key(node: Node) -> str:
    """The same for nodes that differ in nothing but tensors of other shapes."""
    types = [tensor.dtype for tensor in (*node.inputs, *node.outputs)]
    return f"{node.op} {sorted(node.attrs.items(), key=str)} {types}"


def first_breaking(
    make: Callable[[int], Model], count: int, target: Target, feeds: Mapping[str, Array] | None
) -> int | None:
    """Which of some changes, in their order, is the first with which a target no longer runs a model.

    A target may refuse, or end at, what several nodes are together, though it runs each of them.

    Args:
        make: the model with the first so many of the changes.
        count: how many there are.
        target: runs the models in a process of its own, which it may end.
        feeds: what the model runs on without; None if it is to be opened alone.

    Returns:
        Its place; None if the target runs the model with all of them, or does not even without.
    """
    if _runs_apart(make(count), target, feeds) or not _runs_apart(make(0), target, feeds):
        return None
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if _runs_apart(make(middle), target, feeds) else (good, middle)
    return good


def _runs_apart(model: Model, target: Target, feeds: Mapping[str, Array] | None) -> bool:
    try:
        session = Session(model, target, once=True)
        if feeds is not None:
            session.run(feeds)
    except (LoadError, TargetError):
        return False
    return True


def _others(first: dict[int, list[Node]], refused: Sequence[Node]) -> list[Node]:
    out = set(map(id, refused))
    return [group[0] for key, group in first.items() if key not in out]


def _is_light(node: Node) -> bool:
    fed = [tensor for tensor in node.inputs if tensor.name and not _is_kept(tensor)]
    return all(tensor.shape is not None for tensor in fed) and sum(map(_fed_bytes, fed)) <= MAX_FED


def _fed_bytes(tensor: Tensor) -> int:
    width = tensor.dtype.itemsize if tensor.dtype is not None else 1
    return math.prod(_fed_shape(tensor)) * width


def _fed_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else FREE for dim in tensor.shape or ())


def _failing(nodes: Sequence[Node], works: Callable[[Sequence[Node]], bool]) -> list[Node]:
    """Those that do not work by themselves: all at once, and in halves where that fails."""
    if not nodes or works(nodes):
        return []
    if len(nodes) == 1:
        return list(nodes)
    middle = len(nodes) // 2
    return [node for half in (nodes[:middle], nodes[middle:]) for node in _failing(half, works)]


def is_lacking(model: bytes, target: Target) -> bool:
    """Whether a target refuses a model because it has no kernel for something in it."""
    return LACKING in _refusal(model, target)


def _opens(model: bytes, target: Target) -> bool:
    return not _refusal(model, target)


@lru_cache(256)
def _refusal(model: bytes, target: Target) -> str:
    """Why a target does not open a model; empty if it does."""
    try:
        Session(onnx.ModelProto.FromString(model), target, optimize="none")
    except (LoadError, TargetError) as error:
        return str(error)
    return ""


@lru_cache(256)
def _runs(model: bytes, target: Target) -> bool:
    """Whether a model runs on zeros, which are indices of everything."""
    try:
        _run_on_zeros(model, target)
    except (LoadError, TargetError):
        return False
    return True


def _run_on_zeros(model: bytes, target: Target) -> None:
    opened = load(onnx.ModelProto.FromString(model))
    feeds = {
        tensor.name: np.zeros(_fed_shape(tensor), tensor.dtype)
        for tensor in opened.graph.inputs
        if tensor.dtype is not None
    }
    Session(opened, target, optimize="none", once=True).run(feeds)


def _alone(nodes: Sequence[Node], model: Model, kind: np.dtype[Any]) -> bytes:
    """A model of these nodes side by side, each with inputs of its own, in a type instead of float32."""

    def twin(tensor: Tensor, name: str) -> Tensor:
        if isinstance(tensor, Constant) and _is_kept(tensor):
            values = np.asarray(tensor.values)
            return Constant(name, values.astype(kind) if tensor.dtype == _WIDE else values)
        return _made(tensor, name, kind)

    def attrs(node: Node) -> dict[str, ir.Attribute]:
        narrow = node.op == "Cast" and node.attrs.get("to") == onnx.TensorProto.FLOAT
        return {**node.attrs, "to": proto.elem_type_of(kind)} if narrow else node.attrs

    return bytes(alone(nodes, model, twin, attrs).to_proto().SerializeToString())


def _is_kept(tensor: Tensor) -> bool:
    return isinstance(tensor, Constant) and tensor.nbytes <= MAX_BYTES


def _made(tensor: Tensor, name: str, kind: np.dtype[Any]) -> Variable:
    if not tensor.name:
        return ir.empty()
    return Variable(name, kind if tensor.dtype == _WIDE else tensor.dtype, tensor.shape)
