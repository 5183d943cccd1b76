"""The door to PyTorch, which is optional: imported when something is computed with it for the first time."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np

from onnxslim.errors import UsageError
from onnxslim.ir.graph import Array

# PyTorch's own annotations are only there where it is installed.
Tensor: TypeAlias = Any
DType: TypeAlias = Any
Device: TypeAlias = Literal["cpu", "cuda"]

INSTALL = "pip install 'onnx-slimkit[train]'"


class _Lazy:
    """A module that is imported once something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._module = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self._module), name)
        setattr(self, name, found)
        return found


torch: Any = _Lazy("torch")
functional: Any = _Lazy("torch.nn.functional")


def is_missing() -> bool:
    """Whether PyTorch is not installed."""
    return importlib.util.find_spec("torch") is None


def require(whose: str) -> None:
    """Raise UsageError if PyTorch is not installed.

    Args:
        whose: what cannot do without.
    """
    if is_missing():
        raise UsageError(f"{whose} needs PyTorch, which is not installed: {INSTALL}")


def require_device(device: Device, whose: str) -> None:
    """Raise UsageError if there is no such device.

    Args:
        whose: what is to use it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{whose}: PyTorch {torch.__version__} sees no CUDA device here: device cpu works")


def on(device: Device) -> AbstractContextManager[Any]:
    """Have all tensors that are made meanwhile, constants and inputs of nets included, on a device."""
    return nullcontext() if device == "cpu" else torch.device(device)


class UnknownError(Exception):
    """Why something is not computed with PyTorch; a sentence without a full stop."""


# Types of elements that PyTorch computes in, by NumPy's; the others it can at most hold.
_KINDS = {
    np.dtype(kind): name
    for kind, name in (
        (np.float64, "float64"),
        (np.float32, "float32"),
        (np.float16, "float16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.int64, "int64"),
        (np.int32, "int32"),
        (np.int16, "int16"),
        (np.int8, "int8"),
        (np.uint8, "uint8"),
        (np.bool_, "bool"),
    )
}
FLOATS = frozenset(dtype for dtype, name in _KINDS.items() if "float" in name)


def torch_type(dtype: np.dtype[Any], real: DType = None) -> DType:
    """PyTorch's type for one of NumPy's.

    Args:
        dtype: of a tensor of a model.
        real: what to compute in instead of every floating-point type; None for the types as they are.

    Raises:
        UnknownError: PyTorch does not compute in it.
    """
    if dtype not in _KINDS:
        raise UnknownError(f"PyTorch does not compute in {dtype.name}")
    return real if real is not None and dtype in FLOATS else getattr(torch, _KINDS[dtype])


def to_torch(values: Array, real: DType = None) -> Tensor:
    """A tensor of its own with these values; see `torch_type`."""
    kind = torch_type(values.dtype, real)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.as_tensor(values.astype(np.float32)).to(kind)
    return torch.as_tensor(np.array(values, order="C")).to(kind)


def to_numpy(tensor: Tensor) -> Array:
    """The values of a tensor on any device; bfloat16 as float32."""
    plain = tensor.detach().to("cpu")
    return np.asarray((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())
