"""Model files: read with checks, written atomically.

Nothing here trusts a path or a number that a model file contains: external data is opened by onnx's own
checks (no traversal, links or absolute paths), and its bounds are compared with the file before it is mapped.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.external_data_helper as external
import onnx.onnx_cpp2py_export.checker as native
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto, helper, numpy_helper

from onnxslim.errors import LoadError, SaveError, one_line
from onnxslim.ir.graph import Array, Constant, bit_width
from onnxslim.ir.proto import encode_embedded

# protobuf refuses messages of 2 GiB; a margin is kept for everything that is not a tensor.
MAX_EMBEDDED_BYTES = 1_900_000_000
MIN_EXTERNAL_BYTES = 1024
# What is larger goes to a file where it is not needed for some time.
ASIDE_BYTES = 4 << 20
# ONNX Runtime maps data files by page.
ALIGNMENT = 4096


def read_model(path: Path) -> onnx.ModelProto:
    """The protobuf in a file, external data not loaded.

    Raises:
        LoadError: the file is missing, unreadable or not an ONNX model.
    """
    try:
        if path.is_dir():
            raise LoadError(f"'{path}' is a folder, not an ONNX model")
        proto = onnx.load_model(path, load_external_data=False)
    except LoadError:
        raise
    except FileNotFoundError:
        raise LoadError(f"there is no file '{path}'") from None
    except OSError as error:
        raise LoadError(f"cannot read '{path}': {error.strerror or error}") from error
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise LoadError(f"'{path}' is not an ONNX model, or is cut short: {_one_line(error)}") from error
    except Exception as error:  # the text formats raise whatever their parsers raise
        raise LoadError(f"'{path}' is not an ONNX model: {_one_line(error)}") from error
    return proto


def parsed(serialized: bytes) -> onnx.ModelProto:
    """The protobuf in these bytes.

    Raises:
        LoadError: they are not an ONNX model.
    """
    try:
        return onnx.ModelProto.FromString(serialized)
    except DecodeError as error:
        raise LoadError(f"the bytes are not an ONNX model, or are cut short: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    if "MaxDepth" in str(error):
        return "its graphs are nested more deeply than protobuf reads"
    return one_line(error)


# ----------------------------------------------------------------------------------------- tensor data


def decode(tensor: TensorProto, folder: Path | None) -> Array:
    """Values of a tensor; external data is mapped, not read.

    Args:
        tensor: any TensorProto.
        folder: where its model lies; None if that is unknown.

    Raises:
        LoadError: the data is missing, outside the model's folder, or not of the declared size.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except (ValueError, TypeError, KeyError) as error:
            raise LoadError(f"tensor '{tensor.name}' cannot be decoded: {_one_line(error)}") from error
    if folder is None:
        raise LoadError(f"tensor '{tensor.name}' lies outside the model, whose folder is not known")
    return _map(tensor, folder)


def _map(tensor: TensorProto, folder: Path) -> Array:
    shape = tuple(tensor.dims)
    with _open_external(tensor, folder) as (file, dtype, offset, length):
        if length == 0:
            return np.empty(shape, dtype)
        if bit_width(dtype) % 8 or dtype.kind == "O":
            file.seek(offset)
            packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=file.read(length))
            return np.asarray(numpy_helper.to_array(packed))
        raw = np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(length,))
        return raw.view(dtype).reshape(shape)


def spilled(array: Array) -> Array:
    """The same values in a temporary file, of which the system keeps in memory what it has room for.

    The file has no name any longer where the system allows that, and goes with the array.
    """
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, array.dtype, "w+", shape=array.shape)
    mapped[...] = array
    if hasattr(mmap, "MADV_DONTNEED"):  # what was written stays in the file
        mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    return mapped


def aside(array: Array) -> Array:
    """The same array, or if it is large, one in a temporary file: for what is read again much later."""
    return spilled(array) if array.nbytes >= ASIDE_BYTES else array


@contextlib.contextmanager
def _open_external(tensor: TensorProto, folder: Path) -> Iterator[tuple[Any, np.dtype[Any], int, int]]:
    """An external tensor's file, checked by onnx, its type, and offset and length of the data in bytes."""
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        info = external.ExternalDataInfo(tensor)
        descriptor = _descriptor(folder, info.location, tensor.name)
    except (onnx.checker.ValidationError, KeyError, ValueError, OSError) as error:
        raise LoadError(f"external data of tensor '{tensor.name}': {_one_line(error)}") from error
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset = info.offset or 0
        length = size - offset if info.length is None else info.length
        if offset > size or length > size - offset:
            raise LoadError(
                f"external data of tensor '{tensor.name}': bytes {offset} to {offset + length} "
                f"lie beyond the end of '{info.location}' ({size} bytes)"
            )
        needed = (math.prod(tensor.dims) * bit_width(dtype) + 7) // 8
        if length != needed:
            raise LoadError(f"tensor '{tensor.name}' needs {needed} bytes, its external data has {length}")
        yield file, dtype, offset, length


def _descriptor(folder: Path, location: str, name: str) -> int:
    if hasattr(native, "_open_external_data"):
        return int(native._open_external_data(str(folder), location, name, True))
    # Older versions of onnx check a path, and leave opening it to the caller.
    path = native._resolve_external_data_location(str(folder), location, name)  # type: ignore[attr-defined]
    return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))


def check_embedded(tensor: TensorProto) -> None:
    """Raise LoadError unless the bytes inside a tensor are as many as its type and shape take."""
    if any(dim < 0 for dim in tensor.dims):
        raise LoadError(f"tensor '{tensor.name}' has a negative size: {list(tensor.dims)}")
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError:
        raise LoadError(f"tensor '{tensor.name}' is of unknown type {tensor.data_type}") from None
    needed = (math.prod(tensor.dims) * bit_width(dtype) + 7) // 8
    # The fields of numbers are counted when they are decoded.
    if tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
        raise LoadError(
            f"tensor '{tensor.name}' of {dtype} and shape {list(tensor.dims)} takes {needed} bytes, "
            f"but has {len(tensor.raw_data)}"
        )


def check_external(tensor: TensorProto, folder: Path | None) -> None:
    """Raise LoadError unless the external data of this tensor is there and of the declared size."""
    if folder is None:
        raise LoadError(f"tensor '{tensor.name}' lies outside the model, whose folder is not known")
    with _open_external(tensor, folder):
        pass


# --------------------------------------------------------------------------------------------- writing


class DataWriter:
    """Writes tensors one after the other to a data file and makes the TensorProtos that point there."""

    def __init__(self, path: Path, location: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed by `close`
        self._location = location

    def encode(self, constant: Constant) -> TensorProto:
        """A TensorProto of the constant: external if it is large enough, else embedded."""
        if constant.nbytes < MIN_EXTERNAL_BYTES or constant.dtype.kind == "O":
            return encode_embedded(constant)
        data = self._bytes(constant)
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)
        self._file.write(data)
        tensor = TensorProto(name=constant.name, data_type=helper.np_dtype_to_tensor_dtype(constant.dtype))
        tensor.dims.extend(constant.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", offset), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    @staticmethod
    def _bytes(constant: Constant) -> memoryview | bytes:
        if bit_width(constant.dtype) % 8 == 0:
            return np.ascontiguousarray(constant.peek()).reshape(-1).view(np.uint8).data
        # Several to a byte; what the constant was read from may hold them in another field.
        return numpy_helper.from_array(np.asarray(constant.peek())).raw_data

    def close(self) -> None:
        """Flush to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without caring for what was written."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def fresh_data_name(path: Path) -> Iterator[str]:
    """A name for the data file of a model at `path`, reserved by an empty file that is not left behind."""
    name, count = f"{path.name}.data", 0
    while not _reserve(path.with_name(name)):
        count += 1
        name = f"{path.name}.{count}.data"
    reserved = path.with_name(name)
    try:
        yield name
    finally:
        if not reserved.stat().st_size:
            reserved.unlink()


def _reserve(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A private folder beside `path` to write into before anything there is replaced.

    Raises:
        SaveError: the folder cannot be written to, or writing failed; `path` is as it was.
    """
    try:
        if path.is_dir():
            raise SaveError(f"cannot write '{path}': it is a folder")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise SaveError(f"cannot write '{path}': {error.strerror or error}") from error
    except (EncodeError, ValueError) as error:  # too large for a protobuf, or no path at all
        raise SaveError(f"cannot write '{path}': {_one_line(error)}") from error


def commit(staged: Path, final: Path) -> None:
    """Move a finished file into place; readers see the old one or the new one, never half of it."""
    with open(staged, "rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, final)
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file; readers see the old one or the new one, never half of it.

    Raises:
        SaveError: it cannot be written.
    """
    with staging(path) as folder:
        staged = folder / path.name
        staged.write_text(text, encoding="utf-8")
        commit(staged, path)
