"""What can be gone through again and again: readers, functions, and parts of what can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import length_hint
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.sources.arrays import Array
from onnxslim.errors import CalibrationError

T = TypeVar("T")

_ADVICE = "pass a list of batches, or CalibrationData.from_callable with a function that starts anew"


class Reader(Protocol):
    """ONNX Runtime's CalibrationDataReader: the next batch, or None at the end."""

    def get_next(self) -> Mapping[str, Array] | None: ...


class Fresh:
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
        return Fresh, (self.fn,)


class Rewound:
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


def drain(reader: Reader) -> Iterator[Mapping[str, Array]]:
    while (feeds := reader.get_next()) is not None:
        yield feeds


def drain_new(factory: Callable[[], Reader]) -> Iterator[Mapping[str, Array]]:
    return drain(factory())


@dataclass(frozen=True)
class Lazy(Generic[T]):
    """Batches loaded one by one from what describes them."""

    items: Sequence[T]
    load: Callable[[T], Mapping[str, Array]]

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        return map(self.load, self.items)

    def __len__(self) -> int:
        return len(self.items)

    def pick(self, positions: Sequence[int]) -> Lazy[T]:
        return Lazy([self.items[at] for at in positions], self.load)


@dataclass(frozen=True)
class Picked:
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


@dataclass(frozen=True)
class Chained:
    """What several sources give, one source after the other."""

    sources: Sequence[Iterable[Mapping[str, Array]]]

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        return chain.from_iterable(self.sources)

    def __length_hint__(self) -> int:
        return sum(map(length_hint, self.sources))


@dataclass(frozen=True)
class Regrouped:
    """Some samples of each batch of a source, in batches of another size.

    Attributes:
        source: batches whose arrays all have an axis of samples first.
        wanted: of each batch, which samples.
        size: samples per batch; fewer before one whose arrays have other shapes, and at the end.
    """

    source: Iterable[Mapping[str, Array]]
    wanted: Sequence[NDArray[np.intp]]
    size: int

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        waiting: dict[str, Array] = {}
        for feeds, at in zip(self.source, self.wanted, strict=False):
            part = {name: array[at] for name, array in feeds.items()}
            if waiting and _each(waiting) == _each(part):
                part = {name: np.concatenate((waiting[name], array)) for name, array in part.items()}
            elif waiting:
                yield waiting
            count = len(next(iter(part.values())))
            whole = count - count % self.size
            for start in range(0, whole, self.size):
                yield {name: array[start : start + self.size] for name, array in part.items()}
            waiting = {name: array[whole:] for name, array in part.items()} if whole < count else {}
        if waiting:
            yield waiting

    def __length_hint__(self) -> int:
        return -(-sum(map(len, self.wanted)) // self.size)


def _each(feeds: Mapping[str, Array]) -> dict[str, tuple[object, ...]]:
    """Types and shapes of one sample."""
    return {name: (array.dtype, *array.shape[1:]) for name, array in feeds.items()}


def refusal(feeds: object) -> str | None:
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
