"""Operators that compute element by element, pool or normalize; only what has a fact to its name is here."""

from __future__ import annotations

import math

from onnxslim.ir.graph import Node
from onnxslim.ops.channels import elementwise, layers, movement
from onnxslim.ops.spec import Channels, OpSpec, Role, register


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

SAME = Channels(elementwise.same)
BROADCAST = Channels(elementwise.broadcast)
POOL = Channels(layers.pool)
ALONG_AXIS = Channels(layers.along_axis)

register(
    OpSpec(
        "Relu",
        channels=SAME,
        role=Role.CLAMP,
        data=(0,),
        limits=lambda node: (0.0, math.inf),
        example=_text("y = Relu(x)"),
    ),
    OpSpec(
        "Clip",
        channels=SAME,
        role=Role.CLAMP,
        data=(0,),
        limits=_clip_limits,
        example=_text(
            "l = Constant<value_float=0.0>() h = Constant<value_float=6.0>() y = Clip(x, l, h)",
        ),
    ),
    OpSpec("Add", channels=BROADCAST, role=Role.KERNEL, example=_text("y = Add(x, z)", _TWO)),
    OpSpec("Mul", channels=BROADCAST, role=Role.KERNEL, example=_text("y = Mul(x, z)", _TWO)),
    OpSpec(
        "Concat",
        channels=Channels(movement.concat),
        role=Role.KERNEL,
        joins=True,
        example=_text("y = Concat<axis=1>(x, z)", "float[N,2,4,4] x, float[N,3,4,4] z", "float[N,5,4,4] y"),
    ),
    OpSpec(
        "AveragePool",
        channels=POOL,
        role=Role.KERNEL,
        data=(0,),
        misread=_average_pool_misread,
        example=_text("y = AveragePool<kernel_shape=[2,2]>(x)", output="float[N,2,3,3] y"),
    ),
    OpSpec(
        "GlobalAveragePool",
        channels=POOL,
        role=Role.KERNEL,
        data=(0,),
        example=_text("y = GlobalAveragePool(x)", output="float[N,2,1,1] y"),
    ),
    OpSpec("LeakyRelu", channels=SAME, role=Role.KERNEL, data=(0,), example=_text("y = LeakyRelu(x)")),
    OpSpec(
        "Sigmoid",
        channels=SAME,
        role=Role.KERNEL,
        data=(0,),
        squashes=True,
        example=_text("y = Sigmoid(x)"),
    ),
    OpSpec(
        "HardSigmoid",
        channels=SAME,
        role=Role.KERNEL,
        data=(0,),
        unfit=_hard_sigmoid_unfit,
        example=_text("y = HardSigmoid<alpha=0.25, beta=0.5>(x)"),
    ),
    OpSpec(
        "Softmax",
        channels=ALONG_AXIS,
        role=Role.KERNEL,
        data=(0,),
        squashes=True,
        example=_text("y = Softmax(x)"),
    ),
    OpSpec("Identity", channels=SAME, copies=True, keeps_order=True, example=_text("y = Identity(x)")),
    OpSpec("Cast", channels=SAME, keeps_order=True, example=_text("y = Cast<to = 1>(x)")),
    OpSpec("LogSoftmax", channels=ALONG_AXIS, keeps_order=True, example=_text("y = LogSoftmax(x)")),
)

_SAME = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor HardSwish Log Neg "
    "Reciprocal Round Selu Shrink Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"
)
_BINARY = "Sub Div Pow Max Min Mean Sum Mod"
_COMPARE = "Equal Greater GreaterOrEqual Less LessOrEqual"
_LOGIC = "And Or Xor"
_REDUCE = "ReduceMean ReduceSum ReduceL1 ReduceL2 ReduceSumSquare"
_REDUCE_STRICTLY = "ReduceProd ReduceLogSum ReduceLogSumExp"
_FOUR = "float[N,4,4,4] x"
_ONE = "float[N,2,1,1] y"


def _recent(text: str, opset: int) -> str:
    """An example in a later opset."""
    return text.replace('"" : 17', f'"" : {opset}').replace("ir_version: 8", "ir_version: 10")


register(
    *(OpSpec(op, channels=SAME, example=_text(f"y = {op}(x)")) for op in _SAME.split()),
    *(
        OpSpec(
            op,
            channels=BROADCAST,
            example=_text(f"y = {op}{'<fmod = 1>' if op == 'Mod' else ''}(x, z)", _TWO),
        )
        for op in _BINARY.split()
    ),
    *(
        OpSpec(op, channels=BROADCAST, example=_text(f"y = {op}(x, z)", _TWO, "bool[N,2,4,4] y"))
        for op in _COMPARE.split()
    ),
    *(
        OpSpec(
            op,
            channels=BROADCAST,
            example=_text(f"y = {op}(x, z)", "bool[N,2,4,4] x, bool[2,1,1] z", "bool[N,2,4,4] y"),
        )
        for op in _LOGIC.split()
    ),
    *(
        OpSpec(
            op,
            channels=Channels(movement.reduce),
            example=_recent(_text(f"a = Constant<value_ints=[2,3]>() y = {op}(x, a)", output=_ONE), 18),
        )
        for op in _REDUCE.split()
    ),
    *(
        OpSpec(
            op,
            channels=Channels(movement.reduce_strictly),
            example=_recent(_text(f"a = Constant<value_ints=[2,3]>() y = {op}(x, a)", output=_ONE), 18),
        )
        for op in _REDUCE_STRICTLY.split()
    ),
    *(
        OpSpec(
            op,
            channels=Channels(movement.arg_reduce),
            example=_text(f"y = {op}<axis=2, keepdims=0>(x)", output="int64[N,2,4] y"),
        )
        for op in ("ArgMax", "ArgMin")
    ),
    OpSpec("Gelu", channels=SAME, example=_recent(_text("y = Gelu(x)"), 20)),
    OpSpec("Mish", channels=SAME, example=_recent(_text("y = Mish(x)"), 18)),
    OpSpec("Swish", channels=SAME, example=_recent(_text("y = Swish(x)"), 24)),
    OpSpec(
        "BitShift",
        channels=BROADCAST,
        example=_text(
            'y = BitShift<direction="LEFT">(x, z)', "uint8[N,2,4,4] x, uint8[2,1,1] z", "uint8[N,2,4,4] y"
        ),
    ),
    OpSpec("Not", channels=SAME, example=_text("y = Not(x)", "bool[N,2,4,4] x", "bool[N,2,4,4] y")),
    OpSpec("IsNaN", channels=SAME, example=_text("y = IsNaN(x)", output="bool[N,2,4,4] y")),
    OpSpec("IsInf", channels=SAME, example=_text("y = IsInf(x)", output="bool[N,2,4,4] y")),
    OpSpec("PRelu", channels=BROADCAST, example=_text("y = PRelu(x, z)", "float[N,2,4,4] x, float[2,1,1] z")),
    OpSpec(
        "Where",
        channels=BROADCAST,
        example=_text("y = Where(c, x, z)", "bool[N,1,4,4] c, float[N,2,4,4] x, float[2,1,1] z"),
    ),
    OpSpec("Hardmax", channels=ALONG_AXIS, example=_text("y = Hardmax<axis=3>(x)")),
    OpSpec("GlobalMaxPool", channels=POOL, example=_text("y = GlobalMaxPool(x)", output=_ONE)),
    OpSpec("LpPool", channels=POOL, example=_text("y = LpPool<kernel_shape=[4,4]>(x)", output=_ONE)),
    OpSpec("GlobalLpPool", channels=POOL, example=_text("y = GlobalLpPool(x)", output=_ONE)),
    OpSpec("LRN", channels=Channels(layers.local_response), example=_text("y = LRN<size=3>(x)")),
    OpSpec(
        "BatchNormalization",
        channels=Channels(layers.batch_norm),
        example=_text(
            "y = BatchNormalization(x, s, b, m, v)",
            "float[N,2,4,4] x, float[2] s, float[2] b, float[2] m, float[2] v",
        ),
    ),
    OpSpec(
        "InstanceNormalization",
        channels=Channels(layers.instance_norm),
        example=_text("y = InstanceNormalization(x, s, b)", "float[N,2,4,4] x, float[2] s, float[2] b"),
    ),
    OpSpec(
        "GroupNormalization",
        channels=Channels(layers.group_norm),
        example=_recent(
            _text(
                "y = GroupNormalization<num_groups=2>(x, s, b)",
                f"{_FOUR}, float[4] s, float[4] b",
                "float[N,4,4,4] y",
            ),
            21,
        ),
    ),
    OpSpec(
        "LayerNormalization",
        channels=Channels(layers.layer_norm),
        example=_text("y = LayerNormalization(x, s, b)", "float[N,2,4,4] x, float[4] s, float[4] b"),
    ),
    OpSpec(
        "RMSNormalization",
        channels=Channels(layers.layer_norm),
        example=_recent(_text("y = RMSNormalization(x, s)", "float[N,2,4,4] x, float[4] s"), 23),
    ),
)
