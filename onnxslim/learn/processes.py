"""Several processes that learn the same together, each from its share of every step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from onnxslim.learn.door import Device, Tensor, torch
from onnxslim.learn.examples import Lesson


class Processes:
    """One process among those that learn together, with the same parameters in all of them.

    Args:
        rank: number of this one.
        count: of all.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def share(self, at: int, lesson: Lesson) -> Lesson | None:
        """What this process computes: some of the samples, or where they stay together all or none.

        Args:
            at: number of the lesson.
        """
        if self.count == 1:
            return lesson
        if not lesson.apart:
            return lesson if at % self.count == self.rank else None
        mine = lesson.rows(slice(self.rank, None, self.count))
        return mine if mine.samples else None

    def sums(self, numbers: Sequence[float], parameters: Sequence[Tensor] = ()) -> list[float]:
        """Numbers, and in place gradients of parameters, summed over all processes.

        Args:
            numbers: the same in number everywhere.
            parameters: without a gradient where nothing came to them.
        """
        if self.count == 1:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(told)
        for each in parameters:
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        if parameters:
            flat = torch.cat([each.grad.reshape(-1) for each in parameters])
            torch.distributed.all_reduce(flat)
            parts = flat.split([each.numel() for each in parameters])
            for each, part in zip(parameters, parts, strict=True):
                each.grad.copy_(part.reshape(each.shape))
        return [float(each) for each in told.tolist()]

    def agree(self, text: str) -> bool:
        """Whether all processes have the same text."""
        if self.count == 1:
            return True
        number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        ends = torch.tensor([number, -number])
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        return bool(ends[0] == -ends[1])


@contextmanager
def together(device: Device) -> Iterator[Processes]:
    """Those that torchrun started; this one alone, if it did not start it."""
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        yield Processes()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
