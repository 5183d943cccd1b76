"""What is known about ONNX operators: facts, no algorithms."""

from onnxslim.ops import attention, elementwise, linear, movement, special
from onnxslim.ops.spec import REGISTRY, Channels, OpSpec, Role, register, spec_of

__all__ = [
    "REGISTRY",
    "Channels",
    "OpSpec",
    "Role",
    "attention",
    "elementwise",
    "linear",
    "movement",
    "register",
    "spec_of",
    "special",
]
