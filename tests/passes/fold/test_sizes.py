"""Fold: sizes and targets that are known although the tensors are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxslim.errors import LoadError
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model, load
from onnxslim.passes.fold import Fold
from tests.helpers import apply, feeds_for, ops, parse, run, same_outputs, settled

# ------------------------------------------------------------------------------------------------ known sizes


def sizes_of(text: str, **constants: Any) -> str:
    """What is left of a model of a few lines over x, float[N,3,H,8]."""
    model = parse(
        f"g (float[N,3,H,8] x) => (int64[] y) {{ {text} }}",
        {name: np.array(value, np.int64) for name, value in constants.items()},
    )
    result, _ = settled(Fold(), model)
    values = run(result)["y"]
    return f"{values.tolist()}" if ops(result) == {"Constant": 1} else " ".join(sorted(ops(result)))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("y = Shape(x)", "Shape"),
        ("y = Shape<start = 1, end = 2>(x)", "[3]"),
        ("y = Shape<start = -1>(x)", "[8]"),
        ("y = Shape<start = -9, end = -2>(x)", "Shape"),
        ("y = Shape<start = 3, end = 1>(x)", "[]"),
        ("y = Shape<start = 1, end = 9>(x)", "Shape"),
        ("y = Size(x)", "Size"),
        ("s = Shape(x) y = Gather(s, one)", "3"),
        ("s = Shape(x) y = Gather(s, minus)", "8"),
        ("s = Shape(x) y = Gather(s, both)", "[3, 8]"),
        ("s = Shape(x) y = Gather(s, zero)", "Gather Shape"),
        ("s = Shape(x) y = Slice(s, ones, twos)", "[3]"),
        ("s = Shape(x) y = Slice(s, minuses, zeros, zeros, minuses)", "Gather Shape"),
        ("s = Shape(x) t = Slice(s, threes, zeros, zeros, minustwos) y = Mul(t, t)", "[64, 9]"),
        ("s = Shape(x) a = Gather(s, one) b = Unsqueeze(a, zeros) y = Concat<axis = 0>(b, twos)", "[3, 2]"),
        ("s = Shape(x) a = Gather(s, both) y = ReduceProd<keepdims = 0>(a)", "24"),
        ("s = Shape(x) a = Gather(s, one) b = Cast<to = 6>(a) c = Cast<to = 7>(b) y = Div(c, two)", "1"),
        ("s = Shape(x) a = Gather(s, zero) b = Gather(s, zero) y = Sub(a, b)", "0"),
        ("s = Shape(x) b = Equal(s, minus) y = Where(b, one, zero)", "[0, 0, 0, 0]"),
        ("s = Shape(x) b = Equal(s, three) y = Where(b, one, zero)", "Equal Shape Where"),
    ],
)
def test_sizes_that_are_known_become_numbers(text: str, left: str) -> None:
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3, "minus": -1, "both": [1, 3]}
    vectors = {"zeros": [0], "ones": [1], "twos": [2], "threes": [3], "minuses": [-1], "minustwos": [-2]}
    found = sizes_of(text, **numbers, **vectors)
    assert found == left or (left == "Gather Shape" and found in ("Gather Shape", "Shape Slice"))


def test_a_wrong_annotation_of_an_inner_tensor_is_not_believed() -> None:
    model = parse(
        """g (float[N,4] x, int64[2] shape) => (float[A,B] y, int64[2] s) <float[7,7] t>
        { t = Reshape(x, shape) s = Shape(t) y = Neg(t) }"""
    )
    feeds: dict[str, Any] = {"x": np.ones((2, 4), np.float32), "shape": np.array([4, 2], np.int64)}
    result, changes = apply(Fold(), model)
    assert not changes
    assert run(result, feeds)["s"].tolist() == [4, 2]


def test_a_wrong_declaration_of_an_output_is_not_believed() -> None:
    model = parse(
        "g (float[N,4] x, int64[2] shape) => (float[7,7] t, int64[2] s) "
        "{ t = Reshape(x, shape) s = Shape(t) }"
    )
    assert not apply(Fold(), model)[1]


def test_an_annotation_that_no_longer_holds_is_dropped() -> None:
    model = parse(
        "g (int64[2,M] x) => (int64[2,M] y) <int64[2,9] n> { n = NonZero(m) y = Add(x, n) }",
        {"m": np.eye(2, dtype=np.float32)},
    )
    result, _ = apply(Fold(), model)
    assert ops(result) == {"Add": 1}
    same_outputs(model, result, {"x": np.ones((2, 2), np.int64)}, exact=True)


def test_sizes_that_onnx_runtime_computes_in_its_own_way() -> None:
    model = parse(
        "g (float[1,2,8,9] x) => (float[1,2,A,B] p, int64[4] s, int64[4] t) {"
        "p = MaxPool<kernel_shape = [2,1], strides = [4,4], ceil_mode = 1>(x) s = Shape(p)"
        ' r = Resize<mode = "nearest">(x, , c) t = Shape(r) }',
        {"c": np.array([1, 1, 3.1, 1.1], np.float32)},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"MaxPool": 1, "Constant": 2}


# ---------------------------------------------------------------------------------------------------- targets


PIECES = {
    "N": "s{0} = Shape<start = 0, end = 1>(x)",
    "S": "s{0} = Shape<start = 1, end = 2>(x)",
    "NS": "a{0} = Shape<start = 0, end = 2>(x) s{0} = ReduceProd(a{0})",
    "2S": "a{0} = Shape<start = 1, end = 2>(x) s{0} = Mul(a{0}, two)",
    "12": "s{0} = Identity(twelve)",
    "2": "s{0} = Identity(two)",
    "6": "s{0} = Identity(six)",
    "0": "s{0} = Identity(zero)",
    "-1": "s{0} = Identity(minus)",
}


NUMBERS = {"two": [2], "six": [6], "twelve": [12], "zero": [0], "minus": [-1]}


def reshape(pieces: list[str], allowzero: bool = False) -> Model:
    """A model that reshapes float[N,S,12] to the given sizes, which it computes from the input."""
    lines = [PIECES[piece].format(index) for index, piece in enumerate(pieces)]
    target = f"t = Concat<axis = 0>({', '.join(f's{index}' for index in range(len(pieces)))})"
    return parse(
        f"g (float[N,S,12] x) => (float[] y) {{ {' '.join(lines)} {target} "
        f"z = Reshape<allowzero = {int(allowzero)}>(x, t) y = Neg(z) }}",
        {name: np.array(value, np.int64) for name, value in NUMBERS.items()},
    )


@pytest.mark.parametrize(
    ("pieces", "target"),
    [
        (["N", "S", "2", "6"], [0, 0, 2, 6]),
        (["NS", "12"], [-1, 12]),
        (["N", "2S", "6"], None),
        (["N", "-1"], [0, -1]),
        (["0", "S", "-1"], [0, 0, -1]),
        (["S", "N", "12"], None),
        (["NS", "2", "6"], [-1, 2, 6]),
        (["-1", "12"], [-1, 12]),
    ],
)
def test_targets_that_can_be_stated(pieces: list[str], target: list[int] | None) -> None:
    model = reshape(pieces)
    result, _ = apply(Fold(), model)
    node = next(node for node in result.graph.nodes if node.op == "Reshape")
    stated = node.inputs[1].values.tolist() if isinstance(node.inputs[1], Constant) else None
    assert stated == target
    assert ("Shape" in ops(result)) == (target is None)


def test_a_zero_that_does_not_copy_stays_computed() -> None:
    assert "Shape" in ops(apply(Fold(), reshape(["0", "S", "12"], allowzero=True))[0])
    for pieces in (["NS", "12"], ["N", "S", "2", "6"]):
        result, _ = settled(Fold(), reshape(pieces, allowzero=True))
        assert ops(result) == {"Reshape": 1, "Neg": 1}
        assert "allowzero" not in result.graph.nodes[0].attrs


@given(
    st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([(2, 3), (1, 1), (0, 3), (3, 0), (0, 0), (2, 1)]),
)
@settings(max_examples=150, deadline=None)
def test_stated_targets_are_right_for_all_sizes_empty_ones_included(
    pieces: list[str], allowzero: bool, sizes: tuple[int, int]
) -> None:
    # The standard forbids 0 beside -1 where zeros do not copy, computed ones included: any size would do for
    # the -1. ONNX Runtime notices only if they are constant.
    axes = {"N": sizes[0], "S": sizes[1], "NS": sizes[0] * sizes[1], "2S": 2 * sizes[1]}
    assume(not (allowzero and {0, -1} <= {axes[each] if each in axes else int(each) for each in pieces}))
    model = reshape(pieces, allowzero)
    feeds = {"x": np.arange(sizes[0] * sizes[1] * 12, dtype=np.float32).reshape(*sizes, 12)}
    try:
        expected = run(model, feeds)["y"]
    except LoadError:
        return
    result, _ = apply(Fold(), model)
    np.testing.assert_array_equal(run(result, feeds)["y"], expected, strict=True)


@pytest.mark.parametrize(
    ("target", "stated"),
    [
        ("s", [1, 1]),
        ("Concat<axis = 0>(n, four)", [1, 4]),
        ("Concat<axis = 0>(two, s)", [2, 1, 1]),
        ("m", None),
    ],
)
def test_expand_to_its_own_size(target: str, stated: list[int] | None) -> None:
    line = f"t = {target}" if "(" in target else f"t = Identity({target})"
    model = parse(
        f"""g (float[N,S] x, float[2] z) => (float[] y) {{
            s = Shape(x) n = Shape<end = 1>(x) q = Shape(z) m = Concat<axis = 0>(q, n)
            {line} e = Expand(x, t) y = Neg(e)
        }}""",
        {"two": np.array([2]), "four": np.array([4])},
    )
    result, _ = apply(Fold(), model)
    node = next(node for node in result.graph.nodes if node.op == "Expand")
    assert (node.inputs[1].values.tolist() if isinstance(node.inputs[1], Constant) else None) == stated
    feeds = feeds_for(model, size=4) if stated != [1, 4] else feeds_for(model, size=1)
    if stated is not None:
        same_outputs(model, result, feeds, exact=True)


def test_equal_sizes_of_several_tensors_are_computed_once() -> None:
    model = parse(
        """g (float[N,S] x) => (float[] y, float[] z, int64[1] n) {
            a = Exp(x) s = Shape(x) t = Shape(a) n = Shape<end = 1>(a)
            i = Slice(s, zero, one) j = Slice(t, zero, one) k = Slice(t, one, two)
            p = Concat<axis = 0>(i, j) q = Concat<axis = 0>(j, k)
            y = ConstantOfShape(p) z = ConstantOfShape(q)
        }""",
        {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])},
    )
    result, _ = settled(Fold(), model)
    assert ops(result) == {"Exp": 1, "Shape": 2, "Concat": 1, "ConstantOfShape": 2}


def test_a_body_does_not_read_a_size_whose_name_it_has_itself() -> None:
    model = parse(
        """g (float[N] x, bool t) => (int64[1] y) {
            n = Shape(x) a = Exp(x) k = Shape(a)
            y = If(t) <then_branch = p () => (int64[1] u) { n = Neg(k) u = Add(n, k) },
                       else_branch = q () => (int64[1] v) { v = Neg(n) }>
        }"""
    )
    assert not apply(Fold(), model)[1]


def test_axes_without_a_name_are_told_apart() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[?,?,4] x, float[?,8] z) => (float[] y, float[] v) <int64[1] two = {2}> {
            a = Shape<start = 0, end = 1>(x)  b = Shape<start = 1, end = 2>(x)
            t = Concat<axis = 0>(a, b, two, two)  y = Reshape(x, t)
            u = Concat<axis = 0>(a, two, two, two)  v = Reshape(z, u)
        }"""
    )
    result, _ = apply(Fold(), load(model))
    targets = [node.inputs[1] for node in result.graph.nodes if node.op == "Reshape"]
    assert [tensor.values.tolist() for tensor in targets if isinstance(tensor, Constant)] == [
        [0, 0, 2, 2],
        [-1, 2, 2, 2],
    ]
