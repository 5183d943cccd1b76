"""Operators that change nothing, and neighbours that are one: what goes, what stays, and why."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.engine.editor import Editor
from onnxslim.errors import UsageError
from onnxslim.ir.graph import Node, Variable
from onnxslim.ir.model import Model, load
from onnxslim.ops import REGISTRY, OpSpec
from onnxslim.passes import predicates
from onnxslim.passes.eliminate import RULES, Eliminate
from onnxslim.passes.eliminate.arithmetic import Bounds
from onnxslim.passes.eliminate.movement import SliceWindow, joined
from onnxslim.passes.eliminate.noop import widens
from onnxslim.passes.eliminate.view import viewed
from onnxslim.passes.fuse import RULES as FUSE_RULES
from tests.helpers import apply, calls_of, ops, parse, same_outputs, skip_if_opset_is_newer

sizes = st.sampled_from((1, 1, 2, 3, 4, 6))


def test_rules_have_names_of_their_own() -> None:
    names = [rule.name for rule in (*RULES, *FUSE_RULES)]
    assert len(set(names)) == len(names)


def test_a_rule_can_be_left_out() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) { a = Identity(x) b = Cast<to=1>(a) y = Exp(b) }")
    after, _ = apply(Eliminate(skip=("cast",)), model)
    assert ops(after) == {"Cast": 1, "Exp": 1}


def test_leaving_out_what_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"no rule 'nonsense' to skip; known are: if, if-rank, identity"):
        Eliminate(skip=("nonsense",))


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=spec.op) for spec in REGISTRY.values() if spec.is_unary and spec.example],
)
def test_transposes_cancel_around_all_that_works_element_by_element(spec: OpSpec) -> None:
    model = parse(spec.example)
    if model.graph.inputs[1:]:
        pytest.skip("an operand is computed")
    skip_if_opset_is_newer(model.opset)
    node = next(node for node in model.graph.nodes if node.op == spec.op)
    data, result = node.inputs[0], node.outputs[0]
    turned, made = Variable("turned", data.dtype), Variable("made", result.dtype)
    node.inputs[0], node.outputs[0] = turned, made
    model.graph.nodes.insert(0, Node("Transpose", "there", {"perm": (0, 2, 3, 1)}, [data], [turned]))
    model.graph.nodes.append(Node("Transpose", "back", {"perm": (0, 3, 1, 2)}, [made], [result]))
    after, _ = apply(Eliminate(), model)
    # What changes nothing goes itself; one node has to lie between input and output.
    assert ops(after)["Transpose"] == 0 or not ops(after)[spec.op]
    same_outputs(model, after)


@pytest.mark.parametrize(
    ("graph", "node", "reason"),
    [
        (
            "g (float[N] x) => (float[N] y, bool[N] m) { y, m = Dropout(x) }",
            "Dropout→y",
            "dropout: its mask is used",
        ),
        (
            "g (float[N] x) => (float[4] y) <float[4] z = {0,0,0,0}> { y = Add(x, z) }",
            "Add→y",
            "unit: 'z' broadcasts 'x' to another shape, or may",
        ),
        (
            "g (float[N] x) => (float[N] y) { y = Identity(x) }",
            "Identity→y",
            "identity: the names of 'x' and 'y' both have to stay",
        ),
        (
            "g (float[N] x) => (float[N] y) <float a = {9e9}, float b = {-1}> { c = Add(x, a) y = Add(c, b)}",
            "Add→y",
            "constant-chain: the constants differ in sign; rounding in between may be intended",
        ),
    ],
)
def test_says_why_not(graph: str, node: str, reason: str) -> None:
    _, changes = apply(Eliminate(), parse(graph))
    assert not changes
    assert [(skip.node, skip.reason) for skip in changes.skipped] == [(node, reason)]


def test_says_what_was_done() -> None:
    model = parse("g (float[N] x) => (float[N] y) { [mine] a = Identity(x) y = Exp(a) }")
    _, changes = apply(Eliminate(), model)
    assert [(change.node, change.action, change.reason) for change in changes.changed] == [
        ("mine", "removed Identity", "identity")
    ]


def test_leaves_a_model_without_places_untouched() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) { a = Exp(x) y = Neg(a) }")
    after, changes = apply(Eliminate(), model)
    assert not changes
    assert after.to_proto() == model.to_proto()


def test_is_deterministic() -> None:
    model = parse(
        "g (float[2,3] x) => (float[3,2] y)"
        "<int64[1] s = {6}, int64[2] t = {3,2}, float a = {2}, float b = {3}>"
        "{ c = Reshape(x, s) d = Reshape(c, t) e = Mul(d, a) y = Mul(e, b) }"
    )
    first, second = (apply(Eliminate(), model)[0].to_proto() for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_a_rewritten_node_keeps_name_and_notes() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[N,2] x) => (float[N,1,2,1] y)'
        "<int64[1] a = {2}, int64[1] b = {1}> { [first] c = Unsqueeze(x, a) [second] y = Unsqueeze(c, b) }"
    )
    proto.graph.node[1].doc_string = "spoken"
    proto.graph.node[1].metadata_props.add(key="scope", value="head")
    after, _ = apply(Eliminate(), load(proto))
    (node,) = after.to_proto().graph.node
    assert (node.name, node.op_type, node.doc_string) == ("second", "Unsqueeze", "spoken")
    assert [(item.key, item.value) for item in node.metadata_props] == [("scope", "head")]


def test_constants_only_removed_nodes_read_go_too() -> None:
    model = parse(
        "g (float[N,2] x) => (float[N,2] y) <float one = {1}, float two = {2}, float spare = {3}>"
        "{ a = Mul(x, one) y = Mul(a, two) }"
    )
    after, _ = apply(Eliminate(), model)
    assert set(after.graph.initializers) == {"two", "spare"}


def test_a_body_that_hides_a_name_is_left_alone() -> None:
    """Inside the loop, `a` is what the loop carries; there is no way to read the outer `a` in it."""
    model = parse(
        "g (float[2] x, int64 n = {2}) => (float[2] y) <bool c = {1}> { a = Exp(x) d = Identity(a)"
        "y = Loop(n, c, x) <body = b (int64 i, bool ci, float[2] a) => (bool co, float[2] o)"
        "{ co = Identity(ci) o = Add(a, d) }> }"
    )
    after, _ = apply(Eliminate(), model)
    same_outputs(model, after)
    assert ops(after)["Identity"] == 2


def test_works_in_an_if_of_old_files() -> None:
    """Before IR version 4 every initializer is listed among the inputs."""
    model = parse(
        "g (float[N] x, bool d) => (float[N] y) <bool c = {1}, float k = {2}>"
        "{ a = If(c) <then_branch = t () => (float[N] p) <float w = {3}> { u = Mul(x, w) p = Mul(u, k) },"
        "else_branch = e () => (float[N] q) { q = Neg(x) }> y = Exp(a) }",
        ir_version=3,
    )
    after, _ = apply(Eliminate(), model)
    assert ops(after) == {"Mul": 1, "Exp": 1}
    feeds = {"x": np.ones(2, np.float32), "d": np.array(True)}
    same_outputs(model, after, feeds)


def _chain(length: int) -> Model:
    nodes = [
        onnx.helper.make_node("Transpose" if index % 3 else "Identity", [f"t{index}"], [f"t{index + 1}"])
        for index in range(length)
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("t0", 1, [2, 3])],
        [onnx.helper.make_tensor_value_info(f"t{length}", 1, ["A", "B"])],
    )
    imports = [onnx.helper.make_opsetid("", 17)]
    return load(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))


def test_takes_work_in_proportion_to_the_model() -> None:
    def work(length: int) -> None:
        after, _ = apply(Eliminate(), _chain(length))
        assert sum(ops(after).values()) <= 2

    small, large = (calls_of(partial(work, length)) for length in (500, 2000))
    assert large < 4.4 * small


# -------------------------------------------------------------------------------------------- algebra


@given(st.data())
def test_viewed_is_what_onnx_runtime_does(data: st.DataObject) -> None:
    """Views of any kind, chained; the shapes they are expected to have are those they get."""
    shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=4)))
    body, kind = [], [st.integers(0, 3)]
    constants: dict[str, np.ndarray] = {}
    current = shape
    for index in range(data.draw(st.integers(1, 3))):
        op, argument, current = _view(data, data.draw(kind[0]), current)
        name = f"c{index}"
        if op == "Flatten":
            body.append(f"t{index + 1} = Flatten<axis={argument[0]}>(t{index})")
        else:
            constants[name] = np.array(argument, np.int64)
            body.append(f"t{index + 1} = {op}(t{index}, {name})")
    text = (
        f"({', '.join([f'float{list(shape)} t0', *(f'int64[{len(v)}] {k}' for k, v in constants.items())])})"
    )
    made = f"float{list(current) or ''} t{len(body)}"
    model = parse(f"g {text} => ({made}) {{ {' '.join(body)} }}", constants)
    edit = Editor(model)
    found: tuple[int | str | None, ...] | None = shape
    for node in model.graph.nodes:
        found = viewed(node, found, edit)
    assert found == current
    after, _ = apply(Eliminate(), model)
    same_outputs(model, after, exact=True)
    assert sum(ops(after).values()) == 1


def _view(data: st.DataObject, kind: int, shape: tuple[int, ...]) -> tuple[str, list[int], tuple[int, ...]]:
    count = int(np.prod(shape))
    if kind == 0:
        axis = data.draw(st.integers(0, len(shape)))
        return "Flatten", [axis], (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
    if kind == 1:
        axes = [axis for axis, size in enumerate(shape) if size == 1 and data.draw(st.booleans())]
        if axes:
            raw = [axis - len(shape) if data.draw(st.booleans()) else axis for axis in axes]
            return "Squeeze", raw, tuple(size for axis, size in enumerate(shape) if axis not in axes)
    if kind == 2:
        rank = len(shape) + data.draw(st.integers(1, 2))
        axes = sorted(data.draw(st.permutations(range(rank)))[: rank - len(shape)])
        kept = iter(shape)
        return "Unsqueeze", axes, tuple(1 if axis in axes else next(kept) for axis in range(rank))
    first = data.draw(st.sampled_from([size for size in range(1, count + 1) if count % size == 0]))
    target, made = [first, -1], (first, count // first)
    if shape and shape[0] == first and data.draw(st.booleans()):
        target[0] = 0
    return "Reshape", target, made


@given(st.data())
def test_slices_of_slices(data: st.DataObject) -> None:
    """[a, b) and then [c, d) of an axis of any size, in range or not."""
    numbers = st.one_of(st.integers(0, 12), st.just(2**63 - 1))
    first, second = (SliceWindow(0, data.draw(numbers), data.draw(numbers)) for _ in range(2))
    (both,) = joined((first,), (second,))
    for size in range(10):
        whole = np.arange(size)
        expected = whole[first.start : first.end][second.start : second.end]
        assert np.array_equal(whole[both.start : both.end], expected)


@given(st.lists(st.sampled_from((-np.inf, -2.0, 0.0, 1.0, 3.0, np.inf)), min_size=4, max_size=4))
def test_bounds_of_bounds(limits: list[float]) -> None:
    first, second = Bounds(*limits[:2]), Bounds(*limits[2:])
    both = first.then(second)
    values = np.array([-np.inf, -3, -2, -1, 0, 0.5, 1, 2, 3, 4, np.inf])

    def clip(bounds: Bounds, data: np.ndarray) -> np.ndarray:
        return np.asarray(np.minimum(np.maximum(data, bounds.low), bounds.high))

    assert np.array_equal(clip(both, values), clip(second, clip(first, values)))


def test_widening_keeps_every_value() -> None:
    """For each pair of types that is said to widen, all values of a type of 8 or 16 bits come back."""
    for narrow in (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.float16):
        bits = np.arange(2 if narrow is np.bool_ else 2 ** (8 * np.dtype(narrow).itemsize), dtype=np.uint16)
        kind = np.dtype(narrow)
        values = bits.astype(bool) if kind.kind == "b" else bits.astype(f"u{kind.itemsize}").view(kind)
        for wide in (
            np.int8,
            np.uint8,
            np.int16,
            np.uint16,
            np.int32,
            np.int64,
            np.float16,
            np.float32,
            np.float64,
        ):
            if widens(kind, np.dtype(wide)):
                assert np.array_equal(values.astype(wide).astype(narrow), values, equal_nan=kind.kind == "f")


@pytest.mark.parametrize(
    ("narrow", "wide", "expected"),
    [
        (np.int32, np.float32, False),
        (np.int32, np.float64, True),
        (np.int64, np.float64, False),
        (np.uint64, np.int64, False),
        (np.uint32, np.int64, True),
        (np.float64, np.float32, False),
        (np.int8, np.float16, True),
        (np.int16, np.float16, False),
        (np.float32, np.int64, False),
    ],
)
def test_widening(narrow: type, wide: type, expected: bool) -> None:
    assert widens(np.dtype(narrow), np.dtype(wide)) is expected


@settings(deadline=None)
@given(st.lists(sizes, min_size=0, max_size=3), st.lists(sizes, min_size=0, max_size=3))
def test_broadcasts_into_is_what_numpy_does(small: list[int], big: list[int]) -> None:
    try:
        made = np.broadcast_shapes(tuple(small), tuple(big))
    except ValueError:
        made = None
    assert predicates.broadcasts_into(tuple(small), tuple(big)) is (made == tuple(big))


def test_broadcasts_into_knows_what_it_does_not_know() -> None:
    assert predicates.broadcasts_into(("N", 1), ("N", 4))
    assert predicates.broadcasts_into((), None)
    for small, big in (((1,), None), (None, (2,)), ((None,), (None,)), (("N",), ("M",)), ((2,), ("N",))):
        assert not predicates.broadcasts_into(small, big)


@pytest.mark.parametrize("perms", list(itertools.permutations(itertools.permutations(range(3)), 2))[::3])
def test_transposes_compose(perms: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    first, second = perms
    model = parse(
        f"g (float[2,3,4] x) => (float[A,B,C] y) {{ a = Transpose<perm={list(first)}>(x)"
        f" b = Transpose<perm={list(second)}>(a) y = Exp(b) }}"
    )
    after, _ = apply(Eliminate(), model)
    assert ops(after)["Transpose"] <= 1
    same_outputs(model, after, exact=True)
