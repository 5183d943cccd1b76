"""What a search starts from, and what it ends with."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples, Subset
from onnxslim.engine.base import Context, Effort
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError, UsageError, ValidationError
from onnxslim.formats import percent
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, source_sha256
from onnxslim.passes.distill import Distill
from onnxslim.passes.slim import Slim
from onnxslim.recipes.data import Batches, Data
from onnxslim.recipes.recipe import Outcome, Recipe
from onnxslim.runtime.machine import fingerprint
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.profile import require_usable
from onnxslim.runtime.targets import Target
from onnxslim.search.chains import Chain, Structures, encodings
from onnxslim.search.explore import CORRECTIONS, Explorer, OutOfTime
from onnxslim.search.fronts import front
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.making import TrialBench, Workshop
from onnxslim.search.trials import Ledger, SearchTrial
from onnxslim.shapes.given import InputShapes, one_sample, with_sizes
from onnxslim.version import version

# Share of the data that trials are measured on: half of it to choose by, and half to judge what was chosen.
HOLD_OUT = 0.25
# Samples, as `CalibrationData.of` takes them or as users name them, and the class of each.
Labelled: TypeAlias = tuple[Any, "Array | None"]


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        model: of the best trial; the original, slimmed, where none meets the goals.
        outcome: how the model came about: its report, and its recipe; None where none meets the goals.
        best: that trial; None if there is none.
        verified: what was measured of it on samples that nothing was chosen by.
        samples: how many those are; 0 where there are too few to hold some out, and it was measured on those
            that all was chosen by.
        goals: what was asked for, with what is to be kept if nothing was.
        trials: all that were made, in order.
        problem: what no trial meets; empty if one does.
        notes: what was not tried, or could not be looked at.
    """

    model: Model
    outcome: Outcome | None
    best: SearchTrial | None
    verified: TrialFigures | None
    samples: int
    goals: Goals
    trials: tuple[SearchTrial, ...]
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def front(self) -> list[SearchTrial]:
        """Trials that no other one beats in time and in what is kept, the fastest first."""
        return front(self.trials, "latency")

    def require(self) -> SearchResult:
        """Insist on a result.

        Raises:
            ValidationError: no trial meets the goals; says what the nearest one lacks.
        """
        if self.problem:
            raise ValidationError(self.problem)
        return self


class SearchSetup:
    """What trials have in common: the model, the data in its parts, and how a recipe is run.

    Args:
        model: the original.
        data, test: with labels; see `onnxslim.search.optimize`.
        metric, target, seed, libraries, distill: likewise.

    Raises:
        UsageError: PyTorch is wanted, and not installed.
        CalibrationError: the data does not fit the model.
        TargetError: the target is not there.
    """

    def __init__(
        self,
        model: Model,
        data: Labelled,
        test: Labelled,
        metric: Metric | None,
        target: Target,
        seed: int,
        libraries: tuple[str, ...],
        distill: bool,
    ) -> None:
        require_usable(target)
        if distill:
            Distill().require_installed()
        self._distill = distill
        self._model, self._metric, self._seed = model, metric, seed
        self._target, self._libraries = target.with_libraries(libraries), libraries
        # A recipe cannot hold data that is code: it is run with --data then.
        self._named = data[0] if isinstance(data[0], Data) and not data[0].is_function else None
        self._data = _opened(model, *data)
        self._test = None if test[0] is None else _opened(model, *test)
        if metric is None and self._test is not None:
            _require_alike(self._data, self._test)
        given = self._data.data, model, self._target, seed, self._data.labels
        self._samples = Samples(*given, hold_out=HOLD_OUT, learning=distill)
        self._notes: list[str] = []

    def explorer(
        self, goals: Goals, effort: Effort, work: str | os.PathLike[str] | None, shapes: InputShapes
    ) -> Explorer:
        """What makes trials; see `onnxslim.search.optimize`.

        Raises:
            UsageError: the metric fails, or trials are to be kept and it has no name; sizes do not fit.
            SaveError: the folder cannot be made.
        """
        specs = self._model.inputs()
        fed = {name: array.shape for name, array in next(iter(self._data.data)).items()}
        sizes = one_sample(specs, with_sizes(specs, shapes), fed)
        ledger = Ledger(None, {}) if work is None else Ledger(Path(work), self._about(sizes))
        self._choose, self._verify = self._benches(sizes)
        slimmed = Pipeline(Slim(), count=False)(self._model, target=self._target).model
        learning = (Distill(effort=effort),) if self._distill else ()
        ctx = Context(self._target, self._samples, self._seed)
        structures = Structures(slimmed, ctx, effort, learning)
        ways = encodings(goals, self._target, effort)
        self._workshop = Workshop(self._recipe, self._run, self._choose, structures, ways, ledger, effort)
        return Explorer(self._workshop, tuple(ways), goals, effort)

    def result(self, explorer: Explorer) -> SearchResult:
        """The best trial that other samples confirm, or the original where none is."""
        refused = ""
        for trial in self._tried(explorer):
            outcome = self._workshop.outcome(trial)
            verified = self._verify(outcome.model, 0.0)
            lacks = [*explorer.goals.lost(verified), *explorer.goals.over(verified)]
            if not lacks:
                return self._told(explorer, outcome.model, outcome, trial, verified)
            refused = refused or f"the nearest is {trial.label}: on other samples {'; '.join(lacks)}"
        slimmed = self._run(self._recipe((Slim(),))).model
        if not refused and (nearest := explorer.nearest()):
            refused = f"the nearest is {nearest[0].label}: {nearest[1]}"
        problem = f"no result meets the goals; {refused or 'nothing was made'}"
        return self._told(explorer, slimmed, None, None, None, problem)

    def _tried(self, explorer: Explorer) -> Iterator[SearchTrial]:
        """Trials that meet the goals, the best first; behind it, milder ones, should it not hold."""
        for rank, trial in enumerate(explorer.eligible()):
            yield trial
            try:
                for _ in range(0 if rank else CORRECTIONS):
                    milder = explorer.milder(trial)
                    if milder is None:
                        break
                    trial = milder
                    if explorer.meets(trial):
                        yield trial
            except OutOfTime:
                self._notes.append("the time limit left none to try milder ones")

    def _told(
        self,
        explorer: Explorer,
        model: Model,
        outcome: Outcome | None,
        best: SearchTrial | None,
        verified: TrialFigures | None,
        problem: str = "",
    ) -> SearchResult:
        notes = [*self._notes, *filter(None, (explorer.untried, self._coarse(explorer.goals)))]
        trials = tuple(explorer.trials)
        goals = explorer.goals
        samples = 0 if self._verify is self._choose else self._verify.samples
        return SearchResult(model, outcome, best, verified, samples, goals, trials, problem, tuple(notes))

    def _coarse(self, goals: Goals) -> str:
        """That a goal asks for more than the samples can tell, if it does."""
        share = 1.0 / max(self._choose.samples, 1)
        if not goals.max_drop or self._metric is not None or share <= goals.max_drop:
            return ""
        enough = math.ceil(2 / HOLD_OUT / goals.max_drop)
        return (
            f"one of the {self._choose.samples} samples to choose by is {percent(share)} of them, more than "
            f"may be lost, so that none may be: {enough} samples, of which an eighth chooses, would tell"
        )

    def _benches(self, sizes: Mapping[str, tuple[int, ...]]) -> tuple[TrialBench, TrialBench]:
        """What measures trials to choose by, and what was chosen; the same where the samples are."""

        def bench(part: Subset) -> TrialBench:
            return TrialBench(self._model, part, self._target, self._metric, sizes)

        choose, verify = self._parts()
        chosen_by = bench(choose)
        return chosen_by, chosen_by if verify is choose else bench(verify)

    def _parts(self) -> tuple[Subset, Subset]:
        """Samples to choose by, and to judge what was chosen."""
        samples = self._samples
        if self._test is not None:
            if samples.held is None:
                self._notes.append("there are too few samples to choose by others than passes were fitted on")
            return samples.judged, Subset(self._test.data, self._test.labels)
        if samples.halves is not None:
            return samples.halves
        self._notes.append(
            "there are too few samples to hold some out: what is measured is of samples that passes were "
            "fitted on"
        )
        return (samples.judged,) * 2

    def _recipe(self, passes: Chain) -> Recipe:
        return Recipe(
            passes=passes, data=self._named, target=self._target.name, seed=self._seed, hold_out=HOLD_OUT
        )

    def _run(self, recipe: Recipe) -> Outcome:
        return recipe.run(
            self._model,
            data=self._data.data,
            labels=self._data.labels,
            libraries=self._libraries,
            metric=self._metric,
        )

    def _about(self, sizes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
        """All that figures of trials depend on, besides what is tried; of inputs, the sizes to count for."""
        data, labels = self._data.data, self._data.labels
        return {
            "version": version(),
            "model": source_sha256(self._model),
            "data": data.sha256(),
            "labels": None if labels is None else hashlib.sha256(np.asarray(labels).tobytes()).hexdigest(),
            "test": self._test is not None,
            "metric": None if self._metric is None else _name(self._metric),
            "target": [self._target.name, self._target.threads, dict(self._target.options)],
            "machine": fingerprint(),
            "seed": self._seed,
            "distill": self._distill,
            "sizes": sizes,
        }


def _name(metric: Metric) -> str:
    """What tells a metric from others, in other processes too."""
    name = getattr(metric, "__qualname__", "<unnamed>")
    if "<" in name:  # a lambda, a function within another, or an object: the next one may have this name too
        raise UsageError(f"trials are kept by the metric's name: give a function of a module, not {metric!r}")
    return f"{metric.__module__}:{name}"


def _require_alike(data: Batches, test: Batches) -> None:
    """Raise CalibrationError if what was chosen is not judged by what it was chosen by."""
    if (data.labels is None) != (test.labels is None):
        with_labels, without = ("test", "data") if data.labels is None else ("data", "test")
        raise CalibrationError(f"{with_labels} has labels and {without} has none: give both of them or none")


def _opened(model: Model, data: Any, labels: Array | None) -> Batches:
    if isinstance(data, Data):
        return data.read(model)
    bound = CalibrationData.of(data, model.inputs()).bind(model.inputs())
    bound.check(model.inputs())
    return Batches(bound, labels)
