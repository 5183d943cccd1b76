"""Trials asked for one by one: known from before, made here, or by several workers ahead of the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from onnxslim.errors import OnnxSlimError
from onnxslim.recipes.recipe import Outcome
from onnxslim.search.crew import Crew, LostError, Task
from onnxslim.search.making import TrialMade, Workbench
from onnxslim.search.place import Workplace
from onnxslim.search.trials import Ledger, SearchTrial, Wish


class Workshop:
    """Makes trials, as far as they are not known, and keeps one of the models that come of it.

    Args:
        place: what trials have in common.
        ledger: where they are kept.
        crew: workers that make them; without, they are made here.

    Attributes:
        bench: makes and measures trials here.
    """

    def __init__(self, place: Workplace, ledger: Ledger, crew: Crew | None = None) -> None:
        self._place, self._ledger, self._crew = place, ledger, crew
        self.bench = Workbench(place)
        self._last: tuple[str, Outcome] | None = None
        self._kept: tuple[str, Outcome] | None = None

    @property
    def samples(self) -> int:
        """See `onnxslim.search.explore.Maker`."""
        return self.bench.figures.samples

    def possible(self, wish: Wish) -> bool:
        """See `onnxslim.search.explore.Maker`."""
        if self._ledger.known(self._key(wish)) is not None:
            return True
        return any(self._crew.moves() if self._crew is not None else self.bench.structures.moves)

    def expect(self, wishes: Sequence[Wish]) -> None:
        """See `onnxslim.search.explore.Maker`."""
        if self._crew is not None:
            tasks = (Task(self._key(wish), wish) for wish in wishes)
            self._crew.expect(task for task in tasks if self._ledger.known(task.key) is None)

    def made(self, wish: Wish, begin: Callable[[], None]) -> SearchTrial:
        """See `onnxslim.search.explore.Maker`."""
        self._last = None
        key = self._key(wish)
        known = self._ledger.known(key)
        if known is not None:
            return known
        if self._crew is None:
            begin()
            self._take(self.bench.tried(key, wish))
        else:
            self._worked(self._crew, Task(key, wish), begin)
        found = self._ledger.known(key)
        assert found is not None
        return found

    def _worked(self, crew: Crew, task: Task, begin: Callable[[], None]) -> None:
        """Have workers make a trial, if they have not begun to."""
        assert task.wish is not None
        if not crew.makes(task):
            begin()
        try:
            crew.finish(task)
        except LostError as error:  # which does not say that it cannot be made: another search tries again
            self._ledger.add(task.wish.trial(task.key, None, str(error)), lasting=False)

    def _take(self, made: TrialMade) -> None:
        self._ledger.add(made.trial, made.recipe)
        if made.outcome is not None:
            key = made.trial.key
            self._last = key, replace(made.outcome, recipe=self._ledger.recipe(key))

    def keep(self, trial: SearchTrial) -> None:
        """See `onnxslim.search.explore.Maker`."""
        self._kept = self._last

    def outcome(self, trial: SearchTrial) -> Outcome:
        """What a trial made; made again if it is not there any more, anew if its recipe is broken."""
        if self._kept is None or self._kept[0] != trial.key:
            try:
                outcome = self._place.run(self._ledger.recipe(trial.key))
            except OnnxSlimError:
                self._ledger.drop(trial.key)
                made = self.bench.tried(trial.key, trial.wish)
                self._take(made)
                if self._last is None:
                    raise OnnxSlimError(made.trial.error) from None
                outcome = self._last[1]
            self._kept = trial.key, outcome
        return self._kept[1]

    def _key(self, wish: Wish) -> str:
        return self._ledger.key(*wish, self._place.effort)
