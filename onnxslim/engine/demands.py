"""What a lossy pass is asked to keep of the outputs, and how it meets that by doing less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Protocol, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from pydantic import Field

from onnxslim.calibration.fidelity import FAILED, Judge, Score
from onnxslim.calibration.samples import SAMPLES
from onnxslim.engine.allocate import fewest
from onnxslim.engine.base import Context, Pass
from onnxslim.errors import LoadError, TimeUp, UsageError
from onnxslim.formats import percent
from onnxslim.ir.model import Model
from onnxslim.runtime.metric import measure

KEPT = "signal to noise, in dB, that the worst part of the outputs is to keep on the samples to choose by"
# The options of every pass that can do less: `require_sqnr: LeastSqnr = None`, `max_drop: MostDrop = None`.
LeastSqnr: TypeAlias = Annotated[
    float | None, Field(description=f"{KEPT}; less is done until it does, and nothing if that is in vain")
]
MostDrop: TypeAlias = Annotated[
    float | None,
    Field(
        ge=0,
        description="how much less than before the metric of the result may be; less is done until it holds. "
        "The metric is `metric=` of the pipeline, or `--metric`, or accuracy on labels; without one, the "
        "largest output may be another one for this share of the samples",
    ),
]
# In dB: by how much noise goes down at a time where it is not noise that is too much.
STEP = 1.0
# An amount is found to within so many parts of it.
LEVELS = 16


class FidelityGoal:
    """Least fidelity of the outputs, and the most that a metric, or the share of equal decisions, may drop.

    Args:
        whose: name of the pass that is to keep so much.
        sqnr: in dB, on the samples judged on; None for anything.
        max_drop: how much less than the model's the metric of a candidate may be; None for anything.
        model: as it is before the pass.
        ctx: with the metric, if there is one.

    Raises:
        UsageError: the metric fails.
    """

    def __init__(
        self, whose: str, sqnr: float | None, max_drop: float | None, model: Model, ctx: Context
    ) -> None:
        self.sqnr = sqnr
        self._whose, self._max_drop, self._ctx = whose, max_drop, ctx
        self._values: WeakKeyDictionary[Model, float] = WeakKeyDictionary()
        self.before = self.value(model) if max_drop is not None and ctx.metric is not None else None

    def value(self, model: Model) -> float:
        """The metric of a model, measured once."""
        if model not in self._values:
            assert self._ctx.metric is not None
            self._values[model] = measure(self._ctx.metric, model, self._ctx.target)
        return self._values[model]

    def met(self, model: Model, score: Score) -> bool:
        """Whether a candidate keeps enough; see `shortfall`."""
        return not self.shortfall(model, score)

    def missing(self, score: Score) -> float:
        """By how many dB a candidate that does not keep enough should get better."""
        return max((self.sqnr or 0.0) - score.sqnr, 0.0 if self._max_drop is None else STEP)

    def shortfall(self, model: Model, score: Score) -> str:
        """What a candidate that does not keep enough lacks; empty if it lacks nothing.

        Args:
            model: the candidate, which runs.
            score: what it keeps.

        Raises:
            UsageError: there is neither a metric nor an output that decides.
        """
        if score is FAILED:
            return "what was made does not run"
        if self.sqnr is not None and score.sqnr < self.sqnr:
            return f"{score.sqnr:.1f} dB are left, less than require_sqnr={self.sqnr:g}"
        if self._max_drop is None:
            return ""
        if self.before is not None:
            after = self.value(model)
            told = f"the metric drops from {self.before:.6g} to {after:.6g}"
            return f"{told}, more than {self._max_drop:g}" if self.before - after > self._max_drop else ""
        if score.agreement is None:
            raise UsageError(
                f"pass '{self._whose}' with max_drop needs a metric, as no output has shape (batch, classes)"
                ": pass metric= to the pipeline, or --metric, or data with labels, on the command line"
            )
        other = 1.0 - score.agreement
        told = f"{percent(other)} of the decisions are others"
        return f"{told}, more than max_drop={self._max_drop:g}" if other > self._max_drop else ""


class Made(Protocol):
    """What a pass has made, whatever else it knows of it."""

    @property
    def model(self) -> Model:
        """The candidate."""


M = TypeVar("M", bound=Made)


class Demand:
    """A goal, and the samples to choose by to hold candidates to.

    Nothing that is held to it may have been fitted to these samples (`Samples.apart`).

    Args:
        whose, sqnr, max_drop: see `FidelityGoal`.
        model: as it is before the pass; not modified.
        ctx: with data.
        behind: passes that learn behind it (`Pass.behind`). What lacks something is held to it once it has
            learnt, on the samples that are set aside for that.
    """

    def __init__(
        self,
        whose: str,
        sqnr: float | None,
        max_drop: float | None,
        model: Model,
        ctx: Context,
        behind: Sequence[Pass] = (),
    ) -> None:
        original = model.copy()
        self._goal = FidelityGoal(whose, sqnr, max_drop, original, ctx)
        self._judge = Judge(original, ctx.given.tune, ctx.target, SAMPLES)
        self._behind, self._ctx, self._after = behind, ctx, self._judge
        if behind and ctx.given.fresh is not None:  # what was chosen by is learnt from as well
            self._after = Judge(original, ctx.given.fresh, ctx.target, SAMPLES)
        self._tried = 0
        self.shortfall = ""  # of the last candidate that was held to it
        self.refused = ""  # that of the last one that lacked something

    def met(self, model: Model) -> bool:
        """Whether a candidate keeps enough; one that does not run keeps nothing."""
        self._tried += 1
        if self._ctx.progress:
            self._ctx.progress("doing less", self._tried, None)
        score = _scored(model, self._judge)
        self.shortfall = self._goal.shortfall(model, score)
        if self.shortfall and self._behind and score is not FAILED:
            learnt = model.copy()
            for each in self._behind:
                each.run(learnt, self._ctx)
            lacking = self._goal.shortfall(learnt, _scored(learnt, self._after))
            self.shortfall = f"after learning, {lacking}" if lacking else ""
        return not self.shortfall

    def least(self, make: Callable[[int], M], most: int) -> M | None:
        """What is made with the fewest steps back that meets it; None, and `shortfall`, if nothing does.

        Args:
            make: what is made with so many steps back; with more of them it keeps more.
            most: steps back at the most.
        """
        made = make(0)
        if self.met(made.model):
            return made
        found: M | None = None
        self.refused = closest = self.shortfall

        def enough(back: int) -> bool:
            nonlocal found, closest
            trial = make(back)
            if met := self.met(trial.model):
                found = trial
            elif found is None:
                closest = self.shortfall
            if not met:
                self.refused = self.shortfall
            return met

        try:
            fewest(enough, most)
        except TimeUp as error:  # the best so far, if any was good enough
            if found is None:
                raise
            self.refused += f", and {error} before all was tried"
        self.shortfall = "" if found is not None else closest
        return found


def _scored(model: Model, judge: Judge) -> Score:
    """What a model keeps."""
    try:
        return judge(model)
    except LoadError:
        return FAILED


class Demanding(Pass):
    """A pass that can do less.

    It declares both options itself, in their place among its own: `require_sqnr: LeastSqnr = None` and
    `max_drop: MostDrop = None`.
    """

    require_sqnr: float | None
    max_drop: float | None

    @property
    def needs_data(self) -> bool:
        """To hold candidates to what is asked for."""
        return self.require_sqnr is not None or self.max_drop is not None

    def demand(self, model: Model, ctx: Context) -> Demand | None:
        """What is asked for, of the outputs of a model; None if that is nothing.

        Raises:
            CalibrationError: there is no data.
            UsageError: the metric fails.
        """
        if self.require_sqnr is None and self.max_drop is None:
            return None
        self.require_data(ctx.data)
        return Demand(self.name, self.require_sqnr, self.max_drop, model, ctx, self.behind)
