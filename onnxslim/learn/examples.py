"""What is learnt from: inputs, and what is wanted of them, kept in memory or beyond a limit in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim.calibration.feeds import batch_samples
from onnxslim.calibration.stages import SpillStore
from onnxslim.ir.graph import Array

# Bytes of inputs and wanted tensors that are kept in memory.
MEMORY = 512 << 20


@dataclass(frozen=True)
class Lesson:
    """Some samples of one shape, that are computed together.

    Attributes:
        feeds: inputs by name.
        wanted: what tensors should be, by name.
        samples: how many there are.
        apart: whether each of them is computed by itself, so that they may be computed in parts.
    """

    feeds: Mapping[str, Array]
    wanted: Mapping[str, Array]
    samples: int
    apart: bool = False

    def rows(self, chosen: slice) -> Lesson:
        """Some of its samples, which are computed by themselves."""
        feeds, wanted = (
            {name: array[chosen] for name, array in each.items()} for each in (self.feeds, self.wanted)
        )
        return Lesson(feeds, wanted, len(range(self.samples)[chosen]), True)


class Examples:
    """Samples in any order, each with what is wanted of it.

    Args:
        limit: bytes to keep in memory.
    """

    def __init__(self, limit: int = MEMORY) -> None:
        self._store = SpillStore(limit)
        self._chunks: list[Lesson] = []
        # A chunk and a row of it; -1 for all its rows, where they are not computed apart.
        self._places: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return sum(1 if row >= 0 else self._chunks[chunk].samples for chunk, row in self._places)

    @property
    def spilled(self) -> int:
        """Arrays that are in files."""
        return self._store.outside

    def add(self, feeds: Mapping[str, Array], wanted: Mapping[str, Array], *, apart: bool) -> None:
        """Take in a batch.

        Args:
            feeds, wanted: see `Lesson`.
            apart: whether each of its samples is computed by itself.
        """
        samples = batch_samples(feeds)
        kept, goal = ({name: self._store.put(x) for name, x in each.items()} for each in (feeds, wanted))
        chunk = Lesson(kept, goal, samples)
        rows = range(samples) if apart and _has_rows(chunk) else (-1,)
        self._places += [(len(self._chunks), row) for row in rows]
        self._chunks.append(chunk)

    def steps(self, size: int, random: np.random.Generator) -> Iterator[list[Lesson]]:
        """Endlessly, about `size` samples for each step, all samples once before any comes again."""
        while True:
            order = random.permutation(len(self._places))
            pending: list[Lesson] = []
            for lesson in self._lessons(order.tolist(), size):
                pending.append(lesson)
                if sum(each.samples for each in pending) >= size:
                    yield pending
                    pending = []
            if pending:
                yield pending

    def in_order(self, size: int) -> Iterator[Lesson]:
        """Every sample once, about `size` at a time."""
        yield from self._lessons(range(len(self._places)), size)

    def _lessons(self, order: Sequence[int], size: int) -> Iterator[Lesson]:
        waiting: dict[object, list[tuple[int, int]]] = {}
        for at in order:
            chunk, row = self._places[at]
            if row < 0:
                yield self._chunks[chunk]
                continue
            alike = waiting.setdefault(_shapes(self._chunks[chunk]), [])
            alike.append((chunk, row))
            if len(alike) == size:
                yield self._joined(alike)
                alike.clear()
        for alike in waiting.values():
            if alike:
                yield self._joined(alike)

    def _joined(self, places: Sequence[tuple[int, int]]) -> Lesson:
        def rows(which: str) -> dict[str, Array]:
            names = getattr(self._chunks[places[0][0]], which)
            return {
                name: np.stack([getattr(self._chunks[chunk], which)[name][row] for chunk, row in places])
                for name in names
            }

        return Lesson(rows("feeds"), rows("wanted"), len(places), True)


def _has_rows(chunk: Lesson) -> bool:
    arrays = (*chunk.feeds.values(), *chunk.wanted.values())
    return all(array.ndim and len(array) == chunk.samples for array in arrays)


def _shapes(chunk: Lesson) -> object:
    return tuple(array.shape[1:] for each in (chunk.feeds, chunk.wanted) for array in each.values())
