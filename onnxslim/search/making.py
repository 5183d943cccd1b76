"""Trials made: a recipe for each, run on the original, and what came of it measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cached_property

from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import Subset
from onnxslim.engine.base import Effort
from onnxslim.errors import OnnxSlimError
from onnxslim.formats import figure
from onnxslim.ir.download import download
from onnxslim.ir.model import Model
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Outcome, Recipe
from onnxslim.runtime.metric import Metric, measure
from onnxslim.runtime.targets import Target
from onnxslim.search.chains import Chain, Structures
from onnxslim.search.goals import TrialFigures
from onnxslim.search.trials import Ledger, SearchTrial
from onnxslim.shapes import cost

# Seconds to time one trial.
TIMED = 1.0


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
        self._metric = metric or subset.metric
        self.samples = self._judge.seen
        # A metric that fails is told before any trial.
        self._before = None if self._metric is None else measure(self._metric, original, target)

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


class Workshop:
    """Makes trials, as far as they are not known, and keeps one of the models that come of it.

    Args:
        make: a recipe out of passes.
        run: runs it on the original.
        bench: measures what came of it, on samples to choose by.
        structures: what can be left away.
        encodings: ways to store weights and data, by name.
        ledger: where trials are kept.
        effort: that passes take.
    """

    def __init__(
        self,
        make: Callable[[Chain], Recipe],
        run: Callable[[Recipe], Outcome],
        bench: TrialBench,
        structures: Structures,
        encodings: Mapping[str, Chain],
        ledger: Ledger,
        effort: Effort,
    ) -> None:
        self._make, self._run, self._bench = make, run, bench
        self._structures, self._encodings, self._ledger, self._effort = structures, encodings, ledger, effort
        self._last: tuple[str, Outcome] | None = None
        self._kept: tuple[str, Outcome] | None = None

    @property
    def possible(self) -> bool:
        """Whether anything of the work can be left away."""
        return self._structures.possible

    @property
    def samples(self) -> int:
        """That trials are measured on."""
        return self._bench.samples

    def made(self, structure: float, encoding: str, begin: Callable[[], None]) -> SearchTrial:
        """See `onnxslim.search.explore.Maker`."""
        key = self._ledger.key(structure, encoding, self._effort)
        known = self._ledger.known(key)
        if known is not None:
            self._last = None
            return known
        begin()
        trial = self._tried(key, structure, encoding)
        self._ledger.add(trial)
        return trial

    def keep(self, trial: SearchTrial) -> None:
        """See `onnxslim.search.explore.Maker`."""
        self._kept = self._last

    def outcome(self, trial: SearchTrial) -> Outcome:
        """What a trial made; made again if it is not there any more."""
        if self._kept is None or self._kept[0] != trial.key:
            self._kept = trial.key, self._run(self._ledger.recipe(trial.key))
        return self._kept[1]

    def _tried(self, key: str, structure: float, encoding: str) -> SearchTrial:
        start = time.perf_counter()
        label, figures, error = _label(structure, encoding), None, ""
        try:
            recipe = self._make((Slim(), *self._structures(structure), *self._encodings[encoding]))
            outcome = self._run(self._ledger.prepare(key, recipe))
            error = _idle(outcome)
            if not error:
                figures = self._bench(outcome.model, time.perf_counter() - start)
                self._last = key, outcome
        except OnnxSlimError as failed:
            error = str(failed)
        return SearchTrial(key, label, structure, encoding, figures, error)


def _label(structure: float, encoding: str) -> str:
    return encoding if structure >= 1 else f"{figure(structure, '.3g')} of the work, {encoding}"


def _idle(outcome: Outcome) -> str:
    """What passes that were to do something have not done; empty if all did."""
    idle = (step for step in outcome.report.steps[1:] if step.error or not step.changes)
    return "; ".join(f"{step.name} {step.outcome}" for step in idle)
