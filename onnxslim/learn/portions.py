"""How many samples are computed at a time, from what a few of them are measured to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from onnxslim.learn.door import Device, Tensor, torch
from onnxslim.learn.examples import Lesson

# Bytes that a step may keep for the way back: on processors, and of all that a graphics card has.
MEMORY, CARD = 2 << 30, 0.5


class Portions:
    """Cuts lessons such that no part keeps more than a limit from the way forth for the way back.

    Gradients of parts are added up, so that a step is what it is in one piece, up to rounding.

    Args:
        loss: of a lesson, with a gradient.
        limit: bytes.
    """

    def __init__(self, loss: Callable[[Lesson], Tensor], limit: float) -> None:
        self._loss, self._limit = loss, limit
        self._most: dict[object, int] = {}

    def of(self, lesson: Lesson) -> Iterator[Lesson]:
        """The lesson in parts; as it is where its samples stay together."""
        most = self._at_a_time(lesson) if lesson.apart and lesson.samples > 1 else lesson.samples
        if most >= lesson.samples:
            yield lesson
            return
        for first in range(0, lesson.samples, most):
            yield lesson.rows(slice(first, first + most))

    def _at_a_time(self, lesson: Lesson) -> int:
        shapes = tuple(array.shape[1:] for array in lesson.feeds.values())
        if shapes not in self._most:
            one, two = (self._kept(lesson.rows(slice(count))) for count in (1, 2))
            self._most[shapes] = max(int((self._limit - one) // max(two - one, 1)), 0) + 1
        return self._most[shapes]

    def _kept(self, lesson: Lesson) -> int:
        """Bytes that are kept for the way back, what does not depend on the samples included."""
        seen: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._loss(lesson)
        del loss  # until here no storage that was counted was given back
        return sum(seen.values())


def limit(device: Device, megabytes: float | None) -> float:
    """Bytes that may be kept: so many, or by default what is the same every time on one machine."""
    if megabytes is not None:
        return megabytes * 2**20
    return float(CARD * torch.cuda.get_device_properties(device).total_memory if device == "cuda" else MEMORY)
