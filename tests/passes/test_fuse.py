"""What goes into the weights of a layer, computed by the definition of the operators and by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim.errors import UsageError
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model, load
from onnxslim.ops.layers import per_channel
from onnxslim.passes import predicates
from onnxslim.passes.fold import Fold
from onnxslim.passes.fuse import Fuse
from tests.helpers import apply, normal, ops, parse, run, same_outputs

RANDOM = np.random.default_rng(0)
CONV_BATCHNORM = (
    "g (float[N,3,5,5] x, float[4,3,3,3] stem_weight, float[4] s, float[4] t, float[4] m, float[4] v)"
    " => (float[N,4,3,3] y)"
    "{ [stem] a = Conv<dilations=[1,1]>(x, stem_weight) y = BatchNormalization(a, s, t, m, v) }"
)


def values(*shape: int, positive: bool = False) -> Array:
    made = RANDOM.uniform(0.5, 1.5, shape) if positive else RANDOM.standard_normal(shape)
    return np.asarray(made, np.float32)


def batchnorm(channels: int) -> dict[str, Array]:
    return {
        "s": values(channels),
        "t": values(channels),
        "m": values(channels),
        "v": values(channels, positive=True),
    }


def conv_batchnorm() -> Model:
    return parse(CONV_BATCHNORM, {"stem_weight": values(4, 3, 3, 3), **batchnorm(4)})


def test_names_of_weight_bias_and_node() -> None:
    model = conv_batchnorm()
    before = model.graph.initializers["stem_weight"].values
    after, changes = apply(Fuse(), model)
    (node,) = after.graph.nodes
    assert (node.name, node.op, node.outputs[0].name) == ("stem", "Conv", "y")
    assert [tensor.name for tensor in node.inputs] == ["x", "stem_weight", "stem_bias"]
    assert node.attrs == {"dilations": (1, 1)}
    assert [each.name for each in after.to_proto().graph.initializer] == ["stem_weight", "stem_bias"]
    assert [(c.node, c.action) for c in changes.changed] == [
        ("BatchNormalization→y", "moved BatchNormalization into stem")
    ]
    assert model.graph.initializers["stem_weight"].values is before


def test_folds_in_double_precision() -> None:
    """The weight is the exact product, rounded once."""
    model = conv_batchnorm()
    constants = {name: each.values.astype(np.float64) for name, each in model.graph.initializers.items()}
    factor = constants["s"] / np.sqrt(constants["v"] + np.float64(np.float32(1e-5)))
    after, _ = apply(Fuse(), model)
    weight, bias = (
        tensor.values for tensor in after.graph.nodes[0].inputs[1:] if isinstance(tensor, Constant)
    )
    assert weight.dtype == bias.dtype == np.float32
    exact = (constants["stem_weight"] * factor[:, None, None, None]).astype(np.float32)
    np.testing.assert_allclose(weight, exact, rtol=1.2e-7)
    np.testing.assert_allclose(bias, constants["t"] - factor * constants["m"], rtol=1e-6)


def test_weights_may_lie_beside_the_model(tmp_path: Path) -> None:
    """Mapped read-only, and not to be written to."""
    model = parse(
        CONV_BATCHNORM.replace("3,3,3]", "3,9,9]").replace("5,5]", "11,11]"),
        {
            "stem_weight": values(4, 3, 9, 9),
            **batchnorm(4),
        },
    )
    model.save(tmp_path / "m.onnx", external_data=True)
    data = next(tmp_path.glob("*.data"))
    content = data.read_bytes()
    mapped = load(tmp_path / "m.onnx")
    after, changes = apply(Fuse(), mapped)
    assert changes
    same_outputs(model, after)
    assert data.read_bytes() == content


def test_weights_may_be_constant_nodes() -> None:
    model = parse(
        "g (float[N,2] x) => (float[N,2] y) { w = Constant<value=float[2,2] {1,2,3,4}>()"
        "b = Constant<value_floats=[5.0,6.0]>() a = MatMul(x, w) y = Add(b, a) }"
    )
    after, _ = apply(Fuse(), model)
    assert ops(after) == {"Gemm": 1, "Constant": 1}
    same_outputs(model, after)


def test_old_files_declare_their_constants() -> None:
    """Before IR version 4 constants are listed among the inputs, with a shape that has to stay right."""
    model = parse(
        "g (float[N,3] x) => (float[N,2] y) <float[3,2] w = {1,2,3,4,5,6}, float b = {7}, float[2] c = {8,9}>"
        "{ a = Gemm(x, w, b) y = Add(a, c) }",
        ir_version=3,
        opset=9,
    )
    proto = model.to_proto()
    after, _ = apply(Fuse(), load(proto))
    assert ops(after) == {"Gemm": 1}
    same_outputs(model, after)


def test_a_sparse_weight_stays_sparse() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,40] x) => (float[N,30] y) <float c = {2}>'
        "{ a = MatMul(x, w) y = Mul(a, c) }"
    )
    kept = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    places = numpy_helper.from_array(np.array([3, 700], np.int64), "places")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(kept, places, [40, 30]))
    after, changes = apply(Fuse(), load(proto))
    assert not changes
    assert len(after.to_proto().graph.sparse_initializer) == 1


def test_does_not_make_the_file_grow() -> None:
    """Four layers share one weight; a factor for one of them is not worth a second copy."""
    calls = " ".join(f"a{i} = Conv(x, w) y{i} = Mul(a{i}, c{i})" for i in range(4))
    outputs = ", ".join(f"float[N,16,3,3] y{i}" for i in range(4))
    factors = {f"c{i}": values(16, 1, 1) for i in range(4)}
    model = parse(
        f"g (float[N,16,5,5] x) => ({outputs}) {{ {calls} }}",
        {"w": values(16, 16, 3, 3), **factors},
    )
    after, changes = apply(Fuse(), model)
    assert not changes
    assert {skip.reason for skip in changes.skipped} == {"layer-arithmetic: the weight is shared"}
    assert after.stats().bytes <= model.stats().bytes


def test_epsilon_is_in_single_precision() -> None:
    text = "g (double[N,4] x) => (double[N,5] y) { a = MatMul(x, w) y = BatchNormalization(a, o, z, z, v) }"
    constants = {"o": np.ones(5), "z": np.zeros(5), "v": np.full(5, 1e-4), "w": normal(4, 5).astype(float)}
    model = parse(text, constants)
    result, _ = apply(Fuse(), model)
    assert "BatchNormalization" not in ops(result)
    feeds = {"x": normal(3, 4).astype(float)}
    np.testing.assert_allclose(run(result, feeds)["y"], run(model, feeds)["y"], rtol=1e-12)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            "g (float[1,4,4,4] x) => (float[1,4,4,4] y) <float[4,4,1,1] w = {W}, float[4] c = {1,2,3,4}>"
            "{ a = Conv(x, w) y = Mul(a, c) }",
            "layer-arithmetic: the constant is not one value per output channel",
        ),
        (
            "g (float[N,2,4] x) => (float[N,2,4] y) <float[4,4] w = {W}, float[4] c = {1,2,3,4}>"
            "{ a = MatMul(x, w) y = Add(a, c) }",
            "matmul-arithmetic: MatMul has no bias, and only a product of two matrices in single or double "
            "precision is a Gemm",
        ),
        (
            "g (float[N,4,4,4] x) => (float[N,4,5,4] y)"
            "<float[4,4,1,1] w = {W}, int64[8] p = {0,0,1,0,0,0,0,0}>"
            '{ a = Pad<mode="edge">(x, p) y = Conv(a, w) }',
            "pad-layer: it does not pad with a constant",
        ),
        (
            "g (float[N,4,4,4] x) => (float[N,4,4,4] y) <float[4,4,1,1] w = {W}, float z = {0}>"
            "{ a = Conv(x, w) y = Div(a, z) }",
            "layer-arithmetic: the result does not fit float32",
        ),
    ],
)  # fmt: skip
def test_says_why_not(graph: str, reason: str) -> None:
    model = parse(graph.replace("{W}", "{" + ",".join("1" * 16) + "}"))
    _, changes = apply(Fuse(), model)
    assert not changes
    assert [skip.reason for skip in changes.skipped] == [reason]


def test_a_rule_can_be_left_out() -> None:
    after, changes = apply(Fuse(skip=("layer-batchnorm",)), conv_batchnorm())
    assert not changes
    assert ops(after) == {"Conv": 1, "BatchNormalization": 1}
    with pytest.raises(UsageError, match="no rule 'batchnorm' to skip"):
        Fuse(skip=("batchnorm",))


def test_leaves_the_end_of_a_gelu_to_onnx_runtime() -> None:
    """ONNX Runtime computes x·(1 + erf(x/√2))·½ at once; with the ½ in the next weight it does not."""
    model = parse(
        "g (float[N,2,4,4] x) => (float[N,2,4,4] y)"
        "<float r = {1.4142135}, float one = {1}, float half = {0.5}, float[2,2,1,1] w = {1,2,3,4}>"
        "{ a = Div(x, r) b = Erf(a) c = Add(b, one) d = Mul(x, c) e = Mul(d, half) y = Conv(e, w) }"
    )
    _, changes = apply(Fuse(), model)
    assert [skip.reason for skip in changes.skipped] == [
        "scale-layer: it ends a GELU, which ONNX Runtime computes as one"
    ]


def test_bfloat16_weights_are_rounded_to_bfloat16() -> None:
    kind = np.dtype(ml_dtypes.bfloat16)
    constants = {"w": values(4, 3).astype(kind), "c": values(3).astype(kind)}
    model = parse(
        "g (bfloat16[N,2,4] x, bfloat16[4,3] w, bfloat16[3] c) => (bfloat16[N,2,3] y)"
        "{ a = MatMul(x, w) y = Mul(a, c) }",
        constants,
    )
    after, _ = apply(Fuse(), model)
    (node,) = after.graph.nodes
    weight = node.constant(1)
    assert weight is not None
    assert weight.dtype == kind
    exact = constants["w"].astype(np.float64) * constants["c"].astype(np.float64)
    assert np.array_equal(weight, exact.astype(kind))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_rounded_refuses_what_does_not_fit(kind: type) -> None:
    dtype = np.dtype(kind)
    largest = predicates.largest(dtype)
    assert predicates.rounded(np.array([1.0, -0.3]), dtype) is not None
    assert predicates.rounded(np.array([]), dtype) is not None
    for bad in ([np.nan], [np.inf], [1.0, -np.inf]):
        assert predicates.rounded(np.array(bad), dtype) is None
    if dtype.itemsize < 8:
        assert predicates.rounded(np.array([2.0 * largest]), dtype) is None
    if dtype == np.float16:
        assert predicates.rounded(np.array([1e-7]), dtype) is None
        # Beside larger values, what is lost of the small one does not count.
        assert predicates.rounded(np.array([1e-7, 1.0]), dtype) is not None


# ---------------------------------------------------------------------------------------------- laws


@given(st.data())
def test_per_channel_is_what_broadcasting_does(data: st.DataObject) -> None:
    """A constant is one value per channel exactly if multiplying by it is multiplying each channel."""
    rank = data.draw(st.integers(2, 4))
    axis = data.draw(st.integers(0, rank - 1))
    shape = tuple(data.draw(st.sampled_from((2, 3))) for _ in range(rank))
    constant = RANDOM.standard_normal(data.draw(st.lists(st.sampled_from((1, 1, 2, 3)), max_size=rank)))
    found = per_channel(constant, axis - rank, shape[axis])
    made = _product(np.ones(shape), constant)
    others = tuple(each for each in range(rank) if each != axis)
    by_channel = made is not None and made.shape == shape and not np.ptp(made, axis=others).any()
    assert (found is not None) is by_channel
    if found is not None and made is not None:
        assert np.array_equal(found, made.max(axis=others))


def _product(one: Array, other: Array) -> Array | None:
    try:
        return np.asarray(one * other)
    except ValueError:
        return None


CONV = "Conv<group={groups}, strides=[{stride},1], pads=[{pad},0,0,{pad}]>"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_folding_into_convolutions(data: st.DataObject) -> None:
    """Any neighbours of a plain, grouped or transposed convolution; what is left computes the same."""
    groups, per_group_in, per_group_out = (data.draw(st.integers(1, 3)) for _ in range(3))
    transposed, biased = data.draw(st.booleans()), data.draw(st.booleans())
    inputs, outputs = groups * per_group_in, groups * per_group_out
    weight = (inputs, per_group_out, 3, 2) if transposed else (outputs, per_group_in, 3, 2)
    constants = {"w": values(*weight)} | ({"b": values(outputs)} if biased else {})
    op = CONV.format(groups=groups, stride=data.draw(st.integers(1, 2)), pad=data.draw(st.integers(0, 1)))
    if transposed:
        op = op.replace("Conv<", "ConvTranspose<")
    call = f"{op}(t, w{', b' if biased else ''})"
    body = [*_before(data, inputs, constants), f"u = {call}", *_after(data, outputs, constants)]
    model = _model(f"float[N,{inputs},6,5] x", "float[N,A,B,C] y", body, constants)
    after, _ = apply(Fuse(), model)
    # What is before may have to stay; whatever comes after goes.
    assert len(after.graph.nodes) <= 3
    same_outputs(model, after)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_folding_into_products(data: st.DataObject) -> None:
    inputs, outputs = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    flip = {side: data.draw(st.integers(0, 1)) for side in "AB"}
    constants = {"w": values(*((outputs, inputs) if flip["B"] else (inputs, outputs)))}
    if data.draw(st.booleans()):
        alpha, beta = (data.draw(st.sampled_from((1.0, 0.5, 2.0, 0.0))) for _ in range(2))
        bias = data.draw(st.sampled_from(((), (1,), (outputs,), (1, outputs))))
        constants["b"] = values(*bias)
        attrs = f"transA={flip['A']}, transB={flip['B']}, alpha={alpha}, beta={beta}"
        call = f"u = Gemm<{attrs}>(t, w, b)"
    else:
        flip = dict.fromkeys("AB", 0)
        constants["w"] = values(inputs, outputs)
        call = "u = MatMul(t, w)"
    rows = [4, inputs][:: -1 if flip["A"] else 1]
    body = [*_before(data, rows[1], constants, axes=2), call, *_after(data, outputs, constants, axes=2)]
    model = _model(f"float[{rows[0]},{rows[1]}] x", "float[A,B] y", body, constants)
    after, _ = apply(Fuse(), model)
    same_outputs(model, after)


def _model(given: str, made: str, body: list[str], constants: Mapping[str, Array]) -> Model:
    return parse(f"g ({given}) => ({made}) {{ {' '.join(body)} }}", constants)


def _before(data: st.DataObject, channels: int, constants: dict[str, Array], axes: int = 4) -> list[str]:
    """Up to one node from x to t."""
    kind = data.draw(st.sampled_from(("none", "Mul", "Div", "BatchNormalization", "Pad")))
    if kind == "BatchNormalization":
        constants.update({f"p{name}": each for name, each in batchnorm(channels).items()})
        return ["t = BatchNormalization(x, ps, pt, pm, pv)"]
    if kind == "Pad" and axes == 4:
        constants["p"] = np.array([0, 0, *data.draw(_AMOUNTS), 0, 0, *data.draw(_AMOUNTS)], np.int64)
        return ["t = Pad(x, p)"]
    if kind in ("Mul", "Div"):
        constants["f"] = _constant(data, channels, axes)
        return [f"t = {kind}(x, f)"]
    return ["t = Neg(x)"]


_AMOUNTS = st.lists(st.integers(0, 2), min_size=2, max_size=2)


def _after(data: st.DataObject, channels: int, constants: dict[str, Array], axes: int = 4) -> list[str]:
    """Up to three nodes from u to y."""
    kinds = data.draw(
        st.lists(st.sampled_from(("Mul", "Div", "Add", "Sub", "BatchNormalization")), max_size=3)
    )
    body, current = [], "u"
    for index, kind in enumerate(kinds):
        made = f"u{index}"
        if kind == "BatchNormalization":
            constants.update({f"{name}{index}": each for name, each in batchnorm(channels).items()})
            body.append(f"{made} = {kind}({current}, s{index}, t{index}, m{index}, v{index})")
        else:
            constants[f"c{index}"] = _constant(data, channels, axes)
            sides = [current, f"c{index}"]
            if kind != "Div" and data.draw(st.booleans()):
                sides.reverse()
            body.append(f"{made} = {kind}({', '.join(sides)})")
        current = made
    return [*body, f"y = Identity({current})"]


def _constant(data: st.DataObject, channels: int, axes: int) -> Array:
    """One value, or one per channel."""
    if data.draw(st.booleans()):
        return values(positive=True)
    return values(channels, *(1,) * (axes - 2), positive=True)


def test_runs_under_onnx_runtime_without_a_fused_node_left_over() -> None:
    """The smallest residual network: every layer keeps what belongs to it."""
    names = [f"{kind}{i}" for i in (1, 2) for kind in "wstmv"]
    shapes = {name: (2, 2, 3, 3) if name[0] == "w" else (2,) for name in names}
    constants = {name: values(*shape, positive=name[0] == "v") for name, shape in shapes.items()}
    model = parse(
        "g (float[N,2,6,6] x) => (float[N,2,6,6] y) { a = Conv<pads=[1,1,1,1]>(x, w1)"
        " b = BatchNormalization(a, s1, t1, m1, v1) c = Relu(b) d = Conv<pads=[1,1,1,1]>(c, w2)"
        " e = BatchNormalization(d, s2, t2, m2, v2) f = Add(e, x) y = Relu(f) }",
        constants,
    )
    after, _ = apply(Fuse(), model)
    assert ops(after) == {"Conv": 2, "Relu": 2, "Add": 1}
    assert len(after.graph.initializers) <= 2
    same_outputs(model, after)
    assert run(after)


def test_a_weight_that_is_computed_is_told_with_what_stores_it() -> None:
    text = (
        "g (float[N,2,4,4] x) => (float[N,2,4,4] y) { w = Identity(v) [conv] a = Conv(x, w) y = Mul(a, s) }"
    )
    model = parse(text, {"v": normal(2, 2, 1, 1), "s": normal(2, 1, 1)})
    same, changes = apply(Fuse(), model)
    assert ops(same) == ops(model)
    told = "its weight is computed from constants: 'onnxslim fold' stores it"
    assert [(skip.node, skip.reason[: len(told)]) for skip in changes.skipped] == [("conv", told)]
    assert ops(apply(Fuse(), apply(Fold(), model)[0])[0]) == {"Conv": 1}
    product = parse("g (float[N,4,4] x) => (float[N,4,4] y) { r = Relu(x) y = MatMul(x, r) }")
    assert not apply(Fuse(), product)[1].skipped
