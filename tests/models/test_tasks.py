"""Tasks: tables are well-formed, calibration and test have nothing in common, scores are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onnxslim.models import stage, tasks, zoo
from onnxslim.models.inputs import Feed
from onnxslim.models.sources import MARK
from onnxslim.models.tasks import TASKS, Task, files, photographs, retrieval
from onnxslim.models.tasks.lines import Lines
from onnxslim.models.tasks.mails import Mails
from onnxslim.models.tasks.photographs import OTHER_GROUNDS, SCALES, TEST_GROUNDS, Photographs, composite
from onnxslim.models.tasks.retrieval import Docstrings, Glosses, entries, ranked
from onnxslim.models.tasks.speech import Speech
from onnxslim.models.tasks.stamps import STAMPS
from onnxslim.runtime.session import Session

WORDNET = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is known to have its own distinct existence
00001930 03 n 02 black_box 0 thing 1 000 | equipment that records information about a flight; "they found it"
00002137 03 n 01 boxing_ring 0 000 | a square in which men with boxing gloves fight
00002200 03 n 01 Paris 0 000 | the capital and largest city of France
00002300 03 n 01 pair 0 000 | a set of two
"""


def shelve(name: str) -> Path:
    """An empty folder that counts as fetched."""
    folder = stage._at(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(stage.SOURCES[name].content._pin())
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of tiny stand-ins: two stamps of the table and two others, noise for grounds, five entries."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("skimage", reason="calibration has its photographs: pip install 'onnx-slimkit[zoo]'")
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    rng = np.random.default_rng(0)
    shelve("stamps")
    for name in (*list(STAMPS)[:2], "animals/other", "animals/cartoon/drawn"):
        path = stage._at("stamps") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (90, 120, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * (np.arange(120) >= 60)
        image.fromarray(pixels).save(path)
    for name in (*TEST_GROUNDS, *OTHER_GROUNDS):
        source, _, file = name.partition("/")
        path = shelve(source) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    (shelve("wordnet") / "data.noun").write_text(WORDNET)
    monkeypatch.setattr(photographs, "STAMPS", dict(list(STAMPS.items())[:2]))
    grounds = photographs.ground
    grounds.cache_clear()
    yield
    grounds.cache_clear()


def same(first: list[Feed], second: list[Feed]) -> bool:
    return all(np.array_equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_the_table_of_stamps_is_well_formed() -> None:
    assert len(STAMPS) > 100
    names: dict[int, str] = {}
    for stamp, classes in STAMPS.items():
        assert classes, stamp
        assert "cartoon" not in stamp
        for index, name in classes.items():
            assert 0 <= index < 1000
            assert names.setdefault(index, name) == name, f"class {index} has two names"
    assert len(set(names.values())) == len(names)
    assert list(STAMPS) == sorted(STAMPS, key=list(STAMPS).index)


def test_grounds_of_the_test_are_no_others() -> None:
    assert not set(TEST_GROUNDS) & set(OTHER_GROUNDS)
    assert len({*TEST_GROUNDS, *OTHER_GROUNDS}) == len(TEST_GROUNDS) + len(OTHER_GROUNDS)


@pytest.mark.usefixtures("shelf")
def test_photographs_are_the_same_every_time() -> None:
    first, second = Photographs(), Photographs("efficientnet_lite0.torchscript")
    assert same(first.calibration(5), second.calibration(5))
    assert same(first.unlabelled(4), second.unlabelled(4))
    assert same(list(first.test()), list(second.test()))
    assert len(first.test()) == 2 * len(TEST_GROUNDS) * len(SCALES)
    assert first.test() is first.test()
    assert {feed["image"].shape for feed in first.test()} == {(1, 3, 224, 224)}
    assert not same(first.calibration(4), first.unlabelled(4))


@pytest.mark.usefixtures("shelf")
def test_photographs_have_the_size_of_the_model() -> None:
    assert Photographs("efficientnet_lite2.dynamo").calibration(1)[0]["image"].shape == (1, 3, 260, 260)


@pytest.mark.usefixtures("shelf")
def test_unlabelled_photographs_show_other_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert photographs.other_stamps() == ["animals/other"]
    seen = []

    def watched(stamp: str, ground: str, *rest: object) -> object:
        seen.append((stamp, ground))
        return composite(stamp, ground, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(photographs, "composite", watched)
    Photographs().unlabelled(7)
    assert [stamp for stamp, _ in seen] == ["animals/other"] * 3
    assert {ground for _, ground in seen} <= set(OTHER_GROUNDS)


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("scale", [0.3, 0.7, 1.0])
def test_a_composite_has_the_opaque_part_of_a_stamp_at_its_scale(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The opaque half is 60 wide and 90 high; before a black ground it is all that is not black.
    monkeypatch.setattr(photographs, "ground", lambda name: np.zeros((300, 400, 3), np.uint8))
    made = composite(next(iter(STAMPS)), "", scale, 200, np.random.default_rng(1))
    rows, columns = (np.flatnonzero(made.any(axis=(2, axis))) for axis in (1, 0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height == pytest.approx(min(200, 200 * scale * 1.5**0.5), abs=2)
    assert width == pytest.approx(height / 1.5, abs=2)


def logits(*classes: int) -> dict[str, np.ndarray]:
    """Scores of which the named classes are the largest, the first of them most."""
    found = np.zeros((1, 1000), np.float32)
    found[0, list(classes)] = np.arange(len(classes), 0, -1)
    return {"logits": found}


def test_photographs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "STAMPS", {"hen": {8: "hen"}, "dog": {249: "malamute", 250: "husky"}})
    hens = [logits(8), logits(7, 8), logits(1, 2, 3, 4, 5, 8)] + [logits(7)] * 9
    dogs = [logits(249), logits(250), logits(1, 2, 3, 4, 250)] + [logits(250)] * 9
    top1, top5 = Photographs().judge([*hens, *dogs])
    assert top1.value == pytest.approx((1 + 11) / 24)
    assert top5.value == pytest.approx((2 + 12) / 24)
    assert len(set(top1.groups)) == 2


def test_entries_neither_name_their_word_nor_are_short() -> None:
    assert [entry.word for entry in entries(WORDNET)] == ["entity", "black box"]
    assert next(iter(entries(WORDNET))).gloss == "that which is known to have its own distinct existence"
    assert list(entries(WORDNET))[1].gloss == "equipment that records information about a flight"


def test_glosses_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [retrieval.Entry(f"word{i}", f"gloss {i}") for i in range(60)]
    task = Glosses()
    monkeypatch.setattr(task, "tested", 20)
    monkeypatch.setattr(task, "calibrated", 10)
    monkeypatch.setattr(task, "_entries", lambda: known)
    monkeypatch.setattr(task, "feeds", list)
    tested = {text for pair in task.pairs() for text in pair}
    calibration, unlabelled = (set(map(str, feeds(10))) for feeds in (task.calibration, task.unlabelled))
    assert len(tested) == 40
    assert len(calibration) == len(unlabelled) == 10
    assert not tested & calibration
    assert not tested & unlabelled
    assert not calibration & unlabelled
    assert {"gloss 20", "word23"} <= calibration
    with pytest.raises(ValueError, match=r"^glosses has 10 samples to calibrate on, not 11$"):
        task.calibration(11)
    with pytest.raises(ValueError, match=r"^glosses has 30 such samples, not 31$"):
        task.unlabelled(31)


def test_docstrings_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Docstrings()
    monkeypatch.setattr(retrieval, "_docstrings", lambda: [(f"line {i}", f"rest {i}") for i in range(700)])
    monkeypatch.setattr(task, "feeds", list)
    pairs = task.pairs()
    assert len(pairs) == len(set(pairs)) == task.tested
    unlabelled = set(map(str, task.unlabelled(200)))
    assert len(unlabelled) == 200
    assert not {rest for _, rest in pairs} & unlabelled
    with pytest.raises(ValueError, match=r"^docstrings has 200 such samples, not 201$"):
        task.unlabelled(201)


def test_docstrings_are_read(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        f'"""Four words and more.\n\n{"what follows " * 8}\n"""\ndef short() -> None:\n    """Short."""\n'
    )
    (tmp_path / "broken.py").write_text("def")
    found = [list(retrieval._in_file(tmp_path / name)) for name in ("module.py", "broken.py")]
    assert found == [[("Four words and more.", ("what follows " * 8).strip())], []]


def test_ranks_by_hand() -> None:
    passages = np.eye(3)
    queries = np.array([[1.0, 0.5, 0.2], [0.9, 0.5, 0.2], [0.3, 0.3, 0.3]])
    # The second finds the first passage before its own; of equals, one's own comes last.
    assert ranked(queries, passages).tolist() == [1, 2, 3]


def test_retrieval_by_hand() -> None:
    rows = [[2.0, 0.0], [1.0, 3.0], [5.0, 0.1], [9.0, 1.0]]
    recall, mrr = Docstrings().judge([{"embedding": np.array([row])} for row in rows])
    # By angle the first query finds its own before the other, the second does not.
    assert (recall.value, mrr.value) == (1.0, 1.0)
    rows[3] = [4.0, 0.0]
    recall, mrr = Docstrings().judge([{"embedding": np.array([row])} for row in rows])
    assert (recall.value, mrr.value) == (0.0, 0.5)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_is_for_models_of_the_zoo_and_sources_of_the_stage(name: str) -> None:
    assert TASKS[name].name == name
    assert set(TASKS[name].sources) <= set(stage.SOURCES)
    assert TASKS[name].__doc__
    with pytest.raises(ValueError, match=rf"^task {name} is not for 'other', but for "):
        tasks.create(name, "other")


def test_tasks_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"^unknown task 'glosse'; known: photographs, "):
        tasks.create("glosse")


def test_what_a_task_lacks_is_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    assert tasks.create("glosses", "mpnet.dynamo").missing() == [
        "python models/stage.py fetch wordnet",
        "python models/export.py mpnet.dynamo",
    ]


# What float models score at least on part of the test, below what is measured: these catch mistakes in data
# and truth. Python's own library takes too long to read.
LEAST = {
    "photographs": 0.7,
    "glosses": 0.4,
    "speech": 0.9,
    "files": 0.9,
    "lines": 0.7,
    "mails": 0.8,
    "fashion": 0.9,
}


def ready(name: str) -> Task:
    task = tasks.create(name)
    if lacking := task.missing():
        pytest.skip(f"not everything was fetched: {'; '.join(lacking)}")
    pytest.importorskip("skimage", reason="inputs are made from photographs: pip install 'onnx-slimkit[zoo]'")
    return task


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(LEAST))
def test_a_float_model_is_good_at_its_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ready(name)
    monkeypatch.setattr(photographs, "STAMPS", dict(list(STAMPS.items())[:12]))
    monkeypatch.setattr(Glosses, "tested", 100)
    monkeypatch.setattr(Speech, "clips", 8)
    monkeypatch.setattr(files, "MOST", 6)
    monkeypatch.setattr(Lines, "tested", 40)
    monkeypatch.setattr(Mails, "known", 20)
    monkeypatch.setattr(Mails, "asked", 30)
    assert task.metric(Session(task.path()).run) > LEAST[name]


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(TASKS))
def test_samples_are_those_that_the_model_takes(name: str) -> None:
    task = ready(name)
    session = Session(task.path())
    for feeds in (*task.calibration(2), *task.unlabelled(2)):
        assert all(np.isfinite(array).all() for array in session.run(feeds).values())
    assert same(task.unlabelled(3)[:2], task.unlabelled(2))
    assert same(task.calibration(3)[:2], task.calibration(2))


@pytest.mark.zoo
def test_every_stamp_of_the_table_is_there() -> None:
    if not stage.available("stamps"):
        pytest.skip("the stamps were not fetched: python models/stage.py fetch stamps")
    missing = [name for name in STAMPS if not (stage.folder("stamps") / f"{name}.png").is_file()]
    assert missing == []
    assert zoo.cache() in stage.folder("stamps").parents
