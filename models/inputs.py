"""Realistic inputs for the zoo's models: photographs, rendered text, files of many types, voice, sentences.

Every maker takes the number of samples and a random generator and returns that many feeds of batch 1.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import os
import pickle
import tarfile
import wave
import zipfile
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim.models import zoo

Feed = dict[str, npt.NDArray[Any]]
Maker = Callable[[int, np.random.Generator], list[Feed]]
Pixels = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.float32]

# Only photographs inside the scikit-image wheel: nothing is downloaded.
SCENES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "camera.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "grass.png",
    "brick.png",
    "clock_motion.png",
)
PRINTED = ("page.png", "text.png")
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

SENTENCES = (
    "The ferry to the island leaves twice a day.",
    "She repaired the old radio with a borrowed soldering iron.",
    "Interest rates rose for the third time this year, and most lenders followed within a week.",
    "How long does it take to boil an egg at high altitude?",
    "A convolution slides a small window over the image.",
    "Please return the library books before Friday.",
    "The committee postponed its decision until the auditors had delivered a complete report.",
    "Rain.",
    "Our train was delayed by forty minutes because of a fallen tree on the line near the border.",
    "Bake the bread at 230 degrees until the crust is dark brown.",
    "Can I change the delivery address after the order has shipped?",
    "The vaccine was tested on nine thousand volunteers in four countries.",
    "He plays the cello badly but with great enthusiasm.",
    "Quarterly revenue fell short of expectations.",
    "Two rivers meet just below the village, and in spring the meadows between them stand under water.",
    "To reset the device, hold the power button for ten seconds.",
    "The defender was sent off in the last minute of the match.",
    "Whales sleep with one half of the brain at a time.",
    "Nobody had told the new tenants about the noise.",
    "The museum is closed on Mondays and on public holidays.",
    "Sort the list first, then remove the duplicates.",
    "An unexpected error occurred while reading the file; check its permissions and try again.",
    "Fresh basil, two ripe tomatoes and a little salt are all you need.",
    "The painting was attributed to a pupil of the master.",
    "Is this seat taken?",
    "Glaciers in the region have lost a third of their volume since the first survey in 1931.",
    "The contract may be terminated by either party with three months' notice.",
    "My phone battery drains overnight even when nothing is running.",
    "Children under six travel free of charge.",
    "The orchestra tuned while the last of the audience found their seats.",
    "A good compiler reports the cause of an error rather than its symptom.",
    "They walked along the beach until the lights of the harbour disappeared behind the cliff.",
)


def extra(module: str) -> Any:
    """Import a module of the ``zoo`` extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install onnx-slimkit[zoo]") from error


@cache
def photograph(name: str) -> Pixels:
    """A photograph of scikit-image, RGB ``[height, width, 3]``."""
    image = extra("PIL.Image")
    extra("skimage")
    with resources.files("skimage.data").joinpath(name).open("rb") as file:
        return np.asarray(image.open(file).convert("RGB"))


def crop(picture: Pixels, height: int, width: int, rng: np.random.Generator) -> Pixels:
    """A random window with the wanted aspect, between a half of and all the picture, resampled to size."""
    image = extra("PIL.Image")
    scale = min(picture.shape[0] / height, picture.shape[1] / width) * rng.uniform(0.5, 1)
    rows, columns = int(height * scale), int(width * scale)
    top = rng.integers(0, picture.shape[0] - rows + 1)
    left = rng.integers(0, picture.shape[1] - columns + 1)
    window = picture[top : top + rows, left : left + columns]
    return np.asarray(image.fromarray(window).resize((width, height), image.Resampling.BILINEAR))


def _crops(names: tuple[str, ...], samples: int, size: int, rng: np.random.Generator) -> list[Pixels]:
    """Square crops of the named photographs in turn."""
    photographs = [photograph(name) for name in names[:samples]]
    return [crop(photographs[i % len(names)], size, size, rng) for i in range(samples)]


def planes(pixels: Pixels, mean: Samples | float, std: Samples | float) -> Samples:
    """Pixels ``[height, width, 3]`` as the normalised batch ``[1, 3, height, width]``."""
    normal = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


def _draw_text(pixels: Pixels, text: str, x: int, y: int, size: int, dark: bool) -> Pixels:
    """The picture with one line of text on it."""
    picture = extra("PIL.Image").fromarray(pixels)
    font = extra("PIL.ImageFont").load_default(size=size)
    colour = (20, 20, 40) if dark else (245, 245, 235)
    extra("PIL.ImageDraw").Draw(picture).text((x, y), text, fill=colour, font=font)
    return np.asarray(picture)


def fade(pixels: Pixels, dark_text: bool) -> Pixels:
    """Move a background towards white or black, so that text on it can be read."""
    target = 255 if dark_text else 0
    return (0.35 * pixels + 0.65 * target).astype(np.uint8)


def imagenet(pixels: Pixels) -> Feed:
    """A picture as ``image`` float32 [1, 3, height, width], RGB normalised as for ImageNet."""
    return {"image": planes(pixels, IMAGENET_MEAN, IMAGENET_STD)}


def imagenet_crops(samples: int, rng: np.random.Generator, side: int = 224) -> list[Feed]:
    """Photographs as `imagenet` wants them, `side` pixels high and wide."""
    return [imagenet(window) for window in _crops(SCENES, samples, side, rng)]


def text_scenes(samples: int, rng: np.random.Generator) -> list[Feed]:
    """``x`` float32 [1, 3, 320, 320], BGR in -1..1: printed pages and scenes, half of them captioned."""
    feeds = []
    for i, window in enumerate(_crops(PRINTED + SCENES, samples, 320, rng)):
        if i % 2:
            words = " ".join(rng.choice(SENTENCES).split()[:3])
            window = _draw_text(window, words, 10, int(rng.integers(10, 280)), 26, dark=bool(i % 4 == 1))
        feeds.append({"x": planes(window[:, :, ::-1], 0.5, 0.5)})
    return feeds


def _text_line(width: int, words: int, dark: bool, rng: np.random.Generator) -> Pixels:
    """A line of rendered words on part of a photograph, cropped to the text: ``[48, at most width, 3]``."""
    text = " ".join(rng.choice(SENTENCES).split()[:words])
    background = crop(photograph(str(rng.choice(SCENES))), 48, 480, rng)
    size = int(rng.integers(24, 33))
    line = _draw_text(fade(background, dark), text, 6, (44 - size) // 2, size, dark)
    length = int(extra("PIL.ImageFont").load_default(size=size).getlength(text)) + 12
    return line[:, : min(length, width)]


def padded_line(line: Pixels, width: int) -> Samples:
    """A line of text in BGR, -1..1, padded on the right with zeros to ``[1, 3, 48, width]``."""
    bgr = planes(line[:, :, ::-1], 0.5, 0.5)
    return np.pad(bgr, ((0, 0), (0, 0), (0, 0), (0, width - bgr.shape[3])))


def oriented_lines(samples: int, rng: np.random.Generator) -> list[Feed]:
    """``x`` float32 [1, 3, 48, 192]: short lines of text, every second one upside down."""
    feeds = []
    for i in range(samples):
        line = _text_line(192, 2, bool(i % 4 < 2), rng)
        feeds.append({"x": padded_line(line[::-1, ::-1] if i % 2 else line, 192)})
    return feeds


def text_lines(samples: int, rng: np.random.Generator) -> list[Feed]:
    """``x`` float32 [1, 3, 48, 320]: upright lines of text."""
    return [{"x": padded_line(_text_line(320, 3, bool(i % 2), rng), 320)} for i in range(samples)]


def _paragraph(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(SENTENCES, 12))


def _python_source(rng: np.random.Generator) -> bytes:
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    return modules[rng.integers(len(modules))].read_bytes()


def _json_file(rng: np.random.Generator) -> bytes:
    rows = [{"id": i, "text": str(rng.choice(SENTENCES)), "score": rng.random()} for i in range(20)]
    return json.dumps(rows, indent=2).encode()


def _csv_file(rng: np.random.Generator) -> bytes:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["id", "name", "price", "stock"])
    writer.writerows(
        [i, rng.choice(SENTENCES).split()[0], f"{rng.uniform(1, 99):.2f}", rng.integers(500)]
        for i in range(60)
    )
    return table.getvalue().encode()


def _html_file(rng: np.random.Generator) -> bytes:
    body = "".join(f'<p class="entry">{sentence}</p>\n' for sentence in rng.choice(SENTENCES, 15))
    return (
        f"<!DOCTYPE html>\n<html><head><title>Notes</title></head>\n<body>\n{body}</body></html>\n".encode()
    )


def _markdown_file(rng: np.random.Generator) -> bytes:
    items = "\n".join(f"- **{s.split()[0]}**: {s}" for s in rng.choice(SENTENCES, 8))
    return f"# Notes\n\n{_paragraph(rng)}\n\n## List\n\n{items}\n\n```sh\nmake test\n```\n".encode()


def _image_file(rng: np.random.Generator, kind: str) -> bytes:
    file = io.BytesIO()
    window = crop(photograph(str(rng.choice(SCENES))), 96, 96, rng)
    extra("PIL.Image").fromarray(window).save(file, kind)
    return file.getvalue()


def _zip_file(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("notes.txt"), _paragraph(rng))
        archive.writestr(zipfile.ZipInfo("table.csv"), _csv_file(rng))
    return file.getvalue()


def _tar_file(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        content = _python_source(rng)
        member = tarfile.TarInfo("module.py")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _wave_file(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes((32767 * voice(8000, rng)).astype("<i2").tobytes())
    return file.getvalue()


FILES: tuple[Callable[[np.random.Generator], bytes], ...] = (
    _python_source,
    _json_file,
    lambda rng: _image_file(rng, "PNG"),
    _csv_file,
    _zip_file,
    _html_file,
    lambda rng: _image_file(rng, "JPEG"),
    _markdown_file,
    _wave_file,
    lambda rng: _paragraph(rng).encode(),
    lambda rng: gzip.compress(_python_source(rng), mtime=0),
    _tar_file,
    lambda rng: pickle.dumps(_json_file(rng).decode().split()),
    lambda rng: rng.bytes(3000),
)


def file_bytes(samples: int, rng: np.random.Generator) -> list[Feed]:
    """Files of many types, as `ends_of` wants them."""
    return [ends_of(FILES[i % len(FILES)](rng)) for i in range(samples)]


def ends_of(content: bytes) -> Feed:
    """``bytes`` int32 [1, 2048]: the first and the last 1024 bytes of a file.

    White space is stripped from both ends of the file's first and last 4096 bytes, and the value 256 pads
    between the two halves, as the model was trained.
    """
    head, tail = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    features = np.full((1, 2048), 256, np.int32)
    features[0, : len(head)] = np.frombuffer(head, np.uint8)
    features[0, 2048 - len(tail) :] = np.frombuffer(tail, np.uint8)
    return {"bytes": features}


def voice(length: int, rng: np.random.Generator) -> Samples:
    """Synthetic speech at 16 kHz: float32 [length], syllables of changing vowels with pauses between phrases.

    A source-filter model: the harmonics of a gliding pitch, each weighted by three formant resonances.
    """
    syllables = length // 3200 + 2
    knots = np.arange(syllables) * 3200
    time = np.arange(length)

    def glide(low: float, high: float) -> npt.NDArray[np.float64]:
        return np.interp(time, knots, rng.uniform(low, high, syllables))

    pitch = glide(100, 220)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    formants = [(glide(300, 850), 90, 1.0), (glide(900, 2300), 130, 0.5), (glide(2400, 3200), 200, 0.25)]
    sound: npt.NDArray[np.float64] = 0.02 * rng.standard_normal(length)
    for harmonic in range(1, 36):
        gain = sum(g / (1 + ((harmonic * pitch - f) / width) ** 2) for f, width, g in formants)
        sound += gain * np.sin(harmonic * phase) * (harmonic * pitch < 7600)
    spoken = np.repeat(rng.random(syllables) < 0.75, 3200)[:length]
    sound *= np.where(spoken, np.sin(np.pi * time / 3200) ** 2, 0) + 0.05
    return (0.1 * sound).astype(np.float32)


def _frames(count: int, hop: int, rng: np.random.Generator) -> Samples:
    """Frames ``[count, 576]``, `hop` samples apart: 512 samples after the last 64 of the frame before."""
    sound = voice((count - 1) * hop + 576, rng)
    frames: Samples = np.lib.stride_tricks.sliding_window_view(sound, 576)[::hop].copy()
    return frames


def _state(step: int, *shape: int, rng: np.random.Generator) -> Samples:
    """LSTM state: zero at the start of the utterance, later of the size it has in use."""
    return rng.normal(scale=0.3 if step else 0, size=shape).astype(np.float32)


def voice_frames(samples: int, rng: np.random.Generator) -> list[Feed]:
    """``input`` float32 [1, 576] and ``state`` float32 [2, 1, 128]: 16 kHz, eight frames a second."""
    frames = _frames(samples, 2048, rng)
    return [{"input": frames[i : i + 1], "state": _state(i, 2, 1, 128, rng=rng)} for i in range(samples)]


def voice_frames_16k(samples: int, rng: np.random.Generator) -> list[Feed]:
    """As `voice_frames`, with ``sr`` int64 [] = 16000."""
    return [{**feed, "sr": np.array(16000, np.int64)} for feed in voice_frames(samples, rng)]


def voice_frames_two_rates(samples: int, rng: np.random.Generator) -> list[Feed]:
    """As `voice_frames_16k`, but every fourth frame is at 8 kHz: ``input`` [1, 288] and ``sr`` 8000."""
    feeds = voice_frames_16k(samples, rng)
    for feed in feeds[3::4]:
        feed["input"] = feed["input"][:, ::2].copy()
        feed["sr"] = np.array(8000, np.int64)
    return feeds


def voice_sequences(samples: int, rng: np.random.Generator) -> list[Feed]:
    """``input`` float32 [32, 576], ``h`` and ``c`` float32 [1, 1, 128]: a second of 16 kHz voice each."""
    return [
        {
            "input": _frames(32, 512, rng),
            "h": _state(i, 1, 1, 128, rng=rng),
            "c": _state(i, 1, 1, 128, rng=rng),
        }
        for i in range(samples)
    ]


def tokenizer(name: str) -> Any:
    """The tokenizer of a sentence encoder of the zoo ("minilm", "mpnet"), which neither pads nor cuts."""
    found = extra("tokenizers").Tokenizer.from_file(str(zoo.asset(f"{name}.tokenizer.json")))
    found.no_padding()
    found.no_truncation()
    return found


def tokens(line: Any) -> Feed:
    """An encoded text as a feed: ``input_ids`` and ``attention_mask`` int64 [1, tokens]."""
    return {
        "input_ids": np.array([line.ids], np.int64),
        "attention_mask": np.array([line.attention_mask], np.int64),
    }


def token_sequences(samples: int, rng: np.random.Generator, encoder: str = "minilm") -> list[Feed]:
    """``input_ids`` and ``attention_mask`` int64 [1, tokens]: one to three sentences, unpadded."""
    texts = [" ".join(rng.choice(SENTENCES, 1 + i % 3)) for i in range(samples)]
    return [tokens(line) for line in tokenizer(encoder).encode_batch(texts)]


MAKERS: dict[str, Maker] = {
    "ppocr_det": text_scenes,
    "ppocr_rec": text_lines,
    "ppocr_cls": oriented_lines,
    "magika": file_bytes,
    "silero_vad": voice_frames_two_rates,
    "silero_vad_16k_op15": voice_frames_16k,
    "silero_vad_16k_sequence": voice_sequences,
    "silero_vad_half": voice_frames,
    "silero_vad_op18_ifless": voice_frames_two_rates,
    "silero_vad_openvino_16k": voice_frames,
    "efficientnet_lite0.torchscript": imagenet_crops,
    "efficientnet_lite0.dynamo": imagenet_crops,
    "minilm.torchscript": token_sequences,
    "minilm.dynamo": token_sequences,
    "efficientnet_lite1.dynamo": partial(imagenet_crops, side=zoo.SIDES["efficientnet_lite1"]),
    "efficientnet_lite2.dynamo": partial(imagenet_crops, side=zoo.SIDES["efficientnet_lite2"]),
    "mpnet.dynamo": partial(token_sequences, encoder="mpnet"),
}
