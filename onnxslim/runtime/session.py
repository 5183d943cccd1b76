"""ONNX Runtime behind one door: sessions, and which provider really runs what.

The only module that imports onnxruntime, and only when a session is opened. The reference evaluator of onnx
stands behind the same door, as a slow but independent judge.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.version_converter

from onnxslim.errors import LoadError, TargetError, UsageError
from onnxslim.ir import files
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.backend import message
from onnxslim.runtime.limits import Exceeded, Limits, Watch
from onnxslim.runtime.reference import ReferenceSession
from onnxslim.runtime.targets import CPU, OPENVINO, REFERENCE, Target, known

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


def _register(options: Any, libraries: Sequence[str]) -> None:
    library = ""
    try:
        for library in libraries:
            options.register_custom_ops_library(library)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UsageError(f"cannot load custom operators from '{library}': {message(error)}") from error


class Session:
    """A loaded model.

    Args:
        model: a Model, a ModelProto or a file.
        target: where it runs; the provider must really be used.
        optimize: "all", "extended", "basic" or "none" of ONNX Runtime's own graph optimizations.
        optimized: if given, ONNX Runtime writes the graph it runs to this file.
        profile: if given, ONNX Runtime writes what ran where to a file in this folder; see `placement`.
        once: whether it is for a run or two, for which large weights are not copied into another layout.

    Raises:
        LoadError: ONNX Runtime refuses the model; carries its message.
        TargetError: the provider is not there, or was silently replaced by another.
    """

    def __init__(
        self,
        model: Model | onnx.ModelProto | Path,
        target: Target | None = None,
        *,
        optimize: str = "all",
        optimized: Path | None = None,
        profile: Path | None = None,
        once: bool = False,
    ) -> None:
        self.target = target or Target.cpu()
        if self.target.provider == REFERENCE:
            self._session: Any = ReferenceSession(model)
            self.input_names, self.output_names = self._session.input_names, self._session.output_names
            return
        _require(self.target)
        once = once and isinstance(model, Model) and model.nbytes() >= LARGE_BYTES
        options = _options(self.target, optimize, optimized, once)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "profile")
        with _loadable(model) as source:
            try:
                self._session = onnxruntime().InferenceSession(
                    source, options, providers=_providers(self.target), enable_fallback=0
                )
            except Exception as error:  # onnxruntime raises a dozen unrelated types
                raise _refused(self.target, source, error) from error
        used = self._session.get_providers()
        if used[0] != self.target.provider:
            raise TargetError(
                f"{self.target.provider} was asked for, but cannot be used here: ONNX Runtime fell back to "
                f"{used[0]}"
            )
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None, limits: Limits | None = None
    ) -> dict[str, Any]:
        """Outputs by name.

        Args:
            feeds: one array per model input.
            outputs: names of those wanted; None means all.
            limits: what the run may take; not of the reference evaluator, which cannot be stopped.

        Raises:
            LoadError: ONNX Runtime fails on these inputs; carries its message.
            Exceeded: the run was stopped because it took more than it may.
        """
        names = list(self.output_names if outputs is None else outputs)
        if not names:
            return {}  # onnxruntime would take an empty list for all of them
        if limits is not None and self.target.provider != REFERENCE:
            return self._limited(names, feeds, limits)
        return self._run(names, feeds)

    def _limited(self, names: list[str], feeds: Mapping[str, Array], limits: Limits) -> dict[str, Any]:
        options = onnxruntime().RunOptions()
        watch = Watch(limits, lambda: setattr(options, "terminate", True))
        try:
            with watch:
                return self._run(names, feeds, options)
        except LoadError as error:
            if watch.exceeded:
                raise Exceeded(
                    f"ONNX Runtime was stopped: the run took more than {watch.exceeded}"
                ) from error
            raise

    def _run(self, names: list[str], feeds: Mapping[str, Array], *options: Any) -> dict[str, Any]:
        try:
            return dict(zip(names, self._session.run(names, dict(feeds), *options), strict=True))
        except Exception as error:
            judge = REFERENCE if self.target.provider == REFERENCE else "ONNX Runtime"
            raise LoadError(f"{judge} fails to run the model: {message(error)}") from error

    def end_profile(self) -> Path:
        """The profile so far, of a session that was opened with `profile`."""
        return Path(self._session.end_profiling())


def _refused(target: Target, source: bytes | str, error: Exception) -> Exception:
    """What a session that could not be opened means: the model is at fault if processors refuse it too."""
    if target.provider != CPU:
        try:
            onnxruntime().InferenceSession(
                source, _options(Target.cpu(), "none", None, once=True), providers=[CPU]
            )
        except Exception:
            pass
        else:
            return TargetError(f"{target.provider} cannot be used here: {message(error)}")
    return LoadError(f"ONNX Runtime refuses the model: {message(error)}")


def placement(
    model: Model | onnx.ModelProto | Path, target: Target, feeds: Mapping[str, Array]
) -> dict[str, int]:
    """How many operators each execution provider really runs, from ONNX Runtime's profile of one call.

    A provider may take many nodes of the model as one operator of its own.

    Raises:
        TargetError: the provider of the target loads, but runs none of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = Session(model, target, profile=Path(folder))
        session.run(feeds)
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    ran = {
        event["name"]: event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    counts = dict(Counter(ran.values()))
    if ran and target.provider not in counts:
        others = ", ".join(f"{provider} runs {count}" for provider, count in counts.items())
        raise TargetError(f"{target.provider} loads, but runs no operator of the model: {others}")
    return counts


def optimized_model(model: Model, target: Target | None = None) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs, weights left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        # "extended" fuses integer kernels but keeps plain operators where layout changes would hide them.
        Session(model, target, optimize="extended", optimized=path)
        return onnx.load_model(path, load_external_data=False)


def available() -> tuple[Target, ...]:
    """Every target whose provider the installed onnxruntime has and really uses here, processors last."""
    return tuple(target for target in known() if target.provider != REFERENCE and _works(target))


@functools.cache
def _works(target: Target) -> bool:
    """Whether a small product really runs on this target."""
    if target.provider == CPU:
        return True
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[2,2] x) => (float[2,2] y) { y = MatMul(x, x) }'
    )
    try:
        placement(model, target, {"x": np.ones((2, 2), np.float32)})
    except (LoadError, TargetError):
        return False
    return True


def _require(target: Target) -> None:
    present = onnxruntime().get_available_providers()
    if target.provider not in present:
        raise TargetError(
            f"{target.provider} is not available here; the installed onnxruntime has: {', '.join(present)}"
        )


def _providers(target: Target) -> list[str | tuple[str, dict[str, str]]]:
    options = dict(target.options)
    if target.threads and target.provider == OPENVINO:
        options["num_of_threads"] = str(target.threads)
    return [(target.provider, options)]


def _options(target: Target, optimize: str, optimized: Path | None, once: bool) -> Any:
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
    }[optimize]
    if once:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", optimized.name + ".data"
        )
    return options


@contextmanager
def _loadable(model: Model | onnx.ModelProto | Path) -> Iterator[bytes | str]:
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
