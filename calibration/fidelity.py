"""How well a candidate keeps the outputs of the original, on samples held out of what it was made with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeAlias

import numpy as np

from onnxslim import shapes
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.feeds import batch_samples
from onnxslim.calibration.noise import Noise, noise_of
from onnxslim.calibration.sources.arrays import Feeds
from onnxslim.ir.graph import MASK_MAGNITUDE, Array, Dim, Tensor, producer
from onnxslim.ir.model import Model
from onnxslim.ops import Trait, has
from onnxslim.runtime.isolated import WorkerEnded
from onnxslim.runtime.session import Session, no_latency
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import compare, slowdown

MATCHES = ("Concat", "Transpose")

# Samples and bytes of reference outputs that are enough to rank candidates.
SAMPLES = 32
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Score:
    """Fidelity of a candidate.

    Attributes:
        sqnr: signal to noise, in dB, of the part of the outputs that lost most; infinite if nothing changed.
        error: squared error over variance, averaged over parts; 0 if nothing changed.
        parts: `sqnr` by output, or by joined part of it.
        agreement: share of samples whose largest element is where it was, of outputs that look like classes;
            None if there are none.
    """

    sqnr: float
    error: float
    parts: Mapping[str, float]
    agreement: float | None

    @property
    def noise(self) -> float:
        """Power of the noise by that of the signal, in the part that lost most."""
        return noise_of(self.sqnr)


FAILED = Score(-math.inf, math.inf, {}, None)


@dataclass(frozen=True)
class OutputPart:
    """An output, or a slice of it along one axis.

    Attributes:
        name: what reports call it.
        output: the output.
        axis, start, stop: the slice; all of the output where there is no stop.
    """

    name: str
    output: str
    axis: int = 0
    start: int = 0
    stop: int | None = None

    def of(self, values: Mapping[str, Any]) -> Any:
        """Its values: an array, or whatever else an output is that has no parts."""
        array = values[self.output]
        if self.stop is None:
            return array
        index = [slice(None)] * array.ndim
        index[self.axis] = slice(self.start, self.stop)
        return array[tuple(index)]


Run: TypeAlias = Callable[[int, Mapping[str, Array]], Mapping[str, Any]]


class Judge:
    """Compares candidates with the model they were made of.

    Args:
        model: the original.
        data: samples to judge on.
        target: where candidates run.
        samples: how many to use: whole batches from the beginning, until there are as many.
        optimize: how far ONNX Runtime may optimize the original; see `Session`.
        clear: in dB; a candidate that has kept that much of half of the samples is not run on the others.
        opened: whether candidates are known to open. Else the first one is opened in a process of its own
            before, and if that ends there, all others.
    """

    def __init__(
        self,
        model: Model,
        data: CalibrationData,
        target: Target,
        samples: int = SAMPLES,
        *,
        optimize: str = "all",
        clear: float = math.inf,
        opened: bool = False,
    ) -> None:
        self._target = target
        self._apart, self._deadly = not opened, False
        self._model = model
        self._optimize = optimize
        self._clear = clear
        self._half = samples // 2
        self._left = _limited(data.bind(model.inputs()), samples)
        self._size = 0
        self._feeds: list[Mapping[str, Array]] = []
        self._expected: list[Mapping[str, Array]] = []
        self._extend(samples if clear == math.inf else self._half)
        self._parts = self._looked_at()
        self._references: dict[tuple[int, int], _Reference | None] = {}

    def _extend(self, samples: float) -> None:
        """Run the original on more batches, of that many samples at least."""
        session: Session | None = None
        while samples > 0 and self._size < MAX_BYTES and (feeds := next(self._left, None)) is not None:
            session = session or Session(self._model, self._target, optimize=self._optimize, spin=False)
            found = _arrays(session.run(feeds))
            self._feeds.append(feeds)
            self._expected.append(found)
            self._size += sum(array.nbytes for array in (*feeds.values(), *found.values()))
            samples -= batch_samples(feeds)

    @property
    def seen(self) -> int:
        """Samples that the original was run on so far."""
        return sum(map(batch_samples, self._feeds))

    def _looked_at(self) -> list[OutputPart]:
        """All parts in floating point; of models that have none, all."""
        parts = list(chain.from_iterable(parts_of(self._model).values()))
        first = self._expected[0] if self._expected else {}
        floats = [part for part in parts if part.output in first and first[part.output].dtype.kind == "f"]
        return floats or parts

    def __call__(self, model: Model, samples: int | None = None) -> Score:
        """Judge a candidate, as ONNX Runtime runs it, on all samples or on batches of about as many.

        Raises:
            LoadError: it does not run.
        """
        if self._apart:
            self._open_apart(model)
        session = Session(model, self._target, spin=False)
        return self.judged(lambda _, feeds: session.run(feeds), samples)

    @property
    def decides(self) -> bool:
        """Whether an output has a largest value of each sample, which could be another one."""
        return any(True for first in self._expected[:1] for _ in _decisions(first, first))

    @property
    def is_wary(self) -> bool:
        """Whether candidates may end the process that opens them, and are opened in another one before."""
        return self._apart

    def judged(self, run: Run, samples: int | None = None) -> Score:
        """Judge what computes the outputs from the number of a batch and its inputs."""
        sums = [Noise() for _ in self._parts]
        same: list[bool] = []
        seen = 0
        for batch, (feeds, expected) in enumerate(self._batches(samples)):
            found = _arrays(run(batch, feeds))
            for number, (part, each) in enumerate(zip(self._parts, sums, strict=True)):
                key = batch, number
                if key not in self._references:
                    self._references[key] = _Reference.of(part.of(expected))
                if (reference := self._references[key]) is not None:
                    reference.compare(each, part.of(found))
            same.extend(_decisions(expected, found))
            seen += batch_samples(feeds)
            if seen >= self._half and self._score(sums, same).sqnr >= self._clear:
                break
        return self._score(sums, same)

    def _open_apart(self, model: Model) -> None:
        try:
            Session(model, self._target, once=True)
        except WorkerEnded:
            self._deadly = True
            raise
        self._apart = self._deadly

    def _score(self, sums: Sequence[Noise], same: Sequence[bool]) -> Score:
        heard = [each.sqnr for each in sums if each.signal > 0]
        errors = [each.noise / each.variation for each in sums if each.variation > 0]
        return Score(
            sqnr=min(heard, default=math.inf),
            error=float(np.mean(errors)) if errors else 0.0,
            parts={part.name: each.sqnr for part, each in zip(self._parts, sums, strict=True)},
            agreement=float(np.mean(same)) if same else None,
        )

    def latencies(self, models: Sequence[Model], seconds: float) -> list[float]:
        """Time of each model on the first batch, relative to the float model's.

        All are timed in turn, on one thread: more would wait for one another on a busy machine.
        """
        single = self._target.with_threads(1)
        _, ratios = compare(
            (self._model, *models), self._feeds[0], single, rounds=20, least=3, seconds=seconds
        )
        return ratios[1:]

    @property
    def untimed(self) -> str:
        """Why times say nothing about the target; empty if they do."""
        return no_latency(self._target)

    def slowdown(self, model: Model) -> float | None:
        """How many times as long as the original a candidate takes, if it certainly takes longer."""
        return slowdown(self._model, model, self._feeds[0], self._target)

    def _batches(self, samples: int | None) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Array]]]:
        seen = index = 0
        while samples is None or seen < samples:
            if index == len(self._feeds):
                self._extend(math.inf)
            if index == len(self._feeds):
                return
            seen += batch_samples(self._feeds[index])
            yield self._feeds[index], self._expected[index]
            index += 1


def _limited(data: Iterable[Feeds], samples: int) -> Iterator[Feeds]:
    """Whole batches from the beginning, until there are as many samples."""
    for feeds in data:
        yield feeds
        samples -= batch_samples(feeds)
        if samples <= 0:
            return


@dataclass(frozen=True)
class _Reference:
    """A part of what the original makes of one batch, without what is no number, or a mask.

    Attributes:
        values: of it.
        shape: of the part.
        ordinary: which of its elements these are; None where that is all.
        sums: over them.
    """

    values: Array
    shape: tuple[int, ...]
    ordinary: Array | None
    sums: Noise

    @classmethod
    def of(cls, expected: Array) -> _Reference | None:
        """Of an array; None where that holds no numbers."""
        if expected.dtype.kind not in "fiu":
            return None
        ordinary = np.abs(expected.astype(np.float64, copy=False)) < MASK_MAGNITUDE
        whole = bool(ordinary.all())
        values = expected if whole else expected[ordinary]
        return cls(values, expected.shape, None if whole else ordinary, Noise.of(values))

    def compare(self, sums: Noise, found: Array) -> None:
        """Take in what a candidate makes instead; of another shape, it says nothing."""
        if found.shape == self.shape:
            sums.take(self.sums, self.values, found if self.ordinary is None else found[self.ordinary])


def _arrays(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs as one array each: a sequence in a row, an optional without a value as nothing."""
    return {name: _in_a_row(value) for name, value in outputs.items()}


def _in_a_row(value: Any) -> Array:
    if value is None:
        return np.empty(0, np.float32)
    if isinstance(value, Sequence) and all(isinstance(each, np.ndarray) for each in value):
        return np.concatenate([each.reshape(-1) for each in value] or [np.empty(0, np.float32)])
    return np.asarray(value)


def _decisions(expected: Mapping[str, Array], found: Mapping[str, Array]) -> Iterator[bool]:
    for name, array in expected.items():
        if array.ndim == 2 and array.dtype.kind == "f" and array.shape[1] > 1:
            yield from (array.argmax(1) == found[name].argmax(1)).tolist()


def parts_of(model: Model) -> dict[str, list[OutputPart]]:
    """For each output by name, the parts that a Concat puts together in it; one, if there is none.

    Boxes and scores have little in common: one error for both would hide what the smaller one loses. Widths
    that the model does not state are inferred.
    """
    joined = {tensor.name: _joined(tensor) for tensor in model.graph.outputs}
    if any(each is not None and None in each[1] for each in joined.values()):
        model = model.copy()
        shapes.infer(model)
        joined = {tensor.name: _joined(tensor) for tensor in model.graph.outputs}
    return {
        name: (each and _pieces(name, *each)) or [OutputPart(name, name)] for name, each in joined.items()
    }


def _joined(output: Tensor) -> tuple[int, list[Dim]] | None:
    """Along which axis of an output a Concat joins parts, and how wide these are; None if none does."""
    where = list(range(len(output.shape or ())))  # for each axis of a tensor, the one of the output
    maker = producer(output)
    while maker is not None and (maker.op == "Transpose" or has(maker, Trait.COPIES)):
        if maker.op == "Transpose":
            perm = maker.attrs.get("perm") or where[::-1]
            where = [where[list(perm).index(axis)] for axis in range(len(where))]
        maker = producer(maker.inputs[0])
    if maker is None or maker.op != "Concat" or not where:
        return None
    axis = maker.attrs["axis"] % len(where)
    return where[axis], [tensor.shape[axis] if tensor.shape else None for tensor in maker.inputs]


def _pieces(output: str, axis: int, widths: Sequence[Dim]) -> list[OutputPart]:
    """Slices of these widths; none if one is not known."""
    known = [width for width in widths if isinstance(width, int)]
    ends = np.cumsum([0, *known]).tolist() if len(known) == len(widths) else []
    return [
        OutputPart(f"{output}[{start}:{stop}]", output, axis, start, stop)
        for start, stop in pairwise(ends)
        if stop > start
    ]
