"""What a search starts from, and what it ends with."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Subset
from onnxslim.errors import CalibrationError, ValidationError
from onnxslim.formats import percent
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.distill import Distill
from onnxslim.passes.slim import Slim
from onnxslim.recipes.data import Batches, Data
from onnxslim.recipes.recipe import Outcome
from onnxslim.runtime.profile import require_usable
from onnxslim.search.backends import SearchBackend
from onnxslim.search.evaluate import Evaluator
from onnxslim.search.executor import TrialExecutor
from onnxslim.search.explore import CORRECTIONS, Explorer, OutOfTime
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.jobs import DistributedExecutor
from onnxslim.search.problem import HOLD_OUT, SearchProblem
from onnxslim.search.trials import Cut, SearchTrial, TrialStore, front


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
            ValidationError: no trial meets the goals; says what the nearest one falls short of.
        """
        if self.problem:
            raise ValidationError(self.problem)
        return self


class SearchRun:
    """A search: where its trials are made, and what judges the one that is chosen.

    Args:
        problem: what trials have in common.
        test: other samples to judge by; None: half of those held out.

    Raises:
        UsageError: PyTorch is wanted, and not installed.
        CalibrationError: the test data is not of the kind of the data.
        TargetError: the target is not there.
    """

    def __init__(self, problem: SearchProblem, test: Batches | None) -> None:
        require_usable(problem.target)
        if problem.distill:
            Distill().require_installed()
        if problem.metric is None and test is not None:
            _require_alike(problem.data, test)
        self._problem, self._test = problem, test
        self._notes: list[str] = []

    def explorer(self, work: str | os.PathLike[str] | None, backend: SearchBackend | None) -> Explorer:
        """What makes trials; see `onnxslim.search.optimize`.

        Args:
            work: where to keep them.
            backend: whose workers make them; None: they are made here.

        Raises:
            UsageError: the metric fails, or trials are to be kept and it has no name; a goal cannot be
                measured.
            SaveError: the folder cannot be made, or written.
        """
        problem = self._problem
        store = TrialStore(None, {}) if work is None else TrialStore(Path(work), problem.about())
        self._store, given = store, (problem, store)
        self._executor = TrialExecutor(*given) if backend is None else DistributedExecutor(*given, backend)
        runner = self._executor.runner
        self._choose, self._verify = runner.evaluator, self._judge(runner.evaluator)
        cuts: tuple[Cut, ...] = ("work",) if runner.goals.latency is None else ("work", "time")
        every = runner.encodings.items()
        ways = {name: encoding.spares for name, encoding in every if not encoding.narrows}
        narrower = {wide: name for name, encoding in every for wide in encoding.narrows}
        return Explorer(self._executor, ways, runner.goals, cuts, problem.effort, narrower=narrower)

    def result(self, explorer: Explorer) -> SearchResult:
        """The best trial that other samples confirm, or the original where none is."""
        refused = ""
        for trial in self._tried(explorer):
            outcome = self._executor.outcome(trial)
            verified = self._verify(outcome.model, 0.0)
            shortfalls = explorer.goals.shortfalls(verified)
            if not shortfalls:
                return self._told(explorer, outcome.model, outcome, trial, verified)
            refused = refused or f"the nearest is {trial.label}: on other samples {'; '.join(shortfalls)}"
        slimmed = self._problem.run(self._problem.recipe((Slim(),))).model
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
        told = explorer.untried, self._coarse(explorer.goals), self._executor.told, self._store.damaged
        notes = [*self._notes, *filter(None, told)]
        trials = tuple(explorer.trials)
        goals = explorer.goals
        samples = 0 if self._verify is self._choose else self._verify.samples
        return SearchResult(model, outcome, best, verified, samples, goals, trials, problem, tuple(notes))

    def _coarse(self, goals: Goals) -> str:
        """That a goal asks for more than the samples can tell, if it does."""
        share = 1.0 / max(self._choose.samples, 1)
        if not goals.max_drop or self._problem.metric is not None or share <= goals.max_drop:
            return ""
        enough = math.ceil(2 / HOLD_OUT / goals.max_drop)
        return (
            f"one of the {self._choose.samples} samples to choose by is {percent(share)} of them, more than "
            f"may be lost, so that none may be: {enough} samples, of which an eighth chooses, would tell"
        )

    def _judge(self, choose: Evaluator) -> Evaluator:
        """What measures what was chosen: what it was chosen by, where there are no other samples."""
        test, samples = self._test, self._problem.samples
        if test is not None:
            if samples.held is None:
                self._notes.append("there are too few samples to choose by others than passes were fitted on")
            part = Subset(test.data, test.labels)
        elif samples.halves is not None:
            part = samples.halves[1]
        else:
            self._notes.append(
                "there are too few samples to hold some out: what is measured is of samples that passes were "
                "fitted on"
            )
            return choose
        return Evaluator(self._problem, part)


def _require_alike(data: Batches, test: Batches) -> None:
    """Raise CalibrationError if what was chosen is not judged by what it was chosen by."""
    if (data.labels is None) != (test.labels is None):
        with_labels, without = ("test", "data") if data.labels is None else ("data", "test")
        raise CalibrationError(f"{with_labels} has labels and {without} has none: give both of them or none")


def opened(model: Model, data: Any, labels: Array | None) -> Batches:
    """Samples as callers give them.

    Raises:
        CalibrationError: they do not fit the model.
    """
    if isinstance(data, Data):
        return data.read(model)
    bound = CalibrationData.of(data, model.inputs()).bind(model.inputs())
    bound.check(model.inputs())
    return Batches(bound, labels)
