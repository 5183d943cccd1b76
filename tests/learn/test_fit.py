"""The parts of learning: examples in any order, steps in proportion, states as the model can hold them."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.fidelity import OutputPart
from onnxslim.calibration.noise import Noise
from onnxslim.ir.graph import Array
from onnxslim.learn import door
from onnxslim.learn.examples import Examples
from onnxslim.learn.fit import Course, fit
from onnxslim.learn.losses import loss_of
from onnxslim.learn.net import Net
from onnxslim.learn.optimizer import RelativeAdam
from onnxslim.learn.teaching import goals
from onnxslim.learn.weights import weights
from tests.helpers import normal, parse

trained = pytest.mark.skipif(
    door.is_missing(), reason="PyTorch is not installed: pip install 'onnx-slimkit[train]'"
)
pytestmark = pytest.mark.train


def examples(*shapes: tuple[int, ...], limit: int = 1 << 20, apart: bool = True) -> Examples:
    """Batches of these shapes; what is wanted of a sample is its input, doubled."""
    made = Examples(limit)
    for seed, shape in enumerate(shapes):
        x = normal(*shape, seed=seed)
        made.add({"x": x}, {"y": 2 * x}, apart=apart)
    return made


def rows(x: Array) -> set[bytes]:
    return {row.tobytes() for row in x}


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_every_sample_comes_once_before_any_comes_again(limit: int) -> None:
    made = examples((3, 4), (5, 4), (2, 6), limit=limit)
    assert len(made) == 10
    assert made.spilled == (6 if limit == 0 else 0)
    random = np.random.default_rng(0)
    seen = []
    for lessons in islice(made.steps(5, random), 2):
        for lesson in lessons:
            np.testing.assert_array_equal(lesson.wanted["y"], 2 * lesson.feeds["x"])
            assert lesson.samples == len(lesson.feeds["x"])
            seen += sorted(rows(lesson.feeds["x"]))
    given = [normal(*shape, seed=seed) for seed, shape in enumerate(((3, 4), (5, 4), (2, 6)))]
    assert sorted(seen) == sorted(row for x in given for row in rows(x))
    assert sum(lesson.samples for lesson in made.in_order(4)) == 10


def test_batches_that_stay_whole_make_a_step_together() -> None:
    made = examples((3, 4), (3, 4), (3, 4), (3, 4), apart=False)
    steps = list(islice(made.steps(6, np.random.default_rng(0)), 2))
    assert [[lesson.samples for lesson in step] for step in steps] == [[3, 3], [3, 3]]


@trained
def test_steps_are_in_proportion_to_what_they_change() -> None:
    torch: Any = door.torch
    large, small, tiny = (torch.full((4,), size, requires_grad=True) for size in (100.0, 1.0, 1e-9))
    optimizer = RelativeAdam([large, small, tiny])
    for each in (large, small, tiny):
        each.grad = torch.ones(4)
    optimizer.step(0.01)
    found = [float(each.detach()[0]) for each in (large, small, tiny)]
    assert found == pytest.approx([99.0, 0.99, 1e-9 - 1e-5], rel=1e-4)


@trained
def test_it_is_adam() -> None:
    """Beside PyTorch's own, where the scale stays one."""
    torch: Any = door.torch
    mine, other = (torch.ones(1, requires_grad=True) for _ in range(2))
    peer = torch.optim.Adam([other], lr=1e-6)
    optimizer = RelativeAdam([mine])
    for gradient in (1.0, -3.0, 0.5, 2.0):
        mine.grad, other.grad = torch.full((1,), gradient), torch.full((1,), gradient)
        optimizer.step(1e-6)
        peer.step()
    assert float((mine - other).detach().abs()) < 1e-7


@trained
def test_masks_and_what_is_no_number_are_no_goals() -> None:
    torch: Any = door.torch
    parts = [OutputPart("y", "y")]
    (aim,) = goals(parts, [Noise(signal=8.0, total=0.0, size=4)], "relative", ["y"])
    assert aim.variation == 2.0
    found = torch.tensor([1.0, 5.0, 7.0, 3.0], requires_grad=True)
    loss = loss_of([aim], {"y": found}, {"y": torch.tensor([2.0, -3.4e38, math.inf, 3.0])}, None)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.25)
    assert found.grad.tolist() == pytest.approx([-0.5, 0.0, 0.0, 0.0])


@trained
def test_states_are_judged_as_the_model_holds_them() -> None:
    model = parse(
        "g (float16[N,4] x) => (float16[N,4] y) { y = MatMul(x, w) }", {"w": np.eye(4, dtype=np.float16)}
    )
    lessons = examples((64, 4))
    aims = goals([OutputPart("y", "y")], [Noise(signal=4.0, size=1)], "relative", ["y"])
    net = Net(model, weights(model), door.torch.float32)
    learnt = fit(net, aims, lessons, lessons, Course(50, 0.05, 16))
    (values,) = learnt.values
    assert learnt.improved
    np.testing.assert_array_equal(values, values.astype(np.float16))
    (x,) = (lesson.feeds["x"] for lesson in lessons.in_order(64))
    assert learnt.best.unseen == pytest.approx(np.square(x @ values - 2 * x).mean() / 4.0, rel=1e-4)
