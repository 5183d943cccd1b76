"""Ranges, histograms and channel means of inner tensors, from one pass over calibration data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import ChannelMeans, Distribution, Histogram
from onnxslim.calibration.stream import Channels, Progress, Taps, stream
from onnxslim.errors import CalibrationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.runtime.targets import Target


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
            every = thinning(array)
            # What is left out of a sample does not depend on those beside it.
            for part in array if every > 1 and array.ndim > 1 else (array,):
                self.histograms[name].update(part, every=every)
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


def collect(
    model: Model,
    data: CalibrationData,
    tensors: Sequence[str],
    *,
    channels: Sequence[Channels] = (),
    target: Target | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    empty: bool = False,
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
        empty: whether tensors may have no elements in all batches, as a cache that nothing is in yet; their
            histograms are empty then.

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
        _require_usable(name, histogram, name in inputs, empty)
    return found


def _observe(
    model: Model,
    data: CalibrationData,
    seen: Statistics,
    target: Target | None,
    progress: Progress | None = None,
) -> Statistics:
    names = seen.names()
    for batch in stream(data, Taps(model, names, target), progress=progress, what="calibrating"):
        for name in names:
            seen.update(name, batch.values[name])
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


def _require_usable(name: str, seen: Histogram, is_input: bool, empty: bool) -> None:
    if is_input and (seen.nan or seen.posinf or seen.neginf):
        counts = f"{seen.nan} NaN and {seen.posinf + seen.neginf} infinite values"
        raise CalibrationError(f"input '{name}' of the calibration data holds {counts}")
    if not empty and not seen.count and not seen.irregular:
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
