"""The parts of learning: examples in any order, steps in proportion, states as the model can hold them."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.fidelity import OutputPart
from onnxslim.calibration.noise import Noise
from onnxslim.errors import UsageError
from onnxslim.ir.graph import Array
from onnxslim.learn import door
from onnxslim.learn.augment import Augmentation
from onnxslim.learn.examples import Examples, Lesson
from onnxslim.learn.fit import Course, Learnt, fit
from onnxslim.learn.losses import loss_of
from onnxslim.learn.net import Net
from onnxslim.learn.optimizer import RelativeAdam
from onnxslim.learn.processes import Processes
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


def student(seed: int = 0) -> Net:
    """Some products and a nonlinearity, with weights at random."""
    text = "g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, w) r = Tanh(h) y = MatMul(r, v) }"
    model = parse(text, {"w": normal(4, 8, seed=seed), "v": normal(8, 4, seed=seed + 1)})
    return Net(model, weights(model), door.torch.float32)


def learnt(course: Course, net: Net | None = None) -> Learnt:
    """What comes of it, from 64 samples of a shape and 16 of another that stay together."""
    lessons = examples((64, 4))
    lessons.add({"x": normal(16, 4, seed=8)}, {"y": 2 * normal(16, 4, seed=8)}, apart=False)
    aims = goals([OutputPart("y", "y")], [Noise(signal=4.0, size=1)], "relative", ["y"])
    return fit(net or student(), aims, lessons, examples((32, 4)), course)


@trained
def test_steps_in_parts_are_steps_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = learnt(Course(20, 0.01, 32))
    run = Net.__call__

    def counted(net: Net, feeds: Any) -> Any:
        sizes.append(len(feeds["x"]))
        return run(net, feeds)

    monkeypatch.setattr(Net, "__call__", counted)
    # Kept for each sample are the inputs of both products, what Tanh makes and the difference, 80 bytes.
    parts = learnt(Course(20, 0.01, 32, memory=1000 / 2**20))
    assert max(sizes) == 32  # states are judged in one piece, and what stays together is never cut
    assert {12, 8} <= set(sizes)
    for found, expected in zip(parts.values, whole.values, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@trained
def test_bfloat16_learns_and_is_judged_in_single_precision() -> None:
    half, single = (learnt(Course(60, 0.01, 32, precision=each)) for each in ("bfloat16", "single"))
    assert half.looks[0].unseen == single.looks[0].unseen
    assert half.looks[1].loss != single.looks[1].loss
    assert half.best.unseen < 0.6 * half.looks[0].unseen


@trained
def test_nothing_stays_behind_on_the_processor() -> None:
    """PyTorch's device without values stands for a graphics card: what mixes devices fails on it too."""
    text = """g (float[N,1,8,8] x) => (float[N,4] y) { c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c)
      u = Upsample<mode="linear", scales=[1.0,1.0,2.0,2.0]>(r) s = Slice<axes=[2], starts=[1], ends=[9]>(u)
      p = GlobalAveragePool(s) f = Flatten(p) y = Add(f, b) }"""
    values = {"w": normal(4, 1, 3, 3), "b": normal(4)}
    torch: Any = door.torch
    with torch.device("meta"):
        model = parse(text, values, opset=7)
        net = Net(model, weights(model), torch.float32)
        found = net({"x": door.to_torch(normal(2, 1, 8, 8))})["y"]
        found.sum().backward()
    assert (found.device.type, tuple(found.shape)) == ("meta", (2, 4))
    assert {each.grad.device.type for each in net.parameters} == {"meta"}


def test_shares_of_processes_are_all_there_is() -> None:
    lesson, whole = (Lesson({"x": normal(5, 4)}, {}, 5, apart) for apart in (True, False))
    found = [Processes(rank, 2).share(1, lesson) for rank in range(2)]
    assert [each.samples for each in found if each] == [3, 2]
    assert set.union(*(rows(each.feeds["x"]) for each in found if each)) == rows(lesson.feeds["x"])
    assert [Processes(rank, 2).share(1, whole) for rank in range(2)] == [None, whole]
    assert Processes(1, 2).share(0, lesson.rows(slice(1))) is None


def test_copies_of_images_differ_as_was_asked_for() -> None:
    x = normal(64, 1, 28, 28).astype(np.float32)
    feeds = {"image": x, "size": np.ones((64, 2), np.float32)}

    def copied(*kinds: Any, copy: int = 1, seed: int = 0) -> Array:
        made = Augmentation(kinds, 2, seed, feeds)(copy, 0, feeds)
        assert made["size"] is feeds["size"]
        return np.asarray(made["image"])

    assert copied("mirror", copy=0) is x
    mirrored = copied("mirror")
    turned = [np.array_equal(new, old[..., ::-1]) for new, old in zip(mirrored, x, strict=True)]
    same = [np.array_equal(new, old) for new, old in zip(mirrored, x, strict=True)]
    assert sum(turned) + sum(same) == 64
    assert 16 < sum(turned) < 48
    for new, old in zip(copied("shift"), x[:, 0], strict=True):
        places = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
        rolled = (np.array_equal(np.roll(old, by, (0, 1))[2:-2, 2:-2], new[0, 2:-2, 2:-2]) for by in places)
        assert sum(rolled) == 1
    assert 0.04 < (copied("noise") - x).std() / x.std() < 0.06
    np.testing.assert_array_equal(copied("mirror", "shift", "noise"), copied("mirror", "shift", "noise"))
    assert not np.array_equal(copied("noise", seed=1), copied("noise"))
    assert not np.array_equal(copied("noise", copy=2), copied("noise"))
    last = {"x": np.moveaxis(x, 1, 3)}
    moved = Augmentation(["shift"], 1, 0, last)(1, 0, last)["x"]
    np.testing.assert_array_equal(np.moveaxis(moved, 3, 1), copied("shift"))


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((2, 3, 224), np.float32), "has 3 axes, not 4"),
        (np.zeros((2, 3, 8, 8), np.uint8), "is uint8, not floating point"),
        (np.zeros((2, 16, 8, 8), np.float32), "no axis of 1, 3 or 4 channels"),
        (np.zeros((2, 3, 8, 4), np.float32), "beside two of at least 8 pixels"),
    ],
)
def test_what_is_no_image_is_not_altered(array: Array, why: str) -> None:
    with pytest.raises(UsageError, match=f"there are none: 'x' .*{why}"):
        Augmentation(["mirror"], 1, 0, {"x": array})
