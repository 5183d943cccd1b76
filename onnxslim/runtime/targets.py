"""Targets: execution providers, and how each wants its quantized models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxslim.errors import TargetError

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
# Not a provider of ONNX Runtime: operators as the standard's own NumPy code computes them.
REFERENCE = "onnx.reference"


@dataclass(frozen=True)
class Quantized:
    """How a target wants its quantized models.

    Attributes:
        activation: integer type of activations.
        symmetric: whether the zero point of activations is fixed in the middle.
        per_channel: whether weights have one scale per output channel.
        integer_bias: whether a bias is stored as int32 with the product of both scales.
        saturates: whether a kernel may add two uint8·int8 products in 16 bits.
        fuses_relu: whether a Relu is taken into the range of what follows it.
        min_channels: convolutions that sum over fewer channels, depthwise ones apart, are faster in floating
            point; that is the first one of a network, which is also the most sensitive.
        kernels: operators with an integer kernel, besides those that only move data.
        slow: operators that move data faster as floating point than as integers.
        weight_only: matrix products that read integer weights at no loss of time while their data is floats.
    """

    activation: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    symmetric: bool = False
    per_channel: bool = True
    integer_bias: bool = True
    saturates: bool = False
    fuses_relu: bool = True
    min_channels: int = 1
    kernels: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()
    weight_only: frozenset[str] = frozenset()


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
_GPU = Quantized(
    activation=np.dtype(np.int8),
    symmetric=True,
    integer_bias=False,
    fuses_relu=False,
    kernels=frozenset(
        (*_LINEAR_KERNELS, "ConvTranspose", "Add", "AveragePool", "GlobalAveragePool", "Concat")
    ),
)
# Qualcomm's processors: 16-bit activations, which their own tools take for most networks.
_QNN = Quantized(
    activation=np.dtype(np.uint16),
    kernels=_CPU_KERNELS - {"HardSigmoid"} | {"ConvTranspose"},
)


@dataclass(frozen=True)
class Target:
    """An execution provider and what it wants.

    Attributes:
        name: short name for messages and the command line.
        provider: ONNX Runtime's name of it.
        options: provider options.
        threads: threads per operator; 0 lets ONNX Runtime choose.
        libraries: files of custom operators to load. They run as code of this process, so their names must
            come from the caller, never from a model or a recipe.
        quantized: how quantized models are laid out for it.
    """

    name: str
    provider: str
    options: tuple[tuple[str, str], ...] = ()
    threads: int = 0
    libraries: tuple[str, ...] = ()
    quantized: Quantized = field(default_factory=Quantized)

    @staticmethod
    def cpu(threads: int = 0) -> Target:
        """Processors. uint8·int8 kernels without VNNI add in 16 bits, so files are made safe for both."""
        slow = frozenset(("Resize",))
        rules = Quantized(
            saturates=True,
            min_channels=4,
            kernels=_CPU_KERNELS,
            slow=slow,
            weight_only=frozenset(("MatMul", "Gemm")),
        )
        return Target("cpu", CPU, threads=threads, quantized=rules)

    @staticmethod
    def cuda() -> Target:
        """NVIDIA graphics processors; TF32 is off so that results can be compared."""
        return Target("cuda", "CUDAExecutionProvider", (("use_tf32", "0"),), quantized=_GPU)

    @staticmethod
    def tensorrt() -> Target:
        """NVIDIA TensorRT: symmetric int8 with explicit Q/DQ, biases in float."""
        return Target("tensorrt", "TensorrtExecutionProvider", quantized=_GPU)

    @staticmethod
    def openvino() -> Target:
        """Intel OpenVINO on the processor.

        Its integer kernel for the first convolution of a small ViT computes something else: 3 dB are left,
        41 dB with that layer in float (docs/providers.md).
        """
        rules = Quantized(kernels=_CPU_KERNELS, min_channels=4)
        return Target("openvino", OPENVINO, (("device_type", "CPU"),), quantized=rules)

    @staticmethod
    def reference() -> Target:
        """The reference evaluator of the onnx package, for small models; it has no latency to speak of."""
        return Target("reference", REFERENCE)

    @staticmethod
    def named(name: str) -> Target:
        """The target of this name, or of this provider name, in any case.

        Raises:
            TargetError: there is no such target; lists those there are.
        """
        key = name.lower().removesuffix("executionprovider")
        for target in known():
            if key == target.name:
                return target
        names = ", ".join(target.name for target in known())
        raise TargetError(f"unknown execution provider '{name}'; known are: {names}")

    def with_threads(self, threads: int) -> Target:
        """The same target with a fixed number of threads."""
        return replace(self, threads=threads)

    def with_libraries(self, libraries: Sequence[str]) -> Target:
        """The same target with custom operators from these files."""
        return replace(self, libraries=tuple(libraries))


def layout(name: str) -> Quantized:
    """How a target wants its quantized models, be it here or not: one of `LAYOUTS`."""
    return _QNN if name == "qnn" else Target.named(name).quantized


LAYOUTS = ("cpu", "openvino", "cuda", "tensorrt", "qnn")


def known() -> tuple[Target, ...]:
    """Every target that has a name, the fastest first."""
    return (Target.tensorrt(), Target.cuda(), Target.openvino(), Target.cpu(), Target.reference())
