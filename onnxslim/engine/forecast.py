"""How long passes will take, about: what they took on other models, for a model of this size and speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.feeds import batch_samples
from onnxslim.engine.base import Pass
from onnxslim.errors import OnnxSlimError
from onnxslim.ir.model import Model
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

# Seconds that runs are timed for, one run at least.
SECONDS = 0.1


@dataclass(frozen=True)
class Forecast:
    """Seconds that passes will take, about: within three times of it on the models it was made by.

    Attributes:
        names: of the passes, in order.
        seconds: of each.
        per_sample: seconds of one run of the model, for one sample; 0 where none was made.
    """

    names: tuple[str, ...]
    seconds: tuple[float, ...]
    per_sample: float = 0.0

    @classmethod
    def of(
        cls, passes: Sequence[Pass], model: Model, data: CalibrationData | None, target: Target
    ) -> Forecast | None:
        """For a model and data; None where that cannot be told, as the model does not run on them.

        Args:
            passes: in order.
            model: run a few times, unless no pass takes long.
            data: calibration samples; None takes no run.
            target: where it runs.
        """
        per_sample, samples = 0.0, 0
        if data is not None and any(each.work.runs + each.work.samples for each in passes):
            try:
                per_sample, samples = _seconds_per_sample(model, data, target), data.samples()
            except OnnxSlimError:
                return None
        seconds = tuple(_seconds(passes, model, per_sample, samples))
        return cls(tuple(each.name for each in passes), seconds, per_sample)

    @property
    def total(self) -> float:
        """Of all passes."""
        return sum(self.seconds)


def _seconds(passes: Sequence[Pass], model: Model, per_sample: float, samples: int) -> Iterator[float]:
    stats = model.stats()
    for each in passes:
        work = each.work
        yield (
            work.seconds
            + work.per_node * stats.nodes
            + (work.runs * samples + work.samples) * per_sample
            + (work.per_parameter * stats.parameters if samples else 0.0)
        )


def _seconds_per_sample(model: Model, data: CalibrationData, target: Target) -> float:
    feeds = next(iter(data.bind(model.inputs())))
    # Nobody knows yet whether this model ends the process that runs it.
    session = Session(model, target, spin=False, once=True)
    taken: list[float] = []
    while sum(taken) < SECONDS:
        start = time.perf_counter()
        session.run(feeds)
        taken.append(time.perf_counter() - start)
    return min(taken) / max(batch_samples(feeds), 1)
