"""Quantize with fewer codes, for a smaller download."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from onnxslim.errors import UsageError
from onnxslim.ir.download import download
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.quantize.weights import encode, floor_for, floored
from tests.helpers import normal, parse, quantize

NET = """g (float[N,16,6,6] x) => (float[N,64,2,2] y)
{ a = Conv(x, u) b = Relu(a) [layer] c = Conv(b, w) d = Relu(c) y = Conv(d, v) }"""


def uneven(*shape: int, seed: int) -> Array:
    """Weights whose channels are of different sizes."""
    sizes = np.geomspace(0.05, 1.0, shape[0], dtype=np.float32)
    return normal(*shape, seed=seed) * sizes.reshape(-1, 1, 1, 1)


def codes_of(model: Model) -> bytes:
    """All integers of weights."""
    return b"".join(each.values.tobytes() for each in model.constants() if each.dtype == np.int8)


@pytest.fixture
def net() -> Model:
    weights = {"u": uneven(64, 16, 3, 3, seed=1), "w": uneven(64, 64, 3, 3, seed=2)}
    return parse(NET, {**weights, "v": uneven(64, 64, 1, 1, seed=3)})


@pytest.mark.parametrize("share", [0.9, 0.75])
def test_integers_take_less_once_deflated(net: Model, share: float) -> None:
    data = [{"x": normal(16, 16, 6, 6)}]
    plain, _ = quantize(net, data, classifier=True)
    small, _ = quantize(net, data, classifier=True, download=share)
    assert small.stats().bytes == plain.stats().bytes
    sent = [len(zlib.compress(codes_of(each), 6)) for each in (plain, small)]
    # Of all layers together, of which the first one stays in floats.
    assert share - 0.05 < sent[1] / sent[0] < share + 0.06
    assert download(plain).deflate - download(small).deflate == pytest.approx(sent[0] - sent[1], rel=0.1)


def test_the_floor_is_the_least_that_is_enough() -> None:
    weight = uneven(32, 16, 3, 3, seed=4)
    least = floor_for([(weight, 0)], 0.8)

    def sent(floor: float) -> int:
        scales = floored(weight, 0, None, floor)
        return len(zlib.compress(encode(weight, 0, per_channel=True, least=scales).codes.tobytes(), 6))

    assert sent(least) <= 0.8 * sent(0.0) < sent(0.95 * least)


def test_scales_that_have_to_be_larger_stay_so() -> None:
    weight, least = uneven(4, 2, 1, 1, seed=5), np.array([9, 0, 0, 0], np.float32)
    found = floored(weight, 0, least, 0.5)
    assert found is not None
    assert found[0] == 9
    np.testing.assert_allclose(found[1:], 0.5 * np.sqrt(np.square(weight).mean()), rtol=1e-6)
    assert floored(weight, 0, least, 0.0) is least


def test_it_goes_with_integers_of_eight_bits() -> None:
    for given in ({"weights": "int4"}, {"activations": "none"}):
        with pytest.raises(UsageError, match="download goes with"):
            Quantize(download=0.8, **given)  # type: ignore[arg-type]
