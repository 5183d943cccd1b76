"""What is known about ONNX operators: facts, no algorithms."""

from onnxslim.ops import elementwise, linear, movement, special
from onnxslim.ops.spec import REGISTRY, OpSpec, Role, register, spec_of

__all__ = [
    "REGISTRY",
    "OpSpec",
    "Role",
    "elementwise",
    "linear",
    "movement",
    "register",
    "spec_of",
    "special",
]
