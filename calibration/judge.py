"""How well a candidate keeps the outputs of the float model, on samples it was not calibrated on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.graph import MASK_MAGNITUDE, Array, Dim, Tensor, producer
from onnxslim.model import Model
from onnxslim.runtime import Session, Target, latencies

# Samples and bytes of reference outputs that are enough to rank candidates.
SAMPLES = 16
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Score:
    """Fidelity of a candidate.

    Attributes:
        sqnr: signal to quantization noise, in dB, of the part of the outputs that lost most; infinite if
            nothing changed.
        noise: share of noise in the signal, of that part.
        parts: the same in dB by output, or by joined part of it.
        agreement: share of samples whose largest element is where it was, of outputs that look like classes;
            None if there are none.
    """

    sqnr: float
    parts: Mapping[str, float]
    agreement: float | None

    @property
    def noise(self) -> float:
        """Power of the noise by that of the signal, in the part that lost most."""
        return float(10.0 ** (-self.sqnr / 10.0))


@dataclass(frozen=True)
class _Part:
    """A slice of an output along one axis."""

    name: str
    output: str
    axis: int = 0
    start: int = 0
    stop: int | None = None

    def of(self, values: Mapping[str, Any]) -> Array:
        array = np.asarray(values[self.output])
        if not array.ndim:
            return array
        index = [slice(None)] * array.ndim
        index[self.axis] = slice(self.start, self.stop)
        return array[tuple(index)]


class Judge:
    """Compares candidates with a float model.

    Args:
        model: the float model.
        data: samples to judge on; the first `SAMPLES` of them are used.
        target: where candidates run.
    """

    def __init__(self, model: Model, data: CalibrationData, target: Target) -> None:
        self._target = target
        self._parts = [part for tensor in model.graph.outputs for part in _parts_of(tensor)]
        self._model = model
        session = Session(model, target)
        self._feeds: list[Mapping[str, Array]] = []
        self._expected: list[Mapping[str, Any]] = []
        samples = size = 0
        for feeds in data.bind(model.inputs()):
            found = session.run(feeds)
            self._feeds.append(feeds)
            self._expected.append(found)
            samples += _samples(feeds)
            size += sum(np.asarray(array).nbytes for array in (*feeds.values(), *found.values()))
            if samples >= SAMPLES or size >= MAX_BYTES:
                break

    def __call__(self, model: Model, samples: int = SAMPLES) -> Score:
        """Judge a candidate, as ONNX Runtime runs it, on batches of about as many samples.

        Raises:
            LoadError: it does not run.
        """
        session = Session(model, self._target)
        signal, noise = np.zeros(len(self._parts)), np.zeros(len(self._parts))
        same: list[bool] = []
        for feeds, expected in self._batches(samples):
            found = session.run(feeds)
            for index, part in enumerate(self._parts):
                power, error = _powers(part.of(expected), part.of(found))
                signal[index] += power
                noise[index] += error
            same.extend(_decisions(expected, found))
        ratios = {part.name: _decibels(s, n) for part, s, n in zip(self._parts, signal, noise, strict=True)}
        heard = [ratios[part.name] for part, power in zip(self._parts, signal, strict=True) if power > 0]
        return Score(min(heard, default=math.inf), ratios, float(np.mean(same)) if same else None)

    def latencies(self, models: Sequence[Model], seconds: float) -> list[float]:
        """Time of each model on the first batch, relative to the float model's.

        All are timed in turn, on one thread: more would wait for one another on a busy machine.
        """
        single = self._target.with_threads(1)
        sessions = [Session(model, single) for model in (self._model, *models)]
        return latencies(sessions, self._feeds[0], rounds=20, seconds=seconds)[1][1:]

    def _batches(self, samples: int) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Any]]]:
        seen = 0
        for feeds, expected in zip(self._feeds, self._expected, strict=True):
            if seen >= samples:
                return
            seen += _samples(feeds)
            yield feeds, expected


def _samples(feeds: Mapping[str, Array]) -> int:
    return next((len(array) for array in feeds.values() if array.ndim), 1)


def _powers(expected: Array, found: Array) -> tuple[float, float]:
    """Power of a signal and of what was added to it; what is no number, or a mask, is left out."""
    if expected.dtype.kind not in "fiu" or expected.shape != found.shape:
        return 0.0, 0.0
    reference = expected.astype(np.float64)
    ordinary = np.abs(reference) < MASK_MAGNITUDE
    reference = reference[ordinary]
    error = float(np.square(found[ordinary].astype(np.float64) - reference).sum())
    return float(np.square(reference).sum()), error if math.isfinite(error) else math.inf


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def _decisions(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[bool]:
    for name, reference in expected.items():
        array = np.asarray(reference)
        if array.ndim == 2 and array.dtype.kind == "f" and array.shape[1] > 1:
            yield from (array.argmax(1) == np.asarray(found[name]).argmax(1)).tolist()


def _parts_of(output: Tensor) -> list[_Part]:
    """An output, or what a Concat puts together in it: boxes and scores have little in common.

    One error for both would hide what the smaller one loses.
    """
    whole = [_Part(output.name, output.name)]
    where = list(range(len(output.shape or ())))  # for each axis of a tensor, the one of the output
    maker = producer(output)
    while maker is not None and maker.op in ("Identity", "Transpose"):
        if maker.op == "Transpose":
            perm = maker.attrs.get("perm") or where[::-1]
            where = [where[list(perm).index(axis)] for axis in range(len(where))]
        maker = producer(maker.inputs[0])
    if maker is None or maker.op != "Concat" or not where:
        return whole
    axis = maker.attrs["axis"] % len(where)
    widths = [tensor.shape[axis] if tensor.shape else None for tensor in maker.inputs]
    return _pieces(output.name, where[axis], widths) or whole


def _pieces(output: str, axis: int, widths: Sequence[Dim]) -> list[_Part]:
    """Slices of these widths; none if one is not known."""
    known = [width for width in widths if isinstance(width, int)]
    ends = np.cumsum([0, *known]).tolist() if len(known) == len(widths) else []
    return [
        _Part(f"{output}[{start}:{stop}]", output, axis, start, stop)
        for start, stop in pairwise(ends)
        if stop > start
    ]
