"""Operators that must not be computed ahead of time or merged with their equals."""

from __future__ import annotations

from onnxslim.ops.channels import elementwise, layers
from onnxslim.ops.spec import Channels, OpSpec, register

_RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
)
# Folding these would undo a quantized model's 8-bit storage.
_QUANTIZE = (
    (
        "QuantizeLinear",
        """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2,4] x) => (uint8[N,2,4] y)
<float[2] s = {0.5, 0.25}, uint8[2] z = {0, 1}> { y = QuantizeLinear<axis=1>(x, s, z) }""",
    ),
    (
        "DequantizeLinear",
        """<ir_version: 8, opset_import: ["" : 17]>
g (uint8[N,2,4] x) => (float[N,2,4] y)
<float[2] s = {0.5, 0.25}, uint8[2] z = {0, 1}> { y = DequantizeLinear<axis=1>(x, s, z) }""",
    ),
)
# Their results are no tensors, or depend on graphs of their own.
_STRUCTURED = (
    "If",
    "Loop",
    "Scan",
    "SequenceMap",
    "SequenceEmpty",
    "SequenceConstruct",
    "SequenceInsert",
    "SequenceErase",
    "SequenceAt",
    "SequenceLength",
    "SplitToSequence",
    "ConcatFromSequence",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
)

register(
    *(OpSpec(op, foldable=False, pure=False) for op in _RANDOM),
    *(OpSpec(op, foldable=False, channels=Channels(layers.quantize), example=text) for op, text in _QUANTIZE),
    OpSpec("DynamicQuantizeLinear", foldable=False),
    *(OpSpec(op, foldable=False, pure=False) for op in _STRUCTURED),
    # A pure function only outside training mode, which an input may switch on.
    OpSpec(
        "Dropout",
        foldable=False,
        pure=False,
        channels=Channels(elementwise.same_all),
        example="""<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2] x) => (float[N,2] y) { y = Dropout(x) }""",
    ),
)
