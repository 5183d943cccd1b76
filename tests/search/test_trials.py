"""Trials on disk: read back, made again byte for byte, and of no harm where they are broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxslim.errors import SaveError, UsageError
from onnxslim.passes.prune import Prune, PruningPlan
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Recipe
from onnxslim.search.goals import TrialFigures
from onnxslim.search.trials import RECIPE, TRIAL, SearchTrial, TrialStore, trials_in

FIGURES = TrialFigures(np.inf, None, (0.9, 0.8), None, 0.3, 0.25, None, 1.0)
TRIAL_MADE = SearchTrial("k" * 32, "half of it", 0.5, "int8", FIGURES)
PLAN = PruningPlan((), ())


def test_what_is_kept_is_read_back_by_another_search(tmp_path: Path) -> None:
    first = TrialStore(tmp_path / "new" / "work", {"model": "a"})
    failed = SearchTrial("f" * 32, "other", 1.0, "half", None, "it cannot be had")
    for trial in (TRIAL_MADE, failed):
        first.add(trial, Recipe(passes=(Slim(), Prune(plan=PLAN))))
    second = TrialStore(tmp_path / "new" / "work", {"model": "a"})
    assert second.known(TRIAL_MADE.key) == TRIAL_MADE
    assert second.known(failed.key) == failed
    assert second.known("x" * 32) is None
    assert trials_in(tmp_path / "new" / "work") == [failed, TRIAL_MADE]
    plan = tmp_path / "new" / "work" / TRIAL_MADE.key / "prune.json"
    for store in (first, second):
        assert store.recipe(TRIAL_MADE.key).passes == (Slim(), Prune(plan=plan))


def test_in_memory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = TrialStore(None, {})
    store.add(SearchTrial("a", "", 1.0, "float"), Recipe(passes=(Slim(),)))
    assert store.known("a") is not None
    assert store.recipe("a").passes == (Slim(),)
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_they_may_read_of_other_files(tmp_path: Path) -> None:
    store = TrialStore(tmp_path, {})
    store.add(TRIAL_MADE, Recipe(passes=(Slim(), Prune(plan=PLAN))))
    (tmp_path / "other").write_text("")
    expected = (tmp_path / "other").stat().st_mode
    found = sorted((tmp_path / TRIAL_MADE.key).iterdir())
    assert [(path.name, path.stat().st_mode) for path in found] == [
        (name, expected) for name in ("prune.json", RECIPE, TRIAL)
    ]


def test_keys_tell_all_that_figures_depend_on() -> None:
    key = TrialStore(None, {"model": "a"}).key(0.5, "int8", "normal")
    assert TrialStore(None, {"model": "a"}).key(0.5, "int8", "normal") == key
    others = [
        TrialStore(None, {"model": "b"}).key(0.5, "int8", "normal"),
        TrialStore(None, {"model": "a"}).key(0.6, "int8", "normal"),
        TrialStore(None, {"model": "a"}).key(0.5, "half", "normal"),
        TrialStore(None, {"model": "a"}).key(0.5, "int8", "quick"),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}', json.dumps({"key": "other", "label": ""})])
def test_a_trial_that_did_not_end_is_none(tmp_path: Path, content: str) -> None:
    store = TrialStore(tmp_path, {})
    (tmp_path / TRIAL_MADE.key).mkdir()
    (tmp_path / TRIAL_MADE.key / TRIAL).write_text(content)
    assert not store.damaged
    assert store.known(TRIAL_MADE.key) is None
    store.add(TRIAL_MADE, Recipe(passes=(Slim(),)))
    assert f"of the trials in '{tmp_path}', 1 could not be read" in store.damaged
    assert TRIAL_MADE.key in store.damaged
    assert TrialStore(tmp_path, {}).known(TRIAL_MADE.key) == TRIAL_MADE
    assert sorted(path.name for path in (tmp_path / TRIAL_MADE.key).iterdir()) == [RECIPE, TRIAL]


def test_of_two_searches_the_first_to_end_a_trial_keeps_it(tmp_path: Path) -> None:
    first, second = TrialStore(tmp_path, {}), TrialStore(tmp_path, {})
    other = replace(TRIAL_MADE, figures=replace(FIGURES, size=0.9))
    assert first.known(TRIAL_MADE.key) is second.known(TRIAL_MADE.key) is None
    assert not first.damaged
    first.add(TRIAL_MADE, Recipe(passes=(Slim(), Prune(plan=PLAN))))
    second.add(other, Recipe(passes=(Slim(),)))
    assert second.known(other.key) == TRIAL_MADE
    assert len(second.recipe(other.key).passes) == 2
    assert [path.name for path in tmp_path.iterdir()] == [TRIAL_MADE.key]
    second.drop(other.key)
    assert other.key in second.damaged
    assert TrialStore(tmp_path, {}).known(other.key) is None


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot keep trials in"):
        TrialStore(tmp_path / "file" / "work", {})
    with pytest.raises(UsageError, match="there are no trials in"):
        trials_in(tmp_path)
