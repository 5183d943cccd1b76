"""The guides: what they tell people to type runs, block by block, on small models and made-up samples."""

from __future__ import annotations

import re
import runpy
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from onnxslim import cli
from tests.helpers import FASHION, ROOT, normal, parse, run

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^(?: *<!-- (\w+) -->\n)?( *)```(console|python)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
# Told here, as they are for another shell or machine.
FOREIGN = ("pip", "docker")
# Take more than a second.
LONG = ("bugs", "detector", "gpu-and-browser")


def blocks(guide: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Language and text of the blocks without a mark, and of those with this one."""
    for mark, _, language, text in BLOCK.findall(guide.read_text(encoding="utf-8")):
        if not mark or mark == kind:
            yield language, textwrap.dedent(text)


def marked(kind: str) -> list[Path]:
    return [guide for guide in GUIDES if f"<!-- {kind} -->" in guide.read_text(encoding="utf-8")]


def classifier(folder: Path) -> None:
    """Two convolutions and ten classes; images of clothes, labelled by what the network says."""
    text = """g (float[N,1,28,28] image) => (float[N,10] logits)
      <float[16,1,3,3] conv1, float[16,16,3,3] conv2, float[10,16] head> {
        c = Conv<strides = [2,2], pads = [1,1,1,1]>(image, conv1) relu1 = Relu(c)
        d = Conv<strides = [2,2], pads = [1,1,1,1]>(relu1, conv2) relu2 = Relu(d)
        p = GlobalAveragePool(relu2) f = Flatten(p) logits = Gemm<transB = 1>(f, head) }"""
    weights = {"conv1": normal(16, 1, 3, 3), "conv2": normal(16, 16, 3, 3, seed=1), "head": normal(10, 16)}
    model = parse(text, weights)
    model.save(folder / "model.onnx")
    for name, count in (("calibration", 136), ("test", 200)):
        image = np.load(FASHION / f"{name}.npz")["image"][:count]
        label = run(model, {"image": image})["logits"].argmax(1)
        np.savez(folder / f"{name}.npz", image=image, label=label)


def detector(folder: Path) -> None:
    """Two convolutions, boxes and scores; pictures of noise."""
    from PIL import Image

    text = """g (float[N,3,32,32] images) => (float[N,4,16,16] boxes, float[N,5,16,16] scores)
      <float[16,3,3,3] w, float[16,16,3,3] v, float[4,16,1,1] b, float[5,16,1,1] s> {
        [stem] f = Conv<strides = [2,2], pads = [1,1,1,1]>(images, w) [relu] h = Relu(f)
        [body] k = Conv<pads = [1,1,1,1]>(h, v) r = Relu(k)
        [head_boxes] boxes = Conv(r, b) [head_logits] l = Conv(r, s) [head_scores] scores = Sigmoid(l) }"""
    weights = {"w": normal(16, 3, 3, 3), "v": normal(16, 16, 3, 3), "b": normal(4, 16, 1, 1)}
    parse(text, {**weights, "s": normal(5, 16, 1, 1)}).save(folder / "model.onnx")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 8, 6, 3), dtype=np.uint8)
    for at, picture in enumerate(pixels):
        Image.fromarray(picture).resize((48, 64)).save(folder / "images" / f"{at}.png")
    images = np.random.default_rng(1).random((64, 3, 32, 32)).astype(np.float32)
    np.savez(folder / "samples.npz", images=images[:48])
    np.savez(folder / "test.npz", images=images[48:], scores=np.zeros((16, 5, 16, 16), np.float32))


def encoder(folder: Path) -> None:
    """Two layers that make vectors."""
    text = """g (float[N,64] x) => (float[N,32] y) <float[64,64] a, float[64,32] b> {
        h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, b) }"""
    parse(text, {"a": normal(64, 64), "b": normal(64, 32, seed=1)}).save(folder / "encoder.onnx")
    rows = normal(256, 64, seed=2)
    np.savez(folder / "samples.npz", x=rows[:192])
    np.savez(folder / "test.npz", x=rows[192:])


def decoder(folder: Path) -> None:
    """A table of tokens, a layer, and logits."""
    text = """g (int64[N,T] ids) => (float[N,T,128] logits)
      <float[128,64] table, float[64,64] a, float[64,128] b> {
        e = Gather(table, ids)  h = MatMul(e, a)  r = Relu(h)  [lm_head] logits = MatMul(r, b) }"""
    weights = {"table": normal(128, 64), "a": normal(64, 64), "b": normal(64, 128)}
    parse(text, weights).save(folder / "decoder.onnx")
    np.savez(folder / "tokens.npz", ids=np.random.default_rng(0).integers(0, 128, (40, 12)))


MADE: dict[str, Callable[[Path], None]] = {"detector": detector, "retrieval": encoder, "decoders": decoder}


def follow(guide: Path, kind: str, folder: Path) -> int:
    """Do what a guide says; returns how many commands were run."""
    MADE.get(guide.stem, classifier)(folder)
    done = 0
    for at, (language, text) in enumerate(blocks(guide, kind)):
        if language == "python":
            script = folder / f"block{at}.py"
            script.write_text(text, encoding="utf-8")
            runpy.run_path(str(script))
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "))
            assert line.startswith("$ "), line
            assert words[0] in ("onnxslim", *FOREIGN), line
            if words[0] == "onnxslim":
                assert cli.main(words[1:]) == 0, line
                done += 1
    return done


def every() -> Iterator[pytest.param]:  # type: ignore[valid-type]
    for guide in GUIDES:
        marks = [pytest.mark.slow] if guide.stem in LONG else []
        yield pytest.param(guide, id=guide.stem, marks=marks)


@pytest.mark.parametrize("guide", list(every()))
def test_guides_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = guide.read_text(encoding="utf-8")
    assert follow(guide, "", tmp_path) or "<!--" in text


@pytest.mark.slow
@pytest.mark.parametrize("guide", [pytest.param(each, id=each.stem) for each in marked("slow")])
def test_slow_guides_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert follow(guide, "slow", tmp_path)


@pytest.mark.train
@pytest.mark.parametrize("guide", [pytest.param(each, id=each.stem) for each in marked("train")])
def test_guides_that_learn_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    assert follow(guide, "train", tmp_path)
