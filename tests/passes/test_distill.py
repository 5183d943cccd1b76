"""Distill: weights come close to what a teacher makes, or stay as they are and it is told why."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.cli import main
from onnxslim.engine.base import Pass, Progress
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.errors import CalibrationError, TimeUp, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.learn import door
from onnxslim.learn.fit import Look
from onnxslim.passes.cluster import Cluster
from onnxslim.passes.distill import Distill, DistillFigures
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.sparsify import Sparsify
from onnxslim.recipes.recipe import Recipe, Work
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import FASHION, normal, normals, parse, reasons, replaced

NET = """g (float[N,8] x) => (float[N,4] y) <float[8,16] w = {0}, float[16] b = {0}, float[16,4] v = {0}>
{ h = MatMul(x, w) [bias] a = Add(h, b) r = Tanh(a) [last] y = MatMul(r, v) }"""
X = normal(256, 8, seed=9)

train = [
    pytest.mark.train,
    pytest.mark.skipif(
        door.is_missing(), reason="PyTorch is not installed: pip install 'onnx-slimkit[train]'"
    ),
]


def trained(test: Callable[..., None]) -> Callable[..., None]:
    """A test that takes PyTorch."""
    for mark in train:
        test = mark(test)
    return test


def net() -> Model:
    values = normals(w=(8, 16), b=(16,), v=(16, 4))
    return replaced(parse(NET), **{name: array * np.float32(0.5) for name, array in values.items()})


def worse(model: Model, amount: float = 0.1) -> Model:
    """The model with all weights moved."""
    moved = {
        name: each.values + np.float32(amount) * normal(*each.shape, seed=len(name) + 5)
        for name, each in model.graph.initializers.items()
    }
    return replaced(model, **moved)


def distilled(
    step: Distill,
    student: Model,
    teacher: Path | None,
    x: Array = X,
    progress: Progress | None = None,
    **more: Any,
) -> Result:
    """What comes of a student, on one thread."""
    options = {**step.given(), **({} if teacher is None else {"teacher": teacher})}
    return Pipeline(Distill(**options), on_error="raise", count=False)(
        student,
        data=CalibrationData.from_arrays({"x": x}, 16),
        target=Target.cpu(1),
        progress=progress,
        **more,
    )


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    net().save(tmp_path / "teacher.onnx")
    return tmp_path / "teacher.onnx"


def error(teacher: Path, model: Model, x: Array = X) -> float:
    """Relative squared error of the outputs."""
    expected, found = (Session(each).run({"x": x})["y"] for each in (load(teacher), model))
    return float(np.square(expected - found).mean() / expected.var())


def test_it_says_what_to_install_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "is_missing", lambda: True)
    seen: list[str] = []
    with pytest.raises(
        UsageError, match=r"pass 'distill' needs PyTorch.*pip install 'onnx-slimkit\[train\]'"
    ):
        Pipeline(Prune(), Distill())(
            net(), data={"x": X}, progress=lambda what, done, total: seen.append(what)
        )
    assert seen == []


def test_the_command_line_says_so_before_it_reads_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "is_missing", lambda: True)
    with pytest.raises(UsageError, match="needs PyTorch"):
        Work(Recipe(passes=(Distill(),)), "there is no such file.onnx")


@trained
def test_the_command_writes_what_it_learnt(teacher: Path, tmp_path: Path) -> None:
    worse(net()).save(tmp_path / "student.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    words = [
        "distill",
        str(tmp_path / "student.onnx"),
        str(tmp_path / "out.onnx"),
        "--quiet",
        "--steps",
        "20",
    ]
    assert main([*words, "--teacher", str(teacher), "--data", str(tmp_path / "x.npz")]) == 0
    assert error(teacher, load(tmp_path / "out.onnx")) < error(teacher, worse(net()))


def test_steps_and_epochs_are_one_length() -> None:
    with pytest.raises(UsageError, match="steps or epochs"):
        Distill(steps=3, epochs=1.0)


@trained
def test_weights_come_close_to_the_teachers(teacher: Path) -> None:
    student = worse(net())
    result = distilled(Distill(steps=200), student, teacher)
    assert error(teacher, result.model, normal(64, 8, seed=77)) < 0.25 * error(teacher, student)
    figures = DistillFigures.of(result.report.steps[0].changes)
    assert [figures.threads, figures.looks[0].step, figures.looks[-1].step] == [1, 0, 200]
    assert figures.weights == "3 weights of 208 numbers"
    assert figures.examples == "208 samples, judged by 32"
    assert {change.reason for change in result.report.steps[0].changes.changed} == {"w", "b", "v"}


@trained
def test_the_teacher_is_the_model_that_came_in() -> None:
    original = net()
    data = CalibrationData.from_arrays({"x": X}, 16)
    pruned = Pipeline(Prune(ratio=0.5, repair="none"))(original, data=data).model
    both = Pipeline(Prune(ratio=0.5, repair="none"), Distill(steps=150))
    result = both(original, data=data, target=Target.cpu(1)).model
    fresh = normal(64, 8, seed=77)
    expected, before, after = (Session(each).run({"x": fresh})["y"] for each in (original, pruned, result))
    assert result.graph.initializers["w"].shape == pruned.graph.initializers["w"].shape
    assert np.square(expected - after).mean() < 0.5 * np.square(expected - before).mean()


@trained
def test_results_are_the_same_every_time(teacher: Path) -> None:
    first, second = (distilled(Distill(steps=20), worse(net()), teacher).model for _ in range(2))
    assert first.to_proto() == second.to_proto()
    other = distilled(Distill(steps=20), worse(net()), teacher, seed=1).model
    assert other.to_proto() != first.to_proto()


@trained
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn() -> None:
    original = net()
    result = distilled(Distill(steps=5), original, None)
    assert "there is nothing to learn" in result.report.steps[0].outcome
    assert result.model.to_proto() == original.to_proto()


@trained
def test_what_diverges_is_tried_lower_and_the_start_stays(teacher: Path) -> None:
    student = worse(net(), 1e-4)
    result = distilled(Distill(steps=12, lr=0.99), student, teacher)
    outcome = result.report.steps[0].outcome
    assert "no state was better than the start at a rate of 0.99" in outcome
    assert "the start stays" in outcome
    assert result.model.to_proto() == student.to_proto()
    looks = DistillFigures.of(result.report.steps[0].changes).looks
    assert [look.rate for look in looks[-1:]] == [pytest.approx(0.33)]


@trained
def test_numbers_that_are_none_return_the_start(teacher: Path) -> None:
    student = replaced(worse(net()), b=np.full(16, np.float32(1e38)), w=np.full((8, 16), np.float32(3e38)))
    result = Pipeline(Distill(steps=5, teacher=teacher), on_error="revert")(
        student, data=CalibrationData.from_arrays({"x": X}, 16)
    )
    assert result.model.to_proto() == student.to_proto()
    assert result.report.steps[0].outcome


@trained
@pytest.mark.parametrize(
    ("options", "moved"),
    [({"train": "vectors"}, {"b"}), ({"exclude": ("last",)}, {"w", "b"}), ({}, {"w", "b", "v"})],
)
def test_only_weights_that_were_asked_for_move(
    teacher: Path, options: dict[str, Any], moved: set[str]
) -> None:
    student = worse(net())
    result = distilled(Distill(steps=20, **options), student, teacher).model
    before, after = student.graph.initializers, result.graph.initializers
    assert {name for name in after if not np.array_equal(after[name].values, before[name].values)} == moved


@trained
def test_zeros_of_a_sparse_matrix_stay(teacher: Path) -> None:
    student = worse(net())
    sparse = np.where(
        np.abs(student.graph.initializers["w"].values) < 0.4, 0, student.graph.initializers["w"].values
    )
    student = replaced(student, w=sparse.astype(np.float32))
    result = distilled(Distill(steps=40), student, teacher).model.graph.initializers
    assert not np.array_equal(result["w"].values, sparse)
    assert (result["w"].values[sparse == 0] == 0).all()


@trained
def test_half_precision_is_judged_as_it_is_stored(teacher: Path) -> None:
    text = NET.replace("h = MatMul(x, w)", "f = Cast<to=1>(w) h = MatMul(x, f)").replace(
        "float[8,16] w", "float16[8,16] w"
    )
    values = worse(net()).graph.initializers
    student = replaced(
        parse(text),
        **{
            name: each.values.astype(np.float16 if name == "w" else np.float32)
            for name, each in values.items()
        },
    )
    result = distilled(Distill(steps=60), student, teacher)
    learnt = result.model.graph.initializers["w"]
    assert learnt.dtype == np.float16
    figures = DistillFigures.of(result.report.steps[0].changes)
    best = min(look.unseen for look in figures.looks)
    assert error(teacher, result.model) < 2 * best


@trained
def test_weights_that_nothing_comes_to_are_named(teacher: Path) -> None:
    model = parse(NET.replace("r = Tanh(a)", "[step] r = Round(a)"))
    student = replaced(model, **{name: each.values for name, each in worse(net()).graph.initializers.items()})
    changes = distilled(Distill(steps=12), student, teacher).report.steps[0].changes
    found = reasons(changes)
    assert {change.reason for change in changes.changed} == {"v"}
    assert found["bias"] == "no gradient comes to 'b': Round 'step' is in the way"


@trained
def test_features_are_learnt_too_where_they_have_one_shape(teacher: Path) -> None:
    student = worse(net())
    with_them, without = (
        distilled(Distill(steps=100, features=names), student, teacher).model for names in (("r",), ())
    )

    def inside(model: Model) -> float:
        tapped = [model.copy() for model in (load(teacher), model)]
        for each in tapped:
            each.graph.outputs.append(
                next(n.outputs[0] for n in each.graph.nodes if n.outputs[0].name == "r")
            )
        first, second = (Session(each).run({"x": X})["r"] for each in tapped)
        return float(np.square(first - second).mean())

    assert inside(with_them) < inside(without)
    with pytest.raises(UsageError, match="has no tensor 'rr'"):
        distilled(Distill(steps=1, features=("rr",)), student, teacher)


@trained
def test_labels_are_learnt_beside_the_teacher(teacher: Path) -> None:
    labels = (X[:, 0] > 0).astype(np.int64)
    student = worse(net())
    result = distilled(Distill(steps=150, labels="y"), student, teacher, labels=labels).model

    def accuracy(model: Model) -> float:
        return float((Session(model).run({"x": X})["y"].argmax(1) == labels).mean())

    assert accuracy(result) > max(accuracy(student), accuracy(load(teacher))) + 0.1
    with pytest.raises(UsageError, match="the data has none"):
        distilled(Distill(steps=1, labels="y"), student, teacher)


@trained
@pytest.mark.parametrize("loss", ["relative", "kl", "cosine"])
def test_every_loss_gets_less(teacher: Path, loss: Any) -> None:
    figures = DistillFigures.of(
        distilled(Distill(steps=60, loss=loss), worse(net()), teacher).report.steps[0].changes
    )
    assert figures.looks[-1].unseen < 0.5 * figures.looks[0].unseen


@trained
def test_a_teacher_with_other_outputs_is_refused(tmp_path: Path) -> None:
    parse("g (float[N,8] x) => (float[N,8] z) { z = Relu(x) }").save(tmp_path / "other.onnx")
    with pytest.raises(UsageError, match=r"has outputs z, the model y"):
        distilled(Distill(steps=1), net(), tmp_path / "other.onnx")


@trained
@pytest.mark.parametrize(
    ("takes", "told"),
    [
        ("float[N,9]", r"takes float32 \['N', 9\] for 'x', the model"),
        ("int64[N,8]", "takes int64"),
        ("float[8]", ""),
    ],
)
def test_a_teacher_of_other_inputs_is_refused(tmp_path: Path, takes: str, told: str) -> None:
    parse(f"g ({takes} x) => (float[N,4] y) {{ f = Cast<to=1>(x) y = Relu(f) }}").save(
        tmp_path / "other.onnx"
    )
    with pytest.raises(UsageError, match=f"the teacher '.*' {told}"):
        distilled(Distill(steps=1), net(), tmp_path / "other.onnx")


@trained
@pytest.mark.parametrize(("broken", "what"), [(np.nan, "NaN"), (np.inf, "an infinity")])
def test_a_sample_that_is_no_number_is_named_before_the_work(teacher: Path, broken: float, what: str) -> None:
    x = X.copy()
    x[100, 3] = broken
    for step in (Distill(steps=1), Quantize(train=1)):
        with pytest.raises(CalibrationError, match=f"sample 100 of input 'x' holds {what}"):
            Pipeline(step)(net(), data=CalibrationData.from_arrays({"x": x}, 16))


@trained
def test_infinities_that_hide_something_are_learnt_from(tmp_path: Path) -> None:
    """A mask that is given: what it hides is no number in no output."""
    text = """g (float[N,8] x, float[N,8] m) => (float[N,4] y) <float[8,4] w = {0}>
        { a = Add(x, m) s = Softmax(a) y = MatMul(s, w) }"""
    model = replaced(parse(text), w=normal(8, 4))
    model.save(tmp_path / "teacher.onnx")
    mask = np.where(np.arange(8) % 3 == 1, -np.inf, 0).astype(np.float32)
    data = [{"x": normal(4, 8, seed=seed), "m": np.tile(mask, (4, 1))} for seed in range(32)]
    step = Distill(steps=30, teacher=tmp_path / "teacher.onnx")
    result = Pipeline(step)(worse(model), data=data, target=Target.cpu(1))
    looks = DistillFigures.of(result.report.steps[-1].changes).looks
    assert looks[-1].unseen < 0.5 * looks[0].unseen


@trained
def test_weights_of_one_name_in_several_bodies_keep_it(tmp_path: Path) -> None:
    """And are learnt apart; one in a branch that no sample takes stays as it is."""
    weight = "<float[8,4] w = {%s}> { o = MatMul(x, w) }"
    bodies = [f"{name} () => (float[N,4] o) {weight}" for name in ("t", "e")]
    text = f"""g (float[N,8] x, bool c, bool d) => (float[N,4] y)
        {{ y = If (c) <then_branch = {bodies[0]}, else_branch = b () => (float[N,4] p)
            {{ p = If (d) <then_branch = {bodies[1]}, else_branch = u () => (float[N,4] o) {weight}> }}> }}"""
    values = [normal(8, 4, seed=seed).round(2) for seed in range(3)]
    numbers = tuple(", ".join(map(str, each.ravel().tolist())) for each in values)
    model = parse(text % numbers)
    model.save(tmp_path / "teacher.onnx")
    student = model.copy()
    for graph in student.graphs():
        for constant in graph.initializers.values():
            constant.values = constant.values + normal(8, 4, seed=9) / 2
    data = [
        {"x": normal(4, 8, seed=seed), "c": np.array(seed % 2 == 0), "d": np.array(True)}
        for seed in range(32)
    ]
    step = Distill(steps=40, teacher=tmp_path / "teacher.onnx")
    result = Pipeline(step)(student.copy(), data=data, target=Target.cpu(1)).model
    was, found = (
        [graph.initializers["w"].values for graph in each.graphs() if "w" in graph.initializers]
        for each in (student, result)
    )
    gaps = [[float(np.abs(a - b).mean()) for a, b in zip(each, values, strict=True)] for each in (was, found)]
    assert gaps[1][0] < gaps[0][0]
    assert gaps[1][1] < gaps[0][1]
    np.testing.assert_array_equal(found[2], was[2])


@trained
def test_without_data_it_says_so() -> None:
    with pytest.raises(CalibrationError, match="pass 'distill' needs calibration data"):
        Pipeline(Distill())(net())


@trained
def test_what_pytorch_does_not_know_is_named(teacher: Path) -> None:
    text = NET.replace("r = Tanh(a)", "t = Tanh(a) n = RandomUniformLike<low=0.0,high=0.0>(t) r = Add(t, n)")
    student = replaced(
        parse(text), **{name: each.values for name, each in worse(net()).graph.initializers.items()}
    )
    outcome = distilled(Distill(steps=1), student, teacher).report.steps[0].outcome
    assert "RandomUniformLike is not known in PyTorch" in outcome


@trained
def test_batches_of_a_fixed_size_and_samples_of_many_shapes() -> None:
    fixed = parse(NET.replace("float[N,8] x", "float[4,8] x").replace("float[N,4] y", "float[4,4] y"))
    fixed = replaced(fixed, **{name: each.values for name, each in net().graph.initializers.items()})
    batches = [{"x": normal(4, 8, seed=seed)} for seed in range(64)]
    result = Pipeline(Prune(ratio=0.5, repair="none"), Distill(steps=30))(
        fixed, data=batches, target=Target.cpu(1)
    )
    looks = DistillFigures.of(result.report.steps[1].changes).looks
    assert looks[-1].unseen < 0.9 * looks[0].unseen
    text = "g (float[N,T,8] x) => (float[N,T,4] y) <float[8,16] w = {0}, float[16,4] v = {0}> {"
    many = parse(text + " h = MatMul(x, w) r = Tanh(h) y = MatMul(r, v) }")
    many = replaced(many, w=normal(8, 16) / 2, v=normal(16, 4, seed=1) / 2)
    ragged = [{"x": normal(1 + seed % 3, 2 + seed % 5, 8, seed=seed)} for seed in range(80)]
    result = Pipeline(Prune(ratio=0.5, repair="none"), Distill(steps=30))(
        many, data=ragged, target=Target.cpu(1)
    )
    looks = DistillFigures.of(result.report.steps[1].changes).looks
    assert looks[-1].unseen < 0.9 * looks[0].unseen


@trained
def test_when_the_time_is_up_the_best_so_far_is_taken(teacher: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    def progress(what: str, done: int, total: int | None) -> None:
        if "unseen" in what:
            seen.append((done, total))
            if done == 30:
                raise TimeUp("the time limit of 1 s was over")

    result = distilled(Distill(steps=100), worse(net()), teacher, progress=progress)
    assert seen[-1] == (30, 100)
    changes = result.report.steps[0].changes
    assert "the time limit" in reasons(changes)["learning"]
    looks = DistillFigures.of(changes).looks
    assert [look.step for look in looks] == [0, 16]
    assert error(teacher, result.model) < error(teacher, worse(net()))


@trained
@pytest.mark.parametrize("lr", [3e-3, 0.3])
def test_what_was_interrupted_goes_on_from_its_checkpoint(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float
) -> None:
    monkeypatch.setattr("onnxslim.learn.checkpoint.EVERY", 0.0)
    file, student, told = tmp_path / "state", worse(net(), 0.1 if lr < 0.1 else 1e-3), list[int]()
    step = Distill(steps=30, lr=lr, checkpoint=str(file))

    def progress(what: str, done: int, total: int | None) -> None:
        told.extend([done] if "unseen" in what else [])
        if len(told) == (20 if lr < 0.1 else 40):
            raise KeyboardInterrupt

    plain = distilled(Distill(steps=30, lr=lr), student, teacher)
    with pytest.raises(KeyboardInterrupt):
        distilled(step, student, teacher, progress=progress)
    assert file.exists()
    with pytest.raises(UsageError, match="is of another model, data or options"):
        distilled(Distill(steps=31, lr=lr, checkpoint=str(file)), student, teacher)
    told.clear()
    resumed = distilled(step, student, teacher, progress=lambda what, done, total: told.append(done))
    assert resumed.model.to_proto() == plain.model.to_proto()
    first, second = (DistillFigures.of(each.report.steps[0].changes).looks for each in (plain, resumed))
    np.testing.assert_array_equal([*map(_numbers, first)], [*map(_numbers, second)])
    assert not file.exists()
    file.write_bytes(b"something else")
    with pytest.raises(UsageError, match="is no checkpoint"):
        distilled(step, student, teacher)


def _numbers(look: Look) -> tuple[float, ...]:
    return look.step, look.rate, look.loss, look.unseen


@trained
def test_a_network_gets_better_on_images_that_nothing_was_fitted_to(tmp_path: Path) -> None:
    with np.load(FASHION / "calibration.npz") as data, np.load(FASHION / "test.npz") as test:
        images, unseen = data["image"][:256], test["image"][:300]
    original = load(FASHION / "mobilenet.onnx")
    moved = {
        name: each.values * (1 + np.float32(0.1) * normal(*each.shape, seed=at))
        for at, (name, each) in enumerate(original.graph.initializers.items())
        if each.dtype == np.float32
    }
    student = replaced(original, **moved)
    result = Pipeline(Distill(steps=25, teacher=FASHION / "mobilenet.onnx"), count=False)(
        student, data=CalibrationData.from_arrays({"image": images}, 16), target=Target.cpu(1)
    ).model
    expected, before, after = (
        Session(each).run({"image": unseen})["logits"] for each in (original, student, result)
    )
    assert np.square(expected - after).mean() < 0.6 * np.square(expected - before).mean()


@trained
def test_processes_of_torchrun_come_to_what_one_does(teacher: Path, tmp_path: Path) -> None:
    """Over gloo, on the command line, each with its share of every step."""
    worse(net()).save(tmp_path / "student.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    words = ["distill", str(tmp_path / "student.onnx"), "OUT", "--steps", "12", "--batch", "24", "--quiet"]
    words += ["--teacher", str(teacher), "--data", str(tmp_path / "x.npz")]
    alone, two = (str(tmp_path / f"{name}.onnx") for name in ("alone", "two"))
    assert main([alone if word == "OUT" else word for word in words]) == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    run = subprocess.run(
        [*start, "onnxslim", *[two if word == "OUT" else word for word in words]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    one, other, before = (load(path).graph.initializers for path in (alone, two, tmp_path / "student.onnx"))
    for name in ("w", "b", "v"):
        expected = one[name].values
        np.testing.assert_allclose(other[name].values, expected, atol=1e-5 * np.abs(expected).max())
        assert not np.allclose(before[name].values, expected, atol=1e-3)


def layer_of_zeros() -> Model:
    """Two products whose weights are large enough to be stored as codes."""
    text = """g (float[N,24] x) => (float[N,8] y) <float[24,48] w = {0}, float[48,8] v = {0}>
    { h = MatMul(x, w) r = Tanh(h) y = MatMul(r, v) }"""
    return replaced(parse(text), w=normal(24, 48) / 4, v=normal(48, 8, seed=1) / 4)


SMALLER: list[Callable[[int | None], Pass]] = [
    lambda steps: Prune(ratio=0.5, steps=2 if steps else 1, distill=steps),
    lambda steps: Factorize(params=0.7, cache=False, distill=steps),
    lambda steps: Sparsify(sparsity=0.7, distill=steps),
    lambda steps: Sparsify(sparsity=0.7, storage="dense", distill=steps),
    lambda steps: Cluster(bits=2, group=4, distill=steps),
]


@trained
@pytest.mark.parametrize("make", SMALLER)
def test_what_makes_a_model_smaller_learns_behind_it(make: Callable[[int | None], Pass]) -> None:
    original, x, fresh = layer_of_zeros(), normal(1024, 24, seed=9), normal(1024, 24, seed=77)
    data = CalibrationData.from_arrays({"x": x}, 16)
    plain, learnt = (
        Pipeline(make(steps), on_error="raise")(original, data=data, target=Target.cpu(1))
        for steps in (None, 60)
    )
    assert [step.name for step in learnt.report.steps] == [make(None).name, "distill"]
    expected, before, after = (
        Session(each).run({"x": fresh})["y"] for each in (original, plain.model, learnt.model)
    )
    assert np.square(expected - after).mean() < 0.97 * np.square(expected - before).mean()
    assert learnt.model.stats().bytes <= 1.01 * plain.model.stats().bytes


@trained
def test_what_is_asked_for_is_judged_after_learning() -> None:
    """What learning gives back need not be got by doing less; what it does not is told."""
    data = CalibrationData.from_arrays({"x": normal(1024, 24, seed=9)}, 16)

    def run(**options: Any) -> Result:
        step = Prune(ratio=0.5, **options)
        return Pipeline(step, on_error="raise")(layer_of_zeros(), data=data, target=Target.cpu(1))

    cut, spared, learnt = (
        run(require_sqnr=least, distill=steps) for least, steps in ((0, None), (12.4, None), (12.4, 60))
    )
    assert learnt.model.stats().bytes == cut.model.stats().bytes < spared.model.stats().bytes
    nothing = run(require_sqnr=40, distill=1).report.steps[0].changes
    assert "after learning, " in " ".join(reasons(nothing).values())


@trained
@pytest.mark.parametrize("make", SMALLER[2:])
def test_zeros_and_codes_stay_while_values_are_learnt(
    make: Callable[[int | None], Pass], tmp_path: Path
) -> None:
    layer_of_zeros().save(tmp_path / "teacher.onnx")
    x = normal(1024, 24, seed=9)
    data = CalibrationData.from_arrays({"x": x}, 16)
    before = Pipeline(make(None), on_error="raise")(layer_of_zeros(), data=data).model
    after = distilled(Distill(steps=40), before, tmp_path / "teacher.onnx", x).model
    found, kept = ({each.name: each.values for each in model.constants()} for model in (after, before))
    assert found.keys() == kept.keys()
    for name, values in kept.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name] == 0, values == 0)
        if values.dtype != np.float32:
            np.testing.assert_array_equal(found[name], values)
        else:
            assert not np.array_equal(found[name], values)


@trained
def test_copies_are_learnt_from_and_not_judged_by(tmp_path: Path) -> None:
    text = """g (float[N,1,8,8] x) => (float[N,4] y) <float[4,1,3,3] w = {0}>
    { c = Conv(x, w) r = Relu(c) p = GlobalAveragePool(r) y = Flatten(p) }"""
    original = replaced(parse(text), w=normal(4, 1, 3, 3))
    original.save(tmp_path / "teacher.onnx")
    student, x = worse(original), normal(128, 1, 8, 8, seed=9)
    step = Distill(steps=8, augment=("mirror", "shift"), copies=3)
    plain, copied, again = (
        distilled(each, student, tmp_path / "teacher.onnx", x) for each in (Distill(steps=8), step, step)
    )
    figures = [DistillFigures.of(each.report.steps[0].changes) for each in (plain, copied)]
    assert [each.examples for each in figures] == ["104 samples, judged by 16", "416 samples, judged by 16"]
    assert figures[0].looks[0].unseen == figures[1].looks[0].unseen
    assert copied.model.to_proto() == again.model.to_proto() != plain.model.to_proto()


@trained
def test_copies_of_what_is_no_image_are_refused(teacher: Path) -> None:
    with pytest.raises(UsageError, match=r"pass 'distill': augment is for images.*'x' has 2 axes"):
        distilled(Distill(steps=1, augment=("noise",)), worse(net()), teacher)


@trained
def test_what_pytorch_refuses_is_told_with_its_reason(tmp_path: Path) -> None:
    text = """g (float[N,1,1,16] x) => (float[N,4] y)
    { [empty] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
      s = ReduceSum<keepdims=0>(p, axes) y = Add(s, w) }"""
    original = parse(text, {"axes": np.array([2, 3]), "w": normal(1, 4)})
    original.save(tmp_path / "teacher.onnx")
    student = replaced(original, w=normal(1, 4, seed=1))
    result = distilled(Distill(steps=1), student, tmp_path / "teacher.onnx", normal(128, 1, 1, 16))
    told = r"node 'empty' \(MaxPool\): PyTorch does not compute it: Given input size: \(1x1x16\)"
    assert re.search(told, result.report.steps[0].outcome)


@trained
def test_what_onnx_runtime_refuses_is_told_with_its_reason(teacher: Path) -> None:
    text = "g (float[N,8] x) => (float[N,4] y) { s = Reshape(x, odd) h = MatMul(s, w) y = MatMul(h, v) }"
    shape, w, v = np.array([-1, 7]), normal(7, 7), normal(7, 4)
    refused = parse(text, {"odd": shape, "w": w, "v": v})
    with pytest.raises(CalibrationError, match=r"does not run on the calibration data: .*[Rr]eshape"):
        distilled(Distill(steps=1), refused, teacher)
    refused.save(teacher.with_name("refused.onnx"))
    with pytest.raises(CalibrationError, match=r"asking the teacher: .*does not run on .*[Rr]eshape"):
        distilled(Distill(steps=1), net(), teacher.with_name("refused.onnx"))
