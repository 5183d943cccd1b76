"""Trials made: a recipe for each, run on the original, and what came of it measured."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import Subset
from onnxslim.engine.base import Context
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import OnnxSlimError, UsageError
from onnxslim.ir.download import download
from onnxslim.ir.model import Model
from onnxslim.passes.distill import Distill
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Outcome, Recipe
from onnxslim.runtime.metric import Metric, measure
from onnxslim.runtime.targets import Target
from onnxslim.search.chains import Moves, Structures, encodings
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.place import Workplace
from onnxslim.search.trials import SearchTrial, Wish, filed
from onnxslim.shapes import cost

# Seconds to time one trial.
TIMED = 1.0


@dataclass(frozen=True)
class TrialMade:
    """A trial that was made.

    Attributes:
        trial: what came of it.
        recipe: that it was made by, its plans in it; None if there was none to be had.
        outcome: what that gave, where it is at hand; None if it failed.
    """

    trial: SearchTrial
    recipe: Recipe | None
    outcome: Outcome | None = None


class TrialBench:
    """Measures models against the original, on some samples.

    Args:
        original: what they are made of.
        subset: samples to measure on, with their labels if there are any.
        target: where to run.
        metric: of the user's; accuracy if there are labels and it is not given.
        shapes: of the inputs, to count for.
    """

    def __init__(
        self,
        original: Model,
        subset: Subset,
        target: Target,
        metric: Metric | None,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._original, self._target, self._shapes = original, target, shapes
        self._judge = Judge(original, subset.data, target, subset.data.samples())
        self._metric, self._of_user = metric or subset.metric, metric is not None
        self.samples = self._judge.seen
        # A metric that fails is told before any trial.
        self._before = None if self._metric is None else measure(self._metric, original, target)
        if self._before is not None and math.isinf(self._before):
            raise UsageError(f"the metric of the original is {self._before}, which nothing compares with")

    def require_measurable(self, goals: Goals) -> None:
        """Refuse goals in what cannot be measured here.

        Raises:
            UsageError: names the goal, and why.
        """
        if goals.latency is not None and self._judge.untimed:
            raise UsageError(f"the goal latency needs times: {self._judge.untimed}")
        if goals.macs is not None and not self._footprint[2]:
            raise UsageError("the goal macs needs multiply-accumulates, and none are known of this model")
        if goals.max_drop is None or self._of_user:
            return
        if self._metric is None and not self._judge.decides:
            raise UsageError(
                "the goal max_drop needs a metric or labels, as no output has shape (batch, classes)"
            )
        if goals.max_drop >= 1:
            raise UsageError(f"the goal max_drop={goals.max_drop:g} may be all: 0.01 is one in a hundred")

    @cached_property
    def _footprint(self) -> tuple[int, int, int | None]:
        return _footprint(self._original, self._shapes)

    def __call__(self, model: Model, seconds: float, *, timed: bool = True) -> TrialFigures:
        """What is measured of a model.

        Raises:
            LoadError: it does not run.
            UsageError: the metric fails.
        """
        score = self._judge(model)
        size, sent, macs = (
            None if now is None or not before else now / before
            for now, before in zip(_footprint(model, self._shapes), self._footprint, strict=True)
        )
        assert size is not None
        assert sent is not None
        metric, latency = None, None
        if self._metric is not None and self._before is not None:
            metric = self._before, measure(self._metric, model, self._target)
        if timed and not self._judge.untimed:
            (latency,) = self._judge.latencies([model], TIMED)
        return TrialFigures(score.sqnr, score.agreement, metric, latency, size, sent, macs, seconds)


def _footprint(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int | None]:
    """Bytes, bytes once deflated, and multiply-accumulates."""
    return model.stats().bytes, download(model).deflate, cost.macs(model, dict(shapes))


class Workbench:
    """Makes trials of one search and measures them, in whichever process.

    Args:
        place: what they have in common.
        moves: what could be left away, where somebody has found that out; found when it is first needed.

    Attributes:
        figures: measures what came of trials, on samples to choose by.

    Raises:
        UsageError: the metric fails.
    """

    def __init__(self, place: Workplace, moves: Moves | None = None) -> None:
        self.place = place
        self.figures = TrialBench(place.model, place.chooses, place.target, place.metric, place.sizes)
        self._encodings = encodings(place.goals, place.target, place.effort)
        self._moves = moves

    @cached_property
    def structures(self) -> Structures:
        """What can be left away."""
        place = self.place
        slimmed = Pipeline(Slim(), count=False)(place.model, target=place.target).model
        learning = (Distill(effort=place.effort),) if place.distill else ()
        ctx = Context(place.target, place.samples, place.seed)
        return Structures(slimmed, ctx, place.effort, learning, self._moves)

    def tried(self, key: str, wish: Wish) -> TrialMade:
        """Make and measure a trial; one that fails says why."""
        start = time.perf_counter()
        recipe, outcome, figures, error = None, None, None, ""
        try:
            left = self.structures(wish.structure, wish.cut)
            recipe = self.place.recipe((Slim(), *left, *self._encodings[wish.encoding]))
            outcome = self._run(recipe)
            error = _idle(outcome)
            if not error:
                figures = self.figures(outcome.model, time.perf_counter() - start)
        except OnnxSlimError as failed:
            error = str(failed)
        return TrialMade(wish.trial(key, figures, error), recipe, None if error else outcome)

    def _run(self, recipe: Recipe) -> Outcome:
        """Run a recipe; what a model says of how it was made depends on whether plans are files."""
        if not self.place.kept:
            return self.place.run(recipe)
        with tempfile.TemporaryDirectory() as folder:
            return self.place.run(filed(recipe, Path(folder)))


def _idle(outcome: Outcome) -> str:
    """What passes that were to do something have not done; empty if all did."""
    idle = (step for step in outcome.report.steps[1:] if step.error or not step.changes)
    return "; ".join(f"{step.name} {step.outcome}" for step in idle)
