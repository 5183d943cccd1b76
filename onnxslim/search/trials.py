"""Trials of a search, kept on disk: what was tried, how to make it again, and what was measured.

A folder for each, by a hash of all that its figures depend on:

    3f0c…/recipe.yaml   makes the model again, byte for byte: `onnxslim run recipe.yaml IN OUT`
          prune.json    plans that the recipe names
          trial.json    what it is called, and its figures

A folder appears at once, with all that is in it: whatever ends a search, and however many work in one place,
what lies there was made and measured together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import TypeAdapter
from pydantic import ValidationError as Invalid

from onnxslim.engine.base import Pass
from onnxslim.engine.plans import PassPlan
from onnxslim.errors import SaveError, UsageError
from onnxslim.formats import figure, plain
from onnxslim.ir.files import write_text
from onnxslim.recipes.recipe import Recipe
from onnxslim.search.goals import TrialFigures

VERSION = 2
TRIAL, RECIPE = "trial.json", "recipe.yaml"
# What is left less of: multiply-accumulates, of channels and ranks; or time, of channels and branches.
Cut: TypeAlias = Literal["work", "time"]
CostKind: TypeAlias = Literal["latency", "size", "download", "macs"]


class TrialConfig(NamedTuple):
    """What a trial is to try.

    Attributes:
        structure: share that is to be left; 1: nothing is left away.
        encoding: how weights and data are stored.
        cut: of what that is the share.
    """

    structure: float
    encoding: str
    cut: Cut = "work"

    @property
    def needs_moves(self) -> bool:
        """Whether it is made of moves that passes propose."""
        return self.structure < 1 and self.cut == "work"

    @property
    def label(self) -> str:
        """For people."""
        share = f"{figure(self.structure, '.3g')} of the {self.cut}, "
        return f"{'' if self.structure >= 1 else share}{self.encoding}"

    def trial(self, key: str, figures: TrialFigures | None, error: str = "") -> SearchTrial:
        """What came of it."""
        return SearchTrial(key, self.label, self.structure, self.encoding, figures, error, self.cut)


@dataclass(frozen=True)
class SearchTrial:
    """One way to make the model smaller or faster, and what came of it.

    Attributes:
        key: hash of what its figures depend on.
        label: what was done, for people.
        structure, encoding, cut: see `TrialConfig`.
        figures: on samples to choose by; None if it failed.
        error: why it failed.
    """

    key: str
    label: str
    structure: float
    encoding: str
    figures: TrialFigures | None = None
    error: str = ""
    cut: Cut = "work"

    @property
    def config(self) -> TrialConfig:
        """What it was to try."""
        return TrialConfig(self.structure, self.encoding, self.cut)


_TRIAL: TypeAdapter[SearchTrial] = TypeAdapter(SearchTrial)


class TrialStore:
    """The trials of a search.

    Args:
        folder: where they are kept; None keeps them in memory alone.
        about: all that figures depend on besides the passes: the model, the data, the target, the machine.

    Raises:
        SaveError: the folder cannot be made, or written.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, plain(about)
        self._known: dict[str, SearchTrial] = {}
        self._recipes: dict[str, Recipe] = {}
        self._damaged: set[str] = set()
        if folder is not None:
            with _told(folder):
                folder.mkdir(parents=True, exist_ok=True)
                probe = _unused(folder, "probe")
                probe.mkdir()
                probe.rmdir()

    def key(self, *intent: Any) -> str:
        """The hash of a trial that is to do this."""
        told = json.dumps(plain([VERSION, self._about, *intent]), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    @property
    def damaged(self) -> str:
        """Which trials lie in the folder and cannot be gone on from, for people; empty if none."""
        if not self._damaged:
            return ""
        number, keys = len(self._damaged), ", ".join(sorted(self._damaged))
        return f"of the trials in '{self._folder}', {number} could not be read, and count for nothing: {keys}"

    def known(self, key: str) -> SearchTrial | None:
        """A trial that has been made, now or in an earlier search."""
        if key not in self._known and self._folder is not None:
            # Looked for before it is read: another search may put it there in between, whole.
            there = (self._folder / key).is_dir()
            found = _read(self._folder / key / TRIAL)
            whole = found is not None and (found.figures is None or (self._folder / key / RECIPE).is_file())
            if whole and found is not None and found.key == key:
                self._known[key] = found
            elif there:
                self._damaged.add(key)
        return self._known.get(key)

    def recipe(self, key: str) -> Recipe:
        """How to make a trial again, with its plans in files where there is a folder.

        Raises:
            UsageError: what is kept of it cannot be read.
        """
        if self._folder is None:
            return self._recipes[key]
        return Recipe.load(self._folder / key / RECIPE, trust=True)

    def add(self, trial: SearchTrial, recipe: Recipe | None = None, *, lasting: bool = True) -> None:
        """Keep what came of one; where another search has kept it meanwhile, what that has.

        Args:
            trial: what came of it.
            recipe: that it was made by; None if there was none to be had.
            lasting: for later searches, too.

        Raises:
            SaveError: the folder cannot be written.
        """
        if recipe is not None:
            self._recipes[trial.key] = recipe
        if lasting and self._folder is not None and self.known(trial.key) is None:
            with _told(self._folder):
                self._put(trial, recipe)
        if self.known(trial.key) is None:
            self._known[trial.key] = trial

    def notes(self, key: str) -> str:
        """What else was kept by a key; empty if nothing."""
        try:
            return "" if self._folder is None else (self._folder / f"{key}.json").read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def add_notes(self, key: str, text: str) -> None:
        """Keep something else for later searches.

        Raises:
            SaveError: the folder cannot be written.
        """
        if self._folder is not None:
            write_text(self._folder / f"{key}.json", text)

    def drop(self, key: str) -> None:
        """Forget a trial that cannot be made again, so that it is made anew."""
        self._known.pop(key, None)
        if self._folder is not None:
            self._damaged.add(key)
            shutil.rmtree(self._folder / key, ignore_errors=True)

    def _put(self, trial: SearchTrial, recipe: Recipe | None) -> None:
        """Write a folder aside, and then put it where it belongs."""
        assert self._folder is not None
        aside, place = _unused(self._folder, trial.key), self._folder / trial.key
        aside.mkdir()
        try:
            if recipe is not None:
                write_text(aside / RECIPE, filed(recipe, aside).text(aside.absolute()))
            write_text(aside / TRIAL, json.dumps(plain(trial), indent=1))
            if self.known(trial.key) is None:  # what lies there is broken
                shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)
        except OSError:
            if self.known(trial.key) is None:
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def filed(recipe: Recipe, folder: Path) -> Recipe:
    """A recipe whose plans are files in a folder, which are written.

    Raises:
        SaveError: they cannot be.
    """
    return replace(recipe, passes=tuple(_filed(recipe.passes, folder)))


def trials_in(folder: Path) -> list[SearchTrial]:
    """Trials that searches have kept in a folder, in order of their labels.

    Raises:
        UsageError: there are none.
    """
    read = [(path, _read(path)) for path in sorted(folder.glob(f"*/{TRIAL}"))]
    found = [trial for path, trial in read if trial is not None and trial.key == path.parent.name]
    if not found:
        raise UsageError(f"there are no trials in '{folder}': give the folder that --work names")
    return sorted(found, key=lambda trial: (-trial.structure, trial.label, trial.key))


def front(trials: Sequence[SearchTrial], kind: CostKind) -> list[SearchTrial]:
    """Trials that no other one beats in both cost and worth, the cheapest first (Pareto front).

    Args:
        trials: those without figures, or whose cost is not known, are left out.
        kind: of cost.
    """
    points = [(_cost(each.figures, kind), each) for each in trials if each.figures is not None]
    known = [(cost, each) for cost, each in points if cost is not None]
    best: list[SearchTrial] = []
    for _, trial in sorted(known, key=lambda point: (point[0], _worse(point[1]))):
        if not best or _worse(trial) < _worse(best[-1]):
            best.append(trial)
    return best


def _cost(figures: TrialFigures, kind: CostKind) -> float | None:
    value: float | None = getattr(figures, kind)
    return value


def _worse(trial: SearchTrial) -> tuple[float, float]:
    assert trial.figures is not None
    lost, kept = trial.figures.worth
    return -lost, -kept


def _unused(folder: Path, name: str) -> Path:
    return folder / f".{name}-{uuid.uuid4().hex}"


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"cannot keep trials in '{folder}': {error.strerror or error}") from error


def _filed(passes: Sequence[Pass], place: Path) -> Iterator[Pass]:
    """Passes whose plans are files in a folder."""
    for each in passes:
        plan = each.given().get("plan")
        if isinstance(plan, PassPlan):
            path = place / f"{each.name}.json"
            write_text(path, plan.to_json())
            each = replace(each, plan=path)  # type: ignore[type-var]
        yield each


def _read(path: Path) -> SearchTrial | None:
    """What is kept there; a file that is missing or broken is a trial that did not end."""
    try:
        return _TRIAL.validate_json(path.read_text(encoding="utf-8"))
    except (OSError, Invalid, UnicodeDecodeError):
        return None
