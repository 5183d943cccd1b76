"""Models that run where an operator is missing, or is another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx.defs
from onnx import FunctionProto, helper
from pydantic import Field

from onnxslim import shapes
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.editor import Editor
from onnxslim.errors import PassError, UsageError
from onnxslim.ir import proto
from onnxslim.ir.graph import Constant, Node, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import spec_of, versions
from onnxslim.ops.body import UnwrittenError
from onnxslim.ops.contrib import DOMAIN as CONTRIB
from onnxslim.passes import dead, inline
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.sizes import settle_targets
from onnxslim.passes.legalize.forms import Forms, by_itself
from onnxslim.passes.unfuse import obstacle, put, unfuse
from onnxslim.runtime.kernels import is_lacking
from onnxslim.runtime.releases import SETTLED, release
from onnxslim.runtime.targets import Target
from onnxslim.shapes.dims import dims_of

NEWEST = onnx.defs.onnx_opset_version()
# The version of the file format with functions, and those with types that came since.
FUNCTIONS_IR = 8
TYPES_IR = {
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), 9),
    **dict.fromkeys(("int4", "uint4"), 10),
    "float4_e2m1fn": 11,
    "float8_e8m0fnu": 12,
    **dict.fromkeys(("int2", "uint2"), 13),
    **dict.fromkeys(("float6_e2m3fn", "float6_e3m2fn"), 14),
}
# Before this opset, a zero in the target of a Reshape stands for a size of its input, always.
ZEROS = 14
# Operators in operators in operators: none is written in more levels of others.
MOST_LEVELS = 8


@options
class Legalize(Pass):
    """Write a model in operators that are there where it is to run.

    Those are the operators of an opset, of a release of ONNX Runtime, or, without either, those that the
    target has kernels for. What is not there is written in what is: as rows of operators say, as onnx's
    version converter does, or as the function that the standard defines an operator by. Each node that
    changes is run side by side with what it becomes. Where one cannot be said there, it is named, and nothing
    is changed. ONNX Runtime's own operators are written in standard ones if the opset becomes older. A newer
    opset than the model's is possible likewise.

    Commands and recipes do this by themselves with a model that their target has no kernels for.
    """

    name: ClassVar[str] = "legalize"
    lossless: ClassVar[bool] = True

    opset: int | None = Field(
        None, ge=versions.OLDEST, le=NEWEST, description="version of the standard operators"
    )
    onnxruntime: str | None = Field(
        None, description="the oldest release of ONNX Runtime that is to read the model, as 1.15"
    )

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.onnxruntime is not None:
            if self.opset is not None:
                raise UsageError(
                    "pass 'legalize': a release of ONNX Runtime says which opset; give one of them"
                )
            release(self.onnxruntime)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Write the model in place.

        Raises:
            PassError: it cannot be said there; names the nodes, and leaves the model as it is.
        """
        log, twin = Log(), model.copy()
        limit = None if self.onnxruntime is None else release(self.onnxruntime)
        opset = self.opset if limit is None else min(limit.opset, model.opset)
        try:
            if opset is None:
                settle(twin, ctx.target, log)
            else:
                _restate(twin, opset, ctx, log)
        except UnwrittenError as why_not:
            raise PassError(f"pass '{self.name}': {why_not}", pass_name=self.name) from why_not
        version = _ir_version(twin, model.opset)
        version = version if limit is None else min(version, limit.ir_version)
        if version != twin.ir_version:
            log.change(model.graph.name or "model", f"of IR version {version} instead of {twin.ir_version}")
            twin.ir_version = version
        changes = log.done()
        if changes:
            model.become(twin)
        return changes


def _restate(model: Model, opset: int, ctx: Context, log: Log) -> None:
    """Bring a model to an opset, in place; raises UnwrittenError where that cannot be."""
    before = model.opset
    if opset < before:
        for change in unfuse(model, "all", only=partial(_may_be_written, opset=opset)).changed:
            log.change(change.node, change.action)
    if opset == before:
        log.skip(model.graph.name or "model", f"it is of opset {opset}")
        return
    _bring_functions(model, opset, ctx, log)
    untaken = _untaken(model, opset)
    if untaken:
        raise UnwrittenError(untaken)
    if opset < ZEROS and any(node.attrs.get("allowzero") for node in _standard(model)):
        edits = Edits(model, log)
        settle_targets(edits, dims_of(model))
        edits.clean_up()
    for note in Forms(ctx.target).bring(model, opset):
        log.change(*note)
    log.change(model.graph.name or "model", f"of opset {opset} instead of {before}")


def _may_be_written(node: Node, opset: int) -> bool:
    """Whether a node is ONNX Runtime's own and may have a body in an opset."""
    return node.domain == CONTRIB and spec_of(node).body_opset <= opset


def _untaken(model: Model, opset: int) -> str:
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


def _bring_functions(model: Model, opset: int, ctx: Context, log: Log) -> None:
    """Have functions of a model in an opset; their bodies instead, where they mean something else there."""
    if any(_is_other(function, opset) for function in model.shell.functions):
        log.add(inline.Inline().run(model, ctx))
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


def _ir_version(model: Model, before: int) -> int:
    """The version of the file format that a model needs, which was of another opset before.

    That which came with the opset, or with what else is in the model; an older opset is for older readers.
    """
    if model.opset == before:
        return model.ir_version
    needed = [int(helper.OP_SET_ID_VERSION_MAP["ai.onnx", model.opset])]
    needed += [TYPES_IR.get(constant.dtype.name, 0) for constant in model.constants()]
    needed += [FUNCTIONS_IR if model.shell.functions else 0]
    needed += [model.ir_version if model.opset > before else 0]
    return max(needed)


# ------------------------------------------------------------------------- what a target has kernels for


def needed(model: Model, target: Target) -> list[str]:
    """Nodes that a target has no kernels for, though the rest of a model tells nothing against it."""
    if not any(_may_lack(node, model.opset) for node in _standard(model)):
        return []
    return [node.label for node in lacking(model, target, Editor(model))]


def settle(model: Model, target: Target, log: Log) -> None:
    """Write a model in operators that a target has kernels for, in place.

    Raises:
        UnwrittenError: there are none for a node; names it.
    """
    before, forms = model.opset, Forms(target)
    for _ in range(MOST_LEVELS):
        edit = Editor(model)
        nodes = lacking(model, target, edit)
        if not nodes:
            if model.opset != before:
                log.change(model.graph.name or "model", f"of opset {model.opset} instead of {before}")
            return
        why = [
            f"{node.label}: {why_not}"
            for node in nodes
            if (why_not := _settle(node, target, forms, edit, log))
        ]
        edit.commit()
        if why:
            _retreat(model, target, forms, log)
    raise UnwrittenError(
        f"{target.name} has no kernel for what '{nodes[0].label}' ({nodes[0].op}) consists of"
    )


def _settle(node: Node, target: Target, forms: Forms, edit: Editor, log: Log) -> str:
    label, op = node.label, node.op
    try:
        why_not = obstacle(node, edit)
        if not why_not:
            put(node, forms.inside(node, edit), edit)
            log.change(label, f"wrote {op} in others, as {target.name} has no kernel for it")
    except UnwrittenError as error:
        return str(error)
    return why_not


def _retreat(model: Model, target: Target, forms: Forms, log: Log) -> None:
    """Go back to an opset from before the operators that there are no kernels for became what they are."""
    nodes = lacking(model, target, Editor(model))
    opset = min((versions.since(node.op, model.opset) for node in nodes), default=0) - 1
    if opset < SETTLED:
        raise UnwrittenError(f"{target.name} has no kernel for node '{nodes[0].label}' ({nodes[0].op})")
    why_not = _untaken(model, opset)
    if why_not:
        raise UnwrittenError(
            f"{target.name} has no kernel for node '{nodes[0].label}' ({nodes[0].op}); {why_not}"
        )
    for note in forms.bring(model, opset):
        log.change(*note)


def lacking(model: Model, target: Target, edit: Editor) -> list[Node]:
    """Nodes that a target has no kernels for, as it says of each by itself."""
    return [
        node
        for node in _standard(model)
        if _may_lack(node, model.opset)
        and not node.bodies
        and is_lacking(by_itself(node, edit).SerializeToString(deterministic=True), target)
    ]


def _standard(model: Model) -> Iterator[Node]:
    own = model.functions
    return (node for node in model.nodes() if node.domain in DEFAULT_DOMAINS and ("", node.op) not in own)


def _may_lack(node: Node, opset: int) -> bool:
    return versions.since(node.op, opset) > SETTLED
