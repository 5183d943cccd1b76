"""The bundled networks and their images: what piece of clothing is it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from onnxslim.ir.graph import Array
from onnxslim.models import fashion
from onnxslim.models.inputs import Feed
from onnxslim.models.tasks.base import Outputs, Task, first
from onnxslim.models.tasks.estimates import Outcomes

FOLDER = Path(fashion.__file__).parent


class Fashion(Task):
    """Accuracy on Fashion-MNIST, 2000 test images. Nothing has to be fetched.

    Of the 512 images without labels, `calibration` has the first half and `unlabelled` the second.
    """

    name = "fashion"
    models = ("resnet", "mobilenet", "vit")

    def path(self) -> Path:
        """The file that comes along."""
        return FOLDER / f"{self.model}.onnx"

    def calibration(self, samples: int) -> list[Feed]:
        """Images of the first half."""
        return self._of(_arrays("calibration")["image"][:256], samples)

    def unlabelled(self, samples: int) -> list[Feed]:
        """Images of the second half."""
        return self._of(_arrays("calibration")["image"][256:], samples)

    def _of(self, images: Array, samples: int) -> list[Feed]:
        if samples > len(images):
            raise ValueError(f"{self.name} has {len(images)} such samples, not {samples}")
        return [{"image": images[index : index + 1]} for index in range(samples)]

    def _make_test(self) -> Sequence[Feed]:
        images = _arrays("test")["image"]
        return self._of(images, len(images))

    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """Accuracy."""
        said = np.array([int(np.argmax(first(found))) for found in outputs])
        return (Outcomes.of("accuracy", said == _arrays("test")["label"]),)


@cache
def _arrays(name: str) -> dict[str, Array]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {each: file[each] for each in file.files}
