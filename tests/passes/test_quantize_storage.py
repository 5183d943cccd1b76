"""Weights of few bits: the same codes in front of a product and inside of it, kept from file to file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.noise import sqnr
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.ops.blocks import packed, unpacked
from onnxslim.passes import Quantize, Slim, Unfuse
from onnxslim.passes.quantize import QuantizationPlan, QuantizeFigures
from onnxslim.passes.quantize.blocks import Blocking, nearest
from onnxslim.passes.quantize.choices import Settings, Variant
from onnxslim.passes.quantize.dynamic import Dynamic
from onnxslim.passes.quantize.static import Static
from onnxslim.passes.quantize.strategy import Strategy
from onnxslim.passes.quantize.weight_only import WeightOnly, WeightOnlyBlocks, WeightOnlyBytes
from onnxslim.runtime.profile import optimized_model
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import (
    apply,
    normal,
    ops,
    parse,
    quantize,
    reasons,
    run,
    same_outputs,
    skip_if_eight_bits_are_not_fused,
)

FEEDS = {"x": normal(3, 5, 72)}
KIND = "K=72, N=10, bits={bits}, block_size={size}, accuracy_level=4"
NBITS = f"y = com.microsoft.MatMulNBits<{KIND}>(x, w, s{{zero}})"


def products(opset: int = 17) -> Model:
    text = """g (float[N,S,72] x) => (float[N,S,48] y)
    { [one] a = MatMul(x, w1) ab = Add(a, b1) ar = Relu(ab) [two] y = MatMul(ar, w2) }"""
    weights = {"w1": normal(72, 96, seed=1), "b1": normal(96, seed=2), "w2": normal(96, 48, seed=3)}
    return parse(text, weights, opset=opset)


def made(bits: int = 4, size: int = 32, *, zeros: bool = False, opset: int = 17) -> Model:
    """A file with one product, as other tools write them."""
    random = np.random.default_rng(bits + size)
    blocks = -(-72 // size)
    constants: dict[str, Array] = {
        "w": random.integers(0, 256, (10, blocks, size * bits // 8)).astype(np.uint8),
        "s": (random.random((10, blocks)) * 0.1 - 0.05).astype(np.float32),
    }
    if zeros:
        constants["z"] = random.integers(0, 256, (10, -(-blocks * bits // 8))).astype(np.uint8)
    call = NBITS.format(bits=bits, size=size, zero=", z" if zeros else "")
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return parse(f"{head} g (float[N,S,72] x) => (float[N,S,10] y) {{ {call} }}", constants)


def stored(model: Model, **options: Any) -> Model:
    return apply(Quantize(activations="none", require_sqnr=0, **options), model)[0]


@pytest.mark.parametrize("storage", ["qdq", "matmulnbits"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("call", ["a = MatMul(x, w)", "i = Cast<to=7>(x) a = Gather(w, i)"])
def test_constants_that_are_outputs_are_not_stored_twice(call: str, weights: str, storage: str) -> None:
    made = "float[2,72] y" if "MatMul" in call else "float[2,256,72] y"
    text = f"g (float[2,256] x) => ({made}, float[256,72] w) {{ {call} y = MatMul(a, v) }}"
    model = parse(text, {"w": normal(256, 72), "v": normal(72, 72, seed=1)})
    options: dict[str, Any] = {"weights": weights, "storage": storage}
    result, changes = apply(Quantize(activations="none", **options), model)
    (reader,) = result.graph.outputs[1].outputs
    assert reader.op == model.graph.outputs[1].outputs[0].op
    assert any("an output of the model" in skip.reason for skip in changes.skipped)


@pytest.mark.parametrize("algorithm", ["rtn", "cd"])
def test_weights_as_large_as_float32_holds_are_rounded(algorithm: str) -> None:
    text = "g (float[N,72] x) => (float[N,48] y) { a = MatMul(x, w) y = Mul(a, s) }"
    model = parse(text, {"w": 1e36 * normal(72, 48), "s": np.float32(1e-36)})
    feeds = {"x": normal(64, 72)}
    options: dict[str, Any] = {"weights": "int4", "storage": "qdq", "algorithm": algorithm}
    result, _ = quantize(model, [feeds], activations="none", require_sqnr=0, **options)
    assert sqnr(run(model, feeds)["y"], run(result, feeds)["y"]) > 15


def written_out(model: Model) -> list[Array]:
    """What the weights of all products are, as DequantizeLinear computes them."""
    plain, _ = apply(Unfuse(), model)
    found = []
    for node in plain.graph.nodes:
        if node.op == "DequantizeLinear":
            codes, scale, *zero = (tensor.values for tensor in node.inputs if isinstance(tensor, Constant))
            spread = [
                np.repeat(each, node.attrs["block_size"], axis=0)[: len(codes)] for each in (scale, *zero)
            ]
            point = spread[1].astype(np.int32) if zero else 0
            found.append((codes.astype(np.int32) - point) * spread[0])
    return found


@pytest.mark.parametrize(("weights", "size"), [("int4", None), ("int4", 16), ("int4", 64), ("int8", 16)])
def test_both_storages_hold_the_same_codes(weights: str, size: int | None) -> None:
    model = products()
    both = [stored(model, weights=weights, block_size=size, storage=form) for form in ("qdq", "matmulnbits")]
    assert [ops(each)["MatMulNBits"] for each in both] == [0, 2]
    assert both[1].opsets == {"": 17, "com.microsoft": 1}, "nothing of it needs a later one"
    for one, two in zip(*map(written_out, both), strict=True):
        assert np.array_equal(one, two)
    outputs = [Session(each).run(FEEDS)["y"] for each in both]
    skip_if_eight_bits_are_not_fused(weights)
    assert sqnr(*outputs) > 100, "ONNX Runtime makes one of the other"
    nodes = optimized_model(both[0]).graph.node
    levels = [a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"]
    assert levels == [node.attrs["accuracy_level"] for node in both[1].graph.nodes if node.domain]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 32), (4, 128), (8, 32)])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_codes_that_are_there_are_not_rounded_again(bits: int, size: int, zeros: bool, weights: str) -> None:
    model = made(bits, size, zeros=zeros)
    before, expected = written_out(model), run(model, FEEDS)["y"]
    if bits == 8 and weights == "int4":
        return
    there = stored(model, weights=weights, storage="qdq")
    back = stored(there, weights=weights, storage="matmulnbits", block_size=64)
    for each in (there, back, stored(model, weights=weights, storage="matmulnbits")):
        assert np.array_equal(written_out(each), before), ops(each)
        assert sqnr(expected, run(each, FEEDS)["y"]) > 35
    assert (ops(there)["MatMulNBits"], ops(back)["MatMulNBits"]) == (0, 1)
    assert back.graph.nodes[0].attrs["block_size"] == size
    assert there.nbytes() == pytest.approx(back.nbytes(), rel=0.8), "no weight is there twice"


@pytest.mark.parametrize("clamp", ["Relu(a)", "Clip(a)"])
def test_what_onnx_runtime_would_not_fuse_is_written_fused(clamp: str) -> None:
    """It leaves a product alone whose Relu may disappear in a Q, and turns back the weight in every run."""
    text = f"""g (float[N,72] x) => (float[N,48] y)
    {{ a = MatMul(x, w1) r = {clamp} y = MatMul(r, w2) }}"""
    model = parse(text, {"w1": normal(72, 96), "w2": normal(96, 48, seed=1)})
    asked = stored(model, weights="int4", storage="qdq")
    ran = [node.op_type for node in optimized_model(asked).graph.node]
    assert (ran.count("MatMulNBits"), ran.count("DequantizeLinear")) == (1, 1)
    for weights in ("int4", "int8"):
        assert ops(stored(model, weights=weights))["MatMulNBits"] == 2
    assert ops(stored(model, weights="int4", layout="cuda"))["MatMulNBits"] == 0


def test_data_may_have_any_number_of_axes() -> None:
    model = parse("g (float[72] x) => (float[96] y) { y = MatMul(x, w) }", {"w": normal(72, 96)})
    feeds = {"x": normal(72, seed=1)}
    result = stored(model, weights="int8", storage="matmulnbits")
    assert ops(result) == {"MatMulNBits": 1}
    assert sqnr(run(model, feeds)["y"], run(result, feeds)["y"]) > 35


def test_a_product_that_is_left_alone_keeps_its_form() -> None:
    model = made(zeros=True)
    assert not apply(Quantize(activations="none", exclude=("*",)), model)[1]
    both = {"w1": normal(72, 72, seed=1), "w": model.graph.initializers["w"].values}
    head = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    call = NBITS.format(bits=4, size=32, zero="").replace("(x,", "(a,").replace("y =", "[kept] y =")
    text = f"{head} g (float[N,S,72] x) => (float[N,S,10] y) {{ [new] a = MatMul(x, w1) {call} }}"
    mixed = parse(text, {**both, "s": model.graph.initializers["s"].values})
    result, _ = apply(Quantize(activations="none", weights="int4", exclude=("kept",)), mixed)
    assert ops(result) == {"MatMulNBits": 2}
    assert np.array_equal(written_out(result)[1], written_out(mixed)[0])


def test_scales_of_half_precision_are_left_as_they_are() -> None:
    model = made()
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float16[N,S,72] x) => (float16[N,S,10] y) {"""
    constants = {name: model.graph.initializers[name].values for name in "ws"}
    half = parse(
        f"{text} {NBITS.format(bits=4, size=32, zero='')} }}",
        {"w": constants["w"], "s": constants["s"].astype(np.float16)},
    )
    result, changes = apply(Quantize(activations="none", weights="int4"), half)
    assert not changes
    assert (ops(result), result.opset) == ({"MatMulNBits": 1}, 17)


def test_eight_bits_become_four_where_that_is_asked_for() -> None:
    model = made(8, 32)
    result = stored(model, weights="int4")
    assert [node.attrs["bits"] for node in result.graph.nodes] == [4]
    assert 12 < sqnr(run(model, FEEDS)["y"], run(result, FEEDS)["y"]) < 30


def test_the_form_that_a_file_has_stays() -> None:
    assert ops(stored(made()))["MatMulNBits"] == 1
    assert ops(stored(products(), weights="int4")) == {
        "DequantizeLinear": 2,
        "MatMul": 2,
        "Add": 1,
        "Relu": 1,
    }


@pytest.mark.parametrize("opset", [17, 21])
def test_files_of_few_bits_run_in_integers(opset: int) -> None:
    model = made(zeros=True, opset=opset)
    data = [{"x": normal(4, 5, 72, seed=seed)} for seed in range(8)]
    result, changes = quantize(model, data, classifier=True)
    assert ops(result)["QuantizeLinear"] == 1
    assert ops(result)["MatMulNBits"] == 0
    assert QuantizeFigures.of(changes).fused == {"MatMul": 1}
    exact = run(apply(Unfuse(), model)[0], FEEDS)["y"]
    assert sqnr(exact, Session(result).run(FEEDS)["y"]) > 30


def test_what_stays_in_floats_keeps_its_few_bits() -> None:
    model = made()
    data = [{"x": normal(4, 5, 72, seed=seed)} for seed in range(8)]
    result, _ = quantize(model, data)
    assert result.nbytes() < 1.2 * model.nbytes()
    assert "DequantizeLinear" in ops(result)


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_products_are_written_out_in_a_later_opset(opset: int) -> None:
    model = made(zeros=True, opset=opset)
    report = Pipeline(Unfuse())(model)
    assert report.model.opset == 21
    assert ops(report.model) == {"DequantizeLinear": 1, "MatMul": 1}
    assert sqnr(run(model, FEEDS)["y"], run(report.model, FEEDS)["y"]) > 35


def test_slim_leaves_them() -> None:
    model = made()
    slim = Pipeline(Slim())(model).model
    assert ops(slim) == {"MatMulNBits": 1}
    same_outputs(model, slim)


def test_what_rounding_the_data_costs_is_told() -> None:
    model, data = products(), [FEEDS]
    found = {}
    for form in ("qdq", "matmulnbits"):
        _, changes = quantize(
            model, data, weights="int4", activations="none", storage=form, require_sqnr=0, algorithm="rtn"
        )
        found[form] = QuantizeFigures.of(changes).beside_floats
    assert found["qdq"] == found["matmulnbits"]
    assert found["qdq"] is not None
    assert 35 < found["qdq"] < 60
    _, changes = apply(Quantize(weights="int4", activations="none"), model, sample=FEEDS)
    assert QuantizeFigures.of(changes).beside_floats == found["qdq"], "also without data"


def test_what_the_operator_cannot_do_is_stored_in_eight_bits() -> None:
    text = """g (float[72,N] x, float[N,72] z) => (float[N,96] y, float[N,96] v, float[N,96] u)
    { [left] y = Gemm<transA=1>(x, w1, b) [half] v = Gemm<alpha=0.5>(z, w2, b)
      [plain] u = Gemm<transB=1>(z, w3, b) }"""
    values = {
        "w1": normal(72, 96),
        "w2": normal(72, 96, seed=1),
        "w3": normal(96, 72, seed=2),
        "b": normal(96),
    }
    model = parse(text, values)
    result, changes = apply(
        Quantize(weights="int4", activations="none", storage="matmulnbits", require_sqnr=0), model
    )
    assert ops(result) == {"DequantizeLinear": 2, "Gemm": 2, "MatMulNBits": 1}
    told = reasons(changes)
    assert (told["left"], told["half"]) == ("its data is transposed", "its alpha is not 1")
    feeds = {"x": normal(72, 4), "z": normal(4, 72, seed=3)}
    before, after = run(model, feeds), run(result, feeds)
    assert sqnr(before["y"], after["y"]) > 35
    assert sqnr(before["v"], after["v"]) > 35
    assert sqnr(before["u"], after["u"]) > 17


def test_all_codes_are_used_to_either_side() -> None:
    matrix = normal(64, 200)
    for zeros in (True, False):
        found = nearest(matrix, Blocking(4, 32, zeros))
        assert (found.codes.min(), found.codes.max()) == (-8, 7)
        assert (found.zeros is not None) == zeros
    plain = np.abs(matrix).reshape(2, 32, 200).max(axis=1).repeat(32, axis=0) / 7
    rounded = np.rint(matrix / plain) * plain
    kept = [sqnr(matrix, nearest(matrix, Blocking(4, 32, zeros)).values()) for zeros in (True, False)]
    assert kept[0] > kept[1] + 0.8
    assert kept[1] > sqnr(matrix, rounded) + 0.8


def test_eight_bits_of_a_block_use_the_lowest_code() -> None:
    matrix = normal(64, 200)
    found = nearest(matrix, Blocking(8, 32))
    assert (np.abs(found.codes.astype(int)).reshape(2, 32, 200).max(axis=1) >= 127).all()
    assert np.abs(found.values() - matrix).max() <= np.abs(found.scales).max() * 0.51


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from((2, 4, 8)), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_bytes_hold_codes(rows: int, count: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    found = packed(codes, bits)
    assert found.shape == (rows, -(-count * bits // 8))
    assert np.array_equal(unpacked(found, bits, count), codes)


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="storage goes with activations=none"):
        Quantize(storage="matmulnbits")
    with pytest.raises(UsageError, match="block_size goes with activations=none"):
        Quantize(activations="dynamic", block_size=32)
    with pytest.raises(UsageError, match="block_size is a power of two, not 48"):
        Quantize(activations="none", block_size=48)


# ------------------------------------------------------------------------------------------- tables

TIED = """g (int64[N,S] i) => (float[N,S,600] y)
{{ x = Gather(t, i) [one] a = MatMul(x, w1) r = Relu(a) [two] b = MatMul(r, w2) s = Add(b, x) {head} }}"""
HEADS = {
    "MatMul": "tt = Transpose<perm=[1,0]>(t) [head] y = MatMul(s, tt)",
    "MatMul, as it is": "tt = Transpose(t) [head] y = MatMul(s, tt)",
}
FLAT = """g (int64[N] i) => (float[N,600] y)
{ x = Gather(t, i) [one] a = MatMul(x, w1) r = Relu(a) [two] b = MatMul(r, w2)
  [head] y = Gemm<transB=1>(b, t, c) }"""
IDS = {"i": np.random.default_rng(1).integers(0, 600, (3, 5))}


def decoder(head: str = "MatMul", width: int = 64) -> Model:
    weights = {"w1": normal(width, 96, seed=1) / 8, "w2": normal(96, width, seed=3) / 10}
    return parse(TIED.format(head=HEADS[head]), {"t": normal(600, width), **weights})


def lookup(opset: int = 17, width: int = 64) -> Model:
    text = "g (int64[N,S] i) => (float[N,S,48] y) { [rows] x = Gather(t, i) [one] y = MatMul(x, w) }"
    return parse(text, {"t": normal(600, width), "w": normal(width, 48, seed=1)}, opset=opset)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("weights", "size", "least"), [("int4", 0.17, 16), ("int8", 0.28, 36)])
def test_a_table_and_the_head_have_one_set_of_codes(
    head: str, weights: str, size: float, least: float
) -> None:
    model = decoder(head)
    result = stored(model, weights=weights)
    assert ops(result) == {"GatherBlockQuantized": 1, "Reshape": 1, "MatMulNBits": 3, "Relu": 1, "Add": 1}
    assert result.nbytes() < size * model.nbytes()
    assert sqnr(run(model, IDS)["y"], Session(result).run(IDS)["y"]) > least
    head_node = next(node for node in result.graph.nodes if node.name == "head")
    rows = next(node for node in result.graph.nodes if node.op == "GatherBlockQuantized")
    assert rows.inputs[2] is head_node.inputs[2]
    assert head_node.inputs[1].inputs[0].inputs[0] is rows.inputs[0]


def test_what_has_one_set_of_codes_keeps_it() -> None:
    once = stored(decoder(), weights="int4")
    for again in (stored(once, weights="int4"), Pipeline(Slim())(once).model):
        assert ops(again) == ops(once)
        assert again.nbytes() == once.nbytes()
        assert np.array_equal(run(again, IDS)["y"], run(once, IDS)["y"])


def test_blocks_of_a_shared_table_fill_its_rows() -> None:
    model = decoder(width=48)
    result = stored(model, weights="int4")
    assert {node.name: node.attrs["block_size"] for node in result.graph.nodes if node.domain}["head"] == 16
    assert all(
        len(node.inputs) < 4 or not node.inputs[3].name for node in result.graph.nodes if node.name == "head"
    )
    assert sqnr(run(model, IDS)["y"], run(result, IDS)["y"]) > 16


def test_codes_that_others_have_tied_stay_one() -> None:
    """As tools for generation do it: the lookup reads those of the head, reshaped."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (600, 2, 16)).astype(np.uint8)
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (int64[N,S] i) => (float[N,S,600] y) {
      r = Constant<value = int64[2] {600, 32}>() t = Reshape(w, r)
      x = com.microsoft.GatherBlockQuantized<bits=4, block_size=32, quantize_axis=1>(t, i, s)
      z = Cast<to=1>(x)
      y = com.microsoft.MatMulNBits<K=64, N=600, bits=4, block_size=32, accuracy_level=4>(z, w, s) }"""
    scales = (random.random((600, 2)) * 0.1).astype(np.float32)
    model = parse(text, {"w": codes, "s": scales})
    result = stored(model, weights="int4")
    assert ops(result)["MatMulNBits"] == 1
    assert result.nbytes() < 1.01 * model.nbytes(), "once"
    assert np.array_equal(run(result, IDS)["y"], run(model, IDS)["y"])


def test_a_table_in_a_gemm_is_shared_too() -> None:
    constants = {"t": normal(600, 64), "w1": normal(64, 96, seed=1) / 8, "w2": normal(96, 64, seed=3) / 10}
    model = parse(FLAT, {**constants, "c": normal(600, seed=5)})
    result = stored(model, weights="int8")
    assert ops(result) == {"GatherBlockQuantized": 1, "Reshape": 1, "MatMulNBits": 3, "Relu": 1}
    feeds = {"i": IDS["i"].reshape(-1)}
    assert sqnr(run(model, feeds)["y"], run(result, feeds)["y"]) > 33


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_stays_in_floats_shares_the_floats(head: str) -> None:
    model = decoder(head)
    result = stored(model, weights="int4", exclude=("head",))
    assert ops(result) == {"Gather": 1, "Transpose": 1, "MatMul": 1, "MatMulNBits": 2, "Relu": 1, "Add": 1}
    assert np.array_equal(result.graph.initializers["t"].values, model.graph.initializers["t"].values)
    assert result.nbytes() < 0.85 * model.nbytes()
    assert sqnr(run(model, IDS)["y"], run(result, IDS)["y"]) > 20


def test_rows_that_blocks_do_not_fill_are_not_shared() -> None:
    model = decoder(width=72)
    assert ops(stored(model, weights="int4", storage="matmulnbits"))["MatMul"] == 1


def test_tied_tables_are_written_so_for_processors_only() -> None:
    model = decoder()
    assert ops(stored(model, weights="int4", layout="cuda"))["MatMulNBits"] == 0
    assert ops(stored(model, weights="int4", storage="qdq"))["MatMulNBits"] == 0


@pytest.mark.parametrize(
    ("weights", "width", "bits"), [("int4", 64, 4), ("int8", 64, 8), ("int4", 72, 4), ("int4", 65, 8)]
)
def test_tables_are_looked_up_in_few_bits(weights: str, width: int, bits: int) -> None:
    model = lookup(width=width)
    result = stored(model, weights=weights, storage="matmulnbits")
    rows = next(node for node in result.graph.nodes if node.name == "rows")
    assert (rows.op, rows.attrs["bits"]) == ("GatherBlockQuantized", bits)
    plain, _ = apply(Unfuse(), result)
    assert ops(plain) == {"DequantizeLinear": 2, "Gather": 1, "MatMul": 1}
    for feeds in (IDS, {"i": -1 - IDS["i"]}):
        assert sqnr(run(model, feeds)["y"], run(result, feeds)["y"]) > (15 if weights == "int4" else 38)
        assert sqnr(run(plain, feeds)["y"], run(result, feeds)["y"]) > 35


@pytest.mark.parametrize(("width", "zeros"), [(32, False), (64, True), (72, False), (96, False), (128, True)])
def test_no_zero_points_where_older_kernels_take_wrong_ones(width: int, zeros: bool) -> None:
    """ONNX Runtime 1.23 and 1.24 do, where a row has an odd number of blocks."""
    result = stored(lookup(width=width), weights="int4", storage="matmulnbits")
    rows = next(node for node in result.graph.nodes if node.name == "rows")
    assert (rows.attrs["bits"], len(rows.inputs) == 4) == (4, zeros)


def test_a_table_is_kept_in_eight_bits_where_four_cost_too_much() -> None:
    model = lookup()
    data = [{"i": np.random.default_rng(seed).integers(0, 600, (4, 12))} for seed in range(8)]
    same: dict[str, Any] = {"weights": "int4", "activations": "none", "storage": "matmulnbits"}
    result, changes = quantize(model, data, **same, require_sqnr=30)
    bits = {node.name: node.attrs["bits"] for node in result.graph.nodes}
    assert bits == {"rows": 8, "one": 8}
    layers = QuantizeFigures.of(changes).layers
    assert layers is not None
    assert {layer.node: layer.op for layer in layers} == {"rows": "Gather", "one": "MatMul"}
    _, alone = quantize(model, data, **same, exclude=("rows",), require_sqnr=0, algorithm="rtn")
    told = {layer.node: layer.sqnr for layer in layers}
    assert told["one"] == pytest.approx(QuantizeFigures.of(alone).sqnr, abs=1.0), "the table is left alone"
    plan = QuantizeFigures.of(changes).plan
    again, _ = quantize(model, data, plan=plan)
    assert again.to_proto() == result.to_proto()


# ------------------------------------------------------------------------------- four and eight bits


def uneven() -> tuple[Model, list[dict[str, Array]]]:
    """Three products, of which the second counts most by far."""
    text = """g (float[N,64] x) => (float[N,64] y)
    { [first] a = MatMul(x, w1) [second] b = MatMul(x, w2) [third] c = MatMul(x, w3)
      ab = Add(a, b) y = Add(ab, c) }"""
    sizes = {"w1": 0.1, "w2": 1.0, "w3": 0.3}
    weights = {
        name: normal(64, 64, seed=seed) * np.float32(size) for seed, (name, size) in enumerate(sizes.items())
    }
    return parse(text, weights), [{"x": normal(8, 64, seed=seed)} for seed in range(8)]


WAYS: Mapping[str, Mapping[str, Any]] = {
    "qdq": {"activations": "none", "storage": "qdq"},
    "matmulnbits": {"activations": "none", "storage": "matmulnbits"},
    "static": {},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("size", "wide"),
    [(0.165, []), (0.20, ["second"]), (0.24, ["second", "third"]), (0.3, ["first", "second", "third"])],
)
def test_room_goes_to_the_layers_that_gain_most(way: str, size: float, wide: list[str]) -> None:
    model, data = uneven()
    options: dict[str, Any] = {"weights": "int4", "classifier": True, **WAYS[way]}
    result, changes = quantize(model, data, **options, size=size)
    assert result.nbytes() <= size * model.nbytes()
    told = reasons(changes)
    assert sorted(name for name in told if told[name] == "there is room for it in eight bits") == wide
    plan = QuantizeFigures.of(changes).plan
    assert quantize(model, data, plan=plan)[0].to_proto() == result.to_proto()


@pytest.mark.parametrize(
    ("require", "wide", "kept"), [(15.0, [], []), (30.0, ["second", "third"], []), (40.0, [], ["second"])]
)
def test_more_is_kept_by_eight_bits_before_floats(require: float, wide: list[str], kept: list[str]) -> None:
    model, data = uneven()
    result, changes = quantize(model, data, weights="int4", classifier=True, require_sqnr=require)
    told = reasons(changes)
    assert [name for name in told if "in fewer bits" in told[name]] == wide
    figures = QuantizeFigures.of(changes)
    assert figures.sqnr is not None
    assert figures.sqnr >= require
    assert [layer.node for layer in figures.layers or () if layer.kept] == kept
    assert isinstance(figures.plan, QuantizationPlan)
    assert [each.node for each in figures.plan.layers if each.wide] == wide
    assert figures.plan.fitted is None or set(figures.plan.fitted) <= {*wide, *kept}
    plan = figures.plan
    assert quantize(model, data, plan=plan)[0].to_proto() == result.to_proto()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("way", [Static, Dynamic, WeightOnly, WeightOnlyBytes, WeightOnlyBlocks])
@pytest.mark.parametrize("eight", [False, True])
def test_what_is_held_back_is_told(way: type[Strategy], weights: Any, eight: bool) -> None:
    strategy = way(Settings(weights=weights), Target.cpu().layout)
    held = strategy.without(Variant(eight=eight), {"first": "why"})
    assert strategy.held_back(held) == {"first": "why"}
    assert strategy.held_back(strategy.without(held, {})) == {}
    widens = way is Static and weights == "int4" and not eight
    assert strategy.widens(held) == widens == bool(held.wide)


def test_room_is_not_given_for_noise_of_the_data() -> None:
    """The first product is noisiest by far, whatever its weight: one channel stretches the range of all."""
    text = """g (float[N,64] x, float[N,64] z) => (float[N,64] y)
    { [first] a = MatMul(x, w1) [second] b = MatMul(z, w2) y = Add(a, b) }"""
    weights = {"w1": normal(64, 64), "w2": 2 * normal(64, 64, seed=1)}
    weights["w1"][0] = 0
    stretched = np.ones(64, np.float32)
    stretched[0] = 100
    data = [
        {"x": stretched * normal(8, 64, seed=seed), "z": normal(8, 64, seed=seed + 9)} for seed in range(8)
    ]
    model = parse(text, weights)
    options: dict[str, Any] = {"equalization": False, "sequential": False, "algorithm": "rtn"}
    _, changes = quantize(model, data, weights="int4", classifier=True, size=0.22, layers=True, **options)
    layers = QuantizeFigures.of(changes).layers or ()
    told = reasons(changes)
    assert [name for name in told if told[name] == "there is room for it in eight bits"] == ["second"], layers


def test_what_does_not_fit_is_told() -> None:
    model, data = uneven()
    result, changes = quantize(model, data, weights="int4", activations="none", size=0.1)
    assert "in int4 it takes" in reasons(changes)["size=0.1"]
    assert [skip.node for skip in changes.skipped if skip.warning] == ["size=0.1"]
    assert ops(result)["DequantizeLinear"] == 3
    with pytest.raises(UsageError, match="size goes with weights=int4, int3 or int2"):
        Quantize(size=0.2)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        apply(Quantize(weights="int4", activations="none", size=0.2), model)
