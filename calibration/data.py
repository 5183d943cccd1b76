"""Calibration data: batches of model inputs from memory, files, readers or callables.

Whatever the source, iterating a `CalibrationData` gives `dict[str, ndarray]` batches, from the first again
every time. Files are only ever read as plain arrays: no pickles, and never more than `MAX_BYTES` at a time.
"""

from __future__ import annotations

import difflib
import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnxslim.errors import CalibrationError
from onnxslim.ir.model import InputSpec

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[Any]
Feeds = dict[str, Array]
Shape = Sequence["int | str | None"]
T = TypeVar("T")

MAX_BYTES = 4 << 30
MAX_PIXELS = 64_000_000

# What reading a damaged or hostile .npz, .pb or image raises.
_UNREADABLE = (
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
IMAGES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
_MODES = {1: "L", 3: "RGB"}
_ENDLESS = 1 << 62
_ADVICE = "pass a list of batches, or CalibrationData.from_callable with a function that starts anew"


class Reader(Protocol):
    """ONNX Runtime's CalibrationDataReader: the next batch, or None at the end."""

    def get_next(self) -> Mapping[str, Array] | None: ...


class CalibrationData:
    """Batches of model inputs that can be gone through any number of times.

    Args:
        feeds: anything that can be iterated again and again and gives dicts from input name to array. Batches
            may differ in shape. Generators and other one-shot iterators are refused.
        name: what error messages call the data.

    Raises:
        CalibrationError: the source can be read only once; while iterating, a batch is not a dict of arrays.
    """

    def __init__(self, feeds: Iterable[Mapping[str, Array]], *, name: str = "calibration data") -> None:
        if refusal := _refusal(feeds):
            raise CalibrationError(f"{name}: {refusal}")
        self._feeds = feeds
        self._specs: tuple[InputSpec, ...] | None = None
        self._count: int | None = None
        self.name = name

    @classmethod
    def from_npz(
        cls,
        path: str | Path,
        batch_size: int = 8,
        exclude: Collection[str] = (),
        *,
        max_bytes: int = MAX_BYTES,
    ) -> Self:
        """Samples from one .npz file, decoded once and cut into batches.

        The file has one array per model input, the first axis of each counts the samples. The last batch may
        be smaller than the others.

        Args:
            path: the file; what `numpy.savez` or `numpy.savez_compressed` writes.
            batch_size: samples per batch.
            exclude: arrays to leave out, such as labels.
            max_bytes: most the arrays may take once unpacked.
        """
        dropped = {exclude} if isinstance(exclude, str) else set(exclude)
        read = _read_npz(Path(path), max_bytes)
        arrays = {key: array for key, array in read.items() if key not in dropped}
        samples = _sample_count(arrays, str(path))
        cuts = _cuts(samples, batch_size)
        return cls([{key: array[cut] for key, array in arrays.items()} for cut in cuts], name=str(path))

    @classmethod
    def from_npy(cls, files: str | Path | Mapping[str, str | Path], batch_size: int = 8) -> Self:
        """Samples from .npy files, mapped into memory and cut into batches.

        The first axis of each array counts the samples. The last batch may be smaller than the others.

        Args:
            files: one per model input; or a single file, which is fed to the model's first input (its key is
                "#0" until `bind` knows the model).
            batch_size: samples per batch.
        """
        paths = {key: Path(file) for key, file in files.items()} if isinstance(files, Mapping) else {}
        paths = paths or {"#0": Path(files)}  # type: ignore[arg-type]
        name = ", ".join(map(str, paths.values()))
        samples = _sample_count({key: _map_npy(file) for key, file in paths.items()}, name)
        return cls(_Lazy(_cuts(samples, batch_size), partial(_cut_npy, paths)), name=name)

    @classmethod
    def from_dir(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> Self:
        """Batches from a folder, read when they are needed, in natural order (2 before 10).

        One of three: .npz files of one batch each; .npy files of one batch each for a model with one input
        (its key is "#0" until `bind` knows the model); or ONNX test data: folders `test_data_set_N` of
        serialized tensors `input_M.pb` (or one such folder itself). A tensor without a name is fed to the
        model's M-th input, by the key "#M". No file may unpack to over `max_bytes`.
        """
        folder = Path(path)
        kinds: dict[str, tuple[Sequence[Any], Callable[[Any], Feeds]]] = {
            ".npz files": (listed(folder, (".npz",)), partial(_read_npz, max_bytes=max_bytes)),
            ".npy files": (listed(folder, (".npy",)), _read_npy),
            "test_data_set_N/input_M.pb": (_test_sets(folder), partial(_read_test_set, max_bytes=max_bytes)),
        }
        found = [name for name, (items, _) in kinds.items() if items]
        if len(found) != 1:
            *first, last = kinds
            raise CalibrationError(
                f"{folder}: expected {', '.join(first)} or {last}, found {' and '.join(found) or 'none'}"
            )
        items, load = kinds[found[0]]
        return cls(_Lazy(items, load), name=str(folder))

    @classmethod
    def of(cls, source: Any, *, name: str = "calibration data") -> CalibrationData:
        """Batches from whatever gives them.

        Args:
            source: calibration data; a reader with `get_next()`, or a class or function that makes readers;
                a function that returns a fresh iterable of batches; or an iterable of batches.
            name: what error messages call the data.
        """
        if isinstance(source, CalibrationData):
            return source
        if hasattr(source, "get_next"):
            return cls.from_reader(source, name=name)
        if not callable(source) or hasattr(source, "__iter__"):
            return cls(source, name=name)
        made = source()
        if isinstance(made, CalibrationData):
            return made
        if hasattr(made, "get_next"):
            return cls.from_reader(source, name=name)
        return cls.from_callable(source, name=name)

    @classmethod
    def from_reader(cls, reader: Reader | Callable[[], Reader], *, name: str = "reader") -> Self:
        """Batches from an ONNX Runtime CalibrationDataReader.

        A class or function that makes readers is called for every pass over the data. A reader with
        `rewind()` is rewound for every pass, and can serve one pass at a time. Any other reader is read to
        its end at once and its batches are kept in memory.
        """
        if isinstance(reader, type) or not hasattr(reader, "get_next"):
            if not callable(reader):
                raise CalibrationError(f"{name}: a {type(reader).__name__} has no get_next()")
            return cls(_Fresh(partial(_drain_new, reader)), name=name)
        if hasattr(reader, "rewind"):
            return cls(_Rewound(reader, name), name=name)
        return cls(list(_drain(reader)), name=name)

    @classmethod
    def from_callable(
        cls, fn: Callable[[], Iterable[Mapping[str, Array]]], *, name: str = "callable"
    ) -> Self:
        """Batches from a function that returns a fresh iterator of them on every call."""
        if not callable(fn):
            raise CalibrationError(f"{name}: a {type(fn).__name__} is not a function that returns batches")
        return cls(_Fresh(fn), name=name)

    @classmethod
    def from_images(
        cls,
        folder: str | Path,
        *,
        input: str,
        size: int | tuple[int, int],
        layout: str = "NCHW",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        scale: float = 1 / 255,
        channels: int = 3,
        dtype: DTypeLike = np.float32,
        batch_size: int = 8,
    ) -> Self:
        """Images from a folder: JPEG, PNG, BMP and WebP, in natural order, decoded when they are needed.

        Each is cropped around its centre to the wanted aspect ratio, resized (bilinear), and given to the
        model as (pixel * scale - mean) / std. Needs Pillow (the `images` extra).

        Args:
            folder: where the images are; folders in it are not searched.
            input: name of the model input.
            size: height and width, or one number for both.
            layout: "NCHW" or "NHWC".
            mean, std: of the scaled values, one number or one per channel; for ImageNet classifiers
                usually (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225).
            scale: factor that comes first.
            channels: 3 for red, green and blue, 1 for grey.
            dtype: element type of the input.
            batch_size: images per batch; the last may have fewer.
        """
        if layout not in ("NCHW", "NHWC"):
            raise CalibrationError(f"{folder}: layout {layout!r} is neither NCHW nor NHWC")
        if channels not in _MODES:
            raise CalibrationError(f"{folder}: images have 3 channels or 1, not {channels}")
        files = listed(Path(folder), tuple(IMAGES))
        if not files:
            raise CalibrationError(f"{folder}: no images ({', '.join(IMAGES)}) in this folder")
        height, width = (size, size) if isinstance(size, int) else size
        centre, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        for what, values in (("mean", centre), ("std", spread)):
            if values.shape not in ((), (1,), (channels,)):
                raise CalibrationError(f"{folder}: {what} has {values.size} values for {channels} channels")
        load = _Images(
            input, (height, width), layout, centre, spread, scale, _MODES[channels], np.dtype(dtype)
        )
        load.check_pillow()
        batches = [files[cut] for cut in _cuts(len(files), batch_size)]
        return cls(_Lazy(batches, load), name=str(folder))

    @classmethod
    def random(
        cls,
        specs: Iterable[tuple[str, Shape, DTypeLike]],
        *,
        samples: int = 8,
        seed: int = 0,
    ) -> Self:
        """Random batches of the given shapes, for trying things out; the same for the same seed.

        Floating-point inputs are standard normal, bytes cover 0 to 255, other integers are 0 or 1 (so that
        they are valid as masks and as indices). Sizes that are not fixed are taken as 1.

        Warns:
            UserWarning: always. Ranges found on random data ruin a quantized model.
        """
        wanted = tuple((name, tuple(_fixed(shape)), np.dtype(dtype)) for name, shape, dtype in specs)
        for name, _, dtype in wanted:
            if not (dtype.kind in "biuf" or np.can_cast(dtype, np.float32)):
                raise CalibrationError(f"input {name!r}: no random values for type {dtype}")
        warnings.warn("random inputs are for trying things out, not for calibration", stacklevel=2)
        return cls(_Lazy(range(samples), _Random(wanted, seed)), name="random data")

    def __iter__(self) -> Iterator[Feeds]:
        for position, feeds in enumerate(self._feeds):
            where = f"{self.name}: batch {position}"
            arrays = _arrays(feeds, where)
            yield arrays if self._specs is None else _checked(arrays, self._specs, where)

    def __len__(self) -> int:
        """Number of batches; TypeError where only reading them all would tell."""
        return len(self._feeds)  # type: ignore[arg-type]

    def shard(self, index: int, count: int) -> CalibrationData:
        """Every `count`-th batch, starting at `index`: a view that pickles if the source does.

        Files are read by the shard that needs them. A source without random access (a callable, a reader) is
        gone through by every shard, which drops the batches of the others.
        """
        if not 0 <= index < count:
            raise CalibrationError(f"{self.name}: there is no shard {index} of {count}")
        length = self._length()
        return self._pick(range(index, _ENDLESS if length is None else length, count))

    def holdout(
        self, fraction: float = 0.25, *, seed: int | None = None
    ) -> tuple[CalibrationData, CalibrationData]:
        """Two parts, by batches: one to calibrate on and an evenly spread `fraction` to check on.

        With a seed, each batch to check on is a random one of its stretch: where kinds of data alternate, an
        even grid could leave one of them out.
        """
        total = self.count()
        if not 0.0 < fraction < 1.0:
            raise CalibrationError(f"{self.name}: cannot hold out {fraction} of the data, only a part")
        if total < 2:
            raise CalibrationError(
                f"{self.name}: holding out a part takes two batches; use a smaller batch size"
            )
        held = min(max(round(total * fraction), 1), total - 1)
        checked = [(2 * i + 1) * total // (2 * held) for i in range(held)]
        if seed is not None:
            random = np.random.default_rng(seed)
            ends = [i * total // held for i in range(held + 1)]
            checked = [int(random.integers(first, end)) for first, end in pairwise(ends)]
        fitted = sorted(set(range(total)).difference(checked))
        return self._pick(fitted), self._pick(checked)

    def bind(self, specs: Sequence[InputSpec]) -> CalibrationData:
        """The same data for one model: every batch is checked, and "#M" keys get the M-th input's name.

        Raises:
            CalibrationError: while iterating; names batch and input, what was given and what is expected.
        """
        return self._view(self._feeds, tuple(specs))

    def check(self, specs: Sequence[InputSpec]) -> None:
        """Compare the first batch with a model's inputs.

        Raises:
            CalibrationError: there is no batch, or an input is missing, unknown, or of another type or shape.
        """
        if next(iter(self.bind(specs)), None) is None:
            raise CalibrationError(f"{self.name}: there is no data")

    def count(self) -> int:
        """Number of batches; takes one pass over a source that does not know, the first time."""
        if self._count is None:
            length = self._length()
            self._count = sum(1 for _ in self._feeds) if length is None else length
        return self._count

    def _length(self) -> int | None:
        try:
            return len(self)
        except TypeError:
            return None

    def _pick(self, positions: Sequence[int]) -> CalibrationData:
        source = self._feeds
        if isinstance(source, _Lazy):
            return self._view(source.pick(positions), self._specs)
        if isinstance(source, (list, tuple)):
            return self._view([source[at] for at in positions], self._specs)
        if isinstance(source, Sequence):
            return self._view(_Lazy(positions, source.__getitem__), self._specs)
        return self._view(_Picked(source, positions), self._specs)

    def _view(
        self, feeds: Iterable[Mapping[str, Array]], specs: tuple[InputSpec, ...] | None
    ) -> CalibrationData:
        view = CalibrationData(feeds, name=self.name)
        view._specs = specs
        return view


@dataclass(frozen=True)
class _Lazy(Generic[T]):
    """Batches loaded one by one from what describes them."""

    items: Sequence[T]
    load: Callable[[T], Mapping[str, Array]]

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        return map(self.load, self.items)

    def __len__(self) -> int:
        return len(self.items)

    def pick(self, positions: Sequence[int]) -> _Lazy[T]:
        return _Lazy([self.items[at] for at in positions], self.load)


@dataclass(frozen=True)
class _Picked:
    """Some batches of a source that can only be read from its start; positions ascend."""

    source: Iterable[Mapping[str, Array]]
    positions: Sequence[int]

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        wanted = iter(self.positions)
        upcoming = next(wanted, None)
        for position, feeds in enumerate(self.source):
            if upcoming is None:
                return
            if position == upcoming:
                yield feeds
                upcoming = next(wanted, None)


class _Fresh:
    """A function's batches, the function called for every pass."""

    def __init__(self, fn: Callable[[], Iterable[Mapping[str, Array]]]) -> None:
        self.fn = fn
        self.last: object = None

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        batches = self.fn()
        if isinstance(batches, Iterator) and batches is self.last:
            raise CalibrationError("the function given to from_callable returned the same iterator twice")
        self.last = batches
        return iter(batches)

    def __reduce__(self) -> tuple[object, ...]:
        return _Fresh, (self.fn,)


class _Rewound:
    """A reader with `rewind()`, which has one position and so can serve one pass at a time."""

    def __init__(self, reader: Any, name: str) -> None:
        self.reader = reader
        self.name = name
        self.passes = 0

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        self.passes += 1
        current = self.passes
        self.reader.rewind()
        while True:
            feeds = self.reader.get_next()
            if self.passes != current:
                raise CalibrationError(
                    f"{self.name}: rewound while it was being read; pass a function that makes readers"
                )
            if feeds is None:
                return
            yield feeds


@dataclass(frozen=True)
class _Random:
    """Makes random batches, see `CalibrationData.random`."""

    specs: tuple[tuple[str, tuple[int, ...], np.dtype[Any]], ...]
    seed: int

    def __call__(self, position: int) -> Feeds:
        generator = np.random.default_rng([self.seed, position])
        return {name: self._draw(generator, shape, dtype) for name, shape, dtype in self.specs}

    def _draw(self, generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if dtype.kind in "biu":
            return generator.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
        return generator.standard_normal(shape).astype(dtype)


@dataclass(frozen=True)
class _Images:
    """Decodes images, see `CalibrationData.from_images`."""

    input: str
    size: tuple[int, int]
    layout: str
    mean: Array
    std: Array
    scale: float
    mode: str
    dtype: np.dtype[Any]

    def __call__(self, files: Sequence[Path]) -> Feeds:
        pixels = np.stack([self._decode(file) for file in files]).astype(np.float32)
        if pixels.ndim == 3:  # grey
            pixels = pixels[..., None]
        values = (pixels * np.float32(self.scale) - self.mean) / self.std
        if self.layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        return {self.input: np.ascontiguousarray(values, dtype=self.dtype)}

    def check_pillow(self) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            message = "reading images needs Pillow: install it, or onnx-slimkit[images]"
            raise CalibrationError(message) from None

    def _decode(self, file: Path) -> Array:
        from PIL import Image, ImageOps

        try:
            # Only these formats: Pillow hands some others to outside programs.
            with Image.open(file, formats=sorted(set(IMAGES.values()))) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                upright = ImageOps.exif_transpose(image).convert(self.mode)
            height, width = self.size
            return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR))
        except (*_UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _unreadable(file, error) from error


def _refusal(feeds: object) -> str | None:
    """Why this cannot be gone through again and again, if so."""
    kind = type(feeds).__name__
    if isinstance(feeds, (str, Path)):
        return "a path: use CalibrationData.from_npz, from_dir or from_images"
    if hasattr(feeds, "get_next"):
        return "a reader: use CalibrationData.from_reader"
    if isinstance(feeds, Mapping):
        return "a single batch: pass a list of batches"
    if isinstance(feeds, Iterator):
        return f"a {kind} can be read only once; {_ADVICE}"
    if not hasattr(feeds, "__iter__") and not hasattr(feeds, "__getitem__"):
        return f"a {kind} cannot be iterated; {_ADVICE}"
    return None


def _unreadable(file: Path, error: Exception) -> CalibrationError:
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
        raise _unreadable(folder, error) from error


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    # Splitting on digits alternates text and numbers; the name itself decides between "1" and "01".
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if at % 2 else (0, part) for at, part in enumerate(parts)], path.name


def _test_sets(folder: Path) -> list[tuple[Path, ...]]:
    if own := _test_inputs(folder):
        return [own]
    folders = sorted(folder.glob("test_data_set_*"), key=_natural)
    return [inputs for each in folders if each.is_dir() and (inputs := _test_inputs(each))]


def _test_inputs(folder: Path) -> tuple[Path, ...]:
    return tuple(_listed(folder, lambda file: re.fullmatch(r"input_\d+\.pb", file.name) is not None))


def _read_test_set(files: Sequence[Path], max_bytes: int) -> Feeds:
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
    except (*_UNREADABLE, DecodeError) as error:
        raise _unreadable(file, error) from error


def _read_npz(path: Path, max_bytes: int) -> Feeds:
    try:
        with path.open("rb") as file:
            _check_npz(file, max_bytes)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _map_npy(path: Path) -> Array:
    """The array in an .npy file, read page by page when it is used."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("not an .npy file but an archive of several; call it .npz")
        return array
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _cut_npy(paths: Mapping[str, Path], cut: slice) -> Feeds:
    return {key: np.array(_map_npy(path)[cut]) for key, path in paths.items()}


def _read_npy(path: Path) -> Feeds:
    return {"#0": np.array(_map_npy(path))}


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


def _sample_count(arrays: Feeds, name: str) -> int:
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


def _cuts(total: int, batch_size: int) -> list[slice]:
    if batch_size < 1:
        raise CalibrationError(f"a batch has at least one sample, not {batch_size}")
    return [slice(start, start + batch_size) for start in range(0, total, batch_size)]


def _drain(reader: Reader) -> Iterator[Mapping[str, Array]]:
    while (feeds := reader.get_next()) is not None:
        yield feeds


def _drain_new(factory: Callable[[], Reader]) -> Iterator[Mapping[str, Array]]:
    return _drain(factory())


def _fixed(shape: Shape) -> list[int]:
    return [size if isinstance(size, int) else 1 for size in shape]


def _arrays(feeds: Mapping[str, Array], where: str) -> Feeds:
    if not isinstance(feeds, Mapping):
        raise CalibrationError(f"{where} is a {type(feeds).__name__}, not a dict from input name to array")
    for name, array in feeds.items():
        if not isinstance(array, np.ndarray):
            raise CalibrationError(f"{where}: input {name!r} is a {type(array).__name__}, not a numpy array")
    return dict(feeds)


def _checked(feeds: Feeds, specs: Sequence[InputSpec], where: str) -> Feeds:
    """The batch under the model's names; CalibrationError where the model cannot take it."""
    named = {_positional(name, specs): array for name, array in feeds.items()}
    known = [spec.name for spec in specs]
    for name in named:
        if name not in known:
            raise CalibrationError(f"{where}: the model has no input {name!r}{_suggestion(name, known)}")
    for spec in specs:
        if spec.name in named:
            _check_array(named[spec.name], spec, where)
        elif spec.required:
            raise CalibrationError(
                f"{where}: input {spec.name!r} is missing; given: {', '.join(named) or 'none'}"
            )
    return named


def _positional(name: str, specs: Sequence[InputSpec]) -> str:
    position = re.fullmatch(r"#(\d+)", name)
    return specs[int(position[1])].name if position and int(position[1]) < len(specs) else name


def _suggestion(name: str, known: Sequence[str]) -> str:
    if close := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; its inputs are {', '.join(known)}"


def _check_array(array: Array, spec: InputSpec, where: str) -> None:
    if spec.dtype is None:
        raise CalibrationError(
            f"{where}: input {spec.name!r} of the model is not a tensor; only tensors can be fed"
        )
    if array.dtype != spec.dtype and not (_is_text(array.dtype) and _is_text(spec.dtype)):
        expected = f"the model expects {spec.dtype}; convert it, such as with astype"
        raise CalibrationError(f"{where}: input {spec.name!r} is {array.dtype}, {expected}")
    if spec.shape is None or _fits(array.shape, spec.shape):
        return
    sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
    same_samples = array.ndim == len(spec.shape) and _fits(array.shape[1:], spec.shape[1:])
    hint = f"; use batches of {spec.shape[0]}" if same_samples else ""
    raise CalibrationError(
        f"{where}: input {spec.name!r} has shape {array.shape}, the model expects ({sizes}){hint}"
    )


def _is_text(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "OSUT"


def _fits(shape: Sequence[int], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        not isinstance(want, int) or size == want for size, want in zip(shape, expected, strict=True)
    )
