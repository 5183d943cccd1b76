"""Brings a graph into the form that the quantizer knows, without changing what it computes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from onnxslim import shapes
from onnxslim.engine import rewrite
from onnxslim.engine.base import Log
from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.errors import PassError
from onnxslim.ir.graph import Constant, Node
from onnxslim.ir.model import Model
from onnxslim.ops.layouts import IntegerLayout
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.opsets import raise_opset
from onnxslim.passes.unfuse import unfuse

# Per-channel DequantizeLinear appeared in this version.
MIN_OPSET = 13
# Integers of 4 and 16 bits, and scales for blocks of a weight, in this one.
WIDE_OPSET = 21
# Integers of 2 bits.
TWO_BITS_OPSET = 25


def prepare(model: Model, rules: IntegerLayout, log: Log, opset: int = MIN_OPSET) -> None:
    """Raise the opset if need be, and write operators in terms of those with integer kernels.

    Raises:
        PassError: the opset cannot be raised.
    """
    for skip in unfuse(model, "layers", coded=_is_single).skipped:
        log.skip(skip.node, skip.reason)
    if model.opset < opset and (problem := raise_opset(model, opset, log)):
        raise PassError(f"pass 'quantize' needs opset {opset}, and {problem}", pass_name="quantize")
    for skip in store_weights(model):
        log.skip(skip.node, skip.reason)
    shapes.infer(model)
    wanted = [rule for rule in RULES if rule.needs <= rules.kernels]
    rewrite.apply(wanted, model, log)


def _is_single(node: Node) -> bool:
    """Whether what a node reads in floating point is float32: scales of other types are left as they are."""
    kinds = {tensor.dtype for tensor in node.inputs if isinstance(tensor, Constant)}
    return not any(isinstance(kind, np.dtype) and kind.kind == "f" and kind != np.float32 for kind in kinds)


class _KernelRule(Rule[Node]):
    """A rule that pays only where the target has certain integer kernels."""

    needs: ClassVar[frozenset[str]]

    def pattern(self, node: Node, edit: Editor) -> Node | None:
        return node


class SplitHardSwish(_KernelRule):
    """HardSwish(x) = x · HardSigmoid(x) with alpha = 1/6, beta = 1/2, as the operator is defined."""

    name = "split-hardswish"
    ops = frozenset(("HardSwish",))
    makes = frozenset(("HardSigmoid", "Mul"))
    needs = frozenset(("Add", "Mul"))

    def check(self, match: Node, edit: Editor) -> str | None:
        return None

    def rewrite(self, match: Node, edit: Editor) -> str:
        source, label = match.inputs[0], match.name or match.op
        gate = edit.variable(f"{match.outputs[0].name}_gate", source, source.shape)
        attrs = {"alpha": 1.0 / 6.0, "beta": 0.5}
        edit.add(match, "HardSigmoid", [source], [gate], attrs, name=f"{label}_gate")
        edit.replace_node(match, "Mul", [source, gate])
        return "written as HardSigmoid and Mul, which has an integer kernel"


class MeanToPool(_KernelRule):
    """ReduceMean over all spatial axes, kept as size 1, is GlobalAveragePool."""

    name = "mean-to-pool"
    ops = frozenset(("ReduceMean",))
    needs = makes = frozenset(("GlobalAveragePool",))

    def check(self, match: Node, edit: Editor) -> str | None:
        shape = match.inputs[0].shape
        axes = match.attrs.get("axes") if edit.opset < 18 else match.constant(1)
        if shape is None or len(shape) < 3 or axes is None:
            return "its axes or the rank of its input are not known"
        spatial = set(range(2, len(shape)))
        if {int(axis) % len(shape) for axis in np.ravel(axes)} != spatial or not match.attrs.get(
            "keepdims", 1
        ):
            return "it does not pool over exactly the spatial axes"
        return None

    def rewrite(self, match: Node, edit: Editor) -> str:
        edit.replace_node(match, "GlobalAveragePool", [match.inputs[0]])
        return "written as GlobalAveragePool, which has an integer kernel"


RULES: tuple[_KernelRule, ...] = (SplitHardSwish(), MeanToPool())
