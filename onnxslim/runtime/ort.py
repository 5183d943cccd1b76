"""ONNX Runtime as a backend; the only module that imports onnxruntime, and only when it is first used."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from onnxslim.errors import LoadError, TargetError, UsageError
from onnxslim.ir import files
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.backend import Loadable, Opening, message
from onnxslim.runtime.limits import LimitExceeded, RunLimits, Watchdog
from onnxslim.runtime.targets import CPU, Target

# From here on, a copy of the weights would cost more memory than it saves time in a run or two.
LARGE_BYTES = 512 << 20


@functools.cache
def onnxruntime() -> ModuleType:
    """The onnxruntime package.

    Raises:
        TargetError: it is not installed; says which extra installs it.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise TargetError(
            "onnxruntime is not installed; install one of: pip install 'onnx-slimkit[cpu]', "
            "'onnx-slimkit[gpu]', 'onnx-slimkit[openvino]'"
        ) from error
    ort.set_default_logger_severity(4)
    return ort  # type: ignore[no-any-return]


class OrtModel:
    """A model in a session of ONNX Runtime.

    Args:
        session: an `onnxruntime.InferenceSession`.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self.input_names = tuple(item.name for item in session.get_inputs())
        self.output_names = tuple(item.name for item in session.get_outputs())

    def run(
        self, names: Sequence[str], feeds: Mapping[str, Array], limits: RunLimits | None
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

    def _run(self, names: Sequence[str], feeds: Mapping[str, Array], *options: Any) -> list[Any]:
        try:
            return list(self._session.run(list(names), dict(feeds), *options))
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise LoadError(f"ONNX Runtime fails to run the model: {message(error)}") from error

    def end_profile(self) -> Path:
        return Path(self._session.end_profiling())


class OnnxRuntime:
    """Execution providers that the installed onnxruntime has."""

    has_latency = True
    profiles = True

    def open(self, model: Loadable, target: Target, how: Opening) -> OrtModel:
        _require(target)
        once = how.once and isinstance(model, Model) and model.nbytes() >= LARGE_BYTES
        options = _options(target, how, prepack=not once)
        with _loadable(model) as source:
            try:
                session = onnxruntime().InferenceSession(
                    source, options, providers=_providers(target), enable_fallback=0
                )
            except Exception as error:  # onnxruntime raises a dozen unrelated types
                raise _refused(target, source, error) from error
        used = session.get_providers()[0]
        if used != target.provider:
            raise TargetError(
                f"{target.provider} was asked for, but cannot be used here: ONNX Runtime fell back to {used}"
            )
        return OrtModel(session)


def _require(target: Target) -> None:
    present = onnxruntime().get_available_providers()
    if target.provider not in present:
        raise TargetError(
            f"{target.provider} is not available here; the installed onnxruntime has: {', '.join(present)}"
        )


def _refused(target: Target, source: bytes | str, error: Exception) -> Exception:
    """What a session that could not be opened means: the model is at fault if processors refuse it too."""
    if target.provider != CPU:
        try:
            options = _options(Target.cpu(), Opening(optimize="none"), prepack=False)
            onnxruntime().InferenceSession(source, options, providers=[CPU])
        except Exception:
            pass
        else:
            return TargetError(f"{target.provider} cannot be used here: {message(error)}")
    return LoadError(f"ONNX Runtime refuses the model: {message(error)}")


def _providers(target: Target) -> list[str | tuple[str, dict[str, str]]]:
    options = dict(target.options)
    if target.threads and target.threads_option:
        options[target.threads_option] = str(target.threads)
    return [(target.provider, options)]


def _options(target: Target, how: Opening, *, prepack: bool = True) -> Any:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = target.threads
    _register(options, target.libraries)
    options.graph_optimization_level = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }[how.optimize]
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if how.optimized is not None:
        options.optimized_model_filepath = str(how.optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", how.optimized.name + ".data"
        )
    if how.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(how.profile / "profile")
    return options


def _register(options: Any, libraries: Sequence[str]) -> None:
    library = ""
    try:
        for library in libraries:
            options.register_custom_ops_library(library)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UsageError(f"cannot load custom operators from '{library}': {message(error)}") from error


@contextmanager
def _loadable(model: Loadable) -> Iterator[bytes | str]:
    """What ONNX Runtime can open: bytes, or a file where the model is too large for them."""
    if isinstance(model, Path):
        yield str(model)
    elif isinstance(model, onnx.ModelProto):
        yield model.SerializeToString()
    elif model.nbytes() <= files.MAX_EMBEDDED_BYTES:
        yield model.to_proto().SerializeToString()
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            model.save(path)
            yield str(path)
