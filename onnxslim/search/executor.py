"""Trials made: a recipe for each, run on the original, measured, and kept with one of the models."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from onnxslim.engine.base import Context
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import OnnxSlimError, UsageError
from onnxslim.ir.download import deflated, download
from onnxslim.ir.model import Model
from onnxslim.passes.distill import Distill
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Outcome, Recipe
from onnxslim.search.chains import Moves, Structures, encodings, moves_from_json, moves_to_json
from onnxslim.search.evaluate import Evaluator
from onnxslim.search.problem import SearchProblem
from onnxslim.search.trials import SearchTrial, TrialConfig, TrialStore, filed


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


class TrialRunner:
    """Makes trials of one search and measures them, in whichever process.

    Args:
        problem: what they have in common.
        moves: what could be left away, where somebody has found that out; found when it is first needed.

    Attributes:
        evaluator: measures what came of trials, on samples to choose by.
        goals: what is asked for, with what is to be kept if nothing was.
        encodings: ways to store weights and data that may help to reach them, by name.

    Raises:
        UsageError: the metric fails, or a goal cannot be measured or met.
    """

    def __init__(self, problem: SearchProblem, moves: Moves | None = None) -> None:
        self.problem = problem
        self.evaluator = Evaluator(problem, problem.chooses)
        self.goals = self.evaluator.completed(problem.goals)
        self.encodings = encodings(self.goals, problem.target, problem.effort)
        self._moves = moves
        self._require_room(self.problem.model)

    def _require_room(self, model: Model) -> None:
        """Raise UsageError if layers without weights take more bytes of the original's than are asked for."""
        if (size := self.goals.size) is not None:
            self._require("size", size, sum(map(len, self.structures.bare_layers())) / model.stats().bytes)
        if (sent := self.goals.download) is not None:
            self._require("download", sent, deflated(self.structures.bare_layers()) / download(model).deflate)

    @staticmethod
    def _require(goal: str, asked: float, least: float) -> None:
        if asked < least:
            raise UsageError(f"the goal {goal}={asked:g} is out of reach: layers alone are {least:.2g}")

    @cached_property
    def structures(self) -> Structures:
        """What can be left away."""
        problem = self.problem
        slimmed = Pipeline(Slim(), count=False)(problem.model, target=problem.target).model
        learning = (Distill(effort=problem.effort),) if problem.distill else ()
        ctx = Context(problem.target, problem.samples, problem.seed)
        return Structures(slimmed, ctx, problem.effort, learning, self._moves)

    def run(self, key: str, config: TrialConfig) -> TrialMade:
        """Make and measure a trial; one that fails says why."""
        start = time.perf_counter()
        recipe, outcome, figures, error = None, None, None, ""
        try:
            left = self.structures(config.structure, config.cut)
            encoding = self.encodings[config.encoding]
            stored = encoding.behind_cut if left else encoding.passes
            recipe = self.problem.recipe((Slim(), *left, *stored))
            outcome = self._outcome(recipe)
            error = _idle(outcome)
            if not error:
                figures = self.evaluator(outcome.model, time.perf_counter() - start)
        except OnnxSlimError as failed:
            error = str(failed)
        return TrialMade(config.trial(key, figures, error), recipe, None if error else outcome)

    def _outcome(self, recipe: Recipe) -> Outcome:
        """Run a recipe; what a model says of how it was made depends on whether plans are files."""
        if not self.problem.kept:
            return self.problem.run(recipe)
        with tempfile.TemporaryDirectory() as folder:
            return self.problem.run(filed(recipe, Path(folder)))


class TrialExecutor:
    """Makes trials in this process, as far as they are not known, and keeps one of their models.

    Args:
        problem: what trials have in common.
        store: where they are kept.

    Attributes:
        runner: makes and measures trials here.
    """

    def __init__(self, problem: SearchProblem, store: TrialStore) -> None:
        self._problem, self._store = problem, store
        self._found = self._known_moves()
        self.runner = TrialRunner(problem, self._found)
        self._last: tuple[str, Outcome] | None = None
        self._kept: tuple[str, Outcome] | None = None

    @property
    def told(self) -> str:
        """What other processes had to do with it, for people; empty if nothing."""
        return ""

    def possible(self, config: TrialConfig, begin: Callable[[], None]) -> bool:
        """See `onnxslim.search.explore.Executor`."""
        if self._store.known(self._key(config)) is not None:
            return True
        if self._found is None:
            begin()
        return any(self._moves())

    def prefetch(self, configs: Sequence[TrialConfig]) -> None:
        """See `onnxslim.search.explore.Executor`."""

    def run(self, config: TrialConfig, begin: Callable[[], None]) -> SearchTrial:
        """See `onnxslim.search.explore.Executor`."""
        self._last = None
        key = self._key(config)
        if self._store.known(key) is None:
            self._make(key, config, begin)
        found = self._store.known(key)
        assert found is not None
        return found

    def _moves(self) -> Moves:
        if self._found is None:
            self._find_moves()
        assert self._found is not None
        return self._found

    def _find_moves(self) -> None:
        """Find out what could be left away, which takes as long as several trials."""
        self._keep_moves(self.runner.structures.moves)

    def _keep_moves(self, moves: Moves) -> None:
        self._found = moves
        self._store.add_notes(self._moves_key, moves_to_json(moves))

    def _known_moves(self) -> Moves | None:
        try:
            return moves_from_json(self._store.notes(self._moves_key))
        except (ValueError, TypeError, KeyError, UsageError):
            return None

    @property
    def _moves_key(self) -> str:
        return self._store.key("moves", self._problem.effort)

    def _make(self, key: str, config: TrialConfig, begin: Callable[[], None]) -> None:
        begin()
        if config.needs_moves:
            self._moves()
        self._take(self.runner.run(key, config))

    def _take(self, made: TrialMade) -> None:
        self._store.add(made.trial, made.recipe)
        if made.outcome is not None:
            key = made.trial.key
            self._last = key, replace(made.outcome, recipe=self._store.recipe(key))

    def keep(self, trial: SearchTrial) -> None:
        """See `onnxslim.search.explore.Executor`."""
        self._kept = self._last

    def outcome(self, trial: SearchTrial) -> Outcome:
        """What a trial made; made again if it is not there any more, anew if its recipe is broken."""
        if self._kept is None or self._kept[0] != trial.key:
            try:
                outcome = self._problem.run(self._store.recipe(trial.key))
            except OnnxSlimError:
                self._store.drop(trial.key)
                made = self.runner.run(trial.key, trial.config)
                self._take(made)
                if self._last is None:
                    raise OnnxSlimError(made.trial.error) from None
                outcome = self._last[1]
            self._kept = trial.key, outcome
        return self._kept[1]

    def _key(self, config: TrialConfig) -> str:
        return self._store.key(*config, self._problem.effort)


def _idle(outcome: Outcome) -> str:
    """What passes that were to do something have not done; empty if all did."""
    idle = (step for step in outcome.report.steps[1:] if step.error or not step.changes)
    return "; ".join(f"{step.name} {step.outcome}" for step in idle)
