"""Collects statistics of inner tensors in one streaming pass over calibration data.

Tensors are tapped as extra outputs of the model, with ONNX Runtime's optimizations left on: only those that
survive fusion are worth a tap, and the rest of the network runs as fast as it will later. Nothing is kept of
a batch but what the observers make of it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any, TypeAlias

import joblib
import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import ChannelMeans, Distribution, Histogram
from onnxslim.errors import CalibrationError, LoadError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

Progress: TypeAlias = Callable[[str, int, int | None], None]
Channels: TypeAlias = tuple[str, int]  # a tensor and the axis that runs over its channels


@dataclass(frozen=True)
class Statistics:
    """What was seen of the tapped tensors.

    Attributes:
        histograms: by tensor.
        means: of each channel, by tensor and channel axis.
    """

    histograms: dict[str, Histogram]
    means: dict[Channels, ChannelMeans]

    @classmethod
    def empty(cls, tensors: Iterable[str], channels: Iterable[Channels]) -> Statistics:
        """Observers that have seen nothing yet."""
        return cls({name: Histogram() for name in tensors}, {key: ChannelMeans(key[1]) for key in channels})

    def names(self) -> list[str]:
        """The tensors to tap, each once."""
        return list(dict.fromkeys([*self.histograms, *(name for name, _ in self.means)]))

    def update(self, name: str, array: Array) -> None:
        """Show an array to all observers of its tensor."""
        if name in self.histograms:
            self.histograms[name].update(array, every=thinning(array))
        for (tensor, _), observer in self.means.items():
            if tensor == name:
                observer.update(array)

    def merge(self, other: Statistics) -> None:
        """Take in what other observers of the same tensors have seen."""
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])
        for key, observer in self.means.items():
            observer.merge(other.means[key])


# Values of a sample that are always counted.
KEPT = 1 << 14

# Levels of ONNX Runtime's optimization, tried in turn: a fusion may swallow a tensor that is tapped.
LEVELS = ("all", "basic", "none")


def collect(
    model: Model,
    data: CalibrationData,
    tensors: Sequence[str],
    *,
    channels: Sequence[Channels] = (),
    target: Target | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of tensors of the main graph over all batches.

    Args:
        model: not modified.
        data: batches of inputs, of any size and shape the model takes.
        tensors: names of floating-point tensors to make histograms of: inputs, outputs or in between.
        channels: tensors, with their channel axis, to take channel means of.
        target: where to run; processors by default.
        jobs: processes that share the batches; the result does not depend on their number.
        progress: called with ("calibrating", batches done, batches in all).

    Raises:
        CalibrationError: the data does not fit the model, is empty, or holds NaN or infinities. Tensors in
            between may: what was seen of them says so (`irregular`).
    """
    data = data.bind(model.inputs())
    if jobs == 1:
        found = _observe(model, data, Statistics.empty(tensors, channels), target, progress)
    else:
        found = _in_parallel(model, data, Statistics.empty(tensors, channels), target or Target.cpu(), jobs)
    inputs = {spec.name for spec in model.inputs()}
    for name, histogram in found.histograms.items():
        _require_usable(name, histogram, name in inputs)
    return found


def tapped(model: Model, tensors: Sequence[str]) -> Model:
    """A copy of the model in which these tensors are outputs too."""
    copy = model.copy()
    made = {tensor.name: tensor for node in copy.graph.nodes for tensor in node.outputs}
    present = {tensor.name for tensor in (*copy.graph.inputs, *copy.graph.outputs)}
    copy.graph.outputs.extend(made[name] for name in tensors if name not in present)
    return copy


def _observe(
    model: Model,
    batches: Iterable[Mapping[str, Array]],
    seen: Statistics,
    target: Target | None,
    progress: Progress | None = None,
) -> Statistics:
    names = seen.names()
    runner = Runner(tapped(model, names), target)
    total = length_hint(batches, -1)  # -1 where a source cannot know
    for index, feeds in enumerate(batches):
        values = runner.run(feeds, [name for name in names if name not in feeds])
        for name in names:
            seen.update(name, np.asarray(values[name] if name in values else feeds[name]))
        if progress:
            progress("calibrating", index + 1, None if total < 0 else total)
    return seen


def thinning(array: Array) -> int:
    """How sparsely a large array may be counted: every n-th value is enough to see its distribution.

    At least `KEPT` values of each sample are counted, smallest and largest are always exact, and n has no
    factor in common with the sizes of the last two axes, so that no row or column is left out.
    """
    samples = array.shape[0] if array.ndim > 1 else 1
    every = max(array.size // (KEPT * max(samples, 1)), 1)
    plane = math.prod(array.shape[-2:])
    while math.gcd(every, plane) > 1:
        every -= 1
    return every


class Runner:
    """A session that steps down to weaker optimization when the tapped graph does not run at a stronger."""

    def __init__(self, model: Model, target: Target | None) -> None:
        self._model = model
        self._target = target
        self._session: Session | None = None

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Any]:
        if self._session is not None:
            return self._attempt(self._session, feeds, outputs)
        problem = LoadError("no session")
        for level in LEVELS:
            try:
                session = Session(self._model, self._target, optimize=level)
                values = session.run(feeds, outputs)
            except LoadError as error:
                problem = error
                continue
            self._session = session
            return values
        raise CalibrationError(f"the model does not run on the calibration data: {problem}")

    @staticmethod
    def _attempt(session: Session, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Any]:
        try:
            return session.run(feeds, outputs)
        except LoadError as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            raise CalibrationError(f"the model does not run on a batch of {shapes}: {error}") from error


def _in_parallel(
    model: Model, data: CalibrationData, seen: Statistics, target: Target, jobs: int
) -> Statistics:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save(path)
        # One thread per process: the processes are the parallelism.
        work = (
            joblib.delayed(_shard)(path, data.shard(index, jobs), seen, target.with_threads(1))
            for index in range(jobs)
        )
        for part in joblib.Parallel(n_jobs=jobs)(work):
            seen.merge(part)
    return seen


def _shard(path: Path, data: CalibrationData, seen: Statistics, target: Target) -> Statistics:
    return _observe(load(path), data, seen, target)


def _require_usable(name: str, seen: Histogram, is_input: bool) -> None:
    if is_input and (seen.nan or seen.posinf or seen.neginf):
        counts = f"{seen.nan} NaN and {seen.posinf + seen.neginf} infinite values"
        raise CalibrationError(f"input '{name}' of the calibration data holds {counts}")
    if not seen.count and not seen.irregular:
        raise CalibrationError(f"no sample of the calibration data reached tensor '{name}'")


def merge(parts: Sequence[Histogram]) -> Distribution:
    """The distribution over several tensors that are to share one scale."""
    whole = Histogram(parts[0].bins)
    for part in parts:
        whole.merge(part)
    return whole.result()


def is_mask(values: Array) -> bool:
    """Whether a constant holds infinities or mask values, which must not set a range."""
    if values.size == 0:
        return False
    histogram = Histogram()
    histogram.update(np.asarray(values))
    return bool(histogram.irregular)
