"""Targets: execution providers as data, one entry each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from onnxslim.errors import TargetError
from onnxslim.ops.layouts import LAYOUTS, IntegerLayout
from onnxslim.runtime.native import CPU

BackendName: TypeAlias = Literal["onnxruntime", "reference"]


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
        layout: how quantized models are laid out for it, usually one of `LAYOUTS`.
        threads_option: the provider option that takes the number of threads, for providers that do not go by
            the session's.
        backend: what opens models for it, one of `onnxslim.runtime.session.BACKENDS`.
    """

    name: str
    provider: str
    options: tuple[tuple[str, str], ...] = ()
    threads: int = 0
    libraries: tuple[str, ...] = ()
    layout: IntegerLayout = field(default_factory=IntegerLayout)
    threads_option: str = ""
    backend: BackendName = "onnxruntime"

    @staticmethod
    def cpu(threads: int = 0) -> Target:
        """Processors."""
        return REGISTRY["cpu"].with_threads(threads)

    @staticmethod
    def cuda() -> Target:
        """NVIDIA graphics processors."""
        return REGISTRY["cuda"]

    @staticmethod
    def tensorrt() -> Target:
        """NVIDIA TensorRT."""
        return REGISTRY["tensorrt"]

    @staticmethod
    def openvino() -> Target:
        """Intel OpenVINO on the processor."""
        return REGISTRY["openvino"]

    @staticmethod
    def reference() -> Target:
        """The reference evaluator of the onnx package, for small models; it has no latency to speak of."""
        return REGISTRY["reference"]

    @staticmethod
    def named(name: str) -> Target:
        """The target of this name, or of this provider name, in any case.

        Raises:
            TargetError: there is no such target; lists those there are.
        """
        found = REGISTRY.get(name.lower().removesuffix("executionprovider"))
        if found is None:
            raise TargetError(f"unknown execution provider '{name}'; known are: {', '.join(REGISTRY)}")
        return found

    @staticmethod
    def of(target: Target | str | None) -> Target:
        """A target, or the one of this name; processors for None.

        Raises:
            TargetError: there is no such target; lists those there are.
        """
        if target is None or isinstance(target, str):
            return Target.cpu() if target is None else Target.named(target)
        if isinstance(target, Target):
            return target
        raise TargetError(f"a target is the name of one or a Target, not {target!r}")

    def with_threads(self, threads: int) -> Target:
        """The same target with a fixed number of threads."""
        return replace(self, threads=threads)

    def with_libraries(self, libraries: Sequence[str]) -> Target:
        """The same target with custom operators from these files."""
        return replace(self, libraries=tuple(libraries))


_ENTRIES = (
    Target("tensorrt", "TensorrtExecutionProvider", layout=LAYOUTS["tensorrt"]),
    # TF32 is off so that results can be compared.
    Target("cuda", "CUDAExecutionProvider", (("use_tf32", "0"),), layout=LAYOUTS["cuda"]),
    Target(
        "openvino",
        "OpenVINOExecutionProvider",
        (("device_type", "CPU"),),
        layout=LAYOUTS["openvino"],
        threads_option="num_of_threads",
    ),
    Target("cpu", CPU, layout=LAYOUTS["cpu"]),
    # Not a provider of ONNX Runtime: operators as the standard's own NumPy code computes them.
    Target("reference", "onnx.reference", backend="reference"),
)
REGISTRY: dict[str, Target] = {target.name: target for target in _ENTRIES}
"""Every target by its name, the fastest first. A new one is an entry here; nothing else lists them."""


def layouts() -> dict[str, IntegerLayout]:
    """What a quantized model can be laid out for: the table of layouts, and targets with integer kernels."""
    mine = {target.name: target.layout for target in REGISTRY.values() if target.layout.kernels}
    return {**LAYOUTS, **mine}
