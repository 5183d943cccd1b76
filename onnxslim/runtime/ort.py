"""ONNX Runtime as a backend."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from onnxslim.errors import LoadError
from onnxslim.ir import files
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.ir.proto import encode_embedded
from onnxslim.runtime import isolated, native, plugins, vulkan
from onnxslim.runtime.backend import Loadable, Loaded, Opening
from onnxslim.runtime.native import SessionSettings
from onnxslim.runtime.releases import SETTLED
from onnxslim.runtime.targets import Target

MATCHES = ("MatMulNBits",)
WEBGPU = "WebGpuExecutionProvider"
# From here on, a copy of the weights would cost more memory than it saves time in a few runs.
LARGE_BYTES = 512 << 20
# From here on, weights are read where they are instead of copied into the model that a session opens.
BESIDE_BYTES = 1 << 16


class OnnxRuntime:
    """Execution providers that the installed onnxruntime has."""

    profiles = True

    def no_latency(self, target: Target) -> str:
        if target.stands_for:
            return f"it is in the place of {target.stands_for}"
        software = vulkan.software_device() if target.provider == WEBGPU else ""
        return f"its device, {software}, is computed by the processor" if software else ""

    def open(self, model: Loadable, target: Target, how: Opening) -> Loaded:
        settings = _settings(model, target, how)
        try:
            if how.once:
                return isolated.open_model(lambda: _loadable(model), settings, how.limits)
            if isinstance(model, Model) and target.provider == native.CPU and how.optimized is None:
                beside = _Beside(model)
                if model.nbytes() - beside.nbytes <= files.MAX_EMBEDDED_BYTES:
                    proto = model.to_proto_with(beside.encode)
                    return native.open_model(proto.SerializeToString(), settings, beside.weights)
            with _loadable(model) as source:
                return native.open_model(source, settings)
        except LoadError as error:
            advice = _advice(str(error), model)
            if advice:
                raise LoadError(f"{error}; {advice}") from error
            raise


# How ONNX Runtime says that it does not know an opset, or a version of the file format.
_TOO_NEW = ("is under development", "Unsupported model IR version")


def _advice(refusal: str, model: Loadable) -> str:
    """What to do where there is no kernel for an operator, or no opset; empty if nobody knows."""
    if any(why in refusal for why in _TOO_NEW):
        return (
            "this ONNX Runtime is older than the model: install a newer one, or have 'onnxslim legalize "
            "--onnxruntime VERSION' write it for this one"
        )
    if native.LACKING not in refusal:
        return ""
    if isinstance(model, Model) and _has_bfloat16(model):
        return "few kernels take bfloat16: 'onnxslim slim --dtype fp32' makes it float32"
    since = re.search(r"\((\d+)\)", refusal)
    if since and int(since[1]) > SETTLED:
        return "'onnxslim legalize' writes it in operators that there are kernels for"
    return ""


def _has_bfloat16(model: Model) -> bool:
    """Whether a model holds weights in bfloat16."""
    return any(constant.dtype == ml_dtypes.bfloat16 for constant in model.constants())


def _settings(model: Loadable, target: Target, how: Opening) -> SessionSettings:
    return SessionSettings(
        target.provider,
        _provider_options(target),
        target.threads,
        tuple(os.path.abspath(name) if os.path.exists(name) else name for name in target.libraries),
        plugin_library(target),
        target.device,
        _plugin_options(target),
        target.needs,
        how.optimize,
        how.optimized,
        how.profile,
        prepack=not (isinstance(model, Model) and _stays_as_it_is(model, how)),
        spin=how.spin and not how.once,
        fuse_integers=not target.stands_for,
    )


def _stays_as_it_is(model: Model, how: Opening) -> bool:
    """Whether weights had better stay in the layout that they are in.

    Products with blocks of integers round their data only where weights were copied, which is what has to be
    seen: 27.7 dB of a decoder in eight bits, instead of 30.3. Beside too many floats it is not.
    """
    if not (how.once or not how.spin) or model.nbytes() < LARGE_BYTES:
        return False
    rounds = any(node.op == "MatMulNBits" for node in model.nodes())
    floats = sum(each.nbytes for each in model.constants() if each.dtype == np.float32)
    return not rounds or floats >= LARGE_BYTES


def _provider_options(target: Target) -> tuple[tuple[str, str], ...]:
    options = dict(target.options)
    if target.threads and target.threads_option:
        options[target.threads_option] = str(target.threads)
    return tuple(options.items())


def plugin_library(target: Target) -> str:
    """The file of the plugin that has the provider of a target; empty if it takes none, or there is none."""
    if target.provider == native.CPU or target.plugin:
        return target.plugin
    package = plugins.package_of(target.provider)
    return package.library if package else ""


def _plugin_options(target: Target) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, value.replace("{threads}", str(target.threads))) for key, value in target.plugin_options
    )


class _Beside:
    """The large weights of a model, which a session is given beside it.

    Attributes:
        weights: by name, those that `encode` has left out.
        nbytes: of all that it will leave out.
    """

    def __init__(self, model: Model) -> None:
        bodies = (graph for graph in ir.walk(model.graph) if graph is not model.graph)
        inner = {id(each) for graph in bodies for each in graph.initializers.values()}
        # What no node reads, ONNX Runtime drops, and then finds no place for it.
        read = {id(tensor): tensor for node in model.nodes() for tensor in node.inputs}
        self._large = {
            key: each.nbytes
            for key, each in read.items()
            if isinstance(each, Constant) and key not in inner and _is_large(each)
        }
        self.nbytes = sum(self._large.values())
        self.weights: dict[str, Array] = {}

    def encode(self, constant: Constant) -> onnx.TensorProto:
        """The constant, or for a large weight what it is, with its values in `weights`."""
        if id(constant) not in self._large:
            return encode_embedded(constant)
        self.weights[constant.name] = values = np.ascontiguousarray(constant.peek())
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = onnx.TensorProto(name=constant.name, data_type=kind, dims=values.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="beside")
        return tensor


def _is_large(constant: Constant) -> bool:
    dense = constant.proto is None or constant.tensor_proto is not None
    plain = constant.dtype.isbuiltin == 1 and constant.dtype.kind in "fiub"
    return plain and dense and constant.nbytes >= BESIDE_BYTES


@contextmanager
def _loadable(model: Loadable) -> Iterator[bytes | str]:
    """What ONNX Runtime can open: bytes, or a file where the model is too large for them."""
    if isinstance(model, Path):
        yield str(model.absolute())
    elif isinstance(model, onnx.ModelProto):
        yield model.SerializeToString()
    elif model.nbytes() <= files.MAX_EMBEDDED_BYTES:
        yield model.to_proto().SerializeToString()
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            model.save(path)
            yield str(path)
