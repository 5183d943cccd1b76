"""Weights that are computed from constants: every pass over layers takes them for what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxslim.engine.base import Pass
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model, load
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from tests.helpers import apply, normal, ops, parse, quantize, reasons, run, same_outputs

# What a weight of 64 x 96 is computed by, and from what.
WAYS: dict[str, tuple[str, dict[str, Array]]] = {
    "copied": ("w = Identity(v)", {"v": normal(64, 96)}),
    "copied twice": ("u = Identity(v) w = Identity(u)", {"v": normal(64, 96)}),
    "transposed": ("w = Transpose(v)", {"v": normal(96, 64)}),
    "reshaped": ("w = Reshape(v, s)", {"v": normal(96 * 64), "s": np.array([64, -1])}),
    "reshaped, then transposed": (
        "u = Reshape(v, s) w = Transpose(u)",
        {"v": normal(96 * 64), "s": np.array([-1, 64])},
    ),
    "cast": ("w = Cast<to=1>(v)", {"v": normal(64, 96).astype(np.float64)}),
    "scaled": ("w = Mul(v, s)", {"v": normal(64, 96), "s": normal(96)}),
    "normalized": ("n = ReduceL2<axes=[0]>(v) w = Div(v, n)", {"v": normal(64, 96)}),
}


def computed(way: str) -> Model:
    text, constants = WAYS[way]
    return parse(
        f"""g (float[N,64] x) => (float[N,8] y) {{
            {text} [first] a = MatMul(x, w) r = Relu(a) [last] y = MatMul(r, z)
        }}""",
        {name: values * 0.1 if values.dtype.kind == "f" else values for name, values in constants.items()}
        | {"z": normal(96, 8, seed=1)},
    )


@pytest.mark.parametrize("way", WAYS)
def test_what_computes_a_weight_goes_and_nothing_changes(way: str) -> None:
    model = computed(way)
    twin = model.copy()
    assert not store_weights(twin)
    first = next(node for node in twin.graph.nodes if node.name == "first")
    assert isinstance(first.inputs[1], Constant)
    assert ops(twin) == {"MatMul": 2, "Relu": 1}
    assert twin.nbytes() <= model.nbytes()
    same_outputs(model, twin, {"x": normal(4, 64)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "step",
    [
        Quantize(),
        Quantize(activations="dynamic"),
        Quantize(activations="none"),
        Factorize(params=0.7),
        Half(),
        Prune(ratio=0.25, align=1),
    ],
    ids=Pass.describe,
)
def test_every_pass_over_layers_sees_it(way: str, step: Pass) -> None:
    model = computed(way)
    after, changes = apply(step, model, [{"x": normal(16, 64)}])
    assert changes
    assert after.nbytes() < 0.85 * computed("copied").nbytes()


def test_a_weight_shared_through_copies_is_stored_once(tmp_path: Path) -> None:
    model = parse(
        """g (float[N,128] x) => (float[N,128] y) {
            v = Identity(w) u = Identity(v)
            a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) d = Relu(c) e = MatMul(d, u) y = Relu(e)
        }""",
        {"w": 0.1 * normal(128, 128)},
    )
    after, _ = quantize(model, [{"x": normal(16, 128)}], classifier=True)
    for name, each in (("before", model), ("after", after)):
        each.save(tmp_path / f"{name}.onnx")
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["after"] < 0.35 * sizes["before"]
    assert load(tmp_path / "after.onnx").nbytes() < 0.3 * model.nbytes()


def test_a_copy_that_is_an_output_stays_one() -> None:
    model = parse(
        "g (float[N,4] x) => (float[N,4] y, float[4,4] v) { v = Identity(w) y = Gemm(x, v) }",
        {"w": normal(4, 4)},
    )
    twin = model.copy()
    store_weights(twin)
    gemm = next(node for node in twin.graph.nodes if node.op == "Gemm")
    assert gemm.inputs[1] is twin.graph.initializers["w"]
    same_outputs(model, twin, exact=True)


def test_a_copy_is_kept_where_a_body_has_another_tensor_of_that_name() -> None:
    model = parse(
        """g (float[4,4] x, bool c) => (float[4,4] y) {
            v = Identity(w)
            y = If(c) <
                then_branch = t () => (float[4,4] p) <float w = {2}> { u = Mul(x, w) p = Add(u, v) },
                else_branch = e () => (float[4,4] q) { q = Identity(x) }>
        }""",
        {"w": normal(4, 4)},
    )
    twin = model.copy()
    store_weights(twin)
    same_outputs(model, twin, {"x": normal(4, 4, seed=1), "c": np.array(True)}, exact=True)


def test_what_is_read_as_it_is_too_is_not_stored_twice() -> None:
    model = parse(
        """g (int64[N] i) => (float[N,300] y) {
            x = Gather(table, i) head = Transpose(table) [last] y = MatMul(x, head)
        }""",
        {"table": normal(300, 64)},
    )
    twin = model.copy()
    (note,) = store_weights(twin)
    assert "larger" in note.reason
    assert twin.nbytes() == model.nbytes()
    for step in (Quantize(activations="dynamic"), Factorize(params=0.7)):
        _, changes = apply(step, model, [{"i": np.arange(8)}])
        assert "'onnxslim fold --max-growth BYTES'" in reasons(changes)["last"]


def test_sizes_are_left_to_folding() -> None:
    model = parse(
        """g (float[N,8] x) => (float[A,B] y) <int64[1] a = {2}, int64[1] b = {-1}> {
            s = Concat<axis=0>(b, a) y = Reshape(x, s)
        }"""
    )
    twin = model.copy()
    assert not store_weights(twin)
    assert ops(twin) == ops(model)


def test_quantized_weights_stay_integers() -> None:
    model = parse(
        """g (float[N,4] x) => (float[N,4] y) <float scale = {0.5}, int8 zero = {0}> {
            w = DequantizeLinear(codes, scale, zero) v = Transpose(w) [last] y = MatMul(x, v)
        }""",
        {"codes": np.ones((4, 4), np.int8)},
    )
    twin = model.copy()
    store_weights(twin)
    assert ops(twin) == ops(model)
    _, changes = apply(Factorize(params=0.7), model)
    assert reasons(changes)["last"] == "its weight is quantized"


def test_values_are_what_the_model_computed() -> None:
    model = computed("normalized")
    twin = model.copy()
    store_weights(twin)
    first = next(node for node in twin.graph.nodes if node.name == "first")
    given = WAYS["normalized"][1]["v"] * np.float32(0.1)
    values = first.constant(1)
    assert values is not None
    np.testing.assert_allclose(values, given / np.sqrt(np.square(given).sum(0)), rtol=1e-6)
    assert run(twin, {"x": normal(2, 64)})["y"].shape == (2, 8)
