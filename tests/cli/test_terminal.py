"""How far a command is, on a terminal and where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from onnxslim.cli.terminal import EVERY, Meter, duration, progress
from onnxslim.engine.forecast import Forecast

FORECAST = Forecast(("slim", "prune", "slim"), (1.0, 20.0, 2.0))


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time go by."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_meter_says_where_it_is_and_what_is_left(wait: Callable[[float], None]) -> None:
    shown: list[tuple[str, float]] = []
    meter = Meter(lambda line, share: shown.append((line, round(share, 2))), FORECAST)
    meter("slim", 0, 1)
    wait(1)
    meter("slim", 1, 1)
    meter("prune", 0, 1)
    wait(5)
    meter("measuring", 3, 12)
    wait(30)
    meter("repairing", 1, None)
    meter("prune", 1, 1)
    meter("slim", 0, 1)
    wait(1)
    meter("folding", 1, None)
    meter("slim", 1, 1)
    meter("validating", 1, 1)
    assert shown[0] == ("slim (1 of 3), about 23 s left", 0.0)
    assert shown[3] == ("prune (2 of 3): measuring 3 of 12, about 17 s left", 0.26)
    assert shown[4][0] == "prune (2 of 3): repairing 1, about 6 s left"  # late: a tenth of 35 s, and 2 s
    assert shown[5] == ("about 2 s left", 0.95)
    assert shown[6] == ("slim (3 of 3), about 2 s left", 0.95)
    assert shown[7] == ("slim (3 of 3): folding 1, about 1 s left", 0.97)
    assert shown[9] == ("validating 1 of 1", 1.0)


def test_a_meter_without_a_forecast_says_what_is_done() -> None:
    shown: list[tuple[str, float]] = []
    meter = Meter(lambda line, share: shown.append((line, share)))
    meter("validating", 1, 1)
    meter("validating", 2, 5)
    assert shown == [("validating 1 of 1", 0.0), ("validating 2 of 5", 0.0)]


def test_a_pass_has_not_ended_that_has_not_begun() -> None:
    shown: list[str] = []
    meter = Meter(lambda line, _: shown.append(line), Forecast(("slim",), (1.0,)))
    meter("slim", 1, 1)
    assert shown == ["slim 1 of 1, about 1 s left"]


def test_where_there_is_no_terminal_there_is_a_line_every_ten_seconds(
    wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(False, FORECAST) as meter:
        assert meter is not None
        meter("slim", 0, 1)
        for done in range(1, 25):
            wait(1)
            meter("measuring", done, 24)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "onnxslim: this takes about 23 s"
    assert [line.split(": ")[1] for line in told[1:]] == [f"{EVERY:.0f} s", f"{2 * EVERY:.0f} s"]
    assert told[1].startswith("onnxslim: 10 s: slim (1 of 3): measuring 10 of 24, about 23 s left")
    with progress(False) as meter:
        assert meter is not None
        wait(EVERY)
        meter("measuring", 1, 1)
        wait(EVERY)
        meter("measuring", 1, 1)
    assert capsys.readouterr().err.count("measuring") == 2
    with progress(False, Forecast(("slim",), (0.1,))) as meter:
        assert meter is not None
        meter("slim", 0, 1)
        wait(EVERY)
        meter("slim", 1, 1)  # it has ended: there is nothing to tell
    assert not capsys.readouterr().err
    with progress(True, FORECAST) as meter:
        assert meter is None
    with progress(False, Forecast(("slim",), (0.1,))):
        pass
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "1 s"), (89, "89 s"), (150, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations_are_as_exact_as_anybody_knows(seconds: float, told: str) -> None:
    assert duration(seconds) == told
