"""Sessions of ONNX Runtime from plain data; the only module that imports onnxruntime, when it is first used.

A worker of `onnxslim.runtime.isolated` starts with this module: it imports nothing that takes long.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from onnxslim.errors import LoadError, TargetError, UsageError, one_line
from onnxslim.runtime.limits import LimitExceeded, RunLimits, Watchdog

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class SessionSettings:
    """How ONNX Runtime is to open a model.

    Attributes:
        provider: its name of the execution provider, which must really be used.
        provider_options: as text.
        threads: threads per operator; 0 lets it choose.
        libraries: files of custom operators to load.
        plugin: the file of a plugin that has the provider, for where this onnxruntime has not; may be empty.
        device: the kind of its devices to take; the first one if empty.
        plugin_options: instead of `provider_options` for the plugin.
        needs: what a machine must have for it to offer a device.
        optimize, optimized, profile: see `onnxslim.runtime.session.Session`.
        prepack: whether weights may be copied into another layout.
        spin: whether threads that wait for work keep a core busy.
        fuse_integers: whether operators between Q and DQ may become integer kernels, which round and saturate
            in ways of their own.
    """

    provider: str = CPU
    provider_options: tuple[tuple[str, str], ...] = ()
    threads: int = 0
    libraries: tuple[str, ...] = ()
    plugin: str = ""
    device: str = ""
    plugin_options: tuple[tuple[str, str], ...] = ()
    needs: str = ""
    optimize: str = "all"
    optimized: Path | None = None
    profile: Path | None = None
    prepack: bool = True
    spin: bool = True
    fuse_integers: bool = True


@functools.cache
def onnxruntime() -> ModuleType:
    """The onnxruntime package.

    Raises:
        TargetError: it is not installed; says which extra installs it.
    """
    # From 1.29 on it tells Microsoft names and hashes of models; this it heeds when it is imported only.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise TargetError(
            "onnxruntime is not installed; install one of: pip install 'onnx-slimkit[cpu]', "
            "'onnx-slimkit[gpu]', 'onnx-slimkit[openvino]', 'onnx-slimkit[webgpu]'"
        ) from error
    ort.set_default_logger_severity(4)
    return ort  # type: ignore[no-any-return]


class OrtModel:
    """A model in a session of ONNX Runtime.

    Args:
        session: an `onnxruntime.InferenceSession`.
        weights: what it reads where it is.
        elsewhere: opens the same model on processors, to know whether a run fails for the provider's sake.
    """

    def __init__(
        self, session: Any, weights: Sequence[Any] = (), elsewhere: Callable[[], Any] | None = None
    ) -> None:
        self._session = session
        self._weights = weights
        self._elsewhere = elsewhere
        self.input_names = tuple(item.name for item in session.get_inputs())
        self.output_names = tuple(item.name for item in session.get_outputs())

    def run(self, names: Sequence[str], feeds: Mapping[str, Any], limits: RunLimits | None) -> Sequence[Any]:
        """See `onnxslim.runtime.backend.Loaded`."""
        try:
            return self._limited(names, feeds, limits)
        except LimitExceeded:
            raise
        except LoadError as error:
            if self._elsewhere is None or not self._runs_elsewhere(names, feeds):
                raise
            provider, why = self._session.get_providers()[0], str(error).removeprefix(_FAILED)
            raise TargetError(f"{provider} cannot run the model here: {why}") from error

    def _runs_elsewhere(self, names: Sequence[str], feeds: Mapping[str, Any]) -> bool:
        assert self._elsewhere is not None
        try:
            self._elsewhere().run(list(names), dict(feeds))
        except Exception:  # onnxruntime raises a dozen unrelated types
            return False
        return True

    def _limited(
        self, names: Sequence[str], feeds: Mapping[str, Any], limits: RunLimits | None
    ) -> Sequence[Any]:
        if limits is None:
            return self._run(names, feeds)
        options = onnxruntime().RunOptions()
        watchdog = Watchdog(limits, lambda: setattr(options, "terminate", True))
        try:
            with watchdog:
                return self._run(names, feeds, options)
        except LoadError as error:
            if watchdog.exceeded:
                raise LimitExceeded(
                    f"ONNX Runtime was stopped: the run took more than {watchdog.exceeded}"
                ) from error
            raise

    def _run(self, names: Sequence[str], feeds: Mapping[str, Any], *options: Any) -> list[Any]:
        try:
            return list(self._session.run(list(names), dict(feeds), *options))
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise LoadError(_FAILED + message(error)) from error

    def end_profile(self) -> Path:
        """See `onnxslim.runtime.backend.Loaded`."""
        return Path(self._session.end_profiling())


def open_model(
    source: bytes | str, settings: SessionSettings, weights: Mapping[str, Any] = MappingProxyType({})
) -> OrtModel:
    """Open a model in this process.

    Args:
        source: its bytes, or the path of its file.
        settings: how.
        weights: by name, arrays that belong in the place of tensors that the model says are elsewhere.

    Raises:
        LoadError: ONNX Runtime refuses the model; carries its message.
        TargetError: the provider is not there, or not what is used.
        UsageError: a library of custom operators cannot be loaded.
    """
    options = _options(settings)
    providers = _asked_for(options, settings)
    held = [onnxruntime().OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    if held:
        options.add_external_initializers(list(weights), held)
    try:
        session = onnxruntime().InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise _refused(settings, source, error) from error
    used = session.get_providers()[0]
    if used != settings.provider:
        raise TargetError(
            f"{settings.provider} was asked for, but cannot be used here: ONNX Runtime fell back to {used}"
        )
    on_processors = None if settings.provider == CPU else partial(_on_processors, source, settings.libraries)
    return OrtModel(session, held, on_processors)


_FAILED = "ONNX Runtime fails to run the model: "
# In what ONNX Runtime says where it has no kernel for the types of an operator.
LACKING = "NOT_IMPLEMENTED"


def message(error: Exception) -> str:
    """ONNX Runtime's message without its prefixes and source locations, which it nests."""
    text = one_line(error).split("Status Message: ")[-1]
    text = text.rpartition("[ONNXRuntimeError] : ")[-1]
    return re.sub(r"^(\d+ : \w+ : )?/\S+:\d+ .*?\) ", r"\1", text)


def built_in() -> list[str]:
    """The providers of the installed onnxruntime itself."""
    plugged = {device.provider for devices in _PLUGGED.values() for device in devices}
    return [name for name in onnxruntime().get_available_providers() if name not in plugged]


@dataclass(frozen=True)
class PluginDevice:
    """A device that a plugin offers on this machine.

    Attributes:
        provider: the execution provider that runs on it.
        kind: CPU, GPU or NPU.
        vendor: who made it.
        version: of the provider.
        handle: ONNX Runtime's own object.
    """

    provider: str
    kind: str
    vendor: str
    version: str
    handle: Any


# Devices of each plugin that was loaded, by its file: it can be loaded only once.
_PLUGGED: dict[str, tuple[PluginDevice, ...]] = {}


def plugin_devices(library: str, provider: str = "") -> tuple[PluginDevice, ...]:
    """Load a plugin into this process, and see what it offers here.

    Args:
        library: its file.
        provider: the one that is looked for; some plugins call it as they are told.

    Raises:
        TargetError: it cannot be loaded.
    """
    library = os.path.realpath(library)
    if library not in _PLUGGED:
        ort = onnxruntime()
        try:
            before = len(ort.get_ep_devices())
            ort.register_execution_provider_library(provider or library_name(library), library)
            found = ort.get_ep_devices()[before:]
        except Exception as error:  # onnxruntime raises a dozen unrelated types, or is older than plugins
            raise TargetError(f"the plugin '{library}' cannot be loaded: {message(error)}") from error
        _PLUGGED[library] = tuple(map(_device, found))
    return _PLUGGED[library]


def _device(handle: Any) -> PluginDevice:
    kind, version = handle.device.type.name, handle.ep_metadata.get("version", "")
    return PluginDevice(handle.ep_name, kind, handle.device.vendor, version, handle)


def library_name(library: str) -> str:
    """What a library is called, without what all libraries of providers are called."""
    name = Path(library).name.partition(".")[0].removeprefix("lib")
    return name.removeprefix("onnxruntime_").removeprefix("providers_") or name


def _asked_for(options: Any, settings: SessionSettings) -> list[Any] | None:
    """What to name to a session: a provider that is built in; None where options name a device instead."""
    provider, present = settings.provider, built_in()
    if provider in present:
        return [(provider, dict(settings.provider_options))]
    if not settings.plugin:
        raise TargetError(
            f"{provider} is not available here; the installed onnxruntime has: {', '.join(present)}"
        )
    offered = plugin_devices(settings.plugin, provider)
    fit = [each for each in offered if each.provider == provider and settings.device in ("", each.kind)]
    if not fit:
        kinds = ", ".join(dict.fromkeys(f"{each.provider} on {each.kind}" for each in offered))
        wanted = f"{settings.device} device".strip()
        instead, needs = kinds and f", only {kinds}", settings.needs and f"; it needs {settings.needs}"
        raise TargetError(
            f"{provider} cannot be used here: its plugin '{Path(settings.plugin).name}' offers no {wanted} "
            f"on this machine{instead}{needs}"
        )
    try:
        options.add_provider_for_devices([fit[0].handle], dict(settings.plugin_options))
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise TargetError(f"{provider} cannot be used here: {message(error)}") from error
    return None


def _refused(settings: SessionSettings, source: bytes | str, error: Exception) -> Exception:
    """What a session that could not be opened means: the model is at fault if processors refuse it too."""
    if settings.provider != CPU:
        try:
            _on_processors(source, settings.libraries)
        except Exception:
            pass
        else:
            return TargetError(f"{settings.provider} cannot be used here: {message(error)}")
    return LoadError(f"ONNX Runtime refuses the model: {message(error)}")


def _on_processors(source: bytes | str, libraries: tuple[str, ...]) -> Any:
    """A session that tells whether a model is at fault, or the provider."""
    options = _options(SessionSettings(libraries=libraries, optimize="none", prepack=False))
    return onnxruntime().InferenceSession(source, options, providers=[CPU])


def _options(settings: SessionSettings) -> Any:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = settings.threads
    _register(options, settings.libraries)
    options.graph_optimization_level = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }[settings.optimize]
    if not settings.prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not settings.fuse_integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not settings.spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Whoever computes between runs needs the memory that the arena would keep for the next one.
        options.enable_cpu_mem_arena = False
    if settings.optimized is not None:
        options.optimized_model_filepath = str(settings.optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", settings.optimized.name + ".data"
        )
    if settings.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile / "profile")
    return options


def _register(options: Any, libraries: Sequence[str]) -> None:
    library = ""
    try:
        for library in libraries:
            options.register_custom_ops_library(library)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UsageError(f"cannot load custom operators from '{library}': {message(error)}") from error
