"""Operators that compute element by element, pool or normalize."""

from __future__ import annotations

import math
from collections.abc import Callable

from onnxslim.ir.graph import Node
from onnxslim.ops import formulas
from onnxslim.ops.body import WriteBody
from onnxslim.ops.channels import elementwise, layers, movement, scales
from onnxslim.ops.channels.scale_labels import ScaleTrace
from onnxslim.ops.spec import Channels, OpSpec, Role, Trait, register


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
        traits=Trait.ELEMENTWISE,
        channels=SAME,
        role=Role.CLAMP,
        data=(0,),
        limits=lambda node: (0.0, math.inf),
        scales=elementwise.same,
        example=_text("y = Relu(x)"),
    ),
    OpSpec(
        "Clip",
        traits=Trait.ELEMENTWISE,
        channels=SAME,
        role=Role.CLAMP,
        data=(0,),
        limits=_clip_limits,
        example=_text(
            "l = Constant<value_float=0.0>() h = Constant<value_float=6.0>() y = Clip(x, l, h)",
        ),
    ),
    OpSpec(
        "Add",
        traits=Trait.ELEMENTWISE,
        channels=BROADCAST,
        role=Role.KERNEL,
        scales=scales.add,
        example=_text("y = Add(x, z)", _TWO),
    ),
    OpSpec(
        "Mul",
        traits=Trait.ELEMENTWISE,
        channels=BROADCAST,
        role=Role.KERNEL,
        scales=scales.multiply,
        example=_text("y = Mul(x, z)", _TWO),
    ),
    OpSpec(
        "Concat",
        channels=Channels(movement.concat),
        role=Role.KERNEL,
        traits=Trait.JOINS | Trait.KEEPS_ZEROS,
        scales=movement.concat,
        example=_text("y = Concat<axis=1>(x, z)", "float[N,2,4,4] x, float[N,3,4,4] z", "float[N,5,4,4] y"),
    ),
    OpSpec(
        "AveragePool",
        channels=POOL,
        role=Role.KERNEL,
        data=(0,),
        misread=_average_pool_misread,
        scales=scales.pool,
        example=_text("y = AveragePool<kernel_shape=[2,2]>(x)", output="float[N,2,3,3] y"),
    ),
    OpSpec(
        "GlobalAveragePool",
        channels=POOL,
        role=Role.KERNEL,
        data=(0,),
        scales=scales.pool,
        example=_text("y = GlobalAveragePool(x)", output="float[N,2,1,1] y"),
    ),
    OpSpec(
        "LeakyRelu",
        traits=Trait.ELEMENTWISE,
        channels=SAME,
        role=Role.KERNEL,
        data=(0,),
        scales=elementwise.same,
        example=_text("y = LeakyRelu(x)"),
    ),
    OpSpec(
        "Sigmoid",
        traits=Trait.ELEMENTWISE | Trait.SQUASHES | Trait.MERGES_ZEROS,
        channels=SAME,
        role=Role.KERNEL,
        data=(0,),
        example=_text("y = Sigmoid(x)"),
    ),
    OpSpec(
        "HardSigmoid",
        traits=Trait.ELEMENTWISE,
        channels=SAME,
        role=Role.KERNEL,
        data=(0,),
        unfit=_hard_sigmoid_unfit,
        example=_text("y = HardSigmoid<alpha=0.25, beta=0.5>(x)"),
    ),
    OpSpec(
        "Softmax",
        traits=Trait.SQUASHES | Trait.MERGES_ZEROS,
        channels=ALONG_AXIS,
        role=Role.KERNEL,
        data=(0,),
        older=formulas.along_axis("Softmax"),
        example=_text("y = Softmax(x)"),
    ),
    OpSpec(
        "LogSoftmax",
        traits=Trait.KEEPS_ORDER,
        channels=ALONG_AXIS,
        older=formulas.along_axis("LogSoftmax"),
        example=_text("y = LogSoftmax(x)"),
    ),
)

_SAME = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu "
    "HardSwish Identity IsInf IsNaN Log Mish Neg Not Reciprocal Round Selu Shrink Sign Sin Sinh Softplus "
    "Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_BROADCAST = (
    "And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean "
    "Min Mod Or PRelu Pow Sub Sum Where Xor"
)
_REDUCE = "ReduceMean ReduceSum ReduceL1 ReduceL2 ReduceSumSquare"
_REDUCE_STRICTLY = "ReduceProd ReduceLogSum ReduceLogSumExp"
# What holds besides.
_TRAITS = {
    "Abs": Trait.MERGES_ZEROS,
    "Cast": Trait.KEEPS_ORDER | Trait.KEEPS_ZEROS,
    "Cos": Trait.MERGES_ZEROS | Trait.PERIODIC,
    "Div": Trait.DIVIDES,
    "Equal": Trait.MERGES_ZEROS,
    "Exp": Trait.MERGES_ZEROS | Trait.SENSITIVE,
    "Greater": Trait.MERGES_ZEROS,
    "Identity": Trait.COPIES | Trait.MOVES | Trait.KEEPS_ORDER | Trait.KEEPS_ZEROS,
    "Less": Trait.MERGES_ZEROS,
    "Log": Trait.SENSITIVE,
    "Mod": Trait.DIVIDES,
    "Pow": Trait.TELLS_ZEROS | Trait.SENSITIVE,
    "Reciprocal": Trait.TELLS_ZEROS,
    "ReduceL1": Trait.SENSITIVE,
    "ReduceL2": Trait.SENSITIVE,
    "ReduceLogSum": Trait.SENSITIVE,
    "ReduceLogSumExp": Trait.SENSITIVE,
    "ReduceSumSquare": Trait.SENSITIVE,
    "ReduceSum": Trait.SENSITIVE,
    "Sin": Trait.PERIODIC,
    "Softplus": Trait.MERGES_ZEROS,
    "Tan": Trait.PERIODIC,
}
# How scales of slices pass.
_SCALES: dict[str, Callable[[ScaleTrace], None]] = {
    **dict.fromkeys(("Identity", "PRelu"), elementwise.same),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2"), movement.reduce),
    "Sub": scales.add,
    "Div": scales.divide,
}
# What they are where the opset does not have them.
_BODIES: dict[str, WriteBody] = {
    "Gelu": formulas.either_gelu,
    "Swish": lambda b: [formulas.swish(b, b.attr("alpha", 1.0))],
}
_FOUR = "float[N,4,4,4] x"
_ONE = "float[N,2,1,1] y"


def _recent(text: str, opset: int) -> str:
    """An example in a later opset."""
    return text.replace('"" : 17', f'"" : {opset}').replace("ir_version: 8", "ir_version: 10")


_BOOLS = ("bool[N,2,4,4] x, bool[2,1,1] z", "bool[N,2,4,4] y")
_BYTES = ("uint8[N,2,4,4] x, uint8[2,1,1] z", "uint8[N,2,4,4] y")
# Examples that are not plainly of one, or two, tensors of floats in opset 17.
_OTHER = {
    "Cast": _text("y = Cast<to = 1>(x)"),
    "Gelu": _recent(_text("y = Gelu(x)"), 20),
    "Mish": _recent(_text("y = Mish(x)"), 18),
    "Swish": _recent(_text("y = Swish(x)"), 24),
    "Not": _text("y = Not(x)", "bool[N,2,4,4] x", "bool[N,2,4,4] y"),
    "BitwiseNot": _recent(_text("y = BitwiseNot(x)", "uint8[N,2,4,4] x", "uint8[N,2,4,4] y"), 18),
    "IsNaN": _text("y = IsNaN(x)", output="bool[N,2,4,4] y"),
    "IsInf": _text("y = IsInf(x)", output="bool[N,2,4,4] y"),
    "Mod": _text("y = Mod<fmod = 1>(x, z)", _TWO),
    "BitShift": _text('y = BitShift<direction="LEFT">(x, z)', *_BYTES),
    "PRelu": _text("y = PRelu(x, z)", "float[N,2,4,4] x, float[2,1,1] z"),
    "Where": _text("y = Where(c, x, z)", "bool[N,1,4,4] c, float[N,2,4,4] x, float[2,1,1] z"),
    **{
        op: _text(f"y = {op}(x, z)", _TWO, "bool[N,2,4,4] y")
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    **{op: _text(f"y = {op}(x, z)", *_BOOLS) for op in ("And", "Or", "Xor")},
    **{
        op: _recent(_text(f"y = {op}(x, z)", *_BYTES), 18) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")
    },
}

register(
    *(
        OpSpec(
            op,
            traits=Trait.ELEMENTWISE | _TRAITS.get(op, Trait.NONE),
            data=(0,),
            channels=SAME,
            scales=_SCALES.get(op),
            body=_BODIES.get(op),
            example=_OTHER.get(op, _text(f"y = {op}(x)")),
        )
        for op in _SAME.split()
    ),
    *(
        OpSpec(
            op,
            traits=Trait.ELEMENTWISE | _TRAITS.get(op, Trait.NONE),
            channels=BROADCAST,
            scales=_SCALES.get(op),
            example=_OTHER.get(op, _text(f"y = {op}(x, z)", _TWO)),
        )
        for op in _BROADCAST.split()
    ),
    *(
        OpSpec(
            op,
            traits=_TRAITS.get(op, Trait.NONE),
            channels=Channels(trace),
            scales=_SCALES.get(op),
            older=formulas.over_axes(op),
            example=_recent(_text(f"a = Constant<value_ints=[2,3]>() y = {op}(x, a)", output=_ONE), 18),
        )
        for trace, ops in ((movement.reduce, _REDUCE), (movement.reduce_strictly, _REDUCE_STRICTLY))
        for op in ops.split()
    ),
    *(
        OpSpec(
            op,
            traits=Trait.MERGES_ZEROS,
            channels=Channels(movement.arg_reduce),
            example=_text(f"y = {op}<axis=2, keepdims=0>(x)", output="int64[N,2,4] y"),
        )
        for op in ("ArgMax", "ArgMin")
    ),
    OpSpec(
        "CastLike",
        traits=Trait.ELEMENTWISE,
        data=(0,),
        body=formulas.cast_like,
        channels=Channels(elementwise.like),
        example=_text("y = CastLike(x, z)", "float[N,2,4,4] x, double[1] z", "double[N,2,4,4] y"),
    ),
    # Its result are the bits of what it reads: no number is to be put in its place.
    OpSpec(
        "BitCast",
        traits=Trait.ELEMENTWISE | Trait.TELLS_ZEROS,
        data=(0,),
        channels=SAME,
        foldable=False,
        example=_recent(_text("y = BitCast<to = 6>(x)", output="int32[N,2,4,4] y"), 26),
    ),
    OpSpec(
        "SwiGLU",
        traits=Trait.ELEMENTWISE,
        channels=BROADCAST,
        scales=scales.gate,
        body=formulas.swiglu,
        has_kernel=False,
        example=_recent(_text("y = SwiGLU(z, x)", "float[N,2,4,4] x, float[N,2,4,4] z"), 28),
    ),
    OpSpec(
        "Hardmax",
        channels=ALONG_AXIS,
        older=formulas.along_axis("Hardmax"),
        example=_text("y = Hardmax<axis=3>(x)"),
    ),
    OpSpec(
        "GlobalMaxPool", channels=POOL, scales=scales.pool, example=_text("y = GlobalMaxPool(x)", output=_ONE)
    ),
    OpSpec("LpPool", channels=POOL, example=_text("y = LpPool<kernel_shape=[4,4]>(x)", output=_ONE)),
    OpSpec("GlobalLpPool", channels=POOL, example=_text("y = GlobalLpPool(x)", output=_ONE)),
    OpSpec(
        "LpNormalization",
        traits=Trait.SENSITIVE,
        channels=Channels(layers.lp_norm),
        example=_text("y = LpNormalization<axis=1>(x)"),
    ),
    OpSpec(
        "MeanVarianceNormalization",
        channels=Channels(layers.mean_variance_norm),
        example=_text("y = MeanVarianceNormalization<axes=[2,3]>(x)"),
    ),
    OpSpec("LRN", channels=Channels(layers.local_response), example=_text("y = LRN<size=3>(x)")),
    OpSpec(
        "BatchNormalization",
        traits=Trait.COUNTS_OUTPUTS,
        norm_axis=1,
        channels=Channels(layers.batch_norm),
        scales=scales.batch_normalization,
        example=_text(
            "y = BatchNormalization(x, s, b, m, v)",
            "float[N,2,4,4] x, float[2] s, float[2] b, float[2] m, float[2] v",
        ),
    ),
    OpSpec(
        "InstanceNormalization",
        norm_axis=1,
        channels=Channels(layers.instance_norm),
        scales=scales.normalization,
        example=_text("y = InstanceNormalization(x, s, b)", "float[N,2,4,4] x, float[2] s, float[2] b"),
    ),
    OpSpec(
        "GroupNormalization",
        norm_axis=1,
        channels=Channels(layers.group_norm),
        scales=scales.normalization,
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
        norm_axis=-1,
        channels=Channels(layers.layer_norm),
        scales=scales.normalization,
        body=formulas.layer_norm,
        example=_text(
            "y = LayerNormalization(x, s, b)", "float[N,2,6] x, float[6] s, float[6] b", "float[N,2,6] y"
        ),
    ),
    OpSpec(
        "RMSNormalization",
        norm_axis=-1,
        channels=Channels(layers.layer_norm),
        scales=scales.normalization,
        body=formulas.root_norm,
        example=_recent(
            _text("y = RMSNormalization(x, s)", "float[N,2,6] x, float[6] s", "float[N,2,6] y"), 23
        ),
    ),
    # ONNX Runtime's own, in the standard domain all the same; without the mean, an RMSNormalization.
    OpSpec(
        "SimplifiedLayerNormalization",
        norm_axis=-1,
        scales=scales.normalization,
        body=formulas.root_norm,
        example=_text("y = SimplifiedLayerNormalization(x, s)", "float[N,2,4,4] x, float[4] s"),
    ),
)
