"""The one signal-to-noise ratio: what it is, that sums over parts are sums over all, and its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxslim.calibration.noise import Noise, decibels_of, noise_of, sqnr

VALUES = arrays.arrays(np.float32, st.tuples(st.integers(1, 20)), elements=st.floats(-1e3, 1e3, width=32))


def test_it_is_the_power_of_the_signal_by_that_of_the_noise() -> None:
    assert sqnr(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == 10 * math.log10(25 / 0.25) == 20.0


@given(VALUES, st.integers(0, 20), st.floats(0.125, 2, width=32))
def test_parts_together_are_the_whole(values: np.ndarray, at: int, by: float) -> None:
    made = values * np.float32(by)
    first, second = ([each[:at], each[at:]] for each in (values, made))
    assert sqnr(first, second) == pytest.approx(sqnr(values, made))
    runs = ([{"a": each[0], "b": each[1]}] for each in (first, second))
    assert sqnr(*runs) == sqnr(first, second)


def test_sums_do_not_overflow_where_the_type_would() -> None:
    large = np.full(100, 60_000, np.float16)
    assert sqnr(large, large / np.float16(2)) == pytest.approx(10 * math.log10(4))


def test_without_noise_it_is_infinite_and_without_signal_nothing_is_left() -> None:
    one, none = np.ones(2, np.float32), np.zeros(2, np.float32)
    assert sqnr(one, one) == sqnr(none, none) == sqnr([], []) == math.inf
    assert sqnr(none, one) == -math.inf
    assert sqnr(one, one * np.float32(np.nan)) == sqnr(one, one * np.float32(np.inf)) == -math.inf


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="stands for"):
        sqnr(np.ones((2, 1)), np.ones((2, 2)))


def test_variation_is_around_the_mean() -> None:
    sums = Noise()
    sums.add(np.arange(4.0), np.zeros(4))
    assert sums.variation == pytest.approx(np.square(np.arange(4) - 1.5).sum())
    constant = Noise()
    constant.add(np.full(1000, 0.1), np.zeros(1000))
    assert constant.variation == 0.0


@given(st.floats(-290, 290))
def test_ratios_in_dB_are_those_of_powers(value: float) -> None:
    assert -decibels_of(noise_of(value)) == pytest.approx(value, abs=1e-9)


def test_a_ratio_that_is_too_small_is_nothing_but_noise() -> None:
    assert noise_of(-math.inf) == noise_of(-4000.0) == math.inf
    assert noise_of(math.inf) == 0.0
