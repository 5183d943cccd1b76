"""Normalizations put together: in half precision their steps overflow where the whole operator does not."""

from __future__ import annotations

from onnxslim.engine import rewrite
from onnxslim.engine.base import Context, Log
from onnxslim.errors import PassError
from onnxslim.ir.model import Model
from onnxslim.passes.fuse.recompose import Normalization
from onnxslim.passes.legalize import Legalize

# What no normalization of single steps does without.
MATCHES = ("ReduceMean", "Sqrt")


def put_together(model: Model, ctx: Context, log: Log) -> None:
    """Make the steps of normalizations one operator, in place, in the opset that has it where it is older."""
    there = {node.op for node in model.graph.nodes}
    if "ReduceMean" not in there or "Sqrt" not in there:
        return
    if model.opset >= Normalization.since:
        rewrite.apply([Normalization()], model, log)
        return
    twin, raised = model.copy(), Log()
    try:
        raised.add(Legalize(opset=Normalization.since).run(twin, ctx))
    except PassError as why_not:
        log.skip(model.graph.name or "model", f"normalizations stay in single steps: {why_not}")
        return
    made = Log()
    rewrite.apply([Normalization()], twin, made)
    if made.done():
        model.become(twin)
        log.add(raised.done())
        log.add(made.done())
