"""Photographs of things, cut out and put before photographs of nature: does a classifier name the thing."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np

from onnxslim.models import stage, zoo
from onnxslim.models.inputs import SCENES, Feed, Pixels, crop, extra, imagenet, photograph
from onnxslim.models.tasks.base import Outputs, Task, first
from onnxslim.models.tasks.estimates import Outcomes
from onnxslim.models.tasks.stamps import STAMPS

# What composites of the test stand before; and what else is seen before the test.
TEST_GROUNDS = (
    "mate/nature/Dune.jpg",
    "mate/nature/Storm.jpg",
    "plasma/OneStandsOut/contents/images/2560x1600.jpg",
    "plasma/Path/contents/images/2560x1600.jpg",
)
OTHER_GROUNDS = (
    "mate/nature/Aqua.jpg",
    "mate/nature/Blinds.jpg",
    "mate/nature/FreshFlower.jpg",
    "mate/nature/Garden.jpg",
    "mate/nature/GreenMeadow.jpg",
    "mate/nature/LadyBird.jpg",
    "mate/nature/RainDrops.jpg",
    "mate/nature/TwoWings.jpg",
    "mate/nature/Wood.jpg",
    "mate/nature/YellowFlower.jpg",
    "plasma/BytheWater/contents/images/2560x1600.jpg",
    "plasma/ColdRipple/contents/images/2560x1600.jpg",
    "plasma/ColorfulCups/contents/images/2560x1600.jpg",
    "plasma/EveningGlow/contents/images/2560x1600.jpg",
    "plasma/FallenLeaf/contents/images/2560x1600.jpg",
    "plasma/Kite/contents/images/2560x1600.jpg",
)
# The root of a thing's width times height, by the side of the picture, in which all of it has to fit. Smaller
# ones are not fair: with a longer side of 0.6, the float network names every second thing only.
SCALES = (0.7, 0.85, 1.0)
# Grounds are no taller: a crop is between a half of that and all.
GROUND_HEIGHT = 640


class Photographs(Task):
    """Top-1 and top-5 accuracy of ImageNet classifiers: each stamp of the table on 4 grounds, at 3 scales.

    Calibrated on crops of other photographs. `unlabelled` has as many crops as composites, of stamps that the
    table leaves out on grounds that the test does not have.
    """

    name = "photographs"
    models = (
        "efficientnet_lite0.dynamo",
        "efficientnet_lite0.torchscript",
        "efficientnet_lite1.dynamo",
        "efficientnet_lite2.dynamo",
    )
    sources = ("stamps", "mate", "plasma")

    @property
    def side(self) -> int:
        """Height and width of the pictures."""
        return zoo.SIDES[self.model.split(".")[0]]

    def calibration(self, samples: int) -> list[Feed]:
        """Crops of photographs, 28 of them in turn."""
        return [imagenet(each) for each in self._crops(samples, np.random.default_rng(0))]

    def unlabelled(self, samples: int) -> list[Feed]:
        """Crops and composites by turns."""
        names, rng = other_stamps(), np.random.default_rng(2)
        found = self._crops(samples, np.random.default_rng(1))
        for index in range(1, samples, 2):
            stamp, name = names[index // 2 % len(names)], OTHER_GROUNDS[index // 2 % len(OTHER_GROUNDS)]
            found[index] = composite(stamp, name, float(rng.uniform(0.5, 1.0)), self.side, rng)
        return [imagenet(each) for each in found]

    def _crops(self, samples: int, rng: np.random.Generator) -> list[Pixels]:
        pictures = [*map(ground, OTHER_GROUNDS), *map(photograph, SCENES)]
        return [crop(pictures[i % len(pictures)], self.side, self.side, rng) for i in range(samples)]

    def _make_test(self) -> Sequence[Feed]:
        return [
            imagenet(composite(stamp, name, scale, self.side, _seeded(stamp, name, scale)))
            for stamp in STAMPS
            for name in TEST_GROUNDS
            for scale in SCALES
        ]

    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """Top-1 and top-5 accuracy; composites of one stamp are one group."""
        each = len(TEST_GROUNDS) * len(SCALES)
        best = np.concatenate([np.argsort(-first(found), axis=1)[:, :5] for found in outputs])
        by_stamp = zip(STAMPS.values(), best.reshape(-1, each, 5), strict=True)
        right = np.concatenate([np.isin(rows, list(classes)) for classes, rows in by_stamp])
        groups = np.repeat(np.arange(len(STAMPS)), each)
        top1, top5 = right[:, 0], np.asarray(right.any(axis=1))
        return Outcomes.of("top-1", top1, groups=groups), Outcomes.of("top-5", top5, groups=groups)


def _seeded(*what: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def other_stamps() -> list[str]:
    """Stamps that are photographs, as far as size tells, and not in the table."""
    files = sorted(stage.folder("stamps").rglob("*.png"))
    names = [file.relative_to(stage.folder("stamps")).as_posix().removesuffix(".png") for file in files]
    return [
        name
        for name, file in zip(names, files, strict=True)
        if name not in STAMPS and "cartoon" not in name and file.stat().st_size > 20_000
    ]


@cache
def ground(name: str) -> Pixels:
    """A photograph that things are put before, ``[640, width, 3]``."""
    source, _, file = name.partition("/")
    picture = extra("PIL.Image").open(stage.folder(source) / file).convert("RGB")
    return np.asarray(picture.resize((GROUND_HEIGHT * picture.width // picture.height, GROUND_HEIGHT)))


def composite(stamp: str, name: str, scale: float, side: int, rng: np.random.Generator) -> Pixels:
    """A stamp somewhere on part of a ground, ``[side, side, 3]``; see `SCALES`."""
    image = extra("PIL.Image")
    thing = image.open(stage.folder("stamps") / f"{stamp}.png").convert("RGBA")
    thing = thing.crop(thing.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())
    factor = min(scale * side / math.sqrt(thing.width * thing.height), side / max(thing.size))
    width, height = (min(side, max(1, round(length * factor))) for length in thing.size)
    thing = thing.resize((width, height), image.Resampling.LANCZOS)
    picture = image.fromarray(crop(ground(name), side, side, rng))
    at = int(rng.integers(0, side - width + 1)), int(rng.integers(0, side - height + 1))
    picture.paste(thing, at, thing)
    return np.asarray(picture)
