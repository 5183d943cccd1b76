"""Inputs made up from what a model declares, to see whether a rewrite changed what it computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim.errors import LoadError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Dim, Node
from onnxslim.ir.model import InputSpec, Model
from onnxslim.runtime.limits import LimitExceeded, RunLimits
from onnxslim.runtime.session import Session

MATCHES = ("Loop", "Scan")

BATCHES = (2, 3)
# Sizes tried for the free axes other than the batch, until the model runs: sequences, images, sound.
FREE_SIZES = (8, 32, 64, 1, 224, 100)
LONG_SIZES = (4000,)
# Numbers of words to try where a model takes more than zeros and ones.
MAX_ID = 99
# Inputs that take more are not made up; long ones may become tables of every pair of their elements.
MAX_BYTES = 1 << 30
MAX_LONG_BYTES = 1 << 20
# What a model with loops may take on made-up inputs: nothing else says how often they go round.
LIMITS = RunLimits(seconds=5, bytes=256 << 20)

Feeds = dict[str, Array]


@dataclass(frozen=True)
class Run:
    """Inputs of a model and the outputs it makes of them."""

    feeds: Feeds
    outputs: dict[str, Any]


def probes(
    model: Model,
    session: Session,
    samples: Sequence[Mapping[str, Array]] = (),
    specs: Sequence[InputSpec] | None = None,
) -> list[Run]:
    """Runs of the model, at two batch sizes where its batch is free.

    Args:
        model: what to feed.
        session: the same model, loaded.
        samples: real inputs, preferred to made-up ones.
        specs: its inputs, where somebody said more of their sizes than the model does.

    Returns:
        Nothing at all if it runs on none of the inputs tried.
    """
    if samples:
        working = _working(session, [dict(samples[0]), *_single(model.inputs(), samples[0])])
        if working:
            return working
    limits = LIMITS if any(node.op in ("Loop", "Scan") for node in model.nodes()) else None
    for candidates in _candidates(model.inputs() if specs is None else specs):
        safe = [feeds for feeds in candidates if _scans_something(model, feeds, session)]
        try:
            working = _working(session, safe, limits)
        except LimitExceeded:
            return []
        if working:
            return working
    return []


def _working(session: Session, candidates: Sequence[Feeds], limits: RunLimits | None = None) -> list[Run]:
    return [run for run in (_run(session, feeds, limits) for feeds in candidates) if run is not None]


def _scans_something(model: Model, feeds: Feeds, session: Session) -> bool:
    """Whether every Scan has something to go over; ONNX Runtime divides by its length, and the process dies.

    Where that cannot be told (a Scan in a body or a function, one of opset 8), it is taken to have nothing.
    """
    names = {node.op for graph in model.graphs() if graph is not model.graph for node in graph.nodes}
    names |= {node.op_type for function in model.shell.functions for node in function.node}
    if "Scan" in names:
        return False
    if all(node.op != "Scan" for node in model.graph.nodes):
        return True
    copy = model.copy()
    ir.sort(copy.graph)
    nodes = list(copy.graph.nodes)
    for index, node in enumerate(nodes):
        if node.op == "Scan" and not _has_length(node, copy, nodes[:index], feeds, session):
            return False
    return True


def _has_length(scan: Node, model: Model, before: list[Node], feeds: Feeds, session: Session) -> bool:
    """Run what comes before a Scan, for the sizes it goes over."""
    if model.opset < 9:
        return False
    count = scan.attrs["num_scan_inputs"]
    axes = scan.attrs.get("scan_input_axes", [0] * count)
    scanned = scan.inputs[-count:]
    computed = list({id(tensor): tensor for tensor in scanned if ir.producer(tensor) is not None}.values())
    model.graph.nodes, model.graph.outputs = before, computed
    values = dict(feeds)
    try:
        if computed:
            values.update(Session(model, session.target, once=True).run(feeds))
    except LoadError:
        return False
    sizes = (
        (tensor.shape if isinstance(tensor, Constant) else values[tensor.name].shape)[axis]
        for tensor, axis in zip(scanned, axes, strict=True)
    )
    return all(sizes)


def _candidates(specs: Sequence[InputSpec]) -> Iterator[list[Feeds]]:
    if sum(map(_least_bytes, specs)) > MAX_BYTES:
        return
    for size, uneven in itertools.product(FREE_SIZES, (True, False)):
        plain = [make_feeds(specs, batch=batch, size=size, seed=batch, uneven=uneven) for batch in BATCHES]
        if any(map(_has_ids, specs)):
            plain.append(make_feeds(specs, batch=BATCHES[0], size=size, ids=MAX_ID, uneven=uneven))
        yield plain
    yield [make_feeds(specs, batch=1, size=size) for size in FREE_SIZES]
    for size in LONG_SIZES:
        if sum(_least_bytes(spec, size) for spec in specs) <= MAX_LONG_BYTES:
            yield [make_feeds(specs, batch=batch, size=size, seed=batch) for batch in (*BATCHES, 1)]


def _least_bytes(spec: InputSpec, size: int = 1) -> int:
    """What an input takes if its free axes after the first have this size."""
    sizes = (
        dim if isinstance(dim, int) else size if axis else 1 for axis, dim in enumerate(spec.shape or ())
    )
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


def _run(session: Session, feeds: Feeds, limits: RunLimits | None) -> Run | None:
    try:
        return Run(feeds, session.run(feeds, limits=limits))
    except LimitExceeded:
        raise
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
