"""ONNX Runtime behind one door: targets, sessions, latency, and which provider really runs what.

The only module that imports onnxruntime, and only when a session is opened. The reference evaluator of onnx
stands behind the same door, as a slow but independent judge.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.version_converter

from onnxslim import files
from onnxslim.errors import LoadError, TargetError, UsageError
from onnxslim.graph import Array
from onnxslim.model import Model, load
from onnxslim.watch import Exceeded, Limits, Watch

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
# Not a provider of ONNX Runtime: operators as the standard's own NumPy code computes them.
REFERENCE = "onnx.reference"
MAX_REFERENCE_BYTES = 100_000_000
REFERENCE_OPSET = 21
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
        for target in _targets():
            if key == target.name:
                return target
        known = ", ".join(target.name for target in _targets())
        raise TargetError(f"unknown execution provider '{name}'; known are: {known}")

    @staticmethod
    def available() -> tuple[Target, ...]:
        """Every target whose provider the installed onnxruntime has and really uses here, processors last."""
        return tuple(target for target in _targets() if target.provider != REFERENCE and _works(target))

    def with_threads(self, threads: int) -> Target:
        """The same target with a fixed number of threads."""
        return replace(self, threads=threads)

    def with_libraries(self, libraries: Sequence[str]) -> Target:
        """The same target with custom operators from these files."""
        return replace(self, libraries=tuple(libraries))


def _register(options: Any, libraries: Sequence[str]) -> None:
    library = ""
    try:
        for library in libraries:
            options.register_custom_ops_library(library)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UsageError(f"cannot load custom operators from '{library}': {_message(error)}") from error


def layout(name: str) -> Quantized:
    """How a target wants its quantized models, be it here or not: one of `LAYOUTS`."""
    return _QNN if name == "qnn" else Target.named(name).quantized


LAYOUTS = ("cpu", "openvino", "cuda", "tensorrt", "qnn")


def _targets() -> tuple[Target, ...]:
    return (Target.tensorrt(), Target.cuda(), Target.openvino(), Target.cpu(), Target.reference())


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
            self._session: Any = _Reference(model)
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
            raise LoadError(f"{judge} fails to run the model: {_message(error)}") from error

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
            return TargetError(f"{target.provider} cannot be used here: {_message(error)}")
    return LoadError(f"ONNX Runtime refuses the model: {_message(error)}")


class _Reference:
    """A model in the reference evaluator, with the `run` of a session of ONNX Runtime.

    Raises:
        LoadError: the evaluator does not know an operator of the model.
        TargetError: the model is too large for it.
    """

    def __init__(self, model: Model | onnx.ModelProto | Path) -> None:
        from onnx.reference import ReferenceEvaluator

        loaded = load(model)
        if loaded.nbytes() > MAX_REFERENCE_BYTES:
            raise TargetError(
                f"{REFERENCE} is for small models: this one has {loaded.nbytes()} bytes of constants, "
                f"the limit is {MAX_REFERENCE_BYTES}"
            )
        try:
            self._evaluator = ReferenceEvaluator(_modern(loaded.to_proto()))
        except Exception as error:  # whatever its operators raise
            raise LoadError(f"{REFERENCE} refuses the model: {_message(error)}") from error
        self.input_names = tuple(spec.name for spec in loaded.inputs())
        self.output_names = tuple(self._evaluator.output_names)

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Any]:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(self._evaluator.run(list(names), dict(feeds)))


def _modern(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an opset whose operators the evaluator has: it lacks the older Q and DQ."""
    versions = {item.domain: item.version for item in model.opset_import}
    old = versions.get("", REFERENCE_OPSET) < REFERENCE_OPSET
    if not old or not any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node
    ):
        return model
    return onnx.version_converter.convert_version(model, REFERENCE_OPSET)


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


@dataclass(frozen=True)
class Latency:
    """Times of one call, in milliseconds."""

    median: float
    minimum: float


def latencies(
    sessions: Sequence[Session],
    feeds: Mapping[str, Array],
    *,
    rounds: int = 30,
    least: int = 5,
    seconds: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Latency], list[float]]:
    """Time sessions in turn on the same inputs, so that a busy machine slows all of them alike.

    Args:
        sessions: what to compare.
        feeds: inputs of each.
        rounds: turns at the most, after two to warm up.
        least: turns at the least, however long they take.
        seconds: budget for all turns.
        clock: what a run is timed with, in seconds.

    Returns:
        Times of each session, and the median over all turns of its time divided by the first one's.
    """
    for session in sessions:
        session.run(feeds)
        session.run(feeds)
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < rounds and (len(times) < least or time.perf_counter() < end):
        turn = []
        for session in sessions:
            start = clock()
            session.run(feeds)
            turn.append((clock() - start) * 1e3)
        times.append(turn)
    table = np.array(times)
    found = [Latency(float(np.median(column)), float(column.min())) for column in table.T]
    return found, [float(ratio) for ratio in np.median(table / table[:, :1], axis=0)]


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


def _message(error: Exception) -> str:
    """ONNX Runtime's message without its prefixes and source locations."""
    text = " ".join(str(error).split())
    text = re.sub(r"^/\S+:\d+ .*?\) ", "", text.split("Status Message: ")[-1])
    return text.removeprefix("[ONNXRuntimeError] : ")[:400]
