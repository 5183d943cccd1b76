"""Branches that go: what stands in, what it costs, in which order, and that it is what zeros there are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples
from onnxslim.engine.allocate import Refunding, allocate
from onnxslim.engine.base import Context, Log
from onnxslim.engine.check import relative_difference
from onnxslim.engine.joint import acting, jointly
from onnxslim.engine.moves import Load, Move
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.errors import CalibrationError, InvalidGraph, UsageError
from onnxslim.families.analysis import analyze
from onnxslim.families.branches import Branch, branches
from onnxslim.families.costs import Costs
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.prune import Prune, PruneFigures, PruningPlan, depth, exact, price, within
from onnxslim.passes.prune.depth import DepthSearch
from onnxslim.passes.prune.exact import prove_dropped
from onnxslim.passes.prune.price import Probe, Stopwatch, counted, timed
from onnxslim.passes.prune.standin import NOTHING, Kind, drop, fitted
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import Latency
from tests.helpers import FASHION, normals, parse, reasons

CPU = Target.cpu(threads=1)
# Three blocks behind a stem; the second does next to nothing.
BLOCKS = """g (float[N,6] x) => (float[N,4] y) { t = MatMul(x, stem)
  a = MatMul(t, w1) b = Relu(a) c = MatMul(b, v1) s1 = Add(t, c)
  d = MatMul(s1, w2) e = Relu(d) f = MatMul(e, v2) s2 = Add(s1, f)
  h = MatMul(s2, w3) i = Relu(h) j = MatMul(i, v3) s3 = Add(j, s2)
  y = MatMul(s3, head) }"""


def weights(faint: float = 1e-3) -> dict[str, Array]:
    shapes = {f"w{block}": (16, 32) for block in (1, 2, 3)} | {f"v{block}": (32, 16) for block in (1, 2, 3)}
    found = normals(stem=(6, 16), head=(16, 4), **shapes)
    found = {name: each * np.float32(0.3) for name, each in found.items()}
    return {**found, "v2": found["v2"] * np.float32(faint)}


def blocks(faint: float = 1e-3) -> Model:
    return parse(BLOCKS, weights(faint))


def data(samples: int = 64, width: int = 6) -> CalibrationData:
    x = np.random.default_rng(1).standard_normal((samples, width)).astype(np.float32)
    return CalibrationData([{"x": x[at : at + 8]} for at in range(0, samples, 8)])


def prune(model: Model, batches: CalibrationData | None, **options: Any) -> Result:
    return Pipeline(Prune(**options), on_error="raise")(model, data=batches, target=CPU)


def figures(result: Result) -> PruneFigures:
    return PruneFigures.of(result.report.steps[0].changes)


def outputs(model: Model, feeds: Mapping[str, Array]) -> Array:
    return np.asarray(next(iter(Session(model, CPU).run(feeds).values())))


# ------------------------------------------------------------------------------------------- choosing


def test_the_branch_that_does_least_goes_first() -> None:
    result = prune(blocks(), data(), macs=0.7, what="branches")
    assert list(figures(result).branches or {}) == ["Add→s2"]
    assert figures(result).oracle == 0.0
    assert figures(result).families == 0
    changed = {change.node: change.action for change in result.report.steps[0].changes.changed}
    assert changed["Add→s2"] == "its branch is gone"
    assert not {"w2", "v2"} & {each.name for each in result.model.constants()}


def test_branches_compete_with_units_of_families() -> None:
    gone = figures(prune(blocks(), data(), macs=0.7))
    assert list(gone.branches or {}) == ["Add→s2"]  # half of any other block would cost far more
    assert gone.macs[1] <= 0.72 * gone.macs[0]
    assert figures(prune(blocks(), data(), macs=0.7, what="units")).branches is None


def test_units_go_alone_where_the_outputs_keep_more_by_that() -> None:
    constants = weights(faint=1.0)
    for name in ("w1", "w2", "w3"):
        constants[name][:, 16:] = constants[name][:, :16]  # half of the units are doubles
    gone = figures(prune(parse(BLOCKS, constants), data(), macs=0.6))
    assert gone.branches is None
    assert gone.families == 3


def test_interacting_branches_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two do the same, so that each is to be missed only once the other one has gone."""
    constants = weights(faint=1.0)
    constants |= {"w2": constants["w1"], "v2": constants["v1"], "v3": constants["v3"] * np.float32(1.3)}
    text = BLOCKS.replace("MatMul(s1, w2)", "MatMul(t, w2)").replace("MatMul(s2, w3)", "MatMul(t, w3)")
    model = parse(text, constants)
    monkeypatch.setattr(depth, "fitted", lambda _, found, *__: {each: {"nothing": NOTHING} for each in found})
    found = [each for each in branches(model).found if each.end in ("c", "f", "j")]
    samples = Samples(data(), model, CPU)
    search = DepthSearch(
        model, found, samples, 32, {}, {}, lambda _, cuts: 3.0 - len(cuts), Context(target=CPU), Log()
    )
    alone = [search.error({each: "nothing"}) for each in found]
    assert max(alone[:2]) < alone[2] < 2.5 * max(alone[:2])
    assert [each.sum for each in search.within(1.0)] in (["s1", "s3"], ["s2", "s3"])


def test_a_branch_voids_what_families_within_it_have_lost() -> None:
    """The family f lies in the branch b, g elsewhere; all but the damage of f makes b better than g."""
    damage = {"f": {0: 0.0, 1: 0.2}, "g": {0: 0.0, 1: 0.5}, "b": {0: 0.0, 1: 0.6}}

    def cost(picks: Mapping[str, int]) -> float:
        return 10.0 - 4 * picks["g"] - (8 if picks["b"] else 4 * picks["f"])

    start = dict.fromkeys(damage, 0)
    assert allocate(Refunding(damage, cost, {"b": {1: ["f"]}}), 2.0, start) == {"f": 0, "g": 0, "b": 1}
    assert allocate(Refunding(damage, cost, {}), 2.0, start) == {"f": 1, "g": 1, "b": 0}


def _proposed(model: Model, **options: Any) -> list[Move]:
    return list(Prune(**options).propose(model, Context(target=CPU, data=Samples(data(), model, CPU))))


def test_branches_are_proposed_one_more_at_a_time_and_cut_as_they_say() -> None:
    model = blocks(faint=0.05)
    load = Load.of(model, {"x": (1, 6)})
    moves = [move for move in _proposed(model, align=4) if move.group == "branches"]
    assert [move.option for move in moves] == ["1 of 3 branches", "2 of 3 branches", "3 of 3 branches"][
        : len(moves)
    ]
    assert len(moves) > 1
    for move in moves:
        made = Pipeline(acting(Prune(repair="none"), [move]), on_error="raise")(model, data=data()).model
        for unit in ("macs", "bytes"):
            assert Load.of(made, {"x": (1, 6)}).total(unit) == pytest.approx(load.total(unit, [move]))
    assert not [move for move in _proposed(model, what="units") if move.group == "branches"]


def test_a_joint_budget_takes_branches_and_what_is_within_them_no_more() -> None:
    """Without the second block, none of its units and none of its factors are chosen, however tight it is."""
    model = blocks()
    ctx = Context(target=CPU, data=Samples(data(), model, CPU))
    for share in (0.3, 0.01):
        found = jointly((Prune(align=4), Factorize(align=4, params=0.5)), model, ctx, "macs", share)
        pruned = [move for move in found.moves if move.step == "prune"]
        (depth,) = (move for move in pruned if move.group == "branches")
        assert {"d", "f", "w2", "v2"} <= depth.gone
        assert not any(depth.voids(move) for move in found.moves)
        result = Pipeline(*found.passes, on_error="raise")(model, data=data(), target=CPU).model
        assert result.to_proto() == found.result.to_proto()
        assert share < 0.1 or found.left <= share


def test_what_branches_share_goes_with_the_last_of_them() -> None:
    """Units of a weight that two branches read are none once both are gone."""
    model = parse(BLOCKS.replace("MatMul(s1, w2)", "MatMul(s1, w1)"), weights(0.05))
    moves = [move for move in _proposed(model, align=4) if move.group == "branches"]
    assert [("w1" in move.gone, "w1" in move.left) for move in moves][0::2] == [(False, False), (True, True)]
    ctx = Context(target=CPU, data=Samples(data(), model, CPU))
    found = jointly((Prune(align=4),), model, ctx, "bytes", 0.05)
    assert found.moves[0] == moves[-1]
    assert not any(found.moves[0].voids(move) for move in found.moves)


def test_what_keeps_more_once_it_is_fitted_again_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures(prune(blocks(), data(), macs=0.7)).branches
    monkeypatch.setattr(within.Within, "_error", lambda _, __, cuts=None: 1.0 if cuts else 0.5)
    result = prune(blocks(), data(), macs=0.7)
    assert not figures(result).branches
    why = reasons(result.report.steps[0].changes)["Add→s2"]
    assert why == "its branch stays: the outputs keep more if units go alone"


def test_without_data_units_go_alone() -> None:
    assert figures(prune(blocks(), None, macs=0.7)).branches is None
    with pytest.raises(CalibrationError, match="needs calibration data"):
        prune(blocks(), None, macs=0.7, what="branches")
    with pytest.raises(UsageError, match="ratio is of units"):
        prune(blocks(), data(), ratio=0.3, what="branches")


def test_what_is_excluded_keeps_its_branch() -> None:
    result = prune(blocks(), data(), macs=0.7, what="branches", exclude=("v2",))
    assert "Add→s2" not in (figures(result).branches or {})
    assert reasons(result.report.steps[0].changes)["Add→s2"] == "its branch stays: excluded by 'v2'"


def test_less_goes_where_more_is_required() -> None:
    model = blocks(faint=0.05)
    free = figures(prune(model, data(), macs=0.4, what="branches"))
    result = prune(model, data(), macs=0.4, what="branches", require_sqnr=15.0)
    assert list(figures(result).branches or {}) == ["Add→s2"]
    assert len(free.branches or {}) > 1
    assert any(
        "of what was asked for goes: with more" in why
        for why in reasons(result.report.steps[0].changes).values()
    )


def test_of_nested_branches_the_outer_one_takes_the_inner_one_along() -> None:
    text = """g (float[N,8] x) => (float[N,4] y) { a = MatMul(x, w) b = MatMul(a, v) s = Add(a, b)
    c = MatMul(s, u) t = Add(x, c) y = MatMul(t, head) }"""
    model = parse(text, normals(w=(8, 32), v=(32, 32), u=(32, 8), head=(8, 4)))
    gone = figures(prune(model, data(width=8), macs=0.1, what="branches"))
    assert gone.branches == {"Add→t": "linear"}


@pytest.mark.parametrize(
    ("share", "why"),
    [(0.95, "one branch is larger than what was left to go"), (0.01, "no other branch can go")],
)
def test_a_budget_that_branches_miss_says_why(share: float, why: str) -> None:
    result = prune(blocks(), data(16), macs=share, what="branches", repair="none")
    assert reasons(result.report.steps[0].changes)["g"].endswith(why)


def test_steps_and_branches_go_together() -> None:
    result = prune(blocks(), data(), macs=0.5, steps=2)
    assert figures(result).branches
    assert abs(figures(result).macs[1] / figures(result).macs[0] - 0.5) < 0.1
    assert outputs(result.model, {"x": np.ones((3, 6), np.float32)}).shape == (3, 4)


# ------------------------------------------------------------------------------------------ stand-ins


BOTH = "MatMul Add"
DEPTHWISE = "b = Conv<group=4>(x, w, c)"


def skipping(branch: str, sizes: str = "N,8", **shapes: tuple[int, ...]) -> Model:
    text = f"g (float[{sizes}] x) => (float[{sizes}] y) {{ {branch} y = Add(x, b) }}"
    return parse(text, normals(**shapes))


def dropped(model: Model, kind: Kind, batches: CalibrationData) -> Model:
    (branch,) = branches(model).found
    made = fitted(model, [branch], Samples(batches, model, CPU), Context(target=CPU))[branch]
    drop(model, {branch: made[kind]})
    return model


def batches_of(*shape: int, samples: int = 64) -> CalibrationData:
    x = np.random.default_rng(2).standard_normal((samples, *shape)).astype(np.float32)
    return CalibrationData([{"x": x[at : at + 16]} for at in range(0, samples, 16)])


@pytest.mark.parametrize(
    ("model", "kind", "shape", "ops"),
    [
        (skipping("a = MatMul(x, w) b = MatMul(a, v)", w=(8, 9), v=(9, 8)), "linear", (8,), BOTH),
        (
            skipping("a = MatMul(x, w) b = Add(a, c)", "N,5,8", w=(8, 8), c=(8,)),
            "linear",
            (5, 8),
            "MatMul Add",
        ),
        (skipping("b = Conv(x, w, c)", "N,4,5,5", w=(4, 4, 1, 1), c=(4,)), "linear", (4, 5, 5), "Conv"),
        (skipping("b = Conv(x, w, c)", "N,4,7", w=(4, 4, 1), c=(4,)), "linear", (4, 7), "Conv"),
        (skipping(DEPTHWISE, "N,4,5,5", w=(4, 1, 1, 1), c=(4,)), "affine", (4, 5, 5), "Mul Add"),
    ],
)
def test_a_branch_that_is_linear_is_replaced_exactly(
    model: Model, kind: Kind, shape: tuple[int, ...], ops: str
) -> None:
    small = dropped(model.copy(), kind, batches_of(*shape))
    assert " ".join(node.op for node in small.graph.nodes) == ops
    feeds = {"x": np.random.default_rng(3).standard_normal((3, *shape)).astype(np.float32)}
    expected = outputs(model, feeds)
    assert np.abs(outputs(small, feeds) - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_mean_stands_in_for_what_has_one() -> None:
    model = skipping(
        "a = MatMul(x, w) z = Relu(a) f = MatMul(z, v) b = Add(f, c)", w=(8, 4), v=(4, 8), c=(8,)
    )
    small = dropped(model.copy(), "mean", batches_of(8, samples=512))
    assert [node.op for node in small.graph.nodes] == ["Add"]
    feeds = {"x": np.random.default_rng(4).standard_normal((512, 8)).astype(np.float32)}
    assert np.abs((outputs(small, feeds) - outputs(model, feeds)).mean(0)).max() < 0.5


@pytest.mark.parametrize("samples", [2, 3, 5, 8])
def test_few_samples_make_no_wild_stand_ins(samples: int) -> None:
    """They are no further from a branch than the branch is from nothing, on samples that nobody has seen."""
    model = skipping("a = MatMul(x, w) z = Relu(a) b = MatMul(z, v)", "N,32", w=(32, 64), v=(64, 32))
    (branch,) = branches(model).found
    few = Samples(batches_of(32, samples=samples), model, CPU)
    x = np.random.default_rng(4).standard_normal((256, 32)).astype(np.float32)
    wanted = outputs(model, {"x": x})
    for kind, made in fitted(model, [branch], few, Context(target=CPU))[branch].items():
        small = model.copy()
        drop(small, {branch: made})
        error = np.square(outputs(small, {"x": x}) - wanted).mean()
        assert error < 2 * np.square(wanted - x).mean(), kind


def test_half_precision_gets_stand_ins_of_its_type() -> None:
    inner = "a = MatMul(x, w) r = Relu(a) b = MatMul(r, v)"
    text = f"g (float16[N,8] x) => (float16[N,8] y) {{ {inner} y = Add(b, x) }}"
    model = parse(text, {name: each.astype(np.float16) for name, each in normals(w=(8, 8), v=(8, 8)).items()})
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float16)
    small = dropped(model, "linear", CalibrationData([{"x": x[:16]}, {"x": x[16:]}]))
    assert {each.dtype for each in small.constants()} == {np.dtype(np.float16)}
    assert outputs(small, {"x": x}).dtype == np.float16


@pytest.mark.parametrize("stem", ["", "t = Relu(x)"])
def test_a_sum_that_is_an_output_keeps_its_name_and_the_skip_its_own(stem: str) -> None:
    skip = "t" if stem else "x"
    text = f"g (float[N,8] x) => (float[N,8] y) {{ {stem} b = MatMul({skip}, w) y = Add({skip}, b) }}"
    model = parse(text, normals(w=(8, 8)))
    (branch,) = branches(model).found
    drop(model, {branch: NOTHING})
    assert [node.op for node in model.graph.nodes] == [*(["Relu"] if stem else []), "Identity"]
    assert [tensor.name for tensor in model.graph.nodes[-1].inputs] == [skip]
    x = np.ones((2, 8), np.float32)
    assert (outputs(model, {"x": x}) == x).all()


# --------------------------------------------------------------------------------------------- proof


_PIECES = {
    "plain": "{o} = MatMul({i}, w{n})",
    "deep": "{o}a = MatMul({i}, w{n}) {o}b = Relu({o}a) {o} = MatMul({o}b, v{n})",
    "norm": "{o}a = LayerNormalization({i}, g{n}, h{n}) {o} = MatMul({o}a, w{n})",
    "nested": "{o}a = MatMul({i}, w{n}) {o}b = MatMul({o}a, v{n}) {o}c = Add({o}a, {o}b) "
    "{o} = MatMul({o}c, u{n})",
    "pooled": "{o}a = ReduceMean<axes=[0], keepdims=1>({i}) {o} = MatMul({o}a, w{n})",
    "gated": "{o}a = MatMul({i}, w{n}) {o}b = Sigmoid({o}a) {o} = Mul({o}b, {i})",
}


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(sorted(_PIECES)), min_size=1, max_size=4), st.data())
def test_dropping_is_setting_to_zero(kinds: Sequence[str], chosen: st.DataObject) -> None:
    lines, tensor, constants = [], "x", dict[str, tuple[int, ...]]()
    for number, kind in enumerate(kinds):
        lines.append(_PIECES[kind].format(i=tensor, o=f"b{number}", n=number))
        first, second = chosen.draw(st.permutations([tensor, f"b{number}"]))
        lines.append(f"s{number} = Add({first}, {second})")
        tensor = f"s{number}"
        constants |= {f"{letter}{number}": (8, 8) for letter in "wvu"} | {
            f"{each}{number}": (8,) for each in "gh"
        }
    text = f"g (float[N,8] x) => (float[N,8] y) {{ {' '.join(lines)} y = Relu({tensor}) }}"
    model = parse(text, {name: each * np.float32(0.5) for name, each in normals(**constants).items()})
    found = [each for each in branches(model).found if not each.sum.endswith("c")]
    assert len(found) == len(kinds)
    wanted = [each for each in found if chosen.draw(st.booleans())]
    assert prove_dropped(model, wanted, CPU, ()) in (None, 0.0)
    small = model.copy()
    drop(small, dict.fromkeys(wanted, NOTHING))
    assert relative_difference(model, small, CPU) is not None
    assert len(branches(small).found) == len(branches(model).found) - sum(
        1 + (kinds[int(each.sum[1:])] == "nested") for each in wanted
    )


def test_a_cut_that_is_wrong_is_found_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Model, cuts: Mapping[Branch, Any]) -> None:
        model.graph.nodes[-1].inputs[0] = model.graph.inputs[0]
        drop(model, cuts)

    text = "g (float[N,8] x) => (float[N,8] y) { t = Exp(x) b = MatMul(t, w) s = Add(t, b) y = Relu(s) }"
    model = parse(text, normals(w=(8, 8)))
    monkeypatch.setattr(exact, "drop", wrong)
    with pytest.raises(InvalidGraph, match="dropping the branch into 'Add→s' is not what setting it to zero"):
        prove_dropped(model, branches(model).found, CPU, ())


# --------------------------------------------------------------------------------------------- plans


def test_a_plan_replays_branches_byte_for_byte(tmp_path: Path) -> None:
    first = prune(blocks(), data(), macs=0.5, what="branches")
    plan = figures(first).plan
    assert [each.sum for each in plan.branches] == ["s2", *(each.sum for each in plan.branches[1:])]
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    second = prune(blocks(), data(), plan=tmp_path / "plan.json")
    assert second.model.to_proto().SerializeToString() == first.model.to_proto().SerializeToString()
    assert figures(second).plan == plan


def test_a_plan_of_branches_and_units_is_replayed() -> None:
    first = prune(blocks(), data(), macs=0.5, align=4)
    plan = figures(first).plan
    assert plan.branches
    assert plan.entries
    second = prune(blocks(), data(), plan=plan)
    assert figures(second).plan == plan
    assert figures(second).macs == figures(first).macs


def test_a_plan_finds_branches_by_their_place() -> None:
    plan = figures(prune(blocks(), data(), macs=0.7, what="branches")).plan
    renamed = parse(BLOCKS.replace("s2", "other"), weights())
    assert list(figures(prune(renamed, data(), plan=plan)).branches or {}) == ["Add→other"]
    with pytest.raises(UsageError, match="the model has no branch into 's2', which the plan drops"):
        plan.cuts(branches(skipping("b = MatMul(x, w)", w=(8, 8))).found)


def test_without_data_nothing_stands_in_where_a_plan_wants_it() -> None:
    plan = figures(prune(blocks(), data(), macs=0.7, what="branches")).plan
    result = prune(blocks(), None, plan=plan)
    assert list((figures(result).branches or {}).values()) == ["nothing"]
    assert any(
        "nothing stands in for its branch: no " in why
        for why in reasons(result.report.steps[0].changes).values()
    )


def test_a_plan_without_branches_is_written_as_ever() -> None:
    plan = figures(prune(blocks(), data(), macs=0.7, what="units")).plan
    assert "branches" not in json.loads(plan.to_json())
    other = figures(prune(blocks(), data(), macs=0.7, what="branches")).plan
    assert "s2: branch kept against dropped (affine in its place)" in plan.difference(other)


# ------------------------------------------------------------------------------------------- latency


def by_macs(models: Sequence[Model], *_: Any, **__: Any) -> tuple[list[Latency], list[float]]:
    """Times as if nothing but multiply-accumulates took any."""
    macs = [Costs(model, analyze(model)).macs({}) for model in models]
    return [Latency(each, each) for each in macs], [each / macs[0] for each in macs]


def test_a_budget_of_latency_is_corrected_by_what_the_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes a third of the time, whatever is left."""

    def slow(models: Sequence[Model], *_: Any, **__: Any) -> tuple[list[Latency], list[float]]:
        found, ratios = by_macs(models)
        return found, [0.35 + 0.65 * each**3 for each in ratios]

    monkeypatch.setattr(price, "compare", slow)
    latency = figures(prune(blocks(faint=1.0), data(), latency=0.6, what="units", align=1)).latency
    assert latency == pytest.approx(0.6, abs=0.025)


@pytest.mark.parametrize("what", ["both", "branches"])
def test_a_budget_of_latency_is_kept_by_measuring(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(price, "compare", by_macs)
    result = prune(blocks(faint=1.0), data(), latency=0.6, what=what, align=2)
    assert figures(result).latency is not None
    assert abs((figures(result).latency or 0) - 0.6) < 0.1
    assert bool(figures(result).branches) == (what == "branches") or what == "both"


def test_times_are_laid_on_nodes_so_that_measured_ones_come_out() -> None:
    """The truth here is far from the first guess: only the second block takes any time."""
    model = blocks()
    analysis = analyze(model)
    costs, found = Costs(model, analysis), branches(model).found
    probes = [Probe(model.copy, {}, {}), *(Probe(model.copy, {}, {each: "nothing"}) for each in found)]
    learnt = timed(costs, analysis.sizes, probes, [1.0, 1.0, 0.2, 1.0])
    assert learnt({}, {}) == pytest.approx(1.0, abs=0.02)
    assert learnt({}, {found[1]: "nothing"}) < 0.6 < 0.85 < learnt({}, {found[0]: "nothing"})
    assert learnt({}, {found[1]: "linear"}) > learnt({}, {found[1]: "nothing"})


def test_where_times_say_nothing_there_is_no_budget_of_latency() -> None:
    with pytest.raises(UsageError, match="a budget of latency needs a target with one"):
        Stopwatch(blocks(), {}, Target.reference())


def test_prices_count_stand_ins() -> None:
    model = blocks()
    analysis = analyze(model)
    costs, (first, *_) = Costs(model, analysis), branches(model).found
    macs = counted("macs", costs, analysis.sizes)
    batch = analysis.sizes["s1"][0]
    assert macs({}, {}) - macs({}, {first: "mean"}) == batch * 2 * 16 * 32
    assert macs({}, {first: "linear"}) - macs({}, {first: "mean"}) == batch * 16 * 16
    params = counted("params", costs, analysis.sizes)
    assert params({}, {}) - params({}, {first: "affine"}) == 2 * 16 * 32 - 2 * 16


def test_a_bundled_network_loses_a_branch_and_stays_itself() -> None:
    images = np.load(FASHION / "calibration.npz")["image"][:16]
    batches = CalibrationData([{"image": images[:8]}, {"image": images[8:]}])
    result = prune(load(FASHION / "resnet.onnx"), batches, macs=0.85, what="branches", repair="none")
    assert figures(result).branches
    assert (figures(result).oracle or 0.0) < 1e-5
