"""Calibration data: batches of model inputs from memory, files, readers or callables.

Whatever the source, iterating a `CalibrationData` gives `dict[str, ndarray]` batches, from the first again
every time. Files are only ever read as plain arrays: no pickles, and never more than `MAX_BYTES` at a time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from onnxslim.calibration.feeds import BATCH_SIZE, Shape, arrays_of, batch_for, batch_samples, checked
from onnxslim.calibration.sources import arrays, images, readers
from onnxslim.calibration.sources.arrays import MAX_BYTES, Array, Feeds
from onnxslim.calibration.sources.readers import Lazy, Reader
from onnxslim.errors import CalibrationError
from onnxslim.ir.model import InputSpec

if TYPE_CHECKING:
    from typing_extensions import Self

_ENDLESS = 1 << 62


class CalibrationData:
    """Batches of model inputs that can be gone through any number of times.

    Args:
        feeds: anything that can be iterated again and again and gives dicts from input name to array. Batches
            may differ in shape. Generators and other one-shot iterators are refused.
        name: what error messages call the data.
        sizes: number of samples in each batch, where that is known; otherwise it takes a pass to know it.

    Raises:
        CalibrationError: the source can be read only once; while iterating, a batch is not a dict of arrays.
    """

    def __init__(
        self,
        feeds: Iterable[Mapping[str, Array]],
        *,
        name: str = "calibration data",
        sizes: Sequence[int] | None = None,
    ) -> None:
        if refusal := readers.refusal(feeds):
            raise CalibrationError(f"{name}: {refusal}")
        self._feeds = feeds
        self._specs: tuple[InputSpec, ...] | None = None
        self._sizes = None if sizes is None else tuple(sizes)
        self._samples: int | None = None
        self.name = name

    def __repr__(self) -> str:
        length = self._length()
        return f"<CalibrationData '{self.name}'{'' if length is None else f': {length} batches'}>"

    @classmethod
    def from_path(cls, path: str | Path, batch_size: int = BATCH_SIZE) -> Self:
        """What an .npz or .npy file or a folder holds; see `from_npz`, `from_npy` and `from_dir`."""
        file = Path(path)
        if file.is_dir():
            return cls.from_dir(file)
        if file.suffix == ".npz":
            return cls.from_npz(file, batch_size)
        if file.suffix == ".npy":
            return cls.from_npy(file, batch_size)
        raise CalibrationError(f"{path}: expected an .npz or .npy file, or a folder")

    @classmethod
    def from_arrays(
        cls, samples: Mapping[str, Array], batch_size: int = BATCH_SIZE, *, name: str = "calibration data"
    ) -> Self:
        """Samples from memory, cut into batches; the last one may be smaller.

        Args:
            samples: one array per model input, the first axis of each counts the samples.
            batch_size: samples per batch.
            name: what error messages call the data.
        """
        kept = arrays_of(samples, name)
        cuts = arrays.cuts(arrays.sample_count(kept, name), batch_size)
        return cls([{key: array[cut] for key, array in kept.items()} for cut in cuts], name=name)

    @classmethod
    def from_npz(
        cls,
        path: str | Path,
        batch_size: int = BATCH_SIZE,
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
        read = arrays.read_npz(Path(path), max_bytes)
        kept = {key: array for key, array in read.items() if key not in dropped}
        return cls.from_arrays(kept, batch_size, name=str(path))

    @classmethod
    def from_npy(cls, files: str | Path | Mapping[str, str | Path], batch_size: int = BATCH_SIZE) -> Self:
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
        samples = arrays.sample_count({key: arrays.map_npy(file) for key, file in paths.items()}, name)
        cuts = arrays.cuts(samples, batch_size)
        sizes = [len(range(*cut.indices(samples))) for cut in cuts]
        return cls(Lazy(cuts, partial(arrays.cut_npy, paths)), name=name, sizes=sizes)

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
            ".npz files": (arrays.listed(folder, (".npz",)), partial(arrays.read_npz, max_bytes=max_bytes)),
            ".npy files": (arrays.listed(folder, (".npy",)), arrays.read_npy),
            "test_data_set_N/input_M.pb": (
                arrays.test_sets(folder),
                partial(arrays.read_test_set, max_bytes=max_bytes),
            ),
        }
        found = [name for name, (items, _) in kinds.items() if items]
        if len(found) != 1:
            *first, last = kinds
            raise CalibrationError(
                f"{folder}: expected {', '.join(first)} or {last}, found {' and '.join(found) or 'none'}"
                f"{'' if found else ', and no images either'}"
            )
        items, load = kinds[found[0]]
        return cls(Lazy(items, load), name=str(folder))

    @classmethod
    def of(
        cls, source: Any, specs: Sequence[InputSpec] = (), *, name: str = "calibration data"
    ) -> CalibrationData:
        """Batches from whatever gives them.

        Args:
            source: calibration data; a reader with `get_next()`, or a class or function that makes readers;
                a function that returns a fresh iterable of batches; an iterable of batches; samples as one
                array per model input, or as one array for a model with one input; or a path, see `from_path`.
            specs: inputs of the model it is for; samples are cut into batches as large as those.
            name: what error messages call the data.
        """
        if isinstance(source, CalibrationData):
            return source
        if isinstance(source, str | Path):
            return cls.from_path(source, batch_for(specs))
        if isinstance(source, np.ndarray):
            source = {"#0": source}
        if isinstance(source, Mapping):
            return cls.from_arrays(source, batch_for(specs), name=name)
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
            return cls(readers.Fresh(partial(readers.drain_new, reader)), name=name)
        if hasattr(reader, "rewind"):
            return cls(readers.Rewound(reader, name), name=name)
        return cls(list(readers.drain(reader)), name=name)

    @classmethod
    def from_callable(
        cls, fn: Callable[[], Iterable[Mapping[str, Array]]], *, name: str = "callable"
    ) -> Self:
        """Batches from a function that returns a fresh iterator of them on every call."""
        if not callable(fn):
            raise CalibrationError(f"{name}: a {type(fn).__name__} is not a function that returns batches")
        return cls(readers.Fresh(fn), name=name)

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
        batch_size: int = BATCH_SIZE,
        fit: str = "crop",
        order: str = "RGB",
    ) -> Self:
        """Images from a folder: JPEG, PNG, BMP and WebP, in natural order, decoded when they are needed.

        Each is made to fit, resized (bilinear), and given to the model as (pixel * scale - mean) / std. Needs
        Pillow (the `images` extra).

        Args:
            folder: where the images are; without any, those of the folders in it.
            input: name of the model input.
            size: height and width, or one number for both.
            layout: "NCHW" or "NHWC".
            mean, std: of the scaled values, one number or one per channel; for ImageNet classifiers
                usually (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225).
            scale: factor that comes first.
            channels: 3 for red, green and blue, 1 for grey.
            dtype: element type of the input.
            batch_size: images per batch; the last may have fewer.
            fit: to the wanted aspect ratio: "crop" around the centre, "letterbox" (grey borders), "stretch".
            order: of the channels the model gets, "RGB" or "BGR"; mean and std are those of R, G, B anyway.
        """
        files = images.found(Path(folder))
        load = images.reader(str(folder), input, size, layout, mean, std, scale, channels, dtype, fit, order)
        batches = [files[cut] for cut in arrays.cuts(len(files), batch_size)]
        return cls(Lazy(batches, load), name=str(folder), sizes=list(map(len, batches)))

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
        return cls(Lazy(range(samples), _Random(wanted, seed)), name="random data")

    def __iter__(self) -> Iterator[Feeds]:
        for position, feeds in enumerate(self._feeds):
            where = f"{self.name}: batch {position}"
            batch = arrays_of(feeds, where)
            yield batch if self._specs is None else checked(batch, self._specs, where)

    def __len__(self) -> int:
        """Number of batches; TypeError where only reading them all would tell."""
        return len(self._feeds)  # type: ignore[arg-type]

    def __length_hint__(self) -> int:
        """About how many batches there are, where the source has an idea."""
        hint = length_hint(self._feeds, -1)
        return hint if hint >= 0 else NotImplemented

    def shard(self, index: int, count: int) -> CalibrationData:
        """Every `count`-th batch, starting at `index`: a view that pickles if the source does.

        Files are read by the shard that needs them. A source without random access (a callable, a reader) is
        gone through by every shard, which drops the batches of the others.
        """
        if not 0 <= index < count:
            raise CalibrationError(f"{self.name}: there is no shard {index} of {count}")
        length = self._length()
        return self.pick(range(index, _ENDLESS if length is None else length, count))

    def take(self, samples: Sequence[int], size: int) -> CalibrationData:
        """Some samples, in batches of a size of their own: however the data is grouped, the same batches.

        A sample with other shapes than the one before it begins a new batch. Batches that hold none of the
        samples are not read where the source has random access.

        Args:
            samples: their numbers among all, ascending.
            size: of each batch but the last.
        """
        ends = np.cumsum(self.sizes())
        numbers = np.asarray(samples, np.intp)
        batch = np.searchsorted(ends, numbers, side="right")
        positions, firsts = np.unique(batch, return_index=True)
        within = numbers - (ends - np.asarray(self.sizes()))[batch]
        source = self.pick(positions.tolist())
        view = CalibrationData(readers.Regrouped(source, np.split(within, firsts[1:]), size), name=self.name)
        view._samples = len(samples)
        return view

    def then(self, other: CalibrationData) -> CalibrationData:
        """The batches of this and, after them, those of the other."""
        view = CalibrationData(readers.Chained((self, other)), name=self.name)
        view._samples = self.samples() + other.samples()
        return view

    def bind(self, specs: Sequence[InputSpec]) -> CalibrationData:
        """The same data for one model: every batch is checked, and "#M" keys get the M-th input's name.

        Raises:
            CalibrationError: while iterating; names batch and input, what was given and what is expected.
        """
        view = self._view(self._feeds, tuple(specs), self._sizes)
        view._samples = self._samples
        return view

    def check(self, specs: Sequence[InputSpec]) -> None:
        """Compare the first batch with a model's inputs.

        Raises:
            CalibrationError: there is no batch, or an input is missing, unknown, or of another type or shape.
        """
        if next(iter(self.bind(specs)), None) is None:
            raise CalibrationError(f"{self.name}: there is no data")

    def count(self) -> int:
        """Number of batches; takes one pass over a source that does not know, the first time."""
        length = self._length()
        return len(self.sizes()) if length is None else length

    def samples(self) -> int:
        """Number of samples; takes one pass over files, readers and functions, the first time."""
        return sum(self.sizes()) if self._samples is None else self._samples

    def sizes(self) -> tuple[int, ...]:
        """Number of samples in each batch; takes a pass as `samples` does."""
        if self._sizes is None:
            self._sizes = tuple(map(batch_samples, self))
        return self._sizes

    def sha256(self) -> str:
        """Hash of all batches: names, types, shapes and values of their arrays."""
        digest = hashlib.sha256()
        for feeds in self:
            for name, array in feeds.items():
                digest.update(repr((name, array.dtype.str, array.shape)).encode())
                digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
        return digest.hexdigest()

    def _length(self) -> int | None:
        try:
            return len(self)
        except TypeError:
            return None

    def pick(self, positions: Sequence[int]) -> CalibrationData:
        """Some batches, by their numbers, ascending."""
        source = self._feeds
        sizes = (
            None if self._sizes is None else [self._sizes[at] for at in positions if at < len(self._sizes)]
        )
        if isinstance(source, Lazy):
            return self._view(source.pick(positions), self._specs, sizes)
        if isinstance(source, (list, tuple)):
            return self._view([source[at] for at in positions], self._specs, sizes)
        if isinstance(source, Sequence):
            return self._view(Lazy(positions, source.__getitem__), self._specs, sizes)
        return self._view(readers.Picked(source, positions), self._specs, sizes)

    def _view(
        self,
        feeds: Iterable[Mapping[str, Array]],
        specs: tuple[InputSpec, ...] | None,
        sizes: Sequence[int] | None,
    ) -> CalibrationData:
        view = CalibrationData(feeds, name=self.name, sizes=sizes)
        view._specs = specs
        return view


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


def _fixed(shape: Shape) -> list[int]:
    return [size if isinstance(size, int) else 1 for size in shape]
