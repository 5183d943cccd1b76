"""Arrays of files: .npz, .npy and ONNX test data, read as plain arrays and never as pickles."""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.errors import CalibrationError

Array = NDArray[Any]
Feeds: TypeAlias = dict[str, Array]

MAX_BYTES = 4 << 30

# What reading a damaged or hostile .npz, .pb or image raises.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    SyntaxError,
    RuntimeError,
    KeyError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def unreadable(file: Path, error: Exception) -> CalibrationError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return CalibrationError(f"{file}: cannot be read: {' '.join(reason.split())}")


def listed(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files of a folder with one of these suffixes (in lower case), in natural order.

    Raises:
        CalibrationError: the folder cannot be read.
    """
    return _listed(folder, lambda file: file.suffix.lower() in suffixes)


def _listed(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    try:
        return sorted((file for file in folder.iterdir() if wanted(file) and file.is_file()), key=_natural)
    except OSError as error:
        raise unreadable(folder, error) from error


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    # Splitting on digits alternates text and numbers; the name itself decides between "1" and "01".
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if at % 2 else (0, part) for at, part in enumerate(parts)], path.name


def test_sets(folder: Path) -> list[tuple[Path, ...]]:
    if own := _test_inputs(folder):
        return [own]
    folders = sorted(folder.glob("test_data_set_*"), key=_natural)
    return [inputs for each in folders if each.is_dir() and (inputs := _test_inputs(each))]


def _test_inputs(folder: Path) -> tuple[Path, ...]:
    return tuple(_listed(folder, lambda file: re.fullmatch(r"input_\d+\.pb", file.name) is not None))


def read_test_set(files: Sequence[Path], max_bytes: int) -> Feeds:
    feeds: Feeds = {}
    for file in files:
        name, array = _read_tensor(file, max_bytes)
        name = name or f"#{int(file.stem.removeprefix('input_'))}"
        if name in feeds:
            raise CalibrationError(f"{file}: another file of this set already has input {name!r}")
        feeds[name] = array
    return feeds


def _read_tensor(file: Path, max_bytes: int) -> tuple[str, Array]:
    from google.protobuf.message import DecodeError
    from onnx import TensorProto, numpy_helper

    try:
        if file.stat().st_size > max_bytes:
            raise ValueError(f"larger than {max_bytes} bytes")
        tensor = TensorProto.FromString(file.read_bytes())
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError("its data is in another file, which test data may not refer to")
        return tensor.name, numpy_helper.to_array(tensor)
    except (*UNREADABLE, DecodeError) as error:
        raise unreadable(file, error) from error


def read_npz(path: Path, max_bytes: int) -> Feeds:
    try:
        with path.open("rb") as file:
            _check_npz(file, max_bytes)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def map_npy(path: Path) -> Array:
    """The array in an .npy file, read page by page when it is used."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("not an .npy file but an archive of several; call it .npz")
        return array
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def cut_npy(paths: Mapping[str, Path], cut: slice) -> Feeds:
    return {key: np.array(map_npy(path)[cut]) for key, path in paths.items()}


def read_npy(path: Path) -> Feeds:
    return {"#0": np.array(map_npy(path))}


def _check_npz(file: IO[bytes], max_bytes: int) -> None:
    """Refuse an archive for what its headers say, before anything is unpacked."""
    if file.read(6) == b"\x93NUMPY":
        raise ValueError("a single array has no input name; save it with numpy.savez(path, input_name=array)")
    total = 0
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is compressed in a way numpy does not use")
            with archive.open(member.filename) as stream:
                total += _declared_bytes(stream, member.filename)
    if total > max_bytes:
        raise ValueError(f"its arrays take {total} bytes unpacked, more than {max_bytes}")


def _declared_bytes(stream: IO[bytes], member: str) -> int:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{member} is not a plain array")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if dtype.hasobject:
        raise ValueError(f"{member} holds Python objects, which are never loaded")
    if any(size < 0 for size in shape):
        raise ValueError(f"{member} has a negative size")
    size: int = math.prod(shape) * dtype.itemsize
    return size


def sample_count(arrays: Feeds, name: str) -> int:
    if not arrays:
        raise CalibrationError(f"{name}: no arrays")
    counts = {key: len(array) if array.ndim else None for key, array in arrays.items()}
    samples, *others = set(counts.values())
    if others or samples is None:
        listed = ", ".join(f"{key}: {'a scalar' if n is None else n}" for key, n in counts.items())
        raise CalibrationError(
            f"{name}: the first axis of every array must count the samples, got {listed}; "
            "inputs without samples, such as states, can be given as a folder of .npz files of one batch each"
        )
    if not samples:
        raise CalibrationError(f"{name}: no samples")
    return samples


def cuts(total: int, batch_size: int) -> list[slice]:
    if batch_size < 1:
        raise CalibrationError(f"a batch has at least one sample, not {batch_size}")
    return [slice(start, start + batch_size) for start in range(0, total, batch_size)]
