"""Inputs made up from what a model declares, to see whether a rewrite changed what it computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim.errors import LoadError
from onnxslim.graph import Array, Dim
from onnxslim.model import InputSpec, Model
from onnxslim.runtime import Session

BATCHES = (2, 3)
# Sizes tried for the free axes other than the batch, until the model runs: sequences first, images last.
FREE_SIZES = (8, 32, 64, 1, 224, 100)
# Numbers of words to try where a model takes more than zeros and ones.
MAX_ID = 99
# Inputs that take more are not made up.
MAX_BYTES = 1 << 30

Feeds = dict[str, Array]


@dataclass(frozen=True)
class Run:
    """Inputs of a model and the outputs it makes of them."""

    feeds: Feeds
    outputs: dict[str, Any]


def probes(model: Model, session: Session, samples: Sequence[Mapping[str, Array]] = ()) -> list[Run]:
    """Runs of the model, at two batch sizes where its batch is free.

    Args:
        model: what to feed.
        session: the same model, loaded.
        samples: real inputs, preferred to made-up ones.

    Returns:
        Nothing at all if it runs on none of the inputs tried.
    """
    for candidates in _candidates(model.inputs(), samples):
        working = [run for run in (_run(session, feeds) for feeds in candidates) if run is not None]
        if working:
            return working
    return []


def _candidates(specs: Sequence[InputSpec], samples: Sequence[Mapping[str, Array]]) -> Iterator[list[Feeds]]:
    if samples:
        yield [dict(samples[0]), *_single(specs, samples[0])]
    if sum(map(_least_bytes, specs)) > MAX_BYTES:
        return
    for size, uneven in itertools.product(FREE_SIZES, (True, False)):
        plain = [make_feeds(specs, batch=batch, size=size, seed=batch, uneven=uneven) for batch in BATCHES]
        if any(map(_has_ids, specs)):
            plain.append(make_feeds(specs, batch=BATCHES[0], size=size, ids=MAX_ID, uneven=uneven))
        yield plain
    yield [make_feeds(specs, batch=1, size=size) for size in FREE_SIZES]


def _least_bytes(spec: InputSpec) -> int:
    """What an input takes if its free axes have size 1."""
    sizes = (dim for dim in spec.shape or () if isinstance(dim, int))
    return math.prod(sizes) * (spec.dtype.itemsize if spec.dtype is not None else 0)


def _has_ids(spec: InputSpec) -> bool:
    """Whether an input may hold the numbers of words or levels of grey, rather than sizes or counts."""
    return spec.dtype is not None and spec.dtype.kind in "iu" and len(spec.shape or ()) > 1


def _single(specs: Sequence[InputSpec], feeds: Mapping[str, Array]) -> list[Feeds]:
    """The first sample alone, where every input is batched along its free first axis."""
    free = all(spec.shape and not isinstance(spec.shape[0], int) for spec in specs if spec.name in feeds)
    sizes = {array.shape[:1] for array in feeds.values()}
    if not free or len(sizes) != 1 or sizes == {(1,)}:
        return []
    return [{name: array[:1] for name, array in feeds.items()}]


def _run(session: Session, feeds: Feeds) -> Run | None:
    try:
        return Run(feeds, session.run(feeds))
    except LoadError:
        return None


def make_feeds(
    specs: Sequence[InputSpec], *, batch: int, size: int, seed: int = 0, ids: int = 1, uneven: bool = False
) -> Feeds:
    """One array per required input: normal deviates for floats, zeros and ones for integers.

    Args:
        specs: the inputs.
        batch: size of a free first axis.
        size: size of every other free axis.
        seed: of the random generator.
        ids: largest number in integer inputs of two or more axes.
        uneven: give free axes that nothing says are equal different multiples of `size`, so that a mix-up of
            two of them does not go unseen.
    """
    generator = np.random.default_rng(seed)
    sizes = _Sizes({spec.shape[0] for spec in specs if spec.shape} - {None}, batch, size, uneven)
    feeds: Feeds = {}
    for spec in specs:
        if spec.required and spec.dtype is not None:
            feeds[spec.name] = _values(spec, sizes.of(spec), generator, ids if _has_ids(spec) else 1)
    return feeds


class _Sizes:
    """Chooses sizes for free axes, the same for the same symbol."""

    def __init__(self, batch_symbols: Collection[Dim], batch: int, size: int, uneven: bool) -> None:
        self._batch_symbols = batch_symbols
        self._batch = batch
        self._size = size
        self._uneven = uneven
        self._chosen: dict[object, int] = {}

    def of(self, spec: InputSpec) -> tuple[int, ...]:
        """The shape to feed an input with."""
        return tuple(
            dim if isinstance(dim, int) else self._free(dim, spec.name, axis)
            for axis, dim in enumerate(spec.shape or ())
        )

    def _free(self, dim: Dim, name: str, axis: int) -> int:
        if axis == 0 or dim in self._batch_symbols:
            return self._batch
        factor = 1 + len(self._chosen) % 3 if self._uneven else 1
        return self._chosen.setdefault(dim or (name, axis), self._size * factor)


def _values(spec: InputSpec, shape: tuple[int, ...], generator: np.random.Generator, largest: int) -> Array:
    dtype = spec.dtype
    assert dtype is not None
    if dtype.kind == "O":
        return np.full(shape, "a", dtype)
    if dtype.kind in "iub":
        return generator.integers(0, largest + 1, shape).astype(dtype)
    return np.asarray(generator.standard_normal(shape).astype(dtype))
