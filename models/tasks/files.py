"""Files of packages of Debian: of what type are they."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxslim.models import stage, zoo
from onnxslim.models.inputs import Feed, ends_of
from onnxslim.models.tasks.base import Outputs, Task, first
from onnxslim.models.tasks.estimates import Outcomes

# Of one type, at most so many files are in the test; shorter files say little.
MOST, LEAST_BYTES = 60, 64


class Files(Task):
    """Accuracy of the type of a file, where its ending is the truth.

    The packages of the test are others than those calibrated on. Of these, `calibration` has every second
    file and `unlabelled` the rest.
    """

    name = "files"
    models = ("magika",)
    tested = (
        "files_sphinx",
        "files_go",
        "files_cmake",
        "files_lua",
        "files_bootstrap",
        "files_sounds",
        "files_fonts",
        "files_codes",
        "files_ruby",
        "files_typescript",
        "files_tcl",
    )
    others = ("files_docutils", "files_net", "files_jquery", "files_icons", "fonts_liberation", "mate")
    sources = (*tested, *others)

    def calibration(self, samples: int) -> list[Feed]:
        """Files of other packages, type by type in turn."""
        return self._chosen(0, samples)

    def unlabelled(self, samples: int) -> list[Feed]:
        """The files between them."""
        return self._chosen(1, samples)

    def _chosen(self, start: int, samples: int) -> list[Feed]:
        found = by_turns(files(self.others))[start::2]
        if len(found) < samples:
            raise ValueError(f"{self.name} has {len(found)} such samples, not {samples}")
        return [ends_of(path.read_bytes()) for path in found[:samples]]

    def _make_test(self) -> Sequence[Feed]:
        return [ends_of(path.read_bytes()) for path in self._tested]

    @cached_property
    def _tested(self) -> list[Path]:
        return [path for each in files(self.tested).values() for path in _spread(each, MOST)]

    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """Top-1 accuracy, every type with the same weight but for those with few files."""
        config = json.loads(zoo.asset("magika.config.json").read_text("utf-8"))
        labels = np.array(config["target_labels_space"])
        said = labels[[int(np.argmax(first(found))) for found in outputs]]
        return (Outcomes.of("accuracy", said == np.array([kind(path) for path in self._tested])),)


def kind(path: Path) -> str:
    """What a file is by its ending."""
    return stage.ENDINGS[path.suffix[1:]]


def files(sources: Sequence[str]) -> dict[str, list[Path]]:
    """Files of some sources by type, types and files in order."""
    found: dict[str, list[Path]] = {}
    for source in sources:
        for path in sorted(stage.folder(source).rglob("*.*")):
            if path.suffix[1:] in stage.ENDINGS and path.is_file() and path.stat().st_size >= LEAST_BYTES:
                found.setdefault(kind(path), []).append(path)
    return dict(sorted(found.items()))


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    """Some of the files, evenly spread over all."""
    if len(paths) <= most:
        return list(paths)
    return [paths[int(index)] for index in np.linspace(0, len(paths) - 1, most)]


def by_turns(kinds: dict[str, list[Path]]) -> list[Path]:
    """All files: two of each type, evenly spread, then two more of each that has more."""
    queues = [_shuffled(paths) for paths in kinds.values()]
    return [
        path
        for turn in range(0, max(map(len, queues), default=0), 2)
        for each in queues
        for path in each[turn : turn + 2]
    ]


def _shuffled(paths: Sequence[Path]) -> list[Path]:
    return [paths[index] for index in np.random.default_rng(0).permutation(len(paths))]
