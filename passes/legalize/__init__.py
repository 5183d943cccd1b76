"""Models that run where an operator is missing, or is another one."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import onnx.defs
from onnx import helper
from pydantic import Field

from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.editor import Editor
from onnxslim.errors import PassError, UsageError
from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.ops import spec_of, versions
from onnxslim.ops.body import UnwrittenError
from onnxslim.ops.contrib import DOMAIN as CONTRIB
from onnxslim.passes.opsets import restate, standard, untaken
from onnxslim.passes.opsets.forms import Forms, by_itself
from onnxslim.passes.opsets.placing import obstacle, put
from onnxslim.passes.unfuse import unfuse
from onnxslim.runtime.kernels import is_lacking
from onnxslim.runtime.releases import SETTLED, release
from onnxslim.runtime.targets import Target

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
                _restate(twin, opset, ctx.target, log, self._readers)
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

    @property
    def _readers(self) -> str:
        """What is there to say of the opset."""
        return "" if self.onnxruntime is None else f", which ONNX Runtime {self.onnxruntime} reads"


def _restate(model: Model, opset: int, target: Target, log: Log, readers: str) -> None:
    """Bring a model to an opset, in place; raises UnwrittenError where that cannot be."""
    if opset < model.opset:
        for change in unfuse(model, "all", only=partial(_may_be_written, opset=opset)).changed:
            log.change(change.node, change.action)
    if opset == model.opset:
        log.skip(model.graph.name or "model", f"it is of opset {opset}{readers}")
    else:
        restate(model, opset, target, log)


def _may_be_written(node: Node, opset: int) -> bool:
    """Whether a node is ONNX Runtime's own and may have a body in an opset."""
    return node.domain == CONTRIB and spec_of(node).body_opset <= opset


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
    if not any(_may_lack(node, model.opset) for node in standard(model)):
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
                log.change(
                    model.graph.name or "model", f"lowered to opset {model.opset}", f"it was of {before}"
                )
            elif not log.done():
                log.skip(model.graph.name or "model", f"{target.name} has kernels for everything in it")
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
    why_not = untaken(model, opset)
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
        for node in standard(model)
        if _may_lack(node, model.opset)
        and not node.bodies
        and is_lacking(by_itself(node, edit).SerializeToString(deterministic=True), target)
    ]


def _may_lack(node: Node, opset: int) -> bool:
    return versions.since(node.op, opset) > SETTLED
