"""What rows claim of their operators, run on the row's own example.

A claim is a `Trait`, or a field that says how to use an operator; each has one judge here, which every row
that makes the claim has to pass. A new row needs no test code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnxslim.engine.check import difference
from onnxslim.errors import LoadError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node, Variable
from onnxslim.ir.model import Model, constant_of
from onnxslim.ops import OpSpec, Trait
from onnxslim.passes.dead import Dead
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import apply, feeds_for, judge_of, normal, parse, rows, run

HALF = np.dtype(np.float16)
ROWS = rows(domain="")


@dataclass
class Lone:
    """An operator by itself: the example of a row, whose outputs are those of the operator.

    Attributes:
        spec: the row.
        model: whose inputs and outputs take any shape.
        node: the operator.
    """

    spec: OpSpec
    model: Model
    node: Node

    @classmethod
    def of(cls, spec: OpSpec) -> Lone:
        assert spec.example, f"{spec.op} claims something and has no example to show it on"
        model = parse(spec.example)
        node = next(node for node in model.graph.nodes if node.op == spec.op)
        model.graph.outputs[:] = [tensor for tensor in node.outputs if tensor.name]
        model, _ = apply(Dead(), model)
        for tensor in (*model.graph.inputs, *model.graph.outputs):
            assert isinstance(tensor, Variable)
            tensor.shape = None
        return cls(spec, model, next(node for node in model.graph.nodes if node.op == spec.op))

    def data(self) -> list[str]:
        """Inputs of the model that the operator reads as data."""
        fed = {tensor.name for tensor in self.model.graph.inputs}
        names = [self.node.inputs[index].name for index in self.spec.data_inputs(self.node)]
        return [name for name in names if name in fed]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        declared = parse(self.spec.example).graph.inputs
        return {t.name: tuple(d if isinstance(d, int) else 2 for d in t.shape or ()) for t in declared}

    def feeds(self, seed: int = 0) -> dict[str, Array]:
        """Distinct numbers for every element of floats, and all there is of others; 1 for what is no data."""
        random, found = np.random.default_rng(seed), {}
        for tensor in self.model.graph.inputs:
            shape, dtype = self.shapes()[tensor.name], tensor.dtype
            assert dtype is not None
            values: Array = random.permutation(int(np.prod(shape))).reshape(shape) / 4 - 2.1
            if dtype.kind in "iub":
                values = random.integers(0, 2 if dtype.kind == "b" else 4, shape)
            if tensor.name not in self.data():
                values = np.ones(shape) if dtype.kind == "f" else np.zeros(shape)
            found[tensor.name] = values.astype(dtype)
        return found

    def run(self, feeds: Mapping[str, Array], target: Target | None = None) -> list[Any]:
        session = judge_of(self.model) if target is None else Session(self.model, target)
        return list(session.run(feeds).values())

    def first(self, feeds: Mapping[str, Array]) -> Array:
        return np.asarray(self.run(feeds)[0])

    def retyped(self, dtype: np.dtype[Any]) -> None:
        """Take another type where it takes floats."""
        for tensor in (*self.model.graph.inputs, *self.model.graph.outputs):
            if isinstance(tensor, Variable) and tensor.dtype is not None and tensor.dtype.kind == "f":
                tensor.dtype = dtype


def _wide(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def elementwise(lone: Lone) -> None:
    """Transposing and cutting its data transposes and cuts its result, and does no more."""
    feeds, data = lone.feeds(), lone.data()
    result = lone.first(feeds)
    rank = result.ndim
    for order in itertools.islice(itertools.permutations(range(rank)), 1, None, 7):
        moved = {name: _wide(feeds[name], rank).transpose(order) for name in data}
        np.testing.assert_array_equal(lone.first({**feeds, **moved}), result.transpose(order))
    cut = {name: _wide(feeds[name], rank)[..., :1, :2] for name in data}
    np.testing.assert_array_equal(lone.first({**feeds, **cut}), result[..., :1, :2])


def moves(lone: Lone) -> None:
    """Its results are elements of what it reads; after a change of all values, those in the same places."""
    feeds, name = lone.feeds(), lone.data()[0]
    for moved, cubed in zip(lone.run(feeds), lone.run({**feeds, name: feeds[name] ** 3}), strict=True):
        assert np.isin(moved, feeds[name]).all()
        np.testing.assert_array_equal(moved**3, cubed)


def searches(lone: Lone) -> None:
    feeds, name = lone.feeds(), lone.data()[0]
    result = lone.first(feeds)
    assert np.isin(result, feeds[name]).all()
    assert (lone.first({**feeds, name: -feeds[name]}) != -result).any()


def joins(lone: Lone) -> None:
    feeds = lone.feeds()
    parts = np.concatenate([feeds[name].reshape(-1) for name in lone.data()])
    assert len(lone.data()) > 1
    np.testing.assert_array_equal(np.sort(lone.first(feeds), None), np.sort(parts))


def copies(lone: Lone) -> None:
    feeds = lone.feeds()
    assert lone.first(feeds).tobytes() == feeds[lone.data()[0]].tobytes()


def keeps_zeros(lone: Lone) -> None:
    feeds = {name: value * (name not in lone.data()) for name, value in lone.feeds().items()}
    assert not any(np.any(array) for array in lone.run(feeds))


def keeps_order(lone: Lone) -> None:
    feeds, name = lone.feeds(), lone.data()[0]
    np.testing.assert_array_equal(lone.first(feeds).argsort(-1), feeds[name].argsort(-1))


def squashes(lone: Lone) -> None:
    feeds, name = lone.feeds(), lone.data()[0]
    near, far = (lone.first({**feeds, name: feeds[name] * factor}) for factor in (200, 400))
    np.testing.assert_allclose(near, far, atol=1e-6)


def _zeros(lone: Lone) -> tuple[list[Array], list[Array]]:
    """What the operator makes of +0 and of -0, in one input after the other, beside 0, 1 and -1."""
    feeds, plus, minus = lone.feeds(), list[Array](), list[Array]()
    for name, other in itertools.product(lone.data(), (0, 1, -1)):
        if feeds[name].dtype.kind == "f":
            rest = {each: np.full_like(feeds[each], other) for each in lone.data() if each != name}
            for zero, found in ((0.0, plus), (-0.0, minus)):
                found.append(lone.first({**feeds, **rest, name: np.full_like(feeds[name], zero)}))
    return plus, minus


def tells_zeros(lone: Lone) -> None:
    plus, minus = _zeros(lone)
    assert any((one != other).any() for one, other in zip(plus, minus, strict=True))


def merges_zeros(lone: Lone) -> None:
    plus, minus = _zeros(lone)
    assert plus
    assert [each.tobytes() for each in plus] == [each.tobytes() for each in minus]


def divides(lone: Lone) -> None:
    lone.retyped(np.dtype(np.int64))
    one, other = np.arange(1, 13).reshape(3, 4), np.array([1, 2, 3, 5])
    found = lone.first(dict(zip(lone.data(), (one, other), strict=True)))
    assert any(np.array_equal(found, expected) for expected in (one // other, one % other))


def measures(lone: Lone) -> None:
    feeds = lone.feeds()
    other = {name: value + 1 for name, value in feeds.items()}
    np.testing.assert_array_equal(lone.first(feeds), lone.first(other))
    wider = {name: np.concatenate([value] * 2, -1) for name, value in feeds.items()}
    assert (lone.first(feeds) != lone.first(wider)).any()


def grows(lone: Lone) -> None:
    feeds = lone.feeds()
    if lone.spec.op == "Range":
        feeds = {name: np.array(value, np.float32) for name, value in zip(feeds, (0, 99, 1), strict=True)}
    known = [constant_of(tensor) for tensor in lone.node.inputs]
    read = [feeds[tensor.name] for tensor in lone.node.inputs if tensor.name in feeds]
    made = sum(np.asarray(array).nbytes for array in lone.run(feeds))
    assert made > sum(array.nbytes for array in (*read, *known) if array is not None)


def sensitive(lone: Lone) -> None:
    """In half precision, results or the steps between them are off by far more than rounding."""
    single = replace(lone, model=lone.model.copy())
    lone.retyped(HALF)
    worst = 0.0
    with np.errstate(all="ignore"):
        for feeds in _hard(single):
            halves = {name: x.astype(HALF) if x.dtype.kind == "f" else x for name, x in feeds.items()}
            exact = np.asarray(single.run(feeds, Target.reference())[0], np.float64)
            plain = PLAIN.get(lone.spec.op)
            rough = plain(halves["x"]) if plain else np.asarray(lone.run(halves, Target.reference())[0])
            if np.abs(exact).max() < float(np.finfo(HALF).max):
                pairs = ((exact, rough), (_steps(exact), _steps(rough)))
                worst = max(worst, *(_apart(one, np.asarray(other, np.float64)) for one, other in pairs))
    assert worst > 2 * float(np.finfo(HALF).eps)


def periodic(lone: Lone) -> None:
    name, angles = lone.data()[0], normal(1, 2, 4, 4)
    turned = lone.first({name: angles + np.float32(200 * np.pi)})
    np.testing.assert_allclose(lone.first({name: angles}), turned, rtol=2e-2, atol=1e-3)


def _steps(values: Array) -> Array:
    return np.diff(values.reshape(-1))


def _apart(exact: Array, rough: Array) -> float:
    largest = float(np.abs(exact).max(initial=0.0))
    apart = float(np.abs(rough - exact).max(initial=0.0)) / largest if largest else 0.0
    return np.inf if np.isnan(apart) else apart


# What the evaluator computes in a more careful way than the definition, as not all kernels do.
PLAIN: Mapping[str, Callable[[Array], Array]] = {
    "ReduceL1": lambda x: np.abs(x).cumsum(dtype=HALF)[-1:],
    "ReduceLogSum": lambda x: np.log(x.cumsum(dtype=HALF)[-1:]),
    "ReduceLogSumExp": lambda x: np.asarray(np.log(np.exp(x).sum(dtype=HALF))),
    "ReduceSum": lambda x: x.cumsum(dtype=HALF)[-1:],
}


def _hard(lone: Lone) -> list[dict[str, Array]]:
    """Inputs within what half precision holds: one number many times, next to one, large or small."""
    data = lone.data()
    if lone.spec.op == "Range":
        return [dict(zip(data, map(np.float32, (0, 3000, 1)), strict=True))]
    shape, rest = (1, 1, 1, 3000), {n: v for n, v in lone.feeds().items() if n not in data}
    values = [np.full(shape, value, np.float32) for value in (1.0, 300.0, 10.996, 1.0004, 1e-4)]
    powers = {name: np.full(shape, 3000, np.float32) for name in data[1:]}
    return [{**rest, **powers, data[0]: value} for value in values]


def quantizes(lone: Lone) -> None:
    feeds = lone.feeds()
    scale, zero = (np.asarray(lone.node.inputs[index].values)[:, None] for index in (1, 2))  # type: ignore[union-attr]
    expected = (np.rint(feeds["x"] / scale) + zero).clip(0, 255)
    np.testing.assert_array_equal(lone.first(feeds), expected)


def dequantizes(lone: Lone) -> None:
    feeds = lone.feeds()
    scale, zero = (np.asarray(lone.node.inputs[index].values)[:, None] for index in (1, 2))  # type: ignore[union-attr]
    np.testing.assert_array_equal(lone.first(feeds), (feeds["x"] - zero.astype(np.float32)) * scale)


def integer(lone: Lone) -> None:
    """Everything but scales is integers, and with weights of zero the data counts for nothing."""
    feeds, weight = lone.feeds(), lone.node.inputs[lone.spec.weight].name
    assert {value.dtype.kind for value in feeds.values()} == {"u"}
    assert np.ptp(lone.first({**feeds, weight: feeds[weight] * 0})) == 0
    assert np.ptp(lone.first(feeds)) > 0


def structured(lone: Lone) -> None:
    session = onnxruntime.InferenceSession(lone.model.to_proto().SerializeToString())
    kinds = [output.type for output in session.get_outputs()]
    assert all(kind.startswith(("seq(", "optional(")) for kind in kinds)


# Nodes with all of their outputs.
WHOLE = {
    "BatchNormalization": """<ir_version: 8, opset_import: ["" : 9]>
g (float[2,3] x, float[3] s, float[3] b, float[3] m, float[3] v) => (float[2,3] y)
{ y, c, d, e, f = BatchNormalization(x, s, b, m, v) }""",
    "Attention": """<ir_version: 10, opset_import: ["" : 23]>
g (float[1,3,8] q, float[1,5,4] k, float[1,5,4] v, float[1,2,2,2] a, float[1,2,2,2] b)
=> (float[1,3,8] y, float[1,2,7,2] c, float[1,2,7,2] d)
{ y, c, d = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, , a, b) }""",
}


def counts_outputs(lone: Lone) -> None:
    """Without its further outputs it makes something else of the first one, or nothing."""
    model = parse(WHOLE[lone.spec.op])
    feeds = {name: np.abs(value) for name, value in feeds_for(model).items()}
    whole = next(iter(run(model, feeds).values()))
    node = model.graph.nodes[0]
    node.outputs, model.graph.outputs = node.outputs[:1], model.graph.outputs[:1]
    try:
        alone = next(iter(run(model, feeds).values()))
    except LoadError:
        return
    assert difference(whole, alone)


JUDGES: Mapping[Trait, Callable[[Lone], None]] = {
    Trait.ELEMENTWISE: elementwise,
    Trait.MOVES: moves,
    Trait.SEARCHES: searches,
    Trait.JOINS: joins,
    Trait.COPIES: copies,
    Trait.KEEPS_ZEROS: keeps_zeros,
    Trait.KEEPS_ORDER: keeps_order,
    Trait.SQUASHES: squashes,
    Trait.TELLS_ZEROS: tells_zeros,
    Trait.MERGES_ZEROS: merges_zeros,
    Trait.DIVIDES: divides,
    Trait.MEASURES: measures,
    Trait.GROWS: grows,
    Trait.SENSITIVE: sensitive,
    Trait.PERIODIC: periodic,
    Trait.QUANTIZES: quantizes,
    Trait.DEQUANTIZES: dequantizes,
    Trait.INTEGER: integer,
    Trait.STRUCTURED: structured,
    Trait.COUNTS_OUTPUTS: counts_outputs,
}


def test_every_trait_has_a_judge() -> None:
    assert set(JUDGES) == {trait for trait in Trait if trait.value.bit_count() == 1}


def _claims() -> list[Any]:
    return [
        pytest.param(trait, spec, id=f"{trait.name}-{spec.op}")
        for spec in ROWS
        for trait in JUDGES
        if trait in spec.traits
    ]


@pytest.mark.parametrize(("trait", "spec"), _claims())
def test_claims_hold(trait: Trait, spec: OpSpec) -> None:
    JUDGES[trait](Lone.of(spec))


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.op) for s in ROWS if s.norm_axis is not None])
def test_normalizations_scale_and_shift_along_their_axis(spec: OpSpec) -> None:
    lone = Lone.of(spec)
    feeds, axis, names = lone.feeds(), spec.norm_axis, [tensor.name for tensor in lone.node.inputs]
    assert axis is not None
    ones = {name: np.full_like(feeds[name], 2 - index) for index, name in enumerate(names[1:3], 1)}
    plain = lone.first({**feeds, **ones})
    along = [1] * plain.ndim
    along[axis] = -1
    added = {name: np.arange(2, 2 + feeds[name].size, dtype=np.float32) for name in names[1:3]}
    scale, *bias = (values.reshape(along) for values in added.values())
    expected = plain * scale + (bias[0] if bias else 0)
    actual = lone.first({**feeds, **added})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "index"), [pytest.param(s, i, id=f"{s.op}-{i}") for s in ROWS for i in s.ranks]
)
def test_operators_fail_with_another_number_of_axes(spec: OpSpec, index: int) -> None:
    """The state of a recurrent layer is [directions, batch, hidden], its data [steps, batch, inputs]."""
    lone = Lone.of(spec)
    feeds = lone.feeds()
    state = Variable("state", np.dtype(np.float32))
    if index:
        lone.node.inputs.extend(ir.empty() for _ in range(index - len(lone.node.inputs)))
        lone.node.inputs.append(state)
        lone.model.graph.inputs.append(state)
    name = lone.node.inputs[index].name
    whole = {**feeds, **({"state": np.zeros((1, 2, 2), np.float32)} if index else {})}
    assert whole[name].ndim == spec.ranks[index]
    lone.run(whole)
    # Older versions of ONNX Runtime end the process.
    session = Session(lone.model, optimize="none", once=True)
    for shape in (whole[name].shape[1:], (*whole[name].shape, 1)):
        with pytest.raises(LoadError):
            session.run({**whole, name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.op) for s in ROWS if s.at_most is not None])
def test_results_are_no_larger_than_said(spec: OpSpec) -> None:
    lone = Lone.of(spec)
    feeds = {name: np.ones_like(value) for name, value in lone.feeds().items()}
    if spec.op == "Unique":
        feeds = lone.feeds()
    made, read = sum(array.nbytes for array in lone.run(feeds)), sum(array.size for array in feeds.values())
    assert spec.at_most is not None
    assert 0 < made <= spec.at_most * read
