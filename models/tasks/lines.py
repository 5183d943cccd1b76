"""Lines of text in fonts of Debian before photographs: what do they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from onnxslim.ir.graph import Array
from onnxslim.models import stage
from onnxslim.models.inputs import Feed, Pixels, crop, extra, fade, padded_line
from onnxslim.models.tasks.base import Outputs, Task, first
from onnxslim.models.tasks.estimates import Outcomes
from onnxslim.models.tasks.photographs import OTHER_GROUNDS, TEST_GROUNDS, ground
from onnxslim.models.tasks.retrieval import Glosses

HEIGHT, WIDTH = 48, 320


class Lines(Task):
    """Lines that are read without a mistake, and characters: words of WordNet, fonts, grounds.

    Texts, fonts and grounds of the test are others than those of `calibration` and `unlabelled`.
    """

    name = "lines"
    models = ("ppocr_rec",)
    test_fonts = ("fonts_dejavu", "fonts_lato", "fonts_libertine", "fonts_cantarell")
    other_fonts = ("fonts_open", "fonts_liberation", "fonts_carlito", "fonts_free")
    sources = (*test_fonts, *other_fonts, "mate", "plasma", "wordnet")
    tested = 256

    def calibration(self, samples: int) -> list[Feed]:
        """Lines of glosses, fonts in turn."""
        return [line for line, _ in self._lines(samples, 1, self.other_fonts, OTHER_GROUNDS)]

    def unlabelled(self, samples: int) -> list[Feed]:
        """The same of other glosses."""
        return [line for line, _ in self._lines(samples, 2, self.other_fonts, OTHER_GROUNDS)]

    def _make_test(self) -> Sequence[Feed]:
        return [line for line, _ in self._tested]

    @cached_property
    def _tested(self) -> list[tuple[Feed, str]]:
        return self._lines(self.tested, 0, self.test_fonts, TEST_GROUNDS)

    def _lines(
        self, samples: int, part: int, fonts: Sequence[str], grounds: Sequence[str]
    ) -> list[tuple[Feed, str]]:
        """Lines and what they say; of all glosses, every third is in one part."""
        files = fonts_of(fonts)
        texts = Glosses.texts()[part::3]
        rng = np.random.default_rng(part)
        return [
            _line(texts[i % len(texts)], files[i % len(files)], grounds[i % len(grounds)], rng)
            for i in range(samples)
        ]

    @cached_property
    def _characters(self) -> list[str]:
        """What the classes stand for: nothing, the characters in the file, and the space."""
        model = onnx.load(self.path(), load_external_data=False)
        found = {each.key: each.value for each in model.metadata_props}
        return ["", *found["character"].split("\n"), " "]

    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """The share of lines read exactly, and of characters that need no correction."""
        said = [decoded(np.argmax(first(found)[0], axis=1), self._characters) for found in outputs]
        truth = [text for _, text in self._tested]
        wrong = np.array([distance(a, b) for a, b in zip(said, truth, strict=True)])
        length = np.array([len(text) for text in truth])
        return (
            Outcomes.of("exact", wrong == 0),
            Outcomes.of("characters", np.maximum(length - wrong, 0), length),
        )


# A cut of a family that is not made to be read at this size, or has no letters.
UNREADABLE = ("Hairline", "Thin", "Biolinum_K", "LinLibertine_I.", "LinLibertine_M", "Mono")


def fonts_of(sources: Sequence[str]) -> list[Path]:
    """Files of fonts, but for cuts that are not made to be read."""
    found = [path for source in sources for path in sorted(stage.folder(source).rglob("*.[ot]tf"))]
    return [path for path in found if not any(word in path.name for word in UNREADABLE)]


def _line(text: str, font: Path, name: str, rng: np.random.Generator) -> tuple[Feed, str]:
    """As many words as fit, drawn light or dark: ``x`` float32 [1, 3, 48, 320], and what they say."""
    face = extra("PIL.ImageFont").truetype(str(font), int(rng.integers(24, 33)))
    words = fitting(text, lambda said: face.getlength(said) <= WIDTH - 16)
    dark = bool(rng.integers(2))
    pixels: Pixels = fade(crop(ground(name), HEIGHT, WIDTH, rng), dark)
    picture = extra("PIL.Image").fromarray(pixels)
    colour = (20, 20, 40) if dark else (245, 245, 235)
    extra("PIL.ImageDraw").Draw(picture).text((8, HEIGHT // 2), words, fill=colour, font=face, anchor="lm")
    length = min(WIDTH, int(face.getlength(words)) + 16)
    return {"x": padded_line(worn(np.asarray(picture)[:, :length], rng), WIDTH)}, words


def worn(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """A line as from a poor camera: seen at 12 to 20 pixels of height, with noise, and enlarged again."""
    image, height = extra("PIL.Image"), int(rng.integers(12, 21))
    small = image.fromarray(pixels).resize((max(1, pixels.shape[1] * height // HEIGHT), height))
    noisy = np.asarray(small) + rng.normal(0, rng.uniform(0, 20), (small.height, small.width, 3))
    seen = image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    return np.asarray(seen.resize((pixels.shape[1], pixels.shape[0])))


def fitting(text: str, fits: Callable[[str], bool]) -> str:
    """The first words of a text that fit, and at least one of them."""
    words = text.split()
    count = next((n for n in range(len(words), 1, -1) if fits(" ".join(words[:n]))), 1)
    return " ".join(words[:count])


def decoded(classes: Array, characters: Sequence[str]) -> str:
    """The text of the best class at each step, of runs of one class only one (CTC, greedily)."""
    kept = np.concatenate([classes[:1], classes[1:][classes[1:] != classes[:-1]]])
    return "".join(characters[index] for index in kept).strip()


def distance(first: str, second: str) -> int:
    """Edits that make one text of the other (Levenshtein)."""
    row = np.arange(len(second) + 1)
    letters = np.array(list(second))
    for count, letter in enumerate(first, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        ahead = np.concatenate([[count], best]) - np.arange(len(second) + 1)
        row = np.minimum.accumulate(ahead) + np.arange(len(second) + 1)
    return int(row[-1])
