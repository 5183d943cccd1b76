"""Models that come with Q/DQ, as quantization-aware training leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from onnxslim.calibration.noise import sqnr
from onnxslim.ir.graph import Array, Constant, Node
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import QuantizeFigures
from onnxslim.runtime.profile import optimized_model
from onnxslim.runtime.session import Session
from tests.helpers import normal, ops, parse, quantize

DATA = [{"x": normal(4, 8, 6, 6, seed=seed)} for seed in range(6)]
W1, W2 = normal(16, 8, 3, 3, seed=10), normal(8, 16, 1, 1, seed=11)
FLOATS = {"w1": W1, "b1": normal(16, seed=12), "w2": W2, "b2": normal(8, seed=13)}


def _scale(weight: Array) -> Array:
    return np.asarray(np.abs(weight).max(axis=(1, 2, 3)) / 127, np.float32)


def _codes(weight: Array) -> Array:
    return np.rint(weight / _scale(weight)[:, None, None, None]).astype(np.int8)


ZEROS = {"k1": np.zeros(16, np.int8), "k2": np.zeros(8, np.int8)}
SCALES = {"s1": _scale(W1), "s2": _scale(W2)}
CODES = {"c1": _codes(W1), "c2": _codes(W2)}
HEAD = "g (float[N,8,6,6] x) => (float[N,8,6,6] y)"
# Fake quantization of weights that are still floats, behind zero points that are copies of each other.
EXPORTED = """{ kc = Identity(k1)
  q1 = QuantizeLinear<axis=0>(w1, s1, kc) d1 = DequantizeLinear<axis=0>(q1, s1, kc)
  q2 = QuantizeLinear<axis=0>(w2, s2, k2) d2 = DequantizeLinear<axis=0>(q2, s2, k2) """
# Weights that are integers already.
STORED = """{ d1 = DequantizeLinear<axis=0>(c1, s1, k1) d2 = DequantizeLinear<axis=0>(c2, s2, k2) """
PLAIN, PLAIN_FLOATS = "{ ", {"d1": W1, "b1": FLOATS["b1"], "d2": W2, "b2": FLOATS["b2"]}
# Every tensor on a grid; those of the torch exporter have one element along one axis.
PAIRED = """xq = QuantizeLinear(x, sx, zx) xd = DequantizeLinear(xq, sx, zx)
  [one] a = Conv<pads=[1,1,1,1]>(xd, d1, b1) r = Relu(a)
  rq = QuantizeLinear(r, sr, zr) rd = DequantizeLinear(rq, sr, zr) [two] h = Conv(rd, d2, b2)
  hq = QuantizeLinear(h, sh, zh) hd = DequantizeLinear(hq, sh, zh) y = Neg(hd) }"""
BARE = "[one] a = Conv<pads=[1,1,1,1]>(x, d1, b1) r = Relu(a) [two] h = Conv(r, d2, b2) y = Neg(h) }"


def _grids(kind: type[np.generic], zeros: Sequence[int], scales: Sequence[float]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, zero, scale in zip("xrh", zeros, scales, strict=True):
        found[f"z{name}"] = np.array([zero], kind)
        found[f"s{name}"] = np.array([scale], np.float32)
    return found


AFFINE = _grids(np.uint8, (128, 0, 120), (0.04, 0.12, 0.3))
SYMMETRIC = _grids(np.int8, (0, 0, 0), (0.04, 0.25, 0.3))


def _model(weights: str, body: str, *constants: Mapping[str, Array]) -> Model:
    values = {key: value for group in constants for key, value in group.items()}
    return parse(HEAD + weights + body, values)


def _sqnr(before: Model, after: Model, optimize: str = "all") -> float:
    """Against the model as it was trained: without kernels in integers."""
    feeds = {"x": normal(8, 8, 6, 6, seed=99)}
    return sqnr(Session(before, optimize="none").run(feeds), Session(after, optimize=optimize).run(feeds))


def _scales_of(model: Model, op: str) -> set[float]:
    found = set()
    for node in model.graph.nodes:
        if node.op == op:
            assert isinstance(node.inputs[1], Constant)
            found |= set(np.ravel(node.inputs[1].values).tolist())
    return found


def _weight(model: Model, name: str) -> Constant:
    node: Node = next(each for each in model.graph.nodes if each.name == name)
    stored = node.inputs[1].inputs[0].inputs[0]
    assert isinstance(stored, Constant)
    return stored


def _signed(constant: Constant) -> Array:
    """Codes of a weight, stored with either sign."""
    return constant.values.astype(int) - (128 if constant.values.dtype == np.uint8 else 0)


@pytest.mark.parametrize("grids", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("weights", [EXPORTED, STORED], ids=["exported", "stored"])
def test_what_was_trained_stays_as_it_was_and_runs_in_integers(weights: str, grids: dict[str, Array]) -> None:
    model = _model(weights, PAIRED, FLOATS, ZEROS, SCALES, CODES, grids)
    result, changes = quantize(model, DATA)
    assert QuantizeFigures.of(changes).trained == (3, 2)
    assert (QuantizeFigures.of(changes).fused or {})["Conv"] == 2
    assert _sqnr(model, result) > 50
    assert _sqnr(model, result, "none") > 50
    assert _scales_of(result, "QuantizeLinear") == {float(grids[f"s{name}"][0]) for name in "xrh"}
    np.testing.assert_array_equal(_signed(_weight(result, "two")), CODES["c2"])
    kept = {"w1", "w2"} & set(result.graph.initializers)
    assert not kept or weights is STORED, "weights are there twice"
    ran = [node.op_type for node in optimized_model(result).graph.node]
    assert ran.count("QLinearConv") == 2
    assert "Relu" not in ran


def test_codes_that_could_saturate_are_stored_as_uint8() -> None:
    codes = {**CODES, "c1": np.full((16, 8, 3, 3), 120, np.int8)}
    model = _model(STORED, PAIRED, FLOATS, ZEROS, SCALES, codes, AFFINE)
    result, _ = quantize(model, DATA)
    assert _weight(result, "one").values.dtype == np.uint8
    assert (_weight(result, "one").values == 248).all()
    assert _sqnr(model, result) > 50


@pytest.mark.parametrize("algorithm", ["rtn", "cd"])
@pytest.mark.parametrize("weights", [EXPORTED, STORED], ids=["exported", "stored"])
def test_only_weights_were_trained(weights: str, algorithm: str) -> None:
    model = _model(weights, BARE, FLOATS, ZEROS, SCALES, CODES)
    result, changes = quantize(model, DATA, algorithm=algorithm)
    assert QuantizeFigures.of(changes).trained == (0, 2)
    assert (QuantizeFigures.of(changes).fused or {})["Conv"] == 2
    np.testing.assert_array_equal(_signed(_weight(result, "two")), CODES["c2"])
    assert _sqnr(model, result) > 25


def test_only_activations_were_trained() -> None:
    model = _model(PLAIN, PAIRED, PLAIN_FLOATS, AFFINE)
    result, changes = quantize(model, DATA)
    assert QuantizeFigures.of(changes).trained == (3, 0)
    assert (QuantizeFigures.of(changes).fused or {})["Conv"] == 2
    assert _scales_of(result, "QuantizeLinear") == {float(AFFINE[f"s{name}"][0]) for name in "xrh"}
    assert _sqnr(model, result) > 25


def test_what_stays_in_float_keeps_its_pairs_and_its_stored_weight() -> None:
    """Excluded nodes compute what they were trained to compute, and the file does not grow."""
    model = _model(STORED, PAIRED, FLOATS, ZEROS, SCALES, CODES, SYMMETRIC)
    result, changes = quantize(model, DATA, exclude=("two",))
    assert (QuantizeFigures.of(changes).fused or {})["Conv"] == 1
    assert _sqnr(model, result, "none") > 50
    assert _weight(result, "two").values.dtype == np.int8
    assert ops(result)["QuantizeLinear"] == 3


def test_quantizing_twice_is_quantizing_once() -> None:
    model = _model(PLAIN, BARE, PLAIN_FLOATS)
    once, _ = quantize(model, DATA)
    again, changes = quantize(once, DATA)
    assert (QuantizeFigures.of(changes).trained or (0, 0))[0] > 0
    assert ops(again)["QuantizeLinear"] == ops(once)["QuantizeLinear"]
    feeds = {"x": normal(8, 8, 6, 6, seed=99)}
    np.testing.assert_array_equal(Session(once).run(feeds)["y"], Session(again).run(feeds)["y"])


def test_pairs_of_other_kinds_are_left_alone() -> None:
    """Two grids on one tensor, a scale that is computed, codes that are read by something else."""
    model = parse("""g (float[4,8] x, float s) => (float[4,8] y, float[4,8] z, float[4,8] v, uint8[4,8] q)
        <float a = {0.1}, float b = {0.2}, uint8 o = {128}>
        { q = QuantizeLinear(x, a, o) y = DequantizeLinear(q, a, o)
          p = QuantizeLinear(x, b, o) r = DequantizeLinear(p, a, o) z = Sin(r)
          t = QuantizeLinear(x, s, o) u = DequantizeLinear(t, s, o) v = Sin(u) }""")
    feeds = {"x": normal(4, 8), "s": np.array(0.3, np.float32)}
    twin, _ = quantize(model, [feeds])
    assert ops(twin) == ops(model)
    for name, value in Session(model).run(feeds).items():
        np.testing.assert_array_equal(Session(twin).run(feeds)[name], value)
