"""What is known about ONNX operators: facts, no algorithms."""

from onnxslim.ops import attention, bound, contrib, elementwise, generate, linear, movement, special
from onnxslim.ops.spec import (
    REGISTRY,
    Channels,
    OpSpec,
    Role,
    Trait,
    body_of,
    has,
    layer_of,
    register,
    spec_of,
    view_of,
)

__all__ = [
    "REGISTRY",
    "Channels",
    "OpSpec",
    "Role",
    "Trait",
    "attention",
    "body_of",
    "bound",
    "contrib",
    "elementwise",
    "generate",
    "has",
    "layer_of",
    "linear",
    "movement",
    "register",
    "spec_of",
    "special",
    "view_of",
]
