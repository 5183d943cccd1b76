"""Constants that a simplifier shared: apart while a model is cut, together again if they are still equal."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.passes.prune.cut import reshare, unshare
from tests.helpers import normals, parse


def biased() -> Model:
    """Two layers that share a bias."""
    return parse(
        """g (float[N,3,6,6] x) => (float[N,8,6,6] y) { a = Conv(x, w, b) y = Conv(a, v, b) }""",
        normals(w=(8, 3, 1, 1), v=(8, 8, 1, 1), b=(8,)),
    )


def test_what_is_still_equal_is_shared_again() -> None:
    model = biased()
    reshare(model, unshare(model))
    first, second = model.graph.nodes
    assert first.inputs[2] is second.inputs[2]


def test_what_became_different_stays_apart() -> None:
    for values in (np.zeros(8, np.float32), np.zeros(5, np.float32)):
        model = biased()
        twins = unshare(model)
        first, second = model.graph.nodes
        twin = second.inputs[2]
        assert isinstance(twin, Constant)
        twin.values = values
        reshare(model, twins)
        assert second.inputs[2] is twin is not first.inputs[2]


@pytest.mark.parametrize("changed", [False, True])
def test_sizes_that_are_computed_in_two_ways_stay_apart(changed: bool) -> None:
    """A shape that two Reshapes read gets a maker for each; one that now has other inputs is another."""
    model = parse(
        """g (float[N,6] x, int64[2] s) => (float[A,B] y)
        { t = Add(s, k) a = Reshape(x, t) r = Relu(a) y = Reshape(r, t) }""",
        {"k": np.zeros(2, np.int64)},
    )
    twins = unshare(model)
    adds = [node for node in model.graph.nodes if node.op == "Add"]
    assert len(adds) == 2
    adds[1].inputs = [*reversed(adds[1].inputs)] if changed else adds[1].inputs
    reshare(model, twins)
    assert sum(node.op == "Add" for node in model.graph.nodes) == 1 + changed
