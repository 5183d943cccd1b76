"""Trials of a search, kept on disk: what was tried, how to make it again, and what was measured.

A folder for each, by a hash of all that its figures depend on:

    3f0c…/recipe.yaml   makes the model again, byte for byte: `onnxslim run recipe.yaml IN OUT`
          prune.json    plans that the recipe names
          trial.json    what it is called, and its figures

Each file is written at once, `trial.json` last, so that a folder without one is a trial that did not end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic import ValidationError as Invalid

from onnxslim.engine.base import Pass
from onnxslim.engine.plans import PassPlan
from onnxslim.errors import SaveError, UsageError
from onnxslim.formats import plain
from onnxslim.ir.files import write_text
from onnxslim.recipes.recipe import Recipe
from onnxslim.search.goals import TrialFigures

VERSION = 1
TRIAL, RECIPE = "trial.json", "recipe.yaml"


@dataclass(frozen=True)
class SearchTrial:
    """One way to make the model smaller or faster, and what came of it.

    Attributes:
        key: hash of what its figures depend on.
        label: what was done, for people.
        structure: share of the multiply-accumulates that pruning and factors were to leave; 1 without.
        encoding: how weights and data are stored.
        figures: on samples to choose by; None if it failed.
        error: why it failed.
    """

    key: str
    label: str
    structure: float
    encoding: str
    figures: TrialFigures | None = None
    error: str = ""


_TRIAL: TypeAdapter[SearchTrial] = TypeAdapter(SearchTrial)


class Ledger:
    """The trials of a search.

    Args:
        folder: where they are kept; None keeps them in memory alone.
        about: all that figures depend on besides the passes: the model, the data, the target, the machine.

    Raises:
        SaveError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, plain(about)
        self._known: dict[str, SearchTrial] = {}
        self._recipes: dict[str, Recipe] = {}
        if folder is not None:
            _make(folder)

    def key(self, *intent: Any) -> str:
        """The hash of a trial that is to do this."""
        told = json.dumps(plain([VERSION, self._about, *intent]), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def known(self, key: str) -> SearchTrial | None:
        """A trial that has been made, now or in an earlier search."""
        if key not in self._known and self._folder is not None:
            found = _read(self._folder / key / TRIAL)
            if found is not None and found.key == key:
                self._known[key] = found
        return self._known.get(key)

    def prepare(self, key: str, recipe: Recipe) -> Recipe:
        """Keep how to make a trial; what to run, with its plans in files where there is a folder.

        Raises:
            SaveError: the folder cannot be written.
        """
        if self._folder is not None:
            place = self._folder / key
            _make(place)
            recipe = replace(recipe, passes=tuple(_filed(recipe.passes, place)))
            write_text(place / RECIPE, recipe.text(place.absolute()))
        self._recipes[key] = recipe
        return recipe

    def recipe(self, key: str) -> Recipe:
        """How to make a trial again.

        Raises:
            UsageError: what is kept of it cannot be read.
        """
        if key in self._recipes or self._folder is None:
            return self._recipes[key]
        return Recipe.load(self._folder / key / RECIPE, trust=True)

    def add(self, trial: SearchTrial) -> None:
        """Keep what came of one.

        Raises:
            SaveError: the folder cannot be written.
        """
        self._known[trial.key] = trial
        if self._folder is not None:
            write_text(self._folder / trial.key / TRIAL, json.dumps(plain(trial), indent=1))


def trials_in(folder: Path) -> list[SearchTrial]:
    """Trials that searches have kept in a folder, in order of their labels.

    Raises:
        UsageError: there are none.
    """
    found = [trial for path in sorted(folder.glob(f"*/{TRIAL}")) if (trial := _read(path)) is not None]
    if not found:
        raise UsageError(f"there are no trials in '{folder}': give the folder that --work names")
    return sorted(found, key=lambda trial: (-trial.structure, trial.label, trial.key))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
