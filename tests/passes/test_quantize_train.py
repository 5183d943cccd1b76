"""Quantize with `train`: what is learnt through the rounding is what the file computes, and legal in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.cli import main
from onnxslim.engine.base import Log, Progress
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.errors import TimeUp, UsageError
from onnxslim.ir.graph import Array, Constant, Node, Variable, producer
from onnxslim.ir.model import Model, load
from onnxslim.learn import door
from onnxslim.learn.door import UnknownError
from onnxslim.learn.examples import Examples
from onnxslim.learn.fake import straight_through
from onnxslim.learn.fit import Learnt, fit
from onnxslim.learn.net import Net
from onnxslim.learn.teaching import computed
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.passes.quantize import train as training
from onnxslim.passes.quantize.train import Twin
from onnxslim.passes.quantize.weights import MAX_BIAS_CODE, saturates
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import normal, normals, parse, reasons

# With scales that are shared by what is pooled and joined, one that follows from another (HardSwish), and a
# last product that only stores its weight.
NET = """g (float[N,8,8,8] x) => (float[N,64] y)
{ [one] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
  [pool] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
  [two] h = Conv(p, w2, b2) [swish] e = HardSwish(h) s = Add(e, p) [join] c = Concat<axis=1>(s, e)
  [three] d = Conv(c, w3, b3) m = GlobalAveragePool(d) f = Flatten(m) [last] y = MatMul(f, w4) }"""
SHAPES = {"w1": (16, 8, 3, 3), "b1": (16,), "w2": (16, 16, 1, 1), "b2": (16,), "w3": (32, 32, 1, 1)}
X = normal(192, 8, 8, 8, seed=9)
FRESH = normal(32, 8, 8, 8, seed=77)
COSTLY = "in fewer bits its weight would cost too much accuracy"

marks = [
    pytest.mark.train,
    pytest.mark.skipif(
        door.is_missing(), reason="PyTorch is not installed: pip install 'onnx-slimkit[train]'"
    ),
]


def trained(test: Callable[..., None]) -> Callable[..., None]:
    """A test that takes PyTorch."""
    for mark in marks:
        test = mark(test)
    return test


def net() -> Model:
    values = normals(**SHAPES, b3=(32,), w4=(32, 64))
    values = {name: each / np.sqrt(np.float32(max(each[0].size, 4))) for name, each in values.items()}
    return parse(NET, values)


def learnt(
    step: Quantize, model: Model | None = None, progress: Progress | None = None, **more: Any
) -> Result:
    """What comes of a model, on one thread."""
    return Pipeline(step, on_error="raise", count=False)(
        net() if model is None else model,
        data=CalibrationData.from_arrays({"x": X}, 16),
        target=Target.cpu(1),
        progress=progress,
        **more,
    )


def figures(result: Result) -> QuantizeFigures:
    return QuantizeFigures.of(result.report.steps[-1].changes)


def error(model: Model, x: Array = FRESH) -> float:
    """Relative squared error of the outputs."""
    expected, found = (Session(each).run({"x": x})["y"] for each in (net(), model))
    return float(np.square(expected - found).mean() / expected.var())


def pair_of(tensor: Any) -> Node:
    """The DQ that makes a tensor."""
    found = producer(tensor)
    assert found is not None
    assert found.op == "DequantizeLinear"
    return found


def node(model: Model, label: str) -> Node:
    return next(each for each in model.graph.nodes if each.label == label)


def scale_of(tensor: Any) -> float:
    scale = pair_of(tensor).constant(1)
    assert scale is not None
    return float(scale)


@dataclass
class Caught:
    """What training was given, and what the net computes of what it learnt."""

    outcome: Learnt
    outputs: Array
    learnt_from: Examples
    judged_by: Examples


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[Caught]:
    """Takes down what is learnt."""
    seen: list[Caught] = []

    def watched(
        net: Net, wanted: Any, learnt_from: Examples, judged_by: Examples, *args: Any, **more: Any
    ) -> Learnt:
        found = fit(net, wanted, learnt_from, judged_by, *args, **more)
        with door.torch.no_grad():
            for parameter, values in zip(net.parameters, found.values, strict=True):
                parameter.copy_(door.to_torch(values))
        seen.append(Caught(found, computed(net, {"x": FRESH})["y"], learnt_from, judged_by))
        return found

    monkeypatch.setattr(training, "fit", watched)
    return seen


# ------------------------------------------------------------------------------------------------- options


def test_it_says_what_to_install_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "is_missing", lambda: True)
    with pytest.raises(UsageError, match=r"pass 'quantize' with train needs PyTorch.*onnx-slimkit\[train\]"):
        learnt(Quantize(train=5))
    assert not Quantize().learns


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train": 3, "activations": "none"}, "train goes with integer activations"),
        ({"train": 3, "activations": "dynamic"}, "train goes with integer activations"),
        ({"features": ("h",)}, "features goes with train"),
        ({"lr": 0.01}, "lr goes with train"),
        ({"checkpoint": "state"}, "checkpoint goes with train"),
        ({"weights": "int2", "activations": "none"}, "int2 weights go with integer activations"),
        ({"train": 0}, "greater than or equal to 1"),
    ],
)
def test_what_means_nothing_together_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Quantize(**options)


# ------------------------------------------------------------------------------------------------- the rule


@trained
def test_gradients_are_those_of_learned_step_sizes() -> None:
    """Of x, of one scale for all, and of one for each channel, by limits of four bits."""
    torch: Any = door.torch
    model = parse(
        """g (float[3,5] x) => (float[3,5] y)
        { [q] q = QuantizeLinear<axis=0>(x, s, z) y = DequantizeLinear<axis=0>(q, s, z) }""",
        {"s": np.array([0.5, 0.25, 2.0], np.float32), "z": np.zeros(3, np.int8)},
    )
    limits = {id(node(model, "q")): (-7, 7)}
    scale = model.graph.initializers["s"]
    made = Net(model, [scale], rows={"QuantizeLinear": straight_through(limits)})
    x = torch.tensor(3 * normal(3, 5, seed=3), requires_grad=True)
    weight = normal(3, 5, seed=4)
    out = made({"x": x})["y"]
    (out * torch.from_numpy(weight)).sum().backward()
    v = x.detach().numpy() / scale.values[:, None]
    inside = np.abs(v) <= 7
    assert 0 < inside.mean() < 1
    codes = np.clip(np.rint(v), -7, 7)
    np.testing.assert_array_equal(out.detach().numpy(), codes * scale.values[:, None])
    np.testing.assert_allclose(x.grad.numpy(), weight * inside, rtol=1e-6)
    wanted = (weight * np.where(inside, codes - v, codes)).sum(axis=1)
    np.testing.assert_allclose(made.parameters[0].grad.numpy(), wanted, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- the result


@trained
@pytest.mark.parametrize("weights", ["int8", "int3", "int2"])
def test_the_file_computes_what_was_trained_and_more_of_the_original(
    weights: Any, caught: list[Caught]
) -> None:
    result = learnt(Quantize(weights=weights, train=60))
    (seen,) = caught
    assert seen.outcome.improved
    found = Session(result.model).run({"x": FRESH})["y"]
    last = scale_of(node(result.model, "three").inputs[0])
    if "training" not in reasons(result.report.steps[-1].changes):
        assert np.abs(found - seen.outputs).max() < last
        exact = Session(result.model, optimize="none").run({"x": FRESH})["y"]
        assert np.abs(exact - seen.outputs).max() < 1e-3 * last
    told = figures(result)
    assert told.looks[0].step == 0
    assert told.examples == "156 samples, judged by 24"
    assert told.learnt is not None
    assert (told.learnt[1] > told.learnt[0]) == ("training" not in reasons(result.report.steps[-1].changes))
    assert told.distance is not None


@trained
def test_simulated_activations_are_trained_as_the_file_computes_them(caught: list[Caught]) -> None:
    """Of 16 values, with steps that are learnt."""
    result = learnt(Quantize(activations="uint4", train=40, lr=1e-3))
    (seen,) = caught
    assert seen.outcome.improved
    assert "training" not in reasons(result.report.steps[-1].changes)
    before, after = figures(result).learnt or (1.0, 0.0)
    assert after > before
    found = Session(result.model).run({"x": FRESH})["y"]
    # Biases in 32 bits round a few codes the other way.
    assert np.square(found - seen.outputs).mean() < 2e-4 * found.var()
    assert [each.op for each in result.model.graph.nodes].count("Clip") == 3


@trained
def test_fewer_bits_are_stored_as_such_and_the_last_product_in_eight() -> None:
    cases: tuple[tuple[Any, int, Any], ...] = (
        ("int4", 7, ml_dtypes.int4),
        ("int3", 3, ml_dtypes.int4),
        ("int2", 1, ml_dtypes.int2),
    )
    for weights, most, kind in cases:
        result = learnt(Quantize(weights=weights, train=5)).model
        for label in ("one", "two", "three"):
            cast = producer(pair_of(node(result, label).inputs[1]).inputs[0])
            assert cast is not None
            codes = cast.inputs[0]
            assert isinstance(codes, Constant)
            assert codes.dtype == kind
            assert np.abs(codes.values.astype(np.int32)).max() == most


@trained
@pytest.mark.parametrize("options", [{}, {"weights": "int4"}, {"weights": "int2"}, {"per_channel": False}])
def test_what_learns_nothing_writes_what_was_there(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and biases of the closed form are the start to the bit."""
    seen: list[bool] = []

    def nothing(self: Any, candidate: Any, build: Any, teacher: Model, log: Log) -> None:
        before = candidate.model.to_proto()
        twin = Twin(candidate, build)
        twin.write([each.values for each in twin.chosen])
        seen.append(candidate.model.to_proto() == before)
        raise UnknownError("nothing is learnt here")

    monkeypatch.setattr(training.Training, "__call__", nothing)
    result = learnt(Quantize(train=1, **options))
    assert seen == [True]
    assert reasons(result.report.steps[-1].changes)["training"] == "nothing is learnt here"


@trained
def test_scales_that_are_shared_stay_one() -> None:
    result = learnt(Quantize(train=40)).model
    untrained = learnt(Quantize()).model
    join = node(result, "join")
    (reader,) = join.outputs[0].outputs
    scales = {scale_of(each) for each in join.inputs} | {float(reader.inputs[1].values)}  # type: ignore[union-attr]
    assert len(scales) == 1
    assert scales != {scale_of(node(untrained, "join").inputs[0])}
    pool = node(result, "pool")
    (reader,) = pool.outputs[0].outputs
    assert scale_of(pool.inputs[0]) == float(reader.inputs[1].values)  # type: ignore[union-attr]
    gate = next(each for each in result.graph.nodes if each.op == "Add" and "gate" in each.label)
    alpha, codes = scale_of(gate.inputs[0]), pair_of(gate.inputs[0]).inputs[0]
    maker = producer(codes)
    assert maker is not None
    (own,) = (maker.inputs[1].values,)  # type: ignore[union-attr]
    assert alpha == pytest.approx(float(own) / 6, rel=1e-6)


@trained
def test_pairs_of_codes_do_not_come_to_saturate() -> None:
    """Weights all of which are as large as can be pull at what was tightened."""
    model = net()
    large = np.sign(model.graph.initializers["w3"].values).astype(np.float32) / 4
    large[:, ::2] = np.abs(large[:, ::2])
    large[:, 1::2] = np.abs(large[:, 1::2])
    model.graph.initializers["w3"].values = large + normal(*large.shape, seed=8) / 100
    result = learnt(Quantize(train=40), model)
    assert "three" in (figures(result).tightened or {})
    assert figures(result).looks[0] is not min(figures(result).looks, key=lambda look: look.unseen)
    for label in ("one", "two", "three"):
        each = node(result.model, label)
        codes = pair_of(each.inputs[1]).inputs[0]
        assert isinstance(codes, Constant)
        assert codes.dtype == np.int8
        assert not saturates(codes.values, 0, 1, 255)


@trained
def test_what_is_learnt_is_brought_back_to_what_the_file_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales below zero, weights of one sign at their largest and huge biases are legal after one call."""
    seen: list[Model] = []

    def astray(self: Any, candidate: Any, build: Any, teacher: Model, log: Log) -> None:
        twin = Twin(candidate, build)
        rows = {"QuantizeLinear": straight_through(twin.limits)}
        made = Net(twin.model, twin.chosen, door.torch.float32, rows=rows)
        with door.torch.no_grad():
            for constant, parameter in zip(twin.chosen, made.parameters, strict=True):
                if constant.name.endswith("_factor"):
                    parameter.fill_(-1.0)
                elif constant.name.startswith("b1"):
                    parameter.fill_(1e9)
                elif constant.name.endswith("_learnt"):
                    parameter.abs_()
        twin.confine(made.parameters)()
        twin.write([door.to_numpy(each) for each in made.parameters])
        seen.append(candidate.model.copy())
        raise UnknownError("nothing is learnt here")

    monkeypatch.setattr(training.Training, "__call__", astray)
    learnt(Quantize(train=1))
    (model,) = seen
    for each in model.graph.nodes:
        if each.op in ("QuantizeLinear", "DequantizeLinear"):
            scale = each.constant(1)
            assert scale is not None
            assert (scale > 0).all()
    for label in ("one", "two", "three"):
        codes = pair_of(node(model, label).inputs[1]).constant(0)
        assert codes is not None
        assert not saturates(codes, 0, 1, 255)
        bias = pair_of(node(model, label).inputs[2])
        steps, numbers = bias.constant(1), bias.constant(0)
        assert steps is not None
        assert numbers is not None
        assert np.abs(numbers.astype(np.int64)).max() <= 1.001 * MAX_BIAS_CODE
        if label == "one":
            np.testing.assert_allclose(numbers * steps.astype(np.float64), 1e9, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- guards


@trained
def test_states_are_judged_by_samples_that_nothing_was_fitted_to(caught: list[Caught]) -> None:
    learnt(Quantize(train=3))
    (seen,) = caught
    mine, theirs = (
        {row.tobytes() for lesson in each.in_order(16) for row in lesson.feeds["x"]}
        for each in (seen.learnt_from, seen.judged_by)
    )
    assert not mine & theirs
    assert (len(mine), len(theirs)) == (156, 24)


@trained
@pytest.mark.parametrize(("rate", "told"), [(0.9, "the start stays"), (1e30, "the loss went from")])
def test_what_diverges_returns_the_start(rate: float, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(self: Any, *args: Any) -> None:
        raise UnknownError("nothing is learnt here")

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "__call__", untrained)
        start = learnt(Quantize(train=1)).model
    monkeypatch.setattr(training, "RATE", rate)
    result = learnt(Quantize(train=12))
    assert told in " ".join(skip.reason for skip in result.report.steps[-1].changes.skipped)
    assert result.model.to_proto() == start.to_proto()
    before, after = figures(result).learnt or (0.0, 1.0)
    assert before == after


@trained
def test_what_is_worse_in_the_file_returns_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the net said of it."""
    start: list[Model] = []

    def told_better(net: Net, *args: Any, **more: Any) -> Learnt:
        found = fit(net, *args, **more)
        worse = [2 * each for each in found.values]
        return replace(found, best=found.looks[-1], values=worse)

    def seen(self: Any, candidate: Any, *args: Any) -> Any:
        start.append(candidate.model.copy())
        return train(self, candidate, *args)

    train = training.Training.__call__
    monkeypatch.setattr(training, "fit", told_better)
    monkeypatch.setattr(training.Training, "__call__", seen)
    result = learnt(Quantize(train=1))
    assert "the start stays: in ONNX Runtime" in reasons(result.report.steps[-1].changes)["training"]
    assert result.model.to_proto() == start[0].to_proto()


@trained
def test_when_the_time_is_up_the_best_so_far_is_taken() -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        if "unseen" in what and done == 30:
            raise TimeUp("the time limit of 1 s was over")

    result = learnt(Quantize(weights="int2", train=100), progress=progress)
    changes = result.report.steps[-1].changes
    assert "the time limit" in reasons(changes)["learning"]
    assert [look.step for look in figures(result).looks] == [0, 16]


@trained
def test_what_is_asked_for_is_judged_after_training() -> None:
    """Weights get eight bits only where training does not give back enough."""
    less: dict[str, Any] = {"bias_correction": False, "equalization": False, "sequential": False}
    plain = Quantize(weights="int2", algorithm="rtn", require_sqnr=12, **less)
    assert reasons(learnt(plain).report.steps[-1].changes)["three"] == COSTLY
    enough = learnt(replace(plain, train=40, lr=3e-3))
    before, after = figures(enough).learnt or (1.0, 0.0)
    assert before < 12 <= after
    assert COSTLY not in reasons(enough.report.steps[-1].changes).values()
    learnt_nothing = learnt(replace(plain, train=1, lr=1e-9))
    told = reasons(learnt_nothing.report.steps[-1].changes)
    assert "with all layers in integers, " in told["training"]
    assert told["three"] == COSTLY
    assert (figures(learnt_nothing).sqnr or 0) >= 12


@trained
def test_results_are_the_same_every_time() -> None:
    first, second = (learnt(Quantize(weights="int4", train=12)).model for _ in range(2))
    assert first.to_proto() == second.to_proto()


@trained
def test_features_come_close_as_integer_operators_read_them() -> None:
    """What a Relu makes that the integers clip: with it, the sums behind the first layer are closer."""

    def inside(model: Model) -> float:
        found = []
        for each in (net(), model.copy()):
            tensor = node(each, "pool").inputs[0]
            assert isinstance(tensor, Variable)
            tensor.dtype, tensor.shape = np.dtype(np.float32), ("N", 16, 8, 8)
            each.graph.outputs.append(tensor)
            found.append(Session(each, optimize="none").run({"x": FRESH})[tensor.name])
        return float(np.square(found[0] - found[1]).mean())

    plain = Quantize(weights="int2", train=60, algorithm="rtn", sequential=False)
    with_them, without = (learnt(replace(plain, features=names)).model for names in (("r",), ()))
    assert inside(with_them) < inside(without)
    with pytest.raises(UsageError, match="pass 'quantize': the model has no tensor 'rr'"):
        learnt(Quantize(train=1, features=("rr",)))


@trained
def test_a_plan_is_replayed_and_then_trained(tmp_path: Path) -> None:
    untrained = learnt(Quantize(weights="int2", require_sqnr=0))
    plan = figures(untrained).plan
    assert plan is not None
    result = learnt(Quantize(plan=plan, train=40))  # type: ignore[arg-type]
    told = figures(result)
    assert told.distance is not None
    assert error(result.model) < error(untrained.model)


@trained
def test_the_command_writes_what_it_learnt(tmp_path: Path) -> None:
    net().save(tmp_path / "in.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    words = ["quantize", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--quiet", "--train", "20"]
    assert main([*words, "--weights", "int2", "--data", str(tmp_path / "x.npz")]) == 0
    assert error(load(tmp_path / "out.onnx")) < 1.0
