"""Sizes in symbols: what is said about a model holds in every run of it."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from onnxslim.errors import LoadError
from onnxslim.ir.graph import Constant, Tensor
from onnxslim.ir.model import Model
from onnxslim.runtime.session import Session
from onnxslim.shapes import symbols
from onnxslim.shapes.dims import Dims, copied, dims_of
from onnxslim.shapes.symbols import Term
from tests.helpers import parse


def tensor_of(model: Model, name: str) -> Tensor:
    return next(tensor for node in model.nodes() for tensor in node.outputs if tensor.name == name)


def shape(text: str, name: str = "y", **constants: Any) -> tuple[Term, ...] | None:
    model = parse(f"g (float[N,S] x, float[M] z) => (float[] y) {{ {text} }}", constants)
    twin = copied(model)
    own = tensor_of(twin, name)
    assert dims_of(twin).shape(own) == Dims(twin).shape(own), "a copy is known as well as if looked at anew"
    return Dims(model).shape(tensor_of(model, name))


def value(text: str, name: str = "y", **constants: Any) -> tuple[Term | None, ...] | None:
    model = parse(f"g (float[N,S] x, float[M] z) => (int64[] y) {{ {text} }}", constants)
    twin = copied(model)
    own = tensor_of(twin, name)
    assert dims_of(twin).value(own) == Dims(twin).value(own), "a copy is known as well as if looked at anew"
    found = Dims(model).value(tensor_of(model, name))
    return found.terms if found is not None else None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n = Shape<end = 1>(x) o = Squeeze(n) r = Range(a, o, b) y = Cast<to = 1>(r)", ("N",)),
        ("n = Shape<end = 1>(x) o = Squeeze(n) r = Range(b, o, b) y = Cast<to = 1>(r)", (None,)),
        ("s = Shape(x) y = Expand(one, s)", ("N", "S")),
        ("s = Shape<end = 1>(x) y = Slice(table, zero, s, zero)", (("min", "N", 512), 3)),
        (
            "s = Shape<end = 1>(x) t = Slice(table, zero, s, zero) u = Shape<end = 1>(x) "
            "v = Concat<axis = 0>(u, three) y = Expand(t, v)",
            ("N", 3),
        ),
        ("s = Shape<end = 1>(x) t = Slice(row, zero, s, zero) u = Transpose(x) y = Add(t, u)", ("S", "N")),
        ("y = Flatten<axis = 0>(x)", (1, ("*", "N", "S"))),
        ("y = Concat<axis = 1>(x, x)", ("N", ("+", "S", "S"))),
        ("n = Shape<end = 1>(x) q = Concat<axis = 0>(n, minus) y = Reshape(x, q)", ("N", "S")),
        ("y = Add(x, z)", ("N", None)),
        ("y = MatMul(x, w)", ("N", 4)),
        # Nothing says what a shape that is computed from values is: a zero that copies from it stays unknown.
        ("k = Cast<to = 7>(z) d = Reshape(x, k) y = Reshape(d, copy)", (None, None, 2)),
    ],
)
def test_shapes(text: str, expected: tuple[Term | None, ...]) -> None:
    found = shape(
        text,
        a=np.array(0),
        b=np.array(1),
        copy=np.array([0, -1, 2]),
        one=np.ones((1, 1), np.float32),
        table=np.ones((512, 3), np.float32),
        row=np.ones(512, np.float32),
        zero=np.array([0]),
        three=np.array([3]),
        minus=np.array([-1]),
        w=np.ones((5, 4), np.float32),
    )
    assert found is not None
    known = ("N", "S", "M")
    assert tuple(None if isinstance(t, str) and t not in known else t for t in found) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s = Shape(x) y = Mul(s, two)", (("*", "N", 2), ("*", "S", 2))),
        ("s = Size(x) t = Shape<end = 1>(x) u = Squeeze(t) y = Div(s, u)", ("S",)),
        (
            "s = Shape(x) t = Shape(x) u = Concat<axis = 0>(s, t) y = ReduceProd<keepdims = 0>(u)",
            (("*", "N", "N", "S", "S"),),
        ),
        ("s = Shape(x) u = Add(s, two) y = Sub(u, s)", (2, 2)),
        ("s = Shape(x) b = Equal(s, minus) y = Where(b, two, s)", ("N", "S")),
        ("s = Shape(x) b = Equal(s, two) y = Where(b, two, s)", (None, None)),
        (
            "n = Shape<end = 1>(x) m = Shape(z) d = Sub(n, m) b = Equal(d, minus) y = Where(b, two, n)",
            (None,),
        ),
        ("s = Shape(x) c = Cast<to = 1>(s) y = Cast<to = 7>(c)", None),
        ("s = Shape(x) c = Cast<to = 6>(s) y = Cast<to = 7>(c)", ("N", "S")),
        ("s = Shape(x) n = NonZero(x) k = Shape<start = 1>(n) y = Concat<axis = 0>(s, k)", ("N", "S", "unk")),
    ],
)
def test_values(text: str, expected: tuple[Term | None, ...] | None) -> None:
    found = value(text, two=np.array([2]), minus=np.array([-1]))
    if found is not None:
        found = tuple("unk" if isinstance(term, str) and term.startswith("unk") else term for term in found)
    assert found == expected


# ----------------------------------------------------------------------------------- in every run


def evaluated(term: Term, sizes: Mapping[str, int]) -> int:
    """The number a term stands for in a run."""
    if isinstance(term, int):
        return term
    if isinstance(term, str):
        return sizes[term]
    parts = [evaluated(part, sizes) for part in term[1:]]
    if term[0] == "min":
        return min(parts)
    return sum(parts) if term[0] == "+" else int(np.prod(parts))


FREE = ((2, 3), (1, 1), (0, 2), (2, 0), (5, 4), (4, 5), (1, 4), (3, 1))


class Program:
    """A random model over x, float[N,S,4], and z, float[S,4], made of what exporters write."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.lines: list[str] = []
        self.floats = ["x", "z", "table"]
        self.vectors = ["two", "four"]
        self.targets = ["minus"]
        self.scalars = ["one"]
        for _ in range(self.random.randint(3, 14)):
            self.step()

    def pick(self, names: list[str]) -> str:
        return self.random.choice(names)

    def add(self, kind: list[str], text: str) -> None:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        kind.append(name)

    def step(self) -> None:
        data, other = self.pick(self.floats), self.pick(self.floats)
        vector, second = self.pick(self.vectors), self.pick(self.vectors)
        start = self.random.randint(-2, 1)
        choices = (
            (self.vectors, f"Shape<start = {start}>({data})"),
            (self.vectors, f"Shape<start = {start}, end = {start + 1}>({data})"),
            (self.vectors, f"Concat<axis = 0>({vector}, {second})"),
            (self.vectors, f"Mul({vector}, two)"),
            (self.vectors, f"Add({vector}, {second})"),
            (self.targets, f"Concat<axis = 0>({vector}, {self.pick(self.targets)})"),
            (self.targets, f"Concat<axis = 0>({self.pick(self.targets)}, {vector})"),
            (self.vectors, f"ReduceProd({vector})"),
            (self.vectors, f"Slice({vector}, zero, unit)"),
            (self.scalars, f"Gather({vector}, {self.pick(['one', 'naught'])})"),
            (self.vectors, f"Unsqueeze({self.pick(self.scalars)}, zero)"),
            (self.floats, f"Reshape({data}, {vector})"),
            (self.floats, f"Reshape({data}, {self.pick(self.targets)})"),
            (self.floats, f"Expand({data}, {vector})"),
            (self.floats, f"{self.pick(['Add', 'Mul', 'Max'])}({data}, {other})"),
            (self.floats, f"MatMul({data}, {other})"),
            (self.floats, f"Concat<axis = {self.random.randint(0, 1)}>({data}, {data})"),
            (self.floats, f"Slice({data}, zero, {vector}, {self.pick(['zero', 'unit'])})"),
            (self.floats, f"Slice(table, zero, {vector}, zero)"),
            (self.floats, f"Flatten<axis = {self.random.randint(0, 2)}>({data})"),
            (self.floats, f"Transpose({data})"),
            (self.floats, f"Unsqueeze({data}, zero)"),
            (self.floats, f"ConstantOfShape({vector})"),
            (self.floats, f"MaxPool<kernel_shape = [2], strides = [2], ceil_mode = 1>({data})"),
        )
        self.add(*self.random.choice(choices))

    def model(self) -> Model:
        made = [line.split(" = ")[0] for line in self.lines]
        kinds = [f"{'float' if name in self.floats else 'int64'}[] {name}" for name in made]
        constants = {"two": [2], "four": [4], "minus": [-1], "zero": [0], "unit": [1], "one": 1, "naught": 0}
        values: dict[str, Any] = {name: np.array(value, np.int64) for name, value in constants.items()}
        values["table"] = np.ones((3, 4), np.float32)
        return parse(
            f"g (float[N,S,4] x, float[S,4] z) => ({', '.join(kinds)}) {{ {' '.join(self.lines)} }}", values
        )


@given(
    st.integers(0, 2**32), st.sampled_from([(2, 3), (1, 1), (0, 2), (2, 0), (5, 4), (4, 5), (1, 4), (3, 1)])
)
@settings(max_examples=300, deadline=None)
def test_what_is_said_holds_in_every_run(seed: int, free: tuple[int, int]) -> None:
    program = Program(seed)
    batch, length = free
    # A size of zero means "copy" to Reshape; see `Dims`.
    assume(0 not in free or not any("Reshape(" in line for line in program.lines))
    model = program.model()
    feeds = {"x": np.ones((batch, length, 4), np.float32), "z": np.ones((length, 4), np.float32)}
    try:
        outputs = Session(model, optimize="none").run(feeds)
    except LoadError:
        return
    dims = Dims(model)
    sizes = {"N": batch, "S": length}
    for node in model.graph.nodes:
        tensor = node.outputs[0]
        actual = outputs[tensor.name]
        check(dims.shape(tensor), actual.shape, sizes)
        vector = dims.value(tensor)
        if vector is not None:
            check(vector.terms, tuple(actual.reshape(-1).tolist()), sizes)


def check(said: tuple[Term | None, ...] | None, actual: tuple[int, ...], sizes: dict[str, int]) -> None:
    if said is None:
        return
    assert len(said) == len(actual)
    for term, size in zip(said, actual, strict=True):
        # A symbol of inference means whatever it means at its first place.
        if isinstance(term, str):
            assert sizes.setdefault(term, size) == size, (term, size)
        elif term is not None and terms_known(term, sizes):
            assert evaluated(term, sizes) == size, (term, size)


def terms_known(term: Term, sizes: Mapping[str, int]) -> bool:
    if isinstance(term, tuple):
        return term[0] in ("*", "+", "min") and all(terms_known(part, sizes) for part in term[1:])
    return isinstance(term, int) or term in sizes


# ------------------------------------------------------------------------------------------- algebra

names = st.sampled_from(["a", "b", "c"])
expressions = st.recursive(
    st.one_of(st.integers(0, 5), names),
    lambda inner: st.one_of(
        st.builds(symbols.plus, inner, inner),
        st.builds(symbols.times, inner, inner),
        st.builds(symbols.least, inner, inner),
    ),
    max_leaves=6,
)
numbers = st.fixed_dictionaries({name: st.integers(0, 6) for name in "abc"})


@given(expressions, expressions, numbers)
def test_terms_compute_like_numbers(first: Term, second: Term, sizes: dict[str, int]) -> None:
    one, other = evaluated(first, sizes), evaluated(second, sizes)
    assert evaluated(symbols.plus(first, second), sizes) == one + other
    assert evaluated(symbols.times(first, second), sizes) == one * other
    assert evaluated(symbols.least(first, second), sizes) == min(one, other)
    assert symbols.plus(first, second) == symbols.plus(second, first)
    assert symbols.times(first, second) == symbols.times(second, first)
    assert symbols.is_size(first)
    difference = symbols.minus(symbols.plus(first, second), second)
    if not (isinstance(difference, tuple) and difference[0] == "-"):
        assert evaluated(difference, sizes) == one
    quotient = symbols.exactly_over(symbols.times(first, second), second)
    if quotient is not None and other:
        assert evaluated(quotient, sizes) == one


@given(st.lists(expressions, min_size=1, max_size=3), numbers)
@example([("min", "a", 0), "a"], {"a": 1, "b": 0, "c": 0})
def test_broadcast_is_what_broadcasting_gives(parts: list[Term], sizes: dict[str, int]) -> None:
    actual = [evaluated(part, sizes) for part in parts]
    try:
        (expected,) = np.broadcast_shapes(*((size,) for size in actual))
    except ValueError:
        return
    result = symbols.broadcast(parts)
    if result is not None:
        assert evaluated(result, sizes) == expected


def test_one_sweep_goes_through_a_deep_stack() -> None:
    body = " ".join(
        f"a{i} = Reshape(x{i}, split) b{i} = Transpose<perm=[0,2,1,3]>(a{i}) c{i} = Softmax(b{i}) "
        f"d{i} = Transpose<perm=[0,2,1,3]>(c{i}) e{i} = Reshape(d{i}, join) f{i} = Relu(e{i}) "
        f"u{i} = Unsqueeze(f{i}, one) v{i} = Squeeze(u{i}, one) x{i + 1} = Add(v{i}, x{i})"
        for i in range(30)
    )
    model = parse(
        "g (float[N,6,8] x0) => (float[A,B,C] x30) "
        f"<int64[4] split = {{-1,6,2,4}}, int64[3] join = {{-1,6,8}}, int64[1] one = {{1}}> {{ {body} }}"
    )
    dims = Dims(model)
    assert dims.shape(tensor_of(model, "x30")) == ("N", 6, 8)
    assert dims.shape(tensor_of(model, "c29")) == ("N", 2, 6, 4)


def _reshaped() -> Model:
    return parse(
        "g (float[N,6] x) => (float[A,B,C] y) <int64[3] s = {-1,2,3}> { a = Reshape(x, s) y = Relu(a) }"
    )


def test_sizes_are_kept_as_long_as_nothing_changes() -> None:
    model = _reshaped()
    first = dims_of(model)
    assert dims_of(model) is first
    assert dims_of(model.copy()) is not first


def test_axes_without_a_name_are_those_of_the_copy() -> None:
    one, other, ids = ("axis", 9, 0), ("axis", 10, 1), {9: 30, 10: 4}
    for combine in (symbols.plus, symbols.minus, symbols.times, symbols.over, symbols.least):
        expected = combine(("axis", 30, 0), ("axis", 4, 1))
        assert symbols.moved(combine(one, other), ids) == expected != combine(one, other)


def test_sizes_of_a_copy_are_found_anew_once_it_is_edited() -> None:
    model = _reshaped()
    twin = copied(model)
    known = dims_of(twin)
    assert dims_of(twin) is known
    assert known.shape(tensor_of(twin, "y")) == ("N", 2, 3)
    twin.graph.nodes[0].inputs[1] = Constant("t", np.array([-1, 1, 6]))
    assert dims_of(twin).shape(tensor_of(twin, "y")) == ("N", 1, 6)
    assert dims_of(model).shape(tensor_of(model, "y")) == ("N", 2, 3)


@pytest.mark.parametrize("change", ["values", "input", "attribute", "operator", "shape", "opset"])
def test_sizes_are_found_anew_after_any_change(change: str) -> None:
    model = _reshaped()
    before = dims_of(model)
    reshape, relu = model.graph.nodes
    if change == "values":
        constant = reshape.inputs[1]
        assert isinstance(constant, Constant)
        constant.values = np.array([-1, 3, 2])
    elif change == "input":
        reshape.inputs[1] = Constant("t", np.array([-1, 1, 6]))
    elif change == "attribute":
        reshape.attrs["allowzero"] = 1
    elif change == "operator":
        relu.op = "Exp"
    elif change == "shape":
        model.graph.inputs[0].shape = ("M", 12)
    else:
        model.opsets[""] = 18
    assert dims_of(model) is not before
