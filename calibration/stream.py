"""The one loop that runs a model over data: batch by batch, with the tensors that somebody wants to see.

Tensors are tapped as extra outputs of the model, with ONNX Runtime's optimizations left on: only those that
survive fusion are worth a tap, and the rest of the network runs as fast as it will later. Nothing is kept of
a batch but what its observers make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.feeds import batch_samples
from onnxslim.errors import CalibrationError, LoadError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Positions
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

Progress: TypeAlias = Callable[[str, int, int | None], None]
Values: TypeAlias = dict[str, Array]
Channels: TypeAlias = tuple[str, int]  # a tensor and the axis that runs over its channels
T = TypeVar("T")

# Levels of ONNX Runtime's optimization, tried in turn: a fusion may swallow a tensor that is tapped.
LEVELS = ("all", "basic", "none")


@dataclass(frozen=True)
class Batch(Generic[T]):
    """What one batch made, and where its samples stand among all.

    Attributes:
        values: what the run gave.
        first: number of samples in the batches before.
        samples: number of samples in this one.
        total: number of samples in all.
    """

    values: T
    first: int
    samples: int
    total: int

    def positions(self, count: int, rows: int, seed: int = 0) -> Positions:
        """Which of `count` positions of a tensor to look at, for about `rows` in all batches."""
        quota = max(-(-rows // max(self.total, 1)), 1)
        return sampled(count, self.samples, self.first, quota, seed)


def stream(
    data: CalibrationData | Sequence[Mapping[str, Array]],
    run: Callable[[int, Mapping[str, Array]], T],
    *,
    progress: Progress | None = None,
    what: str = "observing",
) -> Iterator[Batch[T]]:
    """Run something on batch after batch.

    Args:
        data: batches of inputs.
        run: from the number of a batch and its inputs to what is to be seen of it, such as `Taps`.
        progress: called with (what, batches done, batches in all) when a batch was looked at.
        what: what is done, in a word.
    """
    batches = length_hint(data, -1)  # -1 where a source cannot know
    total = data.samples() if isinstance(data, CalibrationData) else sum(map(batch_samples, data))
    first = 0
    for index, feeds in enumerate(data):
        samples = batch_samples(feeds)
        yield Batch(run(index, feeds), first, samples, total)
        first += samples
        if progress:
            progress(what, index + 1, None if batches < 0 else batches)


class Taps:
    """Runs a model for the values of some of its tensors: inputs, outputs or in between.

    Args:
        model: not modified.
        names: of tensors of the main graph.
        target: where to run; processors by default.
    """

    def __init__(self, model: Model, names: Sequence[str], target: Target | None = None) -> None:
        self._names = list(dict.fromkeys(names))
        self._defaults = {name: each.values for name, each in model.graph.defaults.items() if name in names}
        self._runner = Runner(tapped(model, self._names), target)

    def __call__(self, _: int, feeds: Mapping[str, Array]) -> Values:
        """Values of the tensors, and of the inputs, in one batch; of an input left out, its default.

        Raises:
            CalibrationError: the model does not run on it.
        """
        given = {**self._defaults, **feeds}
        return {**given, **self._runner.run(feeds, [name for name in self._names if name not in given])}


def tapped(model: Model, tensors: Sequence[str]) -> Model:
    """A copy of the model in which these tensors are outputs too."""
    copy = model.copy()
    made = {tensor.name: tensor for node in copy.graph.nodes for tensor in node.outputs}
    present = {tensor.name for tensor in (*copy.graph.inputs, *copy.graph.outputs)}
    copy.graph.outputs.extend(made[name] for name in tensors if name not in present)
    return copy


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
                session = Session(self._model, self._target, optimize=level, spin=False)
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


def sampled(rows: int, samples: int, first: int, quota: int, seed: int = 0) -> Positions:
    """Positions of a batch to look at: one at random from each of `quota` equal stretches per sample.

    Args:
        rows: positions in the batch.
        samples: samples in the batch.
        first: number of samples in the batches before; which positions are chosen for a sample depends on its
            number and not on how the samples were cut into batches.
        quota: positions per sample; all are taken where there are no more.
        seed: of the choice.
    """
    if quota * samples >= rows:
        return np.arange(rows)
    ends = np.arange(quota * samples + 1) * rows // (quota * samples)
    chance = _uniform(np.arange(first * quota, (first + samples) * quota, dtype=np.uint64), seed)
    return ends[:-1] + (chance * np.diff(ends)).astype(np.intp)


def _uniform(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1), a function of each number and the seed (the mixer of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(seed * 0x632BE5AB + 1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.asarray((z >> np.uint64(11)) * 2.0**-53)
