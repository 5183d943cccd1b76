"""Which operators ONNX Runtime really runs in integers, read from the graph it makes of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.ops import Role, spec_of
from onnxslim.ops.blocks import EXACT
from onnxslim.passes.quantize.block_products import is_product
from onnxslim.passes.quantize.recurrent import is_recurrent
from onnxslim.runtime.profile import optimized_model
from onnxslim.runtime.targets import Target

MATCHES = ("DynamicQuantizeLSTM", "LSTM", "MatMul", "MatMulInteger")

# What operators that compute in integers by themselves are otherwise.
_KINDS = {"MatMulInteger": "MatMul", "DynamicQuantizeLSTM": "LSTM"}
# Those of them that keep their names in the graph that runs.
_OWN = ("DynamicQuantizeLSTM",)


class Kernels(NamedTuple):
    """What became of the operators that were quantized.

    Attributes:
        fused: operators with integer kernels, by type.
        total: operators of the types that could have one.
        unfused: names of nodes between Q and DQ that run in floating point all the same.
    """

    fused: dict[str, int]
    total: dict[str, int]
    unfused: tuple[str, ...]


def kernels(model: Model, integer: Mapping[int, str], target: Target) -> Kernels:
    """Which kernels ONNX Runtime has for a quantized model.

    Args:
        model: the quantized model.
        integer: labels, by id, of the nodes that were to run in integers.
        target: whose optimizations to look at.
    """
    named = model.copy()
    for node, twin in zip(model.graph.nodes, named.graph.nodes, strict=True):
        twin.name = integer.get(id(node), node.label)
    countable = [node for node in named.graph.nodes if _may_be_integer(node)]
    ran = {node.name: node.op_type for node in optimized_model(named, target).graph.node}
    wanted = set(integer.values())
    # A fused node keeps its name and changes its type; "FusedConv" and its like are floating point.
    unfused = [
        node.name
        for node in countable
        if node.name in wanted and node.op not in _OWN and ran.get(node.name) in (node.op, f"Fused{node.op}")
    ]
    lost = set(unfused)
    done = Counter(_kind(node) for node in countable if node.name in wanted and node.name not in lost)
    total = {op: count for op, count in Counter(map(_kind, countable)).items() if done[op]}
    return Kernels(dict(done), total, tuple(unfused))


def beside_floats(model: Model, data: CalibrationData, target: Target) -> float:
    """What a model whose weights alone are integers keeps of what these stand for, as SQNR in dB.

    To multiply by weights of few bits, ONNX Runtime rounds the data of the product to int8, with a scale for
    each block of a row: beside it is the same model in floating point.
    """
    exact = model.copy()
    for node in exact.nodes():
        if is_product(node):
            node.attrs = {**node.attrs, "accuracy_level": EXACT}
    return Judge(exact, data, target, optimize="none")(model).sqnr


def _may_be_integer(node: Node) -> bool:
    return node.op in _KINDS or is_recurrent(node) or spec_of(node).role in (Role.LINEAR, Role.KERNEL)


def _kind(node: Node) -> str:
    return _KINDS.get(node.op, node.op)
