"""What is known of nodes in half precision before anything is run, or from ranges alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from onnxslim.calibration.observers import Histogram
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of
from onnxslim.ops import Role, Trait, has, spec_of

MATCHES = ("MatMul", "Mul", "Pow", "ReduceMean")

SINGLE = np.dtype(np.float32)
TYPES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LARGEST: Mapping[str, float] = {"float16": 65504.0, "bfloat16": 3.3e38}
# Types that hold more than this hold squares of all there is.
_SMALL = 1e10
# From 1 to the next number.
STEP: Mapping[str, float] = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
# Values of a tensor may exceed what was measured by this factor before they become infinite.
HEADROOM = 4.0
# A constant is lost if rounding moves its largest value by more than this share: it is zero then, or so few
# steps from zero (eight, or less) that sums with other small values, as of a variance, are no better.
LOST = 1 / 16


def unfit(node: Node, opset: int, kind: np.dtype[Any], seen: Mapping[str, Histogram]) -> str | None:
    """Why a node by itself stays in single precision; None if it need not."""
    if node.domain not in DEFAULT_DOMAINS or node.bodies:
        return "what it computes inside is not known"
    if has(node, Trait.SENSITIVE):
        return f"{node.op} is sensitive to rounding"
    touched = [
        tensor for tensor in (*node.inputs, *node.outputs) if tensor.name or isinstance(tensor, Constant)
    ]
    if all(tensor.dtype != SINGLE for tensor in touched):
        return "it has nothing in single precision"
    other = next((tensor.name for tensor in touched if tensor.dtype is None), None)
    if other is not None:
        return f"'{other}' is a sequence or an optional, or of a type that is not known"
    if "dtype" in node.attrs or isinstance(node.attrs.get("value"), onnx.AttributeProto):
        return "an attribute of it states its type"
    if not _takes(node, opset, kind):
        return f"{node.op} does not take {kind.name}"
    most = LARGEST[kind.name] / HEADROOM
    for tensor in touched:
        if tensor.dtype == SINGLE and _largest(tensor, seen) > most:
            return f"'{tensor.name}' exceeds what {kind.name} holds"
    if _loses_epsilon(node, opset, kind):
        return f"its epsilon is lost in {kind.name}"
    return None


def _largest(tensor: Tensor, seen: Mapping[str, Histogram]) -> float:
    """The largest finite magnitude; both types hold infinities."""
    if isinstance(tensor, Constant):
        values = np.asarray(tensor.values)
        return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    histogram = seen.get(tensor.name)
    if histogram is None:
        return 0.0
    return np.inf if histogram.nan or histogram.masked else max(-histogram.low, histogram.high, 0.0)


def _takes(node: Node, opset: int, kind: np.dtype[Any]) -> bool:
    """Whether every float32 input and output of an operator may be of another type, all of them the same."""
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return False
    allowed = {each.type_param_str: set(each.allowed_type_strs) for each in schema.type_constraints}
    slots = (*_formal(node.inputs, schema.inputs), *_formal(node.outputs, schema.outputs))
    return all(f"tensor({kind.name})" in allowed.get(each, set()) for each in slots)


def _formal(tensors: Any, formals: Any) -> Iterator[str]:
    for index, tensor in enumerate(tensors):
        if tensor.dtype == SINGLE and formals:
            yield formals[min(index, len(formals) - 1)].type_str


def _loses_epsilon(node: Node, opset: int, kind: np.dtype[Any]) -> bool:
    """Whether an epsilon in an attribute is lost; not where statistics have a type of their own."""
    epsilon = node.attrs.get("epsilon")
    if not isinstance(epsilon, float) or not _is_lost(np.array(epsilon), kind):
        return False
    staged = "stash_type" in onnx.defs.get_schema(node.op, opset, "").attributes
    return not staged or node.attrs.get("stash_type", 1) != onnx.TensorProto.FLOAT


def _is_lost(values: Any, kind: np.dtype[Any]) -> bool:
    top = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    with np.errstate(over="ignore"):
        kept = float(np.array(top).astype(kind))
    return np.isfinite(kept) and abs(kept - top) > LOST * top


def delicate(nodes: Sequence[Node], kind: np.dtype[Any]) -> dict[int, str]:
    """Why nodes stay in single precision because of their neighbours, by id."""
    reasons: dict[int, str] = {}
    for node in nodes:
        for around, reason in _delicate(node, kind):
            reasons.setdefault(id(around), reason)
    return reasons


def squares(nodes: Sequence[Node], kind: np.dtype[Any]) -> dict[int, str]:
    """Why means of squares stay in single precision where no data tells how large they are, by id.

    In float16, squares of numbers from 256 on are infinite.
    """
    if LARGEST[kind.name] > _SMALL:
        return {}
    reason = f"squares of it may exceed what {kind.name} holds, as only data would tell"
    means = [node for node in nodes if node.op == "ReduceMean" and _is_square(ir.producer(node.inputs[0]))]
    around = (each for node in means for each in (*_makers(node), node, *_behind(node)))
    return {id(each): reason for each in around}


def _is_square(node: Node | None) -> bool:
    """Whether a node multiplies a tensor by itself."""
    if node is None or node.op not in ("Mul", "Pow"):
        return False
    if node.op == "Mul":
        return node.inputs[0] is node.inputs[1]
    exponent = constant_of(node.inputs[1])
    return exponent is not None and bool((exponent == 2).all())


def _delicate(node: Node, kind: np.dtype[Any]) -> Iterator[tuple[Node, str]]:
    if has(node, Trait.PERIODIC):
        yield from ((each, f"angles for '{node.label}' are lost to rounding") for each in _angles(node))
    if has(node, Trait.CODES | Trait.INTEGER):
        yield from ((each, "it belongs to what computes in integers") for each in _coded(node))
    for index, tensor in enumerate(node.inputs):
        if isinstance(tensor, Constant) and tensor.dtype == SINGLE and _matters(node, index, tensor, kind):
            around = (*_before(node), *_behind(node)) if has(node, Trait.ELEMENTWISE) else ()
            yield from ((each, f"'{tensor.name}' is lost in {kind.name}") for each in (node, *around))


def _matters(node: Node, index: int, tensor: Constant, kind: np.dtype[Any]) -> bool:
    """Whether a constant is lost, or one of the numbers that a node divides by."""
    values = np.asarray(tensor.values)
    if has(node, Trait.DIVIDES) and index == 1:
        with np.errstate(over="ignore"):
            return bool(((values != 0) & (values.astype(kind) == 0)).any())
    return _is_lost(values, kind)


def _angles(node: Node) -> Iterator[Node]:
    """A node and what computes its angle: all of that, unless layers do, whose sums have no fixed phase."""
    found, pending = {id(node): node}, [node]
    while pending:
        for maker in _makers(pending.pop()):
            if _sums(maker):
                yield from (node, *_before(node))
                return
            if id(maker) not in found:
                found[id(maker)] = maker
                pending.append(maker)
    yield from found.values()


def _sums(node: Node) -> bool:
    """Whether a node is a layer: products are summed, over more than one channel, or it normalizes."""
    spec = spec_of(node)
    if spec.role is not Role.LINEAR:
        return spec.norm_axis is not None
    one, other = (tensor.shape for tensor in node.inputs[:2])
    return node.op != "MatMul" or 1 not in {(one or (0,))[-1], (other or (0,))[-2:][0]}


def _coded(node: Node) -> Iterator[Node]:
    """A node that makes or reads integers, and those at its other side, behind what only moves elements."""
    yield node
    if has(node, Trait.QUANTIZES):
        yield from _moving(_makers(node)[:1], _makers)
    if has(node, Trait.DEQUANTIZES):
        yield from _moving(_readers(node), _readers)
    if has(node, Trait.INTEGER):
        yield from _behind(node, scaled=False)


def _moving(nodes: Sequence[Node], further: Any) -> Iterator[Node]:
    for node in nodes:
        yield node
        if has(node, Trait.MOVES):
            yield from _moving(further(node), further)


def _before(node: Node) -> Iterator[Node]:
    """What a node computes from, as long as each is a function of one tensor: a variance, say."""
    alone = _alone(node)
    while alone is not None:
        maker = ir.producer(alone)
        if maker is None:
            return
        alone = _alone(maker)
        if alone is not None:
            yield maker


def _behind(node: Node, *, scaled: bool = True) -> Iterator[Node]:
    """Functions of the result alone, such as roots, and the first nodes that use these with more.

    Args:
        node: the node.
        scaled: whether the result still matters behind a constant, such as the scale of an integer.
    """
    pending, found = _readers(node), set[int]()
    while pending:
        reader = pending.pop()
        if id(reader) in found or spec_of(reader).role is Role.LINEAR:
            continue
        found.add(id(reader))
        yield reader
        constants = any(isinstance(each, Constant) and each.dtype == SINGLE for each in reader.inputs)
        if _alone(reader) is not None and (scaled or not constants):
            pending.extend(_readers(reader))


def _alone(node: Node) -> Tensor | None:
    """The one tensor that a node computes from besides constants; not of layers."""
    inputs = {id(each): each for each in node.inputs if each.name and not isinstance(each, Constant)}
    if len(inputs) != 1 or _sums(node):
        return None
    return next(iter(inputs.values()))


def _makers(node: Node) -> list[Node]:
    return [maker for maker in map(ir.producer, node.inputs) if maker is not None]


def _readers(node: Node) -> list[Node]:
    return [reader for tensor in node.outputs for reader in tensor.outputs]
