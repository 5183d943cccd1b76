"""Operators of ONNX Runtime's own in standard ones, which every pass knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from pydantic import Field

from onnxslim.engine import rewrite
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.ops import body_of, spec_of
from onnxslim.ops.body import UnwrittenError, WriteBody
from onnxslim.ops.spec import WHICH, Which
from onnxslim.passes.opsets import raise_opset
from onnxslim.passes.opsets.placing import obstacle, put, written
from onnxslim.passes.unfuse import codes


@options
class Unfuse(Pass):
    """Write ONNX Runtime's own operators (FusedConv, BiasGelu, SkipLayerNormalization, …) in standard ones.

    Files that ONNX Runtime has optimized are full of them, and no other pass sees what is inside. It fuses
    them again when it loads the file, where that is faster. Passes that work on layers do this by themselves.
    """

    name: ClassVar[str] = "unfuse"
    lossless: ClassVar[bool] = True

    which: Which = Field(
        "all",
        description="free: those that run as fast written out; layers: also those with weights or integers "
        "inside; units: also attention, whose heads are seen then; all: also matrices of a few bits",
    )

    def run(self, model: Model, ctx: Context) -> Changes:
        """Write out nodes whose operators have bodies, those in bodies of If, Loop and Scan included."""
        return unfuse(model, self.which)


def unfuse(
    model: Model,
    which: Which,
    *,
    coded: Callable[[Node], bool] | None = None,
    only: Callable[[Node], bool] = lambda node: True,
) -> Changes:
    """Write nodes in standard operators, in place: what every pass calls that works on layers.

    Where these are of a later opset, the model is converted to that.

    Args:
        model: edited in place.
        which: see `Unfuse`; operators that take codes become DQ, what they do, and Q.
        coded: which of those that take codes are written out as well, whatever they are written out for.
        only: of which nodes.

    Returns:
        What was written out, and which nodes stay although their operators are known, and why.
    """
    log = Log()
    pending = _pending(model, which, coded, only)
    if _raised(model, [node for node, _ in pending], log):
        pending = _pending(model, which, coded, only)
    if pending:
        edit = Editor(model)
        for node, write in pending:
            label, op = node.label, node.op
            why_not = obstacle(node, edit) or _write(node, write, edit)
            if why_not:
                log.skip(label, f"stays {op}: {why_not}")
            else:
                log.change(label, f"wrote {op} in standard operators")
        edit.commit()
    if which != "free" and any(codes.mover(node) for node in model.nodes()):
        rewrite.apply([codes.MovedCodes()], model, log, lossless=True)
    return log.done()


def writable(
    model: Model, which: Which, *, coded: Callable[[Node], bool] | None = None
) -> Iterator[tuple[Node, WriteBody]]:
    """Nodes that are to be written out, with what does it."""
    for node in model.nodes():
        spec = spec_of(node)
        if spec.body is None:
            continue
        wanted = coded is not None and spec.qoperator and coded(node)
        if wanted or WHICH.index(spec.written) <= WHICH.index(which):
            write = body_of(node, model, qoperators=spec.qoperator)
            if write is not None:
                yield node, write


def _raised(model: Model, nodes: Sequence[Node], log: Log) -> bool:
    """Convert a model to the opset that bodies of its nodes take; False where it has that, or cannot."""
    opset = max((spec_of(node).body_opset for node in nodes), default=0)
    if model.opset >= opset:
        return False
    problem = raise_opset(model, opset, log)
    if problem:
        log.skip("model", problem)
    return not problem


def _pending(
    model: Model, which: Which, coded: Callable[[Node], bool] | None, only: Callable[[Node], bool]
) -> list[tuple[Node, WriteBody]]:
    return [(node, write) for node, write in writable(model, which, coded=coded) if only(node)]


def _write(node: Node, write: WriteBody, edit: Editor) -> str:
    """Put the body of a node in its place; why there is none."""
    try:
        put(node, written(node, write, edit, edit.opset), edit)
    except UnwrittenError as why_not:
        return str(why_not)
    return ""
