"""Limits: what takes too long or too much is stopped, once, and what does not is left alone."""

from __future__ import annotations

import threading

import pytest

from onnxslim.runtime import limits
from onnxslim.runtime.limits import POLL_SECONDS, RunLimits, Watchdog

PLENTY = 1 << 50


@pytest.mark.parametrize(
    ("given", "told"), [(RunLimits(0.0, PLENTY), "0 seconds"), (RunLimits(600.0, 1000), "1000 bytes")]
)
def test_what_exceeds_a_limit_is_stopped_once(
    monkeypatch: pytest.MonkeyPatch, given: RunLimits, told: str
) -> None:
    peaks = iter([5000])  # at the start; from then on more than so many bytes beyond it
    monkeypatch.setattr(limits, "_peak", lambda: next(peaks, 6001))
    calls, stopped = [], threading.Event()

    def stop() -> None:
        calls.append(1)
        stopped.set()

    with Watchdog(given, stop) as dog:
        assert stopped.wait(60)
        threading.Event().wait(20 * POLL_SECONDS)
    assert dog.exceeded == told
    assert calls == [1]


def test_what_stays_within_its_limits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([5000])
    monkeypatch.setattr(limits, "_peak", lambda: next(peaks, 6000))
    calls: list[int] = []
    with Watchdog(RunLimits(600.0, 1000), lambda: calls.append(1)) as dog:
        threading.Event().wait(20 * POLL_SECONDS)
    assert not dog.exceeded
    assert not calls
