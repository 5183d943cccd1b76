"""What can be removed together: families, and what pins the rest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from onnxslim.engine.check import relative_difference
from onnxslim.errors import UsageError
from onnxslim.families.analysis import Analysis, analyze
from onnxslim.families.removal import Removal
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.prune.cut import cut, prepare, zero
from onnxslim.runtime.targets import Target
from tests.helpers import normal, normals, parse, runs, same_outputs

EXACT = 1e-5


def analyzed(text: str, values: Mapping[str, Array], opset: int = 17) -> tuple[Model, Analysis]:
    model = parse(text, values, opset=opset)
    prepare(model)
    return model, analyze(model)


def families(analysis: Analysis) -> dict[str, int]:
    """Units of each family, by the axes of constants they lie along."""
    return {
        " ".join(f"{each.tensor}:{each.axis}" for each in family.members if each.constant): family.size
        for family in analysis.families
    }


def prove(model: Model, analysis: Analysis) -> None:
    """Removing half of every family is what setting it to zero is."""
    removal = Removal(analysis, {family.name: list(range(family.size // 2)) for family in analysis.families})
    small, zeroed = model.copy(), model.copy()
    cut(small, removal)
    zero(zeroed, removal)
    difference = relative_difference(zeroed, small, Target.cpu())
    assert difference is not None
    assert difference < EXACT


def test_a_residual_sum_ties_the_layers_around_it() -> None:
    text = """g (float[N,3,8,8] x) => (float[N,2,8,8] y)
    { a = Conv(x, w) b = Conv<pads=[1,1,1,1]>(a, v, d) c = Relu(b) s = Add(a, c) y = Conv(s, u) }"""
    model, analysis = analyzed(text, normals(w=(6, 3, 1, 1), v=(6, 6, 3, 3), d=(6,), u=(2, 6, 1, 1)))
    assert families(analysis) == {"w:0 v:0 v:1 d:0 u:1": 6}
    prove(model, analysis)


def test_a_broadcast_gate_has_the_channels_of_what_it_scales() -> None:
    text = """g (float[N,4,8,8] x) => (float[N,2,8,8] y)
    { a = Conv(x, w) p = GlobalAveragePool(a) q = Conv(p, r) h = Relu(q) e = Conv(h, t) z = Sigmoid(e)
      s = Mul(a, z) y = Conv(s, u) }"""
    values = normals(w=(6, 4, 1, 1), r=(2, 6, 1, 1), t=(6, 2, 1, 1), u=(2, 6, 1, 1))
    model, analysis = analyzed(text, values)
    assert families(analysis) == {"w:0 r:1 t:0 u:1": 6, "r:0 t:1": 2}
    prove(model, analysis)


def test_concat_and_split_carry_their_parts() -> None:
    text = """g (float[N,4] x) => (float[N,2] y)
    { a = MatMul(x, w) b = MatMul(x, v) c = Concat<axis=1>(a, b) l, r = Split<axis=1>(c, s)
      p = MatMul(l, u) q = MatMul(r, t) y = Add(p, q) }"""
    values = normals(w=(4, 3), v=(4, 5), u=(2, 2), t=(6, 2)) | {"s": np.array([2, 6], np.int64)}
    model, analysis = analyzed(text, values)
    assert families(analysis) == {"w:1 u:0": 2, "v:1 t:0": 5}  # the third column of w is alone
    prove(model, analysis)


def test_flattened_channels_go_with_all_their_positions() -> None:
    text = """g (float[N,3,4,4] x) => (float[N,2] y) { a = Conv(x, w) b = Flatten(a) y = Gemm(b, u) }"""
    model, analysis = analyzed(text, normals(w=(6, 3, 3, 3), u=(24, 2)))
    assert families(analysis) == {"w:0 u:0": 6}
    assert analysis.families[0].width == 4
    prove(model, analysis)


def test_a_depthwise_convolution_follows_and_a_grouped_one_loses_equally() -> None:
    text = """g (float[N,3,8,8] x) => (float[N,2,8,8] y)
    { a = Conv(x, w) b = Conv<group=8, pads=[1,1,1,1]>(a, v) c = Conv<group=2>(b, t) y = Conv(c, u) }"""
    values = normals(w=(8, 3, 1, 1), v=(8, 1, 3, 3), t=(4, 4, 1, 1), u=(2, 4, 1, 1))
    model, analysis = analyzed(text, values)
    assert families(analysis) == {"w:0 v:0 t:1": 4, "t:0 u:1": 2}
    assert [family.width for family in analysis.families] == [2, 2]
    prove(model, analysis)


ATTENTION = """g (float[N,5,8] x) => (float[N,5,3] y)
{ p = MatMul(x, w) q = Reshape(p, split) r = Transpose<perm=[2,0,3,1,4]>(q)
  a = Gather<axis=0>(r, i0) b = Gather<axis=0>(r, i1) c = Gather<axis=0>(r, i2)
  t = Transpose<perm=[0,1,3,2]>(b) s = MatMul(a, t) f = Softmax<axis=-1>(s) o = MatMul(f, c)
  m = Transpose<perm=[0,2,1,3]>(o) h = Reshape(m, merged) y = MatMul(h, u) }"""


def test_packed_attention_loses_whole_heads() -> None:
    values = normals(w=(8, 24), u=(8, 3)) | {
        "split": np.array([0, 5, 3, 4, 2], np.int64),
        "merged": np.array([0, 5, 8], np.int64),
        **{f"i{index}": np.array(index, np.int64) for index in range(3)},
    }
    model, analysis = analyzed(ATTENTION, values)
    assert families(analysis) == {"w:1 u:0": 4}
    assert analysis.families[0].width == 6
    prove(model, analysis)


def test_query_heads_that_share_keys_go_together() -> None:
    text = """g (float[N,5,8] x) => (float[N,5,3] y)
    { a = MatMul(x, q) b = Reshape(a, heads) c = Transpose<perm=[0,2,1,3]>(b)
      d = MatMul(x, k) e = Reshape(d, few) f = Transpose<perm=[0,2,3,1]>(e) g = Unsqueeze(f, two)
      h = Expand(g, twice) i = Reshape(h, flat) s = MatMul(c, i) t = Softmax<axis=-1>(s)
      v = Transpose<perm=[0,2,1,3]>(t) w = Reshape(v, merged) y = MatMul(w, u) }"""
    values = normals(q=(8, 8), k=(8, 4), u=(20, 3)) | {
        "heads": np.array([0, 5, 4, 2], np.int64),
        "few": np.array([0, 5, 2, 2], np.int64),
        "two": np.array([2], np.int64),
        "twice": np.array([1, 2, 2, 2, 5], np.int64),
        "flat": np.array([-1, 4, 2, 5], np.int64),
        "merged": np.array([0, 5, 20], np.int64),
    }
    model, analysis = analyzed(text, values)
    assert families(analysis) == {"q:1 k:1 u:0": 2}
    prove(model, analysis)


def test_shuffled_channels_keep_their_groups_equal() -> None:
    text = """g (float[N,3,4,4] x) => (float[N,2,4,4] y)
    { a = Conv(x, w) b = Reshape(a, apart) c = Transpose<perm=[0,2,1,3,4]>(b) d = Reshape(c, again)
      y = Conv(d, u) }"""
    values = normals(w=(8, 3, 1, 1), u=(2, 8, 1, 1)) | {
        "apart": np.array([0, 2, 4, 4, 4], np.int64),
        "again": np.array([0, 8, 4, 4], np.int64),
    }
    model, analysis = analyzed(text, values)
    assert families(analysis) == {"w:0 u:1": 4}
    prove(model, analysis)


def test_normalizations_are_told() -> None:
    text = """g (float[N,4] x) => (float[N,2] y)
    { a = MatMul(x, w) b = LayerNormalization(a, s, t) y = MatMul(b, u) }"""
    _, analysis = analyzed(text, normals(w=(4, 6), s=(6,), t=(6,), u=(6, 2)))
    assert families(analysis) == {"w:1 s:0 t:0 u:0": 6}
    assert analysis.families[0].crosses == ("LayerNormalization→b",)


def test_decomposed_normalization_over_channels_is_told_too() -> None:
    text = """g (float[N,4] x) => (float[N,2] y)
    { a = MatMul(x, w) q = Mul(a, a) m = ReduceMean<axes=[-1]>(q) e = Add(m, eps) r = Sqrt(e) n = Div(a, r)
      k = Mul(n, s) y = MatMul(k, u) }"""
    values = normals(w=(4, 6), s=(6,), u=(6, 2)) | {"eps": np.array(1e-5, np.float32)}
    _, analysis = analyzed(text, values)
    assert families(analysis) == {"w:1 s:0 u:0": 6}
    assert analysis.families[0].crosses == ("ReduceMean→m",)


def test_hidden_units_of_recurrent_layers() -> None:
    text = """g (float[T,N,4] x) => (float[T,N,2] y)
    { a = MatMul(x, p) h = LSTM<hidden_size=6>(a, w, r, b) s = Squeeze(h, one) y = MatMul(s, u) }"""
    values = normals(p=(4, 3), w=(1, 24, 3), r=(1, 24, 6), b=(1, 48), u=(6, 2))
    model, analysis = analyzed(text, values | {"one": np.array([1], np.int64)})
    assert families(analysis) == {"p:1 w:2": 3, "w:1 r:1 r:2 b:1 u:0": 6}
    prove(model, analysis)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = MatMul(x, w) y = Softmax(a)", "Softmax"),
        ("a = MatMul(x, w) y = Relu(a)", "'y' is an output of the model"),
        ("a = MatMul(x, w) b = CumSum(a, one) y = MatMul(b, u)", "it works along this axis"),
        ("a = MatMul(x, w) b = com.example.Mystery(a) y = MatMul(b, u)", "Mystery is not known"),
        ("a = MatMul(x, w) i = NonZero(a) c = Cast<to=1>(i) y = MatMul(a, u)", "NonZero is not known"),
        (
            "a = MatMul(x, w) s = Size(a) c = Cast<to=1>(s) d = Div(a, c) y = MatMul(d, u)",
            "Size is not known",
        ),
    ],
)
def test_what_pins_an_axis_is_named(body: str, reason: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>
    g (float[N,4] x) => (float y) {{ {body} }}"""
    values = normals(w=(4, 6), u=(6, 2)) | {"one": np.array(1, np.int64)}
    _, analysis = analyzed(text, values)
    told = analysis.explain("w")
    assert any("axis 1 of 'w' (6) is pinned" in line and reason in line for line in told), told
    assert analysis.families == ()


def test_a_body_pins_what_it_reads() -> None:
    text = """g (float[N,4] x, bool c) => (float[N,6] y)
    { a = MatMul(x, w) y = If (c) <then_branch = p () => (float[N,6] e) { e = Relu(a) },
                                  else_branch = q () => (float[N,6] f) { f = Neg(a) }> }"""
    _, analysis = analyzed(text, normals(w=(4, 6)))
    assert analysis.families == ()
    assert "a body of this If reads it" in analysis.explain("w")[1]


def test_an_unknown_tensor_is_refused() -> None:
    _, analysis = analyzed("g (float[N,4] x) => (float[N,2] y) { y = MatMul(x, long) }", normals(long=(4, 2)))
    with pytest.raises(UsageError, match=r"'nowhere' can be followed; known are: .*long.*--families --json"):
        analysis.explain("nowhere")
    with pytest.raises(UsageError, match="did you mean 'long'"):
        analysis.explain("lonk")


def test_equal_biases_do_not_tie_layers() -> None:
    text = """g (float[N,3,4,4] x) => (float[N,2,4,4] y)
    { a = Conv(x, w, z) b = Relu(a) c = Conv(b, v, z) d = Relu(c) y = Conv(d, u) }"""
    model, analysis = analyzed(text, normals(w=(6, 3, 1, 1), v=(6, 6, 1, 1), z=(6,), u=(2, 6, 1, 1)))
    assert sorted(families(analysis).values()) == [6, 6]
    prove(model, analysis)


def test_tied_matrices_stay_tied() -> None:
    text = """g (int64[N,5] i) => (float[N,5,9] y)
    { e = Gather(t, i) h = MatMul(e, w) r = Relu(h) k = Transpose<perm=[1,0]>(t) y = MatMul(r, k) }"""
    model, analysis = analyzed(text, normals(t=(9, 6), w=(6, 6)))
    assert families(analysis) == {"t:1 w:0 w:1": 6}
    prove(model, analysis)


def test_fifty_thousand_labels_take_seconds() -> None:
    """Labels are arrays: an axis of many slices is as cheap as a narrow one."""
    text = "g (float[N,4] x) => (float[N,2] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, u) }"
    _, analysis = analyzed(text, normals(w=(4, 50_000), u=(50_000, 2)))
    assert families(analysis) == {"w:1 u:0": 50_000}


@pytest.mark.parametrize(
    ("text", "shapes", "found"),
    [
        (
            "g (float[N,3,4,8] x) => (float[N,2,4] y) { a = Conv(x, w) m = MatMul(a, v) y = Conv(m, u) }",
            {"w": (6, 3, 1, 1), "v": (8,), "u": (2, 6, 1)},
            {"w:0 u:1": 6},
        ),
        (
            "g (float[N,3,4,8] x) => (float[N,2,8] y) { a = Conv(x, w) m = MatMul(v, a) y = Conv(m, u) }",
            {"w": (6, 3, 1, 1), "v": (4,), "u": (2, 6, 1)},
            {"w:0 u:1": 6},
        ),
    ],
)
def test_batch_axes_of_a_product_with_a_vector(
    text: str, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, int]
) -> None:
    model, analysis = analyzed(text, normals(**shapes))
    assert families(analysis) == found
    prove(model, analysis)


@pytest.mark.parametrize(
    ("body", "statistics"),
    [
        ("b, m, n = BatchNormalization<training_mode=1>(a, s, t, k, l)", "float[6] m"),
        ("b, m = LayerNormalization(a, e)", "float[N,6,1] m"),
    ],
)
def test_statistics_that_are_an_output_stay(body: str, statistics: str) -> None:
    text = f"g (float[N,3,8] x) => (float[N,2,8] y, {statistics}) {{ a = Conv(x, w) {body} y = Conv(b, u) }}"
    values = normals(w=(6, 3, 1), s=(6,), t=(6,), k=(6,), l=(6,), e=(8,), u=(2, 6, 1))
    _, analysis = analyzed(text, values)
    assert analysis.families == ()
    assert any("'m' is an output of the model" in line for line in analysis.explain("w"))


def test_a_batch_is_not_mistaken_for_a_size_of_the_model() -> None:
    """At a batch of five this Reshape would seem to move nothing."""
    text = """g (float[N,5] x) => (float[K] y)
    { a = MatMul(x, w) b = Reshape(a, s) y = ReduceSum<keepdims=0>(b, one) }"""
    values = normals(w=(5, 5)) | {"s": np.array([5, -1], np.int64), "one": np.array([1], np.int64)}
    _, analysis = analyzed(text, values)
    assert analysis.families == ()


def test_an_axis_without_weights_says_so() -> None:
    text = "g (float[N,4] x) => (float[N,2] y) { a = MatMul(x, w) y = MatMul(a, u) }"
    _, analysis = analyzed(text, normals(w=(4, 6), u=(6, 2)))
    assert analysis.explain("a")[0].endswith("is pinned: it runs along data alone")


def test_a_transposed_table_that_is_also_summed_with_is_zeroed_where_it_is_read() -> None:
    text = """g (int64[N,5] i) => (float[N,5,9] y)
    { e = Gather(t, i) h = MatMul(e, w) s = Add(e, h) k = Transpose<perm=[1,0]>(t) y = MatMul(s, k) }"""
    model, analysis = analyzed(text, normals(t=(9, 6), w=(6, 6)))
    assert families(analysis) == {"t:1 w:0 w:1": 6}
    prove(model, analysis)


def test_shapes_from_a_split_are_shared_by_layers() -> None:
    text = """g (float[N,3,8] x) => (float[N,6,8] y)
    { a = Conv(x, w) p = Shape(x) q = Shape(a) k = Concat<axis=0>(p, q) h, t = Split<axis=0>(k, l)
      b = Reshape(a, t) c = Relu(b) y = Reshape(c, t) }"""
    model = parse(text, normals(w=(6, 3, 1)) | {"l": np.array([3, 3], np.int64)})
    twin = model.copy()
    prepare(twin)
    same_outputs(model, twin)


def test_data_of_batch_one_does_not_hide_that_the_batch_is_moved() -> None:
    text = """g (float[N,16] x) => (float[3,K] y)
    { a = MatMul(x, w) r = Relu(a) b = Reshape(r, s) y = MatMul(u, b) }"""
    model = parse(text, normals(w=(16, 16), u=(3, 16)) | {"s": np.array([16, -1], np.int64)})
    assert analyze(model, sizes={"x": (1, 16)}).families == ()


@pytest.mark.parametrize(
    ("body", "constants", "batch"),
    [
        ("a = MatMul(x, w) b = Reshape(a, s) y = MatMul(b, u)", {"s": np.array([1, 4, 6], np.int64)}, 1),
        ("a = MatMul(x, w) b = Reshape(a, s) y = MatMul(b, u)", {"s": np.array([3, 4, 6], np.int64)}, 3),
        ("a = MatMul(x, w) b = Concat<axis=1>(k, a) y = MatMul(b, u)", normals(k=(1, 1, 6)), 1),
    ],
)
def test_a_batch_that_is_free_in_the_interface_alone(
    body: str, constants: dict[str, Array], batch: int
) -> None:
    text = f"g (float[N,4,16] x) => (float[M,K,2] y) {{ {body} }}"
    model = parse(text, normals(w=(16, 6), u=(6, 2)) | constants)
    given = {"x": (batch, 4, 16)}
    analysis = analyze(model, sizes=given)
    assert [family.size for family in analysis.families] == [6]
    assert analysis.sizes["b"] is not None
    prove(model, analysis)
    without = analyze(model).families
    assert [family.size for family in without] == ([6] if batch == 1 else [])


def test_a_batch_in_the_place_of_channels_is_left_alone_where_its_size_does_not_fit() -> None:
    """It runs for two samples alone, which are not among the sizes tried."""
    model = parse(
        "g (float[N,4,6,6] x) => (float[a,b,c,d] y) "
        "{ h = Conv(x, w) t = Transpose<perm = [3,0,2,1]>(h) y = Conv<group = 2>(t, v) }",
        normals(w=(4, 4, 1, 1), v=(4, 1, 1, 1)),
    )
    assert runs(model, {"x": normal(2, 4, 6, 6)})
    found = analyze(model)
    assert not found.families
