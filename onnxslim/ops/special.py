"""Operators that must not be computed ahead of time or merged with their equals."""

from __future__ import annotations

from onnxslim.ops.spec import OpSpec, register

_RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
)
# Folding these would undo a quantized model's 8-bit storage.
_QUANTIZE = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
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
    *(OpSpec(op, foldable=False) for op in _QUANTIZE),
    *(OpSpec(op, foldable=False, pure=False) for op in _STRUCTURED),
    # A pure function only outside training mode, which an input may switch on.
    OpSpec("Dropout", foldable=False, pure=False),
)
