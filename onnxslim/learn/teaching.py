"""What a model is to learn: what another makes of the same inputs, computed once by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import OutputPart
from onnxslim.calibration.noise import Noise
from onnxslim.calibration.stream import Progress, stream
from onnxslim.ir.graph import MASK_MAGNITUDE, Array
from onnxslim.learn.augment import Augmentation
from onnxslim.learn.door import to_numpy, to_torch, torch
from onnxslim.learn.examples import Examples
from onnxslim.learn.losses import Aim, LossName
from onnxslim.learn.net import Net

# From the number of a batch and its inputs to tensors by name, as `calibration/stream.py::Taps` has them.
RunTeacher = Callable[[int, Mapping[str, Array]], Mapping[str, Array]]
_Lesson: TypeAlias = tuple[Mapping[str, Array], dict[str, Array]]


def taught(
    data: CalibrationData,
    run: RunTeacher,
    parts: Sequence[OutputPart],
    *,
    labels: Array | None = None,
    apart: bool = True,
    progress: Progress | None = None,
    augment: Augmentation | None = None,
) -> tuple[Examples, list[Noise]]:
    """Samples with what the teacher makes of them, and the sums of each part over them, without copies.

    Args:
        data: samples.
        run: the teacher.
        parts: what is wanted of it.
        labels: the class of every sample, kept under an empty name.
        apart: whether the model computes each sample by itself.
        progress: called with (what, batches done, batches in all).
        augment: makes copies of the samples, which are samples too; None for none.
    """
    examples, sums = Examples(), [Noise() for _ in parts]
    names = list(dict.fromkeys(part.output for part in parts))

    for copy in range(1 if augment is None else 1 + augment.copies):

        def lesson(at: int, given: Mapping[str, Array], copy: int = copy) -> _Lesson:
            feeds = given if augment is None else augment(copy, at, given)
            made = run(at, feeds)
            return feeds, {name: made[name] for name in names}

        for batch in stream(data, lesson, progress=progress, what="asking the teacher"):
            feeds, wanted = batch.values
            for part, each in zip(parts, sums if not copy else (), strict=not copy):
                values = _counted(part.of(wanted))
                each.add(values, values)
            if labels is not None:
                wanted[""] = labels[batch.first : batch.first + batch.samples]
            examples.add(feeds, wanted, apart=apart)
    return examples, sums


def _counted(values: Array) -> Array:
    """Elements that say something: finite, and no masks."""
    wide = values.astype(np.float64)
    return wide[np.abs(wide) < MASK_MAGNITUDE]


def goals(
    parts: Sequence[OutputPart], sums: Sequence[Noise], loss: LossName, outputs: Sequence[str]
) -> list[Aim]:
    """What is to come close to what; tensors inside always by their relative error.

    Args:
        parts: of outputs, and tensors inside.
        sums: over the examples, of each part.
        loss: for outputs.
        outputs: their names.
    """
    return [
        Aim(part, loss if part.output in outputs else "relative", _variation(each))
        for part, each in zip(parts, sums, strict=True)
    ]


def _variation(sums: Noise) -> float:
    """Mean square around the mean, or of what does not vary around zero."""
    return (sums.variation or sums.signal) / max(sums.size, 1) or 1.0


def computed(net: Net, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What a net makes of a batch."""
    with torch.no_grad():
        found = net({name: to_torch(array) for name, array in feeds.items()})
    return {name: to_numpy(each) for name, each in found.items()}
