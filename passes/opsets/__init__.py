"""Models in another opset, node by node: what every pass calls that needs one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import FunctionProto

from onnxslim import shapes
from onnxslim.engine.base import Context, Log
from onnxslim.errors import LoadError
from onnxslim.ir import proto
from onnxslim.ir.graph import Constant, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import versions
from onnxslim.ops.body import UnwrittenError
from onnxslim.passes import dead, inline
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.sizes import settle_targets
from onnxslim.passes.opsets.forms import Forms
from onnxslim.runtime.targets import Target
from onnxslim.shapes.dims import dims_of

# Before this opset, a zero in the target of a Reshape stands for a size of its input, always.
ZEROS = 14


def raise_opset(model: Model, opset: int, log: Log) -> str | None:
    """Bring the standard operators of a model to a later opset, in place.

    Args:
        model: edited in place, unless it cannot be.
        opset: the later one.
        log: what was done goes here.

    Returns:
        Why that cannot be; None where it is done.
    """
    twin, done = model.copy(), Log()
    try:
        restate(twin, opset, Target.cpu(), done)
    except (UnwrittenError, LoadError) as error:
        problem = f"opset {model.opset} could not be raised: {error}"
        return f"{problem}; export the model again with a newer opset"
    model.become(twin)
    log.add(done.done())
    return None


def restate(model: Model, opset: int, target: Target, log: Log) -> None:
    """Bring the standard operators of a model to another opset, in place.

    Args:
        model: edited in place.
        opset: the other one.
        target: where nodes and their forms are compared.
        log: what was done goes here.

    Raises:
        UnwrittenError: a node has no form there; names it.
    """
    before = model.opset
    _bring_functions(model, opset, target, log)
    why_not = untaken(model, opset)
    if why_not:
        raise UnwrittenError(why_not)
    if opset < ZEROS and any(node.attrs.get("allowzero") for node in standard(model)):
        edits = Edits(model, log)
        settle_targets(edits, dims_of(model))
        edits.clean_up()
    for note in Forms(target).bring(model, opset):
        log.change(*note)
    word = "raised" if opset > before else "lowered"
    log.change(model.graph.name or "model", f"{word} to opset {opset}", f"it was of {before}")


def standard(model: Model) -> Iterator[Node]:
    """Nodes of the standard domain that the model does not define itself."""
    own = model.functions
    return (node for node in model.nodes() if node.domain in DEFAULT_DOMAINS and ("", node.op) not in own)


def untaken(model: Model, opset: int) -> str:
    """What no operator of an opset says, as it has no such type; known before any work."""
    facts = shapes.deduce(model)
    for node in model.nodes():
        if node.domain in DEFAULT_DOMAINS and versions.schema_of(node.op, opset) is not None:
            tensors = [each for each in (*node.inputs, *node.outputs) if each.name]
            kinds = {each.name: kind for each in tensors if (kind := _kind(each, facts)) is not None}
            if why_not := versions.untaken(node, opset, kinds):
                since = _earliest(node, kinds, opset, model.opset)
                return (
                    f"node '{node.label}' ({node.op}) has no form in opset {opset}: {why_not} opset {since}"
                )
    return ""


def _kind(tensor: Tensor, facts: Mapping[int, shapes.Fact]) -> np.dtype[Any] | None:
    if isinstance(tensor, Constant):
        return tensor.dtype
    return facts[id(tensor)].dtype if id(tensor) in facts else None


def _earliest(node: Node, kinds: Mapping[str, np.dtype[Any]], low: int, high: int) -> int:
    return next(each for each in range(low, high + 1) if not versions.untaken(node, each, kinds))


def _bring_functions(model: Model, opset: int, target: Target, log: Log) -> None:
    """Have functions of a model in an opset; their bodies instead, where they mean something else there."""
    if any(_is_other(function, opset) for function in model.shell.functions):
        log.add(inline.Inline().run(model, Context(target)))
        for node, function in inline.calls(model):
            raise UnwrittenError(
                f"node '{node.label}' calls function '{function.name}', which cannot be inlined"
            )
    if model.shell.functions:
        model.shell = proto.fields_but(model.shell)
        for function in model.shell.functions:
            for item in function.opset_import:
                item.version = opset if item.domain in DEFAULT_DOMAINS else item.version


def _is_other(function: FunctionProto, opset: int) -> bool:
    own = next((each.version for each in function.opset_import if each.domain in DEFAULT_DOMAINS), opset)
    standard = (node for node in dead.nested(function.node) if node.domain in DEFAULT_DOMAINS)
    return any(not versions.is_alike(node.op_type, own, opset) for node in standard)
