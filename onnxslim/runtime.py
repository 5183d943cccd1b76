"""ONNX Runtime behind one door: targets, sessions, latency.

The only module that imports onnxruntime, and only when a session is opened.
"""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from onnxslim import files
from onnxslim.errors import LoadError, TargetError
from onnxslim.graph import Array
from onnxslim.model import Model

CPU = "CPUExecutionProvider"
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


@dataclass(frozen=True)
class Target:
    """An execution provider and what it wants.

    Attributes:
        name: short name for messages and the command line.
        provider: ONNX Runtime's name of it.
        options: provider options.
        threads: threads per operator; 0 lets ONNX Runtime choose.
        quantized: how quantized models are laid out for it.
    """

    name: str
    provider: str
    options: tuple[tuple[str, str], ...] = ()
    threads: int = 0
    quantized: Quantized = field(default_factory=Quantized)

    @staticmethod
    def cpu(threads: int = 0) -> Target:
        """Processors. uint8·int8 kernels without VNNI add in 16 bits, so files are made safe for both."""
        slow = frozenset(("Resize",))
        rules = Quantized(saturates=True, min_channels=4, kernels=_CPU_KERNELS, slow=slow)
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
        """Intel OpenVINO on the processor."""
        rules = Quantized(kernels=_CPU_KERNELS)
        return Target("openvino", "OpenVINOExecutionProvider", (("device_type", "CPU"),), quantized=rules)

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
        """Every target whose provider the installed onnxruntime has, processors last."""
        present = onnxruntime().get_available_providers()
        return tuple(target for target in _targets() if target.provider in present)

    def with_threads(self, threads: int) -> Target:
        """The same target with a fixed number of threads."""
        return replace(self, threads=threads)


def _targets() -> tuple[Target, ...]:
    return (Target.tensorrt(), Target.cuda(), Target.openvino(), Target.cpu())


class Session:
    """A loaded model.

    Args:
        model: a Model, a ModelProto or a file.
        target: where it runs; the provider must really be used.
        optimize: "all", "extended", "basic" or "none" of ONNX Runtime's own graph optimizations.
        optimized: if given, ONNX Runtime writes the graph it runs to this file.
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
        once: bool = False,
    ) -> None:
        self.target = target or Target.cpu()
        _require(self.target)
        once = once and isinstance(model, Model) and model.nbytes() >= LARGE_BYTES
        with _loadable(model) as source:
            try:
                self._session = onnxruntime().InferenceSession(
                    source,
                    _options(self.target, optimize, optimized, once),
                    providers=_providers(self.target),
                )
            except Exception as error:  # onnxruntime raises a dozen unrelated types
                raise LoadError(f"ONNX Runtime refuses the model: {_message(error)}") from error
        used = self._session.get_providers()
        if used[0] != self.target.provider:
            raise TargetError(
                f"{self.target.provider} was asked for, but ONNX Runtime fell back to {used[0]}"
            )
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name.

        Args:
            feeds: one array per model input.
            outputs: names of those wanted; None means all.

        Raises:
            LoadError: ONNX Runtime fails on these inputs; carries its message.
        """
        names = list(self.output_names if outputs is None else outputs)
        if not names:
            return {}  # onnxruntime would take an empty list for all of them
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:
            raise LoadError(f"ONNX Runtime fails to run the model: {_message(error)}") from error


def optimized_model(model: Model, target: Target | None = None) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs, weights left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        # "extended" fuses integer kernels but keeps plain operators where layout changes would hide them.
        Session(model, target, optimize="extended", optimized=path)
        return onnx.load_model(path, load_external_data=False)


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in half precision, made by ONNX Runtime's tools."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    with warnings.catch_warnings():
        # It tells of every number it cuts.
        warnings.simplefilter("ignore")
        converted: onnx.ModelProto = convert_float_to_float16(twin)
    return converted


@dataclass(frozen=True)
class Latency:
    """Wall-clock times of one call, in milliseconds."""

    median: float
    minimum: float


def latencies(
    sessions: Sequence[Session], feeds: Mapping[str, Array], *, rounds: int = 30, seconds: float = 5.0
) -> tuple[list[Latency], list[float]]:
    """Time sessions in turn on the same inputs, so that a busy machine slows all of them alike.

    Args:
        sessions: what to compare.
        feeds: inputs of each.
        rounds: turns at the most, after two to warm up.
        seconds: budget for all turns.

    Returns:
        Times of each session, and the median over all turns of its time divided by the first one's.
    """
    for session in sessions:
        session.run(feeds)
        session.run(feeds)
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < rounds and (len(times) < 5 or time.perf_counter() < end):
        turn = []
        for session in sessions:
            start = time.perf_counter()
            session.run(feeds)
            turn.append((time.perf_counter() - start) * 1e3)
        times.append(turn)
    table = np.array(times)
    found = [Latency(float(np.median(column)), float(column.min())) for column in table.T]
    return found, [float(ratio) for ratio in np.median(table / table[:, :1], axis=0)]


def _require(target: Target) -> None:
    present = onnxruntime().get_available_providers()
    if target.provider not in present:
        raise TargetError(
            f"{target.provider} is not available here; the installed onnxruntime has: {', '.join(present)}"
        )


def _providers(target: Target) -> list[str | tuple[str, dict[str, str]]]:
    return [(target.provider, dict(target.options))]


def _options(target: Target, optimize: str, optimized: Path | None, once: bool) -> Any:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = target.threads
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
    text = text.split("Status Message: ")[-1]
    return text.removeprefix("[ONNXRuntimeError] : ")[:400]
