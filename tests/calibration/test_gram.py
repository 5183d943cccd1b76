"""Layers as matrix products, and the moments of what they see: against ONNX Runtime and exact sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import Gram, Moments, covariances, observe
from onnxslim.calibration.stream import sampled
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops import layer_of, view_of
from onnxslim.ops.layers import Layer
from tests.helpers import normal, parse, run


def layer(model: Model) -> Layer:
    found = layer_of(model.graph.nodes[0])
    assert isinstance(found, Layer)
    return found


def agrees(text: str, data: Array, weight: Array, side: int = 1) -> None:
    """The layer's columns times its matrix are what ONNX Runtime computes, and its weight comes back."""
    model = parse(text, {"w": weight})
    expected = run(model, {"x": data})["y"]
    found = layer(model) if side else view_of(model.graph.nodes[0], weight_index=side)
    assert found is not None
    count = found.count(data)
    assert count == expected.size // expected.shape[found.axis]
    at = np.arange(count)
    np.testing.assert_allclose(
        found.matrix() @ found.columns(data, at), found.results(expected, at), rtol=1e-4, atol=1e-4
    )
    some = at[::3]
    np.testing.assert_array_equal(found.columns(data, some), found.columns(data, at)[..., some])
    none = found.columns(data, at[:0])
    assert none.shape == (*found.columns(data, at).shape[:2], 0)
    np.testing.assert_allclose(found.restored(found.matrix()), weight, rtol=1e-6)


def window(op: str, attributes: str, axes: int) -> str:
    free = ",".join("HWD"[:axes])
    return f"g (float[N,C,{free}] x) => (float[N,O,{free}2] y) {{ y = {op}<{attributes}>(x, w) }}".replace(
        f"{free}2", ",".join(f"{axis}2" for axis in "HWD"[:axes])
    )


@st.composite
def windows(draw: st.DrawFn, op: str) -> tuple[str, Array, Array]:
    axes = draw(st.integers(1, 3 if op == "Conv" else 2))

    def numbers(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    kernel, strides, dilations = numbers(1, 3), numbers(1, 3), numbers(1, 2)
    groups, ins, outs = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    words = [f"group={groups}", f"strides={strides}", f"dilations={dilations}"]
    mode = draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "pads":
        words.append(f"pads={numbers(0, 1) + numbers(0, 1)}")
    elif op == "ConvTranspose" or mode == "VALID" or dilations == [1] * axes:
        words.append(f'auto_pad="{mode}"')
    sizes = [7 - i for i in range(axes)]
    shape = (groups * outs, ins) if op == "Conv" else (groups * ins, outs)
    return window(op, ", ".join(words), axes), normal(2, groups * ins, *sizes), normal(*shape, *kernel)


@settings(max_examples=60)
@given(windows("Conv"))
def test_convolutions_are_matrix_products(case: tuple[str, Array, Array]) -> None:
    agrees(*case)


@settings(max_examples=60)
@given(windows("ConvTranspose"))
def test_transposed_convolutions_are_matrix_products(case: tuple[str, Array, Array]) -> None:
    agrees(*case)


@pytest.mark.parametrize(
    "attributes",
    [
        "strides=[2,2], output_padding=[1,0], pads=[1,0,0,1]",
        "strides=[2,2], output_shape=[13,12]",
        'strides=[2,3], auto_pad="SAME_UPPER", output_shape=[13,16]',
    ],
)
def test_output_sizes_of_transposed_convolutions(attributes: str) -> None:
    agrees(window("ConvTranspose", attributes, 2), normal(2, 3, 6, 5), normal(3, 2, 3, 3))


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_in_every_orientation(alpha: float, transposed: tuple[int, int]) -> None:
    a, b = transposed
    text = f"g (float[N,M] x) => (float[A,B] y) {{ y = Gemm<alpha={alpha}, transA={a}, transB={b}>(x, w) }}"
    agrees(text, normal(4, 5) if a else normal(5, 4), normal(3, 4) if b else normal(4, 3))


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4), (2, 3, 5, 4)])
def test_matmul_of_any_rank(shape: Sequence[int]) -> None:
    dims = ",".join("ABCD"[: len(shape)])
    text = f"g (float[{dims}] x) => (float[{','.join('ABCE'[: len(shape)])}] y) {{ y = MatMul(x, w) }}"
    agrees(text, normal(*shape), normal(4, 3))


@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_weight_on_the_left(transposed: tuple[int, int]) -> None:
    a, b = transposed
    text = f"g (float[N,M] x) => (float[A,B] y) {{ y = Gemm<alpha=2.0, transA={a}, transB={b}>(w, x) }}"
    agrees(text, normal(5, 4) if b else normal(4, 5), normal(4, 3) if a else normal(3, 4), side=0)
    product = "g (float[N,M,K] x) => (float[N,3,K] y) { y = MatMul(w, x) }"
    agrees(product, normal(2, 4, 5), normal(3, 4), side=0)


@pytest.mark.parametrize(
    ("text", "weight", "reason"),
    [
        ("g (float[N,4] x, float[4,3] v) => (float[N,3] y) { y = Gemm(x, v) }", None, "not a constant"),
        ("g (double[N,4] x) => (double[N,3] y) { y = MatMul(x, w) }", np.ones((4, 3)), "float64"),
        ("g (float[N,2,4] x) => (float[N,2,3] y) { y = MatMul(x, w) }", normal(2, 4, 3), "not a matrix"),
        ("g (float[N,4] x) => (float[N,3] y) { y = Gemm<alpha=0.0>(x, w) }", normal(4, 3), "alpha"),
    ],
)
def test_what_is_no_layer_says_why(text: str, weight: Array | None, reason: str) -> None:
    found = layer_of(parse(text, {} if weight is None else {"w": weight}).graph.nodes[0])
    assert isinstance(found, str)
    assert reason in found


@given(
    hnp.arrays(np.float32, (2, 3, 40), elements=st.floats(-9, 9, width=16)),
    hnp.arrays(np.float32, (2, 1, 40), elements=st.floats(-9, 9, width=16)),
    st.integers(1, 39),
)
def test_moments_are_those_of_the_rows(x: Array, y: Array, cut: int) -> None:
    whole, parts = Moments(), [Moments(), Moments()]
    whole.update(x, y)
    parts[0].update(x[..., :cut], y[..., :cut])
    parts[1].update(x[..., cut:], y[..., cut:])
    for found in (whole.result(), parts[0].result().joined(parts[1].result())):
        dx, dy = (each - each.mean(axis=2, keepdims=True) for each in (x.astype(float), y.astype(float)))
        assert found.count == 40
        np.testing.assert_allclose(found.gram, dx @ dx.swapaxes(1, 2) / 40, atol=1e-4)
        np.testing.assert_allclose(found.cross, dy @ dx.swapaxes(1, 2) / 40, atol=1e-4)
        np.testing.assert_allclose(found.power, (dy**2).mean(axis=2), atol=1e-4)
        np.testing.assert_allclose(found.x_mean, x.mean(axis=2), atol=1e-5)
        np.testing.assert_allclose(found.raw().gram, x @ x.swapaxes(1, 2) / 40, atol=1e-4)


def test_a_large_mean_does_not_cost_digits() -> None:
    x = normal(1, 4, 9000) + np.float32(1000.0)
    moments = Moments()
    for part in np.array_split(x, 9, axis=2):
        moments.update(part, part[:, :1])
    exact = np.cov(x[0].astype(np.float64), bias=True)
    found: Gram = moments.result()
    np.testing.assert_allclose(found.gram[0], exact, atol=1e-5)
    np.testing.assert_allclose(found.cross[0], exact[:1], atol=1e-5)


def test_what_cannot_be_summed_is_an_error() -> None:
    moments = Moments()
    with pytest.raises(CalibrationError, match="no rows"):
        moments.result()
    with pytest.raises(ValueError, match=r"\(g, k, n\)"):
        moments.update(normal(1, 2, 3), normal(1, 2, 4))
    moments.update(np.full((1, 1, 2), np.nan, np.float32), normal(1, 1, 2))
    with pytest.raises(CalibrationError, match="NaN"):
        moments.result()


@given(st.integers(1, 400), st.integers(1, 6), st.integers(1, 50), st.integers(0, 3))
def test_every_sample_gives_its_share_of_positions(per: int, samples: int, quota: int, seed: int) -> None:
    whole = sampled(per * samples, samples, 0, quota, seed)
    assert (np.diff(whole) > 0).all()
    assert (np.bincount(whole // per, minlength=samples) == min(per, quota)).all()
    parts = [sampled(per, 1, i, quota, seed) + i * per for i in range(samples)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_positions_are_spread_evenly_and_depend_on_the_seed() -> None:
    found = sampled(100 * 784, 100, 0, 30)
    columns = np.bincount(found % 28, minlength=28)
    assert columns.min() > 0.5 * columns.mean()
    assert columns.max() < 1.5 * columns.mean()
    assert (found != sampled(100 * 784, 100, 0, 30, seed=1)).mean() > 0.9


def small() -> Model:
    return parse(
        """g (float[N,2,6,6] x) => (float[N,3] y)
        { c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)
          m = MatMul(f, v) y = Add(m, a) }""",
        {"w": normal(4, 2, 3, 3), "b": normal(4), "v": normal(4, 3), "a": normal(3)},
    )


def test_observed_moments_give_the_weights_back() -> None:
    data = CalibrationData([{"x": normal(4, 2, 6, 6, seed=i)} for i in range(4)])
    model = small()
    found = observe(model, data, ["c", "m"], against={"m": "y"})
    weight = np.linalg.solve(found["c"].gram, found["c"].cross.swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_allclose(weight.reshape(4, 2, 3, 3), model.graph.initializers["w"].values, atol=1e-4)
    bias = found["c"].y_mean - (weight @ found["c"].x_mean[..., None])[..., 0]
    np.testing.assert_allclose(bias[0], model.graph.initializers["b"].values, atol=1e-4)
    assert found["c"].count == 16 * 36
    assert found["m"].gram.shape == (1, 4, 4)
    np.testing.assert_allclose(
        found["m"].y_mean - (model.graph.initializers["v"].values.T @ found["m"].x_mean[0]),
        model.graph.initializers["a"].values[None],
        atol=1e-4,
    )
    alone = observe(model, data, ["c", "m"], alone=True)
    for name, each in alone.items():
        np.testing.assert_array_equal(each.gram, found[name].gram)
        np.testing.assert_array_equal(each.x_mean, found[name].x_mean)
        assert each.cross.shape[1] == each.power.shape[1] == 0


def test_the_cut_into_batches_does_not_matter() -> None:
    whole = normal(12, 2, 6, 6)
    one = observe(small(), [{"x": whole}], ["c"], rows=120)["c"]
    many = observe(small(), [{"x": whole[i : i + 4]} for i in (0, 4, 8)], ["c"], rows=120)["c"]
    assert one.count == many.count == 120
    np.testing.assert_allclose(many.gram, one.gram, atol=1e-5)
    again = observe(small(), [{"x": whole}], ["c"], rows=120)["c"]
    np.testing.assert_array_equal(again.gram, one.gram)


@pytest.mark.parametrize(
    ("layers", "against", "message"),
    [
        (["z"], {}, "no node of the main graph makes a tensor 'z'"),
        (["r"], {}, r"\(Relu\) is not a layer"),
        (["c"], {"c": "z"}, "'z' is neither an input nor computed"),
    ],
)
def test_unknown_names_are_errors(layers: list[str], against: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        observe(small(), [{"x": normal(1, 2, 6, 6)}], layers, against=against)


def test_values_that_are_not_finite_name_the_layer() -> None:
    with pytest.raises(CalibrationError, match="layer 'c': the rows hold NaN"):
        observe(small(), [{"x": np.full((1, 2, 6, 6), np.inf, np.float32)}], ["c"])


def test_layers_that_see_nothing_have_no_moments() -> None:
    model = parse(
        """g (float[N,4] x, float[P,4] past) => (float[N,2] y, float[P,2] z)
        { y = MatMul(x, w) z = MatMul(past, v) }""",
        {"w": normal(4, 2), "v": normal(4, 2)},
    )
    feeds = [{"x": normal(8, 4), "past": np.zeros((0, 4), np.float32)}]
    assert observe(model, feeds, ["y", "z"]).keys() == {"y"}
    assert covariances(model, CalibrationData(feeds), [("x", 1), ("past", 1)]).keys() == {("x", 1)}
