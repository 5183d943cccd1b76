"""Scales moved through networks, weights fitted in turn, and four-bit blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim import shapes
from onnxslim.calibration.noise import sqnr
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import rounding
from onnxslim.passes.quantize.blocks import Blocking, Blocks, nearest
from onnxslim.passes.quantize.scaling import Scaling
from onnxslim.runtime.session import Session
from tests.helpers import ops, parse, quantize, same_outputs

CONV = "float[8,4,3,3] w1, float[8] b1"
HEAD = "a = Conv<pads=[1,1,1,1]>(x, w1, b1)"
LAST = "y = Conv(last, w2)"

# Weights, and what is between the first convolution and the last.
PATTERNS = {
    "relu": ("float[5,8,1,1] w2", "last = Relu(a)"),
    "leaky": ("float[5,8,1,1] w2", "last = LeakyRelu<alpha=0.1>(a)"),
    "prelu": ("float[5,8,1,1] w2, float[8,1,1] s", "last = PRelu(a, s)"),
    "depthwise": (
        "float[5,8,1,1] w2, float[8,1,3,3] d, float[8] e",
        "r = Relu(a) b = Conv<group=8,pads=[1,1,1,1]>(r, d, e) last = Relu(b)",
    ),
    "groups": ("float[6,4,1,1] w2", "last = Relu(a) y = Conv<group=2>(last, w2)"),
    "residual": (
        "float[5,8,1,1] w2, float[8,8,1,1] v, float[8] c",
        "r = Relu(a) b = Conv(r, v, c) last = Add(r, b)",
    ),
    "constants": (
        "float[5,8,1,1] w2, float[8,1,1] s, float[1] t",
        "p = Add(a, s) q = Sub(p, t) m = Mul(q, t) last = Relu(m)",
    ),
    "concat": (
        "float[5,16,1,1] w2",
        "r = Relu(a) p = Identity(a) last = Concat<axis=1>(r, p)",
    ),
    "split": ("float[5,4,1,1] w2", "p, q = Split<axis=1>(a) last = Add(p, q)"),
    "pools": (
        "float[5,8,1,1] w2",
        "p = AveragePool<kernel_shape=[2,2]>(a) q = MaxPool<kernel_shape=[2,2]>(a) last = Add(p, q)",
    ),
    "gate": (
        "float[5,8,1,1] w2, float[4,8,1,1] g1, float[8,4,1,1] g2",
        "p = GlobalAveragePool(a) g = Conv(p, g1) h = Relu(g) i = Conv(h, g2) j = HardSigmoid(i)"
        " last = Mul(a, j)",
    ),
    "transpose": (
        "float[8,5] w2",
        "r = Relu(a) t = Transpose<perm=[0,2,3,1]>(r) y = MatMul(t, w2)",
    ),
    "batchnorm": (
        "float[5,8,1,1] w2, float[8] g, float[8] h, float[8] m, float[8] v",
        "n = BatchNormalization(a, g, h, m, v) last = Relu(n)",
    ),
}


def _network(weights: str, body: str) -> Model:
    tail = "" if "y = " in body else LAST
    constants = {}
    rng = np.random.default_rng(0)
    for declared in f"{CONV}, {weights}".split(", "):
        kind, name = declared.split(" ")
        shape = [int(dim) for dim in kind[len("float[") : -1].split(",")]
        values = rng.standard_normal(shape).astype(np.float32)
        constants[name] = np.abs(values) + 0.5 if name == "v" and len(shape) == 1 else values
    text = f"g (float[2,4,6,6] x, {CONV}, {weights}) => (float y) {{ {HEAD} {body} {tail} }}"
    model = parse(text, constants)
    shapes.infer(model)
    return model


def _feeds(seed: int = 0, *shape: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal(shape or (2, 4, 6, 6)).astype(np.float32)}


@pytest.mark.parametrize("name", PATTERNS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_scales_change_nothing(name: str, seed: int) -> None:
    model = _network(*PATTERNS[name])
    twin = model.copy()
    scaling = Scaling(twin)
    assert scaling.free.sum() >= 4
    random = np.exp(np.random.default_rng(seed).uniform(-2, 2, scaling.free.size))
    scaling.apply(np.where(scaling.free, random, 1.0))
    feeds = _feeds(seed)
    expected, found = (
        Session(model, optimize="none").run(feeds)["y"],
        Session(twin, optimize="none").run(feeds)["y"],
    )
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-5 * scale


@pytest.mark.parametrize(
    "body",
    [
        "last = Clip(a, zero, six)",
        "last = Sigmoid(a)",
        "s = Sigmoid(a) last = Mul(a, s)",
        "last = Softmax<axis=1>(a)",
        "c = Relu(a) last = Pad(c, pads, six)",
        "last = Div(one, a)",
        "m = ReduceMean<axes=[1]>(a) last = Add(a, m)",
        "m = ReduceMean<axes=[2,3]>(a) last = Mul(m, a)",
    ],
)
def test_what_is_not_homogeneous_fixes_scales(body: str) -> None:
    constants = {
        "w1": np.ones((8, 4, 3, 3), np.float32),
        "b1": np.ones(8, np.float32),
        "w2": np.ones((5, 8, 1, 1), np.float32),
        "zero": np.float32(0),
        "one": np.float32(1),
        "six": np.float32(6),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    declared = ", ".join(
        f"{'int64' if v.dtype.kind == 'i' else 'float'}{list(v.shape) if v.ndim else ''} {k}"
        for k, v in constants.items()
    )
    text = f"g (float[2,4,6,6] x, {declared}) => (float y) {{ {HEAD} {body} {LAST} }}"
    model = parse(text, constants)
    shapes.infer(model)
    scaling = Scaling(model)
    assert not scaling.free[scaling.tensors["a"].labels].any()


def _reshaped(model: str, *sizes: tuple[int, ...], w2: tuple[int, ...]) -> Model:
    """Its convolution makes [N, 8, 6, 6]; s0, s1 … are vectors of sizes."""
    random = np.random.default_rng(0)
    constants = {"w1": (8, 4, 3, 3), "b1": (8,), "w2": w2}
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in constants.items()}
    return parse(model, values | {f"s{i}": np.array(each) for i, each in enumerate(sizes)})


def test_a_reshape_that_cuts_across_channels_ties_them() -> None:
    """An axis as long as the channels is not theirs: rows of 8 · 6 hold parts of the first, or last, four."""
    text = f"""g (float[2,4,6,6] x, {CONV}, float[5,6,1,1] w2, int64[4] s0) => (float y)
    {{ {HEAD} r = Relu(a) last = Reshape(r, s0) {LAST} }}"""
    model = _reshaped(text, (2, 6, 8, 6), w2=(5, 6, 1, 1))
    shapes.infer(model)
    twin = model.copy()
    scaling = Scaling(twin)
    assert scaling.free.sum() == 2
    scaling.apply(np.where(scaling.free, np.arange(scaling.free.size) + 1.0, 1.0))
    same_outputs(model, twin)


def test_channels_are_followed_through_a_shuffle() -> None:
    text = f"""g (float[2,4,6,6] x, {CONV}, float[5,8,1,1] w2, int64[5] s0, int64[4] s1) => (float y)
    {{ {HEAD} p = Reshape(a, s0) q = Transpose<perm=[0,2,1,3,4]>(p) last = Reshape(q, s1) {LAST} }}"""
    model = _reshaped(text, (2, 2, 4, 6, 6), (2, 8, 6, 6), w2=(5, 8, 1, 1))
    shapes.infer(model)
    twin = model.copy()
    scaling = Scaling(twin)
    assert scaling.free.sum() == 8
    scaling.apply(np.where(scaling.free, np.arange(scaling.free.size) + 1.0, 1.0))
    same_outputs(model, twin)


def test_channels_are_not_scaled_where_they_are_one_axis_with_samples() -> None:
    """How many there are is known only when the model runs."""
    text = f"""g (float[N,4,6,6] x, {CONV}, float[5,8,1,1] w2, int64[2] s0, int64[4] s1) => (float y)
    {{ {HEAD} p = Reshape(a, s0) q = Relu(p) last = Reshape(q, s1) {LAST} }}"""
    model = _reshaped(text, (-1, 36), (-1, 8, 6, 6), w2=(5, 8, 1, 1))
    shapes.infer(model)
    scaling = Scaling(model)
    assert not scaling.free[scaling.tensors["a"].labels].any()


def test_outputs_are_not_scaled() -> None:
    model = parse(
        f"g (float[2,4,6,6] x, {CONV}, float[5,8,1,1] w2) => (float y, float a)"
        f"{{ {HEAD} last = Relu(a) {LAST} }}",
        {
            "w1": np.ones((8, 4, 3, 3), np.float32),
            "b1": np.ones(8, np.float32),
            "w2": np.ones((5, 8, 1, 1), np.float32),
        },
    )
    shapes.infer(model)
    scaling = Scaling(model)
    assert not scaling.free[scaling.tensors["a"].labels].any()


# ------------------------------------------------------------------------------------ the whole pass


def _noise(before: Model, after: Model, data: list[dict[str, Array]]) -> float:
    runs = ([session.run(feeds) for feeds in data] for session in (Session(before), Session(after)))
    return sqnr(*runs)


@pytest.fixture
def uneven() -> Model:
    """Channels of very different size between layers, which all count alike."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(-3, 3, 16)).astype(np.float32)
    w1 = rng.standard_normal((16, 8, 1, 1)).astype(np.float32) * spread.reshape(-1, 1, 1, 1)
    w2 = rng.standard_normal((8, 16, 3, 3)).astype(np.float32) / spread.reshape(1, -1, 1, 1)
    text = """g (float[N,8,10,10] x, float[16,8,1,1] w1, float[16] b1, float[8,16,3,3] w2, float[8] b2) =>
    (float[N,8,8,8] y) { a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2, b2) }"""
    zeros = {"b1": np.zeros(16, np.float32), "b2": np.zeros(8, np.float32)}
    return parse(text, {"w1": w1, "w2": w2, **zeros})


def test_uneven_channels_are_scaled(uneven: Model) -> None:
    data, other = [_feeds(i, 4, 8, 10, 10) for i in range(8)], [_feeds(99, 16, 8, 10, 10)]
    plain, _ = quantize(uneven, data, equalization=False, algorithm="rtn", require_sqnr=0)
    scaled, changes = quantize(uneven, data, algorithm="rtn", require_sqnr=0)
    assert _noise(uneven, scaled, other) > _noise(uneven, plain, other) + 6
    assert any("scaled alike" in change.action for change in changes.changed)
    assert ops(scaled) == ops(plain)


def test_what_cannot_be_moved_is_multiplied() -> None:
    """GELU lets no scale through: a Mul in float between it and the product."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(-2, 3, 64)).astype(np.float32)
    constants = {
        "w1": rng.standard_normal((16, 64)).astype(np.float32) * spread,
        "w2": rng.standard_normal((64, 16)).astype(np.float32) / spread[:, None],
        "w3": rng.standard_normal((16, 16)).astype(np.float32),
    }
    model = parse(
        """g (float[N,16] x, float[16,64] w1, float[64,16] w2, float[16,16] w3) => (float[N,16] y)
        { a = MatMul(x, w1) b = Gelu(a) c = MatMul(b, w2) d = Gelu(c) y = MatMul(d, w3) }""",
        constants,
        opset=20,
    )
    data = [_feeds(i, 64, 16) for i in range(8)]
    plain, _ = quantize(model, data, equalization=False, algorithm="rtn", require_sqnr=0)
    scaled, _ = quantize(model, data, algorithm="rtn", require_sqnr=0)
    assert ops(scaled)["Mul"] >= 1
    other = [_feeds(99, 256, 16)]
    assert _noise(model, scaled, other) > _noise(model, plain, other) + 3


@pytest.fixture
def deep() -> Model:
    """Eight layers whose noise adds up."""
    rng = np.random.default_rng(1)
    names = [f"w{i}" for i in range(8)]
    constants = {
        name: (rng.standard_normal((24, 24)) * np.sqrt(2 / 24)).astype(np.float32) for name in names
    } | {f"b{i}": np.zeros(24, np.float32) for i in range(8)}
    lines = [f"t{i} = Gemm({'x' if not i else f'r{i - 1}'}, w{i}, b{i}) r{i} = Relu(t{i})" for i in range(7)]
    body = "\n".join([*lines, "y = Gemm(r6, w7, b7)"])
    return parse(f"g (float[N,24] x) => (float[N,24] y) {{ {body} }}", constants)


def test_fitting_in_turn_beats_layers_on_their_own(deep: Model) -> None:
    data, other = [_feeds(i, 64, 24) for i in range(16)], [_feeds(99, 512, 24)]
    same: dict[str, Any] = {"weights": "int4", "equalization": False, "require_sqnr": 0, "classifier": True}
    alone, _ = quantize(deep, data, **same, sequential=False)
    turn, _ = quantize(deep, data, **same)
    assert _noise(deep, turn, other) > _noise(deep, alone, other) + 1


@pytest.mark.parametrize("algorithm", ["cd", "gptq"])
def test_four_bits_beat_the_nearest(deep: Model, algorithm: str) -> None:
    rng = np.random.default_rng(0)
    text = """g (float[N,128] x, float[128,128] w1, float[128,64] w2) => (float[N,64] y)
    { a = MatMul(x, w1) b = Tanh(a) y = MatMul(b, w2) }"""
    shape = {"w1": (128, 128), "w2": (128, 64)}
    model = parse(text, {k: (rng.standard_normal(s) / 11).astype(np.float32) for k, s in shape.items()})
    mixing = (rng.standard_normal((128, 128)) * np.geomspace(1, 0.02, 128)[:, None]).astype(np.float32)
    data = [{"x": feeds["x"] @ mixing} for feeds in (_feeds(i, 64, 128) for i in range(16))]
    same: dict[str, Any] = {"weights": "int4", "activations": "none", "require_sqnr": 0}
    near, _ = quantize(model, data, **same, algorithm="rtn")
    better, _ = quantize(model, data, **same, algorithm=algorithm)
    other = [{"x": _feeds(99, 256, 128)["x"] @ mixing}]
    assert _noise(model, better, other) > _noise(model, near, other) + 3


# ------------------------------------------------------------------------------------------ rounding


def _problem(seed: int, outputs: int = 8, inputs: int = 40) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((inputs, inputs)) * np.geomspace(1, 0.05, inputs)
    return rng.standard_normal((outputs, inputs)).astype(np.float32), root @ root.T / inputs


def _loss(error: Array, gram: Array) -> float:
    return float(np.einsum("ok,kl,ol->", error, gram, error))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_gptq_and_descent_never_lose_to_the_nearest(seed: int) -> None:
    target, gram = _problem(seed)
    scales = np.abs(target).max(axis=1) / 7
    near = np.rint(target / scales[:, None])
    damped = rounding.damped(gram[None])[0]
    before = _loss(near * scales[:, None] - target, damped)
    found = rounding.gptq(target[None], scales[None], gram[None], limit=7)[0]
    assert np.abs(found).max() <= 7
    assert _loss(found * scales[:, None] - target, damped) < before
    codes, better = rounding.refine(target[None], found[None], scales[None], gram[None], limit=7)
    assert _loss(codes[0] * better[0][:, None] - target, damped) <= _loss(
        found * scales[:, None] - target, damped
    ) * (1 + 1e-5)


@given(seed=st.integers(0, 2**31), by_gptq=st.booleans())
@settings(max_examples=10, deadline=None)
def test_blocks_are_better_than_the_nearest(seed: int, by_gptq: bool) -> None:
    target, gram = _problem(seed, inputs=72)
    matrix = np.ascontiguousarray(target.T)
    damped = rounding.damped(gram[None])[0]

    def loss(found: Blocks) -> float:
        return _loss((found.values() - matrix).T, damped)

    found = rounding.round_blocks(matrix, Blocking(), gram, by_gptq=by_gptq)
    assert found.codes.min() == -8
    assert found.codes.max() <= 7
    assert loss(found) < 0.7 * loss(nearest(matrix, Blocking()))


def test_few_rows_say_little_about_pairs_of_inputs() -> None:
    _, gram = _problem(0)
    few, many, exact = (rounding.damped(gram[None], count)[0] for count in (10, 10**9, 0))
    off = ~np.eye(len(gram), dtype=bool)
    np.testing.assert_allclose(few[off], gram[off] * 0.2, rtol=1e-5)
    np.testing.assert_allclose(many, exact, rtol=1e-4)
    np.testing.assert_array_equal(np.diagonal(few), np.diagonal(exact))
