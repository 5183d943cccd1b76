"""One split of the data: by sample where the model computes samples one by one, the same for any grouping."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import GROUP, MAX_INNER_BYTES, Samples
from onnxslim.engine.base import Pass
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.runtime.metric import measure
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import normal, parse

IMAGES = normal(128, 4, 6, 6)


def net() -> Model:
    text = """g (float[N,4,6,6] x) => (float[N,8,6,6] y)
    { a = Conv<pads=[1,1,1,1]>(x, v) r = Relu(a) y = Conv(r, w) }"""
    return parse(text, {"v": normal(16, 4, 3, 3), "w": normal(8, 16, 1, 1)})


def grouped(size: int, lazy: bool = False, images: Array = IMAGES) -> CalibrationData:
    batches = [{"x": images[at : at + size]} for at in range(0, len(images), size)]
    return CalibrationData.from_callable(lambda: batches) if lazy else CalibrationData(batches)


def numbers(data: CalibrationData | None, images: Array = IMAGES) -> list[int]:
    """Which samples a part has."""
    seen = [] if data is None else [sample for feeds in data for sample in feeds["x"]]
    return [next(at for at, image in enumerate(images) if np.array_equal(image, sample)) for sample in seen]


@pytest.mark.parametrize("size", [1, 3, 16, 64])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_sample_is_in_one_part_however_samples_are_grouped(size: int, lazy: bool) -> None:
    wanted = Samples(grouped(8), net())
    found = Samples(grouped(size, lazy), net())
    for part, same in ((found.fit, wanted.fit), (found.tune, wanted.tune), (found.held, wanted.held)):
        assert part is not None
        assert same is not None
        assert numbers(part) == numbers(same)
        assert part.samples() == len(numbers(part))
        assert [len(feeds["x"]) for feeds in part] == [len(feeds["x"]) for feeds in same]
    assert sorted(numbers(found.seen) + numbers(found.held)) == list(range(128))
    assert [found.fit.samples(), found.tune.samples()] == [88, 32]
    assert max(len(feeds["x"]) for feeds in found.fit) == GROUP


def test_groups_are_smaller_where_more_is_computed_in_between() -> None:
    text = "g (float[N,4,6,6] x) => (float[N,4,1,1] y) { a = Tile(x, s) r = Relu(a) y = GlobalMaxPool(r) }"
    data = Samples(grouped(8), parse(text, {"s": np.array([1, 1, 160, 160])}))
    each = 2 * 4 * (4 * 6 * 6 * 160 * 160)  # bytes of two maps
    assert max(len(feeds["x"]) for feeds in data.fit) == MAX_INNER_BYTES // each


def test_passes_that_learn_have_samples_that_nobody_else_sees() -> None:
    labels = np.arange(128)
    learning = Samples(grouped(8), net(), labels=labels, learning=True)
    plain = Samples(grouped(8), net(), labels=labels)
    assert plain.fresh is None
    assert learning.fresh is not None
    assert learning.held is not None
    assert numbers(learning.held) == numbers(plain.held)
    assert sorted(numbers(learning.seen) + numbers(learning.held) + numbers(learning.fresh)) == list(
        range(128)
    )
    assert [learning.fresh.samples(), learning.by_sample] == [16, True]
    assert [each.tolist() for each in learning.labelled if each is not None] == [
        numbers(learning.seen),
        numbers(learning.fresh),
    ]
    few = Samples(grouped(8, images=IMAGES[:56]), net(), learning=True)
    assert few.fresh is None


def test_a_seed_makes_the_split() -> None:
    splits = [numbers(Samples(grouped(8), net(), seed=seed).tune) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    ("count", "tuned", "held"), [(15, False, None), (16, True, None), (127, True, None), (128, True, 8)]
)
def test_few_samples_are_not_held_out(count: int, tuned: bool, held: int | None) -> None:
    samples = Samples(grouped(1, images=IMAGES[:count]), net())
    assert samples.tuned == tuned
    assert (None if samples.held is None else samples.held.samples()) == held
    assert samples.seen.samples() == count - (held or 0)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[8,4,6,6] x) => (float[8,4,6,6] y) { y = Relu(x) }",
        "g (float[N,4,6,6] x) => (float[N,4,6,6] y) { m = ReduceMean<axes=[0]>(x) y = Sub(x, m) }",
        "g (float[N,4,6,6] x) => (float[N,4,6,6] y) { i = Shape(x) f = Cast<to=1>(i) "
        "s = ReduceSum<keepdims=0>(f) y = Mul(x, s) }",
    ],
)
def test_batches_that_belong_together_stay_whole(text: str) -> None:
    model = parse('<ir_version: 8, opset_import: ["" : 12]> ' + text)
    samples = Samples(grouped(8), model)
    parts = [samples.fit, samples.tune]
    assert {len(feeds["x"]) for part in parts for feeds in part} == {8}
    for part in parts:
        for feeds in part:
            (first, *rest) = numbers(CalibrationData([feeds]))
            assert rest == list(range(first + 1, first + 8))


def test_data_that_does_not_fit_is_told() -> None:
    with pytest.raises(CalibrationError, match="there is no data"):
        _ = Samples(CalibrationData([]), net()).fit


@pytest.mark.parametrize(
    "step",
    [
        Prune(ratio=0.25, align=4),
        Prune(macs=0.6, align=4),
        Factorize(params=0.8, align=1),
        Quantize(classifier=True, require_sqnr=0),
        Half(),
    ],
)
def test_results_do_not_depend_on_how_samples_are_grouped(step: Pass) -> None:
    model = net()
    made = [Pipeline(step)(model, data=grouped(size, images=IMAGES[:64])) for size in (1, 16, 64)]
    assert all(each.report.steps[0].changes for each in made)
    protos = [each.model.to_proto().SerializeToString(deterministic=True) for each in made]
    assert protos[0] == protos[1] == protos[2]


@pytest.mark.parametrize("batch", ["N", "8"])
@pytest.mark.parametrize("samples", [256, 64, 8])
def test_labels_go_with_their_samples(batch: str, samples: int) -> None:
    """Where a label is the largest element of its sample, all are right; of two changed, two are wrong."""
    x = normal(samples, 5)
    model = parse(f"g (float[{batch},5] x) => (float[{batch},5] y) {{ y = Identity(x) }}")
    labels, target = x.argmax(1), Target.cpu()
    data = CalibrationData.of(x, model.inputs())
    whole = Samples(data, model, labels=labels)
    assert whole.metric is not None
    assert measure(whole.metric, model, target) == 1
    wrong = np.concatenate(((labels[:2] + 1) % 5, labels[2:]))
    parts = Samples(data, model, labels=wrong)
    assert parts.metric is not None
    held = 0 if parts.held is None else parts.held.samples()
    missed = (1 - measure(parts.metric, model, target)) * (samples - held)
    if whole.held_metric is not None:
        assert parts.held_metric is not None
        assert measure(whole.held_metric, model, target) == 1
        missed += (1 - measure(parts.held_metric, model, target)) * held
    assert missed == pytest.approx(2)
    assert (whole.held_metric is None) == (samples < 128)
    assert Samples(data, model).metric is Samples(data, model).held_metric is None


def test_labels_that_are_too_few_are_told() -> None:
    with pytest.raises(CalibrationError, match="there are 100 labels for 128 samples"):
        Pipeline(Prune(ratio=0.5))(net(), data=grouped(8), labels=np.zeros(100, np.int64))


def test_passes_keep_accuracy_by_labels_and_the_report_has_that_of_samples_held_out() -> None:
    text = "g (float[N,8] x) => (float[N,4] y) { a = MatMul(x, v) r = Relu(a) y = MatMul(r, w) }"
    model = parse(text, {"v": normal(8, 16), "w": normal(16, 4)})
    x = normal(256, 8)
    labels = Session(model).run({"x": x})["y"].argmax(1)
    report = Pipeline(Half(), Prune(ratio=0.5))(model, data=x, labels=labels).report
    once, both = (step.kept for step in report.steps)
    assert once is not None
    assert both is not None
    assert once.accuracy is not None
    assert both.accuracy is not None
    assert once.accuracy[0] == both.accuracy[0] == 1
    assert once.accuracy[1] == once.agreement
    assert both.accuracy[1] == both.agreement != 1
    assert "with accuracy 100.00 % → " in str(both)


@pytest.mark.parametrize("size", [1, 16])
def test_a_share_that_is_asked_for_is_held_out_whole_and_in_halves(size: int) -> None:
    many = normal(400, 4, 6, 6, seed=2)
    wanted = Samples(grouped(size, images=many), net(), hold_out=0.25)
    held = numbers(wanted.held, many)
    assert len(held) == 100
    assert wanted.halves is not None
    choose, judge = (numbers(half.data, many) for half in wanted.halves)
    assert (len(choose), len(judge)) == (50, 50)
    assert sorted(choose + judge) == held
    assert sorted(numbers(wanted.seen, many) + held) == list(range(400))
    assert Samples(grouped(size, images=many), net(), holding=False, hold_out=0.25).halves is None


def test_batches_that_are_left_whole_are_held_out_in_halves_with_their_labels() -> None:
    """The mean over the batch ties its samples."""
    tied = parse("g (float[N,4] x) => (float[N,4] y) { m = ReduceMean<axes=[0]>(x) y = Sub(x, m) }", opset=13)
    batches = [{"x": normal(4, 4, seed=seed)} for seed in range(16)]
    samples = Samples(CalibrationData(batches), tied, labels=np.arange(64), hold_out=0.25)
    assert samples.halves is not None
    first, second = samples.halves
    for part in (first, second):
        assert part.labels is not None
        assert part.data.count() == 2
        for feeds, labels in zip(part.data, part.labels.reshape(2, 4), strict=True):
            assert np.array_equal(feeds["x"], batches[labels[0] // 4]["x"])
    assert not {*first.labels.tolist()} & {*second.labels.tolist()}  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_to_hold_out_is_one(share: float) -> None:
    with pytest.raises(UsageError, match="hold_out is a share between 0 and 1"):
        Pipeline(Half())(net(), data=grouped(8), hold_out=share)
