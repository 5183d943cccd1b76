"""Tasks on sounds, lines of text, files and clothes: splits, truth and scores, without anything fetched."""

from __future__ import annotations

import json
import wave
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim.models import zoo
from onnxslim.models.inputs import Feed
from onnxslim.models.tasks import fashion, files, lines, retrieval, speech
from onnxslim.models.tasks.fashion import Fashion
from onnxslim.models.tasks.files import Files, by_turns
from onnxslim.models.tasks.lines import Lines, decoded, distance, fitting
from onnxslim.models.tasks.mails import Mails, text_of
from onnxslim.models.tasks.photographs import OTHER_GROUNDS, TEST_GROUNDS
from onnxslim.models.tasks.retrieval import Glosses
from onnxslim.models.tasks.speech import FRAME, FRAMES, Clip, Speech
from tests.models.test_tasks import same, shelve


def record(path: Path, samples: np.ndarray, rate: int = 8000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four recordings of each speaker: loud for half a second, then quiet."""
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    monkeypatch.setattr(Speech, "clips", 2)
    speech.clips.cache_clear()
    for number, source in enumerate(Speech.sources):
        folder = shelve(source)
        for index in range(4):
            tone = np.sin(np.arange(4000) * (0.2 + 0.1 * number + 0.02 * index))
            record(folder / f"digits/{index}.wav", np.concatenate([9000 * tone, 9 * tone]))
        record(folder / "beep.wav", np.ones(100))


@pytest.mark.usefixtures("prompts")
def test_clips_are_the_same_every_time_and_of_different_speakers() -> None:
    first = [feeds["input"] for feeds in Speech().test()]
    speech.clips.cache_clear()
    assert all(np.array_equal(a, b["input"]) for a, b in zip(first, Speech().test(), strict=True))
    assert [feeds.shape for feeds in first] == [(FRAMES, 576)] * 4
    assert not same(Speech().calibration(1), Speech().unlabelled(1))
    assert not any(np.array_equal(Speech().calibration(1)[0]["input"], each) for each in first)
    for truth in (clip.truth for clip in Speech()._tested()):
        # Two half seconds of tone, 15.6 frames each, are speech; what is beside their ends does not count.
        assert 26 <= np.sum(truth == 1) <= 32
        assert np.sum(truth == -1) == 8


def test_frames_overlap() -> None:
    sound = np.arange(3 * FRAME, dtype=np.float32)
    frames = speech.feed(sound)["input"]
    assert frames.shape == (3, 576)
    assert frames[0].tolist() == [0] * 64 + list(range(512))
    assert frames[1].tolist() == list(range(512 - 64, 1024))


def test_what_is_speech_by_hand() -> None:
    levels = np.repeat([0, 0, 0, 1, 1, 1, 1, 0.001, 0, 0], FRAME).astype(np.float32)
    assert speech.truth(levels).tolist() == [0, 0, -1, -1, 1, 1, -1, -1, 0, 0]


def test_speech_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = np.zeros(4, np.float32)
    clips = [Clip(silent, np.array([1, 1, 0, -1])), Clip(silent, np.array([0, 1, 0, 0]))]
    monkeypatch.setattr(Speech, "_tested", lambda _: clips)
    f1, frames = Speech().judge([{"p": np.array([0.9, 0.1, 0.8, 0.9])}, {"p": np.array([0, 0.5, 0, 0.6])}])
    # tp 1, fp 1, fn 1, then tp 1, fp 1: 2 · 2 / (2 · 2 + 2 + 1); the frame at a change does not count.
    assert f1.value == pytest.approx(4 / 7)
    assert frames.value == pytest.approx((1 + 3) / 7)


def test_noise_has_the_power_that_is_asked_for() -> None:
    made = speech.noise(20_000, np.random.default_rng(0))
    assert np.square(made).mean() == pytest.approx(1, abs=1e-3)


def test_a_recording_of_another_kind_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "fast.wav", np.ones(8), rate=16000)
    with pytest.raises(ValueError, match=r"fast.wav is not mono, 16 bits at 8 kHz$"):
        speech.sound_of(tmp_path / "fast.wav")


@pytest.mark.parametrize("name", ["digits/beep.wav", "ascending-2tone.wav", "silence/1.wav"])
def test_tones_are_not_speech(name: str) -> None:
    assert not speech.spoken(Path(name))
    assert speech.spoken(Path("digits/1.wav"))


def test_sources_are_split() -> None:
    assert not set(Files.tested) & set(Files.others)
    assert not set(Lines.test_fonts) & set(Lines.other_fonts)
    assert not set(TEST_GROUNDS) & set(OTHER_GROUNDS)


@pytest.fixture
def shelves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten Python and three Lua files in one package of the test and one of the others."""
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    monkeypatch.setattr(Files, "tested", ("files_sphinx",))
    monkeypatch.setattr(Files, "others", ("files_docutils",))
    for source in ("files_sphinx", "files_docutils"):
        folder = shelve(source) / "deep"
        folder.mkdir()
        for index in range(10):
            (folder / f"{index}.py").write_text(f"import x{source}{index}\n" * 20)
        for index in range(3):
            (folder / f"{index}.lua").write_text(f"local x{source}{index} = 1\n" * 20)
        (folder / "short.py").write_text("x = 1\n")
        (folder / "unknown.xyz").write_text("x" * 100)


@pytest.mark.usefixtures("shelves")
def test_files_are_split() -> None:
    task = Files()
    calibration, unlabelled = task.calibration(7), task.unlabelled(6)
    found = [feeds["bytes"].tobytes() for feeds in (*calibration, *unlabelled, *task.test())]
    assert len(found) == len(set(found)) == 26
    with pytest.raises(ValueError, match=r"^files has 7 such samples, not 8$"):
        task.calibration(8)
    assert same(calibration, Files().calibration(7))


@pytest.mark.usefixtures("shelves")
def test_files_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.cache().joinpath("magika.config.json").write_text(
        json.dumps({"target_labels_space": ["c", "lua", "python"]})
    )
    monkeypatch.setattr(files, "MOST", 4)
    task = Files()
    assert [files.kind(path) for path in task._tested] == ["lua"] * 3 + ["python"] * 4
    said = [np.eye(3)[[index]] for index in (1, 1, 0, 2, 2, 2, 1)]
    (accuracy,) = task.judge([{"label": row} for row in said])
    assert accuracy.value == pytest.approx(5 / 7)


def test_types_come_by_turns() -> None:
    found = by_turns({"a": [Path(f"{i}.a") for i in range(5)], "b": [Path("0.b")]})
    assert len(set(found)) == 6
    assert [path.suffix for path in found] == [".a", ".a", ".b", ".a", ".a", ".a"]


def test_text_is_decoded_by_hand() -> None:
    assert decoded(np.array([0, 1, 1, 0, 1, 2, 2, 3, 0]), ["", "a", "b", " "]) == "aab"
    assert decoded(np.array([0, 0]), ["", "a"]) == ""


def edits(first: str, second: str) -> int:
    @cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (first[i - 1] != second[j - 1]))

    return of(len(first), len(second))


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_distances_are_edits(first: str, second: str) -> None:
    assert distance(first, second) == edits(first, second)


def test_words_that_fit() -> None:
    assert fitting("one two three", lambda text: len(text) <= 8) == "one two"
    assert fitting("incomprehensible words", lambda text: len(text) <= 3) == "incomprehensible"


def test_lines_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Lines()
    monkeypatch.setattr(Lines, "_tested", [({}, "ab"), ({}, "abab"), ({}, "b")])
    monkeypatch.setattr(Lines, "_characters", ["", "a", "b", " "])
    said = [[1, 2], [1, 2, 0, 2], [1, 2, 1, 2, 1]]
    exact, characters = task.judge([{"y": np.eye(4)[None, row]} for row in said])
    assert exact.value == pytest.approx(1 / 3)
    # "abb" for "abab" takes one edit of four; "ababa" for "b" more than there are characters.
    assert characters.value == pytest.approx((2 + 3 + 0) / 7)


def test_texts_and_fonts_of_lines_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str]] = []

    def line(text: str, font: Path, ground: str, rng: np.random.Generator) -> tuple[Feed, str]:
        seen.append((text, font.name, ground))
        return {"x": rng.random(1)}, text

    monkeypatch.setattr(lines, "_line", line)
    monkeypatch.setattr(lines, "fonts_of", lambda names: [Path(name) for name in names])
    monkeypatch.setattr(Glosses, "texts", lambda: [f"gloss {i}" for i in range(900)])
    makers = (lambda: Lines()._tested, lambda: Lines().calibration(64), lambda: Lines().unlabelled(64))
    parts = []
    for make in makers:
        make()
        parts.append([*seen])
        seen.clear()
    texts = [{text for text, _, _ in part} for part in parts]
    assert [len(part) for part in texts] == [256, 64, 64]
    assert len(set().union(*texts)) == 256 + 64 + 64
    for column in (1, 2):
        assert not {each[column] for each in parts[0]} & {each[column] for each in (*parts[1], *parts[2])}


def test_a_worn_line_keeps_its_size() -> None:
    pytest.importorskip("PIL.Image")
    made = lines.worn(np.full((48, 100, 3), 128, np.uint8), np.random.default_rng(0))
    assert made.shape == (48, 100, 3)
    assert abs(float(made.mean()) - 128) < 3


def test_images_of_clothes_are_split() -> None:
    task = Fashion("vit")
    calibration, unlabelled = task.calibration(256), task.unlabelled(256)
    images = {feeds["image"].tobytes() for feeds in (*calibration, *unlabelled, *task.test())}
    assert len(images) == 256 + 256 + 2000
    with pytest.raises(ValueError, match=r"^fashion has 256 such samples, not 257$"):
        task.unlabelled(257)
    assert task.missing() == []


def test_clothes_by_hand() -> None:
    labels = fashion._arrays("test")["label"]
    outputs = [
        {"logits": np.eye(10)[[label if index % 4 else (label + 1) % 10]]}
        for index, label in enumerate(labels)
    ]
    (accuracy,) = Fashion().judge(outputs)
    assert accuracy.value == 0.75


def test_glosses_are_one_order_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Glosses, "_entries", lambda: [retrieval.Entry("a", "b"), retrieval.Entry("c", "d")])
    assert Glosses.texts() == ["b", "d"]


MAIL = b"""From: a@b.c
Subject: Offer
Content-Type: multipart/mixed; boundary=x

--x
Content-Type: text/html; charset=utf-8

<p>Buy   <b>now</b></p>
--x--
"""


def test_what_is_to_be_read_of_a_mail() -> None:
    assert text_of(MAIL) == "Offer Buy now"
    assert text_of(b"Subject: Hello\n\nall of\nyou\n") == "Hello all of you"
    assert text_of(b"") == "-"


def test_mails_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    for name in ("spam-1", "spam-2", "easy-ham-1", "easy-ham-2"):
        (folder := shelve("mails") / name).mkdir(parents=True)
        for index in range(6):
            (folder / f"{index}.txt").write_bytes(f"Subject: {name}\n\n{index}\n".encode())
    monkeypatch.setattr(Mails, "known", 2)
    monkeypatch.setattr(Mails, "asked", 3)
    monkeypatch.setattr(Mails, "feeds", lambda _, texts: list(texts))
    task = Mails()
    parts = (task.calibration(6), task.unlabelled(6), task.test())
    calibration, unlabelled, tested = (list(map(str, part)) for part in parts)
    assert calibration[:2] == ["spam-1 0", "easy-ham-1 0"]
    assert len({*calibration, *unlabelled, *tested}) == 6 + 6 + 10
    with pytest.raises(ValueError, match=r"^mails has 6 such samples, not 7$"):
        task.calibration(7)


def test_mails_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mails, "known", 1)
    monkeypatch.setattr(Mails, "asked", 2)
    # Known along the axes; of each class one that is asked is nearer to its own, one of the second is not.
    rows = [[1, 0], [5, 1], [3, 2], [0, 2], [1, 9], [4, 1]]
    (accuracy,) = Mails().judge([{"embedding": np.array([row], np.float32)} for row in rows])
    assert accuracy.value == 0.75
