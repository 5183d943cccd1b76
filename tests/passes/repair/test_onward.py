"""Candidates run from where they differ: the same outputs, of less that is run."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim import shapes
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.stages import SpillStore, StagedRunner, Stop
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.passes.quantize import QuantizeFigures
from onnxslim.passes.quantize.search import Search
from onnxslim.passes.repair.onward import Onward, is_plain
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import normal, parse, quantize

# A branch around two layers, a second output from the middle, a layer beside all others.
TEXT = """g (float[N,4,6,6] x) => (float[N,4,6,6] y, float[N,4,1,1] m)
{ [c0] a = Conv(x, v0) ar = Relu(a)
  [c1] b = Conv(ar, v1) br = Tanh(b) [c2] c = Conv(br, v2) d = Add(c, ar)
  m = GlobalAveragePool(d)
  [c3] e = Conv(d, v3) er = Relu(e) [c4] f = Conv(er, v4) [c5] h = Conv(x, v5) y = Add(f, h) }"""
LAYERS = [f"c{number}" for number in range(6)]


@pytest.fixture
def net() -> Model:
    model = parse(TEXT, {f"v{each}": normal(4, 4, 1, 1, seed=each) for each in range(6)})
    shapes.infer(model)
    return model


def changed(net: Model, label: str) -> Model:
    """Another weight, of its own, in one layer."""
    made = net.copy()
    node = next(node for node in made.graph.nodes if node.label == label)
    weight = node.inputs[1]
    assert isinstance(weight, Constant)
    node.inputs[1] = Constant(f"{weight.name}_other", 2 * weight.values)
    return made


@pytest.mark.parametrize("label", LAYERS)
def test_what_runs_onward_gives_what_the_whole_gives(net: Model, label: str) -> None:
    onward, made = Onward(net, dict.fromkeys(LAYERS, 1), Target.cpu()), changed(net, label)
    rest = onward(made)
    for batch in range(2):
        feeds = {"x": normal(3, 4, 6, 6, seed=batch)}
        found = rest.run(0, batch, onward.at(batch, feeds))
        for name, wanted in Session(made).run(feeds).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_constants_that_are_outputs_are_handed_out(net: Model) -> None:
    weight = net.graph.nodes[0].inputs[1]
    net.graph.outputs.append(weight)
    onward = Onward(net, dict.fromkeys(LAYERS, 1), Target.cpu())
    feeds = {"x": normal(3, 4, 6, 6)}
    found = onward(changed(net, "c4")).run(0, 0, onward.at(0, feeds))
    assert isinstance(weight, Constant)
    np.testing.assert_array_equal(found[weight.name], weight.values)


def test_nodes_are_run_again_for_one_of_their_outputs() -> None:
    text = """g (float[N,4] x) => (float[N,2] y, float[N,2] z)
    { [c0] a = MatMul(x, v0) b, z = Split<axis=1>(a) [c1] y = MatMul(b, v1) }"""
    model = parse(text, {"v0": normal(4, 4), "v1": normal(2, 2)})
    shapes.infer(model)
    feeds = {"x": normal(3, 4)}
    wanted = Session(model).run(feeds)
    rest = StagedRunner(model, [Stop(["y", "z"])], SpillStore(1 << 20), given=["z"])
    found = rest.run(0, 0, {**feeds, "z": wanted["z"]})
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-5)
    np.testing.assert_array_equal(found["z"], wanted["z"])


def test_what_comes_before_a_change_is_not_run_again(net: Model) -> None:
    onward = Onward(net, dict.fromkeys(LAYERS, 1), Target.cpu())
    ran = [{node.label for node in onward(changed(net, label)).parts[0].nodes} for label in LAYERS]
    assert ran[0] >= {"c0", "c1", "c2", "c3", "c4"}
    assert [label in nodes for label, nodes in zip(LAYERS, ran, strict=True)] == [True] * 6
    assert not ran[4] & {"c0", "c1", "c2", "c3"}
    assert not ran[3] & {"c0", "c1"}
    assert ran[5] <= {"c4", "c5", *(node.label for node in net.graph.nodes if node.op in ("Add", "Relu"))}


def test_layers_measured_alone_are_the_same(net: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"x": normal(4, 4, 6, 6, seed=seed)} for seed in range(8)]
    found = []
    for alone in (Search._alone, lambda search, _, model: search._judge(model, 8)):
        monkeypatch.setattr(Search, "_alone", alone)
        _, changes = quantize(net, batches, layers=True, require_sqnr=0, classifier=True)
        found.append({layer.node: layer.sqnr for layer in QuantizeFigures.of(changes).layers or ()})
    assert found[0] == pytest.approx(found[1], abs=0.05)
    assert len(found[0]) >= 4


@pytest.mark.parametrize(
    ("body", "plain"),
    [("y = Relu(x)", True), ("s = SplitToSequence(x) y = ConcatFromSequence<axis=0>(s)", False)],
)
def test_sequences_are_not_kept(body: str, plain: bool) -> None:
    model = parse(f"g (float[2,3] x) => (float[2,3] y) {{ {body} }}")
    shapes.infer(model)
    assert is_plain(model) == plain


def test_candidates_that_may_end_the_process_are_run_whole(
    net: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Model] = []
    call = Onward.__call__

    def noted(self: Onward, candidate: Model) -> StagedRunner:
        started.append(candidate)
        return call(self, candidate)

    monkeypatch.setattr(Onward, "__call__", noted)
    batches = [{"x": normal(4, 4, 6, 6, seed=seed)} for seed in range(8)]
    quantize(net, batches, layers=True, require_sqnr=0)
    assert started
    started.clear()
    monkeypatch.setattr(Judge, "is_wary", True)
    quantize(net, batches, layers=True, require_sqnr=0)
    assert not started
