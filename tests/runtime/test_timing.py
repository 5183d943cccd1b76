"""Which of two models is slower: told only where that is certain."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxslim.runtime import timing
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import SLOWER, TELLING, slowdown
from tests.helpers import normal, products

X = {"x": normal(64, 256)}


def test_a_model_with_more_to_do_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TELLING", 0.0)  # whatever processor this is
    found = slowdown(products(2), products(8), X, Target.cpu())
    assert found is not None
    assert found > 2
    assert slowdown(products(8), products(2), X, Target.cpu()) is None


def test_the_reference_evaluator_has_no_time_to_compare() -> None:
    assert slowdown(products(1), products(2), X, Target.reference()) is None


@pytest.mark.parametrize(
    ("first", "ratios", "told"),
    [
        (1.0, [1.02, SLOWER + 0.01, 1.3, 1.4], None),  # the lower quartile counts, not the median
        (1.0, [SLOWER + 0.02, 1.2, 1.3, 1.4], 1.25),
        (0.9 * TELLING, [2.0, 2.0, 2.0, 2.0], None),
        (1.1 * TELLING, [2.0, 2.0, 2.0, 2.0], 2.0),
    ],
)
def test_slower_is_what_most_turns_say_of_calls_that_last(
    monkeypatch: pytest.MonkeyPatch, first: float, ratios: list[float], told: float | None
) -> None:
    monkeypatch.setattr(timing, "_turns", _turns(first, lambda _: ratios))
    assert slowdown(products(1), products(1), X, Target.cpu()) == (told and pytest.approx(told))


def test_slower_is_what_two_comparisons_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_turns", _turns(1.0, lambda call: [1.5] * 4 if call == 1 else [1.0] * 4))
    assert slowdown(products(1), products(1), X, Target.cpu()) is None


def _turns(first: float, ratios: Callable[[int], list[float]]) -> Callable[..., object]:
    """Stands for the clock: milliseconds of the first model, and how many times as long the second takes."""
    calls = 0

    def turns(*_: object) -> object:
        nonlocal calls
        calls += 1
        return np.array([[first, first * ratio] for ratio in ratios(calls)])

    return turns


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_one_measures_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fcntl

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with timing.alone():
        (file,) = tmp_path.iterdir()
        with open(file, "ab") as stream, pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with timing.alone(patience=0.0):  # nobody waits for ever
            pass
    with open(file, "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with timing.alone():
        pass
