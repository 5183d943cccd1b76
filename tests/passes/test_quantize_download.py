"""Quantize with fewer codes, for a smaller download."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.gram import Gram
from onnxslim.errors import UsageError
from onnxslim.ir.download import deflated, download
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.quantize.rate import Priced, Rate, power_of, price_for
from onnxslim.passes.quantize.rounding import Rounder, damped, refine
from onnxslim.passes.quantize.weights import encode, floor_for, floored, saturates
from tests.helpers import normal, parse, quantize

NET = """g (float[N,16,6,6] x) => (float[N,64,2,2] y)
{ a = Conv(x, u, k) b = Relu(a) [layer] c = Conv(b, w, k) d = Relu(c) y = Conv(d, v, k) }"""


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
    return parse(NET, {**weights, "v": uneven(64, 64, 1, 1, seed=3), "k": normal(64, seed=4)})


@pytest.mark.parametrize("share", [0.9, 0.75])
def test_integers_take_less_once_deflated(net: Model, share: float) -> None:
    data = [{"x": normal(16, 16, 6, 6)}]
    # Channels that are scaled alike have other codes to begin with.
    plain, _ = quantize(net, data, classifier=True, equalization=False)
    small, _ = quantize(net, data, classifier=True, download=share)
    assert len(codes_of(small)) == len(codes_of(plain))
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
    for options in ({"weights": "int4"}, {"activations": "none"}):
        with pytest.raises(UsageError, match="download goes with"):
            Quantize(download=0.8, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ with data: a price


def gram_of(x: Array) -> Array:
    """Second moments of rows [samples, inputs], with a first axis for the group."""
    found: Array = (x.T @ x / len(x)).astype(np.float64)[None]
    return found


def bits_of(codes: Array) -> float:
    """Bits a code takes on average, by how often each comes."""
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / codes.size
    return float(-(shares * np.log2(shares)).sum())


def loss(target: Array, codes: Array, scales: Array, gram: Array) -> float:
    error = codes * scales[..., None] - target
    return float(((error @ gram) * error).sum())


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from((1e-5, 1e-4, 1e-3)))
def test_what_is_lost_and_what_is_sent_together_are_less(seed: int, price: float) -> None:
    """Than with the codes of the least error, at the price that both are compared by."""
    target = normal(1, 24, 32, seed=seed)
    gram = gram_of(normal(200, 32, seed=seed + 1) @ normal(32, 32, seed=seed + 2))
    scales = (np.abs(target).max(axis=2) / 40).astype(np.float32)
    start = np.rint(target / scales[..., None]).astype(np.float32)
    sums = []
    for at in (0.0, price):
        codes, steps = refine(target, start, scales, gram, price=at)
        unit = price * power_of(target, damped(gram))
        sums.append((loss(target, codes, steps, gram), bits_of(codes), unit * codes.size))
    (least, many, unit), (more, few, _) = sums
    assert few < many
    assert more + unit * few < least + unit * many


def test_inputs_that_say_little_get_the_codes_that_others_have() -> None:
    target, sizes = normal(1, 512, 16, seed=3), np.geomspace(1.0, 1e-4, 16)
    scales = (np.abs(target).max(axis=2) / 30).astype(np.float32)
    start = np.rint(target / scales[..., None]).astype(np.float32)
    codes, _ = refine(target, start, scales, np.diag(sizes)[None], price=1e-7)
    assert bits_of(codes[..., 12:]) < 0.9 * bits_of(codes[..., :4])
    assert bits_of(codes[..., :4]) > 0.95 * bits_of(start[..., :4])


@pytest.mark.parametrize("seed", range(3))
def test_a_price_keeps_pairs_from_saturating(seed: int) -> None:
    weight = normal(24, 16, 3, 3, seed=seed)
    model = parse("g (float[N,16,8,8] x) => (float[N,A,B,C] y) { y = Conv(x, w) }", {"w": weight})
    layer = layer_of(model.graph.nodes[0])
    assert isinstance(layer, Layer)
    rows = normal(400, 144, seed=seed)
    means = np.zeros((1, 144)), np.zeros((1, 24))
    gram = Gram(gram_of(rows), np.zeros((1, 24, 144)), np.zeros((1, 24)), *means, 400)
    start = encode(weight, 0, per_channel=True, pair_axis=1)
    found = Rounder(layer, gram, False, price=1e-7)(start, 1, 127, None)
    assert not saturates(found.codes, 0, 1, 255)
    assert bits_of(found.codes) < bits_of(start.codes)


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_price_is_the_least_that_is_enough(share: float) -> None:
    weights = [
        Priced(uneven(32, 16, 3, 3, seed=seed), 0, np.full(32, 10.0**seed, np.float32)) for seed in (0, 1)
    ]

    def sent(price: float) -> int:
        return deflated(
            encode(
                each.weight, 0, per_channel=True, least=each.steps * np.float32(np.sqrt(price))
            ).codes.tobytes()
            for each in weights
        )

    price = price_for(weights, share)
    assert sent(price) <= share * sent(0.0) < sent(0.9 * price)


def test_codes_are_chosen_by_error_and_bits_with_data(net: Model) -> None:
    sizes = np.geomspace(1, 0.02, 16, dtype=np.float32).reshape(-1, 1, 1)
    rows = [{"x": normal(16, 16, 6, 6, seed=seed) * sizes} for seed in range(4)]
    priced, _ = quantize(net, rows, classifier=True, download=0.7)
    plain, _ = quantize(net, rows, classifier=True)
    sent = [download(each).deflate for each in (plain, priced)]
    assert sent[1] < 0.85 * sent[0]


def test_groups_that_share_scales_have_no_price() -> None:
    text = """g (float[N,8,6,6] x) => (float[N,8,6,6] y)
    { a = Conv(x, w) b = ConvTranspose<group=2>(a, u) y = Conv(b, v) }"""
    shapes = {"w": (32, 8, 3, 3), "u": (32, 16, 3, 3), "v": (8, 32, 1, 1)}
    model = parse(text, {name: normal(*shape) for name, shape in shapes.items()})
    small, _ = quantize(model, [{"x": normal(8, 8, 6, 6)}], classifier=True, download=0.6)
    assert codes_of(small)


def test_codes_that_others_have_are_taken_within_limits_only() -> None:
    rate = Rate(1.0, -127, 127)
    rate.renew(np.repeat(np.array([6, 5, -2], np.float32), (1000, 2, 1)))
    code = np.full((1, 3), 5, np.float32)

    def lost(codes: Array) -> Array:
        return np.asarray(0.1 * np.square(codes - np.float32(5.3)))

    free = rate.best(code, lost, -127, 127)
    held = rate.best(code, lost, np.full((1, 3), -128.0), np.array([[5.0, 6.0, 5.0]], np.float32))
    np.testing.assert_array_equal(free, [[6, 6, 6]])
    np.testing.assert_array_equal(held, [[5, 6, 5]])
