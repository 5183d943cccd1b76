"""Models run part by part: no node twice, but for those that are to be looked at again."""

from __future__ import annotations

import numpy as np

from onnxslim.calibration.stages import SpillStore, StagedRunner, Stop
from onnxslim.runtime.session import Session
from tests.helpers import normal, stored
from tests.passes.repair.students import block


def test_each_node_runs_once_per_batch() -> None:
    _, model = block()
    store = SpillStore(1 << 20)
    staged = StagedRunner(model, [Stop(["s"]), Stop(["p", "r"]), Stop(["y"])], store)
    feeds = [normal(2, 4, 8, 8, seed=i) for i in range(3)]
    for stage, name in enumerate(("s", "p", "y")):
        for batch, x in enumerate(feeds):
            found = staged.run(stage, batch, {"x": x} if stage == 0 else {})[name]
            if name == "y":
                np.testing.assert_allclose(found, Session(model).run({"x": x})["y"], atol=1e-4)
    ran = [[node.op for node in part.nodes] for part in staged.parts]
    assert ran == [["Conv"], ["Relu", "Conv", "Relu"], ["Conv", "Add"]]
    assert store.held == 0


def test_peeks_are_computed_again() -> None:
    _, model = block()
    conv = next(node for node in model.graph.nodes if node.outputs[0].name == "a")
    staged = StagedRunner(model, [Stop(["r"], [conv]), Stop(["p"])], SpillStore(1 << 20))
    before = staged.run(0, 0, {"x": normal(2, 4, 8, 8)})["a"]
    for name in "wb":
        model.graph.initializers[name].values = stored(model, name) * np.float32(2)
    np.testing.assert_allclose(staged.run(1, 0, {})["p"], np.maximum(2 * before, 0), rtol=1e-4, atol=1e-4)


def test_what_was_peeked_at_is_not_kept_for_later_stages() -> None:
    _, model = block()
    conv = next(node for node in model.graph.nodes if node.outputs[0].name == "a")
    staged = StagedRunner(model, [Stop(["r"], [conv]), Stop(["a"]), Stop(["p"])], SpillStore(1 << 20))
    before = staged.run(0, 0, {"x": normal(2, 4, 8, 8)})["a"]
    for name in "wb":
        model.graph.initializers[name].values = stored(model, name) * np.float32(2)
    staged.run(1, 0, {})
    np.testing.assert_allclose(staged.run(2, 0, {})["p"], np.maximum(2 * before, 0), rtol=1e-4, atol=1e-4)
