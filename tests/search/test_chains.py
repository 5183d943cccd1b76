"""What is tried for which goals, and that passes with plans leave what was asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context
from onnxslim.engine.moves import Move
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import UsageError
from onnxslim.learn import door
from onnxslim.passes.cluster import Cluster
from onnxslim.passes.distill import Distill
from onnxslim.passes.factorize import FactorizationPlan
from onnxslim.passes.prune import Prune, PruningPlan
from onnxslim.passes.quantize import Quantize
from onnxslim.runtime.targets import Target
from onnxslim.search import Goals, optimize
from onnxslim.search.chains import (
    FLOAT,
    SHARES,
    Structures,
    encodings,
    moves_from_json,
    moves_to_json,
)
from onnxslim.shapes import cost
from tests.helpers import normal, normals, parse

NET = """g (float[N,32] x) => (float[N,8] y)
{ a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) q = Relu(b) y = MatMul(q, u) }"""
DATA = CalibrationData([{"x": normal(8, 32, seed=seed)} for seed in range(16)])


@pytest.mark.parametrize("share", [0.72, 0.5])
def test_what_is_left_of_the_work_is_what_was_asked_for(share: float) -> None:
    net = parse(NET, normals(w=(32, 64), v=(64, 64), u=(64, 8)))
    learning = (Distill(steps=3),)
    structures = Structures(net, Context(data=Samples(DATA, net)), "quick", learning)
    assert any(structures.moves)
    factors = Move(
        "factorize", "a", "8", {"a": 0.1}, float("inf"), True, FactorizationPlan(()), 1e-3, frozenset("b")
    )
    moves = [structures.moves[0], [factors]]
    assert moves_from_json(moves_to_json(moves)) == moves
    assert structures(1.0) == ()
    chain = structures(share)
    assert structures(share) is chain
    assert chain[-1:] == learning
    result = Pipeline(*chain[:-1], on_error="raise")(net, data=DATA).model
    before, after = (cost.macs(model, {"x": (1, 32)}) for model in (net, result))
    assert before is not None
    assert after is not None
    assert 0.5 * share * before < after <= share * before


def test_what_is_left_of_the_time_is_measured() -> None:
    net = parse(NET, normals(w=(32, 512), v=(512, 512), u=(512, 8)))
    (step,) = Structures(net, Context(data=Samples(DATA, net)), "quick")(0.5, "time")
    assert isinstance(step, Prune)
    assert isinstance(step.plan, PruningPlan)
    result = Pipeline(step, on_error="raise")(net, data=DATA).model
    before, after = (cost.macs(model, {"x": (1, 32)}) for model in (net, result))
    assert before is not None
    assert after is not None
    assert after < 0.9 * before


def test_where_nothing_can_go_nothing_is_proposed() -> None:
    net = parse("g (float[N,32] x) => (float[N,32] y) { y = Relu(x) }")
    assert not any(Structures(net, Context(data=Samples(DATA, net)), "quick").moves)


def test_codes_and_integer_weights_are_tried_where_bytes_count() -> None:
    fast = encodings(Goals(latency=0.5), Target.cpu(), "quick")
    assert not any(way.spares for way in fast.values()), "nothing has to be kept"
    assert list(fast) == [FLOAT, "int8", "dynamic int8"]
    assert "half" in encodings(Goals(), Target.cuda(), "quick")
    small = encodings(Goals(size=0.2), Target.cpu(), "quick")
    assert "dynamic int8" not in small, "only bytes count"
    assert {"int4 weights", "codes of 2 bits"} <= small.keys()
    names = {name for name in encodings(Goals(size=0.11), Target.cpu(), "normal") if "average" in name}
    assert names == {"codes of 3.52 bits on average", "codes of 3.17 bits on average, int8"}
    assert not any("average" in name for name in small), "it takes a run for every weight"
    integers = encodings(Goals(size=0.25), Target.cpu(), "normal")["codes of 7.2 bits on average, int8"]
    assert integers.passes == (Cluster(size=0.225, scaled=True), Quantize(require_sqnr=0))
    both = encodings(Goals(download=0.2, macs=0.5), Target.cpu(), "quick")
    assert {"dynamic int8", "codes of 4 bits"} <= both.keys()


def test_integers_are_told_what_goals_need_and_leave_half_of_it_to_what_is_cut() -> None:
    ways = encodings(Goals(require_sqnr=20.0, max_drop=0.01), Target.cpu(), "quick")
    sparing = {name: way for name, way in ways.items() if way.spares}
    assert {way.spares for way in sparing.values()} == {"int8", "dynamic int8"}
    (given,), (behind,), *_ = sparing["int8 that keeps 20 dB and all but 1 %"]
    assert isinstance(given, Quantize)
    assert isinstance(behind, Quantize)
    assert (given.require_sqnr, given.max_drop) == (20.5, 0.01)
    assert (behind.require_sqnr, behind.max_drop) == (23.0, 0.005)


def test_integers_in_codes_are_tried_where_bytes_decide_in_the_end() -> None:
    ways = encodings(Goals(require_sqnr=20.0, max_drop=0.02), Target.cpu(), "normal")
    codes = Cluster(scaled=True, require_sqnr=28.0, max_drop=0.02 / 6)
    (way,) = (way for way in ways.values() if way.narrows)
    assert way.narrows == ("int8", "int8 that keeps 20 dB and all but 2 %")
    assert way.passes == (codes, Quantize(require_sqnr=21.0, max_drop=0.016))
    assert way.behind_cut == (codes, Quantize(require_sqnr=23.0, max_drop=0.01))
    within = encodings(Goals(size=0.5), Target.cpu(), "normal"), encodings(Goals(), Target.cpu(), "quick")
    assert not any(way.narrows for ways in within for way in ways.values())


def test_shares_go_down_in_like_steps() -> None:
    assert all(0.75 < after / before < 0.9 for before, after in pairwise(SHARES))


@pytest.mark.skipif(not door.is_missing(), reason="PyTorch is installed")
def test_learning_without_pytorch_is_refused_before_any_work() -> None:
    net = parse(NET, normals(w=(32, 64), v=(64, 64), u=(64, 8)))
    with pytest.raises(UsageError, match=r"needs PyTorch.*pip install"):
        optimize(net, DATA, distill=True, on_trial=lambda trial: pytest.fail("a trial was made"))
