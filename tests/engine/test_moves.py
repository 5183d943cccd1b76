"""Moves of passes: they say what the passes decide by, make what they say, and share one budget."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context, Pass
from onnxslim.engine.joint import acting, jointly
from onnxslim.engine.moves import BudgetUnit, Load, Move, chosen
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import UsageError
from onnxslim.ir.model import Model
from onnxslim.passes.dead import Dead
from onnxslim.passes.factorize import Factorize, FactorizeFigures
from onnxslim.passes.prune import Prune, PruneFigures, PruningPlan
from onnxslim.passes.quantize import QuantizationPlan, Quantize, QuantizeFigures
from tests.helpers import apply, normal, normals, parse

NET = """g (float[N,8,6,6] x) => (float[N,8] y)
{ a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, v, d) q = Relu(c)
  p = GlobalAveragePool(q) f = Flatten(p) h = MatMul(f, s) t = Relu(h) y = MatMul(t, u) }"""
WEIGHTS = {"w": (32, 8, 3, 3), "b": (32,), "v": (64, 32, 3, 3), "d": (64,), "s": (64, 96), "u": (96, 8)}


@pytest.fixture(scope="module")
def net() -> Model:
    return parse(NET, normals(**WEIGHTS))


BATCHES = [{"x": normal(8, 8, 6, 6, seed=seed)} for seed in range(24)]


def context(model: Model) -> Context:
    return Context(data=Samples(CalibrationData(BATCHES), model))


def load_of(model: Model) -> Load:
    return Load.of(model, {"x": (8, 8, 6, 6)})


def move(step: str, group: str, damage: float, left: Mapping[str, float], measured: bool = True) -> Move:
    return Move(step, group, "", left, damage, measured, PruningPlan((), ()))


LOAD = Load({"a": 600, "c": 400}, {"w": 100, "v": 300})


def test_what_a_model_computes_and_stores(net: Model) -> None:
    load = load_of(net)
    assert load.macs["a"] == 8 * 32 * 8 * 9 * 36
    assert load.total("bytes") == sum(4 * np.prod(shape) for shape in WEIGHTS.values())
    assert set(load.macs) == {"a", "c", "h", "y"}


def test_costs_of_two_passes_on_one_layer_multiply() -> None:
    first = move("prune", "f", 1.0, {"a": 0.5, "c": 0.75})
    second = move("factorize", "a", 1.0, {"a": 0.5, "w": 0.1})
    assert LOAD.total("macs", (first, second)) == 0.25 * 600 + 0.75 * 400
    assert LOAD.saved("macs", second) == 300
    assert LOAD.saved("bytes", second) == 90


def test_the_least_damage_for_the_budget_whatever_the_pass() -> None:
    """Alone the first saves most for what it costs; 500 of 1000 are to be left."""
    moves = [
        move("prune", "f", 0.3, {"a": 0.5, "c": 0.75}),
        move("prune", "f", 2.0, {"a": 0.2, "c": 0.5}),
        move("factorize", "a", 1.0, {"a": 0.5}),
        move("factorize", "c", 0.2, {"c": 0.5}),
    ]
    assert chosen(moves, LOAD, "macs", 500) == [moves[0], moves[3]]
    assert chosen(moves, LOAD, "macs", 400) == [moves[0], moves[2], moves[3]]
    assert chosen(moves, LOAD, "macs", 1000) == []
    assert chosen(moves, LOAD, "macs", 0) == moves[1:]


def test_what_is_not_measured_compares_with_moves_of_its_own_pass_only() -> None:
    own = [move("prune", "f", 3.0, {"a": 0.5}, False), move("prune", "g", 1.0, {"c": 0.5}, False)]
    assert chosen(own, LOAD, "macs", 900) == own[1:]
    with pytest.raises(UsageError, match="moves of pass 'prune' are not measured"):
        chosen([*own, move("factorize", "a", 1.0, {"a": 0.5})], LOAD, "macs", 900)


def test_passes_propose_nothing_unless_they_say_so(net: Model) -> None:
    assert Dead().propose(net, context(net)) == ()


@pytest.mark.parametrize("each", [Prune(align=4), Factorize(params=0.5, align=4), Quantize()])
def test_proposing_leaves_the_model_alone_and_measures_where_there_is_data(net: Model, each: Pass) -> None:
    before = net.to_proto()
    moves = each.propose(net, context(net))
    assert net.to_proto() == before
    assert moves
    assert all(found.measured and found.step == each.name for found in moves)


@pytest.mark.parametrize("each", [Prune(align=4), Factorize(params=0.5, align=4)])
def test_without_data_damage_is_what_the_criterion_says(net: Model, each: Pass) -> None:
    moves = each.propose(net, Context())
    assert moves
    assert not any(found.measured for found in moves)


def test_quantization_proposes_nothing_that_it_cannot_measure(net: Model) -> None:
    assert Quantize(activations="none").propose(net, Context()) == ()


@pytest.mark.parametrize("each", [Prune(align=4), Factorize(params=0.5, align=4)])
def test_in_a_group_each_move_saves_more_and_costs_more_for_it(net: Model, each: Pass) -> None:
    load = load_of(net)
    groups: dict[str, list[tuple[float, float]]] = {}
    for found in each.propose(net, context(net)):
        points = groups.setdefault(found.group, [(0.0, 0.0)])
        points.append((load.saved("bytes", found), found.damage))
    assert max(map(len, groups.values())) > 2
    for points in groups.values():
        slopes = [(y - b) / (x - a) for (a, b), (x, y) in pairwise(points)]
        assert all(x > a for (a, _), (x, _) in pairwise(points))
        assert all(after >= before * (1 - 1e-9) for before, after in pairwise(slopes))


def test_moves_of_pruning_alone_are_what_it_does_by_itself(net: Model) -> None:
    ctx, load = context(net), load_of(net)
    picked = chosen(Prune(align=4).propose(net, ctx), load, "macs", 0.5 * load.total("macs"))
    step = acting(Prune(align=4, repair="none"), picked)
    own = PruneFigures.of(apply(Prune(macs=0.5, align=4), net, BATCHES)[1]).plan
    assert step.plan == own
    assert step.describe() == f"prune(repair='none', plan={own!r})"


def test_moves_of_factorization_alone_are_what_it_does_by_itself(net: Model) -> None:
    ctx, load, wish = context(net), load_of(net), Factorize(params=0.15, align=4)
    own = FactorizeFigures.of(apply(wish, net, BATCHES)[1]).plan
    picked = chosen(wish.propose(net, ctx), load, "bytes", 0.15 * load.total("bytes"))
    assert len(picked) > 2
    assert acting(wish, picked).plan == own


def test_moves_of_quantization_alone_are_what_it_does_by_itself(net: Model) -> None:
    own = QuantizeFigures.of(apply(Quantize(require_sqnr=0), net, BATCHES)[1]).plan
    moves = Quantize().propose(net, context(net))
    assert acting(Quantize(), moves).plan == own
    some = moves[0].plan
    assert isinstance(some, QuantizationPlan)
    assert [each.node for each in some.layers if each.stays is None] == [moves[0].group]


@pytest.mark.parametrize(
    ("unit", "share", "passes"),
    [
        ("macs", 0.4, (Prune(align=4), Factorize(align=4, params=0.5))),
        ("bytes", 0.15, (Prune(align=4), Factorize(align=4, params=0.5), Quantize(classifier=True))),
    ],
)
def test_passes_keep_to_one_budget_together(
    net: Model, unit: BudgetUnit, share: float, passes: tuple[Pass, ...]
) -> None:
    found = jointly(passes, net, context(net), unit, share)
    assert {each.step for each in found.moves} == {each.name for each in passes}
    assert found.left <= share
    assert found.measured is not None
    assert found.predicted / 4 < found.measured < 4 * found.predicted
    result = Pipeline(*found.passes, on_error="raise")(net, data=BATCHES)
    assert load_of(result.model).total(unit) <= share * load_of(net).total(unit)
    assert result.model.to_proto() == found.result.to_proto()


def test_what_is_met_already_needs_no_pass(net: Model) -> None:
    found = jointly((Prune(align=4),), net, context(net), "macs", 1.0)
    assert (found.passes, found.moves, found.left, found.predicted) == ((), (), 1.0, 0.0)
    assert found.measured == 0.0
