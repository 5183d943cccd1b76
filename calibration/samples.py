"""The one split of calibration data: what passes fit on, what they choose by, and what none of them sees.

What a pass was fitted to, or chosen by, it does well on. How good a result is can only be said on samples
that no pass has had to do with, so that all passes of a pipeline share one split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.feeds import batch_samples
from onnxslim.calibration.sources.arrays import Feeds
from onnxslim.errors import CalibrationError, LoadError, UsageError
from onnxslim.ir.graph import Array, Variable
from onnxslim.ir.model import Model
from onnxslim.runtime.metric import Metric, accuracy
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.shapes.cost import sized

# The most samples to choose by, and the most to hold out: more move what is measured by less than a network
# differs from one sample to the next.
SAMPLES = 64
# The part of all samples to choose by, and to hold out. Those to choose by are fitted on as well in the end;
# what is held out is lost for that: of 64 images an eighth costs a pruned ResNet 0.6 dB (decision 61).
TUNE, HELD = 1 / 4, 1 / 16
# The part to choose among states of weights by while they are learnt, where a pass does that, and the most of
# them: what layers were fitted to in closed form, or chosen by, looks better than it is (decision 90).
FRESH, MOST_FRESH = 1 / 8, 512
# Fewer samples than these say too little to be worth what they are missed for.
LEAST_TUNED, LEAST_HELD = 4, 8
# Samples that a model is run on at a time, and bytes of their inputs and outputs, and of all that is computed
# in between, at most: passes look at much of that at once, and larger groups save no time (decision 119).
GROUP = 8
MAX_BYTES, MAX_INNER_BYTES = 4 << 20, 128 << 20
# Largest difference, relative to the largest magnitude, at which a sample counts as computed by itself.
ALONE = 1e-3


# What samples are that results are judged by: held out of everything, or test data; some that passes were
# fitted on, or chosen by; or made up.
Whose: TypeAlias = Literal["held out", "fitted on", "made up"]


class Subset(NamedTuple):
    """Some of the samples.

    Attributes:
        data: they.
        labels: the class of each, in their order; None where nobody said.
    """

    data: CalibrationData
    labels: Array | None

    @property
    def metric(self) -> Metric | None:
        """Accuracy by the labels; None without."""
        return None if self.labels is None else accuracy(self.data, self.labels)


class _Parts(NamedTuple):
    fit: Subset
    tune: Subset
    held: Subset | None
    halves: tuple[Subset, Subset] | None
    fresh: Subset | None
    apart: bool


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a pipeline's data, split when they are first asked for.

    Where the model computes each sample by itself, samples are split and regrouped one by one: what comes out
    does not depend on how they were grouped into batches. Other batches (of a fixed size, of one time step
    after the other, of boxes from all images) are left whole and split as they are.

    Args:
        data: all of it.
        model: what it is for; run on two samples to see whether they depend on each other.
        target: where to run it.
        seed: of the choice of samples.
        labels: the class of every sample of the data, in its order, shape (samples,).
        holding: whether some are held out, if there are enough.
        hold_out: the share of them; by default at most `SAMPLES`.
        test: other samples, to judge results by; none of the data are held out then.
        learning: whether some are set aside for passes that learn, if there are enough.

    Raises:
        UsageError: the seed is negative.
        CalibrationError: when split: the data does not fit the model, or there is none, or there are more or
            fewer labels than samples.
    """

    data: CalibrationData
    model: Model
    target: Target = field(default_factory=Target.cpu)
    seed: int = 0
    labels: Array | None = None
    holding: bool = True
    test: Subset | None = None
    hold_out: float = HELD
    learning: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"the seed {self.seed} is negative: give 0 or more")

    @property
    def fit(self) -> CalibrationData:
        """Samples to fit on, and to take statistics of."""
        return self._parts.fit.data

    @property
    def tune(self) -> CalibrationData:
        """Samples to choose by; those to fit on where there are too few to set some aside (`tuned`)."""
        return self._parts.tune.data

    @property
    def held(self) -> CalibrationData | None:
        """Samples to judge results by, which no pass may fit on or choose by; None if there are too few."""
        return self._parts.held.data if self._parts.held else None

    @property
    def fresh(self) -> CalibrationData | None:
        """Samples to choose among states of weights by, which nothing else fits on or chooses by.

        None where no pass learns, or there are too few.
        """
        return self._parts.fresh.data if self._parts.fresh else None

    @property
    def labelled(self) -> tuple[Array | None, Array | None]:
        """The class of every sample in `seen`, and of every fresh one; None where nobody said."""
        fresh = self._parts.fresh
        return self._seen.labels, fresh.labels if fresh else None

    @property
    def by_sample(self) -> bool:
        """Whether the model computes every sample by itself."""
        return self._parts.apart

    @property
    def judged(self) -> Subset:
        """What results are judged by: the samples held out, or all of them if they are too few for that."""
        return self._parts.held or self._seen

    @property
    def halves(self) -> tuple[Subset, Subset] | None:
        """Those held out of the data in two: to choose among results by, and to judge what was chosen."""
        return self._parts.halves

    @property
    def whose(self) -> Whose:
        """What those are."""
        return "held out" if self._parts.held else "fitted on"

    @property
    def tuned(self) -> bool:
        """Whether the samples to choose by are others than those to fit on."""
        return self.tune is not self.fit

    @property
    def split(self) -> tuple[CalibrationData, CalibrationData] | None:
        """Samples to fit on and others to choose a strength by, however few there are; None if there is one.

        What is chosen by the samples it is fitted on follows them wherever they are fewer than its values.
        """
        if self.tuned:
            return self.fit, self.tune
        total = self.fit.samples() if self.by_sample else self.fit.count()
        if total < 2:
            return None
        chosen_by = range(0, total, round(1 / TUNE))
        parts = [each for each in range(total) if each not in chosen_by], [*chosen_by]
        first, second = (
            self.fit.take(each, GROUP) if self.by_sample else self.fit.pick(each) for each in parts
        )
        return first, second

    @cached_property
    def seen(self) -> CalibrationData:
        """Those to fit on and, after them, those to choose by: to fit on once the choice is made."""
        return self._seen.data

    @cached_property
    def _seen(self) -> Subset:
        fit, tune = self._parts[:2]
        if tune is fit:
            return fit
        both = [part.labels for part in (fit, tune) if part.labels is not None]
        return Subset(fit.data.then(tune.data), np.concatenate(both) if both else None)

    @cached_property
    def apart(self) -> Samples:
        """Those to fit on, split again: whatever is made with these can be judged by those to choose by."""
        return replace(self, data=self.fit, labels=None, holding=False, test=None, learning=False)

    @property
    def metric(self) -> Metric | None:
        """Accuracy by the labels on all samples but those held out, for passes to keep; None without."""
        return self._seen.metric

    @property
    def held_metric(self) -> Metric | None:
        """Accuracy by the labels on the samples held out; None without labels, or where none are held out."""
        return self._parts.held.metric if self._parts.held else None

    @cached_property
    def _parts(self) -> _Parts:
        specs = self.model.inputs()
        data = self.data.bind(specs)
        data.check(specs)
        _require_as_many(self.labels, data)
        size = _group(self.model, data, self.target)
        each = 1 if size else max(batch_samples(next(iter(data))), 1)
        total = data.samples() if size else data.count()
        random = np.random.default_rng(self.seed)

        def count(part: float, least: int, most: int = SAMPLES) -> int:
            found = min(int(total * part), math.ceil(most / each))
            return found if found * each >= least else 0

        part_held = self.hold_out if self.holding and self.test is None else 0.0
        most_held = SAMPLES if self.hold_out == HELD else total * each
        held_out = _spread(np.arange(total), count(part_held, LEAST_HELD, most_held), random)
        left = np.setdiff1d(np.arange(total), held_out)
        new = _spread(left, count(FRESH if self.learning else 0.0, LEAST_HELD, MOST_FRESH), random)
        left = np.setdiff1d(left, new)
        chosen_by = _spread(left, count(TUNE, LEAST_TUNED), random)

        def part(numbers: NDArray[np.intp]) -> Subset:
            if size:
                return Subset(data.take(numbers.tolist(), size), self._labels_of(numbers))
            return Subset(data.pick(numbers.tolist()), self._labels_within(numbers))

        fit = part(np.setdiff1d(left, chosen_by))
        held = part(held_out) if held_out.size else self._test()
        halves = (part(held_out[::2]), part(held_out[1::2])) if held_out.size > 1 else None
        fresh = part(new) if new.size else None
        return _Parts(fit, part(chosen_by) if chosen_by.size else fit, held, halves, fresh, bool(size))

    def _test(self) -> Subset | None:
        """The other samples, as the model takes them."""
        if self.test is None:
            return None
        specs = self.model.inputs()
        data = self.test.data.bind(specs)
        data.check(specs)
        _require_as_many(self.test.labels, data)
        return Subset(data, self.test.labels)

    def _labels_of(self, numbers: NDArray[np.intp]) -> Array | None:
        return None if self.labels is None else np.asarray(self.labels)[numbers]

    def _labels_within(self, batches: NDArray[np.intp]) -> Array | None:
        """Of the samples in some batches."""
        if self.labels is None:
            return None
        ends = np.cumsum((0, *self.data.sizes()))
        labels = np.asarray(self.labels)
        return np.concatenate([labels[ends[at] : ends[at + 1]] for at in batches])


def _require_as_many(labels: Array | None, data: CalibrationData) -> None:
    """Raise CalibrationError if there are labels, and not one for every sample."""
    if labels is not None and len(labels) != data.samples():
        raise CalibrationError(f"{data.name}: there are {len(labels)} labels for {data.samples()} samples")


def require_numbers(data: CalibrationData, model: Model, target: Target) -> None:
    """Raise CalibrationError for a sample that spoils the gradients of all weights.

    That is one with a NaN or an infinity; with a negative one, if it is no mask: then it reaches an output.

    Args:
        data: under the model's names.
        model: run on batches with negative infinities.
        target: where.
    """
    first = 0
    for feeds in data:
        for name, values in feeds.items():
            if values.dtype.kind != "f" or np.isfinite(values).all():
                continue
            hides = bool((np.isfinite(values) | np.isneginf(values)).all())
            if not hides or not _is_finite(Session(model, target, spin=False).run(feeds)):
                raise CalibrationError(f"{data.name}: {_odd(values, name, first)}")
        first += batch_samples(feeds)


def _odd(values: Array, name: str, first: int) -> str:
    """Which sample holds what is no number."""
    place = np.argwhere(~np.isfinite(values))[0]
    what = "NaN" if np.isnan(values[tuple(place)]) else "an infinity"
    sample = first + int(place[0]) if values.ndim else first
    return f"sample {sample} of input {name!r} holds {what}; nothing can be learnt from it"


def _is_finite(outputs: Mapping[str, Any]) -> bool:
    found = (x for x in outputs.values() if isinstance(x, np.ndarray) and x.dtype.kind == "f")
    return all(np.isfinite(each).all() for each in found)


def _spread(numbers: NDArray[np.intp], count: int, random: np.random.Generator) -> NDArray[np.intp]:
    """A random number of each of `count` equal stretches: of data that is sorted, some of every kind."""
    ends = np.arange(count + 1) * len(numbers) // max(count, 1)
    return numbers[random.integers(ends[:-1], ends[1:])]


def _group(model: Model, data: CalibrationData, target: Target) -> int:
    """How many samples to run the model on at a time; 0 if it does not compute each by itself.

    That is seen on the first two: together they have to give what each gives alone.
    """
    pair = _first_two(data) or {}
    shapes = [spec.shape for spec in model.inputs() if spec.name in pair]
    if not pair or any(shape and isinstance(shape[0], int) for shape in shapes):
        return 0
    singles = [{name: array[at : at + 1] for name, array in pair.items()} for at in range(2)]
    try:
        session = Session(model, target, spin=False)
        together, *alone = (session.run(feeds) for feeds in (pair, *singles))
    except LoadError:
        return 0
    if not all(_joined(together[name], [each[name] for each in alone]) for name in together):
        return 0
    bytes_of_two = sum(array.nbytes for array in (*pair.values(), *together.values()))
    fits = min(
        2 * MAX_BYTES // max(bytes_of_two, 1), 2 * MAX_INNER_BYTES // max(_inner_bytes(model, pair), 1)
    )
    return int(np.clip(fits, 1, GROUP))


def _inner_bytes(model: Model, feeds: Feeds) -> int:
    """Bytes of all that is computed of some inputs, as far as shapes tell."""
    found = sized(model, {name: array.shape for name, array in feeds.items()}).graph
    return sum(_bytes(tensor) for node in found.nodes for tensor in node.outputs)


def _bytes(tensor: Variable) -> int:
    """What its values take; 0 where its type or a size is not known."""
    sizes = [dim for dim in tensor.shape or () if isinstance(dim, int)]
    if tensor.dtype is None or tensor.shape is None or len(sizes) < len(tensor.shape):
        return 0
    return math.prod(sizes) * tensor.dtype.itemsize


def _first_two(data: CalibrationData) -> Feeds | None:
    """The first two samples as a batch; None where they are not alike, or there are no two."""
    found = list(islice(_singles(data), 2))
    first, second = found if len(found) == 2 else ({}, {})
    shapes = [{name: (array.dtype, array.shape) for name, array in each.items()} for each in (first, second)]
    if not first or shapes[0] != shapes[1]:
        return None
    return {name: np.concatenate((array, second[name])) for name, array in first.items()}


def _singles(data: CalibrationData) -> Iterator[Mapping[str, Array]]:
    """Samples one by one, as long as all inputs have as many of them."""
    for feeds in data:
        if len({array.shape[:1] or None for array in feeds.values()}) != 1 or not batch_samples(feeds):
            return
        for at in range(batch_samples(feeds)):
            yield {name: array[at : at + 1] for name, array in feeds.items() if array.ndim}


def _joined(together: Any, alone: list[Any]) -> bool:
    """Whether what a model made of several samples is what it makes of each; of a sequence nobody knows."""
    if not isinstance(together, np.ndarray) or not together.ndim:
        return False
    if any(each.shape != (1, *together.shape[1:]) for each in alone):
        return False
    parts = np.concatenate(alone)
    if together.dtype.kind not in "fc" or not together.size:
        return np.array_equal(together, parts)
    margin = ALONE * float(np.abs(together, where=np.isfinite(together), out=np.zeros_like(together)).max())
    return bool(np.allclose(together, parts, rtol=0.0, atol=margin, equal_nan=True))
