"""Weights learnt from examples: the best state on samples that nothing was fitted to, the start included."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from onnxslim.calibration.stream import Progress
from onnxslim.errors import TimeUp, UsageError
from onnxslim.ir.graph import Array, Node
from onnxslim.learn.checkpoint import Checkpoint
from onnxslim.learn.door import Device, Tensor, UnknownError, to_numpy, to_torch, torch
from onnxslim.learn.examples import Examples, Lesson
from onnxslim.learn.losses import Aim, loss_of
from onnxslim.learn.net import Net, refusal
from onnxslim.learn.optimizer import RelativeAdam
from onnxslim.learn.portions import Portions, limit
from onnxslim.learn.processes import Processes, together
from onnxslim.learn.rows import full_precision

Precision: TypeAlias = Literal["single", "bfloat16"]

# The share of the steps in which the rate comes up, and how often on the way states are judged.
WARM_UP, LOOKS = 10, 6
# Shares of the rate that are tried in turn, as long as no state was better than the start.
RATES = (1.0, 1 / 3)
# A model that is so close to its teacher has nothing to learn from it.
LEARNT_ALREADY = 1e-9
# What went wrong is not waited for any longer.
HOPELESS, SLACK = 10.0, 1.0


@dataclass(frozen=True)
class Course:
    """How to learn.

    Attributes:
        steps: how many.
        rate: the largest step, relative to the size of each weight.
        batch: samples for a step.
        seed: of the order of samples.
        threads: of PyTorch; results are the same for the same number. 0: as it is.
        label: the output that scores classes, if there are labels.
        device: that the net and what is made meanwhile is on (`onnxslim/learn/door.py::on`).
        precision: of products on the way forth, in steps; states are judged in single precision.
        memory: MB that a step may keep for the way back; by default see `onnxslim/learn/portions.py::limit`.
    """

    steps: int
    rate: float
    batch: int = 64
    seed: int = 0
    threads: int = 0
    label: str | None = None
    device: Device = "cpu"
    precision: Precision = "single"
    memory: float | None = None


@dataclass(frozen=True)
class Look:
    """What a state was worth.

    Attributes:
        step: after so many.
        rate: the largest of the attempt.
        loss: mean over the steps since the last look; not a number for the start.
        unseen: on the samples to judge by.
    """

    step: int
    rate: float
    loss: float
    unseen: float


@dataclass
class Learnt:
    """What came of it.

    Attributes:
        looks: at all states, in order; the first is the start.
        best: the one that was kept.
        values: of the parameters then.
        notes: on what went wrong, in sentences without a full stop.
        idle: parameters that no gradient came to, by their number, and the node that was in the way; None
            where it was always zero.
        threads: of PyTorch.
    """

    looks: list[Look]
    best: Look
    values: list[Array]
    notes: list[str] = field(default_factory=list)
    idle: dict[int, Node | None] = field(default_factory=dict)
    threads: int = 0

    @property
    def improved(self) -> bool:
        """Whether a state was better than the start."""
        return self.best is not self.looks[0]


@contextmanager
def _threads(count: int) -> Iterator[int]:
    """So many threads of PyTorch, for the time being."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def fit(
    net: Net,
    wanted: Sequence[Aim],
    learnt_from: Examples,
    judged_by: Examples,
    course: Course,
    progress: Progress | None = None,
    masks: Sequence[Array | None] = (),
    checkpoint: Path | None = None,
    confine: Callable[[], None] | None = None,
) -> Learnt:
    """Learn the parameters of a net.

    Where no state is better than the start, it is tried once more with lower steps. What it has at that time
    is returned when the time is up. Processes that torchrun started share the samples of every step and come
    to the same.

    Args:
        net: its parameters are changed in place.
        wanted: what is to come close to what.
        learnt_from, judged_by: examples, of which the latter alone decide.
        course: how.
        progress: called with what is done, steps done and steps in all.
        masks: for each parameter, where it may change; None where everywhere. None at all by default.
        checkpoint: file to keep the state in, once a minute, and to go on from, if it is there.
        confine: called after every step, to bring the parameters back to where they may be.

    Raises:
        UsageError: the file is of something else; several processes start from different weights or samples.
        SaveError: it cannot be written.
        UnknownError: PyTorch does not compute the net on these samples.
    """
    with _threads(course.threads) as threads, together(course.device) as processes:
        fitting = _Fitting(
            net, wanted, learnt_from, judged_by, course, processes, progress, masks, checkpoint, confine
        )
        try:
            if not math.isfinite(fitting.best.unseen):
                fitting.notes.append("the start is no number on the samples to judge by")
            elif fitting.best.unseen < LEARNT_ALREADY:
                fitting.notes.append("the model computes what its teacher does: there is nothing to learn")
            else:
                fitting.attempts()
        except TimeUp as error:
            fitting.save()
            fitting.notes.append(str(error))
        return fitting.learnt(threads)


class _Fitting:
    """The state of learning; see `fit`."""

    def __init__(
        self,
        net: Net,
        wanted: Sequence[Aim],
        learnt_from: Examples,
        judged_by: Examples,
        course: Course,
        processes: Processes,
        progress: Progress | None,
        masks: Sequence[Array | None],
        checkpoint: Path | None,
        confine: Callable[[], None] | None,
    ) -> None:
        self._processes, self._late = processes, ""
        self._parts = Portions(self._loss, limit(course.device, course.memory))
        self._net, self._wanted, self._course, self._progress = net, wanted, course, progress
        self._examples, self._judges = learnt_from, judged_by
        self._start = [each.detach().clone() for each in net.parameters]
        self._values = self._start
        self._confine = confine
        self._masks = [None if each is None else to_torch(each) for each in masks]
        self.notes: list[str] = []
        self._idle: dict[int, Node | None] | None = None
        self.best = Look(0, course.rate, math.nan, self._judge())
        self.looks = [self.best]
        self._number, self._step, self._losses = 0, 0, list[float]()
        self._optimizer = RelativeAdam(net.parameters)
        key = self._key()
        self._require_alike(key, "what comes before depends on the machine: learn from a file that it made")
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint, key)

    def _require_alike(self, what: str, advice: str) -> None:
        if not self._processes.agree(what):
            raise UsageError(f"processes that learn together start from different states: {advice}")

    @property
    def learns(self) -> bool:
        """Whether a gradient came to any parameter."""
        return len(self._idle or ()) < len(self._net.parameters)

    def learnt(self, threads: int) -> Learnt:
        values = [to_numpy(each.contiguous()) for each in self._values]
        return Learnt(self.looks, self.best, values, self.notes, self._idle or {}, threads)

    def attempts(self) -> None:
        """At the rate that was asked for, and if that is in vain at a lower one."""
        state = self._checkpoint.read() if self._checkpoint is not None else None
        found = "none" if state is None else str(state["at"])
        self._require_alike(found, "the checkpoint has to lie where all of them find it")
        if state is not None:
            self._restore(state)
        while self._number < len(RATES):
            rate = self._course.rate * RATES[self._number]
            self._attempt(rate)
            if self.best is not self.looks[0] or not self.learns:
                break
            self.notes.append(f"no state was better than the start at a rate of {rate:g}")
            self._number, self._step, self._losses = self._number + 1, 0, []
        if self._checkpoint is not None and not self._processes.rank:
            self._checkpoint.remove()

    def _attempt(self, rate: float) -> None:
        """All steps at one rate, from the start on, or from where it was."""
        steps = self._course.steps
        lessons = self._examples.steps(self._course.batch, np.random.default_rng(self._course.seed))
        if not self._step:
            self._set(self._start)
            self._optimizer = RelativeAdam(self._net.parameters)
        every = max(steps // LOOKS, 1)
        for step, lesson in islice(enumerate(lessons), self._step, steps):
            self._losses.append(self._backward(lesson))
            if not self.learns or self._went_wrong(step, self._losses):
                return
            self._mask()
            self._optimizer.step(rate * _share(step, steps))
            if self._confine is not None:
                self._confine()
            if (step + 1) % every == 0 or step + 1 == steps:
                self._look(step + 1, rate, self._losses)
            self._step = step + 1
            if self._checkpoint is not None and self._checkpoint.due:
                self.save()
            self._tell(step + 1, self._losses)

    # Interrupted

    def save(self) -> None:
        """Keep the state, if that was asked for."""
        if self._checkpoint is None or not self._step or self._processes.rank:
            return
        state = {
            "at": np.array([self._number, self._step, self.looks.index(self.best)]),
            "losses": np.array(self._losses),
            "looks": np.array([(each.step, each.rate, each.loss, each.unseen) for each in self.looks]),
            "notes": np.array(self.notes, np.str_),
        }
        for name, tensors in self._tensors().items():
            state |= {f"{name}{at}": to_numpy(each) for at, each in enumerate(tensors)}
        self._checkpoint.write(state)

    def _restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a state; what learns nothing shows in the first step, which is looked at again."""
        first = next(self._examples.steps(self._course.batch, np.random.default_rng(self._course.seed)))
        self._backward(first)
        for parameter in self._net.parameters:
            parameter.grad = None
        self._number, self._step, best = (int(each) for each in state["at"])
        self._losses, self._optimizer.steps = state["losses"].tolist(), self._step
        self.looks = [Look(int(step), *rest) for step, *rest in state["looks"].tolist()]
        self.best, self.notes = self.looks[best], state["notes"].tolist()
        self._values = [each.clone() for each in self._start]
        with torch.no_grad():
            for name, tensors in self._tensors().items():
                for at, tensor in enumerate(tensors):
                    tensor.copy_(to_torch(state[f"{name}{at}"]))

    def _tensors(self) -> dict[str, Sequence[Tensor]]:
        """All that a state has of tensors."""
        first, second = self._optimizer.moments
        parameters = self._net.parameters
        return {"parameter": parameters, "first": first, "second": second, "best": self._values}

    def _key(self) -> str:
        """What is learnt, from what and how."""
        digest = hashlib.sha256(repr((self._course, len(self._examples), self.best.unseen)).encode())
        for each in self._start:
            digest.update(to_numpy(each).tobytes())
        first = next(self._examples.steps(self._course.batch, np.random.default_rng(self._course.seed)))
        for lesson in first:  # copies that were made otherwise show there
            for array in (*lesson.feeds.values(), *lesson.wanted.values()):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _backward(self, lessons: Sequence[Lesson]) -> float:
        """Gradients of the mean over some samples; the loss.

        Raises:
            TimeUp: the time was up for one of several processes.
        """
        total, samples = 0.0, sum(each.samples for each in lessons)
        for lesson in self._shares(lessons):
            for part in self._parts.of(lesson):
                loss = self._loss(part)
                share = part.samples / samples
                if loss.requires_grad:
                    self._back(loss if share == 1.0 else loss * share)
                total += float(loss.detach()) * share
        total, late = self._processes.sums([total, float(bool(self._late))], self._net.parameters)
        if self._idle is None:
            self._note_idle()
        if late:
            raise TimeUp(self._late or "the time of another process was up")
        return total

    @staticmethod
    def _back(loss: Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            raise UnknownError(f"no gradients: {refusal(error)}") from error

    def _shares(self, lessons: Iterable[Lesson]) -> Iterator[Lesson]:
        """What this process computes of them."""
        shares = (self._processes.share(at, lesson) for at, lesson in enumerate(lessons))
        return (each for each in shares if each is not None)

    def _loss(self, lesson: Lesson, precision: Precision | None = None) -> Tensor:
        feeds = {name: to_torch(array) for name, array in lesson.feeds.items()}
        goal = {name: to_torch(array) for name, array in lesson.wanted.items()}
        half = (precision or self._course.precision) == "bfloat16"
        with torch.autocast(self._course.device, torch.bfloat16, enabled=half):
            found = self._net(feeds)
        found = {name: full_precision(each) for name, each in found.items()}
        return loss_of(self._wanted, found, goal, self._course.label)

    def _judge(self) -> float:
        """The loss on samples to judge by."""
        total = 0.0
        with torch.no_grad():
            for lesson in self._shares(self._judges.in_order(self._course.batch)):
                total += float(self._loss(lesson, "single")) * lesson.samples
        (total,) = self._processes.sums([total])
        return total / max(len(self._judges), 1)

    def _went_wrong(self, step: int, losses: Sequence[float]) -> bool:
        wrong = not math.isfinite(losses[-1]) or losses[-1] > HOPELESS * losses[0] + SLACK
        if wrong:
            self.notes.append(f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in step {step + 1}")
        return wrong

    def _look(self, step: int, rate: float, losses: Sequence[float]) -> None:
        before = max((each.step for each in self.looks if each.rate == rate and each.step < step), default=0)
        with self._rounded() as values:
            look = Look(step, rate, float(np.mean(losses[before:])), self._judge())
        self.looks.append(look)
        if look.unseen < self.best.unseen:
            self.best, self._values = look, values

    @contextmanager
    def _rounded(self) -> Iterator[list[Tensor]]:
        """Copies of the parameters, which are what the model can hold of them meanwhile."""
        exact = [each.detach().clone() for each in self._net.parameters]
        values = [each.to(kind).to(each.dtype) for each, kind in zip(exact, self._net.kinds, strict=True)]
        self._set(values)
        try:
            yield values
        finally:
            self._set(exact)

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._net.parameters, values, strict=True):
                parameter.copy_(value)

    def _mask(self) -> None:
        """Let nothing go where it may not."""
        for parameter, mask in zip(self._net.parameters, self._masks, strict=False):
            if mask is not None and parameter.grad is not None:
                parameter.grad.mul_(mask)

    def _tell(self, step: int, losses: Sequence[float]) -> None:
        if self._progress is not None:
            told = f"loss {losses[-1]:.3g}, {self.looks[-1].unseen:.3g} unseen: step"
            try:
                self._progress(told, step, self._course.steps)
            except TimeUp as error:
                if self._processes.count == 1:
                    raise
                self._late = str(error)  # the others wait for what this one has of the next step

    def _note_idle(self) -> None:
        """Which parameters nothing came to in the first step."""
        self._idle = {
            at: self._net.in_the_way(at)
            for at, each in enumerate(self._net.parameters)
            if each.grad is None or not bool(each.grad.any())
        }


def _share(step: int, steps: int) -> float:
    """Of the largest rate: up in the first steps, then down as a cosine."""
    warm = max(min(WARM_UP, steps // 2), 1)
    return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2
