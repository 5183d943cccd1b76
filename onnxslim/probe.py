"""Inputs made up from what a model declares, to see whether a rewrite changed what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnxslim.errors import LoadError
from onnxslim.graph import Array, Dim, Shape
from onnxslim.model import InputSpec, Model
from onnxslim.runtime import Session

BATCHES = (2, 3)
# Sizes tried for the free axes other than the batch, until the model runs: sequences first, images last.
FREE_SIZES = (8, 32, 64, 1, 224, 100)
# Numbers of words to try where a model takes more than zeros and ones.
MAX_ID = 99

Feeds = dict[str, Array]


def probes(model: Model, session: Session, samples: Sequence[Mapping[str, Array]] = ()) -> list[Feeds]:
    """Feeds on which the model runs, at two batch sizes where its batch is free.

    Args:
        model: what to feed.
        session: the same model, loaded.
        samples: real inputs, preferred to made-up ones.

    Returns:
        No feeds at all if none of those tried runs.
    """
    for candidates in _candidates(model.inputs(), samples):
        working = [feeds for feeds in candidates if _runs(session, feeds)]
        if working:
            return working
    return []


def _candidates(specs: Sequence[InputSpec], samples: Sequence[Mapping[str, Array]]) -> Iterator[list[Feeds]]:
    if samples:
        yield [dict(samples[0]), *_single(specs, samples[0])]
    for size in FREE_SIZES:
        plain = [make_feeds(specs, batch=batch, size=size, seed=batch) for batch in BATCHES]
        ids = (
            [make_feeds(specs, batch=BATCHES[0], size=size, ids=MAX_ID)] if any(map(_has_ids, specs)) else []
        )
        yield [*plain, *ids]
    yield [make_feeds(specs, batch=1, size=size) for size in FREE_SIZES]


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


def _runs(session: Session, feeds: Feeds) -> bool:
    try:
        session.run(feeds)
    except LoadError:
        return False
    return True


def make_feeds(specs: Sequence[InputSpec], *, batch: int, size: int, seed: int = 0, ids: int = 1) -> Feeds:
    """One array per required input: normal deviates for floats, zeros and ones for integers.

    Args:
        specs: the inputs.
        batch: size of a free first axis.
        size: size of every other free axis.
        seed: of the random generator.
        ids: largest number in integer inputs of two or more axes.
    """
    generator = np.random.default_rng(seed)
    batch_symbols: set[Dim] = {spec.shape[0] for spec in specs if spec.shape} - {None}
    feeds: Feeds = {}
    for spec in specs:
        if spec.required and spec.dtype is not None:
            shape = _sizes(spec.shape, batch_symbols, batch, size)
            feeds[spec.name] = _values(spec, shape, generator, ids if _has_ids(spec) else 1)
    return feeds


def _sizes(shape: Shape, batch_symbols: set[Dim], batch: int, size: int) -> tuple[int, ...]:
    return tuple(
        dim if isinstance(dim, int) else batch if (axis == 0 or dim in batch_symbols) else size
        for axis, dim in enumerate(shape or ())
    )


def _values(spec: InputSpec, shape: tuple[int, ...], generator: np.random.Generator, largest: int) -> Array:
    dtype = spec.dtype
    assert dtype is not None
    if dtype.kind == "O":
        return np.full(shape, "a", dtype)
    if dtype.kind in "iub":
        return generator.integers(0, largest + 1, shape).astype(dtype)
    return np.asarray(generator.standard_normal(shape).astype(dtype))
