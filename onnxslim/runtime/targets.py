"""Targets: execution providers as data, one entry each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from onnxslim.errors import TargetError, UsageError
from onnxslim.ops.layouts import LAYOUTS, IntegerLayout
from onnxslim.runtime import native, plugins
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
        packages: on PyPI, that bring the provider.
        plugin: the file of a plugin of ONNX Runtime that has the provider, for where the onnxruntime that is
            installed has not; by default that of an installed package. It runs as code of this process, like
            `libraries`.
        device: the kind of a plugin's devices to take (CPU, GPU, NPU); the first one by default.
        plugin_options: instead of `options` where the provider is a plugin; the number of threads stands
            where a value says `{threads}`.
        needs: what a machine must have for the provider to offer a device, for messages.
        precision: what floats are computed in, where that is not what the model says or the provider would
            do by itself.
        stands_for: the name of the target that this one is in the place of, see `simulated`.
    """

    name: str
    provider: str
    options: tuple[tuple[str, str], ...] = ()
    threads: int = 0
    libraries: tuple[str, ...] = ()
    layout: IntegerLayout = field(default_factory=IntegerLayout)
    threads_option: str = ""
    backend: BackendName = "onnxruntime"
    packages: tuple[str, ...] = ()
    plugin: str = ""
    device: str = ""
    plugin_options: tuple[tuple[str, str], ...] = ()
    needs: str = ""
    precision: str = ""
    stands_for: str = ""

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
    def webgpu() -> Target:
        """Graphics processors by WebGPU, which is also what browsers have."""
        return REGISTRY["webgpu"]

    @staticmethod
    def qnn() -> Target:
        """Qualcomm's neural processors."""
        return REGISTRY["qnn"]

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
        wanted = plugins.short_name(name)
        for listed in (REGISTRY.values, known):  # packages are looked at only for what is not listed
            for each in listed():
                if wanted in (each.name, plugins.short_name(each.provider)):
                    return each
        names = ", ".join(each.name for each in known())
        raise TargetError(f"unknown execution provider '{name}'; known are: {names}")

    @staticmethod
    def in_library(path: str) -> tuple[Target, ...]:
        """The targets that a plugin of ONNX Runtime brings, from its file, which is loaded as code.

        Raises:
            UsageError: there is no such file.
            TargetError: it cannot be loaded, or offers no device on this machine.
        """
        file = Path(path)
        if not file.is_file():
            raise UsageError(f"there is no plugin '{path}'")
        named = REGISTRY.get(native.library_name(path))
        devices = native.plugin_devices(str(file.resolve()), named.provider if named else "")
        found = dict.fromkeys(each.provider for each in devices)
        if not found:
            raise TargetError(f"the plugin '{path}' offers no device on this machine")
        return tuple(replace(_of_provider(each), plugin=str(file.resolve())) for each in found)

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

    def simulated(self) -> Target:
        """Processors in the place of this target: models are laid out for it, and run here.

        Between Q and DQ they compute in float, so that no integer kernel of processors has a part in it.
        """
        return replace(
            REGISTRY["cpu"],
            threads=self.threads,
            libraries=self.libraries,
            layout=self.layout,
            stands_for=self.name,
        )

    def with_libraries(self, libraries: Sequence[str]) -> Target:
        """The same target with custom operators from these files."""
        return replace(self, libraries=tuple(libraries))


_ENTRIES = (
    Target(
        "tensorrt", "TensorrtExecutionProvider", layout=LAYOUTS["tensorrt"], packages=("onnxruntime-gpu",)
    ),
    Target(
        "tensorrt-rtx",
        "NvTensorRTRTXExecutionProvider",
        layout=LAYOUTS["tensorrt"],
        packages=("onnxruntime-ep-nv-tensorrt-rtx",),
        needs="a graphics card of NVIDIA's RTX line",
    ),
    # TF32 is off so that results can be compared.
    Target(
        "cuda",
        "CUDAExecutionProvider",
        (("use_tf32", "0"),),
        layout=LAYOUTS["cuda"],
        packages=("onnxruntime-gpu",),
        precision="float32 is asked for: TF32, the default, is off",
    ),
    Target(
        "qnn",
        "QNNExecutionProvider",
        (("backend_type", "htp"),),
        layout=LAYOUTS["qnn"],
        packages=("onnxruntime-qnn",),
        device="NPU",
        plugin_options=(("backend_type", "htp"),),
        needs="a neural processor by Qualcomm",
    ),
    Target(
        "webgpu",
        "WebGpuExecutionProvider",
        layout=LAYOUTS["webgpu"],
        packages=("onnxruntime-webgpu", "onnxruntime-ep-webgpu"),
        needs="a graphics card that the system lists",
    ),
    # In bfloat16, the plugin's default where processors have it, 50 dB are left of a float network.
    Target(
        "openvino",
        "OpenVINOExecutionProvider",
        (("device_type", "CPU"),),
        layout=LAYOUTS["openvino"],
        threads_option="num_of_threads",
        packages=("onnxruntime-ep-openvino",),
        device="CPU",
        plugin_options=(
            (
                "load_config",
                '{"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": {threads}}}',
            ),
        ),
        needs="a processor by Intel",
        precision="float32 is asked for: the plugin alone computes in bfloat16 where processors have it",
    ),
    Target("cpu", CPU, layout=LAYOUTS["cpu"], packages=("onnxruntime",)),
    # Not a provider of ONNX Runtime: operators as the standard's own NumPy code computes them.
    Target("reference", "onnx.reference", backend="reference"),
)
REGISTRY: dict[str, Target] = {target.name: target for target in _ENTRIES}
"""Every target by its name, the fastest first. A new one is an entry here; nothing else lists them."""


def known() -> tuple[Target, ...]:
    """The registry, and what packages of plugins bring besides."""
    listed = {target.provider for target in REGISTRY.values()}
    found = (provider for each in plugins.packages() for provider in each.providers)
    others = dict.fromkeys(provider for provider in found if provider not in listed)
    return (*REGISTRY.values(), *map(_of_provider, others))


def _of_provider(provider: str) -> Target:
    """The target of a provider, by its full name; nothing is known of what it wants if it is not listed."""
    listed = (target for target in REGISTRY.values() if target.provider == provider)
    return next(listed, Target(plugins.short_name(provider), provider))


def layouts() -> dict[str, IntegerLayout]:
    """What a quantized model can be laid out for: the table of layouts, and targets with integer kernels."""
    mine = {target.name: target.layout for target in REGISTRY.values() if target.layout.kernels}
    return {**LAYOUTS, **mine}
