"""Operators that must not be computed ahead of time or merged with their equals."""

from __future__ import annotations

from onnxslim.ops import integers
from onnxslim.ops.channels import elementwise, layers
from onnxslim.ops.spec import Channels, OpSpec, Trait, register

_RANDOM = {
    "RandomNormal": Trait.GROWS,
    "RandomUniform": Trait.GROWS,
    "RandomNormalLike": Trait.NONE,
    "RandomUniformLike": Trait.NONE,
    "Multinomial": Trait.NONE,
    "Bernoulli": Trait.NONE,
}
# Folding these would undo a quantized model's 8-bit storage.
_QUANTIZE = (
    (
        "QuantizeLinear",
        Trait.QUANTIZES,
        """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2,4] x) => (uint8[N,2,4] y)
<float[2] s = {0.5, 0.25}, uint8[2] z = {0, 1}> { y = QuantizeLinear<axis=1>(x, s, z) }""",
    ),
    (
        "DequantizeLinear",
        Trait.DEQUANTIZES,
        """<ir_version: 8, opset_import: ["" : 17]>
g (uint8[N,2,4] x) => (float[N,2,4] y)
<float[2] s = {0.5, 0.25}, uint8[2] z = {0, 1}> { y = DequantizeLinear<axis=1>(x, s, z) }""",
    ),
)
_HEAD = '<ir_version: 8, opset_import: ["" : 17]>\ng '
_PAIR = "(float[2] x, float[2] z) => (seq(float[2]) y)"
# Their results are no tensors.
_STRUCTURED = {
    "SequenceEmpty": f"{_HEAD}() => (seq(float) y) {{ y = SequenceEmpty() }}",
    "SequenceConstruct": f"{_HEAD}{_PAIR} {{ y = SequenceConstruct(x, z) }}",
    "SequenceInsert": f"{_HEAD}{_PAIR} {{ s = SequenceConstruct(x) y = SequenceInsert(s, z) }}",
    "SequenceErase": f"{_HEAD}{_PAIR} {{ s = SequenceConstruct(x, z) y = SequenceErase(s) }}",
    "SequenceMap": f"{_HEAD}{_PAIR} {{ s = SequenceConstruct(x, z)"
    " y = SequenceMap<body = b (float[2] e) => (float[2] f) { f = Neg(e) }>(s) }",
    "SplitToSequence": f"{_HEAD}(float[4] x) => (seq(float[1]) y) {{ y = SplitToSequence(x) }}",
    "Optional": f"{_HEAD}(float[2] x) => (optional(float[2]) y) {{ y = Optional(x) }}",
}
# They read such results, or depend on graphs of their own.
_STRUCTURE = (
    "If",
    "Loop",
    "Scan",
    "SequenceAt",
    "SequenceLength",
    "ConcatFromSequence",
    "OptionalGetElement",
    "OptionalHasElement",
)

register(
    *(
        OpSpec(
            op,
            traits=traits,
            foldable=False,
            pure=False,
            example=f"{_HEAD}() => (float[64] y) {{ y = {op}<shape = [64]>() }}" if traits else "",
        )
        for op, traits in _RANDOM.items()
    ),
    *(
        OpSpec(op, traits=trait, foldable=False, channels=Channels(layers.quantize), example=text)
        for op, trait, text in _QUANTIZE
    ),
    *(
        OpSpec(op, "com.microsoft", traits=trait, foldable=False, body=integers.code(op))
        for op, trait, _ in _QUANTIZE
    ),
    OpSpec("DynamicQuantizeLinear", foldable=False),
    *(
        OpSpec(op, traits=Trait.STRUCTURED, foldable=False, pure=False, example=text)
        for op, text in _STRUCTURED.items()
    ),
    *(OpSpec(op, foldable=False, pure=False) for op in _STRUCTURE),
    # A pure function only outside training mode, which an input may switch on.
    OpSpec(
        "Dropout",
        foldable=False,
        pure=False,
        channels=Channels(elementwise.same_all),
        scales=elementwise.same,
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2] x) => (float[N,2] y) { y = Dropout(x) }""",
    ),
)
