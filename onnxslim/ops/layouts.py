"""Integer layouts: what quantized graphs look like for the kernels of one runtime or another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class IntegerLayout:
    """How a target wants its quantized models.

    Attributes:
        activation: integer type of activations.
        bits: that they have of it, if not all: a simulation of what the target has no kernels for. Only what
            weighted operators read is rounded then, and whatever else reads it gets floats.
        symmetric: whether the zero point of activations is fixed in the middle.
        integer_bias: whether a bias is stored as int32 with the product of both scales.
        saturates: whether a kernel may add two uint8·int8 products in 16 bits.
        fuses_relu: whether a Relu is taken into the range of what follows it.
        min_channels: convolutions that sum over fewer channels, depthwise ones apart, are faster in floating
            point; that is the first one of a network, which is also the most sensitive.
        kernels: operators with an integer kernel, besides those that only move data.
        slow: operators that move data faster as floating point than as integers.
        recurrent: recurrent layers with a kernel that turns data and state into integers as they come.
        weight_only: matrix products that read integer weights at no loss of time while their data is floats.
        zero_points: whether weights of few bits may have codes of zero other than 0.
        block_products: whether products by blocks of few bits run, but only where they are written as such.
    """

    activation: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    bits: int | None = None
    symmetric: bool = False
    integer_bias: bool = True
    saturates: bool = False
    fuses_relu: bool = True
    min_channels: int = 1
    kernels: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()
    recurrent: frozenset[str] = frozenset()
    weight_only: frozenset[str] = frozenset()
    block_products: bool = False
    zero_points: bool = False

    @property
    def codes(self) -> tuple[int, int]:
        """Least and largest code of activations.

        A symmetric type leaves its lowest code unused, so that negation stays possible.
        """
        info = np.iinfo(self.activation)
        half = 1 << (self.bits or info.bits) - 1
        least, most = (-half, half - 1) if info.min else (0, 2 * half - 1)
        return least + (self.symmetric and info.min < 0), most

    def of(self, activation: np.dtype[Any], bits: int | None = None) -> IntegerLayout:
        """The same with another type of activations, or so many bits of it; see `bits`."""
        other = replace(self, activation=activation, bits=bits, symmetric=activation.kind == "i")
        if bits is None:
            return other
        # A bias in steps of both scales would be off by more than all else, as it is the same everywhere.
        kernels = self.kernels & {*_LINEAR_KERNELS, "ConvTranspose"}
        return replace(other, kernels=kernels, fuses_relu=False, saturates=False, integer_bias=False)


_LINEAR_KERNELS = ("Conv", "Gemm", "MatMul")
_CPU_KERNELS = frozenset(
    (
        *_LINEAR_KERNELS,
        "Add",
        "Mul",
        "Concat",
        "AveragePool",
        "GlobalAveragePool",
        "LeakyRelu",
        "HardSigmoid",
        "Sigmoid",
        "Softmax",
    )
)
_GPU = IntegerLayout(
    activation=np.dtype(np.int8),
    symmetric=True,
    integer_bias=False,
    fuses_relu=False,
    kernels=frozenset(
        (*_LINEAR_KERNELS, "ConvTranspose", "Add", "AveragePool", "GlobalAveragePool", "Concat")
    ),
)

LAYOUTS: dict[str, IntegerLayout] = {
    # uint8·int8 kernels of processors without VNNI add in 16 bits, so files are made safe for both.
    "cpu": IntegerLayout(
        saturates=True,
        min_channels=4,
        kernels=_CPU_KERNELS,
        slow=frozenset(("Resize",)),
        recurrent=frozenset(("LSTM",)),
        weight_only=frozenset(("MatMul", "Gemm")),
        zero_points=True,
    ),
    # Its kernel for the first convolution of a small ViT computes something else: 3 dB are left, 41 dB with
    # that layer in float (docs/providers.md).
    "openvino": IntegerLayout(min_channels=4, kernels=_CPU_KERNELS),
    "cuda": _GPU,
    # Explicit Q/DQ, biases in float.
    "tensorrt": _GPU,
    # No integer kernels: integers are how weights are stored and, in blocks, read.
    "webgpu": IntegerLayout(weight_only=frozenset(("MatMul", "Gemm")), block_products=True),
    # Qualcomm's processors: 16-bit activations, which their own tools take for most networks.
    "qnn": IntegerLayout(
        activation=np.dtype(np.uint16), kernels=_CPU_KERNELS - {"HardSigmoid"} | {"ConvTranspose"}
    ),
}
"""By name, be the target here or not."""
