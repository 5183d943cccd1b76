"""What is known about ONNX operators: facts, no algorithms."""

from onnxslim.ops import attention, elementwise, generate, linear, movement, special
from onnxslim.ops.spec import REGISTRY, Channels, OpSpec, Role, Trait, has, register, spec_of

__all__ = [
    "REGISTRY",
    "Channels",
    "OpSpec",
    "Role",
    "Trait",
    "attention",
    "elementwise",
    "generate",
    "has",
    "linear",
    "movement",
    "register",
    "spec_of",
    "special",
]
