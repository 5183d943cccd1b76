"""Operators that compute element by element, pool or normalize; only what has a fact to its name is here."""

from __future__ import annotations

import math

from onnxslim.graph import Node
from onnxslim.ops.spec import OpSpec, Role, register


def _text(body: str, inputs: str = "float[N,2,4,4] x", output: str = "float[N,2,4,4] y") -> str:
    return f'<ir_version: 8, opset_import: ["" : 17]>\ng ({inputs}) => ({output}) {{ {body} }}'


def _clip_limits(node: Node) -> tuple[float, float] | None:
    """Limits are attributes before opset 11 and inputs since; a limit that is left out is none."""
    limits = []
    for index, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        values = node.constant(index)
        if values is None and node.input(index) is not None:
            return None
        limits.append(float(values.item()) if values is not None else float(node.attrs.get(name, default)))
    return limits[0], limits[1]


def _average_pool_misread(node: Node) -> str | None:
    """ONNX Runtime's integer kernel knows no dilations, and counts windows beyond the padding in full."""
    if any(step != 1 for step in node.attrs.get("dilations", ())):
        return "the integer kernel of AveragePool has no dilations"
    if node.attrs.get("ceil_mode", 0) and node.attrs.get("count_include_pad", 0):
        return "the integer kernel of AveragePool counts what lies beyond the padding"
    return None


def _hard_sigmoid_unfit(node: Node) -> str | None:
    """Its integer form adds a positive constant to scaled codes, see the quantizer."""
    alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
    return None if alpha > 0 and beta > 0 else "its alpha or beta is not positive"


_TWO = "float[N,2,4,4] x, float[1,2,1,1] z"

register(
    OpSpec(
        "Relu", role=Role.CLAMP, data=(0,), limits=lambda node: (0.0, math.inf), example=_text("y = Relu(x)")
    ),
    OpSpec(
        "Clip",
        role=Role.CLAMP,
        data=(0,),
        limits=_clip_limits,
        example=_text(
            "l = Constant<value_float=0.0>() h = Constant<value_float=6.0>() y = Clip(x, l, h)",
        ),
    ),
    OpSpec("Add", role=Role.KERNEL, example=_text("y = Add(x, z)", _TWO)),
    OpSpec("Mul", role=Role.KERNEL, example=_text("y = Mul(x, z)", _TWO)),
    OpSpec(
        "Concat",
        role=Role.KERNEL,
        joins=True,
        example=_text("y = Concat<axis=1>(x, z)", "float[N,2,4,4] x, float[N,3,4,4] z", "float[N,5,4,4] y"),
    ),
    OpSpec(
        "AveragePool",
        role=Role.KERNEL,
        data=(0,),
        misread=_average_pool_misread,
        example=_text("y = AveragePool<kernel_shape=[2,2]>(x)", output="float[N,2,3,3] y"),
    ),
    OpSpec(
        "GlobalAveragePool",
        role=Role.KERNEL,
        data=(0,),
        example=_text("y = GlobalAveragePool(x)", output="float[N,2,1,1] y"),
    ),
    OpSpec("LeakyRelu", role=Role.KERNEL, data=(0,), example=_text("y = LeakyRelu(x)")),
    OpSpec("Sigmoid", role=Role.KERNEL, data=(0,), example=_text("y = Sigmoid(x)")),
    OpSpec(
        "HardSigmoid",
        role=Role.KERNEL,
        data=(0,),
        unfit=_hard_sigmoid_unfit,
        example=_text("y = HardSigmoid<alpha=0.25, beta=0.5>(x)"),
    ),
    OpSpec("Softmax", role=Role.KERNEL, data=(0,), example=_text("y = Softmax(x)")),
    OpSpec("Identity", copies=True, keeps_order=True, example=_text("y = Identity(x)")),
    OpSpec("Cast", keeps_order=True, example=_text("y = Cast<to = 1>(x)")),
    OpSpec("LogSoftmax", keeps_order=True, example=_text("y = LogSoftmax(x)")),
)
