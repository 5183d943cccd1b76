"""Pruning as a pass: goals, limits, plans, proof, and what is said when nothing can go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge, Score
from onnxslim.calibration.gram import Gram
from onnxslim.calibration.samples import Samples
from onnxslim.engine.allocate import convex
from onnxslim.engine.base import Context, Effort, Log
from onnxslim.engine.check import interface, relative_difference
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.errors import InvalidGraph, UsageError
from onnxslim.families.analysis import analyze
from onnxslim.families.removal import Removal
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model, load
from onnxslim.ir.proto import shape_of
from onnxslim.ops import REGISTRY, Channels
from onnxslim.ops.channels.labels import Block, Trace
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune, PruneFigures, PruningPlan, choose
from onnxslim.passes.prune.cut import cut, prepare, zero
from onnxslim.passes.prune.importance import rank
from onnxslim.passes.prune.within import Stage, Way
from onnxslim.passes.quantize import Quantize
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import normals, parse, reasons

CHAIN = """g (float[N,3,8,8] x) => (float[N,2,8,8] y)
{ a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, v, d) q = Relu(c)
  y = Conv(q, u) }"""


PRODUCTS = "g (float[N,24] x) => (float[N,8] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }"


def chain(width: int = 32) -> Model:
    return parse(
        CHAIN,
        normals(w=(width, 3, 3, 3), b=(width,), v=(width, width, 3, 3), d=(width,), u=(2, width, 1, 1)),
    )


def data(samples: int = 32) -> CalibrationData:
    x = np.random.default_rng(1).standard_normal((samples, 3, 8, 8)).astype(np.float32)
    return CalibrationData([{"x": x[at : at + 8]} for at in range(0, samples, 8)])


def prune(model: Model, batches: CalibrationData | None = None, **options: Any) -> Result:
    return Pipeline(Prune(**options), on_error="raise")(model, data=batches)


def weights(model: Model) -> dict[str, Constant]:
    return {
        tensor.name: tensor
        for node in model.graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, Constant)
    }


@pytest.mark.parametrize("goal", ["macs", "params"])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_a_budget_is_reached(goal: str, share: float) -> None:
    asked: dict[str, Any] = {goal: share, "align": 2}
    figures = PruneFigures.of(prune(chain(64), **asked).report.steps[0].changes)
    before, after = figures.macs if goal == "macs" else figures.params
    assert share - 0.02 <= after / before <= share


def test_the_interface_and_the_names_stay() -> None:
    model = chain()
    result = prune(model, ratio=0.5)
    assert interface(result.model) == interface(model)
    shapes = {tensor.name: tensor.shape for node in result.model.graph.nodes for tensor in node.inputs}
    assert [shapes[name] for name in "wvd"] == [(16, 3, 3, 3), (16, 16, 3, 3), (16,)]


def test_what_is_left_is_a_multiple_of_align_and_never_nothing() -> None:
    result = prune(chain(24), ratio=0.9, align=8)
    shapes = {tensor.name: tensor.shape for node in result.model.graph.nodes for tensor in node.inputs}
    assert shapes["v"] == (8, 8, 3, 3)


def test_excluded_layers_stay_whole_and_are_named() -> None:
    result = prune(chain(), ratio=0.5, exclude=("v",))
    assert not result.report.steps[0].changes
    reasons = {skip.reason for skip in result.report.steps[0].changes.skipped}
    assert "excluded by 'v'" in reasons


def test_a_layer_excluded_by_its_name_keeps_the_channels_it_makes() -> None:
    model = chain()
    model.graph.nodes[0].name = "first"
    result = prune(model, ratio=0.5, exclude=("first",)).model
    assert [tensor.shape for name, tensor in weights(result).items() if name in "wv"] == [
        (32, 3, 3, 3),
        (16, 32, 3, 3),
    ]


def test_nothing_pruned_says_why() -> None:
    model = parse("g (float[N,4] x) => (float[N,6] y) { a = MatMul(x, w) y = Softmax(a) }", normals(w=(4, 6)))
    step = prune(model, ratio=0.5).report.steps[0]
    assert not step.changes
    assert any("Softmax" in skip.reason for skip in step.changes.skipped)


def test_layers_of_a_single_channel_are_told_of() -> None:
    model = parse("g (float[N,1] x) => (float[N,1] y) { y = MatMul(x, w) }", normals(w=(1, 1)))
    step = prune(model, ratio=0.5).report.steps[0]
    assert [skip.reason for skip in step.changes.skipped] == [
        "no axis of 'w' can be followed, or each has a single slice"
    ]


@pytest.mark.parametrize("goals", [{}, {"macs": 0.5, "ratio": 0.5}])
def test_one_goal_is_wanted(goals: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="exactly one"):
        prune(chain(), **goals)


def test_a_plan_leaves_nothing_to_exclude() -> None:
    with pytest.raises(UsageError, match="exclude has nothing to say"):
        prune(chain(), plan=Path("plan.json"), exclude=("w",))


def test_repair_makes_up_for_what_went() -> None:
    """Half of the channels are mixtures of the others: without them nothing is lost."""
    model = chain(16)
    random = np.random.default_rng(3)
    named = weights(model)
    # Channel 2i + 1 is a multiple of channel 2i, behind a Relu too.
    for names in (("w", "b"), ("v", "d")):
        factors = random.uniform(0.5, 2.0, 8)
        for name in names:
            twins = np.array(named[name].values)
            twins[1::2] = twins[::2] * factors.reshape(8, *[1] * (twins.ndim - 1))
            named[name].values = twins
    raw = prune(model, data(), ratio=0.5, repair="none")
    repaired = prune(model, data(), ratio=0.5)
    lost, left = (relative_difference(model, each.model, Target.cpu()) or 0.0 for each in (raw, repaired))
    assert left < 2e-3 < lost
    before = PruneFigures.of(repaired.report.steps[0].changes).unrepaired
    after = repaired.report.steps[0].kept
    assert before is not None
    assert after is not None
    assert before.sqnr < after.sqnr - 20
    assert (before.samples, before.whose) == (after.samples, after.whose)
    assert f"before layers were fitted again: {before}" in str(repaired.report)
    assert PruneFigures.of(raw.report.steps[0].changes).unrepaired is None


def test_without_data_the_report_says_that_nothing_was_repaired() -> None:
    step = prune(chain(), ratio=0.5).report.steps[0]
    assert any("repair needs calibration data" in skip.reason for skip in step.changes.skipped)


def test_steps_reach_the_same_goal() -> None:
    figures = PruneFigures.of(prune(chain(64), data(), macs=0.4, steps=3, align=4).report.steps[0].changes)
    assert 0.36 <= figures.macs[1] / figures.macs[0] <= 0.4


def test_a_plan_can_be_replayed_on_other_names() -> None:
    first = prune(chain(), ratio=0.5)
    plan = PruningPlan.from_json(_json(first))
    names = {"w": "kernel", "v": "second", "u": "head"}
    other = parse(
        CHAIN.replace("w,", "kernel,").replace("(r, v,", "(r, second,").replace("u)", "head)"),
        {names.get(name, name): array for name, array in _values().items()},
    )
    prepare(other)
    analysis = analyze(other)
    small = other.copy()
    cut(small, plan.removal(analysis))
    difference = relative_difference(first.model, small, Target.cpu())
    assert difference == 0.0


def _values() -> dict[str, Array]:
    return normals(w=(32, 3, 3, 3), b=(32,), v=(32, 32, 3, 3), d=(32,), u=(2, 32, 1, 1))


def _json(result: Result) -> str:
    return PruneFigures.of(result.report.steps[0].changes).plan.to_json()


def test_a_plan_goes_through_json_and_tells_differences() -> None:
    plan = PruningPlan.from_json(_json(prune(chain(), ratio=0.5)))
    assert PruningPlan.from_json(plan.to_json()) == plan
    other = PruningPlan.from_json(_json(prune(chain(), ratio=0.25)))
    assert plan.difference(plan) == []
    assert plan.difference(other)[0].startswith("w:0:0: 16 units against 8, 8 in common")


def plan_text(**changes: Any) -> str:
    entry = {"family": "w", "size": 8, "position": 0, "members": ["w:0"], "removed": [1, 2]}
    return json.dumps({"version": 1, "sizes": [8], "entries": [{**entry, **changes}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan of pass 'prune': not JSON: Expecting"),
        ('{"version": 9, "sizes": [], "entries": []}', "it has version 9, and this onnxslim reads 1"),
        ('{"version": 1}', "not a plan of pass 'prune': sizes: Field required"),
        (
            plan_text(removed=[1.5]),
            "not a plan of pass 'prune': entries.0.removed.0: Input should be a valid integer",
        ),
        (plan_text(removed=[True]), "entries.0.removed.0: Input should be a valid integer"),
        (plan_text(removed=["1"]), "entries.0.removed.0: Input should be a valid integer"),
        (plan_text(removed=[-1]), "entries.0.removed.0: Input should be greater than or equal to 0"),
        (plan_text(removed=[3, 3]), "entries.0.removed: Value error, '3' is named twice"),
        (plan_text(members="w:0"), "entries.0.members: Input should be a valid array"),
        (plan_text(other=1), "entries.0.other: there is no such key"),
    ],
)
def test_broken_plans_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        PruningPlan.from_json(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_network_is_refused() -> None:
    plan = PruningPlan.from_json(_json(prune(chain(), ratio=0.5)))
    with pytest.raises(UsageError, match="which has 64"):
        plan.removal(analyze(chain(64)))


def test_a_wrong_rule_is_found_out_and_the_family_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Relu that carries its slices on in the wrong order must not get past the proof."""

    def reversed_labels(trace: Trace) -> None:
        trace.emit(Block(block.axes, np.flip(block.labels)) for block in trace.blocks(0))

    row = REGISTRY["", "Relu"]
    monkeypatch.setitem(REGISTRY, ("", "Relu"), replace(row, channels=Channels(reversed_labels)))
    for model in (chain(), saturated()):
        with pytest.raises(InvalidGraph, match=r"cutting family .[wv]:0:0. is not"):
            prune(model, ratio=0.5)
    kept = Pipeline(Prune(ratio=0.5))(chain())
    assert "cutting family" in kept.report.steps[0].error


def saturated() -> Model:
    """Probabilities that are all zero: nothing could be told by them."""
    return parse(
        """g (float[N,3,8,8] x) => (float[N,2,8,8] y)
        { a = Conv(x, w) r = Relu(a) c = Conv(r, v, d) y = Sigmoid(c) }""",
        {**normals(w=(16, 3, 1, 1), v=(2, 16, 1, 1)), "d": np.full(2, -200.0, np.float32)},
    )


def test_allowed_outputs_may_shrink() -> None:
    model = parse("g (float[N,4] x) => (float[N,16] y) { a = MatMul(x, w) y = Relu(a) }", normals(w=(4, 16)))
    result = prune(model, ratio=0.5, allow_outputs=True)
    assert result.model.graph.outputs[0].shape == ("N", 8)
    x = np.ones((2, 4), np.float32)
    assert Session(result.model).run({"x": x})["y"].shape == (2, 8)


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "energy", "thinet", "obs"])
def test_every_criterion_gives_up_dead_channels_first(criterion: str) -> None:
    model = chain(16)
    named = weights(model)
    dead = [3, 7, 8, 12]
    for name in ("w", "b"):
        quiet = np.array(named[name].values)
        quiet[dead] *= 1e-6
        named[name].values = quiet
    weak = np.array(named["v"].values)
    weak[:, dead] *= 1e-6
    named["v"].values = weak
    plan = PruningPlan.from_json(_json(prune(model, data(), ratio=0.25, align=4, importance=criterion)))
    assert plan.entries[0].removed == tuple(dead)


def test_fpgm_gives_up_what_lies_between_others_first() -> None:
    model = chain(16)
    named = weights(model)
    for name, axis in (("w", 0), ("b", 0), ("v", 1)):
        moved = np.moveaxis(np.array(named[name].values), axis, 0)
        moved[5] = moved.mean(axis=0)
        named[name].values = np.ascontiguousarray(np.moveaxis(moved, 0, axis))
    plan = PruningPlan.from_json(_json(prune(model, ratio=0.0625, align=1, importance="fpgm")))
    assert plan.entries[0].removed == (5,)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=8))
def test_a_convex_curve_lies_below_and_has_rising_slopes(heights: list[float]) -> None:
    points = dict(enumerate(heights))
    hull = list(convex(points).values())
    assert all(low <= high + 1e-9 for low, high in zip(hull, heights, strict=True))
    slopes = np.diff(hull)
    assert (np.diff(slopes) >= -1e-9).all()


def test_elimination_predicts_from_what_is_left() -> None:
    """What reads a + b + (a + b) needs the sum only: both of its terms can go for nothing."""
    model = parse(
        "g (float[N,4] x) => (float[N,2] y) { a = MatMul(x, w) y = MatMul(a, u) }",
        normals(w=(4, 3), u=(3, 2)),
    )
    family = analyze(model).families[0]
    x = np.random.default_rng(0).standard_normal((1000, 2))
    rows = np.concatenate([x, x.sum(axis=1, keepdims=True)], axis=1)
    gram = Gram(
        np.cov(rows.T, bias=True)[None],
        np.zeros((1, 0, 3)),
        np.zeros((1, 0)),
        rows.mean(axis=0)[None],
        np.zeros((1, 0)),
        1000,
    )
    constants = {"w": np.ones((4, 3), np.float32), "u": np.ones((3, 2), np.float32)}
    ranking = rank(family, constants, {("a", 1): gram}, "obs")
    assert ranking.damage[2] < 2e-3 < 0.9 < ranking.damage[3]
    assert ranking.order[2] == 2
    assert rank(family, constants, {("a", 1): gram}, "obs", 2).order == ranking.order[:2]


_SHAPES = {
    "conv": (8, 8, 1, 1),
    "conv3": (8, 8, 3, 3),
    "depthwise": (8, 1, 3, 3),
    "grouped": (8, 4, 1, 1),
}
_OPS = (*_SHAPES, "relu", "norm", "gate", "residual", "concat", "split", "pool")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(_OPS), min_size=2, max_size=9), st.integers(0, 1000))
def test_random_networks_can_be_cut_exactly(kinds: list[str], seed: int) -> None:
    model = random_network(kinds, seed)
    prepare(model)
    analysis = analyze(model)
    random = np.random.default_rng(seed)
    units = {
        family.name: sorted(random.permutation(family.size)[: int(random.integers(0, family.size))].tolist())
        for family in analysis.families
        if not family.crosses
    }
    removal = Removal(analysis, units)
    small, zeroed = model.copy(), model.copy()
    cut(small, removal)
    zero(zeroed, removal)
    difference = relative_difference(zeroed, small, Target.cpu())
    assert difference is not None
    assert difference < 1e-5


def random_network(kinds: list[str], seed: int) -> Model:
    """Layers of these kinds in turn, over 8 channels and 6 x 6 positions."""
    random = np.random.default_rng(seed)
    lines = ["t0 = Conv(x, w0)"]
    arrays = {"w0": random.standard_normal((8, 3, 1, 1)), "head": random.standard_normal((2, 8, 1, 1))}
    for n, kind in enumerate(kinds, start=1):
        t = f"t{n - 1}"
        if kind in _SHAPES:
            shape = _SHAPES[kind]
            arrays[f"w{n}"] = random.standard_normal(shape)
            pad = shape[-1] // 2
            group = 8 // shape[1]
            lines.append(f"t{n} = Conv<group={group}, pads=[{pad},{pad},{pad},{pad}]>({t}, w{n})")
        elif kind == "relu":
            lines.append(f"t{n} = Relu({t})")
        elif kind == "norm":
            arrays[f"w{n}"] = random.uniform(0.5, 1.0, 8)
            lines.append(f"t{n} = BatchNormalization({t}, w{n}, w{n}, w{n}, w{n})")
        elif kind == "gate":
            lines.append(f"g{n} = GlobalAveragePool({t}) h{n} = Sigmoid(g{n}) t{n} = Mul({t}, h{n})")
        elif kind == "residual":
            arrays[f"w{n}"] = random.standard_normal((8, 8, 1, 1))
            lines.append(f"r{n} = Conv({t}, w{n}) t{n} = Add({t}, r{n})")
        elif kind == "concat":
            arrays[f"w{n}"] = random.standard_normal((4, 8, 1, 1))
            arrays[f"v{n}"] = random.standard_normal((8, 12, 1, 1))
            lines.append(f"r{n} = Conv({t}, w{n}) c{n} = Concat<axis=1>({t}, r{n}) t{n} = Conv(c{n}, v{n})")
        elif kind == "split":
            arrays[f"s{n}"] = np.array([3, 5])
            lines.append(f"p{n}, q{n} = Split<axis=1>({t}, s{n}) t{n} = Concat<axis=1>(q{n}, p{n})")
        else:
            lines.append(f"t{n} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({t})")
    body = "\n".join([*lines, f"y = Conv(t{len(kinds)}, head)"])
    return parse(f"g (float[N,3,6,6] x) => (float[N,2,6,6] y) {{ {body} }}", _tame(arrays))


def _tame(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Signals keep their size, so that no gate saturates.

    ONNX Runtime's Sigmoid is exact to 1e-7 absolute: where every gate is saturated, only rounding is left.
    """

    def tame(array: np.ndarray) -> np.ndarray:
        fan_in = array[0].size if array.ndim == 4 else 1
        scaled: np.ndarray = (array / np.sqrt(fan_in)).astype(np.float32)
        return array if array.dtype.kind == "i" else scaled

    return {name: tame(array) for name, array in arrays.items()}


def test_constants_that_a_cut_leaves_equal_are_shared_again() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,8,6,6] y)
        { p = Mul(x, k) q = Mul(p, k) a = Conv(q, w) r = Relu(a) y = Conv(r, v) }""",
        normals(k=(3, 1, 1), w=(16, 3, 1, 1), v=(8, 16, 1, 1)),
    )
    result = prune(model, ratio=0.5)
    assert {name: c.shape for name, c in result.model.graph.initializers.items()} == {
        "k": (3, 1, 1),
        "w": (8, 3, 1, 1),
        "v": (8, 8, 1, 1),
    }


def test_a_plan_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="cannot read the plan '/nowhere/plan"):
        prune(chain(), plan="/nowhere/plan.json")


def test_a_quantized_model_can_be_pruned() -> None:
    """Scales of weights go with their channels; rounding does not get in the way of the proof."""
    quantized = Pipeline(Quantize(), on_error="raise")(chain(), data=data()).model
    step = prune(quantized, ratio=0.5, repair="none").report.steps[0]
    figures = PruneFigures.of(step.changes)
    assert figures.oracle is not None
    assert figures.oracle < 1e-5
    assert figures.params[1] < 0.4 * figures.params[0]


def test_weights_stored_in_half_precision_can_be_pruned() -> None:
    stored = Pipeline(Half(weights_only=True), on_error="raise")(chain()).model
    step = prune(stored, ratio=0.5, repair="none").report.steps[0]
    figures = PruneFigures.of(step.changes)
    assert figures.oracle is not None
    assert figures.oracle < 1e-5
    assert figures.params[1] < 0.4 * figures.params[0]


def test_a_plan_with_a_position_that_is_not_there_is_refused() -> None:
    analysis = analyze(chain())
    plan = PruningPlan.of(Removal(analysis, {analysis.families[0].name: [0]}))
    entry = replace(plan.entries[0], members=("other:0",), position=99)
    with pytest.raises(UsageError, match="no family like"):
        replace(plan, entries=(entry,)).removal(analysis)


def test_a_plan_is_replayed_once_whatever_the_steps(tmp_path: Path) -> None:
    analysis = analyze(chain())
    path = tmp_path / "plan.json"
    path.write_text(PruningPlan.of(Removal(analysis, {analysis.families[0].name: [0, 5]})).to_json())
    figures = PruneFigures.of(prune(chain(), plan=path, steps=3).report.steps[0].changes)
    assert [entry.removed for entry in figures.plan.entries] == [(0, 5)]


def test_a_goal_that_is_met_says_so() -> None:
    step = prune(chain(), macs=1.0).report.steps[0]
    assert not step.changes
    assert [skip.reason for skip in step.changes.skipped] == ["the goal is met as it is"]


def test_a_file_of_ir_3_lists_its_weights_as_they_became() -> None:
    model = chain()
    model.ir_version = 3
    result = prune(load(model.to_proto()), ratio=0.5)
    listed = {info.name: shape_of(info.type) for info in result.model.to_proto().graph.input}
    assert listed["v"] == weights(result.model)["v"].shape == (16, 16, 3, 3)


@pytest.mark.parametrize(
    ("dtype", "text", "values"),
    [
        ("float16", CHAIN, _values()),
        ("double", PRODUCTS, normals(w=(24, 64), v=(64, 8))),
        ("float16", PRODUCTS, normals(w=(24, 64), v=(64, 8))),
    ],
)
def test_the_proof_allows_what_the_type_of_the_weights_rounds(
    dtype: str, text: str, values: dict[str, Array]
) -> None:
    kind = np.dtype(dtype)
    constants = {name: array.astype(kind) for name, array in values.items()}
    result = prune(parse(text.replace("float[", f"{dtype}["), constants), ratio=0.3)
    oracle = PruneFigures.of(result.report.steps[0].changes).oracle
    assert oracle is not None
    assert oracle <= 84 * np.finfo(kind).eps


def test_what_onnx_runtime_has_no_kernel_for_is_cut_without_a_proof() -> None:
    values = {name: array.astype(np.float64) for name, array in _values().items()}
    result = prune(parse(CHAIN.replace("float[", "double["), values), ratio=0.5)
    assert weights(result.model)["v"].shape == (16, 16, 3, 3)
    assert PruneFigures.of(result.report.steps[0].changes).oracle is None


CACHE = """g (float[N,8,6] x, float[N,P,6] past) => (float[N,8,6] y, float[N,P,6] z)
{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) e = MatMul(past, k) f = Relu(e) z = MatMul(f, u) }"""
SLICE_OF_NOTHING = """g (float[N,8,6] x) => (float[N,M,6] y)
{ a = MatMul(x, w) e = Slice(a, end, most, one) f = MatMul(e, k) g = MatMul(a, h) c = Concat<axis=1>(f, g)
  y = MatMul(c, v) }"""


def empty_at_first(samples: int = 12) -> CalibrationData:
    random = np.random.default_rng(0)
    x = [random.standard_normal((2, 8, 6)).astype(np.float32) for _ in range(samples)]
    return CalibrationData([{"x": each, "past": np.zeros((2, 0, 6), np.float32)} for each in x])


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"params": 0.7}, {"ratio": 0.5, "repair": "bias"}])
def test_what_the_data_leave_empty_stays_and_the_rest_goes_on(options: dict[str, Any]) -> None:
    model = parse(CACHE, normals(w=(6, 32), v=(32, 6), k=(6, 32), u=(32, 6)))
    result = prune(model, empty_at_first(), **options)
    assert weights(result.model)["k"].shape == (6, 32)
    assert weights(result.model)["w"].shape[1] < 32
    told = reasons(result.report.steps[0].changes)
    assert told["k:1:0"] == "'f' is empty in all of the calibration data, so nothing of it is cut"


def test_units_that_one_of_two_layers_never_sees_go_by_the_other() -> None:
    sizes = {name: np.array([value], np.int64) for name, value in {"end": 8, "most": 99, "one": 1}.items()}
    model = parse(SLICE_OF_NOTHING, normals(w=(6, 32), k=(32, 32), h=(32, 32), v=(32, 6)) | sizes)
    feeds = [{"x": each["x"]} for each in empty_at_first()]
    small = weights(prune(model, CalibrationData(feeds), ratio=0.5).model)
    assert small["w"].shape == (6, 16)
    assert small["k"].shape == small["h"].shape == (16, 16)


@pytest.mark.parametrize(
    ("effort", "shares", "samples"), [("quick", 2, 8), ("normal", 4, 16), ("thorough", 8, 16)]
)
def test_effort_is_how_closely_damage_is_looked_at(
    effort: Effort, shares: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    class Counting(Judge):
        """Counts what it judges, and on how many samples."""

        def __call__(self, model: Model, *rest: Any) -> Score:
            judged.append(self.seen)
            return super().__call__(model, *rest)

    monkeypatch.setattr(choose, "Judge", Counting)
    figures = PruneFigures.of(
        prune(chain(64), data(64), params=0.5, align=1, effort=effort).report.steps[0].changes
    )
    assert figures.params[1] <= 0.51 * figures.params[0]
    assert judged == [samples] * (shares * (figures.families or 0))


@pytest.mark.parametrize("steps", [1, 2])
def test_shares_do_not_depend_on_the_batch_that_is_looked_at(steps: int) -> None:
    """Sizes that constants have are not tried for a free batch: with five units left, it is seven."""
    text = "g (float[N,24] x) => (float[N,9] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }"
    net = parse(text, normals(w=(24, 8), v=(8, 9)))
    share = 0.4 if steps == 2 else 5 / 8
    result = prune(net, macs=share, align=1, steps=steps)
    before, after = PruneFigures.of(result.report.steps[0].changes).macs
    left = weights(result.model)["v"].shape[0]
    assert left == (3 if steps == 2 else 5)
    assert after / before == left / 8


def test_units_are_ordered_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all samples, once their numbers are known; smaller choices find them there, larger ones take all."""
    asked: list[Mapping[str, int] | None] = []

    def ordering(_: Way, model: Model, __: object, ___: object, most: Mapping[str, int] | None = None) -> Any:
        asked.append(most)
        return f"order {len(asked)}"

    monkeypatch.setattr(Way, "candidates", ordering)
    model = chain()
    samples, unused = Samples(data(), model), lambda *_: None
    way = Way("units", "obs", 1, 0.9, "normal", {}, samples, Context(), Log(), model, analyze, unused)
    stage = Stage(model, analyze(model), way)
    found: list[Any] = [
        stage._ordered(gone) for gone in ({"a": 3, "b": 0}, {"a": 2}, {"a": 3, "b": 1}, {"b": 2})
    ]
    assert found == ["order 1", "order 1", "order 2", "order 2"]
    assert asked == [{"a": 3, "b": 0}, None]
