"""ONNX Runtime as a backend."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import onnx

from onnxslim.errors import LoadError
from onnxslim.ir import files
from onnxslim.ir.model import Model
from onnxslim.runtime import isolated, native
from onnxslim.runtime.backend import Loadable, Loaded, Opening
from onnxslim.runtime.native import SessionSettings
from onnxslim.runtime.targets import Target

# From here on, a copy of the weights would cost more memory than it saves time in a run or two.
LARGE_BYTES = 512 << 20


class OnnxRuntime:
    """Execution providers that the installed onnxruntime has."""

    has_latency = True
    profiles = True

    def open(self, model: Loadable, target: Target, how: Opening) -> Loaded:
        settings = _settings(model, target, how)
        try:
            if how.once:
                return isolated.open_model(lambda: _loadable(model), settings, how.limits)
            with _loadable(model) as source:
                return native.open_model(source, settings)
        except LoadError as error:
            if native.LACKING in str(error) and isinstance(model, Model) and _has_bfloat16(model):
                raise LoadError(f"{error}; {_ADVICE}") from error
            raise


_ADVICE = "few kernels take bfloat16: 'onnxslim slim --dtype fp32' makes it float32"


def _has_bfloat16(model: Model) -> bool:
    """Whether a model holds weights in bfloat16."""
    return any(constant.dtype == ml_dtypes.bfloat16 for constant in model.constants())


def _settings(model: Loadable, target: Target, how: Opening) -> SessionSettings:
    return SessionSettings(
        target.provider,
        _provider_options(target),
        target.threads,
        tuple(os.path.abspath(name) if os.path.exists(name) else name for name in target.libraries),
        how.optimize,
        how.optimized,
        how.profile,
        prepack=not (how.once and isinstance(model, Model) and model.nbytes() >= LARGE_BYTES),
        spin=how.spin and not how.once,
    )


def _provider_options(target: Target) -> tuple[tuple[str, str], ...]:
    options = dict(target.options)
    if target.threads and target.threads_option:
        options[target.threads_option] = str(target.threads)
    return tuple(options.items())


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
